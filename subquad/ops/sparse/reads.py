"""Reads of the attention map that never form it: what each key receives, and maxima and means of blocks of scores.

    s_ij = scale · q_i·k_j   for j ∈ layout(i)
    column mass   m_j  = Σ_i exp(s_ij − lse_i)
    block max     x_IJ = max s_ij ,   block mean   y_IJ = mean s_ij    over the pairs i ∈ I, j ∈ J that the layout shows

All go tile by tile, as attention does (`tiles`), and backwards too: with p = exp(s − lse) recomputed and ġ_j the gradient of m_j,
ds = p ∘ (ġ − Σ_j p ġ), without the last sum and with dlse_i = −Σ_j p ġ where lse was given; a maximum hands its gradient to
the pair that attains it, found again by its index; a mean spreads its own over the pairs it was taken over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.checks import check_qkv, check_tensor, compute_dtype
from subquad.ops.common import full_precision
from subquad.ops.sparse.block_reads import Max, Mean, read_max, read_mean
from subquad.ops.sparse.chunked import repeat_heads, restart, scores
from subquad.ops.sparse.fields import sides_of
from subquad.ops.sparse.inputs import check_call
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.parts import heads_of
from subquad.ops.sparse.tiles import Problem, blank, closed_rows, hidden


@full_precision
def column_mass(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    lse: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """How much softmax weight each key receives from all the queries: the column sums of the attention map.

    >>> mass = column_mass(q[:, -64:], k, Layout.causal(64, 4096))                 # [B, H, 4096]: what the last 64 queries look at

    Args:
        q: ``[B, N, H, D]``, the rows whose weights are summed.
        k: ``[B, M, Hk, D]``, M ≥ N; the head counts divide each other.
        layout: N queries by M keys, as in `sparse_attention`.
        lse: ``[B, N, H]``, the log-sum-exp of each row, over these keys or over more; without it that of the row's own scores.
        q_pos, k_pos, scale, cu_seqlens: as in `sparse_attention`.

    Returns:
        ``[B, H, M]``, float32 (float64 for float64), differentiable in q, k and lse. Sums to the number of rows that see a key,
        where lse is not given.
    """
    heads = _checked(q, k, layout, q_pos, k_pos, cu_seqlens)
    check_tensor("lse", lse, (q.shape[0], q.shape[1], heads), q)
    if layout.parts:
        return _by_parts(column_mass, q, k, layout, heads, q_pos, k_pos, lse=lse, scale=scale, cu_seqlens=cu_seqlens)
    problem, qu, ku = _problem(q, k, layout, heads, q_pos, k_pos, scale, cu_seqlens)
    if lse is not None:
        lse = lse.to(qu.dtype).transpose(1, 2).flatten(0, 1)[..., None]
    return _run(_Mass, _mass, qu, ku, lse, problem)[0].unflatten(0, (-1, heads))[..., : layout.m, 0]


@full_precision
def block_max(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    block: int | tuple[int, int] | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The greatest score of each block of queries and keys, of the pairs that the layout shows.

    >>> top = block_max(q, k, Layout.causal(4096), block=64)                                        # [B, H, 64, 64]

    Args:
        q, k, layout, q_pos, k_pos, scale, cu_seqlens: as in `column_mass`.
        block: tokens of a block, or (queries, keys) of it; by default the layout's own.

    Returns:
        ``[B, H, ⌈N / queries⌉, ⌈M / keys⌉]``, float32 (float64 for float64); −inf where no pair is seen. The gradient of a block
        goes to the pair that attains its maximum, to one of them where several do.
    """
    return _blocks(block_max, Max, read_max, q, k, layout, block, q_pos, k_pos, scale, cu_seqlens)


@full_precision
def block_mean(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    block: int | tuple[int, int] | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The mean score of each block of queries and keys, over the pairs that the layout shows.

    Where a block is seen whole it is the product of the mean query and the mean key, and is computed so.

    >>> mean = block_mean(q, k, Layout.causal(4096), block=(128, 64))                               # [B, H, 32, 64]

    Args:
        q, k, layout, block, q_pos, k_pos, scale, cu_seqlens: as in `block_max`.

    Returns:
        ``[B, H, ⌈N / queries⌉, ⌈M / keys⌉]``, float32 (float64 for float64), differentiable; −inf where no pair is seen.
    """
    return _blocks(block_mean, Mean, read_mean, q, k, layout, block, q_pos, k_pos, scale, cu_seqlens)


def _blocks(
    read: Callable[..., Tensor], function: Any, forward: Callable[..., Any], q: Tensor, k: Tensor, layout: Layout,
    block: int | tuple[int, int] | None, q_pos: Tensor | None, k_pos: Tensor | None, scale: float | None, cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    heads = _checked(q, k, layout, q_pos, k_pos, cu_seqlens)
    sides = (layout.block_q, layout.block_k) if block is None else sides_of(block)
    if layout.parts:
        return _by_parts(read, q, k, layout, heads, q_pos, k_pos, block=sides, scale=scale, cu_seqlens=cu_seqlens)
    problem, qu, ku = _problem(q, k, layout, heads, q_pos, k_pos, scale, cu_seqlens)
    return _run(function, forward, qu, ku, sides, problem)[0].unflatten(0, (-1, heads))


def _checked(q: Tensor, k: Tensor, layout: Layout, q_pos: Tensor | None, k_pos: Tensor | None, cu_seqlens: Tensor | None) -> int:
    heads = check_qkv(q, k, k, longer_keys=True)
    check_call(q, k, layout, heads, q_pos, k_pos, cu_seqlens)
    return heads


def _by_parts(
    read: Callable[..., Tensor], q: Tensor, k: Tensor, layout: Layout, heads: int, q_pos: Tensor | None, k_pos: Tensor | None,
    *, lse: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """A layout for each share of the heads, or for each row of the batch."""
    count, found = len(layout.parts), []
    for number, part in enumerate(layout.parts):
        if layout.parts_of == "heads":
            some = [x if x is None else heads_of(x, 2, number, count, heads) for x in (q, k, lse)]
            positions = [q_pos, k_pos]
        else:
            some = [x if x is None else x[number : number + 1] for x in (q, k, lse)]
            positions = [x[number : number + 1] if x is not None and x.dim() == 2 and x.shape[0] > 1 else x for x in (q_pos, k_pos)]
        given = {} if lse is None else {"lse": some[2]}
        found.append(read(some[0], some[1], part, q_pos=positions[0], k_pos=positions[1], **given, **options))
    return torch.cat(found, 1 if layout.parts_of == "heads" else 0)


def _problem(
    q: Tensor, k: Tensor, layout: Layout, heads: int, q_pos: Tensor | None, k_pos: Tensor | None, scale: float | None,
    cu_seqlens: Tensor | None,
) -> tuple[Problem, Tensor, Tensor]:  # fmt: skip
    """The call cut by `tiles`, with a unit for each head: scaled q ``[B·H, N, 1, D]`` and k ``[B·H, M, D]``."""
    dtype, n = compute_dtype(q), q.shape[1]
    if layout.index is not None and cu_seqlens is not None:
        q_pos, k_pos = restart(q_pos, cu_seqlens, n), restart(k_pos, cu_seqlens, n)
    problem = Problem(
        layout, q.shape[0] * heads, heads, 1, heads, dtype, q.device, q_pos=q_pos, k_pos=k_pos,
        sequences=None if cu_seqlens is None else cu_seqlens.tolist(),
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qu, ku = (repeat_heads(x.to(dtype), heads).transpose(1, 2).flatten(0, 1) for x in (q, k))
    qu = (qu * scale)[:, :, None]
    if layout.index is not None:  # whole blocks, so that they are rows of one tensor
        qu = F.pad(qu, (0, 0, 0, 0, 0, layout.q_blocks * layout.block_q - n)).contiguous()
        ku = F.pad(ku, (0, 0, 0, layout.k_blocks * layout.block_k - layout.m)).contiguous()
    return problem, qu, ku


def _run(function: Any, forward: Callable[..., Any], q: Tensor, k: Tensor, given: Any, problem: Problem) -> tuple[Tensor, ...]:
    needs_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, given))
    if needs_grad and not torch.compiler.is_compiling():
        return (function.apply(q, k, given, problem),)
    return forward(q, k, given, problem)


# ---- column mass ---------------------------------------------------------------------------------------------------


def _mass(q: Tensor, k: Tensor, lse: Tensor | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """The mass ``[units, M, 1]``, and each row's log-sum-exp ``[units, N, 1]``, inf where its weights are 0."""
    mass, used = k.new_zeros(*k.shape[:2], 1), q.new_full(q.shape[:3], torch.inf)
    if lse is not None:
        used[:, : lse.shape[1]] = lse.detach().where(lse > -torch.inf, torch.inf)
    closed, one = closed_rows(problem, q), k.new_ones(1, 1, 1)
    for tile in problem.tiles():
        s, _ = scores(tile, tile.rows_of(q), tile.keys_of(k), ())
        if lse is None:
            total = s.logsumexp(-1)
            total = total.where(s.amax(-1) > hidden(s.dtype) / 8, torch.inf)
            total = total if closed is None else total + tile.rows_of(closed)
            tile.set_rows(used, total.detach())
        else:
            total = tile.rows_of(used if not lse.requires_grad else _filled(lse, used))
        weight = (s - total[..., None]).exp().sum(1)
        tile.add_keys(mass, weight[..., None], one.expand(len(weight), 1, 1))
    return mass, used


def _filled(lse: Tensor, used: Tensor) -> Tensor:
    """lse itself where it counts, so that what is traced has its gradient."""
    padded = F.pad(lse, (0, 0, 0, used.shape[1] - lse.shape[1]), value=torch.inf)
    return padded.where(used < torch.inf, used)


class _Mass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, lse: Tensor | None, problem: Problem) -> Tensor:
        mass, used = _mass(q, k, None if lse is None else lse.detach(), problem)
        ctx.save_for_backward(q, k, used)
        ctx.problem, ctx.rows = problem, None if lse is None else lse.shape[1]
        return mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmass: Tensor) -> tuple[Any, ...]:
        q, k, used = ctx.saved_tensors
        dq, dk = blank(q), blank(k)
        dlse = torch.zeros_like(used)
        dmass = dmass.contiguous()
        for tile in ctx.problem.tiles():
            qt, kt = tile.rows_of(q), tile.keys_of(k)
            s, _ = scores(tile, qt, kt, ())
            p = (s - tile.rows_of(used)[..., None]).exp_()
            ds = p * tile.keys_of(dmass).mT
            pull = ds.sum(-1)
            if ctx.rows is None:
                ds -= p * pull[..., None]
            tile.set_rows(dlse, -pull)
            tile.set_rows(dq, torch.bmm(ds, kt))
            tile.add_keys(dk, ds.mT, qt)
        return dq, dk, None if ctx.rows is None else dlse[:, : ctx.rows], None


__all__ = ["block_max", "block_mean", "column_mass"]
