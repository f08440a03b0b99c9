"""LAWCAT: a short convolution over tokens on q and k, then gated linear attention on learned features, normalised.

    q̃_t = Σ_a w^q_a ∘ q_{t−a} ,   k̃_t = Σ_a w^k_a ∘ k_{t−a} ,   a = 0 … 3           per channel, no bias, none on v
    φ(x) = [softmax(W x), softmax(−W x)], each ≥ 1e-12;  2F = D features, W per head, the same for q and k
    S_t = diag(α_t) S_{t−1} + φ(k̃_t) [v_t, 1]ᵀ ,   [n_t, d_t] = S_tᵀ φ(q̃_t) ,   log α_t = logsigmoid(W₂ W₁ x_t + b) / 16
    o_t = n_t / (d_t + 1e-10)

With a window of w tokens, o_t = (g n^w_t + f n_t) / (g d^w_t + f d_t + 1e-10): n^w and d^w are sums over the window with weights
exp(s_tj − c_t), s = q·k/√D turned by rotary and c its maximum, g = sigmoid(window_factor) per head, f = 1 or, with `affine_factors`,
1 − g. The linear part sees the window's tokens too, and no rotary: convolution and gate say where a token stands. Keys and
gates are repeated to the query heads before the convolution, so w^k and the state are per query head.

It starts with taps of 1 for the token itself and 0.001 for earlier ones, W = 1 (its first F columns), b = 0 and small W₂: α is
½^(1/16) = 0.958; g is ½. Liu et al.: LAWCAT (arXiv 2509.18467); inits, clamp, window and eps as in zeyuliu1037/LAWCAT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, compute_dtype
from subquad.contract import Call, Card, Input, Shape, register
from subquad.mechanisms.linear.gla import GatedLinearAttention
from subquad.ops.common import CHUNK, expand_heads
from subquad.ops.feature_maps import feature_dtype, project_softmax_halves
from subquad.ops.linear import linear_sums
from subquad.ops.short_conv import short_conv
from subquad.ops.sparse.recent import recent_attention
from subquad.rotary import Rotary, rotate

EPS = 1e-10
TAP, GATE = 0.001, 0.006  # how earlier taps, and the spread of the gate's matrices, start


def _flops(s: Shape, window: int = 0, conv_size: int = 4, **_: object) -> float:
    prepared = 4 * conv_size * s.head_dim + 2 * s.head_dim * s.head_dim  # convolutions, and W x of F = D/2 for q and k
    far = CHUNK * (s.head_dim + s.values + 1) + 4 * s.head_dim * (s.values + 1)
    near = 2 * min(s.tokens, window) * (s.head_dim + s.values)
    return s.batch * s.tokens * s.heads * (prepared + far + near)


def _state_bytes(s: Shape, window: int = 0, conv_size: int = 4, **_: object) -> float:
    sums = s.heads * s.head_dim * (s.values + 1) * max(4, s.itemsize)
    tails = (conv_size - 1) * (s.heads + s.kv) * s.head_dim * s.itemsize
    return s.batch * (sums + tails + window * s.kv * (s.head_dim + s.values) * s.itemsize)


@register("lawcat")
class Lawcat(GatedLinearAttention):
    """Normalised gated linear attention on convolved queries and keys.

    Args:
        window: w, the last tokens that softmax sees beside the linear part; 0, the paper's main setting, has no window.
        conv_size: taps of the convolutions, the token itself included.
        affine_factors: with a window, the linear part is weighed by 1 − g instead of 1.
        gate_rank: width between the two matrices of the gate's projection.
        gate_normalizer: what the gate's logsigmoid is divided by; larger forgets less.
        clamp_min: the least log decay; None for no bound.
    """

    card = Card(
        title="LAWCAT",
        paper="arXiv 2509.18467",
        family="hybrid",
        summary="A short causal convolution on queries and keys, then normalised gated linear attention on learned features.",
        causal=True,
        recurrent=True,
        inputs={"log_decay": Input("log of the decay per feature, ≤ 0", ("B", "N", "Hs", "D"), -1.0, 0.0, (-1e3, 0.0))},
        flops=_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes + 4 * s.batch * s.tokens * s.kv * s.head_dim,
        state_bytes=_state_bytes,
        bf16_state=2e-3,
        keeps="for each of {heads} heads a gated sum over tokens of {head_dim} × ({value_dim} + 1) numbers in float32, the last "
        "{conv_size} − 1 queries and keys for the convolutions, and keys and values of the window ({window})",
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        window: int = 0,
        conv_size: int = 4,
        affine_factors: bool = False,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        clamp_min: float | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, gate_rank=gate_rank, gate_normalizer=gate_normalizer, **sizes)
        for name, value, least in (("window", window, 0), ("conv_size", conv_size, 1)):
            if type(value) is not int or value < least:
                raise InputError(name, value, f"an integer of at least {least}")
        if head_dim % 2:
            raise InputError("head_dim", head_dim, "an even number: half of it is the width of the feature map")
        if clamp_min is not None and not clamp_min < 0:
            raise InputError("clamp_min", clamp_min, "a negative number, or None")
        self.window, self.conv_size, self.affine_factors, self.clamp_min = window, conv_size, affine_factors, clamp_min
        self.W = nn.Parameter(torch.eye(head_dim, head_dim // 2).repeat(heads, 1, 1))  # [H, D, F]
        taps = torch.full((heads, head_dim, conv_size), TAP)
        taps[..., -1] = 1
        self.q_taps, self.k_taps = nn.Parameter(taps), nn.Parameter(taps.clone())
        if window:
            self.window_factor = nn.Parameter(torch.zeros(heads))
        if self.hidden_size is not None:
            for name, p in self.gate.named_parameters():
                nn.init.zeros_(p) if name.endswith("bias") else nn.init.normal_(p, std=GATE)

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        log_decay = super().project(hidden)["log_decay"]
        return {"log_decay": log_decay if self.clamp_min is None else log_decay.clamp(min=self.clamp_min)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        state, cu, dtype = call.state, call.cu_seqlens, compute_dtype(q)

        def before(name: str) -> Tensor | None:
            return None if state is None else state[name]

        fq, q_tail = short_conv(q, self.q_taps, kept=before("q_tail"), cu_seqlens=cu)
        fk, k_tail = short_conv(k, self.k_taps, kept=before("k_tail"), cu_seqlens=cu)
        fq, fk = (project_softmax_halves(x, self.W, feature_dtype(q)) for x in (fq, fk))
        log_decay = expand_heads(inputs["log_decay"].to(dtype), self.heads)
        total, mass, S = linear_sums(
            fq, fk, v.to(fq.dtype), log_decay=log_decay, initial_state=before("S"), return_state=call.return_state, cu_seqlens=cu
        )  # fmt: skip
        tensors = {"S": S, "q_tail": q_tail, "k_tail": k_tail}
        if self.window:
            turned_q, turned_k = rotate(call.rotary, q, k)
            (near, lse, top), kept = recent_attention(turned_q, turned_k, v, self.window, state, cu_seqlens=cu, keep=call.return_state)
            tensors.update(kept)
            g = self.window_factor.to(dtype).sigmoid()
            weight, far = (g * (lse - top).exp())[..., None], 1 - g[:, None] if self.affine_factors else 1
            mass = weight + far * mass + EPS
            return ((weight / mass) * near + (far / mass) * total).to(q.dtype), tensors
        return (total * (mass + EPS).reciprocal()).to(q.dtype), tensors


def reference(
    module: Lawcat, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, rotary: Rotary | None = None, **_: object
) -> Tensor:  # fmt: skip
    group, n = module.heads // module.kv_heads, q.shape[1]
    k, v, log_decay = (x.repeat_interleave(group, 2) for x in (k, v, log_decay.to(q)))
    turned_q, turned_k = rotate(rotary, q, k)
    q, k = (
        torch.stack(
            [torch.cat([torch.zeros_like(x[:, :a]), x[:, : max(0, n - a)]], 1) * w[..., -1 - a] for a in range(module.conv_size)]
        ).sum(0)
        for x, w in ((q, module.q_taps), (k, module.k_taps))
    )
    y_q, y_k = torch.einsum("bnhd,hdf->bnhf", q, module.W), torch.einsum("bnhd,hdf->bnhf", k, module.W)
    fq, fk = (torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12) for y in (y_q, y_k))
    ones = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    S, out = q.new_zeros(q.shape[0], module.heads, module.head_dim, module.value_dim + 1), []
    for t in range(n):
        S = log_decay[:, t].exp()[..., None] * S + fk[:, t, :, :, None] * ones[:, t, :, None, :]
        out.append(torch.einsum("bhf,bhfv->bhv", fq[:, t], S))
    sums = torch.stack(out, 1) if out else ones[:, :0]
    if module.window and n:
        i = torch.arange(n, device=q.device)[:, None]
        s = torch.einsum("bnhd,bmhd->bhnm", turned_q, turned_k) * module.head_dim**-0.5
        j = i.T
        s = s.masked_fill((j > i) | (j <= i - module.window), -torch.inf)
        g = module.window_factor.sigmoid()[:, None]
        near = torch.einsum("bhnm,bmhv->bnhv", (s - s.amax(-1, keepdim=True)).exp(), ones)
        sums = g * near + (1 - g if module.affine_factors else 1) * sums
    return sums[..., :-1] / (sums[..., -1:] + EPS)
