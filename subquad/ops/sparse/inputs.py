"""The checks that every call with a layout shares."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import InputError, check_beside, check_cu_seqlens, shape_of
from subquad.ops.sparse.layout import Layout


def check_call(
    q: Tensor, k: Tensor, layout: Layout, heads: int, q_pos: Tensor | None, k_pos: Tensor | None, cu_seqlens: Tensor | None
) -> None:  # fmt: skip
    """The layout against q and k, the positions, and packed sequences."""
    batch, n, m = q.shape[0], q.shape[1], k.shape[1]
    if not isinstance(layout, Layout):
        raise InputError("layout", type(layout).__name__, "a Layout")
    if (layout.n, layout.m) != (n, m):
        raise InputError("layout", f"{layout.n} queries and {layout.m} keys", f"{n} queries and {m} keys, as q and k have")
    rows, lists = layout.rows, layout.heads
    if (rows not in (1, batch) and batch) or heads % lists:
        raise InputError("layout", f"lists for {rows} batch rows and {lists} heads", f"1 or {batch} rows, a divisor of {heads} heads")
    if layout.device is not None and layout.device != q.device:
        raise InputError("layout", f"lists on {layout.device}", f"the device of q, {q.device}")
    for name, x, tokens in (("q_pos", q_pos, n), ("k_pos", k_pos, m)):
        if x is None:
            continue
        check_beside(name, x, q)
        if x.is_floating_point() or x.dtype == torch.bool or tuple(x.shape) not in ((tokens,), (1, tokens), (batch, tokens)):
            raise InputError(name, shape_of(x), f"integers [{tokens}] or [{batch}, {tokens}]")
    check_cu_seqlens(cu_seqlens, q)
    if cu_seqlens is not None and m != n:
        raise InputError("k", shape_of(k), f"as many tokens as q, {n}, in packed input")
