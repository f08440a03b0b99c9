# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels of `merge_sums`, each one pass over its tensors: a program has some rows, a row is one token of one head."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_row(base, b, n, h, s_b, s_n, s_h, keep):
    """A number of each row of ``[B, N, H]``."""
    return tl.load(base + b * s_b + n * s_n + h * s_h, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def load_rows(base, b, n, h, s_b, s_n, s_h, keep, vs, V: tl.constexpr):
    """The channels of each row of ``[B, N, H, V]``."""
    at = base + (b * s_b + n * s_n + h * s_h)[:, None] + vs[None, :]
    return tl.load(at, mask=keep[:, None] & (vs < V)[None, :], other=0.0).to(tl.float32)


@triton.jit
def masses(lse, top, mass, factor, b, n, h, j, l_b, l_n, l_h, t_b, t_n, t_h, m_b, m_n, m_h, keep, late, AFFINE: tl.constexpr):
    """Of each row the mass of o, the weight of far and the mass of far, and one over the whole."""
    g = tl.sigmoid(tl.load(factor + h, mask=keep, other=0.0).to(tl.float32))
    away = load_row(lse, b, n, h, l_b, l_n, l_h, keep) - load_row(top, b, n, h, t_b, t_n, t_h, keep)
    near = tl.where(keep, g * tl.exp2(away * LOG2E), 1.0)
    weight = 1 - g if AFFINE else g * 0 + 1
    far = load_row(mass, b, j, h, m_b, m_n, m_h, late)
    return near, weight, far, 1 / (near + weight * far)


@triton.jit
def places(i, R: tl.constexpr, N, M, H: tl.constexpr, rows):
    """Of the rows of program i: themselves, whether they are there, sequence, token, head, token among the last M, whether it is one."""
    r = i.to(tl.int64) * R + tl.arange(0, R)
    keep = r < rows
    h, token = r % H, r // H
    b, n = token // N, token % N
    j = n - (N - M)
    return r, keep, b, n, h, j, keep & (j >= 0)


@triton.jit(do_not_specialize=["N", "M", "rows"])
def sums_kernel(
    o, lse, top, far, mass, factor, out,
    o_b, o_n, o_h, l_b, l_n, l_h, t_b, t_n, t_h, f_b, f_n, f_h, m_b, m_n, m_h, N, M, rows,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """out ``[B, N, H, V]``; far and mass are of the last M tokens."""
    vs = tl.arange(0, BV)
    r, keep, b, n, h, j, late = places(tl.program_id(0), R, N, M, H, rows)
    near, weight, _, share = masses(
        lse, top, mass, factor, b, n, h, j, l_b, l_n, l_h, t_b, t_n, t_h, m_b, m_n, m_h, keep, late, AFFINE
    )  # fmt: skip
    x = load_rows(o, b, n, h, o_b, o_n, o_h, keep, vs, V) * (near * share)[:, None]
    x += load_rows(far, b, j, h, f_b, f_n, f_h, late, vs, V) * (weight * share)[:, None]
    tl.store(out + r[:, None] * V + vs[None, :], x.to(out.dtype.element_ty), mask=keep[:, None] & (vs < V)[None, :])


@triton.jit(do_not_specialize=["N", "M", "rows"])
def sums_back_kernel(
    o, lse, top, far, mass, factor, do, of_o, of_lse, of_far, of_mass, of_weight,
    o_b, o_n, o_h, l_b, l_n, l_h, t_b, t_n, t_h, f_b, f_n, f_h, m_b, m_n, m_h, d_b, d_n, d_h, N, M, rows,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Gradients, contiguous: of o, of lse (the opposite of top's), of far, of its mass, and with AFFINE of its weight, ``[B, N, H]``."""
    vs = tl.arange(0, BV)
    r, keep, b, n, h, j, late = places(tl.program_id(0), R, N, M, H, rows)
    near, weight, beyond, share = masses(
        lse, top, mass, factor, b, n, h, j, l_b, l_n, l_h, t_b, t_n, t_h, m_b, m_n, m_h, keep, late, AFFINE
    )  # fmt: skip
    d = load_rows(do, b, n, h, d_b, d_n, d_h, keep, vs, V)
    there = keep[:, None] & (vs < V)[None, :]
    tl.store(of_o + r[:, None] * V + vs[None, :], (d * (near * share)[:, None]).to(of_o.dtype.element_ty), mask=there)
    at = (b * M + j) * H + h
    x = d * (weight * share)[:, None]
    tl.store(of_far + at[:, None] * V + vs[None, :], x.to(of_far.dtype.element_ty), mask=late[:, None] & (vs < V)[None, :])
    by_o = tl.sum(d * load_rows(o, b, n, h, o_b, o_n, o_h, keep, vs, V), 1)
    by_far = tl.sum(d * load_rows(far, b, j, h, f_b, f_n, f_h, late, vs, V), 1)
    whole = share * (near * by_o + weight * by_far)
    tl.store(of_lse + r, near * share * (by_o - whole), mask=keep)
    tl.store(of_mass + at, -weight * share * whole, mask=late)
    if AFFINE:
        tl.store(of_weight + r, share * (by_far - beyond * whole), mask=keep)
