"""The sparse Triton kernels against the dense definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import inspect
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from bounds import check_bounds

from subquad.ops.launcher import Launcher
from subquad.ops.sparse import Layout, fused, launch, sparse_attention, sparse_attention_reference
from subquad.ops.sparse.codes import decode, encode
from subquad.ops.sparse.compiled import triton_rule
from subquad.ops.sparse.grids import Neighborhood
from subquad.ops.sparse.launch import Tile
from subquad.ops.sparse.patterns import Intersection, Union, join
from subquad.ops.sparse.rules import EVERYTHING, Causal, Window
from subquad.ops.sparse.visits import Tiling, by_call, by_rule, on_grid, tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {
    (kernel, 32, 32, False): tile
    for kernel, tile in {"forward": Tile(32, 16, 4, 1), "query": Tile(16, 32, 4, 1), "key": Tile(16, 32, 4, 1)}.items()
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Tiles so small that few tokens are many of them, of other sizes in each kernel."""
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    monkeypatch.setattr(launch, "TABLE", SMALL)
    if DEVICE.type == "cpu":
        check_bounds(monkeypatch)


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """The kernels that a test launched."""
    made: list[str] = []
    run = launch._run
    monkeypatch.setattr(launch, "_run", lambda kernel, *args: (made.append(kernel), run(kernel, *args))[1])
    return made


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


RULES = {
    "dense": lambda n, m: Layout.dense(n, m),
    "causal": lambda n, m: Layout.causal(n, m),
    "window": lambda n, m: Layout.window(n, 19, 3, m),
    "terrace": lambda n, m: Layout.terrace(n, 12, m),
    "strided": lambda n, m: Layout.strided(n, 3, window=2, block=8, m=m),
    "power": lambda n, m: Layout.power(n, window=1, sinks=1, block=8, m=m),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("n", "m"), [(70, 70), (37, 90)])
def test_rules(name, n, m, launched):
    both_ways(RULES[name](n, m))
    assert launched == ["forward", "query", "key"]


GRIDS = {
    "plane": lambda: Layout.neighborhood((11, 9), (5, 4)),
    "stride and dilation": lambda: Layout.neighborhood((12, 10), (5, 3), stride=(2, 3), dilation=(2, 3)),
    "volume, causal": lambda: Layout.neighborhood((3, 7, 6), (2, 3, 4), causal=(True, False, False)),
    "circle": lambda: Layout.circle((9, 13), 3.2),
    "ball": lambda: Layout.circle((4, 5, 6), 2.5),
    "line": lambda: Layout.neighborhood(75, 12, stride=2, causal=True),
    "image among text": lambda: Layout.circle((7, 9), 2.5, text_tokens=8),
    "joined": lambda: Layout.circle((9, 13), 3.2) | Layout.neighborhood((9, 13), 3, dilation=3),
    "joined with another kind": lambda: Layout.circle((9, 8), 3.2) | Layout.global_tokens(72, 5),
}


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
RUNS = torch.tensor([[[[3, 40], [0, 0], [9, 9]]]]), torch.tensor([[[[20, 60], [70, 5], [9, 9]]]])


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    layout = LISTS[name]()
    both_ways(layout, batch=2)


@pytest.mark.parametrize("name", ["bitmaps of half a word", "runs"])
def test_lists_that_rows_share_at_positions_of_their_own(name):
    layout = LISTS[name]() & Layout.causal(70, LISTS[name]().m)
    both_ways(layout, batch=2, given={"q_pos": torch.arange(70, device=DEVICE) + torch.tensor([[0], [5]], device=DEVICE)})


def test_lists_chosen_on_the_device():
    """Whole and partial blocks are told apart without reading them; a list that repeats nothing and a block of queries without keys."""
    index = torch.stack([torch.randperm(5)[:3] for _ in range(3)])[None, None]
    layout = Layout.from_blocks(index, torch.tensor([[[3, 0, 2]]]), (32, 16), n=70, m=75, rule=Causal())
    assert layout.dynamic
    both_ways(layout)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 2), (2, 4, 4), (4, 4, 1)])
@pytest.mark.parametrize("of", ["rule", "lists"])
def test_head_counts(heads, of):
    layout = Layout.window(40, 15, 2) if of == "rule" else Layout.from_block_mask(torch.rand(4, 3, 3) > 0.4, 16, n=40, m=40)
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
    made = Layout.window(70, 19, 3) if layout == "window" else Layout.from_block_mask(torch.rand(5, 5) > 0.3, 16, n=70, m=70, rule=Causal())
    both_ways(made, given={"cu_seqlens": cu})


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
    assert len(calls) == 3
    for kernel, (_, tensors, strides, plain) in calls:
        names = kernel.arg_names[len(tensors) + len(strides) :][: len(plain)]
        free = getattr(kernel, "do_not_specialize", None) or getattr(kernel, "kwargs", {}).get("do_not_specialize")
        assert len(names) == 7 and set(names) <= set(free or ())


def test_empty_inputs():
    for n, batch in ((0, 2), (8, 0)):
        x = [torch.zeros(batch, n, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
        o = sparse_attention(*x, Layout.window(n, 4))
        assert o.shape == x[0].shape and torch.autograd.grad(o.sum(), x)[1].shape == x[1].shape


# ---- what is visited ---------------------------------------------------------------------------------------------


def pairs(lists, tiles: int, row: int = 0) -> dict[tuple[int, int], bool]:
    """(tile, item) -> whether it is partial."""
    found = {}
    for tile in range(tiles):
        a, b, c = (int(lists.offsets[row, 2 * tile + i]) for i in range(3))
        found |= {(tile, int(lists.items[row, i])): i >= b for i in range(a, c)}
        assert len({int(x) for x in lists.items[row, a:c]}) == c - a, "no item twice"
    return found


def check_visits(layout: Layout, tiles: Tiling, by_query, by_key) -> None:
    """Every seen pair is visited, whole tiles are seen whole, and the lists by key are those by query, turned."""
    q_tiles, k_tiles = tiles.counts(layout.n, layout.m)
    visited = pairs(by_query, q_tiles)
    assert visited == {(q, k): part for (k, q), part in pairs(by_key, k_tiles).items()}
    mask = layout.to_mask()
    q_of, k_of = (_tile_of(tiles, size, side) for size, side in ((layout.n, "q"), (layout.m, "k")))
    for q in range(q_tiles):
        for k in range(k_tiles):
            block = mask[q_of == q][:, k_of == k]
            assert not block.any() or (q, k) in visited
            if (q, k) in visited and not visited[q, k]:
                assert block.all() and block.shape[1] == tiles.k
    lengths = by_query.offsets[0, 2::2] - by_query.offsets[0, :-1:2]
    assert (lengths[by_query.order[0].long()].diff() <= 0).all()


def _tile_of(tiles: Tiling, tokens: int, side: str) -> Tensor:
    """The tile of every token."""
    if not tiles.grid:
        return torch.arange(tokens) // getattr(tiles, side)
    box, found = getattr(tiles, f"{side}_box"), torch.zeros(tiles.grid, dtype=torch.long)
    for axis, (size, step) in enumerate(zip(tiles.grid, box)):
        shape = [1] * len(tiles.grid)
        shape[axis] = size
        found = found * -(-size // step) + (torch.arange(size) // step).view(shape)
    return found.flatten()


@pytest.mark.parametrize("name", [*RULES, *GRIDS, "band"])
@pytest.mark.parametrize(("q", "k"), [(16, 8), (8, 32)])
def test_visits_of_rules(name, q, k):
    layout = Layout.band(75, 9, 4, global_tokens=3) if name == "band" else GRIDS[name]() if name in GRIDS else RULES[name](37, 90)
    tiles = tiling(layout.inner, q, k, on_grid(layout.inner))
    found = [by_rule(layout.inner, layout.n, layout.m, tiles, torch.device("cpu"), by_key) for by_key in (False, True)]
    check_visits(layout, tiles, *found)


@pytest.mark.parametrize("seed", range(20))
def test_visits_of_many_tiles(seed):
    """Coarse tiles lose nothing: hundreds of tiles a side, windows of every size."""
    draw = random.Random(seed)
    n = draw.randint(1, 700)
    m = n + draw.randint(0, 300)
    layout = Layout.window(n, draw.randint(1, 900), draw.randint(0, 40), m)
    tiles = Tiling(draw.choice([1, 2, 4]), draw.choice([1, 2, 8]))
    lists = by_rule(layout.inner, n, m, tiles, torch.device("cpu"), False)
    q, k = tiles.counts(n, m)
    row = torch.repeat_interleave(torch.arange(q), (lists.offsets[0, 2::2] - lists.offsets[0, :-1:2]).long())
    visited = torch.zeros(q, k, dtype=torch.bool)
    visited[row, lists.items[0].long()] = True
    mask = torch.zeros(q * tiles.q, k * tiles.k, dtype=torch.bool)
    mask[:n, :m] = layout.to_mask()
    assert torch.equal(visited, mask.unflatten(1, (k, -1)).unflatten(0, (q, -1)).any(-1).any(1))


@pytest.mark.parametrize("seed", range(8))
def test_visits_of_many_boxes(seed):
    draw = random.Random(seed)
    grid = (draw.randint(20, 40), draw.randint(20, 40)) if seed % 2 else (draw.randint(6, 9), draw.randint(6, 12), draw.randint(6, 12))
    layout = Layout.circle(grid, draw.uniform(1, 8)) if seed % 4 < 2 else Layout.neighborhood(grid, draw.randint(1, 6))
    tiles = tiling(layout.inner, 4, 2, True)
    visited = pairs(by_rule(layout.inner, layout.n, layout.m, tiles, torch.device("cpu"), False), tiles.counts(layout.n, layout.m)[0])
    i, j = layout.to_mask().nonzero(as_tuple=True)
    seen = torch.stack([_tile_of(tiles, layout.n, "q")[i], _tile_of(tiles, layout.m, "k")[j]], 1).unique(dim=0)
    assert set(visited) == set(map(tuple, seen.tolist()))


def test_visits_on_a_grid_are_found_from_coarse_to_fine(monkeypatch):
    looked, touches = [], Neighborhood.touches_box
    monkeypatch.setattr(Neighborhood, "touches_box", lambda self, q, k: (looked.append(q[0][0].numel()), touches(self, q, k))[1])
    rule = Layout.neighborhood((256, 256), 13).inner
    tiles = tiling(rule, 128, 64, True)
    by_rule(rule, 1 << 16, 1 << 16, tiles, torch.device("cpu"), False)
    assert sum(looked) <= 512 * 1024 / 4


def test_visits_of_lists():
    layout = Layout.from_predicate(lambda i, j: (i // 20 + j // 30) % 2 == 0, 70, 120, (32, 64))
    tiles = Tiling(16, 32)
    check_visits(layout, tiles, *(by_call(layout, tiles, None, None, None, torch.device("cpu"), by_key) for by_key in (False, True)))


@pytest.mark.parametrize("made", ["packed", "positions", "lists"])
def test_visits_of_a_call_are_found_on_its_device(made):
    """No tensor is copied from the host, which would wait for the device."""
    meta, copies = torch.device("meta"), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            copies.extend(
                str(func) for x in (found if isinstance(found, list | tuple) else [found]) if isinstance(x, Tensor) and x.device != meta
            )
            return found

    layout, pos = Layout.window(70, 19, 3), torch.zeros(2, 70, dtype=torch.int32, device=meta)
    if made == "lists":
        index = torch.zeros(1, 2, 5, 3, dtype=torch.int32, device=meta)
        layout = Layout(70, 70, Causal(), 16, 16, index, index[..., 0], dynamic=True)
    given = (pos[:1], pos[:1], pos[0]) if made == "packed" else (pos, None, None) if made == "positions" else (None, None, None)
    with Watch():
        lists = by_call(layout, Tiling(16, 16), *given, meta, False)
    assert lists.offsets.device == meta and copies == []


def test_a_neighbourhood_visits_fewer_tiles_in_boxes_than_in_lines():
    rule, n, device = Layout.neighborhood((128, 128), 13).inner, 128 * 128, torch.device("cpu")
    boxes, lines = tiling(rule, 128, 64, True), tiling(rule, 128, 64, False)
    assert sorted((*boxes.q_box, *boxes.k_box)) == [8, 8, 8, 16] and not lines.grid
    counts = [by_rule(rule, n, n, tiles, device, False).items.shape[1] for tiles in (boxes, lines)]
    assert counts[0] <= 0.6 * counts[1]


def test_a_million_tokens_cost_their_blocks():
    lists = by_rule(Window(4096), 1 << 20, 1 << 20, Tiling(128, 64), torch.device("cpu"), False)
    # 64 whole tiles of a window and the partial ones at both ends, for each of 8192 tiles of queries
    assert lists.items.shape[1] <= 8192 * 67 and lists.offsets.shape[1] == 2 * 8192 + 1


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
    given = [q, k, v, None, key_bias, *[None] * 11, encode(layout.inner), 64, 64, 0.25, 0.0, True, True]
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
