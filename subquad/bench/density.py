"""Sweeps: one mechanism at several settings, its perplexity, recall and speed against what it sees and keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from subquad.bench.html import figure
from subquad.bench.html import table as html_table
from subquad.bench.plots import Axis, Series, lines
from subquad.bench.speed import bytes_text

if TYPE_CHECKING:
    from subquad.bench.report import Report, Row

NEAR = 1.05  # times the original's perplexity that count as near it
HEADS = ("setting", "pairs seen", "bytes_64k", "ppl", "ratio", "recall", "tokens/s", "decode ms")


def sweeps(report: Report) -> dict[str, list[Row]]:
    """The rows of each sweep, those that see and keep least first."""
    found: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.setting:
            found.setdefault(row.name.replace(row.mechanism, row.base, 1), []).append(row)
    return {name: sorted(rows, key=lambda r: (r.pairs or 0.0, r.bytes_64k or 0)) for name, rows in found.items() if len(rows) > 1}


def sweep_sentences(report: Report) -> list[str]:
    """For each sweep: the least that it has to see, or keep, to come near the original."""
    said = []
    for name, rows in sweeps(report).items():
        near = next((r for r in rows if r.ratio is not None and r.ratio <= NEAR), None)
        if near is not None:
            sees = f"{near.pairs:.1%} of the pairs and " if near.pairs is not None else ""
            kept = "–" if near.bytes_64k is None else bytes_text(near.bytes_64k)
            said.append(
                f"{name} comes within {NEAR - 1:.0%} of the original’s perplexity with {near.setting}: {sees}{kept} kept at 65,536 tokens."
            )
        else:
            measured = [r for r in rows if r.ratio is not None]
            if measured:
                best = min(measured, key=lambda r: r.ratio)  # type: ignore[arg-type, return-value]
                said.append(f"{name} comes no nearer to the original’s perplexity than {best.ratio:.3g}×, with {best.setting}.")
    return said


def sweep_cells(row: Row) -> list[str]:
    """One line of a sweep's table."""
    from subquad.bench.report import COLUMNS

    texts = dict(COLUMNS)
    return [row.setting, *(texts[head](row) for head in HEADS[1:])]


def sweep_table(name: str, rows: list[Row]) -> Table:
    table = Table(title=f"{name}, by density", title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in HEADS:
        table.add_column(head.replace(" ", "\n"), justify="left" if head == "setting" else "right", overflow="fold")
    for row in rows:
        table.add_row(*sweep_cells(row))
    return table


SHARE = Axis("pairs seen", log=2, text=lambda v: f"{100 * v:.3g}%")
KEPT = Axis("bytes kept per sequence at 65,536 tokens", log=4, text=bytes_text)
WIDE = 8.0  # greatest over least value from which an axis of perplexities is logarithmic
MEASURES: tuple[tuple[str, Axis, str], ...] = (
    ("Perplexity", Axis("perplexity"), "ppl"),
    ("Recall", Axis("prompts answered exactly", zero=True, text=lambda v: f"{v:.0%}"), "recall"),
    ("Prefill speed", Axis("tokens/s", zero=True, text=lambda v: f"{v:,.0f}"), "tokens_per_s"),
    ("Decode time", Axis("ms", zero=True, text=lambda v: f"{v:g} ms"), "decode_ms"),
)


def sweep_tables(report: Report) -> str:
    """The tables of all sweeps, as HTML; nothing where there is none."""
    return "".join(html_table((f"{name}: setting", *HEADS[1:]), [sweep_cells(r) for r in rows]) for name, rows in sweeps(report).items())


def sweep_figures(report: Report) -> str:
    """Each measure against the share of pairs seen, and against the bytes kept, where settings differ in them."""
    found = sweeps(report)
    names = [(name, index + 1) for index, name in enumerate(found)]
    first = report.original

    def drawn(title: str, y: Axis, of: str, x: Axis, at: Callable[[Row], float | None]) -> str:
        series = []
        for name, color in names:
            points = [(float(a), float(b)) for a, b in ((at(r), getattr(r, of)) for r in found[name]) if a and b is not None]
            if len({a for a, _ in points}) > 1:
                series.append(Series(name, points, color))
        here, value = (None, None) if first is None else (at(first), getattr(first, of))
        if series and first is not None and here and value is not None:
            series.append(Series(first.mechanism, [(float(here), float(value))], 0))
        values = [b for one in series for _, b in one.points]
        y = replace(y, log=2) if of == "ppl" and max(values, default=0) > WIDE * min(values, default=1) else y
        svg = lines(f"{title} against {x.label}", series, x, y)
        return figure(f"{title} against {x.label.split(' per')[0]}", svg, "One point a setting.", [(s.name, s.color) for s in series])

    axes: tuple[tuple[Axis, Callable[[Row], float | None]], ...] = ((SHARE, lambda r: r.pairs), (KEPT, lambda r: r.bytes_64k))
    return "".join(drawn(title, y, of, x, at) for x, at in axes for title, y, of in MEASURES)
