"""Passkey and needle in a haystack: is a number stated somewhere in a long text found again, by length and depth?

passkey: one number in a text of a few sentences that repeat (Mohtashami, Jaggi: Landmark Attention, arXiv 2305.16300, sec. 4.2).
needle: the number of a city, in a book, where other cities have numbers too (as "multi-key" in RULER, arXiv 2404.06654).

Prompts come from a seed. All of it works on any causal language model of transformers, swapped or not, at any length.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from subquad.bench.progress import bar
from subquad.bench.quality import Question, answered, device_of, evaluating
from subquad.checks import InputError, nearest
from subquad.convert.feed import check_written
from subquad.models.text import book, sentences

Task = Literal["passkey", "needle"]
TASKS = ("passkey", "needle")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_OPENING = {
    "passkey": "There is important information hidden inside a lot of irrelevant text. Find it and remember it.",
    "needle": "Some numbers of cities are hidden in the following text. Remember them.",
}
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Tokyo", "Rome", "Quebec", "Dublin", "Athens", "Boston", "Vienna")
_OTHERS = 3  # numbers that are not asked for
_WORDS = 8  # tokens that may stand around a number that is written


@dataclass(frozen=True)
class Hidden:
    """A prompt that ends where `answer` should follow; `choices` are the numbers to rank, the answer among them."""

    task: str
    text: str
    answer: str
    choices: tuple[str, ...]
    length: int
    depth: float


@dataclass(frozen=True)
class Cell:
    """Shares of prompts answered at one length and depth.

    exact: greedy decoding begins with the whole number.
    ranked: the right number is the likeliest of four; None if it was not looked at.
    number: by "forward", every digit is the likeliest after those before it, and after the space that may stand before the first; by
        "generate", the first number that is written is the right one, whatever words stand before it.
    """

    task: str
    length: int
    depth: float
    prompts: int
    exact: float
    ranked: float | None
    number: float


@dataclass(frozen=True)
class Retrieval:
    """All cells, in order of task, length, depth."""

    cells: tuple[Cell, ...]
    by: str
    seed: int

    def mean(self, task: str, length: int) -> float:
        """The share answered exactly at a length, over depths."""
        found = [cell.exact for cell in self.cells if (cell.task, cell.length) == (task, length)]
        return sum(found) / len(found)

    def to_json(self) -> str:
        return json.dumps({"by": self.by, "seed": self.seed, "cells": [asdict(cell) for cell in self.cells]}, indent=1) + "\n"

    def table(self) -> Table:
        """A row for each task and length, a column for each depth: exact, and in brackets the number alone."""
        depths = sorted({cell.depth for cell in self.cells})
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("task", "tokens", *(f"depth {depth:.0%}" for depth in depths), "mean"):
            table.add_column(name, justify="left" if name == "task" else "right")
        at = {(cell.task, cell.length, cell.depth): cell for cell in self.cells}
        for task, length in dict.fromkeys((cell.task, cell.length) for cell in self.cells):
            cells = [at[task, length, depth] for depth in depths]
            shown = [f"{cell.exact:.0%} ({cell.number:.0%})" for cell in cells]
            table.add_row(task, f"{length:,}", *shown, f"{self.mean(task, length):.0%}")
        return table


def hidden_prompt(task: Task, length: int, depth: float, *, index: int = 0, seed: int = 0, count: Callable[[str], int]) -> Hidden:
    """One prompt of at most `length` tokens, as near to it as whole sentences allow; the same for the same arguments.

    Args:
        task: "passkey" or "needle".
        depth: of the number that is asked for: 0 is the beginning of the text, 1 its end.
        index: which prompt of the seed.
        count: tokens of a text.

    Raises:
        InputError: an unknown task, a depth outside 0 … 1, or a length that has no room for the question.
    """
    if task not in TASKS:
        raise nearest("task", str(task), TASKS, "task")
    if not 0 <= depth <= 1:
        raise InputError("depth", depth, "0 … 1")
    pick = random.Random(f"{task}/{seed}/{index}")
    first = pick.sample(range(1, 10), 1 + _OTHERS)
    choices = tuple(f"{digit}{pick.randrange(10000):04d}" for digit in first)  # they differ in the first digit
    answer = choices[0]
    if task == "passkey":
        facts = [f"The pass key is {answer}. Remember it. {answer} is the pass key."]
        question, hay = "What is the pass key? The pass key is", _noise()
    else:
        cities = pick.sample(_CITIES, 1 + _OTHERS)
        facts = [f"The number of {city} is {number}." for city, number in zip(cities, choices)]
        question, hay = f"What is the number of {cities[0]}? The number of {cities[0]} is", _pages(pick)
    room = length - count(" ".join([_OPENING[task], *facts, question]))
    if room < 0:
        raise InputError("length", length, f"at least {length - room} tokens, for the question of {task!r}")
    filler: list[str] = []
    while (size := _counted(count, next_one := next(hay))) <= room:
        filler.append(next_one)
        room -= size
    depths = [depth, *(pick.random() for _ in facts[1:])]
    text = _told(task, filler, facts, depths, question)
    while count(text) > length and filler:  # tokens of a whole are not quite those of its parts
        filler.pop()
        text = _told(task, filler, facts, depths, question)
    order = tuple(pick.sample(choices, len(choices)))
    return Hidden(task, text, answer, order, length, depth)


def _told(task: str, filler: Sequence[str], facts: Sequence[str], depths: Sequence[float], question: str) -> str:
    said = list(filler)
    for depth, fact in sorted(zip(depths, facts), reverse=True):  # from the end, so that places stay right
        said.insert(round(depth * len(filler)), fact)
    return " ".join([_OPENING[task], *said, question])


def _noise() -> Iterator[str]:
    while True:
        yield from _NOISE


@lru_cache(maxsize=1)
def _book() -> list[str]:
    return sentences(book())


def _pages(pick: random.Random) -> Iterator[str]:
    """The book's sentences from some place on, again and again."""
    start = pick.randrange(len(_book()))
    while True:
        yield from _book()[start:]
        start = 0


@lru_cache(maxsize=65536)
def _counted(count: Callable[[str], int], sentence: str) -> int:
    return count(f" {sentence}")


@torch.no_grad()
def retrieval(
    model: Any, tokenizer: Any, *, tasks: Sequence[Task] = ("passkey", "needle"), lengths: Sequence[int] = (512, 1024, 2048),
    depths: Sequence[float] = DEPTHS, prompts: int = 4, by: Literal["forward", "generate"] = "forward", seed: int = 0,
    progress: bool = False,
) -> Retrieval:  # fmt: skip
    """Passkey and needle at all lengths and depths.

    >>> retrieval(model, tokenizer, lengths=(1024, 8192)).table()

    Args:
        lengths: of the prompts, in the tokenizer's tokens.
        depths: where the number stands, 0 … 1.
        prompts: at each length and depth.
        by: "forward", one pass over prompt and answer: exact where every token of the answer is the likeliest, which is what greedy
            decoding writes, ranked by the first token in which the choices differ, the number by that and all after it; or
            "generate", greedy decoding itself, through the model's cache, without ranks: the number is the first that is written.

    Raises:
        InputError: a task, length, depth or way that is not known, or prompts with tokens that the model has no embedding for.
    """
    if by not in ("forward", "generate"):
        raise InputError("by", repr(by), "'forward' or 'generate'")
    if prompts < 1 or not tasks or not lengths or not depths:
        raise InputError("prompts", prompts, "at least one prompt, task, length and depth")

    @lru_cache(maxsize=4096)
    def count(text: str) -> int:
        ids = _ids(tokenizer, text)
        check_written(tokenizer, ids, model)
        return len(ids)

    made = {  # all of them, so that what cannot be asked is refused before anything is
        (task, length, depth): [hidden_prompt(task, length, depth, index=index, seed=seed, count=count) for index in range(prompts)]
        for task in tasks for length in lengths for depth in depths
    }  # fmt: skip
    cells = []
    with evaluating(model), bar("needle", len(made) * prompts, show=progress) as advance:
        for (task, length, depth), some in made.items():
            if by == "generate":
                written = [_written(model, tokenizer, prompt, advance) for prompt in some]
                exact, number = (sum(column) / prompts for column in zip(*written))
                cells.append(Cell(task, length, depth, prompts, exact, None, number))
                continue
            questions = [Question.of(partial(_ids, tokenizer), one.text, one.choices, one.answer) for one in some]
            exact, ranked, number = (sum(column) / prompts for column in zip(*answered(model, questions, advance)))
            cells.append(Cell(task, length, depth, prompts, exact, ranked, number))
    return Retrieval(tuple(cells), by, seed)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _written(model: Any, tokenizer: Any, prompt: Hidden, advance: Callable[[], Any]) -> tuple[bool, bool]:
    """Whether greedy decoding writes the answer, and then no further digit, at once; and whether it is the first number written."""
    advance()
    ids = torch.tensor([_ids(tokenizer, prompt.text)], device=device_of(model))
    most = len(_ids(tokenizer, f" {prompt.answer}")) + _WORDS
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    number = re.search(r"\d+", said)
    right = number is not None and number[0] == prompt.answer
    return right and said.startswith(prompt.answer), right
