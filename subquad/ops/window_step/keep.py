"""What `window_step` reads of a sequence that begins: the keys and values of its first tokens and of its last."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, kernels_serve, padded, traced


def first_kept(k: Tensor, v: Tensor, far: Tensor | None, sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """Of the first `sinks` tokens and the last `window`, which stand at the end; zero where there are no such tokens.

    Args:
        k: ``[B, N, H, D]``; v: ``[B, N, H, V]``.
        far: more of each key, like k, or None.

    Returns:
        ``[B, sinks + window, H, K]``, K being D or, with `far`, 2D, and ``[B, sinks + window, H, V]``, in new memory.
    """
    learns = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or (far is not None and far.requires_grad))
    if not learns and not traced(k) and kernels_serve(k, k.shape[3], v.shape[3]):
        return _by_kernel(k, v, far, sinks, window)
    keys = _kept(k, sinks, window)
    return keys if far is None else torch.cat([keys, _kept(far, sinks, window)], -1), _kept(v, sinks, window)


def _kept(x: Tensor, sinks: int, window: int) -> Tensor:
    n = x.shape[1]
    gap = x.new_zeros(x.shape[0], max(0, sinks - n) + max(0, window - n), *x.shape[2:])
    return torch.cat([x[:, :sinks], gap, x[:, max(0, n - window) :]], 1)


def _by_kernel(k: Tensor, v: Tensor, far: Tensor | None, sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """As one launch, where torch would take as many as ten."""
    k, v, far = by_rows(k), by_rows(v), None if far is None else by_rows(far)
    (batch, n, heads, width), columns, held = k.shape, v.shape[3], sinks + window
    keys = torch.empty((batch, held, heads, width if far is None else 2 * width), dtype=k.dtype, device=k.device)
    values = torch.empty((batch, held, heads, columns), dtype=v.dtype, device=v.device)
    if batch:
        strides = (*k.stride()[:3], *(k if far is None else far).stride()[:3], *v.stride()[:3])
        run = _launcher(heads, width, columns, sinks, window, far is not None)
        run((batch * held * heads, 1, 1), (k, far, v, keys, values), strides, (n,))
    return keys, values


@cache
def _launcher(heads: int, width: int, columns: int, sinks: int, window: int, pair: bool) -> Any:
    from subquad.ops.launcher import launcher  # Triton is imported when it is first needed
    from subquad.ops.window_step.kernels import keep_kernel

    return launcher(
        keep_kernel, H=heads, WINDOW=window, SINKS=sinks, D=width, V=columns, BD=padded(width), BV=padded(columns), PAIR=pair, num_warps=1
    )  # fmt: skip
