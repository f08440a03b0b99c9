"""The process that `recipes.py` starts for each GPU: takes tasks from its input, one a line, and says what it found on its output.

A task is a dict; `TASKS` names what can be asked. Each answer is a line {"record": …, "done": …}; records that are not done are of a
task that goes on. Whatever libraries print goes to the standard error, with the progress of training.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import torch
from common import failure
from recipes_tables import thinned
from torch import Tensor
from torch.utils.data import DataLoader

Tell = Callable[[dict[str, Any]], None]
RECALL = (256, 512, 768)  # tokens between what is stated and the question
KEPT = 65536  # tokens, of the bytes kept
SHORTEST = 256  # tokens of a prompt with a passkey to learn from
ALONE = 100.0  # a window factor whose sigmoid is 1 in float32


class Bench:
    """A model, loaded once and copied for every task, and the tokens."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        from subquad.models.load import load_model

        self.device, self.cuda = device, device == "cuda"
        self.model, tokenizer = load_model(model, dtype)
        self.tokenizer = Remembered(tokenizer)
        self.files: dict[str, dict[str, Tensor]] = {}

    def tokens(self, file: str) -> dict[str, Tensor]:
        if file not in self.files:
            self.files = {file: torch.load(file)}
        return self.files[file]

    def fresh(self) -> Any:
        return copy.deepcopy(self.model).to(self.device).eval()

    def start_memory(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> int | None:
        return round(torch.cuda.max_memory_allocated() / 2**20) if self.cuda else None

    def clear(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


class Remembered:
    """A tokenizer that keeps the ids of the last texts: every run is asked the same prompts."""

    def __init__(self, tokenizer: Any) -> None:
        self.plain = tokenizer
        self.ids = lru_cache(maxsize=20_000)(lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.ids(text)}


# ---- a recipe -----------------------------------------------------------------------------------------------------------


def recipe(bench: Bench, task: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """A conversion in its stages, the model measured at the start, after each, and at the end more closely."""
    from subquad.bench import speed
    from subquad.convert.lora import merge_lora

    data, model, measured = bench.tokens(task["data"]), bench.fresh(), task["measured"]
    original = speed.parameters(model)
    placed(model, task)
    record: dict[str, Any] = {"points": {"start": nats(model, data, measured)}, "stages": {}}
    record |= {"new_parameters": speed.parameters(model) - original, "bytes_64k": speed.kept_bytes(model, [KEPT])[KEPT]}
    for name, stage in task["stages"].items():
        tell(record)
        own = task["plan"]["own"] if "own_share" in stage else 0
        record["stages"][name] = taught(bench, model, name, stage, data["train"], task["seed"], own)
        if name == "finetune":
            record["nats_before_merging"] = nats(model, data, measured)
            merge_lora(model)
        record["points"][name] = nats(model, data, measured)
    record["recall"] = recalled(bench, model, measured)
    if measured.get("long"):
        record["long"] = in_long(model, data, measured)
    if task["stages"] and window_alone(model):
        record["window_alone"] = {"nats": nats(model, data, measured), "recall": recalled(bench, model, measured)}
    record["finite"] = all(math.isfinite(x) for point in record["points"].values() for x in point.values())
    return record


def placed(model: Any, task: dict[str, Any]) -> Any:
    """The model with a recipe's mechanism in it, untrained."""
    from subquad.bench.choice import parse_layers
    from subquad.convert.run import seeded
    from subquad.convert.swap import swap

    if task["mechanism"] is not None:
        with seeded(task.get("seed", 0), -2):  # as `linearize` draws new parameters
            swap(model, task["mechanism"], layers=parse_layers(task["layers"]), **task["options"])
    return model


def taught(bench: Bench, model: Any, name: str, stage: dict[str, Any], data: Any, seed: int, own: int = 0) -> dict[str, Any]:
    """One stage, and what it took; the last `own` tokens of the data are the model's own, which teach by its distribution."""
    from subquad.convert.distill import distill
    from subquad.convert.finetune import finetune

    bench.start_memory()
    if name == "transfer":
        result: Any = distill(model, model, data, **stage, seed=seed)
    else:
        result = finetune(model, data[:-own], **stage, own=data[-own:], seed=seed) if own else finetune(model, data, **stage, seed=seed)
    return {
        "steps": result.steps, "tokens": result.tokens, "seconds": round(result.seconds, 2),
        "tokens_per_s": round(result.tokens / result.seconds), "peak_mib": bench.peak_mib(), "losses": thinned(result.losses),
    }  # fmt: skip


def nats(model: Any, data: dict[str, Tensor], measured: dict[str, Any]) -> dict[str, float]:
    """Nats a token on each text that is measured on."""
    from subquad.bench.quality import perplexity

    texts = {name: data[name] for name in ("book", "other") if data[name].numel()}
    return {name: perplexity(model, text, window=measured["length"], limit=measured["windows"]).nll for name, text in texts.items()}


def in_long(model: Any, data: dict[str, Tensor], measured: dict[str, Any]) -> dict[str, float]:
    """Nats a token of the book in longer windows, and where layers can be stretched to them, after that too."""
    from subquad.bench.quality import perplexity
    from subquad.convert.stretch import stretch, stretching

    window, text = measured["long"], data["book"]
    found = {"as taught": perplexity(model, text, window=window).nll}
    if stretching(model):
        longer = stretch(copy.deepcopy(model), window / measured["length"])
        found["stretched"] = perplexity(longer, text, window=window).nll
    return found


def recalled(bench: Bench, model: Any, measured: dict[str, Any]) -> list[dict[str, Any]]:
    from subquad.bench.quality import recall

    prompts, distances = measured["prompts"], measured["distances"] if measured["prompts"] else ()
    return [asdict(recall(model, bench.tokenizer, prompts=prompts, distance=distance)) for distance in distances]


@torch.no_grad()
def window_alone(model: Any) -> bool:
    """Take the linear part from every LoLCATs layer: with g = 1, all but window and sinks weighs 1 − g = 0. False if none is there."""
    from subquad.bench.speed import outermost

    layers: list[Any] = [module for module in outermost(model) if module.card.name == "lolcats"]
    for module in layers:
        module.affine_factors = True
        module.window_factor.fill_(ALONE)
    return bool(layers)


def write(bench: Bench, task: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Text that the model writes itself, into a file."""
    from subquad.models.self_text import self_text

    made = self_text(bench.fresh(), task["tokens"], length=task["length"], batch=task["batch"], seed=task["seed"], progress=False)
    torch.save(made, task["file"])
    return {"file": task["file"]}


# ---- speed ------------------------------------------------------------------------------------------------------------


def speed(bench: Bench, task: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Prefill and decoding of one sequence by context, and of many sequences; the weights do not matter for it."""
    from subquad.bench.speed import timings

    model, tokens = placed(bench.fresh(), task), bench.tokens(task["data"])["train"]
    record: dict[str, Any] = {"timings": []}
    for length in task["lengths"]:
        try:
            timings(model, tokens, [length], decoded=2, repeats=1)  # compiles what is not yet compiled
            record["timings"] += [asdict(one) for one in timings(model, tokens, [length], decoded=task["decoded"])]
        except torch.OutOfMemoryError as error:
            record["timings"].append({"tokens": length, "error": failure(error)})
        tell(record)
        bench.clear()
    bench.start_memory()
    try:
        record["many"] = many(model, tokens, task["context"], task["sequences"], task["decoded"])
        record["many"]["peak_mib"] = bench.peak_mib()
    except torch.OutOfMemoryError as error:
        record["many"] = {"sequences": task["sequences"], "tokens": task["context"], "error": failure(error)}
    return record


@torch.no_grad()
def many(model: Any, tokens: Tensor, context: int, sequences: int, decoded: int) -> dict[str, Any]:
    """Decoding of `sequences` sequences side by side behind `context` tokens: one is read, what is kept of it repeated."""
    from subquad.bench.machine import synchronize
    from subquad.bench.speed import cache_bytes, cached

    device = next(model.parameters()).device
    ids = tokens.repeat(-(-context // tokens.numel()))[:context][None].to(device)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    held, token = cached(out), out.logits[:, -1:].argmax(-1).repeat(sequences, 1)
    for cache in held.values():
        cache.batch_repeat_interleave(sequences)
    spent = []
    for _ in range(decoded + 3):
        synchronize(device)
        began = time.perf_counter()
        out = model(input_ids=token, use_cache=True, **held)
        synchronize(device)
        spent.append(time.perf_counter() - began)
        token, held = out.logits[:, -1:].argmax(-1), cached(out)
    step = sorted(spent[3:])[decoded // 2]
    size = cache_bytes(*held.values())
    return {"sequences": sequences, "tokens": context, "decode_ms": 1e3 * step, "tokens_per_s": sequences / step, "cache_bytes": size}


# ---- passkey ----------------------------------------------------------------------------------------------------------


class Questions(Sequence[dict[str, Tensor]]):
    """Batches in which half of the sequences begin with a prompt and its answer; all else is text. Every other prompt hides a passkey,
    and every other asks for one of four codes.

    Args:
        tokens: ``[T]`` to take the text from.
        count: of batches.
        answers: predict the answers alone; every sequence then begins with a prompt.
        shortest: tokens of a prompt with a passkey, at least.
    """

    def __init__(
        self, tokenizer: Any, tokens: Tensor, count: int, batch: int, length: int, seed: int, answers: bool, shortest: int = SHORTEST
    ) -> None:  # fmt: skip
        self.tokenizer, self.tokens, self.count, self.batch, self.length = tokenizer, tokens, count, batch, length
        self.seed, self.answers, self.shortest = seed, answers, shortest

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> dict[str, Tensor]:  # type: ignore[override]
        rows = [self._row(step * self.batch + row) for row in range(self.batch)]
        ids, labels = (torch.stack(part) for part in zip(*rows))
        return {"input_ids": ids, **({"labels": labels} if self.answers else {})}

    def _row(self, index: int) -> tuple[Tensor, Tensor]:
        pick = random.Random(f"{self.seed}/{index}")
        start = pick.randrange(self.tokens.numel() - self.length + 1)
        text = self.tokens[start : start + self.length]
        if index % 2 and not self.answers:
            return text, text
        prompt, answer = self._prompt(index, pick)
        asked, whole = self._ids(prompt), self._ids(f"{prompt} {answer}.")
        ids = torch.cat([torch.tensor(whole), text])[: self.length]
        labels = torch.full_like(ids, -100)
        labels[len(asked) : len(whole)] = ids[len(asked) : len(whole)]
        return ids, labels

    def _prompt(self, index: int, pick: random.Random) -> tuple[str, str]:
        """A prompt that fits, and its answer; of other seeds than those that are measured with."""
        from subquad.bench.needle import hidden_prompt
        from subquad.bench.quality import recall_prompts

        room = self.length - 16  # for the answer
        if index // (1 if self.answers else 2) % 2:
            most = room - 128  # tokens of the codes, the question, and a last sentence of what stands between
            code = recall_prompts(1, distance=pick.randint(min(32, most), most), seed=pick.randrange(1, 2**31), count=self._count)[0]
            return code.text, code.answer
        length = pick.randint(min(self.shortest, room), room)
        found = hidden_prompt("passkey", length, pick.random(), index=index, seed=self.seed + 1000, count=self._count)
        return found.text, found.answer

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _count(self, text: str) -> int:
        return len(self._ids(text))


def passkey(bench: Bench, task: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """A recipe on text with questions in it, asked for codes, and for passkeys in longer and longer text."""
    from subquad.bench.needle import retrieval
    from subquad.convert.lora import merge_lora
    from subquad.convert.stretch import stretch, stretching

    data, model = bench.tokens(task["data"])["train"], placed(bench.fresh(), task)
    record: dict[str, Any] = {"stages": {}, "cells": []}
    for number, (name, stage) in enumerate(task["stages"].items()):
        count, answers = stage["steps"] * stage.get("accumulate", 1), name == "finetune" and task["answers"]
        seed = 10 * task["seed"] + number
        sizes = count, stage["batch"], stage["length"]
        questions = Questions(bench.tokenizer, data, *sizes, seed, answers, task.get("shortest", SHORTEST))
        # to find the tokens of a batch's prompts takes the host longer than a GPU takes to learn from them
        workers: dict[str, Any] = {"num_workers": 6, "prefetch_factor": 8, "multiprocessing_context": "fork"} if bench.cuda else {}
        batches = DataLoader(questions, batch_size=None, **workers)  # type: ignore[arg-type]
        record["stages"][name] = taught(bench, model, name, stage, batches, task["seed"])
        if name == "finetune":
            merge_lora(model)
        tell(record)
    record["recall"] = recalled(bench, model, {"prompts": 4 * task["prompts"], "distances": task["distances"]})
    asked = partial(retrieval, tokenizer=bench.tokenizer, tasks=("passkey",), prompts=task["prompts"])
    for length in task["lengths"]:
        record["cells"] += [asdict(cell) for cell in asked(model, lengths=(length,)).cells]
        tell(record)
    taught_at = max((stage["length"] for stage in task["stages"].values()), default=0)
    if taught_at and stretching(model):
        record["stretched"] = []
        for length in (n for n in task["lengths"] if n > taught_at):
            longer = stretch(copy.deepcopy(model), length / taught_at)
            record["stretched"] += [asdict(cell) for cell in asked(longer, lengths=(length,)).cells]
            tell(record)
    return record


# ---- memory -----------------------------------------------------------------------------------------------------------


def memory(bench: Bench, task: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """The most that is allocated in two steps of attention transfer, weights included: of the model, or of a large one in groups."""
    from subquad.convert.distill import distill

    shape: dict[str, Any] = {"steps": 2, "batch": task["batch"], "length": task["length"], "objective": task["objective"]}
    if task["group"] is None:
        model, tokens = placed(bench.fresh(), task), bench.tokens(task["data"])["train"]
        bench.clear()
        bench.start_memory()
        result = distill(model, model, tokens, **shape)
    else:
        model = placed(large(bench, task["large"]), task)
        tokens = torch.randint(model.config.vocab_size, (4 * task["batch"] * task["length"],))
        bench.clear()
        bench.start_memory()
        with tempfile.TemporaryDirectory() as folder:
            result = distill(model, model, tokens, **shape, group=task["group"], device=bench.device, out=folder)
    return {"peak_mib": bench.peak_mib(), "parameters": sum(p.numel() for p in model.parameters()), "seconds": round(result.seconds, 2)}


def large(bench: Bench, sizes: dict[str, int]) -> Any:
    """A random Llama on the CPU, of the weights' dtype here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(bench.device):  # drawn there, as that is faster
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    return model.to("cpu", next(bench.model.parameters()).dtype).eval()


TASKS = {"recipe": recipe, "write": write, "speed": speed, "passkey": passkey, "memory": memory}


def main() -> int:
    """Serve until the input ends; after a failure the process ends, as the device may be in no state to go on with."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    bench = Bench(*sys.argv[1:4])
    for line in sys.stdin:
        task = json.loads(line)

        def tell(record: dict[str, Any], done: bool = False) -> None:
            out.write(json.dumps({"record": record, "done": done}) + "\n")

        try:
            tell(TASKS[task["kind"]](bench, task, tell), done=True)
        except Exception as error:  # whatever it is: it stands in the result
            finite = "not finite" not in str(error)
            tell({"error": failure(error), "traceback": traceback.format_exc()[-2000:], "finite": finite}, done=True)
            return 1
        bench.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
