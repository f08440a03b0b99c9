# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel of rotary embedding, one pass over x: a program turns some tokens of some heads, whose angles it loads once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(base, at, keep, HALF: tl.constexpr, BH: tl.constexpr, T: tl.constexpr, ADJACENT: tl.constexpr):
    """Of T rows, which begin at `at`, the first and the second channels of each of HALF pairs, in float32."""
    if ADJACENT:  # loaded side by side, and told apart in registers
        cs = tl.arange(0, 2 * BH)
        both = tl.load(base + at[:, None] + cs[None, :], mask=keep[:, None] & (cs < 2 * HALF)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(both, [T, BH, 2]))
    else:
        cs = tl.arange(0, BH)
        mask = keep[:, None] & (cs < HALF)[None, :]
        first = tl.load(base + at[:, None] + cs[None, :], mask=mask, other=0.0)
        second = tl.load(base + at[:, None] + (HALF + cs)[None, :], mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(base, at, keep, first, second, HALF: tl.constexpr, BH: tl.constexpr, T: tl.constexpr, ADJACENT: tl.constexpr):
    first, second = first.to(base.dtype.element_ty), second.to(base.dtype.element_ty)
    if ADJACENT:
        cs = tl.arange(0, 2 * BH)
        both = tl.reshape(tl.join(first, second), [T, 2 * BH])
        tl.store(base + at[:, None] + cs[None, :], both, mask=keep[:, None] & (cs < 2 * HALF)[None, :])
    else:
        cs = tl.arange(0, BH)
        mask = keep[:, None] & (cs < HALF)[None, :]
        tl.store(base + at[:, None] + cs[None, :], first, mask=mask)
        tl.store(base + at[:, None] + (HALF + cs)[None, :], second, mask=mask)


@triton.jit(do_not_specialize=["N", "H", "tokens"])
def rotary_kernel(
    x, cos, sin, out, x_b, x_n, x_h, c_b, c_n, s_b, s_n, N, H, tokens,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, T: tl.constexpr, G: tl.constexpr,
    ADJACENT: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Of each pair out_a = cos_a x_a − sin_a x_b, out_b = cos_b x_b + sin_b x_a; with TRANSPOSE by the transposed matrix.

    Args:
        x: ``[B, N, H, D]``, by strides; out: the same, contiguous; tokens is B · N.
        cos, sin: ``[B, N, 2 HALF]``, by strides; channels past 2 HALF are copied, BR is 0 where there are none.
        T, G: tokens and heads of a program.
    """
    program, groups = tl.program_id(0), (H + G - 1) // G
    t = (program // groups).to(tokens.dtype) * T + tl.arange(0, T)
    keep = t < tokens
    b, n = (t // N).to(tl.int64), (t % N).to(tl.int64)
    cos_a, cos_b = load_pairs(cos, b * c_b + n * c_n, keep, HALF, BH, T, ADJACENT)
    sin_a, sin_b = load_pairs(sin, b * s_b + n * s_n, keep, HALF, BH, T, ADJACENT)
    if TRANSPOSE:
        sin_a, sin_b = -sin_b, -sin_a
    first = program % groups * G
    at = b * x_b + n * x_n + first.to(tl.int64) * x_h
    to = (t.to(tl.int64) * H + first) * D
    for _ in range(tl.minimum(G, H - first)):
        one, two = load_pairs(x, at, keep, HALF, BH, T, ADJACENT)
        store_pairs(out, to, keep, one * cos_a - two * sin_a, two * cos_b + one * sin_b, HALF, BH, T, ADJACENT)
        if BR:
            cs = 2 * HALF + tl.arange(0, BR)
            mask = keep[:, None] & (cs < D)[None, :]
            tl.store(out + to[:, None] + cs[None, :], tl.load(x + at[:, None] + cs[None, :], mask=mask), mask=mask)
        at += x_h
        to += D
