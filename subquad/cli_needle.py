"""The command line's part for long texts: `subquad needle`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from subquad.checks import InputError, nearest


def needle(
    model: Annotated[str, typer.Argument(help="smollm2-135m (embedded), a folder (a converted model's too), or a hub id.")],
    task: Annotated[list[str] | None, typer.Option(help="passkey or needle; repeat for both (default: both).")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")] = "512,1024,2048",
    depths: Annotated[str, typer.Option(help="Where the number stands, in percent of the text.")] = "0,25,50,75,100",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts at each length and depth.")] = 4,
    by: Annotated[str, typer.Option(help="forward (one pass, also ranks), or generate (greedy decoding).")] = "forward",
    to: Annotated[str | None, typer.Option(help="Swap the model's attention first: NAME:option=value,….")] = None,
    stretch: Annotated[
        float | None, typer.Option(help="Fit lolcats layers for contexts so many times as long as they were taught on, before asking.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File for the results, JSON.")] = None,
) -> None:
    """Passkey and needle in a haystack: is a number stated in a long text found again?

    In brackets: the number alone, after a space that is given, or with --by generate after other words.

    Examples:

      subquad needle smollm2-135m --to sliding-window:window=64,sinks=4 --lengths 512,2048

      subquad needle runs/first/lolcats --lengths 1024,8192 --by generate --out needle.json

      subquad needle runs/first/lolcats-sinks --lengths 8192 --stretch 8
    """
    from rich.console import Console

    from subquad.bench.choice import dtype_of, integers, parse_choice, pick_device
    from subquad.bench.needle import TASKS, retrieval
    from subquad.bench.report import write_whole
    from subquad.convert.stretch import check_stretch
    from subquad.convert.stretch import stretch as stretched
    from subquad.files import writing
    from subquad.models.load import load_model

    for one in task or ():
        if one not in TASKS:
            raise nearest("--task", one, TASKS, "task")
    try:
        where = [float(part) / 100 for part in depths.split(",")]
    except ValueError:
        where = [-1.0]
    if not all(0 <= depth <= 1 for depth in where):
        raise InputError("--depths", repr(depths), "percentages separated by commas, such as 0,50,100")
    if by not in ("forward", "generate"):
        raise InputError("--by", repr(by), "forward or generate")
    if out is not None and (out.is_dir() or not os.access(out.absolute().parent, os.W_OK)):
        raise InputError("--out", out, "a file in a folder that can be written to")
    counts, place, choice = integers("--lengths", lengths), pick_device(device), None if to is None else parse_choice("--to", to)
    if stretch is not None:
        check_stretch("--stretch", stretch)
    loaded, tokenizer = load_model(model, dtype_of(dtype))
    if choice is not None:
        from subquad.convert.swap import swap

        swap(loaded, choice.name, **choice.options)
    if stretch is not None:
        stretched(loaded, stretch)
    found = retrieval(
        loaded.to(place), tokenizer, tasks=cast(Any, tuple(dict.fromkeys(task or TASKS))), lengths=counts, depths=where, prompts=prompts,
        by=cast(Any, by), seed=seed, progress=True,
    )  # fmt: skip
    Console().print(found.table())
    if out is not None:
        with writing("--out", out):
            write_whole(out, found.to_json())
        typer.echo(f"Written: {out}")
