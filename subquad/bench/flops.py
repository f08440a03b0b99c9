"""Multiply–adds of an image model: convolutions and linear layers as torch counts them, attention by the mechanisms' cards.

>>> from subquad.bench.flops import flops
>>> flops(timm.create_model("ravlt_t"), 224).total / 1e9
2.61…
>>> flops(timm.create_model("l2vit_b"), 224).fvcore / 1e9              # as papers count
15.86…

"FLOPs" of papers on vision are multiply–adds, and many are fvcore's, whose rule is: products of matrices and convolutions, and 5 for
each element of a layer norm, 2 of a batch norm; nothing for activations, softmax, sums, scales and rotary. `total` leaves the norms out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from subquad.checks import InputError
from subquad.contract import Attention, Shape

PER_ELEMENT: dict[type[nn.Module], int] = {nn.LayerNorm: 5, nn.BatchNorm2d: 2}  # fvcore's, in evaluation, with scale and shift
_LINEAR = ("mm", "addmm")


@dataclass(frozen=True)
class Flops:
    """Multiply–adds of one image.

    Args:
        convolutions, linear: of these layers.
        attention: of products between tokens, and of normalisers, by the cards of this library's mechanisms; of other attention the
            products alone.
        norms: what fvcore's rule adds for norms.
    """

    convolutions: float
    linear: float
    attention: float
    norms: float

    @property
    def total(self) -> float:
        """Without norms."""
        return self.convolutions + self.linear + self.attention

    @property
    def fvcore(self) -> float:
        """With norms: fvcore's rule."""
        return self.total + self.norms


def flops(model: nn.Module, size: int | tuple[int, int] = 224, channels: int = 3) -> Flops:
    """Count the multiply–adds of a model's forward pass on one image.

    The pass is run, in evaluation mode, on the device where the model is.

    Args:
        size: rows and columns of the image; an integer for both.
        channels: of the image.

    Raises:
        InputError: a size that is none, or that the model refuses.
    """
    sides = (size, size) if type(size) is int else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(type(n) is int and n > 0 for n in sides):
        raise InputError("size", repr(size), "a positive number of pixels, or (rows, columns)")
    like = next(model.parameters())
    count = _Count()
    handles = count.watch(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # Fused attention is not known to the counter on every device; the plain one is two products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), count.counter:
            model(torch.zeros(1, channels, *sides, device=like.device, dtype=like.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("size", f"{sides[0]} × {sides[1]} ({error})", "a size that the model takes") from None
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    return count.result()


class _Count:
    """What one pass adds up to."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)
        self.cards = self.norms = 0.0
        self.inside: dict[str, float] = {}  # what torch counted within mechanisms, which their cards stand for
        self.before: Mapping[str, float] = {}

    def watch(self, model: nn.Module) -> list[Any]:
        handles = []
        for module in _outermost(model):
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(self._leave))
        for kind, each in PER_ELEMENT.items():
            handles += [m.register_forward_hook(self._norm(each)) for m in model.modules() if isinstance(m, kind)]
        return handles

    def _counts(self) -> dict[str, float]:
        return {str(op).rpartition(".")[2]: float(n) for op, n in self.counter.get_flop_counts().get("Global", {}).items()}

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.before = self._counts()

    def _leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        q, k, v = args[:3]
        assert isinstance(module, Attention)
        shape = Shape(q.shape[1], q.shape[2], q.shape[3], k.shape[2], v.shape[3], batch=q.shape[0], itemsize=q.element_size())
        self.cards += module.card.flops(shape, **module.options) / 2
        for op, n in self._counts().items():
            self.inside[op] = self.inside.get(op, 0) + n - self.before.get(op, 0)

    def _norm(self, each: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            self.norms += each * output.numel()

        return add

    def result(self) -> Flops:
        left = {op: (n - self.inside.get(op, 0)) / 2 for op, n in self._counts().items()}
        convolutions = sum(n for op, n in left.items() if "conv" in op)
        linear = sum(n for op, n in left.items() if op in _LINEAR)
        return Flops(convolutions, linear, self.cards + sum(left.values()) - convolutions - linear, self.norms)


def _outermost(model: nn.Module) -> list[Attention]:
    """Mechanisms that are not part of another one."""
    found: list[Attention] = []
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, Attention) and id(module) not in inner:
            found.append(module)
            inner.update(id(part) for part in module.modules())
    return found


def report(name: str, size: str | None = None) -> str:
    """What `subquad flops` prints; at the model's own size if none is given."""
    from subquad.bench.images import load_image_model, own_sides, parse_sides

    sides = own_sides(name) if size is None else parse_sides(size)
    model, _ = load_image_model(name, sides)
    count = flops(model, sides)
    parts = {"convolutions": count.convolutions, "linear layers": count.linear, "attention": count.attention, "all": count.total}
    rows = [f"{word:17}{value / 1e9:8.2f} G multiply–adds" for word, value in {**parts, "by fvcore's rule": count.fvcore}.items()]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return "\n".join([f"{name}, {sides[0]} × {sides[1]}: {parameters:.1f} M parameters", *rows])
