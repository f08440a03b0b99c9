"""`recurrent_step`: a few tokens of a linear or delta recurrence in one kernel, for decoding.

One launch reads each state once and writes it once; with up to 16 tokens in a call (speculative decoding checks several
at a time) the state stays in registers between them. It has no backward: `available` says when it may be used.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import cdiv, padded

__all__ = ["available", "recurrent_step"]

TOKENS = 16  # most tokens of a call: the chunked forms have work for the matrix units from there on
WIDTH = 256  # widest head


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # an import hook forbids it
        return False


_TRITON = _installed("triton")
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")  # Triton's kernels then run on CPU

# (columns of a tile, warps) by padded head dim: 32 floats of the state a thread, in rows of 128 bytes at least. At 64 to 96
# registers some 20 warps or more share an SM, with a hundred KiB of loads in flight.
LAUNCH = {16: (128, 2), 32: (64, 2), 64: (64, 4), 128: (32, 4), 256: (32, 8)}


def available(q: Tensor, *others: Tensor | None) -> bool:
    """Whether `recurrent_step` serves these tensors: q first, then whichever else the call takes."""
    if not _TRITON or not 1 <= q.shape[1] <= TOKENS or not 1 <= q.shape[3] <= WIDTH:
        return False
    if not (q.is_cuda or (_INTERPRETED and q.device.type == "cpu")) or q.dtype == torch.float64:
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others)))


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """T ≤ 16 tokens of the linear recurrence, or with `beta` of the delta rule.

        S ← a_t S       u = v_t, or with β: β_t (v_t − Sᵀ k_t)       S ← S + k_t uᵀ       o_t = scale · Sᵀ q_t

    >>> o, S = recurrent_step(q, k, v, None, None, S, 0.125)       # linear attention
    >>> o, S = recurrent_step(q, k, v, g, beta, S, 0.125)          # gated delta rule

    Args:
        q, k: ``[B, T, ·, D]``; v: ``[B, T, ·, V]``. Fewer heads of k and v than Hs are repeated; H is the larger of q's and Hs.
        log_decay: per head ``[Hs]``, per token ``[B, T, Hs]`` or per channel ``[B, T, Hs, D]``.
        beta: ``[B, T, Hs]``.
        state: ``[B, Hs, D, V]``, float32; it is left as it is.
        dtype: of o (default: q's).

    Returns:
        o ``[B, T, H, V]`` and the state after the last token.
    """
    return _recurrent_step(q, k, v, log_decay, beta, state, scale, dtype or q.dtype)


def _empty(q: Tensor, v: Tensor, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    heads = max(q.shape[2], state.shape[1])
    return q.new_empty(*q.shape[:2], heads, v.shape[3], dtype=dtype), state.new_empty(state.shape)


@torch.library.custom_op("subquad::recurrent_step", mutates_args=())
def _recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from subquad.ops.step_kernel import step_kernel  # Triton is imported when it is first needed

    o, new_state = _empty(q, v, state, torch.float32 if _INTERPRETED else dtype)  # the interpreter would cut bfloat16 off, not round it
    rows, heads = state.shape[0] * state.shape[1], state.shape[1]
    if rows == 0:
        return o.to(dtype), new_state
    width, columns = state.shape[2:]
    tile, warps = LAUNCH[padded(width)]
    tile = min(tile, padded(columns))
    decay, strides = _decay_of(log_decay)
    with torch.cuda.device_of(q):
        step_kernel[(rows * cdiv(columns, tile),)](
            q, k, v, q if log_decay is None else log_decay, q if beta is None else beta, state, o, new_state,
            q.shape[1], scale, *q.stride(), *k.stride(), *v.stride(), *strides, *(beta.stride() if beta is not None else (0, 0, 0)),
            *state.stride(),
            HEADS=heads, GROUP=o.shape[2] // heads, Q_REPEAT=o.shape[2] // q.shape[2], K_REPEAT=heads // k.shape[2],
            V_REPEAT=heads // v.shape[2], D=width, V=columns, BD=padded(width), BV=tile, DECAY=decay, DELTA=beta is not None,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
    return o.to(dtype), new_state


@_recurrent_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, beta: Any, state: Tensor, scale: float, dtype: torch.dtype) -> Any:
    return _empty(q, v, state, dtype)


def _decay_of(log_decay: Tensor | None) -> tuple[str, tuple[int, ...]]:
    """What the kernel is told of the decay, and its strides over ``[B, T, Hs, D]``: a decay per head stands still over tokens."""
    if log_decay is None:
        return "none", (0, 0, 0, 0)
    if log_decay.dim() == 1:
        return "token", (0, 0, log_decay.stride(0), 0)
    if log_decay.dim() == 3:
        return "token", (*log_decay.stride(), 0)
    return "channel", log_decay.stride()
