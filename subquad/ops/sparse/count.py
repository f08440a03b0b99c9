"""How many pairs a rule shows, where that can be counted without a look at the pairs."""

from __future__ import annotations

from functools import reduce
from math import isqrt, prod

import torch

from subquad.ops.sparse.grids import Circle, Neighborhood
from subquad.ops.sparse.rules import Causal, Everything, Rule, Terrace, Window


def pairs_of(rule: Rule, n: int, m: int) -> int | None:
    """The pairs of n queries, the last of m positions, and m keys that the rule shows; None where they would have to be looked at."""
    if isinstance(rule, Everything):
        return n * m
    if isinstance(rule, Neighborhood | Circle):
        return None if not n == m == prod(rule.grid) else _neighbors(rule) if isinstance(rule, Neighborhood) else _within(rule)
    q = torch.arange(m - n, m)
    if isinstance(rule, Causal):
        return int((q + 1).sum())
    if isinstance(rule, Window):
        return int((q + 1).clamp(max=rule.size).sum() + (q + 1 - rule.size).clamp(0, rule.sinks).sum())
    if isinstance(rule, Terrace):
        return int((q + 1 - ((q // rule.size - 1) * rule.size).clamp(min=0)).sum())
    return None


def _neighbors(rule: Neighborhood) -> int:
    """What is seen along one axis does not depend on the others: their counts multiply."""
    total = 1
    for axis, (size, d) in enumerate(zip(rule.grid, rule.dilation)):
        i = torch.arange(size)
        first, last = rule.along(axis, i // d, (size - i % d + d - 1) // d)
        total *= int((last - first + 1).sum())
    return total


def _within(rule: Circle) -> int:
    """Each offset within the circle is one of as many pairs as the grid has room for it."""
    reach = isqrt(rule.limit)
    steps = [torch.arange(-min(reach, size - 1), min(reach, size - 1) + 1) for size in rule.grid]
    offsets = torch.meshgrid(*steps, indexing="ij")
    room = reduce(torch.mul, (size - offset.abs() for size, offset in zip(rule.grid, offsets)))
    return int(room[sum(offset * offset for offset in offsets) <= rule.limit].sum())
