"""The sparse Triton kernels against the dense definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from bounds import check_bounds
from ops.test_sparse_visits import GRIDS, RULES

from subquad.ops.launcher import Launcher
from subquad.ops.sparse import Layout, RelativeBias, fused, launch, sparse_attention, sparse_attention_reference
from subquad.ops.sparse.codes import decode, encode
from subquad.ops.sparse.compiled import triton_rule
from subquad.ops.sparse.launch import Tile
from subquad.ops.sparse.patterns import Intersection, Union, join
from subquad.ops.sparse.rules import EVERYTHING, Causal, Window

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {
    (kernel, 32, 32, False): tile
    for kernel, tile in {"forward": Tile(32, 16, 4, 1), "query": Tile(16, 32, 4, 1), "key": Tile(16, 32, 4, 1)}.items()
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Tiles so small that few tokens are many of them, of other sizes in each kernel."""
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    before = dict(launch.TABLE)
    launch.use(SMALL)
    if DEVICE.type == "cpu":
        check_bounds(monkeypatch)
    yield
    launch.use(before)


@pytest.fixture(autouse=True)
def launched(launched, monkeypatch) -> list[str]:
    """The kernels that a test launched."""
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda kernel, *args: (launched.append(kernel), run(kernel, *args))[1])
    return launched


def make(layout: Layout, *, heads=(2, 1, 1), width=16, values=16, batch=1) -> list[Tensor]:
    sizes = zip((layout.n, layout.m, layout.m), heads, (width, width, values))
    return [torch.randn(batch, tokens, h, d) for tokens, h, d in sizes]


def both_ways(layout: Layout, *, learned: dict[str, Any] | None = None, given: dict[str, Any] | None = None, **sizes: Any) -> None:
    """o, lse and every gradient, by the kernels in float32 and by the definition in float64; lse has a gradient of its own."""
    x, results = make(layout, **sizes), []
    for attend, dtype in ((sparse_attention, torch.float32), (sparse_attention_reference, torch.float64)):
        qkv = [t.to(DEVICE, dtype).requires_grad_() for t in x]
        more = {name: _leaves(value, dtype) for name, value in (learned or {}).items()}
        options: dict[str, Any] = {} if attend is sparse_attention_reference else {"return_lse": True}
        o, lse, *_ = attend(*qkv, layout, **more, **(given or {}), **options)
        seen = lse > -torch.inf
        weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(i)).to(t) for i, t in enumerate((o, lse))]
        loss = (o * weights[0]).sum() + (lse.masked_fill(~seen, 0) * weights[1]).sum()
        leaves = [*qkv, *itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in more.values())]
        results.append([seen, o.detach(), lse.detach().masked_fill(~seen, 0), *torch.autograd.grad(loss, leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for found, wanted in zip(*(r[1:] for r in results)):
        assert found.shape == wanted.shape
        assert (found.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max().clamp_min(0.1)


def _leaves(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_leaves(x, dtype) for x in value)
    return value.to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("n", "m"), [(70, 70), (37, 90)])
def test_rules(name, n, m, launched):
    both_ways(RULES[name](n, m))
    assert launched == ["forward", "query", "key"]


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    both_ways(GRIDS[name]())


def test_band_with_global_tokens():
    both_ways(Layout.band(75, 9, 4, global_tokens=3))


LISTS = {
    "blocks": lambda: Layout.from_block_mask(torch.rand(2, 2, 4) > 0.5, (32, 16), n=60, m=64),
    "blocks of each row": lambda: Layout.from_block_mask(torch.rand(2, 1, 3, 4) > 0.5, (32, 32), n=90, m=128),
    "bitmaps": lambda: Layout.from_predicate(lambda i, j: (i * 7 + j * 3) % 5 < 2, 70, 80, (32, 64)),
    "bitmaps of half a word": lambda: Layout.from_predicate(lambda i, j: (i * 7 + j * 3) % 5 < 2, 70, 80, 16),
    "bitmaps of a word and a half": lambda: Layout.from_predicate(lambda i, j: (i * 7 + j * 3) % 5 < 2, 70, 80, (16, 48)),
    "within a rule": lambda: Layout.from_block_mask(torch.rand(5, 5) > 0.3, 16, n=70, m=75, rule=Window(25, 2)),
    "runs": lambda: Layout.from_runs(*RUNS, 70, n=70, block=(32, 16)),
}
RUNS = torch.tensor([[[[3, 40], [0, 0], [9, 9]]]], device=DEVICE), torch.tensor([[[[20, 60], [70, 5], [9, 9]]]], device=DEVICE)


def listed(name: str) -> Layout:
    with DEVICE:
        return LISTS[name]()


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    both_ways(listed(name), batch=2)


@pytest.mark.parametrize("name", ["bitmaps of half a word", "runs"])
def test_lists_that_rows_share_at_positions_of_their_own(name):
    layout = listed(name)
    layout &= Layout.causal(70, layout.m)
    both_ways(layout, batch=2, given={"q_pos": torch.arange(70, device=DEVICE) + torch.tensor([[0], [5]], device=DEVICE)})


def test_lists_chosen_on_the_device():
    """Whole and partial blocks are told apart without reading them; a list that repeats nothing and a block of queries without keys."""
    index = torch.stack([torch.randperm(5, device=DEVICE)[:3] for _ in range(3)])[None, None]
    layout = Layout.from_blocks(index, torch.tensor([[[3, 0, 2]]], device=DEVICE), (32, 16), n=70, m=75, rule=Causal())
    assert layout.dynamic
    both_ways(layout)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 2), (2, 4, 4), (4, 4, 1)])
@pytest.mark.parametrize("of", ["rule", "lists"])
def test_head_counts(heads, of):
    layout = Layout.window(40, 15, 2) if of == "rule" else Layout.from_block_mask(torch.rand(4, 3, 3, device=DEVICE) > 0.4, 16, n=40, m=40)
    both_ways(layout, heads=heads)


@pytest.mark.parametrize(("width", "values"), [(24, 16), (16, 40), (8, 8)])
def test_widths(width, values):
    both_ways(Layout.window(40, 15, 2), width=width, values=values)


BIASES = {
    "slopes": {"bias": torch.tensor([0.1, 0.7])},
    "key bias": {"key_bias": torch.linspace(-2, 1, 140).view(1, 2, 70)},
    "shared key bias": {"key_bias": torch.linspace(-2, 1, 70).view(1, 1, 70)},
    "factors": {"bias": (torch.linspace(-1, 1, 420).view(1, 70, 2, 3), torch.linspace(-1, 2, 210).view(1, 70, 1, 3).cos())},
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("layout", ["window", "dense"])
def test_biases_and_their_gradients(name, layout):
    both_ways(Layout.window(70, 19, 3) if layout == "window" else Layout.dense(70), learned=BIASES[name])


def test_slopes_on_a_grid_go_by_position():
    both_ways(Layout.neighborhood((9, 8), 3), learned={"bias": torch.tensor([0.1, 0.7])})


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("reach", [5, 90])
def test_a_table_by_relative_position(heads, reach, launched):
    table = RelativeBias(torch.linspace(-2, 1, heads * (2 * reach + 1), device=DEVICE).view(heads, -1).sin())
    layout, results = Layout.window(70, 19, 3), []
    x = make(layout)
    for attend, dtype in ((sparse_attention, torch.float32), (sparse_attention_reference, torch.float64)):
        qkv = [t.to(DEVICE, dtype).requires_grad_() for t in x]
        o = attend(*qkv, layout, bias=RelativeBias(table.table.to(dtype)))
        o = o[0] if isinstance(o, tuple) else o
        results.append([o.detach(), *torch.autograd.grad(o.sin().sum(), qkv)])
    for found, wanted in zip(*results):
        assert (found.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max()
    assert launched == ["forward", "query", "key"]
    sparse_attention(*x, layout, bias=RelativeBias(table.table.cpu().requires_grad_())) if DEVICE.type == "cpu" else None
    assert len(launched) == 3, "the plain form has the table's gradient"


@pytest.mark.parametrize("biased", [False, True])
def test_softcap(biased):
    both_ways(Layout.window(70, 19, 3), learned=BIASES["key bias"] if biased else None, given={"softcap": 0.8})


def test_hidden_keys_and_rows_that_see_nothing():
    key_bias = torch.zeros(1, 1, 70)
    key_bias[..., :40] = -torch.inf
    x = [t.to(DEVICE).requires_grad_() for t in make(Layout.causal(70))]
    o, lse = sparse_attention(*x, Layout.causal(70), key_bias=key_bias.to(DEVICE), return_lse=True)
    assert (o[:, :40] == 0).all() and (lse[:, :40] == -torch.inf).all() and (o[:, 40:] != 0).any(-1).all()
    grads = torch.autograd.grad((o.square().sum() + lse[:, 40:].sum()), x)
    assert all(g.isfinite().all() and (g[:, :40] == 0).all() and (g[:, 40:] != 0).any() for g in grads)


@pytest.mark.parametrize("layout", ["window", "lists"])
def test_packed_sequences(layout):
    cu = torch.tensor([0, 33, 33, 34, 70], device=DEVICE)
    lists = Layout.from_block_mask(torch.rand(5, 5, device=DEVICE) > 0.3, 16, n=70, m=70, rule=Causal())
    both_ways(Layout.window(70, 19, 3) if layout == "window" else lists, given={"cu_seqlens": cu})


@pytest.mark.parametrize("name", ["causal", "window", "terrace", "power"])
def test_positions(name):
    """Rows of different length, right-aligned as in a cache, with keys that are not there."""
    start = torch.tensor([[30], [9]], device=DEVICE)
    k_pos = torch.arange(75, device=DEVICE) + start - 35
    k_pos[0, 3:20] = -1
    both_ways(RULES[name](40, 75), batch=2, given={"q_pos": torch.arange(40, device=DEVICE) + start, "k_pos": k_pos})


@pytest.mark.parametrize("shift", [-14, 20])
@pytest.mark.parametrize("name", ["plane", "stride and dilation", "volume, causal", "joined with another kind", "image among text"])
def test_queries_outside_of_the_grid(name, shift):
    """Quotients of negative positions are rounded down, as the definition does; no position wraps around."""
    layout = GRIDS[name]()
    both_ways(layout, given={"q_pos": torch.arange(layout.n, device=DEVICE) + shift})


@pytest.mark.parametrize("sorted_pairs", [True, False])
def test_positions_however_the_visits_are_found(sorted_pairs, monkeypatch):
    monkeypatch.setattr("subquad.ops.sparse.visits.SORTED", 1 << 24 if sorted_pairs else 0)
    both_ways(Layout.window(70, 19, 3), given={"q_pos": torch.arange(70, device=DEVICE) + 5})


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["window", "plane", "packed"])
def test_the_maximum_and_its_gradient(name, biased, launched):
    layout = GRIDS["plane"]() if name == "plane" else Layout.window(70, 19)
    given = {"cu_seqlens": torch.tensor([0, 30, 70], device=DEVICE)} if name == "packed" else {}
    key_bias, results = torch.linspace(-2, 1, layout.n).view(1, 1, -1), []
    x = make(layout)
    for attend, dtype in ((sparse_attention, torch.float32), (sparse_attention_reference, torch.float64)):
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in (*x, key_bias)]
        options = {"return_lse": True, "return_max": True} if attend is sparse_attention else {}
        more = {"key_bias": leaves[3], "softcap": 1.5} if biased else {}
        o, lse, top = attend(*leaves[:3], layout, **options, **given, **more)
        weight = torch.linspace(-1, 2, top.numel(), device=DEVICE, dtype=dtype).view(top.shape)
        results.append([top.detach(), *torch.autograd.grad(((lse - top).exp() * weight).sum() + o.sum(), leaves[: 4 if biased else 3])])
    for found, wanted in zip(*results):
        assert (found.double() - wanted).abs().max() <= 5e-6 * wanted.abs().max()
    assert launched == ["forward", "query", "key"]


def test_only_the_gradients_that_are_asked_for(launched):
    q, k, v = (t.to(DEVICE) for t in make(Layout.causal(40)))
    sparse_attention(q.requires_grad_(), k, v, Layout.causal(40)).sum().backward()
    assert launched == ["forward", "query"] and q.grad is not None


def test_strided_inputs():
    q, k, v = make(Layout.causal(40), heads=(2, 2, 2))
    want = sparse_attention(*(t.to(DEVICE) for t in (q, k, v)), Layout.causal(40))
    turned = [t.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    joined = torch.stack([t.to(DEVICE) for t in (q, k, v)], 2).unbind(2)
    for views in (turned, joined):
        assert not views[0].is_contiguous() and torch.equal(sparse_attention(*views, Layout.causal(40)), want)


@pytest.mark.parametrize("n", [1, 40])
def test_steps_between_tokens_are_each_tensors_own(n):
    """Cut from one projection, as they are, shared by all tokens, and a gradient that is: steps are compiled into the kernels."""
    layout = Layout.window(n, 15)
    whole = torch.randn(2, n, 3, 2, 16).to(DEVICE)
    cut, shared = [whole[:, :, i] for i in range(3)], whole[:, :1, 0].expand(-1, n, -1, -1)
    for q, k, v in (cut, [t.contiguous() for t in cut], [cut[0], shared, cut[2]], [shared, cut[1], cut[2].contiguous()]):
        results = []
        for attend, dtype in ((sparse_attention, torch.float32), (sparse_attention_reference, torch.float64)):
            leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
            assert dtype == torch.float64 or [x.stride() for x in leaves] == [x.stride() for x in (q, k, v)]
            o = attend(*leaves, layout)
            o = o[0] if isinstance(o, tuple) else o
            results.append([o, *torch.autograd.grad(o.sum(), leaves)])
        for found, wanted in zip(*results):
            assert (found.double() - wanted).abs().max() <= 3e-6 * wanted.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_inputs(dtype):
    layout = Layout.window(70, 19, 3)
    x = [t.to(DEVICE, dtype).requires_grad_() for t in make(layout)]
    o = sparse_attention(*x, layout)
    wide = [t.detach().double().requires_grad_() for t in x]
    want = sparse_attention_reference(*wide, layout)[0]
    digits = torch.finfo(dtype).eps
    assert o.dtype == dtype and (o.double() - want).abs().max() <= digits * want.abs().max()
    for found, exact in zip(torch.autograd.grad(o.double().sin().sum(), x), torch.autograd.grad(want.sin().sum(), wide)):
        assert found.dtype == dtype and (found.double() - exact).norm() <= 3 * digits * exact.norm()


def test_no_size_is_compiled_into_a_kernel(monkeypatch):
    """Kernels are remembered by all that Triton specialises on, and so it must not specialise on the numbers that follow the strides."""
    calls, call = [], Launcher.__call__
    monkeypatch.setattr(Launcher, "__call__", lambda self, *given: (calls.append((self.kernel, given)), call(self, *given))[1])
    both_ways(Layout.window(40, 15, 2))
    assert {kernel.fn.__name__ for kernel, _ in calls} == {"query_kernel", "key_kernel"}
    for kernel, (_, tensors, strides, plain) in calls:
        names = kernel.arg_names[len(tensors) + len(strides) :][: len(plain)]
        free = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize")
        assert len(names) == 7 and set(names) <= set(free or ())


def test_empty_inputs():
    for n, batch in ((0, 2), (8, 0)):
        x = [torch.zeros(batch, n, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
        o = sparse_attention(*x, Layout.window(n, 4))
        assert o.shape == x[0].shape and torch.autograd.grad(o.sum(), x)[1].shape == x[1].shape


def _learned(n, m):
    """A bias of keys, and factors: what else is read along a tile's keys."""
    factors = tuple(torch.randn(2, size, 1, 3, generator=torch.Generator().manual_seed(size)) for size in (n, m))
    return {"bias": factors, "key_bias": torch.randn(2, 1, m, generator=torch.Generator().manual_seed(9))}


@pytest.mark.parametrize(
    "layout, sizes",
    [
        (Layout.window(70, 25, 3), {}),
        (Layout.dense(37, 50), {"batch": 2, "learned": _learned(37, 50)}),
        (Layout.window(70, 25), {"given": {"cu_seqlens": torch.tensor([0, 13, 13, 70])}}),
        (Layout.from_predicate(lambda q, k: (q * 7 + k * 3) % 5 < 2, 70, 70, block=32), {}),
        (Layout.dense(37, 90), {"batch": 2, "heads": (4, 2, 1)}),
        (Layout.causal(45), {"width": 20, "values": 12}),
        (Layout.causal(45), {"width": 18}),  # rows that begin off 16 bytes: by addresses
    ],
    ids=["window", "beside", "packed", "bitmaps", "groups", "widths", "unaligned"],
)
def test_loads_by_descriptors(layout, sizes, monkeypatch):
    """Tiles beyond the last token and the last channel are zero, as addresses that are not asked for are."""
    asked, call = [], Launcher.__call__
    sizes = {**sizes, "given": {name: x.to(DEVICE) for name, x in sizes.get("given", {}).items()}}
    launch.use({key: tile._replace(described=True) for key, tile in SMALL.items()})
    monkeypatch.setattr(launch, "DESCRIBE_FROM", 0)
    monkeypatch.setattr(Launcher, "__call__", lambda self, *given: (asked.append(given[1][3] is not None), call(self, *given))[1])
    both_ways(layout, **sizes)
    assert set(asked) == {sizes.get("width", 16) % 4 == 0}


# ---- rules as functions, as integers, as operators -------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RULES, *GRIDS])
def test_rules_as_integers(name):
    rule = (GRIDS[name]() if name in GRIDS else RULES[name](37, 90)).inner
    assert decode(encode(rule)) == rule and all(type(x) is int for x in encode(rule))


@pytest.mark.parametrize("name", GRIDS)
def test_sources_are_named_in_ascii(name):
    """The assembler of a GPU takes no other names."""
    assert inspect.getsourcefile(triton_rule(GRIDS[name]().inner, False).fn).isascii()


def test_joined_rules_as_integers():
    rule = join(Intersection, Causal(), join(Union, Window(5, 1), Layout.band(9, 2, 3).inner), EVERYTHING)
    assert decode(encode(rule)) == rule


def test_a_rule_that_branches_cannot_become_a_function():
    class Odd:
        words = "odd"

        def allowed(self, q, k):
            return q if k > 3 else k

        def __hash__(self):
            return 1

    with pytest.raises(TypeError, match="branch"):
        triton_rule(Odd(), False)
    assert not fused.serves(Layout(9, 9, Odd(), 16, 16), None)


def test_operators_are_well_formed():
    layout = Layout.window(40, 15, 2)
    q, k, v = (t.to(DEVICE).requires_grad_() for t in make(layout))
    key_bias = torch.randn(1, 2, 40, device=DEVICE, requires_grad=True)
    given = [q, k, v, None, key_bias, *[None] * 12, encode(layout.inner), 64, 64, 0.25, 0.0, True, True]
    torch.library.opcheck(fused.sparse_op, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


@pytest.mark.parametrize("layout", ["window", "lists", "grid"])
def test_compiles_whole(layout):
    n = 48
    index = torch.tensor([[[[0, 1], [1, 2], [2, 0]]]])

    def made():
        if layout == "lists":
            return Layout.from_blocks(index.to(DEVICE), torch.tensor([[[2, 1, 2]]], device=DEVICE), 16, rule=Causal())
        return Layout.window(n, 19, 3) if layout == "window" else Layout.neighborhood((6, 8), 3)

    def run(q, k, v):
        return sparse_attention(q, k, v, made(), return_lse=True)

    results = []
    for attend in (torch.compile(run, fullgraph=True, backend="aot_eager"), run):
        torch.manual_seed(0)
        x = [t.to(DEVICE).requires_grad_() for t in make(made())]
        o, lse = attend(*x)
        results.append([o, lse, *torch.autograd.grad(o.sin().sum() + lse.masked_fill(lse.isinf(), 0).sum(), x)])
    for found, wanted in zip(*results):
        assert torch.equal(found, wanted)


def test_repeated_runs_are_equal_to_the_last_bit():
    layout = Layout.window(70, 19, 3)
    x = [t.to(DEVICE).requires_grad_() for t in make(layout)]
    runs = [torch.autograd.grad(sparse_attention(*x, layout).square().sum(), x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
