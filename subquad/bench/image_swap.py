"""What a change of attention gains and loses in an image model: `subquad swap` on a ViT, DeiT or Swin of timm or transformers.

    for each size: the original resized (positions interpolated) → measure → for each mechanism: swap, measure, restore

cosine = mean over tokens and images of f · f′ / (‖f‖ ‖f′‖), where f and f′ are what a token is after the last layer, in the original
and in the swapped model. Nothing is trained: it tells how far a mechanism is from the model's own attention before anything is taught.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad.bench import machine
from subquad.bench.choice import Choice, check_choices, dtype_of, parse_layers, pick_device
from subquad.bench.flops import flops
from subquad.bench.folder import check_new
from subquad.bench.image_report import At, ImageReport, ImageRow
from subquad.bench.images import Pair, find_images, load_image_model, own_sides, read_image, weights_words
from subquad.bench.mechanisms import measure
from subquad.bench.progress import Advance, bar
from subquad.bench.speed import parameters
from subquad.checks import InputError
from subquad.convert.size import resize
from subquad.convert.swap import find_host, restore, swap, swapped
from subquad.files import writing
from subquad.models.load import one_line

ORIGINAL = "softmax (original)"
ROUNDS = 3


@dataclass(frozen=True)
class ImageJob:
    """What to do.

    Args:
        model: what `load_image_model` takes, with `weights` and `pretrained`.
        to: the mechanisms, with options.
        images: files and folders; none are the photographs that scikit-learn carries.
        sizes: rows and columns of the images, each measured; none is the model's own.
        layers: as `--layers` takes it, without auto.
        scope: of a Swin, "image" or "window"; None is the model's default.
        batch: images at once when time and memory are measured.
        budget: seconds to repeat a measurement for.
    """

    model: str
    to: tuple[Choice, ...]
    images: tuple[Path, ...] = ()
    sizes: tuple[Pair, ...] = ()
    layers: str = "all"
    scope: str | None = None
    weights: Path | None = None
    pretrained: bool = False
    batch: int = 1
    device: str | None = None
    dtype: str = "float32"
    seed: int = 0
    budget: float = 1.0

    def put(self, model: nn.Module, choice: Choice) -> None:
        """A mechanism into a model, with the same new parameters each time."""
        torch.manual_seed(self.seed)
        where = {} if self.scope is None else {"scope": self.scope}
        swap(model, choice.name, layers=parse_layers(self.layers), **choice.options, **where)


def run_image_job(job: ImageJob, out: Path | None = None, *, command: str = "", progress: bool = False) -> ImageReport:
    """Measure all, and return the report, written to `out` if that is given.

    Raises:
        InputError: anything that does not fit; nothing has been written then.
    """
    device, dtype = _check(job), dtype_of(job.dtype)
    if out is not None:
        check_new("--out", out)
    files, sizes = find_images(job.images), job.sizes or (own_sides(job.model),)
    pixels = [torch.stack([read_image(file, sides) for file in files]) for sides in sizes]
    model, (mean, deviation) = load_image_model(job.model, weights=job.weights, pretrained=job.pretrained)
    model = model.to(device, dtype)
    layers = _try(job, model, sizes)
    report = ImageReport(_about(job, files, sizes, device, command), [ImageRow(ORIGINAL, f"0 of {len(find_host(model).sites)}")])
    report.rows += [ImageRow(choice.label, count) for choice, count in zip(job.to, layers)]
    rounds = len(sizes) * ROUNDS * len(report.rows)
    with bar("measure", rounds, show=progress) as advance:
        for sides, x in zip(sizes, pixels):
            one = resize(copy.deepcopy(model), sides)  # from the model's own size each time
            _measure(job, report.rows, one, ((x - mean) / deviation).to(device, dtype), sides, advance)
    if out is not None:
        with writing("--out", out):
            report.save(out)
    return report


def _check(job: ImageJob) -> str:
    """Everything that can be known to be wrong before anything heavy is done; returns the device."""
    check_choices(job.to)
    if job.layers.strip().startswith("auto"):
        raise InputError("--layers", repr(job.layers), "all, a ratio such as 3:1, or indices: layers of image models are not compared here")
    parse_layers(job.layers)
    if len(set(job.sizes)) < len(job.sizes):
        raise InputError("--size", ", ".join(f"{rows}x{columns}" for rows, columns in job.sizes), "each size once")
    if job.batch < 1:
        raise InputError("--batch", job.batch, "at least 1")
    if not -(2**63) <= job.seed < 2**63:
        raise InputError("--seed", job.seed, "an integer of 64 bits")
    return pick_device(job.device)


def _try(job: ImageJob, model: nn.Module, sizes: Sequence[Pair]) -> list[str]:
    """Put every mechanism in and take it out again, and try every size: what does not fit shows at once.

    Returns layers swapped, of how many.
    """
    find_host(model)
    first = next(model.parameters())
    for sides in sizes:
        try:
            features(resize(copy.deepcopy(model), sides), torch.zeros(1, 3, *sides, dtype=first.dtype, device=first.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError("--size", f"{sides[0]} × {sides[1]}", f"images that {job.model} takes ({one_line(error)})") from None
    found = []
    for choice in job.to:
        job.put(model, choice)
        found.append(f"{len(swapped(model))} of {len(find_host(model).sites)}")
        restore(model)
    return found


@torch.no_grad()
def features(model: Any, pixels: Tensor) -> Tensor:
    """What each token is after the last layer and its norm, ``[B, N, C]`` in float32 or wider, of images ``[B, C, H, W]`` one at a time."""
    found = []
    for one in pixels.split(1):
        x = model.forward_features(one) if hasattr(model, "forward_features") else model.base_model(one).last_hidden_state
        found.append(x.flatten(1, -2) if x.dtype == torch.float64 else x.flatten(1, -2).float())
    return torch.cat(found)


def cosine(found: Tensor, original: Tensor) -> float | None:
    """Mean cosine of the tokens ``[B, N, C]`` of two models; None if a feature is not finite."""
    mean = float(F.cosine_similarity(found.double(), original.double(), dim=-1).mean())
    return mean if math.isfinite(mean) else None


def _measure(job: ImageJob, rows: Sequence[ImageRow], model: nn.Module, pixels: Tensor, sides: Pair, advance: Advance) -> None:
    """Add to each row what is measured at one size. The rows are timed in turn, several times: a busy moment shall not hit one alone."""
    too_large = InputError("--size", f"{sides[0]} × {sides[1]} in batches of {job.batch}", "what fits into memory")
    try:
        batch, original = pixels.repeat(-(-job.batch // len(pixels)), 1, 1, 1)[: job.batch], features(model, pixels)
    except (MemoryError, RuntimeError) as error:  # as a CPU's allocator says it
        if "memory" in str(error):
            raise too_large from None
        raise

    @torch.no_grad()
    def forward() -> None:
        model(batch)

    for turn in range(ROUNDS):
        for row, choice in zip(rows, (None, *job.to)):
            if choice is not None:
                job.put(model, choice)
            try:
                spent = measure(forward, pixels.device, budget=job.budget / ROUNDS) / job.batch
                if turn:
                    row.at[-1] = replace(row.at[-1], ms=min(spent, row.at[-1].ms))
                else:
                    peak, adds = machine.peak_bytes(forward, pixels.device), flops(model, sides).total
                    row.at.append(At(sides, parameters(model), spent, peak, adds, cosine(features(model, pixels), original)))
            except (torch.OutOfMemoryError, MemoryError):
                raise too_large from None
            finally:
                if choice is not None:
                    restore(model)
            advance()


def _about(job: ImageJob, files: Sequence[Path], sizes: Sequence[Pair], device: str, command: str) -> dict[str, str]:
    return {
        "model": job.model,
        "weights": weights_words(job.model, job.weights, job.pretrained),
        "images": ", ".join(file.name for file in files),
        "sizes": ", ".join(f"{rows} × {columns}" for rows, columns in sizes),
        "batch": f"{job.batch}, for time and memory",
        "layers": job.layers + ("" if job.scope is None else f", scope {job.scope}"),
        "device": f"{machine.device_name(device)}, {job.dtype}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        "commit": machine.commit() or "not run from a checkout",
        "command": command or "run_image_job()",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
