"""What `subquad spectrum` reads and shows: a model of timm, images, a table, and a page with plots."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from subquad.bench import html
from subquad.bench.choice import parse_choice
from subquad.bench.folder import check_new
from subquad.bench.machine import commit, versions
from subquad.bench.plots import Axis, Series, lines
from subquad.bench.report import write_whole
from subquad.bench.spectrum import DEFAULT, LEAST, Ranks, check, spectrum
from subquad.checks import InputError
from subquad.files import writing
from subquad.models.vision.released import has_released, load_released, read_checkpoint

HEADS = ("layer", "mechanism", "buffer", "eff.", "head", "eff.", "heads", "eff.")
WORDS = "Numerical and effective rank of the key–value buffer, of one head's output and of all heads' outputs side by side."


def run(
    name: str, images: Sequence[Path], mechanisms: Sequence[str] | None, size: str, weights: Path | None, pretrained: bool, rtol: float,
    out: Path | None, command: str,
) -> None:  # fmt: skip
    """The command: everything is checked before the model is made."""
    choices = [parse_choice("--mechanism", one) for one in mechanisms or DEFAULT]
    wanted = [(c.name, c.options) for c in choices]
    check(wanted)
    if not LEAST <= rtol < 1:
        raise InputError("--rtol", rtol, f"a number from {LEAST:g} to 1")
    sides = parse_sides(size)
    if weights is not None and pretrained:
        raise InputError("--weights", str(weights), "a file, or --pretrained, not both")
    if weights is not None and not weights.is_file():
        raise InputError("--weights", repr(str(weights)), "a file that exists")
    if out is not None:
        check_new("--out", out)
    pixels = torch.stack([read_image(path, sides) for path in images])
    model, (mean, deviation) = make_model(name, sides, weights, pretrained)
    try:
        rows = spectrum(model, (pixels - mean) / deviation, wanted, rtol=rtol, progress=True)
    except (AssertionError, RuntimeError) as error:  # timm's own words for sizes that a model does not take
        raise InputError("--size", f"{size!r} ({error})", f"a size that {name} takes") from None

    table = Table(
        header_style="bold", title=f"{name}, {len(images)} image{'s' * (len(images) > 1)} of {sides[0]} × {sides[1]}, rtol {rtol:g}"
    )
    for index, head in enumerate(HEADS):
        table.add_column(head, justify="left" if index < 2 else "right", overflow="fold", min_width=(8, 11, 5)[min(index, 2)])
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if weights is None and not pretrained:
        typer.echo("The model has the weights that it was first made with; --weights or --pretrained give trained ones.", err=True)
    if out is not None:
        about = {
            "model": name, "weights": "timm's hub" if pretrained else str(weights or "as first made"),
            "images": ", ".join(p.name for p in images),
            "size": f"{sides[0]} × {sides[1]}", "rtol": f"{rtol:g}", "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
            "commit": commit() or "not in a checkout", "command": command,
        }  # fmt: skip
        with writing("--out", out):
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "spectrum.html", page(rows, about))
            write_whole(out / "spectrum.json", json.dumps({"about": about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
        typer.echo(f"Plots: {out / 'spectrum.html'}; numbers: {out / 'spectrum.json'}")


def parse_sides(text: str) -> tuple[int, int]:
    """Rows and columns of ``--size``."""
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 2) or not all(p.isdecimal() and 0 < int(p) <= 4096 for p in parts):
        raise InputError("--size", repr(text), "a side such as 224, or rowsxcolumns such as 192x256, at most 4096")
    return int(parts[0]), int(parts[-1])


def make_model(name: str, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model of timm for images of that size, and the mean and deviation of its pixels ``[3, 1, 1]``."""
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise InputError("model", f"{name!r}, without timm ({error})", "timm installed: pip install 'subquad[convert]'") from None
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3, 0.5)
        near = f"; nearest: {', '.join(close)}" if close else ", as timm.list_models() lists them"
        raise InputError("model", repr(name), f"an image model of timm, or of this library{near}")
    sized: dict[str, Any] = {"img_size": sides} if name.startswith(("vit_", "deit", "flexivit")) else {}  # fixed when made
    try:
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained=pretrained, **sized)
    except Exception as error:  # whatever timm or its hub says
        raise InputError("model", f"{name!r} ({error})", "a model that timm can make here") from None
    if weights is not None:
        load(model, weights)
    config = resolve_model_data_config(model)
    mean, deviation = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return model.eval(), (mean, deviation)


def load(model: nn.Module, path: Path) -> None:
    """Weights from .safetensors, or from a .pth that holds tensors only, under our names or the authors'; all or nothing."""
    own, found = model.state_dict(), read_checkpoint(path)
    if has_released(model) and not own.keys() <= found.keys():
        load_released(model, path)
        return
    wrong = [key for key in own if key not in found or found[key].shape != own[key].shape] + [key for key in found if key not in own]
    if wrong:
        raise InputError("--weights", f"{str(path)!r}, which differs in {', '.join(wrong[:3])}", "weights of this model")
    model.load_state_dict(found)


def read_image(path: Path, sides: tuple[int, int]) -> Tensor:
    """An image file, turned upright and stretched to a size, as ``[3, rows, columns]`` in 0 … 1."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            resized = ImageOps.exif_transpose(image).convert("RGB").resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
            raw = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("images", f"{str(path)!r} ({error})", "image files that Pillow reads") from None
    return raw.view(*sides, 3).permute(2, 0, 1).float() / 255


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
