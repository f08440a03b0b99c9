"""Training steps as CUDA graphs: the passes of a small model are thousands of short kernels, which take the host longer to ask for
than the device to run. A graph asks for all of them at once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARM = 3  # batches that run as they are first: they compile kernels and make what is made once
SWITCH = "SUBQUAD_GRAPHS"  # "off" runs every step as it is


class Graphed:
    """A function of a batch that adds gradients to parameters, captured as a CUDA graph once batches of one shape have come.

    Only batches that hold nothing but `input_ids` on a CUDA device are captured; others, and steps that cannot be captured (a
    warning says so), run as they are. Results are those of the function itself: the same kernels in the same order.

    Args:
        step: from a batch to a tensor on the device; it must not read the device from the host, and must not keep a graph alive.
        parameters: what it adds gradients to.
    """

    def __init__(self, step: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self.step, self.parameters = step, list(parameters)
        self.able = os.environ.get(SWITCH, "auto") != "off"
        self.key: Any = None
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: dict[str, Any], *constants: Any) -> Tensor:
        """`constants` are handed on to the function; another value makes another graph."""
        ids = batch.get("input_ids")
        if not self.able or not plain(batch) or not isinstance(ids, Tensor) or ids.device.type != "cuda":
            return self.step(batch, *constants)
        key = (ids.shape, ids.dtype, ids.device, *constants)
        if key != self.key:
            self.key, self.seen, self.graph = key, 0, None
        if self.graph is None:
            self.seen += 1
            if self.seen <= WARM or not self._capture(ids, constants):
                return self.step(batch, *constants)
        assert self.graph is not None
        before = [p.grad for p in self.parameters]
        self.ids.copy_(ids)
        self.graph.replay()
        self._add(before)
        return self.result.clone()

    def _capture(self, ids: Tensor, constants: tuple[Any, ...]) -> bool:
        before = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None  # the graph makes them anew, always in the same place
        self.ids, graph = ids.clone(), torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # the graph has memory of its own
        try:
            with torch.cuda.graph(graph):
                self.result = self.step({"input_ids": self.ids}, *constants)
            self.graph, self.grads = graph, [p.grad for p in self.parameters]
        except Exception as error:  # a mechanism may read the device, or there is no memory for it
            self.able = False
            warnings.warn(f"training without a CUDA graph: {type(error).__name__}: {error}", stacklevel=2)
        for p, grad in zip(self.parameters, before):
            p.grad = grad
        return self.able

    @torch.no_grad()
    def _add(self, before: list[Tensor | None]) -> None:
        """The graph's gradients, in memory that the next replay does not write, and added to those that were there."""
        there = [(i, grad) for i, grad in enumerate(self.grads) if grad is not None]
        fresh = torch._foreach_mul([grad for _, grad in there], 1.0) if there else []
        for (i, _), grad in zip(there, fresh):
            old = before[i]
            self.parameters[i].grad = grad if old is None else old.add_(grad)


def plain(batch: dict[str, Any]) -> bool:
    """Whether a batch is token ids and nothing else: no padding, no packed sequences, no labels of its own."""
    return set(batch) == {"input_ids"}
