"""Checks and times the kernels of the linear and delta recurrences on a CUDA machine.

    python benchmarks/kernels.py [--only SECTION …] [--peers NAME …] [--quick] [--add RESULT] [--out FOLDER]
    python benchmarks/kernels.py --plot benchmarks/results/kernels-DEVICE.json     draws into docs/img/, on any machine
    python benchmarks/kernels.py --device cpu                                      tries the script at tiny sizes

Sections, each fenced so that a failure is recorded and the rest goes on: `rates` (copy and matrix product), `compile` (all
kernels, side by side), `checks` (results and gradients against float64), `step` (decoding, against copying the states),
`speed` (forward, and forward and backward, against floors and bars), `softmax` (against cuDNN and FlashAttention-2 at 16k
tokens), `length` (time from 512 tokens to a million), `memory`, `first` (the first call on a cold cache), `sanitize`
(memory errors and races); then the peers (flash-linear-attention; the first call of each takes a minute or two, side by
side) and which bars are met. The result file is written anew after each section.

Every timing is given twice: on the device, as calls captured in a CUDA graph take it, and as called from Python, where launches
and autograd may take longer than the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

if {"cpu", "--device=cpu"} & set(sys.argv):  # kernels then run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from common import RESULTS, ROOT, slug
from kernel_bars import FASTER_FROM, MS, bars
from kernel_cases import FEW, FLAT, FORMS, LONG, LONGEST, PEERS, SOFTMAX, STATES, TIMED, Inputs, Shape, floor_bytes, inputs, leaves
from kernel_checks import REGIMES, check, check_shapes, results, rows, tiled
from kernel_sanitize import sanitize
from timing import Timed, called, show
from torch import Tensor

from subquad.bench.machine import peak_bytes, synchronize

SECONDS = {
    "rates": 20, "compile": 150, "checks": 150, "step": 30, "speed": 90, "softmax": 60, "length": 90, "memory": 40, "first": 150,
    "sanitize": 280, "bars": 5,
}  # fmt: skip
PEER_SECONDS = 170  # each
TOKENS = 2**14  # in all, against softmax
TRY: Shape = (1, 70, 2, 16)  # every shape on CPU
Call = Callable[[Inputs], Tensor]


class Bench(Timed):
    """The result so far, and its timings."""

    def __init__(self, args: argparse.Namespace) -> None:
        path = args.out / f"kernels-{slug(args.device)}.json"
        super().__init__("kernels", "Kernels of the linear and delta recurrences", args.device, path, quick=args.quick)
        self.tokens, self.heads = args.tokens, args.heads
        self.timings: list[dict[str, Any]] = []
        if args.add:
            self.add(json.loads(args.add.read_text()), {*args.only, *args.peers})
        self.result["timings"] = self.timings

    def add(self, earlier: dict[str, Any], again: set[str]) -> None:
        """Go on from an earlier result of this device and commit, but for the sections and peers that are run again."""
        for key in ("device", "commit"):
            if earlier[key] != self.result[key]:
                raise SystemExit(f"--add: {key} {earlier[key]} there, {self.result[key]} here")
        self.timings += [case for case in earlier["timings"] if case["section"] not in again and case["name"] not in again]
        self.result = earlier | {key: self.result[key] for key in ("date", "command", "versions")}

    def shape(self, shape: Shape) -> Shape:
        return shape if self.cuda else TRY

    def measure(self, section: str, name: str, shape: Shape, call: Call, grown: Inputs) -> dict[str, Any]:
        """Forward, and forward and backward, in milliseconds, on the device and as called; kept in `timings`."""
        found: dict[str, Any] = {"section": section, "name": name, "shape": list(shape)}
        self.timings.append(found)
        self.time_into(found, call, grown)
        if section in ("speed", "length") and name in FORMS:
            found["floor_ms"] = [1000 * size / self.rate() for size in floor_bytes(grown)]
        return found


def share(found: dict[str, Any], key: str) -> str:
    """Milliseconds, and in brackets how many times the floor."""
    value, floor = found[key], found["floor_ms"][key == "both_ms"]
    return found.get("error", "–") if value is None else f"{value:.3f} ({value / floor:.2f})"


# ---- sections ----------------------------------------------------------------------------------------------------


def rates(bench: Bench) -> dict[str, float]:
    n = 8192 if bench.cuda else 128
    m = torch.randn(n, n, device=bench.device, dtype=torch.bfloat16)
    product = 2 * n**3 / bench.ms(lambda: m @ m) / 1e9
    bench.table("Rates of the machine", "copy, GB/s", "bf16 product, TFLOP/s")(f"{bench.rate() / 1e9:.0f}", f"{product:.2f}")
    return {"copy_gb_s": bench.rate() / 1e9, "product_tflop_s": product}


def parts(name: str, cuda: bool, quick: bool) -> list[tuple[str, Shape]]:
    """What to run once so that all kernels of a form's checks and timings are compiled: dtypes and shapes."""
    checked = [(dtype, shape) for shape in check_shapes(cuda, quick) for dtype in ("float32", "bfloat16")]
    checked += [(regime, shape) for shape, regime in tiled(cuda, quick)]
    return [*checked, ("step", STATES), *(("timed", shape) for shape, names in TIMED if name in names and shape != LONGEST)]


def warm_up(name: str, part: int, device: str, quick: bool) -> None:
    form = FORMS[name]
    kind, shape = parts(name, device == "cuda", quick)[part]
    if kind == "step":
        with torch.no_grad():
            x = inputs(form, (1, 1, *shape[2:]) if device == "cuda" else TRY, device, state=True)
            form({key: t[:, :1] if t.dim() > 2 and key != "initial_state" else t for key, t in x.items()}, return_state=True)
    elif kind == "timed":
        grown = leaves(form, inputs(form, shape if device == "cuda" else TRY, device))
        form(grown).sum().backward()
    elif kind in REGIMES:
        with rows(kind):
            results(form, inputs(form, shape, device, torch.bfloat16, state=True), torch.bfloat16)
    else:
        dtype = getattr(torch, kind)
        results(form, inputs(form, shape, device, dtype, state=True), dtype)


def compile_all(bench: Bench) -> dict[str, str]:
    """Each part of each form in a process of its own, as many as there are cores: later sections find their kernels compiled."""
    jobs = [(name, part) for name in FORMS for part in range(len(parts(name, bench.cuda, bench.quick)))]
    words = [sys.executable, __file__, "--device", bench.device.type, *(["--quick"] if bench.quick else [])]

    def one(job: tuple[str, int]) -> str:
        done = subprocess.run([*words, "--warm", job[0], "--part", str(job[1])], capture_output=True, text=True)
        return done.stderr.strip().splitlines()[-1] if done.returncode else "compiled"

    with ThreadPoolExecutor(os.cpu_count() if bench.cuda else 2) as pool:
        return {f"{name} {part}": said for (name, part), said in zip(jobs, pool.map(one, jobs))}


def checks(bench: Bench) -> dict[str, Any]:
    return check(bench, bench.device, bench.quick)


@torch.no_grad()
def step(bench: Bench) -> dict[str, Any]:
    """Decoding: one token and four, against copying the states."""
    found: dict[str, Any] = {}
    batch, _, heads, dim = STATES if bench.cuda else TRY
    state = torch.randn(batch, heads, dim, dim, device=bench.device)
    out = torch.empty_like(state)
    found["copy_ms"] = bench.device_ms(lambda: out.copy_(state))
    add = bench.table(f"Decode step, states {list(state.shape)}, ms (× copying them)", "form", "1 token", "4 tokens")
    add("copying the states", f"{found['copy_ms']:.3f}", "")
    for name, form in FORMS.items():
        x = [inputs(form, (batch, tokens, heads, dim), bench.device) | {"initial_state": state} for tokens in (1, 4)]
        taken = [bench.device_ms(partial(form, one, return_state=True)) for one in x]
        found[name] = {"ms": taken, "ratio": [ms / found["copy_ms"] for ms in taken]}
        add(name, *(f"{ms:.3f} ({ms / found['copy_ms']:.2f})" for ms in taken))
    return found


def speed(bench: Bench) -> None:
    add = bench.table(
        "Time on the device, bf16, ms (× floor)", "form", "shape", "forward", "forward + backward", "bars, ms", "as called from Python, ms"
    )
    for shape, names in TIMED:
        for name in names:
            form, at = FORMS[name], bench.shape(shape)
            grown = leaves(form, inputs(form, at, bench.device))
            found = bench.measure("speed", name, at, form, grown)
            limits = " / ".join(f"{limit:.3g}" for limit in MS.get((name, shape), ()))
            add(name, str(list(at)), share(found, "forward_ms"), share(found, "both_ms"), limits, called(found))


def softmax(bench: Bench) -> None:
    """16k tokens in all, from many short sequences to one."""
    columns = [*SOFTMAX, *FASTER_FROM]
    total, heads, dim, least = (TOKENS, 16, 128, 512) if bench.cuda else (128, 1, 16, 64)
    add = bench.table(f"Against softmax, {total:,} tokens in all, {heads} heads of {dim}, ms", "tokens", "", *columns)
    tokens = least
    while tokens <= total:
        shape = (total // tokens, tokens, heads, dim)
        found = []
        for name in columns:
            form = FORMS.get(name, FORMS["linear"])
            found.append(bench.measure("softmax", name, shape, SOFTMAX.get(name, form), leaves(form, inputs(form, shape, bench.device))))
        add(f"{tokens:,}", "forward", *(show(f["forward_ms"]) for f in found))
        add("", "both", *(show(f["both_ms"]) for f in found))
        add("", "as called", *(called(f) for f in found))
        tokens *= 2


def length(bench: Bench) -> None:
    """A fixed number of tokens in all, cut into ever longer sequences; softmax to 16k, where it already takes seconds."""
    names = ["linear", "linear per token", "delta", "cuDNN softmax"]
    total, heads, dim = (bench.tokens, bench.heads, 128) if bench.cuda else (256, 1, 16)
    add = bench.table(
        f"Time against length, {total:,} tokens in all, {heads} heads of {dim}, ms",
        "form",
        "tokens",
        "forward",
        "forward + backward",
        "as called",
    )
    for name in names:
        form = FORMS.get(name, FORMS["linear"])
        whole = inputs(form, (1, total, heads, dim), bench.device)
        tokens = 512 if bench.cuda else 64
        while tokens <= (min(total, TOKENS) if name in SOFTMAX else total):
            shape = (total // tokens, tokens, heads, dim)
            grown = leaves(form, {key: t.view(*shape[:2], *t.shape[2:]) for key, t in whole.items()})
            found = bench.measure("length", name, shape, SOFTMAX.get(name, form), grown)
            add(name, f"{tokens:,}", show(found["forward_ms"]), show(found["both_ms"]), called(found))
            tokens *= 2


def peak(bench: Bench, name: str, shape: Shape) -> float:
    """Peak MiB of forward and backward, with the inputs and o's gradient."""
    form = FORMS.get(name, FORMS["linear"])
    grown = leaves(form, inputs(form, shape, bench.device))
    incoming = torch.randn_like(grown["v"])
    call = SOFTMAX.get(name, form)
    call(grown).backward(incoming)  # what the first call alone takes is not the operator's
    for t in grown.values():
        t.grad = None
    held = sum(t.nbytes for t in (*grown.values(), incoming))
    return (held + peak_bytes(lambda: call(grown).backward(incoming), bench.device)) / 2**20


def memory(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {"flat": {}, "length": []}
    at = bench.shape(FLAT)
    add = bench.table(f"Peak memory of forward and backward, inputs counted, {list(at)}, MiB", "form", "MiB")
    for name in (*FORMS, "cuDNN softmax" if bench.cuda else "FlashAttention-2"):
        found["flat"][name] = peak(bench, name, at)
        add(name, f"{found['flat'][name]:.1f}")
    add = bench.table("Peak memory against length, batch 1, 4 heads of 128, MiB", "form", "tokens", "MiB")
    for name in ("linear", "delta"):
        for tokens in [2**i for i in range(12, 21, 2)] if bench.cuda else [64, 128]:
            case = {"name": name, "tokens": tokens, "mib": peak(bench, name, (1, tokens, 4, 128) if bench.cuda else (1, tokens, 1, 16))}
            found["length"].append(case)
            add(name, f"{tokens:,}", f"{case['mib']:.1f}")
    return found


def first_call(name: str, device: str) -> float:
    """Seconds of the first forward and backward of this process; the device and autograd themselves are started before."""
    form, shape = FORMS[name], FLAT if device == "cuda" else TRY
    grown = leaves(form, inputs(form, shape, device))
    incoming = torch.randn_like(grown["v"])
    torch.ones((), device=device, requires_grad=True).backward(torch.ones((), device=device))  # torch then imports sympy
    synchronize(device)
    start = time.perf_counter()
    form(grown).backward(incoming)
    synchronize(device)
    return time.perf_counter() - start


def first(bench: Bench) -> dict[str, float]:
    """Each form's first call in a process and with a kernel cache of its own, one after another, as the compiler takes all cores."""
    add = bench.table("First forward and backward on a cold cache", "form", "s")

    def one(name: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--first", name, "--device", bench.device.type]
            done = subprocess.run(words, env={**os.environ, "TRITON_CACHE_DIR": folder}, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return float(done.stdout.split()[-1])

    found = {name: one(name) for name in FORMS}
    for name, seconds in found.items():
        add(name, f"{seconds:.1f}")
    return found


def peer(bench: Bench, name: str) -> dict[str, float]:
    """An operator of flash-linear-attention, and the seconds it took with its tuning."""
    start = time.perf_counter()
    form, call = PEERS[name]
    for shape in [FLAT] if bench.quick else [FLAT, FEW, LONG]:  # of one head count and head dim: tuned once
        at = bench.shape(shape)
        bench.measure("peers", name, at, call, leaves(FORMS[form], inputs(FORMS[form], at, bench.device)))
    return {"seconds": time.perf_counter() - start}


def compile_peers(bench: Bench, names: list[str]) -> dict[str, str]:
    """Each peer once in a process of its own; here they find their kernels compiled, and tune anew on a free device."""

    def one(name: str) -> str:
        words = [sys.executable, __file__, "--device", bench.device.type, "--warm-peer", name]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=2 * PEER_SECONDS - 10)
        except subprocess.TimeoutExpired:
            return "out of time"
        return done.stderr.strip().splitlines()[-1] if done.returncode else "compiled"

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(one, names)))


def warm_peer(name: str, device: str) -> None:
    form, call = PEERS[name]
    grown = leaves(FORMS[form], inputs(FORMS[form], FLAT if device == "cuda" else TRY, device))
    call(grown).backward(torch.randn_like(grown["v"]))


def show_peers(bench: Bench) -> None:
    add = bench.table(
        "flash-linear-attention on the device, bf16, ms", "operator", "shape", "forward", "forward + backward", "as called", ""
    )
    for found in bench.timings:
        if found["section"] == "peers":
            add(
                found["name"], str(found["shape"]), show(found["forward_ms"]), show(found["both_ms"]), called(found), found.get("error", "")
            )


def verdicts(bench: Bench) -> list[dict[str, Any]]:
    add = bench.table("Bars", "what", "at most", "measured", "")
    found = bars(bench.result)
    for bar in found:
        add(bar.what, f"{bar.limit:.3g}", show(bar.got, "{:.4g}"), bar.verdict)
    return [bar._asdict() | {"verdict": bar.verdict} for bar in found]


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "rates": rates, "compile": compile_all, "checks": checks, "step": step, "speed": speed, "softmax": softmax, "length": length,
    "memory": memory, "first": first, "sanitize": sanitize,
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """All sections that were asked for, then the peers, then the bars."""
    bench = Bench(args)
    print(f"{bench.result['device']}, {bench.result['versions']}")
    with ThreadPoolExecutor(1) as pool:
        for name in sorted(args.only, key="sanitize".__eq__):  # which times nothing: peers are compiled beside it
            if name == "sanitize" and bench.cuda and args.peers:
                compiled = pool.submit(compile_peers, bench, args.peers)
            bench.fenced(name, SECTIONS[name], SECONDS[name])
        if bench.cuda and args.peers:
            if "sanitize" not in args.only:
                compiled = pool.submit(compile_peers, bench, args.peers)
            bench.fenced("compile peers", lambda _: compiled.result(), 2 * PEER_SECONDS)
    for name in args.peers:
        bench.fenced(f"fla {name}", partial(peer, name=name), PEER_SECONDS)
    if args.peers:
        show_peers(bench)
    bench.fenced("bars", verdicts, SECONDS["bars"])
    print(f"written to {bench.path}")
    wrong = any(bar["limit"] == 0 and bar["got"] for bar in bench.result["bars"])
    return 1 if wrong or any(bench.error(name) for name in args.only) else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels of the linear and delta recurrences on a CUDA machine.")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        metavar="NAME",
        help=f"of flash-linear-attention (default: all, or with --only and --quick none): {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--add", type=Path, metavar="RESULT", help="go on from this result file of the same commit: its other sections stay"
    )
    parser.add_argument("--quick", action="store_true", help="short timings, fewer checks, no peers")
    parser.add_argument("--tokens", type=int, default=2**20, help="in all, in `length`")
    parser.add_argument("--heads", type=int, default=4, help="in `length`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--plot", type=Path, metavar="RESULT", help="draw a result file into docs/img/ and measure nothing")
    parser.add_argument("--first", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--warm", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--warm-peer", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot:
        from kernel_plots import draw

        print(*draw(args.plot, ROOT / "docs" / "img"), sep="\n")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch; --device cpu tries the script at tiny sizes", file=sys.stderr)
        return 2
    if args.first:
        print(first_call(args.first, args.device))
        return 0
    if args.warm:
        warm_up(args.warm, args.part, args.device, args.quick)
        return 0
    if args.warm_peer:
        warm_peer(args.warm_peer, args.device)
        return 0
    if args.peers is None:
        args.peers = [] if args.only or args.quick else list(PEERS)
    if args.only is None:
        args.only = list(SECTIONS)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
