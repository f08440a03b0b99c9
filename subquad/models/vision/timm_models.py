"""The vision backbones in timm's registry. Importing this needs timm; `subquad.models.vision` does so once timm is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from subquad.models.vision import l2vit, nalaformer, ravlt
from subquad.models.vision.blocks import STRIDE, Backbone


@dataclass(frozen=True)
class _Entry:
    model: type[Backbone]
    options: dict[str, Any]
    paper: str
    first_conv: str = "stem.0"


_ENTRIES = {
    **{n: _Entry(ravlt.RAVLT, v.options, "2411.07635" if v.linear == "rala" else "2507.00698") for n, v in ravlt.VARIANTS.items()},
    **{n: _Entry(nalaformer.NaLaFormer, options, "2506.21137") for n, options in nalaformer.VARIANTS.items()},
    **{n: _Entry(l2vit.L2ViT, options, "2501.16182", "stem.1") for n, options in l2vit.VARIANTS.items()},
}

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
            "first_conv": entry.first_conv,
            "classifier": "head.fc",
            "paper_ids": f"arXiv:{entry.paper}",
        }
        for name, entry in _ENTRIES.items()
    }
)


def _entry_point(name: str, entry: _Entry) -> Callable[..., Any]:
    def create(pretrained: bool = False, **options: Any) -> Any:
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        return build_model_with_cfg(entry.model, name, pretrained, feature_cfg=features, **{**entry.options, **options})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}, randomly initialised; options as those of `{entry.model.__module__}.{entry.model.__name__}`."
    return create


for _name, _entry in _ENTRIES.items():
    globals()[_name] = register_model(_entry_point(_name, _entry))
