"""Rules as Triton functions: a rule's own `allowed` is traced once, so that the kernels and the definition cannot differ.

A traced value writes a line of source for each operation; lines that repeat are kept once. What comes of the coordinates of
queries alone has the shape ``[queries, 1]``, of keys alone ``[1, keys]``: only the last comparisons are made pair by pair.
"""

from __future__ import annotations

import hashlib
import linecache
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from subquad.ops.sparse.grids import grid_of
from subquad.ops.sparse.rules import Rule

NAMES = ("q0", "q1", "q2", "k0", "k1", "k2")


class _Traced:
    """A value whose operations are written down; what is `signed` may be negative, where Triton rounds quotients to zero."""

    def __init__(self, lines: dict[str, str], name: str, signed: bool = False) -> None:
        self.lines, self.name, self.signed = lines, name, signed

    def _write(self, operation: str, left: Any, right: Any) -> _Traced:
        if isinstance(left, _Traced) and (operation + str(right)) in ("//1", "*1", "+0", "-0"):
            return left
        signed = any(isinstance(x, _Traced) and x.signed for x in (left, right))
        if signed and operation == "//":  # rounded down, as Python does
            left = left - left % right
        elif signed and operation == "%":
            left = self._line("%", left, right, signed) + right
        return self._line(operation, left, right, signed)

    def _line(self, operation: str, left: Any, right: Any, signed: bool) -> _Traced:
        a, b = (x.name if isinstance(x, _Traced) else repr(int(x)) for x in (left, right))
        name = self.lines.setdefault(f"{a} {operation} {b}", f"t{len(self.lines)}")
        return _Traced(self.lines, name, signed)

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("a rule must not branch on positions")


def _operator(operation: str, swapped: bool) -> Any:
    def write(self: _Traced, other: Any) -> _Traced:
        return self._write(operation, other, self) if swapped else self._write(operation, self, other)

    return write


for _name, _operation in {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "and": "&", "or": "|", "lshift": "<<"}.items():
    setattr(_Traced, f"__{_name}__", _operator(_operation, False))
    setattr(_Traced, f"__r{_name}__", _operator(_operation, True))
for _name, _operation in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items():
    setattr(_Traced, f"__{_name}__", _operator(_operation, False))


def source(rule: Rule, name: str, *, on_grid: bool) -> str:
    """The source of ``name(q0, q1, q2, k0, k1, k2)``: of positions q0 and k0, or of coordinates (the last ones, on a plane)."""
    lines: dict[str, str] = {}
    # positions of queries are given ones at times; keys below 0 are hidden, and coordinates on a grid begin at 0
    q0, q1, q2, k0, k1, k2 = (_Traced(lines, x, x == "q0" and not on_grid) for x in NAMES)
    if on_grid:
        axes = len(grid_of(rule) or ())
        found = rule.seen([q0, q1, q2][3 - axes :], [k0, k1, k2][3 - axes :])  # type: ignore[attr-defined]
    else:
        found = rule.allowed(q0, k0)
    body = "".join(f"    {of} = {line}\n" for line, of in lines.items())
    return f"def {name}({', '.join(NAMES)}):\n{body}    return {found.name}\n"


@lru_cache(256)
def triton_rule(rule: Rule, on_grid: bool) -> Any:
    """The rule as a Triton function, of positions or of coordinates on its grid."""
    digest = hashlib.sha256(repr((rule, on_grid)).encode()).hexdigest()[:12]
    name = f"rule_{digest}"
    text = source(rule, name, on_grid=on_grid)
    file = f"<{type(rule).__name__} {digest}>"  # in ASCII, as the assembler is told the name
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton looks for the source
    made: dict[str, Any] = {"__name__": __name__, "tl": tl}  # which the interpreter looks for
    exec(compile(text, file, "exec"), made)
    return triton.jit(made[name])
