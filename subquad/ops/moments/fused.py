"""Moment attention by the Triton kernels, as torch custom operators: gathering, applying, or both in one node.

    both      mean_kernel (RALA) → gather_kernel → combine_kernel → apply_kernel
    backward  apply_back_kernel → combine_kernel → gather_back_kernel (→ apply_back_kernel again, where the mean of φ(q) was used)

A record is what `kernels.py` says: the moments of a row and head, side by side, ``[rows, heads, L]``.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.common import cdiv, full_precision, padded, reduce_heads, traced
from subquad.ops.launch import INTERPRETED, bits_of, config, processors
from subquad.ops.launcher import eager, launcher
from subquad.ops.linear.launch import by_rows
from subquad.ops.moments import blocks, kernels
from subquad.ops.moments.moments import Moments
from subquad.rotary import Rotary

MAPS = {name: getattr(blocks, name.upper()) for name in ("identity", "elu1", "relu", "exp", "silu", "sign_cube", "norm_power")}
TWO_SIGNS = "sign_cube", "norm_power"
NORMALS = {name: getattr(blocks, name.upper()) for name in ("divide", "floored", "magnitude", "subtract", "none")}


class How(NamedTuple):
    """What an operator is told besides its tensors.

    averaged: the global query is the mean of φ(q). mean: sums are divided by the weight. halves: the channels that turn in pairs
    (i, i + halves/2), 0 if pairs are adjacent. eps: with "floored" the floor.
    """

    q_map: str = "identity"
    k_map: str = "identity"
    averaged: bool = False
    logit_scale: float = 1.0
    normalizer: str = "none"
    mean: bool = True
    scale: float = 1.0
    eps: float = 0.0
    halves: int = 0


class Sizes(NamedTuple):
    """Widths: features, values, a record; padded: channels, features, values; and the place of the weight in a record."""

    D: int
    V: int
    F: int
    L: int
    BD: int
    BF: int
    BV: int
    END: int


@cache
def sizes(width: int, values: int, two_signs: bool) -> Sizes:
    copies = 2 if two_signs else 1
    features = copies * width
    end = features * values + features + values
    return Sizes(width, values, features, cdiv(end + 2, 16) * 16, padded(width), copies * padded(width), padded(values), end)


@cache
def plan(kernel: str, size: Sizes, dtype: torch.dtype, programs: int, tokens: int, device: torch.device) -> tuple[int, dict[str, int], int]:
    """Tokens of a tile, options of the launch, and into how many runs to cut each row and head."""
    row = config(kernel, max(size.BF, size.BV), bits_of(dtype), "none", False)
    per = 4 if row.warps <= 4 else 2
    runs = max(1, min(per * processors(device) // max(1, programs), cdiv(tokens, 2 * row.columns)))
    return row.columns, {"num_warps": row.warps, "num_stages": row.stages}, runs


def rows_of(x: Tensor, cu: Tensor | None) -> int:
    return x.shape[0] if cu is None else cu.shape[0] - 1


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


class Call:
    """One call's tensors, heads and constants, shared by its launches."""

    def __init__(self, x: dict[str, Tensor | None], how: How) -> None:
        self.x, self.how = x, how
        self.q, self.k, self.v = (None if t is None else by_rows(t) for t in (x["q"], x["k"], x["v"]))
        self.cu = x["cu"]
        like = self.k if self.k is not None else self.q
        assert like is not None
        self.like = like
        self.tokens, self.width = like.shape[1], like.shape[3]
        record = x["record"]
        if self.k is not None and self.v is not None:
            counts = [t.shape[2] for t in (self.k, self.v, x["logits"], x["factors"]) if t is not None]
            counts += [x["query"].shape[1]] if x["query"] is not None else []
            counts += [self.q.shape[2]] if how.averaged and self.q is not None else []
            self.key_heads, values = max(counts), self.v.shape[3]
        else:
            assert record is not None
            self.key_heads = record.shape[1]
            values = int(x["values"])  # type: ignore[arg-type]
        self.heads = max(self.key_heads, self.q.shape[2] if self.q is not None else 0)
        self.size = sizes(self.width, values, (how.k_map if self.k is not None else how.q_map) in TWO_SIGNS)
        self.rows = rows_of(like, self.cu)
        wide = INTERPRETED or like.dtype != torch.bfloat16
        self.same = {
            "D": self.width, "BD": self.size.BD, "BF": self.size.BF, "HALVES": how.halves, "PACKED": self.cu is not None,
        }  # fmt: skip
        self.both = {"V": values, "BV": self.size.BV, "L": self.size.L, "WIDE": wide, "IP": "tf32x3" if wide else "tf32", **self.same}

    def plan(self, kernel: str, heads: int, tokens: int) -> tuple[int, dict[str, int], int]:
        per_row = tokens if self.cu is None else cdiv(tokens, self.rows)
        return plan(kernel, self.size, self.like.dtype, self.rows * heads, per_row, self.like.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.like.device)

    def or_like(self, x: Tensor | None) -> Tensor:
        return self.like if x is None else x

    # ---- launches ----

    def mean(self) -> Tensor:
        """Shares of the mean of φ(q): ``[rows, heads of q, runs, F]``."""
        assert self.q is not None
        heads, tokens = self.q.shape[2], self.q.shape[1]
        C, options, runs = self.plan("gather", heads, tokens)
        sums = self.empty(self.rows, heads, runs, self.size.F)
        run = launcher(kernels.mean_kernel, H=heads, C=C, MAP=MAPS[self.how.q_map].value, **self.same, **options)
        run((self.rows * heads * runs, 1, 1), (self.q, sums, self.cu_or), self.q.stride()[:3], (tokens, runs))
        return sums

    @property
    def cu_or(self) -> Tensor:
        return self.or_like(self.cu)

    def _keys(self, queries: Tensor | None) -> tuple[dict[str, Any], tuple[Tensor, ...], tuple[int, ...]]:
        """Constants, tensors and strides that both kernels over keys take."""
        assert self.k is not None and self.v is not None
        x, H = self.x, self.key_heads
        logits, factors, seen, cos, sin = x["logits"], x["factors"], x["seen"], x["k_cos"], x["k_sin"]
        constants = {
            "H": H, "GK": H // self.k.shape[2], "GV": H // self.v.shape[2],
            "GG": 1 if queries is None else H // queries.shape[1],
            "GL": 1 if logits is None else H // logits.shape[2], "GF": 1 if factors is None else H // factors.shape[2],
            "MAP": MAPS[self.how.k_map].value, "TURN": cos is not None, "QUERY": queries is not None, "LOGITS": logits is not None,
            "FACTORS": factors is not None, "MASK": seen is not None, **self.both,
        }  # fmt: skip
        tensors = (self.k, self.v, *(self.or_like(t) for t in (queries, logits, factors, seen, cos, sin, self.cu)))
        turned = 0 if cos is None or cos.shape[0] == 1 else cos.stride(0)
        strides = (
            *self.k.stride()[:3], *self.v.stride()[:3], *_strides(logits, 3), *_strides(factors, 3), *_strides(seen, 2), turned
        )  # fmt: skip
        return constants, tensors, strides

    def gather(self, queries: Tensor | None) -> Tensor:
        """The record ``[rows, key heads, L]``."""
        constants, tensors, strides = self._keys(queries)
        C, options, runs = self.plan("gather", self.key_heads, self.tokens)
        parts = self.empty(self.rows, self.key_heads, runs, self.size.L)
        parts_of_query = 1 if queries is None else queries.shape[2]
        launcher(kernels.gather_kernel, C=C, **constants, **options)(
            (self.rows * self.key_heads * runs, 1, 1), (*tensors, parts), strides, (self.tokens, runs, parts_of_query, self.how.logit_scale)
        )
        return parts[:, :, 0] if runs == 1 else self.combine(parts, runs, None)

    def combine(self, parts: Tensor, runs: int, given: Tensor | None) -> Tensor:
        """Records, or gradients of the record `given`, of all runs as one."""
        record = self.empty(self.rows, self.key_heads, self.size.L)
        block = 1024
        run = launcher(
            kernels.combine_kernel, L=self.size.L, END=self.size.END, BLOCK=block, GRAD=given is not None, MEAN=self.how.mean, num_warps=4
        )
        run((self.rows * self.key_heads, cdiv(self.size.L, block), 1), (parts, record, self.or_like(given)), (), (runs,))
        return record

    def _queries(self) -> tuple[dict[str, Any], int, tuple[Any, ...]]:
        """Constants, the stride of a row's angles, and the angles, that both kernels over queries take."""
        assert self.q is not None
        cos, sin = self.x["q_cos"], self.x["q_sin"]
        constants = {
            "H": self.heads, "GQ": self.heads // self.q.shape[2], "GM": self.heads // self.key_heads,
            "MAP": MAPS[self.how.q_map].value, "TURN": cos is not None, "NORMAL": NORMALS[self.how.normalizer].value,
            "MEAN": self.how.mean, **self.both,
        }  # fmt: skip
        return constants, 0 if cos is None or cos.shape[0] == 1 else cos.stride(0), (self.or_like(cos), self.or_like(sin), self.cu_or)

    def apply(self, record: Tensor) -> Tensor:
        """o ``[B, N, H, V]``."""
        assert self.q is not None
        constants, turned, angles = self._queries()
        C, options, runs = self.plan("apply", self.heads, self.q.shape[1])
        o = self.empty(*self.q.shape[:2], self.heads, self.size.V, dtype=self.q.dtype)
        launcher(kernels.apply_kernel, C=C, **constants, **options)(
            (self.rows * self.heads * runs, 1, 1), (self.q, record, *angles, o), (*self.q.stride()[:3], turned),
            (self.q.shape[1], runs, self.how.scale, self.how.eps),
        )  # fmt: skip
        return o

    def apply_back(self, do: Tensor, record: Tensor, more: Tensor | None, *, sums: bool, out: bool) -> tuple[Tensor | None, Tensor | None]:
        """q's gradient ``[B, N, H, D]`` and the record's ``[rows, key heads, L]``, those of them that are asked for."""
        assert self.q is not None
        constants, turned, angles = self._queries()
        C, options, runs = self.plan("apply_back", self.heads, self.q.shape[1])
        dq = self.empty(*self.q.shape[:2], self.heads, self.width, dtype=self.q.dtype) if out else None
        grads = self.empty(self.rows, self.heads, runs, self.size.L) if sums else None
        run = launcher(kernels.apply_back_kernel, C=C, SUMS=sums, OUT=out, MORE=more is not None, **constants, **options)
        run(
            (self.rows * self.heads * runs, 1, 1), (self.q, do, record, self.or_like(more), *angles, self.or_like(dq), self.or_like(grads)),
            (*self.q.stride()[:3], *do.stride()[:3], turned),
            (self.q.shape[1], runs, 1 if more is None else more.shape[2], self.how.scale, self.how.eps),
        )  # fmt: skip
        return dq, None if grads is None else self.combine(grads, runs * (self.heads // self.key_heads), record)

    def gather_back(self, record: Tensor, grads: Tensor, queries: Tensor | None) -> dict[str, Tensor]:
        """Gradients per key head: k, v, and of queries ``[rows, key heads, runs, F]``, logits and factors where there are any."""
        constants, tensors, strides = self._keys(queries)
        C, options, runs = self.plan("gather_back", self.key_heads, self.tokens)
        lead = (*self.like.shape[:2], self.key_heads)
        found = {"k": self.empty(*lead, self.width, dtype=self.like.dtype), "v": self.empty(*lead, self.size.V, dtype=self.like.dtype)}
        if queries is not None:
            found["query"] = self.empty(self.rows, self.key_heads, runs, self.size.F)
        found |= {name: self.empty(*lead) for name in ("logits", "factors") if self.x[name] is not None}
        outputs = (found["k"], found["v"], *(self.or_like(found.get(name)) for name in ("query", "logits", "factors")))
        launcher(kernels.gather_back_kernel, C=C, **constants, **options)(
            (self.rows * self.key_heads * runs, 1, 1), (*tensors, record, grads, *outputs), strides,
            (self.tokens, runs, 1 if queries is None else queries.shape[2], self.how.logit_scale),
        )  # fmt: skip
        return found


NAMES = "q", "k", "v", "record", "query", "logits", "factors", "seen", "k_cos", "k_sin", "q_cos", "q_sin", "cu"
LEARNED = NAMES[:7]
Optional = Tensor | None  # in signatures of operators


def _call(tensors: tuple[Any, ...], values: int, how: tuple[Any, ...]) -> Call:
    return Call({**dict(zip(NAMES, tensors)), "values": values}, How(*how))  # type: ignore[dict-item]


def forward(
    q: Optional, k: Optional, v: Optional, record: Optional, query: Optional, logits: Optional, factors: Optional, seen: Optional,
    k_cos: Optional, k_sin: Optional, q_cos: Optional, q_sin: Optional, cu: Optional, values: int,
    q_map: str, k_map: str, averaged: bool, logit_scale: float, normalizer: str, mean: bool, scale: float, eps: float, halves: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """o ``[B, N, H, V]`` (empty without q), the record (empty without k), and what the backward reads again."""
    tensors = (q, k, v, record, query, logits, factors, seen, k_cos, k_sin, q_cos, q_sin, cu)
    call = _call(tensors, values, (q_map, k_map, averaged, logit_scale, normalizer, mean, scale, eps, halves))
    empty = call.like.new_empty(0, dtype=torch.float32)
    kept: list[Tensor] = []
    if k is not None:
        if averaged:
            kept = [call.mean()]
        record = call.gather(kept[0] if averaged else None if query is None else query[:, :, None])
    assert record is not None
    o = empty if q is None else call.apply(record)
    return o, empty if k is None else record, kept


moments_op = torch.library.custom_op("subquad::moments", forward, mutates_args=())


@moments_op.register_fake
def _(*args: Any) -> Any:
    call = _call(args[:13], args[13], args[14:])
    empty = call.like.new_empty(0, dtype=torch.float32)
    o, record, kept = empty, empty, []
    if call.q is not None:
        o = call.empty(*call.q.shape[:2], call.heads, call.size.V, dtype=call.q.dtype)
    if call.k is not None:
        record = call.empty(call.rows, call.key_heads, call.size.L)
        if call.how.averaged and call.q is not None:
            heads = call.q.shape[2]
            kept = [call.empty(call.rows, heads, call.plan("gather", heads, call.q.shape[1])[2], call.size.F)]
    return o, record, kept


def backward(
    do: Optional, d_record: Optional, made: Tensor, kept: list[Tensor],
    q: Optional, k: Optional, v: Optional, record: Optional, query: Optional, logits: Optional, factors: Optional, seen: Optional,
    k_cos: Optional, k_sin: Optional, q_cos: Optional, q_sin: Optional, cu: Optional, values: int,
    q_map: str, k_map: str, averaged: bool, logit_scale: float, normalizer: str, mean: bool, scale: float, eps: float, halves: int,
    need: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The operator of its backward: the gradients of LEARNED, empty where `need` says so. `made` is the record of the forward."""
    tensors = (q, k, v, record, query, logits, factors, seen, k_cos, k_sin, q_cos, q_sin, cu)
    call = _call(tensors, values, (q_map, k_map, averaged, logit_scale, normalizer, mean, scale, eps, halves))
    needed = dict(zip(LEARNED, need))
    found: dict[str, Tensor | None] = {}
    on = made if k is not None else record
    assert on is not None
    keys = any(needed[name] for name in ("k", "v", "query", "logits", "factors")) or (averaged and needed["q"])
    grads = d_record
    if q is not None and do is not None:
        do = by_rows(do)
        found["q"], of_record = call.apply_back(do, on, None, sums=keys or needed["record"], out=needed["q"] and not averaged)
        grads = of_record if grads is None or of_record is None else grads + of_record
    if k is not None and keys:
        queries = kept[0] if averaged else None if query is None else query[:, :, None]
        assert grads is not None
        found |= call.gather_back(on, grads.contiguous(), queries)
        if averaged and needed["q"] and do is not None:
            found["q"] = call.apply_back(do, on, found["query"], sums=False, out=True)[0]
        of_query = found.get("query")
        if query is not None and of_query is not None:
            found["query"] = of_query.sum(2).unflatten(1, (query.shape[1], -1)).sum(2)
    found["record"] = grads
    results = []
    for name, tensor in zip(LEARNED, tensors):
        grad = found.get(name)
        if not needed[name] or grad is None or tensor is None:
            results.append(call.like.new_empty(0))
        else:
            results.append((grad if name in ("record", "query") else reduce_heads(grad, tensor.shape[2])).to(tensor.dtype))
    return results


moments_backward_op = torch.library.custom_op("subquad::moments_backward", backward, mutates_args=())


@moments_backward_op.register_fake
def _(do: Any, d_record: Any, made: Any, kept: Any, *args: Any) -> list[Tensor]:
    like = made if args[0] is None else args[0]
    return [like.new_empty(x.shape, dtype=x.dtype) if wanted else like.new_empty(0) for x, wanted in zip(args, args[-1])]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, record, kept = output
    ctx.count = len(NAMES)
    ctx.rest = inputs[ctx.count :]
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(record, *inputs[: ctx.count], *kept)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, d_record: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    made, *saved = ctx.saved_tensors
    tensors, kept = saved[: ctx.count], saved[ctx.count :]
    q, k = tensors[:2]
    need = [x is not None and wanted for x, wanted in zip(tensors[: len(LEARNED)], ctx.needs_input_grad)]
    do = None if q is None or do is None else do.to(q.dtype)
    if do is None and d_record is None:
        if q is not None:
            do = q.new_zeros(*q.shape[:2], max(q.shape[2], made.shape[1] if k is not None else tensors[3].shape[1]), ctx.rest[0])
        else:
            d_record = torch.zeros_like(made)
    run: Any = torch.ops.subquad.moments_backward if traced(made) else backward
    found = run(do, d_record, made, list(kept), *tensors, *ctx.rest, need)
    return (*(x if wanted else None for x, wanted in zip(found, need)), *[None] * (ctx.count - len(LEARNED) + len(ctx.rest)))


moments_op.register_autograd(_backward, setup_context=_setup)

_eager = eager("Moments", forward, _setup, _backward)


def moments(x: dict[str, Tensor | None], values: int, how: How) -> tuple[Tensor, Tensor]:
    """o and the record, as a differentiable call or, while something traces, as an operator; x has tensors of NAMES."""
    tensors = [x.get(name) for name in NAMES]
    like = next(t for t in tensors if t is not None)
    run = torch.ops.subquad.moments if traced(like) else _eager
    o, record, *_ = run(*tensors, values, *how)
    return o, record


# ---- as `subquad.ops.moments` calls it ---------------------------------------------------------------------------


def tables(rotary: Rotary | None, like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """cos and sin ``[1 or B, N, D/2]`` of each pair of channels of `like`; half precision where that is finer than its own."""
    if rotary is None:
        return None, None
    turned, pairs = rotary.cos.shape[-1] // 2, like.shape[-1] // 2
    found = []
    for x, other in ((rotary.cos, 1.0), (rotary.sin, 0.0)):
        x = x[..., ::2] if rotary.interleaved else x[..., :turned]
        x = x.to(like.device, torch.float16 if like.dtype == torch.bfloat16 else torch.float32)
        x = torch.nn.functional.pad(x, (0, pairs - turned), value=other) if pairs > turned else x
        found.append((x if x.dim() == 3 else x[None]).contiguous())
    return found[0], found[1]


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
    x = {"q": q, "k": k, "v": v, "k_cos": k_cos, "k_sin": k_sin, "q_cos": q_cos, "q_sin": q_sin, **_extras(extras, k)}
    return moments(x, v.shape[3], How(**how, halves=halves(rotary)))[0]


@full_precision
def gather(k: Tensor, v: Tensor, extras: dict[str, Any], rotary: Rotary | None, k_map: str, logit_scale: float) -> Moments:
    """The moments, in which logit_max is a constant."""
    cos, sin = tables(rotary, k)
    x = {"k": k, "v": v, "k_cos": cos, "k_sin": sin, **_extras(extras, k)}
    record = moments(x, v.shape[3], How(k_map=k_map, logit_scale=logit_scale, halves=halves(rotary)))[1]
    size = sizes(k.shape[3], v.shape[3], k_map in TWO_SIGNS)
    M, z, total, weight, top, _ = record.split([size.F * size.V, size.F, size.V, 1, 1, size.L - size.END - 2], -1)
    return Moments(M.unflatten(-1, (size.F, size.V)), z, total, weight[..., 0], top[..., 0].detach(), rotated=rotary is not None)


@full_precision
def apply(q: Tensor, given: Moments, rotary: Rotary | None, cu_seqlens: Tensor | None, how: Any) -> Tensor:
    """o ``[B, N, H, V]``."""
    size = sizes(q.shape[3], given.M.shape[-1], how["q_map"] in TWO_SIGNS)
    if given.M.shape[-2] != size.F:
        raise InputError("q", shape_of(q), f"channels whose features are those of the moments, {given.M.shape[-2]}")
    total = given.z.new_zeros(*given.z.shape[:2], size.V) if given.v_sum is None else given.v_sum
    pad = given.z.new_zeros(*given.z.shape[:2], size.L - size.END - 2)
    record = torch.cat([given.M.flatten(-2), given.z, total, given.weight[..., None], given.logit_max[..., None], pad], -1)
    cos, sin = tables(rotary, q)
    cu = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    x = {"q": q, "record": record, "q_cos": cos, "q_sin": sin, "cu": cu}
    return moments(x, size.V, How(**how, halves=halves(rotary)))[0]
