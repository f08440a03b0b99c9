"""Swapped attention in transformers' BERT and RoBERTa encoders.

Padded batches are packed, as in decoders: padding reaches no mechanism, and its outputs are zero. Positions are embedded, so
nothing is rotated. Probabilities of attention that a model drops out in training are not dropped: a mechanism has none to drop.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.convert.decoder import Padding
from subquad.convert.module import SwappedAttention


class SwappedBertAttention(SwappedAttention):
    """`attention` of a BERT layer: `self` with the projections, `output` with the last one, the residual and the norm."""

    projection = "output.dense"
    output: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        return self.output(self.heads_output(hidden_states, attention_mask, **kwargs), hidden_states), None

    def heads_output(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """What goes into `output.dense`: ``[B, N, H·D]``."""
        batch, tokens = hidden_states.shape[:2]
        padding = padding_of(attention_mask)
        if padding is not None:
            hidden_states = padding.pack(hidden_states)
        part: Any = self.get_submodule("self")
        q, k, v = (project(hidden_states).unflatten(-1, (-1, self.mechanism.head_dim)) for project in (part.query, part.key, part.value))
        given = hidden_states if self.mechanism.card.needs_hidden else None
        o = self.mechanism(q, k, v, hidden=given, cu_seqlens=None if padding is None else padding.cu_seqlens)
        return (o if padding is None else padding.unpack(o, batch, tokens)).flatten(2)


def padding_of(mask: Any) -> Padding | None:
    """Padding read off a mask ``[B, N]`` or ``[B, 1, ·, N]``: a column that nobody sees.

    Raises:
        InputError: a mask that hides a token from some and not from others.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        was = shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("attention_mask", was, "a mask [batch, tokens], 0 at padding")
    if mask.dim() == 2:
        real = mask != 0
    else:
        seen = (mask == 0 if mask.is_floating_point() else mask != 0)[:, 0]
        real = seen.any(1)
        if bool((seen != real[:, None]).any()):
            raise InputError("attention_mask", "a mask that differs between queries", "a mask [batch, tokens], 0 at padding")
    return None if bool(real.all()) else Padding.of(real)
