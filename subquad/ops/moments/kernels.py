"""Moments in Triton: four kernels over tokens and one that joins what programs found.

A program owns one row, one head and one run of tokens, in tiles of C; tokens are read once, features, weights and rotated features
exist in registers for one tile. What a run adds up is a *record*: M ``[F, V]``, z ``[F]``, v̄ ``[V]``, the weight and the largest
logit, side by side in float32. `combine_kernel` joins the records of a row's runs, in their order: no atomics.

    mean_kernel           Σ φ(q)                                    for RALA's global query
    gather_kernel         k, v → record
    apply_kernel          q, record → o = α n + β v̄,                n = R(φ(q)) M̂,  t = φ(q)·ẑ, and α, β functions of t
    apply_back_kernel     q, ȯ, record → q̇ and the record's gradient
    gather_back_kernel    k, v, record and its gradient → k̇, v̇, and the gradients of what weighs the tokens

with M̂, ẑ, v̄ over Σw (or not, for sums). Feature maps of two signs stand side by side: column c < BD is channel c of the positive
copy, the others are channels of the negative one, so that one matrix product serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.moments.blocks import (
    MAGNITUDE,
    add_parts,
    angles,
    columns,
    feature,
    feature_back,
    fold,
    normal,
    normal_back,
    run_of,
    turn,
)
from subquad.ops.triton_blocks import LOG2E, load_tile, sequence, store_tile

# ---- kernels over tokens -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "splits"])
def mean_kernel(
    q, sums, cu, sq_b, sq_n, sq_h, N, splits,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Means over a run's tokens of φ(q) ``[B, N, H, D]``, as shares of the row's: sums ``[rows, H, splits, F]``."""
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, i_qh % H
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    ch, at, sign = columns(D, BD, BF, HALVES)
    q += i_b * sq_b + begin * sq_n + i_h.to(tl.int64) * sq_h
    total = tl.zeros([C, BF], tl.float32)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        rows = i * C + tl.arange(0, C)
        x = load_tile(q, sq_n, rows.to(tl.int64), n, ch, D, BD).to(tl.float32)
        total += tl.where((rows < n)[:, None], feature(x, sign, MAP), 0.0)
    tl.store(sums + program.to(tl.int64) * (BF // BD * D) + at, tl.sum(total, 0) / tl.maximum(n, 1), mask=ch < D)


@triton.jit
def weigh(
    phi, query, logits, factors, sl_n, sf_n, rows, keep, scale, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr
):  # fmt: skip
    """Factor and logit of each token of a tile; a token that is not seen has factor 0 and logit −inf."""
    factor = keep.to(tl.float32)
    logit = factor * 0
    if FACTORS:
        factor = tl.load(factors + rows * sf_n, mask=keep, other=0.0).to(tl.float32)
    if LOGITS:
        logit += tl.load(logits + rows * sl_n, mask=keep, other=0.0).to(tl.float32)
    if QUERY:
        logit += scale * tl.sum(phi * query[None, :], 1)
    return factor, tl.where(factor != 0, logit, float("-inf"))


@triton.jit(do_not_specialize=["N", "splits", "parts", "scale"])
def gather_kernel(
    k, v, queries, logits, factors, seen, cos, sin, cu, record,
    sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, sl_b, sl_n, sl_h, sf_b, sf_n, sf_h, ss_b, ss_n, sr_b, N, splits, parts, scale,
    H: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, GG: tl.constexpr, GL: tl.constexpr, GF: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr,
    MASK: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The record ``[rows, H, splits, L]`` of a run of keys ``[B, N, H/GK, D]`` and values ``[B, N, H/GV, V]``.

    Args:
        queries: with QUERY ``[rows, H/GG, parts, F]``, to be summed over parts: keys like it get larger logits.
        logits, factors: with LOGITS, FACTORS ``[B, N, heads]``.
        seen: with MASK ``[B, N]``, 0 for padding.
        cos, sin: with TURN ``[1 or B, N, D/2]``.
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
    F: tl.constexpr = BF // BD * D
    ch, at, sign = columns(D, BD, BF, HALVES)
    vs = tl.arange(0, BV)
    k += i_b * sk_b + begin * sk_n + i_h // GK * sk_h
    v += i_b * sv_b + begin * sv_n + i_h // GV * sv_h
    logits += i_b * sl_b + begin * sl_n + i_h // GL * sl_h
    factors += i_b * sf_b + begin * sf_n + i_h // GF * sf_h
    seen += i_b * ss_b + begin * ss_n
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    query = sign
    if QUERY:
        query = add_parts(queries + (i_q * (H // GG) + i_h // GG) * parts * F, parts, F, at, ch < D)

    M = tl.zeros([BF, BV], tl.float32)
    z = tl.zeros([BF], tl.float32)
    total = tl.zeros([BV], tl.float32)
    weight = 0.0
    top = float("-inf")
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        rows = (i * C + tl.arange(0, C)).to(tl.int64)
        keep = rows < n
        x = load_tile(k, sk_n, rows, n, ch, D, BD).to(tl.float32)
        tv = load_tile(v, sv_n, rows, n, vs, V, BV)
        if MASK:
            keep = keep & (tl.load(seen + rows * ss_n, mask=keep, other=0) != 0)
            x = tl.where(keep[:, None], x, 0.0)
            tv = tl.where(keep[:, None], tv, 0.0)
        phi = feature(x, sign, MAP)
        w, logit = weigh(phi, query, logits, factors, sl_n, sf_n, rows, keep, scale, QUERY, LOGITS, FACTORS)
        if QUERY or LOGITS:
            higher = tl.maximum(top, tl.max(logit, 0))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            w *= tl.exp2((logit - shift) * LOG2E)
            past = tl.exp2((top - shift) * LOG2E)
            M, z, total, weight = M * past, z * past, total * past, weight * past
            top = higher
        weight += tl.sum(w, 0)
        total += tl.sum(w[:, None] * tv.to(tl.float32), 0)
        phi *= w[:, None]
        z += tl.sum(phi, 0)
        if TURN:
            c, s = angles(cos, sin, rows, n, BD, BF, D)
            phi = turn(phi, c, s)
        M = tl.dot(tl.trans(phi.to(MT)), tv.to(MT), M, input_precision=IP)

    if not (QUERY or LOGITS):
        top = tl.where(weight > 0, 0.0, float("-inf"))
    record += program.to(tl.int64) * L
    tl.store(record + at[:, None] * V + vs[None, :], M, mask=(ch < D)[:, None] & (vs < V)[None, :])
    tl.store(record + F * V + at, z, mask=ch < D)
    tl.store(record + F * V + F + vs, total, mask=vs < V)
    tl.store(record + F * V + F + V, weight)
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


@triton.jit
def read_record(record, at, keep, vs, n, V: tl.constexpr, F: tl.constexpr, MEAN: tl.constexpr):
    """M̂ ``[BF, BV]``, ẑ, v̄, and n, or 0 if no key was seen."""
    weight, top = tl.load(record + F * V + F + V), tl.load(record + F * V + F + V + 1)
    by = 1 / tl.where(weight == 0, 1.0, weight) if MEAN else tl.exp2(tl.where(top == float("-inf"), 0.0, top) * LOG2E)
    M = tl.load(record + at[:, None] * V + vs[None, :], mask=keep[:, None] & (vs < V)[None, :], other=0.0) * by
    z = tl.load(record + F * V + at, mask=keep, other=0.0) * by
    return M, z, tl.load(record + F * V + F + vs, mask=vs < V, other=0.0) * by, tl.where(weight != 0, n, 0)


@triton.jit(do_not_specialize=["N", "splits", "scale", "eps"])
def apply_kernel(
    q, record, cos, sin, cu, o, sq_b, sq_n, sq_h, sr_b, N, splits, scale, eps,
    H: tl.constexpr, GQ: tl.constexpr, GM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, NORMAL: tl.constexpr, MEAN: tl.constexpr, PACKED: tl.constexpr,
    WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """o ``[B, N, H, V]``, contiguous, of queries ``[B, N, H/GQ, D]`` on records ``[rows, H/GM, L]``."""
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    F: tl.constexpr = BF // BD * D
    ch, at, sign = columns(D, BD, BF, HALVES)
    vs = tl.arange(0, BV)
    q += i_b * sq_b + begin * sq_n + i_h // GQ * sq_h
    o += ((i_b * N + begin) * H + i_h) * V
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    M, z, mean, live = read_record(record + (i_q * (H // GM) + i_h // GM) * L, at, ch < D, vs, n, V, F, MEAN)
    read = M.to(MT)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        rows = (i * C + tl.arange(0, C)).to(tl.int64)
        phi = feature(load_tile(q, sq_n, rows, n, ch, D, BD).to(tl.float32), sign, MAP)
        t = tl.sum(phi * z[None, :], 1)
        if TURN:
            c, s = angles(cos, sin, rows, n, BD, BF, D)
            phi = turn(phi, c, s)
        alpha, beta = normal(t, scale, eps, NORMAL)
        out = tl.dot(phi.to(MT), read, input_precision=IP) * tl.where(rows < live, alpha, 1.0)[:, None]
        if NORMAL >= MAGNITUDE:
            out += beta[:, None] * mean[None, :]
        store_tile(o, H * V, rows, n, vs, V, BV, out)


@triton.jit(do_not_specialize=["N", "splits", "parts", "scale", "eps"])
def apply_back_kernel(
    q, do, record, more, cos, sin, cu, dq, grads,
    sq_b, sq_n, sq_h, sd_b, sd_n, sd_h, sr_b, N, splits, parts, scale, eps,
    H: tl.constexpr, GQ: tl.constexpr, GM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, NORMAL: tl.constexpr, MEAN: tl.constexpr, SUMS: tl.constexpr,
    OUT: tl.constexpr, MORE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradients of `apply_kernel`.

    Args:
        do: o's gradient ``[B, N, H, V]``, by strides.
        dq: with OUT ``[B, N, H, D]``, contiguous.
        grads: with SUMS ``[rows, H, splits, L]``, for `combine_kernel`.
        more: with MORE ``[rows, H, parts, F]``, to be summed over parts: a gradient of the mean of φ(q).
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    F: tl.constexpr = BF // BD * D
    CENTRED: tl.constexpr = NORMAL >= MAGNITUDE
    ch, at, sign = columns(D, BD, BF, HALVES)
    vs = tl.arange(0, BV)
    q += i_b * sq_b + begin * sq_n + i_h // GQ * sq_h
    do += i_b * sd_b + begin * sd_n + i_h * sd_h
    dq += ((i_b * N + begin) * H + i_h) * D
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    M, z, mean, live = read_record(record + (i_q * (H // GM) + i_h // GM) * L, at, ch < D, vs, n, V, F, MEAN)
    read = tl.trans(M.to(MT))
    extra = z * 0
    if MORE:
        extra = add_parts(more + (i_q * H + i_h) * parts * F, parts, F, at, ch < D) / tl.maximum(n, 1)
    dM = tl.zeros([BF, BV], tl.float32)
    dz = tl.zeros([BF], tl.float32)
    d_mean = tl.zeros([BV], tl.float32)
    d_weight = 0.0
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        rows = (i * C + tl.arange(0, C)).to(tl.int64)
        x = load_tile(q, sq_n, rows, n, ch, D, BD).to(tl.float32)
        td = load_tile(do, sd_n, rows, n, vs, V, BV)
        phi = feature(x, sign, MAP)
        t = tl.sum(phi * z[None, :], 1)
        alpha, beta = normal(t, scale, eps, NORMAL)
        alpha = tl.where(rows < live, alpha, 0.0)
        back = tl.dot(td.to(MT), read, input_precision=IP)
        turned = phi
        if TURN:
            c, s = angles(cos, sin, rows, n, BD, BF, D)
            turned = turn(phi, c, s)
        num = tl.sum(turned * back, 1)
        b = tl.sum(td.to(tl.float32) * mean[None, :], 1) if CENTRED else num * 0
        dt = tl.where(rows < live, normal_back(t, num, b, scale, eps, NORMAL), 0.0)
        if SUMS:
            dM = tl.dot(tl.trans((turned * alpha[:, None]).to(MT)), td.to(MT), dM, input_precision=IP)
            dz += tl.sum(dt[:, None] * phi, 0)
            d_weight += tl.sum(alpha * num + dt * t, 0)
            if CENTRED:
                d_mean += tl.sum(beta[:, None] * td.to(tl.float32), 0)
                d_weight += tl.sum(beta * b, 0)
        if OUT:
            back *= alpha[:, None]
            if TURN:
                back = turn(back, c, -s)
            dx = feature_back(x, phi, back + dt[:, None] * z[None, :] + extra[None, :], sign, MAP)
            own, _, _ = columns(D, BD, BD, HALVES)
            store_tile(dq, H * D, rows, n, own, D, BD, fold(dx, BF // BD))
    if SUMS:
        grads += program.to(tl.int64) * L
        tl.store(grads + at[:, None] * V + vs[None, :], dM, mask=(ch < D)[:, None] & (vs < V)[None, :])
        tl.store(grads + F * V + at, dz, mask=ch < D)
        tl.store(grads + F * V + F + vs, d_mean, mask=vs < V)
        tl.store(grads + F * V + F + V, d_weight)


@triton.jit(do_not_specialize=["N", "splits", "parts", "scale"])
def gather_back_kernel(
    k, v, queries, logits, factors, seen, cos, sin, cu, record, grads, dk, dv, d_query, d_logits, d_factors,
    sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, sl_b, sl_n, sl_h, sf_b, sf_n, sf_h, ss_b, ss_n, sr_b, N, splits, parts, scale,
    H: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, GG: tl.constexpr, GL: tl.constexpr, GF: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr,
    MASK: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradients of `gather_kernel`, from those of the record: each head its own.

    Args:
        record, grads: ``[rows, H, L]``.
        dk, dv: ``[B, N, H, D or V]``, contiguous; d_logits, d_factors ``[B, N, H]``.
        d_query: with QUERY ``[rows, H, splits, F]``, to be summed over splits.
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
    F: tl.constexpr = BF // BD * D
    ch, at, sign = columns(D, BD, BF, HALVES)
    own, _, _ = columns(D, BD, BD, HALVES)
    vs = tl.arange(0, BV)
    here = (i_b * N + begin) * H + i_h
    dk += here * D
    dv += here * V
    k += i_b * sk_b + begin * sk_n + i_h // GK * sk_h
    v += i_b * sv_b + begin * sv_n + i_h // GV * sv_h
    logits += i_b * sl_b + begin * sl_n + i_h // GL * sl_h
    factors += i_b * sf_b + begin * sf_n + i_h // GF * sf_h
    seen += i_b * ss_b + begin * ss_n
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    query = sign
    if QUERY:
        query = add_parts(queries + (i_q * (H // GG) + i_h // GG) * parts * F, parts, F, at, ch < D)
    top = tl.load(record + i_qh.to(tl.int64) * L + F * V + F + V + 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    grads += i_qh.to(tl.int64) * L
    dM = tl.load(grads + at[:, None] * V + vs[None, :], mask=(ch < D)[:, None] & (vs < V)[None, :], other=0.0).to(MT)
    across = tl.trans(dM)
    dz = tl.load(grads + F * V + at, mask=ch < D, other=0.0)
    d_total = tl.load(grads + F * V + F + vs, mask=vs < V, other=0.0)
    d_weight = tl.load(grads + F * V + F + V)
    dg = tl.zeros([BF], tl.float32)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        rows = (i * C + tl.arange(0, C)).to(tl.int64)
        keep = rows < n
        x = load_tile(k, sk_n, rows, n, ch, D, BD).to(tl.float32)
        tv = load_tile(v, sv_n, rows, n, vs, V, BV)
        if MASK:
            keep = keep & (tl.load(seen + rows * ss_n, mask=keep, other=0) != 0)
            x = tl.where(keep[:, None], x, 0.0)
            tv = tl.where(keep[:, None], tv, 0.0)
        phi = feature(x, sign, MAP)
        w, logit = weigh(phi, query, logits, factors, sl_n, sf_n, rows, keep, scale, QUERY, LOGITS, FACTORS)
        grown = tl.exp2((logit - shift) * LOG2E) if QUERY or LOGITS else keep.to(tl.float32)
        w *= grown
        back = tl.dot(tv.to(MT), across, input_precision=IP)
        turned = phi
        if TURN:
            c, s = angles(cos, sin, rows, n, BD, BF, D)
            turned = turn(phi, c, s)
        out = tl.dot(turned.to(MT), dM, input_precision=IP)
        store_tile(dv, H * V, rows, n, vs, V, BV, tl.where(w[:, None] != 0, (out + d_total[None, :]) * w[:, None], 0.0))
        d_phi = dz[None, :] + (turn(back, c, -s) if TURN else back)
        if QUERY or LOGITS or FACTORS:
            inner = tl.sum(phi * d_phi, 1) + tl.sum(tv.to(tl.float32) * d_total[None, :], 1) + d_weight
        d_phi *= w[:, None]
        if QUERY:
            d_score = scale * w * inner
            d_phi += d_score[:, None] * query[None, :]
            dg += tl.sum(d_score[:, None] * phi, 0)
        if LOGITS:
            tl.store(d_logits + (here + rows * H), w * inner, mask=rows < n)
        if FACTORS:
            if not (QUERY or LOGITS):
                grown = keep.to(tl.float32)
            tl.store(d_factors + (here + rows * H), grown * inner, mask=rows < n)
        dx = fold(feature_back(x, phi, d_phi, sign, MAP), BF // BD)
        store_tile(dk, H * D, rows, n, own, D, BD, tl.where((w != 0)[:, None], dx, 0.0))
    if QUERY:
        tl.store(d_query + program.to(tl.int64) * F + at, dg, mask=ch < D)
