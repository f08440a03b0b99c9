"""Softmax attention over the keys that a layout names.

s_ij = softcap(scale · q_i·k_j) + b_ij + key_bias_j ,   j ∈ layout(i)
o_i  = Σ_j exp(s_ij − lse_i) v_j ,   lse_i = log Σ_j exp(s_ij)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from subquad.checks import InputError, check_qkv
from subquad.ops.common import full_precision, kernels_serve
from subquad.ops.sparse.bias import Bias, RelativeBias, check_bias
from subquad.ops.sparse.chunked import sparse_attention_chunked
from subquad.ops.sparse.direct import FEW, sparse_attention_direct
from subquad.ops.sparse.inputs import check_call
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.parts import by_parts
from subquad.ops.sparse.reads import block_max, block_mean, column_mass
from subquad.ops.sparse.reference import sparse_attention_reference

__all__ = [
    "Bias",
    "Layout",
    "RelativeBias",
    "block_max",
    "block_mean",
    "column_mass",
    "sparse_attention",
    "sparse_attention_reference",
]


@full_precision
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    bias: Bias | None = None,
    key_bias: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Any:
    """Softmax attention over the keys that `layout` names; work and memory follow the layout's density.

    >>> o = sparse_attention(q, k, v, Layout.window(4096, 512))                       # [B, 4096, H, V]
    >>> o, lse = sparse_attention(q, k, v, Layout.causal(4096), return_lse=True)      # lse [B, 4096, H]

    Args:
        q: ``[B, N, H, D]``.
        k, v: ``[B, M, Hk, D]``, ``[B, M, Hv, V]``, M ≥ N; the head counts each divide the largest.
        layout: N queries by M keys; its lists have 1 or B batch rows and a head count that divides H.
        bias: added to the scaled scores; one of ALiBi slopes ``[H]`` (−slope·|p_i − p_j|), a dense ``[N, M]``,
            ``[H, N, M]`` or ``[B, H, N, M]``, a pair of low-rank factors ``[B, N, H, R]``, ``[B, M, H, R]`` (their
            product), or a `RelativeBias` table.
        key_bias: ``[B, H, M]``, a log-weight per key; −inf hides the key.
        q_pos, k_pos: ``[N]`` or ``[B, N]`` (M for keys) integer positions on which the layout's rule and the bias are
            evaluated instead of indices; a key at a negative position is never seen.
        scale: of q·k (default ``D ** -0.5``).
        softcap: c·tanh(s / c) is applied to the scaled scores, before any bias.
        return_lse, return_max: also return the log-sum-exp and the maximum of each row's scores, ``[B, N, H]``, float32
            (float64 for float64); −inf for a row that sees no key, whose output is 0. Both are differentiable; where
            keys tie for the maximum, they share its gradient, or on a GPU one of them has it.
        cu_seqlens: ``[S + 1]`` offsets of packed sequences (B = 1, M = N): rules hold within each sequence, whose
            positions start at 0; block lists keep to pairs of one sequence.

    Returns:
        o ``[B, N, H, V]``, followed by lse and max where asked for.
    """
    heads = check_qkv(q, k, v, longer_keys=True)
    check_call(q, k, layout, heads, q_pos, k_pos, cu_seqlens)
    if softcap is not None and not softcap > 0:
        raise InputError("softcap", softcap, "a positive number")
    check_bias(bias, key_bias, q, k, heads, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    stats = return_lse or return_max
    # the one place that chooses a path
    if layout.parts:
        return by_parts(
            sparse_attention, q, k, v, layout, heads, bias=bias, key_bias=key_bias, q_pos=q_pos, k_pos=k_pos, scale=scale,
            softcap=softcap, return_lse=return_lse, return_max=return_max, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    plain = bias is None and key_bias is None and softcap is None and cu_seqlens is None and layout.index is None
    if plain and 0 < q.shape[1] <= FEW and q.shape[2] == heads and k.shape[2] == v.shape[2]:
        o, lse, top = sparse_attention_direct(q, k, v, layout, q_pos=q_pos, k_pos=k_pos, scale=scale, stats=stats)
    elif q.shape[1] > FEW and _kernels_serve(q, k, v, layout, bias):  # a few queries over ever more keys would make lists anew each time
        from subquad.ops.sparse.fused import sparse_attention_fused

        o, lse, top = sparse_attention_fused(
            q, k, v, layout, bias=bias, key_bias=key_bias, q_pos=q_pos, k_pos=k_pos, scale=scale, softcap=softcap,
            cu_seqlens=cu_seqlens, stats=return_max,
        )  # fmt: skip
    else:
        o, lse, top = sparse_attention_chunked(
            q, k, v, layout, bias=bias, key_bias=key_bias, q_pos=q_pos, k_pos=k_pos,
            scale=scale, softcap=softcap, cu_seqlens=cu_seqlens, stats=stats,
        )  # fmt: skip
    extra = [x for x, wanted in ((lse, return_lse), (top, return_max)) if wanted]
    return (o, *extra) if extra else o


def _kernels_serve(q: Tensor, k: Tensor, v: Tensor, layout: Layout, bias: Bias | None) -> bool:
    """Whether the Triton kernels have all of this call."""
    if not q.dtype == k.dtype == v.dtype or not kernels_serve(q, q.shape[3], v.shape[3]):
        return False
    from subquad.ops.sparse.fused import serves

    return serves(layout, bias)
