"""Layouts made of layouts, one for each share of the heads or for each row of the batch: their attention, part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subquad.ops.sparse.bias import Bias, RelativeBias
from subquad.ops.sparse.layout import Layout

Cut = Callable[[Tensor, int], Tensor]


def by_parts(
    attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, layout: Layout, heads: int,
    *, bias: Bias | None, key_bias: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None, **options: Any,
) -> Any:  # fmt: skip
    """`attend` on each part of a layout that has parts; outputs are put together again."""
    count, dim = len(layout.parts), 2 if layout.parts_of == "heads" else 0
    outputs = []
    for number, part in enumerate(layout.parts):
        if dim == 2:
            x = [heads_of(y, 2, number, count, heads) for y in (q, k, v)]
            some = _biases(bias, key_bias, lambda t, d: t if t.shape[d] == 1 else heads_of(t, d, number, count, heads), None)  # noqa: B023
            positions = [q_pos, k_pos]
        else:
            x = [y[number : number + 1] for y in (q, k, v)]
            some = _biases(bias, key_bias, None, lambda t, d: t if t.shape[d] == 1 else t.narrow(d, number, 1))  # noqa: B023
            positions = [p[number : number + 1] if p is not None and p.dim() == 2 and p.shape[0] > 1 else p for p in (q_pos, k_pos)]
        outputs.append(attend(*x, part, bias=some[0], key_bias=some[1], q_pos=positions[0], k_pos=positions[1], **options))
    if isinstance(outputs[0], tuple):
        return tuple(torch.cat(each, dim) for each in zip(*outputs))
    return torch.cat(outputs, dim)


def heads_of(x: Tensor, dim: int, number: int, count: int, heads: int) -> Tensor:
    """The heads of part `number` of `count`, along `dim`; shared heads are shared on."""
    own = x.shape[dim]
    if own % count and count % own:
        x, own = x.repeat_interleave(heads // own, dim), heads
    return x.narrow(dim, number * own // count, max(1, own // count))


def _biases(bias: Bias | None, key_bias: Tensor | None, heads: Cut | None, rows: Cut | None) -> tuple[Bias | None, Tensor | None]:
    """The part of the biases: `heads` or `rows` cuts a tensor along its dimension of heads or of batch rows."""

    def cut(x: Tensor, head_dim: int | None, row_dim: int | None) -> Tensor:
        if heads is not None:
            return x if head_dim is None else heads(x, head_dim)
        return x if rows is None or row_dim is None else rows(x, row_dim)

    key_bias = None if key_bias is None else cut(key_bias, 1, 0)
    if isinstance(bias, tuple):
        return (cut(bias[0], 2, 0), cut(bias[1], 2, 0)), key_bias
    if isinstance(bias, RelativeBias):
        return RelativeBias(cut(bias.table, 0, None)), key_bias
    if isinstance(bias, Tensor):
        head_dim, row_dim = {1: (0, None), 2: (None, None), 3: (0, None), 4: (1, 0)}[bias.dim()]
        return cut(bias, head_dim, row_dim), key_bias
    return bias, key_bias
