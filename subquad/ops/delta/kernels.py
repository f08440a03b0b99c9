"""The delta rule in Triton: an inverse per chunk, and a solve in each direction.

With L = strict_tril(K Kᵀ ∘ W) of a chunk, W_ts = 2^(G_t − G_s), S the state before it and x_t = v_t − a_t S_{t−1}ᵀ k_t what
token t misses, u = β x:

    r = V − 2^G ∘ K S ;  x = r − M (β ∘ r) ;  O = 2^G ∘ Q S + tril(Q Kᵀ ∘ W) u ;  S ← 2^{G_C} S + Kᵀ(2^{G_C−G} ∘ u)

where M = L (I + diag(β) L)⁻¹ is strictly lower triangular and needs no division by β. Backwards, from R after the chunk,

    y = 2^{G_C−G} ∘ K R + triu(K Qᵀ ∘ Wᵀ) Ȯ ;  u̇ = y − Mᵀ(β ∘ y) ;  w = −β u̇ ;  R ← 2^{G_C} R + (2^G ∘ Q)ᵀ Ȯ + (2^G ∘ K)ᵀ w

`inverse_kernel` makes M, 128 bytes a token and head in half precision, one program a chunk. `solve_kernel` and
`mirror_kernel` own one sequence, one head and one tile of the columns of V, and keep S or R ``[BD, BV]`` in registers from
the first chunk to the last: q, k and M are read once a tile, the rest once. The gradients of q and k are then two passes of
the linear recurrence (`subquad.ops.linear.kernels`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import count_slots, decays_much, find_chunk, in_two, load_tile, pair_weights, rounded, sequence, store_tile


@triton.jit
def key_scores(k, stride, P, i, j, left, D: tl.constexpr, BD: tl.constexpr, DECAY: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr):
    """K Kᵀ ∘ W for tokens i ``[…, m]`` and the earlier j ``[…, n]`` of a chunk: ``[…, m, n]``."""
    MT: tl.constexpr = tl.float32 if WIDE else k.dtype.element_ty
    BLOCK: tl.constexpr = min(BD, 128 if MT.primitive_bitwidth < 32 else 32)
    i, j = tl.expand_dims(i, -1), tl.expand_dims(j, -2)
    scores = tl.zeros((i + j).shape, tl.float32)
    for d in range(0, BD, BLOCK):
        ds = d + tl.arange(0, BLOCK)
        row = ds[None, None, :] if len(i.shape) == 3 else ds[None, :]
        col = ds[None, :, None] if len(i.shape) == 3 else ds[:, None]
        ki = tl.load(k + i * stride + row, mask=(i < left) & (row < D), other=0.0)
        if SAME:
            kj = tl.permute(ki, (0, 2, 1))
        else:
            kj = tl.load(k + j * stride + col, mask=(j < left) & (col < D), other=0.0)
        scores = tl.dot(ki.to(MT), kj.to(MT), scores, input_precision="tf32x3")
    if DECAY:
        gap = tl.load(P + i) - tl.load(P + j)
        scores *= tl.exp2(tl.where(j < i, gap, 0.0).to(tl.float32))
    return scores


@triton.jit
def minus_product(c, a, b, IP: tl.constexpr):
    """c − a b, good to 16 bits with "bf16x3": three products of halves, for a third of the instructions of tf32x3."""
    if IP == "bf16x3":
        high_a, low_a = in_two(-a, tl.bfloat16)
        high_b, low_b = in_two(b, tl.bfloat16)
        c = tl.dot(low_a, high_b, c)
        c = tl.dot(high_a, low_b, c)
        c = tl.dot(high_a, high_b, c)
    else:
        c -= tl.dot(a, b, input_precision=IP)
    return c


@triton.jit
def below(L, M1, M2, beta1, beta2, IP: tl.constexpr):
    """The block of M left of M2 and below M1, where L has `L`: (I − M2 β₂) L (I − β₁ M1)."""
    L = minus_product(L, L, tl.expand_dims(beta1, -1) * M1, IP)
    return minus_product(L, M2, tl.expand_dims(beta2, -1) * L, IP)


@triton.jit
def even_and_odd(x):
    """The even and the odd ones of matrices x ``[2 n, a, b]``: ``[n, a, b]``, or ``[a, b]`` where n = 1."""
    n: tl.constexpr = x.shape[0] // 2
    if n > 1:
        x = tl.permute(tl.reshape(x, [n, 2, x.shape[1], x.shape[2]]), (0, 2, 3, 1))
    else:
        x = tl.permute(x, (1, 2, 0))
    return tl.split(x)


@triton.jit(do_not_specialize=["N", "sequences", "se_b", "se_n", "se_h"])
def inverse_kernel(
    k, beta, P, cu, M, sk_b, sk_h, se_b, se_n, se_h, N, sequences, sk_n: tl.constexpr,
    H: tl.constexpr, GK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """M ``[B, H, slots, C, C]`` of each chunk, C = 64, from k ``[B, N, H/GK, D]`` and beta ``[B, N, H]`` by strides, P as below.

    Blocks of 2, 4, …, 16 tokens are solved in place for the four blocks of 16 side by side, then joined to 32 and to 64.
    Each join is a step of forward substitution by blocks, and as stable, also for equal keys.
    """
    chunks = count_slots(N, sequences, C, PACKED) if PACKED else tl.cdiv(N, C)
    i_c, i_bh = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    i_q, first, left = find_chunk(cu, sequences, i_c, N, C, PACKED)
    slot = (i_b * H + i_h) * count_slots(N, sequences, C, PACKED) + first // C + i_q
    k += i_b * sk_b + first * sk_n + (i_h // GK) * sk_h
    beta += i_b * se_b + first * se_n + i_h * se_h
    if DECAY:
        P += slot * C
    M += slot * (C * C)
    o2, o4, o16, o32 = tl.arange(0, 2)[:, None], tl.arange(0, 4)[:, None], tl.arange(0, 16), tl.arange(0, 32)

    # the diagonal blocks of 16, all four
    t = o4 * 16 + o16[None, :]
    b = tl.load(beta + t * se_n, mask=t < left, other=0.0).to(tl.float32)
    L = key_scores(k, sk_n, P, t, t, left, D, BD, DECAY, True, WIDE)
    i, j = o16[None, :, None], o16[None, None, :]
    X = tl.where((i // 2 == j // 2) & (i > j), L, 0.0)
    for n in tl.static_range(1, 4):
        X += below(tl.where((i >> n + 1 == j >> n + 1) & (i >> n > j >> n), L, 0.0), X, X, b, b, IP)
    X1, X2 = even_and_odd(X)

    # joined to two of 32
    t = o2 * 32 + o16[None, :]
    b1 = tl.load(beta + t * se_n, mask=t < left, other=0.0).to(tl.float32)
    b2 = tl.load(beta + (t + 16) * se_n, mask=t + 16 < left, other=0.0).to(tl.float32)
    Y = below(key_scores(k, sk_n, P, t + 16, t, left, D, BD, DECAY, False, WIDE), X1, X2, b1, b2, IP)
    upper = tl.reshape(tl.permute(tl.join(X1, tl.zeros_like(X1)), (0, 1, 3, 2)), [2, 16, 32])
    lower = tl.reshape(tl.permute(tl.join(Y, X2), (0, 1, 3, 2)), [2, 16, 32])
    X = tl.reshape(tl.permute(tl.join(upper, lower), (0, 3, 1, 2)), [2, 32, 32])
    X1, X2 = even_and_odd(X)

    # joined to one of 64
    b1 = tl.load(beta + o32 * se_n, mask=o32 < left, other=0.0).to(tl.float32)
    b2 = tl.load(beta + (o32 + 32) * se_n, mask=o32 + 32 < left, other=0.0).to(tl.float32)
    Y = below(key_scores(k, sk_n, P, o32 + 32, o32, left, D, BD, DECAY, False, WIDE), X1, X2, b1, b2, IP)
    cell = o32[:, None] * C + o32[None, :]
    real = (cell >= 0) & (left > 0)
    tl.store(M + cell, X1.to(M.dtype.element_ty), mask=real)
    tl.store(M + 32 + cell, tl.zeros_like(X1).to(M.dtype.element_ty), mask=real)
    tl.store(M + 32 * C + cell, Y.to(M.dtype.element_ty), mask=real)
    tl.store(M + 32 * C + 32 + cell, X2.to(M.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N", "scale", "se_b", "se_n", "se_h"])
def solve_kernel(
    q, k, v, beta, M, P, cu, start, o, x, final,
    sq_b, sq_h, sk_b, sk_h, sv_b, sv_h, se_b, se_n, se_h, N, scale, sq_n: tl.constexpr, sk_n: tl.constexpr, sv_n: tl.constexpr,
    H: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, BOTH: tl.constexpr, START: tl.constexpr, FINAL: tl.constexpr,
    SAVE: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Outputs of one sequence, for one head and one tile of columns.

    Args:
        q ``[B, N, H/GQ, D]``, k ``[B, N, H/GK, D]``, v ``[B, N, H/GV, V]``, beta ``[B, N, H]``, by strides.
        M ``[B, H, slots, C, C]``; P ``[B, H, slots, C]``: the running sums of the decays within chunks, as log2.
        start, final ``[sequences, H, D, V]``; o, and with SAVE x, ``[B, N, H, V]``, contiguous.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    i_v, i_q = tl.program_id(0) % TILES, tl.program_id(0) // (TILES * H)
    i_h = (tl.program_id(0) // TILES % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    rows, ds, vs = tl.arange(0, C), tl.arange(0, BD), i_v * BV + tl.arange(0, BV)
    VP: tl.constexpr = BV if V % BV else V  # padded beyond V only where tiles do not fit
    keep = rows[:, None] >= rows[None, :]
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    q += i_b * sq_b + begin * sq_n + (i_h // GQ) * sq_h
    k += i_b * sk_b + begin * sk_n + (i_h // GK) * sk_h
    v += i_b * sv_b + begin * sv_n + (i_h // GV) * sv_h
    beta += i_b * se_b + begin * se_n + i_h * se_h
    o += ((i_b * N + begin) * H + i_h) * V
    if SAVE:
        x += ((i_b * N + begin) * H + i_h) * V
    slot = (i_b * H + i_h) * count_slots(N, tl.num_programs(0) // (TILES * H), C, PACKED) + begin // C + (i_q if PACKED else 0)
    if DECAY:
        P += slot * C
    M += slot * (C * C)

    S = tl.zeros([BD, BV], tl.float32)
    cell = (i_q * H + i_h).to(tl.int64) * (D * V) + ds[:, None] * V + vs[None, :]
    inside = (ds < D)[:, None] & (vs < V)[None, :]
    if START:
        S += tl.load(start + cell, mask=inside, other=0.0)

    chunks = tl.cdiv(n, C)
    # one of two loops runs: pairs weighed by products of two factors, or one by one; two launches, as in the pass, take longer
    by_one = decays_much(P, chunks, C) if BOTH else False
    for EXACT in tl.static_range(1 if DECAY and not BOTH else 0, 2 if DECAY else 1):
        trips = tl.where(by_one == (EXACT == 1), chunks, 0) if BOTH else chunks
        next_b = tl.load(beta + rows * se_n, mask=rows < n, other=0.0)  # loaded a chunk ahead, as p is
        if DECAY:
            next_p = tl.load(P + rows, mask=(rows >= 0) & (trips > 0), other=0.0)
            next_total = tl.load(P + C - 1, mask=trips > 0, other=0.0)
        for i in range(0, trips):
            at = tl.full([], C, tl.int64) * i
            tk = load_tile(k, sk_n, at + rows, n, ds, D, BD).to(MT)
            tq = load_tile(q, sq_n, at + rows, n, ds, D, BD).to(MT)
            tv = load_tile(v, sv_n, at + rows, n, vs, V, VP).to(tl.float32)
            tm = tl.load(M + at * C + rows[:, None] * C + rows[None, :]).to(MT)
            b = next_b.to(tl.float32)[:, None]
            next_b = tl.load(beta + (at + C + rows) * se_n, mask=at + C + rows < n, other=0.0)
            if DECAY:
                p, total = next_p, next_total
                next_p = tl.load(P + at + C + rows, mask=(rows >= 0) & (i + 1 < trips), other=0.0)
                next_total = tl.load(P + at + C + C - 1, mask=i + 1 < trips, other=0.0)
                leave = tl.exp2((total - p).to(tl.float32))[:, None]
                enter = tl.exp2((p if EXACT else p - total).to(tl.float32))[:, None]

            if DECAY and EXACT:
                read = S.to(MT)
                S *= tl.exp2(total.to(tl.float32))
            else:
                if DECAY:
                    S *= tl.exp2(total.to(tl.float32))
                read = S.to(MT)
            past = tl.dot(tk, read, input_precision=IP)
            r = tv - (past * enter if DECAY else past)
            tx = r - tl.dot(tm, (r * b).to(MT), input_precision=IP)
            tx = rounded(tx, MT)  # as the backward reads it: what it sums must be what the state has, or errors add up
            u = tx * b
            source = (u * leave if DECAY else u).to(MT)
            out = tl.dot(tq, read, input_precision=IP)
            scores = tl.dot(tq, tl.trans(tk), input_precision=IP)
            if DECAY and FINAL and tl.bfloat16 == MT:  # as in the pass with LEFT
                S = tl.dot(tl.trans((tk * leave).to(MT)), u.to(MT), S, input_precision=IP)
            else:
                S = tl.dot(tl.trans(tk), source, S, input_precision=IP)
            if DECAY and EXACT:
                out = tl.dot((scores * pair_weights(p, keep)).to(MT), u.to(MT), out * enter, input_precision=IP)
            else:
                out = tl.dot(tl.where(keep, scores, 0.0).to(MT), source, out, input_precision=IP)
                if DECAY:
                    out *= enter
            store_tile(o, H * V, at + rows, n, vs, V, VP, out * scale)
            if SAVE:
                store_tile(x, H * V, at + rows, n, vs, V, VP, tx)

    if FINAL:
        tl.store(final + cell, S, mask=inside)


@triton.jit(do_not_specialize=["N", "scale", "start_scale", "se_b", "se_n", "se_h"])
def mirror_kernel(
    q, k, do, beta, M, P, cu, start, x, u, w, dv, dots, final,
    sq_b, sq_h, sk_b, sk_h, sd_b, sd_h, se_b, se_n, se_h, N, scale, start_scale,
    sq_n: tl.constexpr, sk_n: tl.constexpr, sd_n: tl.constexpr,
    H: tl.constexpr, GQ: tl.constexpr, GK: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, EXACT: tl.constexpr, OTHER: tl.constexpr,
    START: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """The solve from the last chunk to the first, for one head and one tile of columns, in units of 1/scale.

    Args:
        q, k, beta, M, P as in `solve_kernel`; do ``[B, N, H, V]`` by strides, x its contiguous output.
        EXACT, OTHER as in the pass of the linear recurrence.
        start, final ``[sequences, H, D, V]``: the gradient of the state after, times start_scale, and of the state before.
        u, w, dv ``[B, N, H, V]``: β x, −β u̇ and the gradient of v, contiguous; dots ``[B, H, tiles, N]``: that of beta, by tiles.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    i_v, i_q = tl.program_id(0) % TILES, tl.program_id(0) // (TILES * H)
    i_h = (tl.program_id(0) // TILES % H).to(tl.int64)
    i_b, begin, n = sequence(cu, i_q, N, PACKED)
    rows, ds, vs = tl.arange(0, C), tl.arange(0, BD), i_v * BV + tl.arange(0, BV)
    VP: tl.constexpr = BV if V % BV else V
    keep = rows[:, None] <= rows[None, :]
    MT: tl.constexpr = tl.float32 if WIDE else q.dtype.element_ty
    q += i_b * sq_b + begin * sq_n + (i_h // GQ) * sq_h
    k += i_b * sk_b + begin * sk_n + (i_h // GK) * sk_h
    do += i_b * sd_b + begin * sd_n + i_h * sd_h
    beta += i_b * se_b + begin * se_n + i_h * se_h
    x += ((i_b * N + begin) * H + i_h) * V
    u += ((i_b * N + begin) * H + i_h) * V
    w += ((i_b * N + begin) * H + i_h) * V
    dv += ((i_b * N + begin) * H + i_h) * V
    slot = (i_b * H + i_h) * count_slots(N, tl.num_programs(0) // (TILES * H), C, PACKED) + begin // C + (i_q if PACKED else 0)
    if DECAY:
        P += slot * C
    M += slot * (C * C)
    dots += ((i_b * H + i_h) * TILES + i_v) * N + begin

    chunks = tl.cdiv(n, C)
    if DECAY and OTHER:  # noqa: SIM102
        if decays_much(P, chunks, C) != EXACT:
            return

    S = tl.zeros([BD, BV], tl.float32)
    cell = (i_q * H + i_h).to(tl.int64) * (D * V) + ds[:, None] * V + vs[None, :]
    inside = (ds < D)[:, None] & (vs < V)[None, :]
    if START:
        S += tl.load(start + cell, mask=inside, other=0.0) * start_scale

    at = ((chunks - 1) * C).to(tl.int64)
    next_b = tl.load(beta + (at + rows) * se_n, mask=(at + rows < n) & (chunks > 0), other=0.0)
    if DECAY:
        next_p = tl.load(P + at + rows, mask=(rows >= 0) & (chunks > 0), other=0.0)
        next_total = tl.load(P + at + C - 1, mask=chunks > 0, other=0.0)
    for i in range(0, chunks):
        at = ((chunks - 1 - i) * C).to(tl.int64)
        tk = load_tile(k, sk_n, at + rows, n, ds, D, BD).to(MT)
        tq = load_tile(q, sq_n, at + rows, n, ds, D, BD).to(MT)
        td = load_tile(do, sd_n, at + rows, n, vs, V, VP).to(MT)
        tm = tl.load(M + at * C + rows[:, None] * C + rows[None, :]).to(MT)
        tx = load_tile(x, H * V, at + rows, n, vs, V, VP)
        b = next_b.to(tl.float32)[:, None]
        next_b = tl.load(beta + (at - C + rows) * se_n, mask=(rows >= 0) & (i + 1 < chunks), other=0.0)
        source = td
        if DECAY:
            p, total = next_p, next_total
            next_p = tl.load(P + at - C + rows, mask=(rows >= 0) & (i + 1 < chunks), other=0.0)
            next_total = tl.load(P + at - 1, mask=i + 1 < chunks, other=0.0)
            enter = tl.exp2((total - p if EXACT else -p).to(tl.float32))[:, None]
            leave = tl.exp2(p.to(tl.float32))[:, None]
            source = (td * leave).to(MT)

        if EXACT:
            read = S.to(MT)
            S *= tl.exp2(total.to(tl.float32))
        else:
            if DECAY:
                S *= tl.exp2(total.to(tl.float32))
            read = S.to(MT)
        y = tl.dot(tk, read, input_precision=IP)
        scores = tl.dot(tk, tl.trans(tq), input_precision=IP)
        if EXACT:
            y = tl.dot((scores * pair_weights(total - p, keep)).to(MT), td, y * enter, input_precision=IP)
        else:
            y = tl.dot(tl.where(keep, scores, 0.0).to(MT), source, y, input_precision=IP)
            if DECAY:
                y *= enter
        S = tl.dot(tl.trans(tq), source, S, input_precision=IP)
        du = y - tl.dot(tl.trans(tm), (y * b).to(MT), input_precision=IP)
        tw = du * -b
        S = tl.dot(tl.trans(tk), (tw * leave if DECAY else tw).to(MT), S, input_precision=IP)
        tx = tx.to(tl.float32)
        store_tile(dv, H * V, at + rows, n, vs, V, VP, tw * -scale)
        store_tile(w, H * V, at + rows, n, vs, V, VP, tw)
        store_tile(u, H * V, at + rows, n, vs, V, VP, tx * b)
        tl.store(dots + at + rows, tl.sum(tx * du, 1) * scale, mask=at + rows < n)

    if FINAL:
        tl.store(final + cell, S, mask=inside)
