"""What the moments' kernels are made of, in Triton: feature maps and their gradients, rotary, normalisers, weights, records."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from subquad.ops.launch import INTERPRETED as _INTERPRETED
from subquad.ops.triton_blocks import LOG2E, in_two

IDENTITY, ELU1, RELU, EXP, SILU, SIGN_CUBE, NORM_POWER = (tl.constexpr(i) for i in range(7))
DIVIDE, FLOORED, NONE, MAGNITUDE, SUBTRACT = (tl.constexpr(i) for i in range(5))  # the last two also read the mean of v
TINY = tl.constexpr(1.2e-38)
INTERPRETED = tl.constexpr(_INTERPRETED)


# ---- features ----------------------------------------------------------------------------------------------------


@triton.jit
def channels(D: tl.constexpr, BD: tl.constexpr, HALVES: tl.constexpr):
    """The channel of each column of a tile, ≥ D where there is none.

    The two channels of a rotary pair stand side by side: with HALVES, the channels that turn, these are i and i + HALVES/2.
    """
    c = tl.arange(0, BD)
    return tl.where(c < HALVES, c % 2 * (HALVES // 2) + c // 2, c) if HALVES else c


@triton.jit
def log2(x):
    """By the device's own instruction: tl.log2 is twenty of them."""
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = libdevice.fast_log2f(x)
    return y


@triton.jit
def over(x, y):
    """x / y for |y| from 1e-38 to 1e38, which need not be looked at."""
    if INTERPRETED:
        z = x / y
    else:
        z = libdevice.fast_dividef(x, y)
    return z


@triton.jit
def norm_terms(x):
    """Of each row: 1/‖x‖, tanh ‖x‖, and log₂ |x_c|/‖x‖, of 0 that of the least normal number."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    norm = tl.where(norm > 0, norm, 1.0)
    tanh = 1 - 2 / (tl.exp2(norm * (2 * LOG2E)) + 1)
    return 1 / norm, tanh, log2(tl.maximum(tl.abs(x), TINY)) - log2(norm)[:, None]


@triton.jit
def feature(x, MAP: tl.constexpr):
    """φ(x), in float32; of maps of two signs, what stands in the copy of x's own sign. (tl.exp would look after subnormal numbers.)"""
    if MAP == ELU1:
        y = tl.where(x > 0, x + 1, tl.exp2(x * LOG2E))
    elif MAP == RELU:
        y = tl.maximum(x, 0.0)
    elif MAP == EXP:
        y = tl.exp2(x * LOG2E)
    elif MAP == SILU:
        y = x * tl.sigmoid(x)
    elif MAP == SIGN_CUBE:
        y = tl.abs(x * x * x)
    elif MAP == NORM_POWER:
        _, tanh, logs = norm_terms(x)
        y = tl.where(x != 0, tl.exp2(3 * (0.5 + tanh)[:, None] * logs), 0.0)
    else:
        y = x
    return y


@triton.jit
def feature_back(x, phi, d, MAP: tl.constexpr):
    """The gradient of x from that of φ(x)."""
    if MAP == ELU1:
        y = d * tl.where(x > 0, 1.0, phi)
    elif MAP == RELU:
        y = tl.where(x > 0, d, 0.0)
    elif MAP == EXP:
        y = d * phi
    elif MAP == SILU:
        s = tl.sigmoid(x)
        y = d * s * (1 + x * (1 - s))
    elif MAP == SIGN_CUBE:
        y = d * 3 * x * tl.abs(x)
    elif MAP == NORM_POWER:
        inverse, tanh, logs = norm_terms(x)
        power = 3 * (0.5 + tanh)
        d = d * phi
        by_norm = 3 * (1 - tanh * tanh) * inverse * tl.sum(d * logs, 1) / LOG2E - power * inverse * inverse * tl.sum(d, 1)
        y = over(d * power[:, None], tl.where(tl.abs(x) > TINY, x, 1.0)) + x * by_norm[:, None]  # φ of a subnormal x is 0
    else:
        y = d
    return y


@triton.jit
def copy(x, phi, SECOND: tl.constexpr, TWO: tl.constexpr):
    """The features of one copy: with TWO, where x is above 0, or with SECOND below."""
    return tl.where(x < 0 if SECOND else x > 0, phi, 0.0) if TWO else phi


@triton.jit
def pick(x, first, second, TWO: tl.constexpr):
    """What belongs to the copy of x's own sign."""
    return tl.where(x > 0, first, second) if TWO else first


@triton.jit
def angles(cos, sin, rows, left, D: tl.constexpr, BD: tl.constexpr):
    """cos and sin ``[C, BD/2]`` of the pairs of each row, of tables ``[·, D/2]``."""
    pair = tl.arange(0, BD // 2)
    keep = (rows < left)[:, None] & (pair < D // 2)[None, :]
    at = rows[:, None] * (D // 2) + pair[None, :]
    return tl.load(cos + at, mask=keep, other=0.0).to(tl.float32), tl.load(sin + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def turn(x, cos, sin, TURN: tl.constexpr):
    """With TURN, each pair of neighbouring columns turned by its angle."""
    if TURN:
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        x = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [x.shape[0], x.shape[1]])
    return x


@triton.jit
def in_parts(x, MT: tl.constexpr, SPLIT: tl.constexpr):
    """float32 x in MT, and with SPLIT what rounding leaves of it."""
    if SPLIT:
        first, second = in_two(x, MT)
    else:
        first, second = x.to(MT), x.to(MT)
    return first, second


@triton.jit
def product(a, b, rest, SPLIT: tl.constexpr, IP: tl.constexpr):
    """a·b, with SPLIT of a b in two parts: rounded once, a large mean in b would drown what is left where it cancels."""
    y = tl.dot(a, b, input_precision=IP)
    return tl.dot(a, rest, y, input_precision=IP) if SPLIT else y


@triton.jit
def offset(i, C: tl.constexpr):
    """The first token of tile i: what a tile adds to it is then the same for all, and its addresses are made once."""
    return i * tl.full([], C, tl.int64)


@triton.jit
def pairs_of_rows(x):
    """x ``[C, B]`` with rows i and i + 8 of each 16 added, which one thread has of a product: ``[C / 2, B]``, to sum once in the end."""
    y = tl.sum(tl.reshape(x, [x.shape[0] // 16, 2, 8, x.shape[1]]), 1)
    return tl.reshape(y, [x.shape[0] // 2, x.shape[1]])


@triton.jit
def add_parts(base, parts, stride, at, keep):
    """Σ over `parts` of what stands at base + i·stride + at."""
    total = tl.zeros(at.shape, tl.float32)
    for i in range(parts):
        total += tl.load(base + i * stride + at, mask=keep, other=0.0)
    return total


# ---- normalisers -------------------------------------------------------------------------------------------------


@triton.jit
def normal(t, scale, eps, NORMAL: tl.constexpr):
    """α and β of o = α n + β v̄, for scores that sum to t."""
    if NORMAL == DIVIDE:
        alpha, beta = 1 / (t + eps), t * 0
    elif NORMAL == FLOORED:
        alpha, beta = 1 / tl.maximum(t, eps), t * 0
    elif NORMAL == MAGNITUDE:
        alpha, beta = (1 + 1 / (scale * t + eps)) * scale, -scale * t
    elif NORMAL == SUBTRACT:
        alpha, beta = t * 0 + scale, 1 - scale * t
    else:
        alpha, beta = t * 0 + scale, t * 0
    return alpha, beta


@triton.jit
def normal_back(t, n, b, scale, eps, NORMAL: tl.constexpr):
    """t's gradient, where α has the gradient n and β has b."""
    if NORMAL == DIVIDE:
        y = -n / ((t + eps) * (t + eps))
    elif NORMAL == FLOORED:
        y = tl.where(t >= eps, -n / (tl.maximum(t, eps) * tl.maximum(t, eps)), 0.0)
    elif NORMAL == MAGNITUDE:
        y = -n * scale * scale / ((scale * t + eps) * (scale * t + eps)) - scale * b
    elif NORMAL == SUBTRACT:
        y = -scale * b
    else:
        y = t * 0
    return y


# ---- weights and records -----------------------------------------------------------------------------------------


@triton.jit
def weigh(
    phi, query, logits, factors, sl_n, sf_n, rows, keep, scale, QUERY: tl.constexpr, LOGITS: tl.constexpr, FACTORS: tl.constexpr
):  # fmt: skip
    """Factor and logit of each token of a tile, `query` for each number of phi; a token not seen has factor 0 and logit −inf."""
    factor = keep.to(tl.float32)
    logit = factor * 0
    if FACTORS:
        factor = tl.load(factors + rows * sf_n, mask=keep, other=0.0).to(tl.float32)
    if LOGITS:
        logit += tl.load(logits + rows * sl_n, mask=keep, other=0.0).to(tl.float32)
    if QUERY:
        logit += scale * tl.sum(phi * query, 1)
    return factor, tl.where(factor != 0, logit, float("-inf"))


@triton.jit
def load_matrix(base, ch, vs, D: tl.constexpr, V: tl.constexpr, SECOND: tl.constexpr):
    """Rows `ch` of the M of a record, or with SECOND of its second copy; 0 beyond."""
    at = (ch + (D if SECOND else 0))[:, None] * V + vs[None, :]
    return tl.load(base + at, mask=(ch < D)[:, None] & (vs < V)[None, :], other=0.0)


@triton.jit
def load_vector(base, ch, D: tl.constexpr, TWO: tl.constexpr):
    """Both copies of z, or the one that there is, twice; 0 beyond."""
    first = tl.load(base + ch, mask=ch < D, other=0.0)
    return first, tl.load(base + D + ch, mask=ch < D, other=0.0) if TWO else first


@triton.jit
def store_record(
    record, ch, vs, M, second, z, z_second, total, weight, D: tl.constexpr, V: tl.constexpr, TWO: tl.constexpr
):  # fmt: skip
    """All but the largest logit."""
    F: tl.constexpr = 2 * D if TWO else D
    inside = (ch < D)[:, None] & (vs < V)[None, :]
    tl.store(record + ch[:, None] * V + vs[None, :], M, mask=inside)
    tl.store(record + F * V + ch, z, mask=ch < D)
    if TWO:
        tl.store(record + (D + ch)[:, None] * V + vs[None, :], second, mask=inside)
        tl.store(record + F * V + D + ch, z_second, mask=ch < D)
    tl.store(record + F * V + F + vs, total, mask=vs < V)
    tl.store(record + F * V + F + V, weight)


@triton.jit
def read_record(record, vs, n, V: tl.constexpr, F: tl.constexpr, MEAN: tl.constexpr):
    """What M, z and Σ w v are to be multiplied by, v̄, and n, or 0 if no key was seen."""
    weight, top = tl.load(record + F * V + F + V), tl.load(record + F * V + F + V + 1)
    by = 1 / tl.where(weight == 0, 1.0, weight) if MEAN else tl.exp2(tl.where(top == float("-inf"), 0.0, top) * LOG2E)
    return by, tl.load(record + F * V + F + vs, mask=vs < V, other=0.0) * by, tl.where(weight != 0, n, 0)
