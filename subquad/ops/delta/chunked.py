"""The delta rule in chunks: the triangular (WY) form of Yang et al. (arXiv 2406.06484, sec. 3; 2412.06464 with decay).

In a chunk with state S before it, G the running sum of its log decays, W_ts = exp(G_t − G_s) for s ≤ t, and
u_t = β_t (v_t − a_t S_{t−1}ᵀ k_t) what token t adds along its key:

    (I + A) U = β ∘ (V − (e^G ∘ K) S),    A = β ∘ (K Kᵀ ∘ W) below the diagonal
    O = (e^G ∘ Q) S + (Q Kᵀ ∘ W) U,       S ← e^{G_C} S + (e^{G_C−G} ∘ K)ᵀ U

The solve is made for β∘V and β∘e^G∘K side by side, for all chunks of a segment at once; only the products with S go
from chunk to chunk. The backward recomputes one segment at a time from the state before it, which is all that is kept.
A decay per channel puts W inside the sum over channels (KDA); the rest stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.checks import compute_dtype
from subquad.ops.common import Segment, Span, full_precision, load, rows, segments, store
from subquad.ops.linear.chunked import weigh
from subquad.ops.linear.decay import Decay


def chunk_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, decay: Decay, segment: Segment, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One segment of q ``[B, N, ·, D]``, k, v, beta ``[B, N, Hs, …]``, from the state ``[P, D, V]`` before it.

    Made of differentiable operations. Returns output tiles ``[P, m, C, r, V]`` and the state after.
    """
    heads = decay.heads
    q, k, v, beta = (load(x, segment, heads, decay.dtype) for x in (q, k, v, beta[..., None]))
    q, weights = q * scale, decay.weights(segment, reverse=False)
    p, m, size, group, width = q.shape
    beta = rows(beta)
    below = weights.scores(k, k) * beta  # the solver reads what is below the diagonal alone
    sides = torch.cat([rows(v), rows(weigh(k, weights.read))], -1) * beta
    solved = torch.linalg.solve_triangular(below, sides, upper=False, unitriangular=True).unflatten(0, (p, m))
    fresh, past = solved.split([v.shape[-1], width], -1)
    write, total = rows(weigh(k, weights.write)).mT.unflatten(0, (p, m)), weights.total
    starts, added = [], []
    for i in range(m):
        u = torch.baddbmm(fresh[:, i], past[:, i], state, alpha=-1)
        starts.append(state)
        added.append(u)
        if total is not None:
            state = state * total[:, min(i, total.shape[1] - 1), :, None]
        state = torch.baddbmm(state, write[:, i], u)
    before, u = torch.stack(starts, 1).flatten(0, 1), torch.stack(added, 1).flatten(0, 1)
    o = torch.baddbmm(torch.bmm(rows(weigh(q, weights.read)), before), weights.scores(q, k), u)
    return o.view(p, m, size, group, v.shape[-1]), state


class DeltaRule(torch.autograd.Function):
    """o and the final state of `delta_rule`; k, v and beta have the heads of the state."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        scale: float,
        over: tuple[Span, ...],
    ) -> tuple[Tensor, Tensor]:
        starts: list[Tensor] = []
        o, final = run(q, k, v, beta, log_decay, state, scale, over, starts)
        ctx.save_for_backward(q, k, v, beta, log_decay, *starts)
        ctx.scale, ctx.over, ctx.state_shape = scale, over, state.shape
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, beta, log_decay, *starts = ctx.saved_tensors
        given = [q, k, v, beta] if log_decay is None else [q, k, v, beta, log_decay]
        grads, heads, dtype = [torch.empty_like(x) for x in given], k.shape[2], compute_dtype(q)
        d_state = q.new_zeros(ctx.state_shape, dtype=dtype) if d_final is None else d_final.clone()
        for span in reversed(ctx.over):
            carried = d_state[span.rows].flatten(0, 1)
            for segment in reversed(list(_segments(span, q, k, log_decay))):
                part = [x[:, segment.tokens].detach().requires_grad_() for x in given]
                start = starts.pop().detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
                    decay = Decay(part[4] if len(part) > 4 else None, q, heads, dtype)
                    local = Segment(0, segment.chunks, segment.size)
                    tiles, after = chunk_rule(part[0], part[1], part[2], part[3], ctx.scale, decay, local, start)
                    o = torch.zeros_like(tiles) if do is None else load(do, segment, heads, dtype)
                    *found, carried = torch.autograd.grad((tiles, after), (*part, start), (o, carried))
                for grad, x in zip(grads, found):
                    grad[:, segment.tokens] = x
            d_state[span.rows] = carried.unflatten(0, (-1, heads))
        return (*grads, *(() if log_decay is not None else (None,)), d_state, None, None)


def _segments(span: Span, q: Tensor, k: Tensor, log_decay: Tensor | None) -> Any:
    return segments(span, q, k.shape[2], powers_of_two=log_decay is not None and log_decay.dim() == 4)


@full_precision
def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    over: tuple[Span, ...],
    starts: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule over whole sequences, differentiable by itself; the state before each segment is added to `starts`."""
    heads = k.shape[2]
    decay = Decay(log_decay, q, heads, compute_dtype(q))
    out = q.new_empty(*q.shape[:2], q.shape[2], v.shape[3])
    final = torch.empty_like(state)
    for span in over:
        carried = state[span.rows].flatten(0, 1)
        for segment in _segments(span, q, k, log_decay):
            if starts is not None:
                starts.append(carried)
            tiles, carried = chunk_rule(q, k, v, beta, scale, decay, segment, carried)
            store(out, tiles, segment)
        final[span.rows] = carried.unflatten(0, (-1, heads))
    return out, final


@full_precision
def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: q ``[B, 1, H, D]``, k, v of Hs heads, and the state ``[B, Hs, D, V]`` to o ``[B, 1, H, V]`` and the state."""
    heads = state.shape[1]
    q, k, v, beta = (x.to(state.dtype)[:, 0] for x in (q, k, v, beta))
    if log_decay is not None:
        a = log_decay[:, 0].to(state.dtype).exp()
        state = state * (a[..., None] if log_decay.dim() == 4 else a[..., None, None])
    u = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
    state = torch.addcmul(state, k[..., None], u[..., None, :])
    return ((q * scale).unflatten(1, (heads, -1)) @ state).flatten(1, 2)[:, None], state
