"""What `subquad spectrum` reads and shows: an image model, images, a table, and a page with plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from subquad.bench import html
from subquad.bench.choice import parse_choice
from subquad.bench.folder import check_new
from subquad.bench.images import UNTRAINED, load_image_model, own_sides, parse_sides, read_image, weights_words
from subquad.bench.machine import commit, versions
from subquad.bench.plots import Axis, Series, lines
from subquad.bench.report import write_whole
from subquad.bench.spectrum import DEFAULT, LEAST, Ranks, check, spectrum
from subquad.checks import InputError
from subquad.files import writing

HEADS = ("layer", "mechanism", "buffer", "eff.", "head", "eff.", "heads", "eff.")
WORDS = "Numerical and effective rank of the key–value buffer, of one head's output and of all heads' outputs side by side."


def run(
    name: str, images: Sequence[Path], mechanisms: Sequence[str] | None, size: str | None, weights: Path | None, pretrained: bool,
    rtol: float, out: Path | None, command: str,
) -> None:  # fmt: skip
    """The command: everything is checked before the model is made."""
    choices = [parse_choice("--mechanism", one) for one in mechanisms or DEFAULT]
    wanted = [(c.name, c.options) for c in choices]
    check(wanted)
    if not LEAST <= rtol < 1:
        raise InputError("--rtol", rtol, f"a number from {LEAST:g} to 1")
    sides = own_sides(name) if size is None else parse_sides(size)
    if out is not None:
        check_new("--out", out)
    pixels = torch.stack([read_image(path, sides) for path in images])
    model, (mean, deviation) = load_image_model(name, sides, weights=weights, pretrained=pretrained)
    try:
        rows = spectrum(model, (pixels - mean) / deviation, wanted, rtol=rtol, progress=True)
    except (AssertionError, RuntimeError) as error:  # timm's own words for sizes that a model does not take
        raise InputError("--size", f"{sides[0]}x{sides[1]} ({error})", f"a size that {name} takes") from None

    table = Table(
        header_style="bold", title=f"{name}, {len(images)} image{'s' * (len(images) > 1)} of {sides[0]} × {sides[1]}, rtol {rtol:g}"
    )
    for index, head in enumerate(HEADS):
        table.add_column(head, justify="left" if index < 2 else "right", overflow="fold", min_width=(8, 11, 5)[min(index, 2)])
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if weights_words(name, weights, pretrained) == UNTRAINED:
        typer.echo("The model has the weights that it was first made with; --weights or --pretrained give trained ones.", err=True)
    if out is not None:
        about = {
            "model": name, "weights": weights_words(name, weights, pretrained),
            "images": ", ".join(p.name for p in images),
            "size": f"{sides[0]} × {sides[1]}", "rtol": f"{rtol:g}", "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
            "commit": commit() or "not in a checkout", "command": command,
        }  # fmt: skip
        with writing("--out", out):
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "spectrum.html", page(rows, about))
            write_whole(out / "spectrum.json", json.dumps({"about": about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
        typer.echo(f"Plots: {out / 'spectrum.html'}; numbers: {out / 'spectrum.json'}")


def cells(row: Ranks) -> list[str]:
    pairs = ["–", "–"] if row.buffer is None else [f"{row.buffer[0]:.1f}", f"{row.buffer[1]:.2f}"]
    rest = [f"{row.head[0]:.1f}", f"{row.head[1]:.2f}", f"{row.features[0]:.1f}", f"{row.features[1]:.2f}"]
    return [row.layer, row.mechanism, *pairs, *rest]


def page(rows: Sequence[Ranks], about: dict[str, str]) -> str:
    """Effective ranks over layers, and the table, as a page that needs nothing else."""
    layers, names = list(dict.fromkeys(r.layer for r in rows)), list(dict.fromkeys(r.mechanism for r in rows))
    colors = [(name, index) for index, name in enumerate(names)]
    x = Axis("attention layer")

    def drawn(title: str, part: str, caption: str) -> str:
        series = []
        for name, color in colors:
            own = [(layers.index(r.layer), getattr(r, part)) for r in rows if r.mechanism == name]
            series.append(Series(name, [(index + 1, value[1]) for index, value in own if value is not None], color))
        return html.figure(title, lines(title, series, x, Axis("effective rank", zero=True)), caption, colors)

    body = f"<h1>Ranks of attention: {about['model']}</h1>\n{html.facts(about)}"
    body += drawn("Head's output", "head", "Effective rank of a head's output, mean over heads and images, on the model's own q, k and v.")
    body += drawn("Key–value buffer", "buffer", "Effective rank of the buffer that linear attention reads; softmax has none.")
    body += drawn("All heads", "features", "Effective rank of the outputs of all heads side by side.")
    return html.page(f"Ranks: {about['model']}", body + html.soft(WORDS) + html.table(HEADS, [cells(r) for r in rows]))
