"""Longformer: softmax over a sliding window on both sides, and a few global tokens that see all and are seen by all.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  |i − j| ≤ window / 2 ,  j < global_tokens ,  and every j if i < global_tokens

The global tokens are the first of a sequence, as a classification token is. With `global_projections` their queries, and the keys
and values that these read, are projections of their own, as in the paper's models: in the row of a global token i stand q^g_i, k^g_j
and v^g_j, and all other rows are as above. Rotary turns q and k, and q^g and k^g.
Beltagy, Peters, Cohan: Longformer (arXiv 2004.05150), section 3.1.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Input, Shape, register
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout
from subquad.rotary import Rotary, rotate


def _flops(s: Shape, window: int = 512, global_tokens: int = 1, **_: object) -> float:
    side = min(window // 2, s.tokens - 1)
    pairs = s.tokens * (2 * side + 1) - side * (side + 1) + 2 * global_tokens * s.tokens
    return 2 * s.batch * s.heads * min(pairs, s.tokens**2) * (s.head_dim + s.values)


def _bytes_moved(s: Shape, global_projections: bool = False, **_: object) -> float:
    own = s.batch * s.tokens * s.kv * (s.head_dim + s.values) * s.itemsize  # the keys and values of global tokens' rows
    return s.tensor_bytes + global_projections * own


CARD = Card(
    title="Longformer",
    paper="arXiv 2004.05150",
    family="sparse",
    summary="Softmax over a window on both sides and a few global tokens: linear cost for encoders of long texts.",
    bidirectional=True,
    flops=_flops,
    bytes_moved=_bytes_moved,
)
OWN = {
    "global_q": Input("queries of the global tokens, of which the other rows are not read", ("B", "N", "H", "D"), -2.0, 2.0, (-30.0, 30.0)),
    "global_k": Input("keys that the global tokens read", ("B", "N", "Hs", "D"), -2.0, 2.0, (-30.0, 30.0)),
    "global_v": Input("values that the global tokens read", ("B", "N", "Hs", "V"), -2.0, 2.0, (-30.0, 30.0)),
}


@register("longformer")
class Longformer(Attention):
    """Attention within a window, with global tokens.

    With `global_projections` it takes the inputs `global_q` ``[B, N, H, D]``, `global_k` and `global_v` ``[B, N, kv_heads, D]``, or
    projects them from `hidden` by `query_global`, `key_global` and `value_global`, named as in the published checkpoints. The
    paper starts training them from copies of the projections of q, k and v.

    Args:
        window: keys around a token, half on each side (even).
        global_tokens: first tokens that see all and are seen by all.
        global_projections: whether the rows of global tokens have queries, keys and values of their own.
    """

    card = CARD

    def __init__(
        self, heads: int, head_dim: int, *, window: int = 512, global_tokens: int = 1, global_projections: bool = False, **sizes: object
    ) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if not isinstance(window, int) or window < 0 or window % 2:
            raise InputError("window", window, "an even integer of at least 0")
        if not isinstance(global_tokens, int) or global_tokens < 0:
            raise InputError("global_tokens", global_tokens, "an integer of at least 0")
        self.window, self.global_tokens, self.global_projections = window, global_tokens, global_projections
        if global_projections:
            self.card = replace(self.card, inputs=OWN)
            if self.hidden_size is not None:
                self.query_global = nn.Linear(self.hidden_size, heads * head_dim)
                self.key_global = nn.Linear(self.hidden_size, self.kv_heads * head_dim)
                self.value_global = nn.Linear(self.hidden_size, self.kv_heads * self.value_dim)

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        heads = (("query_global", self.heads), ("key_global", self.kv_heads), ("value_global", self.kv_heads))
        projected = (self.get_submodule(name)(hidden).unflatten(2, (count, -1)) for name, count in heads)
        return dict(zip(OWN, projected))

    def layout(self, n: int) -> Layout:
        """The keys that n queries see."""
        return Layout.band(n, self.window // 2, self.window // 2, global_tokens=self.global_tokens)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        q, k = rotate(call.rotary, q, k)
        if not self.global_projections:
            return sparse_attention(q, k, v, self.layout(q.shape[1]), cu_seqlens=call.cu_seqlens), None
        q_own, k_own = rotate(call.rotary, inputs["global_q"], inputs["global_k"])
        outputs = [v.new_zeros(q.shape[0], 0, self.heads, v.shape[3])]
        for a, b in pairwise([0, q.shape[1]] if call.cu_seqlens is None else call.cu_seqlens.tolist()):
            first, side = min(a + self.global_tokens, b), self.window // 2
            rows = Layout.band(b - first, side, side, global_tokens=first - a, m=b - a)  # the rows behind the global ones
            outputs.append(sparse_attention(q_own[:, a:first], k_own[:, a:b], inputs["global_v"][:, a:b], Layout.dense(first - a, b - a)))
            outputs.append(sparse_attention(q[:, first:b], k[:, a:b], v[:, a:b], rows))
        return torch.cat(outputs, 1), None


def reference(module: Longformer, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **own: Tensor) -> Tensor:
    group, g = module.heads // module.kv_heads, module.global_tokens
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    seen = ((i - j).abs() <= module.window // 2) | (j < g) | (i < g)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(rotary, q, k)
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
        return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)

    o = attend(q, k, v)
    if not module.global_projections:
        return o
    return torch.where(i[..., None] < g, attend(own["global_q"], own["global_k"], own["global_v"]), o)
