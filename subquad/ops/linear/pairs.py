"""Pairs within a chunk under strong decays per channel, exact where a product of two factors would overflow.

For halves of h = 1, 2, 4, … tokens, each pair of different tokens stands in the two halves of one block of 2h. Its
weight is 2^(sum from the middle to the later token) · 2^(sum after the earlier one to the middle): both factors are at
most 1, and their sums are made by adding only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import FLOOR, LOG2E, count_slots, find_chunk, load_tile, store_tile


@triton.jit
def to_middle(
    base, stride, rows, left, cols, width: tl.constexpr, padded: tl.constexpr, size: tl.constexpr, C: tl.constexpr, h: tl.constexpr
):
    """Each token's factor ``[C, size]`` toward the middle of its block of 2h tokens."""
    g = tl.maximum(load_tile(base, stride, rows, left, cols, width, padded).to(tl.float32) * LOG2E, FLOOR)
    inner = rows % h != h - 1
    after = tl.maximum(load_tile(base + stride, stride, rows, left - 1, cols, width, padded).to(tl.float32) * LOG2E, FLOOR)
    after = tl.where(inner[:, None], after, 0.0)
    if h > 1:
        g = tl.reshape(tl.cumsum(tl.reshape(g, [C // h, h, size]), 1), [C, size])
        after = tl.reshape(tl.cumsum(tl.reshape(after, [C // h, h, size]), 1, reverse=True), [C, size])
    return tl.exp2(tl.where((rows // h % 2 == 1)[:, None], g, after))


@triton.jit
def halves(rows, h: tl.constexpr, REVERSE: tl.constexpr):
    """The pairs in the two halves of one block of 2h tokens, the first of a pair the later, or with REVERSE the earlier."""
    block, later = rows // (2 * h), rows // h % 2 == 1
    seen = (block[:, None] == block[None, :]) & (later[:, None] != later[None, :])
    return seen & (later[None, :] if REVERSE else later[:, None])


@triton.jit
def none_risky(risky, first, N, C: tl.constexpr, CHUNKS: tl.constexpr):
    """Whether all of CHUNKS chunks from chunk `first` on, of a row that is not packed, may be skipped."""
    i = first + tl.arange(0, CHUNKS)
    return tl.max(tl.load(risky + i, mask=i < tl.cdiv(N, C), other=0), 0) == 0


@triton.jit(do_not_specialize=["N", "sequences", "scale"])
def pairs_kernel(
    a, b, c, g, cu, risky, o,
    sa_b, sa_n, sa_h, sb_b, sb_n, sb_h, sc_b, sc_n, sc_h, sg_b, sg_n, sg_h, N, sequences, scale,
    H: tl.constexpr, GA: tl.constexpr, GB: tl.constexpr, GC: tl.constexpr, GG: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Adds scale · Σ W_ts (a_t · b_s) c_s over the pairs of risky chunks to o ``[B, N, H, V]``, W per channel of a and b.

    Arguments are those of `pass_kernel`, with the log decays g ``[B, N, H/GG, D]``. A program looks through CHUNKS chunks.
    """
    i_bh, i_v, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    risky += (i_b * (H // GG) + i_h // GG) * count_slots(N, sequences, C, PACKED)
    if not PACKED:  # noqa: SIM102
        if none_risky(risky, i_c * CHUNKS, N, C, CHUNKS):
            return
    rows, vs = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    VP: tl.constexpr = BV if V % BV else V
    DP: tl.constexpr = BD if D % BD else D
    MT: tl.constexpr = tl.float32 if WIDE else a.dtype.element_ty
    for u in range(0, CHUNKS):
        i_q, first, left = find_chunk(cu, sequences, i_c * CHUNKS + u, N, C, PACKED)
        if tl.load(risky + first // C + i_q, mask=left > 0, other=0) > 0:
            base_g = g + i_b * sg_b + first * sg_n + (i_h // GG) * sg_h
            base_a = a + i_b * sa_b + first * sa_n + (i_h // GA) * sa_h
            base_b = b + i_b * sb_b + first * sb_n + (i_h // GB) * sb_h
            tc = load_tile(c + i_b * sc_b + first * sc_n + (i_h // GC) * sc_h, sc_n, rows, left, vs, V, VP).to(MT)
            scores = tl.zeros([C, C], tl.float32)
            for d in range(0, D, BD):
                ds = d + tl.arange(0, BD)
                ta = load_tile(base_a, sa_n, rows, left, ds, D, DP).to(MT)
                tb = load_tile(base_b, sb_n, rows, left, ds, D, DP).to(MT)
                same = tl.dot(ta, tl.trans(tb), input_precision=IP)
                scores += tl.where(rows[:, None] == rows[None, :], same, 0.0)
                for level in tl.static_range(6):
                    w = to_middle(base_g, sg_n, rows, left, ds, D, DP, BD, C, 2**level)
                    part = tl.dot((ta * w).to(MT), tl.trans((tb * w).to(MT)), input_precision=IP)
                    scores += tl.where(halves(rows, 2**level, REVERSE), part, 0.0)
            out = o + ((i_b * N + first) * H + i_h) * V
            acc = tl.dot(scores.to(MT), tc, input_precision=IP) * scale
            acc += load_tile(out, H * V, rows, left, vs, V, VP).to(tl.float32)
            store_tile(out, H * V, rows, left, vs, V, VP, acc)


@triton.jit(do_not_specialize=["N", "sequences", "scale"])
def pairs_backward_kernel(
    q, k, v, do, g, cu, risky, dq, dk, flow,
    sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, so_b, so_n, so_h, sg_b, sg_n, sg_h, N, sequences, scale,
    H: tl.constexpr, HS: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """What the pairs of risky chunks give to q̇, k̇ ``[B, N, H, D]`` and with GATE to q∘q̇ − k∘k̇, flow ``[B, N, HS, D]``.

    Query head h reads head h // GQ of q and h // (H / HS) of g; state head s reads s // GK of k and s // GV of v. A token
    with itself is left out of the flow, to which it gives nothing.
    """
    i_bs, i_d, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_b, i_s = i_bs // HS, i_bs % HS
    risky += i_bs * count_slots(N, sequences, C, PACKED)
    if not PACKED:  # noqa: SIM102
        if none_risky(risky, i_c * CHUNKS, N, C, CHUNKS):
            return
    rows, vs, ds = tl.arange(0, C), tl.arange(0, BV), i_d * BD + tl.arange(0, BD)
    DP: tl.constexpr = BD if D % BD else D
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    for u in range(0, CHUNKS):
        i_q, first, left = find_chunk(cu, sequences, i_c * CHUNKS + u, N, C, PACKED)
        if tl.load(risky + first // C + i_q, mask=left > 0, other=0) > 0:
            base_g = g + i_b * sg_b + first * sg_n + i_s * sg_h
            tk = load_tile(k + i_b * sk_b + first * sk_n + (i_s // GK) * sk_h, sk_n, rows, left, ds, D, DP).to(tl.float32)
            tv = load_tile(v + i_b * sv_b + first * sv_n + (i_s // GV) * sv_h, sv_n, rows, left, vs, V, BV).to(MT)
            e = tl.zeros([C, BD], tl.float32)
            for r in tl.static_range(H // HS):
                i_h = i_s * (H // HS) + r
                tq = load_tile(q + i_b * sq_b + first * sq_n + (i_h // GQ) * sq_h, sq_n, rows, left, ds, D, DP).to(tl.float32)
                to = load_tile(do + i_b * so_b + first * so_n + i_h * so_h, so_n, rows, left, vs, V, BV).to(MT)
                scores = tl.dot(to, tl.trans(tv), input_precision=IP)
                same = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)[:, None]
                to_q, to_k = same * tk, same * tq
                for level in tl.static_range(6):
                    w = to_middle(base_g, sg_n, rows, left, ds, D, DP, BD, C, 2**level)
                    part = tl.where(halves(rows, 2**level, False), scores, 0.0).to(MT)
                    wq, wk = (tq * w).to(MT), (tk * w).to(MT)
                    # the other way round, with more rows than columns, Triton 3.6 makes it read beyond its shared memory
                    from_k = tl.trans(tl.dot(tl.trans(wk), tl.trans(part), input_precision=IP))
                    from_q = tl.trans(tl.dot(tl.trans(wq), part, input_precision=IP))
                    to_q += w * from_k
                    to_k += w * from_q
                    e += wq.to(tl.float32) * from_k - wk.to(tl.float32) * from_q
                at = ((i_b * N + first) * H + i_h) * D
                store_tile(dq + at, H * D, rows, left, ds, D, DP, to_q * scale)
                store_tile(dk + at, H * D, rows, left, ds, D, DP, to_k * scale)
            if GATE:
                store_tile(flow + ((i_b * N + first) * HS + i_s) * D, HS * D, rows, left, ds, D, DP, e * scale)
