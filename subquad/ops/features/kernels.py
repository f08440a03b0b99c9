# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of learned softmax features, a linear map per head and a softmax over it and over its negative.

    y = W_hᵀ x      f = [softmax(y), softmax(−y)], each ≥ 1e-12
    ẏ = f₁ (g₁ − f₁·g₁) − f₂ (g₂ − f₂·g₂)      ẋ = W_h ẏ      Ẇ_h = Σ x ẏᵀ

A program goes over a run of the rows, tokens of all sequences in one line, for one head. y and ẏ are float32 and meet bfloat16 x and f
in products of bfloat16: a float32 factor is then the sum of two or three parts, so that nothing but what is stored is rounded.

Bytes, D and F alike: x is read and f, twice as wide, written; backwards x, f and g are read and ẋ written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import LOG2E, in_two, run_of, upper_bits

LEAST = tl.constexpr(1e-12)


@triton.jit
def places(rows, N, s_b, s_n):
    """Where each row, token n of sequence b, begins."""
    return (rows // N).to(tl.int64) * s_b + (rows % N).to(tl.int64) * s_n


@triton.jit
def load_rows(base, at, rows, T, cols, width: tl.constexpr):
    return tl.load(base + at[:, None] + cols[None, :], mask=(rows < T)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def parts(w, MT: tl.constexpr, PARTS: tl.constexpr):
    """float32 w as a sum of MT; of one part where w is MT."""
    if PARTS == 1:
        first, second, third = w.to(MT), w.to(MT), w.to(MT)
    else:
        first, rest = upper_bits(w)
        second, third = in_two(rest, MT)
        first = first.to(MT)
    return first, second, third


@triton.jit
def softmax(y, inside):
    """Over columns that are inside; 0 elsewhere."""
    y = tl.where(inside, y, float("-inf"))
    e = tl.exp2((y - tl.max(y, 1)[:, None]) * LOG2E)
    return tl.where(inside, tl.maximum(e * (1 / tl.sum(e, 1))[:, None], LEAST), 0.0)


@triton.jit(do_not_specialize=["N", "T", "runs"])
def features_kernel(
    x, weight, f, s_b, s_n, s_h, N, T, runs,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """f ``[B, N, H, 2F]``.

    Args:
        x: ``[B, N, H / R, D]``, by strides; weight: ``[H, D, F]``; T is B · N.
    """
    program = tl.program_id(0)
    i_h, i_s = (program // runs).to(tl.int64), program % runs
    MT: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    ds, fs = tl.arange(0, BD), tl.arange(0, BF)
    inside = (fs < F)[None, :]
    w = tl.load(weight + i_h * (D * F) + ds[:, None] * F + fs[None, :], mask=(ds < D)[:, None] & inside, other=0.0).to(tl.float32)
    first, second, third = parts(w, MT, PARTS)
    x += i_h // R * s_h
    f += i_h * (2 * F)
    start, stop = run_of(i_s, runs, T, C)
    for i in range(start, stop):
        rows = i * C + tl.arange(0, C)
        tile = load_rows(x, places(rows, N, s_b, s_n), rows, T, ds, D).to(MT)
        y = tl.dot(tile, first, input_precision=IP)
        if PARTS > 1:
            y = tl.dot(tile, third, tl.dot(tile, second, y, input_precision=IP), input_precision=IP)
        keep = (rows < T)[:, None] & inside
        at = f + rows.to(tl.int64)[:, None] * (H * 2 * F) + fs[None, :]
        tl.store(at, softmax(y, inside).to(f.dtype.element_ty), mask=keep)
        tl.store(at + F, softmax(-y, inside).to(f.dtype.element_ty), mask=keep)


@triton.jit
def through_softmax(f, g):
    return f * (g - tl.sum(f * g, 1)[:, None])


@triton.jit(do_not_specialize=["N", "T", "runs"])
def features_back_kernel(
    x, weight, f, g, dx, dw, s_b, s_n, s_h, g_b, g_n, g_h, N, T, runs,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    DX: tl.constexpr, DW: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Gradients, those of x for each head.

    Args:
        g: f's gradient ``[B, N, H, 2F]``, by strides.
        dx: with DX ``[B, N, H, D]``; dw: with DW ``[H, runs, D, F]``, to be summed over the runs.
    """
    program = tl.program_id(0)
    i_h, i_s = (program // runs).to(tl.int64), program % runs
    MT: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    ds, fs = tl.arange(0, BD), tl.arange(0, BF)
    x += i_h // R * s_h
    f += i_h * (2 * F)
    g += i_h * g_h
    dx += i_h * D
    if DX:
        across = tl.load(weight + i_h * (D * F) + ds[None, :] * F + fs[:, None], mask=(ds < D)[None, :] & (fs < F)[:, None], other=0.0)
        if PARTS == 1:
            first, second = across.to(MT), across.to(MT)
        else:
            first, second = in_two(across.to(tl.float32), MT)
    of_weight = tl.zeros([BD, BF], tl.float32)
    start, stop = run_of(i_s, runs, T, C)
    for i in range(start, stop):
        rows = i * C + tl.arange(0, C)
        at, here = places(rows, N, g_b, g_n), rows.to(tl.int64) * (H * 2 * F)
        dy = through_softmax(load_rows(f, here, rows, T, fs, F).to(tl.float32), load_rows(g, at, rows, T, fs, F).to(tl.float32))
        dy -= through_softmax(load_rows(f + F, here, rows, T, fs, F).to(tl.float32), load_rows(g + F, at, rows, T, fs, F).to(tl.float32))
        if WIDE:
            upper, lower = dy, dy
        else:
            upper, lower = in_two(dy, MT)
        if DX:
            out = tl.dot(upper, first, input_precision=IP)
            if not WIDE:
                out = tl.dot(lower, first, out)
                if PARTS > 1:
                    out = tl.dot(upper, second, out)
            where = dx + rows.to(tl.int64)[:, None] * (H * D) + ds[None, :]
            tl.store(where, out.to(dx.dtype.element_ty), mask=(rows < T)[:, None] & (ds < D)[None, :])
        if DW:
            tile = tl.trans(load_rows(x, places(rows, N, s_b, s_n), rows, T, ds, D).to(MT))
            of_weight = tl.dot(tile, upper, of_weight, input_precision=IP)
            if not WIDE:
                of_weight = tl.dot(tile, lower, of_weight)
    if DW:
        keep = (ds < D)[:, None] & (fs < F)[None, :]
        tl.store(dw + program.to(tl.int64) * (D * F) + ds[:, None] * F + fs[None, :], of_weight, mask=keep)
