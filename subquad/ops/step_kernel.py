# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of `recurrent_step`: a few tokens of a linear or delta recurrence, with the state in registers.

    S ← a_t S       u = v_t, or with β: β_t (v_t − Sᵀ k_t)       S ← S + k_t uᵀ       o_t = scale · Sᵀ q_t

A program owns BV columns of one state, all D rows of them: columns never meet, so nothing is summed across programs.
It reads its tile once, keeps it in registers while the tokens pass, serves every query head that shares the state, and
writes the tile once. q, k, β and decays are read again by each tile of a state, from the second-level cache.

Bytes: 2 · B · Hs · D · V · 4 for the states; what a token brings is about a hundredth of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Tokens and the strides that follow from them change from call to call: none of them is compiled in. The state's strides
# may be: they are the model's, and that they divide by 16 makes its loads 16 bytes wide.
PER_CALL = (
    "T", "q_b", "q_n", "q_h", "k_b", "k_n", "k_h", "v_b", "v_n", "v_h", "g_b", "g_n", "g_h", "beta_b", "beta_n", "beta_h",
)  # fmt: skip


@triton.jit(do_not_specialize=PER_CALL, do_not_specialize_on_alignment=("q", "k", "v", "log_decay", "beta"))  # may be slices
def step_kernel(
    q, k, v, log_decay, beta, state, o, new_state,
    T, scale,
    q_b, q_n, q_h, q_d,
    k_b, k_n, k_h, k_d,
    v_b, v_n, v_h, v_d,
    g_b, g_n, g_h, g_d,
    beta_b, beta_n, beta_h,
    s_b, s_h, s_d, s_v,
    HEADS: tl.constexpr,  # states in a row of the batch
    GROUP: tl.constexpr,  # output heads that share a state
    Q_REPEAT: tl.constexpr,  # output heads that share a head of q
    K_REPEAT: tl.constexpr,  # states that share a head of k
    V_REPEAT: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,  # "none", "token" (one for the whole state) or "channel" (one for each of its rows)
    DELTA: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + BV - 1) // BV
    row = (tl.program_id(0) // TILES).to(tl.int64)  # one grid axis: the others end at 65,535
    b, h = row // HEADS, row % HEADS
    d = tl.arange(0, BD)
    c = (tl.program_id(0) % TILES) * BV + tl.arange(0, BV)
    seen = (d < D)[:, None] & (c < V)[None, :]
    S = tl.load(state + b * s_b + h * s_h + d[:, None] * s_d + c[None, :] * s_v, mask=seen, other=0.0)

    q += b * q_b + d * q_d
    k += b * k_b + (h // K_REPEAT) * k_h + d * k_d
    v += b * v_b + (h // V_REPEAT) * v_h + c * v_d
    o += (b * T * HEADS + h) * GROUP * V + c
    if DECAY != "none":
        log_decay += b * g_b + h * g_h
    if DELTA:
        beta += b * beta_b + h * beta_h
    for n in range(T):
        key = tl.load(k + n * k_n, mask=d < D, other=0.0).to(tl.float32)
        u = tl.load(v + n * v_n, mask=c < V, other=0.0).to(tl.float32)
        if DECAY == "token":
            S *= tl.exp(tl.load(log_decay + n * g_n).to(tl.float32))
        if DECAY == "channel":
            S *= tl.exp(tl.load(log_decay + n * g_n + d * g_d, mask=d < D, other=0.0).to(tl.float32))[:, None]
        if DELTA:
            u = tl.load(beta + n * beta_n).to(tl.float32) * (u - tl.sum(S * key[:, None], 0))
        S += key[:, None] * u[None, :]
        for j in range(GROUP):
            query = tl.load(q + n * q_n + (h * GROUP + j) // Q_REPEAT * q_h, mask=d < D, other=0.0).to(tl.float32)
            out = tl.sum(S * (query * scale)[:, None], 0)
            tl.store(o + (n * HEADS * GROUP + j) * V, out.to(o.dtype.element_ty), mask=c < V)
    tl.store(new_state + row * D * V + d[:, None] * V + c[None, :], S, mask=seen)
