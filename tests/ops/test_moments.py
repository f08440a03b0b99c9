"""Moments: against the quadratic definition, against each paper's explicit scores, and what follows from sums."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad import InputError, Rotary
from subquad.ops.moments import apply_moments, chunked, gather_moments, mean_features, moment_attention
from subquad.ops.moments.reference import reference
from subquad.ops.sparse import Layout

D, V = 8, 6
SCALE = D**-0.5


@pytest.fixture(params=[False, True], ids=["one-block", "blocks"])
def blocks(request, monkeypatch):
    """All tokens at once, or 13 tokens (one tile) at a time, computed again in the backward pass."""
    if request.param:
        monkeypatch.setattr(chunked, "CPU_BLOCK", 1)
        monkeypatch.setattr(chunked, "LEAST", 13)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(n: int = 37, m: int | None = None, heads: tuple[int, int] = (4, 2)) -> tuple[Tensor, Tensor, Tensor]:
    m = n if m is None else m
    return random(2, n, heads[0], D), random(2, m, heads[1], D), random(2, m, heads[1], V)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-2)


def grads(o: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=o.dtype)
    return list(torch.autograd.grad(o, inputs, weight, allow_unused=True, materialize_grads=True))


MASK = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) > 0.4
ROTARY = Rotary.of(torch.arange(37), D, theta=50.0, interleaved=True)
EXTRAS = ["plain", "global_query", "key_logits", "key_weights", "key_mask", "rotary", "all"]


def extra_inputs(name: str) -> dict:
    every = {"global_query": random(2, 4, D).exp(), "key_logits": 3 * random(2, 37, 4), "key_weights": torch.rand(2, 37, 2).double()}
    every |= {"key_mask": MASK, "rotary": ROTARY}
    return every if name == "all" else {name: every[name]} if name in every else {}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("normalizer", ["divide", "magnitude", "subtract", "none"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_outputs_and_gradients_are_the_definitions(blocks, extra, normalizer, reduce):
    x = {**dict(zip("qkv", qkv())), **extra_inputs(extra)}
    x = {name: t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in x.items()}
    how = {"normalizer": normalizer, "reduce": reduce, "eps": 1e-3}
    rest = {name: t for name, t in x.items() if name not in "qkv"}
    o = moment_attention(x["q"], x["k"], x["v"], feature_map="elu1", **rest, **how)
    turns = {"q_rotary": ROTARY} if "rotary" in x else {}
    expected = reference(x["q"], x["k"], x["v"], maps=("elu1", "elu1"), logit_scale=SCALE, scale=SCALE, **turns, **rest, **how)
    close(o, expected)
    leaves = [t for t in x.values() if isinstance(t, Tensor) and t.requires_grad]
    for found, wanted in zip(grads(o, leaves), grads(expected, leaves)):
        close(found, wanted)


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["plain", "rotary"])
@pytest.mark.parametrize("with_keys", [False, True], ids=["k=None", "k"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_logits_per_channel(blocks, rotary, with_keys, packed):
    q, k, v = (t.requires_grad_() for t in qkv())
    logits = (3 * random(2, 37, 4, D)).requires_grad_()
    leaves = [q, k, v, logits] if with_keys else [q, v, logits]
    k = k if with_keys else None
    maps = ("elu1", "relu")
    expected = reference(q, k, v, maps=maps, rotary=rotary, q_rotary=rotary, key_logits=logits, key_mask=MASK)
    if packed:
        flat = [None if t is None else t.flatten(0, 1)[None] for t in (q, k, v, logits)]
        turn = None if rotary is None else Rotary(rotary.cos.repeat(2, 1), rotary.sin.repeat(2, 1), True)
        o = moment_attention(
            *flat[:3], feature_map=maps, rotary=turn, key_logits=flat[3], key_mask=MASK.view(1, -1), cu_seqlens=torch.tensor([0, 37, 74])
        ).view(expected.shape)  # fmt: skip
    else:
        o = moment_attention(q, k, v, feature_map=maps, rotary=rotary, key_logits=logits, key_mask=MASK)
    close(o, expected)
    for found, wanted in zip(grads(o, leaves), grads(expected, leaves)):
        close(found, wanted)


# ---- the papers' explicit scores -------------------------------------------------------------------------------------


def test_mala(blocks):
    """Scores β_i s_ij/N − γ_i/N with β = 1 + 1/z, γ = z; they sum to one."""
    q, k, v = qkv(heads=(2, 2))
    s = torch.einsum("bnhd,bmhd->bhnm", F.elu(q) + 1, F.elu(k) + 1) / D**0.5
    z = s.mean(-1, keepdim=True)
    scores = (1 + 1 / (z + 1e-6)) * s / 37 - z / 37
    assert (scores.sum(-1) - 1).abs().max() < 1e-5
    close(moment_attention(q, k, v, feature_map="elu1", normalizer="magnitude"), torch.einsum("bhnm,bmhv->bnhv", scores, v))


def test_inline(blocks):
    """Scores s_ij − mean_m s_im + 1/N, s = q·k/(N√D); a scaled query gives another output."""
    q, k, v = qkv(heads=(2, 2))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) / (37 * D**0.5)
    scores = s - s.mean(-1, keepdim=True) + 1 / 37
    o = moment_attention(q, k, v, normalizer="subtract")
    close(o, torch.einsum("bhnm,bmhv->bnhv", scores, v))
    assert (moment_attention(2 * q, k, v, normalizer="subtract") - o).abs().max() > 0.1


@pytest.mark.parametrize("size", [0.5, 10.0], ids=["below the floor", "above"])
def test_l2vit(blocks, size):
    """Sums, not means, and a denominator of at least 100."""
    q, k, v = qkv(heads=(2, 2))
    q, k = size * q, size * k
    s = torch.einsum("bnhd,bmhd->bhnm", q.relu(), k.relu())
    total = s.sum(-1, keepdim=True)
    assert (total < 100).all() if size < 1 else (total > 100).float().mean() > 0.9
    expected = torch.einsum("bhnm,bmhv->bnhv", s / total.clamp(min=100), v)
    close(moment_attention(q, k, v, feature_map="relu", reduce="sum", floor=100), expected)


def test_l2vit_query_without_features():
    q, k, v = qkv()
    o = moment_attention(-q.abs(), k, v, feature_map="relu", reduce="sum", floor=100)
    assert torch.equal(o, torch.zeros_like(o))


def test_lightnet(blocks):
    """Each channel's softmax over tokens, Wᵀ v, then silu(q): no D^-½."""
    q, k, v = qkv(heads=(2, 2))
    expected = torch.einsum("bnhd,bmhd,bmhv->bnhv", F.silu(q), (5 * k).softmax(1), v)
    close(moment_attention(q, None, v, feature_map="silu", key_logits=5 * k, normalizer="none"), expected)
    shifted = moment_attention(q, None, v, feature_map="silu", key_logits=5 * k + random(1, 1, 2, D) * 300, normalizer="none")
    close(shifted, expected)


def test_nalaformer(blocks):
    """s_ij = Σ_c |d_ic|^{p_i} |k_jc|³ over channels where q and k have the same sign."""
    q, k, v = qkv(heads=(2, 2))
    norm = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + norm.tanh())
    same = torch.sign(q)[:, :, None] == torch.sign(k)[:, None]
    s = ((q / norm).abs() ** power)[:, :, None] * (k.abs() ** 3)[:, None] * same
    s = s.sum(-1)  # [B, N, M, H]
    expected = torch.einsum("bnmh,bmhv->bnhv", s / (s.sum(2, keepdim=True) + 1e-6 * 37), v)
    o = moment_attention(q, k, v, feature_map=("norm_power", "sign_cube"))
    close(o, expected)
    close(moment_attention(-q, -k, v, feature_map=("norm_power", "sign_cube")), expected)
    assert (moment_attention(2 * q, k, v, feature_map=("norm_power", "sign_cube")) - o).abs().max() > 1e-3


def test_nalaformer_rotary_turns_both_halves(blocks):
    q, k, v = qkv(heads=(2, 2))
    norm = q.norm(dim=-1, keepdim=True)
    fq = torch.cat([((s * q).relu() / norm) ** (3 * (0.5 + norm.tanh())) for s in (1, -1)], -1)
    fk = torch.cat([(s * k).relu() ** 3 for s in (1, -1)], -1)
    turn = [torch.cat([ROTARY.apply(half) for half in f.chunk(2, -1)], -1) for f in (fq, fk)]
    total = torch.einsum("bnhf,bmhf->bnh", fq, fk) / 37 + 1e-6
    expected = torch.einsum("bnhf,bmhf,bmhv->bnhv", *turn, v) / 37 / total[..., None]
    close(moment_attention(q, k, v, feature_map=("norm_power", "sign_cube"), rotary=ROTARY), expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weights"])
@pytest.mark.parametrize("heads", [None, 1, 2, 4])
def test_sla_linear_half(blocks, heads, weighted):
    """Per block of 8 queries, linear attention over the blocks of 5 keys that the layout names; none gives 0."""
    q, k, v = (t.requires_grad_() for t in qkv(n=37, m=42))
    shape = (5, 9) if heads is None else (heads, 5, 9)
    named = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    named[..., 2, :] = False
    layout = Layout.from_block_mask(named, (8, 5), n=37, m=42)
    mask = torch.rand(2, 42, generator=torch.Generator().manual_seed(4)) > 0.3
    extra = {"key_logits": (30 * random(2, 42, 4)).requires_grad_(), "global_query": random(2, 4, D)} if weighted else {}
    o = moment_attention(q, k, v, feature_map="softmax", layout=layout, eps=1e-5, key_mask=mask, **extra)
    pairs = layout.to_mask()
    pairs = pairs[None] if pairs.dim() == 3 else pairs
    expected = reference(
        q, k, v, maps=("softmax", "softmax"), pair_mask=pairs, eps=1e-5, key_mask=mask, logit_scale=SCALE, **extra
    )  # fmt: skip
    close(o, expected)
    assert torch.equal(o[:, 16:24], torch.zeros_like(o[:, 16:24]))
    leaves = [q, k, v, *[t for t in extra.values() if t.requires_grad]]
    for found, wanted in zip(grads(o, leaves), grads(expected, leaves)):
        close(found, wanted)


def test_a_dense_layout_is_no_layout():
    q, k, v = qkv()
    close(moment_attention(q, k, v, feature_map="elu1", layout=Layout.dense(37)), moment_attention(q, k, v, feature_map="elu1"))


# ---- what follows from sums ------------------------------------------------------------------------------------------


def test_parts_merge(blocks):
    """Moments of three unequal parts, one of them without keys, with logits far apart, merge to those of the whole."""
    q, k, v = qkv()
    logits = 3 * random(2, 37, 4) + torch.linspace(0, 2000, 37, dtype=torch.float64)[:, None]
    whole = gather_moments(k, v, feature_map="elu1", key_logits=logits)
    parts = [
        gather_moments(k[:, s], v[:, s], feature_map="elu1", key_logits=logits[:, s], key_mask=mask)
        for s, mask in ((slice(0, 20), None), (slice(5, 8), torch.zeros(2, 3, dtype=torch.bool)), (slice(20, 37), None))
    ]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        for name in ("M", "z", "v_sum", "weight", "logit_max"):
            close(getattr(merged, name), getattr(whole, name))
        close(apply_moments(q, merged, feature_map="elu1"), apply_moments(q, whole, feature_map="elu1"))


def test_no_keys():
    """M = z = weight = 0; divide gives 0; gradients are finite; merging changes nothing."""
    q, k, v = (t.requires_grad_() for t in qkv())
    none = torch.zeros(2, 37, dtype=torch.bool)
    for extra in ({}, {"key_logits": random(2, 37, 2)}):
        empty = gather_moments(k, v, feature_map="elu1", key_mask=none, **extra)
        assert not any(t.any() for t in (empty.M, empty.z, empty.v_sum, empty.weight))
        o = apply_moments(q, empty, feature_map="elu1", eps=0.0)
        assert torch.equal(o, torch.zeros_like(o))
        assert all(g.isfinite().all() for g in grads(o, [q, k, v]))
        full = gather_moments(k, v, feature_map="elu1", key_logits=random(2, 37, 2) - 2000)
        for merged in (full.merge(empty), empty.merge(full)):
            assert all(torch.equal(getattr(merged, name), getattr(full, name)) for name in ("M", "z", "weight", "logit_max"))
    nothing = gather_moments(k[:, :0], v[:, :0], feature_map="elu1")
    assert nothing.M.shape == (2, 2, D, V) and (nothing.logit_max == -torch.inf).all()
    assert apply_moments(q[:, :0], nothing).shape == (2, 0, 4, V)


@pytest.mark.parametrize("lengths", [(5, 0, 1, 64, 300, 1, 129, 0), (0,), (1,) * 40, ()])
def test_packed_sequences(blocks, lengths):
    total = sum(lengths)
    q, k, v = random(1, total, 4, D), random(1, total, 2, D), random(1, total, 2, V)
    g, logits = random(len(lengths), 4, D), 5 * random(1, total, 2)
    rotary = Rotary.of(torch.arange(total), D)
    leaves = [t.requires_grad_() for t in (q, k, v, g, logits)]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    o = moment_attention(q, k, v, feature_map="elu1", global_query=g, key_logits=logits, rotary=rotary, cu_seqlens=cu)
    alone = []
    for i, (a, b) in enumerate(pairwise(cu.tolist())):
        extra = {"global_query": g[i : i + 1], "key_logits": logits[:, a:b], "rotary": rotary.narrow(a, b)}
        alone.append(moment_attention(q[:, a:b], k[:, a:b], v[:, a:b], feature_map="elu1", **extra))
    expected = torch.cat([o.detach()[:, :0], *alone], 1)
    assert o.shape == (1, total, 4, V)
    if total:
        close(o, expected)
        for found, wanted in zip(grads(o, leaves), grads(expected, leaves)):
            close(found, wanted)
    moments = gather_moments(k, v, cu_seqlens=cu)
    assert moments.M.shape == (len(lengths), 2, D, V) and moments.weight[:, 0].tolist() == list(lengths)


def test_masked_tokens_do_not_matter(blocks):
    q, k, v = qkv()
    one = moment_attention(q, k, v, feature_map="elu1", key_mask=MASK)
    k, v = (t.masked_fill(~MASK[..., None, None], torch.nan).requires_grad_() for t in (k, v))
    two = moment_attention(q, k, v, feature_map="elu1", key_mask=MASK)
    assert torch.equal(one, two)
    for g in grads(two, [k, v]):
        assert not g[~MASK].any() and g.isfinite().all()


@pytest.mark.parametrize("heads", [(4, 1, 1), (2, 2, 4), (1, 4, 2), (4, 2, 4), (2, 4, 1)])
@pytest.mark.parametrize("m", [5, 37, 90])
def test_head_counts_and_token_counts(blocks, heads, m):
    q, k, v = random(2, 37, heads[0], D), random(2, m, heads[1], D), random(2, m, heads[2], V)
    full = [x.repeat_interleave(4 // x.shape[2], 2) for x in (q, k, v)]
    o = moment_attention(q, k, v, feature_map="elu1")
    expected = moment_attention(*full, feature_map="elu1")
    close(o, expected[:, :, :: 4 // max(heads)] if max(heads) < 4 else expected)


def test_fewer_queries_stand_at_the_end():
    q, k, v = qkv()
    whole = moment_attention(q, k, v, feature_map="elu1", rotary=ROTARY)
    close(moment_attention(q[:, 30:], k, v, feature_map="elu1", rotary=ROTARY), whole[:, 30:])


def test_permuted_tokens(blocks):
    q, k, v = qkv()
    order = torch.randperm(37)
    o = moment_attention(q, k, v, feature_map="elu1", key_logits=k.sum(-1))
    k, v = k[:, order], v[:, order]
    close(moment_attention(q[:, order], k, v, feature_map="elu1", key_logits=k.sum(-1)), o[:, order])


def test_mean_features():
    q = random(1, 30, 3, D)
    close(mean_features(q, "elu1"), (F.elu(q) + 1).mean(1))
    packed = mean_features(q, "elu1", cu_seqlens=torch.tensor([0, 10, 10, 30]))
    expected = torch.stack([(F.elu(q[0, :10]) + 1).mean(0), torch.zeros(3, D).double(), (F.elu(q[0, 10:]) + 1).mean(0)])
    close(packed, expected)


def test_scale_enters_where_the_definitions_have_it():
    q, k, v = qkv()
    doubled = moment_attention(q, k, v, normalizer="none", scale=2.0)
    close(doubled, 2 * D**0.5 * moment_attention(q, k, v, normalizer="none"))
    assert torch.equal(moment_attention(q, k, v, feature_map="elu1", scale=2.0), moment_attention(q, k, v, feature_map="elu1"))


# ---- numbers, memory, compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_float32(dtype):
    q, k, v = (t.to(dtype) for t in qkv(n=3000))
    exact = moment_attention(*(t.double() for t in (q, k, v)), feature_map="elu1")
    moments = gather_moments(k, v, feature_map="elu1")
    assert moments.M.dtype == torch.float32
    o = apply_moments(q, moments, feature_map="elu1")
    assert o.dtype == dtype
    assert (o - exact).abs().max() <= (1e-6 if dtype == torch.float32 else 0.6 * torch.finfo(dtype).eps) * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moment_attention(q, k, v, feature_map="elu1"), o)


def test_large_logits():
    q, k, v = (t.float().requires_grad_() for t in qkv())
    logits = (1e4 * random(2, 37, 4)).float().requires_grad_()
    o = moment_attention(q, k, v, feature_map="elu1", key_logits=logits)
    best = logits.argmax(1)  # all weight lies on one key
    expected = torch.stack([v[b, best[b], torch.arange(4) // 2] for b in range(2)])
    assert (o - expected[:, None]).abs().max() < 1e-3
    assert all(g.isfinite().all() for g in grads(o, [q, k, v, logits]))


@pytest.mark.parametrize("name", ["elu1", "relu", "silu", "softmax", "softmax_halves", "exp_halves", "sign_cube", "norm_power", "taylor2"])
def test_feature_maps_have_finite_gradients(name):
    from subquad.ops.feature_maps import feature_map

    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e-30, -50.0, 0.0, 2.0], [300.0, -300.0, 1.0, 0.0]], requires_grad=True)
    phi = feature_map(name)(x)
    assert phi.isfinite().all()
    assert torch.autograd.grad(phi.sum(), x)[0].isfinite().all()


def test_nothing_is_stored_per_block(monkeypatch):
    """What autograd keeps for the backward pass, beside the inputs, does not grow with the tokens."""
    monkeypatch.setattr(chunked, "CPU_BLOCK", 1)

    def stored(tokens: int) -> int:
        x = [torch.randn(1, tokens, 2, D, requires_grad=True) for _ in range(3)]
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.numel()), t)[1], lambda t: t):
            moment_attention(*x, feature_map="elu1", global_query=mean_features(x[0], "elu1")).sum()
        return sum(seen)

    assert stored(2560) < 2560 * 2 * D  # less than one of q, k, v


def test_compiles_in_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "CPU_BLOCK", 1)
    monkeypatch.setattr(chunked, "LEAST", 20)
    q, k, v = (t.requires_grad_() for t in qkv())

    def attend(q, k, v):
        return moment_attention(q, k, v, feature_map="elu1", global_query=mean_features(q, "elu1"), rotary=ROTARY)

    o, expected = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v)
    close(o, expected)
    for found, wanted in zip(grads(o, [q, k, v]), grads(expected, [q, k, v])):
        close(found, wanted)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, change",
    [
        ("feature_map", {"feature_map": "elu"}),
        ("normalizer", {"normalizer": "divided"}),
        ("reduce", {"reduce": "max"}),
        ("rotary", {"rotary": Rotary.of(torch.arange(36), D)}),
        ("global_query", {"global_query": random(3, 4, D)}),
        ("key_logits", {"key_logits": random(2, 36, 4)}),
        ("key_weights", {"key_weights": random(2, 37)}),
        ("key_mask", {"key_mask": torch.ones(2, 37)}),
        ("layout", {"layout": Layout.dense(30)}),
        ("layout", {"layout": Layout.causal(37)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 37])}),
        ("v", {"key_logits": random(2, 37, 3)}),
        ("normalizer", {"key_logits": random(2, 37, 2, D), "normalizer": "subtract"}),
        ("reduce", {"key_logits": random(2, 37, 2, D), "rotary": ROTARY, "reduce": "sum"}),
    ],
)
def test_bad_input_names_the_argument(argument, change):
    q, k, v = qkv()
    with pytest.raises(InputError) as caught:
        moment_attention(q, k, v, **{"feature_map": "elu1", **change})
    assert caught.value.argument == argument and "\n" not in str(caught.value)


def test_moments_that_do_not_merge():
    _, k, v = qkv()
    with pytest.raises(InputError, match="other"):
        gather_moments(k, v).merge(gather_moments(k[:1], v[:1]))
    turned = gather_moments(None, v, key_logits=k, rotary=ROTARY)
    with pytest.raises(InputError, match="per channel"):
        turned.merge(turned)


def test_weights_of_zero_have_no_gradient():
    q, k, v = qkv()
    weights = torch.zeros(2, 37, 2, dtype=torch.float64, requires_grad=True)
    o = moment_attention(q, k, v, feature_map="elu1", key_weights=weights)
    (gradient,) = torch.autograd.grad(o.sum(), weights)
    assert (o == 0).all() and (gradient == 0).all()
