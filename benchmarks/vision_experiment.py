"""Attention for images, matched: one backbone, one recipe, the same batches; only the mechanism differs.

    digit somewhere on a canvas among pieces of others ─ patches of 3 × 3 ─ 196 tokens ─ 4 blocks of a ViT ─ mean ─ 10 classes

There is no convolution but that of the patches: with a stem of four, which sees most of a stroke, what was tried learnt alike, whatever
the attention (docs/lab-notes.md).

python benchmarks/vision_experiment.py --device cuda --out FOLDER      nine mechanisms × three seeds, 190 s at most
python benchmarks/vision_experiment.py --data mnist                    plain digits at 56 × 56, shifted at random; or scikit-learn's: digits
python benchmarks/vision_experiment.py --quick                         the same in small, on a CPU: shows that it works, and nothing else

The digits are the 10,000 of the package: 8,000 are composed into new canvases for every batch, 2,000 are tested on, on canvases with as
much clutter as in training, with none, and with twice as much. The effective rank is that of what attention gives, all heads side by side,
in the trained model: mean over layers and images held out. Several processes share the device; the time of a step is measured before,
by each mechanism alone. Seeds come one after another, so that what is stopped by `--seconds` is whole for the seeds that it has.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, ROOT, Report, failure, slug
from torch import nn

MECHANISMS = ("softmax", "linear-relu", "linear-elu", "rala", "mala", "nalaformer", "inline", "l2vit", "lightnet")
PIECES = (4, 0, 8)  # of clutter: as in training, none, twice as many
RANKED = 32  # images that the rank is taken on


@dataclass(frozen=True)
class Task:
    """Images: their side, that of a token, words for the title, and what is tested on, by name, with its column."""

    side: int
    patch: int
    words: str
    tests: dict[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("mechanism", "seeds", *self.tests.values(), "half-way", "effective rank", "ms a step", "training s")


TASKS = {
    "cluttered": Task(42, 3, "cluttered digits", dict(zip(map(str, PIECES), ("accuracy", "without clutter", "with twice the clutter")))),
    "mnist": Task(56, 4, "MNIST's digits, shifted", {"held out": "accuracy"}),
    "digits": Task(32, 4, "scikit-learn's digits, shifted", {"held out": "accuracy"}),
}


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seeds: int
    epochs: int
    batch: int
    width: int
    depth: int
    heads: int
    digits: int
    tests: int
    lr: float = 3e-3
    data: str = "cluttered"

    @property
    def task(self) -> Task:
        return TASKS[self.data]


FULL = Plan(seeds=3, epochs=24, batch=128, width=64, depth=4, heads=2, digits=8000, tests=2000)
QUICK = Plan(seeds=2, epochs=2, batch=32, width=16, depth=2, heads=2, digits=128, tests=64)


def backbone(plan: Plan, mechanism: str, seed: int) -> nn.Module:
    """A ViT with mean pooling; all that is not the mechanism's own starts the same whatever it is."""
    from timm.models.vision_transformer import VisionTransformer

    import subquad

    sizes = {"embed_dim": plan.width, "depth": plan.depth, "num_heads": plan.heads, "in_chans": 1, "num_classes": 10}
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=plan.task.side, patch_size=plan.task.patch, class_token=False, global_pool="avg", **sizes)
    torch.manual_seed(seed)
    return subquad.swap(model, mechanism)


def data_sets(plan: Plan) -> list[Any]:
    """One for each of the task's tests; the first is trained on."""
    from subquad.train import images

    clutter = plan.data == "cluttered"
    whole = images.load("mnist", 28) if clutter else images.load(plan.data, plan.task.side)
    cut = {"images": plan.digits, "labels": plan.digits, "test_images": plan.tests, "test_labels": plan.tests}
    digits = replace(whole, **{name: getattr(whole, name)[:count] for name, count in cut.items()})
    return [images.clutter(digits, plan.task.side, pieces) for pieces in PIECES] if clutter else [digits]


def recipe(plan: Plan) -> Any:
    from subquad.train.recipe import Recipe

    return Recipe(epochs=plan.epochs, batch_size=plan.batch, lr=plan.lr, mixup=0.0, smoothing=0.0, ema=0.99)


def run_one(task: tuple[Plan, str, int, str]) -> dict[str, Any]:
    """One mechanism with one seed, in a process of its own."""
    plan, mechanism, seed, device = task
    try:
        return {"mechanism": mechanism, "seed": seed, **trained(plan, mechanism, seed, device)}
    except Exception as error:  # whatever it is: it stands in the result, and the other runs go on
        return {"mechanism": mechanism, "seed": seed, "error": failure(error)}


def trained(plan: Plan, mechanism: str, seed: int, device: str) -> dict[str, Any]:
    from subquad.train import loop
    from subquad.train.engine import make_engine

    torch.set_num_threads(1)
    data, *others = data_sets(plan)
    model = backbone(plan, mechanism, seed)
    result = loop.train(model, data, recipe(plan), seed=seed, device=device, engine="torch")
    engine, scale = make_engine("torch", device, None), [255 * x.to(device) for x in data.statistics]
    shares = [result.accuracy]
    for other in others:
        shares.append(loop.evaluate(model, other.test_images.to(device), other.test_labels.to(device), *scale, engine)[1])
    return {
        "images": len(data.labels),
        "accuracy": dict(zip(plan.task.tests, shares)),
        "rank": rank(model, (data.test_images[:RANKED].to(device) - scale[0]) / scale[1]),
        "half_way": result.history[max(0, plan.epochs // 2 - 1)]["accuracy"],
        "history": result.history,
        "seconds": result.seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def rank(model: nn.Module, images: torch.Tensor) -> float:
    """Effective rank of what attention gives on images ``[B, C, H, W]``, all heads side by side: mean over layers and images."""
    from subquad.bench.spectrum import ranks
    from subquad.contract import Attention

    found: list[float] = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    handles = [layer.register_forward_hook(lambda _, args, o: found.append(ranks(o.float().flatten(2))[1])) for layer in layers]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    return statistics.fmean(found)


def speed(plan: Plan, device: str, found: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a training step, the mechanism alone on the device: the median of repeated steps, each waited for. Those that
    are not in `found` are measured and put there."""
    from subquad.train import loop

    data = data_sets(plan)[0]
    warm, count = (10, 20) if device == "cuda" else (1, 2)
    for mechanism in MECHANISMS:
        if mechanism in found:
            continue
        run = loop.Run(backbone(plan, mechanism, 0), data, recipe(plan), 0, device, None, "torch", None, {})
        taken = []
        for index in range(warm + count):
            began = time.perf_counter()
            run.advance()
            if device == "cuda":
                torch.cuda.synchronize()
            taken += [time.perf_counter() - began] if index >= warm else []
        found[mechanism] = 1000 * statistics.median(taken)
        print(f"{mechanism}: {found[mechanism]:.1f} ms a step", flush=True)
        del run
    if device == "cuda":
        torch.cuda.empty_cache()
    return found


def spread(shares: list[float]) -> str:
    """Mean ± standard deviation of a sample, in per cent."""
    mean = f"{100 * statistics.fmean(shares):.2f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def rows(runs: list[dict[str, Any]], times: dict[str, float], task: Task) -> list[list[str]]:
    """A row a mechanism, the most accurate first; those that failed last, with the reason."""
    made = []
    for mechanism in MECHANISMS:
        mine = [run for run in runs if run["mechanism"] == mechanism]
        good = [run for run in mine if "error" not in run]
        if not good:
            made.append(
                (-1.0, [mechanism, "0", mine[0]["error"] if mine else "not run in the time given", *["–"] * (len(task.columns) - 3)])
            )
            continue
        cells = [spread([run["accuracy"][name] for run in good]) for name in task.tests]
        alone = f"{times[mechanism]:.1f}" if mechanism in times else "–"
        ranks = [run["rank"] for run in good if "rank" in run]  # earlier results have none
        ranked = f"{statistics.fmean(ranks):.2f}" if ranks else "–"
        row = [mechanism, str(len(good)), *cells, spread([run["half_way"] for run in good]), ranked, alone]
        mean = statistics.fmean(run["accuracy"][next(iter(task.tests))] for run in good)
        made.append((mean, [*row, f"{statistics.fmean(run['seconds'] for run in good):.0f}"]))
    return [row for _, row in sorted(made, key=lambda pair: -pair[0])]


def kept(earlier: dict[str, Any], report: Report, plan: Plan) -> list[dict[str, Any]]:
    """The finished runs of an earlier result of this plan, whose seeds may be fewer."""
    if earlier.get("benchmark") != "vision_experiment":
        raise SystemExit("vision_experiment: --add: a result of another benchmark")
    for name, theirs, ours in (
        ("device", earlier["device"], report.result["device"]),
        *((name, earlier["plan"].get(name, value), value) for name, value in vars(plan).items() if name != "seeds"),
    ):
        if theirs != ours:
            raise SystemExit(f"vision_experiment: --add: {name} {theirs!r} there, {ours!r} here")
    return [{"commit": earlier["commit"], **run} for run in earlier["training"] if "error" not in run and run["seed"] < plan.seeds]


def timed(earlier: dict[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """The times of a step in an earlier result, and the commit of each."""
    times = {name: ms for name, ms in earlier.get("speed", {}).items() if name in MECHANISMS}
    return times, {name: earlier.get("speed_commits", {}).get(name, earlier["commit"]) for name in times}


def train_all(
    report: Report, plan: Plan, device: str, workers: int, deadline: float, done: list[dict[str, Any]]
) -> list[dict[str, Any]]:  # fmt: skip
    """All runs that are not done, several side by side; the result file is written anew after each."""
    there = {(run["mechanism"], run["seed"]) for run in done}
    tasks = [(plan, name, seed, device) for seed in range(plan.seeds) for name in MECHANISMS if (name, seed) not in there]
    total = len(done) + len(tasks)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
        coming = pool.imap_unordered(run_one, tasks)
        while len(done) < total:
            try:
                done.append(coming.next(timeout=max(0.1, deadline - time.monotonic())) | {"commit": report.result["commit"]})
            except multiprocessing.TimeoutError:
                print(f"{total - len(done)} of {total} runs had no time", flush=True)
                break
            last = done[-1]
            words = last.get("error") or f"{next(iter(last['accuracy'].values())):.2%} in {last['seconds']:.0f} s"
            print(f"{len(done)}/{total} {last['mechanism']}, seed {last['seed']}: {words}", flush=True)
            fill(report, plan, done)
    return sorted(done, key=lambda run: (run["seed"], MECHANISMS.index(run["mechanism"])))


def fill(report: Report, plan: Plan, done: list[dict[str, Any]]) -> None:
    from common import write_json

    times = report.result.get("speed", {})
    times = times if "error" not in times else {}
    task, count = plan.task, next((run["images"] for run in done if "images" in run), plan.digits)
    title = f"Accuracy on {task.words}, {task.side} × {task.side}, after {plan.epochs} epochs of {count:,}, per cent"
    report.result["tables"] = [{"title": title, "columns": list(task.columns), "rows": rows(done, times, task)}]
    report.result["training"] = done
    write_json(report.path, report.result)


def main() -> int:
    parser = argparse.ArgumentParser(description="Attention mechanisms in one small backbone, trained alike on digits.")
    parser.add_argument("--data", default="cluttered", choices=tuple(TASKS), help="default: cluttered; digits needs scikit-learn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results; with --quick: runs)")
    parser.add_argument("--quick", action="store_true", help="tiny: to see that it works")
    parser.add_argument("--epochs", type=int, help=f"default {FULL.epochs}")
    parser.add_argument("--seeds", type=int, help=f"default {FULL.seeds}")
    parser.add_argument(
        "--add", type=Path, metavar="RESULT", help="keep the runs of this result of the same plan, and make those that it lacks"
    )
    parser.add_argument("--workers", type=int, help="processes side by side (default: nine on cuda, one on cpu)")
    parser.add_argument("--seconds", type=float, default=None, help="stop after so long (default: 190 on cuda, no limit on cpu)")
    given = parser.parse_args()
    missing = [name for name in ("timm", "safetensors", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"vision_experiment: {', '.join(missing)} is missing: pip install 'subquad[convert]'", file=sys.stderr)
        return 2
    if given.device == "cuda" and not torch.cuda.is_available():
        print("vision_experiment: --device cuda, on a machine without one", file=sys.stderr)
        return 2
    cuda = given.device == "cuda"
    deadline = time.monotonic() + (given.seconds or (190 if cuda else 10**6))
    torch.set_num_threads(1)  # a process is one run, here as in the workers
    plan = QUICK if given.quick else FULL
    plan = replace(plan, epochs=given.epochs or plan.epochs, seeds=given.seeds or plan.seeds, data=given.data)
    kind = ("" if plan.data == "cluttered" else f"{plan.data}-") + ("quick-" if given.quick else "")
    name = f"vision-experiment-{kind}{slug(given.device)}.json"
    report = Report(
        "vision_experiment",
        "Attention for images, trained alike",
        given.device,
        (given.out or (ROOT / "runs" if given.quick else RESULTS)) / name,
    )
    earlier = {} if given.add is None else json.loads(given.add.read_text(encoding="utf-8"))
    done = kept(earlier, report, plan) if earlier else []
    task = plan.task
    report.result["plan"] = {**vars(plan), "side": task.side, "tested_on": list(task.tests), "mechanisms": list(MECHANISMS)}
    report.result["notes"] = [
        "One backbone (a small ViT), one recipe, the same batches and first weights for a seed; only the mechanism differs. "
        + ("Canvases as in training, without clutter, and with twice as much. " if plan.data == "cluttered" else "")
        + "Half-way: accuracy after half of the epochs, at a learning rate still high. Mean ± standard deviation over seeds.",
        "Effective rank: of attention's output in the trained model, all heads side by side, mean over layers and images held out.",
        "A step's time is that of each mechanism alone on the device; training seconds are those of runs side by side, which share it.",
    ]
    if commits := sorted({run["commit"] for run in done} - {report.result["commit"]}):
        said = f"Of the runs, {len(done)} are of an earlier commit: {', '.join(f'`{one}`' for one in commits)}."
        bare = sum("rank" not in run for run in done)
        report.result["notes"].append(said + (f" {bare} of them have no rank: that column is of the others." if bare else ""))
    known, made_at = timed(earlier)
    if commits := sorted({*made_at.values()} - {report.result["commit"]}):
        report.result["notes"].append(
            f"Of the times of a step, {len(known)} are of an earlier commit: {', '.join(f'`{x}`' for x in commits)}."
        )
    report.fenced("speed", lambda _: speed(plan, given.device, known), seconds=60 if cuda else 600)
    report.result["speed"] = known  # those that there was time for
    report.result["speed_commits"] = {name: made_at.get(name, report.result["commit"]) for name in known}
    workers = given.workers or (len(MECHANISMS) if cuda else 1)
    report.fenced("training", lambda r: train_all(r, plan, given.device, workers, deadline, done), seconds=10**6)
    runs = report.result["training"]
    if isinstance(runs, dict):
        print(f"vision_experiment: {runs['error']}", file=sys.stderr)
        return 1
    for row in (task.columns, *report.result["tables"][0]["rows"]):
        print(" | ".join(row))
    print(f"written: {report.path}")
    return 1 if any("error" in run for run in runs) or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
