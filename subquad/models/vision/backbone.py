"""What a whole network does, whatever it is made of: timm's conventions on logits, features, classifier and recomputing.

`Backbone` has four stages, each on half the grid of the one before; `PlainBackbone` has one grid of patches throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad.checks import InputError, autocasts, shape_of
from subquad.models.vision.blocks import Classifier, PadTo, recomputed


def image_sides(img_size: int | Sequence[int], least: int) -> tuple[int, int]:
    """Rows and columns of images of a size, a side or both. Raises InputError if it is none, or below `least`."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size) if isinstance(img_size, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
        raise InputError("img_size", repr(img_size), f"an integer of at least {least}, or two, for rows and columns")
    return sides[0], sides[1]


class ImageModel(nn.Module):
    """Parts in a row, stages or blocks, of which features can be had, and a head.

    A subclass has the parts under the name `unit`, and `head`, a `Classifier`.

    Args:
        in_chans, num_classes: channels of the images, and classes.
        drop_path_rate: of stochastic depth in the last block; `rates` has each block's, part by part, rising linearly from 0.
        depths: blocks of each part.

    Raises:
        InputError: no channels, or a rate that is not one.
    """

    unit: ClassVar[str]
    least: int  # rows and columns of an image
    stem: Any
    head: Any

    def __init__(self, in_chans: int, num_classes: int, drop_path_rate: float, depths: Sequence[int]) -> None:
        super().__init__()
        if type(in_chans) is not int or in_chans < 1:
            raise InputError("in_chans", repr(in_chans), "a positive integer")
        if not 0 <= drop_path_rate < 1:
            raise InputError("drop_path_rate", drop_path_rate, "a rate of at least 0 and less than 1")
        self.in_chans, self.num_classes = in_chans, num_classes
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.rates = [[next(rates) for _ in range(depth)] for depth in depths]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_chans, H, W]``; H and W at least `least`. Raises InputError if they do not fit."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """What the head takes."""
        x, given = self._embed(images), self._given(images)
        for part in getattr(self, self.unit):
            x = self._step(part, x, *given)
        return self._last(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' result, or what the classifier would see: ``[B, head_hidden_size]``."""
        return self.head(features, pre_logits)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of stages ``[B, dim, ⌈H/s⌉, ⌈W/s⌉]`` with s = 4, 8, 16, 32; or of blocks, with s the patch size.

        Args:
            indices: stages or blocks, from 0 (negative ones count from the last); a number n for the last n; None for all.
            norm: of blocks, apply the norm before the head; without effect on stages.
            stop_early: run nothing after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone, not (last features, list).
        """
        if str(output_fmt) not in ("NCHW", "Format.NCHW"):
            raise InputError("output_fmt", repr(output_fmt), "'NCHW'")
        wanted, x, given, found = self._indices(indices), self._embed(images), self._given(images), {}
        for i, part in enumerate(getattr(self, self.unit)):
            if i > max(wanted) and (stop_early or intermediates_only):
                break
            x = found[i] = self._step(part, x, *given)
        features = [self._as_map(found[i], images, norm) for i in wanted]
        return features if intermediates_only else (self._last(x), features)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove what comes after the last one of `indices`, and the head; returns the indices counted from 0."""
        wanted = self._indices(indices)
        setattr(self, self.unit, getattr(self, self.unit)[: max(wanted) + 1])
        if prune_head:
            self.head = nn.Identity()
        return wanted

    def get_classifier(self) -> nn.Module:
        """The linear layer to the classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place; 0 for none."""
        self.head.reset(num_classes, self.head.global_pool if global_pool is None else global_pool)
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """No names: what is commonly spared, biases, norms and scales, are vectors, which timm's optimizers spare anyway."""
        return set()

    def _embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define _embed()")

    def _given(self, images: Tensor) -> tuple[Any, ...]:
        """What every part takes beside the features."""
        return ()

    def _step(self, part: nn.Module, x: Tensor, *given: Any) -> Tensor:
        return part(x, *given)

    def _last(self, x: Tensor) -> Tensor:
        return x

    def _as_map(self, x: Tensor, images: Tensor, norm: bool) -> Tensor:
        return x

    def _check_images(self, images: Tensor) -> None:
        should = f"floating-point images [B, {self.in_chans}, H, W]"
        if not isinstance(images, Tensor):
            raise InputError("images", type(images).__name__, should)
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise InputError("images", shape_of(images), should)
        if not images.is_floating_point():
            raise InputError(
                "images", shape_of(images), f"{should}, normalised: of bytes, images.float() / 255 less a mean, over a deviation"
            )
        weights = next(self.stem.parameters()).dtype
        if images.dtype != weights and (images.dtype == torch.float64 or not autocasts(images)):
            raise InputError(
                "images", shape_of(images), f"images of the weights' dtype, {str(weights).removeprefix('torch.')}, or autocast"
            )
        if min(images.shape[2:]) < self.least:
            raise InputError("images", shape_of(images), f"at least {self.least} rows and columns, the total stride")

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(getattr(self, self.unit))
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if not indices or not all(-count <= i < count for i in indices):
            raise InputError("indices", indices, f"{self.unit} of 0 … {count - 1}, or a number of last {self.unit} up to {count}")
        return [i % count for i in indices]


class Backbone(ImageModel):
    """A stem of stride 4, four stages, of which the last three halve the grid, and a head.

    A subclass calls this and then makes `stem` and `stages`, which take and give ``[B, C, H, W]``, and `head`. What the head takes is
    ``[B, num_features, ⌈H/32⌉, ⌈W/32⌉]``.

    Args:
        dims, depths: width and blocks of each stage.
        more: what else has one value a stage, by name.

    Raises:
        InputError: sizes that do not fit.
    """

    unit = "stages"
    least = 32
    stages: Any

    def __init__(
        self,
        in_chans: int,
        num_classes: int,
        drop_path_rate: float,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        **more: Sequence[Any],
    ) -> None:
        for name, values in {"dims": dims, "depths": depths, **more}.items():
            if len(values) != 4:
                raise InputError(name, values, "four values, one a stage")
        if min(depths) < 1:
            raise InputError("depths", depths, "at least one block a stage")
        super().__init__(in_chans, num_classes, drop_path_rate, depths)
        self.num_features = dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"} for i, dim in enumerate(dims)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in the backward pass rather than keep its activations."""
        for stage in self.stages.children():
            stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters for learning rates by depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    def _embed(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return self.stem(images.contiguous(memory_format=torch.channels_last))


class TokenClassifier(Classifier):
    """Average of the tokens, dropout, classifier: ``[B, T, C]`` to ``[B, classes]``."""

    pools: ClassVar = {"avg": lambda x: x.mean(1), "": lambda x: x}

    def prepare(self, x: Tensor) -> Tensor:
        return x


class ClassTokenClassifier(TokenClassifier):
    """The class token, or the average of the others; dropout, classifier: ``[B, 1 + T, C]`` to ``[B, classes]``."""

    pools: ClassVar = {"token": lambda x: x[:, 0], "avg": lambda x: x[:, 1:].mean(1), "": lambda x: x}


class PlainBackbone(ImageModel):
    """Patches as tokens, `depth` blocks that keep their grid, a norm, and a head.

    A subclass calls this and then makes `blocks`, which take tokens ``[B, T, C]`` and what `_given` has, the grid (rows, columns) of the
    last rows × columns of them, `norm` and `head`; it may extend `_tokens` and `_given`. Images are extended by zeros to whole patches.
    What the head takes is ``[B, T, C]``.

    Args:
        dim, depth: width and number of blocks.
        patch_size: side of a patch in pixels.
        extra: tokens before those of the grid, such as a class token.

    Raises:
        InputError: sizes that do not fit.
    """

    unit = "blocks"
    blocks: Any
    norm: Any

    def __init__(
        self, in_chans: int, num_classes: int, drop_path_rate: float, *, dim: int, depth: int, heads: int, patch_size: int, extra: int = 0
    ) -> None:
        for name, value in (("depth", depth), ("patch_size", patch_size)):
            if type(value) is not int or value < 1:
                raise InputError(name, repr(value), "a positive integer")
        if heads < 1 or dim % heads:
            raise InputError("heads", heads, f"a divisor of {dim}, the width")
        super().__init__(in_chans, num_classes, drop_path_rate, [1] * depth)
        self.least = self.patch_size = patch_size
        self.extra = extra
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]
        self.stem = nn.Sequential(PadTo(patch_size), nn.Conv2d(in_chans, dim, patch_size, patch_size))
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in the backward pass rather than keep its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters for learning rates by depth."""
        return {"stem": r"^(?:stem|cls_token|pos_embed|position)", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return -(-images.shape[2] // self.patch_size), -(-images.shape[3] // self.patch_size)

    def _embed(self, images: Tensor) -> Tensor:
        self._check_images(images)
        return self._tokens(self.stem(images).flatten(2).mT, self.grid(images))

    def _tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches ``[B, rows · columns, C]`` with positions, and with extra tokens before them."""
        return x

    def _given(self, images: Tensor) -> tuple[Any, ...]:
        return (self.grid(images),)

    def _step(self, part: nn.Module, x: Tensor, *given: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return recomputed(part, x, *given)
        return part(x, *given)

    def _last(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _as_map(self, x: Tensor, images: Tensor, norm: bool) -> Tensor:
        x = self.norm(x) if norm else x
        return x[:, self.extra :].mT.unflatten(2, self.grid(images))
