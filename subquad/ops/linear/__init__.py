"""`linear_attention`: the causal linear recurrence, on which most linear mechanisms stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError, check_cu_seqlens, check_qkv, check_tensor, compute_dtype, shape_of
from subquad.ops import step
from subquad.ops.common import kernels_serve, spans
from subquad.ops.linear.chunked import LinearAttention, linear_step

__all__ = ["linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
    initial_state: Any = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Causal linear attention, in time and memory linear in N.

        S_t = diag(a_t) S_{t−1} + k_t v_tᵀ        o_t = scale · S_tᵀ q_t
        z_t = diag(a_t) z_{t−1} + k_t              with `normalize`, o_t is divided by scale · q_t·z_t + eps

    >>> o = linear_attention(q, k, v)                                     # [B, N, H, V]
    >>> o, S = linear_attention(q, k, v, log_decay=g, return_state=True)  # S [B, Hs, D, V]
    >>> o, S = linear_attention(q1, k1, v1, log_decay=g1, initial_state=S, return_state=True)

    Args:
        q, k: ``[B, N, ·, D]``; v: ``[B, N, ·, V]``. Head counts divide the largest, H; Hs is the larger of k's and v's.
        log_decay: log a ≤ 0 per head ``[Hs]``, per token ``[B, N, Hs]`` or per channel ``[B, N, Hs, D]``; −inf forgets all.
        scale: multiplies q; None is ``D ** -0.5``.
        normalize: divide by the sum of weights.
        initial_state: S ``[B, Hs, D, V]``, or with `normalize` the pair (S, z), z ``[B, Hs, D]``.
        return_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        cu_seqlens: ``[S + 1]`` offsets of sequences packed into a batch of one; states then have S rows.

    Returns:
        o ``[B, N, H, V]`` in the dtype of q, or (o, state).
    """
    heads, dtype = _check(q, k, v, log_decay, normalize, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if normalize:  # a column of ones beside v: its output is the denominator, its state is z
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1)
        initial_state = None if initial_state is None else torch.cat([initial_state[0], initial_state[1][..., None]], -1)
    state = None if initial_state is None else initial_state.to(dtype)
    out_dtype = dtype if normalize else q.dtype
    use_kernels = scale != 0 and kernels_serve(q, q.shape[3], v.shape[3])
    # the one place that chooses a path
    if use_kernels and cu_seqlens is None and state is not None and step.available(q, k, v, log_decay, state):
        o, state = step.recurrent_step(q, k, v, log_decay, None, state, scale, out_dtype)
    elif use_kernels:
        from subquad.ops.linear.fused import linear_attention as by_kernels

        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
        o, state = by_kernels(q, k, v, log_decay, state, cu_seqlens, scale, return_state, out_dtype)
    else:
        log_decay = None if log_decay is None else log_decay.to(dtype)
        if state is None:
            state = torch.zeros(rows, heads, q.shape[3], v.shape[3], dtype=dtype, device=q.device)
        if q.shape[1] == 1 and cu_seqlens is None:
            o, state = linear_step(q, k, v, log_decay, state, scale)
        else:
            o, state = LinearAttention.apply(q, k, v, log_decay, state, scale, spans(q.shape[1], cu_seqlens), out_dtype)

    if normalize:
        o = o[..., :-1] / (o[..., -1:] + eps)
    o = o.to(q.dtype)
    if not return_state:
        return o
    return o, (state[..., :-1], state[..., -1]) if normalize else state


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, normalize: bool, state: Any, cu_seqlens: Any) -> tuple[int, torch.dtype]:
    """Check everything; returns Hs and the dtype of the state."""
    check_qkv(q, k, v)
    check_cu_seqlens(cu_seqlens, q)
    batch, tokens, _, width = q.shape
    heads = max(k.shape[2], v.shape[2])
    if log_decay is not None:
        shapes = [(heads,), (batch, tokens, heads), (batch, tokens, heads, width)]
        if not isinstance(log_decay, Tensor) or tuple(log_decay.shape) not in shapes:
            was = shape_of(log_decay) if isinstance(log_decay, Tensor) else type(log_decay).__name__
            raise InputError("log_decay", was, "shape " + " or ".join(str(list(s)) for s in shapes))
        check_tensor("log_decay", log_decay, tuple(log_decay.shape), q)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is not None:
        if normalize and not (isinstance(state, tuple | list) and len(state) == 2):
            raise InputError("initial_state", type(state).__name__, "a pair (S, z), as normalize is set")
        parts = state if normalize else (state,)
        shapes = [(rows, heads, width, v.shape[3]), (rows, heads, width)]
        for part, shape in zip(parts, shapes):
            check_tensor("initial_state", part, shape, q)
    return heads, compute_dtype(q)
