"""Time and memory of mechanisms themselves at given shapes, beside torch's own attention in the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad import contract
from subquad.bench.choice import Choice
from subquad.bench.machine import peak_bytes, synchronize
from subquad.bench.progress import bar
from subquad.checks import InputError
from subquad.contract import Shape

BASELINE = "torch sdpa"


@dataclass(frozen=True)
class Point:
    """One mechanism at one length: milliseconds, peak bytes above its inputs, and what torch's SDPA took here.

    `train_*` is forward and backward together, None if not measured. `error` says why a point could not be measured.
    """

    mechanism: str
    tokens: int
    forward_ms: float | None = None
    train_ms: float | None = None
    forward_bytes: int | None = None
    train_bytes: int | None = None
    speedup: float | None = None
    train_speedup: float | None = None
    error: str | None = None


def sides(tokens: int) -> tuple[int, int]:
    """The most square (rows, columns) whose product is `tokens`."""
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return rows, tokens // rows


def measure(work: Callable[[], Any], device: torch.device, *, budget: float = 1.0, least: int = 3) -> float:
    """Median milliseconds of `work`, repeated within a budget of seconds, after one call that warms up."""
    spent: list[float] = []
    work()
    end = time.perf_counter() + budget
    while len(spent) < least or (time.perf_counter() < end and len(spent) < 50):
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        spent.append(time.perf_counter() - begin)
        if spent[-1] > 4 * budget:
            break
    return 1e3 * sorted(spent)[len(spent) // 2]


def works(
    name: str, shape: Shape, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward, forward and backward) of one mechanism on random inputs of one shape; `BASELINE` is torch's own."""
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device, dtype)

    q = normal(shape.batch, shape.tokens, shape.heads, shape.head_dim)
    k = normal(shape.batch, shape.tokens, shape.kv, shape.head_dim)
    v = normal(shape.batch, shape.tokens, shape.kv, shape.values)
    leaves = [q, k, v]
    run: Callable[..., Tensor]
    if name == BASELINE:

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.kv != shape.heads)
    else:
        card, width = contract.card(name), shape.heads * shape.head_dim
        module = contract.attention(
            name, shape.heads, shape.head_dim, kv_heads=shape.kv, value_dim=shape.values, hidden_size=width, **options
        ).to(device, dtype)
        call: dict[str, Any] = {}
        if card.needs_hidden:
            call["hidden"] = normal(shape.batch, shape.tokens, width)
        if card.needs_grid:
            call["grid"] = sides(shape.tokens)
        leaves += list(module.parameters())

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return module(q, k, v, **call)

    def forward() -> Any:
        with torch.no_grad():
            return run(q, k, v)

    def train() -> Any:
        for leaf in leaves:
            leaf.requires_grad_()
        out = run(q, k, v)
        return torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)

    return forward, train


def bench(
    choices: Sequence[tuple[str, dict[str, Any]]],
    lengths: Sequence[int],
    *,
    heads: int = 9,
    kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    budget: float = 1.0,
    progress: bool = False,
) -> list[Point]:
    """Time and memory of each (mechanism, options) at each length, torch's SDPA first, all in one run."""
    for name, options in choices:
        contract.attention(name, heads, head_dim, kv_heads=kv_heads, hidden_size=heads * head_dim, **options)
    if any(n < 1 for n in lengths):
        raise InputError("lengths", list(lengths), "positive numbers of tokens")
    where = torch.device(device)
    jobs = [(BASELINE, {}), *choices]
    points: list[Point] = []
    with bar("bench", len(jobs) * len(lengths), show=progress) as advance:
        for tokens in lengths:
            shape = Shape(tokens, heads, head_dim, kv_heads, None, batch, itemsize=torch.finfo(dtype).bits // 8)
            base: Point | None = None
            for name, options in jobs:
                point = _point(name, options, shape, where, dtype, backward, budget, base)
                base = base or point
                points.append(point)
                advance()
    return points


def _point(
    name: str,
    options: dict[str, Any],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    budget: float,
    base: Point | None,
) -> Point:
    found: dict[str, Any] = {}
    try:
        forward, train = works(name, shape, device, dtype, options)
        for kind, work in (("forward", forward), *([("train", train)] if backward else [])):
            found[f"{kind}_ms"] = measure(work, device, budget=budget)
            found[f"{kind}_bytes"] = peak_bytes(work, device)
            reference = getattr(base, f"{kind}_ms", None)
            if reference is not None:
                found["speedup" if kind == "forward" else "train_speedup"] = reference / found[f"{kind}_ms"]
    except InputError as error:
        found["error"] = str(error)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower():
            raise
        found["error"] = "out of memory"
    return Point(Choice(name, options).label, shape.tokens, **found)
