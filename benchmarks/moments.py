"""Checks and times the kernels of moments, and the RAVLT that is built on them, on a CUDA machine.

    python benchmarks/moments.py [--only SECTION …] [--quick] [--authors FOLDER] [--add RESULT] [--out FOLDER]
    python benchmarks/moments.py --device cpu                     tries the script at tiny sizes

Sections: `checks` (results and gradients against the quadratic definition in float64, at every head dim), `core` (RALA, MALA and
NaLaFormer against RALA's formulas in plain PyTorch, eager and compiled, exact softmax, and the floor), `first` (the first call on
a cold cache), `sanitize` (memory errors and races) and `model` (RAVLT-S, inference and training, against the authors' code, a
checkout of qhfan/RALA in --authors).
"""

from __future__ import annotations

import argparse
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
import torch.nn.functional as F
from common import RESULTS, slug
from kernel_sanitize import sanitize
from moment_cases import CALLS, CASES, DIMS, define, formulas, rotary_of, tensors
from moment_models import BATCHES, author_model, our_model, train_and_infer
from timing import Timed, called
from torch import Tensor

from subquad.bench.machine import synchronize

SHAPES = [  # batch, tokens, heads, head dim; grid; bar of forward + backward in ms, and of the forward over the floor
    ((128, 3136, 1, 64), (56, 56), 0.55, 1.8),
    ((128, 784, 2, 64), (28, 28), None, None),
    ((128, 3136, 1, 96), (56, 56), 0.80, 1.8),
    ((8, 50176, 1, 64), (224, 224), 0.60, 1.8),
    ((4, 16384, 8, 64), (128, 128), 0.60, 1.8),
    ((1, 65536, 8, 64), (256, 256), None, None),
]
SECONDS = {"checks": 200, "core": 200, "first": 60, "sanitize": 280, "model": 280}


class Bench(Timed):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(
            "moments", "Kernels of moments and RAVLT", args.device, args.out / f"moments-{slug(args.device)}.json", quick=args.quick
        )
        self.authors: Path | None = args.authors
        self.go_on(args.add)


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def checks(bench: Bench) -> list[dict[str, Any]]:
    """Every case and head dim: errors of o and of each gradient, and their ratio to those of the definition in float32, rounded."""
    add = bench.table(
        "Relative error against float64, and its ratio to that of float32 rounded", "case", "D", "V", "dtype", "o and gradients", ""
    )
    found = []
    tokens = 333 if bench.cuda else 35
    for name, case in CASES.items():
        for width, values in DIMS if case.every and bench.cuda else DIMS[:1] if bench.cuda else [(8, 8)]:
            for dtype in (torch.float32, torch.bfloat16) if max(width, values) <= 64 else (torch.bfloat16,):
                x = tensors(2, tokens, 2, width, values, bench.device, dtype, case)
                ours = define(case, x, kernels=True)
                exact = define(case, {key: t.double() if t.is_floating_point() else t for key, t in x.items()})
                plain = define(case, {key: t.float() if t.is_floating_point() else t for key, t in x.items()})
                errors = {key: error(ours[key], exact[key]) for key in exact}
                ratios = {key: errors[key] / max(error(plain[key].to(dtype), exact[key]), 1e-30) for key in exact}
                if dtype == torch.float32:
                    met = all(value <= (1e-5 if key == "o" else 1e-4) for key, value in errors.items())
                else:
                    met = all(ratio <= 2 for key, ratio in ratios.items() if key in ("o", "dq", "dk", "dv"))
                word = str(dtype).removeprefix("torch.")
                found.append({"case": name, "D": width, "V": values, "dtype": word, "errors": errors, "ratios": ratios, "met": met})
                cells = " ".join(f"{key} {errors[key]:.1e} ({ratios[key]:.1f})" for key in exact)
                add(name, str(width), str(values), word, cells, "met" if met else "missed")
    x = tensors(2, tokens, 2, 16, 16, bench.device, torch.bfloat16, CASES["rala, rotary"])
    runs = [define(CASES["rala, rotary"], x, kernels=True) for _ in range(10)]
    same = all(torch.equal(run[key], runs[0][key]) for run in runs for key in run)
    found.append({"case": "ten runs bit-identical", "met": same})
    add("ten runs bit-identical", "", "", "", "", "met" if same else "missed")
    return found


def core(bench: Bench) -> list[dict[str, Any]]:
    add = bench.table(
        "Time on the device, bf16, ms (× floor of q, k, v, q again, o)", "what", "shape", "forward", "forward + backward", "as called"
    )
    found = []
    for shape, grid, both_bar, floor_bar in SHAPES:
        if not bench.cuda:
            shape, grid = (1, 36, 1, 16), (6, 6)
        torch._dynamo.reset()  # it compiles eight variants of a function, and then no more
        compiled = torch.compile(formulas, dynamic=False) if bench.cuda else formulas
        made = torch.randn(4, *shape, device=bench.device, dtype=torch.bfloat16)
        grown = {name: t.clone().requires_grad_() for name, t in zip("qkv", made)}
        floor = 5 * made[0].nbytes / bench.rate() * 1000
        rotary = rotary_of(grid, shape[3], bench.device)
        todo: dict[str, Any] = {name: partial(call, rotary=None) for name, call in CALLS.items()}
        todo |= {f"{name}, rotary": partial(call, rotary=rotary) for name, call in CALLS.items()}
        todo["formulas, eager"] = partial(formulas, angles=None)
        todo["formulas, compiled"] = partial(compiled, angles=None)
        todo["formulas, rotary, eager"] = partial(formulas, angles=(rotary.cos, rotary.sin))
        if shape[1] <= 20000:
            todo["softmax (SDPA)"] = softmax
        for name, call in todo.items():
            case: dict[str, Any] = {
                "name": name,
                "shape": list(shape),
                "floor_ms": floor,
                "bars": [floor_bar and floor_bar * floor, both_bar],
            }
            found.append(case)
            bench.time_into(case, call, grown)
            ms = [case["forward_ms"], case["both_ms"]]
            cells = [case.get("error", "–") if t is None else f"{t:.3f} ({t / floor:.2f})" for t in ms]
            add(name, str(list(shape)), *cells, called(case))
        if not bench.cuda:
            break
    return found


def small(device: torch.device) -> None:
    """Every case forward and backward on small inputs, for compute-sanitizer."""
    for case in CASES.values():
        for width, values, dtype in ((64, 64, torch.bfloat16), (96, 96, torch.bfloat16), (48, 32, torch.float32)):
            define(case, tensors(1, 70, 2, width, values, device, dtype, case), kernels=True)
    synchronize(device)


def sanitized(bench: Bench) -> dict[str, Any]:
    return sanitize(bench, ["moments"], __file__)


def softmax(x: dict[str, Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in "qkv")).transpose(1, 2)


def first_call(name: str, device: str) -> float:
    """Seconds of the first forward and backward of this process."""
    shape, grid = ((128, 784, 2, 64), (28, 28)) if device == "cuda" else ((1, 36, 1, 16), (6, 6))
    grown = {key: torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for key in "qkv"}
    rotary = rotary_of(grid, shape[3], device)
    torch.ones((), device=device, requires_grad=True).backward(torch.ones((), device=device))
    synchronize(device)
    start = time.perf_counter()
    CALLS[name](grown, rotary=rotary).sum().backward()
    synchronize(device)
    return time.perf_counter() - start


def first(bench: Bench) -> dict[str, float]:
    add = bench.table("First forward and backward on a cold cache", "mechanism", "s")
    found = {}
    for name in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--first", name, "--device", bench.device.type]
            done = subprocess.run(words, env={**os.environ, "TRITON_CACHE_DIR": folder}, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found[name] = float(done.stdout.split()[-1])
        add(name, f"{found[name]:.1f}")
    return found


def model(bench: Bench) -> list[dict[str, Any]]:
    """Images a second and peak memory of RAVLT-S, ours and the authors'."""
    add = bench.table("RAVLT-S, bf16 autocast: images/s and peak GiB of training", "size", "batch", "model", "inference", "training", "GiB")
    models = {"subquad": our_model, "subquad, compiled": our_model, "authors": partial(author_model, bench.authors)}
    found = []
    for size, batch in BATCHES if bench.cuda else [(64, 1)]:
        for name, make in models.items():
            if name == "authors" and bench.authors is None:
                continue
            if "compiled" in name and (not bench.cuda or bench.quick):
                continue
            case: dict[str, Any] = {"name": name, "size": size, "batch": batch}
            found.append(case)
            case |= train_and_infer(make, size, batch, bench.device, compiled="compiled" in name)
            add(
                str(size),
                str(batch),
                name,
                *(case.get("error", "–") if case.get(key) is None else f"{case[key]:.1f}" for key in ("infer", "train", "gib")),
            )
    return found


SECTIONS = {"checks": checks, "core": core, "first": first, "sanitize": sanitized, "model": model}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels of moments, and RAVLT, on a CUDA machine.")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--authors", type=Path, metavar="FOLDER", help="a checkout of qhfan/RALA, to measure the authors' model too")
    parser.add_argument("--quick", action="store_true", help="short timings")
    parser.add_argument("--add", type=Path, metavar="RESULT", help="go on from this result file of the same commit")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--first", choices=list(CALLS), help=argparse.SUPPRESS)
    parser.add_argument("small", nargs="?", choices=["moments"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch; --device cpu tries the script at tiny sizes", file=sys.stderr)
        return 2
    if args.small:
        small(torch.device(args.device))
        return 0
    if args.first:
        print(first_call(args.first, args.device))
        return 0
    bench = Bench(args)
    print(f"{bench.result['device']}, {bench.result['versions']}")
    for name in args.only:
        bench.fenced(name, SECTIONS[name], SECONDS[name])
    print(f"written to {bench.path}")
    wrong = any(not case["met"] for case in bench.result.get("checks", ()) if isinstance(case, dict))
    return 1 if wrong or any(bench.error(name) for name in args.only) else 0


if __name__ == "__main__":
    sys.exit(main())
