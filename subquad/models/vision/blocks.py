"""What the vision backbones are made of. Blocks and what is in them take tokens as ``[B, rows, columns, C]``; stem, stages and head
take ``[B, C, rows, columns]``, in channels-last memory, so that going from one to the other copies nothing. `Backbone` is what all of
them do, whatever they are made of.

RAVLT's and MAViT's own are the block, its attention layer and its feed-forward layers:

    block   x += DW3×3(x);   x += γ₁ Attention(LN(x));   x += γ₂ FFN(LN(x))
    layer   q, k, v, g = x W;   y = ((attend(q, k, v) + DW5×5(v)) ⊙ g) W′
    FFN     h = GELU(x W);   y = (h + DW3×3(h)) W′
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.checks import InputError, shape_of
from subquad.contract import attention
from subquad.layers.rotary2d import rala_rotary
from subquad.rotary import Rotary

STRIDE = 32  # of a backbone's last stage


class DepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of ``[B, rows, columns, C]``, which keeps the shape."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a whole image's branch at a rate, and scales the others up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class GatedAttention(nn.Module):
    """A mechanism between its projections, with depth-wise 5×5 local enhancement of v and an output gate without activation."""

    def __init__(self, dim: int, heads: int, mechanism: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"causal": False} if mechanism == "softmax" else {}
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.attend = attention(mechanism, heads, dim // heads, **options)
        self.local = DepthwiseConv(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        batch, rows, columns, dim = x.shape
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        heads = (batch, rows * columns, self.attend.heads, self.attend.head_dim)
        o = self.attend(*(t.reshape(heads) for t in (q, k, v)), rotary=rotary, grid=(rows, columns))
        return self.proj(self.gated(o.reshape(batch, rows, columns, dim) + self.local(v), gate))

    def gated(self, o: Tensor, gate: Tensor) -> Tensor:
        return o * gate


class FeedForward(nn.Module):
    """Two linear layers with GELU and a residual depth-wise 3×3 convolution between."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.conv = DepthwiseConv(width, 3)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.conv(x))


class Block(nn.Module):
    """Position by depth-wise 3×3 convolution, then attention and feed-forward, each scaled per channel."""

    attention: ClassVar[type[GatedAttention]] = GatedAttention

    def __init__(self, dim: int, heads: int, mechanism: str, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.position = DepthwiseConv(dim, 3)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = self.attention(dim, heads, mechanism)
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, int(mlp_ratio * dim))
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.position(x)
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x), rotary))
        return x + self.drop_path(self.gamma2 * self.ffn(self.norm2(x)))


class Stage(nn.Module):
    """A downsampling (stage 1: none), then blocks: ``[B, C, H, W]`` to ``[B, C′, ⌈H/2⌉, ⌈W/2⌉]``.

    Args:
        rotary_dim: channels of a head, whose rotary each block is then given; None for blocks that take the tokens alone.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], rotary_dim: int | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.rotary_dim = rotary_dim
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        rotary: tuple[Rotary, ...] = ()
        if self.rotary_dim is not None:
            rotary = (rala_rotary((x.shape[1], x.shape[2]), self.rotary_dim, device=x.device),)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *rotary, use_reentrant=False)
            else:
                x = block(x, *rotary)
        return x.permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """What a subclass does in `prepare`, average pool, dropout, classifier: ``[B, C, H, W]`` to ``[B, classes]``."""

    def __init__(self, width: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        self.width = width
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str) -> None:
        if type(num_classes) is not int or num_classes < 0:
            raise InputError("num_classes", repr(num_classes), "an integer ≥ 0, where 0 makes no classifier")
        if global_pool not in ("avg", ""):
            raise InputError("global_pool", repr(global_pool), "'avg', or '' for features that are not pooled")
        if not global_pool and num_classes:
            raise InputError("global_pool", repr(global_pool), "'avg' for a classifier; '' needs num_classes=0")
        like = next(self.parameters(), torch.empty(0))  # none yet while it is made
        self.global_pool = global_pool
        self.fc = nn.Linear(self.width, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        init_weights(self.fc)

    def prepare(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, width, H, W]``."""
        raise TypeError(f"{type(self).__name__} must define prepare()")

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.prepare(x)
        if self.global_pool:
            x = x.mean((2, 3))
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Head(Classifier):
    """1×1 convolution, batch norm, swish, average pool, dropout, classifier: ``[B, C, H, W]`` to ``[B, classes]``."""

    def __init__(self, dim: int, width: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__(width, num_classes, global_pool, drop_rate)
        self.conv = nn.Conv2d(dim, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def prepare(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Backbone(nn.Module):
    """A stem of stride 4, four stages, of which the last three halve the grid, and a head.

    A subclass calls this and then makes `stem` and `stages`, which take and give ``[B, C, H, W]``, and `head`, a `Classifier`.

    Args:
        in_chans, num_classes: channels of the images, and classes.
        drop_path_rate: of stochastic depth in the last block; `rates` has each block's, stage by stage, rising linearly from 0.
        dims, depths: width and blocks of each stage.
        more: what else has one value a stage, by name.

    Raises:
        InputError: sizes that do not fit.
    """

    stem: Any
    stages: Any
    head: Any

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
        super().__init__()
        for name, values in {"dims": dims, "depths": depths, **more}.items():
            if len(values) != 4:
                raise InputError(name, values, "four values, one a stage")
        if min(depths) < 1:
            raise InputError("depths", depths, "at least one block a stage")
        if not 0 <= drop_path_rate < 1:
            raise InputError("drop_path_rate", drop_path_rate, "a rate of at least 0 and less than 1")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = dims[-1]
        self.feature_info = [{"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"} for i, dim in enumerate(dims)]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.rates = [[next(rates) for _ in range(depth)] for depth in depths]

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


def conv_norm(before: int, dim: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, dim, 3, stride, 1), nn.BatchNorm2d(dim)


def stem(in_chans: int, dim: int) -> nn.Sequential:
    """``[B, in_chans, H, W]`` to ``[B, dim, ⌈H/4⌉, ⌈W/4⌉]``."""
    half = dim // 2
    first, second, third = (conv_norm(*sizes) for sizes in ((in_chans, half, 2), (half, half, 1), (half, half, 1)))
    return nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), *third, nn.GELU(), *conv_norm(half, dim, 2))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
