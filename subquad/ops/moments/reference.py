"""The definition of moment attention: an explicit weight for every pair, quadratic in N."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.feature_maps import FeatureMap, feature_map
from subquad.rotary import Rotary


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def turn(rotary: Rotary | None, phi: Tensor, width: int) -> Tensor:
    """Each `width` channels of the features turn by the same angles."""
    return phi if rotary is None else torch.cat([rotary.apply(part) for part in phi.split(width, -1)], -1)


def reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    maps: tuple[str | FeatureMap | None, str | FeatureMap | None] = (None, None),
    rotary: Rotary | None = None,
    q_rotary: Rotary | None = None,
    global_query: Tensor | None = None,
    key_logits: Tensor | None = None,
    key_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalizer: str = "divide",
    reduce: str = "mean",
    logit_scale: float = 1.0,
    scale: float = 1.0,
    eps: float = 1e-6,
    floor: float | None = None,
    pair_mask: Tensor | None = None,
) -> Tensor:
    """o_i = Σ_j a_ij v_j ``[B, N, H, V]`` over the keys that query i sees: those of key_mask and pair_mask.

    w_ij = softmax_j(logits), times key_weights and normalised again, or (reduce "sum") exp(logits) · key_weights
    s_ij = φ(q_i) · w_ij φ(k_j);  n_ij = R_i φ(q_i) · R_j(w_ij φ(k_j)), all that rotary R enters;  t_i = Σ_j s_ij
    a_ij = n_ij / (t_i + eps)   or   / max(t_i, floor)                                          "divide"
    a_ij = (1 + 1/(scale·t_i + eps)) scale·n_ij − scale·t_i w_ij                                "magnitude"
    a_ij = scale·n_ij + (1 − scale·t_i) w_ij                                                    "subtract"
    a_ij = scale·n_ij                                                                           "none"
    """
    heads = max(x.shape[2] for x in (q, k, v, key_logits, global_query[:, None] if global_query is not None else None) if x is not None)
    fq = heads_of(feature_map(maps[0])(q), heads)
    fk = torch.ones_like(heads_of(v[..., :1], heads)) if k is None else heads_of(feature_map(maps[1])(k), heads)
    v = heads_of(v, heads)
    seen = torch.ones(q.shape[1], v.shape[1], dtype=torch.bool, device=q.device) if pair_mask is None else pair_mask
    seen = seen.expand(q.shape[0], heads, -1, -1) if seen.dim() < 4 else seen.repeat_interleave(heads // seen.shape[1], 1)
    seen = (seen & (key_mask[:, None, None] if key_mask is not None else True))[..., None]  # [B, H, N, M, 1]

    logit: Any = torch.zeros_like(fk[..., :1])
    if key_logits is not None:
        logit = logit + heads_of(key_logits if key_logits.dim() == 4 else key_logits[..., None], heads)
    if global_query is not None:
        logit = logit + logit_scale * (heads_of(global_query[:, None], heads) * fk).sum(-1, keepdim=True)
    logit = logit.transpose(1, 2)[:, :, None].masked_fill(~seen, -torch.inf)
    w = logit.softmax(-2).nan_to_num(0) if reduce == "mean" else logit.exp()
    if key_weights is not None:
        w = w * heads_of(key_weights, heads).transpose(1, 2)[:, :, None, :, None]
        w = (w / w.sum(-2, keepdim=True)).nan_to_num(0) if reduce == "mean" else w

    keys = (w * fk.transpose(1, 2)[:, :, None]).flatten(1, 2).transpose(1, 2)  # the weighted keys as each query sees them, [B, M, H·N, F]
    width = q.shape[-1]
    turned = turn(rotary, keys, width).transpose(1, 2).unflatten(1, (heads, -1))
    keys = keys.transpose(1, 2).unflatten(1, (heads, -1))
    s = (fq.transpose(1, 2)[:, :, :, None] * keys).sum(-1)
    n = (turn(q_rotary, fq, width).transpose(1, 2)[:, :, :, None] * turned).sum(-1)
    t, w = s.sum(-1, keepdim=True), w[..., 0]
    if normalizer == "divide":
        a = n / (t + eps if floor is None else t.clamp(min=floor)).where(seen.any(-2), 1)
    elif normalizer == "magnitude":
        a = (1 + 1 / (scale * t + eps)) * scale * n - scale * t * w
    elif normalizer == "subtract":
        a = scale * n + (1 - scale * t) * w
    else:
        a = scale * n
    return torch.einsum("bhnm,bmhv->bnhv", a, v)
