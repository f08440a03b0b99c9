"""The command line's part for talking with a model: `subquad chat`."""

from __future__ import annotations

import io
import sys
import time
from typing import Annotated

import typer

from subquad.checks import InputError


def chat(
    model: Annotated[str, typer.Argument(help="A folder that was saved (a converted model's too), smollm2-135m, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="The system message, where the model has a chat template.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the sampling; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is sampled from.")] = 0.9,
    most: Annotated[int, typer.Option("--max-tokens", help="Tokens of a reply.")] = 256,
    stretch: Annotated[
        float | None, typer.Option(help="Fit lolcats layers for talks so many times as long as they were taught on.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk with a model in the terminal. /reset forgets what was said, /quit leaves; Ctrl-C ends a reply.

    After each reply: its speed, and what the model keeps of the conversation; with a mechanism of fixed state that does not grow.

    Examples:

      subquad chat runs/first/lolcats

      subquad chat smollm2-135m --system "You are a whaler." --temperature 0
    """
    from subquad.bench.chat import Conversation
    from subquad.bench.choice import dtype_of, pick_device
    from subquad.convert.stretch import check_stretch
    from subquad.convert.stretch import stretch as stretched
    from subquad.models.load import load_model

    place, precision = pick_device(device), dtype_of(dtype)
    if stretch is not None:
        check_stretch("--stretch", stretch)
    loaded, tokenizer = load_model(model, precision)
    if stretch is not None:
        stretched(loaded, stretch)
    talk = Conversation(
        loaded.to(place), tokenizer, system=system, temperature=temperature, top_p=top_p, most=most, seed=seed
    )  # fmt: skip
    if not talk.templated:
        typer.echo("This tokenizer has no chat template: the model goes on with your text as it stands.", err=True)
    typer.echo("/reset forgets what was said, /quit leaves.", err=True)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what a pipe holds need not be text
    while (text := _asked()) is not None:
        if text == "/reset":
            talk.reset()
            typer.echo("Forgotten.", err=True)
        elif text.startswith("/"):
            typer.echo(f"No command {text}: /reset and /quit are known.", err=True)
        elif text:
            _reply(talk, text)


def _asked() -> str | None:
    """What the user typed; None to leave."""
    try:
        text = input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        typer.echo("")
        return None
    return None if text in ("/quit", "/exit") else text


def _reply(talk, text: str) -> None:  # type: ignore[no-untyped-def]
    from subquad.bench.speed import bytes_text

    before, began = talk.tokens, time.perf_counter()
    pieces = talk.say(text)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        pieces.close()
    except InputError as error:
        if not talk.tokens:  # a tokenizer that is not the model's fails at the first text already
            raise
        typer.echo(str(error), err=True)
        return
    seconds = time.perf_counter() - began
    typer.echo("")
    read = max(talk.tokens - before, 0)  # less than before where a reply was broken off
    typer.echo(f"[{read / seconds:.1f} tokens/s read and written; {talk.tokens:,} so far, kept in {bytes_text(talk.nbytes)}]", err=True)
