"""L²ViT's linear attention: relu features, a floor under the sum of scores, and a learned temperature per head.

    o_i = τ_h Σ_j φ(q_i)·φ(k_j) v_j / max( Σ_j φ(q_i)·φ(k_j), 100 ),   φ = relu, τ_h starts as D^−½

Sums, not means: how often the floor is reached depends on the number of tokens, and at 224² it is in most rows of a network's last
stage. Where it is, the output grows with q and k; where it is not, their lengths cancel and the weights of a row sum to τ_h.
Zheng: The Linear Attention Resurrection in Vision Transformer (arXiv 2501.16182), as in the author's code; the local
concentration module and the window attention that alternate with it belong to the network. Rotary, of which the author has
none, turns q and k before φ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, compute_dtype
from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate


@register("l2vit")
class L2ViT(Attention):
    """Relu linear attention with a floor and a temperature; one parameter a head.

    Args:
        floor: the least sum of scores that is divided by; above 0.
    """

    card = Card(
        title="L²ViT",
        paper="arXiv 2501.16182",
        family="vision",
        summary="Relu linear attention for images with a floor under its denominator and a learned temperature per head.",
        bidirectional=True,
        needs_grid=True,
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + 2 * s.head_dim),
        bytes_moved=lambda s, **_: s.tensor_bytes,
    )

    def __init__(self, heads: int, head_dim: int, *, floor: float = 100.0, **sizes: Any) -> None:
        super().__init__(heads, head_dim, **sizes)
        if not isinstance(floor, int | float) or not floor > 0:
            raise InputError("floor", floor, "a number above 0")
        self.floor = floor
        self.temperature = nn.Parameter(torch.full((heads,), head_dim**-0.5))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        q, k = rotate(call.rotary, q, k)
        wide = compute_dtype(q)  # the temperature's gradient is a sum over all outputs, which should not be rounded first
        qkv = (x.to(wide) for x in (q, k, v))
        o = moment_attention(*qkv, feature_map="relu", reduce="sum", floor=self.floor, cu_seqlens=call.cu_seqlens)
        return (o * self.temperature[:, None]).to(q.dtype), None


def reference(module: L2ViT, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q.relu(), k.relu())
    weights = module.temperature[:, None, None] * scores / scores.sum(-1, keepdim=True).clamp(min=module.floor)
    return torch.einsum("bhnm,bmhv->bnhv", weights, v)
