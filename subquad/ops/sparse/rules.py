"""Rules: which keys a query may see, as a function of the two positions. Small frozen objects that a kernel can know.

`allowed` is the definition; the others answer for ranges, so that work is planned without looking at pairs. `allowed`,
`touches` and `covers` take integers and tensors alike. Ranges include both ends.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Rule(Hashable, Protocol):
    """What every rule answers; its fields are integers or tuples of integers."""

    @property
    def words(self) -> str:
        """The rule in words: what a query sees."""

    def allowed(self, q: Any, k: Any) -> Any:
        """Whether a query at position q sees a key at position k."""

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Whether some query of q0 … q1 may see some key of k0 … k1 (True where unsure)."""

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Whether every query of q0 … q1 sees every key of k0 … k1 (False where unsure)."""

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        """Key positions at which what the queries q0 … q1 see may begin or end: work is planned between them."""

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        """What the picture of a piece depends on, beside its size: pieces of equal pattern share one mask; None: with none."""


@dataclass(frozen=True)
class Everything:
    """Every query sees every key."""

    words = "every key"

    def allowed(self, q: Any, k: Any) -> Any:
        return (q == q) & (k == k)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (q0 <= q1) & (k0 <= k1)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (q0 == q0) & (k0 == k0)

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return ()

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return None


@dataclass(frozen=True)
class Causal:
    """A query sees the keys up to its own position."""

    words = "the keys up to its own position"

    def allowed(self, q: Any, k: Any) -> Any:
        return k <= q

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 <= q1) & (k0 <= k1)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return k1 <= q0

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return (q0 + 1, q1 + 1)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0


@dataclass(frozen=True)
class Window:
    """A query sees the last `size` keys up to its own position, and the first `sinks` of them all (StreamingLLM)."""

    size: int
    sinks: int = 0

    @property
    def words(self) -> str:
        return f"the last {self.size} keys up to its own position" + (f" and the first {self.sinks}" if self.sinks else "")

    def allowed(self, q: Any, k: Any) -> Any:
        near = k > q - self.size
        return (k <= q) & (near | (k < self.sinks) if self.sinks else near)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 <= q1) & (k0 <= k1) & ((k1 > q0 - self.size) | (k0 < self.sinks))

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k1 <= q0) & ((k0 > q1 - self.size) | (k1 < self.sinks))

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return (self.sinks, q0 - self.size + 1, q1 - self.size + 1, q0 + 1, q1 + 1)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0, k1 < self.sinks


@dataclass(frozen=True)
class Terrace:
    """A query sees its own block of `size` positions and the one before it, up to its own position (LoLCATs)."""

    size: int

    @property
    def words(self) -> str:
        return f"its own block of {self.size} positions and the one before, up to its own position"

    def allowed(self, q: Any, k: Any) -> Any:
        return (k <= q) & (k >= self._start(q))

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k0 <= q1) & (k0 <= k1) & (k1 >= self._start(q0))

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        return (k1 <= q0) & (k0 >= self._start(q1))

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        return (self._start(q0), self._start(q1), q0 + 1, q1 + 1)

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        return k0 - q0, q0 % self.size

    def _start(self, q: Any) -> Any:
        return (q // self.size - 1) * self.size


EVERYTHING = Everything()
