"""The job for sentence encoders: put a mechanism in, teach it on sentences, and compare embeddings with the original's.

    original → for each mechanism: swap, compare, (distil, compare, save,) restore → report

Held-out sentences are the last of the text, and none of them is taught.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from subquad import contract
from subquad.bench import machine
from subquad.bench.choice import Choice, check_choices, parse_layers, pick_device
from subquad.bench.embeddings import Fidelity, embed, fidelity, tokenized
from subquad.bench.folder import Folder
from subquad.bench.report import write_whole
from subquad.checks import InputError
from subquad.convert.transfer import Objective

COLUMNS = ("mechanism", "steps", "objective", "layers", "mean cosine", "least cosine", "Spearman", "seconds of teaching")


@dataclass(frozen=True)
class EncoderJob:
    """What to do.

    Args:
        model: what `load_encoder` takes.
        to: the mechanisms, with options.
        layers: as `--layers` takes it.
        steps: of distillation, for mechanisms with parameters of their own; each reads `batch` sentences.
        objective: of the distillation.
        text: files; none is the embedded book.
        held_out: sentences at the end of the text that are kept from training.
        length: tokens after which a sentence is cut.
        lr: of the distillation (None is `distill`'s own).
    """

    model: str
    to: tuple[Choice, ...]
    layers: str = "all"
    steps: int = 0
    objective: Objective = "output"
    text: tuple[str, ...] = ()
    held_out: int = 500
    batch: int = 16
    length: int = 128
    lr: float | None = None
    seed: int = 0
    device: str | None = None


@dataclass(frozen=True)
class EncoderRow:
    """A mechanism after some steps, against the original."""

    mechanism: str
    steps: int
    objective: str
    layers: str
    fidelity: Fidelity
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    saved: str | None = None

    def cells(self) -> tuple[str, ...]:
        f = self.fidelity
        scores = (f"{f.cosine:.4f}", f"{f.least:.3f}", f"{f.spearman:.4f}")
        taught = (self.objective, f"{self.seconds:.0f}") if self.steps else ("", "")
        return (self.mechanism, str(self.steps), taught[0], self.layers, *scores, taught[1])


@dataclass
class EncoderReport:
    rows: list[EncoderRow]
    about: dict[str, str]

    def table(self) -> Table:
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(COLUMNS):
            table.add_column(name.replace(" ", "\n"), justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
        for row in self.rows:
            table.add_row(*row.cells())
        return table

    def save(self, folder: str | Path) -> None:
        """Write report.json, whole or not at all."""
        content = {"about": self.about, "rows": [asdict(row) for row in self.rows]}
        write_whole(Path(folder) / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run_encoder_job(job: EncoderJob, out: str | Path | None = None, *, command: str = "", progress: bool = False) -> EncoderReport:
    """Run a job and return its report, written to `out` with the taught models if that is given.

    The same job, run again after an interruption, goes on from its last checkpoint.

    Raises:
        InputError: anything that does not fit.
    """
    from subquad.convert.distill import check_objective, learning
    from subquad.convert.swap import check_unswapped, restore, swap
    from subquad.models.encoders import load_encoder
    from subquad.models.text import book, load_text, sentences

    device = _check(job)
    text = load_text(job.text) if job.text else book()
    found = sentences(text)
    needed = job.held_out + (job.batch if job.steps else 0)
    if len(found) < needed:
        raise InputError("text", f"{len(found)} sentences", f"at least {needed}: {job.held_out} held out, and a batch")
    taught, held = found[: len(found) - job.held_out], found[len(found) - job.held_out :]
    identity = {**asdict(job), "to": [choice.label for choice in job.to], "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    folder = Folder(out, identity, command)
    model, tokenizer = load_encoder(job.model)
    check_unswapped(model)
    model = model.to(device)
    for choice in job.to:  # what does not fit shows before anything is written
        swap(model, choice.name, layers=parse_layers(job.layers), **choice.options)
        if job.steps:
            check_objective(job.objective, learning(model))
        restore(model)
    folder.begin()
    batches = _batches(taught, tokenizer, job)
    original = embed(model, tokenizer, held, length=job.length, progress=progress)
    rows = []
    for choice in job.to:
        torch.manual_seed(job.seed)
        swap(model, choice.name, layers=parse_layers(job.layers), **choice.options)
        try:
            rows += _rows(choice, job, folder, model, tokenizer, batches, held, original, progress)
        finally:
            restore(model)
    about = {
        "model": job.model,
        "text": f"{', '.join(job.text) or 'Moby-Dick (embedded)'}; held out: the last {len(held):,} sentences",
        "taught": f"{job.steps} steps of {job.batch} sentences" if job.steps else "nothing",
        "device": machine.device_name(device),
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        "commit": machine.commit() or "not run from a checkout",
        "command": command or "run_encoder_job()",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    report = EncoderReport(rows, about)
    folder.finish(report)
    return report


def _check(job: EncoderJob) -> str:
    check_choices(job.to)
    for choice in job.to:
        if not contract.card(choice.name).bidirectional:
            both = ", ".join(name for name, card in contract.mechanisms().items() if card.bidirectional and not card.needs_grid)
            raise InputError("--to", choice.name, f"a bidirectional mechanism, as the model is an encoder: {both}")
    parse_layers(job.layers)
    if job.lr is not None and not 0 < job.lr < math.inf:
        raise InputError("--lr", job.lr, "a positive number")
    return pick_device(job.device)


def _batches(taught: Sequence[str], tokenizer: Any, job: EncoderJob) -> list[dict[str, torch.Tensor]]:
    """One batch a step, of sentences in an order that the seed gives."""
    if not job.steps:
        return []
    order = list(taught)
    random.Random(job.seed).shuffle(order)
    order = order[: len(order) - len(order) % job.batch][: job.steps * job.batch]
    return tokenized(tokenizer, order, batch=job.batch, length=job.length)


def _rows(
    choice: Choice, job: EncoderJob, folder: Folder, model: Any, tokenizer: Any, batches: list[dict[str, torch.Tensor]],
    held: Sequence[str], original: torch.Tensor, progress: bool,
) -> list[EncoderRow]:  # fmt: skip
    """A swapped model before and, where it has something to learn, after distillation."""
    from subquad.convert.distill import distill, learning
    from subquad.convert.swap import find_host, swapped

    def compare() -> Fidelity:
        return fidelity(embed(model, tokenizer, held, length=job.length, progress=progress), original)

    inside = swapped(model)
    layers = f"{len(inside)} of {len(find_host(model).sites)}"
    rows = [EncoderRow(choice.label, 0, "", layers, compare())]
    if not job.steps or not learning(model):
        return rows
    rate: dict[str, Any] = {} if job.lr is None else {"lr": job.lr}
    result = distill(
        model, model, batches, steps=job.steps, objective=job.objective, seed=job.seed, **rate,
        out=folder.checkpoints(choice.folder), progress=progress, take_finished=True,
    )  # fmt: skip
    after = compare()
    saved = folder.save_model(choice.folder, model, tokenizer)
    return [*rows, EncoderRow(choice.label, job.steps, job.objective, layers, after, result.seconds, result.losses, saved)]
