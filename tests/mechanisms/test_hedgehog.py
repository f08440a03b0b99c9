"""Hedgehog: identities of the three maps, what cancels and what does not, and range."""

import pytest
import torch

import subquad

MAPS = ["softmax", "exp", "softmax2"]


def qkv(n=70, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    return tuple(torch.randn(2, n, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))


def make(feature_map="softmax", dtype=torch.float64, **options):
    module = subquad.attention("hedgehog", 4, 16, kv_heads=2, feature_map=feature_map, **options).to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_weights_sum_to_one(feature_map, causal):
    """v = 1 gives 1, and outputs stay within the values."""
    q, k, v = qkv()
    module = make(feature_map, causal=causal)
    assert (module(q, k, torch.ones_like(v)) - 1).abs().max() < 1e-9
    o = module(q, k, v)
    assert (o.amax((1, 2)) <= v.amax((1, 2))).all() and (o.amin((1, 2)) >= v.amin((1, 2))).all()


def test_exp_with_identity_is_a_sum_of_cosh():
    """With W = 1 and b = 0: weights Σ_d 2 cosh(q_d + k_d)."""
    q, k, v = qkv()
    module = subquad.attention("hedgehog", 4, 16, kv_heads=2, feature_map="exp").double()
    k_all, v_all = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = (2 * torch.cosh(q[:, :, None] + k_all[:, None])).sum(-1).permute(0, 3, 1, 2).tril()
    expected = torch.einsum("bhnm,bmhv->bnhv", scores / scores.sum(-1, keepdim=True), v_all)
    assert (module(q, k, v) - expected).abs().max() < 1e-10


def test_softmax_halves_by_hand():
    """The released form: each half sums to one, so all features of a token sum to two."""
    q, _, _ = qkv()
    module = make()
    features = module.features("q", q)
    y = torch.stack([q[:, :, h] @ module.W_q[h] for h in range(4)], 2)
    expected = torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], -1)
    assert (features - expected).abs().max() < 1e-12
    assert (features.sum(-1) - 2).abs().max() < 1e-9
    joint = make("softmax2").features("q", q)
    assert (joint.sum(-1) - 1).abs().max() < 1e-12


def test_a_shift_of_keys_by_their_maximum_would_be_another_function():
    """Scaling the features of key j by c_j weighs it by c_j: "exp" and "softmax" differ although W is the same."""
    q, k, v = qkv()
    exp, soft = (subquad.attention("hedgehog", 4, 16, kv_heads=2, feature_map=name).double() for name in ("exp", "softmax"))
    assert (exp(q, k, v) - soft(q, k, v)).abs().max() > 0.05
    k = k - k.logsumexp(-1, keepdim=True)  # y and −y are shifted oppositely: no shift of y turns one map into the other
    assert (exp(q, k, v) - soft(q, k, v)).abs().max() > 0.05


def test_weights_are_monotone_and_spiky():
    """Along the direction of the query a key weighs more, and a longer query gives lower entropy."""
    module = subquad.attention("hedgehog", 1, 16, feature_map="exp", causal=False).double()
    direction = torch.randn(16, dtype=torch.float64)
    k = (torch.linspace(0, 3, 24, dtype=torch.float64)[:, None] * direction)[None, :, None]
    fk = module.features("k", k)[0, :, 0]
    entropy = []
    for size in (0.5, 1.0, 2.0):
        a = fk @ module.features("q", size * direction.view(1, 1, 1, 16))[0, 0, 0]
        a = a / a.sum()
        assert (a.diff() > 0).all()
        entropy.append(-(a * a.log()).sum().item())
    assert entropy[0] > entropy[1] > entropy[2]


def test_exp_is_exact_up_to_its_limit_and_finite_beyond():
    """|W x| = 30 in float32: products of e^60, still the paper's function; 10 times more stays finite."""
    q, k, v = qkv(dtype=torch.float32)
    q, k = (30 * x / x.abs().max() for x in (q, k))
    module = subquad.attention("hedgehog", 4, 16, kv_heads=2, feature_map="exp")
    exact = subquad.reference("hedgehog")(module, q, k, v)
    wide = subquad.reference("hedgehog")(module.double(), q.double(), k.double(), v.double())
    o = module.float()(q, k, v)
    assert (o - wide).abs().max() < 1e-4 and exact.isfinite().all()
    for causal in (True, False):
        module = subquad.attention("hedgehog", 4, 16, kv_heads=2, feature_map="exp", causal=causal)
        x = [t.clone().requires_grad_() for t in (10 * q, 10 * k, v)]
        o = module(*x)
        assert o.isfinite().all() and o.abs().max() <= v.abs().max() * (1 + 1e-5)
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), x))


def test_last_token_of_causal_is_bidirectional():
    q, k, v = qkv()
    causal, both = make(), make(causal=False)
    both.load_state_dict(causal.state_dict())
    assert (causal(q, k, v)[:, -1] - both(q, k, v)[:, -1]).abs().max() < 1e-12


def test_rotary_comes_before_the_map():
    q, k, v = qkv()
    rotary = subquad.Rotary.of(torch.arange(70), 16)
    module = make()
    assert torch.equal(module(q, k, v, rotary=rotary), module(rotary.apply(q), rotary.apply(k), v))


def test_parameters():
    """2 · H · D · F (+ biases): queries and keys have maps of their own."""
    made = {name: subquad.attention("hedgehog", 4, 16, feature_map=name, feature_dim=12) for name in MAPS}
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()}
    assert count == {"softmax": 2 * 4 * 16 * 12, "exp": 2 * 4 * (16 + 1) * 12, "softmax2": 2 * 4 * (16 + 1) * 12}
    module = subquad.attention("hedgehog", 4, 16, feature_dim=12)
    assert torch.equal(module.W_q[2] @ torch.ones(12), torch.tensor([1.0] * 12 + [0.0] * 4))
    spread = subquad.attention("hedgehog", 4, 16, init="kaiming").W_k
    assert 0.2 < spread.abs().max() <= 0.25 and abs(spread.std() - 0.25 / 3**0.5) < 0.02


@pytest.mark.parametrize("change", [{"feature_map": "softmx"}, {"init": "zeros"}, {"feature_dim": 0}])
def test_bad_options(change):
    with pytest.raises(subquad.InputError) as caught:
        subquad.attention("hedgehog", 4, 16, **change)
    assert caught.value.argument == next(iter(change))
