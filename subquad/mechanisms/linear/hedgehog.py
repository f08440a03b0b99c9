"""Hedgehog: linear attention whose learned feature map mimics softmax.

    φ(x) = [exp(W x + b), exp(−(W x + b))]                 feature_map="exp", the paper's
    φ(x) = [softmax(W x), softmax(−W x)]                   "softmax", each half on its own, ≥ 1e-12: LoLCATs' code
    φ(x) = softmax([2(W x + b), −2(W x + b)])              "softmax2": flash-linear-attention's
    o_i  = Σ_j φ_q(q_i)·φ_k(k_j) v_j / (Σ_j φ_q(q_i)·φ_k(k_j) + 1e-12),  over j ≤ i if causal

The three are different functions: a factor of φ_q cancels in the quotient, a factor of φ_k(k_j) weighs key j. So "exp"
is not stabilised by a shift per key; it is exact for |W x + b| ≤ 31 (float32) and cut there, where sums would overflow.
W and b are per head: one map for each query head, and one for each key head, which grouped query heads share.
Rotary turns q and k before the map. Zhang, Bhatia, Kumbong, Ré: The Hedgehog & the Porcupine (arXiv 2402.04347);
"softmax" as in HazyResearch/lolcats (arXiv 2410.10254).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from subquad.checks import InputError, nearest
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.common import expand_heads
from subquad.ops.feature_maps import exp_halves, feature_dtype, project_heads, project_softmax_halves, softmax2, softmax_halves
from subquad.ops.linear import linear_attention
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-12
FEATURES = {"softmax": softmax_halves, "exp": exp_halves, "softmax2": softmax2}


def _features(s: Shape, feature_dim: int | None) -> int:
    return 2 * (feature_dim or s.head_dim)


def _flops(s: Shape, feature_dim: int | None = None, **_: object) -> float:
    features = _features(s, feature_dim)
    maps = (s.heads + s.kv) * s.head_dim * features  # W x, counted as 2 · D · F
    return s.batch * s.tokens * (maps + 4 * s.heads * features * (s.values + 1))


def _state_bytes(s: Shape, feature_dim: int | None = None, **_: object) -> float:
    return max(4, s.itemsize) * s.batch * s.kv * _features(s, feature_dim) * (s.values + 1)


def _start(init: str, heads: int, head_dim: int, feature_dim: int) -> Tensor:
    """W ``[heads, D, F]``."""
    if init == "identity":
        return torch.eye(head_dim, feature_dim).repeat(heads, 1, 1)
    return torch.empty(heads, head_dim, feature_dim).uniform_(-(head_dim**-0.5), head_dim**-0.5)


@register("hedgehog")
class Hedgehog(Attention):
    """Linear attention on learned, softmax-like features.

    Args:
        feature_map: which published map: "softmax", "exp" or "softmax2".
        feature_dim: F, the width of W x (default: head_dim); there are 2F features.
        init: W is the identity (its first F columns), or as `nn.Linear` starts ("kaiming"); b is 0.
        causal: whether a token sees only itself and what came before.
    """

    card = Card(
        title="Hedgehog", paper="arXiv 2402.04347", family="linear", causal=True, bidirectional=True, recurrent=True,
        summary="Linear attention on a learned feature map that mimics softmax: spiky and monotone.",
        flops=_flops, bytes_moved=lambda s, **_: s.tensor_bytes, state_bytes=_state_bytes, bf16_state=2e-3,
        keeps="for each of {kv_heads} key heads a sum over tokens of 2·feature_dim × ({value_dim} + 1) numbers in float32",
    )  # fmt: skip

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        feature_map: Literal["softmax", "exp", "softmax2"] = "softmax",
        feature_dim: int | None = None,
        init: Literal["identity", "kaiming"] = "identity",
        causal: bool = True,
        **sizes: object,
    ) -> None:
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        if feature_map not in FEATURES:
            raise nearest("feature_map", feature_map, FEATURES, "feature map of hedgehog")
        if init not in ("identity", "kaiming"):
            raise nearest("init", init, ("identity", "kaiming"), "way to start W")
        if feature_dim is not None and (type(feature_dim) is not int or feature_dim < 1):
            raise InputError("feature_dim", feature_dim, "a positive integer, or None for head_dim")
        self.feature_map, self.init, self.causal = feature_map, init, causal
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        for name, count in (("q", heads), ("k", self.kv_heads)):
            bias = None if feature_map == "softmax" else nn.Parameter(torch.zeros(count, self.feature_dim))
            self.register_parameter(f"W_{name}", nn.Parameter(_start(init, count, head_dim, self.feature_dim)))
            self.register_parameter(f"b_{name}", bias)

    def features(self, name: Literal["q", "k"], x: Tensor) -> Tensor:
        """φ of (rotated) queries or keys ``[B, N, heads, D]``, in their dtype (float32 for float16): ``[B, N, heads, 2F]``."""
        if self.feature_map == "softmax":
            return project_softmax_halves(x, getattr(self, f"W_{name}"))
        y = project_heads(x, getattr(self, f"W_{name}"), getattr(self, f"b_{name}"))
        return FEATURES[self.feature_map](y, feature_dtype(x))

    def feature_pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """φ_q of rotated q and φ_k of rotated k, both for each query head: ``[B, N, H, 2F]``."""
        return self.features("q", q), expand_heads(self.features("k", k), self.heads)

    def weigh(self, fq: Tensor, fk: Tensor, scores: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Weights ``[B, H, n, m]`` of some queries and keys, by features ``[B, H, ·, 2F]``, where scores are not −inf."""
        a = (fq @ fk.mT).where(scores > -torch.inf, 0.0)
        return a / (a.sum(-1, keepdim=True) + EPS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        if not self.causal:
            maps = (partial(self.features, "q"), partial(self.features, "k"))
            return moment_attention(q, k, v, feature_map=maps, reduce="sum", eps=EPS, cu_seqlens=call.cu_seqlens), None
        start = None if call.state is None else (call.state["S"], call.state["z"])
        fq, fk = self.features("q", q), self.features("k", k)
        o, (S, z) = linear_attention(
            fq, fk, v.to(fq.dtype), scale=1.0, normalize=True, eps=EPS, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens
        )  # fmt: skip
        return o.to(q.dtype), {"S": S, "z": z}


def reference(module: Hedgehog, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    y_q = torch.einsum("bnhd,hdf->bnhf", q, module.W_q)
    y_k = torch.einsum("bnhd,hdf->bnhf", k, module.W_k)
    if module.feature_map != "softmax":
        y_q, y_k = y_q + module.get_parameter("b_q"), y_k + module.get_parameter("b_k")
    if module.feature_map == "exp":
        fq, fk = (torch.cat([y.exp(), (-y).exp()], -1) for y in (y_q, y_k))
    elif module.feature_map == "softmax":
        fq, fk = (torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12) for y in (y_q, y_k))
    else:
        fq, fk = (torch.cat([2 * y, -2 * y], -1).softmax(-1) for y in (y_q, y_k))
    fk, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (fk, v))
    scores = torch.einsum("bnhf,bmhf->bhnm", fq, fk)
    scores = scores.tril() if module.causal else scores
    return torch.einsum("bhnm,bmhv->bnhv", scores / (scores.sum(-1, keepdim=True) + EPS), v)
