"""The command line's part for sentence encoders: `subquad swap-encoder`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from subquad.checks import InputError
from subquad.convert.transfer import Objective


def swap_encoder(
    model: Annotated[str, typer.Argument(help="minilm (embedded), a local folder, or a hub id of a BERT or RoBERTa encoder.")],
    to: Annotated[list[str], typer.Option(help="A bidirectional mechanism, with options: NAME:option=value,…; repeat for several.")],
    layers: Annotated[str, typer.Option(help="all, a ratio (3:1: three swapped, one kept), or indices (0,2,4-7,-1).")] = "all",
    distill: Annotated[int, typer.Option(min=0, help="Steps of attention transfer for what has new parameters.")] = 0,
    objective: Annotated[str, typer.Option(help="What a layer learns to match: output, or weights (hedgehog).")] = "output",
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text: files, folders, or hub:owner/name, a data set; cut into sentences (default: the embedded book)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json and the taught models.")] = None,
    held_out: Annotated[int, typer.Option(min=3, help="Sentences at the end of the text to compare on.")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Sentences in a step.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens after which a sentence is cut.")] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the distillation.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of new parameters and of the order of sentences.")] = 0,
) -> None:
    """Put cheaper attention into a sentence encoder, teach it, and compare its embeddings with the original's.

    Examples:

      subquad swap-encoder minilm --to hedgehog --distill 200 --out runs/minilm

      subquad swap-encoder ./my-bert --to longformer:window=32 --to hedgehog --distill 500 --text corpus.txt
    """
    from rich.console import Console

    from subquad.bench.choice import parse_choice
    from subquad.bench.encoder_job import EncoderJob, run_encoder_job
    from subquad.bench.machine import command

    if objective not in ("output", "weights"):
        raise InputError("--objective", repr(objective), "output or weights")
    job = EncoderJob(
        model, tuple(parse_choice("--to", one) for one in to), layers, distill, cast(Objective, objective),
        tuple(str(path) for path in text or ()), held_out, batch, length, lr, seed, device,
    )  # fmt: skip
    report = run_encoder_job(job, out, command=command(), progress=True)
    Console().print(report.table())
    typer.echo(f"Cosines and similarities are of the embeddings of {job.held_out} held-out sentences, against the original's.")
    typer.echo("Nothing was written: name a folder with --out to keep the models." if out is None else f"Report: {out / 'report.json'}")
