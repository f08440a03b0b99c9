"""Text that a model writes itself: data to teach its converted copy with, where there is no other.

Sequences are sampled from the model's own distribution, from the start of a document on; one that ends goes on with the next
document. Each batch has a seed of its own and is kept in a file that appears whole or not at all, so that a run that died goes
on, and another that asks for the same gets it from the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.checks import InputError
from subquad.files import whole, writing
from subquad.models.fingerprint import fingerprint
from subquad.models.load import cache_folder
from subquad.models.progress import tracked

_CACHES = ("cache", "past_key_values")  # transformers names it so from 5.24 on, and so before


def self_text(
    model: Any,
    tokens: int,
    *,
    length: int = 512,
    batch: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Token ids ``[tokens]`` sampled from a causal language model.

    >>> taught = self_text(teacher, 200_000)
    >>> subquad.linearize(model, "lolcats", taught)

    Args:
        tokens: how many.
        length: of a sequence; the next begins a document anew.
        batch: sequences sampled side by side.
        cache: folder of the finished batches, in one of its own for this model and these settings (default: the user's cache).
        progress: show a bar on a terminal.

    Raises:
        InputError: numbers that are not usable, a model that names no token to begin with, or a cache that cannot be written to.
    """
    for name, value in (("tokens", tokens), ("length", length), ("batch", batch)):
        if type(value) is not int or value < 1:
            raise InputError(name, value, "a positive integer")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise InputError("temperature", temperature, "a positive number")
    first = _first_token(model)
    settings = {"length": length, "batch": batch, "temperature": float(temperature), "seed": seed, "first": first}
    key = hashlib.sha256(f"{fingerprint(model, lambda name: False)} {json.dumps(settings)}".encode()).hexdigest()[:16]
    folder = Path(cache if cache is not None else cache_folder()) / f"self-text-{key}"
    count = -(-tokens // (length * batch))
    was = model.training
    try:
        model.eval()
        parts = [_part(model, folder, index, settings) for index in tracked("sampling", range(count), progress)]
    finally:
        model.train(was)
    return torch.cat(parts).flatten()[:tokens].long()


def _first_token(model: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(model.config, name, None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            return value
    raise InputError("model", f"{type(model).__name__} without bos_token_id and eos_token_id", "a model that names one")


def _part(model: Any, folder: Path, index: int, settings: dict[str, Any]) -> Tensor:
    """Batch number `index`, ``[batch, length]``: from its file, or sampled and put there."""
    file = folder / f"part-{index:06d}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # missing or damaged: sample it
        kept = load_file(file)["tokens"]
        if tuple(kept.shape) == (settings["batch"], settings["length"]):
            return kept
    found = sample(model, index=index, **settings).int().cpu()
    with writing("cache", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with whole(file) as draft:
            save_file({"tokens": found}, draft)
    return found


@torch.no_grad()
def sample(model: Any, *, first: int, length: int, batch: int, temperature: float, seed: int, index: int) -> Tensor:
    """Token ids ``[batch, length]`` after `first`, which is not among them."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed((seed * 1_000_003 + index) % 2**63)
    given = torch.full((batch, 1), first, device=device)
    held: dict[str, Any] = {}
    made = []
    for _ in range(length):
        out = model(input_ids=given, use_cache=True, logits_to_keep=1, **held)
        name = next(name for name in _CACHES if name in out)
        held = {name: out[name]}
        weights = (out.logits[:, -1].float() / temperature).softmax(-1)
        given = torch.multinomial(weights, 1, generator=generator)
        made.append(given)
    return torch.cat(made, 1)
