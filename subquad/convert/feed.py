"""Data of a run, whatever they are: one batch a step, as a dict of the model's arguments."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.models.text import Batches


class Feed:
    """Whatever the data are, one batch a step: a dict of the model's arguments. `settings` tell one feed from another."""

    def __init__(self, data: Any, steps: int, batch: int, length: int, seed: int) -> None:
        if isinstance(data, list | tuple) and data and all(isinstance(x, int) for x in data):
            data = torch.tensor(data)
        if isinstance(data, Tensor):
            if data.dim() != 1:
                raise InputError("data", shape_of(data), "token ids [T], or an iterable of batches")
            data = Batches(data, length, steps, seed, batch=batch)
        if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
            raise InputError("data", type(data).__name__, "token ids [T], or an iterable of batches")
        self.data = data
        self.iterator: Iterator[Any] = iter(())
        self.taken = 0  # batches that the iterator has given
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        data = self.data
        if isinstance(data, Batches):
            return {"data": digest_of(data.tokens), "length": data.length, "batch": data.batch}
        if isinstance(data, Sequence):
            if not len(data):
                raise InputError("data", "no batch", "at least one")
            first = [x for x in self[0].values() if isinstance(x, Tensor)]
            return {"data": f"{len(data)} batches, {digest_of(*first)}"}
        return {"data": type(data).__name__}

    def __getitem__(self, step: int) -> dict[str, Any]:
        item = self.data[step % len(self.data)] if isinstance(self.data, Sequence) else self._next(step)
        if isinstance(item, Mapping):
            return dict(item)
        if isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point():
            return {"input_ids": item}
        was = shape_of(item) if isinstance(item, Tensor) else type(item).__name__
        raise InputError("data", f"a batch that is {was}", "a dict of the model's arguments, or token ids [B, N]")

    def _next(self, step: int) -> Any:
        """Batch number `step` of an iterable that can only be read in order; it begins again at its end."""
        while True:
            item = next(self.iterator, None)
            if item is None:
                self.iterator = iter(self.data)
                item = next(self.iterator, None)
                if item is None:
                    raise InputError("data", f"an end after {self.taken} batches", f"{step + 1} batches, or an iterable that begins again")
            self.taken += 1
            if self.taken == step + 1:
                return item


def digest_of(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update((x.float() if x.is_floating_point() else x).numpy().tobytes())
    return digest.hexdigest()[:16]
