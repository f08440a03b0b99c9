"""LightNet: each channel of the keys is a softmax over tokens, all of them or those so far, in one scan.

    o_i = Σ_c silu(q_ic) Σ_j W_jc v_j      W_jc = exp(k_jc) / Δ_c      Δ_c = Σ_j exp(k_jc), over j ≤ i if causal

Over all tokens, their order and the number of dimensions they stand in play no part, so that no second scan is needed. Causal, with
Δ_t = Δ_{t−1} + exp(k_t) and f_t = log Δ_t, it is gated linear attention with key exp(k_t − f_t) and log decay f_{t−1} − f_t, which for the
first token decays nothing; for keys drawn alike the decay tends to 1 − 1/t, and o to a mean. No D^−½.
Rotary turns silu(q) and W, pair by pair; as a pair's channels decay differently, causal scores then depend on more than differences of
positions. The cosine form of LRPE has [x ⊙ cos, x ⊙ sin] of both instead, channel by channel, and is relative.
Qin, Mao, Shen, et al.: You Only Scan Once (arXiv 2405.21022); the equation for all tokens is reconstructed from the recurrence.
MD-TPE, the angles of MD-LRPE, the output gate and the norm belong to the layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from subquad.checks import compute_dtype, nearest
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.mechanisms.linear.gla import recurrence_flops
from subquad.ops.linear import linear_attention
from subquad.ops.moments import moment_attention
from subquad.rotary import Rotary, rotate

FORMS = ("rotary", "cosine")


def _flops(s: Shape, causal: bool = True, lrpe: str = "rotary", **_: object) -> float:
    one_pass = 2 * s.batch * s.tokens * s.heads * (2 * s.head_dim * s.values + s.head_dim)
    return (2 if lrpe == "cosine" else 1) * (recurrence_flops(s) if causal else one_pass)


def _state_bytes(s: Shape, lrpe: str = "rotary", **_: object) -> float:
    width = (2 if lrpe == "cosine" else 1) * s.values + 1
    return max(4, s.itemsize) * s.batch * s.kv * s.head_dim * width


def log_sums(logits: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """log Σ_{s ≤ t} exp(logits_s) along dimension 1, beginning anew with each packed sequence."""
    if cu_seqlens is None:
        return logits.logcumsumexp(1)
    tokens, span = logits.shape[1], 1
    place = torch.arange(tokens, device=logits.device)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, place, right=True) - 1]
    while span < tokens:  # after it, each sum spans twice as many tokens
        inside = (place[span:] - span >= start[span:])[:, None, None]
        joined = torch.logaddexp(logits[:, span:], logits[:, :-span])
        logits = torch.cat([logits[:, :span], joined.where(inside, logits[:, span:])], 1)
        span *= 2
    return logits


@register("lightnet")
class LightNet(Attention):
    """Linear attention with a softmax over tokens for each channel; no parameters.

    Args:
        causal: whether a token sees only itself and what came before.
        lrpe: what is done with rotary's angles, "rotary" to turn pairs of channels, or "cosine" to have cosine and sine of each channel,
            whose angle is that of its cos and sin. The cosine form has twice the channels.
    """

    card = Card(
        title="LightNet",
        paper="arXiv 2405.21022",
        family="vision",
        summary="Linear attention for text, images and video: a softmax over tokens for each key channel, in one scan.",
        causal=True,
        bidirectional=True,
        recurrent=True,
        flops=_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=_state_bytes,
        keeps="for each of {kv_heads} key heads one {head_dim} × {value_dim} matrix (cosine form: two) and {head_dim} log-sums in float32",
    )

    def __init__(
        self, heads: int, head_dim: int, *, causal: bool = True, lrpe: Literal["rotary", "cosine"] = "rotary", **sizes: Any
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if lrpe not in FORMS:
            raise nearest("lrpe", lrpe, FORMS, "form of LRPE")
        self.causal, self.lrpe = causal, lrpe

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.causal:
            return self._so_far(q, k, v, call)
        if self.lrpe == "rotary":
            maps = ("silu", None)
            return moment_attention(
                q, None, v, key_logits=k, feature_map=maps, rotary=call.rotary, normalizer="none", cu_seqlens=call.cu_seqlens
            ), None  # fmt: skip
        wide = compute_dtype(q)
        q, logits, v = (x.to(wide) for x in (q, k, v))
        q, ones = self._cosine(call.rotary, silu(q), torch.ones_like(logits))
        logits = torch.cat([logits, logits], -1)
        o = moment_attention(q, ones, v, key_logits=logits, normalizer="none", cu_seqlens=call.cu_seqlens)
        return o.to(k.dtype), None

    def _so_far(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        dtype, old, bounds = q.dtype, call.state, call.cu_seqlens
        q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))  # differences of log-sums vanish in 16 bits
        sums = log_sums(k, bounds)
        rows = q.shape[0] if bounds is None else bounds.shape[0] - 1
        before = k.new_full((rows, *k.shape[2:]), -torch.inf) if old is None else old["f"]
        if bounds is None:
            if old is not None:
                sums = torch.logaddexp(before[:, None], sums)
            earlier = torch.cat([before[:, None], sums], 1)
            last, earlier = earlier[:, -1], earlier[:, :-1]
        else:
            place = torch.arange(k.shape[1], device=k.device)
            sequence = torch.searchsorted(bounds, place, right=True) - 1
            first = (place == bounds[sequence])[:, None, None]
            if old is not None:
                sums = torch.logaddexp(before[sequence][None], sums)
            earlier = before[sequence][None].where(first, pad(sums, (0, 0, 0, 0, 1, 0))[:, :-1])
            ends = pad(sums, (0, 0, 0, 0, 1, 0))[0, bounds[1:]]
            last = ends.where((bounds.diff() > 0)[:, None, None], before)
        decay = (earlier - sums).clamp(max=0)
        decay = decay.where(earlier > -torch.inf, 0)  # of nothing: the state before a first token is zero
        weight, q = (k - sums).exp(), silu(q)
        if self.lrpe == "rotary":
            q, weight = rotate(call.rotary, q, weight)
        else:
            q, weight = self._cosine(call.rotary, q, weight)
            decay = torch.cat([decay, decay], -1)
        start = None if old is None else old["S"]
        o, S = linear_attention(
            q, weight, v, log_decay=decay, scale=1.0, initial_state=start, return_state=True, cu_seqlens=bounds
        )  # fmt: skip
        return o.to(dtype), {"S": S, "f": last}

    @staticmethod
    def _cosine(rotary: Rotary | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``[B, N, ·, D]`` to ``[B, N, ·, 2D]``: times cosine and times sine; angles that rotary does not have are 0."""
        if rotary is None:
            return tuple(pad(x, (0, x.shape[-1])) for x in tensors)
        rest = tensors[0].shape[-1] - rotary.cos.shape[-1]
        cos, sin = (pad(part, (0, rest), value=value).unsqueeze(-2) for part, value in ((rotary.cos, 1.0), (rotary.sin, 0.0)))
        return tuple(torch.cat([x * cos.to(x), x * sin.to(x)], -1) for x in tensors)


def reference(module: LightNet, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    q, tokens = torch.nn.functional.silu(q), k.shape[1]
    logits = k[:, None].expand(-1, tokens, -1, -1, -1)  # [B, N of queries, N of keys, H, D]
    if module.causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).triu(1)
        logits = logits.masked_fill(later[..., None, None], -torch.inf)
    weights = logits.softmax(2)
    if rotary is not None and module.lrpe == "cosine":
        cos, sin, width = rotary.cos.to(q), rotary.sin.to(q), rotary.cos.shape[-1]
        apart = cos[..., :, None, :] * cos[..., None, :, :] + sin[..., :, None, :] * sin[..., None, :, :]  # cosines of differences
        weights = torch.cat([weights[..., :width] * apart.unsqueeze(-2), weights[..., width:]], -1)
    elif rotary is not None:
        q = rotary.apply(q)
        if module.causal:  # a key is turned when it is seen, and decays afterwards
            seen = weights.diagonal(dim1=1, dim2=2).movedim(-1, 1)
            weights = weights / seen[:, None] * rotary.apply(seen)[:, None]
        else:
            weights = rotary.apply(weights[:, 0])[:, None].expand(-1, tokens, -1, -1, -1) if tokens else weights
    return torch.einsum("bnhd,bnmhd,bmhv->bnhv", q, weights, v)
