"""What the moments' kernels are made of, in Triton: feature maps and their gradients, rotary, normalisers, runs of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY, ELU1, RELU, EXP, SILU, SIGN_CUBE, NORM_POWER = (tl.constexpr(i) for i in range(7))
DIVIDE, FLOORED, NONE, MAGNITUDE, SUBTRACT = (tl.constexpr(i) for i in range(5))  # the last two also read the mean of v


# ---- features ----------------------------------------------------------------------------------------------------


@triton.jit
def columns(D: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, HALVES: tl.constexpr):
    """Of each column of a tile of features: the channel (≥ D: none), the row of the moments, and the sign.

    The two channels of a rotary pair stand side by side: with HALVES, the channels that turn, these are i and i + HALVES/2.
    """
    cols = tl.arange(0, BF)
    c = cols % BD
    ch = tl.where(c < HALVES, c % 2 * (HALVES // 2) + c // 2, c) if HALVES else c
    return ch, cols // BD * D + ch, 1.0 - 2.0 * (cols // BD)


@triton.jit
def norm_terms(x):
    """Of rows of which each channel stands twice: 1/‖x‖, tanh ‖x‖, and log |x_c|/‖x‖."""
    norm = tl.sqrt(0.5 * tl.sum(x * x, 1))
    norm = tl.where(norm > 0, norm, 1.0)
    tanh = 1 - 2 / (tl.exp(2 * norm) + 1)
    return 1 / norm, tanh, tl.log(tl.where(x != 0, tl.abs(x), 1.0)) - tl.log(norm)[:, None]


@triton.jit
def feature(x, sign, MAP: tl.constexpr):
    """φ(x), in float32."""
    if MAP == ELU1:
        y = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == RELU:
        y = tl.maximum(x, 0.0)
    elif MAP == EXP:
        y = tl.exp(x)
    elif MAP == SILU:
        y = x * tl.sigmoid(x)
    elif MAP == SIGN_CUBE:
        y = tl.maximum(x * sign[None, :], 0.0)
        y = y * y * y
    elif MAP == NORM_POWER:
        _, tanh, logs = norm_terms(x)
        y = tl.where(x * sign[None, :] > 0, tl.exp(3 * (0.5 + tanh)[:, None] * logs), 0.0)
    else:
        y = x
    return y


@triton.jit
def feature_back(x, phi, d, sign, MAP: tl.constexpr):
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
        up = tl.maximum(x * sign[None, :], 0.0)
        y = d * 3 * up * up * sign[None, :]
    elif MAP == NORM_POWER:
        inverse, tanh, logs = norm_terms(x)
        power = 3 * (0.5 + tanh)
        d = d * phi
        by_norm = 3 * (1 - tanh * tanh) * inverse * tl.sum(d * logs, 1) - power * inverse * inverse * tl.sum(d, 1)
        y = d * power[:, None] / tl.where(x != 0, x, 1.0) + 0.5 * x * by_norm[:, None]
    else:
        y = d
    return y


@triton.jit
def angles(cos, sin, rows, left, BD: tl.constexpr, BF: tl.constexpr, D: tl.constexpr):
    """cos and sin ``[C, BF/2]`` of the pairs of each row, of tables ``[·, D/2]``."""
    pair = tl.arange(0, BF // 2) % (BD // 2)
    keep = (rows < left)[:, None] & (pair < D // 2)[None, :]
    at = rows[:, None] * (D // 2) + pair[None, :]
    return tl.load(cos + at, mask=keep, other=0.0).to(tl.float32), tl.load(sin + at, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def turn(x, cos, sin):
    """Each pair of neighbouring columns turned by its angle."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [x.shape[0], x.shape[1]])


@triton.jit
def fold(x, COPIES: tl.constexpr):
    """Both copies of each channel added."""
    return tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), 1) if COPIES == 2 else x


@triton.jit
def run_of(i_s, splits, n, C: tl.constexpr):
    """The first tile of run i_s of n tokens, and the one after its last."""
    per = tl.cdiv(tl.cdiv(n, C), splits)
    return i_s * per, tl.minimum((i_s + 1) * per, tl.cdiv(n, C))


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
