"""Lizard: gated linear attention on learned features plus a softmax window with meta memory, added up.

    S_i = γ_i S_{i−1} + φ_k(k_i) v_iᵀ ,   y_i = S_iᵀ φ_q(q_i) ,   γ_i = sigmoid(W_γ x_i): one number a token, for all heads
    a_i = Σ_t exp(s_it) v_t / (Σ_j exp(t_j) + Σ_t exp(s_it)) ,   s_it = q_i·k_t / √D ,   t from i − w + 1 to i
    o_i = y_i + α a_i

The meta memory is m logits t_j, the same for all queries and heads: they take part in the denominator and carry no values.
φ(x) = [softmax(W x), softmax(−W x)] or, by sec. 4, [exp(W x), exp(−W x)]; W per query head and per key head. The student
has no rotary: the gate says where a token stands. The recurrent form and the training form of the paper are as above; its
parallel form divides y_i by z_i·φ_q(q_i), z_i = γ_i z_{i−1} + φ_k(k_i), which is `normalize`.

The paper trains with log Π γ inside the exponentials, φ(q) at +log C and φ(k) at −log C, so that the gated part is one
product of matrices. Here log γ stays in log space too, chunk by chunk (`linear_attention`): pairs weigh
exp(log C_i − log C_j) ≤ 1, which neither overflows nor asks for features that are exponentials.

It starts at W = 1 (φ follows q·k), W_γ = 0 (so γ = ½, or sigmoid(gate_bias) where there is a bias), α = 1 and t_j = −4: the window
is softmax but for sinks of 0.07, and the gated part is small beside it, a few tokens at 2/F each. `normalize` would give it
the weight of a whole softmax from the start. With `window_rotary` the start is that of a sliding window.
Nguyen et al.: Lizard (arXiv 2507.09025, version 4), sec. 3–5.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from subquad.checks import InputError, nearest
from subquad.contract import Attention, Call, Card, Input, Shape, register
from subquad.ops.common import CHUNK
from subquad.ops.feature_maps import exp_halves, feature_dtype, project_heads, project_softmax_halves
from subquad.ops.linear import linear_attention
from subquad.ops.sparse.recent import recent_attention
from subquad.rotary import Rotary, rotate

FEATURES = "softmax", "exp"
SINK_START = -4.0


def _flops(s: Shape, window: int = 128, feature_dim: int | None = None, **_: object) -> float:
    features = 2 * (feature_dim or s.head_dim)
    maps = (s.heads + s.kv) * s.head_dim * features
    near = 2 * min(s.tokens, window) * (s.head_dim + s.values)
    far = CHUNK * (features + s.values) + 4 * features * s.values
    return s.batch * s.tokens * (maps + s.heads * (near + far))


def _state_bytes(s: Shape, window: int = 128, feature_dim: int | None = None, normalize: bool = False, **_: object) -> float:
    sums = 2 * (feature_dim or s.head_dim) * (s.values + normalize) * max(4, s.itemsize)
    return s.batch * s.kv * (sums + window * (s.head_dim + s.values) * s.itemsize)


@register("lizard")
class Lizard(Attention):
    """Gated linear attention plus a softmax window with sinks in its denominator.

    Args:
        window: w.
        sinks: m, the meta memory's logits.
        feature_map: φ, "softmax" or "exp".
        feature_dim: F, the width of W x (default: head_dim); there are 2F features.
        normalize: divide the gated part by its sum of weights.
        window_rotary: turn q and k by rotary in the window; the paper does not.
        gate_bias: where a learned bias of W_γ x starts; None, the paper's, has none.
    """

    card = Card(
        title="Lizard",
        paper="arXiv 2507.09025",
        family="hybrid",
        summary="Gated linear attention on learned features plus a softmax window with meta memory in its denominator, added up.",
        causal=True,
        recurrent=True,
        inputs={"log_decay": Input("log of the gate γ of each token, ≤ 0", ("B", "N"), -1.0, 0.0, (-1e3, 0.0))},
        flops=_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes + 4 * s.batch * s.tokens,
        state_bytes=_state_bytes,
        bf16_state=2e-3,
        keeps="for each of {kv_heads} key heads a gated sum over tokens of 2·feature_dim × {value_dim} numbers in float32 (with normalize "
        "one more than {value_dim}), and the last {window} keys and values",
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        window: int = 128,
        sinks: int = 4,
        feature_map: Literal["softmax", "exp"] = "softmax",
        feature_dim: int | None = None,
        normalize: bool = False,
        window_rotary: bool = False,
        gate_bias: float | None = None,
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if feature_map not in FEATURES:
            raise nearest("feature_map", feature_map, FEATURES, "feature map of lizard")
        if feature_dim is not None and (type(feature_dim) is not int or feature_dim < 1):
            raise InputError("feature_dim", feature_dim, "a positive integer, or None for head_dim")
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
            if type(value) is not int or value < least:
                raise InputError(name, value, f"an integer of at least {least}")
        if gate_bias is not None and type(gate_bias) not in (int, float):
            raise InputError("gate_bias", repr(gate_bias), "a number, or None")
        self.window, self.sinks, self.feature_map, self.normalize = window, sinks, feature_map, normalize
        self.window_rotary, self.gate_bias = window_rotary, gate_bias
        self.feature_dim = head_dim if feature_dim is None else feature_dim
        self.W_q = nn.Parameter(torch.eye(head_dim, self.feature_dim).repeat(heads, 1, 1))  # [H, D, F]
        self.W_k = nn.Parameter(torch.eye(head_dim, self.feature_dim).repeat(self.kv_heads, 1, 1))  # [Hs, D, F]
        self.meta = nn.Parameter(torch.full((sinks,), SINK_START))
        self.alpha = nn.Parameter(torch.ones(()))
        if self.hidden_size is not None:
            self.gate = nn.Linear(self.hidden_size, 1, bias=gate_bias is not None)
            nn.init.zeros_(self.gate.weight)
            if gate_bias is not None:
                nn.init.constant_(self.gate.bias, gate_bias)

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        gate = self.gate(hidden)[..., 0]
        return {"log_decay": logsigmoid(gate if gate.dtype == torch.float64 else gate.float())}

    def features(self, name: Literal["W_q", "W_k"], x: Tensor) -> Tensor:
        """φ of unturned queries or keys ``[B, N, ·, D]``, in their dtype (float32 for float16): ``[B, N, ·, 2F]``."""
        weight = self.get_parameter(name)
        if self.feature_map == "softmax":
            return project_softmax_halves(x, weight)
        return exp_halves(project_heads(x, weight), feature_dtype(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        turned_q, turned_k = rotate(call.rotary if self.window_rotary else None, q, k)
        (near, lse, _), kept = recent_attention(
            turned_q, turned_k, v, self.window, call.state, cu_seqlens=call.cu_seqlens, keep=call.return_state
        )  # fmt: skip
        share = (lse - self.meta.to(lse).logsumexp(0)).sigmoid()  # of the window beside the sinks
        log_decay = inputs["log_decay"].to(lse)[..., None].expand(-1, -1, self.kv_heads)
        start = None if call.state is None else (call.state["S"], call.state["z"]) if self.normalize else call.state["S"]
        fq = self.features("W_q", q)
        far, sums = linear_attention(
            fq, self.features("W_k", k), v.to(fq.dtype), log_decay=log_decay, scale=1.0, normalize=self.normalize,
            eps=0.0, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        tensors = dict(zip(("S", "z"), sums)) if self.normalize else {"S": sums}
        weight = (self.alpha.to(lse) * share)[..., None]
        return torch.addcmul(far.to(near.dtype), weight, near).to(q.dtype), {**tensors, **kept}


def reference(
    module: Lizard, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor, rotary: Rotary | None = None, **_: object
) -> Tensor:  # fmt: skip
    group = module.heads // module.kv_heads
    y_q, y_k = torch.einsum("bnhd,hdf->bnhf", q, module.W_q), torch.einsum("bnhd,hdf->bnhf", k, module.W_k)
    if module.feature_map == "exp":
        fq, fk = (torch.cat([y.exp(), (-y).exp()], -1) for y in (y_q, y_k))
    else:
        fq, fk = (torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12) for y in (y_q, y_k))
    turned_q, turned_k = rotate(rotary if module.window_rotary else None, q, k)
    fk, turned_k, v = (x.repeat_interleave(group, 2) for x in (fk, turned_k, v))
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    s = (torch.einsum("bnhd,bmhd->bhnm", turned_q, turned_k) * module.head_dim**-0.5).masked_fill(
        (j > i) | (j <= i - module.window), -torch.inf
    )
    sinks = module.meta.expand(*s.shape[:3], module.sinks)
    near = torch.cat([sinks, s], -1).softmax(-1)[..., module.sinks :] @ v.transpose(1, 2)
    z, out = fk.new_zeros(fk.shape[0], *fk.shape[2:]), []
    S = fk.new_zeros(*z.shape, module.value_dim)
    for t in range(q.shape[1]):
        gamma = log_decay[:, t].to(q).exp()[:, None, None]
        S = gamma[..., None] * S + fk[:, t, :, :, None] * v[:, t, :, None, :]
        z = gamma * z + fk[:, t]
        y = torch.einsum("bhf,bhfv->bhv", fq[:, t], S)
        out.append(y / torch.einsum("bhf,bhf->bh", fq[:, t], z)[..., None] if module.normalize else y)
    far = torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
    return far + module.alpha * near.transpose(1, 2)
