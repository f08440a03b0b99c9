"""What a person types, read: mechanisms with options, layers, lists of lengths, dtypes, devices."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from subquad import contract
from subquad.checks import InputError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """A mechanism and its options, of which `swept` are one setting of several (`sweep`)."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    swept: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As it is typed: ``sliding-window:window=64,sinks=4``."""
        return _label(self.name, self.options)

    @property
    def base(self) -> str:
        """The label without the options that are swept."""
        return _label(self.name, {k: v for k, v in self.options.items() if k not in self.swept})

    @property
    def setting(self) -> str:
        """The options that are swept: ``window=64``."""
        return ",".join(f"{name}={self.options[name]}" for name in self.swept)

    @property
    def resolved(self) -> str:
        """The mechanism with every option, defaults included: equal for choices that do the same."""
        options = {**contract.option_defaults(contract.mechanism(self.name)), **self.options}
        return f"{self.name}:{sorted((key, repr(value)) for key, value in options.items())}"

    @property
    def folder(self) -> str:
        """A file name for it."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)


def _label(name: str, options: dict[str, Any]) -> str:
    return name + (":" + ",".join(f"{k}={v}" for k, v in options.items()) if options else "")


def parse_choice(argument: str, text: str) -> Choice:
    """``NAME`` or ``NAME:option=value,option=value``; the name and the options are checked.

    >>> parse_choice("--to", "sliding-window:window=64,sinks=4").options
    {'window': 64, 'sinks': 4}
    """
    name, _, rest = text.partition(":")
    known = contract.mechanisms()
    if name not in known:
        raise nearest(argument, name, known, "mechanism")
    defaults, options = contract.option_defaults(contract.mechanism(name)), {}
    for part in _split(rest):
        option, equals, value = part.partition("=")
        if not equals:
            raise InputError(argument, repr(text), "NAME:option=value,option=value")
        if option not in defaults:
            raise nearest(argument, option, defaults, f"option of {name}")
        if option in options:
            raise InputError(argument, f"{option} twice in {text!r}", "each option once")
        options[option] = _value(value)
    return Choice(name, options)


def sweep(argument: str, choices: Sequence[Choice], texts: Sequence[str]) -> list[Choice]:
    """Each mechanism at every value of the swept options that it has; several are crossed.

    >>> [c.label for c in sweep("--sweep", [Choice("gla"), Choice("sliding-window")], ["window=64,128"])]
    ['gla', 'sliding-window:window=64', 'sliding-window:window=128']
    """
    swept: dict[str, list[Any]] = {}
    known = {option for choice in choices for option in contract.option_defaults(contract.mechanism(choice.name))}
    for text in texts:
        option, _, rest = text.partition("=")
        values = [_value(part) for part in _split(rest)]
        if not values:
            raise InputError(argument, repr(text), "OPTION=value,value,…")
        if option not in known:
            raise nearest(argument, option, known, f"option of {', '.join(choice.name for choice in choices) or 'a mechanism'}")
        if option in swept or len({repr(value) for value in values}) < len(values):
            raise InputError(argument, repr(text), "each option, and each of its values, once")
        if any(option in choice.options for choice in choices):
            raise InputError(argument, repr(text), f"{option} given here or with the mechanism, not both")
        swept[option] = values
    found = []
    for choice in choices:
        own = [name for name in swept if name in contract.option_defaults(contract.mechanism(choice.name))]
        for setting in product(*(swept[name] for name in own)):
            found.append(Choice(choice.name, {**dict(zip(own, setting)), **choice.options}, tuple(own)))
    return found


def check_choices(choices: Sequence[Choice]) -> None:
    """Refuse none, and the same twice."""
    if not choices:
        raise InputError("--to", "nothing", "at least one mechanism")
    if len({choice.resolved for choice in choices}) < len(choices):
        raise InputError("--to", ", ".join(choice.label for choice in choices), "each mechanism once")


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:\([^)]*\)|\[[^\]]*\]|[^,])+", text) if part.strip()]


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_layers(text: str) -> str | list[int]:
    """``all``, a ratio ``3:1``, ``auto:8`` (all but the 8 that matter most), or indices and ranges ``0,2,4-7``, where ``-1`` is
    the last layer."""
    text = text.strip()
    if text == "all" or re.fullmatch(r"(auto|\d+):\d+", text):
        return text
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first = int(match[1]) if match else 0
        last = int(match[2] or first) if match else -1
        if match is None or last < first or (first < 0 and match[2]):
            raise InputError("--layers", repr(text), "all, a ratio such as 3:1, auto:K, or indices such as 0,2,4-7 or -1")
        indices += range(first, last + 1)
    return sorted(set(indices))


def integers(argument: str, text: str) -> list[int]:
    """Positive integers separated by commas."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise InputError(argument, repr(text), "positive integers separated by commas")
    return found


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise nearest("--dtype", name, DTYPES, "dtype")
    return DTYPES[name]


def pick_device(name: str | None) -> str:
    """The device asked for, if it can be used; by default CUDA where there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError("--device", repr(name), "cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError("--device", repr(name), "cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError("--device", repr(name), f"a device of this machine, which has {torch.cuda.device_count()} CUDA devices")
    return name
