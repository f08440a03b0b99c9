"""The main job: put cheaper attention into a model, teach it, and show before and after.

    original → for each mechanism: swap, measure, (distil, measure, save, write a paragraph,) restore → report

Every finished row is kept in the output folder at once, and distillation keeps checkpoints, so that the same command,
run again after an interruption, goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subquad import contract
from subquad.bench import machine, quality, speed
from subquad.bench.choice import Choice, dtype_of, parse_layers, pick_device
from subquad.bench.folder import Folder
from subquad.bench.report import Report, Row
from subquad.checks import InputError

ORIGINAL = "softmax (original)"
_PROMPT_TOKENS, _SAMPLE_TOKENS = 48, 120


@dataclass(frozen=True)
class Job:
    """What to do. Two runs with equal jobs (and equal text) are runs of the same command.

    Args:
        model: what `load_model` takes.
        to: the mechanisms, with options; `choice.sweep` makes those of a sweep.
        layers: as `--layers` takes it.
        steps: of distillation, for mechanisms with parameters of their own.
        text: files; none is the embedded book.
        window, stride, windows: of the held-out text, which is the end of the text.
        batch, length, lr: of the distillation (no lr is `distill`'s own).
        prompts: key-value recall prompts; 0 leaves them out.
        lengths: contexts at which prefill and decode are timed; bytes_64k is always from the cards.
    """

    model: str
    to: tuple[Choice, ...]
    layers: str = "all"
    steps: int = 0
    text: tuple[str, ...] = ()
    window: int = 1024
    stride: int | None = None
    windows: int = 8
    batch: int = 1
    length: int = 512
    lr: float | None = None
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
    device = _check(job)
    text = _text(job)
    identity = {**_plain(job), "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    folder = Folder(out, identity, command)
    run = _Run(job, folder, device, progress)
    run.load(text)
    run.try_swaps()
    folder.begin()
    run.rows()
    report = run.report(command)
    folder.finish(report)
    return report


def _plain(job: Job) -> dict[str, Any]:
    return {**asdict(job), "to": [choice.label for choice in job.to], "swept": [choice.setting for choice in job.to]}


def _check(job: Job) -> str:
    """Everything that can be known to be wrong before anything heavy is done; returns the device."""
    if not job.to:
        raise InputError("--to", "nothing", "at least one mechanism")
    labels = [choice.label for choice in job.to]
    if len({choice.resolved for choice in job.to}) < len(labels):
        raise InputError("--to", ", ".join(labels), "each mechanism once")
    for choice in job.to:
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
    return pick_device(job.device)


def _text(job: Job) -> str:
    from subquad.models.text import book, load_text

    return load_text(job.text) if job.text else book()


class _Run:
    """One job under way: the model (swapped and restored in place), the tokens, and where rows are kept."""

    def __init__(self, job: Job, folder: Folder, device: str, progress: bool) -> None:
        self.job, self.folder, self.device, self.progress = job, folder, device, progress
        self.done: list[Row] = []

    def load(self, text: str) -> None:
        from subquad.models.load import load_model
        from subquad.models.text import encode, split

        job = self.job
        model, self.tokenizer = load_model(job.model, dtype_of(job.dtype))
        self.model = model.to(self.device).eval()
        tokens = encode(text, self.tokenizer)
        needed = job.held_out + (job.length * job.batch if job.steps else 0)
        if tokens.numel() < needed:
            what = f"{job.windows} held-out windows of {job.window}" + (f" and one batch of {job.length * job.batch}" if job.steps else "")
            raise InputError("text", f"{tokens.numel()} tokens", f"at least {needed} tokens: {what}")
        self.train, self.held = split(tokens, job.held_out) if tokens.numel() > job.held_out else (tokens[:0], tokens)

    def swap(self, choice: Choice) -> None:
        from subquad.convert.swap import swap

        torch.manual_seed(self.job.seed)  # new parameters are the same in every run
        swap(self.model, choice.name, layers=parse_layers(self.job.layers), **choice.options)

    def restore(self) -> None:
        from subquad.convert.swap import restore

        restore(self.model)

    def try_swaps(self) -> None:
        """Put every mechanism in and take it out again: what does not fit shows before anything is written."""
        for choice in self.job.to:
            self.swap(choice)
            self.restore()

    # ---- rows ------------------------------------------------------------------------------------------------------

    def rows(self) -> None:
        self._keep(self.folder.load("original") or self._measured(ORIGINAL), "original")
        for number, choice in enumerate(self.job.to, 1):
            names = [f"{choice.folder}-{steps}" for steps in sorted({0, self.job.steps})]
            kept = [self.folder.load(name) for name in names]
            if kept[0] is not None and (kept[-1] is not None or not kept[0].new_params):
                self.done += [row for row in kept if row is not None]
                continue
            self.swap(choice)
            try:
                before = kept[0] or self._measured(choice.label, f" ({number} of {len(self.job.to)})", choice)
                self._keep(before, names[0])
                if self.job.steps and before.new_params:
                    self._keep(self._distilled(choice, before), names[1])
            finally:
                self.restore()

    def _keep(self, row: Row, name: str) -> None:
        self.done.append(row)
        self.folder.keep(name, row)

    def _measured(self, label: str, place: str = "", choice: Choice | None = None) -> Row:
        """A row of the model as it stands now."""
        job, model = self.job, self.model
        self._say(f"measuring {label}{place}")
        row = Row(label, speed_at=job.speed_at, layers=self._layers(), params=speed.parameters(model))
        if choice is not None and choice.swept:
            row.base, row.setting = choice.base, choice.setting
        mechanisms = speed.outermost(model)
        row.new_params = sum(p.numel() for m in mechanisms for p in m.parameters())
        row.kept_bytes = speed.kept_bytes(model, sorted({*speed.LENGTHS, *job.lengths}))
        row.bytes_64k, row.keeps = row.kept_bytes[65536], speed.kept_sentence(model)
        row.flops, row.pairs = speed.prefill_flops(model, job.window), speed.pairs_seen(model, job.window)
        self._judge(row)
        self._time(row)
        return row

    def _judge(self, row: Row) -> None:
        """Perplexity and recall of the model as it stands now."""
        job = self.job
        found = quality.perplexity(self.model, self.held, window=job.window, stride=job.stride, progress=self.progress)
        row.nll = found.nll if math.isfinite(found.nll) else None
        row.ppl = found.ppl if math.isfinite(found.ppl) else None
        if job.prompts:
            known = quality.recall(
                self.model, self.tokenizer, prompts=job.prompts, distance=job.distance, seed=job.seed, progress=self.progress
            )
            row.recall, row.recall_ranked = known.exact, known.ranked

    def _time(self, row: Row) -> None:
        found = speed.timings(self.model, self.held, self.job.lengths, progress=self.progress)
        row.timings = [{**asdict(one), "tokens_per_s": one.tokens_per_s} for one in found]
        row.measured_bytes = {one.tokens: one.cache_bytes for one in found}
        at = next(one for one in found if one.tokens == self.job.speed_at)
        row.tokens_per_s, row.decode_ms = at.tokens_per_s, at.decode_ms
        row.peak_memory = speed.prefill_memory(self.model, self.held, at.tokens)

    def _layers(self) -> str:
        return f"{len(speed.outermost(self.model))} of {len(speed.attention_layers(self.model))}"

    def _distilled(self, choice: Choice, before: Row) -> Row:
        """Teach the swapped model, measure it, save it, and let it write."""
        from subquad.convert.distill import distill

        job = self.job
        self._say(f"distilling {choice.label}, {job.steps} steps of {job.batch} × {job.length} tokens")
        rate: dict[str, Any] = {} if job.lr is None else {"lr": job.lr}
        result = distill(
            self.model, self.model, self.train, steps=job.steps, batch=job.batch, length=job.length, seed=job.seed, **rate,
            out=self.folder.checkpoints(choice.folder), progress=self.progress, take_finished=True,
        )  # fmt: skip
        self._say(f"measuring {choice.label} after distillation")
        row = replace(before, distilled_steps=job.steps, losses=result.losses, distill_seconds=result.seconds)
        self._judge(row)
        row.saved = self.folder.save_model(choice.folder, self.model, self.tokenizer)
        row.sample = self._paragraph()
        return row

    @torch.no_grad()
    def _paragraph(self) -> str:
        """A continuation of the first held-out tokens, sampled from a seed."""
        prompt: Tensor = self.held[:_PROMPT_TOKENS][None].to(self.device)
        torch.manual_seed(self.job.seed)
        with quality.evaluating(self.model):
            written = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_SAMPLE_TOKENS, do_sample=True, temperature=0.8, top_p=0.9,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
        return self.tokenizer.decode(written[0], skip_special_tokens=True).strip()

    # ---- words -----------------------------------------------------------------------------------------------------

    def report(self, command: str) -> Report:
        job = self.job
        about = {
            "model": job.model,
            "text": f"{', '.join(job.text) or 'Moby-Dick (embedded)'}; held out: the last {self.held.numel():,} tokens",
            "windows": f"{job.windows} of {job.window:,} tokens" + (f", stride {job.stride}" if job.stride else ""),
            "device": machine.device_name(self.device),
            "dtype": job.dtype,
            "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
            "commit": machine.commit() or "not run from a checkout",
            "command": command or "run_job()",
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }
        return Report(self.done, about, self._notes()).compare()

    def _notes(self) -> list[str]:
        job = self.job
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
        if job.steps:
            tokens = job.steps * job.batch * job.length
            notes.append(f"Distillation: attention transfer on {tokens:,} tokens from before the held-out end; only new parameters learn.")
        still = [row.mechanism for row in self.done if job.steps and row.mechanism != ORIGINAL and not row.new_params]
        if still:
            notes.append(f"Without parameters of their own there is nothing to distil: {', '.join(still)}.")
        return notes

    def _agreement(self) -> str:
        pairs = [(row, n, size, row.kept_bytes[n]) for row in self.done for n, size in row.measured_bytes.items()]
        apart = [(row.name, n, size, card) for row, n, size, card in pairs if size != card]
        if not apart:
            return "both agree to the byte"
        name, n, size, card = max(apart, key=lambda one: abs(math.log(max(one[2], 1) / max(one[3], 1))))
        return f"they differ most for {name} at {n:,} tokens, {speed.bytes_text(size)} measured and {speed.bytes_text(card)} computed"

    def _say(self, text: str) -> None:
        if self.progress:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(text, markup=False)
