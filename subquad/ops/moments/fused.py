"""Moment attention by the Triton kernels, as torch custom operators: gathering, applying, or both in one node.

    both      mean_kernel (RALA) → gather_kernel → combine_kernel → apply_kernel
    backward  apply_back_kernel → combine_kernel → gather_back_kernel (→ apply_back_kernel again, where the mean of φ(q) was used)

A record is what `kernels.py` says: the moments of a row and head, side by side, ``[rows, heads, L]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.common import by_rows, full_precision, reduce_heads, traced
from subquad.ops.launcher import eager
from subquad.ops.moments.launch import How, Sizes, Tensors, head_count, plan
from subquad.ops.moments.moments import TWO_SIGNS, Moments
from subquad.rotary import Rotary

Optional = Tensor | None  # in signatures of operators
LEARNED = Tensors._fields[:7]


def _read(tensors: tuple[Any, ...]) -> Tensors:
    """As the kernels read them: with neighbouring channels side by side."""
    return Tensors(*[t if t is None else by_rows(t) for t in tensors[:3]], *tensors[3:])


def forward(
    q: Optional, k: Optional, v: Optional, record: Optional, query: Optional, logits: Optional, factors: Optional, seen: Optional,
    k_cos: Optional, k_sin: Optional, q_cos: Optional, q_sin: Optional, cu: Optional, values: int,
    q_map: str, k_map: str, averaged: bool, logit_scale: float, normalizer: str, mean: bool, scale: float, eps: float, halves: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """o ``[B, N, H, V]`` (empty without q), the record (empty without k), and what the backward reads again."""
    x = _read((q, k, v, record, query, logits, factors, seen, k_cos, k_sin, q_cos, q_sin, cu))
    run = plan(x, None, values, How(q_map, k_map, averaged, logit_scale, normalizer, mean, scale, eps, halves))
    kept: list[Tensor] = []
    if x.k is not None:
        queries = run.mean(x.q, x) if averaged and x.q is not None else query
        record, found = run.gather(x, queries)
        kept = [t for t in (queries if averaged else None, found) if t is not None]
    assert record is not None
    o = run.empty(0) if x.q is None else run.apply(x, record)
    return o, run.empty(0) if x.k is None else record, kept


moments_op = torch.library.custom_op("subquad::moments", forward, mutates_args=())


@moments_op.register_fake
def _(*args: Any) -> Any:  # by itself, as a plan is remembered by sizes, which may be symbols here
    x, values, how = Tensors(*args[:13]), args[13], How(*args[14:])
    like = x.q if x.k is None else x.k
    assert like is not None
    o = record = like.new_empty(0, dtype=torch.float32)
    kept = []
    heads = head_count(x, how)
    if x.k is not None:
        rows = like.shape[0] if x.cu is None else x.cu.shape[0] - 1
        size = Sizes.of(like.shape[3], values, how.k_map in TWO_SIGNS)
        record = like.new_empty(rows, heads, size.L, dtype=torch.float32)
        if how.averaged and x.q is not None:
            kept = [like.new_empty(rows, x.q.shape[2], 1, size.F, dtype=torch.float32)]
        if kept or x.query is not None:
            kept.append(like.new_empty(*like.shape[:2], heads, dtype=torch.float32))
    if x.q is not None:
        o = x.q.new_empty(*x.q.shape[:2], max(heads, x.q.shape[2]), values)
    return o, record, kept


def backward(
    do: Optional, d_record: Optional, made: Tensor, kept: list[Tensor],
    q: Optional, k: Optional, v: Optional, record: Optional, query: Optional, logits: Optional, factors: Optional, seen: Optional,
    k_cos: Optional, k_sin: Optional, q_cos: Optional, q_sin: Optional, cu: Optional, values: int,
    q_map: str, k_map: str, averaged: bool, logit_scale: float, normalizer: str, mean: bool, scale: float, eps: float, halves: int,
    need: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The operator of its backward: the gradients of LEARNED, empty where `need` says so. `made` is the record of the forward."""
    x = _read((q, k, v, record, query, logits, factors, seen, k_cos, k_sin, q_cos, q_sin, cu))
    do = None if do is None else by_rows(do)
    run = plan(x, do, values, How(q_map, k_map, averaged, logit_scale, normalizer, mean, scale, eps, halves))
    needed = dict(zip(LEARNED, need))
    on = made if x.k is not None else record
    assert on is not None
    keys = any(needed[name] for name in ("k", "v", "query", "logits", "factors")) or (averaged and needed["q"])
    found: dict[str, Tensor | None] = {"record": d_record}
    sums = keys or needed["record"]
    # the mean of φ(q) has a gradient that comes last; and sums of two signs leave no registers for anything beside them
    apart = averaged or (sums and q_map in TWO_SIGNS)
    terms = run.empty(run.batch, run.q_tokens, run.heads, 2) if apart and needed["q"] else None
    if x.q is not None and do is not None and (sums or not averaged):
        found["q"], of_record = run.apply_back(x, do, on, None, terms, sums=sums, out=needed["q"] and not apart)
        found["record"] = of_record if d_record is None or of_record is None else d_record + of_record
    grads = found["record"]
    if x.k is not None and keys:
        assert grads is not None
        found |= run.gather_back(x, on, grads.contiguous(), kept[0] if averaged else query, kept[-1] if kept else None)
        of_query = found.get("query")
        if query is not None and of_query is not None:
            found["query"] = of_query.sum(2).unflatten(1, (query.shape[1], -1)).sum(2)
    if apart and needed["q"] and x.q is not None and do is not None:
        found["q"] = run.apply_back(x, do, on, found["query"] if averaged else None, terms, sums=False, out=True)[0]
    results = []
    for name, wanted, tensor in zip(LEARNED, need, x):
        grad = found.get(name)
        if not wanted or grad is None or tensor is None:
            results.append(run.empty(0))
        else:
            results.append((grad if name in ("record", "query") else reduce_heads(grad, tensor.shape[2])).to(tensor.dtype))
    return results


moments_backward_op = torch.library.custom_op("subquad::moments_backward", backward, mutates_args=())


@moments_backward_op.register_fake
def _(do: Any, d_record: Any, made: Any, kept: Any, *args: Any) -> list[Tensor]:
    return [made.new_empty(x.shape, dtype=x.dtype) if wanted else made.new_empty(0) for x, wanted in zip(args, args[-1])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, record, kept = output
    ctx.rest = inputs[len(Tensors._fields) :]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(record, *inputs[: len(Tensors._fields)], *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_record: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    made, *saved = ctx.saved_tensors
    count = len(Tensors._fields)
    x, kept = Tensors(*saved[:count]), list(saved[count:])
    need = [t is not None and wanted for t, wanted in zip(x[: len(LEARNED)], ctx.needs_input_grad)]
    do = None if x.q is None or do is None else do.to(x.q.dtype)
    if do is None and d_record is None:  # nothing was used of the result
        if x.q is None:
            d_record = torch.zeros_like(made)
        else:
            heads = x.record.shape[1] if x.record is not None else made.shape[1]
            do = x.q.new_zeros(*x.q.shape[:2], max(x.q.shape[2], heads), ctx.rest[0])
    run: Any = torch.ops.subquad.moments_backward if traced(made) else backward
    found = run(do, d_record, made, kept, *x, *ctx.rest, need)
    return (*(t if wanted else None for t, wanted in zip(found, need)), *[None] * (count - len(LEARNED) + len(ctx.rest)))


moments_op.register_autograd(_backward, setup_context=_setup)

_eager = eager("Moments", forward, _setup, _backward)


def moments(x: Tensors, values: int, how: How) -> tuple[Tensor, Tensor]:
    """o and the record, as a differentiable call or, while something traces, as an operator."""
    like = x.q if x.k is None else x.k
    assert like is not None
    run = torch.ops.subquad.moments if traced(like) else _eager
    o, record, *_ = run(*x, values, *how)
    return o, record


# ---- as `subquad.ops.moments` calls it ---------------------------------------------------------------------------


def tables(rotary: Rotary | None, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin ``[1 or B, N, D/2]`` of each pair of channels of `like`; half precision where that is finer than its own."""
    if rotary is None:
        return None, None
    if torch.compiler.is_compiling() or traced(like) or traced(rotary.cos):
        return _tables(rotary, like)
    inference = rotary.cos.is_inference() or torch.is_inference_mode_enabled()
    versions = () if rotary.cos.is_inference() else (rotary.cos._version, rotary.sin._version)
    key = like.shape[-1], like.dtype, like.device, inference, versions
    kept = rotary.__dict__.setdefault("_tables", {})  # one rotary serves many layers
    if key not in kept:
        kept[key] = _tables(rotary, like)
    found: tuple[Tensor, Tensor] = kept[key]
    return found


def _tables(rotary: Rotary, like: Tensor) -> tuple[Tensor, Tensor]:
    turned, pairs = rotary.cos.shape[-1] // 2, like.shape[-1] // 2
    made = []
    for x, other in ((rotary.cos, 1.0), (rotary.sin, 0.0)):
        x = x[..., ::2] if rotary.interleaved else x[..., :turned]
        x = x.detach().to(like.device, torch.float16 if like.dtype == torch.bfloat16 else torch.float32)
        x = torch.nn.functional.pad(x, (0, pairs - turned), value=other) if pairs > turned else x
        made.append((x if x.dim() == 3 else x[None]).contiguous())
    return made[0], made[1]


def halves(rotary: Rotary | None) -> int:
    return 0 if rotary is None or rotary.interleaved else rotary.cos.shape[-1]


def _extras(x: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """The optional tensors as the kernels read them."""
    x = dict(x)
    if x["seen"] is not None:
        x["seen"] = x["seen"].view(torch.uint8)
    if x["query"] is not None:
        x["query"] = x["query"].float().contiguous()
    if x["cu"] is not None:
        x["cu"] = x["cu"].to(like.device).contiguous()
    return x


@full_precision
def attend(q: Tensor, k: Tensor, v: Tensor, extras: dict[str, Any], q_rotary: Rotary | None, rotary: Rotary | None, how: Any) -> Tensor:
    """o ``[B, N, H, V]``."""
    k_cos, k_sin = tables(rotary, k)
    q_cos, q_sin = (k_cos, k_sin) if q_rotary is rotary else tables(q_rotary, q)
    x = Tensors(q=q, k=k, v=v, k_cos=k_cos, k_sin=k_sin, q_cos=q_cos, q_sin=q_sin, **_extras(extras, k))
    return moments(x, v.shape[3], How(**how, halves=halves(rotary)))[0]


@full_precision
def gather(k: Tensor, v: Tensor, extras: dict[str, Any], rotary: Rotary | None, k_map: str, logit_scale: float) -> Moments:
    """The moments, in which logit_max is a constant."""
    cos, sin = tables(rotary, k)
    x = Tensors(k=k, v=v, k_cos=cos, k_sin=sin, **_extras(extras, k))
    record = moments(x, v.shape[3], How(k_map=k_map, logit_scale=logit_scale, halves=halves(rotary)))[1]
    size = Sizes.of(k.shape[3], v.shape[3], k_map in TWO_SIGNS)
    M, z, total, weight, top, _ = record.split([size.F * size.V, size.F, size.V, 1, 1, size.L - size.END - 2], -1)
    return Moments(M.unflatten(-1, (size.F, size.V)), z, total, weight[..., 0], top[..., 0].detach(), rotated=rotary is not None)


@full_precision
def apply(q: Tensor, given: Moments, rotary: Rotary | None, cu_seqlens: Tensor | None, how: Any) -> Tensor:
    """o ``[B, N, H, V]``."""
    size = Sizes.of(q.shape[3], given.M.shape[-1], how["q_map"] in TWO_SIGNS)
    if given.M.shape[-2] != size.F:
        raise InputError("q", shape_of(q), f"channels whose features are those of the moments, {given.M.shape[-2]}")
    total = given.z.new_zeros(*given.z.shape[:2], size.V) if given.v_sum is None else given.v_sum
    pad = given.z.new_zeros(*given.z.shape[:2], size.L - size.END - 2)
    record = torch.cat([given.M.flatten(-2), given.z, total, given.weight[..., None], given.logit_max[..., None], pad], -1)
    cos, sin = tables(rotary, q)
    cu = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    x = Tensors(q=q, record=record, q_cos=cos, q_sin=sin, cu=cu)
    return moments(x, size.V, How(**how, halves=halves(rotary)))[0]
