"""Draws a result of `recipes.py`: perplexity and recall against the bytes that a sequence keeps."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from recipes_tables import end, main_runs, ppl

MARKS = "os^vDPX<>*hd"


def draw(path: Path, folder: Path) -> Path:
    """A point a recipe: of an original or a swap that was trained, the mean over seeds; an untrained one is hollow."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "subquad"  # the same file from the same figures
    result = json.loads(path.read_text(encoding="utf-8"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in main_runs(list(result["runs"].values())):
        groups.setdefault(run["label"], []).append(run)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for number, (label, some) in enumerate(groups.items()):
        nats, kept = statistics.fmean(end(run) for run in some), some[0]["bytes_64k"] / 2**20
        shares = [100 * one["ranked"] for run in some for one in run["recall"]]
        face = "none" if not some[0]["stages"] and some[0]["mechanism"] else f"C{number}"
        for panel, height in zip(panels, (float(ppl(nats)), statistics.fmean(shares) if shares else None)):
            if height is not None:
                panel.plot(kept, height, MARKS[number % len(MARKS)], color=f"C{number}", markerfacecolor=face, linestyle="", label=label)
    for panel, words in zip(panels, ("perplexity, held out", "right number likeliest, %")):
        panel.set(xscale="log", xlabel="MiB kept at 64k tokens", ylabel=words)
    panels[0].set_yscale("log")
    panels[1].axhline(25, color="grey", linewidth=0.6, linestyle=":")  # chance
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.text(0.995, 0.005, f"{result['device']}, {result['commit']}, {result['date'][:10]}", ha="right", size=6, color="grey")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{path.stem}.svg", metadata={"Date": None})
    return folder / f"{path.stem}.svg"
