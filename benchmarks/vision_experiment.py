"""Attention for images, matched: one backbone, one recipe, the same batches; only the mechanism differs.

    digit somewhere on a canvas among pieces of others ─ patches of 3 × 3 ─ 196 tokens ─ 4 blocks of a ViT ─ mean ─ 10 classes

There is no convolution but that of the patches: with a stem of four, which sees most of a stroke, what was tried learnt alike, whatever
the attention (docs/lab-notes.md).

python benchmarks/vision_experiment.py --device cuda --out FOLDER      nine mechanisms × three seeds, 190 s at most
python benchmarks/vision_experiment.py --quick                         the same in small, on a CPU: shows that it works, and nothing else

The digits are the 10,000 of the package: 8,000 are composed into new canvases for every batch, 2,000 are tested on, on canvases with as
much clutter as in training, with none, and with twice as much. Several processes share the device; the time of a step is measured before,
by each mechanism alone. Seeds come one after another, so that what is stopped by `--seconds` is whole for the seeds that it has.
"""

from __future__ import annotations

import argparse
import importlib.util
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
SIDE, PATCH = 42, 3  # of the canvas and of a token: 14 × 14 tokens
PIECES = (4, 0, 8)  # of clutter: as in training, none, twice as many
COLUMNS = ("mechanism", "seeds", "accuracy", "without clutter", "with twice the clutter", "half-way", "ms a step", "training s")


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


FULL = Plan(seeds=3, epochs=24, batch=128, width=64, depth=4, heads=2, digits=8000, tests=2000)
QUICK = Plan(seeds=2, epochs=2, batch=32, width=16, depth=2, heads=2, digits=128, tests=64)


def backbone(plan: Plan, mechanism: str, seed: int) -> nn.Module:
    """A ViT with mean pooling; all that is not the mechanism's own starts the same whatever it is."""
    from timm.models.vision_transformer import VisionTransformer

    import subquad

    sizes = {"embed_dim": plan.width, "depth": plan.depth, "num_heads": plan.heads, "in_chans": 1, "num_classes": 10}
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=SIDE, patch_size=PATCH, class_token=False, global_pool="avg", **sizes)
    torch.manual_seed(seed)
    return subquad.swap(model, mechanism)


def data_sets(plan: Plan) -> list[Any]:
    """One for each of `PIECES`; the first is trained on."""
    from subquad.train import images

    whole = images.load("mnist", 28)
    cut = {"images": plan.digits, "labels": plan.digits, "test_images": plan.tests, "test_labels": plan.tests}
    digits = replace(whole, **{name: getattr(whole, name)[:count] for name, count in cut.items()})
    return [images.clutter(digits, SIDE, pieces) for pieces in PIECES]


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
        "accuracy": dict(zip(map(str, PIECES), shares)),
        "half_way": result.history[max(0, plan.epochs // 2 - 1)]["accuracy"],
        "history": result.history,
        "seconds": result.seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def speed(plan: Plan, device: str) -> dict[str, Any]:
    """Milliseconds of a training step, the mechanism alone on the device: the median of repeated steps, each waited for."""
    from subquad.train import loop

    data, found = data_sets(plan)[0], {}
    warm, count = (10, 20) if device == "cuda" else (1, 2)
    for mechanism in MECHANISMS:
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


def rows(runs: list[dict[str, Any]], times: dict[str, float]) -> list[list[str]]:
    """A row a mechanism, the most accurate first; those that failed last, with the reason."""
    made = []
    for mechanism in MECHANISMS:
        mine = [run for run in runs if run["mechanism"] == mechanism]
        good = [run for run in mine if "error" not in run]
        if not good:
            made.append((-1.0, [mechanism, "0", mine[0]["error"] if mine else "not run in the time given", *["–"] * 5]))
            continue
        cells = [spread([run["accuracy"][str(pieces)] for run in good]) for pieces in PIECES]
        alone = f"{times[mechanism]:.1f}" if mechanism in times else "–"
        row = [mechanism, str(len(good)), *cells, spread([run["half_way"] for run in good]), alone]
        mean = statistics.fmean(run["accuracy"][str(PIECES[0])] for run in good)
        made.append((mean, [*row, f"{statistics.fmean(run['seconds'] for run in good):.0f}"]))
    return [row for _, row in sorted(made, key=lambda pair: -pair[0])]


def train_all(report: Report, plan: Plan, device: str, workers: int, deadline: float) -> list[dict[str, Any]]:
    """All runs, several side by side; the result file is written anew after each."""
    tasks = [(plan, mechanism, seed, device) for seed in range(plan.seeds) for mechanism in MECHANISMS]
    done: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
        coming = pool.imap_unordered(run_one, tasks)
        while len(done) < len(tasks):
            try:
                done.append(coming.next(timeout=max(0.1, deadline - time.monotonic())))
            except multiprocessing.TimeoutError:
                print(f"{len(tasks) - len(done)} of {len(tasks)} runs had no time", flush=True)
                break
            last = done[-1]
            words = last.get("error") or f"{last['accuracy'][str(PIECES[0])]:.2%} in {last['seconds']:.0f} s"
            print(f"{len(done)}/{len(tasks)} {last['mechanism']}, seed {last['seed']}: {words}", flush=True)
            fill(report, plan, done)
    return sorted(done, key=lambda run: (run["seed"], MECHANISMS.index(run["mechanism"])))


def fill(report: Report, plan: Plan, done: list[dict[str, Any]]) -> None:
    from common import write_json

    times = report.result.get("speed", {})
    times = times if "error" not in times else {}
    title = f"Accuracy on cluttered digits, {SIDE} × {SIDE}, after {plan.epochs} epochs of {plan.digits:,}, per cent"
    report.result["tables"] = [{"title": title, "columns": list(COLUMNS), "rows": rows(done, times)}]
    report.result["training"] = done
    write_json(report.path, report.result)


def main() -> int:
    parser = argparse.ArgumentParser(description="Attention mechanisms in one small backbone, trained alike on cluttered digits.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results; with --quick: runs)")
    parser.add_argument("--quick", action="store_true", help="tiny: to see that it works")
    parser.add_argument("--epochs", type=int, help=f"default {FULL.epochs}")
    parser.add_argument("--seeds", type=int, help=f"default {FULL.seeds}")
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
    plan = replace(plan, epochs=given.epochs or plan.epochs, seeds=given.seeds or plan.seeds)
    name = f"vision-experiment-{'quick-' if given.quick else ''}{slug(given.device)}.json"
    report = Report(
        "vision_experiment",
        "Attention for images, trained alike",
        given.device,
        (given.out or (ROOT / "runs" if given.quick else RESULTS)) / name,
    )
    report.result["plan"] = {**vars(plan), "side": SIDE, "pieces": list(PIECES), "mechanisms": list(MECHANISMS)}
    report.result["notes"] = [
        "One backbone (a small ViT), one recipe, the same batches and first weights for a seed; only the mechanism "
        "differs. Canvases as in training, without clutter, and with twice as much; half-way: the first of these after half of the epochs, "
        "at a learning rate still high. Mean ± standard deviation over seeds.",
        "A step's time is that of each mechanism alone on the device; training seconds are those of runs side by side, which share it.",
    ]
    report.fenced("speed", lambda _: speed(plan, given.device), seconds=60 if cuda else 600)
    workers = given.workers or (len(MECHANISMS) if cuda else 1)
    report.fenced("training", lambda r: train_all(r, plan, given.device, workers, deadline), seconds=10**6)
    runs = report.result["training"]
    if isinstance(runs, dict):
        print(f"vision_experiment: {runs['error']}", file=sys.stderr)
        return 1
    for row in (COLUMNS, *report.result["tables"][0]["rows"]):
        print(" | ".join(row))
    print(f"written: {report.path}")
    return 1 if any("error" in run for run in runs) or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
