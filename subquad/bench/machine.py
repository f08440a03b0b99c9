"""Where a measurement was made, and how much memory a piece of work takes at its peak."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from subquad._version import __version__

_PACKAGES = ("torch", "transformers", "timm", "triton")


def command() -> str:
    """The command line of this process, as one would type it."""
    return shlex.join(["subquad", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python, subquad and what it stands on; packages that are missing are left out."""
    found = {"python": platform.python_version(), "subquad": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout subquad runs from, with "+" when files differ from it; None outside a checkout.

    A copy of a checkout without its history is told by the environment variable SUBQUAD_COMMIT.
    """
    if os.environ.get("SUBQUAD_COMMIT"):
        return os.environ["SUBQUAD_COMMIT"]
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 10}
        short = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None
    return short + ("+" if dirty else "")


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's name, or the processor's with the number of threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], device: torch.device | str) -> int:
    """The most bytes torch's allocator holds during `work` beyond what it held before.

    On CUDA from the allocator's own statistics; elsewhere from the profiler's record of every allocation, which is
    exact and does not see memory the process keeps for later.
    """
    if torch.device(device).type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = ((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")  # type: ignore[union-attr]
    now = top = 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        top = max(top, now)
    return top


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes lines of its own to file descriptor 2, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
