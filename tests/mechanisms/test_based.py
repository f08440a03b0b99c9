"""Based: the Taylor map's identities, groups of tokens, memory, and decoding."""

from itertools import pairwise

import pytest
import torch

import subquad
from subquad.mechanisms.linear import based
from subquad.ops.feature_maps import taylor2


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of 256 tokens, the fewest there are."""
    monkeypatch.setattr(based, "CPU_FEATURES", 1)


def qkv(n, heads=2, kv_heads=1, dim=16, batch=2, dtype=torch.float64):
    return tuple(torch.randn(batch, n, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))


def make(**options):
    module = subquad.attention("based", 2, 16, kv_heads=1, **{"feature_dim": 4, **options}).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module


def grads(o, inputs):
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=o.dtype)
    return torch.autograd.grad(o, inputs, weight)


def test_compact_features():
    """153 features for f = 16; their product is 1 + s + s²/2 and that of the authors' 273."""
    q, k = torch.randn(2, 50, 16, dtype=torch.float64)

    def wide(x):
        outer = (x[:, :, None] * x[:, None, :]).flatten(1)
        return torch.cat([torch.ones(50, 1).double(), x / 16**0.25, outer / (2**0.5 * 16**0.5)], -1)

    assert taylor2(q).shape[-1] == 153 and wide(q).shape[-1] == 273
    s = q @ k.T / 4
    assert (taylor2(q) @ taylor2(k).T - (1 + s + s**2 / 2)).abs().max() < 1e-12
    assert (taylor2(q) @ taylor2(k).T - wide(q) @ wide(k).T).abs().max() < 1e-12
    assert (taylor2(q) @ taylor2(k).T).min() >= 0.5


@pytest.mark.parametrize("n", [256, 257, 600])
def test_groups_are_the_definition(small_groups, n):
    """Several groups, a last one of any length: outputs and every gradient."""
    q, k, v = (x.requires_grad_() for x in qkv(n))
    module = make()
    o, expected = module(q, k, v), subquad.reference("based")(module, q, k, v)
    assert (o - expected).abs().max() < 1e-10
    leaves = [q, k, v, *module.parameters()]
    for found, wanted in zip(grads(o, leaves), grads(expected, leaves)):
        assert (found - wanted).abs().max() < 1e-10 * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("lengths", [(700,), (256, 256, 100), (0, 3, 500, 0, 0, 20, 1, 236, 0, 40, 0), (1,) * 300])
def test_packed_groups(small_groups, lengths):
    """Groups that cut sequences anywhere: outputs, states and gradients are those of each sequence alone."""
    total, module = sum(lengths), make()
    q, k, v = (x.requires_grad_() for x in qkv(total, batch=1))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    o, state = module(q, k, v, cu_seqlens=cu, return_state=True)
    o_only = module(q, k, v, cu_seqlens=cu)
    ends = cu.tolist()
    alone = [module(q[:, a:b], k[:, a:b], v[:, a:b], return_state=True) for a, b in pairwise(ends)]
    expected = torch.cat([one for one, _ in alone], 1)
    assert (o - expected).abs().max() < 1e-10 and torch.equal(o, o_only)
    joined = subquad.State.join([s for _, s in alone])
    for name in ("S", "z"):
        assert (state[name] - joined[name]).abs().max() < 1e-10 * joined[name].abs().max()
    assert state.length.tolist() == list(lengths)
    for found, wanted in zip(grads(o, [q, k, v]), grads(expected, [q, k, v])):
        assert (found - wanted).abs().max() < 1e-9


def test_packed_groups_carry_states(small_groups):
    module, cuts = make(), [(100, 300), (0, 5), (400, 200)]
    parts = [qkv(a + b, batch=1) for a, b in cuts]
    firsts = [[x[:, :a] for x in p] for p, (a, _) in zip(parts, cuts)]
    seconds = [[x[:, a:] for x in p] for p, (a, _) in zip(parts, cuts)]
    offsets = [torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*cuts)]
    _, state = module(*(torch.cat(x, 1) for x in zip(*firsts)), cu_seqlens=offsets[0], return_state=True)
    o = module(*(torch.cat(x, 1) for x in zip(*seconds)), cu_seqlens=offsets[1], state=state)
    expected = torch.cat([module(*p)[:, a:] for p, (a, _) in zip(parts, cuts)], 1)
    assert (o - expected).abs().max() < 1e-10


def test_features_are_not_stored(small_groups):
    """What autograd keeps at 2,048 tokens is less than one tensor of features for all of them."""
    module = subquad.attention("based", 2, 16)
    q, k, v = (x.requires_grad_() for x in qkv(2048, kv_heads=2, batch=1, dtype=torch.float32))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        module(q, k, v).sum()
    assert sum(kept) < 2048 * 2 * 153


def test_decoding_is_the_definition():
    q, k, v = qkv(30)
    module, state, outputs = make(), None, []
    with torch.no_grad():
        for t in range(30):
            o, state = module(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state, return_state=True)
            outputs.append(o)
    assert (torch.cat(outputs, 1) - subquad.reference("based")(module, q, k, v)).abs().max() < 1e-10
    assert state["S"].shape == (2, 1, 15, 16) and state["z"].shape == (2, 1, 15)
    assert (state["z"][..., 0] == 30).all()  # the constant feature counts tokens


def test_equal_keys_give_the_mean_and_eps_never_matters():
    """Denominators are at least (i + 1)/2."""
    q, k, v = qkv(40)
    o = make()(q, k[:, :1].expand_as(k), v)
    count = torch.arange(1, 41, dtype=torch.float64).view(1, -1, 1, 1)
    assert (o - (v.cumsum(1) / count).expand_as(o)).abs().max() < 1e-10


def test_small_logits_approach_softmax():
    q, k, v = qkv(60, kv_heads=2)
    module = subquad.attention("based", 2, 16, feature_dim=16).double()
    q, k = 0.05 * q, 0.5 * k
    s = torch.einsum("bnhd,hdf,bmhe,hef->bhnm", q, module.W_q, k, module.W_k) / 4
    softmax = torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).softmax(-1), v)
    assert (module(q, k, v) - softmax).abs().max() < s.abs().max() ** 3
    assert (s - torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).abs().max() < 1e-6  # at f = D the start keeps q·k/√D


def test_start_keeps_the_size_of_logits():
    """Over random subspaces s averages q·k/√D."""
    torch.manual_seed(1)
    q = torch.randn(64)
    s = torch.stack([(q @ m.W_q[0]) @ (q @ m.W_k[0]) / 4 for m in (subquad.attention("based", 1, 64) for _ in range(200))])
    assert abs(s.mean() / (q @ q / 8) - 1) < 0.05


def test_rotary_only_if_asked():
    q, k, v = qkv(50)
    rotary = subquad.Rotary.of(torch.arange(50), 16)
    plain, turned = make(), make(rotate=True)
    turned.load_state_dict(plain.state_dict())
    assert torch.equal(plain(q, k, v, rotary=rotary), plain(q, k, v))
    assert torch.equal(turned(q, k, v, rotary=rotary), plain(rotary.apply(q), rotary.apply(k), v))


def test_bidirectional_is_the_last_causal_token():
    q, k, v = qkv(40)
    causal, both = make(), make(causal=False)
    both.load_state_dict(causal.state_dict())
    assert (both(q, k, v)[:, -1] - causal(q, k, v)[:, -1]).abs().max() < 1e-12
    assert (both(q, k, v) - subquad.reference("based")(both, q, k, v)).abs().max() < 1e-10


def test_bad_options():
    with pytest.raises(subquad.InputError, match="feature_dim"):
        subquad.attention("based", 2, 16, feature_dim=0)
