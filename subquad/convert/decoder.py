"""Swapped attention in transformers' decoders (Llama, Mistral, Qwen2, Qwen3 and models built like them).

The projections, their biases and the query and key norms are the model's own. Queries and keys reach the mechanism unrotated,
with the angles beside them. Padded batches are packed: padding reaches no mechanism, and its outputs are zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.convert.cache import CACHE, SubquadCache, Tokens, check_cache
from subquad.convert.decoding import decoded
from subquad.convert.module import SwappedAttention
from subquad.rotary import Rotary


class Padding(NamedTuple):
    """Where the real tokens of a padded batch are.

    places: ``[total]``, where they are in the flattened ``[B·N]``. cu_seqlens: ``[S + 1]``, their offsets by sequence.
    real: ``[B, N]``, True at real tokens; None if every place holds one.
    """

    places: Tensor
    cu_seqlens: Tensor
    real: Tensor | None = None

    @staticmethod
    def of(real: Tensor) -> Padding:
        """From a boolean ``[B, N]``, True at real tokens."""
        ends = real.sum(1).cumsum(0)
        return Padding(real.flatten().nonzero().squeeze(1), torch.cat([ends.new_zeros(1), ends]).int(), real)

    def pack(self, x: Tensor) -> Tensor:
        """``[B, N, …]`` to ``[1, total, …]``."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor, batch: int, tokens: int) -> Tensor:
        """``[1, total, …]`` to ``[B, N, …]``, zero at padding."""
        flat = x.new_zeros(batch * tokens, *x.shape[2:]).index_copy(0, self.places, x[0])
        return flat.unflatten(0, (batch, tokens))


class SwappedDecoderAttention(SwappedAttention):
    """A decoder's `self_attn` with a causal mechanism."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module  # if the family has them
    k_norm: nn.Module

    def __init__(self, original: Any, mechanism: Any, path: str) -> None:
        super().__init__(original, mechanism, path)
        self.layer_idx = original.layer_idx
        self.config = original.config
        # Families that scale scores by another constant than D^-½ get it through the queries.
        self.query_scale = original.scaling * mechanism.head_dim**0.5

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.heads_output(hidden_states, *args, **kwargs)), None

    def heads_output(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        cache: SubquadCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What goes into `o_proj`: ``[B, N, H·D]``.

        `subquad_padding` says where padding is; the swapped model passes it. Without it (a layer called by itself) padding is
        read off the four-dimensional mask.
        """
        batch, columns = hidden_states.shape[:2]
        if "subquad_padding" in kwargs:
            padding = kwargs["subquad_padding"]
        else:
            padding = _padding_of_mask(attention_mask, columns)
        tokens = self._tokens(hidden_states, position_embeddings, padding)
        cache = past_key_values if cache is None else cache
        if cache is None:
            o = tokens.call(self.mechanism) if len(tokens) else tokens.q
        else:
            o = check_cache(cache).state_layer(self.layer_idx).attend(self.mechanism, tokens, columns)
        o = o if padding is None else padding.unpack(o, batch, columns)
        return o.flatten(2)

    def _tokens(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None, padding: Padding | None) -> Tokens:
        rotary = None
        if angles is not None:
            cos, sin = angles
            if padding is not None:
                cos, sin = (padding.pack(x.expand(hidden.shape[0], -1, -1)) for x in (cos, sin))
            rotary = Rotary(cos[0], sin[0]) if cos.shape[0] == 1 else Rotary(cos, sin)
        if padding is not None:
            hidden = padding.pack(hidden)
        width = self.mechanism.head_dim
        q = self.q_proj(hidden).unflatten(-1, (-1, width))
        k = self.k_proj(hidden).unflatten(-1, (-1, width))
        v = self.v_proj(hidden).unflatten(-1, (-1, width))
        if "q_norm" in self._modules:  # `hasattr` would raise and catch an error
            q, k = self.q_norm(q), self.k_norm(k)
        if abs(self.query_scale - 1) > 1e-6:
            q = q * self.query_scale
        given = hidden if self.mechanism.card.needs_hidden else None
        packed = () if padding is None else (padding.cu_seqlens, padding.real)
        return Tokens(q, k, v, rotary, given, *packed)


def _padding_of_mask(mask: Tensor | None, columns: int) -> Padding | None:
    """Padding read off a four-dimensional causal mask ``[B, 1, N, M]``: a column that no query sees is padding."""
    if mask is None or mask.dim() != 4:
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    real = seen[:, 0].any(1)[:, -columns:]
    return None if bool(real.all()) else Padding.of(real)


def find_padding(
    mask: Any, positions: Tensor | None, rows: int, columns: int, cache: SubquadCache | None
) -> tuple[Padding | None, Tensor | None]:
    """Padding and position ids of one forward pass.

    Args:
        mask: what the model got: ``[rows, seen + columns]``, 0 at padding, or None.
        positions: its position ids; without any, those that count real tokens only are made where there is padding, so that a
            padded row is turned by the same angles as the row alone.
        rows, columns: the batch and the new columns of this pass.
        cache: what holds the seen columns; None without a cache.
    """
    if mask is None:
        return (None if cache is not None or positions is None else _packed(positions)), positions
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        was = shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError("attention_mask", was, "a two-dimensional mask [batch, tokens], 0 at padding: swapped layers take no other")
    whole = columns + (0 if cache is None else cache.get_seq_length())
    if mask.shape != (rows, whole):
        raise InputError("attention_mask", shape_of(mask), f"[{rows}, {whole}]")
    real = mask != 0
    if bool(real.all()):
        return None, positions
    if positions is None:
        positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -columns:]
    real = real[:, -columns:]
    return (None if bool(real.all()) else Padding.of(real)), positions


def _packed(positions: Tensor) -> Padding | None:
    """Sequences packed into one row, which transformers tells by position ids that do not rise by 1."""
    starts = positions.diff(dim=-1) != 1
    if not bool(starts.any()):
        return None
    starts = torch.cat([starts.new_ones(starts.shape[0], 1), starts], 1).flatten()
    places = torch.arange(starts.numel(), device=starts.device)
    return Padding(places, torch.cat([places[starts], places.new_full((1,), starts.numel())]).int())


class DecoderModel:
    """Mixed into the inner model (LlamaModel …): makes the cache, and hands the layers the padding that they cannot see."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        caching = self.config.use_cache if use_cache is None else use_cache
        caching = caching and not (getattr(self, "gradient_checkpointing", False) and self.training)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            check_cache(cache)
        elif caching:
            cache = SubquadCache(self)
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None:
            rows, columns = given.shape[:2]
            padding, position_ids = find_padding(attention_mask, _rows(position_ids, rows), rows, columns, cache)
            kwargs["subquad_padding"] = padding
            if self.all_swapped:
                # No layer reads a four-dimensional mask: an empty one keeps transformers from building it, N² in size.
                attention_mask = given.new_empty(0, 0, 0, 0)
                if input_ids is not None and columns == 1 and padding is None and cache is not None and caching:
                    one = partial(super().forward, attention_mask=attention_mask, use_cache=True, subquad_padding=None, **{CACHE: cache})  # type: ignore[misc]
                    options = {key: value for key, value in kwargs.items() if key != "subquad_padding"}
                    out = decoded(self, one, input_ids, position_ids, cache, options)
                    if out is not None:
                        return out
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=caching,
            **{CACHE: cache},
            **kwargs,
        )


def _rows(positions: Tensor | None, rows: int) -> Tensor | None:
    """Position ids of every row (one row may stand for all)."""
    return positions if positions is None or positions.shape[0] == rows else positions.expand(rows, -1)


class Generation:
    """Mixed into models that generate: `generate` starts from a SubquadCache."""

    def _prepare_cache_for_generation(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            should = "None: a swapped model makes its own cache, whose states already have a fixed size"
            raise InputError("cache_implementation", repr(implementation), should)
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = SubquadCache(self)
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()
            return
        if model_kwargs.get(CACHE) is not None:
            check_cache(model_kwargs[CACHE])
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
