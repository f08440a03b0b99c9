"""MD-LRPE: LightNet's relative positions for linear attention, on grids of any number of axes.

    Θ(s₁ … s_m) = (s₁ θ, …, s_m θ) cut to D channels,   θ_c = base^(−2c/d), c = 0 … d − 1, d = ⌈D / m⌉

In the cosine form, x becomes [x ⊙ cos Θ, x ⊙ sin Θ], and a score Σ_c q_c k_c cos(Θ_c − Θ′_c): it depends on the difference along each axis.
Qin, Mao, Shen, et al.: You Only Scan Once (arXiv 2405.21022), frequencies and axes as in the first author's code (Doraemonzzz/xopes).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.rotary import Rotary


def md_lrpe(
    grid: Sequence[int],
    head_dim: int,
    *,
    extra: int = 0,
    base: float = 10000.0,
    theta: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Rotary:
    """Cosine and sine of an angle of its own for each channel, for ``attention("lightnet", …, lrpe="cosine")``.

    >>> md_lrpe((14, 14), 64).cos.shape
    torch.Size([196, 64])
    >>> md_lrpe((8, 14, 14), 64, extra=1).cos.shape               # a class token before the video's
    torch.Size([1569, 64])

    Args:
        grid: tokens along each axis, the last one running fastest.
        head_dim: D, even.
        extra: tokens before those of the grid, whose angles are 0.
        base: of the frequencies.
        theta: ``[⌈D/m⌉]``, other frequencies, shared by the m axes.

    Raises:
        InputError: sizes that do not fit.
    """
    if head_dim < 2 or head_dim % 2:
        raise InputError("head_dim", head_dim, "a positive even number")
    if not len(grid) or any(type(side) is not int or side < 1 for side in grid):
        raise InputError("grid", tuple(grid), "the number of tokens along each axis, at least one")
    if type(extra) is not int or extra < 0:
        raise InputError("extra", repr(extra), "an integer ≥ 0")
    count = -(-head_dim // len(grid))
    if theta is None:
        theta = base ** (-2 * torch.arange(count, device=device, dtype=torch.float32) / count)
    elif tuple(theta.shape) != (count,):
        raise InputError("theta", shape_of(theta), f"[{count}]: {head_dim} channels over {len(grid)} axes")
    places = torch.meshgrid(*(torch.arange(side, device=theta.device, dtype=theta.dtype) for side in grid), indexing="ij")
    angle = torch.cat([place.flatten()[:, None] * theta for place in places], -1)[:, :head_dim]
    angle = torch.cat([angle.new_zeros(extra, head_dim), angle])
    return Rotary(angle.cos(), angle.sin())
