"""distill: layer-by-layer attention transfer from a model to its swapped copy.

The teacher reads each batch once, without gradients. Where its layer l computes attention, the student's layer l is given
the same inputs x_l, and only what the swap put in (the mechanism's parameters θ_l) learns to give the same output:

    loss_l = ‖student_l(x_l; θ_l) − teacher_l(x_l)‖² / ‖teacher_l(x_l)‖²      before the output projection

The division puts all layers on one scale; AdamW is indifferent to it. Or, with objective="weights", to attend as it does: see
`subquad.convert.mimic`.

Attention transfer: Zhang et al., LoLCATs (arXiv 2410.10254), sec. 3.2.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.convert.checkpoint import Checkpoint, Checkpoints
from subquad.convert.mimic import check_pupil
from subquad.convert.swap import swapped
from subquad.convert.transfer import Objective, Pupils, lessons
from subquad.models.text import Batches

BETAS = (0.7, 0.9)  # short memories: runs are short, and gradients change fast while the maps form
WARMUP = 2  # steps


@dataclass
class DistillResult:
    """How a run went, the steps before an interruption included.

    Args:
        steps: made in all, of which `resumed_from` before this call.
        losses: of each step, the mean over layers.
        layer_losses: of each step, by layer.
        tokens: that the teacher read, padding not counted.
        seconds: spent.
    """

    steps: int
    losses: list[float]
    layer_losses: dict[int, list[float]]
    tokens: int
    seconds: float
    resumed_from: int = 0


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    steps: int,
    objective: Objective = "output",
    lr: float = 2e-2,
    batch: int = 1,
    length: int = 512,
    out: str | Path | None = None,
    save_every: int = 25,
    seed: int = 0,
    progress: bool = True,
    take_finished: bool = False,
) -> DistillResult:
    """Teach the new parameters of a swapped model, in place, to do what the teacher's attention does.

    >>> student = subquad.swap(copy.deepcopy(teacher), "lolcats")
    >>> subquad.distill(student, teacher, tokens, steps=100, out="runs/lolcats")

    Everything else in both models is left as it was, `requires_grad` and training mode included. The two may share weights,
    and may even be one object: its original attention is then the teacher. A student of 16-bit weights learns in float32
    and is rounded at the end.

    Args:
        student: a model that `subquad.swap` changed.
        teacher: a model with the same modules, not swapped; may be on another device or of another dtype.
        data: token ids ``[T]`` (cut into batches here), or an iterable of batches, each a dict of the model's arguments or
            token ids ``[B, N]``; it begins again when it ends.
        steps: batches to learn from.
        objective: "output", the loss above; or "weights", Hedgehog's: cross-entropy between the weights of softmax and of the
            mechanism over the student's own queries and keys (hedgehog, lolcats), quadratic in time and linear in memory.
        lr: the largest learning rate of AdamW: it rises over the first steps and falls to zero along a line. (The paper's
            1e-2, kept up for two epochs, learns more slowly in runs of up to 100 steps.)
        batch, length: of the batches cut from token ids.
        out: folder for checkpoints, in ``out/checkpoint``. The same call, made again after the process died, goes on from the
            last one; on the CPU it ends with the very weights of an unbroken run.
        save_every: steps between checkpoints.
        seed: of the order of batches, and of any randomness within a step.
        progress: show a bar when the run takes longer than two seconds.
        take_finished: if `out` holds the finished run of this call, take its weights instead of refusing.

    Raises:
        InputError: nothing to learn, an objective that a mechanism does not have, models that do not match, text shorter than a
            batch, or an `out` that is not an unfinished run of the same call (the message names the setting that differs).
    """
    _check_numbers(steps=steps, save_every=save_every, batch=batch, length=length)
    if not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise InputError("lr", lr, "a positive number")
    pupils = _pupils(student)
    _check_objective(objective, pupils)
    feed = _Feed(data, steps, batch, length, seed)
    settings = {"layers": _described(pupils), "steps": steps, "lr": lr, "seed": seed, **feed.settings, "teacher": _fingerprint(teacher)}
    settings["objective"] = objective
    keeper = None if out is None else Checkpoints(out, settings, steps, take_finished=take_finished)
    with lessons(student, teacher, pupils, objective) as teach, _Bar(steps, progress) as bar:
        run = _Run(pupils, steps, lr, keeper)
        while run.step < steps:
            with _seeded(seed, run.step):
                losses, tokens = teach(feed[run.step])
            run.advance(losses, tokens)
            bar.advance(run)
            if keeper is not None and (run.step % save_every == 0 or run.step == steps):
                run.save()
    return run.result()


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(name, value, "a positive integer")


def _check_objective(objective: Objective, pupils: Pupils) -> None:
    if objective not in ("output", "weights"):
        raise InputError("objective", repr(objective), "'output' or 'weights'")
    if objective == "weights":
        for pupil in pupils.values():
            check_pupil(pupil)


def _pupils(student: nn.Module) -> Pupils:
    """The swapped layers that have something to learn."""
    inside = swapped(student)
    if not inside:
        raise InputError("student", f"{type(student).__name__} without a swapped layer", "a model that subquad.swap changed")
    found = {index: module for index, module in inside.items() if any(True for _ in module.mechanism.parameters())}
    if not found:
        names = ", ".join(sorted({module.name for module in inside.values()}))
        raise InputError("student", f"layers swapped to {names}", "a mechanism with parameters, as these have nothing to learn")
    return found


def _described(pupils: Pupils) -> str:
    """The swapped layers in a few words: `lolcats(window=64) in 0, 1, 2`."""
    by_kind: dict[str, list[str]] = {}
    for index, module in pupils.items():
        options = ", ".join(f"{key}={value!r}" for key, value in module.mechanism.options.items())
        by_kind.setdefault(f"{module.name}({options})", []).append(str(index))
    return "; ".join(f"{kind} in {', '.join(layers)}" for kind, layers in by_kind.items())


def _fingerprint(model: nn.Module) -> str:
    """A short digest of the beginning of every weight that is not a mechanism's: tells models apart without reading them whole."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if ".mechanism." not in name:
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _seeded(seed: int, step: int) -> Iterator[None]:
    """Randomness that depends on the step alone, so that a resumed run draws what an unbroken one draws."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


# ---- the run: optimizer, schedule, history, checkpoints ------------------------------------------------------------


def schedule(step: int, steps: int) -> float:
    """The share of the largest learning rate at a step: up over the first ones, then down to zero along a line."""
    warmup = min(WARMUP, steps // 10)
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - max(0, step - warmup) / (steps - warmup))


class _Run:
    """Where a run stands. All of it is in a checkpoint; the learning rate and the batch are functions of the step."""

    def __init__(self, pupils: Pupils, steps: int, lr: float, keeper: Checkpoints | None) -> None:
        named = [(f"{m.path}.mechanism.{name}", p) for m in pupils.values() for name, p in m.mechanism.named_parameters()]
        self.live, self.layers = dict(named), list(pupils)
        # Steps would be lost in 16 bits: such parameters are rounded copies of these.
        self.parameters = {name: nn.Parameter(p.detach().float()) if p.dtype.itemsize < 4 else p for name, p in named}
        self.steps, self.lr, self.keeper = steps, lr, keeper
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=BETAS, weight_decay=0.0)
        self.step, self.resumed_from, self.tokens = 0, 0, 0
        self.history: list[list[float]] = []  # losses by step, then layer
        self.seconds, self.began = 0.0, time.perf_counter()
        saved = None if keeper is None else keeper.load()
        if saved is not None:
            self._resume(saved)
        elif keeper is not None:
            self.save()  # marks the folder as this run's, and keeps the first values

    def advance(self, losses: list[float], tokens: int) -> None:
        """One step of the optimizer, with the gradients that are there."""
        wrong = next((i for i, loss in zip(self.layers, losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            raise InputError("lr", self.lr, f"a smaller one: the loss of layer {wrong} is not finite at step {self.step + 1}")
        for name, p in self.live.items():
            self.parameters[name].grad = None if p.grad is None else p.grad.to(self.parameters[name].dtype)
            if p is not self.parameters[name]:
                p.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule(self.step, self.steps)
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
        tensors["losses"] = torch.tensor(self.history, dtype=torch.float64).reshape(self.step, len(self.layers))
        tensors["tokens"] = torch.tensor(self.tokens)
        self.keeper.save(Checkpoint(self.step, tensors, self.elapsed))

    @torch.no_grad()
    def _resume(self, saved: Checkpoint) -> None:
        for name, p in self.parameters.items():
            p.copy_(saved.tensors[f"parameters.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                x = saved.tensors.get(f"optimizer.{name}.{key}")
                if x is not None:
                    self.optimizer.state[p][key] = x if key == "step" else x.to(p.device)
        self._publish()
        self.step = self.resumed_from = saved.step
        self.tokens, self.seconds = int(saved.tensors["tokens"]), saved.seconds
        self.history = saved.tensors["losses"].tolist()

    def result(self) -> DistillResult:
        by_layer = {index: [row[i] for row in self.history] for i, index in enumerate(self.layers)}
        losses = [sum(row) / len(row) for row in self.history]
        return DistillResult(self.step, losses, by_layer, self.tokens, self.elapsed, self.resumed_from)


class _Bar:
    """A progress bar on standard error that appears once the run has taken two seconds."""

    def __init__(self, steps: int, show: bool) -> None:
        self.steps, self.show = steps, show
        self.began, self.tokens = time.perf_counter(), 0
        self.progress: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self, run: _Run) -> None:
        if not self.show or time.perf_counter() - self.began < 2:
            return
        if self.progress is None:
            self._start()
        seconds, made = time.perf_counter() - run.began, run.step - run.resumed_from
        rate = f"{made / seconds:.2f} steps/s, {run.tokens / run.step * made / seconds:,.0f} tokens/s"
        row = run.history[-1]
        self.progress.update(0, completed=run.step, words=f"loss {sum(row) / len(row):.4f}  {rate}")

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("distill"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.progress.add_task("distill", total=self.steps, words="")
        self.progress.start()


# ---- data -----------------------------------------------------------------------------------------------------------


class _Feed:
    """Whatever the data are, one batch a step: a dict of the model's arguments. `settings` tell one feed from another."""

    def __init__(self, data: Any, steps: int, batch: int, length: int, seed: int) -> None:
        if isinstance(data, list | tuple) and data and all(isinstance(x, int) for x in data):
            data = torch.tensor(data)
        if isinstance(data, Tensor):
            if data.dim() != 1:
                raise InputError("data", shape_of(data), "token ids [T], or an iterable of batches")
            data = Batches(data, length, steps, seed, batch=batch)
        if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
            raise InputError("data", type(data).__name__, "token ids [T], or an iterable of batches")
        self.data = data
        self.iterator: Iterator[Any] = iter(())
        self.taken = 0  # batches that the iterator has given
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        data = self.data
        if isinstance(data, Batches):
            return {"data": _digest(data.tokens), "length": data.length, "batch": data.batch}
        if isinstance(data, Sequence):
            if not len(data):
                raise InputError("data", "no batch", "at least one")
            first = [x for x in self[0].values() if isinstance(x, Tensor)]
            return {"data": f"{len(data)} batches, {_digest(*first)}"}
        return {"data": type(data).__name__}

    def __getitem__(self, step: int) -> dict[str, Any]:
        item = self.data[step % len(self.data)] if isinstance(self.data, Sequence) else self._next(step)
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point():
            return {"input_ids": item}
        was = shape_of(item) if isinstance(item, Tensor) else type(item).__name__
        raise InputError("data", f"a batch that is {was}", "a dict of the model's arguments, or token ids [B, N]")

    def _next(self, step: int) -> Any:
        """Batch number `step` of an iterable that can only be read in order; it begins again at its end."""
        while True:
            item = next(self.iterator, None)
            if item is None:
                self.iterator = iter(self.data)
                item = next(self.iterator, None)
                if item is None:
                    raise InputError("data", f"an end after {self.taken} batches", f"{step + 1} batches, or an iterable that begins again")
            self.taken += 1
            if self.taken == step + 1:
                return item


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update((x.float() if x.is_floating_point() else x).numpy().tobytes())
    return digest.hexdigest()[:16]
