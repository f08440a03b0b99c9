"""Rules: which keys a query may see, as a function of the two positions. Small frozen objects that a kernel can know.

`allowed` is the definition; the others answer for ranges, so that work is planned without looking at pairs. `allowed`,
`touches` and `covers` take integers and tensors alike. Ranges include both ends.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Everything:
    """Every query sees every key."""

    def allowed(self, q: Any, k: Any) -> Any:
        """Whether a query at position q sees a key at position k."""
        return (q == q) & (k == k)

    def touches(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Whether some query of q0 … q1 may see some key of k0 … k1 (True where unsure)."""
        return (q0 <= q1) & (k0 <= k1)

    def covers(self, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        """Whether every query of q0 … q1 sees every key of k0 … k1 (False where unsure)."""
        return True

    def cuts(self, q0: int, q1: int) -> tuple[int, ...]:
        """Key positions between which `touches` and `covers` are exact for the queries q0 … q1."""
        return ()

    def pattern(self, q0: int, k0: int, k1: int) -> Hashable:
        """What the picture of a piece depends on, beside its size: pieces of equal pattern share one mask."""
        return None


@dataclass(frozen=True)
class Causal:
    """A query sees the keys up to its own position."""

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

    def allowed(self, q: Any, k: Any) -> Any:
        return (k <= q) & ((k > q - self.size) | (k < self.sinks))

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


Rule = Everything | Causal | Window | Terrace
EVERYTHING = Everything()
