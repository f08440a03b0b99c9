"""The command line's part for simulators: `subquad simulate-gna`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulate_gna(
    grid: Annotated[str, typer.Option(help="Sides of the token grid, one to three: 30x48x80.")],
    window: Annotated[str, typer.Option(help="Keys along each axis: 18x24x24, or one number for all.")],
    stride: Annotated[str, typer.Option(help="Queries that share a window, along each axis; or all: a search.")] = "1",
    dilation: Annotated[str, typer.Option(help="Distance of the keys along each axis.")] = "1",
    causal: Annotated[str | None, typer.Option(help="Axes along which later keys are hidden: 0 or 0,2; or all.")] = None,
    tiles_q: Annotated[str, typer.Option(help="Query tile: 4x8x8, or tokens of it, such as 128,256: every shape.")] = "128",
    tiles_k: Annotated[str, typer.Option(help="Key tile, in the same way.")] = "128",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Key tiles begin at each query tile's first key.")] = False,
    share: Annotated[float | None, typer.Option(help="Share of a model's time in attention: adds its end-to-end bound.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows that are shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with the key tiles each query tile visits.")] = False,
    plot: Annotated[Path | None, typer.Option(help="File for a plot: out.png.")] = None,
) -> None:
    """What neighbourhood attention (GNA) can gain over dense attention on a kernel's tiles, by counting them.

    Examples:

      subquad simulate-gna --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --tiles-q 4x8x8 --tiles-k 2x8x8

      subquad simulate-gna --grid 30x48x80 --window 18x24x24 --stride all --tiles-q 256 --tiles-k 128 --plot strides.png
    """
    from subquad.bench.gna_report import run

    run(grid, window, stride, dilation, causal, tiles_q, tiles_k, dynamic, share, top, as_json, plot)
