"""Checkpoints as authors released them, under the key names of their code: RAVLT (qhfan/RALA), MAViT (qhfan/MALA),
InLine-DeiT and InLine-Swin (LeapLabTHU/InLine), L²ViT (ChuanyangZheng/L2ViT)."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.models.vision.backbone import ImageModel
from subquad.models.vision.inline import InLineDeiT, InLineSwin
from subquad.models.vision.l2vit import L2ViT
from subquad.models.vision.ravlt import RAVLT

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class _Names:
    """How authors' names become ours: each rule turns part of one, and a name may need several.

    Args:
        rules: patterns and what takes their place.
        derived: names of constants that are computed here.
    """

    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]]
    derived: str = r"(?!)"  # none

    def ours(self, name: str) -> str:
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def _downsample(parts: Mapping[str, str]) -> tuple[str, Callable[[re.Match[str]], str]]:
    """They count a downsampling to the stage before it, we to the one after."""
    pattern = rf"^layers\.(\d+)\.downsample\.({'|'.join(parts)})\."
    return pattern, lambda found: f"stages.{int(found[1]) + 1}.downsample.{parts[found[2]]}."


_FINAL_NORM, _CLASSIFIER = (r"^norm\.", "head.norm."), (r"^head\.(weight|bias)$", r"head.fc.\1")
_FEED_FORWARD = [(r"\.mlp\.fc1\.", ".ffn.0."), (r"\.mlp\.fc2\.", ".ffn.2.")]
_STAGES = (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks.")
_PREDICTED = (r"\.attn\.residual\.", ".attn.local.predict.")
_PATCHES = (r"^patch_embed\.proj\.", "stem.1.")

_NAMES: dict[type[ImageModel], _Names] = {
    RAVLT: _Names(
        [
            _downsample({"reduction": "0", "norm": "1"}),
            (r"^patch_embed\.proj\.", "stem."),
            _STAGES,
            (r"\.pos\.", ".position."),
            (r"\.norm([12])\.norm\.", r".norm\1."),
            (r"\.attn\.qkvo\.", ".attn.qkvg."),
            (r"\.attn\.lepe\.", ".attn.local."),
            (r"\.ffn\.dwconv\.", ".ffn.conv."),
            (r"\.gamma_([12])$", r".gamma\1"),
            (r"^proj\.", "head.conv."),
            _FINAL_NORM,
            _CLASSIFIER,
        ],
        derived=r"^layers\.\d+\.RoPE\.angle$",  # the rotary's frequencies
    ),
    InLineDeiT: _Names([_PATCHES, _PREDICTED, *_FEED_FORWARD, _CLASSIFIER]),
    InLineSwin: _Names(
        [
            _downsample({"reduction": "reduction", "norm": "norm"}),
            _PATCHES,
            (r"^patch_embed\.norm\.", "stem.2."),
            _STAGES,
            _PREDICTED,
            (r"\.attn\.relative_position_bias_table$", ".attn.bias"),
            *_FEED_FORWARD,
            _FINAL_NORM,
            _CLASSIFIER,
        ],
        derived=r"\.(attn_mask|attn\.relative_position_index)$",
    ),
    L2ViT: _Names(
        [
            (r"^downsample_layers\.0\.proj\.proj\.(\d)\.", lambda found: f"stem.{int(found[1]) + 1}."),
            (r"^downsample_layers\.0\.norm\.", "stem.6."),
            (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.downsample.2."),
            (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.downsample.0."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.cpe\.0\.proj\.", ".position."),
            (r"\.cpe\.1\.proj\.", ".position2."),
            (r"\.attn\.temperature$", ".attn.attend.temperature"),
            (r"\.local_mp\.bn\.", ".local.norm."),
            (r"\.local_mp\.", ".local."),
            *_FEED_FORWARD,
            _FINAL_NORM,
            _CLASSIFIER,
        ]
    ),
}


def has_released(model: object) -> bool:
    """Whether `load_released` knows the names of this model's authors."""
    return isinstance(model, tuple(_NAMES))


def load_released(model: Model, path: str | Path) -> Model:
    """Load a released checkpoint into a model of the same size, with its number of classes, and return the model.

    >>> model = load_released(vision_model("ravlt_t"), "RAVLT_T.pth")
    >>> model.reset_classifier(10)                                      # for other classes

    Args:
        model: a RAVLT, MAViT, InLine or L²ViT network of `vision_model`, or of `timm.create_model` without features_only.
        path: a .pth file, read by `torch.load(weights_only=True)`, or a .safetensors file; the tensors may stand under "model".

    Raises:
        InputError: a file that is missing, cannot be read safely, or does not fit; the model is then as it was.
    """
    kind = next((kind for kind in _NAMES if isinstance(model, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in _NAMES)
        raise InputError("model", type(model).__name__, f"a network whose authors released weights, as vision_model() makes: {known}")
    path, names = Path(path), _NAMES[kind]
    own = model.state_dict()
    found = {names.ours(name): tensor for name, tensor in read_checkpoint(path).items() if not re.search(names.derived, name)}
    missing, unknown = [n for n in own if n not in found], [n for n in found if n not in own]
    if missing:
        raise InputError("path", f"{path}, which has no {_first(missing)}", "a checkpoint of this model's size")
    if unknown:
        raise InputError("path", f"{path}, which also has {_first(unknown)}", "a checkpoint of this model's size")
    check_numbers(own, found, "path", path)
    wrong = [n for n in own if _squeezed(found[n]) != _squeezed(own[n])]
    if wrong:
        shapes = [f"{n} {list(found[n].shape)} where the model has {list(own[n].shape)}" for n in wrong]
        raise InputError("path", f"{path}, with {_first(shapes)}", "a checkpoint of this model's size and number of classes")
    model.load_state_dict({n: found[n].reshape(own[n].shape) for n in own})
    return model


def check_numbers(own: Mapping[str, Tensor], found: Mapping[str, Tensor], argument: str, path: Path) -> None:
    """Raises InputError where `found` has another kind of numbers than `own`. Counts may be real, as in files cast as a whole."""
    wrong = [n for n, x in own.items() if _kind(found[n]) not in (_kind(x), "real")]
    if wrong:
        kinds = [f"{n} of {_dtype(found[n])} where the model has {_dtype(own[n])}" for n in wrong]
        raise InputError(argument, f"{path}, with {_first(kinds)}", "numbers of the model's kind, in any precision")


def _kind(tensor: Tensor) -> str:
    return (
        "real" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _storage(tensor: Tensor) -> str:
    """How it holds its numbers; a meta tensor holds none."""
    if tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else "nested"
    return "dense" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape up to a 1×1 convolution's, or a broadcast scale's, sides of 1."""
    return tuple(side for side in tensor.shape if side != 1)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .pth or .safetensors file, of which nothing else is executed; they may stand under "model" or "state_dict"."""
    if not path.is_file():
        raise InputError("path", f"{path}, which is not a file", "a .pth or .safetensors file")
    held: Any
    try:
        if path.suffix == ".safetensors":
            held = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the training script's options, kept beside the tensors
                held = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's words are of how to load it all the same
            reason = "it is damaged, or holds more than tensors"
        raise InputError("path", f"{path}, which cannot be read ({reason})", "a whole file of tensors") from None
    for key in ("model", "state_dict"):
        held = held.get(key, held) if isinstance(held, Mapping) else held
    if isinstance(held, Mapping) and held and all(isinstance(n, str) and n.startswith("module.") for n in held):
        held = {n.removeprefix("module."): x for n, x in held.items()}  # saved from torch's data-parallel wrapper
    if not isinstance(held, Mapping) or not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in held.items()):
        raise InputError("path", f"{path}, which holds {type(held).__name__}", 'a state dict of tensors, or one under "model"')
    odd = [f"{n} ({_storage(x)})" for n, x in held.items() if _storage(x) != "dense"]
    if odd:
        raise InputError("path", f"{path}, with {_first(odd)}", "dense tensors that hold their numbers")
    return held
