"""`delta_rule` by the Triton kernels, as torch custom operators: traced, exported, captured and differentiated as one node.

    o, x = solve(q, k, v, β)      u, w, v̇, β̇ = mirrored solve(ȯ, x)
    q̇ = pass(ȯ, u, k)      k̇ = pass(w, u, k) for s < t + [rpass(u, ȯ, q) + rpass(u, w, k) for s > t]

The two passes ahead read one state. The two sums in brackets grow with the sequence, and all but cancel: one pass makes them,
as the sum of their states stays small.
Ġ = q·q̇ + k·(the first part of k̇ − the others) is summed from the end for the gradient of the decays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, expand_heads, traced
from subquad.ops.delta.launch import inverse, inverse_shape, mirror, solve
from subquad.ops.launch import INTERPRETED
from subquad.ops.launcher import eager
from subquad.ops.linear.launch import first_of_group, gate_gradient, linear_pass, prepare, sums_like


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
    save: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The operator: o ``[B, N, H, V]``, the final state (empty unless `keep`), and with `save` x, M and sums of decays for the backward."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        o, final, kept = forward(q.float(), k.float(), v.float(), beta, log_decay, state, cu_seqlens, scale, keep, save)
        return o.bfloat16(), final, kept
    heads = max(k.shape[2], v.shape[2])
    total = max(q.shape[2], heads)
    k, v, beta, log_decay, state = _operands(k, v, beta, log_decay, state, heads, total)
    decay = prepare(log_decay, q, cu_seqlens)
    M = inverse(k, beta, decay, cu_seqlens)
    o, x, last = solve(by_rows(q), k, v, beta, M, decay, cu_seqlens, scale=scale, start=state, final=keep, save=save)
    final = q.new_empty(0, dtype=torch.float32) if last is None else last[:, :: total // heads].contiguous()
    return o, final, [] if x is None else [x, M, *decay.kept]


delta_rule_op = torch.library.custom_op("subquad::delta_rule", forward, mutates_args=())


@delta_rule_op.register_fake
def _(q: Any, k: Any, v: Any, beta: Any, log_decay: Any, state: Any, cu_seqlens: Any, scale: float, keep: bool, save: bool) -> Any:
    heads = max(k.shape[2], v.shape[2])
    total = max(q.shape[2], heads)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = q.new_empty(*q.shape[:2], total, v.shape[3])
    final = q.new_empty((sequences, heads, q.shape[3], v.shape[3]) if keep else (0,), dtype=torch.float32)
    like = [inverse_shape(q, total, cu_seqlens)]
    if log_decay is not None:
        like.append(sums_like(expand_heads(log_decay, total) if total != heads else log_decay, q, cu_seqlens))
    return o, final, [torch.empty_like(o), *(q.new_empty(shape, dtype=dtype) for shape, dtype in like)] if save else []


def backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    final: Tensor,
    kept: list[Tensor],
    scale: float,
    need: list[bool],
) -> list[Tensor]:
    """The operator of its backward: gradients of q, k, v, beta, log_decay and state; empty where `need` says so."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        do, q, k, v = (x.float() for x in (do, q, k, v))
        found = backward(do, d_final, q, k, v, beta, log_decay, state, cu_seqlens, final, kept, scale, need)
        return [x.bfloat16() if i < 3 else x for i, x in enumerate(found)]
    need_q, need_k, _, _, need_decay, need_state = need
    heads = max(k.shape[2], v.shape[2])
    total = max(q.shape[2], heads)
    given, (x, M, *sums) = (q, k, v, beta, log_decay, state), kept
    k, _, beta, log_decay, state = _operands(k, v[:0], beta, log_decay, state, heads, total)
    q, do, ends = by_rows(q), by_rows(do), None
    if d_final is not None:
        ends = first_of_group((d_final * final).sum((-2, -1)), total) if need_decay else None
        d_final = first_of_group(d_final, total)
    decay = prepare(log_decay, q, cu_seqlens, sums)
    u, w, dv, dbeta, d_state = mirror(q, k, do, beta, M, x, decay, cu_seqlens, scale=scale, start=d_final, final=need_state)

    same: dict[str, Any] = {"cu": cu_seqlens, "heads": total, "dtype": q.dtype, "scale": scale, "dots": need_decay}
    dq = dk = dg = None
    if need_q or need_k or need_decay:
        keys = need_k or need_decay
        before = None if state is None else state.mT.contiguous()
        ahead = linear_pass(do, u, k, decay, x=q, start=before, more_queries=w if keys else None, **same)
        dq = ahead.o
    if need_k or need_decay:
        turned = None if d_final is None else d_final.mT.contiguous()
        back = linear_pass(
            u, do, q, decay, x=k, more_keys=w, add=ahead.more, reverse=True, once=True, start=turned, start_scale=1 / scale, **same
        )  # fmt: skip
        dk = back.o
        if need_decay:
            assert ahead.dots is not None and back.dots is not None
            dg = gate_gradient(ahead.dots, back.dots, ends, cu_seqlens, total)
    grads = (dq, dk, dv, dbeta.sum(2).mT, dg, None if d_state is None else d_state * scale)
    return [
        _reduced(grad, axis, like) if grad is not None and like is not None and wanted else q.new_empty(0)
        for grad, axis, like, wanted in zip(grads, (2, 2, 2, 2, 2, 1), given, need)
    ]


delta_rule_backward_op = torch.library.custom_op("subquad::delta_rule_backward", backward, mutates_args=())


@delta_rule_backward_op.register_fake
def _(do: Any, d_final: Any, q: Any, k: Any, v: Any, beta: Any, log_decay: Any, state: Any, cu_seqlens: Any, final: Any, kept: Any, scale: float, need: list[bool]) -> Any:  # fmt: skip # noqa: E501
    given = (q, k, v, beta, log_decay, state)
    return [q.new_empty(x.shape, dtype=x.dtype) if wanted else q.new_empty(0) for x, wanted in zip(given, need)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, beta, log_decay, state, cu_seqlens, ctx.scale, ctx.keep, _ = inputs
    _, final, kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(q, k, v, beta, log_decay, state, cu_seqlens, final, *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, state, cu_seqlens, final, *kept = ctx.saved_tensors
    if not kept:
        raise RuntimeError("delta_rule was called without `save`, and its backward reads what that keeps")
    do = torch.zeros_like(kept[0]) if do is None else do
    d_final = d_final if ctx.keep else None
    need = [x is not None and wanted for x, wanted in zip((q, k, v, beta, log_decay, state), ctx.needs_input_grad)]
    run = torch.ops.subquad.delta_rule_backward if traced(q) else backward
    found = run(do.to(q.dtype), d_final, q, k, v, beta, log_decay, state, cu_seqlens, final, list(kept), ctx.scale, need)
    return (*(x if wanted else None for x, wanted in zip(found, need)), None, None, None, None)


delta_rule_op.register_autograd(_backward, setup_context=_setup)


_eager = eager("DeltaRule", forward, _setup, _backward)


def delta_rule(*inputs: Any) -> tuple[Tensor, Tensor]:
    """o and the final state of `forward` without `save`, as a differentiable call or, while something traces, as an operator."""
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:6] if x is not None)
    run = torch.ops.subquad.delta_rule if traced(inputs[0]) else _eager
    o, final, *_ = run(*inputs, save)
    return o, final


def _operands(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None, heads: int, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """All but q as the kernels read them; more query heads than state heads give each query head a state of its own."""
    if total != heads:
        k, v, beta = expand_heads(k, total), expand_heads(v, total), expand_heads(beta, total)
        log_decay = None if log_decay is None else expand_heads(log_decay, total)
        state = None if state is None else state.repeat_interleave(total // heads, 1)
    return by_rows(k), by_rows(v), beta, log_decay, None if state is None else state.float().contiguous()


def _reduced(grad: Tensor, axis: int, like: Tensor) -> Tensor:
    """A gradient, summed over the heads that its input has not (heads are on `axis`), in the input's dtype."""
    heads = like.shape[axis]
    grad = grad if grad.shape[axis] == heads else grad.unflatten(axis, (heads, -1)).sum(axis + 1)
    return grad.to(like.dtype).contiguous()
