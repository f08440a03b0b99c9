"""GLA: gated linear attention, with a data-dependent decay per key channel.

    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ ,   o_t = S_tᵀ q_t / √D ,   log α_t = logsigmoid(W₂ W₁ x_t + b) / 16

Yang, Wang, Shen, Panda, Kim: Gated Linear Attention Transformers with Hardware-Efficient Training (arXiv 2312.06635), eq. 3–4.
The gate says what is forgotten and so where a token stands: the definition has no rotary, and a given one is not applied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Input, Shape, register
from subquad.ops.common import CHUNK
from subquad.ops.linear import linear_attention


def recurrence_flops(s: Shape, **_: object) -> float:
    """Of the chunked linear recurrence: scores and values inside a chunk, and products with the state."""
    return s.batch * s.tokens * s.heads * (CHUNK * (s.head_dim + s.values) + 4 * s.head_dim * s.values)


def _bytes_moved(s: Shape, **_: object) -> float:
    return s.tensor_bytes + 4 * s.batch * s.tokens * s.kv * s.head_dim  # the gate, in float32


@register("gla")
class GatedLinearAttention(Attention):
    """Linear attention with a decay per token, head and key channel.

    Args:
        gate_rank: width between the two matrices of the gate's projection.
        gate_normalizer: what the gate's logsigmoid is divided by; larger forgets less.
    """

    card = Card(
        title="Gated linear attention (GLA)",
        paper="arXiv 2312.06635",
        family="linear",
        summary="Linear attention whose state forgets, channel by channel, as the data say.",
        causal=True,
        recurrent=True,
        inputs={"log_decay": Input("log of the decay per key channel, ≤ 0", ("B", "N", "Hs", "D"), -1.0, 0.0, (-1e3, 0.0))},
        flops=recurrence_flops,
        bytes_moved=_bytes_moved,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.kv * s.head_dim * s.values,
        keeps="one {head_dim} × {value_dim} matrix in float32 for each of {kv_heads} key heads",
    )

    def __init__(self, heads: int, head_dim: int, *, gate_rank: int = 16, gate_normalizer: float = 16.0, **sizes: Any) -> None:
        super().__init__(heads, head_dim, **sizes)
        if type(gate_rank) is not int or gate_rank < 1:
            raise InputError("gate_rank", gate_rank, "a positive integer")
        if not gate_normalizer > 0:
            raise InputError("gate_normalizer", gate_normalizer, "a positive number")
        self.gate_rank, self.gate_normalizer = gate_rank, gate_normalizer
        if self.hidden_size is not None:
            down = nn.Linear(self.hidden_size, gate_rank, bias=False)
            self.gate = nn.Sequential(down, nn.Linear(gate_rank, self.kv_heads * head_dim))

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        gate = self.gate(hidden)
        log_decay = logsigmoid(gate if gate.dtype == torch.float64 else gate.float()) / self.gate_normalizer
        return {"log_decay": log_decay.unflatten(-1, (self.kv_heads, self.head_dim))}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        start = None if call.state is None else call.state["S"]
        o, S = linear_attention(
            q, k, v, log_decay=inputs["log_decay"], initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o, {"S": S}


def reference(module: GatedLinearAttention, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, **_: object) -> Tensor:
    k, v, log_decay = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v, log_decay))
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim), []
    for t in range(q.shape[1]):
        S = log_decay[:, t].to(q).exp()[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) * module.head_dim**-0.5)
    return torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
