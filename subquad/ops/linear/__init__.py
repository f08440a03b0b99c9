"""`linear_attention`: the causal linear recurrence, on which most linear mechanisms stand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError, check_cu_seqlens, check_qkv, check_tensor, compute_dtype, shape_of
from subquad.ops import step
from subquad.ops.common import kernels_serve, padded, spans
from subquad.ops.linear.chunked import LinearAttention, linear_step

__all__ = ["linear_attention", "linear_sums"]


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
    _, dtype = _check(q, k, v, log_decay, normalize, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    run = partial(_run, q, k, log_decay=log_decay, scale=scale, keep=return_state, cu_seqlens=cu_seqlens)
    if not normalize:
        o, state = run(v, state=None if initial_state is None else initial_state.to(dtype), dtype=q.dtype)
        return (o.to(q.dtype), state) if return_state else o.to(q.dtype)
    start = None if initial_state is None else torch.cat([initial_state[0], initial_state[1][..., None]], -1).to(dtype)
    o, total, state = _with_total(run, v, v.new_ones(*v.shape[:2], 1, 1), start, dtype)
    o = (o / (total + eps)).to(q.dtype)
    return (o, (state[..., :-1], state[..., -1])) if return_state else o


def linear_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    counts: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Numerator and denominator of linear attention, for those who add to both: S_tᵀ q_t and z_tᵀ q_t.

    Args:
        q, k, v, log_decay, cu_seqlens: as `linear_attention` takes them.
        counts: ``[B, N, 1, 1]`` in the dtype of v, how often a key counts in the denominator; None is once.
        initial_state: S and z side by side, ``[B, Hs, D, V + 1]``.
        return_state: also keep the state after the last token; it is of no use otherwise.

    Returns:
        numerator ``[B, N, H, V]`` in the dtype of q, denominator ``[B, N, H, 1]`` in float32 (float64 for float64), state.
    """
    _, dtype = _check(q, k, v, log_decay, False, None, cu_seqlens)
    state = None if initial_state is None else initial_state.to(dtype)
    counts = v.new_ones(*v.shape[:2], 1, 1) if counts is None else counts
    run = partial(_run, q, k, log_decay=log_decay, scale=1.0, keep=return_state, cu_seqlens=cu_seqlens)
    o, total, state = _with_total(run, v, counts, state, q.dtype)
    return o, total, state


def weights_apart(v: Tensor) -> bool:
    """Whether sums of weights take a pass of their own, for values like v ``[B, N, H, V]``: a column beside them would double the tiles."""
    return v.shape[1] > 1 and padded(v.shape[3] + 1) > padded(v.shape[3])


def _with_total(run: Any, v: Tensor, counts: Tensor, state: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of values in `dtype`, and of weights: a column beside v, or where that would double the kernels' tiles a pass of its own.

    64 columns and one more are two tiles of 64, and 128 wide where the backward contracts them; rows of 65 bfloat16 are not
    aligned either. A pass over one column computes q·k again and has a tile of 16.
    """
    q, k, wide = run.args[0], run.args[1], compute_dtype(v)
    channels = run.keywords["log_decay"] is not None and run.keywords["log_decay"].dim() == 4  # q and k would be weighed twice
    if weights_apart(v) and not channels and kernels_serve(q, q.shape[3], v.shape[3]):
        s, z = (None, None) if state is None else (state[..., :-1].contiguous(), state[..., -1:].contiguous())
        heads = max(k.shape[2], v.shape[2])
        counts = counts if k.shape[2] == heads else counts.expand(-1, -1, heads, -1)
        o, s = run(v, state=s, dtype=dtype)
        total, z = run(counts, state=z, dtype=wide)
        return o, total, torch.cat([s, z], -1) if run.keywords["keep"] else s
    v = torch.cat([v, counts.expand(-1, -1, v.shape[2], -1)], -1)
    o, state = run(v, state=state, dtype=wide)
    assert state is not None
    return o[..., :-1].to(dtype), o[..., -1:], state


def _run(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, state: Tensor | None, scale: float, keep: bool,
    cu_seqlens: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o in `dtype` or wider, and the state where it is to `keep`: the one place that chooses a path."""
    use_kernels = scale != 0 and kernels_serve(q, q.shape[3], v.shape[3])
    if use_kernels and cu_seqlens is None and state is not None and step.available(q, k, v, log_decay, state):
        return step.recurrent_step(q, k, v, log_decay, None, state, scale, dtype)
    if use_kernels:
        from subquad.ops.linear.fused import linear_attention as by_kernels

        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
        return by_kernels(q, k, v, log_decay, state, cu_seqlens, scale, keep, dtype)
    wide = compute_dtype(q)
    log_decay = None if log_decay is None else log_decay.to(wide)
    if state is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = torch.zeros(rows, max(k.shape[2], v.shape[2]), q.shape[3], v.shape[3], dtype=wide, device=q.device)
    if q.shape[1] == 1 and cu_seqlens is None:
        return linear_step(q, k, v, log_decay, state, scale)
    return LinearAttention.apply(q, k, v, log_decay, state, scale, spans(q.shape[1], cu_seqlens), dtype)


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
