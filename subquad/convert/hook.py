"""Teach transformers' Auto classes about saved models with swapped attention, without importing transformers.

`AutoConfig.from_pretrained` is where every Auto class begins to read a folder. `install()` wraps it, at once if transformers'
Auto classes are imported already, else when they are; the first call then registers the swapped families.
"""

from __future__ import annotations

from typing import Any

from subquad.imports import when_imported

AUTO = "transformers.models.auto.configuration_auto"


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
    when_imported(AUTO, _wrap)


install()
