"""NaLaFormer: RAVLT's network with norm-aware linear attention, and with a layer and a block of its own.

    block   x += DW3×3(x);   x += γ₁ Attention(LN(x));   x += DW3×3(x);   x += γ₂ FFN(LN(x))
    layer   q, k, v, g = x W;   y = (LN(attend(q, k, v) + DW5×5(v)) ⊙ SiLU(g)) W′

Stem, stages, feed-forward layers and head are those of RAVLT: stages 1 and 2 have the linear attention, 3 and 4 softmax.
Meng, Luo, Huo, Wang, Li, Zhang: NaLaFormer (arXiv 2506.21137).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.models.vision import ravlt
from subquad.models.vision.blocks import Block, DepthwiseConv, GatedAttention, init_weights
from subquad.models.vision.ravlt import RAVLT, Size
from subquad.rotary import Rotary

_XT = Size((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), (1.0, 1.0, 1.0, 1.0), 0.1)
_T, _S, _B, _L = (ravlt.VARIANTS[f"ravlt_{size}"].size for size in "tsbl")  # they share all but the feed-forward layers' width

# Options of `NaLaFormer` for each size.
VARIANTS: dict[str, dict[str, Any]] = {
    "nalaformer_xt": {**vars(_XT), "mlp_ratio": 3.5},
    "nalaformer_t": {**vars(_T), "mlp_ratio": 4.0},
    "nalaformer_s": {**vars(_S), "mlp_ratio": 3.5},
    "nalaformer_b": {**vars(_B), "mlp_ratio": 4.0},
    "nalaformer_l": {**vars(_L), "mlp_ratio": 3.5},
}


class NormGatedAttention(GatedAttention):
    """The layer of RAVLT with a layer norm over all heads' channels before the gate, and SiLU on the gate."""

    def __init__(self, dim: int, heads: int, mechanism: str) -> None:
        super().__init__(dim, heads, mechanism)
        self.norm = nn.LayerNorm(dim)

    def gated(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.norm(o) * F.silu(gate)


class NaLaBlock(Block):
    """The block of RAVLT with a second depth-wise 3×3 convolution, between attention and feed-forward."""

    attention = NormGatedAttention

    def __init__(self, dim: int, heads: int, mechanism: str, mlp_ratio: float, layer_scale: float, drop_path: float) -> None:
        super().__init__(dim, heads, mechanism, mlp_ratio, layer_scale, drop_path)
        self.position2 = DepthwiseConv(dim, 3)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.position(x)
        x = x + self.scale(self.gamma1, x) * self.attn(self.norm1(x), rotary)
        x = x + self.position2(x)
        return x + self.scale(self.gamma2, x) * self.ffn(self.norm2(x))


class NaLaFormer(RAVLT):
    """NaLaFormer (arXiv 2506.21137).

    >>> model = vision_model("nalaformer_s")
    >>> model(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])

    The sizes are those of the authors' code (ZacharyMeng/NaLaFormer). For XT and T the published figures differ from what that code
    makes: XT is published with 8 M parameters and has 6.1 M; T is published with 15 M, which it has with ``mlp_ratio=3.5``, and has
    15.9 M with the code's 4.

    Args:
        mechanisms: each stage's attention, by the name it is registered under.
        mlp_ratio: width of the feed-forward layers over that of the stage.
        options: the other ones of `RAVLT`.

    Raises:
        InputError: sizes that do not fit each other, or an unknown mechanism.
    """

    block = NaLaBlock

    def __init__(
        self,
        *,
        mechanisms: Sequence[str] = ("nalaformer", "nalaformer", "softmax", "softmax"),
        mlp_ratio: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(mechanisms=mechanisms, mlp_ratio=mlp_ratio, **options)

    def init_weights(self) -> None:
        """Only convolutions and the classifier are drawn anew: the authors leave linear layers, of which the head's is one, as PyTorch
        makes them."""
        for part in (self.stem, self.stages):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    init_weights(module)
        nn.init.kaiming_uniform_(self.head.conv.weight, a=5**0.5)
