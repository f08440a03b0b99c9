"""What a job tries, one after the other: a mechanism, or a recipe, and the stages that teach it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subquad.bench.choice import Choice
from subquad.checks import InputError

if TYPE_CHECKING:
    from subquad.bench.job import Job
    from subquad.convert.recipe import Recipe

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
    def grouped(self) -> bool:
        """Whether a few layers at a time are transferred."""
        return self.transfer is not None and self.transfer.get("group") is not None

    @property
    def stages(self) -> list[Mapping[str, Any]]:
        return [stage for stage in (self.transfer, self.finetune) if stage is not None]

    def rows(self) -> list[str]:
        """File names of its rows: swapped, after transfer, after fine-tuning."""
        steps = 0 if self.transfer is None else self.transfer["steps"]
        names = [f"{self.folder}-{n}" for n in sorted({0, steps})]
        return names if self.finetune is None else [*names, f"{self.folder}-{steps}-{self.finetune['steps']}"]


def subjects(job: Job) -> list[Subject]:
    """Of the mechanisms, then of the recipes, all of which read the same number of tokens, to less than a step.

    Raises:
        InputError: an unknown recipe, or nothing to try.
    """
    from subquad.convert.recipe import recipe

    size = {"batch": job.batch or BATCH, "length": job.length or LENGTH}
    rate = {} if job.lr is None else {"lr": job.lr}
    group = {} if job.group is None else {"group": job.group}
    transfer = {"steps": job.steps, **size, **rate, **group} if job.steps else None
    share = {} if job.own_share is None else {"own_share": job.own_share}
    finetune = {"steps": job.finetune, **size, **share} if job.finetune else None
    found = [Subject(choice, transfer, finetune) for choice in job.to]
    given = [recipe(name).sharing(job.own_share).changed({"transfer": {**rate, **group}}) for name in job.recipes]
    for one in _equal(job, given):
        found.append(Subject(Choice(one.mechanism, dict(one.options)), one.transfer, one.finetune, one.name, one.paper))
    if not found:
        raise InputError("--to", "nothing", "at least one mechanism, or a --recipe")
    names = [one.recipe for one in found if one.recipe]
    if len(set(names)) < len(names):
        raise InputError("--recipe", ", ".join(names), "each recipe once")
    return found


def _equal(job: Job, given: list[Recipe]) -> list[Recipe]:
    """Recipes with the job's steps, batch and length, all with as many tokens as the one that reads most so. Stages share them as
    the recipe's file says, or as the job's steps do."""
    asked = {name: {"steps": steps} for name, steps in (("transfer", job.steps), ("finetune", job.finetune)) if steps is not None}
    made = [one.changed(asked).sized(job.batch, job.length) for one in given]
    if len(made) < 2:
        return made  # nothing to compare with
    budget = max(one.total for one in made)
    like = made if asked else given
    return [one.budgeted(budget, {name: own.tokens(name) for name in one.stages}) for one, own in zip(made, like)]


def step_tokens(stage: Mapping[str, Any]) -> int:
    """Tokens of one batch of a stage."""
    return stage.get("batch", BATCH) * stage.get("length", LENGTH)


def stage_tokens(stage: Mapping[str, Any] | None) -> int:
    """Tokens of all steps of a stage."""
    return 0 if stage is None else stage["steps"] * step_tokens(stage) * stage.get("accumulate", 1)
