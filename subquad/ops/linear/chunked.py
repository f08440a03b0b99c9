"""Causal linear attention in chunks: one pass with a direction is the forward and, three times more, the backward.

With W_ts = exp(G_t − G_s), G the running sum of the log decays,

    pass(a, b, c)_t  = Σ_{s≤t} W_ts (a_t · b_s) c_s        state: Σ W b cᵀ, carried forwards
    rpass(a, b, c)_t = Σ_{s≥t} W_st (a_t · b_s) c_s        the same, carried backwards

    o = pass(q, k, v)    q̇ = pass(ȯ, v, k)    k̇ = rpass(v, ȯ, q)    v̇ = rpass(k, q, ȯ)
    Ġ = q·q̇ − k·k̇ ,     ġ = the reversed running sum of Ġ, plus ⟨Ṡ_N, S_N⟩

An initial state starts `pass`, the gradient of the final state starts `rpass`. No state is stored for the backward.
A decay per channel weighs the contracted side (a, b) in o and v̇, and the columns c in q̇ and k̇.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from subquad.checks import compute_dtype
from subquad.ops.common import Span, expand_heads, full_precision, load, reduce_heads, rows, segments, store
from subquad.ops.linear.decay import Decay, Weights


def weigh(tiles: Tensor, weight: Tensor | None) -> Tensor:
    return tiles if weight is None else tiles * weight


def scan(sums: Tensor, total: Tensor | None, state: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Carry a state ``[P, D, V]`` over chunks: S ← total ∘ S + sum.

    Args:
        sums: ``[P, m, D, V]``, what each chunk adds.
        total: the decay over each chunk, ``[P, m, …]`` that broadcasts to sums, or None.

    Returns:
        the states each chunk starts from ``[P, m, D, V]``, and the state after the last.
    """
    starts: list[Tensor] = []
    order = range(sums.shape[1])
    for i in reversed(order) if reverse else order:
        starts.append(state)
        if total is None:
            state = sums[:, i] + state  # in this order: inductor otherwise adds in place to a state that another pass still reads
        else:
            state = torch.addcmul(sums[:, i], total[:, min(i, total.shape[1] - 1)], state)
    return torch.stack(starts[::-1] if reverse else starts, 1), state


def chunk_pass(a: Tensor, b: Tensor, c: Tensor, weights: Weights, state: Tensor, *, columns: bool) -> tuple[Tensor, Tensor]:
    """The pass over one segment: tiles a, b, c and the state ``[P, D, V]`` to output tiles and the state after."""
    p, m, size, group, _ = a.shape
    shape = (p, m, size, group, c.shape[-1])
    columns = columns and weights.per_channel
    total = weights.total
    if columns:
        c_kept, b_kept = weigh(c, weights.write), b
        total = None if total is None else total[..., None, :]
    else:
        c_kept, b_kept = c, weigh(b, weights.write)
        total = None if total is None else total[..., :, None]
    sums = torch.bmm(rows(b_kept).mT, rows(c_kept)).view(p, m, *state.shape[1:])
    starts, state = scan(sums, total, state, reverse=weights.reverse)
    starts = starts.flatten(0, 1)
    if columns:
        out = weigh(torch.bmm(rows(a), starts).view(shape), weights.read)
        return out.add_(weights.columns(torch.bmm(rows(a), rows(b).mT), c)), state
    out = torch.bmm(rows(weigh(a, weights.read)), starts)
    return out.baddbmm_(weights.scores(a, b), rows(c)).view(shape), state


@full_precision
def linear_pass(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    decay: Decay,
    state: Tensor,
    over: tuple[Span, ...],
    *,
    reverse: bool = False,
    columns: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """One pass over whole sequences.

    Args:
        a, b: ``[B, N, ·, D]``; c: ``[B, N, ·, V]``. Fewer heads than Hs are repeated; more are groups that share a state:
            each of a's gets its own output, b's and c's (equal in number) are summed.
        state: ``[rows, Hs, D, V]`` before the first token, or with `reverse` after the last.
        reverse: sum over this and later tokens.
        columns: decays per channel weigh the channels of c and not of a and b.
        scale: multiplies the output, not the state.
        dtype: of the output (default: a's).

    Returns:
        ``[B, N, Hs·ra, V]``, and the state after the last token (with `reverse`: before the first).
    """
    heads, width = decay.heads, c.shape[-1]
    out = a.new_empty(*a.shape[:2], max(a.shape[2], heads), width, dtype=dtype or a.dtype)
    final = torch.empty_like(state)
    for span in over:
        carried = state[span.rows].flatten(0, 1)
        for segment in segments(span, a, heads, reverse=reverse, powers_of_two=decay.per_channel):
            x, y, z = (load(t, segment, heads, decay.dtype) for t in (a, b, c))
            o, carried = chunk_pass(x, y, z, decay.weights(segment, reverse=reverse), carried, columns=columns)
            store(out, o.mul_(scale) if scale != 1.0 else o, segment)
        final[span.rows] = carried.unflatten(0, (-1, heads))
    return out, final


def decay_gradient(log_decay: Tensor, total: Tensor, over: tuple[Span, ...], state: Tensor, d_state: Tensor | None) -> Tensor:
    """From Ġ ``[B, N, Hs, D]``, the gradient with respect to running sums, to ġ in the shape of `log_decay`.

    Args:
        state, d_state: the final state ``[rows, Hs, D, V]`` and its gradient, on which every token's decay acts.
    """
    per_channel = log_decay.dim() == 4
    total = total if per_channel else total.sum(-1)
    at_end = None if d_state is None else (d_state * state).sum(-1 if per_channel else (-2, -1))
    out = torch.empty_like(total)
    for span in over:
        part = total[:, span.start : span.stop].flip(1).cumsum(1).flip(1)
        out[:, span.start : span.stop] = part if at_end is None else part + at_end[span.rows, None]
    return out.sum((0, 1)) if log_decay.dim() == 1 else out


class LinearAttention(torch.autograd.Function):
    """o and the final state of `linear_attention`, without normaliser."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor,
        scale: float,
        over: tuple[Span, ...],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        decay = Decay(log_decay, q, max(k.shape[2], v.shape[2]), compute_dtype(q))
        o, final = linear_pass(q, k, v, decay, state, over, scale=scale, dtype=dtype)
        ctx.save_for_backward(q, k, v, log_decay, state, final)
        ctx.scale, ctx.over = scale, over
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, log_decay, state, final = ctx.saved_tensors
        need_q, need_k, need_v, need_decay, need_state = ctx.needs_input_grad[:5]
        decay = Decay(log_decay, q, max(k.shape[2], v.shape[2]), compute_dtype(q))
        heads = max(q.shape[2], decay.heads)
        if do is None:
            do = v.new_zeros(*v.shape[:2], heads, v.shape[3])
        do = do if ctx.scale == 1.0 else do * ctx.scale
        start = torch.zeros_like(state) if d_final is None else d_final
        dq = dk = dv = dg = d_state = None
        if need_q or need_decay:
            dq, _ = linear_pass(do, v, k, decay, state.mT, ctx.over, columns=True, dtype=decay.dtype)
        if need_k or need_decay:
            dk, _ = linear_pass(v, do, expand_heads(q, heads), decay, start.mT, ctx.over, reverse=True, columns=True, dtype=decay.dtype)
        if need_v or need_state:
            dv, d_state = linear_pass(k, expand_heads(q, heads), do, decay, start, ctx.over, reverse=True)
            dv = reduce_heads(dv, v.shape[2]).to(v.dtype)
        if need_decay:
            assert dq is not None and dk is not None
            total = reduce_heads(expand_heads(q, heads) * dq, decay.heads) - expand_heads(k, decay.heads) * dk
            dg = decay_gradient(log_decay, total, ctx.over, final, d_final)
        dq = None if dq is None else reduce_heads(dq, q.shape[2]).to(q.dtype)
        dk = None if dk is None else reduce_heads(dk, k.shape[2]).to(k.dtype)
        return dq, dk, dv, dg, d_state, None, None, None


@full_precision
def linear_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: q ``[B, 1, H, D]`` and the state ``[B, Hs, D, V]`` to o ``[B, 1, H, V]`` in the state's dtype, and the state."""
    heads = state.shape[1]
    q, k, v = (x.to(state.dtype)[:, 0] for x in (q, k, v))
    k, v = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    q = q if q.shape[1] >= heads else q.repeat_interleave(heads // q.shape[1], 1)
    if log_decay is not None:
        a = log_decay.exp() if log_decay.dim() == 1 else log_decay[:, 0].exp()
        state = state * (a[..., None] if log_decay.dim() == 4 else a[..., None, None])
    state = torch.addcmul(state, k[..., None], v[..., None, :])
    o = (q * scale).unflatten(1, (heads, -1)) @ state
    return o.flatten(1, 2)[:, None], state
