"""Every vision backbone by name: its class, the options of its published size, and what timm is told of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from subquad.checks import nearest
from subquad.models.vision import inline, l2vit, lightnet, nalaformer, ravlt
from subquad.models.vision.backbone import ImageModel


@dataclass(frozen=True)
class Variant:
    """A published model.

    Args:
        model, options: its class, and keyword arguments of it.
        paper: arXiv number.
        image: rows and columns of the images that it was trained on.
        first_conv: where its first convolution is.
    """

    model: type[ImageModel]
    options: dict[str, Any]
    paper: str
    image: int = 224
    first_conv: str = "stem.0"


VARIANTS = {
    **{n: Variant(ravlt.RAVLT, v.options, "2411.07635" if v.linear == "rala" else "2507.00698") for n, v in ravlt.VARIANTS.items()},
    **{n: Variant(nalaformer.NaLaFormer, options, "2506.21137") for n, options in nalaformer.VARIANTS.items()},
    **{n: Variant(l2vit.L2ViT, options, "2501.16182", first_conv="stem.1") for n, options in l2vit.VARIANTS.items()},
    **{n: Variant(inline.InLineDeiT, options, "2412.06590", options["img_size"], "stem.1") for n, options in inline.DEIT.items()},
    **{n: Variant(inline.InLineSwin, options, "2412.06590", first_conv="stem.1") for n, options in inline.SWIN.items()},
    **{n: Variant(lightnet.LightNet, options, "2405.21022", first_conv="stem.1") for n, options in lightnet.VARIANTS.items()},
}


def make(name: str, options: dict[str, Any]) -> Any:
    """What `subquad.models.vision.vision_model` does."""
    if name not in VARIANTS:
        raise nearest("name", name, VARIANTS, "vision model")
    model, known = VARIANTS[name].model, _options(VARIANTS[name].model)
    for option in options:
        if option not in known:
            raise nearest("options", option, known, f"option of {model.__name__}")
    return model(**{**VARIANTS[name].options, **options})


def _options(model: type[ImageModel]) -> list[str]:
    """What its constructor takes by name, that of its base class too where it hands options on."""
    names: list[str] = []
    for made in (kind.__dict__["__init__"] for kind in model.__mro__ if "__init__" in kind.__dict__):
        found = inspect.signature(made).parameters.values()
        names += [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        if all(p.kind != p.VAR_KEYWORD for p in found):
            break
    return names
