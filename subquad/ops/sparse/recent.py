"""Softmax over the last w tokens, in one call or behind what earlier calls kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.stream import Stream

Near = tuple[Tensor, Tensor, Tensor]  # o [B, N, H, V], and lse and max [B, N, H] of the rows' scores
Kept = tuple[Tensor, Tensor]  # keys and values


def recent_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *,
    kept: Kept | None = None, length: Tensor | None = None, cu_seqlens: Tensor | None = None, keep: bool = False,
) -> tuple[Near, Kept | None]:  # fmt: skip
    """Attention to the last `window` tokens, in float32 or float64.

    Args:
        q, k, v: turned already, ``[B, N, H, D]``, ``[B, N, Hs, D]``, ``[B, N, Hs, V]``.
        kept: the last `window` keys and values before them, ``[R, window, Hs, ·]``, zeros where there were fewer.
        length: how many tokens came before, ``[R]``; None, as `kept`, at the start.
        cu_seqlens: offsets of packed sequences.
        keep: whether the keys and values to keep are wanted.

    Returns:
        (o, lse, max) and what is kept after the last token, in the dtype of k and v, or None.
    """
    dtype = compute_dtype(q)
    if kept is not None and length is not None and cu_seqlens is None and q.shape[1] == 1:
        kept = torch.cat([kept[0][:, 1:], k], 1), torch.cat([kept[1][:, 1:], v], 1)
        k_pos = length[:, None] + torch.arange(1 - window, 1, device=q.device)
        layout = Layout.dense(1, window)
        near = sparse_attention(*(x.to(dtype) for x in (q, *kept)), layout, k_pos=k_pos, return_lse=True, return_max=True)
        return near, kept
    if kept is None or length is None:
        layout = Layout.window(q.shape[1], window)
        near = sparse_attention(*(x.to(dtype) for x in (q, k, v)), layout, cu_seqlens=cu_seqlens, return_lse=True, return_max=True)
        if not keep:
            return near, None
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    old = kept or (k.new_zeros(rows, window, *k.shape[2:]), v.new_zeros(rows, window, *v.shape[2:]))
    stream = Stream(window, rows, q.shape[1], cu_seqlens, q.device)
    joined = stream.join(old[0], k), stream.join(old[1], v)
    if kept is not None and length is not None:
        wide = (x.to(dtype) for x in (q, *joined))
        near = attend_behind(*wide, lambda n, m: Layout.window(n, window, m=m), stream, length)
    return near, (stream.last(joined[0], window), stream.last(joined[1], window))


def attend_behind(q: Tensor, k: Tensor, v: Tensor, layout: Callable[[int, int], Layout], stream: Stream, length: Tensor) -> Near:
    """(o, lse, max) of new queries against joined keys and values, by position; `layout` makes one of n queries by m keys."""
    new = stream.positions(length)
    before = length[:, None] + torch.arange(-stream.past, 0, device=q.device)
    q, q_pos, k_pos = stream.pad(q), stream.pad(new, -1), stream.join(before, new)
    near = sparse_attention(
        q, k, v, layout(q.shape[1], k.shape[1]), q_pos=q_pos, k_pos=k_pos, cu_seqlens=stream.cu_seqlens,
        return_lse=True, return_max=True,
    )  # fmt: skip
    o, lse, top = (stream.unpad(x) for x in near)
    return o, lse, top
