"""Moments in Triton: kernels over tokens, and one that joins what programs found.

A program owns one row, one head and one run of tokens, in tiles of C; tokens are read once, features, weights and rotated features
exist in registers for one tile. What a run adds up is a *record*: M ``[F, V]``, z ``[F]``, Σ w v ``[V]``, the weight and the largest
logit, side by side in float32. `combine_kernel` joins the records of a row's runs, in their order: no atomics.

    mean_kernel           Σ φ(q)                                    for RALA's global query
    gather_kernel         k, v → record
    apply_kernel          q, record → o = α n + β v̄,                n = R(φ(q)) M̂,  t = φ(q)·ẑ, and α, β functions of t

with M̂, ẑ, v̄ over Σw (or not, for sums). Maps of two signs (TWO) give a copy of the channels for each; a channel is 0 in one of
them, so that features, z and gradients exist once, and only M has two parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.moments.blocks import (
    MAGNITUDE,
    add_parts,
    angles,
    channels,
    copy,
    feature,
    in_parts,
    load_matrix,
    load_vector,
    normal,
    offset,
    pick,
    product,
    read_record,
    store_record,
    turn,
    weigh,
)
from subquad.ops.triton_blocks import LOG2E, load_tile, run_of, sequence, store_tile


@triton.jit(do_not_specialize=["N", "splits"])
def mean_kernel(
    q, sums, cu, sq_b, sq_h, N, splits,
    sq_n: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
    TWO: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Means over a run's tokens of φ(q) ``[B, N, H, D]``, as shares of the row's: sums ``[rows, H, splits, F]``."""
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, i_qh % H
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    ch = channels(D, BD, HALVES)
    q += i_b * sq_b + begin * sq_n + i_h.to(tl.int64) * sq_h
    rows = tl.arange(0, C)
    total = tl.zeros([C, BD], tl.float32)
    if TWO:
        second = tl.zeros([C, BD], tl.float32)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        at, left = offset(i, C), n - i * C
        x = load_tile(q + at * sq_n, sq_n, rows, left, ch, D, BD).to(tl.float32)
        phi = tl.where((rows < left)[:, None], feature(x, MAP), 0.0)
        total += copy(x, phi, False, TWO)
        if TWO:
            second += copy(x, phi, True, TWO)
    sums += program.to(tl.int64) * (2 * D if TWO else D)
    tl.store(sums + ch, tl.sum(total, 0) / tl.maximum(n, 1), mask=ch < D)
    if TWO:
        tl.store(sums + D + ch, tl.sum(second, 0) / tl.maximum(n, 1), mask=ch < D)


@triton.jit(do_not_specialize=["N", "splits", "scale"])
def gather_kernel(
    k, v, queries, logits, factors, seen, cos, sin, cu, record, found,
    sk_b, sk_h, sv_b, sv_h, sl_b, sl_n, sl_h, sf_b, sf_n, sf_h, ss_b, ss_n, sr_b, N, splits, scale,
    sk_n: tl.constexpr, sv_n: tl.constexpr,
    H: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, GG: tl.constexpr, GL: tl.constexpr, GF: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr,
    MASK: tl.constexpr, TOTAL: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The record ``[rows, H, splits, L]`` of a run of keys ``[B, N, H/GK, D]`` and values ``[B, N, H/GV, V]``.

    Args:
        queries: with QUERY ``[rows, H/GG, F]``: keys like it get larger logits.
        logits, factors: with LOGITS, FACTORS ``[B, N, heads]``.
        seen: with MASK ``[B, N]``, 0 for padding.
        cos, sin: with TURN ``[1 or B, N, D/2]``.
        TOTAL: whether Σ w v is wanted; it is 0 otherwise.
        found: with QUERY the logits ``[B, N, H]``, for the backward; −inf where a token is not seen.
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
    F: tl.constexpr = 2 * D if TWO else D
    ch = channels(D, BD, HALVES)
    vs = tl.arange(0, BV)
    k += i_b * sk_b + begin * sk_n + i_h // GK * sk_h
    v += i_b * sv_b + begin * sv_n + i_h // GV * sv_h
    logits += i_b * sl_b + begin * sl_n + i_h // GL * sl_h
    factors += i_b * sf_b + begin * sf_n + i_h // GF * sf_h
    seen += i_b * ss_b + begin * ss_n
    found += (i_b * N + begin) * H + i_h
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    query, query_second = ch.to(tl.float32), ch.to(tl.float32)
    if QUERY:
        query, query_second = load_vector(queries + (i_q * (H // GG) + i_h // GG) * F, ch, D, TWO)

    rows = tl.arange(0, C)
    M, second = tl.zeros([BD, BV], tl.float32), tl.zeros([BD, BV] if TWO else [1, 1], tl.float32)
    z, z_second = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    total = tl.zeros([BV], tl.float32)
    weight = tl.zeros([C], tl.float32)
    top = float("-inf")
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        at, left = offset(i, C), n - i * C
        keep = rows < left
        x = load_tile(k + at * sk_n, sk_n, rows, left, ch, D, BD).to(tl.float32)
        tv = load_tile(v + at * sv_n, sv_n, rows, left, vs, V, BV)
        if MASK:
            keep = keep & (tl.load(seen + at * ss_n + rows * ss_n, mask=keep, other=0) != 0)
            x = tl.where(keep[:, None], x, 0.0)
            tv = tl.where(keep[:, None], tv, 0.0)
        phi = feature(x, MAP)
        own = pick(x, query[None, :], query_second[None, :], TWO)
        w, logit = weigh(phi, own, logits + at * sl_n, factors + at * sf_n, sl_n, sf_n, rows, keep, scale, QUERY, LOGITS, FACTORS)
        if QUERY:
            tl.store(found + at * H + rows * H, logit, mask=rows < left)
        if QUERY or LOGITS:
            higher = tl.maximum(top, tl.max(logit, 0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            w *= tl.exp2((logit - shift) * LOG2E)
            past = tl.exp2((top - shift) * LOG2E)
            M, z, weight = M * past, z * past, weight * past
            if TOTAL:
                total *= past
            if TWO:
                second, z_second = second * past, z_second * past
            top = higher
        weight += w
        if TOTAL:
            total += tl.sum(w[:, None] * tv.to(tl.float32), 0)
        phi *= w[:, None]
        c, s = angles(cos + at * (D // 2), sin + at * (D // 2), rows, left, D, BD) if TURN else (w, w)
        part = copy(x, phi, False, TWO)
        z += tl.sum(part, 0)
        M = tl.dot(tl.trans(turn(part, c, s, TURN).to(MT)), tv.to(MT), M, input_precision=IP)
        if TWO:
            part = copy(x, phi, True, TWO)
            z_second += tl.sum(part, 0)
            second = tl.dot(tl.trans(turn(part, c, s, TURN).to(MT)), tv.to(MT), second, input_precision=IP)

    weight = tl.sum(weight, 0)
    if not (QUERY or LOGITS):
        top = tl.where(weight > 0, 0.0, float("-inf"))
    record += program.to(tl.int64) * L
    store_record(record, ch, vs, M, second, z, z_second, total, weight, D, V, TWO)
    tl.store(record + F * V + F + V + 1, top)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(parts, record, given, splits, L: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr, GRAD: tl.constexpr, MEAN: tl.constexpr):  # fmt: skip # noqa: E501
    """The record ``[rows, L]`` of a row from those of its runs ``[rows, splits, L]``, in their order.

    GRAD: these are gradients of M̂, ẑ, v̄ and, where the weight stands, of log Σw; `given` is the record that they are of, and the
    result is its gradient. The largest logit has none.
    """
    i, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    parts += i * splits * L
    total = tl.zeros([BLOCK], tl.float32)
    if GRAD:
        weight, top = tl.load(given + i * L + END), tl.load(given + i * L + END + 1)
        total = add_parts(parts, splits, L, cols, cols <= END)
        if MEAN:
            total *= tl.where(cols == END, -1.0, 1.0) / tl.where(weight == 0, 1.0, weight)
        else:
            total *= tl.where(cols == END, 0.0, tl.exp2(tl.where(top == float("-inf"), 0.0, top) * LOG2E))
    else:
        top = float("-inf")
        for s in range(splits):
            top = tl.maximum(top, tl.load(parts + s * L + END + 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        for s in range(splits):
            share = tl.exp2((tl.load(parts + s * L + END + 1) - shift) * LOG2E)
            total += share * tl.load(parts + s * L + cols, mask=cols <= END, other=0.0)
        total = tl.where(cols == END + 1, top, total)
    tl.store(record + i * L + cols, total, mask=cols < L)


@triton.jit(do_not_specialize=["N", "splits", "scale", "eps"])
def apply_kernel(
    q, record, cos, sin, cu, o, sq_b, sq_h, sr_b, N, splits, scale, eps,
    sq_n: tl.constexpr, H: tl.constexpr, GQ: tl.constexpr, GM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, NORMAL: tl.constexpr, MEAN: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """o ``[B, N, H, V]``, contiguous, of queries ``[B, N, H/GQ, D]`` on records ``[rows, H/GM, L]``."""
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    F: tl.constexpr = 2 * D if TWO else D
    ch = channels(D, BD, HALVES)
    vs = tl.arange(0, BV)
    q += i_b * sq_b + begin * sq_n + i_h // GQ * sq_h
    o += ((i_b * N + begin) * H + i_h) * V
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    record += (i_q * (H // GM) + i_h // GM) * L
    by, mean, live = read_record(record, vs, n, V, F, MEAN)
    z, z_second = load_vector(record + F * V, ch, D, TWO)
    z, z_second = z * by, z_second * by
    read, rest = in_parts(load_matrix(record, ch, vs, D, V, False) * by, MT, SPLIT)
    if TWO:
        read_second, rest_second = in_parts(load_matrix(record, ch, vs, D, V, True) * by, MT, SPLIT)
    rows = tl.arange(0, C)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        at, left = offset(i, C), n - i * C
        x = load_tile(q + at * sq_n, sq_n, rows, left, ch, D, BD).to(tl.float32)
        phi = feature(x, MAP)
        t = tl.sum(phi * pick(x, z[None, :], z_second[None, :], TWO), 1)
        c, s = angles(cos + at * (D // 2), sin + at * (D // 2), rows, left, D, BD) if TURN else (t, t)
        alpha, beta = normal(t, scale, eps, NORMAL)
        out = product(turn(copy(x, phi, False, TWO), c, s, TURN).to(MT), read, rest, SPLIT, IP)
        if TWO:
            out += product(turn(copy(x, phi, True, TWO), c, s, TURN).to(MT), read_second, rest_second, SPLIT, IP)
        out *= tl.where(rows < live - i * C, alpha, 1.0)[:, None]
        if NORMAL >= MAGNITUDE:
            out += beta[:, None] * mean[None, :]
        store_tile(o + at * (H * V), H * V, rows, left, vs, V, BV, out)
