"""Which layers to leave as they are: those whose replacement alone costs most.

    cost_l = nll(the model with layer l replaced) − nll(the model)         nats per token, nothing taught yet

Layers are measured one at a time: what two of them cost together may be more or less than the sum.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from subquad.checks import InputError
from subquad.convert.loss import labels_of, next_token_loss
from subquad.convert.run import seeded
from subquad.convert.swap import check_unswapped, find_host, restore, swap
from subquad.convert.transfer import moved
from subquad.models.fingerprint import fingerprint
from subquad.models.progress import tracked


def auto_keep(layers: Any) -> int | None:
    """K of "auto:K"; None for any other choice of layers."""
    match = re.fullmatch(r"auto:(\d+)", layers) if isinstance(layers, str) else None
    return None if match is None else int(match[1])


def choose_layers(
    model: Any,
    batches: Sequence[dict[str, Any]],
    to: str,
    keep: int,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[int]:
    """All layers but the `keep` whose replacement costs most, as `swap` takes them; arguments as of `layer_costs`."""
    check_keep(model, keep)
    costs = layer_costs(model, batches, to, options, seed=seed, cache=cache, progress=progress)
    worst = sorted(costs, key=lambda layer: costs[layer], reverse=True)[:keep]
    return sorted(set(costs) - set(worst))


def check_keep(model: Any, keep: int) -> None:
    """Check that layers are left to swap."""
    count = len(find_host(model).sites)
    if keep >= count:
        raise InputError("layers", f"auto:{keep}", f"fewer layers to keep than the model has, {count}")


def layer_costs(
    model: Any,
    batches: Sequence[dict[str, Any]],
    to: str,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[int, float]:
    """Nats per token that replacing one layer's attention costs, by layer; the model is left as it was.

    >>> layer_costs(model, [{"input_ids": tokens[None, :1024]}], "sliding-window", {"window": 64})

    Args:
        model: a causal language model that is not swapped.
        batches: dicts of the model's arguments.
        to, options: as `swap` takes them.
        seed: of new parameters.
        cache: a JSON file that keeps the layers measured so far, for the same model and choice.

    Raises:
        InputError: a model that is swapped.
    """
    check_unswapped(model)
    batches = [moved(batch, next(model.parameters()).device) for batch in batches]
    tokens = [int(x) for batch in batches for x in batch["input_ids"].flatten()[:64]]
    settings = {"model": fingerprint(model), "to": to, "options": dict(options), "seed": seed, "text": tokens}
    file = None if cache is None else Path(cache)
    found = _kept(file, settings)
    todo = [layer for layer in range(len(find_host(model).sites)) if layer not in found]
    original = _nll(model, batches) if todo else 0.0
    for layer in tracked("layers", todo, progress):
        with seeded(seed, -2):
            swap(model, to, layers=[layer], **options)
        try:
            found[layer] = _nll(model, batches) - original
        finally:
            restore(model)
        if file is not None:
            _keep(file, settings, found)
    return dict(sorted(found.items()))


@torch.no_grad()
def _nll(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    was, total, count = model.training, 0.0, 0
    try:
        model.eval()
        for batch in batches:
            logits = model(**{key: x for key, x in batch.items() if key != "labels"}, use_cache=False).logits
            labels = labels_of(batch)
            total += float(next_token_loss(logits, labels))
            count += int((labels != -100).sum())
    finally:
        model.train(was)
    return total / count


def _kept(file: Path | None, settings: dict[str, Any]) -> dict[int, float]:
    """The layers measured before with these settings."""
    if file is None or not file.exists():
        return {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        same = read["settings"] == json.loads(json.dumps(settings))
        return {int(layer): float(cost) for layer, cost in read["costs"].items()} if same else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # damaged: measure again


def _keep(file: Path, settings: dict[str, Any], costs: Mapping[int, float]) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({"settings": settings, "costs": dict(costs)}) + "\n", encoding="utf-8")
        os.replace(beside, file)
    except OSError as error:
        raise InputError("out", f"{file} ({error.strerror or error})", "a folder that can be written to") from None
