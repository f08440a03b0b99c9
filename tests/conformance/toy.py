"""Toy: retention, with one decay for all heads.  o_t = Σ_{s≤t} e^{-(t-s)/8} (q_t · k_s) v_s / √D"""

import torch

from subquad.contract import Attention, Card, register
from subquad.ops.linear import linear_attention
from subquad.rotary import rotate


@register("toy-retention")
class ToyRetention(Attention):
    card = Card(
        title="Toy retention", paper="none", family="linear", summary="Retention with one decay for all heads.",
        causal=True, recurrent=True,
        flops=lambda s, **_: 4 * s.batch * s.tokens * s.heads * s.head_dim * s.values,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=lambda s, **_: 4 * s.batch * s.kv * s.head_dim * s.values,
        keeps="a state of {kv_heads}×{head_dim}×{value_dim}",
    )  # fmt: skip

    def mix(self, q, k, v, call):
        q, k = rotate(call.rotary, q, k)
        start = call.state["S"] if call.state else None
        decay = q.new_full((self.kv_heads,), -1 / 8, dtype=torch.float32)
        result = linear_attention(
            q, k, v, log_decay=decay, initial_state=start, return_state=call.return_state, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return (result[0], {"S": result[1]}) if call.return_state else (result, None)


def reference(module, q, k, v, rotary=None):
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    t = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    weights = (t[:, None] >= t) * torch.exp(-(t[:, None] - t) / 8)
    return torch.einsum("bthd,bshd,hts,bshv->bthv", q, k, weights.expand(module.heads, -1, -1), v) / q.shape[-1] ** 0.5
