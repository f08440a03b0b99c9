"""`merge_sums` by Triton kernels, as torch custom operators."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, cdiv, full_precision, padded, traced
from subquad.ops.launcher import Launcher, eager, launcher
from subquad.ops.merge import kernels

ELEMENTS = 2048  # of a tile, four warps of four numbers a thread and load


@cache
def _plan(back: bool, heads: int, width: int, affine: bool) -> tuple[Launcher, int]:
    """The launcher, and the rows of a program."""
    tile, kernel = max(1, ELEMENTS // padded(width)), kernels.sums_back_kernel if back else kernels.sums_kernel
    return launcher(kernel, H=heads, V=width, BV=padded(width), R=tile, AFFINE=affine, num_warps=4), tile


def _launch(back: bool, o: Tensor, far: Tensor, affine: bool, tensors: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> None:
    batch, n, heads, width = o.shape
    run, tile = _plan(back, heads, width, affine)
    strides = tuple([stride for x in read for stride in x.stride()[:3]])
    rows = batch * n * heads
    if rows:
        run((cdiv(rows, tile), 1, 1), tensors, strides, (n, far.shape[1], rows))


def forward(
    o: Tensor, lse: Tensor, top: Tensor, far: Tensor, mass: Tensor, factor: Tensor, affine: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The output, and nothing beside it: operators with a state have one here."""
    o, far = by_rows(o), by_rows(far)
    out = torch.empty(o.shape, dtype=dtype, device=o.device)
    _launch(False, o, far, affine, (o, lse, top, far, mass, factor, out), (o, lse, top, far, mass))
    return out, out.new_empty(0), []


def backward(
    do: Tensor, o: Tensor, lse: Tensor, top: Tensor, far: Tensor, mass: Tensor, factor: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of o, lse (top has the opposite), far, mass and factor."""
    o, far, do = by_rows(o), by_rows(far), by_rows(do)
    of_o, of_far = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, far))
    of_lse, of_weight = (torch.empty(o.shape[:3], dtype=torch.float32, device=o.device) for _ in range(2))
    of_mass = torch.empty(far.shape[:3], dtype=torch.float32, device=o.device)
    tensors = (o, lse, top, far, mass, factor, do, of_o, of_lse, of_far, of_mass, of_weight)
    _launch(True, o, far, affine, tensors, (o, lse, top, far, mass, do))
    g = factor.float().sigmoid()
    of_factor = of_lse.sum((0, 1)) * (1 - g)  # lse stands beside log g
    if affine:
        of_factor -= of_weight.sum((0, 1)) * (g * (1 - g))
    return of_o, of_lse, of_far, of_mass, of_factor.to(factor.dtype)


sums_op = torch.library.custom_op("subquad::merge_sums", forward, mutates_args=())
sums_backward_op = torch.library.custom_op("subquad::merge_sums_backward", backward, mutates_args=())


@sums_op.register_fake
def _(o: Tensor, lse: Any, top: Any, far: Any, mass: Any, factor: Any, affine: bool, dtype: torch.dtype) -> Any:
    out = o.new_empty(o.shape, dtype=dtype)
    return out, out.new_empty(0), []


@sums_backward_op.register_fake
def _(do: Any, o: Tensor, lse: Tensor, top: Any, far: Tensor, mass: Tensor, factor: Tensor, affine: bool) -> Any:
    return tuple(x.new_empty(x.shape) for x in (o, lse, far, mass, factor))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.affine = inputs[6]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    run: Any = torch.ops.subquad.merge_sums_backward if traced(saved[0]) else backward
    of_o, of_lse, of_far, of_mass, of_factor = run(do, *saved, ctx.affine)
    found = of_o, of_lse, -of_lse if ctx.needs_input_grad[2] else None, of_far, of_mass, of_factor
    return *(grad if wanted else None for grad, wanted in zip(found, ctx.needs_input_grad)), None, None


sums_op.register_autograd(_backward, setup_context=_setup)

_eager = eager("MergeSums", forward, _setup, _backward)


@full_precision
def merge_sums(
    o: Tensor, lse: Tensor, top: Tensor, far: Tensor, mass: Tensor, factor: Tensor, affine: bool, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """As `subquad.ops.merge.merge_sums`, of float32 statistics; mass is ``[B, M, H]``."""
    run = torch.ops.subquad.merge_sums if traced(far) else _eager
    out: Tensor = run(o, lse, top, far, mass, factor.contiguous(), affine, dtype)[0]
    return out
