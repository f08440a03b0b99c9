"""Files that appear whole or not at all, and what the system says when it refuses them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from subquad.checks import InputError

REFUSALS = (OSError, SafetensorError)  # safetensors does not pass on the system's own error


def reason(error: BaseException) -> str:
    """Why, in a line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


@contextlib.contextmanager
def writing(argument: str, path: str | Path, should: str = "a folder that can be written to") -> Iterator[None]:
    """Makes what the system refuses (no such place, no permission, no space) bad input."""
    try:
        yield
    except REFUSALS as error:
        raise InputError(argument, f"{path} ({reason(error)})", should) from None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.save_pretrained, which tells of what the system refuses by a plain Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if "os error" in str(error):
            raise OSError(str(error)) from None
        raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to that becomes `path` when all is written, so that nobody meets half a file; else nothing is left of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
