"""MD-TPE: LightNet's positions of tokens, an exponential Toeplitz filter along each axis of the grid, summed.

    y_i = Σ_axes c Σ_{j ≤ i} λ^(i−j) x_j,   λ = sigmoid(a), one a and one c for each axis and head;   output: RMSNorm(y) W

i and j are places along the axis, and a head is a slice of the channels. The recurrence s_i = λ s_{i−1} + c x_i computes it in O(N).
Qin, Mao, Shen, et al.: You Only Scan Once (arXiv 2405.21022), filter as in the first author's code (Doraemonzzz/xmixers), where c is the
product of two vectors. It is one-sided there; whether the paper's filter for images is could not be found out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.ops.linear import linear_attention


class MDTPE(nn.Module):
    """Filter along each axis, RMSNorm, and a linear layer without bias.

    >>> MDTPE(192, heads=3, axes=2)(torch.randn(2, 196, 192), (14, 14)).shape
    torch.Size([2, 196, 192])

    Args:
        dim: channels, a multiple of heads.
        heads: slices of the channels, each with a decay of its own.
        axes: of the grid: 1 for text, 2 for images, 3 for video.

    Raises:
        InputError: sizes that do not fit.
    """

    def __init__(self, dim: int, heads: int, axes: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError("heads", heads, f"a divisor of {dim}, the channels")
        if axes < 1:
            raise InputError("axes", axes, "at least 1")
        self.dim, self.heads, self.axes = dim, heads, axes
        self.logits = nn.Parameter(torch.zeros(axes, heads))  # a
        self.scale = nn.Parameter(torch.ones(axes, heads))  # c
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens ``[B, N, dim]`` of a grid whose sides' product is N, the last one running fastest."""
        return self.proj(self.norm(self.filter(x, grid)))

    def filter(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """y of tokens ``[B, N, dim]``."""
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError("x", shape_of(x), f"tokens [B, N, {self.dim}]")
        if len(grid) != self.axes or math.prod(grid) != x.shape[1]:
            raise InputError("grid", tuple(grid), f"{self.axes} sides whose product is {x.shape[1]}")
        tokens = x.reshape(x.shape[0], *grid, self.heads, self.dim // self.heads)
        y = torch.zeros_like(tokens)
        for axis in range(self.axes):
            lines = tokens.movedim(1 + axis, -3)  # [B, other axes …, n, heads, width]
            v = lines.flatten(0, -4)
            q = torch.ones_like(v[..., :1])
            k = q * self.scale[axis, :, None].to(x.dtype)
            o = linear_attention(q, k, v, log_decay=nn.functional.logsigmoid(self.logits[axis]), scale=1.0)
            y = y + o.reshape(lines.shape).movedim(-3, 1 + axis)
        return y.reshape(x.shape)
