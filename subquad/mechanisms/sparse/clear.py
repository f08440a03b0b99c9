"""CLEAR: softmax over a disc around each token of an image, for diffusion transformers of high resolution.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  ‖x_i − x_j‖ < radius ,  x the place on the grid

Nothing is shifted at borders: tokens there see fewer keys. Rotary turns q and k. The text tokens of the paper's joint sequence
are a dense part of their own, to be joined by `merge`; they are not part of this.
Liu, Tan, Wang: CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up (arXiv 2412.16112).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout
from subquad.rotary import Rotary, rotate


def _flops(s: Shape, radius: float = 8.0, **_: object) -> float:
    return 2 * s.batch * s.heads * s.tokens * min(math.pi * radius * radius, s.tokens) * (s.head_dim + s.values)


CARD = Card(
    title="CLEAR",
    paper="arXiv 2412.16112",
    family="sparse",
    summary="Softmax over a disc around each token of the image: cost linear in pixels for diffusion transformers.",
    bidirectional=True,
    needs_grid=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
)


@register("clear")
class Clear(Attention):
    """Attention within a circle on the grid of the call; a ball on a video's.

    Args:
        radius: keys at a smaller distance are seen.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, radius: float = 8.0, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 < radius < math.inf:
            raise InputError("radius", radius, "a positive number")
        self.radius = radius

    def layout(self, grid: Sequence[int]) -> Layout:
        """The keys that each token of the grid sees."""
        return Layout.circle(tuple(grid), self.radius)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        assert call.grid is not None
        q, k = rotate(call.rotary, q, k)
        layout, shape = self.layout(call.grid), (*q.shape[:3], v.shape[3])
        # packed images are all of this size: they are a batch
        q, k, v = (x.reshape(-1, layout.n, *x.shape[2:]) if call.cu_seqlens is not None else x for x in (q, k, v))
        return sparse_attention(q, k, v, layout).reshape(shape), None


def reference(module: Clear, q: Tensor, k: Tensor, v: Tensor, *, grid: Sequence[int], rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    place = torch.tensor(list(product(*(range(side) for side in grid))), dtype=torch.float64, device=q.device)
    seen = (place[:, None] - place).square().sum(-1) < module.radius**2
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
