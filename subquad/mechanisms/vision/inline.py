"""InLine: injective linear attention. Scores are normalised by subtraction, not by division.

a_ij = s_ij − 1/N Σ_m s_im + 1/N,   s_ij = φ(q_i)·φ(k_j) / (√D N)            o_i = Σ_j a_ij v_j

The a_ij of a row sum to one and may be negative. Queries that differ, be it in length alone, get different rows as long as
the keys span; in normalised linear attention φ(q) and 2φ(q) get the same.
Han, Pu, Xia, et al.: Bridging the Divide (arXiv 2412.06590), without the local residual, which belongs to the layer. The
authors' code has φ = identity. Rotary, of which they have none, turns q and k before φ.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from subquad.checks import nearest
from subquad.contract import Attention, Call, Card, register
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

FEATURES = ("identity", "relu", "elu1", "exp")


@register("inline")
class InLine(Attention):
    """Injective linear attention; no parameters.

    Args:
        feature_map: φ, "identity" (the authors' code), "relu", "elu1" (elu + 1) or "exp".
    """

    card = Card(
        title="InLine",
        paper="arXiv 2412.06590",
        family="vision",
        summary="Linear attention for images normalised by subtraction, which tells queries of any length apart.",
        bidirectional=True,
        needs_grid=True,
        flops=lambda s, **_: 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + 2 * s.head_dim + 2 * s.values),
        bytes_moved=lambda s, **_: s.tensor_bytes,
    )

    def __init__(
        self, heads: int, head_dim: int, *, feature_map: Literal["identity", "relu", "elu1", "exp"] = "identity", **sizes: Any
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if feature_map not in FEATURES:
            raise nearest("feature_map", feature_map, FEATURES, "feature map of inline")
        self.feature_map = feature_map

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, None]:
        q, k = rotate(call.rotary, q, k)
        return moment_attention(q, k, v, feature_map=self.feature_map, normalizer="subtract", cu_seqlens=call.cu_seqlens), None


def reference(module: InLine, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    if module.feature_map == "elu1":
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    elif module.feature_map != "identity":
        q, k = getattr(q, module.feature_map)(), getattr(k, module.feature_map)()
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    tokens = k.shape[1]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / (q.shape[-1] ** 0.5 * tokens)
    return torch.einsum("bhnm,bmhv->bnhv", scores - scores.mean(-1, keepdim=True) + 1 / tokens, v)
