"""LightNet's attention over all tokens: each channel of the keys is a softmax over tokens, in one scan.

    W_jc = softmax_j(k_jc)        o_i = Σ_c silu(q_ic) Σ_j W_jc v_j

The additive recurrence Δ_t = Δ_{t−1} + exp(k_t) of the paper, taken over all tokens at once: the order of the tokens, and in how
many dimensions they stand, plays no part, so that no second scan is needed. No D^−½. Rotary, if any, turns silu(q) and the
weights. Qin, Mao, Shen, et al.: You Only Scan Once (arXiv 2405.21022); the equation for all tokens is reconstructed from
the recurrence. Positions (MD-TPE, MD-LRPE), the output gate and the norm belong to the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate


@register("lightnet")
class LightNet(Attention):
    """Linear attention with a softmax over tokens for each channel; no parameters."""

    card = Card(
        title="LightNet",
        paper="arXiv 2405.21022",
        family="vision",
        summary="Linear attention for images and video: a softmax over tokens for each key channel, in one scan.",
        bidirectional=True,
        needs_grid=True,
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + s.head_dim),
        bytes_moved=lambda s, **_: s.tensor_bytes,
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        o = moment_attention(
            q, None, v, key_logits=k, feature_map=("silu", None), rotary=call.rotary, normalizer="none", cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o, None


def reference(module: LightNet, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    q, k = rotate(rotary, torch.nn.functional.silu(q), k.softmax(1))
    return torch.einsum("bnhd,bmhd,bmhv->bnhv", q, k, v)
