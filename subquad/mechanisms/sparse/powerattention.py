"""PowerAttention: the blocks at distances of powers of two, so that what is reached doubles with every layer.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  j ≤ i  with  δ < local,  δ = 2^m,  or block(j) < sinks ,   δ = block(i) − block(j)

Rotary turns q and k. The state is every key (turned) and value: any of them may be asked for again.
Chen et al.: PowerAttention (arXiv 2503.03588).
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse.cached import cached_attention
from subquad.ops.sparse.layout import Layout
from subquad.rotary import Rotary, rotate


def _flops(s: Shape, block: int = 64, local: int = 2, sinks: int = 1, **_: object) -> float:
    blocks = -(-s.tokens // block)
    distances = {*range(1, min(local, blocks)), *(1 << i for i in range(blocks.bit_length()) if 1 << i < blocks)}
    # a distance joins blocks − distance pairs of blocks; the diagonal is half seen; sinks are a few whole columns
    pairs = blocks * (block + 1) / 2 * block + sum(blocks - d for d in distances) * block * block + sinks * block * s.tokens
    return 2 * s.batch * s.heads * min(pairs, s.tokens * (s.tokens + 1) / 2) * (s.head_dim + s.values)


CARD = Card(
    title="PowerAttention",
    paper="arXiv 2503.03588",
    family="sparse",
    summary="Softmax over near blocks and those a power of two away: d layers reach all within 2^d blocks.",
    causal=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=lambda s, **_: s.batch * s.tokens * s.kv * (s.head_dim + s.values) * s.itemsize,
    keeps="every key and value: {tokens} tokens of {kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("powerattention")
class PowerAttention(Attention):
    """Attention to blocks of keys at distances of powers of two.

    Args:
        block: tokens of a block.
        local: nearest blocks that a token sees, its own included.
        sinks: first blocks that every later token sees.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, block: int = 64, local: int = 2, sinks: int = 1, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        for name, value, least in (("block", block, 1), ("local", local, 1), ("sinks", sinks, 0)):
            if not isinstance(value, int) or value < least:
                raise InputError(name, value, f"an integer of at least {least}")
        self.block, self.local, self.sinks = block, local, sinks

    def layout(self, n: int, m: int | None = None) -> Layout:
        """The keys that n queries see of m."""
        return Layout.power(n, window=self.local, sinks=self.sinks, block=self.block, m=m)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        return cached_attention(q, k, v, call, self.layout)


def reference(module: PowerAttention, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    away = i // module.block - j // module.block
    power = torch.stack([away == 1 << x for x in range(31)]).any(0)
    seen = (j <= i) & ((away < module.local) | power | (j // module.block < module.sinks))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
