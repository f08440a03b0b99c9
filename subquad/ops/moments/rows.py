"""Launch parameters of the moments' kernels in bfloat16, measured on an H100 or an H200.

By kernel, and by whether features are turned by a rotary, have two signs, both or neither: tokens of a tile, warps and stages for widths of
features and values up to 64, up to 128 and, of two signs, up to 256. Two signs with a rotary were measured up to 128 alone, in the second
column; beside it stand the rows without one. What has no row, float32 too, takes `CAREFUL` or `PLAIN`.
"""

from __future__ import annotations

from functools import cache

from subquad.ops.common import cdiv
from subquad.ops.launch import Config

ROWS: dict[tuple[str, str], tuple[Config, ...]] = {
    ("mean", "none"): (Config(32, 8, 3), Config(32, 8, 3)),
    ("mean", "signs"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("gather", "none"): (Config(128, 4, 3), Config(64, 4, 1)),
    ("gather", "turned"): (Config(128, 4, 2), Config(32, 4, 3)),
    ("gather", "signs"): (Config(64, 4, 3), Config(128, 4, 3), Config(64, 8, 1)),
    ("gather", "signs, turned"): (Config(64, 4, 3), Config(64, 4, 2), Config(64, 8, 1)),
    ("apply", "none"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("apply", "turned"): (Config(64, 4, 2), Config(64, 4, 3)),
    ("apply", "signs"): (Config(32, 4, 3), Config(64, 4, 1)),
    ("apply", "signs, turned"): (Config(32, 4, 3), Config(64, 4, 2)),
    ("apply_back", "none"): (Config(64, 4, 3), Config(64, 8, 3)),
    ("apply_back", "turned"): (Config(64, 4, 3), Config(64, 8, 3)),
    ("apply_back", "signs"): (Config(32, 4, 3), Config(64, 4, 1), Config(64, 8, 2)),
    ("apply_back", "signs, turned"): (Config(32, 4, 3), Config(32, 4, 3), Config(64, 8, 2)),
    ("apply_back_both", "none"): (Config(64, 4, 3), Config(32, 8, 3)),
    ("apply_back_both", "turned"): (Config(64, 4, 3), Config(32, 8, 3)),
    ("apply_back_out", "none"): (Config(64, 4, 2), Config(64, 4, 1)),
    ("apply_back_out", "turned"): (Config(128, 4, 1), Config(64, 4, 1)),
    ("apply_back_out", "signs"): (Config(32, 4, 2), Config(64, 4, 2), Config(64, 8, 2)),
    ("gather_back", "none"): (Config(64, 4, 3), Config(64, 4, 2)),
    ("gather_back", "turned"): (Config(64, 4, 3), Config(64, 8, 3)),
    ("gather_back", "signs"): (Config(64, 4, 2), Config(64, 4, 3), Config(64, 4, 1)),
}
RESIDENT = {"mean": 8, "apply": 4}  # programs for each processor, at least where there is work for them; 2 where nothing is said
CAREFUL = Config(32, 8, 2)
PLAIN = Config(32, 4, 1)  # float32


@cache
def runs(kernel: str, programs: int, processors: int) -> int:
    """Into how many runs each of so many rows and heads is cut: up to twice as many as wanted where that evens out the last turn."""
    wanted = RESIDENT.get(kernel, 2) * processors
    counts = range(max(1, wanted // programs), max(1, 2 * wanted // programs) + 1)
    return min(counts, key=lambda count: (cdiv(programs * count, processors) / count, count))


@cache
def row(kernel: str, way: str, width: int, bits: int) -> Config:
    """For the wider of features and values, padded."""
    if bits == 32:
        return PLAIN if width <= 64 else CAREFUL
    found = ROWS.get((kernel, way)) or ROWS[kernel, way.removesuffix(", turned")]
    place = 0 if width <= 64 else 1 if width <= 128 else 2
    return found[place] if place < len(found) else CAREFUL
