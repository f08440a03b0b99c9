"""The command line's main job, `subquad swap`: another attention in a language model or an image model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subquad.checks import InputError

OF_LANGUAGE = (
    "recipe", "distill", "finetune", "tune_original", "text", "self_tokens", "own_share", "window", "stride", "windows", "length",
    "lr", "group", "prompts", "lengths",
)  # fmt: skip
OF_IMAGES = ("image", "size", "scope", "weights", "pretrained")


def swap(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A language model: smollm2-135m (embedded), a local folder, or a hub id. Or an image model: a name of timm's, or a folder."
        ),
    ],
    to: Annotated[list[str] | None, typer.Option(help="A mechanism, with options: NAME:option=value,…; repeat for several.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A published conversion (see subquad recipes), or a .toml file; repeat for several.")
    ] = None,
    sweep: Annotated[list[str] | None, typer.Option(help="Settings of an option, each a row: window=64,128,256; repeat to cross.")] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="all, a ratio (3:1: three swapped, one kept), indices (0,2,4-7,-1), or auto:8 (all but the 8 that cost most to replace)."
        ),
    ] = "all",
    distill: Annotated[
        int | None,
        typer.Option(min=0, help="Steps of attention transfer (default: a recipe's own; else 0); more where recipes have to read alike."),
    ] = None,
    finetune: Annotated[
        int | None, typer.Option(min=0, help="Steps of low-rank fine-tuning after that, likewise (default: a recipe's own; else 0).")
    ] = None,
    tune_original: Annotated[bool, typer.Option("--tune-original", help="Fine-tune the original in the same way, to compare.")] = False,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files, folders, or hub:owner/name, a data set (default: the embedded book); self: the model writes what it learns from."
        ),
    ] = None,
    self_tokens: Annotated[int, typer.Option(min=1, help="Tokens that the model writes with --text self.")] = 65536,
    own_share: Annotated[
        float | None,
        typer.Option(
            help="With --text self: fine-tune on so large a share of that text by its distribution, on the rest of --text besides."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, distilled models and checkpoints.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of held-out text.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows (default: the window).")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows held out, at the end of the text.")] = 8,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at a time to teach with (default: a recipe's own; else 1); of images, those timed at once."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a sequence to teach with (default: a recipe's own; else 512).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the distillation.")] = None,
    group: Annotated[int | None, typer.Option(min=1, help="Layers on the device at a time to distil; the model stays on the CPU.")] = None,
    prompts: Annotated[int, typer.Option(min=0, help="Key-value recall prompts (0: none).")] = 8,
    lengths: Annotated[str, typer.Option(help="Context lengths at which speed is measured.")] = "256,1024,2048",
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of new parameters, data order and prompts.")] = 0,
    image: Annotated[
        list[Path] | None, typer.Option(help="For an image model: files, or folders (default: scikit-learn's photographs).")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Of images: sides or rowsxcolumns, separated by commas (default: the model's own).")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="In a Swin: image (default: all of it at once), or window.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of a model of timm, .safetensors or .pth (default: as first made).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Weights from timm's hub.")] = False,
) -> None:
    """Put cheaper attention into a model, teach it, and show before and after.

    The same command, run again after an interruption, goes on where it stopped. Image models (ViT, DeiT and Swin) are compared, not taught:
    subquad train vision does that.

    Examples:

      subquad swap smollm2-135m --to sliding-window:window=64,sinks=4

      subquad swap smollm2-135m --to lolcats --to gla --distill 200 --out runs/first

      subquad swap smollm2-135m --to sliding-window --sweep window=64,128,256,512 --out runs/density

      subquad swap ./my-llama --to lolcats --layers 3:1 --distill 500 --text corpus.txt --out runs/mine

      subquad swap ./my-llama --recipe lolcats --recipe sliding-window --distill 200 --finetune 200 --tune-original --out runs/recipes

      subquad swap deit_tiny_patch16_224 --pretrained --to rala --to inline --size 224,384 --out runs/deit
    """
    from subquad.bench import choice
    from subquad.bench.images import is_image_model
    from subquad.bench.machine import command

    of_images = is_image_model(model)
    for name in OF_LANGUAGE if of_images else OF_IMAGES:
        if ctx.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
            should = f"without it: {model} is a model for images" if of_images else f"an image model, which {model!r} is not"
            raise InputError(f"--{name.replace('_', '-')}", "given", should)
    chosen = tuple(choice.sweep("--sweep", [choice.parse_choice("--to", one) for one in to or ()], sweep or ()))
    line = command()
    report: Any
    if of_images:
        from subquad.bench.image_swap import ImageJob, run_image_job
        from subquad.bench.images import parse_sides

        pictures = ImageJob(
            model, chosen, tuple(image or ()), tuple(parse_sides(one.strip()) for one in size.split(",")) if size else (), layers,
            scope, weights, pretrained, batch or 1, device, dtype, seed,
        )  # fmt: skip
        report = run_image_job(pictures, out, command=line, progress=True)
    else:
        from subquad.bench.job import Job, run_job

        job = Job(
            model=model, to=chosen, recipes=tuple(recipe or ()), layers=layers, steps=distill, finetune=finetune,
            tune_original=tune_original, text=tuple(str(path) for path in text or ()), self_tokens=self_tokens, own_share=own_share,
            window=window, stride=stride, windows=windows, batch=batch, length=length, lr=lr, group=group, prompts=prompts,
            lengths=tuple(choice.integers("--lengths", lengths)), device=device, dtype=dtype, seed=seed,
        )  # fmt: skip
        report = run_job(job, out, command=line, progress=True)
    report.print()
    if out is None:
        typer.echo(
            "Nothing was written: name a folder with --out to keep " + ("the report." if of_images else "the report and the models.")
        )
    else:
        typer.echo(f"Report: {out / 'report.html'} and {out / 'report.json'}")
