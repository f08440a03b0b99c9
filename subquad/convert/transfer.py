"""One batch of attention transfer: the teacher's forward pass, with a lesson for each swapped layer inside it.

Where the teacher's layer computes attention, the student's layer is given the same inputs and its loss is differentiated at
once: layers do not depend on each other, so the memory needed is that of one layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.convert.graphs import Graphed, plain
from subquad.convert.mimic import pupil_loss
from subquad.convert.module import SwappedAttention
from subquad.convert.windows import note_tokens

Pupils = Mapping[int, SwappedAttention]
Objective = Literal["output", "weights"]
Teach = Callable[[dict[str, Any]], tuple[list[float], int]]

LOSS_WEIGHT = 1000.0  # the paper's; it keeps 16-bit gradients in range, and AdamW is indifferent to it


def transfer_loss(output: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared error over the target's mean square.

    Args:
        output, target: ``[B, N, C]``, before the output projection.
        real: boolean ``[B, N]``, False at padding, which does not count.
    """
    wide = torch.float64 if output.dtype == torch.float64 else torch.float32
    target = target.to(wide)
    error, power = (output.to(wide) - target).square().sum(-1), target.square().sum(-1)
    if real is not None:
        error, power = error.where(real, 0.0), power.where(real, 0.0)
    return error.sum() / power.sum().clamp_min(torch.finfo(wide).tiny)


@contextlib.contextmanager
def lessons(student: nn.Module, teacher: nn.Module, pupils: Pupils, objective: Objective = "output") -> Iterator[Teach]:
    """Both models made ready: frozen but for the pupils' mechanisms, in the right modes, hooked. All is undone at the end.

    Yields the function that takes a batch (the teacher's arguments), adds gradients to the mechanisms' parameters, and returns
    each pupil's loss and the number of tokens.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_frozen(student, teacher, pupils))
        if teacher is student:
            stack.enter_context(originals(student))
        given = [_Lesson(module, *_taught(teacher, module), objective) for module in pupils.values()]
        handles = [handle for lesson in given for handle in lesson.handles] + _watch_grids(student, teacher, pupils)
        for handle in handles:
            stack.callback(handle.remove)
        yield _Teacher(teacher, given)


class _Teacher:
    def __init__(self, teacher: nn.Module, given: list[_Lesson]) -> None:
        self.given = given
        self.body = getattr(teacher, "base_model", teacher)  # of transformers: without the head, which nobody needs here
        self.device = next(teacher.parameters()).device
        here = all(lesson.like.device == self.device for lesson in given)
        self.run = Graphed(self._run, [p for lesson in given for p in lesson.pupil.mechanism.parameters()], able=here)

    def __call__(self, batch: dict[str, Any]) -> tuple[list[float], int]:
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.device.type == "cpu" and not bool((mask != 0).any()):  # elsewhere it would wait for the device
            raise InputError("data", "a batch of padding alone", "batches with a token to learn from")
        batch = moved({key: x for key, x in batch.items() if key != "labels"}, self.device)
        return self.run(batch).tolist(), self.given[0].tokens

    @torch.no_grad()
    def _run(self, batch: dict[str, Any]) -> Tensor:
        mask = batch.get("attention_mask")
        real = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        for lesson in self.given:
            lesson.plain, lesson.real, lesson.loss = plain(batch), real, None
        self.body(**batch, **({"use_cache": False} if "input_ids" in batch else {}))
        losses = []
        for lesson in self.given:
            if lesson.loss is None:
                raise InputError("teacher", f"no call of {lesson.pupil.path}", "a model that runs every layer the student has swapped")
            losses.append(lesson.loss.double().to(self.device))
            lesson.loss = None
        return torch.stack(losses)


class _Lesson:
    """One layer's: catches what the teacher's attention gets and gives, and has the pupil try the same.

    Args:
        pupil: the student's layer.
        attention, projection: the teacher's attention and, in it, its output projection.
        objective: what is compared: outputs, or attention weights.
    """

    def __init__(self, pupil: SwappedAttention, attention: nn.Module, projection: nn.Module, objective: Objective) -> None:
        self.objective = objective
        self.pupil, self.like = pupil, next(pupil.mechanism.parameters())
        self.inputs: tuple[Any, Any] = ((), {})
        self.plain = False
        self.real: Tensor | None = None
        self.loss: Tensor | None = None
        self.tokens = 0
        self.handles = [
            attention.register_forward_pre_hook(self._catch, with_kwargs=True),
            projection.register_forward_pre_hook(self._try),
        ]

    def _catch(self, attention: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = (args, kwargs)

    def _try(self, projection: nn.Module, given: tuple[Tensor, ...]) -> None:
        device, dtype = self.like.device, self.like.dtype
        args, kwargs = moved(self.inputs, device, dtype)
        if self.plain and kwargs.get("attention_mask") is not None:  # merely causal: nothing in it to look for
            kwargs["attention_mask"] = None
        target, real = given[0].to(device), moved(self.real, device)
        with torch.enable_grad():
            if self.objective == "weights":
                loss = pupil_loss(self.pupil, args, kwargs)
            else:
                loss = transfer_loss(self.pupil.heads_output(*args, **kwargs), target, real)
            (LOSS_WEIGHT * loss).backward()
        self.loss, self.inputs = loss.detach(), ((), {})
        self.tokens = target.shape[0] * target.shape[1] if real is None else int(real.sum())


def moved(x: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """All tensors inside x on a device; floating-point ones in `dtype` if given."""
    if isinstance(x, Tensor):
        return x.to(device, dtype if x.is_floating_point() else None)
    if isinstance(x, Mapping):
        return {key: moved(value, device, dtype) for key, value in x.items()}
    if type(x) in (tuple, list):
        return type(x)(moved(value, device, dtype) for value in x)
    return x


def _taught(teacher: nn.Module, pupil: SwappedAttention) -> tuple[nn.Module, nn.Module]:
    """The teacher's attention that a pupil stands for, and its output projection."""
    try:
        attention = teacher.get_submodule(pupil.path)
        return attention, attention.get_submodule(pupil.projection)
    except AttributeError:
        what = f"{type(teacher).__name__} without {pupil.path}.{pupil.projection}"
        raise InputError("teacher", what, "a model with the student's modules") from None


def _watch_grids(student: nn.Module, teacher: nn.Module, pupils: Pupils) -> list[Any]:
    """Encoder layers read the grid of patches off the student's patch projection, which does not run here: the teacher's does."""
    projections = {id(p): p for p in (getattr(module, "patches", None) for module in pupils.values()) if p is not None}
    names = {id(module): name for name, module in student.named_modules()}
    handles = []
    for key, mine in projections.items():

        def note(module: nn.Module, args: Any, output: Tensor, mine: nn.Module = mine) -> None:
            mine.subquad_grid = tuple(output.shape[-2:])  # type: ignore[assignment]

        handles.append(teacher.get_submodule(names[key]).register_forward_hook(note))
    for block in (block for block in (getattr(module, "block", None) for module in pupils.values()) if block is not None):

        def note_grid(module: nn.Module, args: Any, kwargs: Any, mine: nn.Module = block) -> None:
            note_tokens(mine, args, kwargs)

        handles.append(teacher.get_submodule(names[id(block)]).register_forward_pre_hook(note_grid, with_kwargs=True))
    return handles


@contextlib.contextmanager
def _frozen(student: nn.Module, teacher: nn.Module, pupils: Pupils) -> Iterator[None]:
    """Evaluation mode, and gradients for nothing but the mechanisms' parameters."""
    modes = [(module, module.training) for model in (student, teacher) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in student.parameters()]
    try:
        student.eval(), teacher.eval()
        student.requires_grad_(False)
        for module in pupils.values():
            module.mechanism.train().requires_grad_(True)
            module.mechanism.zero_grad(set_to_none=True)
        yield
    finally:
        for module in pupils.values():
            module.mechanism.zero_grad(set_to_none=True)
        for p, flag in wanted:
            p.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """A swapped model with its original attention for a while, as its own teacher."""
    parts = [(part, type(part)) for part in model.modules() if hasattr(type(part), "plain")]
    swaps = [(name, module) for name, module in model.named_modules() if isinstance(module, SwappedAttention)]
    try:
        for part, kind in parts:
            part.__class__ = kind.plain  # type: ignore[assignment,attr-defined]
        for name, module in swaps:
            _place(model, name, module.release())
        yield
    finally:
        for name, module in swaps:
            _place(model, name, module)
        for part, kind in parts:
            part.__class__ = kind


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
