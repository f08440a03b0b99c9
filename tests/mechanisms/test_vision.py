"""The vision mechanisms: what their papers say of them, on rows of weights."""

import math

import pytest
import torch

import subquad
from subquad.layers.rotary2d import rala_rotary

GRID, N, D = (5, 7), 35, 16


def qkv(seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(1, N, 1, D, dtype=torch.float64) for _ in range(3))


def rows(name, q, k, **given):
    """The weights ``[N, N]`` of one head: values are unit vectors."""
    call = {"grid": GRID, **({"options": {"causal": False}} if subquad.card(name).causal else {}), **given}
    module = subquad.attention(name, 1, D, value_dim=N, **call.pop("options", {})).double()
    return module(q, k, torch.eye(N, dtype=torch.float64)[None, :, None], **call)[0, :, 0].detach()


def phi(x):
    return torch.nn.functional.elu(x) + 1


def of_features(y):
    """x with elu(x) + 1 = y > 0."""
    return torch.where(y > 1, y - 1, y.log())


@pytest.mark.parametrize("name", ["mala", "inline"])
def test_rows_sum_to_one_and_may_be_negative(name):
    q, k, _ = qkv()
    a = rows(name, 3 * q, k)
    assert (a.sum(-1) - 1).abs().max() < 1e-5  # eps inside mala's reciprocal
    assert a.min() < 0


def test_mala_follows_the_length_of_its_query_as_softmax_does():
    """φ(q) grown by a: β shrinks to 1 + 1/(a z), and differences between scores grow to (1 + 1/(a z)) a, while normalised linear
    attention gives the same row."""
    q, k, _ = qkv()
    fq, fk = phi(q)[0, :, 0], phi(k)[0, :, 0]
    s = fq @ fk.T / D**0.5
    z = s.mean(-1, keepdim=True)
    before = rows("mala", q, k)
    for a in (0.5, 2.0, 5.0):
        grown = of_features(a * phi(q))
        found = rows("mala", grown, k)
        closed = ((1 + 1 / (a * z)) * a * s - a * z) / N
        assert (found - closed).abs().max() < 1e-5
        spread, was = found.max(-1).values - found.min(-1).values, before.max(-1).values - before.min(-1).values
        assert ((spread > was) if a > 1 else (spread < was)).all()
        assert (
            rows("linear-elu", grown, k, options={"causal": False}) - rows("linear-elu", q, k, options={"causal": False})
        ).abs().max() < 1e-5


def test_nalaformer_keys_have_no_scale_and_queries_do():
    q, k, _ = qkv()
    k = k + k.sign()  # cubes of small keys would be as small as eps
    a = rows("nalaformer", q, k)
    assert a.min() >= 0 and (a.sum(-1) - 1).abs().max() < 1e-2
    assert (rows("nalaformer", q, 10 * k) - a).abs().max() < 1e-2
    assert (rows("nalaformer", -q, -k) - a).abs().max() < 1e-12
    assert (rows("nalaformer", 0.1 * q, k) - a).abs().max() > 1e-2


def test_nalaformer_grows_sharper_with_the_length_of_the_query():
    q, k, _ = qkv()
    direction = q / q.norm(dim=-1, keepdim=True)
    entropies = []
    for norm in (0.05, 0.5, 1.0, 4.0):
        a = rows("nalaformer", norm * direction, k + k.sign())
        a = a / a.sum(-1, keepdim=True)
        entropies.append(-(a * a.clamp(min=1e-300).log()).sum(-1).mean())
    assert entropies == sorted(entropies, reverse=True) and entropies[0] < math.log(N)


def test_nalaformer_takes_zero_queries():
    q, k, v = (x.clone().requires_grad_() for x in qkv())
    zero = q * torch.arange(N).remainder(2).view(1, N, 1, 1)
    o = subquad.attend(zero, k, v, "nalaformer", grid=GRID)
    o.sum().backward()
    assert (o[:, ::2] == 0).all() and all(x.grad.isfinite().all() for x in (q, k, v))


def test_inline_is_injective_where_plain_linear_attention_is_not():
    """Queries along one direction: InLine tells them apart, normalised linear attention gives all the same row."""
    q, k, _ = qkv()
    along = q[:, :1].relu() * torch.linspace(0.5, 4, N, dtype=torch.float64).view(1, N, 1, 1)
    apart = torch.cdist(rows("inline", along, k), rows("inline", along, k)) + torch.eye(N)
    assert apart.min() > 1e-4
    plain = rows("linear-relu", along, k, options={"causal": False})
    assert (plain - plain[:1]).abs().max() < 1e-5
    found = rows("inline", q, k)
    assert (torch.cdist(found, found) + torch.eye(N)).min() > 1e-4  # nor do random queries meet


def test_l2vit_has_two_regimes():
    q, k, _ = qkv()
    strong, weak = rows("l2vit", 100 * q, k), rows("l2vit", 1e-2 * q, k)
    assert (rows("l2vit", 200 * q, k) - strong).abs().max() < 1e-12
    assert (strong.sum(-1) - D**-0.5).abs().max() < 1e-12
    assert (rows("l2vit", 2e-2 * q, k) - 2 * weak).abs().max() < 1e-12
    assert (rows("l2vit", 1e-2 * q, 3 * k) - 3 * weak).abs().max() < 1e-12
    assert (rows("l2vit", -q.abs(), k) == 0).all()
    sums = (q[0, :, 0].relu() @ k[0, :, 0].relu().T).sum(-1)
    assert (sums > 0).all() and ((rows("l2vit", q, k, options={"floor": 1e-9}).sum(-1)) - D**-0.5).abs().max() < 1e-12


def test_lightnet_rows_sum_to_the_query_and_keys_have_no_offset():
    q, k, _ = qkv()
    a = rows("lightnet", q, k)
    assert (a.sum(-1) - torch.nn.functional.silu(q)[0, :, 0].sum(-1)).abs().max() < 1e-12
    assert (rows("lightnet", q, k + torch.randn(1, 1, 1, D, dtype=torch.float64)) - a).abs().max() < 1e-12
    equal = rows("lightnet", q, torch.zeros_like(k))
    assert (equal - equal.mean(-1, keepdim=True)).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["mala", "nalaformer", "inline", "l2vit", "lightnet"])
def test_tokens_permute(name):
    q, k, v = qkv()
    order = torch.randperm(N)
    module = subquad.attention(name, 1, D, **({"causal": False} if subquad.card(name).causal else {})).double()
    o = module(q, k, v, grid=GRID)
    moved = module(*(x[:, order] for x in (q, k, v)), grid=GRID)
    assert (moved - o[:, order]).abs().max() < 1e-12


@pytest.mark.parametrize("name, changes", [("mala", True), ("nalaformer", True), ("inline", False)])
def test_rotary_and_the_sum_of_weights(name, changes):
    """MALA's and NaLaFormer's denominators leave rotary out, as published; InLine's weights are of turned queries and keys."""
    q, k, _ = qkv()
    a = rows(name, q, k, rotary=rala_rotary(GRID, D))
    assert ((a.sum(-1) - 1).abs().max() > 0.01) == changes
    assert (a - rows(name, q, k)).abs().max() > 0.01


@pytest.mark.parametrize("name, options", [("inline", {"feature_map": "cosine"}), ("l2vit", {"floor": 0}), ("l2vit", {"floor": "100"})])
def test_options_are_checked(name, options):
    with pytest.raises(subquad.InputError, match=next(iter(options))):
        subquad.attention(name, 1, D, **options)
