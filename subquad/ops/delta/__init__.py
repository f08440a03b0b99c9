"""`delta_rule`: the recurrence that corrects what its state recalls, on which DeltaNet and its kin stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError, check_cu_seqlens, check_qkv, check_tensor, compute_dtype, shape_of
from subquad.ops import step
from subquad.ops.common import expand_heads, kernels_serve, spans
from subquad.ops.delta.chunked import DeltaRule, delta_step, run

__all__ = ["delta_rule"]

# Head dim of the solves' kernels: beyond it Triton 3.6 makes ones that read past their shared memory on Hopper, which has no room for
# wider float32 values either.
WIDEST = 128


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """The (gated) delta rule, in time and memory linear in N.

        S_t = (I − β_t k_t k_tᵀ) diag(a_t) S_{t−1} + β_t k_t v_tᵀ        o_t = scale · S_tᵀ q_t

    >>> o = delta_rule(q, k, v, beta)                                  # [B, N, H, V]
    >>> o, S = delta_rule(q, k, v, beta, log_decay=g, return_state=True)

    Args:
        q, k: ``[B, N, ·, D]``; v: ``[B, N, ·, V]``. Head counts divide the largest, H; Hs is the larger of k's and v's.
            D > 128, and V > 128 in float32, are computed by plain PyTorch on CUDA too, but for decoding.
            Keys are used as given: with β ≤ 1 they should have norm 1 at most, or the state may grow without bound.
        beta: ``[B, N, Hs]``, the size of each correction.
        log_decay: log a ≤ 0 per token ``[B, N, Hs]``, or per channel ``[B, N, Hs, D]``, which on CUDA too is computed by plain
            PyTorch but for decoding; None is 0.
        scale: multiplies q; None is ``D ** -0.5``.
        initial_state: ``[B, Hs, D, V]``.
        return_state: also return the state after the last token, in float32 (float64 for float64 inputs).
        cu_seqlens: ``[S + 1]`` offsets of sequences packed into a batch of one; states then have S rows.

    Returns:
        o ``[B, N, H, V]`` in the dtype of q, or (o, state).
    """
    heads, state_heads = _check(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    dtype = compute_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    state = None if initial_state is None else initial_state.to(dtype)
    use_kernels = scale != 0 and kernels_serve(q, q.shape[3], v.shape[3])
    fits = q.shape[3] <= WIDEST and (v.shape[3] <= WIDEST or q.dtype != torch.float32)
    # the one place that chooses a path
    if use_kernels and cu_seqlens is None and state is not None and step.available(q, k, v, beta, log_decay, state):
        o, state = step.recurrent_step(q, k, v, log_decay, beta, state, scale)
    elif use_kernels and fits and (log_decay is None or log_decay.dim() == 3):
        from subquad.ops.delta.fused import delta_rule as by_kernels

        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
        o, state = by_kernels(q, k, v, beta, log_decay, state, cu_seqlens, scale, return_state)
    else:
        q = expand_heads(q, heads if q.shape[2] < state_heads else q.shape[2])
        k, v = expand_heads(k, state_heads), expand_heads(v, state_heads)
        if state is None:
            rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = torch.zeros(rows, state_heads, k.shape[3], v.shape[3], dtype=dtype, device=q.device)
        if q.shape[1] == 1 and cu_seqlens is None:
            o, state = delta_step(q, k, v, beta, log_decay, state, scale)
        elif torch.compiler.is_compiling():  # the compiler keeps and recomputes what it likes
            o, state = run(q, k, v, beta, log_decay, state, scale, spans(q.shape[1], cu_seqlens))
        else:
            o, state = DeltaRule.apply(q, k, v, beta, log_decay, state, scale, spans(q.shape[1], cu_seqlens))
    o = o.to(q.dtype)
    return (o, state) if return_state else o


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Any, log_decay: Any, state: Any, cu_seqlens: Any) -> tuple[int, int]:
    """Check everything; returns H and Hs."""
    heads = check_qkv(q, k, v)
    check_cu_seqlens(cu_seqlens, q)
    batch, tokens, _, width = q.shape
    state_heads = max(k.shape[2], v.shape[2])
    if beta is None:
        raise InputError("beta", None, f"a tensor {[batch, tokens, state_heads]}")
    check_tensor("beta", beta, (batch, tokens, state_heads), q)
    if log_decay is not None:
        shapes = [(batch, tokens, state_heads), (batch, tokens, state_heads, width)]
        if not isinstance(log_decay, Tensor) or tuple(log_decay.shape) not in shapes:
            was = shape_of(log_decay) if isinstance(log_decay, Tensor) else type(log_decay).__name__
            raise InputError("log_decay", was, "shape " + " or ".join(str(list(s)) for s in shapes))
        check_tensor("log_decay", log_decay, tuple(log_decay.shape), q)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_tensor("initial_state", state, (rows, state_heads, width, v.shape[3]), q)
    return heads, state_heads
