"""`gather_moments`, `apply_moments`, `moment_attention`: bidirectional linear attention, with weights over the tokens.

w_j = key_weights_j · exp(key_logits_j + scale · global_query·φ(k_j))
M = Σ w_j R(φ(k_j)) v_jᵀ    z = Σ w_j φ(k_j)    v̄ = Σ w_j v_j    each over Σ w_j with reduce "mean"

o_i = R(φ(q_i)) M / (φ(q_i)·z + eps)                            "divide": RALA, NaLaFormer; with floor: L²ViT
o_i = (1 + 1/(t_i + eps)) s R(φ(q_i)) M − t_i v̄                 "magnitude": MALA,  t_i = s φ(q_i)·z, s the scale
o_i = s R(φ(q_i)) M + (1 − t_i) v̄                               "subtract": InLine
o_i = s R(φ(q_i)) M                                             "none": LightNet
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from subquad.checks import InputError, check_cu_seqlens, compute_dtype, nearest, shape_of
from subquad.ops.common import full_precision, kernels_serve, traced
from subquad.ops.feature_maps import FeatureMap, feature_map
from subquad.ops.moments import chunked
from subquad.ops.moments.moments import KERNEL_MAPS, TWO_SIGNS, Moments
from subquad.rotary import Rotary

if TYPE_CHECKING:
    from subquad.ops.sparse import Layout

__all__ = ["Moments", "apply_moments", "gather_moments", "mean_features", "moment_attention"]

NORMALIZERS = ("divide", "magnitude", "subtract", "none")
Map = str | FeatureMap | None


def gather_moments(
    k: Tensor | None,
    v: Tensor,
    *,
    feature_map: Map = None,
    rotary: Rotary | None = None,
    global_query: Tensor | None = None,
    key_logits: Tensor | None = None,
    key_weights: Tensor | None = None,
    scale: float | None = None,
    layout: Layout | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Moments:
    """The moments of keys and values, in one pass over the tokens and memory that does not grow with them.

    >>> moments = gather_moments(k, v, feature_map="elu1")       # M [B, H, D, V], z [B, H, D]
    >>> whole = gather_moments(k1, v1).merge(gather_moments(k2, v2))

    Args:
        k: ``[B, N, ·, D]``; None for feature 1 (per head) or, with logits per channel, features that are the weights.
        v: ``[B, N, ·, V]``. Head counts divide the largest, H, of those of k, v, global_query, key_logits and key_weights.
        feature_map: name (see `subquad.ops.feature_maps`) or function of ``[…, D]`` to ``[…, F]``, in float32 or float64.
        rotary: turns the weighted features that enter M (not those of z, nor the logits).
        global_query: ``[B, ·, F]`` (packed: ``[S, ·, F]``), features to which keys are compared.
        key_logits: ``[B, N, ·]``, or ``[B, N, ·, F]`` for weights per channel.
        key_weights: ``[B, N, ·]``, factors ≥ 0 of the weights.
        scale: of global_query·φ(k); None is ``D ** -0.5``.
        layout: for each block of queries, moments over the key blocks that the layout names for it.
        cu_seqlens: ``[S + 1]`` offsets of sequences packed into a batch of one; the moments then have S rows.
        key_mask: bool ``[B, N]``, False for padding.
    """
    heads = _check_keys(k, v, global_query, key_logits, key_weights, layout, cu_seqlens, key_mask)
    angles = _angles(rotary, v)
    if k is not None and _kernels_serve(k, v.shape[3], rotary, (feature_map,), key_logits, layout):
        from subquad.ops.moments import fused

        extras = {"query": global_query, "logits": key_logits, "factors": key_weights, "seen": key_mask, "cu": cu_seqlens}
        return fused.gather(k, v, extras, rotary, feature_map or "identity", k.shape[-1] ** -0.5 if scale is None else scale)
    per_channel = key_logits is not None and key_logits.dim() == 4
    width = k.shape[-1] if k is not None else key_logits.shape[-1] if key_logits is not None and per_channel else 1
    named = {"k": k, "v": v, "key_logits": key_logits, "key_weights": key_weights, "mask": key_mask, "global_query": global_query}
    x = {name: t for name, t in named.items() if t is not None} | angles
    how = chunked.Gather(
        _map(feature_map), width**-0.5 if scale is None else scale, heads, width, compute_dtype(v), bool(rotary and rotary.interleaved)
    )
    return _gather(v, x, how, layout, cu_seqlens)


def apply_moments(
    q: Tensor,
    moments: Moments,
    *,
    feature_map: Map = None,
    rotary: Rotary | None = None,
    normalizer: str = "divide",
    reduce: str = "mean",
    scale: float | None = None,
    eps: float = 1e-6,
    floor: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The output ``[B, N, H, V]`` of queries q ``[B, N, ·, D]`` on moments; formulas above.

    Args:
        moments: from `gather_moments`; its rows are those of q (the sequences of cu_seqlens, if given).
        feature_map: of q; it may differ from that of k.
        rotary: turns φ(q) on M, not on z.
        normalizer: "divide" (0 where no key is seen), "magnitude", "subtract" or "none".
        reduce: "mean" divides all sums by Σw; "sum" takes them as they are.
        scale: of the scores, which "divide" leaves out; None is ``D ** -0.5`` (1 for weights per channel: those are
            softmaxes over tokens by themselves).
        eps: added to the sum of scores that is divided by.
        floor: with "divide", the least sum of scores, in place of eps.
        cu_seqlens: ``[S + 1]`` offsets of q's packed sequences.
    """
    _check_queries(q, moments.M.shape[0], moments.M.shape[-3], normalizer, reduce, cu_seqlens)
    _check_moments(q, moments, normalizer, reduce)
    angles = _angles(rotary, q)
    flat = moments.block_q is None and not moments.per_channel and moments.M.dtype == torch.float32
    if flat and _kernels_serve(q, moments.M.shape[-1], rotary, (feature_map,)):
        from subquad.ops.moments import fused

        return fused.apply(q, moments, rotary, cu_seqlens, _applied(q, feature_map, normalizer, reduce, scale, eps, floor))
    if scale is None:
        scale = 1.0 if moments.per_channel else q.shape[-1] ** -0.5
    how = chunked.Apply(_map(feature_map), normalizer, scale, eps, floor, bool(rotary and rotary.interleaved))
    return _apply(q, angles, moments, how, reduce, cu_seqlens)


def moment_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    *,
    feature_map: Map | tuple[Map, Map] = None,
    rotary: Rotary | None = None,
    global_query: Tensor | Literal["mean"] | None = None,
    key_logits: Tensor | None = None,
    key_weights: Tensor | None = None,
    normalizer: str = "divide",
    reduce: str = "mean",
    scale: float | None = None,
    eps: float = 1e-6,
    floor: float | None = None,
    layout: Layout | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """`gather_moments` of k and v, then `apply_moments` to q; arguments as there.

    >>> o = moment_attention(q, k, v, feature_map="elu1")                               # linear attention
    >>> o = moment_attention(q, k, v, feature_map="elu1", global_query="mean")          # RALA
    >>> o = moment_attention(q, k, v, feature_map=("norm_power", "sign_cube"))          # NaLaFormer

    Args:
        feature_map: of q and k, or a pair (of q, of k).
        rotary: angles of k's tokens; where q has fewer tokens, these stand at the end.
        global_query: "mean" for `mean_features` of q, of the tokens that key_mask leaves where q has as many as k.
        cu_seqlens: offsets of the packed sequences of q and of k, v alike.
    """
    q_map, k_map = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if isinstance(global_query, str) and global_query != "mean":
        raise InputError("global_query", repr(global_query), "a tensor, 'mean' or None")
    if isinstance(global_query, str) and key_mask is not None:
        global_query = mean_features(q, q_map, cu_seqlens=cu_seqlens, mask=key_mask if q.shape[1] == v.shape[1] else None)
    given = None if isinstance(global_query, str) else global_query
    whole = all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k, v))  # others are told below what they should be
    if k is not None and whole and q.dtype == v.dtype and _kernels_serve(q, v.shape[3], rotary, (q_map, k_map), key_logits, layout):
        from subquad.ops.moments import fused

        heads = _check_keys(k, v, given, key_logits, key_weights, layout, cu_seqlens, key_mask)
        _angles(rotary, v)
        _check_queries(q, v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, heads, normalizer, reduce, cu_seqlens)
        how = _applied(q, q_map, normalizer, reduce, scale, eps, floor)
        how |= {"k_map": k_map or "identity", "averaged": given is not global_query, "logit_scale": how["scale"]}
        extras = {"query": given, "logits": key_logits, "factors": key_weights, "seen": key_mask, "cu": cu_seqlens}
        return fused.attend(q, k, v, extras, _at_the_end(rotary, q), rotary, how)
    if isinstance(global_query, str):
        global_query = mean_features(q, q_map, cu_seqlens=cu_seqlens)
    moments = gather_moments(
        k, v, feature_map=k_map, rotary=rotary, global_query=global_query, key_logits=key_logits, key_weights=key_weights, scale=scale,
        layout=layout, cu_seqlens=cu_seqlens, key_mask=key_mask,
    )  # fmt: skip
    return apply_moments(
        q, moments, feature_map=q_map, rotary=_at_the_end(rotary, q), normalizer=normalizer, reduce=reduce, scale=scale, eps=eps,
        floor=floor, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def mean_features(x: Tensor, feature_map: Map = None, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The mean of φ(x) over tokens: ``[B, N, H, D]`` to ``[B, H, F]`` (packed: ``[S, H, F]``), such as RALA's global query."""
    moments = gather_moments(x, x[..., :0], feature_map=feature_map, cu_seqlens=cu_seqlens, key_mask=mask)
    return moments.z / moments.weight.clamp(min=1)[..., None]


# ---- the choice of path ----------------------------------------------------------------------------------------------


def _kernels_serve(
    x: Tensor, values: int, rotary: Rotary | None, maps: tuple[Map, ...], key_logits: Tensor | None = None, layout: Layout | None = None
) -> bool:
    """Whether the Triton kernels serve q or k like x, with values of that width."""
    if not kernels_serve(x, x.shape[-1], values) or layout is not None or (key_logits is not None and key_logits.dim() == 4):
        return False
    if rotary is not None and (rotary.cos.shape[-1] > x.shape[-1] or rotary.cos.requires_grad or rotary.sin.requires_grad):
        return False  # refused, or differentiated, by the plain form
    known = all(name is None or (isinstance(name, str) and name in KERNEL_MAPS) for name in maps)
    alike = len({name in TWO_SIGNS for name in maps}) == 1
    widest = 128 if x.dtype == torch.bfloat16 else 64  # in float32 more does not fit shared memory
    fits = 0 < values <= widest and 0 < x.shape[-1] <= widest and (rotary is None or x.shape[-1] % 2 == 0)
    return known and alike and fits and (traced(x) or x.numel() > 0)


def _applied(q: Tensor, q_map: Any, normalizer: str, reduce: str, scale: float | None, eps: float, floor: float | None) -> dict[str, Any]:
    """What the kernels are told of how moments are applied."""
    floored = floor is not None and normalizer == "divide"
    return {
        "q_map": q_map or "identity", "normalizer": "floored" if floored else normalizer, "mean": reduce == "mean",
        "scale": q.shape[-1] ** -0.5 if scale is None else scale, "eps": floor if floored else eps,
    }  # fmt: skip


@full_precision
def _gather(v: Tensor, x: dict[str, Tensor], how: chunked.Gather, layout: Layout | None, cu_seqlens: Tensor | None) -> Moments:
    return chunked.gather(x, how, layout, cu_seqlens)


@full_precision
def _apply(q: Tensor, angles: dict[str, Tensor], moments: Moments, how: chunked.Apply, reduce: str, cu_seqlens: Tensor | None) -> Tensor:
    return chunked.apply(q, angles, moments, how, reduce, cu_seqlens)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _map(name: Map) -> FeatureMap:
    return feature_map(name)


def _angles(rotary: Rotary | None, x: Tensor) -> dict[str, Tensor]:
    """cos and sin ``[B, N, R]`` for tokens of x."""
    if rotary is None:
        return {}
    if rotary.tokens != x.shape[1] or (rotary.cos.dim() == 3 and rotary.cos.shape[0] not in (1, x.shape[0])):
        raise InputError("rotary", f"cos {shape_of(rotary.cos)}", f"[N, R] or [B, N, R] for {x.shape[1]} tokens and {x.shape[0]} rows")
    return {"cos": rotary.cos.expand(*x.shape[:2], -1), "sin": rotary.sin.expand(*x.shape[:2], -1)}


def _at_the_end(rotary: Rotary | None, q: Tensor) -> Rotary | None:
    """The angles of q's tokens, which stand at the end of those of rotary."""
    if rotary is None or q.shape[1] == rotary.tokens:
        return rotary
    if q.shape[1] > rotary.tokens:
        raise InputError("q", shape_of(q), f"at most as many tokens as rotary has, {rotary.tokens}")
    return rotary.narrow(rotary.tokens - q.shape[1], rotary.tokens)


def _check_keys(
    k: Tensor | None, v: Tensor, g: Tensor | None, logits: Tensor | None, weights: Tensor | None, layout: Any, cu_seqlens: Any, mask: Any
) -> int:
    """Check everything about keys; returns H."""
    for name, x in (("v", v), ("k", k)):
        if x is not None and not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
            raise InputError(name, shape_of(x) if isinstance(x, Tensor) else type(x).__name__, "a floating-point tensor [B, N, H, D]")
    check_cu_seqlens(cu_seqlens, v)
    batch, tokens = v.shape[:2]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = [v.shape[2]]
    for name, given, dims, lead in (
        ("k", k, (4,), (batch, tokens)), ("global_query", g, (3,), (rows,)), ("key_logits", logits, (3, 4), (batch, tokens)),
        ("key_weights", weights, (3,), (batch, tokens)),
    ):  # fmt: skip
        if given is None:
            continue
        if given.dim() not in dims or tuple(given.shape[: len(lead)]) != lead:
            raise InputError(name, shape_of(given), f"{' or '.join(map(str, dims))} dimensions that begin with {list(lead)}")
        if given.device != v.device:
            raise InputError(name, shape_of(given), f"the device of v, {v.device}")
        heads.append(given.shape[len(lead)])
    if k is not None and k.dtype != v.dtype:
        raise InputError("k", shape_of(k), f"the dtype of v, {v.dtype}")
    if g is not None and k is None:
        raise InputError("global_query", shape_of(g), "none without k, to which it is compared")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (batch, tokens)):
        was = shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("key_mask", was, f"a bool tensor {[batch, tokens]}, False for padding")
    if layout is not None:
        _check_layout(layout, tokens, logits, cu_seqlens)
        heads.append(1 if layout.index is None else layout.index.shape[1])
    most = max(heads)
    if any(h == 0 or most % h for h in heads):
        raise InputError("v", f"head counts {heads} of v, k, global_query, key_logits, key_weights, layout", "divisors of the largest")
    return most


def _check_layout(layout: Layout, tokens: int, logits: Tensor | None, cu_seqlens: Any) -> None:
    if cu_seqlens is not None:
        raise InputError("layout", layout, "none with cu_seqlens")
    if layout.m != tokens:
        raise InputError("layout", layout, f"a layout of {tokens} keys")
    if logits is not None and logits.dim() == 4:
        raise InputError("key_logits", shape_of(logits), "logits per head [B, N, H] with a layout")


def _check_queries(q: Tensor, rows: int, heads: int, normalizer: str, reduce: str, cu_seqlens: Any) -> None:
    if normalizer not in NORMALIZERS:
        raise nearest("normalizer", normalizer, NORMALIZERS, "normalizer")
    if reduce not in ("mean", "sum"):
        raise nearest("reduce", reduce, ("mean", "sum"), "reduction")
    if not isinstance(q, Tensor) or q.dim() != 4 or not q.is_floating_point():
        raise InputError("q", shape_of(q) if isinstance(q, Tensor) else type(q).__name__, "a floating-point tensor [B, N, H, D]")
    check_cu_seqlens(cu_seqlens, q)
    own = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows != own:
        raise InputError("moments", f"{rows} rows", f"{own} rows: one for each of q's")
    if not q.shape[2] or max(q.shape[2], heads) % min(q.shape[2], heads):
        raise InputError("q", shape_of(q), f"a head count that divides or is divided by that of the moments, {heads}")


def _check_moments(q: Tensor, moments: Moments, normalizer: str, reduce: str) -> None:
    if moments.block_q is not None and moments.M.shape[1] != -(-q.shape[1] // moments.block_q):
        raise InputError("q", shape_of(q), f"tokens in {moments.M.shape[1]} blocks of {moments.block_q}")
    if moments.per_channel and normalizer in ("magnitude", "subtract"):
        raise InputError("normalizer", repr(normalizer), "'divide' or 'none': weights per channel have no mean of v")
    if moments.per_channel and moments.rotated and reduce == "sum":
        raise InputError("reduce", "'sum'", "'mean': rotated moments under weights per channel are gathered as means")
