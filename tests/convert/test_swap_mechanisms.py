"""Every registered mechanism in a tiny model: cached and whole, padded and alone, saved and loaded agree."""

import pytest
import torch

import subquad
from subquad.convert.swap import swapped

pytestmark = pytest.mark.filterwarnings("ignore")
CAUSAL = [name for name, card in subquad.mechanisms().items() if card.causal]
BIDIRECTIONAL = [name for name, card in subquad.mechanisms().items() if card.bidirectional]


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def close(a, b, tolerance=1e-4):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def same_tokens(a, b, model):
    """Greedy tokens agree up to the first near-tie: there the two runs part for good reason."""
    for one, two in zip(a, b):
        differ = (one != two).nonzero()
        if len(differ):
            best = logits(model, two[None, : differ[0]]).squeeze(0)[-1].topk(2).values
            assert best[0] - best[1] < 1e-3


@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder(decoder, name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = subquad.swap(decoder("qwen3"), name, layers="3:1"), torch.randint(5, 97, (2, 14))
    whole = logits(model, ids, use_cache=False)
    with torch.no_grad():
        out = model(ids[:, :6])
        parts = [out.logits]
        for start, stop in ((6, 10), (10, 11), (11, 12), (12, 14)):
            out = model(ids[:, start:stop], past_key_values=out.past_key_values)
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, alone = ids.masked_fill(mask == 0, 0), logits(model, ids[:1, 5:])
    close(logits(model, padded, attention_mask=mask)[0, 5:], alone[0])
    with torch.no_grad():  # the first chunk of row 0 is nothing but padding
        out = model(padded[:, :4], attention_mask=mask[:, :4])
        out = model(padded[:, 4:10], attention_mask=mask[:, :10], past_key_values=out.past_key_values)
        last = model(padded[:, 10:], attention_mask=mask, past_key_values=out.past_key_values)
    close(last.logits, torch.stack([alone[0, -4:], whole[1, -4:]]))
    greedy = {"max_new_tokens": 8, "do_sample": False}
    generated = model.generate(padded, attention_mask=mask, **greedy)
    same_tokens(generated[:1, 5:], model.generate(ids[:1, 5:], use_cache=False, **greedy), model)
    same_tokens(model.generate(ids[:1], prompt_lookup_num_tokens=3, **greedy), model.generate(ids[:1], **greedy), model)
    model.generate(ids, num_beams=2, **greedy)
    model.save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ids), whole, 1e-6)


@pytest.mark.parametrize("name", [name for name in CAUSAL if subquad.card(name).recurrent])
def test_a_fixed_state_does_not_grow(decoder, name):
    model, ids = subquad.swap(decoder(), name), torch.randint(5, 97, (1, 70))
    sizes = set()
    for count in (2, 40):
        out = model.generate(ids, max_new_tokens=count, do_sample=False, return_dict_in_generate=True)
        sizes.add(out.past_key_values.nbytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("name", CAUSAL)
def test_a_sixteen_bit_decoder_trains(decoder, name):
    model, ids = subquad.swap(decoder().to(torch.bfloat16), name).train(), torch.randint(5, 97, (2, 9))
    model(ids, labels=ids).loss.backward()
    for module in swapped(model).values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_encoders(name):
    from timm.models.vision_transformer import VisionTransformer
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
    }
    models = [
        ViTForImageClassification(ViTConfig(**sizes)),
        VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=2, reg_tokens=2),
    ]
    images = torch.randn(2, 3, 32, 32)
    for model in models:
        subquad.swap(model.eval(), name)
        seen = {}
        module = swapped(model)[0]
        module.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(x=args[0]))
        with torch.no_grad():
            model(images)
            whole = module.heads_output(seen["x"])
            x = seen["x"].clone()
            x[:, -1] += 1  # the last patch is seen by every token before it
            assert ((module.heads_output(x) - whole)[:, :-1].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_softmax_changes_nothing(decoder, family):
    model, ids = decoder(family), torch.randint(5, 97, (2, 14))
    before = logits(model, ids)
    close(logits(subquad.swap(model, "softmax"), ids), before, 1e-5)


def test_sliding_window_is_mistrals_own(decoder):
    model, ids = decoder("mistral", sliding_window=5), torch.randint(5, 97, (2, 20))
    before, greedy = logits(model, ids), {"max_new_tokens": 12, "do_sample": False}
    generated = model.generate(ids, **greedy)
    subquad.swap(model, "sliding-window", window=5, sinks=0)
    close(logits(model, ids), before, 1e-5)
    same_tokens(model.generate(ids, **greedy), generated, model)
