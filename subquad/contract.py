"""The contract every mechanism keeps: Card, Attention, and the registry behind the front door.

A mechanism is one class in one file: its `card`, its `mix` (what it does to q, k, v around a primitive) and, beside
it, `reference` (the paper's definition, written with no attention to speed). `@register("name")` makes it known to
`subquad list`, the docs, `swap`, the benchmark and the conformance suite.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from subquad.checks import InputError, autocasts, check_cu_seqlens, check_qkv, nearest, shape_of
from subquad.rotary import Rotary
from subquad.state import State

FAMILIES = ("exact", "linear", "sparse", "hybrid", "vision")


@dataclass(frozen=True)
class Shape:
    """The sizes that a cost depends on. `itemsize` is bytes per element of q, k, v."""

    tokens: int
    heads: int
    head_dim: int
    kv_heads: int | None = None
    value_dim: int | None = None
    batch: int = 1
    itemsize: int = 2

    @property
    def kv(self) -> int:
        return self.kv_heads or self.heads

    @property
    def values(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def tensor_bytes(self) -> int:
        """Bytes of q, k, v and o, each once: the least any attention moves."""
        per_token = self.heads * (self.head_dim + self.values) + self.kv * (self.head_dim + self.values)
        return self.batch * self.tokens * per_token * self.itemsize


@dataclass(frozen=True)
class Input:
    """An extra input tensor of a mechanism.

    Args:
        doc: what it is.
        shape: symbols of ``B N H Hs D V`` (H query heads, Hs state heads, D key dim, V value dim).
        low, high: the range of usual values, which the suite samples from.
        extremes: values at which output and gradients must still be finite.
    """

    doc: str
    shape: tuple[str, ...]
    low: float
    high: float
    extremes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a mechanism is, what it can do, what it costs, and what it keeps.

    `flops`, `bytes_moved` (forward) and `state_bytes` (kept per layer, for the whole batch, after `shape.tokens`
    tokens) are functions of a `Shape` and the mechanism's options; `keeps` says the last in words and may name
    options and sizes in braces.
    """

    title: str
    paper: str
    family: str
    summary: str
    flops: Callable[..., float]
    bytes_moved: Callable[..., float]
    causal: bool = False
    bidirectional: bool = False
    needs_grid: bool = False
    recurrent: bool = False  # keeps a state of fixed size when decoding
    training_free: bool = False  # a pretrained softmax model keeps working untrained
    inputs: Mapping[str, Input] = field(default_factory=dict)
    state_bytes: Callable[..., float] | None = None
    keeps: str = "nothing"
    bf16_factor: float = 2.0  # allowed bf16 error, as a multiple of the reference's own
    bf16_state: float = (
        1e-5  # allowed error of float32 states of bf16 inputs; 2e-3 where features are rounded to bf16 before they are summed
    )
    name: str = ""  # set by @register

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise nearest("card.family", self.family, FAMILIES, "family")
        if not (self.causal or self.bidirectional):
            raise InputError("card", "neither causal nor bidirectional", "at least one of them")
        if self.causal and self.state_bytes is None:
            raise InputError("card.state_bytes", None, "a function of Shape, as the mechanism is causal")

    @property
    def needs_hidden(self) -> bool:
        """Whether it projects extra inputs from the layer's hidden states unless they are passed in."""
        return bool(self.inputs)

    def kept(self, shape: Shape, **options: Any) -> str:
        """What one layer keeps per sequence, in words."""
        sizes = {"heads": shape.heads, "kv_heads": shape.kv, "head_dim": shape.head_dim, "value_dim": shape.values}
        return self.keeps.format(**{**sizes, "tokens": shape.tokens, **options})


@dataclass(frozen=True)
class Call:
    """What comes with q, k, v in one call: everything of `Attention.forward` that is not a named extra input."""

    rotary: Rotary | None = None
    grid: tuple[int, ...] | None = None
    cu_seqlens: Tensor | None = None
    state: State | None = None
    return_state: bool = False


class Attention(nn.Module):
    """Base of all mechanisms. Subclasses set `card` and write `mix`; options are keyword arguments of `__init__`,
    each kept as an attribute of the same name. Where options add inputs, an instance has a card of its own.

    Args:
        heads: query heads H.
        head_dim: D, the width of q and k per head.
        kv_heads: heads of k and v (default: `heads`); divides `heads`.
        value_dim: V, the width of v per head (default: `head_dim`).
        hidden_size: width of `hidden`, for mechanisms that project extra inputs from it.
        layer: (index, count), for mechanisms whose constants depend on depth.
    """

    card: Card

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        value_dim: int | None = None,
        hidden_size: int | None = None,
        layer: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.value_dim = head_dim if value_dim is None else value_dim
        self.hidden_size, self.layer = hidden_size, layer
        self.losses: dict[str, Tensor] = {}
        self._option_names = tuple(option_defaults(type(self)))  # once: a signature takes as long to read as several kernels to launch
        for name in ("heads", "head_dim", "kv_heads", "value_dim", "hidden_size"):
            size = getattr(self, name)
            if (type(size) is not int or size < 1) and not (name == "hidden_size" and size is None):
                raise InputError(name, repr(size), "a positive integer")
        if heads % self.kv_heads:
            raise InputError("kv_heads", self.kv_heads, f"a divisor of heads, {heads}")
        pair = isinstance(layer, tuple | list) and len(layer) == 2 and all(type(n) is int for n in layer)
        if not pair or not 0 <= layer[0] < layer[1]:
            raise InputError("layer", layer, "(index, count) with 0 ≤ index < count")

    @property
    def options(self) -> dict[str, Any]:
        """The options it was made with, defaults included."""
        return {name: getattr(self, name) for name in self._option_names}

    @property
    def _sizes(self) -> str:
        sizes = f"{self.heads} heads ({self.kv_heads} of keys) of {self.head_dim}, values of {self.value_dim}"
        return ", ".join([self.card.name, sizes, *(f"{name}={value}" for name, value in self.options.items())])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The mechanism itself: the output ``[B, N, H, V]``, and the tensors of the new state (None if not asked for)."""
        raise TypeError(f"{type(self).__name__} must define mix()")

    def project(self, hidden: Tensor) -> dict[str, Tensor]:
        """All of `card.inputs`, from hidden states ``[B, N, hidden_size]``."""
        raise TypeError(f"{type(self).__name__} has inputs and must define project()")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: Rotary | None = None,
        hidden: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        return_state: bool = False,
        **inputs: Tensor,
    ) -> Any:
        """Attention over q, k ``[B, N, H, D]`` (unrotated) and v ``[B, N, H, V]``.

        Args:
            rotary: angles of these tokens, applied where the definition says; None applies none.
            hidden: ``[B, N, hidden_size]``, from which extra inputs are projected unless they are passed by name.
            grid: (rows, columns) or (frames, rows, columns) of the tokens, for mechanisms on images and video.
            cu_seqlens: ``[S + 1]`` offsets of packed sequences; the batch is then 1, states have S rows.
            state: what the previous call returned; None starts afresh.
            return_state: also return the new state.

        Returns:
            o ``[B, N, H, V]``, or (o, State).

        Raises:
            InputError: anything that does not fit, naming the argument.
        """
        self._check(q, k, v, rotary, grid, cu_seqlens, state, return_state)
        extra = self._inputs(q, hidden, inputs)
        call = Call(rotary, grid, cu_seqlens, state, return_state)
        o, tensors = self.mix(q, k, v, call, **extra)
        if not return_state:
            return o
        assert tensors is not None, "mix() must return its state's tensors when call.return_state is set"
        return o, self._next_state(q, k, v, call, extra, tensors)

    def _next_state(self, q: Tensor, k: Tensor, v: Tensor, call: Call, extra: dict[str, Tensor], tensors: dict[str, Tensor]) -> State:
        seen = q.shape[1] if call.cu_seqlens is None else call.cu_seqlens.diff().long()
        old = call.state
        if old is not None:
            length = old.length + seen
        elif call.cu_seqlens is None:
            length = torch.full((q.shape[0],), q.shape[1], dtype=torch.long, device=q.device)
        else:
            length = call.cu_seqlens.diff().long()
        new = State(tensors, length, self._sizes)
        if old is None or not old.recording:
            return new
        if call.cu_seqlens is not None:
            return new.record()  # packed calls are not replayed: crop reaches back to here only
        rotary = {}
        if call.rotary is not None:
            rotary = {"cos": call.rotary.cos.expand(q.shape[0], -1, -1), "sin": call.rotary.sin.expand(q.shape[0], -1, -1)}
        interleaved = call.rotary is not None and call.rotary.interleaved

        def replay(state: State, inputs: dict[str, Tensor]) -> State:
            angles = Rotary(inputs["cos"], inputs["sin"], interleaved) if "cos" in inputs else None
            named = {name: inputs[name] for name in extra}
            return self(inputs["q"], inputs["k"], inputs["v"], rotary=angles, state=state, return_state=True, **named)[1]

        return old.recorded(new, {"q": q, "k": k, "v": v, **rotary, **extra}, replay)

    def _check(self, q, k, v, rotary, grid, cu_seqlens, state, return_state) -> None:  # type: ignore[no-untyped-def]
        card = self.card
        check_qkv(q, k, v)
        for name, x, heads, width in (
            ("q", q, self.heads, self.head_dim), ("k", k, self.kv_heads, self.head_dim), ("v", v, self.kv_heads, self.value_dim)
        ):  # fmt: skip
            if x.shape[2] != heads or x.shape[3] != width:
                raise InputError(name, shape_of(x), f"{heads} heads of dim {width}: [B, N, {heads}, {width}]")
        check_cu_seqlens(cu_seqlens, q)
        if rotary is not None and not isinstance(rotary, Rotary):
            raise InputError("rotary", type(rotary).__name__, "a subquad.Rotary(cos, sin)")
        if rotary is not None and (rotary.tokens != q.shape[1] or rotary.cos.shape[-1] > self.head_dim):
            raise InputError("rotary", f"cos {list(rotary.cos.shape)}", f"{q.shape[1]} tokens, at most {self.head_dim} wide")
        if rotary is not None and rotary.cos.dim() == 3 and rotary.cos.shape[0] not in (1, q.shape[0]):
            raise InputError("rotary", f"cos {list(rotary.cos.shape)}", f"one row, or a row for each of the {q.shape[0]} in the batch")
        if card.needs_grid:
            text = getattr(self, "text_tokens", 0)  # tokens of the sequence that are not on the grid
            beside, count = (f" beside {text} of text" if text else ""), "sides whose product is "
            sides = isinstance(grid, tuple | list) and all(type(side) is int and side > 0 for side in grid)
            if not sides or grid is None:
                raise InputError("grid", repr(grid), f"(rows, columns) whose product is {q.shape[1] - text}: {card.name} works on a grid")
            tokens = math.prod(grid) + text
            if cu_seqlens is None and tokens != q.shape[1]:
                raise InputError("grid", tuple(grid), f"{count}the number of tokens{beside}, {q.shape[1] - text}")
            if cu_seqlens is not None and not torch.compiler.is_compiling() and any(n != tokens for n in cu_seqlens.diff().tolist()):
                raise InputError("grid", tuple(grid), f"{count}the length of every sequence{beside}, {(cu_seqlens.diff() - text).tolist()}")
        if (state is not None or return_state) and not (card.causal and getattr(self, "causal", True)):
            why = f"none: {card.name} is not causal" + (" (it was made with causal=False)" if card.causal else "")
            raise InputError("state" if state is not None else "return_state", "given", why)
        if state is not None:
            if not isinstance(state, State):
                raise InputError("state", type(state).__name__, "a State returned by an earlier call")
            rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            if state.batch != rows:
                raise InputError("state", f"batch size {state.batch}", f"{rows} rows")
            if state.origin not in ("", self._sizes):
                raise InputError("state", f"that of {state.origin}", self._sizes)
            if state.length.device != q.device:
                raise InputError("state", f"on {state.length.device}", f"the device of q, {q.device}")

    def _inputs(self, q: Tensor, hidden: Tensor | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The extra inputs: passed in, or projected from `hidden`; checked against the card's shapes."""
        known = self.card.inputs
        for name in inputs:
            if name not in known:
                raise nearest(name, name, known, f"input of {self.card.name}")
        missing = [name for name in known if inputs.get(name) is None]
        given = {name: x for name, x in inputs.items() if x is not None}
        if missing:
            if hidden is None or self.hidden_size is None:
                why = "a tensor, or pass hidden= to a mechanism made with hidden_size="
                raise InputError(missing[0], None, f"{why} ({known[missing[0]].doc})")
            if not isinstance(hidden, Tensor) or hidden.shape != (*q.shape[:2], self.hidden_size):
                was = shape_of(hidden) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise InputError("hidden", was, f"shape {[*q.shape[:2], self.hidden_size]}")
            own = next((p.dtype for p in self.parameters()), hidden.dtype)
            if hidden.dtype != own and not autocasts(hidden):
                raise InputError("hidden", shape_of(hidden), f"the dtype of the mechanism's parameters, {str(own).removeprefix('torch.')}")
            given = {**self.project(hidden), **given}
        sizes = {"B": q.shape[0], "N": q.shape[1], "H": self.heads, "Hs": self.kv_heads, "D": self.head_dim, "V": self.value_dim}
        for name, spec in known.items():
            want, x = tuple(sizes[s] for s in spec.shape), given[name]
            if not isinstance(x, Tensor) or tuple(x.shape) != want:
                was = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
                raise InputError(name, was, f"[{', '.join(spec.shape)}] = {list(want)}")
            if x.device != q.device:
                raise InputError(name, shape_of(x), f"the device of q, {q.device}")
        return given


# ---- the registry --------------------------------------------------------------------------------------------------

_REGISTRY: dict[str, type[Attention]] = {}
_SIZES = ("self", "heads", "head_dim", "kv_heads", "value_dim", "hidden_size", "layer")


def register(name: str) -> Callable[[type[Attention]], type[Attention]]:
    """Make a mechanism known under `name`: the only step there is."""

    def wrap(cls: type[Attention]) -> type[Attention]:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise InputError("name", repr(name), f"a name not taken by {_REGISTRY[name].__module__}")
        cls.card = replace(cls.card, name=name)
        _REGISTRY[name] = cls
        return cls

    return wrap


def mechanism(name: str) -> type[Attention]:
    """The class registered under `name`."""
    if not isinstance(name, str) or name not in _REGISTRY:
        raise nearest("name", name, _REGISTRY, "mechanism")
    return _REGISTRY[name]


def mechanisms() -> dict[str, Card]:
    """Every registered mechanism's card, by name."""
    return {name: _REGISTRY[name].card for name in sorted(_REGISTRY)}


def card(name: str) -> Card:
    """One mechanism's card."""
    return mechanism(name).card


def reference(name: str) -> Callable[..., Tensor]:
    """One mechanism's definition, ``reference(module, q, k, v, **inputs)``, from its own file."""
    cls = mechanism(name)
    found = getattr(sys.modules[cls.__module__], "reference", None)
    if found is None:
        raise InputError("name", repr(name), f"a mechanism whose file defines reference(): {cls.__module__} does not")
    return found


def option_defaults(cls: type[Attention]) -> dict[str, Any]:
    """A mechanism's options and their defaults, read off its `__init__`."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _SIZES and p.kind is not p.VAR_KEYWORD}


def _check_type(option: str, value: object, default: object) -> None:
    """An option is of the type of its default (an integer may stand for a float); those without a default check themselves."""
    kinds: dict[type, tuple[type, str]] = {
        bool: (bool, "True or False"), int: (int, "an integer"), float: (float, "a number"), str: (str, "a string"),
    }  # fmt: skip
    if type(default) not in kinds:
        return
    kind, words = kinds[type(default)]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InputError(option, repr(value), words)


def attention(
    name: str,
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    hidden_size: int | None = None,
    layer: tuple[int, int] = (0, 1),
    **options: Any,
) -> Attention:
    """Make a mechanism by name.

    >>> attention("sliding-window", heads=9, head_dim=64, kv_heads=3, window=64, sinks=4)

    Raises:
        InputError: unknown mechanism or option (with the nearest names), or sizes that do not fit.
    """
    cls = mechanism(name)
    known = option_defaults(cls)
    for option in options:
        if option not in known:
            raise nearest(option, option, known, f"option of {name}")
        _check_type(option, options[option], known[option])
    sizes: dict[str, Any] = {"kv_heads": kv_heads, "value_dim": value_dim, "hidden_size": hidden_size, "layer": layer}
    return cls(heads, head_dim, **sizes, **options)


def attend(q: Tensor, k: Tensor, v: Tensor, name: str, **inputs: Any) -> Any:
    """Run a mechanism that has no parameters on q, k ``[B, N, H, D]``, v ``[B, N, H, V]``.

    `inputs` takes what the mechanism's `forward` takes (rotary, grid, cu_seqlens, state, …), its extra inputs, and
    its options.

    >>> o = attend(q, k, v, "sliding-window", window=64, sinks=4)
    """
    cls = mechanism(name)
    call_names = set(inspect.signature(Attention.forward).parameters) - {"self", "q", "k", "v", "inputs"}
    options = {key: value for key, value in inputs.items() if key not in call_names and key not in cls.card.inputs}
    passed = {key: value for key, value in inputs.items() if key not in options}
    heads = check_qkv(q, k, v)
    module = attention(name, heads, q.shape[-1], kv_heads=k.shape[2], value_dim=v.shape[-1], **options)
    if any(True for _ in module.parameters()):
        raise InputError("name", repr(name), "a mechanism without parameters; make this one with subquad.attention()")
    return module.to(q.device)(q, k, v, **passed)
