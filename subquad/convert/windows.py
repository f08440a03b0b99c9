"""Swapped attention in Swin models: timm's SwinTransformer, transformers' Swin.

A Swin block cuts its grid of tokens into windows, every second block after a cyclic shift. A window of a shifted block may hold tokens
from both ends of the image: up to four rectangles, the regions, which do not see each other (Liu et al., arXiv 2103.14030, sec. 3.2).

    scope="image"    the windows are joined again, and the mechanism works on the whole grid, as InLine-Swin's does (arXiv 2412.06590)
    scope="window"   the mechanism works on each window, in shifted blocks on each region, with the region as its grid

Swin's relative position bias is added to softmax's scores. Only softmax in windows has a place for it, and it then computes what
the original does; all others leave it out. Zeros with which a block fills up its last windows are tokens like any other to
``scope="window"``, as they are to Swin, and are left out by ``scope="image"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import Attention
from subquad.convert.module import SwappedAttention

SCOPES = ("image", "window")
Pair = tuple[int, int]


def partition(x: Tensor, side: Pair) -> Tensor:
    """``[B, rows, columns, C]`` in windows: ``[B · windows, h·w, C]``."""
    batch, rows, columns, width = x.shape
    h, w = side
    return x.reshape(batch, rows // h, h, columns // w, w, width).transpose(2, 3).reshape(-1, h * w, width)


def reverse(x: Tensor, grid: Pair, side: Pair) -> Tensor:
    """The inverse of `partition`, for a grid of that many rows and columns."""
    (rows, columns), (h, w) = grid, side
    return x.reshape(-1, rows // h, columns // w, h, w, x.shape[-1]).transpose(2, 3).reshape(-1, rows, columns, x.shape[-1])


@dataclass(frozen=True)
class Windows:
    """How a Swin block cuts its tokens.

    Args:
        grid: rows and columns of the tokens.
        side: rows and columns of a window.
        shift: the cyclic shift of rows and columns, upwards and to the left.
        roll_first: whether the shift precedes the filling up with zeros (timm) or follows it (transformers).
    """

    grid: Pair
    side: Pair
    shift: Pair
    roll_first: bool

    @property
    def padded(self) -> Pair:
        """Rows and columns filled up to whole windows."""
        (rows, columns), (h, w) = self.grid, self.side
        return rows + -rows % h, columns + -columns % w

    def cut(self, x: Tensor) -> Tensor:
        """``[B, rows, columns, C]`` in windows: ``[B · windows, h·w, C]``."""
        fill = (0, 0, 0, self.padded[1] - self.grid[1], 0, self.padded[0] - self.grid[0])
        x = F.pad(self._roll(x, -1), fill) if self.roll_first else self._roll(F.pad(x, fill), -1)
        return partition(x, self.side)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `cut`; what was filled up is dropped."""
        x, (rows, columns) = reverse(x, self.padded, self.side), self.grid
        return self._roll(x[:, :rows, :columns], 1) if self.roll_first else self._roll(x, 1)[:, :rows, :columns]

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        return x.roll((sign * self.shift[0], sign * self.shift[1]), (1, 2)) if any(self.shift) else x

    def regions(self, axis: int) -> Iterator[tuple[slice, int]]:
        """Parts of an axis of the shifted grid, and the length of a region in each: the last window is two regions."""
        size, side, shift = self.padded[axis], self.side[axis], self.shift[axis]
        parts = ((0, size - side, side), (size - side, size - shift, side - shift), (size - shift, size, shift))
        for start, stop, length in parts if shift else ((0, size, side),):
            if start < stop:
                yield slice(start, stop), length


def watch_swin(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Have each Swin block, by the path of its attention, leave the (rows, columns) of the tokens it is given on itself.

    timm's patch embedding refuses images of another size than the model was made for; it stops to when no layer has windows left.
    """
    free = True
    for path, block in blocks.items():
        if note_tokens not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(note_tokens, with_kwargs=True)
        free &= getattr(model.get_submodule(path), "scope", None) == "image"
    embed: Any = getattr(model, "patch_embed", None)
    if free and hasattr(embed, "strict_img_size") and "subquad_strict" not in vars(embed):
        embed.subquad_strict, embed.strict_img_size = embed.strict_img_size, False


def forget_swin(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Undo `watch_swin`."""
    for block in blocks.values():
        for key, hook in list(block._forward_pre_hooks.items()):
            if hook is note_tokens:
                del block._forward_pre_hooks[key]
                block._forward_pre_hooks_with_kwargs.pop(key, None)
        block.__dict__.pop("subquad_grid", None)
        if "subquad_windows" in vars(block):
            block.window_size, block.shift_size = block.__dict__.pop("subquad_windows")
    embed: Any = getattr(model, "patch_embed", None)
    if "subquad_strict" in getattr(embed, "__dict__", {}):
        embed.strict_img_size = embed.__dict__.pop("subquad_strict")


def note_tokens(block: Any, args: Any, kwargs: Any) -> None:
    """The hook: transformers passes the sizes on, timm's tokens lie on their grid."""
    sizes = args[1] if len(args) > 1 else kwargs.get("input_dimensions")
    block.subquad_grid = tuple(args[0].shape[1:3] if sizes is None else sizes)
    if sizes is not None:  # transformers' blocks shrink their windows at a small image, and leave them so for the next one
        if "subquad_windows" not in vars(block):
            block.subquad_windows = (block.window_size, block.shift_size)
        block.window_size, block.shift_size = block.subquad_windows


class SwappedWindowAttention(SwappedAttention):
    """Common to both libraries. It is called with windows ``[B · windows, h·w, C]``, as the original is.

    Args:
        block: the Swin block that it stands in, which `watch_swin` watches.
        scope: "image" or "window".
    """

    plain_softmax = False
    roll_first: bool
    block: Any

    def __init__(self, original: Any, mechanism: Attention, path: str, block: nn.Module, scope: str) -> None:
        super().__init__(original, mechanism, path)
        self.placement = {"scope": scope}
        self.__dict__["block"] = block  # it holds this module

    @property
    def scope(self) -> str:
        return self.placement["scope"]

    @property
    def keeps_bias(self) -> bool:
        """Whether the relative position bias is added: it is to softmax's scores, in windows."""
        return self.scope == "window" and self.name == "softmax"

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}, {'with' if self.keeps_bias else 'without'} the relative position bias"

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, N, H, D]`` of tokens ``[B, N, C]``."""
        raise TypeError(f"{type(self).__name__} must define project()")

    def bias(self) -> Tensor:
        """The relative position bias ``[1, H, h·w, h·w]``."""
        raise TypeError(f"{type(self).__name__} must define bias()")

    def windows(self) -> Windows:
        side, shift = (x if isinstance(x, tuple) else (x, x) for x in (self.block.window_size, self.block.shift_size))
        return Windows(self.block.subquad_grid, side, shift, self.roll_first)

    def mix(self, hidden: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Windows ``[B · windows, h·w, C]`` to the same of ``H·D`` channels."""
        cut = self.windows()
        if self.scope == "image":
            image = cut.join(hidden)
            o = self._attend(image.flatten(1, 2), cut.grid)
            return cut.cut(o.unflatten(1, cut.grid))
        if self.keeps_bias:
            return self._biased(hidden, mask, cut.side, dropout)
        if not any(cut.shift):
            return self._attend(hidden, cut.side)
        image, rows = reverse(hidden, cut.padded, cut.side), []
        for down, h in cut.regions(0):
            columns = []
            for across, w in cut.regions(1):
                part = image[:, down, across]
                o = self._attend(partition(part, (h, w)), (h, w))
                columns.append(reverse(o, (part.shape[1], part.shape[2]), (h, w)))
            rows.append(torch.cat(columns, 2))
        return partition(torch.cat(rows, 1), cut.side)

    def _attend(self, hidden: Tensor, grid: Pair) -> Tensor:
        """The mechanism on images of that grid, ``[B, rows · columns, C]`` to ``[B, rows · columns, H·D]``."""
        card = self.mechanism.card
        q, k, v = self.project(hidden)
        given: dict[str, Any] = {"grid": grid} if card.needs_grid else {}
        return self.mechanism(q, k, v, hidden=hidden if card.needs_hidden else None, **given).flatten(2)

    def _biased(self, hidden: Tensor, mask: Tensor | None, side: Pair, dropout: float) -> Tensor:
        """Softmax with the relative position bias and the mask ``[windows, h·w, h·w]`` of a shifted block."""
        bias = self.bias()
        if bias.shape[-1] != hidden.shape[1]:
            was = f"windows of {side[0]} × {side[1]} with a relative position bias for {bias.shape[-1]} tokens"
            raise InputError("images", was, "images whose grid is at least a window in every stage, or scope='image'")
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(hidden.shape[0] // mask.shape[0], 1, 1, 1)
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout if self.training else 0.0)
        return o.transpose(1, 2).flatten(2)


class SwappedTimmWindowAttention(SwappedWindowAttention):
    """`attn` of timm's SwinTransformerBlock."""

    projection = "proj"
    roll_first = True
    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    attn_drop: nn.Dropout
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, original: Any, mechanism: Attention, path: str, block: nn.Module, scope: str) -> None:
        super().__init__(original, mechanism, path, block, scope)
        self._share(original)

    def _share(self, original: Any) -> None:
        """timm keeps the bias on the attention module itself."""
        self.relative_position_bias_table = original.relative_position_bias_table
        self.register_buffer("relative_position_index", original.relative_position_index, persistent=False)

    def release(self) -> nn.Module:
        original: Any = super().release()
        original.relative_position_bias_table = self.relative_position_bias_table
        original.relative_position_index = self.relative_position_index
        return original

    def set_window_size(self, window_size: Any) -> None:
        """What timm's `set_input_size` calls: the bias is interpolated to the new window."""
        original: Any = self.release()
        original.set_window_size(window_size)
        self._share(original)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.proj_drop(self.proj(self.heads_output(x, mask)))

    def heads_output(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """What goes into `proj`."""
        return self.mix(x, mask, self.attn_drop.p)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(hidden).unflatten(-1, (3, self.mechanism.heads, self.mechanism.head_dim)).unbind(2)

    def bias(self) -> Tensor:
        index = self.relative_position_index
        return self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


class SwappedSwinAttention(SwappedWindowAttention):
    """`attention` of transformers' SwinLayer."""

    roll_first = False
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    relative_position_bias: nn.Module

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, None]:
        return self.o_proj(self.heads_output(hidden_states, attention_mask, **kwargs)), None

    def heads_output(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """What goes into `o_proj`."""
        return self.mix(hidden_states, attention_mask, self.original.attention_dropout)  # type: ignore[arg-type]

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (project(hidden).unflatten(-1, (-1, self.mechanism.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def bias(self) -> Tensor:
        return self.relative_position_bias()
