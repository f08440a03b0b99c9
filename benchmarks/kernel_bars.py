"""The bars that the kernels are held to on an H100, and which of them a result of `kernels.py` meets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from kernel_cases import FEW, FLAT, FORMS, LONG, LONGER, LONGEST, NARROW, PEERS, Shape
from kernel_sanitize import TOOLS

MS: dict[tuple[str, Shape], tuple[float, float]] = {  # on the device: forward, forward and backward
    **{(form, shape): (0.112, 0.42) for form in ("linear", "linear per head") for shape in (FLAT, NARROW)},
    **{("linear per token", shape): (0.125, 0.55) for shape in (FLAT, NARROW)},
    ("linear per channel", FLAT): (0.22, 0.95),
    ("delta", FLAT): (0.22, 0.75),
    ("gated delta", FLAT): (0.26, 0.90),
    ("linear", FEW): (0.135, 0.54),
    ("linear per token", FEW): (1.4 * 0.135, 1.4 * 0.54),
    ("linear", LONG): (0.32, 1.25),
    ("linear per token", LONG): (1.4 * 0.32, 1.4 * 1.25),
}
FASTER_FROM = {"linear": 1024, "linear per token": 1024, "delta": 2048, "gated delta": 2048}  # tokens, than cuDNN's softmax
MIB = {name: 900 if form.delta else 600 for name, form in FORMS.items()}  # peak of forward and backward at FLAT
GROWTH = 1.15  # time per token at LONGEST over that at LONGER
STEP = 1.3  # a decode step over the time to copy the states
FIRST = 5.0  # seconds of the first forward and backward on a cold cache
FASTER_THAN_FLA = {  # at FLAT, on the device: forward, forward and backward
    "linear_attn": (3, 3.7), "lightning_attn": (3, 3.7), "simple_gla": (3, None), "gla": (4, None), "delta_rule": (2.8, 2.5),
    "gated_delta_rule": (3.7, None),
}  # fmt: skip
WAYS = {"forward_ms": "forward", "both_ms": "forward + backward"}


class Bar(NamedTuple):
    """`got` must not exceed `limit`; None is not measured."""

    what: str
    limit: float
    got: float | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.got is None else "met" if self.got <= self.limit else "missed"


def bars(result: dict[str, Any]) -> list[Bar]:
    """All bars, in the order of the sections."""
    return [
        *_checks(result),
        *_sanitize(result),
        *_step(result),
        *_ms(result),
        *_peers(result),
        *_growth(result),
        *_softmax(result),
        *_memory(result),
        *_first(result),
    ]


def _timed(result: dict[str, Any], section: str, name: str, shape: Shape, way: str) -> float | None:
    for case in result.get("timings", ()):
        if (case["section"], case["name"], tuple(case["shape"])) == (section, name, shape):
            return case[way]
    return None


def _part(result: dict[str, Any], name: str) -> dict[str, Any]:
    return result.get(name) or {}


def _checks(result: dict[str, Any]) -> Iterator[Bar]:
    found = _part(result, "checks")
    missed = {
        "results and gradients beyond their tolerance": [case["met"] for case in found.get("cases", ())],
        "forms with non-finite results under extreme gates": list(found.get("extreme", {}).values()),
        "forms whose repeated runs differ": list(found.get("repeats", {}).values()),
    }
    for what, met in missed.items():
        yield Bar(what, 0, met.count(False) if met else None)


def _sanitize(result: dict[str, Any]) -> Iterator[Bar]:
    for tool in TOOLS:
        yield Bar(f"what compute-sanitizer's {tool} finds", 0, _part(result, "sanitize").get("found", {}).get(tool))


def _step(result: dict[str, Any]) -> Iterator[Bar]:
    for name in FORMS:
        ratios = _part(result, "step").get(name, {}).get("ratio", (None,))
        yield Bar(f"decode step over copying the states, {name}", STEP, ratios[0])


def _ms(result: dict[str, Any]) -> Iterator[Bar]:
    for (name, shape), limits in MS.items():
        for (way, words), limit in zip(WAYS.items(), limits):
            yield Bar(f"{name}, {list(shape)}, {words}, ms", limit, _timed(result, "speed", name, shape, way))


def _peers(result: dict[str, Any]) -> Iterator[Bar]:
    for peer, factors in FASTER_THAN_FLA.items():
        form = PEERS[peer][0]
        for (way, words), factor in zip(WAYS.items(), factors):
            if factor is not None:
                ours, theirs = _timed(result, "speed", form, FLAT, way), _timed(result, "peers", peer, FLAT, way)
                share = None if ours is None or theirs is None else ours / theirs
                yield Bar(f"{form}, {words}, time over that of fla's {peer}", 1 / factor, share)


def _growth(result: dict[str, Any]) -> Iterator[Bar]:
    for name in ("linear", "linear per token"):
        for way, words in WAYS.items():
            short, long = (_timed(result, "speed", name, shape, way) for shape in (LONGER, LONGEST))
            growth = None if short is None or long is None else long / short * LONGER[1] / LONGEST[1]
            yield Bar(f"{name}, {words}, time per token at 1,048,576 tokens over that at 131,072", GROWTH, growth)


def _softmax(result: dict[str, Any]) -> Iterator[Bar]:
    cases = [case for case in result.get("timings", ()) if case["section"] == "softmax"]
    for name, least in FASTER_FROM.items():
        for way, words in WAYS.items():
            shapes = [tuple(case["shape"]) for case in cases if case["name"] == name and case["shape"][1] >= least]
            pairs = [[_timed(result, "softmax", who, shape, way) for who in (name, "cuDNN softmax")] for shape in shapes]
            ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
            what = f"{name}, {words}, largest time over cuDNN softmax's from {least:,} tokens"
            yield Bar(what, 1.0, max(ratios) if ratios and len(ratios) == len(pairs) else None)


def _memory(result: dict[str, Any]) -> Iterator[Bar]:
    for name, limit in MIB.items():
        yield Bar(f"peak memory, {name}, MiB", limit, _part(result, "memory").get("flat", {}).get(name))


def _first(result: dict[str, Any]) -> Iterator[Bar]:
    for name in FORMS:
        yield Bar(f"first call, {name}, s", FIRST, _part(result, "first").get(name))
