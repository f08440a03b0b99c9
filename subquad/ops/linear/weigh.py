"""Decays per channel, applied before the pass and after it, so that the pass itself only weighs its state.

In a chunk with running sums g of the log decays (as log2, their total G), o = pass(q, k, v) becomes

    q̂ = q ∘ 2^(g − base),  k̃ = k ∘ 2^(G − g)        o = q̂ (2^base ∘ S) + tril(q̂ k̃ᵀ) v,    S ← 2^G ∘ S + k̃ᵀ v

with base = G, so that 2^(g_t − G) 2^(G − g_s) weighs a pair. The backward runs on the same q̂ and k̃:

    q̇ = 2^(g − base) ∘ [ȯ (S ∘ 2^base) + tril(ȯ vᵀ) k̃],    k̇ = 2^(G − g) ∘ [v R + triu(v ȯᵀ) q̂],    Ġ = q̂ ∘ […] − k̃ ∘ […]

Where a chunk decays by more than 2^-100 in some channel, base is 0, and `pairs.py` computes the pairs within the chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import FLOOR, LOG2E, SAFE, count_slots, find_chunk, load_tile, run_of, sequence, store_tile

RUN = tl.constexpr(4)  # tokens whose sums one thread makes by itself


@triton.jit
def by_runs(C: tl.constexpr):
    """The token of each row of a tile: neighbours stand a fourth of the tile apart, where one thread has them all."""
    r = tl.arange(0, C)
    return r % (C // RUN) * RUN + r // (C // RUN)


@triton.jit
def running(x, REVERSE: tl.constexpr):
    """Sums of x ``[C, B]`` through each token, from the first or with REVERSE the last, for rows `by_runs`."""
    x = tl.reshape(x, [RUN, x.shape[0] // RUN, x.shape[1]])
    own = tl.sum(x, 0)
    others = tl.cumsum(own, 0, reverse=REVERSE) - own
    return tl.reshape(tl.cumsum(x, 0, reverse=REVERSE) + others[None, :, :], [x.shape[1] * RUN, x.shape[2]])


@triton.jit
def load_decays(base, stride, rows, left, cols, width: tl.constexpr, padded: tl.constexpr, EXACT: tl.constexpr):
    """A chunk's log2 decays: sums through each token and sums after it ``[C, padded]``, and their total ``[padded]``."""
    g = load_tile(base, stride, rows, left, cols, width, padded).to(tl.float64 if EXACT else tl.float32)
    g = tl.maximum(g * LOG2E, FLOOR)
    through = running(g, False)
    total = tl.min(through, 0)  # the last: sums of logs ≤ 0 only fall
    return through.to(tl.float32), (total[None, :] - through).to(tl.float32), total.to(tl.float32)


@triton.jit(do_not_specialize=["N", "sequences"])
def weigh_kernel(
    q, k, g, cu, q_hat, k_hat, total, risky,
    sq_b, sq_n, sq_h, sk_b, sk_n, sk_h, sg_b, sg_n, sg_h, N, sequences,
    H: tl.constexpr, HS: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """q̂ ``[B, N, H, D]`` and k̃ ``[B, N, HS, D]`` of one chunk of one head of the state.

    Also total ``[B, HS, slots, D]``, and 1 in risky ``[B, HS, slots]`` where base is 0, as products would overflow.
    Query head h reads head h // GQ of q, state head s head s // GK of k.
    """
    i_c, i_s, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_q, first, left = find_chunk(cu, sequences, i_c, N, C, PACKED)
    if left <= 0:
        return
    rows, ds = by_runs(C), tl.arange(0, BD)
    through, after, whole = load_decays(g + i_b * sg_b + first * sg_n + i_s * sg_h, sg_n, rows, left, ds, D, BD, EXACT)
    safe = tl.min(whole, 0) >= SAFE
    slot = (i_b * HS + i_s) * count_slots(N, sequences, C, PACKED) + first // C + i_q
    tl.store(total + slot * D + ds, whole, mask=ds < D)
    tl.store(risky + slot, tl.where(safe, 0, 1))
    tk = load_tile(k + i_b * sk_b + first * sk_n + i_s // GK * sk_h, sk_n, rows, left, ds, D, BD).to(tl.float32)
    store_tile(k_hat + ((i_b * N + first) * HS + i_s) * D, HS * D, rows, left, ds, D, BD, tk * tl.exp2(after))
    weight = tl.exp2(tl.where(safe, -after, through))
    for i in tl.static_range(H // HS):
        i_h = i_s * (H // HS) + i
        tq = load_tile(q + i_b * sq_b + first * sq_n + i_h // GQ * sq_h, sq_n, rows, left, ds, D, BD).to(tl.float32)
        store_tile(q_hat + ((i_b * N + first) * H + i_h) * D, H * D, rows, left, ds, D, BD, tq * weight)


@triton.jit(do_not_specialize=["N", "parts", "scale"])
def unweigh_kernel(
    g, cu, q_hat, k_hat, aq, ak, risky, at_end, sums, dq, dk, dg, sg_b, sg_n, sg_h, N, parts, scale,
    H: tl.constexpr, HS: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, C: tl.constexpr,
    EXACT: tl.constexpr, GATE: tl.constexpr, CUT: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the passes' aq, ak ``[B, N, H, D]`` to q̇, k̇ ``[B, N, H, D]`` and with GATE ġ ``[B, N, HS, D]``.

    dq, dk and dg hold what the pairs of risky chunks gave. A program walks one tile of channels of one head of the state from
    the end, and sums Ġ on its way, from `at_end` ``[sequences, HS, D]`` on. With CUT it walks one of so many parts of the sequence,
    and writes the part's own sum to `sums` ``[sequences, HS, parts, D]``, for `carry_kernel`.
    """
    i_q, i_s, i_t = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_p, i_t = i_t % parts, i_t // parts
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    rows, ds = by_runs(C), i_t * BT + tl.arange(0, BT)
    DP: tl.constexpr = BT if D % BT else D
    g += i_b * sg_b + begin * sg_n + i_s * sg_h
    slots = count_slots(N, tl.num_programs(0), C, PACKED)
    risky += (i_b * HS + i_s) * slots + begin // C + (i_q if PACKED else 0)
    low, high = run_of(i_p, parts, n, C)
    if GATE:
        carry = tl.load(at_end + (i_q * HS + i_s) * D + ds, mask=(ds < D) & (i_p == parts - 1), other=0.0)
    for i in tl.range(low, high, num_stages=STAGES):
        j = low + high - 1 - i
        left = n - j * C
        first = (j * C).to(tl.int64)
        through, after, _ = load_decays(g + first * sg_n, sg_n, rows, left, ds, D, DP, EXACT)
        mark = tl.load(risky + j)
        read, enter = tl.exp2(tl.where(mark == 0, -after, through)), tl.exp2(after)
        at = i_b * N + begin + first
        tk = load_tile(k_hat + (at * HS + i_s) * D, HS * D, rows, left, ds, D, DP).to(tl.float32)
        if GATE:
            flow = load_tile(dg + (at * HS + i_s) * D, HS * D, rows, left * mark, ds, D, DP)
        for r in tl.range(0, H // HS, num_stages=STAGES):  # not unrolled: loads ahead for every head would not fit
            i_h = i_s * (H // HS) + r
            here = (at * H + i_h) * D
            x = load_tile(aq + here, H * D, rows, left, ds, D, DP).to(tl.float32) * scale
            y = load_tile(ak + here, H * D, rows, left, ds, D, DP).to(tl.float32) * scale
            pair_q = load_tile(dq + here, H * D, rows, left * mark, ds, D, DP).to(tl.float32)
            pair_k = load_tile(dk + here, H * D, rows, left * mark, ds, D, DP).to(tl.float32)
            store_tile(dq + here, H * D, rows, left, ds, D, DP, x * read + pair_q)
            store_tile(dk + here, H * D, rows, left, ds, D, DP, y * enter + pair_k)
            if GATE:
                tq = load_tile(q_hat + here, H * D, rows, left, ds, D, DP).to(tl.float32)
                flow += tq * x - tk * y
        if GATE:
            through = running(flow, True) + carry[None, :]
            store_tile(dg + (at * HS + i_s) * D, HS * D, rows, left, ds, D, DP, through)
            carry += tl.sum(flow, 0)
    if GATE and CUT:
        tl.store(sums + ((i_q * HS + i_s) * parts + i_p) * D + ds, carry, mask=ds < D)


@triton.jit(do_not_specialize=["N", "parts"])
def carry_kernel(
    sums, cu, dg, N, parts,
    HS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add to ġ of every part but the last what flows in from those after it."""
    i_q, i_s, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    rows, ds = tl.arange(0, C), tl.arange(0, BD)
    carry = tl.zeros([BD], tl.float32)
    for i in range(i_p + 1, parts):
        carry += tl.load(sums + ((i_q * HS + i_s) * parts + i) * D + ds, mask=ds < D, other=0.0)
    low, high = run_of(i_p, parts, n, C)
    for j in range(low, high):
        here = dg + ((i_b * N + begin + j * C) * HS + i_s) * D
        tile = load_tile(here, HS * D, rows, n - j * C, ds, D, BD)
        store_tile(here, HS * D, rows, n - j * C, ds, D, BD, tile + carry[None, :])
