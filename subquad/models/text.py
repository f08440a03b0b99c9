"""Text: the embedded book, files of the user's, and how tokens are cut for training and for evaluation."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of

_OPENERS = {".xz": lzma.decompress, ".gz": gzip.decompress}
_HUB, _MOST_CHARACTERS = "hub:", 50_000_000  # what names a data set, and what is read of one
_IN_FOLDERS = (".txt", ".md", ".txt.xz", ".md.xz", ".txt.gz", ".md.gz")  # what counts as text inside a folder
_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "Capt"))
_SENTENCE_END = re.compile(rf"(?:(?<=[.!?]){_TITLES}|(?<=[.!?][\"'”’])) (?=[\"'“‘A-Z])")


def book() -> str:
    """Moby-Dick, 1.2 MB of English: the text of the demo (its source and licence: `subquad/demo/DATA.md`)."""
    packed = resources.files("subquad") / "demo" / "moby-dick.txt.xz"
    return lzma.decompress(packed.read_bytes()).decode("utf-8")


def load_text(paths: str | Path | Sequence[str | Path]) -> str:
    """The text of UTF-8 files (plain, .xz or .gz), of all .txt and .md files under folders, and of data sets, in the order given.

    >>> load_text(["notes.txt", "hub:Salesforce/wikitext:wikitext-2-raw-v1"])

    Args:
        paths: files, folders, or ``hub:owner/name`` with a ``:config`` where there are several: the "text" column of a data set's
            training part, of which the first 50 million characters are read. Needs the package datasets.

    Raises:
        InputError: a path that is missing, empty of text, damaged or not UTF-8, or a data set that cannot be read, naming it.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise InputError("text", "no path", "at least one file or folder")
    return "\n\n".join(part for path in given for part in _texts(path))


def _texts(path: str | Path) -> Iterator[str]:
    if str(path).startswith(_HUB):
        yield _data_set(str(path))
    else:
        yield from map(_read, _files(Path(path)))


def _data_set(given: str) -> str:
    """The beginning of a data set of the hub, read row by row."""
    name, _, config = given.removeprefix(_HUB).partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise InputError("text", f"{given}, without the package datasets", "datasets installed: pip install datasets") from None
    parts, length = [], 0
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            if not isinstance(row.get("text"), str):
                raise InputError("text", f"{given}, with columns {', '.join(row)}", 'a data set with a column "text"')
            parts.append(row["text"])
            length += len(row["text"])
            if length >= _MOST_CHARACTERS:
                break
    except InputError:
        raise
    except Exception as error:  # whatever the hub, the network or a data set's reader says
        raise InputError("text", f"{given} ({' '.join(str(error).split())})", "a data set of the hub that can be read here") from None
    text = "\n\n".join(parts)[:_MOST_CHARACTERS]
    if not text.strip():
        raise InputError("text", given, "a data set with text in it")
    return text


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError("text", path, "a file or folder that exists")
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(_IN_FOLDERS))
    if not found:
        raise InputError("text", path, "a folder that holds .txt or .md files")
    return found


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        opener = _OPENERS.get(path.suffix.lower())
        text = (opener(raw) if opener else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("text", path, f"UTF-8 text (byte {error.start} is not)") from None
    except (OSError, EOFError, lzma.LZMAError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise InputError("text", path, f"a readable, undamaged file ({error})") from None
    if not text.strip():
        raise InputError("text", path, "a file with text in it")
    return text


def encode(text: str, tokenizer: Any) -> Tensor:
    """Token ids ``[T]`` of a text of any length, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def split(tokens: Tensor, held_out: float | int = 0.1) -> tuple[Tensor, Tensor]:
    """Cut tokens ``[T]`` into the part to train on and the held-out end: a share of them (float) or a number (int)."""
    _check_tokens(tokens)
    total = tokens.shape[0]
    count = round(total * held_out) if isinstance(held_out, float) else held_out
    if not 0 < count < total:
        raise InputError("held_out", held_out, f"a share between 0 and 1, or fewer than the {total} tokens there are")
    return tokens[: total - count], tokens[total - count :]


class Window(NamedTuple):
    """Tokens ``[size]`` of which the last `scored` are predicted and counted; those before are context only."""

    tokens: Tensor
    scored: int


def windows(tokens: Tensor, size: int, stride: int | None = None) -> Iterator[Window]:
    """Cut tokens ``[T]`` for evaluation into windows that start every `stride` tokens (default `size`).

    Each token is scored in the first window that predicts it, so none is counted twice; the last window ends with the
    text. With `stride` = `size`, a window's first token has no context and is not scored.
    """
    _check_tokens(tokens)
    stride = size if stride is None else stride
    if not isinstance(size, int) or size < 2:
        raise InputError("size", size, "an integer of at least 2")
    if not isinstance(stride, int) or not 0 < stride <= size:
        raise InputError("stride", stride, f"an integer from 1 to the window's size, {size}")
    _check_length(tokens, size)
    return _windows(tokens, size, stride)


def _windows(tokens: Tensor, size: int, stride: int) -> Iterator[Window]:
    total, done = tokens.shape[0], 0
    for start in range(0, total, stride):
        start = min(start, total - size)
        end = start + size
        scored = min(size - 1, end - done)
        if scored > 0:
            yield Window(tokens[start:end], scored)
        done = end
        if end == total:
            return


class Batches(Sequence[Tensor]):
    """Training batches ``[batch, length]``, each a function of (seed, step) alone, so that a run resumes from a number.

    Every epoch cuts the tokens ``[T]`` afresh, from a random offset, into pieces taken in random order.

    Args:
        tokens: ``[T]``.
        length: tokens of a piece.
        steps: how many batches there are.
        seed: of the order.
        batch: pieces in a batch.
    """

    def __init__(self, tokens: Tensor, length: int, steps: int, seed: int = 0, *, batch: int = 1) -> None:
        _check_tokens(tokens)
        for name, value in (("length", length), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise InputError(name, value, "a positive integer")
        _check_length(tokens, length)
        self.tokens, self.length, self.steps, self.seed, self.batch = tokens, length, steps, seed, batch
        self.pieces = max((tokens.shape[0] - length) // length, 1)  # in each epoch; what is left is room for the offset

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:  # type: ignore[override]
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return torch.stack([self._piece(step * self.batch + row) for row in range(self.batch)])

    def _piece(self, index: int) -> Tensor:
        offset, order = _epoch(self.tokens.shape[0] - self.pieces * self.length, self.pieces, self.length, self.seed, index // self.pieces)
        start = offset + order[index % self.pieces] * self.length
        return self.tokens[start : start + self.length]


@lru_cache(maxsize=4)
def _epoch(spare: int, pieces: int, length: int, seed: int, epoch: int) -> tuple[int, list[int]]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    offset = int(torch.randint(min(spare, length) + 1, (), generator=generator))
    return offset, torch.randperm(pieces, generator=generator).tolist()


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 1 or tokens.is_floating_point():
        was = shape_of(tokens) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError("tokens", was, "an integer tensor [T]")


def _check_length(tokens: Tensor, size: int) -> None:
    if tokens.shape[0] < size:
        raise InputError("text", f"{tokens.shape[0]} tokens", f"at least one window, {size} tokens")


def sentences(text: str, *, least: int = 4, most: int = 60) -> list[str]:
    """The sentences of an English text, in order, that have from `least` to `most` words; each once.

    A sentence ends with . ! or ? (and closing quotes) before a space and a capital, quote or end; titles such as "Mr." end none.
    """
    flat = " ".join(text.split())
    parts = _SENTENCE_END.split(flat)
    return list(dict.fromkeys(part for part in parts if least <= len(part.split()) <= most))
