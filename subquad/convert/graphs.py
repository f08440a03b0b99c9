"""Steps as CUDA graphs: the passes of a small model are thousands of short kernels, which take the host longer to ask for
than the device to run. A graph asks for all of them at once. Training steps are here, decoded tokens in `decoding.py`."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM = 3  # batches that run as they are first: they compile kernels and make what is made once
SWITCH = "SUBQUAD_GRAPHS"  # "off" runs every step as it is


class Captured(NamedTuple):
    """A graph, and the tensors that its replays read and write."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    result: Tensor
    grads: list[Tensor | None]


class Graphed:
    """A function of a batch that adds gradients to parameters, captured as a CUDA graph once batches of one shape have come.

    Only batches that hold nothing but `input_ids`, and perhaps `labels`, on a CUDA device are captured; others, and steps that
    cannot be captured (a warning says so), run as they are. Results are those of the function itself: the same kernels in the same order.

    Args:
        step: from a batch, and tensors beside it, to a tensor on the device; it must not read the device from the host, and must not
            keep a graph alive.
        parameters: what it adds gradients to.
        able: False runs every step as it is.
    """

    def __init__(self, step: Callable[..., Tensor], parameters: Iterable[nn.Parameter], *, able: bool = True) -> None:
        self.step, self.parameters = step, list(dict.fromkeys(parameters))
        self.able = able and os.environ.get(SWITCH, "auto") != "off"
        self.key: Any = None
        self.seen = 0
        self.captured: Captured | None = None

    def __call__(self, batch: dict[str, Any], *beside: Tensor) -> Tensor:
        """`beside`: tensors on the batch's device that are handed on to the function, always of the same shapes."""
        key = self._key(batch) if self.able else None
        if key != self.key:  # the graph goes: another batch needs its memory, and notes what a replay would not note anew
            self.key, self.seen, self.captured = key, 0, None
        if key is None:
            return self.step(batch, *beside)
        if self.captured is None:
            self.seen += 1
            if self.seen <= WARM or not self._capture(batch, beside):
                return self.step(batch, *beside)
        assert self.captured is not None
        before = [p.grad for p in self.parameters]
        for static, x in zip(self.captured.given, (*batch.values(), *beside)):
            static.copy_(x)
        self.captured.graph.replay()
        self._add(self.captured.grads, before)
        return self.captured.result.clone()

    def _key(self, batch: dict[str, Any]) -> Any:
        """What batches of one graph have in common; None where there can be none."""
        if not plain(batch) and set(batch) != {"input_ids", "labels"}:
            return None
        if not all(isinstance(x, Tensor) and x.device.type == "cuda" for x in batch.values()):
            return None
        return tuple((name, x.shape, x.dtype, x.device) for name, x in batch.items())

    def _capture(self, batch: dict[str, Tensor], beside: tuple[Tensor, ...]) -> bool:
        before = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None  # the graph makes them anew, always in the same place
        static, values = {name: x.clone() for name, x in batch.items()}, [x.clone() for x in beside]
        try:
            graph, result = capture(static["input_ids"].device, lambda: self.step(static, *values))
            self.captured = Captured(graph, [*static.values(), *values], result, [p.grad for p in self.parameters])
            return True
        except NotCaptured as error:
            self.able, self.key = False, None
            warnings.warn(f"training without a CUDA graph: {error}", stacklevel=3)
            return False
        finally:
            for p, grad in zip(self.parameters, before):
                p.grad = grad

    @torch.no_grad()
    def _add(self, grads: list[Tensor | None], before: list[Tensor | None]) -> None:
        """The graph's gradients, in memory that the next replay does not write, and added to those that were there."""
        there = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        fresh = torch._foreach_mul([grad for _, grad in there], 1.0) if there else []
        for (i, _), grad in zip(there, fresh):
            old = before[i]
            self.parameters[i].grad = grad if old is None else old.add_(grad)


class NotCaptured(Exception):
    """A function that cannot be captured; in words, why."""


def capture(device: torch.device, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What `run` asks of a CUDA device as a graph, none of it done yet, and what it returned.

    Raises:
        NotCaptured: it reads the device, or there is no memory for it. The device can be used as before.
    """
    with _one:
        return _capture(device, run)


def _capture(device: torch.device, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        # torch leaves a capture that was broken off on its stream, and by itself captures on the current device; "thread_local",
        # as threads that compile or load data may call CUDA meanwhile
        with torch.cuda.stream(here), torch.cuda.graph(graph, stream=_side(device), capture_error_mode="thread_local"):
            result = run()
        return graph, result
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # under the error of a capture that it broke off
            raise error.__context__ from None
        failed = f"{type(error).__name__}: {error}"
    graph.reset()
    _broken.append(graph)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())  # the old one may still wait for the end of the capture
    raise NotCaptured(failed)


_one = threading.Lock()  # threads that serve would capture on one stream, and wait for a device that another's capture lets nobody wait for
_broken: list[torch.cuda.CUDAGraph] = []  # the allocator may go on asking them whether memory is theirs


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device's captures: one, as the libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


def plain(batch: dict[str, Any]) -> bool:
    """Whether a batch is token ids and nothing else: no padding, no packed sequences, no labels of its own."""
    return set(batch) == {"input_ids"}
