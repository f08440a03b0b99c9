"""Checks and times the kernels of sparse attention on a CUDA machine, against FlexAttention and torch's dense attention.

    python benchmarks/sparse.py [--only SECTION …] [--quick] [--workers N] [--add RESULT] [--out FOLDER]
    python benchmarks/sparse.py --device cpu --only checks        tries the script at tiny sizes

Sections: `checks` (results and gradients against the definition in float64, and against the errors of torch's flash kernel),
`tune` (milliseconds of many tiles, each checked against the first; it prints rows for `subquad.ops.sparse.launch`), `speed`
(against FlexAttention, compiled, its best options of a few, and the dense kernels), `long` (a window at up to a million tokens),
`first` (the first call on a cold cache) and `sanitize` (memory errors and races).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

if {"cpu", "--device=cpu"} & set(sys.argv):  # kernels then run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("SUBQUAD_KERNELS", "on")

import torch
from common import RESULTS, failure, slug
from kernel_sanitize import sanitize
from sparse_cases import CHECKS, FLEX, RASTER, SPEEDS, Speed, flex, ours, results, sdpa
from sparse_checks import checks, error
from timing import Timed, called, show
from torch import Tensor

from subquad.bench.machine import synchronize
from subquad.ops.launcher import rehearse
from subquad.ops.sparse import Layout, fused, launch, sparse_attention
from subquad.ops.sparse.launch import How, Inputs, Tile

SECONDS = {"checks": 240, "tune": 420, "speed": 420, "long": 60, "first": 60, "sanitize": 200}


class Bench(Timed):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(
            "sparse", "Kernels of sparse attention", args.device, args.out / f"sparse-{slug(args.device)}.json", quick=args.quick
        )
        self.go_on(args.add)
        self.workers = args.workers or (min(8, os.cpu_count() or 1) if self.cuda else 1)


# ---- tiles ---------------------------------------------------------------------------------------------------------

TUNED = [  # kind of layout, its name in SPEEDS by head dim
    (False, 128, "causal window 1024"),
    (False, 64, "causal window 1024"),
    (True, 64, "13 x 13 on 128 x 128"),
    (True, 128, "13 x 13 on 128 x 128"),
]
SIDES = {
    "forward": [(128, 64), (128, 128), (64, 64), (64, 128), (128, 32), (64, 32)],
    "query": [(128, 64), (64, 64), (64, 128), (128, 32), (64, 32), (128, 128)],
    "key": [(64, 128), (64, 64), (32, 128), (128, 64), (32, 64), (128, 128)],
}


def candidates(kernel: str, width: int, boxes: bool, quick: bool) -> list[Tile]:
    found = []
    for (q, k), warps, stages in itertools.product(SIDES[kernel], (4, 8), (2, 3) if quick else (1, 2, 3, 4)):
        held = (q * width if kernel != "key" else 2 * k * width) + stages * 2 * (k if kernel != "key" else q) * width
        if 2 * held <= 220_000 and max(q, k) * width * (2 if kernel == "key" else 1) <= warps * 32 * 160:
            found += [Tile(q, k, warps, stages, described) for described in ((False,) if boxes or stages == 1 else (False, True))]
    return found


def alone(kernel: str, x: Inputs, layout: Layout, do: Tensor) -> Any:
    """One of the three kernels on operands that are made beforehand, the lists of visits too."""
    how = How(layout.inner, 0, 0, x.q.shape[3] ** -0.5, 0.0)
    tiles, lists = fused._visits(kernel, x, layout)
    if kernel == "forward":
        return lambda: {"o": launch.forward_pass(x, how, tiles, lists, False, False)[0]}
    lse = torch.full(x.q.shape[:3], 6.0, device=x.q.device)
    if kernel == "query":
        return lambda: launch.query_pass(x, how, tiles, lists, tiles, x.q, lse, None, do, None, None)[0]
    log, delta = torch.zeros(2, x.q.shape[0], x.q.shape[2], tiles.counts(layout.n, 0)[0] * tiles.q, device=x.q.device)
    return lambda: launch.key_pass(x, how, tiles, lists, do, launch.Rows(log + 6, delta, None, None))


def tune(bench: Bench) -> list[dict[str, Any]]:
    add = bench.table("Tiles: milliseconds of each kernel alone", "kernel", "D", "tiles", "best five", "in use")
    found, layouts = [], {speed.name: speed for speed in SPEEDS}
    before = dict(launch.TABLE)
    try:
        for boxes, width, name in TUNED:
            layout = layouts[name].layout() if bench.cuda else Layout.neighborhood((6, 8), 3) if boxes else Layout.window(48, 20)
            shape = (1, layout.n, 16 if bench.cuda else 1, width if bench.cuda else 16)
            q, k, v, do = torch.randn(4, *shape, device=bench.device, dtype=torch.bfloat16)
            for kernel in SIDES:
                row = tune_one(bench, kernel, boxes, width, Inputs(q, k, v), layout, do)
                found.append(row)
                best = "; ".join(f"{tuple(tile)} {ms:.3f}" for tile, ms in row["tried"][:5])
                add(kernel, str(width), "boxes" if boxes else "lines", best, f"{tuple(row['used'])} {show(row['used_ms'])}")
            if not bench.cuda:
                break
    finally:
        launch.use(before)
    return found


def tune_one(bench: Bench, kernel: str, boxes: bool, width: int, x: Inputs, layout: Layout, do: Tensor) -> dict[str, Any]:
    bits = 8 * x.q.dtype.itemsize
    used = launch.tile_of(kernel, width, bits, boxes)
    key = (kernel, max(64, width), bits, boxes)
    tiles = list(dict.fromkeys([used, *candidates(kernel, width, boxes, bench.quick)]))[: None if bench.cuda else 2]
    calls: dict[Tile, Any] = {}
    for tile in tiles:
        launch.use({**launch.TABLE, key: tile})
        call = alone(kernel, x, layout, do)
        if bench.cuda:
            rehearse(call)  # all compile side by side
        calls[tile] = (call, dict(launch.TABLE))
    right, wanted, wrong = [], None, []

    def take(tile: Tile) -> Any:
        call, table = calls[tile]
        launch.use(table)
        return call

    for tile in tiles:  # all of them before any is timed, which compilers at work would disturb
        try:
            got = take(tile)()
            wanted = wanted or got
            (right if all(error(got[name], wanted[name].double()) <= 2e-2 for name in wanted) else wrong).append(tile)
        except Exception as reason:  # out of shared memory or registers
            wrong.append((*tile, failure(reason)))
            synchronize(bench.device)
    tried = [(tile, bench.ms(take(tile))) for tile in right]
    tried.sort(key=lambda pair: pair[1])
    return {"kernel": kernel, "boxes": boxes, "D": width, "used": used, "used_ms": dict(tried).get(used), "tried": tried, "wrong": wrong}


# ---- times ---------------------------------------------------------------------------------------------------------


def needed_flops(layout: Layout, shape: tuple[int, int, int, int]) -> float:
    """FLOPs of the forward over the blocks of 128 x 128 that hold a seen pair."""
    from subquad.ops.sparse.visits import Tiling, by_rule

    batch, n, heads, width = shape
    pairs = by_rule(layout.inner, n, layout.m, Tiling(128, 128), torch.device("cpu"), False).items.shape[1]
    return 4.0 * width * batch * heads * pairs * 128 * 128


def speed(bench: Bench) -> list[dict[str, Any]]:
    from torch.nn.attention import SDPBackend

    add = bench.table(
        "Time on the device, bf16, ms", "layout", "shape", "what", "forward", "forward + backward", "as called", "TFLOP/s of needed blocks"
    )
    found: list[dict[str, Any]] = []
    for one in (
        SPEEDS if bench.cuda else [Speed("13 x 13 on 128 x 128", (1, 48, 1, 16), lambda: Layout.neighborhood((6, 8), 3), (1.3, 1.25))]
    ):
        torch._dynamo.reset()
        layout, torch_found = one.layout(), []
        made = torch.randn(3, *one.shape, device=bench.device, dtype=torch.bfloat16)
        x = {name: t.clone().requires_grad_() for name, t in zip("qkv", made)}
        todo: dict[str, Any] = {"subquad": partial(ours, layout=layout)}
        if one.name in RASTER:
            todo["subquad, tiles of neighbouring indices"] = partial(ours, layout=layout)
        options = FLEX[:2] if bench.quick else FLEX
        todo |= {f"FlexAttention {json.dumps(o)}": flex(layout, bench.device, 128, o) for o in options} if bench.cuda else {}
        if one.name == "dense causal" and bench.cuda:
            todo |= {
                "cuDNN": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
                "FlashAttention-2": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
            }
        flops = needed_flops(layout, one.shape)
        for name, call in todo.items():
            case: dict[str, Any] = {
                "layout": one.name,
                "name": name,
                "shape": list(one.shape),
                "bars": list(one.bars),
                "needed_flops": flops,
            }
            torch_found.append(case)
            with raster(name.endswith("indices")):
                bench.time_into(case, call, x)
            ms = [case["forward_ms"], case["both_ms"]]
            rates = " / ".join("–" if t is None else f"{flops * times / t / 1e9:.0f}" for t, times in zip(ms, (1, 3.5)))
            add(one.name, str(list(one.shape)), name, *(case.get("error", "–") if t is None else show(t) for t in ms), called(case), rates)
        found += torch_found
    verdicts(bench, found)
    return found


def verdicts(bench: Bench, found: list[dict[str, Any]]) -> None:
    """How many times faster than the best of FlexAttention's options, than tiles of neighbouring indices, and cuDNN's share."""
    add = bench.table("Times faster, on the device", "layout", "than", "forward", "bar", "forward + backward", "bar ")
    for one in SPEEDS:
        by_name = {case["name"]: case for case in found if case["layout"] == one.name}
        mine = by_name.pop("subquad", None)
        if mine is None or not mine["both_ms"]:
            continue
        rivals = {
            "FlexAttention": ([case for name, case in by_name.items() if name.startswith("Flex")], one.bars),
            "tiles of neighbouring indices": ([case for name, case in by_name.items() if name.endswith("indices")], (1.3, 1.3)),
            "cuDNN": ([case for name, case in by_name.items() if name == "cuDNN"], (0.7, None)),
        }
        for rival, (cases, bars) in rivals.items():
            cells = []
            for key, bar in zip(("forward_ms", "both_ms"), bars):
                times = [case[key] for case in cases if case[key]]
                factor = min(times) / mine[key] if times else None
                met = "" if bar is None or factor is None else f"{bar}, {'met' if factor >= bar else 'missed'}"
                cells += [show(factor, "{:.2f}"), met or "–"]
            if cases:
                add(one.name, rival, *cells)


class raster:
    """Within it, tiles of grids are of neighbouring indices."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        self.before = fused.on_grid
        if self.wanted:
            fused.on_grid = lambda rule: False

    def __exit__(self, *_: Any) -> None:
        fused.on_grid = self.before


def long(bench: Bench) -> list[dict[str, Any]]:
    """A window of 4096 up to a million tokens: time per token, memory, and how long its layout and its visits take to make."""
    add = bench.table(
        "Causal window 4096, 4 heads of 128, bf16", "tokens", "forward ms", "forward + backward ms", "ns a token", "peak MiB", "visits ms"
    )
    found = []
    for tokens in (1 << 17, 1 << 20) if bench.cuda else (64,):
        width = 128 if bench.cuda else 16
        x = {name: torch.randn(1, tokens, 4, width, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for name in "qkv"}
        fused.by_rule.cache_clear()
        synchronize(bench.device)
        start = time.perf_counter()
        layout = Layout.window(tokens, 4096)
        fused._visits("forward", Inputs(*(t.detach() for t in x.values())), layout)
        synchronize(bench.device)
        case: dict[str, Any] = {"tokens": tokens, "visits_ms": 1000 * (time.perf_counter() - start)}
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        bench.time_into(case, partial(ours, layout=layout), x)
        case["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20 if bench.cuda else None
        ns = None if case["forward_ms"] is None else 1e6 * case["forward_ms"] / tokens
        add(
            str(tokens),
            show(case["forward_ms"]),
            show(case["both_ms"]),
            show(ns, "{:.1f}"),
            show(case["peak_mib"], "{:.0f}"),
            show(case["visits_ms"], "{:.1f}"),
        )
        found.append(case)
        del x
    return found


FIRST = """
import time, torch
from subquad.ops.sparse import Layout, sparse_attention
x = [torch.randn(1, 4096, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
torch.cuda.synchronize(); start = time.perf_counter()
sparse_attention(*x, Layout.{layout}).sum().backward(); torch.cuda.synchronize()
print("took", time.perf_counter() - start)
"""


def first(bench: Bench) -> list[dict[str, Any]]:
    """Forward and backward in a new process, with nothing compiled."""
    add = bench.table("First call on a cold cache, forward and backward", "layout", "seconds", "")
    found = []
    for layout in ("window(4096, 512)", "neighborhood((64, 64), 13)") if bench.cuda else ():
        with tempfile.TemporaryDirectory() as cache:
            run = subprocess.run(
                [sys.executable, "-c", FIRST.format(layout=layout)],
                env={**os.environ, "TRITON_CACHE_DIR": cache},
                capture_output=True,
                text=True,
            )
        took = next((float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("took")), None)
        found.append(
            {"layout": layout, "seconds": took, "met": took is not None and took < 5, "error": None if took else run.stderr[-500:]}
        )
        add(layout, show(took, "{:.1f}"), "met" if found[-1]["met"] else "missed")
    return found


def small(device: torch.device) -> None:
    """Every check forward and backward, for compute-sanitizer."""
    for name, check in CHECKS.items():
        layout = check.layout(device)
        sizes = zip((layout.n, layout.m, layout.m), check.heads)
        x = [torch.randn(1, tokens, heads, 64, device=device, dtype=torch.bfloat16) for tokens, heads in sizes]
        results(sparse_attention, x, layout, check.more(device), torch.bfloat16)
        synchronize(device)
        print("ran", name, flush=True)


SECTIONS = {
    "checks": checks, "tune": tune, "speed": speed, "long": long, "first": first,
    "sanitize": lambda bench: sanitize(bench, ["sparse"], __file__),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels of sparse attention on a CUDA machine.")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="fewer tiles to try, shorter timings")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that the checks, most of whose time is compilation, are spread over"
    )
    parser.add_argument("--add", type=Path, metavar="RESULT", help="go on from this result file of the same commit")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("small", nargs="?", choices=["sparse"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch; --device cpu tries the script at tiny sizes", file=sys.stderr)
        return 2
    if args.small:
        small(torch.device(args.device))
        return 0
    bench = Bench(args)
    print(f"{bench.result['device']}, {bench.result['versions']}")
    for name in args.only:
        bench.fenced(name, SECTIONS[name], SECONDS[name])
    print(f"written to {bench.path}")
    wrong = any(case.get("met") is False for case in bench.result.get("checks", ()) if isinstance(case, dict))
    return 1 if wrong or any(bench.error(name) for name in args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
