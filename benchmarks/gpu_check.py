"""Checks and times subquad on a CUDA machine, from the checkout, in under eight minutes.

    python3 benchmarks/gpu_check.py [--out FOLDER] [--only SECTION …] [--device cpu]

Sections, each fenced so that a failure is recorded and the rest goes on: `tests` (the conformance suite and the
primitives' tests on the device), `machine` (copy and matrix rates), `primitives` and `mechanisms` (forward, forward
and backward, peak memory, against SDPA and FlexAttention), `decode` (one token at a time, bytes kept). The result
file is written anew after each section. ``--device cpu`` runs the same code at tiny sizes, to try the script itself.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, ROOT, Report, failure, slug, time_cpu, time_cuda
from torch import Tensor

import subquad
from subquad.bench.mechanisms import sides

DTYPE = torch.bfloat16
SHAPES = [(8, 2048, 16, 64), (4, 4096, 16, 128), (1, 16384, 16, 64)]  # batch, tokens, heads, head dim
TRY_SHAPES = [(1, 256, 2, 64)]
SECONDS = {"tests": 260, "machine": 20, "primitives": 90, "mechanisms": 110, "decode": 40}
CONTEXTS = (1024, 16384)
MEASURES = ("forward ms", "forward + backward ms", "MB, forward")

Call = Callable[[], Any]


class Bench(Report):
    """The device, its timers, and the result so far."""

    def __init__(self, device: str, path: Path) -> None:
        super().__init__("gpu_check", "Plain-torch forms on GPU", device, path)
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.shapes = SHAPES if self.cuda else TRY_SHAPES

    def time(self, call: Call) -> float:
        """Milliseconds of one call."""
        return time_cuda(call)["ms"] if self.cuda else time_cpu({"it": call}, 2)["it"]["ms"]

    def memory(self, call: Call) -> float:
        """Peak memory of one call above what is held before it, MB; 0 on CPU, where it is not counted."""
        if not self.cuda:
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def measure(self, make: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[str]:
        """Forward ms, forward and backward ms, forward's peak MB; an error's last line in place of what failed."""
        cells: list[str] = []

        def forward() -> Any:
            with torch.no_grad():
                return make(**tensors)

        grown = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}

        def both() -> Any:
            out = make(**grown)
            return torch.autograd.grad(out.float().square().mean(), [x for x in grown.values() if x.requires_grad], allow_unused=True)

        for read, call, form in ((self.time, forward, "{:.3f}"), (self.time, both, "{:.3f}"), (self.memory, forward, "{:.0f}")):
            try:
                cells.append(form.format(read(call)))
            except (RuntimeError, ValueError) as error:
                cells.append(failure(error))
                if self.cuda:
                    torch.cuda.empty_cache()
        return cells


# ---- sections ----------------------------------------------------------------------------------------------------


def tests(bench: Bench) -> dict[str, Any]:
    """The suite on this device, in a process of its own; kept: the closing line and what failed."""
    paths = [str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "conformance", ROOT / "tests" / "ops") if p.exists()]
    words = [sys.executable, "-m", "pytest", "-m", "not slow", "--tb=line", "-rf", *paths]
    if subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True).returncode == 0:
        words += ["-n", str(min(8, os.cpu_count() or 1))]
    env = {**os.environ, "SUBQUAD_TEST_DEVICE": bench.device.type, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS["tests"] - 5)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, code = (late.stdout or b"").decode(errors="replace"), -1
    failed = [line[7:300] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    closing = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    summary = closing[-1].strip("= ") if closing else output[-500:]
    print(summary, *failed[:40], sep="\n  ")
    return {"exit": code, "summary": summary, "failed": failed[:200]}


def machine(bench: Bench) -> dict[str, float]:
    """Rates a kernel is measured against: copy (bytes read and written) and bf16 matrix product."""
    size = 2**28 if bench.cuda else 2**22
    a = torch.empty(size, dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    copy = 2 * size / bench.time(lambda: b.copy_(a)) / 1e6
    n = 8192 if bench.cuda else 256
    m = torch.randn(n, n, dtype=DTYPE, device=bench.device)
    product = 2 * n**3 / bench.time(lambda: m @ m) / 1e9
    bench.table("Rates of the machine", "copy, GB/s", "bf16 product, TFLOP/s")(f"{copy:.0f}", f"{product:.2f}")
    return {"copy_gb_s": copy, "product_tflop_s": product}


def qkv(bench: Bench, shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: F.normalize(torch.randn(shape, device=bench.device), dim=-1).to(DTYPE) for name in "qk"} | {
        "v": torch.randn(shape, device=bench.device, dtype=DTYPE)
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(1, 2)


def flex_window(tokens: int, size: int, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with a causal window, compiled: the peer of `Layout.window`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - size), None, None, tokens, tokens, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def primitive_calls(bench: Bench, shape: tuple[int, int, int, int]) -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]]:
    from subquad.ops.delta import delta_rule
    from subquad.ops.linear import linear_attention
    from subquad.ops.moments import moment_attention
    from subquad.ops.sparse import Layout, sparse_attention

    b, n, h, d = shape
    x = qkv(bench, shape)
    beta = {"beta": torch.rand(b, n, h, device=bench.device, dtype=DTYPE)}
    head = -torch.logspace(-3, -1, h, device=bench.device)
    token = {"log_decay": -torch.rand(b, n, h, device=bench.device) * 0.1}
    channel = {"log_decay": -torch.rand(b, n, h, d, device=bench.device) * 0.1}
    window = Layout.window(n, 512)
    calls: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
        "SDPA, causal": (sdpa, x),
        "linear, no decay": (linear_attention, x),
        "linear, decay per head": (lambda q, k, v: linear_attention(q, k, v, log_decay=head), x),
        "linear, decay per token": (linear_attention, x | token),
        "linear, decay per channel": (linear_attention, x | channel),
        "delta": (delta_rule, x | beta),
        "delta, decay per token": (delta_rule, x | beta | token),
        "moments, φ = elu + 1": (lambda q, k, v: moment_attention(q, k, v, feature_map=lambda t: F.elu(t) + 1), x),
        "window of 512": (lambda q, k, v: sparse_attention(q, k, v, window), x),
    }
    if bench.cuda:
        calls["FlexAttention, window of 512"] = (flex_window(n, 512, bench.device), x)
    return calls


def primitives(bench: Bench) -> None:
    for shape in bench.shapes:
        add = bench.table(f"Primitives, bf16, {list(shape)}", "form", *MEASURES)
        for name, (call, tensors) in primitive_calls(bench, shape).items():
            add(name, *bench.measure(call, tensors))


def extra_inputs(card: subquad.Card, module: subquad.Attention, batch: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """A mechanism's extra inputs, drawn from the ranges on its card."""
    sizes = {"B": batch, "N": tokens, "H": module.heads, "Hs": module.kv_heads, "D": module.head_dim, "V": module.value_dim}
    made = {}
    for name, spec in card.inputs.items():
        drawn = torch.rand([sizes[s] for s in spec.shape], device=device)
        made[name] = (spec.low + (spec.high - spec.low) * drawn).to(DTYPE)
    return made


def mechanisms(bench: Bench) -> None:
    for shape in bench.shapes:
        b, n, h, d = shape
        add = bench.table(f"Mechanisms, bf16, {list(shape)}", "mechanism", *MEASURES)
        add("SDPA, causal", *bench.measure(sdpa, qkv(bench, shape)))
        for name, card in subquad.mechanisms().items():
            torch.manual_seed(0)
            module = subquad.attention(name, h, d).to(bench.device, DTYPE)
            fixed = {"grid": sides(n)} if card.needs_grid else {}
            tensors = qkv(bench, shape) | extra_inputs(card, module, b, n, bench.device)
            add(name, *bench.measure(lambda module=module, fixed=fixed, **x: module(**x, **fixed), tensors))


@torch.no_grad()
def decode(bench: Bench) -> None:
    """One token at a time after a prompt: ms per token and bytes kept per layer, batch 1."""
    h, d = 16, 64
    contexts = CONTEXTS if bench.cuda else (64, 256)
    columns = [word for n in contexts for word in (f"ms/token at {n:,}", f"bytes kept at {n:,}")]
    add = bench.table(f"Decoding, bf16, {h} heads of {d}, one layer", "mechanism", *columns)
    for name, card in subquad.mechanisms().items():
        if not card.causal:
            continue
        cells = [name]
        for n in contexts:
            try:
                torch.manual_seed(0)
                module = subquad.attention(name, h, d).to(bench.device, DTYPE)
                prompt = qkv(bench, (1, n, h, d)) | extra_inputs(card, module, 1, n, bench.device)
                state = module(**prompt, return_state=True)[1]
                token = {key: x[:, -1:] for key, x in prompt.items()}
                ms = bench.time(lambda module=module, token=token, state=state: module(**token, state=state, return_state=True))
                cells += [f"{ms:.3f}", f"{state.nbytes:,}"]
            except (RuntimeError, ValueError) as error:
                cells += [failure(error), ""]
        add(*cells)


SECTIONS = {"tests": tests, "machine": machine, "primitives": primitives, "mechanisms": mechanisms, "decode": decode}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time subquad on a CUDA machine.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to PyTorch; --device cpu tries the script at tiny sizes", file=sys.stderr)
        return 2
    path = args.out / f"gpu_check-{slug(args.device)}.json"
    bench = Bench(args.device, path)
    print(f"{bench.result['device']}, {bench.result['versions']}")
    for name in args.only:
        bench.fenced(name, SECTIONS[name], SECONDS[name])
    print(f"written to {path}")
    broken = [name for name in args.only if bench.error(name)]
    return 1 if broken or bench.result.get("tests", {}).get("exit", 0) != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
