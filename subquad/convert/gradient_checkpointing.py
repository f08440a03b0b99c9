"""Gradient checkpointing in evaluation mode: layers of transformers keep their inputs alone and are computed again in the backward pass.

transformers' layers do so in training mode only, where dropout is on. Here a layer is taken to be training where it asks whether to
checkpoint, and computes in evaluation mode, the first time and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn


def checkpointed(model: nn.Module) -> list[Any]:
    """The layers on which `gradient_checkpointing_enable` has taken effect."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing]


@contextlib.contextmanager
def recomputing(layers: Sequence[Any]) -> Iterator[None]:
    """Forward passes with gradients checkpoint these layers, which are in evaluation mode; the backward pass may come later."""
    held = [(layer, layer._gradient_checkpointing_func) for layer in layers]
    try:
        for layer, checkpoint in held:
            layer.training, layer._gradient_checkpointing_func = True, partial(_checkpoint, layer, checkpoint)
        yield
    finally:
        for layer, checkpoint in held:
            layer.training, layer._gradient_checkpointing_func = False, checkpoint


def _checkpoint(layer: nn.Module, checkpoint: Callable[..., Any], compute: Callable[..., Any], *args: Any) -> Any:
    def evaluated(*args: Any) -> Any:
        was, layer.training = layer.training, False  # dropout between the layer's modules asks the layer itself
        try:
            return compute(*args)
        finally:
            layer.training = was

    return checkpoint(evaluated, *args)
