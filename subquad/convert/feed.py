"""Data of a run, whatever they are: one batch a step, as a dict of the model's arguments."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.models.text import Batches


class Feed:
    """Whatever the data are, one batch a step: a dict of the model's arguments. `settings` tell one feed from another.

    Token ids that `model` has no embedding for are refused. With `own`, token ids of another text, that text has `own_share` of
    the sequences, the first ones of each batch; `data` must then be token ids, not cut by the caller.
    """

    def __init__(
        self, data: Any, steps: int, batch: int, length: int, seed: int, model: nn.Module, own: Any = None, own_share: float = 1.0
    ) -> None:  # fmt: skip
        self.vocabulary = vocabulary(model)
        data = _as_ids(data)
        if own is not None and not isinstance(data, Tensor):  # batches of the caller's begin again where they end, and the share would not
            raise InputError("data", type(data).__name__, "token ids [T], as own is given")
        if isinstance(data, Tensor):
            if data.dim() != 1:
                raise InputError("data", shape_of(data), "token ids [T], or an iterable of batches")
            data = Batches(self._ids(data), length, steps, seed, batch=batch)
            data = data if own is None else Mixed(data, self._own(own, length), own_share)
        if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
            raise InputError("data", type(data).__name__, "token ids [T], or an iterable of batches")
        self.data = data
        self.iterator: Iterator[Any] = iter(())
        self.taken = 0  # batches that the iterator has given
        self.settings = self._settings()

    @property
    def length(self) -> int | None:
        """Tokens of every sequence; None where the batches are the caller's own."""
        return self.data.length if isinstance(self.data, Batches) else None

    def own_rows(self, step: int) -> int:
        """How many of the first sequences of a batch are of `own`."""
        return self.data.own_rows(step) if isinstance(self.data, Mixed) else 0

    def _own(self, own: Any, length: int) -> Tensor:
        own = _as_ids(own)
        if not isinstance(own, Tensor) or own.dim() != 1 or own.is_floating_point():
            raise InputError("own", shape_of(own) if isinstance(own, Tensor) else type(own).__name__, "token ids [T]")
        if own.numel() < length:
            raise InputError("own", f"{own.numel()} tokens", f"at least one sequence, {length} tokens")
        return self._ids(own, "own")

    def _settings(self) -> dict[str, Any]:
        data = self.data
        if isinstance(data, Batches):
            also = {"own": digest_of(data.own.tokens), "own_share": data.share} if isinstance(data, Mixed) else {}
            return {"data": digest_of(data.tokens), "length": data.length, "batch": data.batch, **also}
        if isinstance(data, Sequence):
            if not len(data):
                raise InputError("data", "no batch", "at least one")
            first = [x for x in self[0].values() if isinstance(x, Tensor)]
            return {"data": f"{len(data)} batches, {digest_of(*first)}"}
        return {"data": type(data).__name__}

    def __getitem__(self, step: int) -> dict[str, Any]:
        item = self.data[step % len(self.data)] if isinstance(self.data, Sequence) else self._next(step)
        if isinstance(item, Mapping):
            return self._checked(dict(item))
        if isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point():
            return {"input_ids": item if isinstance(self.data, Batches) else self._ids(item)}
        was = shape_of(item) if isinstance(item, Tensor) else type(item).__name__
        raise InputError("data", f"a batch that is {was}", "a dict of the model's arguments, or token ids [B, N]")

    def _checked(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return batch
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape != ids.shape:
            raise InputError("data", f"a batch with attention_mask {shape_of(mask)}", f"{list(ids.shape)}, as its input_ids")
        return {**batch, "input_ids": self._ids(ids)}

    def _ids(self, ids: Tensor, name: str = "data") -> Tensor:
        """Token ids, checked where that does not wait for a device."""
        if ids.is_floating_point():
            return ids
        if self.vocabulary is not None and ids.device.type == "cpu":
            check_ids(name, ids, self.vocabulary)
        return ids.long()

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


class Mixed(Batches):
    """Batches ``[batch, length]`` whose first rows are of another text, the rest of the first, each a function of (seed, step) alone.

    The rows of `own` after any number of batches are `share` of all, rounded down: batches may differ by one.

    Args:
        data: the first text, cut.
        own: token ids ``[T]`` of the other, cut in the same way and taken in an order of its own.
        share: above 0, at most 1.
    """

    def __init__(self, data: Batches, own: Tensor, share: float) -> None:
        super().__init__(data.tokens, data.length, data.steps, data.seed, batch=data.batch)
        own = own.to(data.tokens.device)  # a batch is on one device
        self.own, self.share = Batches(own, data.length, data.steps, data.seed, batch=data.batch), share

    def own_rows(self, step: int) -> int:
        return self._before(step + 1) - self._before(step)

    def __getitem__(self, step: int) -> Tensor:  # type: ignore[override]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        before, after = self._before(step), self._before(step + 1)
        rows = [self.own._piece(index) for index in range(before, after)]
        rows += [self._piece(index) for index in range(step * self.batch - before, (step + 1) * self.batch - after)]
        return torch.stack(rows)

    def _before(self, step: int) -> int:
        """Rows of `own` in all batches before a step's."""
        return math.floor(step * self.batch * self.share + 1e-9)


def _as_ids(data: Any) -> Any:
    """A list of integers as a tensor; anything else as it is."""
    if isinstance(data, list | tuple) and data and all(isinstance(x, int) for x in data):
        return torch.tensor(data)
    return data


def vocabulary(model: Any) -> int | None:
    """How many tokens a model of transformers has embeddings for; None for other models."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # timm's, and models that begin with something else
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def check_ids(argument: str, ids: Tensor, vocabulary: int) -> None:
    """Refuse token ids outside the vocabulary."""
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if wrong.numel():
        raise InputError(argument, f"token id {int(wrong[0])}", f"ids from 0 to {vocabulary - 1}: the model has {vocabulary} tokens")


def check_written(tokenizer: Any, ids: Sequence[int], model: Any) -> None:
    """Refuse token ids that a tokenizer wrote and the model has no embedding for; a wider tokenizer may have tokens that no text needs."""
    known, most = vocabulary(model), max(ids, default=0)
    if known is not None and most >= known:
        was = f"token id {most}, of a tokenizer with {len(tokenizer):,} tokens"
        raise InputError(
            "tokenizer", was, f"ids below {known:,}, the tokens that the model has embeddings for: a tokenizer of the model's own"
        )


def digest_of(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        x = x.detach().cpu().contiguous()
        digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
        digest.update((x.float() if x.is_floating_point() else x).numpy().tobytes())
    return digest.hexdigest()[:16]
