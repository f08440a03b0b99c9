"""The report of `subquad swap` on an image model: original and mechanisms at each size, as a table, as JSON and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from subquad.bench import html
from subquad.bench.images import UNTRAINED
from subquad.bench.plots import Axis, Dot, Series, dots, lines
from subquad.bench.report import save_report
from subquad.bench.speed import bytes_text

FORMAT = 1
HEADS = ("mechanism", "size", "M params", "G multiply–adds", "ms/image", "× original", "peak memory", "cosine")
NOTES = (
    "Nothing was trained after the swap. cosine: of what each token is after the last layer to the same of the original, mean over tokens "
    "and images.",
    "ms/image: of repeated forward passes, the least of three medians taken in turn. × original: how many times as fast. peak memory: "
    "beyond the weights, of one pass.",
)
FRESH = "The model has the weights that it was first made with: the cosines say nothing of a trained one (--pretrained, or --weights)."


@dataclass(frozen=True)
class At:
    """Measured on images of one size: parameters (positions for it included), milliseconds an image, peak bytes of a batch, multiply–adds
    of an image, cosine to the original (None if not finite)."""

    sides: tuple[int, int]
    parameters: int
    ms: float
    peak_bytes: int
    multiply_adds: float
    cosine: float | None

    @property
    def size(self) -> str:
        rows, columns = self.sides
        return str(rows) if rows == columns else f"{rows}×{columns}"


@dataclass
class ImageRow:
    """The original, or a mechanism in its place; `layers` swapped, of how many; a measurement for each size."""

    mechanism: str
    layers: str
    at: list[At] = field(default_factory=list)


@dataclass
class ImageReport:
    """Rows, the original first, and what they were measured on."""

    about: dict[str, str]
    rows: list[ImageRow]

    @property
    def notes(self) -> tuple[str, ...]:
        return (*NOTES, FRESH) if self.about["weights"] == UNTRAINED else NOTES

    def cells(self) -> list[list[str]]:
        """A line for each size and row."""
        found = []
        for index, first in enumerate(self.rows[0].at):
            for row in self.rows:
                at = row.at[index]
                millions, adds = f"{at.parameters / 1e6:.2f}", f"{at.multiply_adds / 1e9:.3g}"
                costs = [millions, adds, f"{at.ms:.3g}", f"{first.ms / at.ms:.3g}×", bytes_text(at.peak_bytes)]
                found.append([row.mechanism, at.size, *costs, "–" if at.cosine is None else f"{at.cosine:.4f}"])
        return found

    def print(self, console: Console | None = None) -> None:
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, head in enumerate(HEADS):
            words = head.replace(" ", "\n").replace("–", "–\n")
            table.add_column(words, justify="right" if index else "left", overflow="fold", no_wrap=index > 0, min_width=0 if index else 11)
        for cells in self.cells():
            table.add_row(*cells)
        console = console or Console()
        console.print(table)
        for note in self.notes:
            console.print(f"• {note}", highlight=False, soft_wrap=True, markup=False)

    def to_json(self) -> str:
        content = {"format": FORMAT, "about": self.about, "rows": [asdict(row) for row in self.rows], "notes": self.notes}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `report.html`, then `report.json`, each whole or not at all."""
        save_report(folder, page(self), self.to_json())


def page(report: ImageReport) -> str:
    """The report as a page that needs nothing else."""
    names = [(row.mechanism, index) for index, row in enumerate(report.rows)]
    pixels = Axis("pixels of an image", log=2, text=lambda value: f"{value / 1e6:.2g} M" if value >= 1e6 else f"{value / 1e3:.3g} k")
    plots = ""
    for title, of, axis, caption in (
        ("Time", "ms", Axis("ms an image", log=10, text=lambda v: f"{v:g} ms"), "Least of three medians of repeated forward passes."),
        ("Multiply–adds", "multiply_adds", Axis("multiply–adds", log=10, text=lambda v: f"{v / 1e9:g} G"), "Of one image."),
        ("Peak memory", "peak_bytes", Axis("bytes", log=4, text=bytes_text), "Of one forward pass, beyond the weights."),
    ):
        series = [
            Series(row.mechanism, [(a.sides[0] * a.sides[1], getattr(a, of)) for a in row.at], i) for i, row in enumerate(report.rows)
        ]
        plots += html.figure(title, lines(f"{title} against pixels", series, pixels, axis), caption, names)
    for index, first in enumerate(report.rows[0].at):
        likeness = [(row.mechanism, row.at[index].cosine, color) for color, row in enumerate(report.rows) if color]
        ends = [Dot(name, value, f"{value:.4f}", color) for name, value, color in likeness if value is not None]
        drawn = dots("Cosine of the features to the original's", ends, Axis("cosine", zero=True))
        plots += html.figure(f"Likeness at {first.size}", drawn, "Cosine of the tokens' features to the original's, without training.")
    model = report.about["model"]
    body = (
        f"<h1>Attention of {escape(model)}: what another one gains and loses</h1>"
        + html.table(HEADS, report.cells())
        + html.items(report.notes)
        + f'<h2>Plots</h2><div class="plots">{plots}</div><h2>How this was measured</h2>'
        + html.facts(report.about)
    )
    return html.page(f"subquad: {model}", body)
