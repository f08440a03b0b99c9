"""Rules as lists of integers, which operators can be given, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from subquad.ops.sparse.grids import Circle, Neighborhood
from subquad.ops.sparse.patterns import Band, Globals, Intersection, Listed, Power, Strided, Union
from subquad.ops.sparse.rules import Causal, Everything, Rule, Terrace, Window

KINDS: tuple[type, ...] = (
    Everything, Causal, Window, Terrace, Band, Globals, Strided, Power, Listed, Union, Intersection, Neighborhood, Circle,
)  # fmt: skip


def has_code(rule: Rule) -> bool:
    """Whether the rule, and those it joins, are of the library's kinds."""
    return type(rule) in KINDS and all(has_code(part) for part in getattr(rule, "rules", ()))


def encode(rule: Rule) -> list[int]:
    """The rule's kind and its fields; a tuple is its length and what it holds."""
    code = [KINDS.index(type(rule))]
    for field in fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, field.name)
        if isinstance(value, tuple):
            code.append(len(value))
            for part in value:
                code += encode(part) if type(part) in KINDS else [int(part)]
        else:
            code.append(value)
    return code


def decode(code: list[int]) -> Rule:
    """The inverse of `encode`."""
    return _read(iter(code))


def _read(code: Iterator[int]) -> Rule:
    kind = KINDS[next(code)]
    values: list[Any] = []
    for field in fields(kind):
        if field.type == "int":
            values.append(next(code))
            continue
        of: Any = {"tuple[int, ...]": next, "tuple[bool, ...]": lambda c: bool(next(c)), "tuple[Rule, ...]": _read}[str(field.type)]
        values.append(tuple(of(code) for _ in range(next(code))))
    made: Rule = kind(*values)
    return made
