"""Maxima and means of blocks of scores, forwards and backwards, for the tiles of `tiles` with a unit for each head.

A tile's queries are whole runs of tokens, and so are its keys; each is laid out as the blocks that its tokens lie in, reduced, and
put where the blocks stand among all. Blocks that several tiles share meet there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.ops.sparse.tiles import Problem, RunTile, Tile, blank, closed_rows, hidden


class _Fold:
    """Some tokens of a tile as the blocks they lie in, ``[units, tokens, …]`` to ``[units, blocks, size, …]``.

    Args:
        ids: ``[1 or units, blocks]``, the number of each among all blocks; several may have one number.
        size, before, after: tokens of a block, and how many of them are missing in front of the first and behind the last.
    """

    def __init__(self, ids: Tensor, size: int, before: int = 0, after: int = 0) -> None:
        self.ids, self.size, self.before, self.after = ids, size, before, after

    @classmethod
    def run(cls, start: int, stop: int, block: int, device: torch.device) -> _Fold:
        """The tokens start … stop − 1."""
        ids = torch.arange(start // block, -(-stop // block), device=device)[None]
        return cls(ids, block, start % block, -stop % block)

    @classmethod
    def listed(cls, index: Tensor, side: int, block: int) -> _Fold:
        """Whole blocks of `side` tokens, one beside the other: ``[units, tokens]`` names them."""
        size = gcd(side, block)
        return cls(index[:, ::size] // block, size)

    def fold(self, x: Tensor, dim: int, value: float = 0.0) -> Tensor:
        if self.before or self.after:
            x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [self.before, self.after], value=value)
        return x.unflatten(dim, (-1, self.size))

    def token(self, index: Tensor, place: Tensor, dim: int) -> Tensor:
        """The tokens, named by `index` ``[1 or units, tokens]``, at places 0 … size − 1 of blocks that lie along `dim`."""
        first = torch.arange(place.shape[dim], device=place.device) * self.size - self.before
        place = place + (first[:, None] if dim == 1 else first)
        return index.expand(len(place), -1).gather(1, place.flatten(1).clamp(0, index.shape[1] - 1)).view_as(place)

    def unfold(self, x: Tensor, dim: int) -> Tensor:
        """What each block has, for each of its tokens."""
        x = x.repeat_interleave(self.size, dim)
        return x.narrow(dim, self.before, x.shape[dim] - self.before - self.after)


@dataclass
class _Piece:
    """Some keys of a tile, its `columns`, against all its queries: all of their pairs are seen, or those that `mask` shows."""

    columns: slice
    keys: _Fold
    mask: Tensor | None  # added to ``[units, queries, keys]``


def _cut(tile: Tile, sides: tuple[int, int]) -> tuple[_Fold, list[_Piece]]:
    """The blocks of a tile's queries, and its keys in pieces, in order."""
    p = tile.problem
    runs = tile.runs if isinstance(tile, RunTile) else []
    width = sum(run.stop - run.start for run in runs) or tile.k_index.shape[1]
    masks = [(columns.start, columns.stop, mask.squeeze(-2)) for columns, mask in tile.masks]
    if not isinstance(tile, RunTile):
        queries = _Fold.listed(tile.q_index, p.layout.block_q, sides[0])
        edges = sorted({0, width, *(x for a, b, _ in masks for x in (a, b))})
        spans = [(a, b, _Fold.listed(tile.k_index[:, a:b], p.layout.block_k, sides[1])) for a, b in pairwise(edges)]
    else:
        queries, spans, at = _Fold.run(tile.rows.start, tile.rows.stop, sides[0], p.device), [], 0
        for run in runs:
            end = at + run.stop - run.start
            edges = sorted({at, end, *(x for a, b, _ in masks for x in (a, b) if at < x < end)})
            spans += [(a, b, _Fold.run(run.start + a - at, run.start + b - at, sides[1], p.device)) for a, b in pairwise(edges)]
            at = end
    pieces = []
    for a, b, fold in spans:
        mask = next((mask[..., a - start : b - start] for start, stop, mask in masks if start <= a and b <= stop), None)
        pieces.append(_Piece(slice(a, b), fold, mask))
    return queries, pieces


def _places(tile: Tile, queries: _Fold, keys: _Fold, shape: tuple[int, int]) -> Tensor:
    """Where the blocks of a tile stand in ``[units, nq, nk]`` laid flat, ``[units, blocks, blocks]``."""
    units = tile.problem.arange(tile.span.start, tile.span.stop) if isinstance(tile, RunTile) else tile.unit_index
    rows = units[:, None] * shape[0] + queries.ids
    return rows[:, :, None] * shape[1] + keys.ids[:, None]


def _grid(problem: Problem, sides: tuple[int, int]) -> tuple[int, int]:
    return -(-problem.layout.n // sides[0]), -(-problem.layout.m // sides[1])


def _seen_scores(piece: _Piece, q: Tensor, k: Tensor, closed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scores ``[units, queries, keys]`` of a piece, and which of them are seen; None: all."""
    s = torch.bmm(q, k[:, piece.columns].mT)
    seen = None if closed is None else (closed == 0)[..., None].expand_as(s)
    if piece.mask is not None:
        shown = (piece.mask > hidden(s.dtype) / 2).expand_as(s)
        seen = shown if seen is None else seen & shown
    return s, seen


def read_max(q: Tensor, k: Tensor, sides: tuple[int, int], problem: Problem, *, find: bool = False) -> tuple[Tensor, Tensor]:
    """The maxima ``[units, nq, nk]`` and, with `find`, the pair that attains each, as query · M + key, flat."""
    shape, closed = _grid(problem, sides), closed_rows(problem, q)
    top = q.new_full((problem.units * shape[0] * shape[1],), -torch.inf)
    pairs = torch.zeros(len(top) if find else 0, dtype=torch.long, device=q.device)
    traced = torch.compiler.is_compiling()  # then gradients need every step's maxima as they were
    for tile in problem.tiles():
        qt, kt = tile.rows_of(q), tile.keys_of(k)
        queries, pieces = _cut(tile, sides)
        shut = None if closed is None else tile.rows_of(closed)
        for piece in pieces:
            s, seen = _seen_scores(piece, qt, kt, shut)
            wide = piece.keys.fold(s if seen is None else s.masked_fill(~seen, -torch.inf), 2, -torch.inf)
            flat = _places(tile, queries, piece.keys, shape).flatten()
            if not find:
                found = queries.fold(wide.amax(3), 1, -torch.inf).amax(2).flatten()
                top = top.scatter_reduce(0, flat, found, "amax") if traced else top.scatter_reduce_(0, flat, found, "amax")
                continue
            best, key = wide.max(3)
            best, query = queries.fold(best, 1, -torch.inf).max(2)
            key = queries.fold(key, 1).gather(2, query[:, :, None]).squeeze(2)
            pair = queries.token(tile.q_index, query, 1) * k.shape[1] + piece.keys.token(tile.k_index[:, piece.columns], key, 2)
            before, found = top[flat], best.flatten()
            top.scatter_reduce_(0, flat, found, "amax")
            won = (found > before) & (found == top[flat])
            pairs[flat[won]] = pair.flatten()[won]
    return top.view(problem.units, *shape), pairs


class Max(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sides: tuple[int, int], problem: Problem) -> Tensor:
        top, pairs = read_max(q, k, sides, problem, find=True)
        ctx.save_for_backward(q, k, top, pairs)
        ctx.step = max(1, problem.budget // max(1, q.shape[-1]))
        return top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtop: Tensor) -> tuple[Any, ...]:
        q, k, top, pairs = ctx.saved_tensors
        dq, dk = blank(q), blank(k)
        q_rows, k_rows, dq_rows, dk_rows = (x.reshape(-1, q.shape[-1]) for x in (q, k, dq, dk))
        push = dtop.where(top > -torch.inf, 0).flatten()[:, None]
        unit = torch.arange(len(top), device=q.device).repeat_interleave(top.shape[1] * top.shape[2])
        for a in range(0, len(push), ctx.step):
            some = slice(a, a + ctx.step)
            i = unit[some] * q.shape[1] + pairs[some] // k.shape[1]
            j = unit[some] * k.shape[1] + pairs[some] % k.shape[1]
            dq_rows.index_add_(0, i, push[some] * k_rows[j])
            dk_rows.index_add_(0, j, push[some] * q_rows[i])
        return dq, dk, None, None


def read_mean(q: Tensor, k: Tensor, sides: tuple[int, int], problem: Problem) -> tuple[Tensor, Tensor]:
    """The means ``[units, nq, nk]``, and the pairs that they were taken over."""
    shape, closed = _grid(problem, sides), closed_rows(problem, q)
    total = q.new_zeros(problem.units, *shape)
    count = torch.zeros_like(total)
    for tile in problem.tiles():
        qt, kt = tile.rows_of(q), tile.keys_of(k)
        queries, pieces = _cut(tile, sides)
        shut = None if closed is None else tile.rows_of(closed)
        opened = qt.new_ones(1, qt.shape[1]) if shut is None else (shut == 0).to(qt.dtype)
        for piece in pieces:
            if piece.mask is None:  # queries that fill up a block are 0
                sums = torch.bmm(queries.fold(qt, 1).sum(2), piece.keys.fold(kt[:, piece.columns], 1).sum(2).mT)
                ones = qt.new_ones(1, piece.columns.stop - piece.columns.start)
                pairs = queries.fold(opened, 1).sum(2)[:, :, None] * piece.keys.fold(ones, 1).sum(2)[:, None]
            else:
                s, seen = _seen_scores(piece, qt, kt, shut)
                assert seen is not None
                sums, pairs = (queries.fold(piece.keys.fold(x, 2).sum(3), 1).sum(2) for x in (s.where(seen, 0), seen.to(s.dtype)))
            flat = _places(tile, queries, piece.keys, shape).flatten()
            total.view(-1).index_add_(0, flat, sums.flatten())
            count.view(-1).index_add_(0, flat, pairs.expand_as(sums).flatten())
    return torch.where(count > 0, total / count.clamp(min=1), -torch.inf), count


class Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, sides: tuple[int, int], problem: Problem) -> Tensor:
        mean, count = read_mean(q, k, sides, problem)
        ctx.save_for_backward(q, k, count)
        ctx.problem, ctx.sides = problem, sides
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor) -> tuple[Any, ...]:
        q, k, count = ctx.saved_tensors
        dq, dk = blank(q), blank(k)
        push = torch.where(count > 0, dmean / count.clamp(min=1), 0).flatten()
        for tile in ctx.problem.tiles():
            qt, kt = tile.rows_of(q), tile.keys_of(k)
            queries, pieces = _cut(tile, ctx.sides)
            spread = []
            for piece in pieces:
                g = push[_places(tile, queries, piece.keys, count.shape[1:])]
                ds = queries.unfold(piece.keys.unfold(g, 2), 1)
                spread.append(ds if piece.mask is None else ds * (piece.mask > hidden(ds.dtype) / 2))
            ds = torch.cat(spread, 2)
            tile.set_rows(dq, torch.bmm(ds, kt))
            tile.add_keys(dk, ds.mT, qt)
        return dq, dk, None, None


__all__ = ["Max", "Mean", "read_max", "read_mean"]
