"""Draws a result of `kernels.py`: how near the floor each form is, and time and memory against length."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kernel_cases import FORMS

COLOURS = {
    "linear": "#1f77b4", "linear per head": "#17becf", "linear per token": "#2ca02c", "linear per channel": "#bcbd22",
    "delta": "#d62728", "gated delta": "#9467bd", "cuDNN softmax": "#7f7f7f",
}  # fmt: skip
WAYS = (("forward_ms", "forward"), ("both_ms", "forward + backward"))


def draw(path: Path, folder: Path) -> list[Path]:
    """Draw what the result file holds; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "subquad", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    result = json.loads(path.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    drawers: dict[str, Callable[[dict[str, Any]], Any]] = {"floor": floor, "time": time, "memory": memory}
    written = []
    for name, drawer in drawers.items():
        figure = drawer(result)
        if figure is None:  # its section was not run
            continue
        figure.text(0.995, 0.005, f"{result['device']}, {result['commit']}, {result['date'][:10]}", ha="right", size=6, color="grey")
        written.append(folder / f"{path.stem}-{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
    return written


def axes(title: str, count: int = 2) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 3.6), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def timings(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [case for case in result["timings"] if case["section"] == section]


def floor(result: dict[str, Any]) -> Any:
    """For each form and shape, the share of the copy rate that the bytes which must move once are moved at."""
    cases = [case for case in timings(result, "speed") if case["both_ms"] is not None]
    if not cases:
        return None
    figure, panels = axes("Share of the copy rate")
    labels = [f"{case['name']}  {tuple(case['shape'])}" for case in cases]
    for i, (panel, (way, words)) in enumerate(zip(panels, WAYS)):
        shares = [100 * case["floor_ms"][i] / case[way] for case in cases]
        panel.barh(labels, shares, color=[COLOURS[case["name"]] for case in cases])
        panel.set(title=words, xlim=(0, 100), xlabel="floor / time, %")
        panel.invert_yaxis()
        panel.tick_params(axis="y", labelleft=i == 0, labelsize=7)
    figure.set_size_inches(9.2, 1 + 0.19 * len(cases))
    return figure


def time(result: dict[str, Any]) -> Any:
    cases = timings(result, "length")
    if not cases:
        return None
    total = cases[0]["shape"][0] * cases[0]["shape"][1]
    figure, panels = axes(f"Time for {total:,} tokens in all, {cases[0]['shape'][2]} heads of {cases[0]['shape'][3]}")
    for panel, (way, words) in zip(panels, WAYS):
        lines(panel, ((case["name"], case["shape"][1], case[way]) for case in cases))
        panel.set(title=words, ylabel="ms")
    return figure


def memory(result: dict[str, Any]) -> Any:
    cases = (result.get("memory") or {}).get("length")
    if not cases:
        return None
    figure, (panel,) = axes("Peak memory of forward and backward, batch 1", 1)
    lines(panel, ((case["name"], case["tokens"], case["mib"]) for case in cases))
    panel.set(ylabel="MiB")
    return figure


def lines(panel: Any, points: Iterable[tuple[str, int, float | None]]) -> None:
    """A line a name through (tokens, value), both axes logarithmic."""
    kept = [point for point in points if point[2] is not None]
    for name in in_order(point[0] for point in kept):
        xs, ys = zip(*((x, y) for who, x, y in kept if who == name))
        panel.plot(xs, ys, "o-", ms=3, color=COLOURS.get(name), label=name)
    panel.set(xlabel="tokens in a sequence")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)


def in_order(names: Iterable[str]) -> Iterator[str]:
    """Each name once: the forms as they are listed, then the others."""
    seen = list(dict.fromkeys(names))
    yield from sorted(seen, key=lambda name: list(FORMS).index(name) if name in FORMS else len(FORMS) + seen.index(name))
