"""L²ViT: softmax attention in windows and linear attention over the whole image, in turn.

    image ─ stem /4 ─ stage 1 ─ /2 ─ stage 2 ─ /2 ─ stage 3 ─ /2 ─ stage 4 ─ LN, pool, classifier
                      local, global, local, global, … in every stage

    local    x += DW3×3(x);   x += WindowAttention(LN(x));   x += DW3×3(x);                          x += FFN(LN(x))
    global   x += DW3×3(x);   x += LinearAttention(LN(x));   x += LocalConcentration(LN(x));         x += FFN(LN(x))

Positions are known from the depth-wise convolutions alone. Blocks and what is in them take ``[B, rows, columns, C]``.
Zheng: The Linear Attention Resurrection in Vision Transformer (arXiv 2501.16182), details as in the author's code (ChuanyangZheng/L2ViT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import attention
from subquad.models.vision.backbone import Backbone
from subquad.models.vision.blocks import ChannelNorm, DepthwiseConv, DropPath, NormHead, PadTo, Stage, feed_forward, init_weights

# Options of `L2ViT` for each size. No rate of stochastic depth is published for T and S; the code's default is 0.
_T: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "drop_path_rate": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "l2vit_t": _T,
    "l2vit_s": {**_T, "depths": (2, 2, 18, 2)},
    "l2vit_b": {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "drop_path_rate": 0.3},
}


class Attend(nn.Module):
    """A mechanism between its projections, over all tokens of ``[B, rows, columns, C]``."""

    def __init__(self, dim: int, heads: int, mechanism: str, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attend = attention(mechanism, heads, dim // heads, **options)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, _ = x.shape
        qkv = self.qkv(x).reshape(batch, rows * columns, 3, self.attend.heads, self.attend.head_dim)
        return self.proj(self.attend(*qkv.unbind(2), grid=(rows, columns)).reshape(x.shape))


class WindowAttend(Attend):
    """Softmax attention in windows of ``window × window`` tokens that do not overlap, without shift or mask.

    A grid that they do not fit is extended by zeros to the right and at the bottom. These tokens are attended to, as in the author's
    code: their keys and values are the projection's biases.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads, "softmax", causal=False)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, dim = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -columns % side, 0, -rows % side))
        down, across = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(batch, down, side, across, side, dim).transpose(2, 3)
        x = super().forward(x.reshape(-1, side, side, dim))
        x = x.reshape(batch, down, across, side, side, dim).transpose(2, 3)
        return x.reshape(batch, down * side, across * side, dim)[:, :rows, :columns]


class LocalConcentration(nn.Module):
    """Depth-wise 7×7 convolution, GELU, batch norm, depth-wise 7×7 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = DepthwiseConv(dim, 7)
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = DepthwiseConv(dim, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.conv1(x)).permute(0, 3, 1, 2)
        return self.conv2(self.norm(x).permute(0, 2, 3, 1))


class LocalBlock(nn.Module):
    """Window attention between two depth-wise 3×3 convolutions, then feed-forward."""

    def __init__(self, dim: int, heads: int, window: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.position = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttend(dim, heads, window)
        self.position2 = DepthwiseConv(dim, 3)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.position2(x)
        return x + self.drop_path(self.ffn(self.norm2(x)))


class GlobalBlock(nn.Module):
    """Linear attention over the whole grid, then local concentration and feed-forward."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.position = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attend(dim, heads, "l2vit")
        self.norm3 = nn.LayerNorm(dim)
        self.local = LocalConcentration(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = feed_forward(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class L2ViT(Backbone):
    """L²ViT (arXiv 2501.16182).

    >>> model = vision_model("l2vit_t")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    >>> model.forward_features(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 768, 7, 7])

    The linear attention divides by a sum over tokens that is at least 100, so its function depends on the size of the image.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier: the model then returns ``[B, dims[-1]]``.
        dims, depths, heads: width, blocks and heads of each stage.
        window: side of the local blocks' windows; published: 7, and 12 for images of 384 × 384.
        mlp_ratio: width of the feed-forward layers over that of the stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; it rises linearly from 0 in the first.
        global_pool: "avg"; or "", with num_classes=0, for ``[B, dims[-1], ⌈H/32⌉, ⌈W/32⌉]``.

    Raises:
        InputError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        dims: Sequence[int] = _T["dims"],
        depths: Sequence[int] = _T["depths"],
        heads: Sequence[int] = _T["heads"],
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(in_chans, num_classes, drop_path_rate, dims=dims, depths=depths, heads=heads)
        for dim, count in zip(dims, heads):
            if count < 1 or dim % count:
                raise InputError("heads", count, f"a divisor of {dim}, the width of its stage")
        if type(window) is not int or window < 1:
            raise InputError("window", repr(window), "a positive integer, the side of a window in tokens")
        self.head_hidden_size = dims[-1]
        half = dims[0] // 2
        convs = (
            nn.Conv2d(in_chans, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, dims[0], 3, 2, 1),
            nn.BatchNorm2d(dims[0]),
        )
        self.stem = nn.Sequential(PadTo(4), *convs, ChannelNorm(dims[0]))
        self.stages = nn.Sequential()
        for i, (dim, count) in enumerate(zip(dims, heads)):
            down = nn.Sequential(ChannelNorm(dims[i - 1]), PadTo(2), nn.Conv2d(dims[i - 1], dim, 2, 2)) if i else nn.Identity()
            blocks = [
                GlobalBlock(dim, count, mlp_ratio, rate) if j % 2 else LocalBlock(dim, count, window, mlp_ratio, rate)
                for j, rate in enumerate(self.rates[i])
            ]
            self.stages.append(Stage(down, blocks))
        self.head = NormHead(dims[-1], num_classes, global_pool, drop_rate)
        self.apply(init_weights)
