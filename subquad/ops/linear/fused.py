"""`linear_attention` by the Triton pass, as torch custom operators: traced, exported, captured and differentiated as one node.

    o = pass(q, k, v)    q̇ = pass(ȯ, v, k)    k̇ = rpass(v, ȯ, q)    v̇ = rpass(k, q, ȯ)

Ġ = q·q̇ − k·k̇ is summed from the end for the gradient of the decays: by `gate_kernel` from row sums of the two passes, or per
channel where `unweigh_kernel` ends them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, reduce_heads, traced
from subquad.ops.launch import INTERPRETED
from subquad.ops.launcher import eager
from subquad.ops.linear.channel import Weighed, pairs, pairs_backward, unweigh, weigh, weighed_like
from subquad.ops.linear.launch import gate_gradient, linear_pass, prepare, sums_like


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator: o ``[B, N, H, V]`` in `dtype`, the final state (empty unless `keep`), and what the backward reads again."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        o, final, kept = forward(q.float(), k.float(), v.float(), log_decay, state, cu_seqlens, scale, keep, torch.float32)
        return o.to(dtype), final, kept
    q, k, v = (by_rows(x) for x in (q, k, v))
    heads = max(k.shape[2], v.shape[2])
    total = max(q.shape[2], heads)
    same: dict[str, Any] = {
        "cu": cu_seqlens, "heads": total, "dtype": dtype, "scale": scale, "start": state, "group": total // heads, "final": keep,
        "left": keep,
    }  # fmt: skip
    if log_decay is not None and log_decay.dim() == 4:
        weighed = weigh(q, k, log_decay, cu_seqlens, total, heads)
        result = linear_pass(weighed.q, weighed.k, v, weighed.decay, **same)
        pairs(q, k, v, log_decay, weighed.decay, result.o, cu=cu_seqlens, reverse=False, scale=scale)
        kept = weighed.tensors()
    else:
        decay = prepare(log_decay, q, cu_seqlens)
        result, kept = linear_pass(q, k, v, decay, **same), decay.kept
    return result.o, q.new_empty(0, dtype=torch.float32) if result.final is None else result.final, kept


linear_attention_op = torch.library.custom_op("subquad::linear_attention", forward, mutates_args=())


@linear_attention_op.register_fake
def _(q: Any, k: Any, v: Any, log_decay: Any, state: Any, cu_seqlens: Any, scale: float, keep: bool, dtype: torch.dtype) -> Any:
    heads, batch = max(k.shape[2], v.shape[2]), q.shape[0]
    total = max(q.shape[2], heads)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = q.new_empty(batch, q.shape[1], total, v.shape[3], dtype=dtype)
    final = q.new_empty((sequences, heads, q.shape[3], v.shape[3]) if keep else (0,), dtype=torch.float32)
    kept = []
    if log_decay is not None:
        channel = log_decay.dim() == 4
        kept = weighed_like(q, cu_seqlens, total, heads) if channel else [sums_like(log_decay, q, cu_seqlens)]
    return o, final, [torch.empty(x, dtype=t, device=q.device) for x, t in kept]


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor,
    kept: list[Tensor],
    scale: float,
    need: list[bool],
) -> list[Tensor]:
    """The operator of its backward: gradients of q, k, v, log_decay and state; empty where `need` says so."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        found = backward(do.float(), d_final, q.float(), k.float(), v.float(), log_decay, state, cu_seqlens, final, kept, scale, need)
        return [x.to(torch.bfloat16) if i < 3 else x for i, x in enumerate(found)]
    do, q, k, v = (by_rows(x) for x in (do, q, k, v))
    need_q, need_k, need_v, need_decay, need_state = need
    value_heads, heads = v.shape[2], max(k.shape[2], v.shape[2])
    total = max(q.shape[2], heads)
    group = total // heads
    same: dict[str, Any] = {"cu": cu_seqlens, "heads": total, "scale": scale}
    ahead: dict[str, Any] = {"start": None if state is None else state.mT.contiguous(), "group": group, "column": True, **same}
    back: dict[str, Any] = {"reverse": True, "start_scale": 1 / scale, "group": group, "once": True, **same}
    turned = None if d_final is None else d_final.mT.contiguous()
    dq = dk = dv = dg = d_state = None
    if log_decay is not None and log_decay.dim() == 4:
        weighed = Weighed.of(kept)
        decay, sources, queries = weighed.decay, weighed.q, weighed.k
        if need_q or need_k or need_decay:
            wide: dict[str, Any] = {"split": need_decay, "dtype": torch.float32}
            aq = linear_pass(do, v, weighed.k, decay, **wide, **{**ahead, "scale": 1.0}).o
            ak = linear_pass(v, do, weighed.q, decay, column=True, start=turned, **wide, **{**back, "scale": 1.0}).o
            dq, dk = (torch.empty(aq.shape, dtype=q.dtype, device=q.device) for _ in range(2))
            dg = torch.empty(weighed.k.shape, dtype=torch.float32, device=q.device) if need_decay else None
            pairs_backward(q, k, v, do, log_decay, decay, dq, dk, dg, cu=cu_seqlens, scale=scale)
            ends = None if d_final is None else (d_final * final).sum(-1)
            unweigh(log_decay, weighed, aq, ak, dq, dk, dg, ends, cu_seqlens, scale)
    else:
        decay, sources, queries = prepare(log_decay, q, cu_seqlens, kept), q, k
        q_dots = k_dots = None
        if need_q or need_decay:
            done = linear_pass(do, v, k, decay, x=q, dots=need_decay, dtype=q.dtype, **ahead)
            dq, q_dots = done.o, done.dots
        if need_k or need_decay:
            done = linear_pass(v, do, q, decay, column=True, start=turned, x=k, dots=need_decay, dtype=q.dtype, **back)
            dk, k_dots = done.o, done.dots
        if q_dots is not None and k_dots is not None:
            ends = None if d_final is None else (d_final * final).sum((-2, -1))
            dg = gate_gradient(q_dots, k_dots, ends, cu_seqlens, heads)
    if need_v or need_state:
        done = linear_pass(queries, sources, do, decay, start=d_final, final=need_state, dtype=q.dtype, **back)
        dv = done.o
        if log_decay is not None and log_decay.dim() == 4:
            pairs(k, q, do, log_decay, decay, dv, cu=cu_seqlens, reverse=True, scale=scale)
        if done.final is not None:
            d_state = done.final.unflatten(1, (heads, -1)).sum(2) * scale
    if dg is not None and log_decay is not None:
        dg = (dg.sum((0, 1)) if log_decay.dim() == 1 else dg).to(log_decay.dtype)
    grads = (
        None if dq is None else reduce_heads(dq, q.shape[2]),
        None if dk is None else reduce_heads(dk, k.shape[2]),
        None if dv is None else reduce_heads(dv, value_heads),
        dg,
        d_state,
    )
    return [q.new_empty(0) if x is None or not wanted else x for x, wanted in zip(grads, need)]


linear_attention_backward_op = torch.library.custom_op("subquad::linear_attention_backward", backward, mutates_args=())


@linear_attention_backward_op.register_fake
def _(do: Any, d_final: Any, q: Any, k: Any, v: Any, log_decay: Any, state: Any, cu_seqlens: Any, final: Any, kept: Any, scale: float, need: list[bool]) -> Any:  # fmt: skip # noqa: E501
    given = (q, k, v, log_decay, state)
    return [q.new_empty(x.shape, dtype=x.dtype) if wanted else q.new_empty(0) for x, wanted in zip(given, need)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, log_decay, state, cu_seqlens, ctx.scale, ctx.keep, _ = inputs
    _, final, kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(q, k, v, log_decay, state, cu_seqlens, final, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state, cu_seqlens, final, *kept = ctx.saved_tensors
    if do is None:
        do = q.new_zeros(*v.shape[:2], max(q.shape[2], k.shape[2], v.shape[2]), v.shape[3])
    d_final = d_final if ctx.keep else None
    need = [x is not None and wanted for x, wanted in zip((q, k, v, log_decay, state), ctx.needs_input_grad)]
    run = torch.ops.subquad.linear_attention_backward if traced(q) else backward
    found = run(do.to(q.dtype), d_final, q, k, v, log_decay, state, cu_seqlens, final, list(kept), ctx.scale, need)
    return (*(x if wanted else None for x, wanted in zip(found, need)), None, None, None, None)


linear_attention_op.register_autograd(_backward, setup_context=_setup)


_eager = eager("LinearAttention", forward, _setup, _backward)


def linear_attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    """o and the final state of `forward`, as a differentiable call or, while something traces, as an operator."""
    run = torch.ops.subquad.linear_attention if traced(inputs[0]) else _eager
    o, final, *_ = run(*inputs)
    return o, final
