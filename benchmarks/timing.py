"""A result file whose timings are given twice: on the device, and as called from Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Report, failure
from torch import Tensor


class Timed(Report):
    """A report with timers, on CUDA or, to try a script, on CPU."""

    def __init__(self, benchmark: str, title: str, device: str, path: Path, *, quick: bool) -> None:
        super().__init__(benchmark, title, device, path)
        self.device = torch.device(device)
        self.cuda, self.quick = self.device.type == "cuda", quick
        self.copy_rate: float | None = None  # bytes a second

    def ms(self, call: Callable[[], Any], grown: dict[str, Tensor] | None = None) -> float:
        """Median milliseconds of a call; gradients of `grown` are dropped before each."""
        learned = [t for t in (grown or {}).values() if t.requires_grad]
        if self.cuda:
            from triton.testing import do_bench

            warmup, rep = (5, 20) if self.quick else (15, 80)
            return float(do_bench(call, warmup=warmup, rep=rep, grad_to_none=learned, return_mode="median"))
        taken = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - start))
        return statistics.median(taken)

    def device_ms(self, call: Callable[[], Any], grown: dict[str, Tensor] | None = None) -> float:
        """Median milliseconds on the device: of calls captured in a CUDA graph."""
        if not self.cuda:
            return self.ms(call, grown)
        from triton.testing import do_bench_cudagraph

        learned = [t for t in (grown or {}).values() if t.requires_grad]
        try:
            return float(do_bench_cudagraph(call, rep=10 if self.quick else 40, grad_to_none=learned or None, return_mode="median"))
        finally:
            for t in learned:
                t.grad = None

    def time_into(self, found: dict[str, Any], call: Callable[[dict[str, Tensor]], Tensor], grown: dict[str, Tensor]) -> None:
        """Fill in forward, and forward and backward, in milliseconds, on the device and as called; or the error where one fails."""
        found |= dict.fromkeys(("forward_ms", "both_ms", "forward_called_ms", "both_called_ms"))
        incoming = torch.randn_like(grown["v"])

        def forward() -> Any:
            with torch.no_grad():
                return call(grown)

        def both() -> None:
            call(grown).backward(incoming)

        try:
            found["forward_called_ms"] = self.ms(forward)
            found["forward_ms"] = self.device_ms(forward)
            found["both_called_ms"] = self.ms(both, grown)
            found["both_ms"] = self.device_ms(both, grown)
        except TimeoutError:
            found["error"] = "out of time"
            raise
        except Exception as error:  # a peer may fail in its own way; the others are still measured
            found["error"] = failure(error)
            if self.cuda:
                torch.cuda.empty_cache()

    def rate(self) -> float:
        """The copy rate, bytes read and written a second; measured when it is first asked for."""
        if self.copy_rate is None:
            size = 2**30 if self.cuda else 2**22
            a = torch.empty(size, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            self.copy_rate = 2000 * size / self.ms(lambda: b.copy_(a))
        return self.copy_rate


def show(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value)


def called(found: dict[str, Any]) -> str:
    return f"{show(found['forward_called_ms'])} / {show(found['both_called_ms'])}"
