"""Sparse attention whose state is every key and value so far: for causal layouts that may come back to any of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.contract import Call
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout

Make = Callable[[int, int], Layout]  # of n queries and m keys
Behind = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # o of new q, all k and v, and the length seen before


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, make: Make, behind: Behind | None = None
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """(o ``[B, N, H, V]``, the state's keys and values): q and k are rotated already.

    A row that has seen less than others has its keys at the end; what stands before them is never seen. `behind` attends from new
    tokens to these; None evaluates the layout's rule at their positions.
    """
    behind = behind or partial(_behind, make=make)
    if call.cu_seqlens is not None and (call.state is not None or call.return_state):
        return _packed(q, k, v, call, call.cu_seqlens.tolist(), behind)
    if call.state is None:
        o = sparse_attention(q, k, v, make(q.shape[1], k.shape[1]), cu_seqlens=call.cu_seqlens)
        return o, {"k": k, "v": v} if call.return_state else None
    k, v = torch.cat([call.state["k"], k], 1), torch.cat([call.state["v"], v], 1)
    return behind(q, k, v, call.state.length), {"k": k, "v": v}


def _behind(q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, make: Make) -> Tensor:
    """New tokens behind the `length` ``[B]`` that each row has seen, by position."""
    n, m = q.shape[1], k.shape[1]
    q_pos = length[:, None] + torch.arange(n, device=q.device)
    k_pos = length[:, None] + torch.arange(n - m, n, device=q.device)
    return sparse_attention(q, k, v, make(n, m), q_pos=q_pos, k_pos=k_pos)


def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call, ends: list[int], behind: Behind) -> tuple[Tensor, dict[str, Tensor]]:
    """One sequence after another; their keys and values are kept as rows, the shorter ones filled up in front."""
    outputs, rows = [q.new_zeros(1, 0, q.shape[2], v.shape[3])], []
    for i, (a, b) in enumerate(pairwise(ends)):
        row, length = [k[:, a:b], v[:, a:b]], torch.zeros(1, dtype=torch.long, device=q.device)
        if call.state is not None:
            length = call.state.length[i : i + 1]
            row = [torch.cat([call.state[name][i : i + 1], x], 1) for name, x in zip("kv", row)]
        outputs.append(behind(q[:, a:b], row[0], row[1], length))
        rows.append(row)
    longest = max((row[0].shape[1] for row in rows), default=0)
    filled = [[F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in column] for column in zip(*rows)] or [[k[:0]], [v[:0]]]
    return torch.cat(outputs, 1), {name: torch.cat(column) for name, column in zip("kv", filled)}
