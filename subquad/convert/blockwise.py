"""Attention transfer a few layers at a time, for models that do not fit on the device: block-wise training.

A group of layers is brought to the device and learns from all batches; what it makes of them, the hidden states that the next
group starts from, is kept on the disk. Layers do not depend on each other in attention transfer, so the result is that of
`distill` on the whole model.

Zhang et al., LoLCATs (arXiv 2410.10254), section 3.3, which trains a model of 405 billion parameters so.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.convert.checkpoint import SHOULD, Checkpoint, Checkpoints
from subquad.convert.run import Bar, seeded
from subquad.convert.transfer import Objective, Pupils, lessons
from subquad.files import REFUSALS, reason, whole, writing


class Hidden:
    """The hidden states between two groups, one file a step, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, hidden: Tensor) -> None:
        with writing("out", self.folder, "a folder that can be written to, with room for the hidden states of all steps"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(self.path(step)) as draft:
                save_file({"hidden": hidden.detach().cpu().contiguous()}, draft)

    def load(self, step: int) -> Tensor:
        try:
            return load_file(self.path(step))["hidden"]
        except (*REFUSALS, KeyError) as error:
            was = f"damaged or missing hidden states {self.path(step)} ({reason(error)})"
            raise InputError("out", was, "the whole file, or another folder") from None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def body_of(model: nn.Module) -> Any:
    """The inner model of a decoder, whose layers can be run a few at a time from hidden states."""
    body = getattr(model, "base_model", model)
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(body, "embed_tokens") or not hasattr(body, "norm"):
        raise InputError("model", type(model).__name__, "a decoder of transformers (layers, embed_tokens, norm), to be taught in groups")
    kinds = set(getattr(body.config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise InputError("model", f"layers of kinds {', '.join(sorted(kinds))}", "layers of one kind, to be taught in groups")
    return body


@contextlib.contextmanager
def only(body: Any, first: int, stop: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A body cut to the layers first … stop − 1, on the device, without its last norm. Yields a dict that holds, after each of
    its forward passes, what came out, as "hidden"."""
    layers, norm, rotary = body.layers, body.norm, getattr(body, "rotary_emb", None)
    held: dict[str, Any] = {}
    part = nn.ModuleList(layers[first:stop])
    before = next(part.parameters()).device
    handle = body.register_forward_hook(lambda module, args, output: held.update(hidden=output[0]))
    try:
        body.layers, body.norm = part.to(device), nn.Identity()
        if rotary is not None:
            body.rotary_emb = rotary.to(device)
        yield held
    finally:
        handle.remove()
        body.layers, body.norm = layers, norm
        part.to(before)
        if rotary is not None:
            rotary.to(before)


def groups_of(pupils: Pupils, layers: int, size: int) -> list[tuple[int, int, Pupils]]:
    """(first layer, one behind the last, the pupils among them); groups without a pupil at the end are left out."""
    cut = [(first, min(first + size, layers)) for first in range(0, layers, size)]
    found: list[tuple[int, int, Pupils]] = [(a, b, {i: x for i, x in pupils.items() if a <= i < b}) for a, b in cut]
    while found and not found[-1][2]:
        found.pop()
    return found


def distill_in_groups(
    student: nn.Module, teacher: nn.Module, feed: Any, pupils: Pupils, size: int, *, device: torch.device, steps: int, lr: float,
    out: Path, save_every: int, seed: int, settings: dict[str, Any], progress: bool, take_finished: bool,
    objective: Objective = "output",
) -> Any:  # fmt: skip
    """`distill`, a group of `size` layers at a time: arguments as there, checked already.

    Groups are kept in ``out/group-000`` …, hidden states in ``out/hidden-001`` …, of which two are there at most.
    """
    from subquad.convert.distill import DistillResult, _Run

    body, bodies = body_of(teacher), {id(body_of(model)): body_of(model) for model in (teacher, student)}
    results, source = [], None
    todo = groups_of(pupils, len(body.layers), size)

    def start(step: int) -> dict[str, Any]:
        """What a group begins with: hidden states from the disk, or the embeddings."""
        batch = {**feed[step], "use_cache": False}
        ids = batch.pop("input_ids")
        embed = body.embed_tokens
        return {**batch, "inputs_embeds": embed(ids.to(embed.weight.device)).detach() if source is None else source.load(step)}

    for number, (first, stop, some) in enumerate(todo):
        target = Hidden(out / f"hidden-{number + 1:03d}") if number + 1 < len(todo) else None
        with contextlib.ExitStack() as stack:
            mine = {**settings, "group": f"layers {first}-{stop - 1}"}
            keeper = Checkpoints(out / f"group-{number:03d}", mine, steps, take_finished=True)
            if target is None and not take_finished and _finished(keeper, steps):
                raise InputError("out", f"{out}, a finished run", SHOULD)
            if some:
                teach: Any = stack.enter_context(lessons(student, teacher, some, objective))
                teach.device = device
                for module in some.values():  # a model that is its own teacher does not hold them meanwhile
                    stack.callback(module.mechanism.to, next(module.mechanism.parameters()).device)
                    module.mechanism.to(device)
            held, *_ = [stack.enter_context(only(one, first, stop, device)) for one in bodies.values()]
            bar = stack.enter_context(Bar(f"distill layers {first}-{stop - 1}", steps, progress))
            if not some:  # what it makes of the states is needed all the same
                assert target is not None
                if not _finished(keeper, steps):  # otherwise a later group may have read them, and what they were made of is gone
                    if keeper.load() is None:
                        keeper.save(Checkpoint(0, {}, 0.0))  # marks the folder as this run's
                    for step in range(steps):
                        if not target.path(step).exists():
                            _run(body, start(step), device)
                            target.save(step, held["hidden"])
                    keeper.save(Checkpoint(steps, {}, 0.0))
            else:
                run = _Run(some, steps, lr, keeper)
                while run.step < steps:
                    with seeded(seed, run.step):
                        losses, tokens = teach(start(run.step))
                    if target is not None:
                        target.save(run.step, held["hidden"])
                    run.advance(losses, tokens)
                    bar.advance(run)
                    if run.step % save_every == 0 or run.step == steps:
                        run.save()
                results.append(run.result())
        if source is not None:
            source.remove()
        source = target
    layer_losses = {index: losses for result in results for index, losses in result.layer_losses.items()}
    losses = [sum(row) / len(row) for row in zip(*layer_losses.values())]
    begun = next((i for i, result in enumerate(results) if result.steps > result.resumed_from), len(results) - 1)
    seconds = sum(result.seconds for result in results)
    return DistillResult(steps, losses, layer_losses, results[0].tokens, seconds, results[begun].resumed_from)


def _finished(keeper: Checkpoints, steps: int) -> bool:
    saved = keeper.load()
    return saved is not None and saved.step >= steps


@torch.no_grad()
def _run(body: nn.Module, batch: dict[str, Any], device: torch.device) -> None:
    body(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in batch.items() if key != "labels"})
