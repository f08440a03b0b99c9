"""Gated DeltaNet: the delta rule on a state that first decays.

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ ,   o_t = S_tᵀ q_t / √D
    log α_t = −exp(A) softplus(W_a x_t + b) ,   β_t = sigmoid(W_b x_t)

q and k as in DeltaNet (`deltanet.py`). exp(A) starts in U(0, 16), softplus(b) log-uniform in [0.001, 0.1], as in Mamba-2.
Yang, Kautz, Hatamizadeh: Gated Delta Networks (arXiv 2412.06464), eq. 10. No rotary in the definition.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from subquad.contract import Input, Shape, register
from subquad.mechanisms.linear import deltanet
from subquad.mechanisms.linear.deltanet import BETA, DeltaNet


def step_bias(*shape: int) -> Tensor:
    """Biases whose softplus is log-uniform in [0.001, 0.1], Mamba-2's first steps."""
    step = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_(min=1e-4)
    return step + (-torch.expm1(-step)).log()


def _bytes_moved(s: Shape, **_: object) -> float:
    return s.tensor_bytes + s.batch * s.tokens * s.kv * (4 + s.itemsize)  # the decay in float32, and β


@register("gated-deltanet")
class GatedDeltaNet(DeltaNet):
    """The gated delta rule on unit queries and keys.

    Args:
        qk_activation: of q and k before they are normalised, "silu" or "none".
        negative_eigenvalues: β in (0, 2) instead of (0, 1), when it is projected.
    """

    card = replace(
        DeltaNet.card,
        title="Gated DeltaNet",
        paper="arXiv 2412.06464",
        summary="The delta rule on a state that decays by a data-dependent gate: replaces values, and forgets.",
        inputs={"beta": BETA, "log_decay": Input("log of the decay, ≤ 0", ("B", "N", "Hs"), -1.0, 0.0, (-1e3, 0.0))},
        bytes_moved=_bytes_moved,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        qk_activation: Literal["silu", "none"] = "silu",
        negative_eigenvalues: bool = False,
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, qk_activation=qk_activation, negative_eigenvalues=negative_eigenvalues, **sizes)
        if self.hidden_size is not None:
            self.decay = nn.Linear(self.hidden_size, self.kv_heads, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.kv_heads).uniform_(1e-4, 16).log_())
            self.dt_bias = nn.Parameter(step_bias(self.kv_heads))

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        gate = self.decay(hidden)
        gate = gate if gate.dtype == torch.float64 else gate.float()
        return {**super().project(hidden), "log_decay": -self.A_log.to(gate).exp() * softplus(gate + self.dt_bias.to(gate))}


reference = deltanet.reference
