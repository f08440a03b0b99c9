"""The definition of `merge`: every part's mass in the open, without care for its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_reference(parts: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor | float] | None = None) -> tuple[Tensor, Tensor]:
    """o = Σ w_i e^{lse_i} o_i / Σ w_i e^{lse_i},  lse = log Σ w_i e^{lse_i}."""
    weights = [1.0] * len(parts) if weights is None else weights
    mass = [w * lse.exp() for (_, lse), w in zip(parts, weights)]
    total = torch.stack(mass).sum(0)
    return sum(m[..., None] * o for (o, _), m in zip(parts, mass)) / total[..., None], total.log()
