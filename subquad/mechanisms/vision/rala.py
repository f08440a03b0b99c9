"""RALA: rank-augmented linear attention for images. φ = elu + 1, all sums over the tokens of one image.

    ḡ   = mean_i φ(q_i)
    α_j = N · softmax_j( ḡ · φ(k_j) / √D )                  weights of the tokens: they raise the rank of M
    M   = 1/N Σ_j R(α_j φ(k_j)) v_jᵀ                        R: rotary, if any, after φ and the weights
    o_i = R(φ(q_i)) M / ( φ(q_i) · 1/N Σ_j α_j φ(k_j) + 1e-6 )

The denominator leaves rotary out, as published: with it, the weights of a row do not sum to exactly one.
Fan, Huang, He: Breaking the Low-Rank Dilemma of Linear Attention (arXiv 2411.07635), without the layer's local
convolution, output gate and projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-6


@register("rala")
class RALA(Attention):
    """Rank-augmented linear attention; no parameters. Grouped queries share keys and values, each with its own weights."""

    card = Card(
        title="RALA",
        paper="arXiv 2411.07635",
        family="vision",
        summary="Linear attention for images whose tokens are weighted by their likeness to the mean query.",
        bidirectional=True,
        needs_grid=True,
        # moments and their application (2 F·V products each), the weights, z and the denominator
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + 4 * s.head_dim),
        bytes_moved=lambda s, **_: s.tensor_bytes + s.batch * s.tokens * s.heads * s.head_dim * s.itemsize,  # q is read twice
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        o = moment_attention(
            q, k, v, feature_map="elu1", global_query="mean", rotary=call.rotary, eps=EPS, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o, None


def reference(module: RALA, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    tokens, dim = q.shape[1], q.shape[-1]
    alpha = tokens * (torch.einsum("bhd,bnhd->bnh", q.mean(1), k) / dim**0.5).softmax(1)
    k = alpha[..., None] * k
    total = torch.einsum("bnhd,bmhd->bnh", q, k) / tokens + EPS
    q, k = rotate(rotary, q, k)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / tokens
    return torch.einsum("bhnm,bmhv->bnhv", scores, v) / total[..., None]
