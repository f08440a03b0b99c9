"""The pass of the linear recurrence, in Triton: one kernel, launched four times, is the operator and its backward.

With W_ts = 2^(G_t − G_s), a pass gives o_t = scale · Σ_{s≤t} W_ts (a_t · b_s) c_s, or the sum over s ≥ t with `REVERSE`.
A program owns one sequence, one head and one tile of the columns of c. It keeps the state Σ W b cᵀ ``[BD, BV]`` in
registers from the first chunk to the last, so that a, b and c are read once, o is written once and no state is stored.
The delta rule's gradients are such passes too, with a second sum that is strict, s ≠ t.

A decay per channel weighs the rows of the state (`CHANNEL`) in o and v̇, and its columns (`COLUMN`) in q̇ and k̇; the tokens
come weighed from `weigh.py`. Decays per token weigh pairs by a product, 2^(g_t − g_C) · 2^(g_C − g_s), or where that would
overflow one by one: each way is a launch of its own, which leaves the other's segments alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import (
    FLOOR,
    LOG2E,
    count_slots,
    decays_much,
    find_chunk,
    in_two,
    load_tile,
    pair_weights,
    rounded,
    sequence,
    store_tile,
)

TOKEN, CHANNEL, COLUMN = (tl.constexpr(i) for i in (1, 2, 3))  # what DECAY is per; 0 is none
KEYS, QUERIES = (tl.constexpr(i) for i in (1, 2))  # what MORE are; 0 is none


@triton.jit(do_not_specialize=["N", "sequences"])
def sums_kernel(
    g, P, cu, sg_b, sg_n, sg_h, N, sequences, HP: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Running sums within each chunk of log decays g ``[B, N, HP]``, as log2: P ``[B, HP, slots, C]``, level past the end."""
    i_c, i_b, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_q, first, left = find_chunk(cu, sequences, i_c, N, C, PACKED)
    slots = count_slots(N, sequences, C, PACKED)
    rows = tl.arange(0, C)
    x = tl.load(g + i_b.to(tl.int64) * sg_b + i_h.to(tl.int64) * sg_h + (first + rows) * sg_n, mask=rows < left, other=0.0)
    x = tl.maximum(x.to(P.dtype.element_ty) * LOG2E, FLOOR)
    at = ((i_b.to(tl.int64) * HP + i_h) * slots + first // C + i_q) * C
    tl.store(P + at + rows, tl.cumsum(x, 0), mask=(rows >= 0) & (left > 0))


@triton.jit
def read_state(ta, read, rest, SPLIT: tl.constexpr, IP: tl.constexpr):
    """Queries times the state, which with SPLIT comes in two parts."""
    if SPLIT:
        return tl.dot(ta, read, tl.dot(ta, rest))
    else:
        return tl.dot(ta, read, input_precision=IP)


@triton.jit
def add_pairs(acc, scores, p, kept, tc, source, EXACT: tl.constexpr, MT: tl.constexpr, IP: tl.constexpr):
    """acc with the pairs kept: weighed here, or already by what they are made of and what acc is multiplied by later."""
    if EXACT:
        return tl.dot((scores * pair_weights(p, kept)).to(MT), tc, acc, input_precision=IP)
    else:
        return tl.dot(tl.where(kept, scores, 0.0).to(MT), source, acc, input_precision=IP)


@triton.jit(do_not_specialize=["N", "segments", "scale", "start_scale"])
def pass_kernel(
    a, b, c, x, w, add, P, risky, cu, start, o, more, final, dots, parts, totals,
    sa_b, sa_h, sb_b, sb_h, sc_b, sc_h, sx_b, sx_h, N, segments, scale, start_scale,
    sa_n: tl.constexpr, sb_n: tl.constexpr, sc_n: tl.constexpr, sx_n: tl.constexpr,
    H: tl.constexpr, GA: tl.constexpr, GB: tl.constexpr, GC: tl.constexpr, GX: tl.constexpr, GP: tl.constexpr, GS: tl.constexpr,
    ONCE: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXACT: tl.constexpr, OTHER: tl.constexpr, REVERSE: tl.constexpr, START: tl.constexpr, CUT: tl.constexpr,
    FINAL: tl.constexpr, LEFT: tl.constexpr, OUT: tl.constexpr, MORE: tl.constexpr, ADD: tl.constexpr, DOT: tl.constexpr,
    SPLIT: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """One pass over one segment of one sequence, for one head and one tile of columns.

    Args:
        a ``[B, N, H/GA, D]``, b ``[B, N, H/GB, D]``, c ``[B, N, H/GC, V]``, by strides; o ``[B, N, H, V]``, contiguous.
        w ``[B, N, H, D]``, contiguous, with MORE: KEYS of a second, strict sum of the same queries a, over values x, which shares
            the state; or further QUERIES of it, whose strict sums go to `more`, like o. x ``[B, N, H/GX, V]``, by strides.
        add: with ADD ``[B, N, H, V]``, contiguous: joins the output.
        P: decays as log2: per token `sums_kernel`'s, per channel the totals of `weigh_kernel`.
        risky: per channel, marks of the chunks whose pairs are left out.
        EXACT: per token, weigh pairs one by one, not by products, which overflow where a chunk decays much.
        OTHER: leave each segment for which that is not the way to the other launch.
        start, final: states ``[sequences, heads, D, V]`` before and after. Heads of a group of GS share one; with ONCE, as for
            gradients, the start enters the first of a group, and each head has its own final.
        parts: what each segment but the last adds to the state, ``[sequences, heads, segments, D, V]``: written without OUT, and with
            CUT, of several segments, added up by those that come later. Heads share it as `final`.
        LEFT: per token, weigh and round b, not c, where they enter the state, as the row sums of the backward do: what a final
            state adds to the decays' gradient then cancels with them.
        dots: with DOT ``[B, H, tiles, N]``: Σ over the tile's columns of o·x, without `add` (in float32 also without s = t), and of more·c.
        totals: beside `parts`, the decay over the segment, as log2 ``[sequences, heads, segments, D or V]``.
        SPLIT: read the state in two parts of MT, as the gradient of decays needs: between q·q̇ and k·k̇ much cancels, and
            rounding would add up. For that x is also weighed and rounded as the other direction's sources are.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)  # one axis holds all: the others end at 65,535; tiles of a head are neighbours
    here_segments = segments if OUT else segments - 1
    i_v, i_s = program % TILES, program // TILES % here_segments
    if REVERSE and not OUT:
        i_s += 1
    i_qh = program // (TILES * here_segments)
    i_q, i_h = i_qh // H, (i_qh % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    chunks = tl.cdiv(n, C)
    per = tl.cdiv(chunks, segments)
    count = tl.minimum(per, chunks - i_s * per)  # below 1 where the segment is empty
    rows, ds, vs = tl.arange(0, C), tl.arange(0, BD), i_v * BV + tl.arange(0, BV)
    VP: tl.constexpr = BV if V % BV else V  # padded beyond V only where tiles do not fit
    MT: tl.constexpr = tl.float32 if WIDE else a.dtype.element_ty
    PW: tl.constexpr = C if DECAY == TOKEN else D if DECAY == CHANNEL else V  # what P holds of a chunk
    seen = (rows[:, None] <= rows[None, :]) if REVERSE else (rows[:, None] >= rows[None, :])
    others = seen & (rows[:, None] != rows[None, :])
    # s = t cancels in the gradient of decays; beside strong ones it is most of a row sum, and stays out of it for its digits, and
    # beside weak ones as well: the other direction may have other segments, where these pairs are weighed the other way
    OWN: tl.constexpr = DOT and tl.float32 == MT
    seen = others if OWN else seen

    here = (i_b * N + begin) * H + i_h
    b += i_b * sb_b + begin * sb_n + (i_h // GB) * sb_h
    c += i_b * sc_b + begin * sc_n + (i_h // GC) * sc_h
    if OUT:
        a += i_b * sa_b + begin * sa_n + (i_h // GA) * sa_h
        o += here * V
    if DOT or MORE == KEYS:
        x += i_b * sx_b + begin * sx_n + (i_h // GX) * sx_h
    if MORE:
        w += here * D
    if MORE == QUERIES and OUT:
        more += here * V
    if DOT:
        dots += ((i_b * H + i_h) * TILES + i_v) * N + begin
    if ADD:
        add += here * V
    if DECAY >= TOKEN:
        slots = count_slots(N, tl.num_programs(0) // (TILES * here_segments * H), C, PACKED)
        slot = (i_b * (H // GP) + i_h // GP) * slots + begin // C + (i_q if PACKED else 0) + i_s * per
        P += slot.to(tl.int64) * PW
    if DECAY >= CHANNEL:
        risky += slot
    if DECAY == TOKEN or DECAY == CHANNEL:  # noqa: SIM109
        pw, in_p = ds if DECAY == CHANNEL else rows, (ds < D) if DECAY == CHANNEL else (rows >= 0)
    if DECAY == COLUMN:
        pw, in_p = vs, vs < V
    if DECAY == TOKEN and OTHER:  # noqa: SIM102
        if decays_much(P, count, C) != EXACT:
            return

    S = tl.zeros([BD, BV], tl.float32)
    cell = ds[:, None] * V + vs[None, :]
    inside = (ds < D)[:, None] & (vs < V)[None, :]
    shared = i_q * (H // GS) + i_h // GS
    state = (i_q * H + i_h if ONCE else shared).to(tl.int64)
    if START:
        mask = inside & (i_h % GS == 0) if ONCE else inside
        S += tl.load(start + shared.to(tl.int64) * (D * V) + cell, mask=mask, other=0.0) * start_scale
    if CUT:
        for i in range(0, segments - 1 - i_s if REVERSE else i_s):
            at = state * segments + (segments - 1 - i if REVERSE else i)
            if DECAY == CHANNEL:
                S *= tl.exp2(tl.load(totals + at * D + ds, mask=ds < D, other=0.0))[:, None]
            elif DECAY:
                S *= tl.exp2(tl.load(totals + at * V + vs, mask=vs < V, other=0.0))[None, :]
            S += tl.load(parts + at * (D * V) + cell, mask=inside, other=0.0)
    if not OUT:
        passed = tl.zeros([BD if DECAY == CHANNEL else BV], tl.float32)

    if DECAY >= TOKEN:  # loaded a chunk ahead
        j = count - 1 if REVERSE else 0
        next_p = tl.load(P + j * PW + pw, mask=in_p & (count > 0), other=0.0)
        if DECAY == TOKEN:
            next_last = tl.load(P + j * PW + C - 1, mask=count > 0, other=0.0)
        else:
            next_last = tl.load(risky + j, mask=count > 0, other=0)
    for i in range(0, count):
        j = count - 1 - i if REVERSE else i
        at = ((i_s * per + j) * C).to(tl.int64)
        left = n - (i_s * per + j) * C
        tb = load_tile(b + at * sb_n, sb_n, rows, left, ds, D, BD).to(MT)
        tc = load_tile(c + at * sc_n, sc_n, rows, left, vs, V, VP).to(MT)
        if OUT:
            ta = load_tile(a + at * sa_n, sa_n, rows, left, ds, D, BD).to(MT)
        if DOT or MORE == KEYS:
            tx = load_tile(x + at * sx_n, sx_n, rows, left, vs, V, VP)
        if ADD:
            added = load_tile(add + at * (H * V), H * V, rows, left, vs, V, VP)

        # weights: p reads the state before, total − p enters the state after, total carries the state over the chunk
        p, kept, source = rows, seen, tc
        if DECAY >= TOKEN:
            p, last = next_p, next_last
            ahead = j - 1 if REVERSE else j + 1
            next_p = tl.load(P + ahead * PW + pw, mask=in_p & (i + 1 < count), other=0.0)
            if DECAY == TOKEN:
                total = last
                next_last = tl.load(P + ahead * PW + C - 1, mask=i + 1 < count, other=0.0)
            else:
                next_last = tl.load(risky + ahead, mask=i + 1 < count, other=0)
        full = S
        if DECAY == TOKEN:
            p = total - p if REVERSE else p
            enters = tl.exp2((total - p).to(tl.float32))[:, None]
            source = (tc * enters).to(MT)
            row = tl.exp2((p if EXACT else p - total).to(tl.float32))[:, None]
            S *= tl.exp2(total.to(tl.float32))
            full = full if EXACT else S
        if DECAY >= CHANNEL:
            kept = seen & (last == 0)
            base = tl.exp2(tl.where(last == 0, p, 0.0))
            whole = tl.exp2(tl.where(last == 0, 0.0, p)) if REVERSE else tl.exp2(p)
            base = base[:, None] if DECAY == CHANNEL else base[None, :]
            full = S if REVERSE else S * base
            S *= whole[:, None] if DECAY == CHANNEL else whole[None, :]

        read, rest = in_two(full, MT) if SPLIT else (full.to(MT), tc)
        if OUT:
            scores = tl.dot(ta, tl.trans(tb), input_precision=IP)
            acc = read_state(ta, read, rest, SPLIT, IP)
        if DECAY == TOKEN and LEFT:
            S = tl.dot(tl.trans((tb * enters).to(MT)), tc, S, input_precision=IP)
        else:
            S = tl.dot(tl.trans(tb), source, S, input_precision=IP)
        if DOT or MORE == KEYS:
            tx = tx.to(tl.float32)
        if DOT:
            if EXACT:
                products = acc * (rounded(tx * row, MT) - tx * row)
            else:
                mirrored = rounded(tx * tl.exp2(p.to(tl.float32))[:, None], MT)
        if OUT:
            acc = acc * row if EXACT else acc
            acc = add_pairs(acc, scores, p, kept, tc, source, EXACT, MT, IP)
            if OWN:
                own = tl.sum(tl.where(rows[:, None] == rows[None, :], scores, 0.0), 1)[:, None]
                own = own if EXACT else own * enters
        if MORE == KEYS:
            tw = load_tile(w + at * (H * D), H * D, rows, left, ds, D, BD).to(MT)
            source = (tx * enters if DECAY == TOKEN else tx).to(MT)
            if OUT:
                acc = add_pairs(acc, tl.dot(ta, tl.trans(tw), input_precision=IP), p, others, tx.to(MT), source, EXACT, MT, IP)
            S = tl.dot(tl.trans(tw), source, S, input_precision=IP)
        if DECAY >= CHANNEL and REVERSE:
            S *= base

        if DOT:
            products = products + acc * tx if EXACT else acc * mirrored
            factor = scale if EXACT else scale * tl.exp2(-total.to(tl.float32))
            summed = tl.sum(products, 1)
            if MORE != QUERIES:
                tl.store(dots + at + rows, summed * factor, mask=rows < left)
        if OWN:
            acc += own * tc
        if OUT:
            acc *= row * scale if DECAY == TOKEN and not EXACT else scale
            if ADD:
                acc += added.to(tl.float32)
            store_tile(o + at * (H * V), H * V, rows, left, vs, V, VP, acc)
            if MORE == QUERIES:  # loaded late, as registers are few
                tw = load_tile(w + at * (H * D), H * D, rows, left, ds, D, BD).to(MT)
                acc = read_state(tw, read, rest, SPLIT, IP)
                if DOT and EXACT:
                    products = acc * (rounded(tc.to(tl.float32) * row, MT) - tc.to(tl.float32) * row)
                acc = acc * row if EXACT else acc
                acc = add_pairs(acc, tl.dot(tw, tl.trans(tb), input_precision=IP), p, others, tc, source, EXACT, MT, IP)
                if DOT:
                    mirrored = tc.to(tl.float32) if EXACT else rounded(tc.to(tl.float32) * tl.exp2(p.to(tl.float32))[:, None], MT)
                    products = products + acc * mirrored if EXACT else acc * mirrored
                    tl.store(dots + at + rows, (summed + tl.sum(products, 1)) * factor, mask=rows < left)
                acc *= row * scale if DECAY == TOKEN and not EXACT else scale
                store_tile(more + at * (H * V), H * V, rows, left, vs, V, VP, acc)
        elif DECAY:
            passed += p if DECAY >= CHANNEL else total.to(tl.float32)

    if FINAL:
        mask = inside if ONCE else inside & (i_h % GS == 0)
        tl.store(final + state * (D * V) + cell, S, mask=mask & (i_s == (0 if REVERSE else segments - 1)))
    if not OUT:
        at = state * segments + i_s
        tl.store(parts + at * (D * V) + cell, S, mask=inside)
        if DECAY == CHANNEL:
            tl.store(totals + at * D + ds, passed, mask=(ds < D) & (i_v == 0))
        elif DECAY:
            tl.store(totals + at * V + vs, passed, mask=vs < V)


@triton.jit(do_not_specialize=["N"])
def gate_kernel(
    dq, dk, at_end, cu, dg, N, HS: tl.constexpr, TQ: tl.constexpr, TK: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK: tl.constexpr, END: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """ġ ``[B, N, HS]`` per token: the running sum, from the end and from `at_end` ``[sequences, HS]`` on, of
    Ġ = q·q̇ − k·k̇, whose parts are the rows of dq ``[B, HS, TQ, N]`` and dk ``[B, HS, TK, N]``."""
    i_q, i_h = tl.program_id(0), tl.program_id(1)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    at_q = dq + (i_b * HS + i_h) * TQ * N + begin + tl.arange(0, BQ)[:, None] * N.to(tl.int64)
    at_k = dk + (i_b * HS + i_h) * TK * N + begin + tl.arange(0, BK)[:, None] * N.to(tl.int64)
    in_q, in_k = (tl.arange(0, BQ) < TQ)[:, None], (tl.arange(0, BK) < TK)[:, None]
    carry = tl.load(at_end + i_q * HS + i_h) if END else 0.0
    blocks = tl.cdiv(n, BLOCK)
    for i in range(0, blocks):
        t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        here = (t < n)[None, :]
        e = tl.sum(tl.load(at_q + t[None, :], mask=in_q & here, other=0.0), 0)
        e -= tl.sum(tl.load(at_k + t[None, :], mask=in_k & here, other=0.0), 0)
        sums = tl.cumsum(e, 0, reverse=True) + carry
        tl.store(dg + ((i_b * N + begin) + t) * HS + i_h, sums.to(dg.dtype.element_ty), mask=t < n)
        carry += tl.sum(e, 0)
