"""stretch: fit a converted model, without training, for contexts longer than those that it was taught on.

It is for linear attention what scaling scores by the logarithm of the length is for softmax. Which weights change and how is
the mechanism's: `Lolcats.stretched`, whose two powers were chosen on passkeys, where docs/recipes.md has figures.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.convert.swap import note_plan, swapped


@runtime_checkable
class Stretches(Protocol):
    """A mechanism that can be fitted for longer contexts."""

    def stretched(self, by: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Its options and parameters, these in float64, for contexts `by` times as long as those taught."""


@torch.no_grad()
def stretch(model: Any, by: float) -> Any:
    """Fit a model's `lolcats` layers for contexts `by` times as long as those they were taught on, in place; returns the model.

    >>> subquad.stretch(model, 8).save_pretrained("folder")      # taught on 1,024 tokens, for texts of 8,192

    Twice in a row multiplies: by 2 and by 4 is by 8, and 1 / 8 undoes that, up to rounding. It is not meant for the length taught.
    States that were kept before do not fit afterwards. Other layers, softmax ones too, stay as they are.

    Args:
        model: one that `swap` or `linearize` put `lolcats` into, not wrapped by peft or `torch.compile`; or a `lolcats` module itself.
        by: a positive number.

    Raises:
        InputError: no such layer, or a number that is not positive and finite or too large for a layer's dtype; nothing has been changed
            then.
    """
    check_stretch("by", by)
    found = stretching(model)
    if not found:
        names = ", ".join(sorted({module.name for module in swapped(model).values()})) or "its own attention"
        raise InputError("model", f"{type(model).__name__} with {names}", "a model with layers that are swapped to lolcats")
    for layer, (options, values) in [(layer, _in_its_dtypes(layer, by)) for layer in found]:  # all of them before the first is changed
        for name, option in options.items():
            setattr(layer, name, option)
        for name, value in values.items():
            # in new memory, so that no captured graph goes on with the old option and these weights
            setattr(layer, name, nn.Parameter(value, requires_grad=getattr(layer, name).requires_grad))
    if found[0] is not model:
        note_plan(model)  # options changed
    return model


def stretching(model: Any) -> list[Any]:
    """What can be stretched of a model: its mechanisms that can, or a mechanism itself."""
    return [x for x in (model, *(module.mechanism for module in swapped(model).values())) if isinstance(x, Stretches)]


def check_stretch(name: str, by: Any) -> None:
    if isinstance(by, bool) or not isinstance(by, int | float) or not 0 < by <= sys.float_info.max:
        raise InputError(name, repr(by), "a positive number: how many times as long as the texts that were taught")


def _in_its_dtypes(layer: Any, by: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    options, values = layer.stretched(by)
    for name, value in values.items():
        old = getattr(layer, name)
        values[name] = value.to(old.dtype)
        if values[name].isinf().any() and not old.isinf().any():
            raise InputError("by", by, f"a smaller number: {name} becomes larger than {str(old.dtype).removeprefix('torch.')} goes")
    return options, values
