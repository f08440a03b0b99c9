"""The training loop: resumable at any step, and the same run then as without the stop.

    for step:  batch = order(seed, epoch)[step];  draw, mix, autocast, loss, backward, clip, AdamW, moving average
    after each epoch: test the averaged weights; save

A checkpoint holds weights, their average, the optimizer's moments and the history, as tensors in one safetensors file; all else follows
from the step. It is written after each epoch, and when the user interrupts.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.convert.checkpoint import Checkpoint, Checkpoints
from subquad.train.engine import make_engine
from subquad.train.images import Images, order
from subquad.train.recipe import Mixer, Recipe, make_optimizer, make_schedule, seeded

HISTORY = ("loss", "lr", "test_loss", "accuracy")  # of each epoch: means over its steps, the last step's rate, and the test
TEST_BATCH = 256


@dataclass
class Result:
    """How a run went, what was done before an interruption included.

    Args:
        accuracy, test_loss: on the images held out, after the last epoch, of the averaged weights (of the plain ones with ``ema=0``).
        history: of each epoch, `HISTORY` by name.
        steps: of which `resumed_from` were made before this call.
        seconds: of training, tests left out.
        starts, start_seconds: first steps, of which a resumed run has several, and their part of `seconds`: they compile and warm up.
    """

    accuracy: float
    test_loss: float
    history: list[dict[str, float]]
    steps: int
    seconds: float
    resumed_from: int = 0
    starts: int = 0
    start_seconds: float = 0.0


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    *,
    seed: int = 0,
    device: str = "cpu",
    precision: str | None = None,
    engine: str = "accelerate",
    out: str | Path | None = None,
    identity: dict[str, Any] | None = None,
    advance: Callable[[int, str], None] | None = None,
) -> Result:
    """Train a classifier, in place; it ends with the weights that were tested: the averaged ones, unless ``ema=0``.

    >>> train(model, load("mnist", 28), Recipe(epochs=3), seed=1, out="runs/first").history[-1]["accuracy"]

    Args:
        model: takes ``[B, C, H, W]`` of `data.shape`, gives ``[B, classes]``; see `subquad.train.models.build`.
        seed: of the order of the data, of augmentation and mixing, and of the model's own randomness: two models see the same batches.
        precision: "float32" or "bfloat16" (autocast); the default is bfloat16 on CUDA.
        engine: "accelerate" or "torch".
        out: folder of checkpoints. The same call, made again after an interruption, goes on; made after the end, it gives the result again.
        identity: what else makes two runs the same, in `out`.
        advance: called after each step, with the steps made and words on how it goes.

    Raises:
        InputError: fewer images than a batch, a loss that is not finite, or an `out` that belongs to another run.
        KeyboardInterrupt: after the step at which the user interrupted has been made, and saved.
    """
    if len(data.labels) < recipe.batch_size:
        raise InputError("batch_size", recipe.batch_size, f"at most the images to train on, {len(data.labels)}")
    run = Run(model, data, recipe, seed, device, precision, engine, out, identity or {})
    with _interruptible() as stopped:
        while run.step < run.steps:
            words = run.advance()
            if advance is not None:
                advance(run.step, words)
            if run.step % run.epoch_steps == 0:
                run.finish_epoch()
            elif stopped.is_set():
                run.save()
            if stopped.is_set() and run.step < run.steps:
                raise KeyboardInterrupt
    return run.result()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An interrupt (Ctrl-C) sets the event rather than stop in the middle of a step; a second one stops at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stopped.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """Where a run stands."""

    def __init__(
        self, model: nn.Module, data: Images, recipe: Recipe, seed: int, device: str, precision: str | None, engine: str,
        out: str | Path | None, identity: dict[str, Any],
    ) -> None:  # fmt: skip
        from timm.loss import SoftTargetCrossEntropy
        from timm.utils import ModelEmaV3

        self.recipe, self.seed, self.raw = recipe, seed, model
        self.epoch_steps = len(data.labels) // recipe.batch_size
        self.steps = recipe.epochs * self.epoch_steps
        settings = {**identity, **asdict(recipe), "seed": seed, "data": data.digest, "precision": precision or "default"}
        self.keeper = None if out is None else Checkpoints(out, settings, self.steps, take_finished=True)
        self.engine = make_engine(engine, device, precision)
        self.device = self.engine.device
        self.data = data.to(self.device)
        self.mean, self.deviation = (255 * x.to(self.device) for x in self.data.statistics)
        _checkpoint_blocks(model, recipe.checkpointing)
        model.to(self.device).train()
        # Made before the engine wraps the model's forward, which a copy would share.
        self.ema = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.epoch_steps)
        self.model, self.stepper = self.engine.prepare(model, self.optimizer)
        self.mix, self.loss = Mixer(recipe, len(data.classes)), SoftTargetCrossEntropy()
        self.step, self.resumed_from, self.seconds = 0, 0, 0.0
        self.starts, self.start_seconds = 0, 0.0
        self.history: list[list[float]] = []
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)  # of this epoch's losses
        self.batches: tuple[int, Any] = (-1, ())
        saved = None if self.keeper is None else self.keeper.load()
        if saved is not None:
            self._resume(saved)

    def advance(self) -> str:
        """One step; gives words on how it went."""
        began = time.perf_counter()
        epoch, place = divmod(self.step, self.epoch_steps)
        if self.batches[0] != epoch:
            self.batches = (epoch, order(len(self.data.labels), self.recipe.batch_size, epoch, self.seed))
        indices = self.batches[1][place]
        with seeded(self.seed, self.step):
            images = self.data.draw(indices, torch.Generator().manual_seed(self.seed * 1_000_003 + self.step))
            images, targets = self.mix((images - self.mean) / self.deviation, self.data.labels[indices.to(self.device)])
            self.schedule.step_update(self.step)
            with self.engine.autocast():
                logits = self._logits(images)
            loss = self.loss(logits.float(), targets)
            self.engine.backward(loss)
        self.engine.clip(self.model, self.recipe.clip)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.raw, step=self.step)
        self.total += loss.detach()
        first = self.step == self.resumed_from + 1
        if first and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what the first step still has to do is not the second's
        seconds = time.perf_counter() - began
        self.seconds += seconds
        if first:
            self.starts, self.start_seconds = self.starts + 1, self.start_seconds + seconds
        return f"epoch {epoch + 1}/{self.recipe.epochs}" + (f", accuracy {self.history[-1][3]:.1%}" if self.history else "")

    def _logits(self, images: Tensor) -> Tensor:
        try:
            return self.model(images)  # type: ignore[no-any-return]
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            should = "a larger one, or larger images: a batch norm has a single number of each channel to average"
            raise InputError("batch_size", self.recipe.batch_size, should) from None

    def finish_epoch(self) -> None:
        """Test, note, save. The loss is read here only, as every reading waits for the device."""
        began = time.perf_counter()
        mean = float(self.total) / self.epoch_steps
        self.seconds += time.perf_counter() - began  # what the device still had to do
        if not math.isfinite(mean):
            raise InputError("lr", self.recipe.lr, f"a smaller one: the loss is not finite in epoch {self.step // self.epoch_steps}")
        test_loss, accuracy = evaluate(self.tested, self.data.test_images, self.data.test_labels, self.mean, self.deviation, self.engine)
        self.history.append([mean, float(self.optimizer.param_groups[0]["lr"]), test_loss, accuracy])
        self.total.zero_()
        self.save()

    @property
    def tested(self) -> nn.Module:
        return self.raw if self.ema is None else self.ema.module

    def save(self) -> None:
        if self.keeper is None:
            return
        tensors = {f"model.{name}": x for name, x in self.raw.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": x for name, x in self.ema.module.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": x for key, x in state.items()}
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY))
        tensors["total"] = self.total
        tensors["starts"] = torch.tensor([self.starts, self.start_seconds], dtype=torch.float64)
        whole = {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}  # tensors that share memory cannot be saved
        self.keeper.save(Checkpoint(self.step, whole, self.seconds))

    def _resume(self, saved: Checkpoint) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in saved.tensors.items() if name.startswith(prefix)}

        try:
            self.raw.load_state_dict(part("model."))
            if self.ema is not None:
                self.ema.module.load_state_dict(part("ema."))
        except RuntimeError:
            raise InputError("out", "weights of another model", "a folder of the same run, or a new one") from None
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in part("optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = x
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = self.resumed_from = saved.step
        self.seconds = saved.seconds
        self.history = saved.tensors["history"].tolist()
        self.total.copy_(saved.tensors["total"])
        starts, self.start_seconds = saved.tensors["starts"].tolist()
        self.starts = int(starts)

    def result(self) -> Result:
        if self.ema is not None:
            self.raw.load_state_dict(self.ema.module.state_dict())
        history = [dict(zip(HISTORY, row)) for row in self.history]
        last = history[-1]
        spent = self.seconds, self.resumed_from, self.starts, self.start_seconds
        return Result(last["accuracy"], last["test_loss"], history, self.step, *spent)


def _checkpoint_blocks(model: Any, wanted: bool) -> None:
    if wanted and not hasattr(model, "set_grad_checkpointing"):
        raise InputError("checkpointing", f"{type(model).__name__}, which cannot recompute blocks", "a model of timm that can, or none")
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(wanted)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor, engine: Any) -> tuple[float, float]:
    """Cross-entropy and accuracy on uint8 images ``[N, C, H, W]``; `mean` and `deviation` on their scale, 0 … 255."""
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    right = torch.zeros((), dtype=torch.long, device=images.device)
    for x, y in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH)):
        with engine.autocast():
            logits = model((x.float() - mean) / deviation).float()
        loss += nn.functional.cross_entropy(logits, y, reduction="sum")
        right += (logits.argmax(1) == y).sum()
    model.train(training)
    return float(loss) / len(labels), float(right) / len(labels)
