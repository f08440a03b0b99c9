"""RetNet: retention, linear attention with a fixed decay per head, each head's output normalised.

    o_n = norm( Σ_{m≤n} γ_h^(n−m) (q_n · k_m) v_m / √D ) ,     S_n = γ_h S_{n−1} + k_n v_nᵀ ,     h = 0 … H−1

q and k are turned by rotary: with one decay for all channels that is the paper's xPos. γ_h, by name:

    decays="default"   1 − 2^(−5−h): eq. 8
    decays="equal"     1 − e^x, x going evenly from log 1/32 to log 1/512: sec. 3.1, the same range at any number of heads

norm is over the values of each head, without weights: "group" takes mean and variance, as GroupNorm in the text, "rms" the
mean square, as microsoft/torchscale does now. Either forgets the size of a row of weights, so the factors of sec. 2.2 that
keep those rows in range change nothing (but by ε = 1e-6); of them only 1/√D is here. The swish gate is the layer's.
Sun et al.: Retentive Network (arXiv 2307.08621), eq. 5–8. Decays belong to query heads; grouped keys are repeated.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from subquad.checks import InputError, compute_dtype, nearest
from subquad.contract import Call, register
from subquad.mechanisms.linear.lightning import FixedDecay, Lightning
from subquad.ops.common import expand_heads
from subquad.ops.linear import linear_attention
from subquad.rotary import Rotary, rotate

DECAYS = ("default", "equal")
NORMS = ("group", "rms", "none")
EPS = 1e-6


@register("retnet")
class RetNet(FixedDecay):
    """Multi-scale retention.

    Args:
        decays: "default" (1 − 2^(−5−h)) or "equal" (the range of the paper's experiments).
        norm: of each head's output, "group" (the text), "rms" (the authors' released code) or "none".
        rotate: turn q and k by the rotary that is given.
    """

    card = replace(
        Lightning.card,
        title="Retention (RetNet)",
        paper="arXiv 2307.08621",
        summary="Linear attention with rotary and a fixed decay per head, whose outputs are normalised head by head.",
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        decays: Literal["default", "equal"] = "default",
        norm: Literal["group", "rms", "none"] = "group",
        rotate: bool = True,
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if decays not in DECAYS:
            raise nearest("decays", decays, DECAYS, "set of decays")
        if norm not in NORMS:
            raise nearest("norm", norm, NORMS, "norm of retnet")
        if norm == "group" and self.value_dim == 1:
            raise InputError("value_dim", 1, 'at least 2: norm="group" makes a single channel zero')
        self.decays, self.norm, self.rotate = decays, norm, rotate
        self.make_log_decay()

    def log_decays(self) -> list[float]:
        if self.decays == "default":
            return [math.log1p(-(2.0 ** (-5 - h))) for h in range(self.heads)]
        exponents = (math.log(32) + math.log(16) * h / max(self.heads - 1, 1) for h in range(self.heads))
        return [math.log1p(-math.exp(-x)) for x in exponents]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        dtype = q.dtype
        if self.norm != "none":  # what is normalised is not rounded to 16 bits first
            q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
        q, k = rotate(call.rotary if self.rotate else None, q, k)
        k, v = expand_heads(k, self.heads), expand_heads(v, self.heads)
        start = None if call.state is None else call.state["S"]
        o, S = linear_attention(q, k, v, log_decay=self.log_decay, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens)
        if self.norm != "none":
            o = (layer_norm if self.norm == "group" else rms_norm)(o, o.shape[-1:], eps=EPS)
        return o.to(dtype), {"S": S}


def reference(module: RetNet, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary if module.rotate else None, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    steps = torch.arange(q.shape[1], device=q.device)
    apart = (steps[:, None] - steps).clamp(min=0)
    decay = (module.log_decay.to(q)[:, None, None] * apart).exp().tril()
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    o = torch.einsum("bhnm,bmhv->bnhv", scores * decay, v)
    if module.norm == "none":
        return o
    o = o - o.mean(-1, keepdim=True) if module.norm == "group" else o
    return o / (o.square().mean(-1, keepdim=True) + EPS).sqrt()
