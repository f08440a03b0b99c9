"""Visits: which tiles of keys each tile of queries visits, or the reverse, as the kernels read it.

A visited pair of tiles is whole (every query sees every key) or partial. Lists are made on the device by one sort; where a rule
says all on indices, they are found from coarse tiles to fine ones, so that the work follows the blocks and not N².
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import cdiv
from subquad.ops.sparse.grids import Box, grid_of
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.rules import Rule

COARSE = 32  # fine tiles along a side of a coarse one
COARSE_BOX = 4  # the same along each axis of a grid
AT_ONCE = 1 << 22  # pairs of tiles looked at together
SORTED = 1 << 24  # pairs up to which nothing is read on the host


class Lists(NamedTuple):
    """The items that each of T tiles visits, for L = rows · heads lists.

    Args:
        rows, heads: of the batch and of attention that have lists of their own; 1 where all share one.
        offsets: int32 ``[L, 2T + 1]``: whole items of tile t stand from offsets[2t] on, partial ones from offsets[2t + 1] on, up to
            offsets[2t + 2].
        items: int32 ``[L, E]``, tiles of the other side.
        order: int32 ``[L, T]``, the tiles by falling number of items, so that long ones begin first.
        numbers: int32 ``[L, E]``, the bitmap of each item, −1 for none; or None.
    """

    rows: int
    heads: int
    offsets: Tensor
    items: Tensor
    order: Tensor
    numbers: Tensor | None


class Tiling(NamedTuple):
    """How tokens lie in tiles: `q` queries and `k` keys each, on a grid boxes of them.

    Args:
        q_box, k_box: sides of the tiles on `grid`; empty for tiles of neighbouring indices.
    """

    q: int
    k: int
    grid: tuple[int, ...] = ()
    q_box: tuple[int, ...] = ()
    k_box: tuple[int, ...] = ()

    def counts(self, n: int, m: int) -> tuple[int, int]:
        """Tiles of queries and of keys."""
        if self.grid:
            return prod(map(cdiv, self.grid, self.q_box)), prod(map(cdiv, self.grid, self.k_box))
        return cdiv(n, self.q), cdiv(m, self.k)


def on_grid(rule: Rule) -> bool:
    """Whether a rule stands on a grid of several axes, whose boxes can be tiles."""
    return len(grid_of(rule) or ()) > 1


@lru_cache(512)
def tiling(rule: Rule, q: int, k: int, boxes: bool) -> Tiling:
    """Tiles of so many queries and keys: neighbouring tokens, or the boxes of the rule's grid that meet the fewest boxes."""
    if not boxes:
        return Tiling(q, k)
    grid = grid_of(rule) or ()

    def cost(q_box: tuple[int, ...], k_box: tuple[int, ...]) -> float:
        total = 1.0
        for axis, side in enumerate(grid):
            near = (rule.span(axis) + q_box[axis] + k_box[axis] - 2) / k_box[axis]  # type: ignore[attr-defined]
            total *= cdiv(side, q_box[axis]) * min(cdiv(side, k_box[axis]), near)
        return total

    best = min((cost(a, b), a, b) for a in _boxes(q, len(grid)) for b in _boxes(k, len(grid)))
    return Tiling(q, k, grid, best[1], best[2])


def _boxes(tokens: int, axes: int) -> list[tuple[int, ...]]:
    """Boxes of powers of two."""
    if axes == 1:
        return [(tokens,)]
    sides = [1 << i for i in range(tokens.bit_length())]
    return [(side, *rest) for side in sides for rest in _boxes(tokens // side, axes - 1)]


class Pairs(NamedTuple):
    """Pairs of tiles ``[rows · heads, E]``, in any order: which are partial, which are meant at all, and their bitmaps."""

    q: Tensor
    k: Tensor
    partial: Tensor
    kept: Tensor | None = None
    numbers: Tensor | None = None

    def lists(self, rows: int, counts: tuple[int, int], by_key: bool) -> Lists:
        """As lists of the tiles of queries, or of keys."""
        owner, item = (self.k, self.q) if by_key else (self.q, self.k)
        owners, items = counts[by_key], max(counts[not by_key], 1)
        key = (owner.long() * 2 + self.partial) * items + item
        if self.kept is not None:
            key = key.masked_fill(~self.kept, 2 * owners * items)
        key, order = key.sort(dim=1)
        bounds = (torch.arange(2 * owners + 1, device=key.device) * items).expand(key.shape[0], -1).contiguous()
        offsets = torch.searchsorted(key, bounds, out_int32=True)
        first = (offsets[:, 2::2] - offsets[:, :-1:2]).sort(dim=1, descending=True, stable=True).indices.int()
        numbers = None if self.numbers is None else self.numbers.gather(1, order).int()
        return Lists(rows, key.shape[0] // rows, offsets, (key % items).int(), first, numbers)


# ---- rules on indices: found once, and remembered ------------------------------------------------------------------


@lru_cache(64)
def by_rule(rule: Rule, n: int, m: int, tiles: Tiling, device: torch.device, by_key: bool) -> Lists:
    """The visits of a rule by which query i stands at i + m − n and key j at j."""
    with torch.inference_mode(False):
        pairs = Pairs(*(x[None] for x in (_on_grid if tiles.grid else _on_line)(rule, n, m, tiles, device)))
        return pairs.lists(1, tiles.counts(n, m), by_key)


def _on_line(rule: Rule, n: int, m: int, tiles: Tiling, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    q_tiles, k_tiles = tiles.counts(n, m)
    shift = m - n

    def touched(q: Tensor, k: Tensor, wide: int) -> Tensor:
        q0, k0 = q * (tiles.q * wide), k * (tiles.k * wide)
        q1, k1 = (q0 + (tiles.q * wide - 1)).clamp(max=n - 1), (k0 + (tiles.k * wide - 1)).clamp(max=m - 1)
        return rule.touches(q0 + shift, q1 + shift, k0, k1)  # type: ignore[no-any-return]

    q, k = _all_pairs(cdiv(q_tiles, COARSE), cdiv(k_tiles, COARSE), device)
    kept = touched(q, k, COARSE)
    near, found = torch.arange(COARSE, device=device), []
    for some_q, some_k in zip(*(x[kept].split(AT_ONCE // COARSE**2) for x in (q, k))):
        q, k = torch.broadcast_tensors((some_q[:, None] * COARSE + near)[:, :, None], (some_k[:, None] * COARSE + near)[:, None])
        inside = (q < q_tiles) & (k < k_tiles)
        q, k = q[inside], k[inside]
        kept = touched(q, k, 1)
        found.append((q[kept], k[kept]))
    q, k = (torch.cat(x) for x in zip(*found))
    q0, k0 = q * tiles.q, k * tiles.k
    whole = rule.covers(q0 + shift, (q0 + (tiles.q - 1)).clamp(max=n - 1) + shift, k0, k0 + (tiles.k - 1)) & (k0 + tiles.k <= m)
    return q, k, ~whole


def _all_pairs(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pair = torch.arange(rows * columns, device=device)
    return pair // max(columns, 1), pair % max(columns, 1)


def _on_grid(rule: Any, n: int, m: int, tiles: Tiling, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    grid, fine = tiles.grid, (tiles.q_box, tiles.k_box)
    wide = [tuple(side * COARSE_BOX for side in sides) for sides in fine]

    def boxes(q: Tensor, k: Tensor, sides: Any) -> list[Box]:
        return [[(a, b.clamp(max=size - 1)) for (a, b), size in zip(_box(x, grid, s), grid)] for x, s in zip((q, k), sides)]

    q, k = _all_pairs(prod(map(cdiv, grid, wide[0])), prod(map(cdiv, grid, wide[1])), device)
    kept = rule.touches_box(*boxes(q, k, wide))
    found = []
    for some_q, some_k in zip(*(x[kept].split(AT_ONCE // COARSE_BOX ** (2 * len(grid))) for x in (q, k))):
        (q, q_in), (k, k_in) = (_finer(x, grid, sides) for x, sides in zip((some_q, some_k), fine))
        inside = q_in[:, :, None] & k_in[:, None]
        q, k = (x[inside] for x in torch.broadcast_tensors(q[:, :, None], k[:, None]))
        kept = rule.touches_box(*boxes(q, k, fine))
        found.append((q[kept], k[kept]))
    q, k = (torch.cat(x) for x in zip(*found))
    whole = rule.covers_box(*boxes(q, k, fine))
    for (_, last), size in zip(_box(k, grid, tiles.k_box), grid):
        whole = whole & (last < size)
    return q, k, ~whole


def _finer(tile: Tensor, grid: tuple[int, ...], sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The tiles in each coarse one ``[E]``, and which of them are on the grid, ``[E, COARSE_BOX ** axes]``."""
    index, inside = torch.zeros_like(tile)[:, None], torch.ones_like(tile, dtype=torch.bool)[:, None]
    near = torch.arange(COARSE_BOX, device=tile.device)
    wide = _box(tile, grid, tuple(side * COARSE_BOX for side in sides))
    for (first, _), size, side in zip(wide, grid, sides):
        at, count = (first // side)[:, None] + near, cdiv(size, side)
        index = (index[:, :, None] * count + at[:, None]).flatten(1)
        inside = (inside[:, :, None] & (at < count)[:, None]).flatten(1)
    return index, inside


def _box(tile: Tensor, grid: tuple[int, ...], sides: tuple[int, ...]) -> Box:
    """The coordinates of tiles, first and last along each axis, beyond the grid too."""
    ranges: Box = []
    for size, side in zip(reversed(grid), reversed(sides)):
        count = cdiv(size, side)
        first = tile % count * side
        ranges.append((first, first + (side - 1)))
        tile = tile // count
    return ranges[::-1]


# ---- lists, given positions and packed sequences: made on the device at each call ------------------------------------


class Ranges(NamedTuple):
    """What tiles of tokens hold, ``[R, T]`` each: least and greatest position, whether all are seen, first and last sequence."""

    low: Tensor
    high: Tensor
    seen: Tensor | None
    first: Tensor | None
    last: Tensor | None

    def repeat(self, times: int) -> Ranges:
        """Every row that many times, side by side."""
        made: Any = (x if x is None or x.shape[0] == 1 else x.repeat_interleave(times, 0) for x in self)
        return Ranges(*made)


def ranges(pos: Tensor | None, sequence: Tensor | None, tokens: int, shift: int, side: int, device: torch.device, *, keys: bool) -> Ranges:
    """Of `tokens` tokens at positions `pos` ``[R, tokens]``, or at their index + shift, in tiles of `side`."""
    if pos is None:
        low = torch.arange(0, tokens, side, device=device)[None] + shift
        high, seen = (low + (side - 1)).clamp(max=tokens - 1 + shift), None
    else:
        hidden = pos < 0 if keys else None
        low, high = _extremes(pos if hidden is None else pos.masked_fill(hidden, torch.iinfo(pos.dtype).max), pos, side)
        seen = None if hidden is None else ~_extremes(hidden.byte(), hidden.byte(), side)[1].bool()
    first, last = (None, None) if sequence is None else _extremes(sequence[None], sequence[None], side)
    return Ranges(low, high, seen, first, last)


def _extremes(low: Tensor, high: Tensor, side: int) -> tuple[Tensor, Tensor]:
    pad = -low.shape[1] % side
    low, high = (torch.cat([x, x[:, -1:].expand(-1, pad)], 1).unflatten(1, (-1, side)) for x in (low, high))
    return low.amin(2), high.amax(2)


def _decide(rule: Rule, q: Ranges, k: Ranges, tq: Tensor, tk: Tensor) -> tuple[Tensor, Tensor]:
    """(whether pairs of tiles ``[R, E]`` are visited, whether they are partial), by positions and sequences."""

    def at(x: Tensor, tile: Tensor) -> Tensor:
        return x.expand(tile.shape[0], -1).gather(1, tile)

    q0, q1, k0, k1 = at(q.low, tq), at(q.high, tq), at(k.low, tk), at(k.high, tk)
    kept, whole = rule.touches(q0, q1, k0, k1) & (k1 >= 0), rule.covers(q0, q1, k0, k1)
    whole = whole if k.seen is None else whole & at(k.seen, tk)
    if q.first is not None and q.last is not None and k.first is not None and k.last is not None:
        a, b, c, d = at(q.first, tq), at(q.last, tq), at(k.first, tk), at(k.last, tk)
        kept, whole = kept & (a <= d) & (c <= b), whole & (a == b) & (c == d) & (a == c)
    return kept, ~whole


def by_call(
    layout: Layout, tiles: Tiling, q_pos: Tensor | None, k_pos: Tensor | None, sequence: Tensor | None, device: torch.device, by_key: bool
) -> Lists:
    """The visits where lists, given positions ``[1|B, tokens]`` or packed sequences (the sequence of each token) say more."""
    counts = tiles.counts(layout.n, layout.m)
    q = ranges(q_pos, sequence, layout.n, layout.m - layout.n, tiles.q, device, keys=False)
    k = ranges(k_pos, sequence, layout.m, 0, tiles.k, device, keys=True)
    rows = max(q.low.shape[0], k.low.shape[0])
    if layout.index is None:
        tq, tk = (x.expand(rows, -1) for x in _all_pairs(*counts, device))
        kept, partial = _decide(layout.inner, q, k, tq, tk)
        if rows == 1 and kept.numel() > SORTED:  # a synchronisation, rather than a sort of what is mostly nothing
            tq, tk, partial, kept = tq[:, kept[0]], tk[:, kept[0]], partial[:, kept[0]], kept[:, kept[0]]
        pairs = Pairs(tq, tk, partial, kept)
    else:
        rows, heads = max(layout.index.shape[0], rows), layout.index.shape[1]
        named = _listed(layout, tiles, rows)
        # every head of a row has the row's positions
        kept, partial = _decide(layout.inner, q.repeat(heads), k.repeat(heads), named.q, named.k)
        pairs = named._replace(kept=kept if named.kept is None else named.kept & kept, partial=named.partial | partial)
    cut = pairs.k * tiles.k + tiles.k > layout.m
    return pairs._replace(partial=pairs.partial | cut).lists(rows, counts, by_key)


def _listed(layout: Layout, tiles: Tiling, rows: int) -> Pairs:
    """The pairs of tiles that block lists name."""
    assert layout.index is not None and layout.counts is not None
    index, counts, device = layout.index, layout.counts, layout.index.device
    q_blocks, capacity = index.shape[2:]
    slots = torch.arange(capacity, device=device).expand(counts.numel(), -1)
    row, head, block = (x.flatten() for x in torch.meshgrid(*(torch.arange(s, device=device) for s in counts.shape), indexing="ij"))
    blocks = index[row, head, block].long()
    whole = layout.whole((row, head, block), blocks, slots)
    sub_q, sub_k = layout.block_q // tiles.q, layout.block_k // tiles.k
    q = torch.arange(q_blocks, device=device)[:, None, None, None] * sub_q + torch.arange(sub_q, device=device)[:, None]
    k = index.long()[..., None, None] * sub_k + torch.arange(sub_k, device=device)
    kept = (q * tiles.q < layout.n) & (k * tiles.k < layout.m) & (slots < counts.flatten()[:, None]).view(*index.shape, 1, 1)

    def each(x: Tensor) -> Tensor:
        return x.expand(kept.shape).flatten(2).expand(rows, -1, -1).flatten(0, 1)

    partial = torch.zeros_like(kept) if whole is None else ~whole.view(*index.shape, 1, 1)
    numbers = None if layout.bit_index is None else each(layout.bit_index[..., None, None])
    return Pairs(each(q.where(kept, 0)), each(k.where(kept, 0)), each(partial), each(kept), numbers)


__all__ = ["Lists", "Ranges", "Tiling", "by_call", "by_rule", "on_grid", "tiling"]
