"""Ragged or blocked tokens as equal tiles: ``[B, N, …]`` becomes ``[tiles, C, …]``, with a mask for the slots left over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.checks import InputError
from subquad.ops.moments.moments import Moments, finite
from subquad.ops.sparse.rules import EVERYTHING

if TYPE_CHECKING:
    from subquad.ops.sparse import Layout


class Packed(NamedTuple):
    """Packed sequences cut into tiles of C tokens, none of which crosses a border.

    token: the token in each slot ``[T, C]`` (0 where none); valid ``[T, C]``; row: each tile's sequence ``[T]``;
    slot: each token's place among the T·C slots ``[total]``; rows: the number of sequences.
    """

    token: Tensor
    valid: Tensor
    row: Tensor
    slot: Tensor
    rows: int

    @staticmethod
    def cut(cu_seqlens: Tensor) -> Packed:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        rows, total = lengths.shape[0], int(cu_seqlens[-1])
        size = min(128, max(16, 1 << (total // max(rows, 1)).bit_length()))  # at most about half of the slots stay empty
        tiles = (lengths + size - 1) // size
        row = torch.arange(rows, device=starts.device).repeat_interleave(tiles)
        place = torch.arange(row.shape[0], device=row.device) - (tiles.cumsum(0) - tiles)[row]
        token = (starts[row] + place * size)[:, None] + torch.arange(size, device=row.device)
        valid = token < (starts + lengths)[row][:, None]
        return Packed(token.where(valid, 0), valid, row, valid.flatten().nonzero()[:, 0], rows)

    def load(self, x: Tensor) -> Tensor:
        """``[1, total, …]`` to ``[T, C, …]``; slots left over hold token 0."""
        return x[0].index_select(0, self.token.flatten()).unflatten(0, self.token.shape)

    def store(self, tiles: Tensor) -> Tensor:
        """``[T, C, …]`` to ``[1, total, …]``."""
        return tiles.flatten(0, 1).index_select(0, self.slot)[None]

    def largest(self, tiles: Tensor) -> Tensor:
        """Of values ``[T, …]`` the largest in each sequence, −inf where it has no tokens."""
        row = self.row.view(-1, *(1,) * (tiles.dim() - 1)).expand(tiles.shape)
        return tiles.new_full((self.rows, *tiles.shape[1:]), -torch.inf).scatter_reduce(0, row, tiles, "amax")

    def add(self, tiles: Tensor) -> Tensor:
        """Of values ``[T, …]`` the sum in each sequence."""
        return tiles.new_zeros(self.rows, *tiles.shape[1:]).index_add(0, self.row, tiles)

    def join(self, parts: Moments) -> Moments:
        """Moments of tiles ``[T, …]`` to those of sequences ``[S, …]``."""
        top = self.largest(parts.logit_max)
        parts = parts.scaled((parts.logit_max - finite(top)[self.row]).exp())
        return replace(parts.map(self.add), logit_max=top)


def to_blocks(x: Tensor, size: int) -> Tensor:
    """``[B, N, …]`` to ``[B · ⌈N/size⌉, size, …]``, zeros (False) behind the last token."""
    pad = -x.shape[1] % size
    if pad:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    return x.unflatten(1, (-1, size)).flatten(0, 1)


def named_blocks(layout: Layout, heads: int) -> Tensor:
    """Which key blocks each block of queries names: bool ``[B|1, H|1, Q, T]``."""
    if layout.rule != EVERYTHING:
        raise InputError("layout", layout.rule, "a layout of whole blocks, without a rule inside them: moments are of whole blocks")
    if layout.index is None or layout.counts is None:
        return torch.ones(1, 1, layout.q_blocks, layout.k_blocks, dtype=torch.bool)
    kept = torch.arange(layout.index.shape[-1], device=layout.index.device) < layout.counts[..., None]
    named = torch.zeros(*layout.counts.shape, layout.k_blocks + 1, dtype=torch.bool, device=kept.device)
    named = named.scatter(-1, layout.index.long().where(kept, layout.k_blocks), True)[..., : layout.k_blocks]
    return named if named.shape[1] == 1 else named.repeat_interleave(heads // named.shape[1], 1)


def join_blocks(parts: Moments, named: Tensor, block_q: int) -> Moments:
    """Moments of key blocks ``[B, T, …]`` to those of query blocks ``[B, Q, …]``, by `named` ``[B|1, H|1, Q, T]``."""
    tops = parts.logit_max.transpose(1, 2)[:, :, None]  # [B, H, 1, T]
    tops = tops.expand(*tops.shape[:2], named.shape[2], -1).masked_fill(~named, -torch.inf)
    top = tops.amax(-1) if named.shape[-1] else tops.new_full(tops.shape[:-1], -torch.inf)
    factor = (tops - finite(top)[..., None]).exp()  # [B, H, Q, T]

    def add(x: Tensor) -> Tensor:
        flat = factor @ x.transpose(1, 2).flatten(3) if x.dim() > 3 else factor @ x.transpose(1, 2)[..., None]
        return flat.transpose(1, 2).reshape(x.shape[0], named.shape[2], *x.shape[2:])

    assert parts.v_sum is not None
    return Moments(add(parts.M), add(parts.z), add(parts.v_sum), add(parts.weight), top.transpose(1, 2), block_q, parts.rotated)
