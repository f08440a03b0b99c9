"""What a layout holds, and the checks that its makers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.sparse.rules import Rule

if TYPE_CHECKING:
    from subquad.ops.sparse.layout import Layout


class Fields:
    """The attributes of `Layout`, which says what they are."""

    def __init__(
        self, n: int, m: int, rule: Rule, block_q: int, block_k: int, index: Tensor | None = None, counts: Tensor | None = None, *,
        bits: Tensor | None = None, bit_index: Tensor | None = None, starts: Tensor | None = None, stops: Tensor | None = None,
        dynamic: bool = False, parts: Sequence[Layout] = (), parts_of: str = "",
    ) -> None:  # fmt: skip
        self.n, self.m, self.inner = n, m, rule
        self.block_q, self.block_k = block_q, block_k
        self.index, self.counts = index, counts
        self.bits, self.bit_index, self.starts, self.stops = bits, bit_index, starts, stops
        self.dynamic, self.parts, self.parts_of = dynamic, tuple(parts), parts_of
        self._host_counts: list[int] | None = None


def check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(name, repr(value), f"an integer of at least {least}")


def check_sizes(n: int, m: int, *, aligned: bool = True) -> None:
    check_int("n", n, 0)
    check_int("m", m, 0)
    if aligned and m < n:
        raise InputError("m", m, f"at least n, {n}: positions align at the end")


def cut_short(name: str, given: int | None, blocks: int, side: int) -> int:
    """The number of tokens that `blocks` blocks hold: all, or `given`, which must end in the last block."""
    if given is None:
        return blocks * side
    check_int(name, given, 0)
    if -(-given // side) != blocks:
        raise InputError(name, given, f"a number that fills {blocks} blocks of {side}: {max(0, (blocks - 1) * side + 1)} … {blocks * side}")
    return given


def sides_of(block: int | tuple[int, int]) -> tuple[int, int]:
    block_q, block_k = block if isinstance(block, tuple) else (block, block)
    check_int("block", block_q, 1)
    check_int("block", block_k, 1)
    return block_q, block_k


def check_lists(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        was = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(name, was, "integers [B or 1, H or 1, blocks of queries, capacity]")
