"""Liger: no parameters, the pooled gates, each half by what it should be, and its recurrences in closed form."""

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import subquad
from subquad import Rotary
from subquad.mechanisms.hybrid.liger import pool

FORMS = ("gla", "hgrn2", "gsa")


def qkv(n=70, dim=16):
    return tuple(torch.randn(2, n, h, dim, dtype=torch.float64) for h in (4, 2, 2))


def recurrence(form, q, k, v, **options):
    """The second half: with a window of one token the first is ½ v."""
    o = subquad.attention("liger", 4, q.shape[-1], kv_heads=2, form=form, window=1, **options)(q, k, v)
    return 2 * o - v.repeat_interleave(2, 2)


@pytest.mark.parametrize("form", FORMS)
def test_a_swap_adds_no_parameter(form):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, **sizes))
    before, buffers = {name: p.clone() for name, p in model.named_parameters()}, len(list(model.buffers()))
    subquad.swap(model, "liger", form=form)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and len(list(model.buffers())) == buffers
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert not list(subquad.attention("liger", 4, 8, form=form).state_dict())


@pytest.mark.parametrize("slots", [1, 4, 16, 24, 64])
def test_pooled_gates_are_the_pooled_key_projection(slots):
    """Adaptive average pooling of all key heads' channels side by side, as one row, and for slots that divide D plain means."""
    _, k, _ = qkv()
    row = nn.AdaptiveAvgPool1d(2 * slots)(k.flatten(2)).unflatten(-1, (2, slots))
    assert (pool(k, slots) - row).abs().max() < 1e-12
    if 16 % slots == 0:
        assert (pool(k, slots) - k.unflatten(-1, (slots, -1)).mean(-1)).abs().max() < 1e-12
    if slots == 16:
        assert torch.equal(pool(k, slots), k)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_half_is_softmax_and_alone_sees_rotary(form):
    """A window over all tokens: what rotary changes is half the change of exact softmax attention."""
    q, k, v = qkv()
    rotary = Rotary.of(torch.arange(70), 16, theta=100.0)
    module, softmax = (
        subquad.attention(name, 4, 16, kv_heads=2, **o) for name, o in (("liger", {"form": form, "window": 70}), ("softmax", {}))
    )
    turned, plain = module(q, k, v, rotary=rotary), module(q, k, v)
    expected = 0.5 * (softmax(q, k, v, rotary=rotary) - softmax(q, k, v))
    assert expected.abs().max() > 0.1
    assert (turned - plain - expected).abs().max() < 1e-12
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    exact = scaled_dot_product_attention(x, y, z, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert (plain - 0.5 * exact - 0.5 * recurrence(form, q, k, v)).abs().max() < 1e-12


def test_the_second_half_is_gla():
    q, k, v = qkv()
    gla = subquad.attention("gla", 4, 16, kv_heads=2)
    expected = gla(q.softmax(-1) * 4, k.softmax(-1), v, log_decay=logsigmoid(k) / 16)  # 4 = √D: no scale
    assert (recurrence("gla", q, k, v) - expected).abs().max() < 1e-12


def test_the_second_half_is_hgrn2():
    q, k, v = qkv()
    hgrn2 = subquad.attention("hgrn2", 4, 16, kv_heads=2, lower_bound=0, q_activation="none", v_activation="none")
    assert (recurrence("hgrn2", q, k, v) - hgrn2(q.softmax(-1), k, v)).abs().max() < 1e-12


def test_slots_hold_averages_of_all_tokens_so_far():
    """In closed form: slot m holds Σ_j (1 − α_j) Π_{l>j} α_l x_j, whose weights sum to 1 − Π α."""
    q, k, v = qkv(30)
    k_all, v_all = (x.repeat_interleave(2, 2) for x in (k, v))
    alpha = k_all.unflatten(-1, (8, 2)).mean(-1).sigmoid() ** (1 / 16)  # eight slots of two channels
    later = alpha.log().cumsum(1)
    weights = (later[:, :, None] - later[:, None]).exp() * (1 - alpha)[:, None]  # [B, i, j, H, M]
    weights = weights * torch.ones(30, 30, dtype=torch.float64).tril()[None, :, :, None, None]
    assert (weights.sum(2) - (1 - later.exp())).abs().max() < 1e-12
    keys, values = (torch.einsum("bijhm,bjhd->bihmd", weights, x) for x in (k_all, v_all))
    read = torch.einsum("bihmd,bihd->bihm", keys, q).softmax(-1)
    expected = torch.einsum("bihm,bihmd->bihd", read, values)
    assert (recurrence("gsa", q, k, v, slots=8) - expected).abs().max() < 1e-12


def test_equal_channels_gate_all_slots_alike():
    """Then all slots hold the same, and what is read is their common average whatever the query."""
    q, k, v = qkv()
    k = k[..., :1].expand_as(k)
    o = recurrence("gsa", q, k, v)
    assert (o - recurrence("gsa", -3 * q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_gates_forget(form):
    """Gates of 0 at a token forget all before it."""
    q, k, v = qkv()
    k[:, 40] = -4e4
    other = v.clone()
    other[:, :40] += torch.randn_like(v[:, :40])
    o, moved = (recurrence(form, q, k, x) for x in (v, other))
    assert (o - moved)[:, :40].abs().max() > 1e-3
    assert (o - moved)[:, 40:].abs().max() < 1e-12


@pytest.mark.parametrize("bad", [{"form": "mamba"}, {"window": 0}, {"slots": 0}, {"slots": 2.0}])
def test_bad_options(bad):
    with pytest.raises(subquad.InputError, match=next(iter(bad))):
        subquad.attention("liger", 4, 16, **bad)
