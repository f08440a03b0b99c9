"""DeltaNet: linear attention whose state is corrected, not only added to.

    S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ ,   o_t = S_tᵀ q_t / √D ,   β_t = sigmoid(W x_t)

q and k are SiLU, then of norm 1, as in the layer. One step of size β_t down the gradient of ½‖Sᵀk_t − v_t‖².
Yang, Wang, Zhang, Shen, Kim: Parallelizing Linear Transformers with the Delta Rule (arXiv 2406.06484), eq. 1–2, sec. 3.3.
No rotary in the definition: a given one is not applied.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from subquad.checks import nearest
from subquad.contract import Attention, Call, Card, Input, Shape, register
from subquad.ops.common import CHUNK
from subquad.ops.delta import delta_rule

ACTIVATIONS = ("silu", "none")
BETA = Input("size of each correction, in (0, 1)", ("B", "N", "Hs"), 0.0, 1.0, (0.0, 1.0))


def unit(x: Tensor, activation: str) -> Tensor:
    """x / √(‖x‖² + 1e-6) over channels, after the activation, in float32 (float64): smooth at zero."""
    x = x if x.dtype == torch.float64 else x.float()
    x = silu(x) if activation == "silu" else x
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def rule_flops(s: Shape, **_: object) -> float:
    """Of the chunked delta rule: scores, solve, and products with the state."""
    solve = CHUNK * (2 * s.head_dim + s.values)
    return s.batch * s.tokens * s.heads * (solve + CHUNK * (s.head_dim + s.values) + 6 * s.head_dim * s.values)


@register("deltanet")
class DeltaNet(Attention):
    """The delta rule on unit queries and keys.

    Args:
        qk_activation: of q and k before they are normalised, "silu" or "none".
        negative_eigenvalues: β in (0, 2) instead of (0, 1), when it is projected.
    """

    card = Card(
        title="DeltaNet",
        paper="arXiv 2406.06484",
        family="linear",
        summary="Linear attention with the delta rule: a key's old value is replaced, not added to.",
        causal=True,
        recurrent=True,
        inputs={"beta": BETA},
        flops=rule_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes + s.batch * s.tokens * s.kv * s.itemsize,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.kv * s.head_dim * s.values,
        keeps="one {head_dim} × {value_dim} matrix in float32 for each of {kv_heads} key heads",
        bf16_factor=3.5,
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
        super().__init__(heads, head_dim, **sizes)
        if qk_activation not in ACTIVATIONS:
            raise nearest("qk_activation", qk_activation, ACTIVATIONS, "activation of q and k")
        self.qk_activation, self.negative_eigenvalues = qk_activation, negative_eigenvalues
        if self.hidden_size is not None:
            self.beta = nn.Linear(self.hidden_size, self.kv_heads, bias=False)

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        beta = self.beta(hidden)
        beta = (beta if beta.dtype == torch.float64 else beta.float()).sigmoid()
        return {"beta": 2 * beta if self.negative_eigenvalues else beta}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        start = None if call.state is None else call.state["S"]
        uq, uk = unit(q, self.qk_activation), unit(k, self.qk_activation)
        o, S = delta_rule(
            uq, uk, v.to(uq.dtype), inputs["beta"], log_decay=inputs.get("log_decay"),
            initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        return o.to(q.dtype), {"S": S}


def reference(module: DeltaNet, q: Tensor, k: Tensor, v: Tensor, *, beta: Tensor, log_decay: Tensor | None = None, **_: object) -> Tensor:
    q, k = (x * x.sigmoid() if module.qk_activation == "silu" else x for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    k, v, beta, log_decay = (x.to(q).repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v, beta, log_decay))
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim), []
    for t in range(q.shape[1]):
        S = log_decay[:, t].exp()[..., None, None] * S
        error = v[:, t] - torch.einsum("bhdv,bhd->bhv", S, k[:, t])
        S = S + torch.einsum("bhd,bhv->bhdv", beta[:, t, :, None] * k[:, t], error)
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S) * module.head_dim**-0.5)
    return torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
