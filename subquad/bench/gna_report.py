"""What `subquad simulate-gna` reads and shows: a table, JSON and a plot of what neighbourhood attention can gain on tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from subquad.bench.choice import integers
from subquad.bench.gna import Shape, Tiling, frontier, ranked, shapes_of
from subquad.checks import InputError
from subquad.files import writing
from subquad.ops.sparse.grids import Neighborhood
from subquad.ops.sparse.layout import Layout

ALL = "all"
WORDS = (
    "ideal: 1 / density. reachable: the scores of dense attention over those of all visited tiles. bound: all key tiles over those of the "
    "query tile that visits most. partial: visited tiles that need a mask."
)


def run(
    grid: str, window: str, stride: str, dilation: str, causal: str | None, tiles_q: str, tiles_k: str, dynamic: bool, share: float | None,
    top: int, as_json: bool, plot: Path | None,
) -> None:  # fmt: skip
    """The command: everything is checked before anything is counted."""
    sides = parse_shape("--grid", grid)
    steps = (1,) * len(sides) if stride == ALL else parse_shape("--stride", stride, len(sides))
    rule = Layout.neighborhood(
        sides, parse_shape("--window", window, len(sides)), stride=steps, dilation=parse_shape("--dilation", dilation, len(sides)),
        causal=parse_causal(causal, len(sides)),
    ).rule  # fmt: skip
    assert isinstance(rule, Neighborhood)
    boxes_q, boxes_k = parse_tiles("--tiles-q", tiles_q, sides), parse_tiles("--tiles-k", tiles_k, sides)
    if share is not None and not 0 < share <= 1:
        raise InputError("--share", share, "a number above 0 and at most 1")
    if plot is not None:
        check_plot(plot)
    every = (frontier if stride == ALL else ranked)(rule, boxes_q, boxes_k, dynamic=dynamic, progress=True)
    rows = every[-top:] if stride == ALL else every[:top]
    if plot is not None:
        with writing("--plot", plot):
            draw(rows, over_strides=stride == ALL).savefig(plot, dpi=150)
    if as_json:
        typer.echo(json.dumps({**about(rule, dynamic), "rows": [facts(row, share) for row in rows]}, indent=1))
        return
    show(rows, len(every), rule, share, over_strides=stride == ALL)


# ---- what is typed -------------------------------------------------------------------------------------------------


def parse_shape(argument: str, text: str, axes: int | None = None) -> Shape:
    """``30x48x80``, or one number, which stands for all of `axes` axes."""
    parts = text.lower().replace("×", "x").split("x")
    good = all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) >= 1 for part in parts)
    wanted = (1, 2, 3) if axes is None else (1, axes)
    if not good or len(parts) not in wanted:
        count = "one to three" if axes is None else f"one or {axes}" if axes > 1 else "one"
        raise InputError(argument, repr(text), f"{count} positive integers, such as {'x'.join(['8'] * (axes or 3))}")
    shape = tuple(int(part) for part in parts)
    return shape * axes if axes and len(shape) == 1 else shape


def parse_causal(text: str | None, axes: int) -> tuple[bool, ...]:
    """``all``, or numbers of axes separated by commas, the first being 0."""
    if text is None or text == ALL:
        return (text == ALL,) * axes
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]", part) and int(part) < axes for part in parts):
        raise InputError("--causal", repr(text), f"all, or axes of 0 … {axes - 1} separated by commas")
    return tuple(str(axis) in parts for axis in range(axes))


def parse_tiles(argument: str, text: str, grid: Shape) -> list[Shape]:
    """A tile ``4x8x8``, or numbers of tokens ``64,128``, which stand for every shape of so many."""
    if len(grid) == 1 or "x" not in text.lower().replace("×", "x"):
        counts = integers(argument, text)
        if max(counts) > 1 << 14:
            raise InputError(argument, repr(text), f"tiles of at most {1 << 14} tokens")
        shapes = [(n,) for n in counts] if len(grid) == 1 else [shape for n in counts for shape in shapes_of(n, grid)]
        if not shapes:
            raise InputError(argument, repr(text), "tiles that are not far larger than the grid")
        return list(dict.fromkeys(shapes))
    if len(parse_shape(argument, text)) != len(grid):
        raise InputError(argument, repr(text), f"{len(grid)} sides, as many as the grid has, or a number of tokens")
    return [parse_shape(argument, text)]


def check_plot(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot", "no matplotlib here", "matplotlib installed: pip install 'subquad[report]'") from None
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        raise InputError("--plot", repr(str(path)), f"a file name that ends in one of: {', '.join(sorted(kinds))}")
    if not path.absolute().parent.is_dir():
        raise InputError("--plot", repr(str(path)), "a file in a folder that exists")


# ---- what is shown -------------------------------------------------------------------------------------------------


def text_of(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def about(rule: Neighborhood, dynamic: bool) -> dict[str, Any]:
    sides = {name: getattr(rule, name) for name in ("grid", "window", "dilation", "causal")}
    return {**sides, "dynamic": dynamic, "tokens": prod(rule.grid)}


def facts(row: Tiling, share: float | None) -> dict[str, Any]:
    """A row of the table in full, with the key tiles that each query tile visits, axis by axis and class by class."""
    return {
        "stride": row.rule.stride, "tile_q": row.tile_q, "tile_k": row.tile_k, "density": row.density, "ideal": row.ideal,
        "reachable": row.reachable, "bound": row.bound, "visited": row.visited, "worst": row.worst, "partial": row.partial,
        **({} if share is None else {"end_to_end": row.end_to_end(share)}),
        "axes": [[{"first": first.tolist(), "last": last.tolist()} for first, last, *_ in axis.visits()] for axis in row.axes],
    }  # fmt: skip


def show(rows: Sequence[Tiling], count: int, rule: Neighborhood, share: float | None, *, over_strides: bool) -> None:
    out = Console(highlight=False)
    words = rule.words.split(", stride")[0] if over_strides else rule.words
    same = len({row.ideal for row in rows}) == 1  # unless a causal axis shows fewer keys at larger strides
    seen = f", of which a query sees {rows[0].density:.2%}: ideal {rows[0].ideal:.2f}×" if same else ""
    out.print(f"{words[0].upper()}{words[1:]}: {rows[0].tokens:,} tokens{seen}.", markup=False, soft_wrap=True)
    columns = [("stride", lambda row: text_of(row.rule.stride)), *COLUMNS[same:]]
    if share is not None:
        columns.append(("end to end", lambda row: f"{row.end_to_end(share):.2f}×"))
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head, _ in columns:
        table.add_column(head, justify="left" if head in ("stride", "query tile", "key tile") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(text(row) for _, text in columns))
    out.print(table)
    notes = ["Strides that gain over all with as few queries to a window; others cost as much as a smaller one."] if over_strides else []
    notes += [f"{len(rows)} of {count:,} rows; --top shows more."] if count > len(rows) else []
    for note in [*notes, WORDS]:
        out.print(f"• {note}", soft_wrap=True)


COLUMNS = (
    ("ideal", lambda row: f"{row.ideal:.2f}×"),
    ("query tile", lambda row: text_of(row.tile_q)),
    ("key tile", lambda row: text_of(row.tile_k)),
    ("reachable", lambda row: f"{row.reachable:.2f}×"),
    ("bound", lambda row: f"{row.bound:.2f}×"),
    ("partial", lambda row: f"{row.partial:.1%}"),
)


def draw(rows: Sequence[Tiling], *, over_strides: bool) -> Any:
    """A matplotlib figure: speed-ups over the queries that share a window, or of each pair of tiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    if over_strides:
        x = [row.shared for row in rows]
        axes.plot(x, [row.reachable for row in rows], "o-", label="reachable")
        axes.plot(x, [row.bound for row in rows], "s:", label="bound")
        axes.plot(x, [row.ideal for row in rows], "--", color="gray", label="ideal")
        axes.set_xscale("log", base=2)
        for row in rows:
            axes.annotate(text_of(row.rule.stride), (row.shared, row.reachable), textcoords="offset points", xytext=(4, -12), fontsize=8)
        axes.set(xlabel="queries that share a window (product of the strides)", ylabel="times as fast as dense")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
    else:
        names = [f"{text_of(row.tile_q)} / {text_of(row.tile_k)}" for row in rows]
        axes.barh(names, [row.reachable for row in rows], label="reachable")
        axes.plot([row.bound for row in rows], names, "kx", label="bound")
        axes.axvline(rows[0].ideal, linestyle="--", color="gray", label="ideal")
        axes.invert_yaxis()
        axes.set(xlabel="times as fast as dense", ylabel="query tile / key tile")
    axes.legend(loc="lower right")
    return figure
