"""The streamed loss of attention weights against the dense one, its memory, and distillation by it."""

import copy
import math

import pytest
import torch
from convert.toy_mechanisms import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import subquad
from subquad import InputError, Rotary
from subquad.convert import mimic
from subquad.convert.distill import distill
from subquad.convert.recipe import linearize
from subquad.convert.swap import swap, swapped

CASES = {
    "hedgehog": ("hedgehog", {}),
    "hedgehog-exp": ("hedgehog", {"feature_map": "exp"}),
    "hedgehog-softmax2": ("hedgehog", {"feature_map": "softmax2", "feature_dim": 3}),
    "hedgehog-encoder": ("hedgehog", {"causal": False}),
    "lolcats": ("lolcats", {"window": 5, "feature_dim": 6}),
    "lolcats-sinks": ("lolcats", {"window": 5, "sinks": 3, "feature_dim": 6}),
    "lolcats-unturned": ("lolcats", {"window": 5, "sinks": 1, "feature_dim": 6, "far_rotary": False}),
    "lolcats-terrace": ("lolcats", {"window": 4, "window_form": "tk", "affine_factors": True, "feature_dim": 8}),
}
every = pytest.mark.parametrize("case", CASES)


def made(case, dtype, heads=4, kv_heads=2, head_dim=8):
    name, options = CASES[case]
    module = subquad.attention(name, heads, head_dim, kv_heads=kv_heads, **options).to(dtype)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    return module


def inputs(tokens, dtype, rows=2, head_dim=8):
    q, k = torch.randn(rows, tokens, 4, head_dim, dtype=dtype), torch.randn(rows, tokens, 2, head_dim, dtype=dtype)
    angles = torch.outer(torch.arange(tokens, dtype=dtype), torch.rand(head_dim // 2, dtype=dtype)).repeat(1, 2)
    return 2 * q, 2 * k, Rotary(angles.cos(), angles.sin())


def dense(module, q, k, rotary):
    """−Σ p log a with both maps written out; a are the outputs of the mechanism's definition on values that are unit vectors."""
    tokens = q.shape[1]
    units = torch.eye(tokens, dtype=q.dtype)[None, :, None].expand(q.shape[0], tokens, module.kv_heads, tokens)
    a = subquad.reference(module.card.name)(module, q, k, units, rotary=rotary).transpose(1, 2)
    q, k = subquad.rotary.rotate(rotary, q, k)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, 2)) / math.sqrt(q.shape[-1])
    if getattr(module, "causal", True):
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    return -(scores.softmax(-1) * a.clamp_min(1e-12).log()).sum(-1).mean()


def graded(module, loss):
    module.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("budget", [1, 600, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"])
@every
def test_streamed_is_dense(case, dtype, tolerance, budget, monkeypatch):
    monkeypatch.setitem(mimic.BUDGET, "cpu", budget)
    module = made(case, dtype)
    q, k, rotary = inputs(37, dtype)
    loss, expected = mimic.weights_loss(module, q, k, rotary=rotary), dense(module, q, k, rotary)
    assert abs(loss.item() - expected.item()) <= tolerance * expected.item()
    for found, right in zip(graded(module, loss), graded(module, expected)):
        assert (found - right).abs().max() <= 10 * tolerance * max(1, right.abs().max())


@every
def test_packed_sequences_count_alike(case, monkeypatch):
    monkeypatch.setitem(mimic.BUDGET, "cpu", 300)
    module, lengths = made(case, torch.float64), (11, 0, 1, 23)
    q, k, _ = inputs(sum(lengths), torch.float64, rows=1)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = mimic.weights_loss(module, q, k, cu_seqlens=ends)
    parts = [dense(module, q[:, a : a + n], k[:, a : a + n], None) * n for a, n in zip(ends.tolist(), lengths) if n]
    expected = sum(parts) / sum(lengths)
    assert packed.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, right in zip(graded(module, packed), graded(module, expected)):
        assert (found - right).abs().max() <= 1e-11


@pytest.mark.parametrize("causal", [True, False])
def test_the_least_loss_is_the_entropy_of_softmax(causal):
    """φ of zero maps is constant, so a is uniform; with q = 0 so is p, and nothing can be learnt."""
    module = subquad.attention("hedgehog", 2, 4, causal=causal).double()
    torch.nn.init.zeros_(module.W_q), torch.nn.init.zeros_(module.W_k)
    q = k = torch.zeros(1, 6, 2, 4, dtype=torch.float64)
    entropy = sum(map(math.log, range(1, 7))) / 6 if causal else math.log(6)
    loss = mimic.weights_loss(module, q, k)
    assert loss.item() == pytest.approx(entropy, abs=1e-9)
    assert all(g.abs().max() < 1e-9 for g in graded(module, loss))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.numel = max(self.numel, x.numel())
        return out


@every
def test_no_tensor_grows_with_the_square_of_the_tokens(case, monkeypatch):
    monkeypatch.setitem(mimic.BUDGET, "cpu", 16 * 4 * 512)  # 16 queries of 512 tokens
    module = made(case, torch.float32)
    q, k, rotary = inputs(512, torch.float32, rows=1)
    with Largest() as largest:
        mimic.weights_loss(module, q, k, rotary=rotary).backward()
    assert 16 * 4 * 512 <= largest.numel <= 2 * 16 * 4 * 512 < 4 * 512 * 512


def test_layers_learn_to_attend_alike():
    teacher, tokens = tiny_llama(), torch.randint(97, (600,))
    student = swap(copy.deepcopy(teacher), "hedgehog")
    result = distill(student, teacher, tokens, steps=40, batch=2, length=32, lr=5e-2, objective="weights", progress=False)
    assert result.losses[-1] < 0.97 * result.losses[0]
    caught = {}
    for index, module in swapped(student).items():
        module.mechanism.register_forward_hook(
            lambda m, args, kwargs, out, index=index: caught.update({index: (m, args, kwargs)}), with_kwargs=True
        )
    with torch.no_grad():
        student(tokens[None, :32])
        mechanism, (q, k, _), kwargs = caught[0]  # the first layer sees the same inputs in both models
        after = dense(mechanism, q, k, kwargs["rotary"])
        fresh = subquad.attention("hedgehog", mechanism.heads, mechanism.head_dim, kv_heads=mechanism.kv_heads)
        assert after < 0.97 * dense(fresh, q, k, kwargs["rotary"])


def test_losses_are_those_of_the_layers_inputs_and_padding_does_not_count():
    teacher = tiny_llama()
    row = torch.randint(1, 97, (1, 20))
    padded = {"input_ids": torch.nn.functional.pad(row, (7, 0)), "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (7, 0)),
              "position_ids": torch.nn.functional.pad(torch.arange(20)[None], (7, 0))}  # fmt: skip
    found = []
    for batch in (row, padded):
        student = swap(copy.deepcopy(teacher), "lolcats", window=4)
        found.append(distill(student, teacher, [batch], steps=1, objective="weights", progress=False))
    assert found[0].tokens == found[1].tokens == 20
    assert found[1].losses == pytest.approx(found[0].losses, rel=1e-5)
    student = swap(copy.deepcopy(teacher), "lolcats", window=4)
    hidden = teacher.model(row, output_hidden_states=True).hidden_states
    angles = teacher.model.rotary_emb(hidden[0], torch.arange(20)[None])
    for index, module in swapped(student).items():
        attention = teacher.model.layers[index].self_attn
        x = teacher.model.layers[index].input_layernorm(hidden[index])
        q, k = (project(x).unflatten(-1, (-1, 8)) for project in (attention.q_proj, attention.k_proj))
        expected = dense(module.mechanism, q, k, Rotary(angles[0][0], angles[1][0]))
        assert found[0].layer_losses[index][0] == pytest.approx(expected.item(), rel=1e-5)


def test_what_has_no_weights_to_teach_is_refused():
    teacher = tiny_llama()
    with pytest.raises(InputError, match=r"objective: got 'weights' for gla; .*hedgehog, lolcats"):
        distill(swap(copy.deepcopy(teacher), "gla"), teacher, torch.arange(64), steps=1, length=8, objective="weights")
    student = swap(copy.deepcopy(teacher), "hedgehog")
    with pytest.raises(InputError, match="objective: got 'output_weights'"):
        distill(student, teacher, torch.arange(64), steps=1, length=8, objective="output_weights")
    with pytest.raises(InputError, match="hedgehog, lolcats"):
        mimic.weights_loss(subquad.attention("softmax", 2, 8), *(torch.zeros(1, 3, 2, 8) for _ in range(2)))


def tiny_mistral(window):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=window, initializer_range=0.3)).eval()


def test_a_softmax_with_a_bias_is_refused():
    from transformers import SwinConfig, SwinModel

    teacher = SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[2], window_size=4))
    images = [{"pixel_values": torch.zeros(1, 3, 16, 16)}]
    with pytest.raises(InputError, match="whose original has a position bias"):
        distill(swap(copy.deepcopy(teacher), "hedgehog"), teacher, images, steps=1, objective="weights")


def test_a_window_is_taken_where_it_holds_the_sequences_whole(tokens):
    sliding, full, ids = tiny_mistral(8), tiny_mistral(None), tokens[None, :9]
    with torch.no_grad():
        near, whole = sliding(ids, use_cache=False).logits, full(ids, use_cache=False).logits
    torch.testing.assert_close(near[:, :8], whole[:, :8])
    assert (near[:, 8] - whole[:, 8]).abs().max() > 1e-3  # of nine tokens the last does not see the first
    options = {"steps": 3, "batch": 2, "objective": "weights", "progress": False}
    losses = [distill(swap(model, "hedgehog"), model, tokens, length=8, **options).losses for model in (sliding, full)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for data, length, words in (
        (tokens, 9, "a window of 8, for a length of 9; expected 'output', or token ids and a length of at most 8"),
        ([tokens[None, :8]], 8, "a window of 8, for batches of any length"),
    ):
        with pytest.raises(InputError, match=f"objective: got 'weights' for model.layers.0.self_attn, whose original has {words}"):
            distill(sliding, sliding, data, length=length, **options)


def test_the_recipe_is_carried_out_within_a_window(tokens):
    options = {"steps": {"transfer": 1, "finetune": 1}, "batch": 8, "progress": False}
    for layers in ("all", "auto:1"):
        model = tiny_mistral(8)
        with pytest.raises(InputError, match="a window of 8, for a length of 9"):
            linearize(model, "hedgehog", tokens, layers=layers, length=9, **options)
        assert not swapped(model)
        assert linearize(model, "hedgehog", tokens, layers=layers, length=8, **options).transfer.steps == 1
