"""The job of `subquad train vision`: a model and its baselines, each with several seeds, trained on the same batches."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from subquad import contract
from subquad.bench.choice import Choice, parse_choice, pick_device
from subquad.bench.folder import Folder
from subquad.bench.machine import commit, device_name, versions
from subquad.bench.vision_report import Trained, VisionReport
from subquad.checks import InputError, nearest
from subquad.files import whole, writing
from subquad.train import images, loop, models
from subquad.train.recipe import Recipe

KEPT = ("job.json", "report.json", "report.html", "rows", "checkpoints")  # what a run may leave in its folder


@dataclass(frozen=True)
class Contestant:
    """A model of timm, and the mechanism put into it, if any."""

    model: str
    choice: Choice | None = None

    @property
    def label(self) -> str:
        return self.model if self.choice is None else f"{self.model} + {self.choice.label}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)

    def build(self, data: images.Images, seed: int, drop_path: float) -> nn.Module:
        mechanism, options = (None, {}) if self.choice is None else (self.choice.name, self.choice.options)
        return models.build(self.model, data, mechanism=mechanism, seed=seed, drop_path=drop_path, **options)


@dataclass(frozen=True)
class VisionJob:
    """What was asked for."""

    model: str
    data: str
    recipe: Recipe
    baselines: tuple[str, ...] = ()
    mechanisms: tuple[str, ...] = ()
    seeds: int = 1
    size: int | None = None
    device: str | None = None
    precision: str | None = None
    drop_path: float = 0.0

    def contestants(self) -> list[Contestant]:
        """The model, with each mechanism; then the baselines, which are models, or mechanisms for the model."""
        models.check(self.model)
        found = [Contestant(self.model, parse_choice("--mechanism", name)) for name in self.mechanisms] or [Contestant(self.model)]
        for name in self.baselines:
            if name.partition(":")[0] in contract.mechanisms():
                found.append(Contestant(self.model, parse_choice("--baseline", name)))
            elif models.known(name):
                found.append(Contestant(name))
            else:
                raise nearest("--baseline", name, [*contract.mechanisms(), *models.names()], "mechanism, or a model of timm")
        labels = [one.label for one in found]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise InputError("--baseline", f"{twice} twice", "each model once")
        return found


def run_job(job: VisionJob, out: Path | None, *, command: str, fresh: bool = False, progress: bool = True) -> VisionReport:
    """Train all; what was finished earlier in the same folder is taken from there.

    Raises:
        InputError: before anything is written.
        KeyboardInterrupt: when the user interrupts; the folder then holds all that was done.
    """
    if job.seeds < 1:
        raise InputError("--seeds", job.seeds, "at least 1")
    models.check_drop_path(job.drop_path)
    device = pick_device(job.device)
    contestants = job.contestants()
    data = images.load(job.data, job.size, progress=progress)
    if len(data.labels) < job.recipe.batch_size:
        raise InputError("--batch-size", job.recipe.batch_size, f"at most the images to train on, {len(data.labels)}")
    sizes = [sum(p.numel() for p in one.build(data, 0, job.drop_path).parameters()) for one in contestants]  # before the folder is made
    if fresh and out is not None:
        _clear(out)
    identity = {**asdict(job), "size": data.shape[1], "data": f"{job.data} ({data.digest})"}
    folder = Folder(out, {key: value for key, value in identity.items() if key != "device"}, command)
    folder.begin()
    report = VisionReport(about=_about(job, data, device, command))
    report.rows = [Trained(one.label, count, job.recipe.batch_size) for one, count in zip(contestants, sizes)]
    steps = job.recipe.epochs * (len(data.labels) // job.recipe.batch_size)
    for seed in range(job.seeds):
        for one, row in zip(contestants, report.rows):
            model = one.build(data, seed, job.drop_path)
            with _bar(f"{one.label}, seed {seed}", steps, progress) as advance:
                result = loop.train(
                    model, data, job.recipe,
                    seed=seed, device=device, precision=job.precision, out=folder.checkpoints(f"{one.folder}-{seed}"),
                    identity={"model": one.label, "drop_path": job.drop_path}, advance=advance,
                )  # fmt: skip
            row.runs.append(result)
            _keep_weights(out, f"{one.folder}-seed{seed}", model)
    folder.finish(report)  # type: ignore[arg-type]  # it saves itself as the other reports do
    return report


def _clear(out: Path) -> None:
    """Remove what an earlier run of this command left, and nothing else."""
    try:
        earlier = json.loads((out / "job.json").read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing of ours: the folder is refused if it is not empty
    if not isinstance(earlier, dict) or not {"recipe", "seeds", "mechanisms"} <= earlier.keys():
        return
    with writing("--out", out):
        for path in (out / "weights").glob("*-seed*.safetensors"):
            path.unlink()
        if (out / "weights").is_dir() and not any((out / "weights").iterdir()):
            (out / "weights").rmdir()
        for name in KEPT:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _keep_weights(out: Path | None, name: str, model: nn.Module) -> None:
    """``weights/NAME.safetensors``, whole or not at all."""
    if out is None:
        return
    path = out / "weights" / f"{name}.safetensors"
    with writing("--out", out):
        path.parent.mkdir(exist_ok=True)
        with whole(path) as draft:
            save_file({key: x.detach().to("cpu", copy=True).contiguous() for key, x in model.state_dict().items()}, draft)


def _about(job: VisionJob, data: images.Images, device: str, command: str) -> dict[str, str]:
    channels, rows, columns = data.shape
    recipe: dict[str, Any] = asdict(job.recipe)
    return {
        "data": f"{job.data}, {rows} × {columns} × {channels}",
        "images": f"{len(data.labels):,} to train on, {len(data.test_labels):,} held out, {len(data.classes)} classes",
        "recipe": ", ".join(f"{key} {value}" for key, value in recipe.items()),
        "seeds": str(job.seeds),
        "precision": job.precision or ("bfloat16" if device.startswith("cuda") else "float32"),
        "device": device_name(device),
        "versions": ", ".join(f"{key} {value}" for key, value in versions().items()),
        "commit": commit() or "not in a checkout",
        "command": command,
    }


@contextmanager
def _bar(label: str, steps: int, show: bool) -> Iterator[Any]:
    """A bar on standard error, on terminals, with the accuracy of the last epoch."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns: Sequence[Any] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as progress:
        task = progress.add_task(label, total=steps, words="")
        yield lambda step, words: progress.update(task, completed=step, words=words)
