"""The definition of `sparse_attention`: a dense masked softmax, N × M scores and all."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.sparse.bias import Bias, RelativeBias
from subquad.ops.sparse.layout import Layout


def sparse_attention_reference(
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, lse, max), as `sparse_attention` with `return_lse` and `return_max`."""
    heads, dtype = max(q.shape[2], k.shape[2], v.shape[2]), compute_dtype(q)
    qh, kh, vh = (x.to(dtype).repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v))
    s = torch.einsum("bnhd,bmhd->bhnm", qh, kh) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + _dense_bias(bias, layout, q_pos, k_pos, cu_seqlens)
    if key_bias is not None:
        s = s + key_bias[:, :, None, :]
    mask = layout.to_mask(q_pos=q_pos, k_pos=k_pos, cu_seqlens=cu_seqlens).to(q.device)
    if mask.dim() > 2:
        mask = mask.repeat_interleave(heads // mask.shape[-3], -3)
    s = s.masked_fill(~mask, -torch.inf)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)  # a row that sees no key: any finite score, put aside below
    o = torch.einsum("bhnm,bmhv->bnhv", s.softmax(-1).masked_fill(empty, 0.0), vh)
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    top = s.amax(-1).masked_fill(empty[..., 0], -torch.inf)
    return o.to(q.dtype), lse.transpose(1, 2), top.transpose(1, 2)


def _dense_bias(bias: Bias, layout: Layout, q_pos: Tensor | None, k_pos: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Any form of bias as ``[B|1, H|1, N, M]``."""
    if isinstance(bias, tuple):
        return torch.einsum("bnhr,bmhr->bhnm", *(x.expand(-1, -1, max(y.shape[2] for y in bias), -1) for x in bias))
    if isinstance(bias, Tensor) and bias.dim() > 1:
        return bias
    parameter = bias.table if isinstance(bias, RelativeBias) else bias
    i, j = torch.arange(layout.n, device=parameter.device), torch.arange(layout.m, device=parameter.device)
    qp = q_pos if q_pos is not None else i + (layout.m - layout.n)
    kp = k_pos if k_pos is not None else j
    if cu_seqlens is not None and (q_pos is None or k_pos is None):
        start = cu_seqlens.to(i)[torch.bucketize(i, cu_seqlens[1:].to(i), right=True)]
        qp, kp = qp if q_pos is not None else i - start, kp if k_pos is not None else j - start
    away = (kp[..., None, :] - qp[..., :, None]).reshape(-1, 1, layout.n, layout.m)
    if isinstance(bias, RelativeBias):
        reach = bias.table.shape[1] // 2
        return bias.table[:, away.clamp(-reach, reach) + reach].squeeze(2).transpose(0, 1)
    return -bias[:, None, None] * away.abs()
