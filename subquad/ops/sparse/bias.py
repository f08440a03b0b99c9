"""Additive biases of the scores, each read tile by tile so that no N × M map is formed (but for the dense one).

A term knows two things: the scores it adds to a tile, and how the tile's score gradients fall back on its parameter.
Tiles are ``[units, queries, G, keys]``: a unit is a pair of batch row and head group, G the query heads that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.checks import InputError, check_beside, shape_of

if TYPE_CHECKING:
    from subquad.ops.sparse.tiles import Tile


@dataclass(frozen=True)
class RelativeBias:
    """A learned table by relative position: b_ij = table[h, clamp(p_j − p_i, −R, R) + R].

    Args:
        table: ``[H, 2R + 1]`` or ``[1, 2R + 1]``.
    """

    table: Tensor


Bias = Tensor | tuple[Tensor, Tensor] | RelativeBias


class KeyBias:
    """A log-weight per key: parameter ``[units, G, M]``."""

    def scores(self, p: Tensor, tile: Tile) -> Tensor:
        return p[tile.unit_index[:, None], :, tile.k_index].permute(0, 2, 1)[:, None]

    def accumulate(self, grad: Tensor, tile: Tile, ds: Tensor) -> None:
        where = (tile.unit_index[:, None], tile.k_index)
        grad.permute(0, 2, 1).index_put_(where, ds.sum(1).permute(0, 2, 1), accumulate=True)


class Slopes:
    """ALiBi (Press et al., arXiv 2108.12409): b_ij = −slope · |p_i − p_j|; parameter ``[units, G]``."""

    def scores(self, p: Tensor, tile: Tile) -> Tensor:
        return -p[tile.units][:, None, :, None] * self._distance(tile, p)

    def accumulate(self, grad: Tensor, tile: Tile, ds: Tensor) -> None:
        grad.index_add_(0, tile.unit_index, (ds * self._distance(tile, grad)).sum((1, 3)), alpha=-1)

    def _distance(self, tile: Tile, like: Tensor) -> Tensor:
        return tile.distance.abs().to(like.dtype)[:, :, None, :]


class Table:
    """`RelativeBias`; parameter ``[units, G, 2R + 1]``."""

    def scores(self, p: Tensor, tile: Tile) -> Tensor:
        index = self._index(tile, p)
        rows = p[tile.units][:, None].expand(-1, index.shape[1], -1, -1)
        return rows.gather(3, index.expand(rows.shape[0], -1, rows.shape[2], -1))

    def accumulate(self, grad: Tensor, tile: Tile, ds: Tensor) -> None:
        index = self._index(tile, grad).expand_as(ds).permute(0, 2, 1, 3).flatten(2)
        part = torch.zeros(ds.shape[0], *grad.shape[1:], dtype=grad.dtype, device=grad.device)
        part.scatter_add_(2, index, ds.permute(0, 2, 1, 3).flatten(2))
        grad.index_add_(0, tile.unit_index, part)

    def _index(self, tile: Tile, table: Tensor) -> Tensor:
        reach = table.shape[-1] // 2
        return tile.distance.clamp(-reach, reach)[:, :, None, :] + reach


class Dense:
    """A full map; parameter ``[B|1, H|1, N, M]``, read at the visited tiles only."""

    def __init__(self, groups: int, heads: int) -> None:
        self.groups, self.heads = groups, heads  # units of a batch row, query heads

    def scores(self, p: Tensor, tile: Tile) -> Tensor:
        return p[self._where(p, tile)]

    def accumulate(self, grad: Tensor, tile: Tile, ds: Tensor) -> None:
        grad.index_put_(self._where(grad, tile), ds, accumulate=True)

    def _where(self, p: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        unit, shared = tile.unit_index, self.heads // self.groups
        head = (unit % self.groups * shared)[:, None] + torch.arange(shared, device=unit.device)
        batch = (unit // self.groups).clamp(max=p.shape[0] - 1)
        head = head.clamp(max=p.shape[1] - 1)
        return batch[:, None, None, None], head[:, None, :, None], tile.q_index[:, :, None, None], tile.k_index[:, None, None, :]


Term = KeyBias | Slopes | Table | Dense


def per_unit(x: Tensor, batch: int, groups: int, heads: int) -> Tensor:
    """``[B|1, H|1, …]`` as ``[B · groups, H / groups, …]``."""
    rest = x.shape[2:]
    x = x.expand(batch, heads, *rest).reshape(batch, groups, heads // groups, *rest)
    return x.flatten(0, 1)


def check_bias(bias: Bias | None, key_bias: Tensor | None, q: Tensor, k: Tensor, heads: int, softcap: float | None) -> None:
    """One line for a bias whose form or shape does not fit."""
    batch, n, m = q.shape[0], q.shape[1], k.shape[1]
    parts = bias if isinstance(bias, tuple) else (bias.table if isinstance(bias, RelativeBias) else bias,)
    given = [("bias", part) for part in parts if isinstance(part, Tensor)]
    for name, x in given if key_bias is None else [("key_bias", key_bias), *given]:
        check_beside(name, x, q)
    if key_bias is not None and tuple(key_bias.shape) not in [(b, h, m) for b in (1, batch) for h in (1, heads)]:
        raise InputError("key_bias", shape_of(key_bias), f"[B, H, M] = {[batch, heads, m]} (B and H may be 1)")
    if isinstance(bias, Tensor):
        if bias.dim() == 1 and bias.shape[0] != heads:
            raise InputError("bias", shape_of(bias), f"ALiBi slopes [H] = [{heads}]")
        leading = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if bias.dim() != 1 and (bias.dim() > 4 or leading[2:] != (n, m) or leading[0] not in (1, batch) or leading[1] not in (1, heads)):
            raise InputError("bias", shape_of(bias), f"[N, M], [H, N, M] or [B, H, N, M] = {[batch, heads, n, m]}")
    elif isinstance(bias, RelativeBias):
        table = bias.table
        if table.dim() != 2 or table.shape[0] not in (1, heads) or table.shape[1] % 2 == 0:
            raise InputError("bias.table", shape_of(table), f"[H, 2R + 1] with H = {heads} or 1")
    elif isinstance(bias, tuple):
        _check_factors(bias, q, k, heads)
        if softcap is not None:
            raise InputError("softcap", softcap, "None beside low-rank factors, which join q and k")
    elif bias is not None:
        raise InputError("bias", type(bias).__name__, "slopes [H], a dense [.., N, M], a pair of factors or a RelativeBias")


def _check_factors(bias: tuple[Tensor, ...], q: Tensor, k: Tensor, heads: int) -> None:
    if len(bias) != 2:
        raise InputError("bias", f"{len(bias)} factors", "a pair: [B, N, H, R] and [B, M, H, R]")
    for name, x, of in (("bias[0]", bias[0], q), ("bias[1]", bias[1], k)):
        fits = x.dim() == 4 and x.shape[0] in (1, of.shape[0]) and x.shape[1] == of.shape[1] and x.shape[2] in (1, heads)
        if not fits or x.shape[3] != bias[0].shape[-1]:
            raise InputError(name, shape_of(x), f"[B|1, {of.shape[1]}, H|1, R] with H = {heads} and the R of both factors equal")
