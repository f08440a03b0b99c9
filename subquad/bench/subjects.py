"""What a job tries, one after the other: a mechanism, or a recipe, and the stages that teach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subquad.bench.choice import Choice
from subquad.checks import InputError

if TYPE_CHECKING:
    from subquad.bench.job import Job

BATCH, LENGTH = 1, 512  # of what is taught without a recipe


@dataclass(frozen=True)
class Subject:
    """One mechanism and what teaches it.

    Args:
        transfer, finetune: arguments of `distill` and `finetune`, or None.
        recipe, paper: where they are from; empty for a mechanism that was named itself.
    """

    choice: Choice
    transfer: Mapping[str, Any] | None = None
    finetune: Mapping[str, Any] | None = None
    recipe: str = ""
    paper: str = ""

    @property
    def label(self) -> str:
        return f"{self.choice.label} (recipe {self.recipe})" if self.recipe else self.choice.label

    @property
    def folder(self) -> str:
        return f"recipe-{self.recipe}" if self.recipe else self.choice.folder

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        return [stage for stage in (self.transfer, self.finetune) if stage is not None]

    def rows(self) -> list[str]:
        """File names of its rows: swapped, after transfer, after fine-tuning."""
        steps = 0 if self.transfer is None else self.transfer["steps"]
        names = [f"{self.folder}-{n}" for n in sorted({0, steps})]
        return names if self.finetune is None else [*names, f"{self.folder}-{steps}-{self.finetune['steps']}"]


def subjects(job: Job) -> list[Subject]:
    """Of the mechanisms, then of the recipes.

    Raises:
        InputError: an unknown recipe, or nothing to try.
    """
    from subquad.convert.recipe import recipe

    size = {"batch": job.batch or BATCH, "length": job.length or LENGTH}
    rate = {} if job.lr is None else {"lr": job.lr}
    transfer = {"steps": job.steps, **size, **rate} if job.steps else None
    finetune = {"steps": job.finetune, **size} if job.finetune else None
    found = [Subject(choice, transfer, finetune) for choice in job.to]
    given = {key: value for key, value in (("batch", job.batch), ("length", job.length)) if value is not None}
    for name in job.recipes:
        one = recipe(name)
        changes: dict[str, dict[str, Any]] = {
            "transfer": {**given, **rate, **_steps(job.steps)},
            "finetune": {**given, **_steps(job.finetune)},
        }
        one = one.changed({stage: values for stage, values in changes.items() if values})
        found.append(Subject(Choice(one.mechanism, dict(one.options)), one.transfer, one.finetune, one.name, one.paper))
    if not found:
        raise InputError("--to", "nothing", "at least one mechanism, or a --recipe")
    names = [one.recipe for one in found if one.recipe]
    if len(set(names)) < len(names):
        raise InputError("--recipe", ", ".join(names), "each recipe once")
    return found


def _steps(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"steps": steps}


def step_tokens(stage: Mapping[str, Any]) -> int:
    """Tokens of one batch of a stage."""
    return stage.get("batch", BATCH) * stage.get("length", LENGTH)


def stage_tokens(stage: Mapping[str, Any] | None) -> int:
    """Tokens of all steps of a stage."""
    return 0 if stage is None else stage["steps"] * step_tokens(stage) * stage.get("accumulate", 1)
