"""`window_step`: one decoded token of softmax over a window, and linear attention to all before it, in one kernel.

It has no backward, and no form in plain torch: `serves` says where it may be used, and mechanisms have a step of their own besides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import autocasts
from subquad.ops.common import kernels_serve, traced
from subquad.ops.linear import weights_apart
from subquad.ops.sparse.direct import FEW
from subquad.ops.window_step.keep import first_kept

__all__ = ["first_kept", "serves", "serves_first", "window_step"]


def serves(q: Tensor, k: Tensor, v: Tensor, kept: tuple[Tensor, Tensor], sums: Tensor, maps: tuple[Tensor, Tensor], factor: Tensor) -> bool:
    """Whether `window_step` has a kernel for these: where kernels serve, one token, one dtype of all tokens, and no gradients."""
    if q.shape[1] != 1 or not kernels_serve(q, *maps[0].shape[1:], v.shape[3]):
        return False
    if not all(x.dtype == q.dtype for x in (k, v, *kept)) or sums.dtype != torch.float32 or torch.float64 in (maps[0].dtype, maps[1].dtype):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *kept, sums, *maps, factor)))


def serves_first(q: Tensor, k: Tensor, v: Tensor, far: tuple[Tensor, Tensor], maps: tuple[Tensor, Tensor], factor: Tensor) -> bool:
    """Whether `first.first_call` has these: bfloat16 or float32 that kernels serve, a past of some tokens, no gradients, nothing traced."""
    if traced(q) or q.dtype not in (torch.bfloat16, torch.float32) or not kernels_serve(q, *maps[0].shape[1:], v.shape[3]):
        return False
    if far[1].shape[1] < 2 or q.shape[1] <= FEW or not weights_apart(v) or not q.shape[0]:
        return False
    given = q, k, v, *far, *maps, factor
    if autocasts(q) or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return False
    from subquad.ops.features import serve  # Triton is imported when it is first needed

    return serve(q, maps[0])


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: tuple[Tensor, Tensor],
    sums: Tensor,
    length: Tensor,
    maps: tuple[Tensor, Tensor],
    factor: Tensor,
    *,
    sinks: int = 0,
    affine: bool = False,
    far: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """One token of each row: what leaves the window enters the sums, unless it is a sink, then the token sees both.

        S ← S + φ_k(k_left) [v_left, 1]      s_j = q·k_j / √D over sinks, window and the token,  c = max s
        o = (g Σ exp(s_j − c) v_j + f φ_q(q) S_v) / (g Σ exp(s_j − c) + f φ_q(q) S_1)      φ(x) = [softmax(W x), softmax(−W x)] ≥ 1e-12

    g = sigmoid(factor), f = 1 − g if `affine`, else 1. All is computed in float32; φ of bfloat16 is rounded to it.

    Args:
        q: ``[B, 1, H, D]``, bfloat16, float16 or float32; D, F and V are 256 at most.
        k, v: ``[B, 1, Hs, D]``, ``[B, 1, Hs, V]``, in its dtype; Hs divides H.
        kept: keys ``[B, sinks + w, Hs, K]`` and values ``[…, V]`` of the first `sinks` tokens and of the last w, which stand at the end;
            K is D, or with `far` 2D: keys as k has them, and as the k of `far`.
        sums: S ``[B, H, 2F, V + 1]``, float32, whose last column sums the weights.
        length: ``[B]`` int64, the tokens of each row before this one. Places that they do not fill are not read.
        maps: W of queries and of keys, ``[H, D, F]``.
        factor: ``[H]``.
        far: q and k of the features, where these are not of q and k themselves (which may be rotated).

    Returns:
        o ``[B, 1, H, V]`` in the dtype of v, and the kept pair and the sums for the next token, in new memory.
    """
    from subquad.ops.window_step import fused  # Triton is imported when it is first needed

    far_q, far_k = (None, None) if far is None else far
    o, new_k, new_v, new_sums = fused.window_step(q, k, v, far_q, far_k, *kept, sums, length, *maps, factor, sinks, affine)
    return o, (new_k, new_v), new_sums
