"""What the vision backbones are made of. Blocks and what is in them take tokens as ``[B, rows, columns, C]``; stem, stages and head
take ``[B, C, rows, columns]``, in channels-last memory, so that going from one to the other copies nothing.

RAVLT's and MAViT's own are the block, its attention layer and its feed-forward layers:

    block   x += DW3×3(x);   x += γ₁ Attention(LN(x));   x += γ₂ FFN(LN(x))
    layer   q, k, v, g = x W;   y = ((attend(q, k, v) + DW5×5(v)) ⊙ g) W′
    FFN     h = GELU(x W);   y = (h + DW3×3(h)) W′
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from subquad.checks import InputError
from subquad.contract import attention, option_defaults
from subquad.contract import mechanism as find
from subquad.layers.rotary2d import rala_rotary
from subquad.ops.common import transformed
from subquad.rotary import Rotary


class DepthwiseConv(nn.Conv2d):
    """Depth-wise convolution of ``[B, rows, columns, C]``, which keeps the shape."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GeluConv(DepthwiseConv):
    """a + DW(a) of a = GELU(h), tokens as above. For the backward pass it keeps h, and not a."""

    def forward(self, h: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or transformed() or not torch.is_grad_enabled():  # a compiler chooses by itself what is kept
            a = F.gelu(h)
            return a + super().forward(a)
        y: Tensor = _GeluConv.apply(h, self.weight.to(h.dtype), None if self.bias is None else self.bias.to(h.dtype))  # as autocast would
        return y


class _GeluConv(torch.autograd.Function):
    """Computing a again takes one pass over h; keeping it would take as much memory as h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h, weight)
        a = F.gelu(h)
        return a + F.conv2d(a.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)).permute(0, 2, 3, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, weight = ctx.saved_tensors
        channels, around = len(weight), [weight.shape[-1] // 2] * 2
        outer, a = grad.permute(0, 3, 1, 2), F.gelu(h).permute(0, 3, 1, 2)
        of_a, of_weight, of_bias = torch.ops.aten.convolution_backward(
            outer, a, weight, [channels], [1, 1], around, [1, 1], False, [0, 0], channels, list(ctx.needs_input_grad)
        )
        of_h = torch.ops.aten.gelu_backward(grad + of_a.permute(0, 2, 3, 1), h) if ctx.needs_input_grad[0] else None
        return of_h, of_weight, of_bias


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
        options: dict[str, Any] = {"causal": False} if "causal" in option_defaults(find(mechanism)) else {}
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
        self.conv = GeluConv(width, 3)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.conv(self.fc1(x)))
        return y


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
        x = x + self.scale(self.gamma1, x) * self.attn(self.norm1(x), rotary)
        return x + self.scale(self.gamma2, x) * self.ffn(self.norm2(x))

    def scale(self, gamma: Tensor, x: Tensor) -> Tensor:
        """What each image's branch is multiplied by, once: ``[B, 1, 1, C]``, 0 where stochastic depth drops it; γ in evaluation."""
        return self.drop_path(gamma.expand(x.shape[0], 1, 1, -1)) if self.training else gamma


def recomputed(part: nn.Module, *given: Any) -> Any:
    """What `part` makes of `given`, its activations computed again in the backward pass, which leaves batch norms' statistics alone."""
    if torch.compiler.is_compiling():  # buffers are written once there, whatever is computed again
        return checkpoint(part, *given, use_reentrant=False)
    return checkpoint(part, *given, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_held(part)))


@contextmanager
def _statistics_held(part: nn.Module) -> Iterator[None]:
    """Batch norms normalise as before, and neither average nor count."""
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in part.modules() if isinstance(norm, _BatchNorm)]
    for norm, _, _ in held:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in held:
            norm.momentum, norm.num_batches_tracked = momentum, count


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
                x = recomputed(block, x, *rotary)
            else:
                x = block(x, *rotary)
        return x.permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """What a subclass does in `prepare`, average pool, dropout, classifier: ``[B, C, H, W]`` to ``[B, classes]``."""

    pools: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {"avg": lambda x: x.mean((2, 3)), "": lambda x: x}

    def __init__(self, width: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        if not 0 <= drop_rate <= 1:
            raise InputError("drop_rate", drop_rate, "a rate from 0 to 1")
        self.width = width
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str) -> None:
        if type(num_classes) is not int or num_classes < 0:
            raise InputError("num_classes", repr(num_classes), "an integer ≥ 0, where 0 makes no classifier")
        pools = " or ".join(repr(name) for name in self.pools if name)
        if global_pool not in self.pools:
            raise InputError("global_pool", repr(global_pool), f"{pools}, or '' for features that are not pooled")
        if not global_pool and num_classes:
            raise InputError("global_pool", repr(global_pool), f"{pools} for a classifier; '' needs num_classes=0")
        like = next(self.parameters(), torch.empty(0))  # none yet while it is made
        self.global_pool = global_pool
        self.fc = nn.Linear(self.width, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        init_weights(self.fc)

    def prepare(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, width, H, W]``."""
        raise TypeError(f"{type(self).__name__} must define prepare()")

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.pools[self.global_pool](self.prepare(x)))
        return x if pre_logits else self.fc(x)


class Head(Classifier):
    """1×1 convolution, batch norm, swish, average pool, dropout, classifier: ``[B, C, H, W]`` to ``[B, classes]``."""

    def __init__(self, dim: int, width: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__(width, num_classes, global_pool, drop_rate)
        self.conv = nn.Conv2d(dim, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def prepare(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PadTo(nn.Module):
    """Zeros to the right of and below ``[B, C, H, W]``, up to multiples of `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, -x.shape[3] % self.side, 0, -x.shape[2] % self.side))


class NormHead(Classifier):
    """Layer norm, average pool, dropout, classifier: ``[B, C, H, W]`` to ``[B, classes]``."""

    def __init__(self, dim: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__(dim, num_classes, global_pool, drop_rate)
        self.norm = ChannelNorm(dim)

    def prepare(self, x: Tensor) -> Tensor:
        return self.norm(x)


def conv_norm(before: int, dim: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, dim, 3, stride, 1), nn.BatchNorm2d(dim)


def stem(in_chans: int, dim: int) -> nn.Sequential:
    """``[B, in_chans, H, W]`` to ``[B, dim, ⌈H/4⌉, ⌈W/4⌉]``."""
    half = dim // 2
    first, second, third = (conv_norm(*sizes) for sizes in ((in_chans, half, 2), (half, half, 1), (half, half, 1)))
    return nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), *third, nn.GELU(), *conv_norm(half, dim, 2))


def feed_forward(dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
