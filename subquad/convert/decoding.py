"""Decoded tokens as CUDA graphs. States of fixed size let one graph serve every further token of a cache: it reads and writes them where
they are, and the host asks for one thing where it asked for thousands of short kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from subquad.convert.cache import CACHE, StateLayer, SubquadCache
from subquad.convert.graphs import SWITCH, WARM, NotCaptured, capture
from subquad.convert.module import SwappedAttention
from subquad.state import State

DEVICE = "cuda"
TRIES = 3  # captures of one model that may fail, for want of memory perhaps: each takes time, and leaves a broken graph
Forward = Callable[..., Any]  # the inner model's own, without what the swapped one does before it


def decoded(model: Any, forward: Forward, ids: Tensor, positions: Tensor | None, cache: SubquadCache, options: Mapping[str, Any]) -> Any:
    """What `forward` gives for one more token of each row of `cache`, from the fourth such token on by a graph; None where there is none.

    A graph belongs to a cache and goes with it, or with the model. It needs states of fixed size in every layer, a CUDA device, and no
    gradients; where a model with all of these cannot be captured, a warning says why, and it is seldom tried again. While a graph
    serves a cache, its `State`s are written in place.

    Args:
        ids: ``[B, 1]``, real tokens in every row.
        positions: their position ids ``[B, 1]``; by default that of the next column.
        options: the other arguments of this call; any that is set lets it run as it is.
    """
    given = {key: value for key, value in options.items() if value is not None and key != "cache_position"}
    plain = all(value is False for value in given.values())
    if ids.device.type != DEVICE or not plain or not _may_capture(ids.device) or _failed.get(model, 0) >= TRIES:
        return None
    return _steps.setdefault(cache, Steps())(model, partial(forward, **given), ids, positions, cache, tuple(given))


def _may_capture(device: torch.device) -> bool:
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(device.type)  # its copies of weights are made and dropped outside the graph
        or torch.compiler.is_compiling()
        or torch.cuda.is_current_stream_capturing()
        or os.environ.get(SWITCH, "auto") == "off"
    )


class Made:
    """What a model is made of: a graph does what the modules did, and reads the weights where they were, when it was captured."""

    def __init__(self, model: nn.Module) -> None:
        parts = list(model.modules())
        self.tables = _hooks(model) + [held for x in parts for held in (x._modules, x._parameters, x._buffers) if held]
        self.count = sum(map(len, self.tables))
        self.values = [table.values() for table in self.tables if table]  # views, which show what is there now
        self.held = list(chain.from_iterable(self.values))
        self.weights = [x for x in self.held if isinstance(x, Tensor)]
        self.places = [x.data_ptr() for x in self.weights]
        self.adapted = [x for x in parts if hasattr(x, "merged_adapters")]  # peft's layers
        self.switches = self._switches()

    def _switches(self) -> list[tuple[Any, ...]]:
        """What peft's layers choose by at each call, merged weights being where unmerged ones were."""
        return [(x.disable_adapters, *x.active_adapters, None, *x.merged_adapters) for x in self.adapted]  # type: ignore[misc]

    @property
    def same(self) -> bool:
        """Whether weights, modules, adapters in use and hooks are those that they were, and the weights where they were."""
        there = sum(map(len, self.tables)) == self.count and all(map(is_, chain.from_iterable(self.values), self.held))
        return there and [x.data_ptr() for x in self.weights] == self.places and self._switches() == self.switches


@dataclass
class Captured:
    """A graph, the tensors that its replays read and write, and the model that it stands for."""

    graph: Any
    ids: Tensor
    positions: Tensor
    hidden: Tensor
    states: list[State]
    made: Made

    def goes_on(self, layers: list[StateLayer]) -> bool:
        """Whether the cache is as the last replay left it."""
        return all(layer.state is place and not layer.record_past for layer, place in zip(layers, self.states))

    def __call__(self, ids: Tensor, positions: Tensor, layers: list[StateLayer]) -> Tensor:
        """The hidden states of one more token of each row; the layers are then one column further."""
        for layer, place in zip(layers, self.states):
            if layer.state is not place:  # the first time, and where rows were reordered or another pass came between
                place.assign(_there(layer))
            layer.state, layer.columns = place, layer.columns + 1
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.hidden.clone()


class Steps:
    """The single tokens of one cache."""

    def __init__(self) -> None:
        self.key: Any = None
        self.forms: list[Any] = []
        self.seen = 0
        self.able = True
        self.output: Any = None  # the class of what the model returns
        self.graphs: WeakKeyDictionary[nn.Module, Captured] = WeakKeyDictionary()  # one, which goes with its model

    def __call__(
        self, model: Any, forward: Forward, ids: Tensor, positions: Tensor | None, cache: SubquadCache, named: tuple[str, ...]
    ) -> Any:
        layers = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
        key: Any = (ref(model), model.training, ids.shape, ids.device, torch.is_inference_mode_enabled(), named)
        captured = self.graphs.get(model)
        changed = key != self.key or (captured is not None and not captured.made.same)
        if changed or captured is None or not captured.goes_on(layers):
            forms = [_form(layer) for layer in layers]
            if changed or forms != self.forms:
                self.key, self.forms, self.seen, captured = key, forms, 0, None
                self.graphs.clear()
        if not self.able or len(layers) < len(cache.layers) or None in self.forms:
            return None
        if positions is None:
            positions = ids.new_full(ids.shape, cache.get_seq_length())
        positions = positions.expand(ids.shape)
        if captured is None:
            self.seen += 1
            if self.seen <= WARM:
                return self._as_it_is(forward, ids, positions)
            captured = self._capture(model, forward, ids, positions, layers)
            if captured is None:
                return None
            self.graphs[model] = captured
        return self.output(last_hidden_state=captured(ids, positions, layers), **{CACHE: cache})

    def _as_it_is(self, forward: Forward, ids: Tensor, positions: Tensor) -> Any:
        out = forward(input_ids=ids, position_ids=positions)
        self.output = type(out)
        self.able = isinstance(out, Mapping) and set(out) == {"last_hidden_state", CACHE}  # nothing else was asked for
        return out

    def _capture(self, model: nn.Module, forward: Forward, ids: Tensor, positions: Tensor, layers: list[StateLayer]) -> Captured | None:
        self.able = _fixed(model)
        if not self.able:
            return None
        ids, positions = ids.clone(), positions.clone()
        states = [_there(layer).map(Tensor.clone) for layer in layers]

        def run() -> Tensor:
            """The pass, whose layers write their next states where their last ones were; the cache knows nothing of it."""
            before = [(layer.state, layer.columns) for layer in layers]
            try:
                for layer, place in zip(layers, states):
                    layer.state = layer.place = place
                hidden: Tensor = forward(input_ids=ids, position_ids=positions).last_hidden_state
            finally:
                for layer, (state, columns) in zip(layers, before):
                    layer.state, layer.columns, layer.place = state, columns, None
            return hidden

        try:
            graph, hidden = capture(ids.device, run)
        except NotCaptured as error:
            self.able, _failed[model] = False, _failed.get(model, 0) + 1
            warnings.warn(f"decoding without a CUDA graph: {error}", stacklevel=5)
            return None
        return Captured(graph, ids, positions, hidden, states, Made(model))


_steps: WeakKeyDictionary[SubquadCache, Steps] = WeakKeyDictionary()
_failed: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # captures


def _form(layer: StateLayer) -> Any:
    """What a layer's state has to be like for a graph to serve it; None where there is none to write into, or a record is kept of it."""
    state = layer.state
    if state is None or not state.tensors or layer.record_past or state.recording:
        return None
    return tuple((name, x.shape, x.dtype, x.device) for name, x in state.tensors.items())


def _fixed(model: nn.Module) -> bool:
    """Whether all layers keep states of fixed size, and nobody moves weights or watches modules."""
    layers = [module for module in model.modules() if isinstance(module, SwappedAttention)]
    moved = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate's, that fetch weights
    watched = any(getattr(hook, "__name__", "") != "output_capturing_hook" for hooks in _hooks(model) for hook in hooks.values())
    return all(module.mechanism.card.recurrent for module in layers) and not moved and not watched


def _there(layer: StateLayer) -> State:
    assert layer.state is not None, "a layer without a state has no form"
    return layer.state


def _hooks(model: nn.Module) -> list[Mapping[Any, Any]]:
    of_all = torch.nn.modules.module._global_forward_pre_hooks, torch.nn.modules.module._global_forward_hooks
    return [*of_all, *(hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks))]
