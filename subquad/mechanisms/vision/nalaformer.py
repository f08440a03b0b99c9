"""NaLaFormer: norm-aware linear attention. Sums over the tokens of one image.

    φ_q(q) = [relu(d)^p, relu(−d)^p],   d = q/‖q‖,  p = 3 (½ + tanh ‖q‖)          φ_k(k) = [relu(k)³, relu(−k)³]
    o_i = R(φ_q(q_i)) Σ_j R(φ_k(k_j)) v_jᵀ / ( φ_q(q_i)·Σ_j φ_k(k_j) + 1e-6 N )

Channels of the same sign attend to each other, others do not. The length of a query does not cancel: it is the exponent, and
a longer query attends more sharply. Rotary turns both halves by the same angles, and is left out of the denominator, as
published. A query of length 0, for which the authors' code gives NaN, attends to nothing here.
Meng, Luo, Huo, Wang, Li, Zhang: NaLaFormer (arXiv 2506.21137), without the layer's convolution, norm, gate and projections.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-6


@register("nalaformer")
class NaLaFormer(Attention):
    """Norm-aware linear attention; no parameters."""

    card = Card(
        title="NaLaFormer",
        paper="arXiv 2506.21137",
        family="vision",
        summary="Linear attention for images whose exponent, and so its sharpness, follows the length of the query.",
        bidirectional=True,
        needs_grid=True,
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (4 * s.head_dim * s.values + 4 * s.head_dim),
        bytes_moved=lambda s, **_: s.tensor_bytes,
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        maps = ("norm_power", "sign_cube")
        return moment_attention(q, k, v, feature_map=maps, rotary=call.rotary, eps=EPS, cu_seqlens=call.cu_seqlens), None


def reference(module: NaLaFormer, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    norm = q.square().sum(-1, keepdim=True).sqrt()
    norm = norm.where(norm > 0, 1)
    power = 3 * (0.5 + norm.tanh())
    halves_q = [(sign * q / norm).relu() ** power for sign in (1, -1)]
    halves_k = [(sign * k).relu() ** 3 for sign in (1, -1)]
    tokens = q.shape[1]
    total = torch.stack([torch.einsum("bnhd,bmhd->bnh", a, b) for a, b in zip(halves_q, halves_k)]).sum(0) / tokens + EPS
    turned = zip(rotate(rotary, *halves_q), rotate(rotary, *halves_k))
    scores = torch.stack([torch.einsum("bnhd,bmhd->bhnm", a, b) for a, b in turned]).sum(0) / tokens
    return torch.einsum("bhnm,bmhv->bnhv", scores, v) / total[..., None]
