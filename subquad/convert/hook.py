"""Teach transformers' Auto classes about saved models with swapped attention, without importing transformers.

`AutoConfig.from_pretrained` is where every Auto class begins to read a folder. `install()` wraps it, at once if transformers'
Auto classes are imported already, else when they are; the first call then registers the swapped families.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as Python would, and wraps AutoConfig once it has been executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: Any) -> None:
    read = module.AutoConfig.from_pretrained.__func__
    if getattr(read, "_registers_subquad", False):
        return

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Only now: while transformers is being imported its models cannot be imported yet.
        from subquad.convert.saving import register_families

        register_families()
        return read(cls, *args, **kwargs)

    from_pretrained.__doc__ = read.__doc__
    from_pretrained._registers_subquad = True  # type: ignore[attr-defined]
    module.AutoConfig.from_pretrained = classmethod(from_pretrained)


def install() -> None:
    """Make saved swapped models known to transformers, whichever of the two is imported first."""
    if AUTO in sys.modules:
        _wrap(sys.modules[AUTO])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


install()
