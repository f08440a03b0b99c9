"""A short causal convolution over tokens, each channel by itself, in one call or behind the tokens kept by earlier ones.

y_t[c] = Σ_a w[c, r − a] x_{t−a}[c] ,   a = 0 … r          taps as in torch's conv1d: the last is the current token's
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.common import full_precision
from subquad.ops.sparse.stream import Stream


@full_precision
def short_conv(
    x: Tensor, weight: Tensor, *, kept: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The convolution in float32 or float64; before the first token stand zeros.

    Args:
        x: ``[B, N, Hx, D]``.
        weight: ``[H, D, r + 1]``; Hx divides H, and heads of x are repeated to H.
        kept: the last r tokens before x, ``[R, r, Hx, D]``; None at the start.
        cu_seqlens: offsets of packed sequences, which keep to themselves.

    Returns:
        y ``[B, N, H, D]``, and the last r tokens of each row in the dtype of x.
    """
    past, tokens = weight.shape[-1] - 1, x.shape[1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if kept is None:
        kept = x.new_zeros(rows, past, *x.shape[2:])
    stream = Stream(past, rows, tokens, cu_seqlens, x.device)
    joined = stream.join(kept, x)
    taps = weight.to(compute_dtype(x)).unflatten(0, (x.shape[2], -1))  # [Hx, H / Hx, D, r + 1]
    wide = joined.to(taps.dtype)[:, :, :, None]
    y = torch.zeros((), dtype=taps.dtype, device=x.device)
    for back in range(past + 1):
        earlier = wide[:, past - back : past - back + tokens] if cu_seqlens is None else wide[:, stream.index - back]
        y = y + earlier * taps[..., past - back]
    return y.flatten(2, 3), stream.last(joined, past)
