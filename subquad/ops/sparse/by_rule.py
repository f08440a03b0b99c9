"""Layouts made by a rule alone: nothing is held, whatever their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

from subquad.checks import InputError
from subquad.ops.sparse.fields import Fields, check_int, check_sizes
from subquad.ops.sparse.grids import Circle, Neighborhood
from subquad.ops.sparse.patterns import Band, Globals, Joint, Power, Strided, Union, join
from subquad.ops.sparse.rules import EVERYTHING, Causal, Rule, Terrace, Window

PerAxis = int | Sequence[int]


class ByRule(Fields):
    """Makers of layouts whose rule says all."""

    @classmethod
    def dense(cls, n: int, m: int | None = None) -> Self:
        """Every query sees every key."""
        m = n if m is None else m
        check_sizes(n, m, aligned=False)
        return cls(n, m, EVERYTHING, 128, 128)

    @classmethod
    def causal(cls, n: int, m: int | None = None) -> Self:
        """Query i sees the keys j ≤ i + m − n."""
        m = n if m is None else m
        check_sizes(n, m)
        return cls(n, m, Causal(), 128, 128)

    @classmethod
    def window(cls, n: int, size: int, sinks: int = 0, m: int | None = None) -> Self:
        """Query i, standing at p = i + m − n, sees p − size < j ≤ p, and j < sinks up to p."""
        m = n if m is None else m
        check_sizes(n, m)
        check_int("size", size, 1)
        check_int("sinks", sinks, 0)
        return cls(n, m, Window(size, sinks), 128 if size >= 256 else 64, 64)

    @classmethod
    def terrace(cls, n: int, size: int, m: int | None = None) -> Self:
        """A query sees its own block of `size` positions and the block before it, causally: size … 2·size keys."""
        m = n if m is None else m
        check_sizes(n, m)
        check_int("size", size, 1)
        return cls(n, m, Terrace(size), 128 if size >= 256 else 64, 64)

    @classmethod
    def band(cls, n: int, left: int, right: int, *, global_tokens: int = 0, m: int | None = None) -> Self:
        """Query i, standing at p = i + m − n, sees the keys p − left … p + right; the first `global_tokens` positions see all and
        are seen by all.

        Beltagy et al.: Longformer (arXiv 2004.05150), section 3.1, with a window of left + right.
        """
        m = n if m is None else m
        check_sizes(n, m)
        for name, value in (("left", left), ("right", right), ("global_tokens", global_tokens)):
            check_int(name, value, 0)
        rule = join(Union, Band(left, right), Globals(global_tokens)) if global_tokens else Band(left, right)
        return cls(n, m, rule, 128 if left + right >= 256 else 64, 64)

    @classmethod
    def global_tokens(cls, n: int, count: int) -> Self:
        """The first `count` tokens see every key, and every query sees them: to be joined with another layout by ``|``."""
        check_sizes(n, n)
        check_int("count", count, 0)
        return cls(n, n, Globals(count), 64, 64)

    @classmethod
    def neighborhood(
        cls, grid: PerAxis, window: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1, causal: bool | Sequence[bool] = False
    ) -> Self:
        """The nearest keys on a grid of one to three axes, tokens in row-major order; windows slide inwards at borders.

        >>> Layout.neighborhood((64, 64), 13)
        Layout(4096 x 4096, Neighborhood(grid=(64, 64), window=(13, 13), ...), density 4.13 %)

        Args:
            grid: its sides, or the length of a sequence.
            window: keys along each axis; even ones reach window/2 to the left and window/2 − 1 to the right.
            stride: queries that share the window of their group's leader, at most the window.
            dilation: distance of the keys along each axis; window · dilation is at most the side.
            causal: whether later coordinates are hidden.

        Each is a number or one per axis. Hassani et al. (arXiv 2504.16922).
        """
        sides = _axes("grid", grid, 0)
        windows, strides, dilations = (
            _axes(name, x, len(sides)) for name, x in (("window", window), ("stride", stride), ("dilation", dilation))
        )
        flags = (causal,) * len(sides) if isinstance(causal, bool) else tuple(causal)
        if len(flags) != len(sides) or not all(isinstance(c, bool) for c in flags):
            raise InputError("causal", repr(causal), f"True or False, or one for each of the {len(sides)} axes")
        for side, w, s, d in zip(sides, windows, strides, dilations):
            if w * d > side:
                at = f" under dilation {d}" if d > 1 else ""
                raise InputError("window", w, f"at most {side // d}{at} on an axis of {side}")
            if s > w:
                raise InputError("stride", s, f"at most the window, {w}")
        return cls._on_grid(sides, Neighborhood(sides, windows, strides, dilations, flags))

    @classmethod
    def circle(cls, grid: PerAxis, radius: float, *, text_tokens: int = 0, text_first: bool = True) -> Self:
        """Keys at a Euclidean distance below `radius` on a grid of one to three axes (CLEAR, arXiv 2412.16112).

        `text_tokens` more stand before the grid's tokens, or behind them: they see all and are seen by all.
        """
        sides = _axes("grid", grid, 0)
        if isinstance(radius, bool) or not isinstance(radius, int | float) or not 0 < radius < math.inf:
            raise InputError("radius", repr(radius), "a positive number")
        check_int("text_tokens", text_tokens, 0)
        alone = cls._on_grid(sides, Circle(sides, min(math.ceil(radius * radius) - 1, sum(side * side for side in sides))))
        if not text_tokens:
            return alone
        rule = Joint(alone.inner, text_tokens if text_first else 0, alone.n)
        return cls(alone.n + text_tokens, alone.n + text_tokens, rule, alone.block_q, alone.block_k)

    @classmethod
    def strided(cls, n: int, stride: int, *, window: int = 1, block: int = 64, offset: int = 0, m: int | None = None) -> Self:
        """Causal, by blocks: the last `window` blocks and the blocks j with (j + offset) mod stride = 0.

        Lin et al.: S2-Attention (arXiv 2407.17678); Child et al.: Sparse Transformers (arXiv 1904.10509) with block = 1.
        """
        m = n if m is None else m
        check_sizes(n, m)
        for name, value, least in (("stride", stride, 1), ("window", window, 1), ("block", block, 1), ("offset", offset, 0)):
            check_int(name, value, least)
        return cls(n, m, Strided(block, window, stride, offset % stride), _side(block), 64)

    @classmethod
    def power(cls, n: int, *, window: int = 2, sinks: int = 0, block: int = 64, m: int | None = None) -> Self:
        """Causal, by blocks: the last `window` blocks, those at distances 1, 2, 4, 8, …, and the first `sinks` blocks.

        Chen et al.: PowerAttention (arXiv 2503.03588): d layers reach every block at a distance below 2^d.
        """
        m = n if m is None else m
        check_sizes(n, m)
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0), ("block", block, 1)):
            check_int(name, value, least)
        return cls(n, m, Power(block, window, sinks), _side(block), 64)

    @classmethod
    def _on_grid(cls, grid: tuple[int, ...], rule: Rule) -> Self:
        n, side = math.prod(grid), grid[-1]
        # whole lines, so that a tile's keys are few long runs
        return cls(n, n, rule, side * max(1, 64 // side) if side <= 128 else 64, 64)


def _side(block: int) -> int:
    """Queries of a tile: whole blocks of the rule, about 64."""
    return block * max(1, 64 // block) if block <= 128 else 64


def _axes(name: str, value: Any, axes: int) -> tuple[int, ...]:
    """A positive integer for each axis; a single number stands for all of them."""
    given = (value,) * max(axes, 1) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    good = all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in given)
    if not good or (len(given) != axes if axes else not 1 <= len(given) <= 3):
        raise InputError(name, repr(value), f"positive integers, {axes if axes else 'one to three'} of them")
    return given
