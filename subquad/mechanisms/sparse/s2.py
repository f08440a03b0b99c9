"""S2-Attention: near blocks for every head, and a shard of the far ones for each, so that the heads together see everything.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over  j ≤ i  with  block(i) − block(j) < local  or  (block(j) + shard(h)) mod stride = 0

Head h of H belongs to shard h · stride div H: neighbouring heads, as grouped queries are, read the same columns.
Rotary turns q and k. A key that has left a head's local blocks is read again only in the columns of its shard: the state is the
last local · block keys (turned) and values, and of those before them each head's shard (`ops/sparse/sharded.py`).
Lin et al.: S2-Attention: Hardware-Aware Context Sharding Among Attention Heads (arXiv 2407.17678), as in its released kernels,
where the shards shift with the head of keys.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.sharded import Shards
from subquad.rotary import Rotary, rotate

MOST = 8  # shards when the stride is not given


def _shards(heads: int, stride: int | None) -> int:
    return stride or max(x for x in range(1, min(MOST, heads) + 1) if heads % x == 0)


def _flops(s: Shape, block: int = 64, local: int = 4, stride: int | None = None, **_: object) -> float:
    near = min(s.tokens, block * local)
    triangle, whole = near * (near + 1) / 2, s.tokens * (s.tokens + 1) / 2
    local_pairs = triangle + (s.tokens - near) * near
    pairs = local_pairs + (whole - local_pairs) / _shards(s.heads, stride)
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.values)


def _state_bytes(s: Shape, block: int = 64, local: int = 4, stride: int | None = None, **_: object) -> float:
    kept = Shards(s.heads, s.kv, _shards(s.heads, stride), block, local).kept(s.tokens)
    return s.batch * kept * (s.head_dim + s.values) * s.itemsize


CARD = Card(
    title="S2-Attention",
    paper="arXiv 2407.17678",
    family="sparse",
    summary="Softmax over near blocks and every stride-th block, shifted from head to head so that their union is everything.",
    causal=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=_state_bytes,
    keeps="the keys and values of the last {local} blocks of {block} tokens, and each head's shard of all before them: "
    "{kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("s2")
class S2(Attention):
    """Attention whose far keys are shared out over the heads.

    Args:
        block: tokens of a block.
        local: nearest blocks that every head sees, a token's own included.
        stride: shards, a divisor of the heads; None takes the largest divisor up to 8.
    """

    card = CARD

    def __init__(self, heads: int, head_dim: int, *, block: int = 64, local: int = 4, stride: int | None = None, **sizes: object) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        for name, value in (("block", block), ("local", local)):
            if not isinstance(value, int) or value < 1:
                raise InputError(name, value, "an integer of at least 1")
        if stride is not None and (not isinstance(stride, int) or stride < 1 or heads % stride):
            raise InputError("stride", stride, f"a divisor of heads, {heads}, so that the shards are equal and cover every key")
        self.block, self.local, self.stride = block, local, stride

    @property
    def shards(self) -> int:
        return _shards(self.heads, self.stride)

    def layout(self, n: int, m: int | None = None) -> Layout:
        """The keys that n queries see of m, shard by shard."""
        shards = range(self.shards)
        return Layout.per_head([Layout.strided(n, self.shards, window=self.local, block=self.block, offset=shard, m=m) for shard in shards])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        shards = Shards(self.heads, self.kv_heads, self.shards, self.block, self.local)
        if call.state is None:
            o = sparse_attention(q, k, v, self.layout(q.shape[1]), cu_seqlens=call.cu_seqlens)
            if not call.return_state:
                return o, None
            rows = q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
            old, length = shards.start(rows, k, v), torch.zeros(rows, dtype=torch.long, device=q.device)
        else:
            old, length = {name: call.state[name] for name in shards.start(0, k, v)}, call.state.length
            o = self._behind(shards, q, k, v, old, length, call.cu_seqlens)
        return o, shards.store(old, k, v, length, call.cu_seqlens) if call.return_state else None

    def _behind(
        self, shards: Shards, q: Tensor, k: Tensor, v: Tensor, old: dict[str, Tensor], length: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        """New tokens behind a state: a batch at once, packed sequences one by one."""
        if cu_seqlens is None:
            return shards.attend(q, k, v, old, length)
        outputs = [q.new_zeros(1, 0, q.shape[2], v.shape[3])]
        for row, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            own = {name: x[row : row + 1] for name, x in old.items()}
            outputs.append(shards.attend(q[:, a:b], k[:, a:b], v[:, a:b], own, length[row : row + 1]))
        return torch.cat(outputs, 1)


def reference(module: S2, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    shard = (torch.arange(module.heads, device=q.device) * module.shards // module.heads)[:, None, None]
    column = (j // module.block + shard) % module.shards == 0
    seen = (j <= i) & ((i // module.block - j // module.block < module.local) | column)
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
