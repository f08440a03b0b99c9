"""finetune: the second stage of a conversion, low-rank changes of the projections learnt from what the whole model says.

    next-token   mean over t of − log p(x_{t+1} | x_≤t)
    kl           mean over t of Σ_v p_T(v | x_≤t) log( p_T(v | x_≤t) / p(v | x_≤t) ),   p_T of the teacher, temperature 1

Text of the teacher's own writing may stand beside the data: it teaches by kl, the data as they are asked to.

Only adapters (and, if asked, the mechanisms' parameters) learn. The mean is over all tokens of a step, however they are cut
into batches, accumulated and spread over devices; padding is neither seen nor predicted.

Second stage of Zhang et al.: LoLCATs (arXiv 2410.10254), sec. 3.3; adapters: Hu et al., LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, nearest
from subquad.convert.checkpoint import Checkpoints
from subquad.convert.distill import described
from subquad.convert.feed import Feed
from subquad.convert.gradient_checkpointing import checkpointed, recomputing
from subquad.convert.graphs import Graphed, plain
from subquad.convert.lora import TARGETS, add_lora, drop_lora, projections, without_lora
from subquad.convert.loss import divergence, labels_of, next_token_loss
from subquad.convert.run import Bar, Run, check_counts, check_rate, check_share, seeded
from subquad.convert.swap import swapped
from subquad.convert.transfer import moved, originals
from subquad.models.fingerprint import fingerprint

LOSSES = ("next-token", "kl")
SCHEDULES = ("cosine", "linear")
PRECISIONS = ("float32", "bfloat16")


@dataclass
class FinetuneResult:
    """How a run went, the steps before an interruption included.

    Args:
        steps: made in all, of which `resumed_from` before this call.
        losses: of each step.
        tokens: that the model read, padding not counted.
        seconds: spent.
        parameters: numbers that learnt.
    """

    steps: int
    losses: list[float]
    tokens: int
    seconds: float
    parameters: int
    resumed_from: int = 0


def finetune(
    model: Any,
    data: Any,
    *,
    steps: int,
    lr: float = 1e-4,
    batch: int = 1,
    accumulate: int = 1,
    length: int = 512,
    targets: Sequence[str] = TARGETS,
    rank: int = 8,
    alpha: float = 16.0,
    train_mechanism: bool = False,
    loss: str = "next-token",
    teacher: Any = None,
    kl_weight: float = 1.0,
    own: Tensor | None = None,
    own_share: float = 0.6,
    schedule: str = "cosine",
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    precision: str = "float32",
    out: str | Path | None = None,
    save_every: int = 25,
    seed: int = 0,
    progress: bool = True,
    take_finished: bool = False,
) -> FinetuneResult:
    """Train low-rank adapters on a causal language model's projections, in place; `merge_lora` folds them in.

    >>> subquad.finetune(student, tokens, steps=200, lr=1e-4, accumulate=8, out="runs/lora")
    >>> subquad.merge_lora(student).save_pretrained("folder")

    The model may be swapped or not. The adapters stay in it; all else that does not learn is left as it was. After an error
    the model is without adapters. It computes in evaluation mode, without dropout; gradient checkpointing that was enabled on it
    (of transformers' layers) takes effect nevertheless. Under `accelerate launch` each process reads batches of its own.

    Args:
        model: a causal language model of transformers.
        data: as `distill` takes them: token ids ``[T]``, or an iterable of batches, dicts of the model's arguments or token
            ids ``[B, N]``. With `labels`, those are predicted where they are not -100.
        steps: of the optimizer, each from `accumulate` batches.
        lr: the largest learning rate of AdamW, reached after `warmup` (a share of the steps) and falling to zero as
            `schedule` says, "cosine" or "linear".
        batch, length: of the batches cut from token ids.
        targets: names of the linear layers that get adapters, of rank `rank`, scaled by alpha / rank.
        train_mechanism: whether parameters that the swap put in learn too.
        loss: "next-token", or "kl" for `kl_weight` of the divergence from the teacher and 1 − `kl_weight` of next-token.
        teacher: for "kl" and `own`; by default the model itself with its original attention and without adapters.
        own: token ids ``[T]`` that the teacher wrote, as `self_text` samples them. `own_share` of the sequences, above 0 and at most 1, are
            cut from them and learn the teacher's distribution ("kl" of weight 1); the others are of `data`, which must be token ids
            then, and learn as `loss` says.
        max_grad_norm: gradients are scaled down to this norm.
        precision: "bfloat16" computes under autocast.
        out: folder for checkpoints, in ``out/checkpoint``. The same call, made again after the process died, goes on from the
            last one; on the CPU it ends with the very weights of an unbroken run.
        save_every: steps between checkpoints.
        seed: of the adapters' first values, of the order of batches, and of any randomness within a step.
        take_finished: if `out` holds the finished run of this call, take its weights instead of refusing.

    Raises:
        InputError: a target the model lacks, `own` beside data that are not token ids, a loss that is not finite (the last checkpoint
            stays), or an `out` that is not an unfinished run of the same call.
    """
    check_counts(steps=steps, batch=batch, accumulate=accumulate, length=length, rank=rank, save_every=save_every)
    for name, value in {"lr": lr, "alpha": alpha, "max_grad_norm": max_grad_norm}.items():
        check_rate(name, value)
    for name, value, most in (("kl_weight", kl_weight, 1), ("warmup", warmup, 1)):
        if not isinstance(value, int | float) or not 0 <= value <= most:
            raise InputError(name, value, f"a number from 0 to {most}")
    check_share("own_share", own_share)
    for name, word, known in (("loss", loss, LOSSES), ("schedule", schedule, SCHEDULES), ("precision", precision, PRECISIONS)):
        if word not in known:
            raise nearest(name, word, known, name)
    paths = projections(model, targets)
    with _engine(model, precision) as engine:
        feed = Feed(data, steps * accumulate * engine.world, batch, length, seed, model, own, own_share)
        settings = {
            "model": fingerprint(model, lambda name: train_mechanism and ".mechanism." in name), "layers": described(swapped(model)),
            "targets": list(targets), "rank": rank, "alpha": alpha, "train_mechanism": train_mechanism, "loss": loss, "steps": steps,
            "lr": lr, "schedule": schedule, "warmup": warmup, "max_grad_norm": max_grad_norm, "precision": precision, "seed": seed,
            "accumulate": accumulate * engine.world, **feed.settings,
        }  # fmt: skip
        if loss == "kl":
            settings["kl_weight"] = kl_weight
        if loss == "kl" or own is not None:
            settings["teacher"] = fingerprint(model if teacher is None else teacher)
        keeper = None if out is None else Checkpoints(out, settings, steps, take_finished=take_finished)
        with (
            _evaluating(model if teacher is None else teacher),
            _learning(model, paths, rank, alpha, train_mechanism, seed) as live,
            Bar("finetune", steps, progress) as bar,
        ):
            run = engine.begin(live, steps, lr, partial(share, steps=steps, schedule=schedule, warmup=warmup), keeper)
            judge = _Judge(model, teacher, kl_weight if loss == "kl" else 0.0)
            while run.step < steps:
                with seeded(seed, run.step):
                    first = (run.step * engine.world + engine.rank) * accumulate
                    batches = [(feed[i], feed.own_rows(i)) for i in range(first, first + accumulate)]
                    engine.advance(run, judge, batches, max_grad_norm)
                bar.advance(run)
                if keeper is not None and (run.step % save_every == 0 or run.step == steps):
                    engine.save(run)
            for name, p in live.items():
                if ".lora_" in name:  # as they were learnt, so that merging rounds once
                    p.data = run.parameters[name].detach()
    count = sum(p.numel() for p in run.parameters.values())
    return FinetuneResult(run.step, [row[0] for row in run.history], run.tokens, run.elapsed, count, run.resumed_from)


def share(step: int, steps: int, schedule: str = "cosine", warmup: float = 0.1) -> float:
    """The share of the largest learning rate at a step: up along a line, then down to zero."""
    rising = int(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    left = 1 - (step - rising) / (steps - rising)
    return left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _learning(model: nn.Module, paths: Sequence[str], rank: int, alpha: float, mechanisms: bool, seed: int) -> Iterator[dict[str, Any]]:
    """The model with adapters, and everything else that does not learn frozen and in evaluation mode; yields what learns."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    inside = [module.mechanism for module in swapped(model).values()] if mechanisms else []
    try:
        with seeded(seed, -1):
            live: dict[str, Any] = add_lora(model, paths, rank, alpha)
        model.zero_grad(set_to_none=True)
        learning = {id(p) for mechanism in inside for p in mechanism.parameters()}
        live |= {name: p.requires_grad_(True) for name, p in model.named_parameters() if id(p) in learning}
        with _evaluating(model):
            for mechanism in inside:
                mechanism.train()
            yield live
    except BaseException:
        drop_lora(model)
        raise
    finally:
        model.zero_grad(set_to_none=True)
        for p, flag in wanted:
            p.requires_grad_(flag)


# ---- the loss ---------------------------------------------------------------------------------------------------------


class _Judge:
    """The summed loss of a batch: of `weight` KL and 1 − `weight` next-token, and of KL alone on its first rows, if so many are `own`."""

    def __init__(self, model: Any, teacher: Any, weight: float) -> None:
        self.model, self.teacher, self.weight = model, model if teacher is None else teacher, weight
        self.layers = checkpointed(model)

    def __call__(self, forward: Any, batch: dict[str, Any], own: int = 0) -> Tensor:
        """Calls `forward`, which is the model, perhaps wrapped. With `own`, a batch is token ids and nothing else."""
        target = self._target(batch if self.weight else {"input_ids": batch["input_ids"][:own]}) if self.weight or own else None
        with recomputing(self.layers):
            logits = forward(**{key: x for key, x in batch.items() if key != "labels"}, use_cache=False).logits
        labels = labels_of(batch)
        if target is not None and target.shape[1:] != logits.shape[1:]:
            was = f"{type(self.teacher).__name__} with a vocabulary of {target.shape[-1]}"
            raise InputError("teacher", was, f"that of the model, {logits.shape[-1]}")
        if not own:
            return self._loss(logits, labels, target)
        assert target is not None
        mine, rest = logits.split([own, len(logits) - own])  # whose gradients are joined by one copy
        away = divergence(mine, labels[:own], target[:own])
        return away if own == len(logits) else away + self._loss(rest, labels[own:], target[own:] if self.weight else None)

    def _loss(self, logits: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
        away = logits.new_zeros(()) if target is None else self.weight * divergence(logits, labels, target)
        return away if self.weight == 1 else away + (1 - self.weight) * next_token_loss(logits, labels)

    @torch.no_grad()
    def _target(self, batch: dict[str, Any]) -> Tensor:
        batch = {key: x for key, x in batch.items() if key != "labels"}
        if self.teacher is not self.model:
            device = next(self.teacher.parameters()).device
            return self.teacher(**moved(batch, device), use_cache=False).logits.to(batch["input_ids"].device)
        with originals(self.model), without_lora(self.model):
            return self.model(**batch, use_cache=False).logits


# ---- where it runs ------------------------------------------------------------------------------------------------------


class _Engine:
    """accelerate's devices, precision and gradients around one model."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
            from accelerate.state import AcceleratorState
        except ImportError as error:
            raise InputError("model", f"no accelerate ({error})", "pip install 'subquad[convert]'") from None
        self.device = next(model.parameters()).device
        AcceleratorState._reset_state(reset_partial_state=True)  # one a process: an earlier run's device may have been another
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu", mixed_precision="bf16" if precision == "bfloat16" else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )  # fmt: skip
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.world > 1:
            self.device = self.accelerator.device
            model.to(self.device)
        self.model = self.wrapped = model
        # neither DDP's buckets nor autocast's copies belong in a graph, and checkpointing reads the state of the device's generator
        self.graphs = self.world == 1 and precision != "bfloat16" and not checkpointed(model)
        self.learn: dict[int, Graphed] = {}  # by the number of own rows, which is cut into a graph

    def begin(
        self, live: dict[str, Any], steps: int, lr: float, share: Callable[[int], float], keeper: Checkpoints | None
    ) -> Run:  # fmt: skip
        self.accelerator.wait_for_everyone()
        if keeper is not None and not self.accelerator.is_main_process and keeper.load() is None:
            keeper = None  # the main process is about to write the first checkpoint
        run = Run(live, steps, 1, lr, share, keeper)
        self.accelerator.wait_for_everyone()
        if self.world > 1:
            self.wrapped = self.accelerator.prepare_model(self.model, device_placement=False)
        return run

    def advance(self, run: Run, judge: _Judge, batches: list[tuple[dict[str, Any], int]], max_grad_norm: float) -> None:
        """One step from all of `batches`, each with the number of its first rows that are own text."""
        counts = torch.tensor([_counts(batch) for batch, _ in batches]).sum(0)  # before they are moved: to count there is to wait
        targets, tokens = (self._sum(counts.to(self.device)) if self.world > 1 else counts).tolist()
        if not targets:
            raise InputError("data", "a step without a token to predict", "batches of two tokens or more that are not padding")
        # at once: each copy waits for what the device has been asked for
        batches = [(moved(batch, self.device), own) for batch, own in batches]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        by = torch.full((), float(targets), device=self.device)
        for index, (batch, own) in enumerate(batches):
            if own not in self.learn:
                self.learn[own] = Graphed(partial(self._learn, judge, own), run.live.values(), able=self.graphs)
            apart = index < len(batches) - 1
            with self.accelerator.no_sync(self.wrapped) if apart else contextlib.nullcontext():
                total += self.learn[own](batch, by)
        mean = float(self._sum(total))
        run.collect()
        norm = float(self.accelerator.clip_grad_norm_(run.parameters.values(), max_grad_norm)) if math.isfinite(mean) else math.nan
        if not math.isfinite(norm):
            what = "loss" if not math.isfinite(mean) else "gradient"
            raise InputError("lr", run.lr, f"a smaller one: the {what} is not finite at step {run.step + 1}")
        run.update([mean], tokens)

    def _learn(self, judge: _Judge, own: int, batch: dict[str, Any], targets: Tensor) -> Tensor:
        """A batch's part of the mean loss over so many targets, with its gradients."""
        with self.accelerator.autocast():
            loss = judge(self.wrapped, batch, own) / targets
            self.accelerator.backward(loss * self.world)  # gradients are averaged over processes
        return loss.detach()

    def save(self, run: Run) -> None:
        if self.accelerator.is_main_process:
            run.save()
        self.accelerator.wait_for_everyone()

    def _sum(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, "sum") if self.world > 1 else x


def _counts(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens that are predicted, and tokens that are no padding."""
    labels, mask = labels_of(batch), batch.get("attention_mask")
    if plain(batch):
        return labels.numel(), batch["input_ids"].numel()
    return int((labels != -100).sum()), batch["input_ids"].numel() if mask is None else int((mask != 0).sum())


@contextlib.contextmanager
def _engine(model: nn.Module, precision: str) -> Iterator[_Engine]:
    engine = _Engine(model, precision)
    try:
        yield engine
    finally:
        if engine.wrapped is not model:
            engine.accelerator.unwrap_model(engine.wrapped, keep_fp32_wrapper=False)
        engine.accelerator.free_memory()
