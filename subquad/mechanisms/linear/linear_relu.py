"""Plain linear attention on φ(x) = relu(x): the cheapest map, and features that are often zero.

o_i = Σ_j φ(q_i)·φ(k_j) v_j / (Σ_j φ(q_i)·φ(k_j) + 1e-6),  over j ≤ i if causal; 0 where no feature is shared

As in EfficientViT (Cai, Li, Hu, Gan, Han: arXiv 2205.14756), sec. 3.1, without its convolutions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from subquad.contract import register
from subquad.mechanisms.linear.linear_elu import LinearELU
from subquad.mechanisms.linear.linear_elu import reference as reference


@register("linear-relu")
class LinearReLU(LinearELU):
    """Normalised linear attention on relu; no parameters.

    Args:
        causal: whether a token sees only itself and what came before.
    """

    card = replace(
        LinearELU.card,
        title="Linear attention, relu",
        paper="arXiv 2205.14756",
        summary="Plain linear attention on relu: the cheapest feature map.",
    )
    features: ClassVar[str] = "relu"
