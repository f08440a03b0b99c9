"""Liger: half softmax over a window, half a gated recurrence whose gate is pooled from the key projection. No parameters.

    o_i = ½ Σ_{i−w<j≤i} softmax_j(q̂_i·k̂_j / √D) v_j + ½ r_i          q̂, k̂ turned by rotary

    form="gla"     S_t = diag(α_t) S_{t−1} + softmax(k_t) v_tᵀ ,   r_t = S_tᵀ softmax(q_t) ,   log α_t = logsigmoid(g_t) / 16
    form="hgrn2"   S_t = diag(α_t) S_{t−1} + (1 − α_t) v_tᵀ ,      r_t = S_tᵀ softmax(q_t) ,   α_t = sigmoid(g_t)
    form="gsa"     K_t = diag(α_t) K_{t−1} + (1 − α_t) k_tᵀ ,      V_t = diag(α_t) V_{t−1} + (1 − α_t) v_tᵀ ,
                   r_t = V_tᵀ softmax(K_t q_t) ,                   log α_t = logsigmoid(g_t) / 16, one for each of M slots

The recurrence sees q and k unturned and has neither scale nor denominator; softmax(q), softmax(k) are over channels. g is
the key projection, averaged by adaptive pooling to the width of the gate: to D per head it is k itself, to M slots per head
each slot's mean of D/M channels. So nothing is added and nothing is initialised: a swapped model starts with exactly half
its softmax, as far as the window reaches, plus half the recurrence, and is tuned from there. "gsa", whose reads are averages
of values, starts nearest; the sums of "gla" are of no fixed size.
Lan et al.: Liger (arXiv 2503.01496), sec. 3; normalisers, halves and forms as in OpenSparseLLMs/Linearization. Gated slot
attention: Zhang et al. (arXiv 2409.07146). Keys come as the model makes them, with its bias and norm where it has them.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, logsigmoid

from subquad.checks import InputError, compute_dtype, nearest
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.common import CHUNK
from subquad.ops.feature_maps import feature_dtype
from subquad.ops.linear import linear_attention
from subquad.ops.linear.by_value import linear_attention_by_value
from subquad.ops.sparse.recent import recent_attention
from subquad.rotary import Rotary, rotate

FORMS = ("gla", "hgrn2", "gsa")
GATE_NORMALIZER = 16.0


def _flops(s: Shape, form: str = "gla", window: int = 64, slots: int = 64, **_: object) -> float:
    near = 2 * min(s.tokens, window) * (s.head_dim + s.values)
    far = CHUNK * (s.head_dim + s.values) + 4 * s.head_dim * s.values
    if form == "gsa":
        far = CHUNK * (s.head_dim + 2 * slots + s.values) + 4 * slots * (s.head_dim + s.values)
    return s.batch * s.tokens * s.heads * (near + far)


def _state_bytes(s: Shape, form: str = "gla", window: int = 64, slots: int = 64, **_: object) -> float:
    sums = slots * (s.head_dim + s.values) if form == "gsa" else s.head_dim * s.values
    return s.batch * s.kv * (sums * max(4, s.itemsize) + window * (s.head_dim + s.values) * s.itemsize)


@register("liger")
class Liger(Attention):
    """A softmax window and a gated recurrence in equal parts, without parameters.

    Args:
        form: of the recurrence: "gla", "hgrn2" or "gsa" (gated slot attention).
        window: w, the last tokens that softmax sees.
        slots: M, the memory slots of "gsa".
    """

    card = Card(
        title="Liger",
        paper="arXiv 2503.01496",
        family="hybrid",
        summary="Half softmax over a window, half a gated recurrence whose gate is the pooled key projection: no new parameters.",
        causal=True,
        recurrent=True,
        flops=_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=_state_bytes,
        bf16_state=2e-3,
        keeps="for each of {kv_heads} key heads a {head_dim} × {value_dim} matrix in float32 (with gsa instead {slots} slots of "
        "{head_dim} + {value_dim} numbers), and the last {window} keys and values",
    )

    def __init__(
        self, heads: int, head_dim: int, *, form: Literal["gla", "hgrn2", "gsa"] = "gla", window: int = 64, slots: int = 64, **sizes: Any
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if form not in FORMS:
            raise nearest("form", form, FORMS, "form of liger")
        for name, size in (("window", window), ("slots", slots)):
            if type(size) is not int or size < 1:
                raise InputError(name, size, "a positive integer")
        self.form, self.window, self.slots = form, window, slots

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        turned_q, turned_k = rotate(call.rotary, q, k)
        (near, _, _), kept = recent_attention(
            turned_q, turned_k, v, self.window, call.state, cu_seqlens=call.cu_seqlens, keep=call.return_state
        )  # fmt: skip
        far, sums = self.recur(q, k, v, call)
        return torch.lerp(near, far.to(near.dtype), 0.5), {**sums, **kept}

    def recur(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """r ``[B, N, H, V]``, from unturned q, k, v, and what the recurrence keeps; gates in float32 or float64."""

        def before(name: str) -> Tensor | None:
            return None if call.state is None else call.state[name]

        dtype, kept_in = compute_dtype(q), feature_dtype(q)
        if self.form == "gsa":
            q, k, v = (x.to(dtype) for x in (q, k, v))
            log_decay = logsigmoid(pool(k, self.slots)) / GATE_NORMALIZER
            write = -log_decay.expm1()
            read, K = linear_attention_by_value(
                q, k, write, log_decay, scale=1.0, initial_state=before("K"), cu_seqlens=call.cu_seqlens
            )  # fmt: skip
            o, S = linear_attention(
                read.softmax(-1), write, v, log_decay=log_decay, scale=1.0, initial_state=before("S"), return_state=True,
                cu_seqlens=call.cu_seqlens,
            )  # fmt: skip
            return o, {"K": K, "S": S}
        log_decay = logsigmoid(k.to(dtype))
        if self.form == "gla":
            log_decay, write = log_decay / GATE_NORMALIZER, k.to(kept_in).softmax(-1)  # softmax is float32 inside
        else:
            write = (-k.to(kept_in)).sigmoid()
        o, S = linear_attention(
            q.to(kept_in).softmax(-1), write, v.to(kept_in), log_decay=log_decay, scale=1.0, initial_state=before("S"), return_state=True,
            cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        return o, {"S": S}


def pool(k: Tensor, slots: int) -> Tensor:
    """The key projection pooled to a gate for each slot: ``[B, N, Hs, D]`` to ``[B, N, Hs, slots]``; heads keep to themselves."""
    batch, n, heads, width = k.shape
    pooled = adaptive_avg_pool1d(k.reshape(-1, 1, width), slots) if k.numel() else k.new_zeros(batch * n * heads, 1, slots)
    return pooled.reshape(batch, n, heads, slots)


def reference(module: Liger, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    turned_q, turned_k = rotate(rotary, q, k)
    i = torch.arange(q.shape[1], device=q.device)[:, None]
    j = i.T
    s = torch.einsum("bnhd,bmhd->bhnm", turned_q, turned_k) * module.head_dim**-0.5
    seen = (j <= i) & (j > i - module.window)
    a = s.masked_fill(~seen, -torch.inf).softmax(-1)
    gates = k
    if module.form == "gsa":  # slot m averages channels floor(m D / M) … ceil((m + 1) D / M) − 1
        D, M = module.head_dim, module.slots
        gates = torch.stack([k[..., m * D // M : -(-(m + 1) * D // M)].mean(-1) for m in range(M)], -1)
    alpha = gates.sigmoid() if module.form == "hgrn2" else gates.sigmoid() ** (1 / 16)
    keys = k.new_zeros(q.shape[0], module.heads, alpha.shape[-1], module.head_dim)
    values, out = v.new_zeros(q.shape[0], module.heads, alpha.shape[-1], module.value_dim), []
    for t in range(q.shape[1]):
        f, read = alpha[:, t, :, :, None], q[:, t].softmax(-1)
        write = k[:, t, :, :, None].softmax(-2) if module.form == "gla" else 1 - f
        values = f * values + write * v[:, t, :, None, :]
        if module.form == "gsa":
            keys = f * keys + write * k[:, t, :, None, :]
            read = torch.einsum("bhmd,bhd->bhm", keys, q[:, t]).softmax(-1)
        out.append(torch.einsum("bhm,bhmv->bhv", read, values))
    far = torch.stack(out, 1) if out else v.new_zeros(q.shape[0], 0, module.heads, module.value_dim)
    return 0.5 * torch.einsum("bhnm,bmhv->bnhv", a, v) + 0.5 * far
