"""Streams: the new tokens of every row behind the last P tokens that the row kept, in batches and in packed input alike."""

from __future__ import annotations

import torch
from torch import Tensor


class Stream:
    """Joins what each of R rows kept (``[R, P, …]``) with its new tokens (``[R, N, …]``, or packed ``[1, total, …]``).

    Args:
        past: P.
        rows: R.
        tokens: N, or total.
        cu_seqlens: ``[R + 1]`` offsets of packed input; None for a batch.
    """

    def __init__(self, past: int, rows: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        self.past, self.tokens, self.device = past, tokens, device
        self.cu_seqlens: Tensor | None = None  # of the joined sequences
        if cu_seqlens is None:
            return
        offsets, row = cu_seqlens.long(), torch.arange(rows, device=device)
        self.row = torch.repeat_interleave(row, offsets.diff(), output_size=tokens)
        self.cu_seqlens = offsets + past * torch.arange(rows + 1, device=device)
        self.index = torch.arange(tokens, device=device) + past * (self.row + 1)  # where new tokens stand in the joined
        self.offset = torch.arange(tokens, device=device) - offsets[self.row]  # of a token in its sequence
        kept = (self.cu_seqlens[:-1, None] + torch.arange(past, device=device)).flatten()
        self.order = torch.empty(rows * past + tokens, dtype=torch.long, device=device)
        self.order[torch.cat([kept, self.index])] = torch.arange(rows * past + tokens, device=device)

    def join(self, kept: Tensor, new: Tensor) -> Tensor:
        """``[R, P + N, …]``, or packed ``[1, R · P + total, …]``."""
        if self.cu_seqlens is None:
            return torch.cat([kept, new], 1)
        return torch.cat([kept.flatten(0, 1), new[0]])[self.order][None]

    def positions(self, length: Tensor) -> Tensor:
        """Of the new tokens, ``[R, N]`` or ``[1, total]``; `length` ``[R]`` tokens came before."""
        if self.cu_seqlens is None:
            return length[:, None] + torch.arange(self.tokens, device=self.device)
        return (length[self.row] + self.offset)[None]

    def pad(self, new: Tensor, value: float = 0) -> Tensor:
        """New tokens as queries over the joined keys: packed sequences must be as long as theirs, batches need not."""
        if self.cu_seqlens is None:
            return new
        padded = new.new_full((1, self.order.shape[0], *new.shape[2:]), value)
        return padded.index_copy(1, self.index, new)

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return padded if self.cu_seqlens is None else padded[:, self.index]

    def delayed(self, joined: Tensor, by: int) -> Tensor:
        """For each new token, the joined one that stands `by` ≤ P before it."""
        if self.cu_seqlens is None:
            return joined[:, self.past - by : self.past - by + self.tokens]
        return joined[:, self.index - by]

    def last(self, joined: Tensor, count: int) -> Tensor:
        """The last `count` ≤ P joined tokens of each row, ``[R, count, …]``."""
        if self.cu_seqlens is None:
            return joined[:, joined.shape[1] - count :]
        return joined[0, self.cu_seqlens[1:, None] - count + torch.arange(count, device=self.device)]
