"""Images to train on, held whole as uint8 on the device, and batches of them that depend on the seed and the step alone.

>>> data = load("mnist", size=56)                      # or "digits", "cluttered-mnist", or a folder of folders of images
>>> data.images.shape, data.test_images.shape
(torch.Size([8000, 1, 56, 56]), torch.Size([2000, 1, 56, 56]))
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.checks import InputError, nearest
from subquad.models.progress import tracked

NAMES = ("mnist", "cluttered-mnist", "digits")
SIZES = {"mnist": 64, "cluttered-mnist": 64, "digits": 32}  # sides when none is asked for: room for backbones of stride 32
FOLDER_SIZE, SPLIT_SEED, TEST_SHARE = 224, 0, 0.2
MOST_BYTES = 16 * 2**30  # of a folder's images once decoded
PIECE, PIECES = 8, 8  # clutter: side of a piece of another digit, and how many


@dataclass(frozen=True)
class Images:
    """A data set.

    Args:
        name: how it was asked for.
        images, labels: to train on, uint8 ``[N, C, H, W]`` and int64 ``[N]``.
        test_images, test_labels: held out.
        classes: their names.
        mirror: whether an image may be mirrored; a digit may not.
    """

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mirror: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what a model sees."""
        c, h, w = self.images.shape[1:]
        return int(c), int(h), int(w)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of the training images, 0 … 1, ``[C, 1, 1]``."""
        count = self.images.numel() // self.images.shape[1]
        total = self.images.sum((0, 2, 3), dtype=torch.float64)
        squares = sum(part.double().square().sum((0, 2, 3)) for part in self.images.split(512))
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=1e-8).sqrt()
        return (mean / 255).float().view(-1, 1, 1), (deviation / 255).float().view(-1, 1, 1)

    @property
    def digest(self) -> str:
        """Tells data sets apart."""
        found = hashlib.sha256()
        for x in (self.images, self.labels, self.test_images, self.test_labels):
            found.update(f"{list(x.shape)} {x.sum(dtype=torch.int64)}".encode() + x.flatten()[::97].cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, device: torch.device | str) -> Images:
        moved = {key: getattr(self, key).to(device) for key in ("images", "labels", "test_images", "test_labels")}
        return replace(self, **moved)

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """A training batch ``[B, C, H, W]`` in 0 … 255: shifted by up to an eighth of the side at random, and mirrored where allowed."""
        x = self.images[indices.to(self.images.device)]
        batch, _, rows, columns = x.shape
        reach = max(1, rows // 8)
        down, right = torch.randint(2 * reach + 1, (2, batch), generator=generator).to(x.device)
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(x.device) & self.mirror
        x = F.pad(x, (reach, reach, reach, reach))
        across = torch.arange(columns, device=x.device).expand(batch, -1)
        across = torch.where(mirrored[:, None], columns - 1 - across, across) + right[:, None]
        along = torch.arange(rows, device=x.device) + down[:, None]
        one = torch.arange(batch, device=x.device)[:, None, None]
        return x[one, :, along[:, :, None], across[:, None, :]].permute(0, 3, 1, 2).float()


@dataclass(frozen=True)
class Cluttered(Images):
    """Digits at random places of a larger canvas, among pieces of other digits, composed anew for every batch.

    `images` are the digits ``[N, 1, 28, 28]``; `test_images` are canvases, made once. After the cluttered MNIST of Mnih, Heess, Graves,
    Kavukcuoglu: Recurrent Models of Visual Attention (arXiv 1406.6247), sec. 4.1.

    Args:
        side: of the canvas.
        pieces: of other digits, 8 × 8 each.
    """

    side: int = 64
    pieces: int = PIECES

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.side, self.side

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Of the canvases held out, as those for training do not exist until they are drawn."""
        return replace(Images(self.name, self.test_images, self.test_labels, self.test_images, self.test_labels, ())).statistics

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        return canvases(self.images[indices.to(self.images.device)], self.images, self.side, self.pieces, generator)


def canvases(digits: Tensor, pool: Tensor, side: int, pieces: int, generator: torch.Generator) -> Tensor:
    """Each digit ``[B, 1, 28, 28]`` somewhere on a canvas ``[B, 1, side, side]`` in 0 … 255, with 8 × 8 pieces of `pool`'s digits.

    Where things overlap, the brighter pixel shows. Places come from `generator`, which lives on the CPU, on every device alike.
    """
    batch, height = digits.shape[0], digits.shape[-1]
    device = digits.device

    def window(count: int, size: int, room: int) -> tuple[Tensor, Tensor]:
        """Rows ``[count, size, 1]`` and columns ``[count, 1, size]`` of windows at random places."""
        corner = torch.randint(room - size + 1, (2, count), generator=generator).to(device)
        span = torch.arange(size, device=device)
        return (corner[0, :, None] + span)[:, :, None], (corner[1, :, None] + span)[:, None, :]

    canvas = torch.zeros(batch * side * side, device=device)

    def place(patches: Tensor, owner: Tensor) -> None:
        rows, columns = window(len(patches), patches.shape[-1], side)
        at = (owner[:, None, None] * side + rows) * side + columns
        canvas.scatter_reduce_(0, at.flatten(), patches.float().flatten(), "amax")

    owner = torch.arange(batch, device=device)
    place(digits[:, 0], owner)
    if pieces:
        chosen = torch.randint(len(pool), (batch * pieces,), generator=generator).to(device)
        rows, columns = window(batch * pieces, PIECE, height)
        place(pool[:, 0][chosen[:, None, None], rows, columns], owner.repeat_interleave(pieces))
    return canvas.view(batch, 1, side, side)


# ---- loading -------------------------------------------------------------------------------------------------------


def load(name: str | Path, size: int | None = None, *, progress: bool = False) -> Images:
    """A data set by name, or a folder of images, split into a part to train on and one to test on, always the same.

    Args:
        name: "mnist" (10,000 digits that come with the package; 8,000 to train on), "cluttered-mnist" (the same among clutter), "digits"
            (scikit-learn's 1,797 of 8 × 8), or a folder with a folder of images per class, or with two such folders, ``train`` and ``val``.
        size: side of the images, which are resized to it (default: 64, 64, 32, and 224 for a folder).
        progress: a bar on terminals while a folder's images are read.

    Raises:
        InputError: an unknown name, a folder without classes or images, a size that is out of range, or a package that is missing.
    """
    text = str(name)
    side = size if size is not None else SIZES.get(text, FOLDER_SIZE)
    if type(side) is not int or not 8 <= side <= 1024:
        raise InputError("size", repr(size), "a side of 8 to 1024 pixels")
    if text in ("mnist", "cluttered-mnist"):
        return _mnist(text, side)
    if text == "digits":
        return _digits(side)
    if not Path(name).is_dir():
        if "/" in text or Path(name).exists():
            raise InputError("data", repr(text), "a folder of images, or one of: " + ", ".join(NAMES))
        raise nearest("data", text, NAMES, "data set, or a folder of images")
    return _folder(Path(name), side, progress)


def split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on, and `count` to test on, each class in the same share (to the nearest whole number), in random order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.bincount(labels)
    exact = sizes.double() * count / len(labels)
    take = exact.floor().long()
    rest = (exact - take).argsort(descending=True, stable=True)[: count - int(take.sum())]  # the largest remainders make up the sum
    take[rest] += 1
    kept, held = [], []
    for label, number in enumerate(take.tolist()):
        mine = (labels == label).nonzero()[:, 0]
        mine = mine[torch.randperm(len(mine), generator=generator)]
        held.append(mine[:number])
        kept.append(mine[number:])
    both = [torch.cat(part) for part in (kept, held)]
    first, second = (part[torch.randperm(len(part), generator=generator)] for part in both)
    return first, second


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 ``[N, C, H, W]`` at another size, without aliasing."""
    if images.shape[-2:] == (side, side):
        return images
    parts = (F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True) for x in images.split(1024))
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


def _mnist(name: str, side: int) -> Images:
    with resources.as_file(resources.files("subquad") / "data/mnist.npz") as path, np.load(path, allow_pickle=False) as file:
        images, labels = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()
    kept, held = split(labels, len(labels) // 5, SPLIT_SEED)
    classes = tuple(str(digit) for digit in range(10))
    if name == "mnist":
        images = resized(images, side)
        return Images(name, images[kept], labels[kept], images[held], labels[held], classes)
    if side < 32:
        raise InputError("size", side, "at least 32 for cluttered-mnist, whose digits of 28 × 28 are placed on it")
    return clutter(Images(name, images[kept], labels[kept], images[held], labels[held], classes), side, PIECES)


def clutter(digits: Images, side: int, pieces: int) -> Cluttered:
    """A data set of digits ``[N, 1, 28, 28]`` as one of cluttered canvases; those held out have pieces of digits that are held out."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    tests = canvases(digits.test_images, digits.test_images, side, pieces, generator).to(torch.uint8)
    return Cluttered(digits.name, digits.images, digits.labels, tests, digits.test_labels, digits.classes, side=side, pieces=pieces)


def _digits(side: int) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("data", "'digits', without scikit-learn", "scikit-learn installed: pip install scikit-learn") from None
    found: Any = load_digits()
    images = torch.from_numpy(found.images).float()[:, None]
    images = resized((images * 255 / 16).round().to(torch.uint8), side)
    labels = torch.from_numpy(found.target).long()
    kept, held = split(labels, len(labels) // 5, SPLIT_SEED)
    return Images("digits", images[kept], labels[kept], images[held], labels[held], tuple(str(digit) for digit in range(10)))


def _folder(root: Path, side: int, progress: bool) -> Images:
    """A folder in the layout of torchvision's ImageFolder, by timm's reader."""
    try:
        from timm.data.readers import create_reader
    except ImportError:
        raise InputError("data", f"{str(root)!r}, without timm", "timm installed: pip install 'subquad[convert]'") from None

    def read(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
        should = "a folder with a folder of images for each of two classes or more"
        try:
            reader: Any = create_reader("", str(folder))
        except (RuntimeError, OSError):
            raise InputError("data", f"{str(folder)!r}, in which no image is found", should) from None
        if len(reader.class_to_idx) < 2:
            raise InputError("data", f"{str(folder)!r}, with {len(reader.class_to_idx)} class", should)
        return list(reader.samples), tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.get))

    parts = (root / "train", next((root / n for n in ("val", "test", "validation") if (root / n).is_dir()), root / "val"))
    if parts[0].is_dir() != parts[1].is_dir():
        there, absent = (parts[0], parts[1]) if parts[0].is_dir() else (parts[1], parts[0])
        raise InputError("data", f"{str(root)!r}, with {there.name} and no {absent.name}", "both, or folders of classes alone")
    if parts[0].is_dir():
        (train, classes), (test, others) = read(parts[0]), read(parts[1])
        if classes != others:
            odd = sorted(set(classes) ^ set(others))[0]
            raise InputError(
                "data", f"{str(root)!r}, whose {parts[0].name} and {parts[1].name} differ in {odd!r}", "the same classes in both"
            )
    else:
        samples, classes = read(root)
        labels = torch.tensor([label for _, label in samples])
        kept, held = split(labels, max(1, int(len(samples) * TEST_SHARE)), SPLIT_SEED)
        train, test = ([samples[i] for i in part] for part in (kept.tolist(), held.tolist()))
    size = (len(train) + len(test)) * 3 * side**2
    if size > MOST_BYTES:
        raise InputError(
            "data", f"{len(train) + len(test)} images of {side} × {side}", f"at most {MOST_BYTES >> 30} GiB decoded; a smaller size"
        )
    read_all = torch.empty(len(train) + len(test), 3, side, side, dtype=torch.uint8)  # once, and not in pieces beside it
    for image, (path, _) in zip(read_all, tracked("reading images", [*train, *test], progress)):
        image.copy_(_read(path, side))
    arrays = read_all.split([len(train), len(test)])
    own, held_labels = (torch.tensor([label for _, label in part]) for part in (train, test))
    return Images(str(root), arrays[0], own, arrays[1], held_labels, classes, mirror=True)


def _read(path: str, side: int) -> Tensor:
    """An image file, its shorter side resized to `side` and its middle cut out, uint8 ``[3, side, side]``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("data", f"{path!r} ({error})", "image files that Pillow reads") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def order(count: int, batch: int, epoch: int, seed: int) -> Sequence[Tensor]:
    """The batches of an epoch, as indices: a permutation that the seed and the epoch decide; an incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)
