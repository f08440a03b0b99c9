"""What a change of attention costs in quality: perplexity by strided windows, and key-value recall.

    nll = − 1/T Σ_t log p(x_t | the tokens before it in its window),   ppl = exp(nll)

Both work on any causal language model of transformers, swapped or not.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from subquad.bench.progress import bar
from subquad.checks import InputError
from subquad.models.text import windows

_ROWS = 256  # logits rows per cross entropy: bounds the float32 copy of [rows, vocabulary]
_TOKENS = {"cuda": 8192}  # of one pass where short ones leave the device idle; elsewhere sequences come one by one

Item = TypeVar("Item")


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood in nats per token, over `tokens` scored tokens in `windows` windows."""

    nll: float
    tokens: int
    windows: int

    @property
    def ppl(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


@torch.no_grad()
def perplexity(
    model: Any, tokens: Tensor, *, window: int = 1024, stride: int | None = None, limit: int | None = None, progress: bool = False
) -> Perplexity:
    """Perplexity of a causal language model on held-out tokens ``[T]``.

    Args:
        window: tokens the model sees at once.
        stride: tokens between windows (default: `window`, no overlap); smaller gives every token more context.
        limit: measure on the last `limit` windows only.

    Raises:
        InputError: fewer tokens than one window, or a window or stride that is not usable.
    """
    stride = window if stride is None else stride
    spans = list(windows(tokens, window, stride))[-limit if limit else 0 :]
    device, total, count = device_of(model), 0.0, 0
    with evaluating(model), bar("perplexity", len(spans), show=progress) as advance:
        for some in _together(spans, lambda _: window, device):
            ids = torch.stack([span.tokens for span in some]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for row, seen, (_, scored) in zip(logits, ids, some):
                total += _nll(row[-scored - 1 : -1], seen[-scored:])
                count += scored
                advance()
    return Perplexity(total / count, count, len(spans))


def _together(items: Sequence[Item], length: Callable[[Item], int], device: torch.device) -> Iterator[Sequence[Item]]:
    """Neighbours that one pass takes."""
    start, most = 0, _TOKENS.get(device.type, 0)
    while start < len(items):
        stop, longest = start + 1, length(items[start])
        while stop < len(items) and (stop + 1 - start) * max(longest, length(items[stop])) <= most:
            longest = max(longest, length(items[stop]))
            stop += 1
        yield items[start:stop]
        start = stop


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Summed negative log-likelihood of targets ``[T]`` under logits ``[T, vocabulary]``, in float32 and double sums."""
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    parts = (F.cross_entropy(l.to(wide), t, reduction="none").double().sum() for l, t in zip(logits.split(_ROWS), targets.split(_ROWS)))
    return float(sum(parts))


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


class evaluating:
    """Put a model into evaluation mode, and back."""

    def __init__(self, model: Any) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> Any:
        return self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)


# ---- key-value recall ----------------------------------------------------------------------------------------------

_NAMES = (
    "Ada", "Boris", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis", "Maria", "Nora",
    "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Teresa", "Victor", "Wanda",
)  # fmt: skip
_FILLER = (
    "The morning was clear and the harbour quiet.", "A cart went slowly up the hill.", "Nobody in the street looked up.",
    "Rain came in from the west before noon.", "The baker swept his step and went inside.", "Two boats lay idle at the quay.",
    "Somewhere a bell rang and then stopped.", "The old road follows the river to the mill.",
)  # fmt: skip


@dataclass(frozen=True)
class RecallPrompt:
    """Pairs, then filler, then the question; `codes` holds every pair's number, `answer` the one asked for."""

    pairs: str
    filler: str
    question: str
    answer: str
    codes: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.pairs} {self.filler} {self.question}" if self.filler else f"{self.pairs} {self.question}"


@dataclass(frozen=True)
class Recall:
    """Shares of prompts answered: `exact` where greedy decoding writes the whole number, `ranked` where the right
    number is likelier than those of the prompt's other pairs (chance is one in `pairs`)."""

    exact: float
    ranked: float
    prompts: int
    pairs: int
    distance: int


def recall_prompts(
    prompts: int = 8, *, pairs: int = 4, distance: int = 256, seed: int = 0, count: Callable[[str], int] | None = None
) -> list[RecallPrompt]:
    """Prompts "The code of NAME is NUMBER." … filler … "The code of NAME is", the same for the same seed.

    Args:
        pairs: 2 … 9; the codes of one prompt differ in their first digit.
        distance: least length of the filler between the pairs and the question.
        count: length of a text (default: words); pass a tokenizer's for a distance in tokens.
    """
    if not 2 <= pairs <= 9:
        raise InputError("pairs", pairs, "2 … 9")
    length = count or (lambda text: len(text.split()))
    made = []
    for index in range(prompts):
        pick = random.Random(f"{seed}/{index}")
        names = pick.sample(_NAMES, pairs)
        codes = tuple(f"{first}{pick.randrange(1000):03d}" for first in pick.sample(range(1, 10), pairs))
        asked = pick.randrange(pairs)
        filler = ""
        while length(filler) < distance:
            filler = f"{filler} {pick.choice(_FILLER)}".strip()
        stated = " ".join(f"The code of {name} is {code}." for name, code in zip(names, codes))
        made.append(RecallPrompt(stated, filler, f"The code of {names[asked]} is", codes[asked], codes))
    return made


@torch.no_grad()
def recall(
    model: Any, tokenizer: Any, *, prompts: int = 8, pairs: int = 4, distance: int = 256, seed: int = 0, progress: bool = False
) -> Recall:
    """Key-value recall: is a number stated `distance` tokens ago still known? Read off forward passes, without decoding."""
    if prompts < 1:
        raise InputError("prompts", prompts, "at least 1")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    made = recall_prompts(prompts, pairs=pairs, distance=distance, seed=seed, count=lambda text: len(encode(text)))
    questions = [Question.of(encode, prompt.text, prompt.codes, prompt.answer) for prompt in made]
    with evaluating(model), bar("recall", prompts, show=progress) as advance:
        found = answered(model, questions, advance)
    exact, ranked, _ = (sum(column) / prompts for column in zip(*found))
    return Recall(exact, ranked, prompts, pairs, distance)


class Question(NamedTuple):
    """A prompt with its answer as token ids, where the answer starts, and the token in which the choices first differ."""

    ids: list[int]
    start: int
    fork: int
    rivals: tuple[int, ...]

    @classmethod
    def of(cls, encode: Callable[[str], list[int]], text: str, choices: Sequence[str], answer: str) -> Question:
        answers = {choice: encode(f"{text} {choice}") for choice in choices}
        fork = common_start(list(answers.values()))
        start = common_start([*answers.values(), encode(text)])
        return cls(answers[answer], start, fork, tuple(ids[fork] for ids in answers.values()))


class Answer(NamedTuple):
    """How a question was answered.

    exact: every token of the answer is the likeliest, which is what greedy decoding writes.
    ranked: the right choice is likelier than its rivals, by the first token in which they differ.
    number: every token from that one on is the likeliest after those before it, a space that the model may not have begun with among them.
    """

    exact: bool
    ranked: bool
    number: bool


@torch.no_grad()
def answered(model: Any, questions: Sequence[Question], advance: Callable[[], Any]) -> list[Answer]:
    """An answer to each question, in their order."""
    device, found = device_of(model), []
    for some in _together(questions, lambda question: len(question.ids), device):
        # padded on the right, which what is causal does not see
        ids = pad_sequence([torch.tensor(question.ids) for question in some], batch_first=True).to(device)
        first = min(question.start for question in some)
        kept = ids.shape[1] - first + 1  # places, of which the first predicts token `first`
        logits = model(input_ids=ids, use_cache=False, **_keeping(model, kept)).logits[:, -kept:]
        for row, (right, start, fork, rivals) in zip(logits, some):
            said = row[start - first : len(right) - first]
            same = [token == wanted for token, wanted in zip(said.argmax(-1).tolist(), right[start:])]
            scores = said[fork - start, list(rivals)].tolist()
            found.append(Answer(all(same), rivals[scores.index(max(scores))] == right[fork], all(same[fork - start :])))
            advance()
    return found


def _keeping(model: Any, count: int) -> dict[str, int]:
    """The argument that has a model of transformers compute its last logits alone, where it has one."""
    known = inspect.signature(model.forward).parameters.values()
    takes = any(p.name == "logits_to_keep" or (p.kind is p.VAR_KEYWORD and hasattr(model, "config")) for p in known)
    return {"logits_to_keep": count} if takes else {}


def common_start(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common start."""
    same = 0
    for column in zip(*sequences):
        if len(set(column)) > 1:
            break
        same += 1
    return same
