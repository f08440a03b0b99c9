"""Pairs that are counted without a look at them, against the elementwise definition."""

from itertools import product

import pytest
import torch

from subquad.ops.sparse import Layout
from subquad.ops.sparse.count import pairs_of

GRIDS = [((n,), w) for n in range(1, 10) for w in range(1, n + 1)] + [((5, 7), (2, 5)), ((6, 4, 5), (3, 4, 2))]


def looked_at(layout):
    q, k = torch.arange(layout.m - layout.n, layout.m), torch.arange(layout.m)
    return int(layout.inner.allowed(q[:, None], k[None, :]).expand(layout.n, layout.m).sum())


@pytest.mark.parametrize("n, m", [(0, 5), (1, 1), (9, 9), (4, 13), (13, 13)])
def test_rules_of_lines(n, m):
    found = [Layout.causal(n, m), Layout.dense(n, m)]
    found += [Layout.window(n, size, sinks, m=m) for size in (1, 3, 12, 20) for sinks in (0, 1, 4, 15)]
    found += [Layout.terrace(n, size, m) for size in (1, 3, 20)]
    for layout in found:
        assert pairs_of(layout.inner, n, m) == looked_at(layout), layout


@pytest.mark.parametrize("grid, window", GRIDS, ids=str)
def test_neighborhoods(grid, window):
    sides = (window,) * len(grid) if isinstance(window, int) else window
    for stride, dilation, causal in product((1, 2), (1, 2), (False, True)):
        if stride <= min(sides) and all(w * dilation <= size for w, size in zip(sides, grid)):
            layout = Layout.neighborhood(grid, sides, stride=stride, dilation=dilation, causal=causal)
            assert pairs_of(layout.inner, layout.n, layout.m) == looked_at(layout), layout


@pytest.mark.parametrize("grid", [(9,), (6, 7), (1, 8), (4, 5, 3)], ids=str)
def test_circles(grid):
    for radius in (1, 1.5, 2, 3.7, 6, 30):
        layout = Layout.circle(grid, radius)
        assert pairs_of(layout.inner, layout.n, layout.m) == looked_at(layout), radius


def test_large_layouts_are_shown_without_a_look_at_their_pairs(monkeypatch):
    side = 1024
    layout = Layout.neighborhood((side, side), 13)
    monkeypatch.setattr(type(layout.inner), "allowed", None)
    assert layout.density == 13 * 13 / side**2 and "density 0.02 %" in repr(layout)
    n, w = 1 << 20, 4096
    assert Layout.window(n, w).density == (w * (w + 1) // 2 + (n - w) * w) / n**2
