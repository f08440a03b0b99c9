"""Vision backbones: RAVLT, MAViT, NaLaFormer and L²ViT, in several sizes each.

>>> from subquad.models.vision.ravlt import vision_model
>>> model = vision_model("ravlt_s")                                  # needs no timm
>>> import subquad, timm
>>> model = timm.create_model("ravlt_s", features_only=True)         # in whichever order the two are imported

Neither timm nor the models are imported here: they are registered when timm's own models have been imported.
"""

from __future__ import annotations

import importlib

from subquad.imports import when_imported


def install() -> None:
    """Make the models known to timm, whichever of the two is imported first."""
    when_imported("timm.models", lambda _: importlib.import_module("subquad.models.vision.timm_models"))


install()
