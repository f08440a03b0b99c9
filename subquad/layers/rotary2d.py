"""Two-dimensional rotary angles for tokens on a grid."""

from __future__ import annotations

import torch

from subquad.checks import InputError
from subquad.rotary import Rotary

MOST = 32  # rotaries remembered: a network asks for the same few at each call
_known: dict[tuple[object, ...], Rotary] = {}


def rala_rotary(grid: tuple[int, int], head_dim: int, *, device: torch.device | str | None = None) -> Rotary:
    """RALA's rotary (arXiv 2411.07635): the first half of the channels turns with the row, the second with the column.

    D/4 frequencies 10000^−linspace(0, 1, D/4), each for a pair of adjacent channels. Tokens stand row by row.

    >>> rala_rotary((14, 14), 64).cos.shape
    torch.Size([196, 64])

    Args:
        grid: (rows, columns).
        head_dim: D, a multiple of 4.
    """
    if head_dim < 4 or head_dim % 4:
        raise InputError("head_dim", head_dim, "a multiple of 4: pairs of channels for rows and for columns")
    if len(grid) != 2 or min(grid) < 1:
        raise InputError("grid", tuple(grid), "(rows, columns)")
    where = torch.device(device or "cpu")
    settled = device is not None and (where.type != "cuda" or where.index is not None)  # not whatever is the default just now
    if torch.compiler.is_compiling() or not settled:
        return _rotary(grid, head_dim, device)
    key = tuple(grid), head_dim, where, torch.is_inference_mode_enabled()
    if key not in _known:
        rotary = _rotary(grid, head_dim, device)
        if type(rotary.cos) is not torch.Tensor:  # fake
            return rotary
        if len(_known) >= MOST:
            _known.pop(next(iter(_known)))
        _known[key] = rotary
    return _known[key]


def _rotary(grid: tuple[int, int], head_dim: int, device: torch.device | str | None) -> Rotary:
    frequency = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, device=device).repeat_interleave(2)  # [D/2]
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32)[:, None] * frequency for side in grid)
    across = (grid[0], grid[1], head_dim // 2)
    angle = torch.cat([rows[:, None].expand(across), columns[None].expand(across)], -1).flatten(0, 1)
    return Rotary(angle.cos(), angle.sin(), interleaved=True)
