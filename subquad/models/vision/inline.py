"""InLine networks: DeiT and Swin with injective linear attention and a local residual.

    block   x += Attention(LN(x));   x += FFN(LN(x))
    layer   q, k, v = x W;   y = (attend(q, k, v) + DW3×3(v; w)) W′,   w = GELU(x̄ W₁) W₂,   x̄ the mean of the layer's tokens

W₁ and W₂ are block-diagonal, a block a head, and w is 3 × 3 weights for each channel of each image. The class token is attended to and
attends like the others, and stands apart from the grid that the convolution runs on. In Swin the linear attention sees the whole map
where Swin has windows; the blocks that keep softmax keep shifted windows of 7 × 7 and their table of relative positions.
Han, Pu, Xia, et al.: Bridging the Divide (arXiv 2412.06590), sizes and details as in the authors' code (LeapLabTHU/InLine).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError, compute_dtype
from subquad.contract import attention
from subquad.models.vision.backbone import Backbone, ClassTokenClassifier, PlainBackbone, image_sides
from subquad.models.vision.blocks import ChannelNorm, DropPath, NormHead, PadTo, Stage, feed_forward

# Options of `InLineDeiT` and `InLineSwin` for each size; of DeiT, the images' side too, which the positions are learned for.
DEIT: dict[str, dict[str, Any]] = {
    "inline_deit_tiny": {"img_size": 224, "dim": 192, "heads": 6},
    "inline_deit_small": {"img_size": 288, "dim": 320, "heads": 10},
    "inline_deit_base": {"img_size": 448, "dim": 384, "heads": 12},
}
_T: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "linear": (2, 2, 6, 0)}
_S: dict[str, Any] = {**_T, "depths": (2, 2, 18, 2), "linear": (2, 2, 0, 0)}
_B: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "linear": (2, 2, 2, 0)}
SWIN: dict[str, dict[str, Any]] = {
    "inline_swin_tiny": {**_T, "drop_path_rate": 0.2},
    "inline_swin_small": {**_S, "drop_path_rate": 0.3},
    "inline_swin_base": {**_B, "drop_path_rate": 0.5},
}


class LocalResidual(nn.Module):
    """Depth-wise 3×3 convolution without bias, whose weights are predicted from a vector, each image's own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.Conv1d(dim, dim, 1, groups=heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=heads))

    def forward(self, v: Tensor, mean: Tensor, grid: Sequence[int]) -> Tensor:
        """v ``[B, rows · columns, C]`` and the vector ``[B, C]`` to ``[B, rows · columns, C]``."""
        batch, _, dim = v.shape
        if not batch:  # there is no convolution of no groups
            return v
        weight = self.predict(mean[..., None]).reshape(batch * dim, 1, 3, 3)
        image = v.mT.reshape(1, batch * dim, grid[0], grid[1])
        return F.conv2d(image, weight.to(image.dtype), padding=1, groups=batch * dim).reshape(batch, dim, -1).mT


class InLineAttend(nn.Module):
    """Injective linear attention over all tokens, and the local residual of those on the grid.

    Args:
        extra: tokens before those of the grid.
    """

    def __init__(self, dim: int, heads: int, extra: int = 0) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attend = attention("inline", heads, dim // heads)
        self.local = LocalResidual(dim, heads)
        self.proj = nn.Linear(dim, dim)
        self.extra = extra

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """``[B, extra + rows · columns, C]``, and the same back."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.attend.heads, self.attend.head_dim).unbind(2)
        o = self.attend(q, k, v, grid=(1, tokens)).flatten(2)  # its weights do not depend on the grid
        local = self.local(v.flatten(2)[:, self.extra :], x.mean(1), grid)
        return self.proj(o + F.pad(local, (0, 0, self.extra, 0)))


class MapAttend(InLineAttend):
    """The same on maps ``[B, rows, columns, C]``."""

    def forward(self, x: Tensor, grid: Sequence[int] = ()) -> Tensor:
        return super().forward(x.flatten(1, 2), x.shape[1:3]).reshape(x.shape)


class ShiftedWindowAttend(nn.Module):
    """Swin's softmax attention (arXiv 2103.14030) in windows that do not overlap, with a learned bias by relative position.

    Along a side that is no longer than the window there is one window, and no shift. What a window has from the other end of the map,
    or beyond its end, is not attended to.

    Args:
        shifted: whether the windows are moved by half their side.
    """

    def __init__(self, dim: int, heads: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[B, rows, columns, C]``."""
        batch, rows, columns, dim = x.shape
        sides = [min(self.window, n) for n in (rows, columns)]
        shifts = [side // 2 if self.shifted and side < n else 0 for side, n in zip(sides, (rows, columns))]
        padded = F.pad(x, (0, 0, 0, -columns % sides[1], 0, -rows % sides[0])).roll([-s for s in shifts], (1, 2))
        down, across, tokens = padded.shape[1] // sides[0], padded.shape[2] // sides[1], sides[0] * sides[1]
        qkv = self.qkv(padded).reshape(batch, down, sides[0], across, sides[1], 3, self.heads, dim // self.heads)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7)  # windows beside heads
        q, k, v = qkv.reshape(3, batch, down * across * self.heads, tokens, dim // self.heads)
        bias = self._bias(sides, x.device)
        if any(shifts) or padded.shape != x.shape:
            apart = self._apart((rows, columns), sides, shifts, x.device)
            bias = bias.masked_fill(apart[:, None], -torch.inf)
        bias = bias.expand(down * across, -1, -1, -1).flatten(0, 1).to(q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        o = o.reshape(batch, down, across, self.heads, *sides, dim // self.heads).permute(0, 1, 4, 2, 5, 3, 6).reshape(padded.shape)
        return self.proj(o.roll(shifts, (1, 2))[:, :rows, :columns])

    def _bias(self, sides: Sequence[int], device: torch.device) -> Tensor:
        """``[1, heads, tokens, tokens]`` of a window."""
        difference = [torch.arange(n, device=device)[:, None] - torch.arange(n, device=device) + self.window - 1 for n in sides]
        index = difference[0][:, None, :, None] * (2 * self.window - 1) + difference[1][None, :, None]
        return self.bias[index.flatten(2).flatten(0, 1)].permute(2, 0, 1)[None]

    def _apart(self, grid: Sequence[int], sides: Sequence[int], shifts: Sequence[int], device: torch.device) -> Tensor:
        """``[windows, tokens, tokens]``: which are not on one piece of the map."""
        labels = []
        for n, side, shift in zip(grid, sides, shifts):
            place = torch.arange(n + -n % side, device=device).roll(-shift)
            wrapped = torch.arange(len(place), device=device) >= len(place) - shift
            labels.append(torch.where(place >= n, 2, wrapped.long()).reshape(-1, side))
        label = labels[0][:, None, :, None] * 3 + labels[1][None, :, None]
        label = label.flatten(0, 1).flatten(1)
        return label[:, :, None] != label[:, None]


class Block(nn.Module):
    """Attention and feed-forward, each after a norm; what comes with the tokens is handed to the attention."""

    def __init__(self, attend: nn.Module, dim: int, mlp_ratio: float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attend
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.ffn = feed_forward(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), *given))
        return x + self.drop_path(self.ffn(self.norm2(x)))


def init_linear(module: nn.Module) -> None:
    """Convolutions are left as PyTorch makes them, as the authors do."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class InLineDeiT(PlainBackbone):
    """InLine-DeiT (arXiv 2412.06590): one grid of patches, and a class token that the classifier reads.

    >>> model = vision_model("inline_deit_tiny")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    >>> model.forward_features(torch.randn(2, 3, 224, 224)).shape             # the class token first
    torch.Size([2, 197, 192])

    Images of another size than `img_size` get its positions interpolated; the class token has a position of its own.

    Args:
        img_size: side of the images in pixels, or rows and columns, that the positions are learned for.
        in_chans: channels of the images.
        num_classes: 0 for no classifier: the model then returns ``[B, dim]``.
        dim, depth, heads: width, blocks, heads.
        patch_size: side of a patch in pixels.
        mlp_ratio: width of the feed-forward layers over dim.
        drop_rate: dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; it rises linearly from 0 in the first.
        global_pool: "token"; "avg" for the mean of the patches; or "", with num_classes=0, for ``[B, 1 + patches, dim]``.

    Raises:
        InputError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 192,
        depth: int = 12,
        heads: int = 6,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        global_pool: str = "token",
    ) -> None:
        super().__init__(in_chans, num_classes, drop_path_rate, dim=dim, depth=depth, heads=heads, patch_size=patch_size, extra=1)
        rows, columns = (-(-side // patch_size) for side in image_sides(img_size, patch_size))
        self.learned = rows, columns  # the positions' grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + rows * columns, dim))
        self.blocks = nn.ModuleList(Block(InLineAttend(dim, heads, 1), dim, mlp_ratio, rate, 1e-6) for [rate] in self.rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = ClassTokenClassifier(dim, num_classes, global_pool, drop_rate)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """The class token and the positions; vectors are spared by timm's optimizers anyway."""
        return {"cls_token", "pos_embed"}

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """``[1, 1 + rows · columns, C]``: the class token's, then the grid's, interpolated if it is not the one they are learned for."""
        if grid == self.learned:
            return self.pos_embed
        table = self.pos_embed[:, 1:].mT.unflatten(2, self.learned)
        table = F.interpolate(table.to(compute_dtype(table)), grid, mode="bicubic").to(table.dtype)  # not every device has it in 16 bits
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).mT], 1)

    def _tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.positions(grid)


class PatchMerging(nn.Module):
    """Four neighbours' channels side by side, layer norm, and a linear layer: ``[B, C, H, W]`` to ``[B, C′, ⌈H/2⌉, ⌈W/2⌉]``."""

    def __init__(self, before: int, dim: int) -> None:
        super().__init__()
        self.pad = PadTo(2)
        self.norm = nn.LayerNorm(4 * before)
        self.reduction = nn.Linear(4 * before, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(x).permute(0, 2, 3, 1)
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class InLineSwin(Backbone):
    """InLine-Swin (arXiv 2412.06590): four stages, whose first `linear` blocks have linear attention and the others windows.

    >>> model = vision_model("inline_swin_tiny")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    >>> model.forward_features(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 768, 7, 7])

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier: the model then returns ``[B, dims[-1]]``.
        dims, depths, heads: width, blocks and heads of each stage.
        linear: how many of each stage's blocks, from its first, have linear attention.
        window: side of the other blocks' windows; published: 7, and 12 for images of 384 × 384.
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
        linear: Sequence[int] = _T["linear"],
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(in_chans, num_classes, drop_path_rate, dims=dims, depths=depths, heads=heads, linear=linear)
        for dim, count in zip(dims, heads):
            if count < 1 or dim % count:
                raise InputError("heads", count, f"a divisor of {dim}, the width of its stage")
        if not all(0 <= count <= depth for count, depth in zip(linear, depths)):
            raise InputError("linear", linear, f"at most the blocks of each stage, {tuple(depths)}")
        if type(window) is not int or window < 2:
            raise InputError("window", repr(window), "an integer of at least 2, the side of a window in tokens")
        self.head_hidden_size = dims[-1]
        self.stem = nn.Sequential(PadTo(4), nn.Conv2d(in_chans, dims[0], 4, 4), ChannelNorm(dims[0]))
        self.stages = nn.Sequential()
        for i, (dim, count) in enumerate(zip(dims, heads)):
            attends = [
                MapAttend(dim, count) if j < linear[i] else ShiftedWindowAttend(dim, count, window, shifted=j % 2 == 1)
                for j in range(depths[i])
            ]
            blocks = [Block(attend, dim, mlp_ratio, rate, 1e-5) for attend, rate in zip(attends, self.rates[i])]
            self.stages.append(Stage(PatchMerging(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.head = NormHead(dims[-1], num_classes, global_pool, drop_rate)
        self.apply(init_linear)
