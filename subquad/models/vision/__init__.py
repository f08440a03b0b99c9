"""Vision backbones: RAVLT, MAViT, NaLaFormer, L²ViT, InLine and LightNet, in several sizes each.

>>> from subquad.models.vision import vision_model
>>> model = vision_model("ravlt_s")                                  # needs no timm
>>> import subquad, timm
>>> model = timm.create_model("ravlt_s", features_only=True)         # in whichever order the two are imported

Neither timm nor the models are imported here: they are registered when timm's own models have been imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from subquad.imports import when_imported

if TYPE_CHECKING:
    from subquad.models.vision.released import load_released

__all__ = ["install", "load_released", "vision_model"]


def install() -> None:
    """Make the models known to timm, whichever of the two is imported first."""
    when_imported("timm.models", lambda _: importlib.import_module("subquad.models.vision.timm_models"))


def vision_model(name: str, **options: Any) -> Any:
    """A published vision backbone, randomly initialised. timm is not needed.

    >>> vision_model("mavit_t", num_classes=10, drop_path_rate=0.0)
    >>> vision_model("inline_deit_small")(torch.randn(2, 3, 288, 288)).shape
    torch.Size([2, 1000])

    Args:
        name: such as "ravlt_s", "nalaformer_b", "l2vit_t", "inline_swin_tiny" or "lightnet_s"; an unknown one is answered with its nearest.
        options: of the model's class, in place of the published size's.

    Returns:
        a `subquad.models.vision.backbone.ImageModel`.

    Raises:
        InputError: an unknown name, or options that do not fit.
    """
    from subquad.models.vision import variants

    return variants.make(name, options)


def __getattr__(name: str) -> Any:
    if name == "load_released":  # its module has all the models
        return importlib.import_module("subquad.models.vision.released").load_released
    raise AttributeError(f"module 'subquad.models.vision' has no attribute {name!r}")


install()
