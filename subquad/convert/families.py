"""The families of transformers that can be swapped, by the names transformers gives their parts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from subquad.checks import InputError


@dataclass(frozen=True)
class Family:
    """`prefix` begins the names of the family's classes: LlamaModel, LlamaAttention, LlamaConfig."""

    model_type: str
    prefix: str
    causal: bool

    def module(self) -> ModuleType:
        return import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    def config_class(self) -> Any:
        return getattr(import_module(f"transformers.models.{self.model_type}"), f"{self.prefix}Config")

    def part(self, name: str) -> Any:
        """Its class of that name: "Model", "Attention", "PreTrainedModel"."""
        return getattr(self.module(), f"{self.prefix}{name}")


FAMILIES = (
    Family("llama", "Llama", causal=True),
    Family("mistral", "Mistral", causal=True),
    Family("qwen2", "Qwen2", causal=True),
    Family("qwen3", "Qwen3", causal=True),
    Family("vit", "ViT", causal=False),
    Family("deit", "DeiT", causal=False),
    Family("swin", "Swin", causal=False),
    Family("bert", "Bert", causal=False),
    Family("roberta", "Roberta", causal=False),
)


def find_family(model: object) -> Family | None:
    """The family a model of transformers belongs to, by its class or a class it inherits from."""
    return _of_type(type(model))


def family_of(cls: type) -> Family:
    """The family of one of transformers' model or config classes."""
    family = _of_type(cls)
    if family is None:
        raise InputError("model", cls.__name__, f"a class of {', '.join(f.prefix for f in FAMILIES)}")
    return family


def _of_type(cls: type) -> Family | None:
    for base in cls.__mro__:
        for family in FAMILIES:
            if base.__module__.startswith(f"transformers.models.{family.model_type}."):
                return family
    return None
