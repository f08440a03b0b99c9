"""Checkpoints as the authors of RAVLT and MAViT released them (qhfan/RALA, qhfan/MALA), under the key names of their code."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from subquad.checks import InputError
from subquad.models.vision.ravlt import RAVLT

# Each rule turns part of one of their names into ours; a name may need several.
_RULES = [
    (r"^patch_embed\.proj\.", "stem."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.pos\.", ".position."),
    (r"\.norm([12])\.norm\.", r".norm\1."),
    (r"\.attn\.qkvo\.", ".attn.qkvg."),
    (r"\.attn\.lepe\.", ".attn.local."),
    (r"\.ffn\.dwconv\.", ".ffn.conv."),
    (r"\.gamma_([12])$", r".gamma\1"),
    (r"^proj\.", "head.conv."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_DERIVED = re.compile(r"^layers\.\d+\.RoPE\.angle$")  # the rotary's frequencies, a constant


def load_released(model: RAVLT, path: str | Path) -> RAVLT:
    """Load a released checkpoint into a model of the same size, with 1000 classes, and return the model.

    >>> model = load_released(vision_model("ravlt_t"), "RAVLT_T.pth")
    >>> model.reset_classifier(10)                                      # for other classes

    Args:
        model: of `vision_model`, or of `timm.create_model` without features_only.
        path: a .pth file, read by `torch.load(weights_only=True)`, or a .safetensors file; the tensors may stand under "model".

    Raises:
        InputError: a file that is missing, cannot be read safely, or does not fit; the model is then as it was.
    """
    if not isinstance(model, RAVLT):
        raise InputError("model", type(model).__name__, "a RAVLT, as vision_model() makes")
    path = Path(path)
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in read_checkpoint(path).items():
        if not _DERIVED.match(name):
            found[_rename(name)] = tensor
    missing, unknown = [n for n in own if n not in found], [n for n in found if n not in own]
    if missing:
        raise InputError("path", f"{path}, which has no {_first(missing)}", "a checkpoint of this model's size")
    if unknown:
        raise InputError("path", f"{path}, which also has {_first(unknown)}", "a checkpoint of this model's size")
    wrong = [n for n in own if _squeezed(found[n]) != _squeezed(own[n])]
    if wrong:
        shapes = [f"{n} {list(found[n].shape)} where the model has {list(own[n].shape)}" for n in wrong]
        raise InputError("path", f"{path}, with {_first(shapes)}", "a checkpoint of this model's size and number of classes")
    model.load_state_dict({n: found[n].reshape(own[n].shape) for n in own})
    return model


def _rename(name: str) -> str:
    """Our name of one of their tensors. They count a downsampling to the stage before it, we to the one after."""
    down = re.match(r"^layers\.(\d+)\.downsample\.(reduction|norm)\.(.+)$", name)
    if down:
        return f"stages.{int(down[1]) + 1}.downsample.{0 if down[2] == 'reduction' else 1}.{down[3]}"
    for pattern, ours in _RULES:
        name = re.sub(pattern, ours, name)
    return name


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape up to a 1×1 convolution's, or a broadcast scale's, sides of 1."""
    return tuple(side for side in tensor.shape if side != 1)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .pth or .safetensors file, of which nothing else is executed; they may stand under "model"."""
    if not path.is_file():
        raise InputError("path", f"{path}, which is not a file", "a .pth or .safetensors file")
    held: Any
    try:
        if path.suffix == ".safetensors":
            held = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the training script's options, kept beside the tensors
                held = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError("path", f"{path}, which cannot be read ({reason})", "a whole file of tensors") from None
    held = held.get("model", held) if isinstance(held, Mapping) else held
    if not isinstance(held, Mapping) or not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in held.items()):
        raise InputError("path", f"{path}, which holds {type(held).__name__}", 'a state dict of tensors, or one under "model"')
    return held
