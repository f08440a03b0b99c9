"""A progress bar on standard error, for what is counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def tracked(label: str, things: Sequence[Any], show: bool) -> Iterable[Any]:
    """The things one by one, under a bar if `show` and standard error is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(things, label, console=console, transient=True, disable=not (show and console.is_terminal))
