"""The recipe: AdamW, warm-up and cosine, mixup and cutmix, label smoothing, moving average of weights; all by timm.

Schedule and randomness are functions of the step alone, so that a run resumed from its weights is the run that was not stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subquad.checks import InputError

BETAS = (0.9, 0.999)
WARMUP_LR, LEAST_LR = 1e-2, 1e-2  # shares of the largest learning rate: where the warm-up begins, and where the cosine ends


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        epochs, batch_size: passes over the data, and images of a step; an incomplete last batch is left out.
        lr: the largest learning rate.
        weight_decay: of matrices and kernels; biases, norms and scales are spared.
        warmup: epochs in which the learning rate rises along a line.
        mixup, cutmix: the α of their Beta distributions; 0 for none. Of two, one is drawn for each batch.
        smoothing: share of the target that is spread over all classes.
        ema: decay of the moving average of weights, which is what is tested; it rises to this as 1 − step^(−2/3); 0 for none.
        clip: largest norm of the gradient.
        checkpointing: recompute each block in the backward pass, to save memory.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 1.0
    mixup: float = 0.2
    cutmix: float = 0.0
    smoothing: float = 0.1
    ema: float = 0.999
    clip: float = 1.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(name, repr(value), "a positive integer")
        bounds = {"lr": (0, math.inf), "clip": (0, math.inf)}
        for name, (low, high) in bounds.items():
            if not low < getattr(self, name) < high:
                raise InputError(name, getattr(self, name), "a finite number above 0")
        for name in ("weight_decay", "warmup", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(name, getattr(self, name), "a finite number of at least 0")
        for name in ("smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "at least 0 and less than 1")
        if self.warmup > self.epochs:
            raise InputError("warmup", self.warmup, f"at most the epochs, {self.epochs}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise InputError("batch_size", self.batch_size, "an even number: mixup mixes the images of a batch in pairs")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with timm's grouping: no decay of vectors, nor of what the model itself exempts."""
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, betas=BETAS)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch_steps: int) -> Any:
    """timm's cosine over all steps, after a warm-up; `step_update(t)` sets the rates of step t, counted from 0."""
    from timm.scheduler import CosineLRScheduler

    steps, warmup = recipe.epochs * epoch_steps, round(recipe.warmup * epoch_steps)
    least, first = recipe.lr * LEAST_LR, recipe.lr * WARMUP_LR
    return CosineLRScheduler(optimizer, max(steps, 2), lr_min=least, warmup_t=warmup, warmup_lr_init=first, t_in_epochs=False)


class Mixer:
    """Images and labels to mixed images and targets ``[B, classes]`` whose rows sum to 1."""

    def __init__(self, recipe: Recipe, classes: int) -> None:
        from timm.data.mixup import Mixup, mixup_target

        self.plain = lambda labels: mixup_target(labels, classes, smoothing=recipe.smoothing)
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            alphas = {"mixup_alpha": recipe.mixup, "cutmix_alpha": recipe.cutmix}
            self.mixup = Mixup(**alphas, label_smoothing=recipe.smoothing, num_classes=classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.mixup(images, labels) if self.mixup is not None else (images, self.plain(labels))


@contextlib.contextmanager
def seeded(seed: int, step: int) -> Iterator[None]:
    """Randomness of torch and of numpy (which timm's Mixup draws from) that depends on the seed and the step; left as it was."""
    drawn = (seed * 1_000_003 + step) % 2**32
    before = np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        try:
            yield
        finally:
            np.random.set_state(before)
