"""LightNet image classifiers: one grid of patches, linear attention in one scan, MD-TPE before the blocks and MD-LRPE in them.

    block   x += Attention(RMSNorm(x));   x += GLU(RMSNorm(x))
    layer   q, k, v = x W;   y = (RMSNorm(attend(q, k, v)) ⊙ SiLU(x U₁ U₂)) W′          U₁ U₂ of the rank of a head
    GLU     y = (SiLU(x W₁) ⊙ x W₂) W₃

Qin, Mao, Shen, et al.: You Only Scan Once (arXiv 2405.21022). The paper's text and its networks' code could not be had: gate, norm and
channel mixer are as in flash-linear-attention's layer and in public descriptions of the paper, and widths and depths are DeiT's.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import attention
from subquad.layers.md_lrpe import md_lrpe
from subquad.layers.md_tpe import MDTPE
from subquad.models.vision.backbone import PlainBackbone, TokenClassifier
from subquad.models.vision.blocks import DropPath, init_weights
from subquad.rotary import Rotary

# Options of `LightNet` for each size, which are DeiT's: the published ones are not known.
VARIANTS: dict[str, dict[str, Any]] = {
    "lightnet_t": {"dim": 192, "heads": 3},
    "lightnet_s": {"dim": 384, "heads": 6},
    "lightnet_b": {"dim": 768, "heads": 12},
}
EPS = 1e-6


class GatedLightNet(nn.Module):
    """Bidirectional LightNet attention between projections without bias, with a norm over all heads and a low-rank output gate."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        rank = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attend = attention("lightnet", heads, rank, causal=False, lrpe="cosine")
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False))
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.attend.heads, self.attend.head_dim).unbind(2)
        o = self.attend(q, k, v, rotary=rotary).flatten(2)
        return self.proj(self.norm(o) * F.silu(self.gate(x)))


class GLU(nn.Module):
    """Gated linear unit: SiLU of one projection times another, and a projection back; no biases."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * width, bias=False)
        self.fc2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class LightNetBlock(nn.Module):
    """Attention and GLU, each after an RMSNorm."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=EPS)
        self.attn = GatedLightNet(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=EPS)
        self.ffn = GLU(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), rotary))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class LightNet(PlainBackbone):
    """LightNet (arXiv 2405.21022) for images, in DeiT's widths and depths, as the paper's own could not be had.

    >>> model = vision_model("lightnet_t")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    >>> model.forward_features(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 196, 192])

    No position is tied to the size of the image: MD-TPE filters along rows and columns, and MD-LRPE's angles follow from the place.

    Args:
        in_chans: channels of the images.
        num_classes: 0 for no classifier: the model then returns ``[B, dim]``.
        dim, depth, heads: width, blocks, heads; dim / heads is even.
        patch_size: side of a patch in pixels.
        mlp_ratio: width of the GLU over dim; 8/3 has as many parameters as DeiT's feed-forward layers.
        drop_rate: dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; it rises linearly from 0 in the first.
        global_pool: "avg"; or "", with num_classes=0, for ``[B, patches, dim]``.

    Raises:
        InputError: sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        patch_size: int = 16,
        mlp_ratio: float = 8 / 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(in_chans, num_classes, drop_path_rate, dim=dim, depth=depth, heads=heads, patch_size=patch_size)
        if dim % (2 * heads):
            raise InputError("heads", heads, f"a divisor of {dim} / 2, so that a head has an even number of channels")
        self.head_dim = dim // heads
        self.position = MDTPE(dim, heads, axes=2)
        self.blocks = nn.ModuleList(LightNetBlock(dim, heads, mlp_ratio, rate) for [rate] in self.rates)
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.head = TokenClassifier(dim, num_classes, global_pool, drop_rate)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """MD-TPE's decays and scales; vectors are spared by timm's optimizers anyway."""
        return {"position.logits", "position.scale"}

    def _tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.position(x, grid)

    def _given(self, images: Tensor) -> tuple[Any, ...]:
        return (md_lrpe(self.grid(images), self.head_dim, device=images.device),)
