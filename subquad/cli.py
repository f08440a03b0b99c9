"""The command line: what `subquad --help` lists.

Bad input of any kind is one line on standard error and exit status 2. What is heavy is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from subquad import contract
from subquad._version import __version__
from subquad.checks import InputError, nearest
from subquad.cli_chat import chat
from subquad.cli_encoder import swap_encoder
from subquad.cli_needle import needle
from subquad.cli_recipes import recipes
from subquad.cli_simulate import simulate_gna
from subquad.cli_swap import swap
from subquad.cli_train import train_app

CAPABILITIES = ("causal", "bidirectional", "needs_grid", "recurrent", "training_free", "needs_hidden")


_UsageError: Any = typer.BadParameter.__base__  # click's own, or that of the click inside newer typers


class _Door(TyperGroup):
    """Turns bad input, from wherever it was noticed, into one line and exit status 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _one_line():
            return super().invoke(ctx)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        message = str(error)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # `subquad` alone shows the help
            raise
        message = error.format_message()
    else:
        return
    typer.echo(f"subquad: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


app = typer.Typer(
    cls=_Door, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def main() -> None:
    app(prog_name="subquad")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"subquad {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Sub-quadratic attention: look at mechanisms, put one into a model, and measure what it gains and loses."""


# ---- list and show -------------------------------------------------------------------------------------------------


@app.command("list")
def list_command(
    family: Annotated[str | None, typer.Option(help=f"Only one family: {', '.join(contract.FAMILIES)}.")] = None,
    can: Annotated[list[str] | None, typer.Option(help=f"Only what can: {', '.join(CAPABILITIES)}; repeat for several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Every mechanism, by family.

    Examples:

      subquad list --family linear

      subquad list --can causal --can recurrent --json
    """
    if family is not None and family not in contract.FAMILIES:
        raise nearest("--family", family, contract.FAMILIES, "family")
    for wish in can or []:
        if wish not in CAPABILITIES:
            raise nearest("--can", wish, CAPABILITIES, "capability")
    cards = [c for c in contract.mechanisms().values() if family in (None, c.family) and all(getattr(c, wish) for wish in can or [])]
    cards.sort(key=lambda c: (contract.FAMILIES.index(c.family), c.name))
    if as_json:
        typer.echo(json.dumps([_card_facts(c) for c in cards], indent=1, ensure_ascii=False))
        return
    table = Table(header_style="bold")
    for head in ("name", "family", "can", "what it does"):
        table.add_column(head, no_wrap=head == "name", overflow="fold")
    for c in cards:
        table.add_row(c.name, c.family, ", ".join(_abilities(c)), c.summary)
    Console().print(table)


def _abilities(card: contract.Card) -> list[str]:
    return [name.replace("_", " ") for name in CAPABILITIES if getattr(card, name)]


def _card_facts(card: contract.Card) -> dict[str, Any]:
    names = ("name", "title", "paper", "family", "summary")
    options = contract.option_defaults(contract.mechanism(card.name))
    return {
        **{name: getattr(card, name) for name in names},
        **{name: bool(getattr(card, name)) for name in CAPABILITIES},
        "inputs": {name: spec.doc for name, spec in card.inputs.items()},
        "options": {
            name: value if isinstance(value, (int, float, str, bool, type(None))) else repr(value) for name, value in options.items()
        },
        "keeps": card.keeps,
    }


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A mechanism, as `subquad list` names it; options may follow: sliding-window:window=64.")],
    tokens: Annotated[int, typer.Option(min=1, help="Costs at this many tokens.")] = 65536,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 3,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """One mechanism: its card, options, costs at a shape, and how to use it.

    Examples:

      subquad show lolcats

      subquad show sliding-window:window=64,sinks=4 --tokens 8192
    """
    from subquad.bench.choice import parse_choice
    from subquad.bench.speed import Layer, bytes_text

    choice = parse_choice("name", name)
    made = contract.attention(choice.name, heads, head_dim, kv_heads=kv_heads, hidden_size=heads * head_dim, **choice.options)
    card = made.card
    layer = Layer(card, heads, kv_heads, head_dim, head_dim, made.options)
    costs = {"flops": layer.cost("flops", tokens, 2), "bytes_moved": layer.cost("bytes_moved", tokens, 2)}
    if card.state_bytes is not None:
        costs["state_bytes"] = layer.cost("state_bytes", tokens, 2)
    if as_json:
        size = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": 2}
        typer.echo(json.dumps({**_card_facts(card), "shape": size, "costs": costs}, indent=1, ensure_ascii=False))
        return
    out = Console(highlight=False)
    out.print(f"[bold]{card.name}[/]  {card.title}", soft_wrap=True)
    out.print(card.summary, soft_wrap=True, markup=False)
    out.print(f"\npaper    {card.paper}\nfamily   {card.family}\ncan      {', '.join(_abilities(card))}", soft_wrap=True, markup=False)
    _listing(out, "options", [f"{key} = {value!r}" for key, value in made.options.items()])
    _listing(out, "inputs", [f"{key}: {spec.doc}" for key, spec in card.inputs.items()])
    out.print(
        f"\nOne layer, one sequence of {tokens:,} tokens, {heads} heads ({kv_heads} of keys), head dim {head_dim}, 16-bit:", markup=False
    )
    out.print(f"  forward  {costs['flops'] / 1e9:.4g} GFLOP, moves {bytes_text(costs['bytes_moved'])}", markup=False)
    if "state_bytes" in costs:
        kept = card.kept(layer.shape(tokens, 2), **made.options)
        out.print(f"  keeps    {bytes_text(costs['state_bytes'])}: {kept}", soft_wrap=True, markup=False)
    out.print("\n" + _usage(choice.name, choice.options, card, heads, kv_heads, head_dim), markup=False, soft_wrap=True)


def _listing(out: Console, title: str, lines: list[str]) -> None:
    for index, line in enumerate(lines):
        out.print(f"{'' if index else title:8} {line}", soft_wrap=True, markup=False)


def _usage(name: str, options: dict[str, Any], card: contract.Card, heads: int, kv_heads: int, head_dim: int) -> str:
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    hidden = f", hidden_size={heads * head_dim}" if card.needs_hidden else ""
    call = "".join([", hidden=hidden" if card.needs_hidden else "", ", grid=(rows, columns)" if card.needs_grid else ""])
    lines = [
        "import subquad",
        f'module = subquad.attention("{name}", heads={heads}, head_dim={head_dim}, kv_heads={kv_heads}{hidden}{given})',
        f"o = module(q, k, v{call})  # q [B, N, {heads}, {head_dim}], k and v [B, N, {kv_heads}, {head_dim}]",
    ]
    if card.causal:
        lines.append(f'subquad.swap(model, "{name}"{given})  # a pretrained language model')
    return "\n".join(lines)


def _command() -> str:
    from subquad.bench.machine import command

    return command()


app.command("swap")(swap)
app.add_typer(train_app, name="train")
app.command("recipes")(recipes)
app.command("simulate-gna")(simulate_gna)
app.command("swap-encoder")(swap_encoder)
app.command("needle")(needle)
app.command("chat")(chat)


# ---- bench, tune and doctor ----------------------------------------------------------------------------------------


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Mechanisms, with options (default: every one that works on a sequence).")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "1024,2048,4096",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 9,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key and value heads (default: as many).")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Also forward and backward together.")] = False,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds to repeat each measurement for.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.html, with plots.")] = None,
) -> None:
    """Time and memory of mechanisms here, beside torch's own attention in the same run.

    Examples:

      subquad bench lightning gla sliding-window:window=512 --tokens 4096,8192,16384

      subquad bench --backward --out runs/bench
    """
    from dataclasses import asdict

    from subquad.bench.choice import dtype_of, integers, parse_choice, pick_device
    from subquad.bench.folder import check_new
    from subquad.bench.html import BENCH_HEADS, bench_cells, bench_page
    from subquad.bench.machine import commit, device_name, versions
    from subquad.bench.mechanisms import bench as measure
    from subquad.bench.report import write_whole
    from subquad.files import writing

    choices = [parse_choice("names", one) for one in names or [n for n, c in contract.mechanisms().items() if not c.needs_grid]]
    where, counts, precision = pick_device(device), integers("--tokens", tokens), dtype_of(dtype)
    for c in choices:  # before the folder is made
        contract.attention(c.name, heads, head_dim, kv_heads=kv_heads, hidden_size=heads * head_dim, **c.options)
    if out is not None:
        check_new("--out", out)
        with writing("--out", out):
            out.mkdir(parents=True, exist_ok=True)
    points = measure(
        [(c.name, c.options) for c in choices], counts,
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, batch=batch,
        device=where, dtype=precision, backward=backward, budget=budget, progress=True,
    )  # fmt: skip
    about = {
        "device": device_name(where), "dtype": dtype, "heads": f"{heads} ({kv_heads or heads} of keys), head dim {head_dim}, batch {batch}",
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()), "commit": commit() or "not in a checkout", "command": _command(),
    }  # fmt: skip
    table = Table(
        title=f"{about['device']}, {dtype}, {about['heads']}",
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    width = len(BENCH_HEADS) if backward else 5
    for index, head in enumerate(BENCH_HEADS[:width]):
        words = head.replace(" ", "\n")
        table.add_column(words, justify="right" if index else "left", no_wrap=index > 0, min_width=0 if index else 14, overflow="fold")
    for point in points:
        table.add_row(*bench_cells(point)[:width])
    Console().print(table)
    if out is not None:
        with writing("--out", out):
            write_whole(out / "bench.html", bench_page(points, about))
            write_whole(out / "bench.json", json.dumps({"about": about, "points": [asdict(p) for p in points]}, indent=1) + "\n")
        typer.echo(f"Plots: {out / 'bench.html'}; numbers: {out / 'bench.json'}")


@app.command("spectrum")
def spectrum_command(
    model: Annotated[
        str, typer.Argument(help="A ViT, DeiT or Swin of timm, or in a folder of transformers', or a backbone of this library.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, stretched to --size.")],
    mechanism: Annotated[
        list[str] | None, typer.Option(help="A mechanism with options; repeat for several (default: all for images).")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Side of the images, or rowsxcolumns (default: the model's own).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the model, .safetensors or .pth (default: as first made).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Weights from timm's hub.")] = False,
    rtol: Annotated[float, typer.Option(help="Singular values above this share of the largest count as rank.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Folder for spectrum.json and spectrum.html, with plots.")] = None,
) -> None:
    """Ranks of what attention keeps and gives, layer by layer, for several mechanisms on a model's own q, k and v.

    Examples:

      subquad spectrum vit_tiny_patch16_224 photo.jpg --pretrained --out runs/ranks

      subquad spectrum ravlt_t a.png b.png --mechanism softmax --mechanism rala --size 192x256

      subquad spectrum ./my-swin photo.jpg --size 384
    """
    from subquad.bench.spectrum_report import run

    run(model, images, mechanism, size, weights, pretrained, rtol, out, _command())


@app.command("flops")
def flops_command(
    model: Annotated[str, typer.Argument(help="An image model of timm or of this library, or a folder of transformers'.")],
    size: Annotated[str | None, typer.Option(help="Side of the images, or rowsxcolumns (default: the model's own).")] = None,
) -> None:
    """Parameters and multiply–adds of an image model.

    Examples:

      subquad flops ravlt_s

      subquad flops deit_small_patch16_224 --size 384
    """
    from subquad.bench.flops import report

    typer.echo(report(model, size))


@app.command()
def tune(
    head_dim: Annotated[str, typer.Option(help="Head dims, separated by commas.")] = "64,128",
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; repeat for several (default: all).")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    quick: Annotated[bool, typer.Option("--quick", help="Head dim 128, and few programs only for the pass.")] = False,
    device: Annotated[str, typer.Option(help="cuda; or cpu, which tries it tiny where TRITON_INTERPRET=1.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="File for the rows; SUBQUAD_LAUNCH=FILE then uses them.")] = None,
) -> None:
    """Measure the kernels' launch parameters on this GPU, and print rows for the table of subquad/ops/launch.py.

    Examples:

      subquad tune --out launch.json

      SUBQUAD_LAUNCH=launch.json python train.py
    """
    from importlib.util import find_spec

    import torch

    from subquad.bench.choice import dtype_of, integers
    from subquad.bench.machine import device_name, versions
    from subquad.bench.report import write_whole
    from subquad.files import writing

    widths, precision = [128] if quick else sorted(set(integers("--head-dim", head_dim))), dtype_of(dtype)
    if max(widths) > 256:
        raise InputError("--head-dim", repr(head_dim), "at most 256")
    if dtype == "float16":
        raise InputError("--dtype", repr(dtype), "bfloat16 or float32, which have rows")
    if find_spec("triton") is None:
        raise InputError("tune", "a machine without Triton", "Triton, whose kernels are measured")
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
    if device == "cpu" and not interpreted:
        raise InputError("--device", "'cpu'", "cuda; cpu only tries the command, with TRITON_INTERPRET=1")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InputError(
            "--device", f"{device!r}, where torch sees {torch.cuda.device_count()} CUDA devices", "cuda, on a machine that has one"
        )
    from subquad.bench import tune as tuner

    if device == "cpu":
        precision = dtype_of("float32")  # Triton's interpreter has no bfloat16 products
    for name in kernel or ():
        if name not in tuner.KERNELS:
            raise nearest("--kernel", name, tuner.KERNELS, "kernel")
    about = {"device": device_name(device), "versions": versions(), "command": _command()}
    rows: list[tuner.Row] = []
    try:
        for row in tuner.tune(widths, precision, device, kernels=kernel or tuple(tuner.KERNELS), quick=quick, progress=True):
            rows.append(row)
            if out is not None:  # anew after each row: it takes minutes
                with writing("--out", out):
                    write_whole(out, tuner.save(rows, about))
    finally:
        for row in rows:
            typer.echo(row.line)
    if out is not None:
        typer.echo(f"Written: {out}; SUBQUAD_LAUNCH={shlex.quote(str(out))} uses it", err=True)


@app.command()
def doctor() -> None:
    """What this machine can run, and why not."""
    from subquad.bench.doctor import examine

    marks = {"ok": "[green]ok[/]", "missing": "[yellow]–[/]", "broken": "[red]no[/]"}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in examine():
        found = f"{finding.found}{'; ' if finding.advice else ''}{finding.advice}"
        table.add_row(marks[finding.state], finding.name, escape(found))  # "[convert]" is no markup
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
