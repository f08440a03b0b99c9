"""Rotary embedding by one Triton kernel, as a torch custom operator: x is read once, and written once, turned."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, cdiv, power_of_two, traced, transformed
from subquad.ops.launch import INTERPRETED
from subquad.ops.launcher import Launcher, launcher, prepared
from subquad.ops.rotary.kernels import rotary_kernel

ELEMENTS = 2048  # of a tile, four warps of two loads of eight 16-bit numbers a thread
HEADS = 4  # of a program, for which it loads the angles once


@cache
def _plan(width: int, turned: int, interleaved: bool, transpose: bool) -> tuple[Launcher, int]:
    """The launcher, and the tokens of a program."""
    half, rest = turned // 2, width - turned
    tokens = max(1, ELEMENTS // power_of_two(width))
    run = launcher(
        rotary_kernel, D=width, HALF=half, BH=power_of_two(half), BR=power_of_two(rest) if rest else 0, T=tokens, G=HEADS,
        ADJACENT=interleaved, TRANSPOSE=transpose, num_warps=4,
    )  # fmt: skip
    return run, tokens


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool) -> Tensor:
    """x turned, contiguous; with `transpose` by the transposed matrix, which is that of the gradient.

    Args:
        x: ``[B, N, H, D]`` in float16, bfloat16 or float32; computed in float32.
        cos, sin: ``[N, R]``, ``[1, N, R]`` or ``[B, N, R]``, R even and from 2 to D.
    """
    x, cos, sin = by_rows(x), by_rows(cos), by_rows(sin)
    batch, n, heads, width = x.shape
    # the interpreter would cut bfloat16 off, not round it
    out = torch.empty(x.shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if out.numel():
        run, tokens = _plan(width, cos.shape[-1], interleaved, transpose)
        strides = (*x.stride()[:3], *_steps(cos), *_steps(sin))
        run((cdiv(batch * n, tokens) * cdiv(heads, HEADS), 1, 1), (x, cos, sin, out), strides, (n, heads, batch * n))
    return out.to(x.dtype) if INTERPRETED else out


def _steps(table: Tensor) -> tuple[int, int]:
    """The strides of sequences and of tokens."""
    return (0 if table.dim() == 2 or table.shape[0] == 1 else table.stride(0)), table.stride(-2)


rotary_op = torch.library.custom_op("subquad::rotary", forward, mutates_args=())


@rotary_op.register_fake
def _(x: Tensor, cos: Any, sin: Any, interleaved: bool, transpose: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.transpose = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """By the same call, so that it has a gradient itself; in plain torch for a whole batch of gradients."""
    cos, sin = ctx.saved_tensors
    run = _plain if transformed() else turn
    return run(g, cos, sin, ctx.interleaved, not ctx.transpose), None, None, None, None


rotary_op.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The operator without the dispatch of operators, for calls that nothing traces."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, cos, sin, interleaved, _ = inputs
        found = prepared(lambda: forward(*inputs), lambda: [forward(x, cos, sin, interleaved, way) for way in (False, True)])
        _setup(ctx, inputs, found)
        return found

    backward = staticmethod(_backward)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool = False) -> Tensor:
    """As `forward`, with the gradient of x alone."""
    if traced(x):
        found: Tensor = torch.ops.subquad.rotary(x, cos, sin, interleaved, transpose)
        return found
    if x.requires_grad and torch.is_grad_enabled():
        return _Eager.apply(x, cos, sin, interleaved, transpose)  # type: ignore[no-any-return, no-untyped-call]
    return forward(x, cos, sin, interleaved, transpose)


def _plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool) -> Tensor:
    from subquad.rotary import Rotary  # which imports this room

    if transpose:  # the sines of a pair change places and sign
        pairs, inner = ((-1, 2), -1) if interleaved else ((2, -1), -2)
        sin = -sin.unflatten(-1, pairs).flip(inner).flatten(-2)
    return Rotary(cos, sin, interleaved).apply(x)
