"""Vision backbones: RAVLT and MAViT, in four sizes each.

>>> from subquad.models.vision.ravlt import vision_model
>>> model = vision_model("ravlt_s")                                  # needs no timm
>>> import subquad, timm
>>> model = timm.create_model("ravlt_s", features_only=True)         # in whichever order the two are imported

Neither timm nor the models are imported here: they are registered when timm's own models have been imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TIMM, OURS = "timm.models", "subquad.models.vision.timm_models"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `timm.models` as Python would, and registers our models once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != TIMM:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(OURS)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Make the models known to timm, whichever of the two is imported first."""
    if TIMM in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
