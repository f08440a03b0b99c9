"""Low-rank adapters (peft's) on a model's projections: added in place, merged in place.

    W′ = W + (α / r) B A        A [r, in] random, B [out, r] zero at first: the model starts as it was

Hu et al.: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from subquad.checks import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def merge_lora(model: Any) -> Any:
    """Fold a model's low-rank adapters into its weights, in place; returns the model, which then saves as any other.

    >>> subquad.finetune(model, tokens, steps=100)
    >>> subquad.merge_lora(model).save_pretrained("folder")

    Raises:
        InputError: no adapters, or adapters whose values are not finite.
    """
    layers = adapters(model)
    if not layers:
        raise InputError("model", f"{type(model).__name__} without low-rank adapters", "a model that subquad.finetune trained")
    for path, layer in layers.items():
        if not all(bool(p.isfinite().all()) for name, p in layer.named_parameters() if "lora_" in name):
            raise InputError("model", f"adapters of {path} that are not finite", "a model whose training went well")
    for layer in layers.values():
        layer.merge()
    _take_out(model, layers)
    return model


def projections(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths of a model's linear layers of these names, mechanisms' own left out.

    Raises:
        InputError: a name that no linear layer has (the message lists those there are), or a model with adapters.
    """
    if adapters(model):
        raise InputError("model", f"{type(model).__name__} with low-rank adapters", "one without: subquad.merge_lora(model) first")
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mechanism." not in path and "." in path:
            found.setdefault(path.rpartition(".")[2], []).append(path)
    if isinstance(targets, str) or not targets:
        raise InputError("targets", repr(targets), f"names of linear layers; there are {', '.join(found)}")
    for name in targets:
        if name not in found:
            raise InputError("targets", repr(name), f"names of linear layers; there are {', '.join(found)}")
    return [path for name in dict.fromkeys(targets) for path in found[name]]


def add_lora(model: nn.Module, paths: Sequence[str], rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Put adapters on the linear layers at these paths; returns their parameters, of the weights' dtype, by name.

    All other parameters stop to require gradients. Beside 16-bit weights a `Run` keeps what they learn in
    float32.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("targets", f"low-rank adapters without peft ({error})", "pip install 'subquad[convert]'") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(paths), lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model)
    for layer in adapters(model).values():
        layer.train(layer.get_base_layer().training)
    model.requires_grad_(False)
    found = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    for name, p in found.items():
        adapted: Any = model.get_submodule(name.partition(".lora_")[0])
        beside = adapted.get_base_layer().weight.dtype
        p.data = p.data.to(beside if beside.is_floating_point and beside.itemsize > 1 else torch.float32)  # beside quantised weights
        p.requires_grad_(True)
    return found


def adapters(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by path."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def drop_lora(model: nn.Module) -> None:
    """Take adapters out again; what they learnt is lost."""
    _take_out(model, adapters(model))


def _take_out(model: Any, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model as if it had no adapters, for a while."""
    layers = adapters(model).values()
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextlib.contextmanager
def weights_kept(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Give the linear layers at these paths their weights back at the end, whatever was merged into them."""
    weights = [model.get_parameter(f"{path}.weight") for path in paths]
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before):
                weight.copy_(value)
