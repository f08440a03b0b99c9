"""Lightning attention: causal linear attention with a fixed decay per head.

    o_t = Σ_{s≤t} λ_h^(t−s) (q_t · k_s) v_s ,     S_t = λ_h S_{t−1} + k_t v_tᵀ

No softmax, denominator or 1/√D. log λ_h of head h of H in layer l of L, by name, as text and released code disagree:

    slopes="alibi"   −s_h (1 − l/(L−1) + 1e-5), s the ALiBi slopes 2^(−8(h+1)/H): the authors' code and its checkpoints
    slopes="paper"   −(8h/H) (1 − l/L): the text of TransNormerLLM

Qin et al.: Lightning Attention-2 (arXiv 2401.04658); slopes: TransNormerLLM (arXiv 2307.14995), OpenNLPLab/lightning-attention.
A rotary, if one is given, turns q and k (after the feature map). Slopes belong to query heads; grouped keys are repeated.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from subquad.checks import compute_dtype, nearest
from subquad.contract import Attention, Call, Card, register
from subquad.mechanisms.linear.gla import recurrence_flops
from subquad.ops.common import expand_heads
from subquad.ops.linear import linear_attention
from subquad.rotary import Rotary, rotate

SLOPES = ("alibi", "paper")
FEATURE_MAPS = ("none", "silu")


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes: a geometric series, filled up from the next power of two where `heads` is none (arXiv 2108.12409)."""
    whole = 2 ** math.floor(math.log2(heads))
    found = [2 ** (-8 * (h + 1) / whole) for h in range(whole)]
    return found if whole == heads else found + alibi_slopes(2 * whole)[::2][: heads - whole]


def log_decays(slopes: str, heads: int, layer: tuple[int, int]) -> list[float]:
    """log λ of each head in layer (index, count)."""
    index, count = layer
    if slopes == "alibi":
        depth = 1 - index / max(count - 1, 1) + 1e-5
        return [-s * depth for s in alibi_slopes(heads)]
    return [-(8 * h / heads) * (1 - index / count) for h in range(heads)]


class FixedDecay(Attention):
    """A mechanism whose heads decay by constants: `log_decay` ``[H]``, of which `log_decays` gives the values."""

    log_decay: Tensor

    def log_decays(self) -> list[float]:
        """log λ of each head."""
        raise TypeError(f"{type(self).__name__} must define log_decays()")

    def make_log_decay(self) -> None:
        """Called when everything that the constants depend on is set."""
        self.register_buffer("log_decay", self._decays(), persistent=False)

    def _decays(self, device: torch.device | None = None) -> Tensor:
        return torch.tensor(self.log_decays(), dtype=torch.float64, device=device)

    def _apply(self, fn: Any, recurse: bool = True) -> FixedDecay:
        super()._apply(fn, recurse)
        self.log_decay = self._decays(self.log_decay.device)  # moves with the module, but is never rounded to its dtype
        return self


@register("lightning")
class Lightning(FixedDecay):
    """Linear attention with a constant decay per head.

    Args:
        slopes: "alibi" (the authors' released code) or "paper" (the text).
        feature_map: of q and k, "none" or "silu" (TransNormerLLM's layers).
    """

    card = Card(
        title="Lightning attention",
        paper="arXiv 2401.04658",
        family="linear",
        summary="Causal linear attention with a fixed decay per head: constant speed and memory at any length.",
        causal=True,
        recurrent=True,
        flops=recurrence_flops,
        bytes_moved=lambda s, **_: s.tensor_bytes,
        state_bytes=lambda s, **_: max(4, s.itemsize) * s.batch * s.heads * s.head_dim * s.values,
        keeps="one {head_dim} × {value_dim} matrix in float32 for each of {heads} heads",
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        slopes: Literal["alibi", "paper"] = "alibi",
        feature_map: Literal["none", "silu"] = "none",
        **sizes: Any,
    ) -> None:
        super().__init__(heads, head_dim, **sizes)
        if slopes not in SLOPES:
            raise nearest("slopes", slopes, SLOPES, "set of slopes")
        if feature_map not in FEATURE_MAPS:
            raise nearest("feature_map", feature_map, FEATURE_MAPS, "feature map of lightning")
        self.slopes, self.feature_map = slopes, feature_map
        self.make_log_decay()

    def log_decays(self) -> list[float]:
        return log_decays(self.slopes, self.heads, self.layer)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        dtype = q.dtype
        if self.feature_map == "silu":  # features are not rounded to 16 bits
            q, k, v = (x.to(compute_dtype(x)) for x in (q, k, v))
            q, k = silu(q), silu(k)
        q, k = rotate(call.rotary, q, k)
        k, v = expand_heads(k, self.heads), expand_heads(v, self.heads)
        start = None if call.state is None else call.state["S"]
        o, S = linear_attention(
            q, k, v, log_decay=self.log_decay, scale=1.0, initial_state=start, return_state=True, cu_seqlens=call.cu_seqlens
        )
        return o.to(dtype), {"S": S}


def reference(module: Lightning, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    if module.feature_map == "silu":
        q, k = q * q.sigmoid(), k * k.sigmoid()
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    steps = torch.arange(q.shape[1], device=q.device)
    apart = (steps[:, None] - steps).clamp(min=0)
    weights = (module.log_decay.to(q)[:, None, None] * apart).exp().tril()
    return torch.einsum("bhnm,bmhv->bnhv", torch.einsum("bnhd,bmhd->bhnm", q, k) * weights, v)
