"""The fast form of `sparse_attention` in plain torch: tile by tile, forwards and backwards, no N × M map.

Forward, for each tile of queries against all the keys it visits:  s = q kᵀ + b,  p = softmax(s),  o = p v,
lse = max s − log max p  (the greatest probability is 1 / Σ exp(s − max s)).
Backward, with p recomputed and Δ = ȯ·o:  ds = p ∘ (ȯ vᵀ − Δ + l̇se) + ṁax ∘ [s = max s] / ties,
dv = pᵀ ȯ,  dq = ds k,  dk = dsᵀ q   (Dao et al., arXiv 2205.14135, alg. 4, with two more outputs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.checks import compute_dtype
from subquad.ops.sparse.bias import Bias, Dense, KeyBias, RelativeBias, Slopes, Table, Term, per_unit
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.tiles import Problem, Tile, blank, hidden


def sparse_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    bias: Bias | None,
    key_bias: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    scale: float,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o ``[B, N, H, V]``, lse ``[B, N, H]``, max ``[B, N, H]``); the last two hold nothing unless `stats`."""
    batch, n, heads, dtype = q.shape[0], q.shape[1], max(q.shape[2], k.shape[2], v.shape[2]), compute_dtype(q)
    wide = [x.to(dtype) for x in (q, k, v)]
    wide[0] = repeat_heads(wide[0], heads) * scale
    if isinstance(bias, tuple):
        wide[0], wide[1] = _join_factors(wide[0], wide[1], bias)
    k_groups = wide[1].shape[2] if wide[1].shape[2] == wide[2].shape[2] else heads
    lists = 1 if layout.index is None else layout.index.shape[1]
    groups = k_groups if k_groups % lists == 0 else lists if lists % k_groups == 0 else heads
    if layout.index is not None and (cu_seqlens is not None):
        q_pos, k_pos = restart(q_pos, cu_seqlens, n), restart(k_pos, cu_seqlens, n)
    terms, parameters = _terms(bias, key_bias, batch, groups, heads, dtype)
    problem = Problem(
        layout, batch * groups, groups, heads // groups, k_groups, dtype, q.device, terms, softcap, q_pos, k_pos,
        None if cu_seqlens is None else cu_seqlens.tolist(),
        sparse_rows=layout.index is not None or k_pos is not None or q_pos is not None or bool(terms),
        stats=stats,
    )  # fmt: skip
    qu = wide[0].unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
    ku, vu = (repeat_heads(x, k_groups).transpose(1, 2).flatten(0, 1) for x in wide[1:])
    if layout.index is not None:  # whole blocks, so that they are rows of one tensor
        qu = F.pad(qu, (0, 0, 0, 0, 0, layout.q_blocks * layout.block_q - n)).contiguous()
        ku, vu = (F.pad(x, (0, 0, 0, layout.k_blocks * layout.block_k - layout.m)).contiguous() for x in (ku, vu))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (qu, ku, vu, *parameters))
    if needs_grad and not torch.compiler.is_compiling():
        o, lse, top = _Sparse.apply(qu, ku, vu, problem, *parameters)
    else:  # without gradients, or traced: autograd then follows the plain operations
        o, lse, top = _forward(qu, ku, vu, problem, parameters)
    o, lse, top = (x[:, :n].unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3) for x in (o, lse, top))
    return o.to(q.dtype), lse, top


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, h, D]`` with every head repeated up to `heads`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _join_factors(q: Tensor, k: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Low-rank factors as further channels: [scale·q, q_b]·[k, k_b] = scale·q·k + q_b·k_b (FlashBias, arXiv 2505.12044)."""
    q_b, k_b = (x.to(q.dtype) for x in factors)
    k = repeat_heads(k, max(k.shape[2], k_b.shape[2]))
    q_b, k_b = (x.expand(y.shape[0], -1, y.shape[2], -1) for x, y in ((q_b, q), (k_b, k)))
    return torch.cat([q, q_b], -1), torch.cat([k, k_b], -1)


def restart(positions: Tensor | None, cu_seqlens: Tensor, n: int) -> Tensor:
    """Positions that restart at every packed sequence, unless given."""
    if positions is not None:
        return positions
    i = torch.arange(n, device=cu_seqlens.device)
    return i - cu_seqlens.to(i)[torch.bucketize(i, cu_seqlens[1:].to(i), right=True)]


def _terms(
    bias: Bias | None, key_bias: Tensor | None, batch: int, groups: int, heads: int, dtype: torch.dtype
) -> tuple[tuple[Term, ...], list[Tensor]]:
    """The biases that tiles add, and their parameters; small ones in the dtype in which gradients are summed."""
    terms: list[Term] = []
    parameters: list[Tensor] = []
    if key_bias is not None:
        terms.append(KeyBias())
        parameters.append(per_unit(key_bias.to(dtype), batch, groups, heads))
    if isinstance(bias, RelativeBias):
        terms.append(Table())
        parameters.append(per_unit(bias.table[None].to(dtype), batch, groups, heads))
    elif isinstance(bias, Tensor) and bias.dim() == 1:
        terms.append(Slopes())
        parameters.append(per_unit(bias[None].to(dtype), batch, groups, heads))
    elif isinstance(bias, Tensor):
        terms.append(Dense(groups, heads))
        parameters.append(bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape)))
    return tuple(terms), parameters


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        o, lse, top = _forward(q, k, v, problem, parameters)
        ctx.save_for_backward(q, k, v, o, lse, *parameters)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return o, lse, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, dtop: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, *parameters = ctx.saved_tensors
        dq, dk, dv, dp = _backward(q, k, v, ctx.problem, parameters, o, lse, do, dlse, dtop)
        return dq, dk, dv, None, *dp


def scores(tile: Tile, q: Tensor, k: Tensor, parameters: Any) -> tuple[Tensor, Tensor | None]:
    """Scores ``[units, queries · G, keys]`` with what is not seen far below, and tanh(s / cap) where there is a cap."""
    p = tile.problem
    s, bend = torch.bmm(q, k.mT), None
    if p.softcap is not None:
        bend = (s / p.softcap).tanh()
        s = bend * p.softcap
    s4 = s.unflatten(1, (-1, p.shared))
    for term, parameter in zip(p.terms, parameters):
        s4 += term.scores(parameter, tile).to(s.dtype).clamp(min=hidden(s.dtype) / 4)
    for columns, mask in tile.masks:
        s4[..., columns] += mask
    return s, bend


def _forward(q: Tensor, k: Tensor, v: Tensor, problem: Problem, parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o ``[units, N, G, V]``, lse and max ``[units, N, G]``."""
    rows = q.shape[:3]
    every_row = problem.layout.index is None and not problem.sparse_rows  # is written by some tile
    o = (q.new_empty if every_row else q.new_zeros)(*rows, v.shape[-1])
    lse, top = q.new_full(rows, -torch.inf), q.new_full(rows, -torch.inf)
    for tile in problem.tiles():
        s, _ = scores(tile, tile.rows_of(q), tile.keys_of(k), parameters)
        highest = s.amax(-1) if problem.stats or problem.sparse_rows else None
        prob = s.softmax(-1)
        mixed = torch.bmm(prob, tile.keys_of(v))
        if highest is not None:
            alive = highest > hidden(s.dtype) / 8
            mixed = mixed * alive[..., None] if problem.sparse_rows else mixed
            # traced: a compiler recomputes prob, to other last digits, and amax's gradient asks where prob equals its maximum
            total = s.logsumexp(-1) if torch.compiler.is_compiling() else highest - prob.amax(-1).log()
            tile.set_rows(lse, total.where(alive, -torch.inf))
            tile.set_rows(top, highest.where(alive, -torch.inf))
        tile.set_rows(o, mixed)
    return o, lse, top


def _backward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, parameters: Any, o: Tensor, lse: Tensor,
    do: Tensor | None, dlse: Tensor | None, dtop: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gradients of q, k, v and of the bias parameters."""
    dead = (lse == -torch.inf) if problem.sparse_rows else None
    do, dlse, dtop = (
        x if x is None or dead is None else x.masked_fill(dead if x.dim() == 3 else dead[..., None], 0) for x in (do, dlse, dtop)
    )
    do = torch.zeros_like(o) if do is None else do.contiguous()
    push = -(do * o).sum(-1)
    push = push if dlse is None else push + dlse
    dq, dk, dv = blank(q), blank(k), blank(v)
    dp = [torch.zeros_like(x) for x in parameters]
    for tile in problem.tiles():
        qt, kt, dot = tile.rows_of(q), tile.keys_of(k), tile.rows_of(do)
        s, bend = scores(tile, qt, kt, parameters)
        prob = s.softmax(-1)
        tile.add_keys(dv, prob.mT, dot)
        ds = torch.bmm(dot, tile.keys_of(v).mT).add_(tile.rows_of(push)[..., None]).mul_(prob)
        if dtop is not None:
            ties = (s == s.amax(-1, keepdim=True)).to(s.dtype)
            ds += ties * (tile.rows_of(dtop) / ties.sum(-1))[..., None]
        for term, grad in zip(problem.terms, dp):
            term.accumulate(grad, tile, ds.unflatten(1, (-1, problem.shared)).to(grad.dtype))
        if bend is not None:
            ds *= 1 - bend.square()
        tile.set_rows(dq, torch.bmm(ds, kt))
        tile.add_keys(dk, ds.mT, qt)
    return dq, dk, dv, dp
