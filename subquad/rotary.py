"""Rotary position embedding, handed to mechanisms so that each applies it where its definition says.

Su et al.: RoFormer (arXiv 2104.09864), eq. 34; the halves pairing is Llama's, the adjacent pairing the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of

KERNEL_DTYPES = torch.float16, torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of each token's angles.

    Args:
        cos, sin: ``[N, R]`` or ``[B, N, R]`` (R ≤ head dim; channels past R are not turned).
        interleaved: pairs are adjacent channels (2i, 2i+1) if True, halves (i, i + R/2) if False.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.cos.shape != self.sin.shape:
            raise InputError("rotary.sin", shape_of(self.sin), f"the shape of rotary.cos, {list(self.cos.shape)}")
        if self.cos.dim() not in (2, 3) or self.cos.shape[-1] % 2:
            raise InputError("rotary.cos", shape_of(self.cos), "[N, R] or [B, N, R] with R even")

    def __getstate__(self) -> dict[str, object]:
        """Without what operators remember about it."""
        return {"cos": self.cos, "sin": self.sin, "interleaved": self.interleaved}

    @staticmethod
    def of(positions: Tensor, dim: int, *, theta: float = 10000.0, interleaved: bool = False) -> Rotary:
        """The usual one-dimensional rotary for integer positions ``[N]`` or ``[B, N]``, in float32."""
        frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        angle = positions[..., None].float() * frequency
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat([angle, angle], -1)
        return Rotary(angle.cos(), angle.sin(), interleaved)

    @property
    def tokens(self) -> int:
        return self.cos.shape[-2]

    def to(self, x: Tensor) -> Rotary:
        """The same angles in the dtype and on the device of x."""
        return Rotary(self.cos.to(x), self.sin.to(x), self.interleaved)

    def narrow(self, start: int, stop: int) -> Rotary:
        """The angles of tokens start … stop-1."""
        return Rotary(self.cos[..., start:stop, :], self.sin[..., start:stop, :], self.interleaved)

    def apply(self, x: Tensor) -> Tensor:
        """Turn x ``[B, N, H, D]``, in x's dtype (float32 arithmetic for 16-bit x); the width R of cos must be ≤ D."""
        width = self.cos.shape[-1]
        if self.cos.shape[-2] != x.shape[1] or width > x.shape[-1]:
            raise InputError("rotary", shape_of(self.cos), f"cos and sin for {x.shape[1]} tokens, at most {x.shape[-1]} wide")
        if self._by_kernel(x):
            from subquad.ops.rotary import turn  # Triton is imported when it is first needed

            return turn(x, self.cos, self.sin, self.interleaved)
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        cos, sin = self.cos.to(wide).unsqueeze(-2), self.sin.to(wide).unsqueeze(-2)  # over heads
        turned, rest = wide[..., :width], wide[..., width:]
        if self.interleaved:
            even, odd = turned[..., 0::2], turned[..., 1::2]
            partner = torch.stack([-odd, even], -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            partner = torch.cat([-second, first], -1)
        turned = turned * cos + partner * sin
        return (torch.cat([turned, rest], -1) if rest.shape[-1] else turned).to(x.dtype)

    def _by_kernel(self, x: Tensor) -> bool:
        """Whether the kernel serves x, and these angles, whose gradient it does not have."""
        from subquad.ops.common import kernels_serve  # whose package imports this file

        cos, sin = self.cos, self.sin
        if x.is_meta or not kernels_serve(x, x.shape[-1]) or x.dim() != 4 or x.dtype not in KERNEL_DTYPES or not cos.shape[-1]:
            return False
        fits = (cos.dim() == 2 or cos.shape[0] in (1, x.shape[0])) and cos.device == sin.device == x.device
        return fits and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))


def rotate(rotary: Rotary | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply `rotary` to each tensor; `None` leaves them as they are."""
    return tensors if rotary is None else tuple(rotary.apply(x) for x in tensors)
