"""distill: layer-by-layer attention transfer from a model to its swapped copy.

The teacher reads each batch once, without gradients. Where its layer l computes attention, the student's layer l is given
the same inputs x_l, and only what the swap put in (the mechanism's parameters θ_l) learns to give the same output:

    loss_l = ‖student_l(x_l; θ_l) − teacher_l(x_l)‖² / ‖teacher_l(x_l)‖²      before the output projection

The division puts all layers on one scale; AdamW is indifferent to it. Or, with objective="weights", to attend as it does: see
`subquad.convert.mimic`.

Attention transfer: Zhang et al., LoLCATs (arXiv 2410.10254), sec. 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.checks import InputError
from subquad.convert.checkpoint import Checkpoints
from subquad.convert.feed import Feed
from subquad.convert.mimic import check_pupil
from subquad.convert.module import SwappedAttention
from subquad.convert.run import Bar, Run, check_counts, check_rate, seeded
from subquad.convert.swap import check_unswapped, swapped
from subquad.convert.transfer import Objective, Pupils, lessons
from subquad.models.fingerprint import fingerprint

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
    group: int | None = None,
    device: torch.device | str | None = None,
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
            mechanism over the student's own queries and keys (hedgehog, lolcats), quadratic in time and linear in memory. It
            takes no original with a window, unless data are token ids and `length` is at most the window.
        lr: the largest learning rate of AdamW: it rises over the first steps and falls to zero along a line. (The paper's
            1e-2, kept up for two epochs, learns more slowly in runs of up to 100 steps.)
        batch, length: of the batches cut from token ids.
        out: folder for checkpoints, in ``out/checkpoint``. The same call, made again after the process died, goes on from the
            last one; on the CPU it ends with the very weights of an unbroken run.
        save_every: steps between checkpoints.
        seed: of the order of batches, and of any randomness within a step.
        progress: show a bar when the run takes longer than two seconds.
        take_finished: if `out` holds the finished run of this call, take its weights instead of refusing.
        group: teach so many layers at a time, block by block, on `device` (default: a GPU where there is one), the rest of the
            models staying where they are; hidden states between groups are kept in `out`, which is needed then. For
            decoders that do not fit on the device; the result is the same.
        device: of the group.

    Raises:
        InputError: nothing to learn, an objective that a mechanism does not have, models that do not match, text shorter than a
            batch, or an `out` that is not an unfinished run of the same call (the message names the setting that differs).
    """
    check_counts(steps=steps, save_every=save_every, batch=batch, length=length)
    check_rate("lr", lr)
    pupils = _pupils(student)
    if teacher is not student:
        check_unswapped(teacher, "teacher")
    feed = Feed(data, steps, batch, length, seed, teacher)
    check_objective(objective, pupils, feed.length)
    settings = {"layers": described(pupils), "steps": steps, "lr": lr, "seed": seed, **feed.settings, "teacher": fingerprint(teacher)}
    settings["objective"] = objective
    if group is not None:
        options: dict[str, Any] = {
            "steps": steps,
            "lr": lr,
            "save_every": save_every,
            "seed": seed,
            "progress": progress,
            "take_finished": take_finished,
        }
        options["objective"] = objective
        return _in_groups(student, teacher, feed, pupils, group, device, out, settings, options)
    keeper = None if out is None else Checkpoints(out, settings, steps, take_finished=take_finished)
    with lessons(student, teacher, pupils, objective) as teach, Bar("distill", steps, progress) as bar:
        run = _Run(pupils, steps, lr, keeper)
        while run.step < steps:
            with seeded(seed, run.step):
                losses, tokens = teach(feed[run.step])
            run.advance(losses, tokens)
            bar.advance(run)
            if keeper is not None and (run.step % save_every == 0 or run.step == steps):
                run.save()
    return run.result()


def _in_groups(
    student: nn.Module, teacher: nn.Module, feed: Feed, pupils: Pupils, group: int, device: torch.device | str | None,
    out: str | Path | None, settings: dict[str, Any], options: dict[str, Any],
) -> DistillResult:  # fmt: skip
    from subquad.convert.blockwise import distill_in_groups

    folder = check_groups(teacher, group, out)
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return distill_in_groups(student, teacher, feed, pupils, group, device=where, out=folder, settings=settings, **options)


def check_groups(teacher: nn.Module, group: int, out: str | Path | None) -> Path:
    """The folder for the hidden states between groups; a model that cannot be taught in groups is refused."""
    from subquad.convert.blockwise import body_of

    check_counts(group=group)
    if out is None:
        raise InputError("out", None, "a folder for the hidden states between groups")
    body_of(teacher)
    return Path(out)


def check_objective(objective: Objective, pupils: Pupils, length: int | None = None, *, spare: int = 0) -> None:
    """Refuse an unknown objective, and one that more than `spare` of the layers, which need not be swapped, cannot be taught by.

    Args:
        length: of the sequences to learn from, if it is known.
    """
    if objective not in ("output", "weights"):
        raise InputError("objective", repr(objective), "'output' or 'weights'")
    refusals = []
    for pupil in pupils.values() if objective == "weights" else ():
        try:
            check_pupil(pupil, length)
        except InputError as error:
            refusals.append(error)
    if len(refusals) > spare:
        raise refusals[0]


def _pupils(student: nn.Module) -> Pupils:
    """The swapped layers that have something to learn."""
    inside = swapped(student)
    if not inside:
        raise InputError("student", f"{type(student).__name__} without a swapped layer", "a model that subquad.swap changed")
    found = learning(student)
    if not found:
        names = ", ".join(sorted({module.name for module in inside.values()}))
        raise InputError("student", f"layers swapped to {names}", "a mechanism with parameters, as these have nothing to learn")
    return found


def learning(model: nn.Module) -> Pupils:
    """The swapped layers of a model that have something to learn."""
    return {index: module for index, module in swapped(model).items() if any(True for _ in module.mechanism.parameters())}


def described(pupils: Mapping[int, SwappedAttention]) -> str:
    """The swapped layers in a few words: `lolcats(window=64) in 0, 1, 2`."""
    by_kind: dict[str, list[str]] = {}
    for index, module in pupils.items():
        options = ", ".join(f"{key}={value!r}" for key, value in module.mechanism.options.items())
        by_kind.setdefault(f"{module.name}({options})", []).append(str(index))
    return "; ".join(f"{kind} in {', '.join(layers)}" for kind, layers in by_kind.items())


def schedule(step: int, steps: int) -> float:
    """The share of the largest learning rate at a step: up over the first ones, then down to zero along a line."""
    warmup = min(WARMUP, steps // 10)
    return min(1.0, (step + 1) / (warmup + 1)) * (1 - max(0, step - warmup) / (steps - warmup))


class _Run(Run):
    def __init__(self, pupils: Pupils, steps: int, lr: float, keeper: Checkpoints | None) -> None:
        live = {f"{m.path}.mechanism.{name}": p for m in pupils.values() for name, p in m.mechanism.named_parameters()}
        self.layers = list(pupils)
        super().__init__(live, steps, len(pupils), lr, partial(schedule, steps=steps), keeper, betas=BETAS)

    def advance(self, losses: list[float], tokens: int) -> None:
        """One step of the optimizer, with the gradients that are there."""
        wrong = next((i for i, loss in zip(self.layers, losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            raise InputError("lr", self.lr, f"a smaller one: the loss of layer {wrong} is not finite at step {self.step + 1}")
        self.collect()
        self.update(losses, tokens)

    def result(self) -> DistillResult:
        by_layer = {index: [row[i] for row in self.history] for i, index in enumerate(self.layers)}
        losses = [sum(row) / len(row) for row in self.history]
        return DistillResult(self.step, losses, by_layer, self.tokens, self.elapsed, self.resumed_from)
