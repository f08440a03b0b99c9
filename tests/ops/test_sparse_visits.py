"""Which tiles the sparse kernels visit: every seen pair, whole tiles seen whole, and the lists by key those by query, turned."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad.ops.sparse import Layout
from subquad.ops.sparse.grids import Neighborhood
from subquad.ops.sparse.rules import Causal, Window
from subquad.ops.sparse.visits import Tiling, by_call, by_rule, on_grid, tiling

RULES = {
    "dense": lambda n, m: Layout.dense(n, m),
    "causal": lambda n, m: Layout.causal(n, m),
    "window": lambda n, m: Layout.window(n, 19, 3, m),
    "terrace": lambda n, m: Layout.terrace(n, 12, m),
    "strided": lambda n, m: Layout.strided(n, 3, window=2, block=8, m=m),
    "power": lambda n, m: Layout.power(n, window=1, sinks=1, block=8, m=m),
}


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
