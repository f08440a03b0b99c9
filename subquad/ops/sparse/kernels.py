"""Triton kernels of softmax over the keys that a layout names.

`query_kernel` owns a tile of queries of one head and goes through the tiles of keys on its list: first the whole ones, which
need no mask, then the partial ones; in a loop each, or in one where tiles come by descriptors. Scores (times `unit`) are in
log 2; the row's running maximum and sum are float32:

    s = q·kᵀ    m' = max(m, max s)    p = 2^(s − m')    l' = l·2^(m − m') + Σp    o' = o·2^(m − m') + p·v

and for the gradient of the queries, with δ = Σ o·ȯ − (gradient of lse):

    p = 2^(s − lse)    ṡ = p·(ȯ·vᵀ − δ)    q̇ = scale · ṡ·k

(the gradient of a row's maximum joins ṡ at the key that has it).

`key_kernel` owns a tile of keys and goes through the tiles of queries that visit it:  v̇ = pᵀ·ȯ ,  k̇ = scale · ṡᵀ·q.

Milakov & Gimelshein (arXiv 1805.02867); Dao: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.sparse.blocks import inside_of, origin, place_of, positions, rows_of, seen_pairs, shaped, within
from subquad.ops.triton_blocks import LOG2E

INF = tl.constexpr(float("inf"))
PER_CALL = ("n", "m", "tiles", "blocks", "entries", "row_tiles", "scale")  # one compiled kernel serves all sizes


@triton.jit(do_not_specialize=PER_CALL)
def query_kernel(
    q_at, k_at, v_at, k_rows, v_rows, offsets, items, order, numbers, bits, starts, stops, q_pos, k_pos, sequence, slopes, key_bias, table,
    q_factor, k_factor, o_at, lse_at, top_at, arg_at, do_at, d_lse, d_top, log_at, delta_at, top_rows, arg_rows, dq_at, d_slope, d_factor,
    q_b, q_h, k_b, k_h, v_b, v_h, do_b, do_h, qp_b, kp_b, kb_b, kb_h, tb_h, qf_b, qf_n, qf_h, kf_b, kf_n, kf_h,
    n, m, tiles, blocks, entries, row_tiles, scale,
    QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr, ON: tl.constexpr,  # from one token to the next of q, k, v and ȯ
    GRAD: tl.constexpr, H: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, S: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr,
    RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr, REACH: tl.constexpr,
    BELOW: tl.constexpr, CAP: tl.constexpr, PLAIN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """o ``[B, N, H, V]``, lse and max ``[B, N, H]``; or (GRAD) q̇, what falls to slopes and factors, and lse and δ in the order
    of `key_kernel`'s tiles of queries ``[B, H, row_tiles · S]``. Program: a tile of M queries, a head, a batch row."""
    pid = tl.program_id(0)
    h = (pid // tiles % H).to(tl.int64)  # a head may be N · D elements from the next
    b = (pid // (tiles * H)).to(tl.int64)
    which = h // (H // LISTS)
    if ROWS:
        which += b * LISTS
    tile = tl.load(order + which * tiles + pid % tiles)
    first, o0, o1, o2 = origin(tile, M, G0, G1, G2, A0, A1, A2)
    rows, q0, q1, q2 = within(M, G0, G1, G2, A0, A1, A2)
    q0, q1, q2 = q0 + o0, q1 + o1, q2 + o2
    q_in = inside_of(q0, q1, q2, n, G0, G1, G2)
    q_first = first.to(tl.int64)
    cols, v_cols, f_cols = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BR)
    q = rows_of(q_at + b * q_b + q_first * QN + (h // GQ) * q_h, rows, QN, q_in, cols, D, BD, True)
    qp = positions(None if q_pos is None else q_pos + b * qp_b, first, rows, q0, q_in, m - n if G0 == 0 else 0)[:, None]
    qs = None if sequence is None else tl.load(sequence + first + rows, mask=q_in, other=-1)[:, None]
    slope = None if slopes is None else tl.load(slopes + h)
    of_head = None if table is None else table + h * tb_h
    runs = None if starts is None else starts + (which * blocks + first // BLOCK_Q) * RUNS
    ends = None if stops is None else stops + (which * blocks + first // BLOCK_Q) * RUNS
    if q_factor is not None:
        qf = rows_of(q_factor + b * qf_b + q_first * qf_n + h * qf_h, rows, qf_n, q_in, f_cols, R, BR, True)
        df = tl.zeros([M, BR], tl.float32)
    at = (b * n + first + rows) * H + h  # of this tile's rows, in [B, N, H]
    if GRAD:
        do = rows_of(do_at + b * do_b + q_first * ON + h * do_h, rows, ON, q_in, v_cols, V, BV, True)
        o = tl.load(o_at + at[:, None] * V + v_cols[None, :], mask=q_in[:, None] & (v_cols < V)[None, :], other=0.0)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if d_lse is not None:
            delta -= tl.load(d_lse + at, mask=q_in, other=0.0)
        lse = tl.load(lse_at + at, mask=q_in, other=INF) * LOG2E
        lse = tl.where(lse == -INF, INF, lse)  # rows that see nothing
        there = (b * H + h) * row_tiles * S + place_of(q0, q1, q2, S, G0, G1, G2, S0, S1, S2)
        tl.store(delta_at + there, delta, mask=q_in)
        tl.store(log_at + there, lse, mask=q_in)
        if d_top is not None:
            of_top = tl.load(d_top + at, mask=q_in, other=0.0)
            arg = tl.load(arg_at + at, mask=q_in, other=-1)
            tl.store(top_rows + there, of_top, mask=q_in)
            tl.store(arg_rows + there, arg, mask=q_in)
        bends = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BD], tl.float32)
    else:
        top = tl.full([M], -INF, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, BV], tl.float32)
        arg = tl.full([M], -1, tl.int32)
    unit = scale * LOG2E if PLAIN else 1.0
    near, c0, c1, c2 = within(N, G0, G1, G2, B0, B1, B2)
    part = offsets + which * (2 * tiles + 1) + 2 * tile
    ONE: tl.constexpr = k_rows is not None  # loop over all tiles: nothing then waits between whole tiles and those cut
    for PARTIAL in tl.static_range(1 if ONE else 2):
        start, middle, stop = tl.load(part + PARTIAL), tl.load(part + 1), tl.load(part + (2 if ONE else PARTIAL + 1))
        coming = tl.load(items + which * entries + start, mask=start < stop, other=0)
        for i in range(start, stop):
            item = which * entries + i
            begin, p0, p1, p2 = origin(coming, N, G0, G1, G2, B0, B1, B2)
            coming = tl.load(items + item + 1, mask=i + 1 < stop, other=0)  # a step ahead, so that nothing waits for it
            k0, k1, k2 = c0 + p0, c1 + p1, c2 + p2
            k_in = inside_of(k0, k1, k2, m, G0, G1, G2)
            k_first = begin.to(tl.int64)
            if k_rows is not None:
                k = k_rows.load([b.to(tl.int32), (h // GK).to(tl.int32), begin, 0]).reshape(N, BD)
            else:
                k = rows_of(k_at + b * k_b + k_first * KN + (h // GK) * k_h, near, KN, k_in, cols, D, BD, PARTIAL)
            kp = positions(None if k_pos is None else k_pos + b * kp_b, begin, near, k0, k_in, 0)[None, :]
            kb = None if key_bias is None else tl.load(key_bias + b * kb_b + h * kb_h + begin + near, mask=k_in, other=0.0)[None, :]
            factors = None
            if k_factor is not None:
                kf = rows_of(k_factor + b * kf_b + k_first * kf_n + h * kf_h, near, kf_n, k_in, f_cols, R, BR, ONE or PARTIAL)
                factors = tl.dot(qf, tl.trans(kf), input_precision="tf32x3")
            s, bend = shaped(tl.dot(q, tl.trans(k), input_precision=IP), factors, qp, kp, slope, kb, of_head, scale, REACH, CAP, PLAIN)
            if (i >= middle) if ONE else PARTIAL:
                number = 0 if numbers is None else tl.load(numbers + item)
                ks = None if sequence is None else tl.load(sequence + begin + near, mask=k_in, other=-2)[None, :]
                seen = None if BELOW else k_in[None, :]
                if k_pos is not None:
                    seen = k_in[None, :] & (kp >= 0)
                seen = seen_pairs(
                    seen, qp, q1[:, None], q2[:, None], kp, k1[None, :], k2[None, :], qs, ks, (first + rows)[:, None],
                    (begin + near)[None, :], number, bits, runs, ends, RULE, BLOCK_Q, BLOCK_K, RUNS,
                )  # fmt: skip
                s = tl.where(seen, s, -INF)
            if v_rows is not None:
                v = v_rows.load([b.to(tl.int32), (h // GV).to(tl.int32), begin, 0]).reshape(N, BV)
            else:
                v = rows_of(v_at + b * v_b + k_first * VN + (h // GV) * v_h, near, VN, k_in, v_cols, V, BV, PARTIAL)
            if GRAD:
                p = tl.exp2(s * unit - lse[:, None])
                ds = p * (tl.dot(do, tl.trans(v), input_precision=IP) - delta[:, None])
                if d_top is not None:
                    ds += tl.where((begin + near)[None, :] == arg[:, None], of_top[:, None], 0.0)
                if slopes is not None:
                    bends += tl.sum(ds * tl.abs(qp - kp).to(tl.float32), 1)
                if k_factor is not None:
                    df = tl.dot(ds, kf, df, input_precision="tf32x3")
                if CAP > 0:
                    ds *= 1.0 - bend * bend
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=IP)
            else:
                highest = tl.max(s, 1)
                higher = tl.maximum(top, highest)
                if arg_at is not None:  # the key of the maximum, the last one of equals within a tile
                    here = tl.max(tl.where(s == highest[:, None], (begin + near)[None, :], -1), 1)
                    arg = tl.where(highest > top, here, arg)
                base = higher * unit
                if ONE or PARTIAL or key_bias is not None:  # a row that has seen nothing yet has no finite maximum
                    base = tl.where(higher == -INF, 0.0, base)
                p = tl.exp2(s * unit - base[:, None])
                fade = tl.exp2(top * unit - base)
                total = total * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=IP)
                top = higher
    if GRAD:
        tl.store(
            dq_at + at[:, None] * D + cols[None, :], (acc * scale).to(dq_at.dtype.element_ty), mask=q_in[:, None] & (cols < D)[None, :]
        )
        if slopes is not None:
            tl.store(d_slope + (b * H + h) * tiles + tile, -tl.sum(tl.where(q_in, bends, 0.0), 0))
        if k_factor is not None:
            tl.store(d_factor + at[:, None] * R + f_cols[None, :], df, mask=q_in[:, None] & (f_cols < R)[None, :])
    else:
        o = (acc / tl.where(total > 0, total, 1.0)[:, None]).to(o_at.dtype.element_ty)
        tl.store(o_at + at[:, None] * V + v_cols[None, :], o, mask=q_in[:, None] & (v_cols < V)[None, :])
        tl.store(lse_at + at, (top * unit + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, mask=q_in)
        if top_at is not None:
            tl.store(top_at + at, top * unit / LOG2E, mask=q_in)
        if arg_at is not None:
            tl.store(arg_at + at, arg, mask=q_in)


@triton.jit(do_not_specialize=PER_CALL)
def key_kernel(
    q_at, k_at, v_at, q_rows, do_rows, offsets, items, order, numbers, bits, starts, stops, q_pos, k_pos, sequence, slopes, key_bias, table,
    q_factor, k_factor, log_at, delta_at, top_rows, arg_rows, do_at, dk_at, dv_at, d_bias, d_factor,
    q_b, q_h, k_b, k_h, v_b, v_h, do_b, do_h, qp_b, kp_b, kb_b, kb_h, tb_h, qf_b, qf_n, qf_h, kf_b, kf_n, kf_h,
    n, m, tiles, blocks, entries, row_tiles, scale,
    QN: tl.constexpr, KN: tl.constexpr, VN: tl.constexpr, ON: tl.constexpr,
    H: tl.constexpr, HS: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, LISTS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    RUNS: tl.constexpr, REACH: tl.constexpr, CAP: tl.constexpr, PLAIN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """k̇ ``[B, M, HS, D]``, v̇ ``[B, M, HS, V]``, and what falls to the bias of keys and to their factors, for each head. Program:
    a tile of N keys, one of HS heads with all heads of queries that read it, a batch row. Tiles are ``[keys, queries]``."""
    pid = tl.program_id(0)
    hs = (pid // tiles % HS).to(tl.int64)
    b = (pid // (tiles * HS)).to(tl.int64)
    group: tl.constexpr = H // HS
    which = hs * group // (H // LISTS)  # the lists of a group agree, or HS is H
    if ROWS:
        which += b * LISTS
    tile = tl.load(order + which * tiles + pid % tiles)
    first, o0, o1, o2 = origin(tile, N, G0, G1, G2, B0, B1, B2)
    rows, k0, k1, k2 = within(N, G0, G1, G2, B0, B1, B2)
    k0, k1, k2 = k0 + o0, k1 + o1, k2 + o2
    k_in = inside_of(k0, k1, k2, m, G0, G1, G2)
    k_first = first.to(tl.int64)
    cols, v_cols, f_cols = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BR)
    k = rows_of(k_at + b * k_b + k_first * KN + (hs * group // GK) * k_h, rows, KN, k_in, cols, D, BD, True)
    v = rows_of(v_at + b * v_b + k_first * VN + (hs * group // GV) * v_h, rows, VN, k_in, v_cols, V, BV, True)
    kp = positions(None if k_pos is None else k_pos + b * kp_b, first, rows, k0, k_in, 0)[:, None]
    ks = None if sequence is None else tl.load(sequence + first + rows, mask=k_in, other=-2)[:, None]
    unit = scale * LOG2E if PLAIN else 1.0
    near, c0, c1, c2 = within(M, G0, G1, G2, A0, A1, A2)
    part = offsets + which * (2 * tiles + 1) + 2 * tile
    dk = tl.zeros([N, BD], tl.float32)
    dv = tl.zeros([N, BV], tl.float32)
    for j in range(group):
        h = hs * group + j
        slope = None if slopes is None else tl.load(slopes + h)
        of_head = None if table is None else table + h * tb_h
        kb = None if key_bias is None else tl.load(key_bias + b * kb_b + h * kb_h + first + rows, mask=k_in, other=0.0)[:, None]
        sums = tl.zeros([N], tl.float32)
        if k_factor is not None:
            kf = rows_of(k_factor + b * kf_b + k_first * kf_n + h * kf_h, rows, kf_n, k_in, f_cols, R, BR, True)
            df = tl.zeros([N, BR], tl.float32)
        ONE: tl.constexpr = q_rows is not None
        for PARTIAL in tl.static_range(1 if ONE else 2):
            start, middle, stop = tl.load(part + PARTIAL), tl.load(part + 1), tl.load(part + (2 if ONE else PARTIAL + 1))
            coming = tl.load(items + which * entries + start, mask=start < stop, other=0)
            for i in range(start, stop):
                item = which * entries + i
                visitor = coming
                coming = tl.load(items + item + 1, mask=i + 1 < stop, other=0)
                begin, p0, p1, p2 = origin(visitor, M, G0, G1, G2, A0, A1, A2)
                q0, q1, q2 = c0 + p0, c1 + p1, c2 + p2
                q_in = inside_of(q0, q1, q2, n, G0, G1, G2)
                q_first = begin.to(tl.int64)
                if q_rows is not None:
                    q = q_rows.load([b.to(tl.int32), (h // GQ).to(tl.int32), begin, 0]).reshape(M, BD)
                else:
                    q = rows_of(q_at + b * q_b + q_first * QN + (h // GQ) * q_h, near, QN, q_in, cols, D, BD, True)
                qp = positions(None if q_pos is None else q_pos + b * qp_b, begin, near, q0, q_in, m - n if G0 == 0 else 0)[None, :]
                factors = None
                if q_factor is not None:
                    qf = rows_of(q_factor + b * qf_b + q_first * qf_n + h * qf_h, near, qf_n, q_in, f_cols, R, BR, True)
                    factors = tl.dot(kf, tl.trans(qf), input_precision="tf32x3")
                at = ((b * H + h) * row_tiles + visitor) * M + tl.arange(0, M)
                s, bend = shaped(tl.dot(k, tl.trans(q), input_precision=IP), factors, qp, kp, slope, kb, of_head, scale, REACH, CAP, PLAIN)
                if (i >= middle) if ONE else PARTIAL:
                    number = 0 if numbers is None else tl.load(numbers + item)
                    qs = None if sequence is None else tl.load(sequence + begin + near, mask=q_in, other=-1)[None, :]
                    runs = None if starts is None else starts + (which * blocks + begin // BLOCK_Q) * RUNS
                    ends = None if stops is None else stops + (which * blocks + begin // BLOCK_Q) * RUNS
                    seen = None if k_pos is None else kp >= 0  # keys that are not there are not written either
                    seen = seen_pairs(
                        seen, qp, q1[None, :], q2[None, :], kp, k1[:, None], k2[:, None], qs, ks, (begin + near)[None, :],
                        (first + rows)[:, None], number, bits, runs, ends, RULE, BLOCK_Q, BLOCK_K, RUNS,
                    )  # fmt: skip
                    s = tl.where(seen, s, -INF)
                p = tl.exp2(s * unit - tl.load(log_at + at)[None, :])
                if q_rows is not None:
                    do = do_rows.load([b.to(tl.int32), h.to(tl.int32), begin, 0]).reshape(M, BV)
                else:
                    do = rows_of(do_at + b * do_b + q_first * ON + h * do_h, near, ON, q_in, v_cols, V, BV, True)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=IP)
                ds = p * (tl.dot(v, tl.trans(do), input_precision=IP) - tl.load(delta_at + at)[None, :])
                if top_rows is not None:
                    here = (first + rows)[:, None] == tl.load(arg_rows + at)[None, :]
                    ds += tl.where(here, tl.load(top_rows + at)[None, :], 0.0)
                if key_bias is not None:
                    sums += tl.sum(ds, 1)
                if k_factor is not None:
                    df = tl.dot(ds, qf, df, input_precision="tf32x3")
                if CAP > 0:
                    ds *= 1.0 - bend * bend
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=IP)
        if key_bias is not None:
            tl.store(d_bias + (b * H + h) * m + first + rows, sums, mask=k_in)
        if k_factor is not None:
            of_factor = ((b * m + first + rows) * H + h)[:, None] * R + f_cols[None, :]
            tl.store(d_factor + of_factor, df, mask=k_in[:, None] & (f_cols < R)[None, :])
    out = ((b * m + first + rows) * HS + hs)[:, None]
    tl.store(dk_at + out * D + cols[None, :], (dk * scale).to(dk_at.dtype.element_ty), mask=k_in[:, None] & (cols < D)[None, :])
    tl.store(dv_at + out * V + v_cols[None, :], dv.to(dv_at.dtype.element_ty), mask=k_in[:, None] & (v_cols < V)[None, :])
