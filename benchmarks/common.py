"""What every benchmark shares: where it ran, timers, and result files.

Results are JSON under ``benchmarks/results/``, stamped with device, versions, commit and date. The tables of the
README and of the docs are generated from them.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from subquad.bench.machine import commit, device_name, processor, versions  # noqa: E402
from subquad.bench.report import write_whole  # noqa: E402


def slug(device: torch.device | str) -> str:
    """The device's name as it may stand in a file name."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(device: torch.device | str) -> dict[str, Any]:
    """Where, when and with what a result was measured."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"device": device_name(device), "versions": versions(), "commit": commit(), "date": date, "command": " ".join(sys.argv)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and range of several timings, in milliseconds."""
    ms = sorted(1000 * s for s in seconds)
    return {"ms": round(statistics.median(ms), 4), "ms_min": round(ms[0], 4), "ms_max": round(ms[-1], 4)}


def time_cpu(calls: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, dict[str, float]]:
    """Time several calls in turns, so that a machine's other load falls on all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: spread(seconds) for name, seconds in taken.items()}


def time_cuda(call: Callable[[], Any], budget: float = 0.3, most: int = 50) -> dict[str, float]:
    """Time one call with CUDA events: warmed up, the second-level cache cleared before each, about `budget` seconds."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(5, min(most, int(budget / max(time.perf_counter() - start, 1e-6))))
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")  # 256 MB, larger than any second-level cache
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return spread([begin.elapsed_time(end) / 1000 for begin, end in events])


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def failure(error: BaseException) -> str:
    """An error in one short line, to stand in a table in place of a figure."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}"


class Report:
    """A result file that grows: sections that cannot take each other down, and tables."""

    def __init__(self, benchmark: str, title: str, device: str, path: Path) -> None:
        self.path = path
        self.result: dict[str, Any] = {"benchmark": benchmark, "title": title, **stamp(device), "tables": []}

    def fenced(self, name: str, section: Callable[[Any], Any], seconds: int) -> None:
        """Run a section for at most so many seconds; write what it gave, or how it failed."""

        def late(*_: Any) -> None:
            raise TimeoutError(f"more than {seconds} s")

        start = time.perf_counter()
        signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        try:
            self.result[name] = section(self)
        except Exception as error:  # whatever it is: recorded, and the other sections still run
            self.result[name] = {"error": failure(error), "traceback": traceback.format_exc()[-2000:]}
        finally:
            signal.alarm(0)
        took = time.perf_counter() - start
        print(f"{name}: {took:.0f} s{f', {self.error(name)}' if self.error(name) else ''}", flush=True)
        write_json(self.path, self.result)

    def go_on(self, earlier: Path | None) -> None:
        """Keep the sections of an earlier result of the same device and commit."""
        if earlier is None:
            return
        found = json.loads(earlier.read_text())
        for key in ("device", "commit"):
            if found[key] != self.result[key]:
                raise SystemExit(f"--add: {key} {found[key]} there, {self.result[key]} here")
        self.result = found | {key: self.result[key] for key in ("date", "command", "versions")}

    def error(self, name: str) -> str | None:
        """How a section failed; None when it did not."""
        found = self.result.get(name)
        return found.get("error") if isinstance(found, dict) else None

    def table(self, title: str, *columns: str) -> Callable[..., None]:
        """Open a table of the result, in place of one of that title; gives the function that adds a row, so that a late
        section keeps its first rows."""
        rows: list[list[str]] = []
        self.result["tables"] = [table for table in self.result["tables"] if table["title"] != title]
        self.result["tables"].append({"title": title, "columns": list(columns), "rows": rows})
        print(f"\n{title}\n  {' | '.join(columns)}")

        def add(*cells: str) -> None:
            rows.append(list(cells))
            print("  " + " | ".join(cells), flush=True)

        return add
