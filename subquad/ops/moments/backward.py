"""The gradients of moments, in Triton: programs and records are those of `kernels.py`.

apply_back_kernel     q, ȯ, record → q̇ and the record's gradient
gather_back_kernel    k, v, record and its gradient → k̇, v̇, and the gradients of what weighs the tokens
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
    feature_back,
    in_parts,
    load_matrix,
    load_vector,
    normal,
    normal_back,
    offset,
    pairs_of_rows,
    pick,
    product,
    read_record,
    store_record,
    turn,
    weigh,
)
from subquad.ops.triton_blocks import LOG2E, load_tile, run_of, sequence, store_tile


@triton.jit(do_not_specialize=["N", "splits", "parts", "scale", "eps"])
def apply_back_kernel(
    q, do, record, more, cos, sin, cu, terms, dq, grads,
    sq_b, sq_h, sd_b, sd_h, sr_b, N, splits, parts, scale, eps,
    sq_n: tl.constexpr, sd_n: tl.constexpr, H: tl.constexpr, GQ: tl.constexpr, GM: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, NORMAL: tl.constexpr, MEAN: tl.constexpr, SUMS: tl.constexpr,
    OUT: tl.constexpr, TWICE: tl.constexpr, MORE: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """The gradients of `apply_kernel`.

    Args:
        do: o's gradient ``[B, N, H, V]``, by strides.
        dq: with OUT ``[B, N, H, D]``, contiguous.
        grads: with SUMS ``[rows, H, splits, L]``, for `combine_kernel`.
        TWICE: in two passes, SUMS and OUT each in its own.
        terms: with TWICE ``[B, N, H, 2]``, α of each token and the gradient of what its scores sum to: SUMS writes them, OUT reads them.
        more: with MORE ``[rows, H, parts, F]``, to be summed over parts: a gradient of the mean of φ(q).
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    F: tl.constexpr = 2 * D if TWO else D
    CENTRED: tl.constexpr = NORMAL >= MAGNITUDE
    ch = channels(D, BD, HALVES)
    vs = tl.arange(0, BV)
    q += i_b * sq_b + begin * sq_n + i_h // GQ * sq_h
    do += i_b * sd_b + begin * sd_n + i_h * sd_h
    here = (i_b * N + begin) * H + i_h
    dq += here * D
    terms += here * 2
    cos += i_b * sr_b + begin * (D // 2)
    sin += i_b * sr_b + begin * (D // 2)
    record += (i_q * (H // GM) + i_h // GM) * L
    by, mean, live = read_record(record, vs, n, V, F, MEAN)
    z, z_second = load_vector(record + F * V, ch, D, TWO)
    z, z_second = z * by, z_second * by
    read, rest = in_parts(tl.trans(load_matrix(record, ch, vs, D, V, False) * by), MT, SPLIT)
    if TWO:
        read_second, rest_second = in_parts(tl.trans(load_matrix(record, ch, vs, D, V, True) * by), MT, SPLIT)
    extra, extra_second = z * 0, z * 0
    if MORE:
        more += (i_q * H + i_h) * parts * F
        extra = add_parts(more, parts, F, ch, ch < D) / tl.maximum(n, 1)
        if TWO:
            extra_second = add_parts(more + D, parts, F, ch, ch < D) / tl.maximum(n, 1)
    dM, dM_second = tl.zeros([BD, BV], tl.float32), tl.zeros([BD, BV] if TWO else [1, 1], tl.float32)
    dz, dz_second = tl.zeros([C // 2, BD], tl.float32), tl.zeros([C // 2, BD] if TWO else [1, 1], tl.float32)
    d_mean = tl.zeros([BV], tl.float32)
    d_weight = tl.zeros([C], tl.float32)
    rows = tl.arange(0, C)
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        at, left = offset(i, C), n - i * C
        alive = rows < live - i * C
        x = load_tile(q + at * sq_n, sq_n, rows, left, ch, D, BD).to(tl.float32)
        td = load_tile(do + at * sd_n, sd_n, rows, left, vs, V, BV)
        now = terms + at * (2 * H) + rows * (2 * H)
        phi = feature(x, MAP)
        own_z = pick(x, z[None, :], z_second[None, :], TWO)
        if SUMS or not TWICE:
            t = tl.sum(phi * own_z, 1)
            alpha, beta = normal(t, scale, eps, NORMAL)
            alpha = tl.where(alive, alpha, 0.0)
        else:
            alpha = tl.load(now, mask=rows < left, other=0.0)
            dt = tl.load(now + 1, mask=rows < left, other=0.0)
        c, s = angles(cos + at * (D // 2), sin + at * (D // 2), rows, left, D, BD) if TURN else (alpha, alpha)
        back = turn(product(td.to(MT), read, rest, SPLIT, IP), c, -s, TURN)
        if TWO:
            back = pick(x, back, turn(product(td.to(MT), read_second, rest_second, SPLIT, IP), c, -s, TURN), TWO)
        if SUMS or not TWICE:
            num = tl.sum(phi * back, 1)
            b = tl.sum(td.to(tl.float32) * mean[None, :], 1) if CENTRED else num * 0
            dt = tl.where(alive, normal_back(t, num, b, scale, eps, NORMAL), 0.0)
        if SUMS and TWICE:
            tl.store(now, alpha, mask=rows < left)
            tl.store(now + 1, dt, mask=rows < left)
        if SUMS:
            d_weight += alpha * num + dt * t
            if CENTRED:
                d_mean += tl.sum(beta[:, None] * td.to(tl.float32), 0)
                d_weight += beta * b
            part = copy(x, phi, False, TWO)
            dz += pairs_of_rows(dt[:, None] * part)
            dM = tl.dot(tl.trans(turn(part * alpha[:, None], c, s, TURN).to(MT)), td.to(MT), dM, input_precision=IP)
            if TWO:
                part = copy(x, phi, True, TWO)
                dz_second += pairs_of_rows(dt[:, None] * part)
                dM_second = tl.dot(tl.trans(turn(part * alpha[:, None], c, s, TURN).to(MT)), td.to(MT), dM_second, input_precision=IP)
        if OUT:
            d_phi = back * alpha[:, None] + dt[:, None] * own_z
            if MORE:
                d_phi += pick(x, extra[None, :], extra_second[None, :], TWO)
            store_tile(dq + at * (H * D), H * D, rows, left, ch, D, BD, feature_back(x, phi, d_phi, MAP))
    if SUMS:
        dz, dz_second = tl.sum(dz, 0), tl.sum(dz_second, 0)
        store_record(grads + program.to(tl.int64) * L, ch, vs, dM, dM_second, dz, dz_second, d_mean, tl.sum(d_weight, 0), D, V, TWO)


@triton.jit(do_not_specialize=["N", "splits", "scale"])
def gather_back_kernel(
    k, v, queries, found, logits, factors, seen, cos, sin, cu, record, grads, dk, dv, d_query, d_logits, d_factors,
    sk_b, sk_h, sv_b, sv_h, sl_b, sl_n, sl_h, sf_b, sf_n, sf_h, ss_b, ss_n, sr_b, N, splits, scale,
    sk_n: tl.constexpr, sv_n: tl.constexpr,
    H: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, GG: tl.constexpr, GL: tl.constexpr, GF: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    MAP: tl.constexpr, HALVES: tl.constexpr, TURN: tl.constexpr, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr,
    MASK: tl.constexpr, TOTAL: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The gradients of `gather_kernel`, from those of the record: each head its own.

    Args:
        record, grads: ``[rows, H, L]``.
        found: with QUERY the logits that `gather_kernel` found.
        dk, dv: ``[B, N, H, D or V]``, contiguous; d_logits, d_factors ``[B, N, H]``.
        d_query: with QUERY ``[rows, H, splits, F]``, to be summed over splits.
    """
    program = tl.program_id(0)
    i_s, i_qh = program % splits, program // splits
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    MT: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
    F: tl.constexpr = 2 * D if TWO else D
    ch = channels(D, BD, HALVES)
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
    query, query_second = ch.to(tl.float32), ch.to(tl.float32)
    if QUERY:
        query, query_second = load_vector(queries + (i_q * (H // GG) + i_h // GG) * F, ch, D, TWO)
    top = tl.load(record + i_qh.to(tl.int64) * L + F * V + F + V + 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    grads += i_qh.to(tl.int64) * L
    dM, rest = in_parts(load_matrix(grads, ch, vs, D, V, False), MT, SPLIT)
    across, rest_across = tl.trans(dM), tl.trans(rest)
    if TWO:
        dM_second, rest_second = in_parts(load_matrix(grads, ch, vs, D, V, True), MT, SPLIT)
        across_second, rest_across_second = tl.trans(dM_second), tl.trans(rest_second)
    dz, dz_second = load_vector(grads + F * V, ch, D, TWO)
    d_total = tl.load(grads + F * V + F + vs, mask=vs < V, other=0.0)
    d_weight = tl.load(grads + F * V + F + V)
    dg, dg_second = tl.zeros([C // 2, BD], tl.float32), tl.zeros([C // 2, BD] if TWO else [1, 1], tl.float32)
    rows = tl.arange(0, C)
    HIDDEN: tl.constexpr = MASK or LOGITS or FACTORS  # whether tokens without weight may hold anything
    start, stop = run_of(i_s, splits, n, C)
    for i in range(start, stop):
        at, left = offset(i, C), n - i * C
        keep = rows < left
        x = load_tile(k + at * sk_n, sk_n, rows, left, ch, D, BD).to(tl.float32)
        tv = load_tile(v + at * sv_n, sv_n, rows, left, vs, V, BV)
        if MASK:
            keep = keep & (tl.load(seen + at * ss_n + rows * ss_n, mask=keep, other=0) != 0)
            tv = tl.where(keep[:, None], tv, 0.0)
        phi = feature(x, MAP)
        own = pick(x, query[None, :], query_second[None, :], TWO)
        w, logit = weigh(phi, own, logits + at * sl_n, factors + at * sf_n, sl_n, sf_n, rows, keep, scale, False, LOGITS, FACTORS)
        if QUERY:
            logit = tl.load(found + (here + at * H) + rows * H, mask=keep, other=float("-inf"))
        grown = tl.exp2((logit - shift) * LOG2E) if QUERY or LOGITS else keep.to(tl.float32)
        w *= grown
        c, s = angles(cos + at * (D // 2), sin + at * (D // 2), rows, left, D, BD) if TURN else (w, w)
        out = product(turn(copy(x, phi, False, TWO), c, s, TURN).to(MT), dM, rest, SPLIT, IP)
        if TWO:
            out += product(turn(copy(x, phi, True, TWO), c, s, TURN).to(MT), dM_second, rest_second, SPLIT, IP)
        if TOTAL:
            out += d_total[None, :]
        out *= w[:, None]
        store_tile(dv + at * (H * V), H * V, rows, left, vs, V, BV, tl.where(w[:, None] != 0, out, 0.0) if HIDDEN else out)
        if MASK:  # only now: before 3.8 Triton lays out operands wrong that are turned, of 16 channels and made with loaded bytes
            x = tl.where(keep[:, None], x, 0.0)
            phi = tl.where(keep[:, None], phi, 0.0)
        d_phi = turn(product(tv.to(MT), across, rest_across, SPLIT, IP), c, -s, TURN)
        if TWO:
            d_phi = pick(x, d_phi, turn(product(tv.to(MT), across_second, rest_across_second, SPLIT, IP), c, -s, TURN), TWO)
        d_phi += pick(x, dz[None, :], dz_second[None, :], TWO)
        if QUERY or LOGITS or FACTORS:
            inner = tl.sum(phi * d_phi, 1) + d_weight
            if TOTAL:
                inner += tl.sum(tv.to(tl.float32) * d_total[None, :], 1)
        d_phi *= w[:, None]
        if QUERY:
            d_score = scale * w * inner
            d_phi += d_score[:, None] * own
            dg += pairs_of_rows(d_score[:, None] * copy(x, phi, False, TWO))
            if TWO:
                dg_second += pairs_of_rows(d_score[:, None] * copy(x, phi, True, TWO))
        if LOGITS:
            tl.store(d_logits + (here + at * H) + rows * H, w * inner, mask=rows < left)
        if FACTORS:
            tl.store(d_factors + (here + at * H) + rows * H, grown * inner, mask=rows < left)
        dx = feature_back(x, phi, d_phi, MAP)
        store_tile(dk + at * (H * D), H * D, rows, left, ch, D, BD, tl.where((w != 0)[:, None], dx, 0.0) if HIDDEN else dx)
    if QUERY:
        d_query += program.to(tl.int64) * F
        tl.store(d_query + ch, tl.sum(dg, 0), mask=ch < D)
        if TWO:
            tl.store(d_query + D + ch, tl.sum(dg_second, 0), mask=ch < D)
