"""A few queries against keys without lists, biases or packing, as in decoding: the definition in the fewest operations.

One tile of all scores ``[B, U, N · G, M]``: cutting it would cost more than computing it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.rules import EVERYTHING
from subquad.ops.sparse.tiles import hidden

FEW = 8  # queries


def sparse_attention_direct(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, q_pos: Tensor | None, k_pos: Tensor | None, scale: float, stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(o, lse, max) as in `sparse_attention_chunked`; k and v have equal head counts, which divide q's."""
    n, groups, dtype = q.shape[1], k.shape[2], compute_dtype(q)
    seen = _seen(layout, q_pos, k_pos, q.device)
    if not stats:  # a row without keys gives 0 there too
        q_wide, k_wide, v_wide = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        mask = None if seen is None else seen[:, None]
        o = F.scaled_dot_product_attention(q_wide, k_wide, v_wide, attn_mask=mask, scale=scale, enable_gqa=groups != q.shape[2])
        return o.transpose(1, 2).to(q.dtype), None, None
    rows = (q.to(dtype) * scale).unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    s = rows @ k.to(dtype).permute(0, 2, 3, 1)
    if seen is not None:
        s = s.unflatten(2, (n, -1)).masked_fill(~seen[:, None, :, None, :], hidden(dtype)).flatten(2, 3)
    o = s.softmax(-1) @ v.to(dtype).transpose(1, 2)
    o, lse, top = (x.unflatten(2, (n, -1)).transpose(1, 2).flatten(2, 3) for x in (o, s.logsumexp(-1), s.amax(-1)))
    if seen is not None:
        empty = ~seen.any(-1)[:, :, None]
        o, lse, top = o.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf), top.masked_fill(empty, -torch.inf)
    return o.to(q.dtype), lse, top


def _seen(layout: Layout, q_pos: Tensor | None, k_pos: Tensor | None, device: torch.device) -> Tensor | None:
    """``[1 or B, N or 1, M]``, or None where everything is seen."""
    seen = None if k_pos is None else (k_pos if k_pos.dim() == 2 else k_pos[None])[:, None, :] >= 0
    if layout.rule == EVERYTHING:
        return seen
    qp = torch.arange(layout.m - layout.n, layout.m, device=device) if q_pos is None else q_pos
    kp = torch.arange(layout.m, device=device) if k_pos is None else k_pos
    ruled = layout.rule.allowed(qp[..., :, None], kp[..., None, :])
    ruled = ruled if ruled.dim() == 3 else ruled[None]
    return ruled if seen is None else ruled & seen
