"""Learned softmax features by Triton kernels, as torch custom operators: [softmax(Wx), softmax(−Wx)] in one pass over x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import by_rows, cdiv, padded, reduce_heads, traced
from subquad.ops.features import kernels
from subquad.ops.launch import INTERPRETED, processors, remembered
from subquad.ops.launcher import Grid, Launcher, eager, launcher

WIDEST = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}  # channels and features of a map, which a program holds whole
ROWS = 64  # of a tile; eight warps share one of more than 64 channels or features


def serve(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels, where they serve x ``[B, N, Hx, D]``, have maps like weight ``[H, D, F]``."""
    return max(weight.shape[1:]) <= WIDEST.get(x.dtype, 0) and weight.dtype != torch.float64


class Plan(NamedTuple):
    """A launch, and into how many runs it cuts the rows of each head."""

    run: Launcher
    grid: Grid
    runs: int


@remembered
def _plan(
    back: bool, rows: int, kinds: tuple[torch.dtype, torch.dtype], x_heads: int, sizes: tuple[int, ...], device: torch.device, **what: bool
) -> Plan:  # fmt: skip
    heads, width, features = sizes
    wide = INTERPRETED or kinds[0] != torch.bfloat16
    large = max(padded(width), padded(features)) > 64
    runs = max(1, min(cdiv(rows, 2 * ROWS), cdiv((2 if large else 4) * processors(device), heads)))
    run = launcher(
        kernels.features_back_kernel if back else kernels.features_kernel,
        H=heads, R=heads // x_heads, D=width, F=features, BD=padded(width), BF=padded(features), C=ROWS,
        PARTS=1 if wide or kinds[1] == torch.bfloat16 else 3, WIDE=wide, IP="tf32x3" if wide else "tf32",
        num_warps=8 if large else 4, num_stages=2, **what,
    )  # fmt: skip
    return Plan(run, (heads * runs, 1, 1), runs)


def forward(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """f, and nothing beside it: operators with a state have one here."""
    x, weight = by_rows(x), weight.contiguous()
    heads, features = weight.shape[0], weight.shape[2]
    f = x.new_empty(*x.shape[:2], heads, 2 * features, dtype=dtype)
    rows = x.shape[0] * x.shape[1]
    if rows:
        plan = _plan(False, rows, (x.dtype, weight.dtype), x.shape[2], tuple(weight.shape), x.device)
        plan.run(plan.grid, (x, weight, f), x.stride()[:3], (x.shape[1], rows, plan.runs))
    return f, f.new_empty(0), []


def backward(g: Tensor, x: Tensor, weight: Tensor, f: Tensor, need: list[bool]) -> list[Tensor]:
    """The gradients of x and weight; empty where `need` says so."""
    g, x, weight = by_rows(g), by_rows(x), weight.contiguous()
    (heads, width, features), rows = weight.shape, x.shape[0] * x.shape[1]
    shared = heads > x.shape[2]
    wide = torch.float32 if shared else x.dtype
    dx = x.new_empty(*x.shape[:2], heads, width, dtype=wide) if need[0] else None
    dw = x.new_zeros(heads, 1, width, features, dtype=torch.float32) if need[1] else None
    if rows:
        what = {"DX": need[0], "DW": need[1]}
        plan = _plan(True, rows, (x.dtype, weight.dtype), x.shape[2], tuple(weight.shape), x.device, **what)
        dw = x.new_empty(heads, plan.runs, width, features, dtype=torch.float32) if need[1] else None
        tensors = (x, weight, f, g, *(f if t is None else t for t in (dx, dw)))
        plan.run(plan.grid, tensors, (*x.stride()[:3], *g.stride()[:3]), (x.shape[1], rows, plan.runs))
    empty = x.new_empty(0)
    of_x = empty if dx is None else reduce_heads(dx, x.shape[2]).to(x.dtype)
    return [of_x, empty if dw is None else dw.sum(1).to(weight.dtype)]


features_op = torch.library.custom_op("subquad::softmax_features", forward, mutates_args=())
features_backward_op = torch.library.custom_op("subquad::softmax_features_backward", backward, mutates_args=())


@features_op.register_fake
def _(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Any:
    f = x.new_empty(*x.shape[:2], weight.shape[0], 2 * weight.shape[2], dtype=dtype)
    return f, f.new_empty(0), []


@features_backward_op.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, f: Tensor, need: list[bool]) -> list[Tensor]:
    return [x.new_empty(t.shape, dtype=t.dtype) if wanted else x.new_empty(0) for t, wanted in zip((x, weight), need)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, _ = inputs
    f, nothing, _ = output
    ctx.mark_non_differentiable(nothing)
    ctx.save_for_backward(x, weight, f)


def _backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, f = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:2])
    run: Any = torch.ops.subquad.softmax_features_backward if traced(x) else backward
    return *(grad if wanted else None for grad, wanted in zip(run(g.to(f.dtype), x, weight, f, need), need)), None


features_op.register_autograd(_backward, setup_context=_setup)

_eager = eager("SoftmaxFeatures", forward, _setup, _backward)


def softmax_features(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[softmax(Wx), softmax(−Wx)], each at least 1e-12, computed in float32 and rounded to `dtype`.

    Args:
        x: ``[B, N, Hx, D]``.
        weight: ``[H, D, F]``; Hx divides H, and heads of x are shared by maps that follow each other.

    Returns:
        ``[B, N, H, 2F]``.
    """
    run = torch.ops.subquad.softmax_features if traced(x) else _eager
    f: Tensor = run(x, weight, dtype)[0]
    return f
