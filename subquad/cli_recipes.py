"""The command line's part for recipes: `subquad recipes`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from subquad.convert.recipe import Recipe


def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe in full: a name, or a .toml file of your own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Published ways to convert a pretrained model: what each does, needs and costs.

    Examples:

      subquad recipes

      subquad recipes lolcats --json
    """
    from subquad.convert.recipe import recipe
    from subquad.convert.recipe import recipes as all_recipes

    chosen = [recipe(name)] if name is not None else list(all_recipes().values())
    if as_json:
        facts = [_facts(one) for one in chosen]
        typer.echo(json.dumps(facts if name is None else facts[0], indent=1, ensure_ascii=False))
    elif name is None:
        table = Table(header_style="bold")
        for head in ("name", "stages, tokens", "needs", "what it does"):
            table.add_column(head, no_wrap=head in ("name", "stages, tokens"), overflow="fold")
        for one in chosen:
            stages = "\n".join(f"{stage} {_millions(one.tokens(stage))}" for stage in one.stages)
            table.add_row(one.name, stages, ", ".join(one.needs), one.summary)
        Console().print(table)
    else:
        _show(chosen[0])


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {**asdict(recipe), "tokens": {stage: recipe.tokens(stage) for stage in recipe.stages}}


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.3g} M"


def _show(recipe: Recipe) -> None:
    out = Console(highlight=False)
    out.print(f"[bold]{recipe.name}[/]  {recipe.title}", soft_wrap=True)
    options = ",".join(f"{key}={value}" for key, value in recipe.options.items())
    lines = [
        recipe.summary, "", f"paper      {recipe.paper}", f"mechanism  {recipe.mechanism}{':' + options if options else ''}",
        f"needs      {', '.join(recipe.needs)}", f"cost       {recipe.cost}",
    ]  # fmt: skip
    for stage, given in recipe.stages.items():
        words = ", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in given.items())
        lines.append(f"{stage:10} {words}: {_millions(recipe.tokens(stage))} tokens")
    lines += ["", "import subquad", f'subquad.linearize(model, "{recipe.name}", tokens, out="runs/{recipe.name}")']
    out.print("\n".join(lines), markup=False, soft_wrap=True)
