"""Recipes: how a published conversion goes, as a small file each; and `linearize`, which carries one out.

subquad/convert/recipes/NAME.toml
    title, paper, summary, needs = [words, …], cost
    [mechanism]   name, and its options
    [transfer]    steps, lr, batch, length, objective, group (of `distill`; left out where there is nothing to transfer)
    [finetune]    steps, lr, rank, targets, loss, …          (of `finetune`)
"""

from __future__ import annotations

import inspect
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from subquad import contract
from subquad.checks import InputError, nearest
from subquad.convert.distill import DistillResult, check_groups, check_objective, distill, learning
from subquad.convert.feed import Feed
from subquad.convert.finetune import LOSSES, SCHEDULES, FinetuneResult, finetune
from subquad.convert.lora import TARGETS, merge_lora, projections
from subquad.convert.run import check_counts, seeded
from subquad.convert.sensitivity import auto_keep, check_keep, choose_layers
from subquad.convert.swap import check_unswapped, find_host, put_back, restore, swap, swapped

WORDS = ("title", "paper", "summary", "cost")
STAGES: dict[str, tuple[str, ...]] = {
    "transfer": ("steps", "lr", "batch", "length", "objective", "group"),
    "finetune": (
        "steps", "lr", "batch", "accumulate", "length", "targets", "rank", "alpha", "train_mechanism", "loss", "kl_weight", "own_share",
        "schedule", "warmup", "max_grad_norm",
    ),
}  # fmt: skip
_WORDS = {"loss": LOSSES, "schedule": SCHEDULES}
_SHARES = ("kl_weight", "own_share", "warmup")
_COMPARED = 4  # batches that layers are compared on
_CALLS: dict[str, Callable[..., Any]] = {"transfer": distill, "finetune": finetune}


@dataclass(frozen=True)
class Recipe:
    """A conversion: a mechanism, and the stages that teach it.

    Args:
        needs: what it asks of the model and the text, in words.
        cost: in words.
        mechanism, options: as `swap` takes them.
        transfer, finetune: arguments of `distill` and `finetune`; None leaves the stage out.
    """

    name: str
    title: str
    paper: str
    summary: str
    cost: str
    needs: tuple[str, ...]
    mechanism: str
    options: Mapping[str, Any]
    transfer: Mapping[str, Any] | None = None
    finetune: Mapping[str, Any] | None = None

    @property
    def stages(self) -> dict[str, Mapping[str, Any]]:
        """The stages there are, in order."""
        return {name: stage for name in STAGES if (stage := getattr(self, name)) is not None}

    def tokens(self, stage: str) -> int:
        """Tokens that a stage reads."""
        given = {**_defaults(stage), **self.stages[stage]}
        return given["steps"] * given["batch"] * given["length"] * given.get("accumulate", 1)

    @property
    def total(self) -> int:
        """Tokens that all stages read."""
        return sum(map(self.tokens, self.stages))

    def sized(self, batch: int | None, length: int | None) -> Recipe:
        """With `batch` sequences at a time, of `length` tokens; None keeps the recipe's own. A step of fine-tuning accumulates as many
        batches as make the sequences that the recipe reads in a step; a step of the transfer is one batch."""
        changes: dict[str, dict[str, int]] = {name: {} if length is None else {"length": length} for name in self.stages}
        for name, stage in self.stages.items():
            if batch is not None:
                given = {**_defaults(name), **stage}
                changes[name]["batch"] = batch
                if "accumulate" in given:
                    changes[name]["accumulate"] = max(1, -(-given["batch"] * given["accumulate"] // batch))
        return self.changed(changes)

    def budgeted(self, tokens: int, shares: Mapping[str, float]) -> Recipe:
        """With the steps that read `tokens` in all, which is exact to half a step of the last stage.

        Args:
            tokens: at least a step of every stage.
            shares: of the stages, in any unit.
        """
        sizes = {name: self.tokens(name) // stage["steps"] for name, stage in self.stages.items()}
        made, left = {}, tokens
        for index, (name, size) in enumerate(sizes.items()):
            later = list(sizes)[index + 1 :]
            part = left * shares[name] / sum(shares[one] for one in (name, *later))
            most = (left - sum(sizes[one] for one in later)) // size if later else math.inf
            made[name] = max(1, int(min(round(part / size), most)))
            left -= made[name] * size
        return self.changed({name: {"steps": steps} for name, steps in made.items()})

    def scaled(self, steps: int) -> Recipe:
        """With `steps` in all, shared out to the stages in the recipe's proportion, at least one each."""
        check_counts(steps=steps)
        if len(self.stages) == 1:
            return self.changed({key: {"steps": steps} for key in self.stages})
        assert self.transfer is not None and self.finetune is not None
        if steps < 2:
            raise InputError("steps", steps, f"at least 2: {self.name} has two stages")
        whole = self.transfer["steps"] + self.finetune["steps"]
        first = min(max(1, round(steps * self.transfer["steps"] / whole)), steps - 1)
        return self.changed({"transfer": {"steps": first}, "finetune": {"steps": steps - first}})

    def sharing(self, own_share: float | None) -> Recipe:
        """With this share of the model's own text in fine-tuning, and no other; None: where there is no such text."""
        if self.finetune is None:
            return self
        left = {key: value for key, value in self.finetune.items() if key != "own_share"}
        return replace(self, finetune=left if own_share is None else {**left, "own_share": own_share})

    def changed(self, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """With other values in its stages; those of 0 steps, and those it does not have, are left out."""
        made = {name: {**stage, **changes.get(name, {})} for name, stage in self.stages.items()}
        left = {name: stage for name, stage in made.items() if stage["steps"]}
        return replace(self, transfer=left.get("transfer"), finetune=left.get("finetune"))


@cache
def recipes() -> dict[str, Recipe]:
    """The recipes that come with the library, by name."""
    folder = resources.files("subquad") / "convert" / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name.removesuffix(".toml"))
    return {(name := file.name.removesuffix(".toml")): parse(name, file.read_text(encoding="utf-8"), file.name) for file in files}


def recipe(name: str | Path | Recipe) -> Recipe:
    """A recipe by name, or from a file of one's own, which ends with .toml.

    Raises:
        InputError: no such recipe, or a file that is not one; the message names the file and what in it.
    """
    if isinstance(name, Recipe):
        return name
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in recipes():
            raise nearest("recipe", str(name), recipes(), "recipe, or a .toml file")
        return recipes()[str(name)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("recipe", path, f"a recipe's file ({getattr(error, 'strerror', None) or error})") from None
    return parse(path.stem, text, str(path))


def parse(name: str, text: str, file: str) -> Recipe:
    """A recipe from the text of its file."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {file}", f"TOML that cannot be read ({error})", "a file of valid TOML") from None
    _known(file, "", given, (*WORDS, "needs", "mechanism", *STAGES))
    title, paper, summary, cost = (_typed(file, key, given.get(key), str) for key in WORDS)
    needs = _typed(file, "needs", given.get("needs"), list)
    options = dict(_typed(file, "[mechanism]", given.get("mechanism"), dict))
    mechanism = _typed(file, "mechanism.name", options.pop("name", None), str)
    if mechanism not in contract.mechanisms():
        raise nearest(f"recipe {file}", mechanism, contract.mechanisms(), "mechanism")
    _known(file, "mechanism.", options, contract.option_defaults(contract.mechanism(mechanism)))
    stages = {key: _stage(file, key, given[key]) for key in STAGES if key in given}
    if not stages:
        raise InputError(f"recipe {file}", "no stage", f"{' or '.join(f'[{key}]' for key in STAGES)}")
    return Recipe(
        name, title, paper, summary, cost, tuple(map(str, needs)), mechanism, options, stages.get("transfer"), stages.get("finetune")
    )  # fmt: skip


def _stage(file: str, name: str, given: Any) -> dict[str, Any]:
    stage = dict(_typed(file, f"[{name}]", given, dict))
    _known(file, f"{name}.", stage, STAGES[name])
    _typed(file, f"{name}.steps", stage.get("steps"), int)
    for key, value in stage.items():
        default = _defaults(name)[key]
        kind = {bool: bool, float: int | float, str: str, tuple: list}.get(type(default), int)
        _typed(file, f"{name}.{key}", value, kind)
        if key in _WORDS and value not in _WORDS[key]:
            raise nearest(f"recipe {file}", value, _WORDS[key], f"{name}.{key}")
        if type(value) in (int, float):
            good, should = _range(key, kind, value)
            if not good:
                raise InputError(f"recipe {file}", f"{name}.{key} = {value}", should)
    return stage


def _range(key: str, kind: Any, value: float) -> tuple[bool, str]:
    """Whether a stage takes a number, which shows before any stage has run; and what it takes."""
    if key == "own_share":
        return 0 < value <= 1, "a number above 0 and at most 1"
    if key in _SHARES:
        return 0 <= value <= 1, "a number from 0 to 1"
    if kind is int:
        least = 0 if key == "steps" else 1  # a stage of no steps is left out
        return value >= least, f"an integer of at least {least}"
    return 0 < value < math.inf, "a positive number"


def _defaults(stage: str) -> dict[str, Any]:
    return {key: one.default for key, one in inspect.signature(_CALLS[stage]).parameters.items() if key in STAGES[stage]}


def _known(file: str, place: str, given: Mapping[str, Any], known: Any) -> None:
    for key in given:
        if key not in known:
            raise nearest(f"recipe {file}", f"{place}{key}", [f"{place}{name}" for name in known], "key")


def _typed(file: str, key: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        was = f"no {key}" if value is None else f"{key} = {value!r}"
        names = {str: "a text", list: "a list", dict: "a table", int: "an integer", bool: "true or false"}
        raise InputError(f"recipe {file}", was, names.get(kind, "a number"))
    return value


# ---- carrying one out -------------------------------------------------------------------------------------------------


@dataclass
class LinearizeResult:
    """How each stage went; None for a stage that the recipe does not have, or that had nothing to learn."""

    recipe: Recipe
    transfer: DistillResult | None = None
    finetune: FinetuneResult | None = None


def linearize(
    model: Any,
    recipe: str | Path | Recipe,
    data: Any,
    *,
    layers: Any = "all",
    steps: int | Mapping[str, int] | None = None,
    batch: int | None = None,
    length: int | None = None,
    group: int | None = None,
    own: Tensor | None = None,
    out: str | Path | None = None,
    save_every: int = 25,
    seed: int = 0,
    progress: bool = True,
) -> LinearizeResult:
    """Convert a pretrained causal language model by a recipe, in place: swap, attention transfer, fine-tuning, merge.

    >>> subquad.linearize(model, "lolcats", tokens, steps=400, out="runs/lolcats")
    >>> model.save_pretrained("folder")

    Args:
        recipe: a name (`subquad recipes` lists them), a .toml file, or a Recipe.
        data: as `distill` and `finetune` take them, for both stages, each of which reads them from their beginning.
        layers: as `swap` takes them, or "auto:K": all but the K whose replacement alone costs most on the first batches.
        steps: None for the recipe's own; an integer for both stages together, in the recipe's proportion; or
            {"transfer": …, "finetune": …}, 0 leaving a stage out.
        batch, length: of the sequences at a time, instead of the recipe's; fine-tuning accumulates batches until a step has read as
            many sequences as the recipe's.
        group: layers on the device at a time in the transfer, as `distill` takes it; `out` is needed then.
        own: token ids ``[T]`` that the model wrote, which fine-tuning takes beside `data` as `finetune` does; the transfer reads `data`.
        out: folder for checkpoints, a folder in it for each stage. The same call on the same model, made again after the
            process died, goes on; made after the end, it gives the converted model again.
        seed: of new parameters, adapters and data.

    Raises:
        InputError: as `swap`, `distill` and `finetune`. The model's attention is then what it was.
    """
    chosen = _chosen(recipe, steps, batch, length)
    check_counts(save_every=save_every)
    if group is not None:
        chosen = grouped(chosen, group)
    if isinstance(data, Iterator) and len(chosen.stages) + (auto_keep(layers) is not None) > 1:
        should = "token ids, or an iterable that begins again: each stage reads it from its beginning"
        raise InputError("data", f"{type(data).__name__}, which can be read once", should)
    if not find_host(model).causal:
        raise InputError("model", type(model).__name__, "a causal decoder")
    if chosen.finetune is not None:
        projections(model, chosen.finetune.get("targets", TARGETS))  # before the first stage takes its time
    if own is not None:
        _check_own(model, data, own, chosen, seed)
    keep = auto_keep(layers)
    if keep is not None:
        _check_measurable(model, data, chosen, keep, out, seed)
        feed, cache = _first_batches(model, data, chosen, seed), None if out is None else Path(out) / "layers.json"
        layers = choose_layers(model, feed, chosen.mechanism, keep, chosen.options, seed=seed, cache=cache, progress=progress)
    before = swapped(model)  # layers of another kind, which stay
    with seeded(seed, -2):
        swap(model, chosen.mechanism, layers=layers, **chosen.options)
    result = LinearizeResult(chosen)
    common: dict[str, Any] = {"save_every": save_every, "seed": seed, "progress": progress, "take_finished": True}
    try:
        for name, stage in chosen.stages.items():
            place = None if out is None else Path(out) / name
            if name == "finetune":
                result.finetune = finetune(model, data, **stage, own=own, out=place, **common)
                merge_lora(model)
            elif learning(model):
                result.transfer = distill(model, model, data, **stage, out=place, **common)
    except BaseException:
        restore(model)
        put_back(model, before)
        raise
    return result


def grouped(chosen: Recipe, group: int) -> Recipe:
    """With a transfer of `group` layers at a time."""
    check_counts(group=group)
    if chosen.transfer is None:
        raise InputError("group", group, "a recipe and steps with something to transfer, as nothing is here")
    return chosen.changed({"transfer": {"group": group}})


def _check_own(model: Any, data: Any, own: Any, chosen: Recipe, seed: int) -> None:
    """Refuse what the fine-tuning would refuse of the model's own text."""
    if chosen.finetune is None:
        raise InputError("own", "given", "a recipe and steps with fine-tuning, as nothing is tuned here")
    given = {**_defaults("finetune"), **chosen.finetune}
    Feed(data, given["steps"], given["batch"], given["length"], seed, model, own, given["own_share"])


def _check_measurable(model: Any, data: Any, chosen: Recipe, keep: int, out: str | Path | None, seed: int) -> None:
    """Refuse, before layers are measured, what the swap or a stage would refuse whichever layers are chosen."""
    check_unswapped(model)
    check_keep(model, keep)
    lengths = {}
    for name, stage in chosen.stages.items():
        given = {**_defaults(name), **stage}
        lengths[name] = Feed(data, given["steps"], given["batch"], given["length"], seed, model).length
    with seeded(seed, -2):
        swap(model, chosen.mechanism, **chosen.options)
    try:
        pupils = learning(model)
        if chosen.transfer is not None and pupils:
            check_objective(chosen.transfer.get("objective", "output"), pupils, lengths["transfer"], spare=keep)
    finally:
        restore(model)
    if chosen.transfer is not None and pupils and chosen.transfer.get("group") is not None:
        check_groups(model, chosen.transfer["group"], out)


def _first_batches(model: Any, data: Any, chosen: Recipe, seed: int) -> list[dict[str, Any]]:
    """What layers are compared on."""
    given = next(iter(chosen.stages.values()), {})
    feed = Feed(data, _COMPARED, given.get("batch", 1), given.get("length", 512), seed, model)
    return [feed[step] for step in range(_COMPARED)]


def _chosen(given: str | Path | Recipe, steps: int | Mapping[str, int] | None, batch: int | None, length: int | None) -> Recipe:
    chosen = recipe(given)
    if isinstance(steps, Mapping):
        for key, value in steps.items():
            if key not in STAGES:
                raise nearest("steps", key, STAGES, "stage")
            if type(value) is not int or value < 0:
                raise InputError("steps", f"{key}: {value!r}", "an integer of at least 0")
        chosen = chosen.changed({key: {"steps": value} for key, value in steps.items()})
    elif steps is not None:
        chosen = chosen.scaled(steps)
    check_counts(**{key: value for key, value in (("batch", batch), ("length", length)) if value is not None})
    return chosen.sized(batch, length)
