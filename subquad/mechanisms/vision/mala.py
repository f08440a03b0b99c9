"""MALA: magnitude-aware linear attention. φ = elu + 1, all sums over the N tokens of one image.

    z_i = 1/N Σ_j s_ij,     s_ij = φ(q_i)·φ(k_j) / √D
    a_ij = (1 + 1/(z_i + 1e-6)) s_ij / N − z_i / N             o_i = Σ_j a_ij v_j

The a_ij of a row sum to one and may be negative. As φ(q) grows by a factor, their differences grow, as softmax's do; in plain
linear attention the factor cancels. Rotary, if any, turns φ(q) and φ(k) in s_ij but not in z_i: that is the published form.
Fan, Huang, Ai, He: Rectifying Magnitude Neglect in Linear Attention (arXiv 2507.00698), without the layer's local
convolution, output gate and projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-6


@register("mala")
class MALA(Attention):
    """Magnitude-aware linear attention; no parameters."""

    card = Card(
        title="MALA",
        paper="arXiv 2507.00698",
        family="vision",
        summary="Linear attention for images that grows sharper with the length of the query, as softmax does.",
        bidirectional=True,
        needs_grid=True,
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + 2 * s.head_dim + 2 * s.values),
        bytes_moved=lambda s, **_: s.tensor_bytes,
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        o = moment_attention(
            q, k, v, feature_map="elu1", rotary=call.rotary, normalizer="magnitude", eps=EPS, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o, None


def reference(module: MALA, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    tokens, scale = q.shape[1], q.shape[-1] ** -0.5
    z = scale * torch.einsum("bnhd,bmhd->bhnm", q, k).mean(-1, keepdim=True)
    q, k = rotate(rotary, q, k)
    scores = scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
    weights = (1 + 1 / (z + EPS)) * scores / tokens - z / tokens
    return torch.einsum("bhnm,bmhv->bnhv", weights, v)
