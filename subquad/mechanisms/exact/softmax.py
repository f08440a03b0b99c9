"""Softmax attention, exact, through torch's own kernels: what the others replace.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j ,  over j ≤ i if causal

Rotary turns q and k. The state is every key (turned) and value so far: it grows.
Vaswani et al.: Attention Is All You Need (arXiv 1706.03762), eq. 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.contract import Attention, Call, Card, Shape, register
from subquad.rotary import Rotary, rotate


def _flops(s: Shape, causal: bool = True, **_: object) -> float:
    pairs = s.tokens * (s.tokens + 1) / 2 if causal else s.tokens**2
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.values)


def _state_bytes(s: Shape, **_: object) -> float:
    return s.batch * s.tokens * s.kv * (s.head_dim + s.values) * s.itemsize


CARD = Card(
    title="Softmax attention",
    paper="arXiv 1706.03762",
    family="exact",
    summary="Exact softmax attention through torch's kernels: quadratic, and the measure of all others.",
    causal=True,
    bidirectional=True,
    training_free=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=_state_bytes,
    bf16_factor=3.5,  # torch's kernels round the weights to 16 bit before their products
    keeps="every key and value: {tokens} tokens of {kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("softmax")
class Softmax(Attention):
    """Exact attention.

    Args:
        causal: whether a token sees only itself and what came before.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, causal: bool = True, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        self.causal = causal

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        if call.cu_seqlens is not None:
            return self._packed(q, k, v, call, call.cu_seqlens.tolist())
        if call.state is None:
            return self._attend(q, k, v), {"k": k, "v": v}
        k, v = torch.cat([call.state["k"], k], 1), torch.cat([call.state["v"], v], 1)
        return self._attend(q, k, v, call.state.length), {"k": k, "v": v}

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, call: Call, ends: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """One sequence after another; their keys and values are kept as rows, the shorter ones filled up in front."""
        outputs, rows = [], []
        for i, (a, b) in enumerate(pairwise(ends)):
            row, length = [k[:, a:b], v[:, a:b]], None
            if call.state is not None:
                length = call.state.length[i : i + 1]
                row = [torch.cat([call.state[name][i : i + 1], x], 1) for name, x in zip("kv", row)]
            outputs.append(self._attend(q[:, a:b], row[0], row[1], length))
            rows.append(row)
        longest = max((row[0].shape[1] for row in rows), default=0)
        o = torch.cat([q.new_zeros(1, 0, self.heads, self.value_dim), *outputs], 1)
        filled = [[F.pad(x, (0, 0, 0, 0, longest - x.shape[1], 0)) for x in column] for column in zip(*rows)] or [[k[:0]], [v[:0]]]
        return o, {name: torch.cat(column) for name, column in zip("kv", filled)}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor | None = None) -> Tensor:
        """q against k and v, of which each row's last `length` + N are real."""
        n, m, mask = q.shape[1], k.shape[1], None
        if length is not None:
            key = torch.arange(m, device=q.device)
            seen = key >= (m - n - length)[:, None]
            mask = seen[:, None, :] & (key <= torch.arange(m - n, m, device=q.device)[:, None])
            mask = mask[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and length is None, enable_gqa=self.kv_heads != self.heads
        )  # fmt: skip
        return o.transpose(1, 2)


def reference(module: Softmax, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    if module.causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhnm,bmhv->bnhv", s.softmax(-1), v)
