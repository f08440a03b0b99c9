"""Rules as lists of integers, which operators can be given, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from subquad.ops.sparse.grids import Circle, Neighborhood
from subquad.ops.sparse.patterns import Band, Globals, Intersection, Joint, Listed, Power, Strided, Union
from subquad.ops.sparse.rules import Causal, Everything, Rule, Terrace, Window

KINDS: tuple[type, ...] = (
    Everything, Causal, Window, Terrace, Band, Globals, Strided, Power, Listed, Union, Intersection, Neighborhood, Circle, Joint,
)  # fmt: skip


def has_code(rule: Rule) -> bool:
    """Whether the rule, and those inside it, are of the library's kinds."""
    parts = (*getattr(rule, "rules", ()), *([rule.inner] if isinstance(rule, Joint) else []))
    return type(rule) in KINDS and all(has_code(part) for part in parts)


def encode(rule: Rule) -> list[int]:
    """The rule's kind and its fields; a tuple is its length and what it holds."""
    return [KINDS.index(type(rule)), *(x for field in fields(rule) for x in _write(getattr(rule, field.name)))]  # type: ignore[arg-type]


def _write(value: Any) -> list[int]:
    if isinstance(value, tuple):
        return [len(value), *(x for part in value for x in _write(part))]
    return encode(value) if type(value) in KINDS else [int(value)]


def decode(code: list[int]) -> Rule:
    """The inverse of `encode`."""
    return _read(iter(code))


def _read(code: Iterator[int]) -> Rule:
    kind = KINDS[next(code)]
    made: Rule = kind(*(_field(str(field.type), code) for field in fields(kind)))
    return made


def _field(kind: str, code: Iterator[int]) -> Any:
    if kind.startswith("tuple["):
        return tuple(_field(kind.removeprefix("tuple[").removesuffix(", ...]"), code) for _ in range(next(code)))
    return _read(code) if kind == "Rule" else bool(next(code)) if kind == "bool" else next(code)
