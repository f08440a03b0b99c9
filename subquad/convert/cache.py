"""SubquadCache: a transformers Cache with one State per swapped layer and transformers' own cache layers for kept ones."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from subquad.checks import InputError
from subquad.contract import Attention
from subquad.rotary import Rotary
from subquad.state import State

# transformers names the argument `past_key_values` up to 5.23, and `cache` from 5.24 on.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
ROLLBACK = 256  # tokens of a recorded prompt that `crop` can take back (drafts are far shorter)


@dataclass(frozen=True)
class Tokens:
    """What one call feeds a mechanism: q, k, v ``[B, N, H, D]``, their angles, and the hidden states it projects from.

    Packed sequences come with `cu_seqlens`, and those of a padded batch with `real` ``[B, columns]``, True where tokens are.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rotary: Rotary | None = None
    hidden: Tensor | None = None
    cu_seqlens: Tensor | None = None
    real: Tensor | None = None

    def __len__(self) -> int:
        return self.q.shape[1]

    def narrow(self, start: int, stop: int) -> Tokens:
        """Tokens start … stop-1."""
        rotary = None if self.rotary is None else self.rotary.narrow(start, stop)
        hidden = None if self.hidden is None else self.hidden[:, start:stop]
        return Tokens(self.q[:, start:stop], self.k[:, start:stop], self.v[:, start:stop], rotary, hidden)

    def call(self, mechanism: Attention, state: State | None = None, return_state: bool = False) -> Any:
        given = {"rotary": self.rotary, "hidden": self.hidden, "cu_seqlens": self.cu_seqlens}
        return mechanism(self.q, self.k, self.v, **given, state=state, return_state=return_state)

    def record(self) -> tuple[dict[str, Tensor], Any]:
        """The tensors and the function that `State.crop` replays them with, from an empty state."""
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        interleaved = False
        if self.rotary is not None:
            rows, interleaved = self.q.shape[0], self.rotary.interleaved
            tensors |= {"cos": self.rotary.cos.expand(rows, -1, -1), "sin": self.rotary.sin.expand(rows, -1, -1)}

        def rebuild(held: dict[str, Tensor]) -> Tokens:
            rotary = Rotary(held["cos"], held["sin"], interleaved) if "cos" in held else None
            return Tokens(held["q"], held["k"], held["v"], rotary, held.get("hidden"))

        return tensors, rebuild


class StateLayer(CacheLayerMixin):
    """What one swapped layer keeps. Its length counts columns, padding included, as transformers' masks do; the State's own
    `length` counts each row's real tokens."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.columns = 0
        self.padding: list[int] = []  # the last columns, while recording, that were padding in every row
        self.padding_known_from = 0  # padding in earlier columns is forgotten
        self.record_past = False
        self.place: State | None = None  # where each new state is written, while a graph is made
        self.device: torch.device | None = None

    def attend(self, mechanism: Attention, tokens: Tokens, columns: int) -> Tensor:
        """The mechanism's output for `tokens`, which go on from what was seen and fill `columns` columns."""
        if self.record_past and tokens.real is not None:
            self._note_padding(tokens.real)
        self.columns += columns
        self.device, self.is_initialized = tokens.q.device, True
        if len(tokens) == 0:  # nothing but padding
            return tokens.v.new_zeros(*tokens.q.shape[:3], tokens.v.shape[-1])
        state = self.state if self.state is not None and self.state.tensors else None
        if state is not None and state.recording != self.record_past:
            state.record(self.record_past)
        if self.record_past and tokens.cu_seqlens is not None and tokens.cu_seqlens.shape[0] == 2:
            tokens = replace(tokens, cu_seqlens=None)  # one packed sequence is a plain one, and plain ones are recorded
        if not self.record_past or tokens.cu_seqlens is not None:
            o, after = tokens.call(mechanism, state, return_state=True)
            self.state = after if self.place is None else self.place.assign(after)
            return o
        return self._attend_recording(mechanism, tokens, state)

    def _note_padding(self, real: Tensor) -> None:
        """Remember which of the next columns hold no token in any row of `real` ``[B, columns]``."""
        found = (~real.any(0)).nonzero().squeeze(1) + self.columns
        noted = self.padding + found[-ROLLBACK - 1 :].tolist()
        if len(noted) > ROLLBACK:
            self.padding_known_from = noted[-ROLLBACK - 1] + 1
        self.padding = noted[-ROLLBACK:]

    def _attend_recording(self, mechanism: Attention, tokens: Tokens, state: State | None) -> Tensor:
        """As `attend`, able to roll back; of a long prompt only the last tokens are recorded, not the whole of it."""
        parts = []
        unrecorded = len(tokens) - ROLLBACK
        if unrecorded > 0:
            before = None if state is None else State(state.tensors, state.length)
            o, state = tokens.narrow(0, unrecorded).call(mechanism, before, return_state=True)
            state.record()
            parts.append(o)
            tokens = tokens.narrow(unrecorded, unrecorded + ROLLBACK)
        o, after = tokens.call(mechanism, state, return_state=True)
        self.state = after if state is not None else _recorded_from_nothing(mechanism, tokens, after)
        return torch.cat([*parts, o], 1) if parts else o

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the mechanism makes its own state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise InputError(CACHE, "a SubquadCache in which this layer is swapped", "a cache made for this model")

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` columns (a positive number is the length to keep, as before transformers 5.18)."""
        drop = self.columns - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if drop <= 0:
            return
        keep = max(self.columns - drop, 0)
        if self.state is not None:
            if self.padding_known_from > keep:
                raise InputError("tokens_to_remove", tokens_to_remove, f"to keep at least the first {self.padding_known_from} columns")
            tokens = drop - sum(column >= keep for column in self.padding)  # the State has seen no padding
            self.state = self.state.crop(-tokens) if tokens else self.state
        self.padding = [column for column in self.padding if column < keep]
        self.columns = keep

    def reset(self) -> None:
        self.state, self.columns, self.is_initialized = None, 0, False
        self.padding, self.padding_known_from = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.length.device)
            self.state = self.state.reorder(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.length.device)
            self.state = self.state.reorder(rows[indices.to(rows.device)])

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        if self.state is not None and self.device is not None:
            self.state = self.state.to(self.device)


def _recorded_from_nothing(mechanism: Attention, tokens: Tokens, after: State) -> State:
    """`after`, recorded as what `tokens` led to from an empty state (a first call has no state that records it)."""
    tensors, rebuild = tokens.record()

    def replay(state: State, held: dict[str, Tensor]) -> State:
        return rebuild(held).call(mechanism, None, return_state=True)[1]

    return State({}, torch.zeros_like(after.length)).record().recorded(after, tensors, replay)


class SubquadCache(Cache):
    """The cache of a swapped model: `State`s for swapped layers, growing (or sliding) keys and values for kept ones.

    >>> cache = SubquadCache(model)
    >>> model(tokens, past_key_values=cache, use_cache=True)
    >>> cache.nbytes

    Args:
        model: a swapped model of transformers.
    """

    def __init__(self, model: Any) -> None:
        if getattr(model, "all_swapped", False):  # the inner model's word, as all modules take long to look through
            super().__init__(layers=[StateLayer() for _ in model.layers])
            return
        from subquad.convert.swap import swapped  # swap imports this file's users

        inside = swapped(model)
        kept: list[Any] = DynamicCache(config=model.config).layers
        super().__init__(layers=[StateLayer() if index in inside else layer for index, layer in enumerate(kept)])

    @property
    def nbytes(self) -> int:
        """Bytes kept, for the whole batch."""
        total = 0
        for layer in self.layers:
            kept = () if isinstance(layer, StateLayer) else (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += layer.nbytes if isinstance(layer, StateLayer) else 0
            total += sum(x.numel() * x.element_size() for x in kept if x is not None)
        return total

    def state_layer(self, index: int) -> StateLayer:
        """What swapped layer `index` keeps."""
        layer = self.layers[index]
        if not isinstance(layer, StateLayer):
            raise InputError(CACHE, f"a SubquadCache in which layer {index} is not swapped", "a cache made for this model")
        return layer


def check_cache(cache: object) -> SubquadCache:
    """The cache a swapped model needs, or an error that says how to get one."""
    if not isinstance(cache, SubquadCache):
        should = "a SubquadCache: leave it out and the model makes one, or subquad.convert.cache.SubquadCache(model)"
        raise InputError(CACHE, type(cache).__name__, should)
    return cache
