"""Image classifiers to train: any model of timm, this library's included, made for the data, with another attention if asked."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from subquad.checks import InputError
from subquad.contract import attention
from subquad.convert.plan import check_direction
from subquad.convert.swap import swap
from subquad.models.vision.l2vit import L2ViT
from subquad.models.vision.ravlt import RAVLT
from subquad.train.images import Images


def known(name: str) -> bool:
    """Whether timm has a model of that name. Raises InputError without timm."""
    return _timm().is_model(name)


def check(name: str) -> None:
    """Raises InputError for a name that timm does not have, with the nearest ones."""
    if not known(name):
        near = difflib.get_close_matches(name, names(), 3, 0.5)
        raise InputError("model", repr(name), f"a model of timm{'; nearest: ' + ', '.join(near) if near else ''}")


def check_drop_path(rate: float) -> None:
    """Raises InputError for what is no rate of stochastic depth: a block that is always dropped cannot be scaled up."""
    if not 0 <= rate < 1:
        raise InputError("drop_path", rate, "at least 0 and less than 1")


def names() -> list[str]:
    """Every model of timm."""
    return _timm().list_models()


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise InputError("model", f"no timm ({error})", "timm installed: pip install 'subquad[convert]'") from None
    return timm


def build(
    name: str, data: Images, *, mechanism: str | None = None, seed: int = 0, drop_path: float = 0.0, **options: Any
) -> nn.Module:  # fmt: skip
    """A model with random weights for these images, `seed` deciding them, in training mode.

    >>> build("ravlt_t", load("mnist"))
    >>> build("vit_tiny_patch16_224", load("mnist"), mechanism="rala")

    Args:
        name: a model of timm.
        mechanism: in place of a ViT's attention; in RAVLT, MAViT and NaLaFormer in place of the linear attention of stages 1 and 2.
        drop_path: rate of stochastic depth in the last block, less than 1.
        options: the mechanism's.

    Raises:
        InputError: an unknown model (with the nearest names), no rate, images that do not fit it, or a mechanism that cannot stand in it.
    """
    check(name)
    check_drop_path(drop_path)
    timm = _timm()
    channels, rows, columns = data.shape
    sizes: dict[str, Any] = {"in_chans": channels, "num_classes": len(data.classes)}
    config = timm.get_pretrained_cfg(name)
    if getattr(config, "fixed_input_size", False):
        sizes["img_size"] = (rows, columns)
    if drop_path:
        sizes["drop_path_rate"] = drop_path
    try:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = timm.create_model(name, pretrained=False, **sizes)
    except InputError:
        raise
    except Exception as error:  # whatever timm says of sizes that do not fit
        if "'drop_path_rate'" in str(error):
            raise InputError("drop_path", drop_path, f"0, as {name} has no stochastic depth") from None
        raise InputError("model", f"{name!r} for images of {channels} × {rows} × {columns} ({error})", "a model that takes them") from None
    _check_patch(model, name, rows, columns)
    if mechanism is not None:
        with torch.random.fork_rng([]):  # a mechanism's own parameters are drawn apart: all others are the same whatever it is
            torch.manual_seed(seed)
            _put(model, name, mechanism, options)
    _probe(model, name, data.shape)
    return model.train()


def _put(model: nn.Module, name: str, mechanism: str, options: dict[str, Any]) -> None:
    """A mechanism in place of a model's own, for tokens that all see each other."""
    if isinstance(model, L2ViT):
        raise InputError("mechanism", f"{mechanism!r} in {name}", "a ViT of timm, RAVLT, MAViT or NaLaFormer")
    if not isinstance(model, RAVLT):
        swap(model, mechanism, **options)
        return
    options = check_direction(mechanism, options, False, name)
    for layer in (block.attn for stage in model.stages[:2] for block in stage.blocks):
        made = attention(mechanism, layer.attend.heads, layer.attend.head_dim, **options)
        if made.card.needs_hidden:
            raise InputError("mechanism", f"{mechanism!r} in {name}", "one that takes q, k and v alone")
        layer.attend = made


def _check_patch(model: Any, name: str, rows: int, columns: int) -> None:
    """timm cuts off what does not fill a patch, without a word."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(patch, tuple) and (rows % patch[0] or columns % patch[1]):
        above = -(-max(rows, columns) // patch[0]) * patch[0]
        raise InputError("size", f"{rows} × {columns}", f"a multiple of {name}'s patch, {patch[0]}, such as {above}")
    info = getattr(model, "feature_info", None)
    stride = max((int(i["reduction"]) for i in info), default=1) if isinstance(info, list) else 1
    if min(rows, columns) < stride:
        raise InputError("size", f"{rows} × {columns}", f"at least {stride}, the stride of {name}")


def _probe(model: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """One blank image through the model: what it refuses, it refuses now."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *shape))
    except InputError as error:
        raise InputError("size", f"{shape[1]} × {shape[2]} ({error})", f"a size that {name} takes") from None
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise InputError("size", f"{shape[1]} × {shape[2]} ({str(error).splitlines()[0]})", f"a size that {name} takes") from None
