"""The plain-torch forms of the primitives on CPU: checked, then timed against softmax attention.

    python benchmarks/cpu_forms.py [--tokens 16384] [--heads 9] [--dim 64]

1. each form against its definition, written out here in float64;
2. forward time at (1, tokens, heads, dim) in float32, in turns with `scaled_dot_product_attention(is_causal=True)`;
3. from half of these tokens to all of them: time and peak memory above the inputs, each in a fresh process.

Writes ``benchmarks/results/cpu_forms-<device>.json``. Exits with 1 if a check fails; a form that is slower than
hoped for is reported, not hidden.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, largest_difference, slug, stamp, time_cpu, write_json
from torch import Tensor

from subquad.ops.delta import delta_rule
from subquad.ops.linear import linear_attention
from subquad.ops.sparse import Layout, sparse_attention

WINDOW = 512
TOLERANCE = 1e-4  # float32 form against the float64 definition, relative to the largest value
WANTED = {"linear attention, no decay": 9.0, "delta rule": 3.0, f"window of {WINDOW}": 5.0}  # times SDPA's speed

Inputs = dict[str, Tensor]


def make_inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k, v ``[1, N, H, D]``, beta ``[1, N, H]`` and a log decay ``[H]``; keys of length 1, as the delta rule needs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, dim, dtype=dtype) for _ in range(3))
    beta = torch.rand(1, tokens, heads, dtype=dtype)
    log_decay = -torch.logspace(-3, -1, heads, dtype=dtype)
    return {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "log_decay": log_decay}


def softmax(x: Inputs) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def window(x: Inputs) -> Tensor:
    return sparse_attention(x["q"], x["k"], x["v"], Layout.window(x["q"].shape[1], WINDOW))


FORMS: dict[str, Callable[[Inputs], Tensor]] = {
    "linear attention, no decay": lambda x: linear_attention(x["q"], x["k"], x["v"]),
    "linear attention, decay per head": lambda x: linear_attention(x["q"], x["k"], x["v"], log_decay=x["log_decay"]),
    "delta rule": lambda x: delta_rule(x["q"], x["k"], x["v"], x["beta"]),
    f"window of {WINDOW}": window,
}


# ---- definitions -------------------------------------------------------------------------------------------------


def define_linear(x: Inputs, decayed: bool) -> Tensor:
    """o_t = D^-½ Σ_{s≤t} exp((t − s) g) (q_t · k_s) v_s, quadratically."""
    n, d = x["q"].shape[1], x["q"].shape[-1]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    decay = x["log_decay"] if decayed else torch.zeros_like(x["log_decay"])
    weight = (decay[:, None, None] * distance.clamp(min=0)).exp() * (distance >= 0)
    return torch.einsum("bnhd,bmhd,hnm,bmhv->bnhv", x["q"], x["k"], weight, x["v"]) * d**-0.5


def define_delta(x: Inputs) -> Tensor:
    """S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, o_t = D^-½ S_tᵀ q_t, token by token."""
    b, n, h, d = x["q"].shape
    state, out = x["q"].new_zeros(b, h, d, x["v"].shape[-1]), []
    for t in range(n):
        k, beta = x["k"][:, t], x["beta"][:, t, :, None]
        error = x["v"][:, t] - torch.einsum("bhd,bhdv->bhv", k, state)
        state = state + torch.einsum("bhd,bhv->bhdv", k, beta * error)
        out.append(torch.einsum("bhd,bhdv->bhv", x["q"][:, t], state))
    return torch.stack(out, 1) * d**-0.5


def define_window(x: Inputs) -> Tensor:
    """Softmax over the keys j with i − size < j ≤ i."""
    n = x["q"].shape[1]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    mask = (distance >= 0) & (distance < WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


DEFINITIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "linear attention, no decay": lambda x: define_linear(x, False),
    "linear attention, decay per head": lambda x: define_linear(x, True),
    "delta rule": define_delta,
    f"window of {WINDOW}": define_window,
}


# ---- the three parts ---------------------------------------------------------------------------------------------


def check(tokens: int = 1237) -> dict[str, float]:
    """Each form's error against its definition, at a length that is no multiple of anything."""
    x = make_inputs(tokens, 3, 64)
    exact = {name: tensor.double() for name, tensor in x.items()}
    return {name: largest_difference(form(x), DEFINITIONS[name](exact)) for name, form in FORMS.items()}


def speed(tokens: int, heads: int, dim: int, repeats: int) -> dict[str, dict[str, float]]:
    x = make_inputs(tokens, heads, dim)
    calls: dict[str, Callable[[], Any]] = {"softmax (SDPA, causal)": lambda: softmax(x)}
    calls |= {name: (lambda form=form: form(x)) for name, form in FORMS.items()}
    with torch.no_grad():
        return time_cpu(calls, repeats)


def resident() -> tuple[float, float]:
    """Memory of this process now and at its highest, in MB; the highest restarts at now where the system allows it."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return now, peak


def give_back() -> None:
    """Freed memory that the allocator holds would be used again unseen: hand it to the system first (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def probe(name: str, tokens: int, heads: int, dim: int) -> dict[str, float]:
    """Peak memory above the inputs, and the time, of one form: runs in a process of its own."""
    form = FORMS[name]
    with torch.no_grad():
        form(make_inputs(600, heads, dim))  # loads what is loaded at the first call
        x = make_inputs(tokens, heads, dim)
        give_back()
        before, _ = resident()
        form(x)
        _, peak = resident()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            form(x)
            taken.append(time.perf_counter() - start)
    return {"ms": 1000 * statistics.median(taken), "mb": peak - before}


def doubling(tokens: int, heads: int, dim: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time and memory at half of the tokens and at all: medians over fresh processes, in turns."""
    out = {}
    for name in FORMS:
        seen: dict[int, list[dict[str, float]]] = {tokens // 2: [], tokens: []}
        for _ in range(rounds):
            for n, results in seen.items():
                words = [sys.executable, __file__, "--probe", name, "--tokens", n, "--heads", heads, "--dim", dim]
                done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout))
        middle = {n: {key: statistics.median(r[key] for r in results) for key in ("ms", "mb")} for n, results in seen.items()}
        half, full = middle[tokens // 2], middle[tokens]
        out[name] = {
            "ms_half": half["ms"], "ms": full["ms"], "mb_half": half["mb"], "mb": full["mb"],
            "time_ratio": full["ms"] / half["ms"], "memory_ratio": full["mb"] / half["mb"],
        }  # fmt: skip
    return out


def tables(
    errors: dict[str, float], times: dict[str, dict[str, float]], growth: dict[str, dict[str, float]], n: int
) -> list[dict[str, Any]]:
    softmax_ms = times["softmax (SDPA, causal)"]["ms"]
    rows = [["softmax (SDPA, causal)", f"{softmax_ms:.0f}", "1.0", "", ""]]
    for name in FORMS:
        wanted = f"{WANTED[name]:.0f}" if name in WANTED else ""
        rows.append([name, f"{times[name]['ms']:.1f}", f"{softmax_ms / times[name]['ms']:.1f}", wanted, f"{errors[name]:.1e}"])
    grown = [
        [name, f"{g['time_ratio']:.2f}", f"{g['memory_ratio']:.2f}", f"{g['mb_half']:.0f}", f"{g['mb']:.0f}"] for name, g in growth.items()
    ]
    half = n // 2
    return [
        {
            "title": f"Forward on CPU, float32, {n:,} tokens",
            "columns": ["form", "ms", "times softmax's speed", "aim", "error"],
            "rows": rows,
        },
        {
            "title": f"From {half:,} to {n:,} tokens, fresh processes",
            "columns": ["form", "time ×", "memory ×", f"MB above inputs at {half:,}", f"at {n:,}"],
            "rows": grown,
        },
    ]


def show(table: dict[str, Any]) -> None:
    widths = [max(len(str(row[i])) for row in [table["columns"], *table["rows"]]) for i in range(len(table["columns"]))]
    print(f"\n{table['title']}")
    for row in [table["columns"], *table["rows"]]:
        print(
            "  "
            + "  ".join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the plain-torch forms on this CPU.")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes per size in the doubling test")
    parser.add_argument("--probe", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the result file (default: benchmarks/results/cpu_forms-<device>.json)")
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(probe(args.probe, args.tokens, args.heads, args.dim)))
        return 0

    errors = check()
    wrong = [f"{name}: {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        print(f"differs from its definition by more than {TOLERANCE}: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    times = speed(args.tokens, args.heads, args.dim, args.repeats)
    growth = doubling(args.tokens, args.heads, args.dim, args.rounds)
    result = {
        "benchmark": "cpu_forms", "title": "Plain-torch forms on CPU", **stamp("cpu"),
        "shape": [1, args.tokens, args.heads, args.dim], "errors": errors, "times": times, "growth": growth,
        "tables": tables(errors, times, growth, args.tokens),
    }  # fmt: skip
    for table in result["tables"]:
        show(table)
    path = args.out or RESULTS / f"cpu_forms-{slug('cpu')}.json"
    write_json(path, result)
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
