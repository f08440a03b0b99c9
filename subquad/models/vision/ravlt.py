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
from typing import Any, ClassVar

from torch import nn

from subquad.checks import InputError
from subquad.models.vision.backbone import Backbone
from subquad.models.vision.blocks import Block, Head, Stage, conv_norm, init_weights, stem


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


class RAVLT(Backbone):
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

    block: ClassVar[type[Block]] = Block

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
        per_stage = {"heads": heads, "layer_scale": layer_scale, "mechanisms": mechanisms}
        super().__init__(in_chans, num_classes, drop_path_rate, dims=dims, depths=depths, **per_stage)
        for dim, count in zip(dims, heads):
            if count < 1 or dim % (4 * count):
                raise InputError("heads", count, f"a divisor of {dim} / 4, so that the rotary turns pairs of a head's channels")
        self.head_hidden_size = head_width
        self.stem = stem(in_chans, dims[0])
        self.stages = nn.Sequential()
        for i, dim in enumerate(dims):
            down = nn.Sequential(*conv_norm(dims[i - 1], dim, 2)) if i else nn.Identity()
            blocks = [self.block(dim, heads[i], mechanisms[i], mlp_ratio, layer_scale[i], rate) for rate in self.rates[i]]
            self.stages.append(Stage(down, blocks, dim // heads[i]))
        self.head = Head(dims[-1], head_width, num_classes, global_pool, drop_rate)
        self.init_weights()

    def init_weights(self) -> None:
        self.apply(init_weights)
