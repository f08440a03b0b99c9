"""RAVLT and MAViT: image backbones of four stages, linear attention on the fine grids and softmax on the coarse ones.

    image ─ stem /4 ─ stage 1 ─ /2 ─ stage 2 ─ /2 ─ stage 3 ─ /2 ─ stage 4 ─ 1×1, norm, swish, pool, classifier
                      linear         linear         softmax        softmax

The two differ in the linear attention, `rala` or `mala`, and in the width of the head.
Fan, Huang, He: Breaking the Low-Rank Dilemma of Linear Attention (arXiv 2411.07635).
Fan, Huang, Ai, He: Rectifying Magnitude Neglect in Linear Attention (arXiv 2507.00698).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, nearest, shape_of
from subquad.models.vision.blocks import Block, Head, Stage, init_weights, stem

STRIDE = 32  # of the last stage


@dataclass(frozen=True)
class Size:
    """A published size: one entry a stage, and the rate of stochastic depth that it was trained with."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    layer_scale: tuple[float, ...]
    drop_path_rate: float


@dataclass(frozen=True)
class Variant:
    """A published model: its size, the attention of its stages 1 and 2, and the width of its head."""

    size: Size
    linear: str
    head_width: int

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of `RAVLT`."""
        mechanisms = (self.linear, self.linear, "softmax", "softmax")
        return {**vars(self.size), "mechanisms": mechanisms, "head_width": self.head_width}


_T = Size((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), (1.0, 1.0, 1.0, 1.0), 0.1)
_S = Size((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), (1.0, 1.0, 1.0, 1.0), 0.15)
_B = Size((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), (1.0, 1.0, 1e-6, 1e-6), 0.4)
_L = Size((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), (1e-6, 1e-6, 1e-6, 1e-6), 0.55)

VARIANTS = {
    "ravlt_t": Variant(_T, "rala", 1024),
    "ravlt_s": Variant(_S, "rala", 1024),
    "ravlt_b": Variant(_B, "rala", 1024),
    "ravlt_l": Variant(_L, "rala", 1024),
    "mavit_t": Variant(_T, "mala", 2048),
    "mavit_s": Variant(_S, "mala", 2048),
    "mavit_b": Variant(_B, "mala", 2048),
    "mavit_l": Variant(_L, "mala", 2560),
}


class RAVLT(nn.Module):
    """RAVLT (arXiv 2411.07635) and, with ``mechanisms=("mala", "mala", "softmax", "softmax")``, MAViT (arXiv 2507.00698).

    >>> model = vision_model("ravlt_s")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    >>> model.forward_features(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 512, 7, 7])

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier: the model then returns ``[B, head_width]``.
        dims, depths, heads, layer_scale: width, blocks, heads and initial scale of the branches of each stage.
        mechanisms: each stage's attention, by the name it is registered under.
        mlp_ratio: width of the feed-forward layers over that of the stage.
        head_width: channels of the head's 1×1 convolution.
        drop_rate: dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; it rises linearly from 0 in the first.
        global_pool: "avg"; or "", with num_classes=0, for ``[B, head_width, H/32, W/32]``.

    Raises:
        InputError: sizes that do not fit each other, or an unknown mechanism.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = _T.dims,
        depths: Sequence[int] = _T.depths,
        heads: Sequence[int] = _T.heads,
        layer_scale: Sequence[float] = _T.layer_scale,
        mechanisms: Sequence[str] = ("rala", "rala", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        head_width: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        for name, values in (
            ("dims", dims),
            ("depths", depths),
            ("heads", heads),
            ("layer_scale", layer_scale),
            ("mechanisms", mechanisms),
        ):
            if len(values) != 4:
                raise InputError(name, values, "four values, one a stage")
        for dim, count in zip(dims, heads):
            if count < 1 or dim % (4 * count):
                raise InputError("heads", count, f"a divisor of {dim} / 4, so that the rotary turns pairs of a head's channels")
        if min(depths) < 1:
            raise InputError("depths", depths, "at least one block a stage")
        if not 0 <= drop_path_rate < 1:
            raise InputError("drop_path_rate", drop_path_rate, "a rate of at least 0 and less than 1")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features, self.head_hidden_size = dims[-1], head_width
        self.feature_info = [{"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"} for i, dim in enumerate(dims)]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stem = stem(in_chans, dims[0])
        self.stages = nn.Sequential()
        for i, (dim, depth) in enumerate(zip(dims, depths)):
            blocks = [Block(dim, heads[i], mechanisms[i], mlp_ratio, layer_scale[i], next(rates)) for _ in range(depth)]
            self.stages.append(Stage(dims[i - 1] if i else None, dim, blocks))
        self.head: Any = Head(dims[-1], head_width, num_classes, global_pool, drop_rate)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_chans, H, W]``; H and W at least 32. Raises InputError if they do not fit."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last stage's features ``[B, num_features, ⌈H/32⌉, ⌈W/32⌉]``."""
        return self.stages(self._embed(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`' result, or what the classifier would see: ``[B, head_width]``."""
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
        """Features of stages, ``[B, dim, ⌈H/s⌉, ⌈W/s⌉]`` with s = 4, 8, 16, 32.

        Args:
            indices: stages, from 0 (negative ones count from the last); a number n for the last n; None for all.
            norm: without effect, as no norm follows the stages.
            stop_early: run no stage after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone, not (last features, list).
        """
        if str(output_fmt) not in ("NCHW", "Format.NCHW"):
            raise InputError("output_fmt", repr(output_fmt), "'NCHW'")
        wanted, x, found = self._indices(indices), self._embed(images), {}
        for i, stage in enumerate(self.stages):
            if i > max(wanted) and (stop_early or intermediates_only):
                break
            x = found[i] = stage(x)
        features = [found[i] for i in wanted]
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Remove the stages after the last one of `indices`, and the head; returns the indices counted from 0."""
        wanted = self._indices(indices)
        self.stages = self.stages[: max(wanted) + 1]
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in the backward pass rather than keep its activations."""
        for stage in self.stages.children():
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """No names: what is commonly spared, biases, norms and scales, are vectors, which timm's optimizers spare anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm groups parameters for learning rates by depth."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks}

    def _embed(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_chans or not images.is_floating_point():
            raise InputError("images", shape_of(images), f"floating-point images [B, {self.in_chans}, H, W]")
        if min(images.shape[2:]) < STRIDE:
            raise InputError("images", shape_of(images), f"at least {STRIDE} rows and columns, the total stride")
        return self.stem(images.contiguous(memory_format=torch.channels_last))

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if indices is None or isinstance(indices, int):
            indices = range(-(count if indices is None else indices), 0)
        if not indices or not all(-count <= i < count for i in indices):
            raise InputError("indices", indices, f"stages of 0 … {count - 1}, or a number of last stages up to {count}")
        return [i % count for i in indices]


def vision_model(name: str, **options: Any) -> RAVLT:
    """A published RAVLT or MAViT, randomly initialised; `options` of `RAVLT` replace its own. timm is not needed.

    >>> vision_model("mavit_t", num_classes=10, drop_path_rate=0.0)

    Raises:
        InputError: an unknown name (with the nearest ones), or options that do not fit.
    """
    if name not in VARIANTS:
        raise nearest("name", name, VARIANTS, "vision model")
    return RAVLT(**{**VARIANTS[name].options, **options})
