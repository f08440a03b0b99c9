"""The rows of a job under way: the model swapped, taught, measured and restored in place, each row kept at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad.bench import quality, speed
from subquad.bench.choice import Choice, dtype_of, parse_layers
from subquad.bench.folder import Folder
from subquad.bench.model_card import model_card
from subquad.bench.report import Row
from subquad.bench.subjects import BATCH, LENGTH, Subject, step_tokens
from subquad.checks import InputError

if TYPE_CHECKING:
    from subquad.bench.job import Job

ORIGINAL = "softmax (original)"
SELF = "self"  # as a text: what the model writes itself
_PROMPT_TOKENS, _SAMPLE_TOKENS = 48, 120
_COMPARED = 4  # windows that layers are compared on


class JobRun:
    """One job under way: the model (swapped and restored in place), the tokens, and where rows are kept."""

    def __init__(self, job: Job, subjects: list[Subject], folder: Folder, device: str, progress: bool) -> None:
        self.job, self.subjects, self.folder, self.device, self.progress = job, subjects, folder, device, progress
        self.teaching = device  # where groups of layers are taught; a model that is taught so need not fit there
        if any(one.grouped for one in subjects):
            self.device = "cpu"
        self.own: Tensor | None = None  # text of the model's own beside `train`
        self.done: list[Row] = []
        self.kept_layers: dict[str, list[int]] = {}  # by subject, where they were chosen

    def load(self, text: str) -> None:
        from subquad.convert.feed import check_written
        from subquad.convert.swap import check_unswapped
        from subquad.models.load import load_model
        from subquad.models.text import encode, split

        job = self.job
        model, self.tokenizer = load_model(job.model, dtype_of(job.dtype))
        check_unswapped(model)
        self.model = model.to(self.device).eval()
        tokens = encode(text, self.tokenizer)
        check_written(self.tokenizer, tokens.tolist(), model)
        batch = max((step_tokens(stage) for one in self.subjects for stage in one.stages), default=0)
        if SELF in job.text:
            if job.self_tokens < batch:
                raise InputError("--self-tokens", job.self_tokens, f"at least one batch, {batch} tokens")
            batch = 0
            if job.own_share is not None:
                batch = max(step_tokens(one.finetune) for one in self.subjects if one.finetune is not None)
        needed = job.held_out + batch
        if tokens.numel() < needed:
            what = f"{job.windows} held-out windows of {job.window}" + (f" and one batch of {batch}" if batch else "")
            raise InputError("text", f"{tokens.numel()} tokens", f"at least {needed} tokens: {what}")
        self.train, self.held = split(tokens, job.held_out) if tokens.numel() > job.held_out else (tokens[:0], tokens)
        self.before = self.train  # whoever writes what is taught
        if job.layers.strip().startswith("auto") and self.before.numel() < 2:
            raise InputError("text", f"{tokens.numel()} tokens", "text before the held-out end, to compare layers on")

    def write(self) -> None:
        """With `--text self`: have the model write what it is taught with, or with `--own-share` a part of it."""
        from subquad.models.self_text import self_text

        if SELF in self.job.text and any(one.stages for one in self.subjects):
            self._say(f"sampling {self.job.self_tokens:,} tokens from the model")
            length = max(stage.get("length", LENGTH) for one in self.subjects for stage in one.stages)
            made = self_text(self.model, self.job.self_tokens, length=length, seed=self.job.seed, progress=self.progress)
            if self.job.own_share is None:
                self.train = made
            else:
                self.own = made

    @property
    def every(self) -> Tensor:
        """All tokens there are to teach with."""
        return self.train if self.own is None else torch.cat([self.own, self.train])

    def swap(self, choice: Choice, layers: Any) -> None:
        from subquad.convert.swap import swap

        torch.manual_seed(self.job.seed)  # new parameters are the same in every run
        swap(self.model, choice.name, layers=layers, **choice.options)

    def layers(self, one: Subject) -> Any:
        """The layers that a subject is put into; those of "auto:K" are measured on text from before the held-out end."""
        from subquad.convert.sensitivity import auto_keep, choose_layers

        wanted, job = parse_layers(self.job.layers), self.job
        keep = auto_keep(wanted)
        if keep is None:
            return wanted
        self._say(f"comparing the layers for {one.label}")
        text = self.before[-_COMPARED * job.window :]
        batches = [{"input_ids": ids[None]} for ids in text.split(job.window) if ids.numel() > 1]
        cache = None if self.folder.path is None else self.folder.path / "layers" / f"{one.folder}.json"
        chosen = choose_layers(
            self.model, batches, one.choice.name, keep, one.choice.options, seed=job.seed, cache=cache, progress=self.progress
        )  # fmt: skip
        self.kept_layers[one.label] = sorted(set(range(len(speed.attention_layers(self.model)))) - set(chosen))
        return chosen

    def restore(self) -> None:
        from subquad.convert.swap import restore

        restore(self.model)

    def try_swaps(self) -> None:
        """Put every mechanism in and take it out again, and look for what is to be tuned: what does not fit shows before anything
        is written."""
        from subquad.convert.blockwise import body_of
        from subquad.convert.distill import check_objective, learning
        from subquad.convert.lora import projections
        from subquad.convert.sensitivity import auto_keep, check_keep

        layers = parse_layers(self.job.layers)
        keep = auto_keep(layers)
        if keep is not None:
            check_keep(self.model, keep)
            layers = "all"
        for one in self.subjects:
            if one.grouped:
                body_of(self.model)
            self.swap(one.choice, layers)
            if one.transfer is not None:
                objective, length = one.transfer.get("objective", "output"), one.transfer.get("length", LENGTH)
                check_objective(objective, learning(self.model), length, spare=keep or 0)
            self.restore()
            if one.finetune is not None:
                projections(self.model, _targets(one))

    # ---- rows ------------------------------------------------------------------------------------------------------

    def rows(self) -> None:
        self._keep(self.folder.load("original") or self._measured(ORIGINAL), "original")
        if self.job.tune_original:
            self._keep(self.folder.load("original-tuned") or self._original_tuned(), "original-tuned")
        for number, one in enumerate(self.subjects, 1):
            self._series(one, f" ({number} of {len(self.subjects)})")

    def _series(self, one: Subject, place: str) -> None:
        """A subject's rows: swapped, after transfer if there is something to learn, after fine-tuning."""
        names = dict(zip(("swapped", *_stages(one)), one.rows()))
        layers = self.layers(one)
        kept = {stage: self.folder.load(name) for stage, name in names.items()}
        first = kept["swapped"]
        if first is not None and not first.new_params:
            names.pop("transfer", None)
        if all(kept[stage] is not None for stage in names):
            self.done += [row for stage in names if (row := kept[stage]) is not None]
            return
        self.swap(one.choice, layers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._weights_kept(one))
            stack.callback(self.restore)
            row = first or self._measured(one.label, place, one.choice, one.recipe)
            self._keep(row, names["swapped"])
            for stage in [stage for stage in ("transfer", "finetune") if stage in names]:
                if stage == "transfer" and not row.new_params:
                    continue
                teach = self._distilled if stage == "transfer" else self._tuned
                row = teach(one, row, kept[stage])
                if kept[stage] is None and stage == list(names)[-1]:
                    self._finish(one, row)
                self._keep(row, names[stage])

    @contextlib.contextmanager
    def _weights_kept(self, one: Subject) -> Iterator[None]:
        from subquad.convert.lora import projections, weights_kept

        if one.finetune is None:
            yield
            return
        with weights_kept(self.model, projections(self.model, _targets(one))):
            yield

    def _keep(self, row: Row, name: str) -> None:
        self.done.append(row)
        self.folder.keep(name, row)

    def _measured(self, label: str, place: str = "", choice: Choice | None = None, recipe: str = "") -> Row:
        """A row of the model as it stands now."""
        job, model = self.job, self.model
        self._say(f"measuring {label}{place}")
        row = Row(label, speed_at=job.speed_at, layers=self._layers(), params=speed.parameters(model), recipe=recipe)
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

    # ---- teaching ------------------------------------------------------------------------------------------------------

    def _distilled(self, one: Subject, before: Row, kept: Row | None) -> Row:
        """Teach the swapped model by attention transfer, and measure it; if it was measured before, only take its weights."""
        from subquad.convert.distill import distill

        assert one.transfer is not None
        self._say(f"distilling {one.label}, {one.transfer['steps']} steps of {_size(one.transfer)} tokens")
        where = self.teaching if one.grouped else None
        result = distill(self.model, self.model, self.every, **one.transfer, device=where, **self._common(one.folder))
        if kept is not None:
            return kept
        self._say(f"measuring {one.label} after distillation")
        row = replace(before, distilled_steps=result.steps, losses=result.losses, distill_seconds=result.seconds)
        row.distill_tokens = row.taught_tokens = result.tokens
        self._judge(row)
        return row

    def _tuned(self, one: Subject, before: Row, kept: Row | None, alike: Tensor | None = None) -> Row:
        """Tune the model as it stands with low-rank adapters, merge them, and measure it. All of `alike`, if given, teaches in one way."""
        from subquad.convert.finetune import finetune
        from subquad.convert.lora import merge_lora

        assert one.finetune is not None
        self._say(f"fine-tuning {before.mechanism}, {one.finetune['steps']} steps of {_size(one.finetune)} tokens")
        data, own = (self.train, self.own) if alike is None else (alike, None)
        result = finetune(self.model, data, **one.finetune, own=own, **self._common(f"{one.folder}-finetune"))
        merge_lora(self.model)
        self._say(f"measuring {before.mechanism} after fine-tuning")
        row = replace(before, tuned_steps=result.steps, tune_losses=result.losses, tune_seconds=result.seconds)
        row.tune_tokens, row.taught_tokens = result.tokens, (before.taught_tokens or 0) + result.tokens
        self._judge(row)
        return row

    def _original_tuned(self) -> Row:
        """The model with its own attention, tuned as the first subject that is tuned at all, but on the next token of all text: what the
        text alone gains."""
        like = next(one for one in self.subjects if one.finetune is not None)
        assert like.finetune is not None
        own = {key: value for key, value in like.finetune.items() if key not in ("loss", "kl_weight", "own_share", "train_mechanism")}
        one = replace(like, finetune=own, recipe="original")
        with self._weights_kept(one):
            return self._tuned(one, self.done[0], None, self.every)

    def _common(self, name: str) -> dict[str, Any]:
        out = self.folder.checkpoints(name)
        return {"seed": self.job.seed, "out": out, "progress": self.progress, "take_finished": True}

    def _finish(self, one: Subject, row: Row) -> None:
        """Save the taught model with its card, and let it write."""
        own = [done for done in self.done if done.mechanism == row.mechanism]
        card = model_card(self.job, one, [self.done[0], *own, row], self.held.numel())
        row.saved = self.folder.save_model(one.folder, self.model, self.tokenizer, card)
        row.sample = self._paragraph()

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

    def _say(self, text: str) -> None:
        if self.progress:
            from rich.console import Console

            Console(stderr=True, highlight=False).print(text, markup=False)


def _targets(one: Subject) -> Any:
    from subquad.convert.lora import TARGETS

    assert one.finetune is not None
    return one.finetune.get("targets", TARGETS)


def _stages(one: Subject) -> list[str]:
    return [name for name in ("transfer", "finetune") if getattr(one, name) is not None]


def _size(stage: Any) -> str:
    """The shape of a step, in words."""
    return f"{stage.get('batch', BATCH) * stage.get('accumulate', 1)} × {stage.get('length', LENGTH)}"
