"""Launch parameters of the Triton kernels: a table, no tuning at run time. `subquad tune` measures and prints new rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton

from subquad.ops.common import cdiv, padded

Result = TypeVar("Result")
INTERPRETED = triton.knobs.runtime.interpret  # on CPU, where bfloat16 products do not exist


class Config(NamedTuple):
    """Columns of a tile, warps of a program, stages of the pipeline."""

    columns: int
    warps: int
    stages: int


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; on CPU, under the interpreter, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# (kernel, padded head dim, bits, decay) -> parameters when there are many programs, and when there are few. A "heavy" pass also reads
# the state in two parts, or adds to its output; "queries" and "keys" are passes of two sums. Rows of the delta rule's kernels for few
# programs are estimates.
TABLE: dict[tuple[str, int, int, str], tuple[Config, Config]] = {
    ("pass", 64, 16, "none"): (Config(64, 4, 3), Config(32, 4, 4)),
    ("pass", 64, 16, "scalar"): (Config(64, 4, 3), Config(32, 4, 4)),
    ("pass", 64, 16, "channel"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("pass", 128, 16, "none"): (Config(64, 4, 4), Config(32, 4, 4)),
    ("pass", 128, 16, "scalar"): (Config(64, 4, 2), Config(32, 4, 3)),
    ("pass", 128, 16, "channel"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("heavy", 64, 16, "none"): (Config(64, 4, 4), Config(64, 4, 4)),
    ("heavy", 64, 16, "scalar"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("heavy", 64, 16, "channel"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("heavy", 128, 16, "none"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("heavy", 128, 16, "scalar"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("heavy", 128, 16, "channel"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("queries", 64, 16, "none"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("queries", 64, 16, "scalar"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("queries", 128, 16, "none"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("queries", 128, 16, "scalar"): (Config(64, 4, 1), Config(64, 4, 1)),
    ("keys", 64, 16, "none"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("keys", 64, 16, "scalar"): (Config(64, 4, 2), Config(64, 4, 2)),
    ("keys", 128, 16, "none"): (Config(64, 4, 3), Config(64, 4, 3)),
    ("keys", 128, 16, "scalar"): (Config(64, 4, 1), Config(64, 4, 1)),
    ("inverse", 64, 16, "none"): (Config(64, 2, 1), Config(64, 2, 1)),
    ("inverse", 64, 16, "scalar"): (Config(64, 2, 1), Config(64, 2, 1)),
    ("inverse", 128, 16, "none"): (Config(64, 2, 1), Config(64, 2, 1)),
    ("inverse", 128, 16, "scalar"): (Config(64, 2, 1), Config(64, 2, 1)),
    ("solve", 64, 16, "none"): (Config(64, 4, 3), Config(16, 4, 3)),
    ("solve", 64, 16, "scalar"): (Config(64, 4, 3), Config(16, 4, 3)),
    ("solve", 128, 16, "none"): (Config(64, 4, 2), Config(32, 4, 3)),
    ("solve", 128, 16, "scalar"): (Config(64, 4, 2), Config(32, 4, 3)),
    ("mirror", 64, 16, "none"): (Config(64, 4, 1), Config(16, 4, 3)),
    ("mirror", 64, 16, "scalar"): (Config(64, 4, 1), Config(16, 4, 3)),
    ("mirror", 128, 16, "none"): (Config(64, 4, 2), Config(32, 4, 3)),
    ("mirror", 128, 16, "scalar"): (Config(64, 4, 2), Config(32, 4, 3)),
}


def bits_of(dtype: torch.dtype) -> int:
    """Bits of the table's key: float16 is computed as float32."""
    return 16 if dtype == torch.bfloat16 else 32


def config(kernel: str, width: int, bits: int, decay: str, few: bool) -> Config:
    """The row for a kernel, or what is likely to fit where none was measured."""
    width = padded(width)
    found = TABLE.get((kernel, width, bits, decay))
    if found is not None:
        return found[few]
    if width < 64 and bits == 16:
        return Config(64, 4, 3)
    room = width * bits <= 64 * 32 and kernel not in ("queries", "keys")
    return Config(32, 8 if width > 128 else 4, 2 if room else 1)


CUT = "pass", "heavy", "queries", "keys"  # kernels whose sequences can be cut
SEGMENT = 16  # chunks in a segment, at least
# (padded head dim, bits, decay) -> programs that a multiprocessor holds at once, programs to cut a pass into for each, and segments up to
# which twice as many; else 2, 2 and none
WAVES = {(128, 16, "none"): (1, 1, 0), (128, 16, "scalar"): (2, 2, 8)}
_remembering: list[Any] = []


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with its results remembered for as long as the table stays as it is."""
    _remembering.append(lru_cache(4096)(function))
    return cast(Callable[..., Result], _remembering[-1])


@remembered
def choose(
    kernel: str, width: int, columns: int, bits: int, device: torch.device, decay: str, programs: int, chunks: int
) -> tuple[Config, int]:
    """Parameters for `programs` sequences and heads of `columns`, and into how many segments to cut each, so that the chip is full.

    Few programs get narrower tiles, which read q and k once more for each, or, if they would be more than two, the pass is cut.
    """
    slots = processors(device)
    many, few = (config(kernel, width, bits, decay, few=few) for few in (False, True))
    tiles, narrow = cdiv(columns, many.columns), cdiv(columns, few.columns)
    full, wanted, double = WAVES.get((padded(width), bits, decay), (2, 2, 0)) if kernel in CUT else (2, 2, 0)
    if programs * tiles >= 0.75 * full * slots:
        return many, 1
    narrowed = tiles < narrow <= 2 and programs * narrow >= 0.75 * slots
    if narrowed or kernel not in CUT or chunks < 2 * SEGMENT:
        return few, 1
    segments = wanted * slots // (programs * tiles)
    return many, max(1, min(chunks // SEGMENT, max(segments, min(2 * segments, double))))


def use(rows: dict[tuple[str, int, int, str], tuple[Config, Config]]) -> None:
    """Take these rows from now on, as `subquad tune` finds them."""
    TABLE.update(rows)
    forget()


def forget() -> None:
    """Forget what followed from the tables."""
    for function in _remembering:
        function.cache_clear()


def read_rows(path: str, argument: str) -> dict[tuple[str, int, int, str], tuple[Config, Config]]:
    """Rows from a file that `subquad tune --out` wrote; `argument` is what named it."""
    import json  # here, as few programs read such a file
    from pathlib import Path

    from subquad.checks import InputError

    def wrong(what: str) -> InputError:
        return InputError(argument, f"{path!r}, {what}", "a file as `subquad tune --out` writes it")

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [((x["kernel"], x["width"], x["bits"], x["decay"]), (x["many"], x["few"])) for x in found["rows"]]
    except OSError as error:
        raise wrong(f"which cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise wrong(f"which is not JSON ({error})") from None
    except (KeyError, TypeError):
        raise wrong('which has no "rows", or a row without kernel, width, bits, decay, many or few') from None
    kernels, decays = {key[0] for key in TABLE}, {key[3] for key in TABLE}
    for key, pair in rows:
        kernel, width, bits, decay = key
        named = kernel in kernels and decay in decays if isinstance(kernel, str) and isinstance(decay, str) else False
        if not (named and width in (16, 32, 64, 128, 256) and bits in (16, 32)):
            raise wrong(f"with a row for {list(key)}")
        for one in pair:
            whole = isinstance(one, list) and len(one) == 3 and all(type(x) is int for x in one)
            if not (whole and one[0] in (16, 32, 64, 128, 256) and one[1] in (1, 2, 4, 8, 16) and 1 <= one[2] <= 8):
                raise wrong(f"with {one} for {list(key)}")
    return {key: (Config(*many), Config(*few)) for key, (many, few) in rows}


def _from_environment() -> None:
    """Rows for this machine instead of the table's, where SUBQUAD_LAUNCH names a file."""
    if path := os.environ.get("SUBQUAD_LAUNCH"):
        use(read_rows(path, "SUBQUAD_LAUNCH"))


_from_environment()
