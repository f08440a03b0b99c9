"""Blocks that the Triton kernels share: tiles of tokens, decays of a chunk, and packed sequences.

A kernel works on chunks of C tokens. Decays enter as log2: with g the running sum inside a chunk, its own token
included, a pair of tokens weighs 2^(g_t − g_s), the state before the chunk is read with 2^g_t, and token s enters the
state after it with 2^(g_C − g_s). Backwards, the same holds with g_C − g in place of g.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SAFE = tl.constexpr(-100.0)  # log2 of what a chunk may decay by, for its pairs to be weighed by products
FLOOR = tl.constexpr(-256.0)  # stands for −inf: 2 to it is 0, and sums of a few keep the digits of the others


@triton.jit
def load_tile(base, stride, rows, left, cols, width: tl.constexpr, padded: tl.constexpr):
    """Rows `rows` < left and columns `cols` < width of a matrix; zero beyond."""
    keep = (rows < left)[:, None]
    if width != padded:
        keep = keep & (cols < width)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=keep, other=0.0)


@triton.jit
def store_tile(base, stride, rows, left, cols, width: tl.constexpr, padded: tl.constexpr, tile):
    """The opposite of `load_tile`, in the matrix's dtype."""
    keep = (rows < left)[:, None]
    if width != padded:
        keep = keep & (cols < width)[None, :]
    tl.store(base + rows[:, None] * stride + cols[None, :], tile.to(base.dtype.element_ty), mask=keep)


@triton.jit
def sequence(cu, i, N, PACKED: tl.constexpr):
    """Of sequence i: its row in the batch, its first token in that row, and its length."""
    if PACKED:
        begin = tl.load(cu + i).to(tl.int64)
        row = begin * 0
        length = (tl.load(cu + i + 1) - begin).to(tl.int32)
    else:
        row = i.to(tl.int64)
        begin = row * 0
        length = N
    return row, begin, length


@triton.jit
def run_of(i_s, splits, n, C: tl.constexpr):
    """The first tile of run i_s of so many of n tokens, and the one after its last."""
    per = tl.cdiv(tl.cdiv(n, C), splits)
    return i_s * per, tl.minimum((i_s + 1) * per, tl.cdiv(n, C))


@triton.jit
def count_slots(N, sequences, C: tl.constexpr, PACKED: tl.constexpr):
    """Room for what is kept of each chunk of a row of the batch, see `launch.slots`."""
    return N // C + 2 + (sequences if PACKED else 0)


@triton.jit
def find_chunk(cu, sequences, i, N, C: tl.constexpr, PACKED: tl.constexpr):
    """The chunk with slot i of a row of the batch: its sequence (0 unless packed), its first token in the row, and the tokens
    that its sequence has from there on (none where the slot is empty)."""
    i_q = i * 0
    if PACKED:  # slots begin at cu // C + sequence, which only rises: the last one up to i, by bisection
        beyond = sequences + i * 0
        while beyond - i_q > 1:
            middle = (i_q + beyond) // 2
            start = tl.load(cu + middle).to(tl.int64) // C + middle
            i_q = tl.where(start <= i, middle, i_q)
            beyond = tl.where(start <= i, beyond, middle)
        begin = tl.load(cu + i_q).to(tl.int64)
        first = begin + (i - begin // C - i_q) * C
        left = tl.load(cu + i_q + 1).to(tl.int64) - first
    else:
        first = i.to(tl.int64) * C
        left = N - first
    return i_q, first, left.to(tl.int32)


@triton.jit
def decays_much(P, chunks, C: tl.constexpr):
    """Whether one of these chunks decays below 2^SAFE: P holds running sums within each."""
    lowest = tl.zeros([128], tl.float32)
    for i in range(0, chunks, 128):
        j = i + tl.arange(0, 128)
        lowest = tl.minimum(lowest, tl.load(P + j.to(tl.int64) * C + C - 1, mask=j < chunks, other=0.0).to(tl.float32))
    return tl.min(lowest, 0) < SAFE


@triton.jit
def pair_weights(p, keep):
    """2^(p_t − p_s) for the pairs kept, else 0."""
    return tl.where(keep, tl.exp2(tl.where(keep, p[:, None] - p[None, :], 0.0).to(tl.float32)), 0.0)


@triton.jit
def rounded(x, MT: tl.constexpr):
    """float32 x, rounded to MT and back: for bfloat16 in integers, which are faster than two conversions."""
    if tl.bfloat16 == MT:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        return x.to(MT).to(tl.float32)


@triton.jit
def upper_bits(x):
    """float32 x as what bfloat16 holds of it, cut, and what is left."""
    upper = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return upper, x - upper


@triton.jit
def in_two(x, MT: tl.constexpr):
    """float32 x as a sum of two MT."""
    upper, rest = upper_bits(x)
    return upper.to(MT), rest.to(MT)
