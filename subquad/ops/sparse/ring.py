"""Rings: the last tokens of every row, and for good the first few, in a fixed number of slots.

Token p stands in slot p if p < sinks, else in slot sinks + (p − sinks) mod window, or in none where `window` is 0; `length`
tokens have been seen.
"""

from __future__ import annotations

import torch
from torch import Tensor


def holds(length: Tensor, window: int, sinks: int) -> Tensor:
    """The position that each slot holds after `length` ``[R]`` tokens, ``[R, sinks + window]``; an empty slot's is −1 or ≥ length."""
    slot = torch.arange(sinks + window, device=length.device)
    last = length[:, None] - 1
    ring = last - (last - slot) % max(1, window)
    return torch.where(slot < sinks, slot, ring.where(ring >= sinks, -1))


def store(old: Tensor, new: Tensor, length: Tensor, sinks: int, cu_seqlens: Tensor | None) -> Tensor:
    """The slots ``[R, slots, …]`` after new tokens ``[R, N, …]`` or packed ``[1, total, …]``: each takes the last that is its own."""
    if new.shape[1] == 0:
        return old
    rows = torch.arange(old.shape[0], device=old.device)
    if cu_seqlens is None:
        start, count = torch.zeros_like(rows), torch.full_like(rows, new.shape[1])
    else:
        start, count, rows = cu_seqlens[:-1].long(), cu_seqlens.diff().long(), torch.zeros_like(rows)
    token = holds(length + count, old.shape[1] - sinks, sinks) - length[:, None]
    fresh = (token >= 0) & (token < count[:, None])
    index = (start[:, None] + token.where(fresh, 0)).clamp(max=new.shape[1] - 1)
    return torch.where(fresh[..., None, None], new[rows[:, None], index], old)
