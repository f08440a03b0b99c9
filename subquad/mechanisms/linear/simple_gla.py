"""Simple GLA: linear attention with one data-dependent decay per token and head, the form Mamba-2 has as attention.

    S_t = α_t S_{t−1} + k_t v_tᵀ ,   o_t = S_tᵀ q_t / √D ,   log α_t = logsigmoid(W x_t + b) / 16          form="gla"
    S_t = α_t S_{t−1} + k_t (Δ_t v_t)ᵀ ,   o_t = S_tᵀ q_t ,   log α_t = −e^A Δ_t ,   Δ_t = softplus(W x_t + b)   form="mamba2"

The two are one operator, state space duality: q, k, v are C, B, x. Mamba-2 also scales what is written by the step, for
which Δ_t = −e^(−A) log α_t, with A one number per head. The skip connection, convolution and norm are the layer's.
Dao, Gu: Transformers are SSMs (arXiv 2405.21060), sec. 3–5, 7; the first form is that of flash-linear-attention, with the
gate of GLA (arXiv 2312.06635, eq. 4). No rotary in the definition: a given one is not applied.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from subquad.checks import InputError, compute_dtype, nearest
from subquad.contract import Attention, Call, Card, Input, Shape, register
from subquad.mechanisms.linear.gated_deltanet import step_bias
from subquad.mechanisms.linear.gla import recurrence_flops
from subquad.ops.linear import linear_attention

FORMS = ("gla", "mamba2")


def _bytes_moved(s: Shape, **_: object) -> float:
    return s.tensor_bytes + 4 * s.batch * s.tokens * s.kv  # the gate, in float32


@register("simple-gla")
class SimpleGLA(Attention):
    """Linear attention with a decay per token and head.

    Args:
        form: "gla" (gate by logsigmoid, scale 1/√D) or "mamba2" (gate by a step, which also scales the values; no scale).
        gate_normalizer: what the logsigmoid of "gla" is divided by; larger forgets less.
    """

    card = Card(
        title="Simple GLA (Mamba-2)",
        paper="arXiv 2405.21060",
        family="linear",
        summary="Linear attention whose state forgets, head by head, as the data say: what Mamba-2 computes.",
        causal=True,
        recurrent=True,
        inputs={"log_decay": Input("log of the decay, ≤ 0", ("B", "N", "Hs"), -1.0, 0.0, (-1e3, 0.0))},
        flops=recurrence_flops,
        bytes_moved=_bytes_moved,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.kv * s.head_dim * s.values,
        keeps="one {head_dim} × {value_dim} matrix in float32 for each of {kv_heads} key heads",
    )

    def __init__(
        self, heads: int, head_dim: int, *, form: Literal["gla", "mamba2"] = "gla", gate_normalizer: float = 16.0, **sizes: Any
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if form not in FORMS:
            raise nearest("form", form, FORMS, "form of simple-gla")
        if not gate_normalizer > 0:
            raise InputError("gate_normalizer", gate_normalizer, "a positive number")
        self.form, self.gate_normalizer = form, gate_normalizer
        if form == "mamba2":
            self.A_log = nn.Parameter(torch.empty(self.kv_heads).uniform_(1, 16).log_())
        if self.hidden_size is not None:
            self.gate = nn.Linear(self.hidden_size, self.kv_heads)
            if form == "mamba2":
                self.gate.bias = nn.Parameter(step_bias(self.kv_heads))

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        gate = self.gate(hidden)
        gate = gate if gate.dtype == torch.float64 else gate.float()
        if self.form == "mamba2":
            return {"log_decay": -self.A_log.to(gate).exp() * softplus(gate)}
        return {"log_decay": logsigmoid(gate) / self.gate_normalizer}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        dtype, log_decay, scale = q.dtype, inputs["log_decay"], None
        if self.form == "mamba2":
            q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))  # values times steps are not rounded to 16 bits
            v, scale = v * (-log_decay.to(v) * (-self.A_log.to(v)).exp())[..., None], 1.0
        start = None if call.state is None else call.state["S"]
        o, S = linear_attention(
            q, k, v, log_decay=log_decay, scale=scale, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o.to(dtype), {"S": S}


def reference(module: SimpleGLA, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, **_: object) -> Tensor:
    log_decay, scale = log_decay.to(q), module.head_dim**-0.5
    if module.form == "mamba2":
        step, scale = -log_decay / module.A_log.to(q).exp(), 1.0
        v = step[..., None] * v
    k, v, log_decay = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v, log_decay))
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim), []
    for t in range(q.shape[1]):
        S = log_decay[:, t].exp()[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) * scale)
    return torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
