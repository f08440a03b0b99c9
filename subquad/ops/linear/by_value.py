"""Causal linear attention whose decays are per value channel: they weigh the columns of the state and not its rows.

    S_t = S_{t−1} diag(a_t) + k_t v_tᵀ        o_t = scale · S_tᵀ q_t

The mirror of decays per key channel: o and v̇ are passes that weigh columns, q̇ and k̇ passes that weigh what is contracted
(`chunked.py`). Gated slot attention writes its keys to slots this way (Zhang et al., arXiv 2409.07146).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.checks import compute_dtype
from subquad.ops.common import Span, full_precision, reduce_heads, spans
from subquad.ops.linear.chunked import decay_gradient, linear_pass
from subquad.ops.linear.decay import Decay


def linear_attention_by_value(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *,
    scale: float | None = None, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Linear attention with a decay per token, head and value channel, in plain torch on any device.

    Args:
        q: ``[B, N, H, D]``; k: ``[B, N, Hs, D]``; v: ``[B, N, Hs, V]``; Hs divides H.
        log_decay: log a ≤ 0, ``[B, N, Hs, V]``.
        scale: multiplies q; None is ``D ** -0.5``.
        initial_state: ``[B, Hs, D, V]``, or a row for each of the packed sequences.
        cu_seqlens: offsets of packed sequences.

    Returns:
        o ``[B, N, H, V]`` in the dtype of q, and the state after the last token.
    """
    dtype, scale = compute_dtype(q), q.shape[-1] ** -0.5 if scale is None else scale
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        initial_state = torch.zeros(rows, v.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=q.device)
    log_decay, state = log_decay.to(dtype), initial_state.to(dtype)
    if q.shape[1] == 1 and cu_seqlens is None:
        return step(q, k, v, log_decay, state, scale)
    return _ByValue.apply(q, k, v, log_decay, state, scale, spans(q.shape[1], cu_seqlens))  # type: ignore[no-any-return]


@full_precision
def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token."""
    x, y, z = (t.to(state.dtype)[:, 0] for t in (q, k, v))
    state = torch.addcmul(state * log_decay[:, 0].exp()[..., None, :], y[..., None], z[..., None, :])
    o = (x * scale).unflatten(1, (state.shape[1], -1)) @ state
    return o.flatten(1, 2)[:, None].to(q.dtype), state


class _ByValue(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float, over: tuple[Span, ...]
    ) -> tuple[Tensor, Tensor]:
        decay = Decay(log_decay, q, v.shape[2], state.dtype)
        o, final = linear_pass(q, k, v, decay, state, over, columns=True, scale=scale, dtype=q.dtype)
        ctx.save_for_backward(q, k, v, log_decay, state, o, final)
        ctx.scale, ctx.over = scale, over
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, log_decay, state, o, final = ctx.saved_tensors
        decay = Decay(log_decay, q, v.shape[2], state.dtype)
        do = torch.zeros_like(o) if do is None else do
        scaled, end = do * ctx.scale, torch.zeros_like(state) if d_final is None else d_final
        dq, _ = linear_pass(scaled, v, k, decay, state.mT, ctx.over)
        dk, _ = linear_pass(v, scaled, q, decay, end.mT, ctx.over, reverse=True)
        dv, d_state = linear_pass(k, q, scaled, decay, end, ctx.over, reverse=True, columns=True, dtype=decay.dtype)
        total = reduce_heads(o.to(decay.dtype) * do, v.shape[2]) - v * dv
        dg = decay_gradient(log_decay, total, ctx.over, final.mT, None if d_final is None else d_final.mT)
        return dq, dk, dv.to(v.dtype), dg, d_state, None, None
