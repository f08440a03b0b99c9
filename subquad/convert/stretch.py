"""stretch: fit a converted model, without training, for contexts longer than those that it was taught on.

    W ← s^0.09 W        g ← s^(2/3) g        f as it was        contexts of s times the length

of LoLCATs' maps, window weight and past weight (`mechanisms/hybrid/lolcats.py`). The past of a linear attention weighs as much as
all of its keys together, so that s times as many of them outweigh the window and the one key that was meant; sharper features keep
that key above the others, and a heavier window keeps its share of the normaliser. It is for linear attention what scaling scores by
the logarithm of the length is for softmax. This library's own; both powers were chosen on passkeys, where docs/recipes.md has figures.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from subquad.checks import InputError
from subquad.convert.swap import note_plan, swapped

SHARPER = 0.09  # the power of s that maps are multiplied with: 1.2 at eight times the length
HEAVIER = 2 / 3  # that of the window's weight beside the past's: 4 there


@torch.no_grad()
def stretch(model: Any, by: float) -> Any:
    """Sharpen a model's `lolcats` layers for contexts `by` times as long as those they were taught on, in place; returns the model.

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
    layers = [module.mechanism for module in swapped(model).values()] if not _stretches(model) else [model]
    found = [layer for layer in layers if _stretches(layer)]
    if not found:
        names = ", ".join(sorted({layer.card.name for layer in layers})) or "its own attention"
        raise InputError("model", f"{type(model).__name__} with {names}", "a model with layers that are swapped to lolcats")
    for layer, values in [(layer, _stretched(layer, by)) for layer in found]:  # all of them before the first is put in
        layer.affine_factors = True
        for name, value in values.items():
            # in new memory, so that no captured graph goes on with the old option and these weights
            setattr(layer, name, nn.Parameter(value, requires_grad=getattr(layer, name).requires_grad))
    if layers[0] is not model:
        note_plan(model)  # options changed
    return model


def check_stretch(name: str, by: Any) -> None:
    if isinstance(by, bool) or not isinstance(by, int | float) or not 0 < by <= sys.float_info.max:
        raise InputError(name, repr(by), "a positive number: how many times as long as the texts that were taught")


def _stretches(module: Any) -> bool:
    from subquad.mechanisms.hybrid.lolcats import Lolcats

    return isinstance(module, Lolcats)


def _stretched(layer: Any, by: float) -> dict[str, Tensor]:
    """Parameters of a layer with affine factors, by name, in their dtypes."""
    factor = layer.window_factor.detach().to(torch.float64)
    if not layer.affine_factors:  # g beside 1 is what σ(log g) beside 1 − σ(log g) is
        factor = F.logsigmoid(factor)
    values = {"window_factor": factor + HEAVIER * math.log(by)}
    values |= {name: getattr(layer, name).detach().to(torch.float64) * by**SHARPER for name in ("W_q", "W_k")}
    made = {}
    for name, value in values.items():
        old = getattr(layer, name)
        made[name] = value.to(old.dtype)
        if made[name].isinf().any() and not old.isinf().any():
            raise InputError("by", by, f"a smaller number: {name} becomes larger than {str(old.dtype).removeprefix('torch.')} goes")
    return made
