"""Kimi Delta Attention: the gated delta rule with a decay per key channel.

    S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ ,   o_t = S_tᵀ q_t / √D ,   β_t = sigmoid(W_b x_t)

    gate="softplus"   log α_t = −e^A softplus(W₂ W₁ x_t + b): A per head, b per channel
    gate="sigmoid"    log α_t = −5 sigmoid(e^A (W₂ W₁ x_t + b)): bounded, as flash-linear-attention offers

q and k as in DeltaNet (`deltanet.py`): SiLU, then of norm 1. W₁ is D wide. Both gates start at the same decays, A and the
steps as in Mamba-2. Short convolutions, the values' SiLU, output norm and gate are the layer's.
Kimi Team: Kimi Linear (arXiv 2510.26692), eq. 1 and sec. 4; 1/√D, which the layer's norm undoes, is in the released code.
No rotary in the definition: a given one is not applied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from subquad.checks import InputError, nearest
from subquad.contract import Input, Shape, register
from subquad.mechanisms.linear.deltanet import BETA, DeltaNet
from subquad.mechanisms.linear.gated_deltanet import step_bias

GATES = ("softplus", "sigmoid")


def _bytes_moved(s: Shape, **_: object) -> float:
    return s.tensor_bytes + s.batch * s.tokens * s.kv * (4 * s.head_dim + s.itemsize)  # the decays in float32, and β


@register("kda")
class KimiDeltaAttention(DeltaNet):
    """The delta rule on unit queries and keys, on a state that decays channel by channel.

    Args:
        qk_activation: of q and k before they are normalised, "silu" or "none".
        negative_eigenvalues: β in (0, 2) instead of (0, 1), when it is projected.
        gate: how the decay is projected, "softplus" (the paper) or "sigmoid" (bounded from below by `gate_floor`).
        gate_floor: the least log decay of "sigmoid".
        gate_rank: width between the two matrices of the gate's projection; None is the head dim.
    """

    card = replace(
        DeltaNet.card,
        title="Kimi Delta Attention (KDA)",
        paper="arXiv 2510.26692",
        summary="The delta rule on a state that forgets, channel by channel, as the data say.",
        inputs={
            "beta": BETA,
            "log_decay": Input("log of the decay per key channel, ≤ 0", ("B", "N", "Hs", "D"), -1.0, 0.0, (-1e3, 0.0)),
        },
        bytes_moved=_bytes_moved,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        qk_activation: Literal["silu", "none"] = "silu",
        negative_eigenvalues: bool = False,
        gate: Literal["softplus", "sigmoid"] = "softplus",
        gate_floor: float = -5.0,
        gate_rank: int | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, qk_activation=qk_activation, negative_eigenvalues=negative_eigenvalues, **sizes)
        if gate not in GATES:
            raise nearest("gate", gate, GATES, "gate of kda")
        if not gate_floor < 0:
            raise InputError("gate_floor", gate_floor, "a negative number")
        if gate_rank is not None and (type(gate_rank) is not int or gate_rank < 1):
            raise InputError("gate_rank", repr(gate_rank), "a positive integer, or None")
        self.gate, self.gate_floor, self.gate_rank = gate, gate_floor, gate_rank
        if self.hidden_size is not None:
            rank = head_dim if gate_rank is None else gate_rank
            down = nn.Linear(self.hidden_size, rank, bias=False)
            self.decay = nn.Sequential(down, nn.Linear(rank, self.kv_heads * head_dim, bias=False))
            A, bias = torch.empty(self.kv_heads, 1).uniform_(1, 16), step_bias(self.kv_heads, head_dim)
            if gate == "sigmoid":  # the bias from which the sigmoid gives the same decay
                bias = (A * softplus(bias) / -gate_floor).clamp(max=0.5).logit() / A
            self.A_log, self.dt_bias = nn.Parameter(A.log()), nn.Parameter(bias)

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        x = self.decay(hidden).unflatten(-1, (self.kv_heads, self.head_dim))
        x = x if x.dtype == torch.float64 else x.float()
        x, A = x + self.dt_bias.to(x), self.A_log.to(x).exp()
        log_decay = -A * softplus(x) if self.gate == "softplus" else self.gate_floor * (A * x).sigmoid()
        return {**super().project(hidden), "log_decay": log_decay}


def reference(module: KimiDeltaAttention, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, log_decay: Tensor, **_: object) -> Tensor:
    q, k = (x * x.sigmoid() if module.qk_activation == "silu" else x for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    k, v, beta, alpha = (x.to(q).repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v, beta, log_decay.to(q).exp()))
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim), []
    unity = torch.eye(module.head_dim, dtype=q.dtype, device=q.device)
    for t in range(q.shape[1]):
        b, kt = beta[:, t, :, None, None], k[:, t, :, :, None]
        S = (unity - b * kt * kt.mT) @ (alpha[:, t, :, :, None] * S) + b * kt * v[:, t, :, None, :]
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) * module.head_dim**-0.5)
    return torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
