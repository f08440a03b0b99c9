"""The command line's part for training: `subquad train vision`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

train_app = typer.Typer(no_args_is_help=True, help="Train a model with one attention or several, on the same batches.")


@train_app.callback()
def _train() -> None:
    """Train a model with one attention or several, on the same batches."""


@train_app.command("vision")
def vision(
    model: Annotated[str, typer.Option(help="A model of timm, this library's included: ravlt_t, l2vit_t, vit_tiny_patch16_224, …")],
    data: Annotated[
        str, typer.Option(help="mnist, cluttered-mnist, digits, or a folder: a folder of images per class, or train/ and val/.")
    ],
    mechanism: Annotated[
        list[str] | None, typer.Option(help="Attention for the model, with options: NAME:option=value,…; repeat for several.")
    ] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="Train beside it: another model, or a mechanism; repeat for several.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with seeds 0, 1, ….")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.")] = 0.05,
    warmup: Annotated[float, typer.Option(help="Epochs of warm-up, before the cosine.")] = 1.0,
    mixup: Annotated[float, typer.Option(help="α of mixup; 0 for none.")] = 0.2,
    cutmix: Annotated[float, typer.Option(help="α of cutmix; 0 for none.")] = 0.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = 0.1,
    ema: Annotated[float, typer.Option(help="Decay of the moving average of weights; 0 for none.")] = 0.999,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    drop_path: Annotated[float, typer.Option(help="Rate of stochastic depth.")] = 0.0,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute blocks in the backward pass: less memory.")] = False,
    size: Annotated[int | None, typer.Option(help="Side of the images (default: 64; digits 32; a folder 224).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default: bfloat16 on cuda).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report, curves, weights and checkpoints.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on with what is in --out, or begin anew.")] = True,
) -> None:
    """Train an image classifier, and others beside it on the same batches.

    The same command, run again after an interruption, goes on where it stopped.

    Examples:

      subquad train vision --model ravlt_t --data mnist --epochs 3 --out runs/ravlt

      subquad train vision --model vit_tiny_patch16_224 --data cluttered-mnist --mechanism rala --baseline softmax --seeds 3
    """
    from subquad.bench.machine import command
    from subquad.bench.vision_job import VisionJob, run_job
    from subquad.train.recipe import Recipe

    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=min(warmup, epochs), mixup=mixup, cutmix=cutmix,
        smoothing=smoothing, ema=ema, clip=clip, checkpointing=checkpointing,
    )  # fmt: skip
    job = VisionJob(
        model, data, recipe, tuple(baseline or ()), tuple(mechanism or ()), seeds=seeds, size=size, device=device, precision=precision,
        drop_path=drop_path,
    )  # fmt: skip
    try:
        report = run_job(job, out, command=command(), fresh=not resume)
    except KeyboardInterrupt:
        kept = "nothing was kept, as there is no --out" if out is None else f"kept in {out}; the same command goes on from there"
        typer.echo(f"subquad: stopped; {kept}", err=True)
        raise typer.Exit(130) from None
    report.print()
    if out is None:
        typer.echo("Nothing was written: name a folder with --out to keep the report and the weights.")
    else:
        typer.echo(f"Report: {out / 'report.html'} and {out / 'report.json'}; weights: {out / 'weights'}")
