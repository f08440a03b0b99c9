"""Plain linear attention on φ(x) = elu(x) + 1: the baseline of its family.

    o_i = Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + 1e-6),  over j ≤ i if causal

Rotary turns q and k before the map, so that weights stay positive and sum to one.
Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs (arXiv 2006.16236), eq. 4–7.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from subquad.checks import compute_dtype
from subquad.contract import Attention, Call, Card, register
from subquad.ops.feature_maps import feature_map
from subquad.ops.linear import linear_attention
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-6


@register("linear-elu")
class LinearELU(Attention):
    """Normalised linear attention on elu + 1; no parameters.

    Args:
        causal: whether a token sees only itself and what came before.
    """

    card = Card(
        title="Linear attention, elu + 1", paper="arXiv 2006.16236", family="linear", causal=True, bidirectional=True, recurrent=True,
        summary="Plain linear attention on elu + 1: the baseline that the others are compared with.",
        flops=lambda s, **_: 4 * s.batch * s.tokens * s.heads * s.head_dim * (s.values + 1),
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.kv * s.head_dim * (s.values + 1),
        keeps="for each of {kv_heads} key heads a sum over tokens of {head_dim} × ({value_dim} + 1) numbers in float32",
    )  # fmt: skip
    features: ClassVar[str] = "elu1"

    def __init__(self, heads: int, head_dim: int, *, causal: bool = True, **sizes: Any) -> None:
        super().__init__(heads, head_dim, **sizes)
        self.causal = causal

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        if not self.causal:
            o = moment_attention(q, k, v, feature_map=self.features, reduce="sum", eps=EPS, cu_seqlens=call.cu_seqlens)
            return o, None
        start = None if call.state is None else (call.state["S"], call.state["z"])
        phi, wide = feature_map(self.features), compute_dtype(q)
        o, (S, z) = linear_attention(
            phi(q.to(wide)), phi(k.to(wide)), v.to(wide), scale=1.0, normalize=True, eps=EPS, initial_state=start, return_state=True,
            cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        return o.to(q.dtype), {"S": S, "z": z}


def reference(module: LinearELU, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    if module.features == "relu":
        q, k = q.relu(), k.relu()
    else:
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    scores = scores.tril() if module.causal else scores
    return torch.einsum("bhnm,bmhv->bnhv", scores / (scores.sum(-1, keepdim=True) + EPS), v)
