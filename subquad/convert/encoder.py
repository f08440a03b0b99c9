"""Swapped attention in ViT-type encoders: transformers' ViT and DeiT, timm's VisionTransformer.

A mechanism that works on a grid gets the grid of patches, as the patch embedding made it for this very image, so sizes may change
from call to call and need not be square. Class, register and distillation tokens do not lie on that grid. Under such a mechanism
they are the only ones to use softmax: each reads all tokens (cost proportional to N), while patches read each other through the
mechanism and no longer read them: the class attention of CaiT (Touvron et al., arXiv 2103.17239, sec. 3), in every layer. All
other mechanisms treat them as tokens like any other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError, shape_of
from subquad.convert.module import SwappedAttention


def watch_grid(projection: nn.Module) -> None:
    """Have the patch projection, a convolution, leave the (rows, columns) of its last output on itself."""
    if _note_grid not in projection._forward_hooks.values():
        projection.register_forward_hook(_note_grid)


def forget_grid(projection: nn.Module) -> None:
    """Undo `watch_grid`."""
    for key, hook in list(projection._forward_hooks.items()):
        if hook is _note_grid:
            del projection._forward_hooks[key]
    projection.__dict__.pop("subquad_grid", None)


def _note_grid(module: nn.Module, args: Any, output: Tensor) -> None:
    module.subquad_grid = tuple(output.shape[-2:])  # type: ignore[assignment]


class SwappedEncoderAttention(SwappedAttention):
    """Common to both libraries: prefix tokens and the grid.

    Args:
        patches: the patch projection that `watch_grid` watches.
        prefix: how many tokens stand before the patches.
    """

    patches: nn.Module

    def __init__(self, original: Any, mechanism: Any, path: str, patches: nn.Module, prefix: int) -> None:
        super().__init__(original, mechanism, path)
        self.prefix = prefix
        self.__dict__["patches"] = patches  # it belongs to the patch embedding

    def mix(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v ``[B, N, H, D]`` to ``[B, N, H·D]``."""
        card = self.mechanism.card
        given = hidden if card.needs_hidden else None
        if not card.needs_grid:
            return self.mechanism(q, k, v, hidden=given).flatten(2)
        rows, columns = getattr(self.patches, "subquad_grid", (0, 0))
        p = self.prefix
        if rows * columns + p != q.shape[1]:
            should = f"{p} + {rows} × {columns} tokens, of which none is dropped: {card.name} works on the whole grid of patches"
            raise InputError("x", f"{q.shape[1]} tokens", should)
        given = None if given is None else given[:, p:]
        o = self.mechanism(q[:, p:], k[:, p:], v[:, p:], hidden=given, grid=(rows, columns))
        if p:
            first = F.scaled_dot_product_attention(q[:, :p].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            o = torch.cat([first.transpose(1, 2), o], 1)
        return o.flatten(2)

    def check_mask(self, mask: Any, causal: bool = False) -> None:
        if mask is not None or causal:
            was = "is_causal=True" if causal else shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError("attention_mask", was, "None: swapped encoder layers see every token of an image")


class SwappedViTAttention(SwappedEncoderAttention):
    """`attention` of transformers' ViT and DeiT layers."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.heads_output(hidden_states, attention_mask, **kwargs)), None

    def heads_output(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """What goes into `o_proj`."""
        self.check_mask(attention_mask)
        width = self.mechanism.head_dim
        q, k, v = (project(hidden_states).unflatten(-1, (-1, width)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.mix(hidden_states, q, k, v)


class SwappedTimmAttention(SwappedEncoderAttention):
    """`attn` of timm's VisionTransformer blocks: fused projection, optional query/key norms, output norm and gate."""

    projection = "proj"
    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module  # of the output; older versions have none
    gate: nn.Module  # if the model has one
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.proj_drop(self.proj(self.heads_output(x, attn_mask, is_causal)))

    def heads_output(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """What goes into `proj`: after timm's output norm and gate, where a model has them."""
        self.check_mask(attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.mechanism.heads, self.mechanism.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        o = self.mix(x, q, k, v)
        if hasattr(self, "norm"):
            o = self.norm(o)
        if hasattr(self, "gate"):
            o = o * self.gate(x).sigmoid()
        return o
