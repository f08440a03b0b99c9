"""What the conformance tests are made of: cases drawn from the cards, their inputs, and comparisons.

A case is one mechanism in one mode. Everything here follows from the card (claims, `Input` shapes and ranges), the
options' defaults and their annotations; nothing is written per mechanism. Set SUBQUAD_TEST_DEVICE=cuda for a GPU.
"""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import subquad
from subquad import Attention, Card, Input, Rotary, Shape, State
from subquad.contract import option_defaults

DEVICE = torch.device(os.environ.get("SUBQUAD_TEST_DEVICE", "cpu"))
HEADS, KV_HEADS, DIM = 4, 2, 16
SMALL = {"window": 24, "window_size": 24, "block": 16, "block_size": 16, "block_q": 16, "block_k": 16}  # cross borders early
COUNTS = {"sinks": 3}  # what variants make of counts that are 0 by default
LENGTHS = (1, 2, 15, 17, 63, 65, 130)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One mechanism, causal or not, with one choice of options."""

    name: str
    causal: bool
    changed: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        both = self.card.causal and self.card.bidirectional
        mode = ("causal" if self.causal else "bidirectional") if both else ""
        return "-".join(filter(None, [self.name, mode, *(f"{name}={value}" for name, value in self.changed)]))

    @property
    def card(self) -> Card:
        """The class's, or where options differ the module's own, as these may add inputs."""
        return _card_of(self) if self.changed else subquad.card(self.name)

    @property
    def options(self) -> dict[str, Any]:
        """Small windows and blocks where the defaults would hide a border, the mode, and this case's changes."""
        defaults = option_defaults(subquad.mechanism(self.name))
        small = {name: size for name, size in SMALL.items() if isinstance(defaults.get(name), int)}
        card = subquad.card(self.name)
        mode = {"causal": self.causal} if card.causal and card.bidirectional else {}
        return {**small, **mode, **dict(self.changed)}

    def make(self, dtype: torch.dtype = torch.float64, *, heads: int = HEADS, head_dim: int = DIM, **sizes: Any) -> Attention:
        """A module whose parameters are all moved off their initial values, which may be special (0, 1, identity)."""
        sizes = {"kv_heads": KV_HEADS if heads == HEADS else heads, **self.options, **sizes}
        torch.manual_seed(7)
        module = subquad.attention(self.name, heads, head_dim, **sizes).to(DEVICE)
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.2 * torch.randn_like(p))
        return module.to(dtype)

    def twin(self, module: Attention, dtype: torch.dtype) -> Attention:
        """The same module made afresh in another dtype: constants in full precision, parameters as rounded in `module`."""
        sizes = {name: getattr(module, name) for name in ("kv_heads", "value_dim", "hidden_size", "layer")}
        torch.manual_seed(7)  # as in make(): the same random constants
        twin = subquad.attention(self.name, module.heads, module.head_dim, **sizes, **module.options).to(DEVICE, dtype)
        with torch.no_grad():
            for new, old in zip(twin.parameters(), module.parameters(), strict=True):
                new.copy_(old)
        return twin

    def inputs(self, n: int, module: Attention, *, batch: int = 2, dtype: torch.dtype | None = None, seed: int = 0) -> Inputs:
        """Random q, k, v and extra inputs, drawn in float64 and rounded, so that every dtype sees the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        size = sizes_of(module, batch, n)
        shapes = {"q": ("B", "N", "H", "D"), "k": ("B", "N", "Hs", "D"), "v": ("B", "N", "Hs", "V")}
        x = {name: torch.randn([size[s] for s in shape], dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        for name, spec in self.card.inputs.items():
            u = torch.rand([size[s] for s in spec.shape], dtype=torch.float64, generator=generator)
            x[name] = spec.low + (spec.high - spec.low) * u
        dtype = dtype or next((p.dtype for p in module.parameters()), torch.float64)
        return {name: t.to(DEVICE, dtype) for name, t in x.items()}

    def grid(self, n: int) -> dict[str, Any]:
        """The `grid` argument for n tokens, as square as n allows; nothing for mechanisms without a grid."""
        if not self.card.needs_grid:
            return {}
        rows = max(r for r in range(1, int(max(n, 1) ** 0.5) + 1) if n % r == 0)
        return {"grid": (rows, n // rows)}

    def run(self, module: Attention, x: Inputs, **call: Any) -> Any:
        """The mechanism, with the grid it needs."""
        grid = self.grid(x["q"].shape[1]) if "grid" not in call else {}
        return module(x["q"], x["k"], x["v"], **{n: t for n, t in x.items() if n not in "qkv"}, **grid, **call)

    def define(self, module: Attention, x: Inputs, rotary: Rotary | None = None) -> Tensor:
        """The mechanism's `reference`; a definition that does not take `rotary` never rotates."""
        reference = subquad.reference(self.name)
        call: dict[str, Any] = {**self.grid(x["q"].shape[1]), **({} if rotary is None else {"rotary": rotary})}
        takes = inspect.signature(reference).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            call = {name: value for name, value in call.items() if name in takes}
        return reference(module, x["q"], x["k"], x["v"], **{n: t for n, t in x.items() if n not in "qkv"}, **call)

    # ---- tokens ----

    def tokens(self, x: Inputs, start: int, stop: int) -> Inputs:
        """Tokens start … stop-1 of every input that has tokens."""
        return {name: t[:, start:stop] if self.has_tokens(name) else t for name, t in x.items()}

    def has_tokens(self, name: str) -> bool:
        return name in "qkv" or self.card.inputs[name].shape[1] == "N"

    def pack(self, parts: list[Inputs]) -> Inputs:
        """Sequences ``[1, n, …]`` one after another, as one packed input."""
        return {name: torch.cat([p[name] for p in parts], 1) if self.has_tokens(name) else parts[0][name] for name in parts[0]}


@functools.cache
def _card_of(case: Case) -> Card:
    return case.make().card


def sizes_of(module: Attention, batch: int, n: int) -> dict[str, int]:
    """What the symbols of `Input.shape` stand for."""
    return {"B": batch, "N": n, "H": module.heads, "Hs": module.kv_heads, "D": module.head_dim, "V": module.value_dim}


def shape_of(module: Attention, n: int, *, batch: int, dtype: torch.dtype) -> Shape:
    return Shape(
        tokens=n, heads=module.heads, head_dim=module.head_dim, kv_heads=module.kv_heads, value_dim=module.value_dim,
        batch=batch, itemsize=dtype.itemsize,
    )  # fmt: skip


# ---- which cases a test runs on --------------------------------------------------------------------------------------


def modes(name: str) -> list[Case]:
    card = subquad.card(name)
    return [Case(name, causal) for causal, claimed in ((True, card.causal), (False, card.bidirectional)) if claimed]


def variants(case: Case) -> list[Case]:
    """The case with each on/off or named option (a bool, a Literal, or one of COUNTS) changed, one at a time."""
    cls = subquad.mechanism(case.name)
    hints = typing.get_type_hints(cls.__init__)
    found = []
    for option, default in option_defaults(cls).items():
        if option == "causal":
            continue
        values: tuple[Any, ...] = ()
        if isinstance(default, bool):
            values = (True, False)
        elif typing.get_origin(hints.get(option)) is typing.Literal:
            values = typing.get_args(hints[option])
        elif default == 0 and option in COUNTS:
            values = (COUNTS[option],)
        found += [Case(case.name, case.causal, ((option, value),)) for value in values if value != default]
    return found


def every(where: Callable[[Case], bool] = lambda case: True, *, with_variants: bool = False) -> pytest.MarkDecorator:
    """Parametrise a test over all cases (that satisfy `where`), the mechanism's name in the test's id."""
    cases = [case for name in subquad.mechanisms() for case in modes(name) if where(case)]
    if with_variants:
        cases += [changed for case in cases for changed in variants(case)]
    return pytest.mark.parametrize("case", cases, ids=str)


def causal(case: Case) -> bool:
    return case.causal


def bidirectional(case: Case) -> bool:
    return not case.causal


# ---- comparisons -----------------------------------------------------------------------------------------------------


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value (or 0.01 where all are smaller)."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-2))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: object = "output") -> None:
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    found = error(actual, expected)
    assert found <= tolerance, f"{what}: relative error {found:.2e} > {tolerance:.0e}"  # NaN fails too


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert actual.keys() == expected.keys(), f"{what}: {sorted(actual)} but expected {sorted(expected)}"
    for name, tensor in expected.items():
        assert_close(actual[name], tensor, tolerance, f"{what} {name}")


def noise(x: Tensor, seed: int = 1) -> Tensor:
    """A fixed random tensor like x, to weigh outputs with."""
    return torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(x.device, x.dtype)


def gradients(module: Attention, x: Inputs, outputs: Callable[[Inputs], Tensor], weight: Tensor | None = None) -> Inputs:
    """Gradients of a fixed random weighting of the output in each input and each parameter, zeros where unused."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    wanted = {**leaves, **dict(module.named_parameters())}
    o = outputs(leaves)
    found = torch.autograd.grad(o, list(wanted.values()), noise(o) if weight is None else weight.to(o.dtype), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), found)}


def split(case: Case, module: Attention, x: Inputs, pieces: list[int], state: State | None = None, **call: Any) -> tuple[Tensor, State]:
    """The output and last state of one call per piece, the state carried."""
    rotary: Rotary | None = call.pop("rotary", None)
    outputs, at = [], 0
    for n in pieces:
        turned = {} if rotary is None else {"rotary": rotary.narrow(at, at + n)}
        o, state = case.run(module, case.tokens(x, at, at + n), state=state, return_state=True, **turned, **call)
        outputs.append(o)
        at += n
    assert state is not None
    return torch.cat(outputs, 1), state


@functools.cache
def takes_value_dim(name: str) -> bool:
    """Whether the class accepts a value dim that differs from the head dim."""
    try:
        subquad.attention(name, HEADS, DIM, value_dim=DIM + 8)
    except subquad.InputError:
        return False
    return True


__all__ = [
    "DEVICE", "DIM", "GRADIENT_TOLERANCE", "HEADS", "KV_HEADS", "LENGTHS", "TOLERANCE", "Case", "Input", "Inputs", "assert_all_close",
    "assert_close", "bidirectional", "causal", "error", "every", "gradients", "modes", "noise", "shape_of", "sizes_of", "split",
    "takes_value_dim", "variants",
]  # fmt: skip
