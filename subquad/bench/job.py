"""The main job: put cheaper attention into a model, teach it, and show before and after.

    original → for each mechanism or recipe: swap, measure, (distil, measure,) (fine-tune, measure,) save, restore → report

Every finished row is kept in the output folder at once, and both ways of teaching keep checkpoints, so that the same command,
run again after an interruption, goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subquad import contract
from subquad.bench import machine, speed
from subquad.bench.choice import Choice, dtype_of, parse_layers, pick_device
from subquad.bench.folder import Folder
from subquad.bench.images import is_image_model
from subquad.bench.job_rows import SELF, JobRun
from subquad.bench.report import Report
from subquad.bench.subjects import Subject, stage_tokens, subjects
from subquad.checks import InputError


@dataclass(frozen=True)
class Job:
    """What to do. Two runs with equal jobs (and equal text) are runs of the same command.

    Args:
        model: what `load_model` takes.
        to: the mechanisms, with options; `choice.sweep` makes those of a sweep.
        recipes: names of recipes, or files, each tried after the mechanisms.
        layers: as `--layers` takes it.
        steps: of distillation, for mechanisms with parameters of their own; None is none, and a recipe's own.
        finetune: steps of fine-tuning after that, in the same way.
        tune_original: fine-tune the original too, as the first of the others that is tuned.
        text: files; none is the embedded book. With "self" among them the model itself writes what it is taught with, `self_tokens`
            tokens, and the others are for measuring alone.
        own_share: beside "self", text of both kinds teaches: the transfer reads all of it; of the sequences of fine-tuning this share
            is the model's own text, by its distribution, and the rest the files' before the held-out end, by the next token or as a
            recipe says; the original learns the next token of all. None: its own text is all that teaches.
        window, stride, windows: of the held-out text, which is the end of the text.
        batch, length: of teaching (None: a recipe's own, otherwise 1 × 512); lr of the distillation (None: its own).
        group: layers on the device at a time in the transfer; the model stays on the CPU then, and all else is done there.
        prompts: key-value recall prompts; 0 leaves them out.
        lengths: contexts at which prefill and decode are timed; bytes_64k is always from the cards.
    """

    model: str
    to: tuple[Choice, ...] = ()
    recipes: tuple[str, ...] = ()
    layers: str = "all"
    steps: int | None = None
    finetune: int | None = None
    tune_original: bool = False
    text: tuple[str, ...] = ()
    self_tokens: int = 65536
    own_share: float | None = None
    window: int = 1024
    stride: int | None = None
    windows: int = 8
    batch: int | None = None
    length: int | None = None
    lr: float | None = None
    group: int | None = None
    prompts: int = 8
    distance: int = 256
    lengths: tuple[int, ...] = (256, 1024, 2048)
    device: str | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def held_out(self) -> int:
        """Tokens at the end of the text that are kept from training."""
        return self.window + (self.windows - 1) * (self.stride or self.window)

    @property
    def speed_at(self) -> int:
        """The context length whose times stand in the table."""
        return max((n for n in self.lengths if n <= self.window), default=min(self.lengths))


def run_job(job: Job, out: str | Path | None = None, *, command: str = "", progress: bool = False) -> Report:
    """Run a job, or go on with it, and return its report (written to `out`, if that is given).

    Raises:
        InputError: anything that does not fit; nothing has been written then.
    """
    device, wanted = _check(job, out)
    text = _text(job)
    identity = {**_plain(job), "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "stages": [one.stages for one in wanted]}
    folder = Folder(out, identity, command)
    run = JobRun(job, wanted, folder, device, progress)
    run.load(text)
    run.try_swaps()
    folder.begin()
    run.write()
    run.rows()
    report = _Words(run).report(command)
    folder.finish(report)
    return report


def _plain(job: Job) -> dict[str, Any]:
    return {**asdict(job), "to": [choice.label for choice in job.to], "swept": [choice.setting for choice in job.to]}


def _check(job: Job, out: str | Path | None) -> tuple[str, list[Subject]]:
    """Everything that can be known to be wrong before anything heavy is done; returns the device and what is to be tried."""
    from subquad.convert.run import check_share

    if is_image_model(job.model):
        should = "a causal language model; for images, run_image_job of subquad.bench.image_swap, or subquad train vision"
        raise InputError("model", repr(job.model), should)
    wanted = subjects(job)
    labels = [choice.label for choice in job.to]
    if len({choice.resolved for choice in job.to}) < len(labels):
        raise InputError("--to", ", ".join(labels), "each mechanism once")
    for choice in (one.choice for one in wanted):
        if not contract.card(choice.name).causal:
            causal = ", ".join(name for name, card in contract.mechanisms().items() if card.causal)
            raise InputError("--to", choice.name, f"a causal mechanism, as the model is causal: {causal}")
    parse_layers(job.layers)
    dtype_of(job.dtype)
    if job.stride is not None and job.stride > job.window:
        raise InputError("--stride", job.stride, f"at most the window, {job.window}")
    if not 0 <= job.seed < 2**63:
        raise InputError("--seed", job.seed, "at least 0 and less than 2**63")
    if job.lr is not None and not 0 < job.lr < math.inf:
        raise InputError("--lr", job.lr, "a positive number")
    if job.group is not None and not any(one.grouped for one in wanted):
        raise InputError("--group", job.group, "something to transfer: --distill, or a recipe that transfers")
    if out is None and any(one.grouped for one in wanted):
        raise InputError("--group", "no --out", "a folder for the hidden states between groups, named with --out")
    if job.tune_original and all(one.finetune is None for one in wanted):
        raise InputError("--tune-original", "nothing else that is tuned", "--finetune, or a recipe that fine-tunes")
    if job.own_share is not None:
        check_share("--own-share", job.own_share)
        if SELF not in job.text:
            raise InputError("--own-share", job.own_share, "text that the model writes itself beside the other: --text self")
        if all(one.finetune is None for one in wanted):
            raise InputError("--own-share", job.own_share, "something that is tuned: --finetune, or a recipe that fine-tunes")
    return pick_device(job.device), wanted


def _text(job: Job) -> str:
    """The text to measure on, and to teach with unless the model writes that itself."""
    from subquad.models.text import book, load_text

    files = [path for path in job.text if path != SELF]
    return load_text(files) if files else book()


class _Words:
    """The report of a job that has run, and what it says in words."""

    def __init__(self, run: JobRun) -> None:
        self.run = run

    def report(self, command: str) -> Report:
        job = self.run.job
        about = {
            "model": job.model,
            "text": f"{self._texts()}; held out: the last {self.run.held.numel():,} tokens",
            "windows": f"{job.windows} of {job.window:,} tokens" + (f", stride {job.stride}" if job.stride else ""),
            "device": machine.device_name(self.run.device) + self._apart(),
            "dtype": job.dtype,
            "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
            "commit": machine.commit() or "not run from a checkout",
            "command": command or "run_job()",
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }
        return Report(self.run.done, about, self._notes()).compare()

    def _apart(self) -> str:
        apart = any(one.grouped for one in self.run.subjects) and self.run.teaching != self.run.device
        return f"; groups of layers taught on {machine.device_name(self.run.teaching)}" if apart else ""

    def _notes(self) -> list[str]:
        job = self.run.job
        measured = ", ".join(f"{n:,}" for n in job.lengths)
        notes = [
            f"tokens/s (prefill), decode ms and prefill memory are at {job.speed_at:,} tokens of context, one sequence; times were "
            f"measured at {measured} tokens, longer contexts were not measured. Speed does not depend on the weights, so it is "
            "measured once a mechanism.",
            f"bytes_64k is computed from the mechanisms’ cards, as are the other lengths, except that real caches were measured at "
            f"{measured} tokens: {self._agreement()}.",
        ]
        if job.prompts:
            notes.append(
                f"recall: {job.prompts} prompts of 4 numbers, asked for {job.distance} tokens later; few prompts, so a coarse figure."
            )
        else:
            notes.append("recall was not measured.")
        for label, layers in self.run.kept_layers.items():
            kept = ", ".join(map(str, layers)) or "none"
            notes.append(f"{label} keeps the layers whose replacement alone costs most on text from before the held-out end: {kept}.")
        return notes + self._teaching()

    def _texts(self) -> str:
        job = self.run.job
        files = ", ".join(path for path in job.text if path != SELF) or "Moby-Dick (embedded)"
        also = "" if job.own_share is None else "the text before the held-out end and "
        return f"{files}; taught with {also}{job.self_tokens:,} tokens that the model wrote itself" if SELF in job.text else files

    def _teaching(self) -> list[str]:
        """What each stage was, in a sentence each."""
        job, rows, notes = self.run.job, self.run.done, []
        where = "that the model wrote itself" if SELF in job.text else "from before the held-out end"
        tuned_on = where
        if job.own_share is not None:
            where = f"{where} or from before the held-out end"
            tuned_on = f"{where}; {job.own_share:.4g} of the sequences are its own and teach by its distribution, the others "
            tuned_on += "by the next token, or as the recipe says" + (" (all do, for the original)" if job.tune_original else "")
        if any(one.transfer is not None for one in self.run.subjects):
            counts = sorted({stage_tokens(one.transfer) for one in self.run.subjects if one.transfer is not None})
            tokens = " or ".join(f"{count:,}" for count in counts)
            notes.append(f"Distillation: attention transfer on {tokens} tokens {where}; only new parameters learn.")
        if any(row.tuned_steps for row in rows):
            counts = sorted({stage_tokens(one.finetune) for one in self.run.subjects if one.finetune is not None})
            tokens = " or ".join(f"{count:,}" for count in counts)
            maps = [one.label for one in self.run.subjects if one.finetune is not None and one.finetune.get("train_mechanism")]
            also = f", and what the swap put in ({', '.join(maps)})" if maps else ""
            notes.append(
                f"Fine-tuning: low-rank adapters, merged{also}, on {tokens} tokens {tuned_on}; "
                "rows before it are of the same model without."
            )
        compared = [one for one in self.run.subjects if one.recipe]
        if len(compared) > 1:
            notes.append(f"Tokens that each recipe was taught with: {'; '.join(map(self._tokens_read, compared))}.")
        still = [one.label for one in self.run.subjects if one.transfer is not None]
        still = [row.mechanism for row in rows if row.mechanism in still and not row.new_params and not row.taught]
        if still:
            notes.append(f"Without parameters of their own there is nothing to distil: {', '.join(still)}.")
        return notes

    def _tokens_read(self, one: Subject) -> str:
        """What a recipe's stages read, in words."""
        last = [row for row in self.run.done if row.recipe == one.recipe and row.mechanism == one.label][-1]
        stages = ((last.distill_tokens, "transfer"), (last.tune_tokens, "fine-tuning"))
        parts = [f"{tokens:,} in {name}" for tokens, name in stages if tokens]
        return f"{one.recipe} {' and '.join(parts) or 'none'}" + (f", {last.taught_tokens:,} in all" if len(parts) > 1 else "")

    def _agreement(self) -> str:
        pairs = [(row, n, size, row.kept_bytes[n]) for row in self.run.done for n, size in row.measured_bytes.items()]
        apart = [(row.name, n, size, card) for row, n, size, card in pairs if size != card]
        if not apart:
            return "both agree to the byte"
        name, n, size, card = max(apart, key=lambda one: abs(math.log(max(one[2], 1) / max(one[3], 1))))
        return f"they differ most for {name} at {n:,} tokens, {speed.bytes_text(size)} measured and {speed.bytes_text(card)} computed"
