"""Gradient checkpointing in fine-tuning: less is kept for the backward pass, and what is learnt is the same, without dropout."""

import copy

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

from subquad.convert.finetune import _Engine, finetune
from subquad.convert.lora import adapters
from subquad.convert.swap import swap, swapped


def tiny_opt():
    """Its layers drop hidden states out by their own mode, not by that of a module in them."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.5, attention_dropout=0.5, max_position_embeddings=64, init_std=0.3))


MODELS = {
    "llama": lambda: tiny_llama(attention_dropout=0.5),
    "swapped": lambda: swap(tiny_llama(attention_dropout=0.5), "hedgehog", layers=[0, 2]),
    "opt": tiny_opt,
}


class Kept:
    """Bytes of what autograd keeps at once, at most."""

    def __init__(self):
        self.now = self.most = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: Held(self, x), lambda held: held.tensor)


class Held:
    def __init__(self, kept, tensor):
        self.kept, self.tensor = kept, tensor
        kept.now += tensor.nbytes
        kept.most = max(kept.most, kept.now)

    def __del__(self):
        self.kept.now -= self.tensor.nbytes


def enable(model, **options):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options or None)
    return model


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}], ids=["", "reentrant"])
@pytest.mark.parametrize("loss", ["next-token", "kl"])
@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept_and_the_same_is_learnt(name, loss, options, tokens):
    torch.manual_seed(0)
    plain = MODELS[name]().train()
    found = []
    for model in (copy.deepcopy(plain), enable(copy.deepcopy(plain), **options)):
        kept = Kept()
        with kept.hooks:
            result = finetune(
                model, tokens, steps=3, batch=2, length=32, lr=1e-2, targets=("q_proj", "v_proj"), loss=loss, kl_weight=0.5,
                train_mechanism=bool(swapped(model)), progress=False,
            )  # fmt: skip
        learnt = {key: p.detach() for key, p in model.named_parameters() if ".lora_" in key or ".mechanism." in key}
        found.append((result.losses, learnt, kept.most))
    (losses, learnt, most), (again, same, less) = found
    assert adapters(model) and len(set(losses)) == 3
    assert again == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(same, learnt, rtol=1e-5, atol=1e-7)
    assert less < most / 2


def test_layers_are_computed_twice_and_in_evaluation_mode(tokens):
    model, modes = enable(tiny_llama()).train(), []
    first = model.model.layers[0]
    held, before = first._gradient_checkpointing_func, list(model.modules())
    first.mlp.register_forward_pre_hook(lambda *_: modes.append((first.training, first.mlp.training)))
    finetune(model, tokens, steps=2, length=16, progress=False)
    assert modes == [(False, False)] * 4
    assert all(module.training for module in before)
    assert first._gradient_checkpointing_func is held


def test_checkpointed_steps_are_not_captured():
    assert _Engine(tiny_llama(), "float32").graphs and not _Engine(enable(tiny_llama()), "float32").graphs
