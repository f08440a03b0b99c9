"""`sparse.py`'s checks: results and gradients against the definition in float64, case by case, in one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from sparse_cases import CHECKS, ours, results, sdpa
from timing import Timed
from torch import Tensor

from subquad.ops.sparse import Layout, sparse_attention, sparse_attention_reference

WIDTHS = [(64, 64), (128, 128), (32, 32), (80, 80), (96, 64), (256, 256)]
ERROR_BAR = 1.5  # times the errors of torch's flash kernel
VERDICTS = {None: "", True: "met", False: "missed"}

Found = tuple[dict[str, Any], tuple[str, ...]]  # what the result file keeps, and a row of the table


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def checks(bench: Timed) -> list[dict[str, Any]]:
    """All cases, over `bench.workers` processes, in the order of `cases`."""
    add = bench.table(
        "Relative error against float64, and its ratio to that of float32 rounded", "layout", "D", "dtype", "o, lse and gradients", ""
    )
    found = []
    for case, cells in spread(cases(bench.device), bench.workers):
        found.append(case)
        add(*cells)
    return found


def cases(device: torch.device) -> list[Callable[[], Found]]:
    cuda, found = device.type == "cuda", []
    for name in CHECKS:
        for width, values in WIDTHS if cuda and name in ("causal", "plane") else WIDTHS[:2] if cuda else [(16, 16)]:
            for dtype in (torch.bfloat16, torch.float32, torch.float16) if width == 64 else (torch.bfloat16,):
                found.append(partial(against_definition, name, width, values, dtype, device))
    if cuda:
        found += [partial(against_flash, width, device) for width in (64, 128)]
    return [*found, partial(repeated, device)]


def spread(calls: list[Callable[[], Found]], workers: int) -> Iterator[Found]:
    """What the calls give, in their order; each of several processes takes the next one that is left."""
    if workers == 1:
        yield from (call() for call in calls)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(call) for call in calls]
        try:
            yield from (one.result() for one in waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def against_definition(name: str, width: int, values: int, dtype: torch.dtype, device: torch.device) -> Found:
    check = CHECKS[name]
    layout, more = check.layout(device), check.more(device)
    torch.manual_seed(0)
    sizes = zip((layout.n, layout.m, layout.m), check.heads, (width, width, values))
    x = [torch.randn(1, tokens, heads, d, device=device).to(dtype) for tokens, heads, d in sizes]
    got = results(sparse_attention, x, layout, more, dtype)
    exact = results(sparse_attention_reference, x, layout, more, torch.float64)
    plain = results(sparse_attention_reference, x, layout, more, torch.float32)
    errors = {key: error(got[key], exact[key]) for key in exact}
    ratios = {key: errors[key] / max(error(plain[key].to(got[key].dtype), exact[key]), 1e-12) for key in exact}
    met = all(e <= (1e-5 if key in ("o", "lse") else 1e-4) for key, e in errors.items()) if dtype == torch.float32 else None
    word = str(dtype).removeprefix("torch.")
    case = {"layout": name, "D": width, "V": values, "dtype": word, "errors": errors, "ratios": ratios, "met": met}
    return case, (name, str(width), word, " ".join(f"{k} {errors[k]:.1e} ({ratios[k]:.1f})" for k in exact), VERDICTS[met])


def against_flash(width: int, device: torch.device) -> Found:
    """Errors on dense causal attention beside those of torch's flash kernel, bf16, the same inputs."""
    from torch.nn.attention import SDPBackend

    torch.manual_seed(0)
    x = {name: torch.randn(2, 2048, 4, width, device=device, dtype=torch.bfloat16) for name in "qkv"}
    do, layout, outs = torch.randn_like(x["q"]), Layout.causal(2048), []
    calls = (
        partial(ours, layout=layout),
        partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
        lambda y: sparse_attention_reference(*y.values(), layout)[0],
    )
    for call, dtype in zip(calls, (torch.bfloat16, torch.bfloat16, torch.float64)):
        y = {name: t.detach().to(dtype).requires_grad_() for name, t in x.items()}
        o = call(y)
        outs.append([o.detach(), *torch.autograd.grad(o, list(y.values()), do.to(dtype))])
    names = ("o", "dq", "dk", "dv")
    errors, theirs = ({n: error(a, b) for n, a, b in zip(names, got, outs[2])} for got in outs[:2])
    ratios = {n: errors[n] / theirs[n] for n in names}
    met = max(ratios.values()) <= ERROR_BAR
    word = " ".join(f"{n} {errors[n]:.1e} ({ratios[n]:.2f})" for n in names)
    shared: dict[str, Any] = {"layout": "causal against flash", "D": width, "dtype": "bfloat16", "errors": errors}
    cells = ("causal, against torch's flash kernel", str(width), "bfloat16", word, VERDICTS[met])
    return shared | {"flash": theirs, "ratios": ratios, "met": met}, cells


def repeated(device: torch.device) -> Found:
    layout = Layout.window(333, 100, 5)
    torch.manual_seed(0)
    x = [torch.randn(1, 333, 2, 64, device=device, dtype=torch.bfloat16) for _ in range(3)]
    runs = [results(sparse_attention, x, layout, {}, torch.bfloat16) for _ in range(10 if device.type == "cuda" else 2)]
    same = all(torch.equal(run[key], runs[0][key]) for run in runs for key in run)
    name = "ten runs bit-identical"
    return {"layout": name, "met": same}, (name, "", "", "", VERDICTS[same])
