"""The moments in plain torch: tokens block by block, so that features and weights exist for one block at a time.

Gathering takes one pass: each block has its own largest logit, and moments of blocks are merged with the larger one.
Rotated moments under logits per channel cannot be rescaled, so there a first pass finds each channel's log Σ w. Applying
takes one pass over the queries. With autograd, each block is computed again in the backward pass instead of stored.

Per-token inputs travel as a dict of ``[R, n, …]`` tensors: k, v, key_logits, key_weights, mask, cos, sin, and
global_query ``[R, H, F]`` beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.checks import InputError
from subquad.ops.common import batch_to_cut, expand_heads
from subquad.ops.feature_maps import FeatureMap
from subquad.ops.moments.moments import Moments, finite, merge_scaled
from subquad.ops.moments.tiles import Packed, join_blocks, named_blocks, to_blocks
from subquad.rotary import Rotary

if TYPE_CHECKING:
    from subquad.ops.sparse import Layout

Tokens = dict[str, Tensor]

CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 25  # numbers in one temporary: near a CPU's cache, fills a GPU
LEAST = 128  # tokens per block, so that a block's moments stay small beside it


class Gather(NamedTuple):
    """What is constant over the blocks: φ, the scale of the logits, heads, D of the keys, and how rotary pairs channels."""

    phi: FeatureMap
    scale: float
    heads: int
    width: int
    dtype: torch.dtype
    interleaved: bool


class Apply(NamedTuple):
    phi: FeatureMap
    normalizer: str
    scale: float
    eps: float
    floor: float | None
    interleaved: bool


# ---- gathering -------------------------------------------------------------------------------------------------------


def gather(x: Tokens, how: Gather, layout: Layout | None, cu_seqlens: Tensor | None) -> Moments:
    """The moments of tokens ``[B, N, …]``, with a row for each batch row or packed sequence."""
    if cu_seqlens is not None:
        return gather_packed(x, how, Packed.cut(cu_seqlens))
    if layout is not None:
        return gather_blocks(x, how, layout)
    if needs_totals(x):
        tops, totals = (torch.stack(t) for t in zip(*each(block_totals, pieces(x, 1, how.width), how)))
        top = tops.amax(0)
        x = {**x, "log_total": log_total(top, (totals * (tops - finite(top)).exp()).sum(0))}
    parts = [Moments(*part) for part in each(block_moments, pieces(x, 1, how.width), how)]
    return rotated(reduce(merge_scaled, parts), x)


def gather_packed(x: Tokens, how: Gather, packed: Packed) -> Moments:
    tiles = {name: x[name].index_select(0, packed.row) if name in PER_ROW else packed.load(x[name]) for name in x}
    tiles["mask"] = packed.valid & tiles["mask"] if "mask" in tiles else packed.valid
    if needs_totals(x):
        tops, totals = (torch.cat(t) for t in zip(*each(block_totals, pieces(tiles, 0, how.width), how)))
        top = packed.largest(tops)
        totals = packed.add(totals * (tops - finite(top)[packed.row]).exp())
        tiles["log_total"] = log_total(top, totals).index_select(0, packed.row)
    return packed.join(rotated(gather_tiles(tiles, how), x))


def gather_blocks(x: Tokens, how: Gather, layout: Layout) -> Moments:
    """For each block of queries, the moments over the key blocks that the layout names for it."""
    x = {"mask": torch.ones(x["v"].shape[:2], dtype=torch.bool, device=x["v"].device), **x}
    tiles = {name: t.repeat_interleave(layout.k_blocks, 0) if name in PER_ROW else to_blocks(t, layout.block_k) for name, t in x.items()}
    parts = rotated(gather_tiles(tiles, how), x).map(lambda t: t.unflatten(0, (x["v"].shape[0], layout.k_blocks)))
    return join_blocks(parts, named_blocks(layout, how.heads).to(parts.M.device), layout.block_q)


def gather_tiles(tiles: Tokens, how: Gather) -> Moments:
    """Moments of each tile: ``[T, C, …]`` to ``[T, …]``."""
    parts = each(block_moments, pieces(tiles, 0, how.width), how)
    return Moments(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))  # type: ignore[arg-type]


def needs_totals(x: Tokens) -> bool:
    """Whether each channel's weights must sum to 1 before they are rotated: no factor per channel can enter later."""
    return "cos" in x and "key_logits" in x and x["key_logits"].dim() == 4


def rotated(moments: Moments, x: Tokens) -> Moments:
    return replace(moments, rotated="cos" in x)


def block_moments(x: Tokens, how: Gather) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """M, z, v_sum, weight and logit_max of the tokens ``[R, n, …]`` of each row."""
    v = keep(x, x["v"].to(how.dtype))
    phi = features(x, how)
    w, top = weights(x, logits(x, phi, how), how)
    per_channel = w.dim() == 4
    weighted = w if per_channel else w[..., None]
    if phi is not None:
        heads = max(phi.shape[2], w.shape[2])
        weighted = expand_heads(weighted, heads) * expand_heads(phi, heads)
    z = expand_heads(weighted.sum(1, keepdim=True), how.heads)[:, 0]
    weight = expand_heads(w.sum(1, keepdim=True), how.heads)[:, 0]
    turned = expand_heads(rotate_features(x, weighted, how.width, how.interleaved), how.heads)
    v = expand_heads(v, how.heads).transpose(1, 2)  # [R, H, n, V]
    v_sum = None if per_channel else (expand_heads(w, how.heads).transpose(1, 2)[:, :, None] @ v)[:, :, 0]
    return turned.permute(0, 2, 3, 1) @ v, z, v_sum, weight, top


def block_totals(x: Tokens, how: Gather) -> tuple[Tensor, Tensor]:
    """The largest logit of each row's tokens, and Σ w under it."""
    w, top = weights(x, logits(x, features(x, how), how), how)
    return top, expand_heads(w.sum(1, keepdim=True), how.heads)[:, 0]


def log_total(top: Tensor, total: Tensor) -> Tensor:
    """log Σ key_weights · exp(logit), −inf where there is no key."""
    return total.masked_fill(total == 0, 1).log() + top


def keep(x: Tokens, t: Tensor) -> Tensor:
    """`t` with zeros at masked tokens, whatever stands there."""
    return t if "mask" not in x else t.masked_fill(~x["mask"][..., None, None], 0)


def features(x: Tokens, how: Gather) -> Tensor | None:
    """φ(k) ``[R, n, Hk, F]``."""
    return how.phi(keep(x, x["k"].to(how.dtype))) if "k" in x else None


def logits(x: Tokens, phi: Tensor | None, how: Gather) -> Tensor | None:
    """key_logits + scale · global_query·φ(k): ``[R, n, H']`` or ``[R, n, H', F]``, or None."""
    given = x["key_logits"].to(how.dtype) if "key_logits" in x else None
    if "global_query" not in x or phi is None:
        return given
    g = x["global_query"].to(how.dtype)
    heads = max(g.shape[1], phi.shape[2])
    alike = how.scale * (expand_heads(phi, heads) * expand_heads(g[:, None], heads)).sum(-1)
    if given is None:
        return alike
    heads = max(heads, given.shape[2])
    alike = expand_heads(alike, heads)
    return expand_heads(given, heads) + (alike[..., None] if given.dim() == 4 else alike)


def weights(x: Tokens, logit: Tensor | None, how: Gather) -> tuple[Tensor, Tensor]:
    """w = key_weights · exp(logit − top) ``[R, n, H']`` or ``[R, n, H', F]``, and top ``[R, H]`` or ``[R, H, F]``.

    top is the largest logit, or log Σ w of all tokens where that is known: then w sums to 1.
    """
    factor = x["key_weights"].to(how.dtype) if "key_weights" in x else x["v"].new_ones(*x["v"].shape[:2], 1, dtype=how.dtype)
    if "mask" in x:
        factor = factor.masked_fill(~x["mask"][..., None], 0)
    seen = torch.zeros_like(factor) if logit is None else logit
    heads = max(factor.shape[2], seen.shape[2])
    factor, seen = expand_heads(factor, heads), expand_heads(seen, heads)
    factor = factor[..., None] if seen.dim() == 4 else factor
    if "mask" in x or "key_weights" in x:
        seen = seen.masked_fill(factor == 0, -torch.inf)
    top = x.get("log_total")
    if top is None:
        top = seen.detach().amax(1) if seen.shape[1] else seen.new_full((seen.shape[0], *seen.shape[2:]), -torch.inf)
        top = expand_heads(top[:, None], how.heads)[:, 0]
    if logit is None:
        return factor, top
    shift = finite(top)[:, None]
    return expand_heads(factor, shift.shape[2]) * (expand_heads(seen, shift.shape[2]) - shift).exp(), top.detach()


def rotate_features(x: Tokens, phi: Tensor, width: int, interleaved: bool) -> Tensor:
    """R(φ): features ``[R, n, H, r·D]`` turn as r vectors of width D."""
    if "cos" not in x:
        return phi
    if phi.shape[-1] % width:
        raise InputError("rotary", f"{phi.shape[-1]} features of {width} channels", "none, or features that are a multiple of the channels")
    copies = phi.unflatten(-1, (-1, width)).flatten(2, 3)
    return Rotary(x["cos"], x["sin"], interleaved).apply(copies).view(phi.shape)


# ---- applying --------------------------------------------------------------------------------------------------------


def apply(q: Tensor, cos_sin: Tokens, moments: Moments, how: Apply, reduce_by: str, cu_seqlens: Tensor | None) -> Tensor:
    """The output ``[B, N, H, V]`` in the dtype of q; the rows of `moments` are batch rows, packed sequences or query blocks."""
    x: Tokens = {"q": q, **cos_sin}
    ready = prepare(moments, reduce_by)
    batch, tokens = q.shape[:2]
    if cu_seqlens is not None:
        packed = Packed.cut(cu_seqlens)
        tiles = {name: packed.load(t) for name, t in x.items()}
        tiles.update({name: t.index_select(0, packed.row) for name, t in ready.items()})
        return packed.store(apply_tiles(tiles, how))
    if moments.block_q is not None:
        tiles = {name: to_blocks(t, moments.block_q) for name, t in x.items()}
        tiles.update({name: t.flatten(0, 1) for name, t in ready.items()})
        return apply_tiles(tiles, how).unflatten(0, (batch, -1)).flatten(1, 2)[:, :tokens]
    return torch.cat(each(block_apply, pieces({**x, **ready}, 1, q.shape[-1], "q"), how), 1)


def apply_tiles(tiles: Tokens, how: Apply) -> Tensor:
    return torch.cat(each(block_apply, pieces(tiles, 0, tiles["q"].shape[-1], "q"), how))


def prepare(moments: Moments, reduce_by: str) -> Tokens:
    """M, z and the sum of v, each divided by Σw (mean) or times exp(logit_max) (sum), and whether a row sees any key."""
    weight = moments.weight
    none = weight == 0
    factor = (1 / weight.masked_fill(none, 1)).masked_fill(none, 0) if reduce_by == "mean" else finite(moments.logit_max).exp()
    scaled = moments.scaled(factor)
    seen = (~none).any(-1) if moments.per_channel else ~none
    ready = {"M": scaled.M, "z": scaled.z, "seen": seen}
    return ready if scaled.v_sum is None else {**ready, "v_sum": scaled.v_sum}


def block_apply(x: Tokens, how: Apply) -> Tensor:
    """Queries ``[R, n, Hq, D]`` on the moments of their row: ``[R, n, H, V]``."""
    q, M = x["q"], x["M"]
    phi = how.phi(q.to(M.dtype))
    heads = max(q.shape[2], M.shape[1])
    M, z, seen = (t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1) for t in (M, x["z"], x["seen"]))
    turned = rotate_features(x, phi, q.shape[-1], how.interleaved)
    o = expand_heads(turned, heads).transpose(1, 2) @ M
    total = expand_heads(phi, heads).transpose(1, 2) @ z[..., None]
    return normalize(o, total, x.get("v_sum"), seen[..., None, None], how).transpose(1, 2).to(q.dtype)


def normalize(o: Tensor, total: Tensor, v_sum: Tensor | None, seen: Tensor, how: Apply) -> Tensor:
    """Scores s that sum to `total` and give o, turned into weights: s/total, βs − γ/N, s − mean s + 1/N, or s."""
    if how.normalizer == "divide":
        total = total + how.eps if how.floor is None else total.clamp(min=how.floor)
        return o / total.where(seen, 1)
    o, total = how.scale * o, how.scale * total
    if how.normalizer == "none":
        return o
    assert v_sum is not None
    v_mean = (v_sum if v_sum.shape[1] == o.shape[1] else v_sum.repeat_interleave(o.shape[1] // v_sum.shape[1], 1))[:, :, None]
    if how.normalizer == "magnitude":
        return (1 + 1 / (total + how.eps)) * o - total * v_mean
    return o + (1 - total) * v_mean


# ---- block by block --------------------------------------------------------------------------------------------------

PER_ROW = ("global_query", "log_total", "M", "z", "v_sum", "seen")  # all others are per token


def pieces(x: Tokens, dim: int, width: int, like: str = "v") -> list[Tokens]:
    """Cut rows (dim 0) or tokens (dim 1) so that features of `width` fit a block; all cuts of a tensor in one operation,
    as its backward is then one concatenation."""
    t = x[like]
    other = batch_to_cut(t) if dim else t.shape[1]
    other *= max(h.shape[2] for name, h in x.items() if name in ("q", "k", "v")) * max(width, t.shape[-1])
    least = LEAST if dim == 1 else 1
    size = max(least, (CPU_BLOCK if t.device.type == "cpu" else GPU_BLOCK) // max(1, other))
    if size >= t.shape[dim]:
        return [x]
    cuts = {name: h.split(size, dim) for name, h in x.items() if dim == 0 or name not in PER_ROW}
    fixed = {} if dim == 0 else {name: h for name, h in x.items() if name in PER_ROW}
    return [{**{name: parts[i] for name, parts in cuts.items()}, **fixed} for i in range(len(cuts[like]))]


def each(function: Callable[..., Any], blocks: list[Tokens], how: Any) -> list[Any]:
    """`function` of each block; several blocks under autograd are computed again in the backward pass."""
    if len(blocks) == 1 or not torch.is_grad_enabled():
        return [function(x, how) for x in blocks]
    return [checkpoint(function, x, how, use_reentrant=False, preserve_rng_state=False) for x in blocks]
