"""`kernels.py`'s checks: results and gradients of the recurrences against their token-by-token definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from common import Report
from kernel_cases import FORMS, Form, Inputs, Shape, inputs
from torch import Tensor

from subquad.ops import launch
from subquad.ops.delta.reference import delta_rule
from subquad.ops.linear.reference import linear_attention

SHAPES: list[Shape] = [(2, 200, 2, 64), (1, 333, 2, 128), (2, 130, 3, 48), (1, 77, 2, 80), (1, 1100, 1, 64), (1, 4200, 1, 64)]
REGIMES = "many", "few", "cut"  # which rows of the launch table are taken, at both head dims of it: all of its tiles
TRY_SHAPES: list[Shape] = [(1, 70, 1, 16)]
RESULTS = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state")
FLOAT32 = 1e-5, 1e-4  # largest relative error of outputs and of gradients for float32 inputs
BFLOAT16 = 2.0, 3.5  # largest error over that of the plain computation, linear and delta
REPEATS = 10


def check_shapes(cuda: bool, quick: bool) -> list[Shape]:
    return TRY_SHAPES if not cuda else SHAPES[1:2] if quick else SHAPES


def tiled(cuda: bool, quick: bool) -> list[tuple[Shape, str]]:
    """Shapes, and the rows of the launch table that they are checked with."""
    return [((*check_shapes(cuda, quick)[0][:3], dim), regime) for dim in ((64, 128) if cuda else (16,)) for regime in REGIMES]


def results(call: Callable[..., Any], x: Inputs, dtype: torch.dtype) -> Inputs:
    """o, the final state and each gradient, for gradients of o and of the state that are drawn in `dtype`."""
    grown = {name: t.detach().requires_grad_() for name, t in x.items()}
    outs = call(grown, return_state=True)
    torch.manual_seed(1)
    incoming = [torch.randn(t.shape, device=t.device).to(dtype).to(t.dtype) for t in outs]
    grads = torch.autograd.grad(outs, list(grown.values()), incoming)
    return dict(zip(("o", "state"), (t.detach() for t in outs))) | {f"d{name}": grad for name, grad in zip(grown, grads)}


def define(form: Form) -> Callable[..., Any]:
    """The form's definition, called as the form is."""

    def call(x: Inputs, **options: Any) -> Any:
        options |= {"log_decay": x.get("log_decay"), "initial_state": x["initial_state"]}
        if form.delta:
            return delta_rule(x["q"], x["k"], x["v"], x["beta"], **options)
        return linear_attention(x["q"], x["k"], x["v"], **options)

    return call


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm; NaN where anything is not finite."""
    return float((got.double() - exact).norm() / exact.norm())


@lru_cache(32)
def wanted(form: Form, shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Inputs, Inputs]:
    """The definition's results in float64, and in float32."""
    x = inputs(form, shape, device, dtype, state=True)
    exact, plain = (results(define(form), {name: t.to(wide) for name, t in x.items()}, dtype) for wide in (torch.float64, torch.float32))
    return exact, plain


def compare(form: Form, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Each result's error, its ratio to that of the definition in float32 rounded to `dtype`, and whether all are within bounds."""
    exact, plain = wanted(form, shape, dtype, device)
    ours = results(form, inputs(form, shape, device, dtype, state=True), dtype)
    errors = {name: error(ours[name], exact[name]) for name in exact}
    ratios = {name: errors[name] / max(error(plain[name].to(dtype), exact[name]), 1e-30) for name in exact}
    if dtype == torch.float32:
        met = all(value <= FLOAT32[name.startswith("d")] for name, value in errors.items())
    else:
        met = all(ratio <= BFLOAT16[form.delta] for ratio in ratios.values())
    return {"errors": errors, "ratios": ratios, "met": met}


def extreme(form: Form, shape: Shape, device: torch.device) -> bool:
    """Whether everything stays finite with gates from 1 down to 0, −inf among their logarithms."""
    x = inputs(form, shape, device, state=True)
    values = torch.tensor([-torch.inf, -1e4, -30.0, -1e-4, 0.0], device=device)
    if "log_decay" in x:
        x["log_decay"] = values[torch.randint(0, 5, x["log_decay"].shape, device=device)]
    if "beta" in x:
        x["beta"] = torch.randint(0, 2, x["beta"].shape, device=device).to(x["beta"].dtype)
    return all(bool(t.isfinite().all()) for t in results(form, x, torch.bfloat16).values())


def repeats(form: Form, shape: Shape, device: torch.device) -> bool:
    """Whether every run gives the same bits."""
    x = inputs(form, shape, device, state=True)
    first = results(form, x, torch.bfloat16)
    for _ in range(REPEATS - 1):
        again = results(form, x, torch.bfloat16)
        if not all(torch.equal(t, again[name]) for name, t in first.items()):
            return False
    return True


@contextmanager
def rows(regime: str) -> Iterator[None]:
    """Only the rows of the launch table for many programs, only those for few, or sequences cut into segments."""
    before, segment = dict(launch.TABLE), launch.SEGMENT
    if regime == "cut":
        launch.SEGMENT = 2
    one = regime == "few"
    launch.use({key: (pair[one], pair[one]) for key, pair in before.items()} if regime != "cut" else {})
    try:
        yield
    finally:
        launch.SEGMENT = segment
        launch.use(before)


def check(bench: Report, device: torch.device, quick: bool) -> dict[str, Any]:
    """All forms, dtypes and shapes; errors, and in brackets their ratio to the plain computation's."""
    shapes = check_shapes(device.type == "cuda", quick)
    found: dict[str, Any] = {"cases": [], "extreme": {}, "repeats": {}}
    add = bench.table(
        "Relative error against float64, and its ratio to that of plain float32 rounded", "form", "shape", "dtype", "rows", *RESULTS, ""
    )
    for name, form in FORMS.items():
        plan = [(shape, dtype, "") for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
        for shape, dtype, regime in plan + [(shape, torch.bfloat16, regime) for shape, regime in tiled(device.type == "cuda", quick)]:
            with rows(regime) if regime else nullcontext():
                case = compare(form, shape, dtype, device)
            word = str(dtype).removeprefix("torch.")
            found["cases"].append({"form": name, "shape": shape, "dtype": word, "rows": regime, **case})
            cells = (f"{case['errors'][r]:.1e} ({case['ratios'][r]:.1f})" if r in case["errors"] else "" for r in RESULTS)
            add(name, str(list(shape)), word, regime, *cells, "met" if case["met"] else "missed")
    add = bench.table("Extreme gates, repeated runs", "form", "finite with gates of 0 and 1", f"{REPEATS} runs bit-identical")
    for name, form in FORMS.items():
        found["extreme"][name] = extreme(form, shapes[0], device)
        found["repeats"][name] = repeats(form, shapes[0], device)
        add(name, *("yes" if found[key][name] else "no" for key in ("extreme", "repeats")))
    return found
