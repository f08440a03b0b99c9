"""The moments' Triton kernels against the quadratic definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from bounds import OutOfBounds

from subquad import InputError, Rotary
from subquad.ops.feature_maps import feature_map
from subquad.ops.launch import Config, forget
from subquad.ops.moments import apply_moments, gather_moments, moment_attention
from subquad.ops.moments.launch import Plan
from subquad.ops.moments.reference import reference
from subquad.ops.moments.rows import runs

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 70
NAMES = "q", "k", "v", "key_logits", "key_weights", "global_query"
MAPS = {
    "elu1": "elu1",
    "none": None,
    "relu": "relu",
    "silu, exp": ("silu", "exp"),
    "two signs": ("norm_power", "sign_cube"),
}


@pytest.fixture
def launched(launched, monkeypatch) -> list[str]:
    """The names of the calls of kernels that a test made."""
    for name in ("mean", "gather", "apply", "apply_back", "gather_back"):
        call = getattr(Plan, name)
        monkeypatch.setattr(Plan, name, lambda *args, call=call, name=name, **how: (launched.append(name), call(*args, **how))[1])
    return launched


def make(heads: tuple[int, int] = (4, 2), width: int = 16, columns: int = 16, n: int = N, batch: int = 2) -> dict[str, Tensor]:
    q = torch.randn(batch, n, heads[0], width)
    return {"q": q, "k": torch.randn(batch, n, heads[1], width), "v": torch.randn(batch, n, heads[1], columns)}


def rotary(kind: str, width: int = 16, turned: int | None = None, n: int = N) -> Rotary:
    return Rotary.of(torch.arange(n), turned or width, theta=50.0, interleaved=kind == "adjacent")


def both_ways(x: dict[str, Any], **how: Any) -> None:
    """o and every gradient, by the kernels in float32 and by the definition in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        given = {name: t.to(DEVICE, dtype).requires_grad_() if name in NAMES else t for name, t in x.items()}
        given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in given.items()}
        if dtype == torch.float32:
            o = moment_attention(**given, **how)
        else:
            o = defined(given, dict(how))
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
        grads = torch.autograd.grad(o, [given[name] for name in NAMES if name in given and isinstance(given[name], Tensor)], weights)
        results.append([o.detach(), *grads])
    for found, wanted in zip(*results):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max().clamp_min(0.1)


def defined(given: dict[str, Any], how: dict[str, Any]) -> Tensor:
    maps = how.pop("feature_map", None)
    maps = maps if isinstance(maps, tuple) else (maps, maps)
    turn = how.pop("rotary", None)
    turn = None if turn is None else Rotary(turn.cos.to(DEVICE), turn.sin.to(DEVICE), turn.interleaved)
    if how.get("global_query") == "mean":
        how["global_query"] = feature_map(maps[0])(given["q"]).mean(1)
    scale = given["q"].shape[-1] ** -0.5
    return reference(**given, **how, maps=maps, rotary=turn, q_rotary=turn, logit_scale=scale, scale=scale)


# scores of both signs may sum to 0, by which "divide" and "magnitude" would divide
ALL = [(maps, one) for maps in MAPS for one in ("divide", "magnitude", "subtract", "none")[2 * (maps in ("none", "silu, exp")) :]]


@pytest.mark.parametrize(("maps", "normalizer"), ALL)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_every_normaliser_on_every_map(maps, normalizer, reduce):
    both_ways(make(), feature_map=MAPS[maps], normalizer=normalizer, reduce=reduce, eps=1e-3)


@pytest.mark.parametrize(("maps", "turned"), [("elu1", None), ("elu1", 8), ("two signs", None)])
@pytest.mark.parametrize("kind", ["adjacent", "halves"])
def test_rotary(maps, kind, turned):
    query = {"global_query": "mean"} if maps == "elu1" else {}
    both_ways(make(), feature_map=MAPS[maps], rotary=rotary(kind, turned=turned), **query)


@pytest.mark.parametrize("extra", ["key_logits", "key_weights", "key_mask", "global_query", "all"])
def test_weights_of_tokens(extra):
    every: dict[str, Any] = {
        "key_logits": 3 * torch.randn(2, N, 4), "key_weights": torch.rand(2, N, 2), "key_mask": torch.rand(2, N) > 0.4,
        "global_query": torch.rand(2, 4, 16),
    }  # fmt: skip
    every["key_weights"][0, 5] = 0
    some = every if extra == "all" else {extra: every[extra]}
    both_ways(make() | some, feature_map="elu1", rotary=rotary("adjacent"))


@pytest.mark.parametrize("sizes", [(24, 40), (48, 16), (16, 64), (6, 5)])
def test_widths_that_are_no_powers_of_two(sizes):
    width, columns = sizes
    both_ways(make((2, 2), width, columns), feature_map="elu1", global_query="mean", rotary=rotary("halves", width))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (2, 4)])
def test_head_counts(heads):
    both_ways(make(heads), feature_map="elu1", global_query="mean")


@pytest.mark.parametrize("more", [{"normalizer": "subtract"}, {"global_query": "mean"}])
def test_rows_in_many_runs_of_tokens(monkeypatch, more):
    """Tiles of each kernel's own size, so that kernels differ in how many runs they cut a row into."""
    sizes = {"mean": 32, "gather": 64, "apply": 32, "apply_back": 16, "apply_back_both": 64, "apply_back_out": 32, "gather_back": 16}
    monkeypatch.setattr("subquad.ops.moments.launch.processors", lambda device: 40)
    monkeypatch.setattr("subquad.ops.moments.launch.row", lambda kernel, *_: Config(sizes[kernel], 4, 1))
    forget()
    both_ways(make(n=200), feature_map="elu1", **more)
    monkeypatch.undo()
    forget()


def test_runs_even_out_the_last_turn():
    assert runs("gather", 128, 132) == 2  # two programs for nearly each processor
    assert runs("gather", 150, 132) == 3  # 450 programs in four turns: 1.33 a run, where one run takes two and two take three
    assert runs("gather", 1000, 132) == 1
    assert runs("apply", 1, 132) == 4 * 132


def test_floor():
    both_ways(make(), feature_map="relu", reduce="sum", floor=60.0)


def test_logits_far_apart():
    x = make((2, 2))
    x["key_logits"] = 30 * torch.randn(2, N, 2)
    both_ways(x, feature_map="elu1")


def test_packed_sequences_are_as_separate_ones(launched):
    x = make((2, 2), n=61, batch=1)
    ends = torch.tensor([0, 13, 13, 50, 61])
    packed = {name: t.clone().to(DEVICE).requires_grad_() for name, t in x.items()}
    o = moment_attention(**packed, feature_map="elu1", global_query="mean", cu_seqlens=ends.to(DEVICE))
    o.square().sum().backward()
    assert launched == ["mean", "gather", "apply", "apply_back", "gather_back", "apply_back"]
    for start, stop in pairwise(ends.tolist()):
        if start == stop:
            continue
        one = {name: t[:, start:stop].clone().to(DEVICE).requires_grad_() for name, t in x.items()}
        alone = moment_attention(**one, feature_map="elu1", global_query="mean")
        alone.square().sum().backward()
        torch.testing.assert_close(o[:, start:stop], alone, rtol=0, atol=1e-6)
        for name, t in packed.items():
            torch.testing.assert_close(t.grad[:, start:stop], one[name].grad, rtol=0, atol=2e-5)


def test_gathered_and_applied_apart_is_both_at_once(launched):
    x = {name: t.to(DEVICE) for name, t in make().items()}
    halves = [(x["k"][:, part], x["v"][:, part]) for part in (slice(0, 30), slice(30, None))]
    first, second = (gather_moments(k, v, feature_map="elu1", key_logits=k.sum(-1)) for k, v in halves)
    o = apply_moments(x["q"], first.merge(second), feature_map="elu1", normalizer="subtract")
    whole = moment_attention(**x, feature_map="elu1", key_logits=x["k"].sum(-1), normalizer="subtract")
    assert launched == ["gather", "gather", "apply", "gather", "apply"]
    torch.testing.assert_close(o, whole, rtol=1e-5, atol=1e-5)


def test_gradients_through_moments():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make().items()}
    wide = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    for given in (x, wide):  # float64 goes the plain way
        moments = gather_moments(given["k"], given["v"], feature_map="elu1", key_logits=given["k"].sum(-1))
        (apply_moments(given["q"], moments, feature_map="elu1").square().sum() + moments.z.sum() + moments.weight.sum()).backward()
    for name, t in x.items():
        assert (t.grad.double() - wide[name].grad).abs().max() <= 1e-5 * wide[name].grad.abs().max(), name


def test_only_the_gradients_that_are_asked_for(launched):
    x = {name: t.to(DEVICE) for name, t in make().items()}
    x["q"].requires_grad_()
    moment_attention(**x, feature_map="elu1").sum().backward()
    assert launched == ["gather", "apply", "apply_back"] and x["k"].grad is None
    assert torch.isfinite(x["q"].grad).all()


@pytest.mark.parametrize("layout", ["heads first", "every second channel"])
def test_strided_inputs(layout):
    x = {name: t.to(DEVICE) for name, t in make().items()}
    if layout == "heads first":
        views = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in x.items()}
    else:
        views = {name: torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2] for name, t in x.items()}
    torch.testing.assert_close(moment_attention(**views, feature_map="elu1"), moment_attention(**x, feature_map="elu1"), rtol=0, atol=0)


@pytest.mark.parametrize("turned", [False, True])
def test_masked_tokens_may_hold_anything(turned):
    x = {name: t.to(DEVICE) for name, t in make().items()}
    mask = torch.rand(2, N, device=DEVICE) > 0.3
    how = {"feature_map": "elu1", "key_mask": mask, "global_query": "mean", "rotary": rotary("halves") if turned else None}
    spoiled = x | {name: x[name].masked_fill(~mask[..., None, None], torch.nan).requires_grad_() for name in "kv"}
    o = moment_attention(**spoiled, **how)
    torch.testing.assert_close(o, moment_attention(**x, **how), rtol=0, atol=0)
    o.sum().backward()
    assert all((spoiled[name].grad.nan_to_num(9.0)[~mask] == 0).all() for name in "kv")
    assert all(spoiled[name].grad.isfinite().all() for name in "kv")


def test_a_row_without_keys_gives_zero_and_no_gradient():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make().items()}
    mask = torch.tensor([[True] * N, [False] * N], device=DEVICE)
    o = moment_attention(**x, feature_map="relu", key_mask=mask, eps=0.0)
    o.sum().backward()
    assert (o[1] == 0).all() and all(torch.isfinite(t.grad).all() and (t.grad[1] == 0).all() for t in x.values())


def test_operators_are_well_formed():
    from subquad.ops.moments.fused import How, Tensors, moments_op

    x = make((2, 2), n=20)
    x = Tensors(**{name: t.to(DEVICE).requires_grad_() for name, t in x.items()})
    how = How("elu1", "elu1", True, 0.25, "divide", True, 0.25, 1e-6, 0)
    torch.library.opcheck(moments_op, (*x, 16, *how), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiles_whole():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make((2, 2)).items()}

    def attend(q, k, v):
        return moment_attention(q, k, v, feature_map="elu1", global_query="mean")

    wanted = torch.autograd.grad(attend(**x).sum(), list(x.values()))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, one in zip(torch.autograd.grad(compiled(**x).sum(), list(x.values())), wanted):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)


@pytest.mark.skipif(
    DEVICE.type != "cpu", reason="a GPU does not tell of a stray address: what is tested is the check that the interpreter is given"
)
def test_the_check_of_addresses_finds_a_stray_one():
    import triton
    import triton.language as tl

    @triton.jit
    def stray(x, n, C: tl.constexpr):
        at = tl.arange(0, C)
        tl.store(x + at, tl.load(x + at + 1, mask=at < n, other=0.0), mask=at < n)

    x = torch.zeros(8)
    stray[(1,)](x, 7, C=8)
    with pytest.raises(Exception, match="stray touches 32 bytes into a tensor of 32 bytes") as error:
        stray[(1,)](x, 8, C=8)
    assert isinstance(error.value.__cause__, OutOfBounds) or "OutOfBounds" in str(error.value)


@pytest.mark.parametrize("where", ["gathered", "applied"])
def test_a_rotary_of_other_tokens_is_refused_before_it_is_read(where):
    x = {name: t.to(DEVICE) for name, t in make().items()}
    short = Rotary.of(torch.arange(N - 1, device=DEVICE), 16)
    with pytest.raises(InputError, match="rotary"):
        if where == "gathered":
            gather_moments(x["k"], x["v"], rotary=short)
        else:
            apply_moments(x["q"], gather_moments(x["k"], x["v"]), rotary=short)
    with pytest.raises(InputError, match="rotary"):
        moment_attention(**x, rotary=Rotary.of(torch.arange(N, device=DEVICE), 24))


def test_a_changed_rotary_is_read_anew():
    x = {name: t.to(DEVICE) for name, t in make().items()}
    turn = Rotary.of(torch.arange(N, device=DEVICE), 16)
    before = moment_attention(**x, feature_map="elu1", rotary=turn)
    turn.cos.fill_(1.0)
    turn.sin.zero_()
    after = moment_attention(**x, feature_map="elu1", rotary=turn)
    torch.testing.assert_close(after, moment_attention(**x, feature_map="elu1"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after)
    assert set(copy.deepcopy(turn).__dict__) == {"cos", "sin", "interleaved"}


def test_learned_angles_have_gradients():
    x = {name: t.to(DEVICE) for name, t in make().items()}
    angles = torch.randn(N, 16, device=DEVICE, requires_grad=True)
    moment_attention(**x, feature_map="elu1", rotary=Rotary(angles.cos(), angles.sin())).sum().backward()
    assert angles.grad.abs().max() > 0


def test_gradients_of_gradients_are_refused_not_wrong():
    x = {name: t.to(DEVICE).requires_grad_() for name, t in make().items()}
    o = moment_attention(**x, feature_map="elu1")
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(o.sum(), x["q"], create_graph=True)


def test_functional_transforms_take_the_plain_form():
    x = {name: t.to(DEVICE) for name, t in make().items()}
    found = torch.func.grad(lambda q: moment_attention(q, x["k"], x["v"], feature_map="elu1").sum())(x["q"])
    x["q"].requires_grad_()
    moment_attention(**x, feature_map="elu1").sum().backward()
    torch.testing.assert_close(found, x["q"].grad, rtol=1e-4, atol=1e-5)


def test_the_mean_query_leaves_padding_out():
    x = {name: t.to(DEVICE) for name, t in make().items()}
    mask = (torch.arange(N, device=DEVICE) < 50).expand(2, N)
    padded = moment_attention(**x, feature_map="elu1", global_query="mean", key_mask=mask)[:, :50]
    alone = moment_attention(**{name: t[:, :50] for name, t in x.items()}, feature_map="elu1", global_query="mean")
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_compiles_for_any_number_of_tokens(turned):
    def attend(q, k, v, cos, sin):
        return moment_attention(q, k, v, feature_map="elu1", global_query="mean", rotary=Rotary(cos, sin) if turned else None)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (20, 33):
        x = {name: t.to(DEVICE).requires_grad_() for name, t in make((2, 2), n=n).items()}
        turn = Rotary.of(torch.arange(n, device=DEVICE), 16)
        wanted = torch.autograd.grad(attend(**x, cos=turn.cos, sin=turn.sin).square().sum(), list(x.values()))
        found = torch.autograd.grad(compiled(**x, cos=turn.cos, sin=turn.sin).square().sum(), list(x.values()))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
