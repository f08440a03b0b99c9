# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of `window_step`: one token of a softmax window over linear attention to all before it, with what is kept of either.

    S ← S + φ_k(k_left) [v_left, 1]      s_j = q·k_j / √D over what is kept and the token itself,  c = max s
    o = (g Σ exp(s_j − c) v_j + w φ_q(q) S_v) / (g Σ exp(s_j − c) + w φ_q(q) S_1)

A program owns one query head of one sequence and BC columns of v and S. Columns meet in nothing but scores and features, which
every tile of columns makes anew; heads that share keys read them once each, and the first of them writes what is kept.

Bytes: 2 · B · H · 2F · (V + 1) · 4 for the sums, twice what is kept of keys and values, and both maps of each head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.features.kernels import LEAST
from subquad.ops.triton_blocks import LOG2E, rounded


@triton.jit
def softmax(y, inside, MT: tl.constexpr):
    """Over the entries that are inside, each at least LEAST, and rounded where MT is bfloat16; 0 elsewhere."""
    y = tl.where(inside, y, float("-inf"))
    e = tl.exp2((y - tl.max(y, 0)) * LOG2E)
    f = tl.maximum(e * (1 / tl.sum(e, 0)), LEAST)
    if tl.bfloat16 == MT:  # as `project_softmax_halves` keeps features; of float16 they are float32
        f = rounded(f, MT)
    return tl.where(inside, f, 0.0)


@triton.jit
def halves(x, weight, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BR: tl.constexpr):
    """softmax(Wᵀ x) and softmax(−Wᵀ x), x ``[D]`` and W ``[D, F]``."""
    fs = tl.arange(0, BF)
    inside = fs < F
    y = tl.zeros([BF], tl.float32)
    for start in range(0, D, BR):
        ds = start + tl.arange(0, BR)
        w = tl.load(weight + ds[:, None] * F + fs[None, :], mask=(ds < D)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        y += tl.sum(tl.load(x + ds, mask=ds < D, other=0.0).to(tl.float32)[:, None] * w, 0)
    return softmax(y, inside, x.dtype.element_ty), softmax(-y, inside, x.dtype.element_ty)


@triton.jit
def window_step_kernel(
    q, far_q, k, far_k, v, kept_k, kept_v, sums, length, w_q, w_k, factor, o, new_k, new_v, new_sums,
    q_b, q_h, fq_b, fq_h, k_b, k_h, fk_b, fk_h, v_b, v_h, kk_b, kk_n, kk_h, kv_b, kv_n, kv_h, s_b, s_h, s_f, s_v, length_b, scale,
    H: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, V: tl.constexpr,
    BD: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr, PAIR: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """o ``[B, 1, H, V]`` and, all contiguous, new_k, new_v and new_sums, of the shapes of kept_k, kept_v and sums.

    Args:
        q, far_q: ``[B, 1, H, D]``; k, far_k: ``[B, 1, H / GROUP, D]``; v: ``[B, 1, H / GROUP, V]``, all by strides.
        kept_k: ``[B, SINKS + WINDOW, H / GROUP, K]``, K = D or with PAIR 2D, where the far half is the second; kept_v: ``[…, V]``.
        sums: ``[B, H, 2F, V + 1]``; length: ``[B]``; w_q, w_k: ``[H, D, F]``; factor: ``[H]``.
    """
    TILES: tl.constexpr = (V + BC - 1) // BC
    P: tl.constexpr = SINKS + WINDOW
    K: tl.constexpr = 2 * D if PAIR else D
    tile = tl.program_id(0) % TILES
    row = (tl.program_id(0) // TILES).to(tl.int64)  # one grid axis: the others end at 65,535
    b, h = row // H, row % H
    shared = h // GROUP
    ds, fs, cs = tl.arange(0, BD), tl.arange(0, BF), tile * BC + tl.arange(0, BC)
    in_d, in_f, in_c = ds < D, fs < F, cs < V
    q += b * q_b + h * q_h
    far_q += b * fq_b + h * fq_h
    k += b * k_b + shared * k_h
    far_k += b * fk_b + shared * fk_h
    v += b * v_b + shared * v_h
    kept_k += b * kk_b + shared * kk_h
    kept_v += b * kv_b + shared * kv_h
    sums += b * s_b + h * s_h
    past = tl.load(length + b * length_b)  # tokens before this one

    # the sums first, as all else is computed while they are on their way
    at_f, there = fs[:, None] * s_f + cs[None, :] * s_v, in_f[:, None] & in_c[None, :]
    upper = tl.load(sums + at_f, mask=there, other=0.0)
    lower = tl.load(sums + F * s_f + at_f, mask=there, other=0.0)
    upper_mass = tl.load(sums + fs * s_f + V * s_v, mask=in_f, other=0.0)
    lower_mass = tl.load(sums + (F + fs) * s_f + V * s_v, mask=in_f, other=0.0)

    query = tl.load(q + ds, mask=in_d, other=0.0).to(tl.float32) * scale
    key, value = tl.load(k + ds, mask=in_d, other=0.0), tl.load(v + cs, mask=in_c, other=0.0)
    top = tl.sum(query * key.to(tl.float32), 0)
    total = 1.0
    near = value.to(tl.float32)
    first = h % GROUP == 0
    new_k += (b * P * (H // GROUP) + shared) * K
    new_v += (b * P * (H // GROUP) + shared) * V
    for start in range(0, P, BP):
        j = start + tl.arange(0, BP)
        here = (j < P)[:, None]
        position = past - WINDOW + (j - SINKS)  # of what the window keeps
        sink = (j < SINKS) & (j < past - WINDOW)  # one that the window still holds is seen there
        seen = sink | ((j >= SINKS) & (j < P) & (position >= 0) & ((j > SINKS) | (position < SINKS)))
        at = kept_k + j[:, None] * kk_n + ds[None, :]
        keys = tl.load(at, mask=here & in_d[None, :], other=0.0)
        values = tl.load(kept_v + j[:, None] * kv_n + cs[None, :], mask=here & in_c[None, :], other=0.0)
        s = tl.where(seen, tl.sum(keys.to(tl.float32) * query[None, :], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        p, shrink = tl.exp2((s - higher) * LOG2E), tl.exp2((top - higher) * LOG2E)
        total = total * shrink + tl.sum(p, 0)
        near = near * shrink + tl.sum(p[:, None] * tl.where(seen[:, None], values.to(tl.float32), 0.0), 0)
        top = higher

        to = (tl.where(j < SINKS, j, j - 1) * (H // GROUP))[:, None]
        stays = here & (((j < SINKS) & (j != past)) | (j > SINKS))[:, None] & first
        whole = stays & in_d[None, :] & (tile == 0)
        tl.store(new_k + to * K + ds[None, :], keys, mask=whole)
        if PAIR:
            tl.store(new_k + to * K + (D + ds)[None, :], tl.load(at + D, mask=whole, other=0.0), mask=whole)
        tl.store(new_v + to * V + cs[None, :], values, mask=stays & in_c[None, :])
    last, own = (P - 1) * (H // GROUP), past * (H // GROUP)  # the newest place of the window, and that of a sink
    in_k, in_v = in_d & first & (tile == 0), in_c & first
    tl.store(new_k + last * K + ds, key, mask=in_k)
    tl.store(new_v + last * V + cs, value, mask=in_v)
    tl.store(new_k + own * K + ds, key, mask=in_k & (past < SINKS))
    tl.store(new_v + own * V + cs, value, mask=in_v & (past < SINKS))
    if PAIR:
        key = tl.load(far_k + ds, mask=in_d, other=0.0)
        tl.store(new_k + last * K + D + ds, key, mask=in_k)
        tl.store(new_k + own * K + D + ds, key, mask=in_k & (past < SINKS))

    left = past - WINDOW >= SINKS  # whether the oldest of the window goes into the sums: it is real, and no sink
    one, two = halves(kept_k + SINKS * kk_n + K - D, w_k + h * (D * F), D, F, BF, BR)
    one, two = tl.where(left, one, 0.0), tl.where(left, two, 0.0)
    value = tl.load(kept_v + SINKS * kv_n + cs, mask=in_c & left, other=0.0).to(tl.float32)
    upper += one[:, None] * value[None, :]
    lower += two[:, None] * value[None, :]
    upper_mass += one
    lower_mass += two
    new_sums += row * (2 * F * (V + 1))
    at_f = fs[:, None] * (V + 1) + cs[None, :]
    tl.store(new_sums + at_f, upper, mask=there)
    tl.store(new_sums + F * (V + 1) + at_f, lower, mask=there)
    tl.store(new_sums + fs * (V + 1) + V, upper_mass, mask=in_f & (tile == 0))
    tl.store(new_sums + (F + fs) * (V + 1) + V, lower_mass, mask=in_f & (tile == 0))

    one, two = halves(far_q, w_q + h * (D * F), D, F, BF, BR)
    far = tl.sum(upper * one[:, None], 0) + tl.sum(lower * two[:, None], 0)
    mass = tl.sum(upper_mass * one, 0) + tl.sum(lower_mass * two, 0)
    g = tl.sigmoid(tl.load(factor + h).to(tl.float32))
    weight = 1 - g if AFFINE else g * 0 + 1
    out = (g * near + weight * far) * (1 / (g * total + weight * mass))
    tl.store(o + row * V + cs, out.to(o.dtype.element_ty), mask=in_c)


@triton.jit(do_not_specialize=["N"])
def keep_kernel(
    k, far_k, v, kept_k, kept_v, k_b, k_n, k_h, f_b, f_n, f_h, v_b, v_n, v_h, N,
    H: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """Of N tokens those that `window_step_kernel` reads as kept_k and kept_v, zero where there is none; a program copies one head of one.

    Args:
        k, far_k: ``[B, N, H, D]``; v: ``[B, N, H, V]``, all by strides; far_k is read with PAIR alone.
    """
    HELD: tl.constexpr = SINKS + WINDOW
    program = tl.program_id(0).to(tl.int64)
    b, place, h = program // (H * HELD), program // H % HELD, program % H
    n = tl.where(place < SINKS, place, N - HELD + place)
    there = (n >= 0) & (n < N)
    ds, vs = tl.arange(0, BD), tl.arange(0, BV)
    K: tl.constexpr = 2 * D if PAIR else D
    to = kept_k + program * K
    tl.store(to + ds, tl.load(k + b * k_b + n * k_n + h * k_h + ds, mask=there & (ds < D), other=0.0), mask=ds < D)
    if PAIR:
        tl.store(to + D + ds, tl.load(far_k + b * f_b + n * f_n + h * f_h + ds, mask=there & (ds < D), other=0.0), mask=ds < D)
    tl.store(kept_v + program * V + vs, tl.load(v + b * v_b + n * v_n + h * v_h + vs, mask=there & (vs < V), other=0.0), mask=vs < V)
