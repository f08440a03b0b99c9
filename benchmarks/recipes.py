"""Every linearization recipe on one model, with the same number of tokens, texts and measures, spread over the GPUs there are.

    text ─ tokens ─┬─ swap ─ attention transfer ─ low-rank tuning ─ merge        one run of `JOBS`, on one GPU
                   ├─ …                                                         perplexity at each point, recall at the end
                   └─ the original, with the same tuning

python benchmarks/recipes.py --out FOLDER                          all of `JOBS`, the longest first, and goes on with FOLDER's result
python benchmarks/recipes.py --recipes lolcats --tune-lr 3e-4      one of them, otherwise
python benchmarks/recipes.py --only speed,passkey,memory           the other sections
python benchmarks/recipes.py --plot RESULT                         draws a result into docs/img/
python benchmarks/recipes.py --device cpu --tokens 512 --length 64 --batch 2 --windows 2 --prompts 1 --distances 16 --recipes lolcats

A run that is finished is written at once and not made again with the same settings. Texts come from installed packages
(`recipes_text.py`), the tables from `recipes_tables.py`; what a GPU does stands in `recipes_worker.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import recipes_text
import torch
from common import RESULTS, ROOT, Report, failure, slug, write_json
from recipes_pool import Place, Pool
from recipes_tables import ORIGINAL, main_runs, stages_of, tables
from recipes_worker import RECALL

from subquad.checks import InputError

SECTIONS = ("recipes", "speed", "passkey", "memory")
PASSKEYS = ("lawcat", "lolcats-sinks", "liger", "sliding-window")
BARS = {"transfer": 12, "blockwise": 16}  # GiB wanted at most
LARGE = {  # the sizes of Llama 3.2 1B
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256,
}  # fmt: skip
SMALL = LARGE | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "vocab_size": 1000}  # fmt: skip


# all layers but the seven of SmolLM2-135M that cost most to replace, nothing taught, on two pages of the book: 0, 1, 3, 8, 10, 18, 19
AUTO = "2,4,5,6,7,9,11,12,13,14,15,16,17,20,21,22,23,24,25,26,27,28,29"


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        label: of its row; runs of one label differ in the seed alone.
        recipe: its name, or "original" for the model with its own attention.
        layers: as `--layers` of the command line takes them.
        options: of the mechanism, instead of the recipe's.
        cost: about how long it takes beside the others; the longest begin first.
    """

    label: str
    recipe: str
    seed: int = 0
    layers: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    cost: float = 1.0


JOBS = (
    Job("original", ORIGINAL, trained=False, cost=0.1),
    Job("original tuned", ORIGINAL, cost=0.4),
    Job("sliding-window untrained", "sliding-window", trained=False, cost=0.1),
    Job("sliding-window", "sliding-window", cost=1.0),
    Job("hedgehog", "hedgehog", cost=2.0),
    Job("lawcat", "lawcat", cost=1.4),
    Job("liger", "liger", cost=1.8),
    Job("lizard", "lizard", cost=1.6),
    Job("lolcats", "lolcats", cost=1.5),
    Job("lolcats-sinks", "lolcats-sinks", cost=1.5),
    Job("lolcats-sinks, with rotary", "lolcats-sinks", options={"far_rotary": True}, cost=1.5),
    Job("lolcats 3:1", "lolcats", layers="3:1", cost=1.3),  # every fourth layer keeps softmax
    Job("lolcats-sinks 3:1", "lolcats-sinks", layers="3:1", cost=1.3),
    Job("lolcats-sinks, auto:7", "lolcats-sinks", layers=AUTO, cost=1.3),
)
SEEDS = (1, 2)  # further ones, of lolcats and of what --seeds-for names


def jobs(labels: tuple[str, ...] | None, seeds_for: tuple[str, ...]) -> list[Job]:
    """The runs asked for; those with further seeds come last."""
    known = {job.label: job for job in JOBS}
    for label in (*(labels or ()), *seeds_for):
        if label not in known:
            raise SystemExit(f"recipes: no run {label!r}; there are {', '.join(known)}")
    first = [job for job in JOBS if labels is None or job.label in labels]
    again = [job for job in first if job.label in seeds_for and job.trained]
    return first + [Job(**{**vars(job), "seed": seed, "cost": job.cost / 100}) for seed in SEEDS for job in again]


# ---- tasks --------------------------------------------------------------------------------------------------------------


def plan_of(given: Any, train: torch.Tensor) -> dict[str, Any]:
    """What all trained runs share."""
    keys = ("model", "dtype", "tokens", "length", "batch", "micro", "share", "tune_lr", "transfer_lr", "loss")
    names = [*given.text, *([f"{given.recall_tokens} to recall"] if given.recall_tokens else [])]
    names += [f"{given.self_tokens} of its own"] if given.self_tokens else []
    text = f"{' + '.join(names)} ({digest(train.numpy().tobytes())})"
    own = {} if given.own_share is None else {"own": given.self_tokens, "own_share": given.own_share}
    return {**{key: getattr(given, key) for key in keys}, "text": text, **own}


def recipe_tasks(given: Any, plan: dict[str, Any], held: str) -> list[dict[str, Any]]:
    measured = {name: getattr(given, name) for name in ("model", "dtype", "length", "windows", "prompts", "distances")}
    measured |= {"distances": list(given.distances), "held_out": held, **({"long": given.long} if given.long else {})}
    made = []
    for job in jobs(given.recipes, given.seeds_for):
        stages = stages_of(job.recipe, plan) if job.trained else {}
        task = {"kind": "recipe", "label": job.label, "seed": job.seed, **mechanism_of(job.recipe, job.options), "layers": job.layers}
        made.append({**task, "stages": stages, "plan": plan if job.trained else None, "measured": measured, "cost": job.cost})
    return made


def mechanism_of(recipe: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    from subquad.convert.recipe import recipe as find

    if recipe == ORIGINAL:
        return {"recipe": recipe, "mechanism": None, "options": {}}
    chosen = find(recipe)
    return {"recipe": recipe, "mechanism": chosen.mechanism, "options": {**chosen.options, **(options or {})}}


def speed_tasks(given: Any) -> list[dict[str, Any]]:
    cuda = given.device == "cuda"
    sizes = {"lengths": [1024, 4096, 16384, 32768, 65536] if cuda else [64, 128], "decoded": 32 if cuda else 2}
    sizes |= {"context": 32768 if cuda else 64, "sequences": 32 if cuda else 2}
    shared = {"kind": "speed", "layers": "all", **sizes, "dtype": given.dtype, "model": given.model, "cost": 3.0}
    return [{**shared, "label": name, **mechanism_of(name)} for name in (ORIGINAL, *given.speed_for)]


def passkey_tasks(given: Any, plan: dict[str, Any]) -> list[dict[str, Any]]:
    plan = {key: value for key, value in plan.items() if key not in ("own", "own_share")}  # the text is cut otherwise here
    shared = {"kind": "passkey", "layers": "all", "seed": 0, "plan": plan, "answers": given.passkey_loss == "answer"}
    shared |= {"lengths": list(given.passkey_lengths), "prompts": given.passkey_prompts, "distances": list(given.distances)}
    shared |= {"shortest": given.passkey_shortest} if given.passkey_shortest is not None else {}
    made = [{**shared, "label": ORIGINAL, **mechanism_of(ORIGINAL), "stages": {}, "plan": None, "cost": 0.2}]
    known = {job.label: job for job in JOBS}
    for job in (known.get(label) or Job(label, label) for label in given.passkey_for):
        stages = stages_of(job.recipe, plan) if job.trained else {}
        task = {**shared, "label": job.label, "layers": job.layers, **mechanism_of(job.recipe, job.options), "stages": stages}
        task |= {"plan": plan if job.trained else None, "cost": 2.5 if job.trained else 0.2}
        again = SEEDS if job.trained and job.label in given.seeds_for else ()
        made += [task, *({**task, "seed": seed, "cost": task["cost"] / 100} for seed in again)]
    return made


def memory_tasks(given: Any) -> list[dict[str, Any]]:
    from subquad.convert.recipe import recipes

    shared = {"kind": "memory", "layers": "all", "batch": given.batch, "length": given.length, "model": given.model, "dtype": given.dtype}
    words = f"{given.batch} × {given.length:,} tokens"
    made = []
    for name, one in recipes().items():
        if one.transfer is not None:
            task = {**shared, "label": f"{name}: transfer, {words}", **mechanism_of(name), "group": None}
            made.append({**task, "objective": one.transfer.get("objective", "output"), "bar_gib": BARS["transfer"], "cost": 0.05})
    large = {**shared, "label": f"lolcats: a Llama of 1 B, two layers at a time, {words}", **mechanism_of("lolcats"), "group": 2}
    large["objective"] = "output"
    return [*made, {**large, "large": LARGE if given.device == "cuda" else SMALL, "bar_gib": BARS["blockwise"], "cost": 0.3}]


def key_of(task: Mapping[str, Any]) -> str:
    """A name for a run: what it is called, and a digest of all that decides what comes out."""
    left = {name: value for name, value in task.items() if name not in ("cost", "label", "seed", "data")}
    return f"{task['kind']}/{task['label']}/{task.get('seed', 0)}/{digest(json.dumps(left, sort_keys=True).encode())}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# ---- the result -----------------------------------------------------------------------------------------------------------


def finished(run: Mapping[str, Any]) -> bool:
    return run.get("done", False) and "error" not in run


class Results:
    """The result file: runs by key, and the tables of all of them."""

    def __init__(self, given: Any) -> None:
        title = f"Linearization recipes on {given.model}, side by side"
        self.at_once = given.at_once
        self.report = Report("recipes", title, given.device, given.out / f"recipes-{slug(given.device)}.json")
        self.runs: dict[str, dict[str, Any]] = {}
        for path in (self.report.path, *given.add):
            if path.exists() or path in given.add:
                found = json.loads(path.read_text(encoding="utf-8"))
                if found["device"] != self.report.result["device"]:
                    raise SystemExit(f"recipes: {path} is of {found['device']}; this is {self.report.result['device']}")
                self.runs |= {key: run for key, run in found["runs"].items() if finished(run) and key not in self.runs}

    def keep(self, task: dict[str, Any], record: dict[str, Any]) -> None:
        """A task's record in place of the one before, written at once."""
        left = {name: value for name, value in task.items() if name not in ("cost", "data")}
        stamp = {**{name: self.report.result[name] for name in ("commit", "date")}, "at_once": self.at_once}
        self.runs[key_of(task)] = {**left, **stamp, "settings": task.get("stages"), **record}
        if record.get("done"):
            print(f"{task['label']}: {summary(record)}", flush=True)
        self.write()

    def write(self) -> None:
        try:
            self.report.result["tables"] = tables(self.runs)
        except Exception as error:  # a table that cannot be made must not cost the runs
            self.report.result["tables"] = []
            print(f"tables: {failure(error)}", file=sys.stderr)
        self.report.result |= {"runs": self.runs, "notes": [*NOTES, *sampled_anew(self.runs), *made_at(self.runs)]}
        write_json(self.report.path, self.report.result)


def made_at(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on the commits of the runs, where they are several."""
    labels: dict[str, list[str]] = {}
    for run in runs.values():
        labels.setdefault(str(run.get("commit")), []).append(str(run["label"]))
    named = "; ".join(f"`{commit}`: {', '.join(dict.fromkeys(some))}" for commit, some in labels.items())
    return [f"Runs are of several commits. {named}."] if len(labels) > 1 else []


def sampled_anew(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence on texts of the same kinds that are not the same."""
    texts = {run["plan"]["text"] for run in main_runs(list(runs.values())) if run["plan"]}
    return ["What the model wrote itself was sampled anew for some of the runs that stand in one table."] if len(texts) > 1 else []


NOTES = [
    "Every run reads the same number of tokens; recipes of two stages share them as their files say, “original tuned” gets what these "
    "tune with. Steps of 8 sequences of 1,024 tokens unless settings say otherwise; rates, ranks and schedules are the recipes’ "
    "where a title names no other.",
    "Perplexity on the end of Moby-Dick, which nothing was trained on, in windows without overlap; other text: version 3 of the GPL. "
    "The gap is that in nats a token between the swapped model untrained and the original.",
    "Recall: four numbers are stated, one is asked for so many tokens later; the right number is likelier than the others of the prompt "
    "(chance is a quarter), or written in full.",
    "Without its linear part: the same weights, and what is older than the window weighs nothing, but for the sinks of lolcats-sinks; "
    "lolcats has none, as sliding-window has.",
    "Weights are those of the data type; what learns is kept in float32, adapters are merged before the last measurement.",
]


def summary(record: Mapping[str, Any]) -> str:
    """A finished record in one line."""
    if "error" in record:
        return record["error"]
    if "points" in record:
        nats = ", ".join(f"{point} {found['book']:.3f}" for point, found in record["points"].items())
        return f"nats {nats}; " + " ".join(f"{name} {stage['seconds']:.0f} s" for name, stage in record["stages"].items())
    if "cells" in record:
        at = {cell["length"]: [one["exact"] for one in record["cells"] if one["length"] == cell["length"]] for cell in record["cells"]}
        return "passkeys " + ", ".join(f"{length}: {sum(found) / len(found):.0%}" for length, found in at.items())
    words = {name: value for name, value in record.items() if name in ("peak_mib", "seconds", "many")}
    return f"done {json.dumps(words) if words else ''}"


# ---- the command line -----------------------------------------------------------------------------------------------------


def words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def labels(text: str) -> tuple[str, ...]:
    """Labels of runs, some of which have a comma themselves."""
    known, found = {job.label for job in JOBS}, [""]
    for word in words(text):
        joined = f"{found[-1]}, {word}"
        found[-1:] = [joined] if joined in known else [found[-1], word]
    return tuple(found[1:])


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words(text))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Linearization recipes, side by side.")
    add = parser.add_argument
    add("--plot", type=Path, metavar="RESULT", help="draw a result file into docs/img/ and measure nothing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--out", type=Path, default=RESULTS, help="folder of the result file; runs that are there are kept")
    add("--add", type=Path, action="append", default=[], metavar="RESULT", help="keep the runs of this result too")
    add("--seconds", type=float, help="begin no run after so long (default: 440 on cuda, no limit on cpu)")
    add("--only", type=words, default=("recipes",), help=f"sections, of {', '.join(SECTIONS)}")
    add("--model", default="smollm2-135m")
    add("--dtype", help="of the weights (default: bfloat16 on cuda, float32 on cpu)")
    add("--recipes", type=labels, help="labels of runs (default: all)")
    add("--seeds-for", type=labels, default=("lolcats",), help="labels that get seeds 1 and 2 as well, in all that is trained")
    add("--tokens", type=float, default=6e6, help="that every run reads")
    add("--length", type=int, default=1024, help="of a sequence, and of the windows of perplexity")
    add("--batch", type=int, default=8, help="sequences of a step")
    add("--micro", type=int, help="sequences at once in fine-tuning (default: all of a step)")
    add("--share", type=float, help="of the tokens, for the transfer of recipes of two stages (default: as the recipe says)")
    add("--tune-lr", type=float)
    add("--transfer-lr", type=float)
    add("--loss", choices=("kl", "next-token"), help="of fine-tuning (default: the recipe's)")
    add("--text", type=words, default=recipes_text.default_text(), help="of book, shakespeare (default: those that are installed)")
    add("--recall-tokens", type=int, default=0, help="train on so many tokens, too, of documents with numbers to recall")
    add("--at-once", type=int, default=1, metavar="N", help="runs side by side on a GPU (default: 1)")
    add("--self-tokens", type=int, default=0, help="train on so many tokens, too, that the model writes itself")
    add("--own-share", type=float, help="of the tuning's sequences are then of that text and teach its distribution (default: as the rest)")
    add("--other-text", type=Path, help="a file to measure on (default: the GPL that a package carries)")
    add("--windows", type=int, default=32, help="held out at the end of the book, and of the other text at most")
    add("--long", type=int, metavar="N", help="look at the book in windows of N tokens too, where lolcats is stretched to them as well")
    add("--prompts", type=int, default=64, help="of recall, at each distance")
    add("--distances", type=numbers, default=RECALL)
    add("--speed-for", type=words, default=("lolcats",), help="recipes to time beside the original")
    add("--passkey-for", type=labels, default=PASSKEYS, help="runs, by label or recipe, to train on passkeys and codes")
    add("--passkey-tokens", type=float, default=2e6)
    add("--passkey-loss", choices=("all", "answer"), default="all")
    add("--passkey-lengths", type=numbers, default=(1024, 2048, 4096, 8192))
    add("--passkey-shortest", type=int, help="tokens at least of a prompt with a passkey to learn from (default: 256)")
    add("--passkey-prompts", type=int, default=4, help="at each of five depths")
    given = parser.parse_args()
    cuda = given.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, on a machine without one")
    for name, known in (("only", SECTIONS), ("text", ("book", "shakespeare"))):
        if unknown := [word for word in getattr(given, name) if word not in known]:
            parser.error(f"--{name} {unknown[0]}: there are {', '.join(known)}")
    given.tokens, given.passkey_tokens, given.micro = int(given.tokens), int(given.passkey_tokens), given.micro or given.batch
    if given.own_share is not None and not (0 < given.own_share <= 1 and given.self_tokens):
        parser.error(f"--own-share {given.own_share}: a number above 0 and at most 1, with --self-tokens")
    if given.at_once < 1:
        parser.error(f"--at-once {given.at_once}: a positive integer")
    given.dtype = given.dtype or ("bfloat16" if cuda else "float32")
    if given.batch % given.micro:
        parser.error(f"--micro {given.micro}: a divisor of --batch {given.batch}")
    return given


def places(device: str, each: int) -> list[Place]:
    """`each` on every GPU there is, as CUDA_VISIBLE_DEVICES names them, or on the CPU."""
    if device == "cpu":
        return [Place(None, number) for number in range(each)]
    visible = words(os.environ.get("CUDA_VISIBLE_DEVICES", "")) or tuple(map(str, range(torch.cuda.device_count())))
    return [Place(gpu, number) for number in range(each) for gpu in visible]


def main() -> int:
    given = arguments()
    if given.plot is not None:
        from recipes_plot import draw

        print(draw(given.plot, ROOT / "docs" / "img"))
        return 0
    began = time.monotonic()
    limit = given.seconds if given.seconds is not None else 440 if given.device == "cuda" else 10**9
    results = Results(given)
    pool = Pool(places(given.device, given.at_once), given, began + limit)
    with tempfile.TemporaryDirectory() as folder:
        try:
            left = carried_out(given, results, pool, Path(folder))
        except InputError as error:
            raise SystemExit(f"recipes: {error}") from None
        finally:
            pool.close()
    results.write()
    for table in results.report.result["tables"]:
        print(f"\n{table['title']}", *(" | ".join(row) for row in (table["columns"], *table["rows"])), sep="\n  ")
    print(f"\nwritten: {results.report.path}; {left} runs had no time; {time.monotonic() - began:.0f} s")
    return 1 if any("error" in run for run in results.runs.values()) else 0


def carried_out(given: Any, results: Results, pool: Pool, folder: Path) -> int:
    """All tasks that are not finished; returns how many were not begun."""
    from subquad.models.load import load_model
    from subquad.models.text import encode, load_text

    _, tokenizer = load_model(given.model, given.dtype)
    pool.start()  # they load the model while the texts are read here
    train, held = recipes_text.tokens_of(given.text, tokenizer, given.windows * given.length)
    text = load_text(given.other_text) if given.other_text else recipes_text.gpl()
    other = encode(text, tokenizer) if text else train[:0]
    if not text:
        print("no package here carries the GPL: --other-text FILE measures on a text of yours; left out", flush=True)
    if given.recall_tokens:
        pages = recipes_text.tokens_of(("book",), tokenizer, given.windows * given.length)[0]
        train = torch.cat([train, recipes_text.recall_text(tokenizer, pages, given.recall_tokens)])
    if given.self_tokens:
        train = torch.cat([train, own_text(given, pool, folder)])
    print(
        f"{train.numel():,} tokens to train on ({', '.join(given.text)}), {held.numel():,} and {other.numel():,} to measure on", flush=True
    )
    file = folder / "tokens.pt"
    torch.save({"train": train, "book": held, "other": other}, file)
    plan = plan_of(given, train)
    tasks = []
    if "recipes" in given.only:
        tasks += recipe_tasks(given, plan, digest(torch.cat([held, other]).numpy().tobytes()))
    if "speed" in given.only:
        tasks += speed_tasks(given)
    if "passkey" in given.only:
        tasks += passkey_tasks(given, plan | {"tokens": given.passkey_tokens})
    if "memory" in given.only:
        tasks += memory_tasks(given)
    todo = [{**task, "data": str(file)} for task in tasks if not finished(results.runs.get(key_of(task), {}))]
    print(f"{len(todo)} runs, {len(tasks) - len(todo)} were finished; {len(pool.places)} places", flush=True)
    return pool.run(todo, results.keep)


def own_text(given: Any, pool: Pool, folder: Path) -> torch.Tensor:
    """Text that the model writes, in parts that the places share, the same however many places there are."""
    count, length = 4 if given.device == "cuda" else 1, min(given.length, 512)  # half of the steps, each for twice as many sequences
    batch = min(2048 if given.device == "cuda" else 8, -(-given.self_tokens // (count * length)))
    shared = {
        "kind": "write",
        "label": "text",
        "tokens": -(-given.self_tokens // count),
        "length": length,
        "batch": batch,
        "cost": 1.0,
    }
    tasks = [{**shared, "seed": seed, "file": str(folder / f"text-{seed}.pt")} for seed in range(count)]
    failed: list[Any] = []
    pool.run(tasks, lambda task, record: failed.append(record) if "error" in record else None)
    if failed:
        raise SystemExit(f"recipes: {failed[0]}")
    return torch.cat([torch.load(task["file"]) for task in tasks])[: given.self_tokens]  # parts are rounded up


if __name__ == "__main__":
    sys.exit(main())
