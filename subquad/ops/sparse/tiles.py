"""Tiles: a layout cut into pieces of bounded size, each a few queries of some units against the keys they visit.

A unit is a pair (batch row, head group); the G query heads of a group share keys and lie side by side in a tile's rows.
Internally q is ``[units, N, G, D]``, k and v ``[units of k, M, D]``; a tile reads and writes those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from subquad.ops.sparse.bias import Term
from subquad.ops.sparse.layout import Layout, segments
from subquad.ops.sparse.rules import EVERYTHING

# scores of a tile: few enough on a CPU to stay in cache, many enough on a GPU to fill it
BUDGET = {"cpu": 1 << 20, "cuda": 1 << 26}
MASKS = 256  # masks of partial pieces kept for pieces that look alike
WASTE = 0.75  # block lists share a tile while the shortest has this share of the longest's blocks


def hidden(dtype: torch.dtype) -> float:
    """The score of a pair that is not seen: finite, so that no empty row gives NaN, and below any real score."""
    return torch.finfo(dtype).min / 2


def blank(x: Tensor) -> Tensor:
    """Zeros for the gradient of x."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


@dataclass
class Problem:
    """Everything about one call that is not differentiated.

    Args:
        units, groups, shared: B·U, U and G; query head h is shared·(unit mod U) + its place in the group.
        k_groups: groups of k and v, a divisor of `groups` (smaller when lists differ within a group of heads).
        q_pos, k_pos: ``[N]`` or ``[B, N]`` explicit positions, or None for the layout's own.
        sequences: offsets of the packed sequences, or None.
    """

    layout: Layout
    units: int
    groups: int
    shared: int
    k_groups: int
    dtype: torch.dtype
    device: torch.device
    terms: tuple[Term, ...] = ()
    softcap: float | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    sequences: list[int] | None = None
    sparse_rows: bool = False  # whether a row may see no key
    stats: bool = True  # whether lse and max are wanted
    _masks: dict = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.units // self.groups

    @property
    def budget(self) -> int:
        return BUDGET.get(self.device.type, BUDGET["cpu"])

    def tiles(self) -> Iterator[Tile]:
        return list_tiles(self) if self.layout.index is not None else run_tiles(self)

    def arange(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device)

    def additive(self, seen: Tensor) -> Tensor:
        """A boolean mask as what is added to the scores."""
        shown, not_seen = (torch.full((), x, dtype=self.dtype, device=self.device) for x in (0.0, hidden(self.dtype)))
        return torch.where(seen, shown, not_seen)


class Tile:
    """What both kinds of tile offer; `masks` are (columns, what is added to ``[units, queries, G, columns]``)."""

    problem: Problem
    units: slice | Tensor
    masks: list[tuple[slice, Tensor]]
    q_index: Tensor  # [1 or units, queries], clamped to N − 1
    k_index: Tensor  # [1 or units, keys], clamped to M − 1
    unit_index: Tensor  # [units]

    def rows_of(self, x: Tensor) -> Tensor:
        """The tile's part of ``[units, N, G, …]``: ``[units, queries · G, …]``."""
        raise TypeError

    def keys_of(self, x: Tensor) -> Tensor:
        """The tile's part of ``[units, M, D]``."""
        raise TypeError

    def set_rows(self, x: Tensor, value: Tensor) -> None:
        """Write the tile's rows of ``[units, N, G, …]``."""
        raise TypeError

    def add_keys(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right [units, keys, D]`` to the tile's keys of x."""
        raise TypeError

    @cached_property
    def distance(self) -> Tensor:
        """Key position minus query position, ``[1 or units, queries, keys]``."""
        p = self.problem
        q_pos = self.positions(p.q_pos, self.q_index, p.layout.m - p.layout.n)
        return self.positions(p.k_pos, self.k_index, 0)[:, None, :] - q_pos[:, :, None]

    def positions(self, given: Tensor | None, index: Tensor, shift: int) -> Tensor:
        """Positions of the tokens `index`, ``[1 or units, tokens]``."""
        if given is None:
            return index + shift
        if given.dim() == 1 or given.shape[0] == 1:
            return given.reshape(-1)[index]
        return given[(self.unit_index // self.problem.groups)[:, None], index]


class RunTile(Tile):
    """Queries `rows` of `units` against runs of keys: everything is a slice, nothing is gathered."""

    def __init__(self, problem: Problem, units: slice, rows: slice, runs: list[slice], masks: list[tuple[slice, Tensor]]) -> None:
        self.problem, self.units, self.rows, self.runs, self.masks = problem, units, rows, runs, masks
        self.span = units

    @cached_property
    def unit_index(self) -> Tensor:  # type: ignore[override]
        return self.problem.arange(self.span.start, self.span.stop)

    @cached_property
    def q_index(self) -> Tensor:  # type: ignore[override]
        return self.problem.arange(self.rows.start, self.rows.stop)[None]

    @cached_property
    def k_index(self) -> Tensor:  # type: ignore[override]
        return torch.cat([self.problem.arange(r.start, r.stop) for r in self.runs])[None]

    def rows_of(self, x: Tensor) -> Tensor:
        return x[self.units, self.rows].flatten(1, 2)

    def keys_of(self, x: Tensor) -> Tensor:
        parts = [x[self.units, run] for run in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def set_rows(self, x: Tensor, value: Tensor) -> None:
        x[self.units, self.rows] = value.unflatten(1, (-1, self.problem.shared))

    def add_keys(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        # one product, then sums: a product straight into a slice leaves the batched path of the CPU library
        sizes = [run.stop - run.start for run in self.runs]
        for run, part in zip(self.runs, torch.bmm(left, right).split(sizes, 1)):
            x[self.units, run] += part


def run_tiles(p: Problem) -> Iterator[Tile]:
    """Query blocks one after the other, each with the runs of keys its rule names."""
    offsets = [0, p.layout.n] if p.sequences is None else p.sequences
    for start, stop in pairwise(offsets):
        keys = (start, stop) if p.sequences is not None else (0, p.layout.m)
        if p.q_pos is None and p.k_pos is None:
            yield from _tiles_by_index(p, start, stop, keys)
        elif stop > start:
            yield from _tiles_by_position(p, start, stop, keys)


def _tiles_by_index(p: Problem, start: int, stop: int, keys: tuple[int, int]) -> Iterator[Tile]:
    """Positions are indices: runs and masks by arithmetic; masks touch the partial pieces alone."""
    m, rule = keys[1] - keys[0], p.layout.rule
    shift = m - (stop - start)
    for q0 in range(start, stop, p.layout.block_q):
        q1 = min(q0 + p.layout.block_q, stop)
        first, last = q0 - start + shift, q1 - 1 - start + shift
        runs: list[slice] = []
        masks: list[tuple[slice, Tensor]] = []
        width = 0
        for a, b, full in segments(rule, first, last, m):
            if runs and runs[-1].stop == keys[0] + a:
                runs[-1] = slice(runs[-1].start, keys[0] + b)
            else:
                runs.append(slice(keys[0] + a, keys[0] + b))
            if not full:
                masks.append((slice(width, width + b - a), _partial(p, first, last, a, b)))
            width += b - a
        yield from _by_units(p, slice(q0, q1), runs, masks, width)


def _partial(p: Problem, first: int, last: int, a: int, b: int) -> Tensor:
    """The mask ``[queries, 1, keys]`` of a partial piece; pieces that look alike share it."""
    pattern = p.layout.rule.pattern(first, a, b - 1)
    key = (last - first, b - a, pattern)
    if pattern is not None and key in p._masks:
        return p._masks[key]
    mask = p.additive(p.layout.rule.allowed(p.arange(first, last + 1)[:, None], p.arange(a, b)))[:, None]
    if pattern is not None and len(p._masks) < MASKS:
        p._masks[key] = mask
    return mask


def _by_units(p: Problem, rows: slice, runs: list[slice], masks: list[tuple[slice, Tensor]], width: int) -> Iterator[Tile]:
    """One tile, or several over the units where the scores would pass the budget."""
    if not width:
        return
    step = max(1, p.budget // ((rows.stop - rows.start) * p.shared * width))
    for u in range(0, p.units, step):
        units = slice(u, min(u + step, p.units))
        cut = [(columns, mask[units] if mask.dim() == 4 and mask.shape[0] > 1 else mask) for columns, mask in masks]
        yield RunTile(p, units, rows, runs, cut)


def _tiles_by_position(p: Problem, start: int, stop: int, keys: tuple[int, int]) -> Iterator[Tile]:
    """Positions are given: the visited keys follow from the positions' ranges, block by block."""
    shift = 0 if p.sequences is not None else p.layout.m - p.layout.n
    q_pos = _given(p.q_pos, start, stop, shift, p)
    k_pos = _given(p.k_pos, keys[0], keys[1], 0, p)
    for q0, runs in _visited(p, q_pos, k_pos):
        q = q_pos[:, q0 : q0 + p.layout.block_q]
        k = torch.cat([k_pos[:, run] for run in runs], 1) if len(runs) != 1 else k_pos[:, runs[0]]
        seen = p.layout.rule.allowed(q[:, :, None], k[:, None, :]) & (k >= 0)[:, None, :]
        mask = p.additive(seen)[:, :, None]
        if mask.shape[0] > 1:
            mask = mask.repeat_interleave(p.groups, 0)
        rows = slice(start + q0, start + q0 + q.shape[1])
        shifted = [slice(keys[0] + r.start, keys[0] + r.stop) for r in runs]
        yield from _by_units(p, rows, shifted, [(slice(0, k.shape[1]), mask)], k.shape[1])


def _given(pos: Tensor | None, start: int, stop: int, shift: int, p: Problem) -> Tensor:
    """Positions of the tokens start … stop−1, ``[1 or B, tokens]``."""
    if pos is None:
        first = shift if p.sequences is not None else start + shift
        return p.arange(first, first + stop - start)[None]
    return (pos if pos.dim() == 2 else pos[None])[:, start:stop]


def _visited(p: Problem, q_pos: Tensor, k_pos: Tensor) -> Iterator[tuple[int, list[slice]]]:
    """(first query, runs of keys) of every query block. Reads the blocks' ranges on the host, unless it is one block."""
    n, m, bq, bk = q_pos.shape[1], k_pos.shape[1], p.layout.block_q, p.layout.block_k
    if n <= bq or m <= bk or torch.compiler.is_compiling():
        yield from ((q0, [slice(0, m)]) for q0 in range(0, n, bq))
        return
    far = torch.iinfo(torch.long).max
    seen = k_pos >= 0
    q0, q1 = _range(q_pos, q_pos, bq)
    k0, k1 = _range(k_pos.long().masked_fill(~seen, far), k_pos.long().masked_fill(~seen, -1), bk)
    touched = p.layout.rule.touches(q0[:, :, None], q1[:, :, None], k0[:, None], k1[:, None])
    for i, row in enumerate(touched.any(0).tolist()):
        runs: list[slice] = []
        for j in (j for j, hit in enumerate(row) if hit):
            a, b = j * bk, min((j + 1) * bk, m)
            if runs and runs[-1].stop == a:
                a = runs.pop().start
            runs.append(slice(a, b))
        if runs:
            yield i * bq, runs


def _range(low: Tensor, high: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The least of `low` and the greatest of `high` in every block of tokens, ``[1 or B, blocks]``."""
    pad = -low.shape[1] % block
    low, high = (torch.cat([x, x[:, -1:].expand(-1, pad)], 1).unflatten(1, (-1, block)) for x in (low, high))
    return low.amin(2), high.amax(2)


class ListTile(Tile):
    """Some rows (unit, query block) with lists of like length; their key blocks are gathered."""

    def __init__(self, problem: Problem, rows: Tensor, blocks: Tensor, kept: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> None:
        p, layout = problem, problem.layout
        self.problem, self.row_ids, self.at = problem, rows, at
        self.units = self.unit_index = rows // layout.q_blocks
        slots = p.arange(0, blocks.shape[1]).expand_as(blocks)
        blocks, kept, slots, clear = self._whole_first(blocks, kept, slots)
        k_unit = self.unit_index // p.groups * p.k_groups + self.unit_index % p.groups * p.k_groups // p.groups
        self.block_ids = k_unit[:, None] * layout.k_blocks + blocks
        q = (rows % layout.q_blocks)[:, None] * layout.block_q + p.arange(0, layout.block_q)
        k = (blocks[:, :, None] * layout.block_k + p.arange(0, layout.block_k)).flatten(1)
        seen = kept.repeat_interleave(layout.block_k, 1) & (k < layout.m)
        self.q_index, self.k_index = q.clamp(max=layout.n - 1), k.clamp(max=layout.m - 1)
        columns = slice(clear * layout.block_k, k.shape[1])
        named = layout.listed(at, blocks[:, clear:], slots[:, clear:])
        self.masks = [(columns, p.additive(self._seen(seen[:, columns], self.k_index[:, columns], named)))]

    def _whole_first(self, blocks: Tensor, kept: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """The lists with the blocks that need no mask in front, and how many such every row has."""
        p, layout = self.problem, self.problem.layout
        moved = p.q_pos is not None or p.k_pos is not None or p.sequences is not None
        if moved or layout.dynamic or torch.compiler.is_compiling():  # how many there are cannot be known, or not be read
            return blocks, kept, slots, 0
        q0 = (self.row_ids % layout.q_blocks)[:, None] * layout.block_q + (layout.m - layout.n)
        k0 = blocks * layout.block_k
        whole = kept & (k0 + layout.block_k <= layout.m)
        whole = whole & layout.inner.covers(q0, q0 + layout.block_q - 1, k0, k0 + layout.block_k - 1)
        shown = layout.whole(self.at, blocks, slots)
        whole = whole if shown is None else whole & shown
        order = whole.byte().sort(dim=1, descending=True, stable=True).indices
        return blocks.gather(1, order), kept.gather(1, order), slots.gather(1, order), int(whole.sum(1).min())

    def _seen(self, seen: Tensor, k_index: Tensor, named: Tensor | None) -> Tensor:
        """``[units, queries or 1, 1, keys]``."""
        p = self.problem
        k_pos = self.positions(p.k_pos, k_index, 0)
        if p.k_pos is not None:
            seen = seen & (k_pos >= 0)
        q_pos = self.positions(p.q_pos, self.q_index, p.layout.m - p.layout.n)
        pairs = seen[:, None, :] if named is None else seen[:, None, :] & named
        if p.layout.inner != EVERYTHING:
            pairs = pairs & p.layout.inner.allowed(q_pos[:, :, None], k_pos[:, None, :])
        if p.sequences is not None:
            ends = torch.tensor(p.sequences[1:], device=p.device)
            of_q, of_k = (torch.bucketize(x, ends, right=True) for x in (self.q_index, k_index))
            pairs = pairs & (of_q[:, :, None] == of_k[:, None, :])
        return pairs[:, :, None]

    def rows_of(self, x: Tensor) -> Tensor:
        return x.view(self.problem.units * self.problem.layout.q_blocks, -1, *x.shape[3:])[self.row_ids]

    def keys_of(self, x: Tensor) -> Tensor:
        return x.view(-1, self.problem.layout.block_k, x.shape[-1])[self.block_ids].flatten(1, 2)

    def set_rows(self, x: Tensor, value: Tensor) -> None:
        x.view(self.problem.units * self.problem.layout.q_blocks, -1, *x.shape[3:])[self.row_ids] = value

    def add_keys(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        width = self.problem.layout.block_k * x.shape[-1]
        x.view(-1, width).index_add_(0, self.block_ids.flatten(), torch.bmm(left, right).view(-1, width))


def list_tiles(p: Problem) -> Iterator[Tile]:
    """Rows sorted by the length of their lists, so that those that share a tile waste little; empty ones are left out."""
    layout = p.layout
    assert layout.index is not None and layout.counts is not None
    index, counts, capacity = layout.index, layout.counts, layout.index.shape[-1]
    rows_per = layout.block_q * p.shared * layout.block_k
    for rows, cap in _row_groups(p, capacity, rows_per):
        unit, block = rows // layout.q_blocks, rows % layout.q_blocks
        batch = (unit // p.groups).clamp(max=index.shape[0] - 1)
        head = unit % p.groups * index.shape[1] // p.groups
        at = (batch, head, block)
        yield ListTile(p, rows, index[at][:, :cap].long(), p.arange(0, cap) < counts[at][:, None], at)


def _row_groups(p: Problem, capacity: int, rows_per: int) -> Iterator[tuple[Tensor, int]]:
    """(rows, the longest list among them), each within the budget."""
    layout, total = p.layout, p.units * p.layout.q_blocks
    if layout.dynamic or torch.compiler.is_compiling():  # lengths are not read: every list is taken as full
        step = max(1, p.budget // max(1, rows_per * capacity))
        yield from ((p.arange(a, min(a + step, total)), capacity) for a in range(0, total, step) if capacity)
        return
    assert layout.index is not None
    counts = torch.tensor(layout.host_counts).view(*layout.index.shape[:3])
    counts = counts.repeat_interleave(p.groups // counts.shape[1], 1).expand(p.batch, -1, -1).flatten()
    ordered, order = counts.sort(descending=True, stable=True)
    lengths, order, at = ordered.tolist(), order.to(p.device), 0
    while at < total and lengths[at]:
        longest = lengths[at]
        end = min(at + max(1, p.budget // (rows_per * longest)), total)
        while lengths[end - 1] < WASTE * longest:
            end -= 1
        yield order[at:end], longest
        at = end


def closed_rows(p: Problem, q: Tensor) -> Tensor | None:
    """inf at the queries ``[units, N, 1]`` that only fill up the last block of lists, 0 elsewhere; None where there are none."""
    if q.shape[1] == p.layout.n:
        return None
    closed = q.new_zeros(*q.shape[:2], 1)
    closed[:, p.layout.n :] = torch.inf
    return closed
