"""HGRN2: a gated linear RNN whose state is a matrix. The forget gate is the decay, and what it frees is the key.

    f_t = β + (1 − β) sigmoid(k_t) ,   S_t = diag(f_t) S_{t−1} + (1 − f_t) silu(v_t)ᵀ ,   o_t = S_tᵀ sigmoid(q_t)

q, k, v are the projections W_o x, W_f x, W_i x of output gate, forget gate and input: there are no keys beside the gate's
logits. The outer product is the state expansion, D numbers for each channel of the values where HGRN had one.
β is the lower bound of layer l of L: 0 in the first layer, rising with depth, so that upper layers remember longer. Its
default l / L is where the paper's learned bound (a running sum over the layers of a softmax) begins.
Qin et al.: HGRN2 (arXiv 2404.07904), sec. 2–3; bound and activations: HGRN (arXiv 2311.04823), Doraemonzzz/hgru2-pytorch.
flash-linear-attention has instead silu for q, no activation for v, and 1/√D (which the layer's norm undoes).
No rotary in the definition: a given one is not applied.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from subquad.checks import InputError, compute_dtype, nearest
from subquad.contract import Attention, Call, Card, register
from subquad.mechanisms.linear.gla import recurrence_flops
from subquad.ops.linear import linear_attention

Q_ACTIVATIONS = ("sigmoid", "silu", "none")
V_ACTIVATIONS = ("silu", "none")


def forget_gate(logits: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """log f and 1 − f of f = bound + (1 − bound) sigmoid(logits), without cancellation at either end."""
    free = (1 - bound) * (-logits).sigmoid()
    if bound == 0:
        return logsigmoid(logits), free
    if bound == 1:
        return torch.zeros_like(logits), free
    low = logits.new_full((), bound)  # no copy from the host, which a CUDA graph does not hold
    small = torch.logaddexp(low.log(), (-low).log1p() + logsigmoid(logits))
    return torch.where(free < 0.5, (-free.clamp(max=0.5)).log1p(), small), free


@register("hgrn2")
class HGRN2(Attention):
    """Linear attention whose keys are what its forget gate frees.

    Args:
        lower_bound: β of the forget gate, in [0, 1]; None is l / L in layer l of L.
        q_activation: of the output gate, "sigmoid", "silu" or "none".
        v_activation: of the input, "silu" or "none".
    """

    card = Card(
        title="HGRN2",
        paper="arXiv 2404.07904",
        family="linear",
        summary="A gated linear RNN with a matrix for a state: keys are forget-gate logits, and what is forgotten is overwritten.",
        causal=True,
        recurrent=True,
        flops=recurrence_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.kv * s.head_dim * s.values,
        keeps="one {head_dim} × {value_dim} matrix in float32 for each of {kv_heads} key heads",
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        lower_bound: float | None = None,
        q_activation: Literal["sigmoid", "silu", "none"] = "sigmoid",
        v_activation: Literal["silu", "none"] = "silu",
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        number = type(lower_bound) in (int, float)
        if lower_bound is not None and not (number and 0 <= lower_bound <= 1):
            raise InputError("lower_bound", repr(lower_bound), "a number in [0, 1], or None")
        if q_activation not in Q_ACTIVATIONS:
            raise nearest("q_activation", q_activation, Q_ACTIVATIONS, "activation of q")
        if v_activation not in V_ACTIVATIONS:
            raise nearest("v_activation", v_activation, V_ACTIVATIONS, "activation of v")
        self.lower_bound, self.q_activation, self.v_activation = lower_bound, q_activation, v_activation

    @property
    def bound(self) -> float:
        """β, from the option or the layer's depth."""
        index, count = self.layer
        return index / count if self.lower_bound is None else self.lower_bound

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        dtype = q.dtype
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))  # gates are not rounded to 16 bits
        q = q.sigmoid() if self.q_activation == "sigmoid" else silu(q) if self.q_activation == "silu" else q
        v = silu(v) if self.v_activation == "silu" else v
        log_decay, free = forget_gate(k, self.bound)
        start = None if call.state is None else call.state["S"]
        o, S = linear_attention(
            q, free, v, log_decay=log_decay, scale=1.0, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o.to(dtype), {"S": S}


def reference(module: HGRN2, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    gates = {"sigmoid": q.sigmoid(), "silu": q * q.sigmoid(), "none": q}
    q = gates[module.q_activation]
    v = v * v.sigmoid() if module.v_activation == "silu" else v
    f = module.bound + (1 - module.bound) * k.sigmoid()
    f, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (f, v))
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim), []
    for t in range(q.shape[1]):
        S = f[:, t, :, :, None] * S + (1 - f[:, t, :, :, None]) * v[:, t, :, None, :]
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, t], S))
    return torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
