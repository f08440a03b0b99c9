"""The simulator of neighbourhood attention against masks laid out tile by tile, and against what its paper prints."""

import itertools
import math
import random

import pytest

from subquad import InputError
from subquad.bench.gna import Tiling, frontier, ranked, shapes_of
from subquad.ops.sparse import Layout

HUNYUAN, FLUX, COSMOS = (30, 48, 80), (256, 256), (16, 44, 80)


def problems(seed, count):
    """Random grids of one to three axes with windows, strides, dilations and tiles that divide nothing."""
    draw = random.Random(seed)
    for _ in range(count):
        axes = []
        for _ in range(draw.choice((1, 2, 2, 3))):
            side = draw.randint(2, 9)
            dilation = draw.choice((1, 1, 1, 2, 3)) if side >= 6 else 1
            window = draw.randint(1, side // dilation)
            axes.append((side, window, draw.randint(1, window), dilation, draw.random() < 0.3, draw.randint(1, 5), draw.randint(1, 5)))
        yield list(zip(*axes))


def neighborhood(grid, window, stride, dilation, causal):
    return Layout.neighborhood(grid, window, stride=stride, dilation=dilation, causal=causal)


def tiles_by_mask(layout, grid, dilation, tile_q, tile_k, dynamic):
    """(query tile → the key tiles it visits, those that are whole), by looking at every pair."""
    mask = layout.to_mask()
    place = list(itertools.product(*map(range, grid)))
    members = {}
    for token, at in enumerate(place):
        key = tuple((x % d, x // d // t) for x, d, t in zip(at, dilation, tile_q))
        members.setdefault(key, []).append(token)
    found = {}
    for tile, queries in members.items():
        classes = [r for r, _ in tile]
        own = [j for j, at in enumerate(place) if [x % d for x, d in zip(at, dilation)] == classes]
        inner = {j: tuple(x // d for x, d in zip(place[j], dilation)) for j in own}
        seen = [j for j in own if mask[queries, j].any()]
        origin = [min(inner[j][axis] for j in seen) for axis in range(len(grid))] if dynamic else [0] * len(grid)
        until = [max(inner[j][axis] for j in seen) for axis in range(len(grid))] if dynamic else [math.inf] * len(grid)
        keys = {}
        for j in own:
            if all(o <= x <= u for x, o, u in zip(inner[j], origin, until)):
                keys.setdefault(tuple((x - o) // t for x, o, t in zip(inner[j], origin, tile_k)), []).append(j)
        found[tile] = (
            {name for name, js in keys.items() if mask[queries][:, js].any()},
            {name for name, js in keys.items() if mask[queries][:, js].all()},
        )
    return found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_equals_enumeration(seed, dynamic):
    for grid, window, stride, dilation, causal, tile_q, tile_k in problems(seed, 4):
        layout = neighborhood(grid, window, stride, dilation, causal)
        tiling = Tiling(layout.rule, tile_q, tile_k, dynamic)
        found = tiles_by_mask(layout, grid, dilation, tile_q, tile_k, dynamic)
        visited = {}
        for parts in itertools.product(*map(visits, tiling.axes)):
            box = itertools.product(*(range(first, last + 1) for _, first, last in parts))
            visited[tuple(place for place, _, _ in parts)] = set(box)
        assert visited == {tile: keys for tile, (keys, _) in found.items()}
        assert tiling.visited == sum(len(keys) for keys, _ in found.values())
        assert tiling.worst == max(len(keys) for keys, _ in found.values())
        assert round((1 - tiling.partial) * tiling.visited) == sum(len(whole) for _, whole in found.values())
        assert tiling.density == pytest.approx(float(layout.to_mask().double().mean()), rel=1e-12)
        assert tiling.ideal >= tiling.reachable * (1 - 1e-12)


def visits(axis):
    """((residue class, query tile), first key tile, last) of one axis."""
    return [
        ((residue, number), a, b)
        for residue, (first, last, *_) in enumerate(axis.visits())
        for number, (a, b) in enumerate(zip(first.tolist(), last.tolist()))
    ]


@pytest.mark.parametrize(
    "grid, window, stride, tile_q, tile_k, share, printed",
    [
        (FLUX, 80, 1, (16, 16), (16, 8), 0.518, 1.76),
        (FLUX, 80, 16, (16, 16), (16, 8), 0.518, 1.88),
        (COSMOS, (16, 24, 16), 1, (8, 4, 8), (4, 4, 8), 0.587, 1.90),
        (COSMOS, (16, 24, 16), (1, 8, 16), (8, 4, 8), (4, 4, 8), 0.587, 2.10),
        (HUNYUAN, (18, 24, 24), 1, (4, 8, 8), (2, 8, 8), 0.607, 1.73),
        (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 0.607, 2.23),
    ],
)
def test_published_end_to_end_bounds(grid, window, stride, tile_q, tile_k, share, printed):
    """The columns of bounds in the paper's tables: 90, 89 and 91 % of the pairs left out, at stride 1 and at the stride they use."""
    tiling = Tiling(Layout.neighborhood(grid, window, stride=stride).rule, tile_q, tile_k)
    assert tiling.end_to_end(share) == pytest.approx(printed, abs=0.006)
    assert (tiling.partial == 0 and tiling.bound == pytest.approx(tiling.ideal)) == (stride != 1)


@pytest.mark.parametrize(
    "grid, window, left_out",
    [
        (FLUX, 80, 90),
        (COSMOS, (16, 24, 16), 89),
        (COSMOS, (16, 32, 48), 56),
        (HUNYUAN, (18, 24, 24), 91),
        (HUNYUAN, (30, 40, 40), 58),
    ],
)
def test_published_sparsity(grid, window, left_out):
    tiling = Tiling(Layout.neighborhood(grid, window).rule, (1,) * len(grid), (1,) * len(grid))
    assert round(100 * (1 - tiling.density)) == left_out
    # tiles of one token waste nothing
    assert tiling.reachable == pytest.approx(tiling.ideal) == pytest.approx(tiling.bound) and tiling.partial == 0


def test_published_case_of_58_percent():
    """HunyuanVideo with a window of 30×40×40: stride 1×32×8 leaves no mask, stride 1 loses two fifths of what there is to gain."""
    block, plain = (
        Tiling(Layout.neighborhood(HUNYUAN, (30, 40, 40), stride=stride).rule, (2, 16, 8), (2, 8, 8)) for stride in ((1, 32, 8), 1)
    )
    assert block.reachable == block.bound == pytest.approx(2.4) and block.partial == 0
    assert plain.bound == pytest.approx(48 * 80 / (6 * 7 * 64))  # 6 of 6 and 7 of 10 key tiles


@pytest.mark.parametrize(
    "grid, window, tile_q, tile_k, share, printed",
    [
        (FLUX, (80, 80), (16, 16), (16, 8), 0.518, [1.76, 1.84, 1.88]),
        (HUNYUAN, (18, 24, 24), (4, 8, 8), (2, 8, 8), 0.607, [1.73, 1.78, 1.98, 2.02, 2.18, 2.20, 2.23]),
    ],
)
def test_the_frontier_of_strides_is_the_published_one(grid, window, tile_q, tile_k, share, printed):
    found = frontier(Layout.neighborhood(grid, window).rule, [tile_q], [tile_k])
    assert [x.end_to_end(share) for x in found] == pytest.approx(printed, abs=0.006)
    assert found[0].rule.stride == (1,) * len(grid) and found[-1].partial == 0


def test_the_frontier_leaves_out_what_gains_nothing():
    """Against every stride and pair of tiles: each kept one beats all with as few queries to a window, and nothing beats them."""
    rule = Layout.neighborhood((7, 10), (4, 6), causal=(True, False)).rule
    tiles = shapes_of(4, rule.grid)
    kept = frontier(rule, tiles, tiles)
    every = [
        Tiling(Layout.neighborhood((7, 10), (4, 6), stride=stride, causal=(True, False)).rule, q, k)
        for stride in itertools.product(range(1, 5), range(1, 7))
        for q, k in itertools.product(tiles, tiles)
    ]
    steps = sorted({x.shared for x in every})
    best = [max(x.reachable for x in every if x.shared <= step) for step in steps]
    gains = [(step, now) for step, now, before in zip(steps, best, [0.0, *best]) if now > before * (1 + 1e-12)]
    assert [(x.shared, x.reachable) for x in kept] == gains


def test_shapes_and_their_order():
    assert shapes_of(8, (3, 100)) == [(1, 8), (2, 4), (4, 2)]
    assert all(math.prod(shape) == 64 for shape in shapes_of(64, HUNYUAN)) and (4, 4, 4) in shapes_of(64, HUNYUAN)
    rows = ranked(Layout.neighborhood((12, 12), 5).rule, shapes_of(16, (12, 12)), shapes_of(16, (12, 12)))
    assert [x.reachable for x in rows] == sorted((x.reachable for x in rows), reverse=True)
    assert len(rows) == 25 and rows[0].tile_q == rows[0].tile_k == (4, 4)


def test_dynamic_tiles_follow_the_window():
    """A shared window of 16 keys is two tiles of 8 wherever it begins; on a fixed grid it mostly lies across three."""
    rule = Layout.neighborhood(64, 16, stride=4).rule
    fixed, moving = (Tiling(rule, (4,), (8,), dynamic) for dynamic in (False, True))
    assert moving.visited == 16 * 2 and moving.partial == 0 and moving.reachable == moving.ideal == 4
    assert fixed.worst == 3 and fixed.visited > moving.visited and fixed.ideal == 4


@pytest.mark.parametrize("tile_q, tile_k, argument", [((4,), (4, 4), "tile_q"), ((4, 4), (4, 0), "tile_k")])
def test_bad_tiles_are_named(tile_q, tile_k, argument):
    with pytest.raises(InputError) as error:
        Tiling(Layout.neighborhood((8, 8), 3).rule, tile_q, tile_k)
    assert error.value.argument == argument
    with pytest.raises(InputError, match="rule: got Causal"):
        Tiling(Layout.causal(8).rule, (4,), (4,))


def test_a_long_grid_is_counted_axis_by_axis():
    """A million tokens: no pair of them is looked at."""
    tiling = Tiling(Layout.neighborhood((100, 100, 100), 21).rule, (4, 4, 8), (4, 4, 8))
    assert tiling.tokens == 10**6 and tiling.density == pytest.approx(0.21**3)
    assert tiling.worst == 7 * 7 * 5 and tiling.reachable < tiling.ideal
