"""`sparse_attention` by the Triton kernels, as torch custom operators: traced, exported, captured and differentiated as one node."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch import Tensor

from subquad.ops.common import by_rows, reduce_heads, traced
from subquad.ops.launch import INTERPRETED
from subquad.ops.launcher import eager
from subquad.ops.sparse.bias import Bias, RelativeBias
from subquad.ops.sparse.codes import decode, encode, has_code
from subquad.ops.sparse.launch import How, Inputs, forward_pass, key_pass, query_pass, tiles_of
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.visits import Lists, Tiling, by_call, by_rule, on_grid

Optional = Tensor | None
LEAST = 16  # tokens along a side of a tile, at least
_captured: list[Lists] = []
LEARNED = ("q", "k", "v", "slopes", "key_bias", "q_factor", "k_factor")


def serves(layout: Layout, bias: Bias | None) -> bool:
    """Whether the kernels have this layout and this bias."""
    if layout.parts or not has_code(layout.inner):
        return False
    if layout.index is not None and (gcd(layout.block_q, 128) < LEAST or gcd(layout.block_k, 128) < LEAST):
        return False
    if isinstance(bias, RelativeBias):  # whose gradient is a sum along diagonals, which tiles cut
        return not (torch.is_grad_enabled() and bias.table.requires_grad)
    return bias is None or (isinstance(bias, Tensor) and bias.dim() == 1) or (isinstance(bias, tuple) and bias[0].shape[3] <= 64)


def _tiles(kernel: str, x: Inputs, layout: Layout) -> Tiling:
    """The tiles of a kernel: boxes of a grid where only the rule asks where tokens are."""
    held, boxes = layout.index is not None, not _moved(x, layout) and x.slopes is None and x.table is None and on_grid(layout.inner)
    sides = (layout.block_q, layout.block_k) if held else (0, 0)
    return tiles_of(kernel, layout.inner, max(x.q.shape[3], x.v.shape[3]), 8 * x.q.dtype.itemsize, boxes, *sides)


def _moved(x: Inputs, layout: Layout) -> bool:
    """Whether more than the rule and the sizes says what is visited."""
    return layout.index is not None or x.q_pos is not None or x.k_pos is not None


def _visits(kernel: str, x: Inputs, layout: Layout) -> tuple[Tiling, Lists]:
    """The tiles of a kernel, and what they visit."""
    tiles = _tiles(kernel, x, layout)
    if _moved(x, layout):
        return tiles, by_call(layout, tiles, x.q_pos, x.k_pos, x.sequence, x.q.device, kernel == "key")
    lists = by_rule(layout.inner, layout.n, layout.m, tiles, x.q.device, kernel == "key")
    if x.q.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph reads them again after the cache has let them go
        _captured.append(lists)
    return tiles, lists


@lru_cache(256)
def _by_rule(n: int, m: int, rule: tuple[int, ...], block_q: int, block_k: int) -> Layout:
    return Layout(n, m, decode(list(rule)), block_q, block_k)


def _read(
    q: Tensor, k: Tensor, v: Tensor, slopes: Optional, key_bias: Optional, q_factor: Optional, k_factor: Optional, table: Optional,
    q_pos: Optional, k_pos: Optional, cu: Optional, index: Optional, counts: Optional, bits: Optional, bit_index: Optional,
    starts: Optional, stops: Optional, rule: list[int], block_q: int, block_k: int, scale: float, softcap: float,
) -> tuple[Inputs, Layout, How]:  # fmt: skip
    """The operator's arguments as the kernels read them."""
    n, m, held = q.shape[1], k.shape[1], index is not None
    if not held and starts is None and cu is None and q_pos is None and k_pos is None:  # the common case, in less time
        layout, none = _by_rule(n, m, tuple(rule), block_q, block_k), (None,) * 6
        x = Inputs(by_rows(q), by_rows(k), by_rows(v), *none, slopes, key_bias, table, q_factor, k_factor)
        return x, layout, How(layout.inner, 0, 0, scale, softcap)
    layout = Layout(
        n, m, decode(rule), block_q, block_k, index, counts, bits=bits, bit_index=bit_index, starts=starts, stops=stops, dynamic=True
    )  # fmt: skip
    sequence = None
    if cu is not None:
        i = torch.arange(n, device=q.device)
        sequence = torch.bucketize(i, cu[1:].to(i), right=True)
        restarted = (i - cu.to(i)[sequence])[None]
        q_pos, k_pos = restarted if q_pos is None else q_pos, restarted if k_pos is None else k_pos
        sequence = sequence.int()
    rows = max(x.shape[0] for x in (starts, q_pos, k_pos) if x is not None) if starts is not None else 1
    starts, stops = (x if x is None else x.expand(rows, -1, -1, -1) for x in (starts, stops))  # lists are told apart where positions are
    starts, stops, q_pos, k_pos = (None if t is None else t.contiguous() for t in (starts, stops, q_pos, k_pos))
    given = by_rows(q), by_rows(k), by_rows(v)
    x = Inputs(*given, bits, starts, stops, q_pos, k_pos, sequence, slopes, key_bias, table, q_factor, k_factor)
    return x, layout, How(layout.inner, block_q if held else 0, block_k if held else 0, scale, softcap)


def forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Optional, key_bias: Optional, q_factor: Optional, k_factor: Optional, table: Optional,
    q_pos: Optional, k_pos: Optional, cu: Optional, index: Optional, counts: Optional, bits: Optional, bit_index: Optional,
    starts: Optional, stops: Optional, rule: list[int], block_q: int, block_k: int, scale: float, softcap: float, stats: bool, learns: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The operator: o ``[B, N, H, V]``, lse ``[B, N, H]`` and, for `stats`, the maximum (and if it `learns`, the key that has it).

    A bias is float32; softcap 0 is none.
    """
    rest: Any = (slopes, key_bias, q_factor, k_factor, table, q_pos, k_pos, cu, index, counts, bits, bit_index, starts, stops, rule)
    if INTERPRETED and q.dtype == torch.bfloat16:
        o, lse, kept = forward(q.float(), k.float(), v.float(), *rest, block_q, block_k, scale, softcap, stats, learns)  # type: ignore[call-arg]
        return o.to(q.dtype), lse, kept
    x, layout, how = _read(q, k, v, *rest, block_q, block_k, scale, softcap)  # type: ignore[call-arg]
    o, lse, top, arg = forward_pass(x, how, *_visits("forward", x, layout), stats, learns)
    return o, lse, [t for t in (top, arg) if t is not None]


sparse_op = torch.library.custom_op("subquad::sparse_attention", forward, mutates_args=())


@sparse_op.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    stats, learns = rest[-2:]
    shape = (*q.shape[:2], max(q.shape[2], k.shape[2], v.shape[2]))
    lse = q.new_empty(shape, dtype=torch.float32)
    kept = [torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)][: 0 if not stats else 1 + learns]
    return q.new_empty(*shape, v.shape[3]), lse, kept


def backward(
    do: Tensor, d_lse: Optional, d_top: Optional, o: Tensor, lse: Tensor, arg: Optional,
    q: Tensor, k: Tensor, v: Tensor, slopes: Optional, key_bias: Optional, q_factor: Optional, k_factor: Optional, table: Optional,
    q_pos: Optional, k_pos: Optional, cu: Optional, index: Optional, counts: Optional, bits: Optional, bit_index: Optional,
    starts: Optional, stops: Optional, rule: list[int], block_q: int, block_k: int, scale: float, softcap: float, need: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The operator of its backward: the gradients of LEARNED, empty where `need` says so."""
    rest: Any = (slopes, key_bias, q_factor, k_factor, table, q_pos, k_pos, cu, index, counts, bits, bit_index, starts, stops, rule)
    if INTERPRETED and q.dtype == torch.bfloat16:
        grads = (do.float(), d_lse, d_top, o.float(), lse, arg, q.float(), k.float(), v.float())
        results = backward(*grads, *rest, block_q, block_k, scale, softcap, need)  # type: ignore[call-arg]
        return [t.to(q.dtype) if i < 3 else t for i, t in enumerate(results)]
    x, layout, how = _read(q, k, v, *rest, block_q, block_k, scale, softcap)  # type: ignore[call-arg]
    do, d_lse, d_top = by_rows(do), *(t if t is None else t.contiguous() for t in (d_lse, d_top))
    order = _tiles("key", x, layout)
    found, rows = query_pass(x, how, *_visits("query", x, layout), order, o, lse, arg, do, d_lse, d_top)
    needed = dict(zip(LEARNED, need))
    if any(needed[name] for name in ("k", "v", "key_bias", "k_factor")):
        found |= key_pass(x, how, *_visits("key", x, layout), do, rows)
    if slopes is not None:
        found["slopes"] = found["slopes"].sum((0, 2))
    results = []
    for name, wanted in needed.items():
        like = getattr(x, name)
        if not wanted or like is None:
            results.append(q.new_empty(0, dtype=q.dtype if name in ("q", "k", "v") else torch.float32))
        elif name in ("q", "k", "v"):
            results.append(reduce_heads(found[name], like.shape[2]))
        else:
            results.append(found[name].sum_to_size(like.shape))
    return results


sparse_backward_op = torch.library.custom_op("subquad::sparse_attention_backward", backward, mutates_args=())


@sparse_backward_op.register_fake
def _(do: Any, d_lse: Any, d_top: Any, o: Any, lse: Any, arg: Any, *rest: Any) -> list[Tensor]:
    some = zip(rest[: len(LEARNED)], rest[-1])
    return [x.new_empty(x.shape) if wanted and x is not None else (lse if x is None else x).new_empty(0) for x, wanted in some]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    o, lse, kept = output
    ctx.tensors = len(inputs) - 7
    ctx.rest = inputs[ctx.tensors : -2]
    arg = kept[1] if len(kept) > 1 else None
    ctx.mark_non_differentiable(*kept[0 if arg is None else 1 :])
    ctx.save_for_backward(o, lse, arg, *inputs[: ctx.tensors])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_lse: Tensor | None, *d_kept: Any) -> tuple[Tensor | None, ...]:
    o, lse, arg, *tensors = ctx.saved_tensors
    need = [x is not None and wanted for x, wanted in zip(tensors[: len(LEARNED)], ctx.needs_input_grad)]
    do = torch.zeros_like(o) if do is None else do.to(o.dtype)
    d_top = d_kept[0] if d_kept and arg is not None else None
    d_top = d_top[0] if isinstance(d_top, list | tuple) else d_top  # an operator's list
    run: Any = torch.ops.subquad.sparse_attention_backward if traced(o) else backward
    found = run(do, d_lse, d_top, o, lse, arg, *tensors, *ctx.rest, need)
    rest = [None] * (len(tensors) - len(LEARNED) + len(ctx.rest) + 2)
    return (*(x if wanted else None for x, wanted in zip(found, need)), *rest)


sparse_op.register_autograd(_backward, setup_context=_setup)

_eager = eager("SparseAttention", forward, _setup, _backward)
encoded = lru_cache(256)(encode)


def forward_by_rule(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and the maximum, for a layout that is a rule, where there are no gradients, biases and positions, and nothing traces."""
    absent = (None,) * 14  # slopes … stops
    given: Any = (q, k, v, *absent, encoded(layout.inner), layout.block_q, layout.block_k, q.shape[3] ** -0.5, 0.0, True, False)
    o, lse, (top,) = forward(*given)
    return o, lse, top


def sparse_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, bias: Bias | None, key_bias: Tensor | None, q_pos: Tensor | None,
    k_pos: Tensor | None, scale: float, softcap: float | None, cu_seqlens: Tensor | None, stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(o ``[B, N, H, V]``, lse and, for `stats`, max ``[B, N, H]``), all differentiable; the maximum's gradient goes to one of equals."""
    slopes, q_factor, k_factor, table = None, None, None, None
    if isinstance(bias, tuple):
        q_factor, k_factor = (by_rows(x.float()) for x in bias)
    elif isinstance(bias, RelativeBias):
        table = bias.table.detach().float().contiguous()
    elif isinstance(bias, Tensor):
        slopes = bias.float().contiguous()
    key_bias = None if key_bias is None else by_rows(key_bias.float())
    q_pos, k_pos = (x if x is None or x.dim() == 2 else x[None] for x in (q_pos, k_pos))
    given = (q, k, v, slopes, key_bias, q_factor, k_factor)
    learns = stats and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    run: Any
    run, code = (torch.ops.subquad.sparse_attention, encode) if traced(q) else (_eager, encoded)
    o, lse, *kept = run(
        *given, table, q_pos, k_pos, cu_seqlens, layout.index, layout.counts, layout.bits, layout.bit_index, layout.starts, layout.stops,
        code(layout.inner), layout.block_q, layout.block_k, float(scale), float(softcap or 0), stats, learns,
    )  # fmt: skip
    kept = kept[0] if kept and isinstance(kept[0], list) else kept
    return o, lse, kept[0] if kept else None


__all__ = ["serves", "sparse_attention_fused"]
