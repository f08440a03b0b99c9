"""RAVLT and MAViT in timm's registry. Importing this needs timm; `subquad.models.vision` does so once timm is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from subquad.models.vision.ravlt import RAVLT, STRIDE, VARIANTS

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "min_input_size": (3, STRIDE, STRIDE),
            "fixed_input_size": False,
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0",
            "classifier": "head.fc",
            "paper_ids": "arXiv:" + ("2411.07635" if variant.linear == "rala" else "2507.00698"),
        }
        for name, variant in VARIANTS.items()
    }
)


def _entry_point(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, **options: Any) -> Any:
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(RAVLT, name, pretrained, feature_cfg=features, **{**VARIANTS[name].options, **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}, randomly initialised; options as those of `subquad.models.vision.ravlt.RAVLT`."
    return create


for _name in VARIANTS:
    globals()[_name] = register_model(_entry_point(_name))
