"""Softmax over the last w tokens, in one call or behind what earlier calls kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.stream import Stream
from subquad.state import State

Near = tuple[Tensor, Tensor, Tensor]  # o [B, N, H, V], and lse and max [B, N, H] of the rows' scores


def recent_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, state: State | None = None, *, cu_seqlens: Tensor | None = None, keep: bool = False
) -> tuple[Near, dict[str, Tensor]]:
    """Attention to the last `window` tokens; lse and max are float32, or float64 for float64.

    Args:
        q, k, v: turned already, ``[B, N, H, D]``, ``[B, N, Hs, D]``, ``[B, N, Hs, V]``.
        state: holds, as "k" and "v", the last `window` keys and values of each row, ``[R, window, Hs, ·]``, zeros where there
            were fewer.
        cu_seqlens: offsets of packed sequences.
        keep: whether the keys and values to keep are wanted.

    Returns:
        (o, lse, max), and "k" and "v" for the next state, in the dtype of k and v; none at the start unless `keep`.
    """
    if state is not None and cu_seqlens is None and q.shape[1] == 1:
        joined = torch.cat([state["k"][:, 1:], k], 1), torch.cat([state["v"][:, 1:], v], 1)
        wide_q, wide_k, wide_v = (x.to(compute_dtype(q)) for x in (q, *joined))
        k_pos = state.length[:, None] + torch.arange(1 - window, 1, device=q.device)
        o, lse, top = sparse_attention(wide_q, wide_k, wide_v, Layout.dense(1, window), k_pos=k_pos, return_lse=True, return_max=True)
        return (o.to(q.dtype), lse, top), {"k": joined[0], "v": joined[1]}
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is None:
        layout = Layout.window(q.shape[1], window)
        near = sparse_attention(q, k, v, layout, cu_seqlens=cu_seqlens, return_lse=True, return_max=True)
        if not keep:
            return near, {}
        old = k.new_zeros(rows, window, *k.shape[2:]), v.new_zeros(rows, window, *v.shape[2:])
    else:
        old = state["k"], state["v"]
    stream = Stream(window, rows, q.shape[1], cu_seqlens, q.device)
    joined = stream.join(old[0], k), stream.join(old[1], v)
    if state is not None:
        near = attend_behind(q, *joined, lambda n, m: Layout.window(n, window, m=m), stream, state.length)
    return near, {"k": stream.last(joined[0], window), "v": stream.last(joined[1], window)}


def kept_positions(length: Tensor, window: int, sinks: int = 0) -> Tensor:
    """Where kept tokens stand, ``[R, sinks + window]``: the first `sinks`, then the last `window` of `length` ``[R]``.

    Negative where there is none; a sink that the window still holds stands there alone.
    """
    last = length[:, None] + torch.arange(-window, 0, device=length.device)
    if not sinks:
        return last
    first = torch.arange(sinks, device=length.device)
    return torch.cat([first.where(first < last[:, :1], -1), last], 1)


def attend_behind(
    q: Tensor, k: Tensor, v: Tensor, layout: Callable[[int, int], Layout], stream: Stream, length: Tensor, sinks: int = 0
) -> Near:
    """(o, lse, max) of new queries against joined keys and values, by position; `layout` makes one of n queries by m keys.

    What `stream` joins is the first `sinks` tokens and the last, as `kept_positions` has them.
    """
    new = stream.positions(length)
    before = kept_positions(length, stream.past - sinks, sinks)
    q, q_pos, k_pos = stream.pad(q), stream.pad(new, -1), stream.join(before, new)
    near = sparse_attention(
        q, k, v, layout(q.shape[1], k.shape[1]), q_pos=q_pos, k_pos=k_pos, cu_seqlens=stream.cu_seqlens,
        return_lse=True, return_max=True,
    )  # fmt: skip
    o, lse, top = (stream.unpad(x) for x in near)
    return o, lse, top
