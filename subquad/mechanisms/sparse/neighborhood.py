"""Neighborhood attention: softmax over the nearest tokens of an image or a video, any number of axes, stride and dilation.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over the window of i: on every axis the keys nearest to the leader of i's stride group

Windows slide inwards at the borders, so that all tokens see the same number of keys; with dilation d, keys of the same residue
mod d are the axis. Rotary turns q and k.
Hassani et al.: Generalized Neighborhood Attention (arXiv 2504.16922); Neighborhood Attention (arXiv 2204.07143).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout
from subquad.rotary import Rotary, rotate

PerAxis = int | Sequence[int]


def _each(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    """One number for each axis; a single number stands for all."""
    given = (value,) if isinstance(value, int) else tuple(value)
    given = given * axes if len(given) == 1 else given
    if len(given) != axes:
        raise InputError(name, repr(value), f"one number, or one for each of the {axes} axes of the grid")
    return given


def _flops(s: Shape, window: PerAxis = (7,), **_: object) -> float:
    sides = _each("window", window, 1 if isinstance(window, int) else len(window))
    seen = math.prod(sides) if len(sides) > 1 else sides[0] ** 2  # a single number is taken as an image's
    return 2 * s.batch * s.heads * s.tokens * min(seen, s.tokens) * (s.head_dim + s.values)


CARD = Card(
    title="Neighborhood attention",
    paper="arXiv 2504.16922",
    family="sparse",
    summary="Softmax over a window of the nearest tokens on an image's or a video's grid, with stride and dilation (NATTEN).",
    bidirectional=True,
    needs_grid=True,
    training_free=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
)


@register("neighborhood")
class Neighborhood(Attention):
    """Attention within a window on the grid of the call, which has one to three axes.

    Args:
        window: keys along each axis, one number or one an axis; cut to what the grid and the dilation leave.
        stride: queries that share a window, likewise; cut to the window.
        dilation: distance of the keys, likewise; cut to the side of the grid.
    """

    card = CARD

    def __init__(
        self, heads: int, head_dim: int, *, window: PerAxis = (7,), stride: PerAxis = (1,), dilation: PerAxis = (1,), **sizes: object
    ) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        for name, value in (("window", window), ("stride", stride), ("dilation", dilation)):
            given = (value,) if isinstance(value, int) else value
            good = isinstance(given, tuple | list) and 1 <= len(given) <= 3
            if not good or not all(type(x) is int and x >= 1 for x in given):
                raise InputError(name, repr(value), "a positive integer, or one for each axis of the grid")
        self.window, self.stride, self.dilation = window, stride, dilation

    def fitted(self, grid: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Window, stride and dilation on a grid, cut to what fits."""
        named = (("window", self.window), ("stride", self.stride), ("dilation", self.dilation))
        window, stride, dilation = (_each(name, value, len(grid)) for name, value in named)
        dilation = tuple(min(d, side) for d, side in zip(dilation, grid))
        window = tuple(min(w, side // d) for w, side, d in zip(window, grid, dilation))
        return window, tuple(min(s, w) for s, w in zip(stride, window)), dilation

    def layout(self, grid: Sequence[int]) -> Layout:
        """The keys that each token of the grid sees."""
        window, stride, dilation = self.fitted(grid)
        return Layout.neighborhood(tuple(grid), window, stride=stride, dilation=dilation)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        assert call.grid is not None
        q, k = rotate(call.rotary, q, k)
        layout, shape = self.layout(call.grid), (*q.shape[:3], v.shape[3])
        # packed images are all of this size: they are a batch
        q, k, v = (x.reshape(-1, layout.n, *x.shape[2:]) if call.cu_seqlens is not None else x for x in (q, k, v))
        return sparse_attention(q, k, v, layout).reshape(shape), None


def reference(
    module: Neighborhood, q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], rotary: Rotary | None = None, **_: object
) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    seen = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for size, window, stride, dilation in zip(grid, *module.fitted(grid)):
        axis = torch.zeros(size, size, dtype=torch.bool, device=q.device)
        for i in range(size):
            same = list(range(i % dilation, size, dilation))
            group = i // dilation // stride * stride
            leader = same[min(group + stride // 2, len(same) - 1)]
            axis[i, sorted(same, key=lambda j: (abs(j - leader), j))[:window]] = True
        seen = torch.kron(seen.int(), axis.int()).bool()
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
