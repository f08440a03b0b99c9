"""Blocks that the sparse kernels share: where a tile's tokens lie, which of its pairs are seen, and their scores.

A tile is SIDE neighbouring tokens, or on a grid (G0 > 0) the tokens of a box A0 × A1 × A2. Scores times `unit` are in log 2.
What belongs to queries comes with a length-1 axis for the keys, and the other way round: tiles and their transposes read alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from subquad.ops.triton_blocks import LOG2E


@triton.jit
def origin(
    tile, SIDE: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr
):
    """A tile's first token, and the coordinates of its corner."""
    if G0 == 0:
        return tile * SIDE, tile * SIDE, 0, 0
    else:
        rows: tl.constexpr = (G1 + A1 - 1) // A1
        columns: tl.constexpr = (G2 + A2 - 1) // A2
        c0 = tile // (rows * columns) * A0
        c1 = tile // columns % rows * A1
        c2 = tile % columns * A2
        return (c0 * G1 + c1) * G2 + c2, c0, c1, c2


@triton.jit
def within(SIDE: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr, A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr):
    """Of a tile's tokens: the distance from its first, and their coordinates from its corner."""
    i = tl.arange(0, SIDE)
    if G0 == 0:
        return i, i, i * 0, i * 0
    else:
        c0 = i // (A1 * A2)
        c1 = i // A2 % A1
        c2 = i % A2
        return (c0 * G1 + c1) * G2 + c2, c0, c1, c2


@triton.jit
def place_of(
    c0,
    c1,
    c2,
    SIDE: tl.constexpr,
    G0: tl.constexpr,
    G1: tl.constexpr,
    G2: tl.constexpr,
    A0: tl.constexpr,
    A1: tl.constexpr,
    A2: tl.constexpr,
):
    """Where the tokens at these coordinates stand when all are laid tile after tile."""
    if G0 == 0:
        return c0
    else:
        tile = (c0 // A0 * ((G1 + A1 - 1) // A1) + c1 // A1) * ((G2 + A2 - 1) // A2) + c2 // A2
        return tile * SIDE + (c0 % A0 * A1 + c1 % A1) * A2 + c2 % A2


@triton.jit
def inside_of(c0, c1, c2, tokens, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr):
    """Which of the coordinates are tokens."""
    if G0 == 0:
        return c0 < tokens
    else:
        return (c0 < G0) & (c1 < G1) & (c2 < G2)


@triton.jit
def rows_of(base, local, stride, inside, cols, width: tl.constexpr, padded: tl.constexpr, MASKED: tl.constexpr):
    """The rows `local` of a matrix, zero where not `inside`: nothing is asked where no tile is cut short (not MASKED)."""
    at = base + local[:, None] * stride + cols[None, :]
    if MASKED and width != padded:
        return tl.load(at, mask=inside[:, None] & (cols < width)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif width != padded:
        return tl.load(at, mask=(cols < width)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def positions(pos, first, local, coordinate, inside, shift):
    """Positions of a tile's tokens: those given, or their index + shift; on a grid the first coordinate."""
    if pos is None:
        return coordinate + shift
    else:
        return tl.load(pos + first + local, mask=inside, other=-1).to(tl.int32)


@triton.jit
def seen_pairs(
    seen, q, q1, q2, k, k1, k2, q_sequence, k_sequence, q_token, k_token, number, bits, starts, stops,
    RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Which pairs of a partial tile are seen, of those `seen` so far (None: all): by the rule, sequences, bitmap `number` and runs."""
    if RULE is not None:
        seen = both(seen, RULE(q, q1, q2, k, k1, k2))
    if q_sequence is not None:
        seen = both(seen, q_sequence == k_sequence)
    if bits is not None:
        words: tl.constexpr = (BLOCK_K + 31) // 32
        of_block = bits + tl.maximum(number, 0).to(tl.int64) * (BLOCK_Q * words)
        of_key = k_token % BLOCK_K
        word = tl.load(of_block + q_token % BLOCK_Q * words + of_key // 32, mask=both(seen, number >= 0), other=-1)
        seen = both(seen, (word >> (of_key % 32) & 1) != 0)
    if starts is not None:
        inside = k_token < 0
        for r in range(RUNS):
            inside = inside | ((k_token >= tl.load(starts + r)) & (k_token < tl.load(stops + r)))
        seen = both(seen, inside)
    if seen is None:
        return k_token >= 0
    else:
        return seen


@triton.jit
def both(a, b):
    """a & b; None is true of all."""
    if a is None:
        return b
    else:
        return a & b


@triton.jit
def shaped(dots, factors, q, k, slope, key_bias, table, scale, REACH: tl.constexpr, CAP: tl.constexpr, PLAIN: tl.constexpr):
    """(scores, tanh of what a cap bends) out of products of queries and keys; a bias that is None adds nothing.

    Where nothing is added (PLAIN), scores stay products: the scale, which is positive, joins the exponent at no cost.
    """
    bend = dots
    s = dots
    if CAP > 0:
        bend = 1.0 - 2.0 / (tl.exp2(dots * (scale * (2.0 * LOG2E / CAP))) + 1.0)
        s = bend * (CAP * LOG2E)
    elif not PLAIN:
        s = dots * (scale * LOG2E)
    if factors is not None:
        s += factors * LOG2E
    if slope is not None:
        s -= (slope * LOG2E) * tl.abs(q - k).to(tl.float32)
    if key_bias is not None:
        s += key_bias * LOG2E
    if table is not None:
        away = tl.minimum(tl.maximum(k - q, -REACH), REACH) + REACH
        s += tl.load(table + away) * LOG2E
    return s, bend
