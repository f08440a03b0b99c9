"""`window_step` by its Triton kernel, as a torch custom operator without a backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, cdiv, padded, traced
from subquad.ops.launch import INTERPRETED
from subquad.ops.launcher import launcher
from subquad.ops.window_step.kernels import window_step_kernel

ELEMENTS = 4096  # of a tile of the sums, of which there are two, and of a map: 16 numbers a thread of eight warps


def forward(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, far_k: Tensor | None, kept_k: Tensor, kept_v: Tensor, sums: Tensor,
    length: Tensor, w_q: Tensor, w_k: Tensor, factor: Tensor, sinks: int, affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, and the new keys, values and sums."""
    (heads, width, features), (batch, held, shared, columns) = w_q.shape, kept_v.shape
    pair = far_q is not None
    q, k, v, kept_k, kept_v = (by_rows(x) for x in (q, k, v, kept_k, kept_v))
    far_q, far_k = q if far_q is None else by_rows(far_q), k if far_k is None else by_rows(far_k)
    # the interpreter would cut bfloat16 off, not round it
    o = torch.empty(batch, 1, heads, columns, dtype=torch.float32 if INTERPRETED else v.dtype, device=v.device)
    new_k, new_v, new_sums = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (kept_k, kept_v, sums))
    tile = min(padded(columns), max(16, ELEMENTS // padded(features)))
    rows = min(padded(held), max(16, 2 * ELEMENTS // max(padded(width), tile)))
    run = launcher(
        window_step_kernel, H=heads, GROUP=heads // shared, WINDOW=held - sinks, SINKS=sinks, D=width, F=features, V=columns,
        BD=padded(width), BF=padded(features), BC=tile, BP=rows, BR=min(padded(width), max(16, ELEMENTS // padded(features))),
        PAIR=pair, AFFINE=affine, num_warps=8,
    )  # fmt: skip
    programs = batch * heads * cdiv(columns, tile)
    if programs:
        tensors = (
            q, far_q, k, far_k, v, kept_k, kept_v, sums, length, w_q.contiguous(), w_k.contiguous(), factor.contiguous(),
            o, new_k, new_v, new_sums,
        )  # fmt: skip
        steps = [stride for x in (q, far_q, k, far_k, v) for stride in x.stride()[::2]]
        steps += [stride for x in (kept_k, kept_v) for stride in x.stride()[:3]]
        run((programs, 1, 1), tensors, (*steps, *sums.stride(), *length.stride()), (width**-0.5,))
    return o.to(v.dtype), new_k, new_v, new_sums


step_op = torch.library.custom_op("subquad::window_step", forward, mutates_args=())


@step_op.register_fake
def _(
    q: Any, k: Any, v: Tensor, far_q: Any, far_k: Any, kept_k: Tensor, kept_v: Tensor, sums: Tensor,
    length: Any, w_q: Tensor, w_k: Any, factor: Any, sinks: int, affine: bool,
) -> Any:  # fmt: skip
    return v.new_empty(v.shape[0], 1, w_q.shape[0], v.shape[3]), *(x.new_empty(x.shape) for x in (kept_k, kept_v, sums))


def window_step(
    q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, far_k: Tensor | None, kept_k: Tensor, kept_v: Tensor, sums: Tensor,
    length: Tensor, w_q: Tensor, w_k: Tensor, factor: Tensor, sinks: int, affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `subquad.ops.window_step.window_step`."""
    run: Any = torch.ops.subquad.window_step if traced(v) else forward
    found: tuple[Tensor, Tensor, Tensor, Tensor] = run(q, k, v, far_q, far_k, kept_k, kept_v, sums, length, w_q, w_k, factor, sinks, affine)
    return found
