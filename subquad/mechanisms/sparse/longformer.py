"""Longformer: softmax over a sliding window on both sides, and a few global tokens that see all and are seen by all.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  |i − j| ≤ window / 2 ,  j < global_tokens ,  and every j if i < global_tokens

Rotary turns q and k. The global tokens are the first of a sequence, as a classification token is; the projections of their own
that the paper gives them belong to the layer and are not part of this.
Beltagy, Peters, Cohan: Longformer (arXiv 2004.05150), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout
from subquad.rotary import Rotary, rotate


def _flops(s: Shape, window: int = 512, global_tokens: int = 1, **_: object) -> float:
    side = min(window // 2, s.tokens - 1)
    pairs = s.tokens * (2 * side + 1) - side * (side + 1) + 2 * global_tokens * s.tokens
    return 2 * s.batch * s.heads * min(pairs, s.tokens**2) * (s.head_dim + s.values)


CARD = Card(
    title="Longformer",
    paper="arXiv 2004.05150",
    family="sparse",
    summary="Softmax over a window on both sides and a few global tokens: linear cost for encoders of long texts.",
    bidirectional=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
)


@register("longformer")
class Longformer(Attention):
    """Attention within a window, with global tokens.

    Args:
        window: keys around a token, half on each side (even).
        global_tokens: first tokens that see all and are seen by all.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, window: int = 512, global_tokens: int = 1, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if not isinstance(window, int) or window < 0 or window % 2:
            raise InputError("window", window, "an even integer of at least 0")
        if not isinstance(global_tokens, int) or global_tokens < 0:
            raise InputError("global_tokens", global_tokens, "an integer of at least 0")
        self.window, self.global_tokens = window, global_tokens

    def layout(self, n: int) -> Layout:
        """The keys that n queries see."""
        return Layout.band(n, self.window // 2, self.window // 2, global_tokens=self.global_tokens)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        q, k = rotate(call.rotary, q, k)
        return sparse_attention(q, k, v, self.layout(q.shape[1]), cu_seqlens=call.cu_seqlens), None


def reference(module: Longformer, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    seen = ((i - j).abs() <= module.window // 2) | (j < module.global_tokens) | (i < module.global_tokens)
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
