"""Image models by name, and images as they take them: models of timm, those of this library included, and folders of transformers'."""

from __future__ import annotations

import difflib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.convert.size import resize
from subquad.models.load import DEFAULT, need, one_line, quiet
from subquad.models.vision.released import check_numbers, has_released, load_released, read_checkpoint

Pair = tuple[int, int]
FAMILIES = ("vit", "deit", "swin")  # of transformers
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MOST = 16  # images of a folder that are read
UNTRAINED = "as first made, untrained"


def is_image_model(name: str) -> bool:
    """Whether `load_image_model` knows what that is: a folder of an image model, or a name of timm's that is no file or folder."""
    if Path(name).is_dir():
        return _model_type(Path(name)) in FAMILIES
    if name == DEFAULT or "/" in name or Path(name).exists() or importlib.util.find_spec("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name))


def own_sides(name: str) -> Pair:
    """Rows and columns of the images that a model is for, 224 where nothing says so."""
    if Path(name).is_dir():
        side = _config(Path(name)).get("image_size", 224)
        sides = side if isinstance(side, list) else [side, side]
        if len(sides) != 2 or not all(type(one) is int and one > 0 for one in sides):
            raise InputError("model", f"{name}, whose config.json has image_size {side!r}", "an integer of at least 1, or two")
        return sides[0], sides[1]
    try:
        from timm.models import get_pretrained_cfg
    except ImportError:
        return 224, 224
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return config.input_size[1:] if config is not None and config.input_size else (224, 224)


def load_image_model(
    name: str, sides: Pair | None = None, *, weights: Path | None = None, pretrained: bool = False
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model for images, in eval mode on the CPU, and the mean and deviation of its pixels ``[3, 1, 1]``.

    Args:
        name: a model of timm or of this library, or a folder that `save_pretrained` of transformers wrote of a ViT, DeiT or Swin.
        sides: rows and columns of its images; None for its own.
        weights: a file of weights (default: those of the folder; of a name, as first made).
        pretrained: weights from timm's hub.

    Raises:
        InputError: no such model, or weights that are not its own.
    """
    if weights is not None and pretrained:
        raise InputError("--weights", str(weights), "a file, or --pretrained, not both")
    if weights is not None and not weights.is_file():
        raise InputError("--weights", repr(str(weights)), "a file that exists")
    if not Path(name).is_dir():
        return _timm(name, sides, weights, pretrained)
    if pretrained:
        raise InputError("--pretrained", f"with the folder {name}", "a model of timm; a folder has weights of its own")
    model, statistics = _folder(Path(name))
    if weights is not None:
        load_weights(model, weights)
    return resize(model, sides) if sides not in (None, own_sides(name)) else model, statistics


def weights_words(name: str, weights: Path | None, pretrained: bool) -> str:
    """Where `load_image_model` has a model's weights from, in words."""
    own = "the folder's" if Path(name).is_dir() else UNTRAINED
    return "timm's hub" if pretrained else str(weights or own)


def _timm(name: str, sides: Pair | None, weights: Path | None, pretrained: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise InputError("model", f"{name!r}, without timm ({error})", "timm installed: pip install 'subquad[convert]'") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        near = f"; nearest: {', '.join(close)}" if close else ", as timm.list_models() lists them, or a folder of transformers'"
        raise InputError("model", repr(name), f"an image model of timm, or of this library{near}")
    fixed = sides is not None and name.startswith(("vit_", "deit", "flexivit", "swin_"))  # their size is set when they are made
    sized: dict[str, Any] = {"img_size": sides} if fixed else {}
    try:
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=pretrained, **sized)
    except Exception as error:  # whatever timm or its hub says
        raise InputError("model", f"{name!r} ({error})", "a model that timm can make here") from None
    if weights is not None:
        load_weights(model, weights)
    config = resolve_model_data_config(model)
    mean, deviation = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return model.eval(), (mean, deviation)


def _folder(path: Path) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    kind = _model_type(path)
    if kind not in FAMILIES:
        was = f"{path}, a folder of {kind!r}" if kind else f"{path}, a folder without transformers' config.json"
        raise InputError("model", was, "a folder of a ViT, DeiT or Swin of transformers, or a name of timm's")
    need("transformers", "subquad[convert]")
    import transformers

    named = (_config(path).get("architectures") or [""])[0]
    auto: Any = transformers.AutoModelForImageClassification if named.endswith("ForImageClassification") else transformers.AutoModel
    try:
        with quiet():
            model, info = auto.from_pretrained(str(path), local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except InputError:
        raise
    except Exception as error:  # damaged, or of another version: all arrive as different classes
        raise InputError("model", path, f"a folder of an image model and its weights ({one_line(error)})") from None
    missing = sorted(key for key in info["missing_keys"] if "pooler." not in key)  # it reads what all tokens end as: not looked at here
    if missing:
        raise InputError("model", f"{path} without weights for {missing[0]} ({len(missing)} missing)", "weights for every parameter")
    said = _read_json(path / "preprocessor_config.json")
    for key in ("image_mean", "image_std"):
        numbers = said.setdefault(key, [0.5] * 3)
        if not (isinstance(numbers, list) and len(numbers) == 3 and all(type(one) in (int, float) for one in numbers)):
            raise InputError("model", f"{path}, whose preprocessor_config.json has {key} {numbers!r}", "three numbers, one a channel")
    mean, deviation = (torch.tensor(said[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return model.eval(), (mean, deviation)


def _model_type(path: Path) -> str:
    return str(_config(path).get("model_type", "")).removeprefix("subquad_")


def _config(path: Path) -> dict[str, Any]:
    return _read_json(path / "config.json")


def _read_json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none, or if it holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights from .safetensors, or from a .pth that holds tensors only, under our names or the authors'; all or nothing."""
    own, found = model.state_dict(), read_checkpoint(path)
    if has_released(model) and not own.keys() <= found.keys():
        load_released(model, path)
        return
    wrong = [key for key in own if key not in found or found[key].shape != own[key].shape] + [key for key in found if key not in own]
    if wrong:
        raise InputError("--weights", f"{str(path)!r}, which differs in {', '.join(wrong[:3])}", "weights of this model")
    check_numbers(own, found, "--weights", path)
    model.load_state_dict(found)


# ---- images --------------------------------------------------------------------------------------------------------


def parse_sides(text: str) -> Pair:
    """Rows and columns of ``--size``."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(p.isdecimal() and 0 < int(p) <= 4096 for p in parts):
        raise InputError("--size", repr(text), "a side such as 224, or rowsxcolumns such as 192x256, at most 4096")
    return int(parts[0]), int(parts[-1])


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files, and of each folder the first 16 images in it; without any, the photographs that scikit-learn carries.

    Raises:
        InputError: nothing there, or no scikit-learn.
    """
    if not paths:
        spec = importlib.util.find_spec("sklearn")
        home = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "datasets" / "images"
        found = sorted(home.glob("*.jpg")) if spec else []
        if not found:
            raise InputError("--image", "none, without scikit-learn's", "image files or folders, or pip install 'subquad[digits]'")
        return found
    found = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)[:MOST] if path.is_dir() else [path]
        if not inside:
            raise InputError("--image", f"{str(path)!r}, a folder without images", "image files, or folders that hold some")
        found += inside
    return found


def read_image(path: Path, sides: Pair) -> Tensor:
    """An image file, turned upright and stretched to a size, as ``[3, rows, columns]`` in 0 … 1."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            resized = ImageOps.exif_transpose(image).convert("RGB").resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
            raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("images", f"{str(path)!r} ({error})", "image files that Pillow reads") from None
    return raw.view(*sides, 3).permute(2, 0, 1).float() / 255
