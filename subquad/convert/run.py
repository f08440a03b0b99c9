"""A training run under way: parameters, optimizer, history, checkpoints, and the bar that shows it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from subquad.checks import InputError
from subquad.convert.checkpoint import Checkpoint, Checkpoints

LINES = 10.0  # seconds between lines of progress where there is no terminal
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a parameter


def check_counts(**numbers: int) -> None:
    """Positive integers, each under its argument's name."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(name, value, "a positive integer")


def check_rate(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(name, value, "a positive number")


def check_share(name: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise InputError(name, value, "a number above 0 and at most 1")


@contextlib.contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Randomness that depends on the step alone, so that a resumed run draws what an unbroken one draws."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


class Run:
    """Where a run stands. All of it is in a checkpoint; the learning rate and the batch are functions of the step.

    Args:
        live: the parameters that learn, by name.
        steps: of the whole run.
        width: losses of a step.
        lr: the largest learning rate, of which `share(step)` is the part at a step.
        betas: of AdamW.
        keeper: of the checkpoints; None keeps none.
    """

    def __init__(
        self,
        live: Mapping[str, nn.Parameter],
        steps: int,
        width: int,
        lr: float,
        share: Callable[[int], float],
        keeper: Checkpoints | None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.live = dict(live)
        # Steps would be lost in 16 bits: such parameters are rounded copies of these.
        self.parameters = {name: nn.Parameter(p.detach().float()) if p.dtype.itemsize < 4 else p for name, p in live.items()}
        self.steps, self.width, self.lr, self.share, self.keeper = steps, width, lr, share, keeper
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=betas, weight_decay=0.0)
        self.step, self.resumed_from, self.tokens = 0, 0, 0
        self.history: list[list[float]] = []  # losses by step, then part
        self.seconds, self.began = 0.0, time.perf_counter()
        saved = None if keeper is None else keeper.load()
        if saved is not None:
            self._resume(saved)
        elif keeper is not None:
            self.save()  # marks the folder as this run's, and keeps the first values

    def collect(self) -> None:
        """Move the gradients to the parameters that the optimizer steps."""
        for name, p in self.live.items():
            self.parameters[name].grad = None if p.grad is None else p.grad.to(self.parameters[name].dtype)
            if p is not self.parameters[name]:
                p.grad = None

    def update(self, losses: list[float], tokens: int) -> None:
        """One step of the optimizer, with the gradients that were collected."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.share(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        self.step += 1
        self.tokens += tokens
        self.history.append(losses)

    @torch.no_grad()
    def _publish(self) -> None:
        for name, p in self.live.items():
            if p is not self.parameters[name]:
                p.copy_(self.parameters[name])

    @property
    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def save(self) -> None:
        assert self.keeper is not None
        tensors = {f"parameters.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": x for key, x in self.optimizer.state.get(p, {}).items()}
        tensors["losses"] = torch.tensor(self.history, dtype=torch.float64).reshape(self.step, self.width)
        tensors["tokens"] = torch.tensor(self.tokens)
        self.keeper.save(Checkpoint(self.step, tensors, self.elapsed))

    @torch.no_grad()
    def _resume(self, saved: Checkpoint) -> None:
        assert self.keeper is not None
        for name, p in self.parameters.items():
            x = saved.tensors.get(f"parameters.{name}")
            if x is None or x.shape != p.shape or not {"losses", "tokens"} <= saved.tensors.keys():
                was = f"{self.keeper.out}, whose checkpoint does not hold {name} {list(p.shape)}"
                raise InputError("out", was, "a checkpoint of this run, or another folder")
        for name, p in self.parameters.items():
            p.copy_(saved.tensors[f"parameters.{name}"])
            for key in MOMENTS:
                x = saved.tensors.get(f"optimizer.{name}.{key}")
                if x is not None:
                    self.optimizer.state[p][key] = x if key == "step" else x.to(p.device)
        self._publish()
        self.step = self.resumed_from = saved.step
        self.tokens, self.seconds = int(saved.tensors["tokens"]), saved.seconds
        self.history = saved.tensors["losses"].tolist()


class Bar:
    """A progress bar on standard error that appears once the run has taken two seconds.

    Where that is no terminal: a line every ten seconds, and one at the end.
    """

    def __init__(self, label: str, steps: int, show: bool) -> None:
        self.label, self.steps, self.show = label, steps, show
        self.began = self.said = time.perf_counter()
        self.console: Any = None
        self.progress: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self, run: Run) -> None:
        now = time.perf_counter()
        if not self.show or now - self.began < 2:
            return
        if self.console is None:
            self._start()
        if self.progress is None and now - self.said < LINES and run.step < self.steps:
            return
        seconds, made = time.perf_counter() - run.began, run.step - run.resumed_from
        rate = f"{made / seconds:.2f} steps/s, {run.tokens / run.step * made / seconds:,.0f} tokens/s"
        words = f"loss {sum(run.history[-1]) / len(run.history[-1]):.4f}  {rate}"
        if self.progress is not None:
            self.progress.update(0, completed=run.step, words=words)
            return
        self.said = now
        print(f"{self.label} {run.step}/{self.steps}  {words}  {seconds:.0f} s", file=sys.stderr, flush=True)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        if not (self.console.is_terminal or self.console.is_jupyter):
            return
        columns = (TextColumn(self.label), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=self.console)
        self.progress.add_task(self.label, total=self.steps, words="")
        self.progress.start()
