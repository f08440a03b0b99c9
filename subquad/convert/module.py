"""SwappedAttention: a model's attention module with a mechanism between its own projections."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import Attention, attention


class SwappedAttention(nn.Module):
    """Stands where `original` stood. It holds the original's own submodules under their own names, so that state dicts keep
    their keys, and the mechanism as `mechanism`. The original is kept, unregistered, for `restore`.

    Args:
        original: the module replaced.
        mechanism: what mixes the tokens.
        path: where it stands in the model, such as ``model.layers.3.self_attn``.
    """

    projection: ClassVar[str] = "o_proj"  # the output projection's name; its input is what `heads_output` returns
    plain_softmax: ClassVar[bool] = True  # the original's weights are the softmax of q·k / √D, without a bias
    original: nn.Module

    def __init__(self, original: nn.Module, mechanism: Attention, path: str) -> None:
        super().__init__()
        for name, child in original.named_children():
            setattr(self, name, child)
        self.mechanism = mechanism
        self.path = path
        self.placement: dict[str, Any] = {}  # options of `swap` that are not the mechanism's
        self.__dict__["original"] = original  # past nn.Module's registration: its weights are already here
        self.train(original.training)

    @property
    def name(self) -> str:
        """The mechanism's name."""
        return self.mechanism.card.name

    def heads_output(self, *args: Any, **kwargs: Any) -> Tensor:
        """What goes into the output projection, ``[B, N, H·V]``; takes what `forward` takes."""
        raise TypeError(f"{type(self).__name__} must define heads_output()")

    def release(self) -> nn.Module:
        """The original, with the submodules as they are now (they may have been replaced, by an adapter for instance)."""
        for name, _ in list(self.original.named_children()):
            setattr(self.original, name, getattr(self, name))
        return self.original.train(self.training)

    @torch.no_grad()
    def initialise(self) -> None:
        """Give every parameter and buffer of the mechanism that was not read from a file its first value.

        After loading, these hold whatever was in memory: non-persistent buffers always, parameters if the file lacks them.
        """
        fresh = remake(self.mechanism)
        values = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        held = {**dict(self.mechanism.named_parameters()), **dict(self.mechanism.named_buffers())}
        for name, tensor in held.items():
            if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta:
                tensor.copy_(values[name])
        for module in self.mechanism.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers passes over it


def make(name: str, like: Tensor, heads: int, head_dim: int, **rest: Any) -> Attention:
    """A mechanism on the device of `like`, its parameters in the dtype of `like`.

    It is made in float32 on the CPU, so that constants are exact and can be computed even while a model is being built on the
    meta device in bfloat16. Parameters then take the model's dtype, 16-bit ones included, as they meet the model's hidden
    states in matrix products (train a 16-bit model under autocast or in float32). Buffers keep the dtype they were made
    with: they are constants such as decays.
    """
    if not like.is_floating_point():
        raise InputError("model", f"weights of dtype {str(like.dtype).removeprefix('torch.')}", "a model that is not quantized")
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            made = attention(name, heads, head_dim, **rest)
    finally:
        torch.set_default_dtype(default)
    made = made.to(like.device)
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(like.dtype)
    return made


def remake(mechanism: Attention) -> Attention:
    """A mechanism of the same kind and sizes with first values, in float32 on the CPU."""
    sizes = {name: getattr(mechanism, name) for name in ("kv_heads", "value_dim", "hidden_size", "layer")}
    like = torch.empty(0, dtype=torch.float32)
    return make(mechanism.card.name, like, mechanism.heads, mechanism.head_dim, **sizes, **mechanism.options)
