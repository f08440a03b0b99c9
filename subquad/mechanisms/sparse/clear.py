"""CLEAR: softmax over a disc around each token of an image, for diffusion transformers of high resolution.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  ‖x_i − x_j‖ < radius ,  x the place on the grid

Nothing is shifted at borders: tokens there see fewer keys. With `text_tokens` the sequence is the paper's joint one: so many of
its tokens, the first or the last, are text, which sees all and is seen by all. Rotary turns q and k, of text too.
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


def _flops(s: Shape, radius: float = 8.0, text_tokens: int = 0, **_: object) -> float:
    image, text = max(0, s.tokens - text_tokens), min(text_tokens, s.tokens)
    side, r = math.sqrt(image), radius
    # of a square image: the discs, less what lies beyond the borders
    discs = math.pi * r**2 * image - 2 * side * 4 / 3 * r**3 + r**4 / 2 if r <= side else image**2
    pairs = discs + 2 * image * text + text * text
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.values)


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
        text_tokens: tokens of the sequence that are text, beside those of the grid.
        text_first: whether they stand before the image's tokens, as FLUX has them, or behind.
    """

    card = CARD

    def __init__(
        self, heads: int, head_dim: int, *, radius: float = 8.0, text_tokens: int = 0, text_first: bool = True, **sizes: object
    ) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 < radius < math.inf:
            raise InputError("radius", radius, "a positive number")
        if type(text_tokens) is not int or text_tokens < 0:
            raise InputError("text_tokens", text_tokens, "an integer of at least 0")
        self.radius, self.text_tokens, self.text_first = radius, text_tokens, text_first

    def layout(self, grid: Sequence[int]) -> Layout:
        """The keys that each token sees, of the grid and of text."""
        return Layout.circle(tuple(grid), self.radius, text_tokens=self.text_tokens, text_first=self.text_first)

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
    image = torch.arange(len(place), device=q.device) + (module.text_tokens if module.text_first else 0)
    seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    seen[image[:, None], image] = (place[:, None] - place).square().sum(-1) < module.radius**2
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
