"""The vision backbones in timm's registry. Importing this needs timm; `subquad.models.vision` does so once timm is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from subquad.models.vision.backbone import Backbone, image_sides
from subquad.models.vision.variants import VARIANTS, Variant


def _least(variant: Variant, options: dict[str, Any]) -> int:
    """Rows and columns of an image, at least: the total stride, or a patch."""
    return Backbone.least if issubclass(variant.model, Backbone) else options.get("patch_size", 16)


def _config(variant: Variant) -> dict[str, Any]:
    staged, least = issubclass(variant.model, Backbone), _least(variant, variant.options)
    return {
        "num_classes": 1000,
        "input_size": (3, variant.image, variant.image),
        "min_input_size": (3, least, least),
        "fixed_input_size": False,
        "pool_size": (variant.image // 32,) * 2 if staged else None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": variant.first_conv,
        "classifier": "head.fc",
        "paper_ids": f"arXiv:{variant.paper}",
    }


default_cfgs = generate_default_cfgs({name: _config(variant) for name, variant in VARIANTS.items()})


def _entry_point(name: str, variant: Variant) -> Callable[..., Any]:
    def create(pretrained: bool = False, **options: Any) -> Any:
        # all four stages; of equal blocks, the last three
        features = {"out_indices": (0, 1, 2, 3) if issubclass(variant.model, Backbone) else 3, "feature_cls": "getter"}
        if "img_size" not in variant.options and "img_size" in options:  # nothing here is made for one size
            image_sides(options.pop("img_size"), _least(variant, options))
        return build_model_with_cfg(variant.model, name, pretrained, feature_cfg=features, **{**variant.options, **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}, randomly initialised; options as those of `{variant.model.__module__}.{variant.model.__name__}`."
    return create


for _name, _variant in VARIANTS.items():
    globals()[_name] = register_model(_entry_point(_name, _variant))
