"""The definitions of `sparse_attention` and of the reads of its map: a dense masked softmax, N × M scores and all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
    s, vh = _scores(q, k, heads, scale), v.to(dtype).repeat_interleave(heads // v.shape[2], 2)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + _dense_bias(bias, layout, q_pos, k_pos, cu_seqlens)
    if key_bias is not None:
        s = s + key_bias[:, :, None, :]
    s = _hide(s, layout, q_pos, k_pos, cu_seqlens)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0.0)  # a row that sees no key: any finite score, put aside below
    o = torch.einsum("bhnm,bmhv->bnhv", s.softmax(-1).masked_fill(empty, 0.0), vh)
    lse = s.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    top = s.amax(-1).masked_fill(empty[..., 0], -torch.inf)
    return o.to(q.dtype), lse.transpose(1, 2), top.transpose(1, 2)


def column_mass_reference(q: Tensor, k: Tensor, layout: Layout, *, lse: Tensor | None = None, **options: Any) -> Tensor:
    """`column_mass`: the column sums of exp(s − lse)."""
    s = _masked(q, k, layout, **options)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    total = s.masked_fill(empty, 0.0).logsumexp(-1) if lse is None else lse.transpose(1, 2)
    total = total.masked_fill(empty[..., 0] | (total == -torch.inf), torch.inf)
    return (s - total[..., None]).exp().sum(2)


def block_max_reference(q: Tensor, k: Tensor, layout: Layout, *, block: tuple[int, int], **options: Any) -> Tensor:
    """`block_max`: amax of every block of scores."""
    return _by_block(_masked(q, k, layout, **options), block).amax((-2, -1))


def block_mean_reference(q: Tensor, k: Tensor, layout: Layout, *, block: tuple[int, int], **options: Any) -> Tensor:
    """`block_mean`: sum over count of every block of scores."""
    s = _by_block(_masked(q, k, layout, **options), block)
    seen = s > -torch.inf
    count = seen.sum((-2, -1))
    return (s.masked_fill(~seen, 0.0).sum((-2, -1)) / count.clamp(min=1)).masked_fill(count == 0, -torch.inf)


def _masked(
    q: Tensor, k: Tensor, layout: Layout, *, scale: float | None = None, q_pos: Tensor | None = None, k_pos: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _hide(_scores(q, k, max(q.shape[2], k.shape[2]), scale), layout, q_pos, k_pos, cu_seqlens)


def _scores(q: Tensor, k: Tensor, heads: int, scale: float | None) -> Tensor:
    """scale · q·k, ``[B, H, N, M]``."""
    qh, kh = (x.to(compute_dtype(q)).repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    return torch.einsum("bnhd,bmhd->bhnm", qh, kh) * (q.shape[-1] ** -0.5 if scale is None else scale)


def _hide(s: Tensor, layout: Layout, q_pos: Tensor | None, k_pos: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The scores with −inf where nothing is seen."""
    mask = layout.to_mask(q_pos=q_pos, k_pos=k_pos, cu_seqlens=cu_seqlens).to(s.device)
    if mask.dim() > 2:
        mask = mask.repeat_interleave(s.shape[1] // mask.shape[-3], -3)
    return s.masked_fill(~mask, -torch.inf)


def _by_block(s: Tensor, block: tuple[int, int]) -> Tensor:
    """``[B, H, blocks, blocks, queries, keys]``, filled up with −inf."""
    s = F.pad(s, (0, -s.shape[-1] % block[1], 0, -s.shape[-2] % block[0]), value=-torch.inf)
    return s.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0])).transpose(-3, -2)


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
