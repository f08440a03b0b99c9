"""subquad: sub-quadratic attention for PyTorch, under one contract.

>>> import subquad
>>> subquad.mechanisms()                                         # name -> Card
>>> module = subquad.attention("gla", heads=8, head_dim=64, hidden_size=512)
>>> o = subquad.attend(q, k, v, "sliding-window", window=512)    # mechanisms without parameters
>>> subquad.swap(model, "lolcats"); subquad.restore(model)       # in a pretrained model
>>> subquad.distill(student, teacher, data)                      # teach it
>>> subquad.finetune(student, data); subquad.merge_lora(student) # and tune it with low-rank adapters
>>> subquad.linearize(model, "lolcats", data)                    # all of that, by a published recipe
>>> subquad.stretch(model, 8)                                    # for contexts of eight times the length taught
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from subquad import mechanisms as _registered  # noqa: F401  importing it registers every mechanism
from subquad._version import __version__
from subquad.checks import InputError
from subquad.contract import (
    Attention,
    Call,
    Card,
    Input,
    Shape,
    attend,
    attention,
    card,
    mechanism,
    mechanisms,
    reference,
    register,
)
from subquad.convert import hook as _hook  # noqa: F401  importing it lets transformers load saved swapped models
from subquad.models import vision as _vision  # noqa: F401  importing it lets timm create the vision backbones
from subquad.rotary import Rotary
from subquad.state import State

if TYPE_CHECKING:
    from subquad.bench.report import Report
    from subquad.convert.distill import distill
    from subquad.convert.finetune import finetune
    from subquad.convert.lora import merge_lora
    from subquad.convert.recipe import linearize
    from subquad.convert.stretch import stretch
    from subquad.convert.swap import restore, swap


# What needs transformers, timm or matplotlib is imported when first asked for, so that `import subquad` stays fast.
_LATER = {
    "swap": "subquad.convert.swap",
    "restore": "subquad.convert.swap",
    "distill": "subquad.convert.distill",
    "finetune": "subquad.convert.finetune",
    "merge_lora": "subquad.convert.lora",
    "linearize": "subquad.convert.recipe",
    "stretch": "subquad.convert.stretch",
    "Report": "subquad.bench.report",
}
_PARTS = ("bench", "layers", "train")  # packages; the others are imported above

__all__ = [
    "Attention", "Call", "Card", "Input", "InputError", "Report", "Rotary", "Shape", "State", "__version__", "attend", "attention",
    "card", "distill", "finetune", "linearize", "mechanism", "mechanisms", "merge_lora", "reference", "register", "restore", "stretch",
    "swap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value
    if name in _PARTS:
        return import_module(f"subquad.{name}")
    raise AttributeError(f"module 'subquad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER, *_PARTS])
