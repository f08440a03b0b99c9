"""Lists of key blocks: made from predicates, single keys and runs, and read back as pairs.

A block of a list is whole, or partial: then a bitmap says which of its pairs are seen, ``bits [P, block_q, ⌈block_k / 32⌉]``
int32, key j of the block in bit j mod 32 of word j div 32. Blocks that look alike share one: ``bit_index [B|1, H|1, nq, capacity]``
names it, −1 for a whole block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.ops.sparse.rules import Rule

AT_ONCE = 1 << 23  # pairs evaluated together
WORD = 32

Predicate = Callable[[Tensor, Tensor], Tensor]
Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # index, counts, bits, bit_index


def compact(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """(counts ``[…]``, columns ``[…, capacity]``) of a boolean ``[…, C]``: the True ones in front, in rising order."""
    columns = kept.byte().sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    return kept.sum(-1, dtype=torch.int32).clamp(max=capacity), columns.to(torch.int32)


def compact_read(kept: Tensor) -> tuple[Tensor, Tensor]:
    """`compact` with the longest list as the capacity, which is read on the host: one pass over the mask, no sort."""
    flat = kept.flatten(0, -2)
    row, column = flat.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=flat.shape[0])
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    index = torch.zeros(flat.shape[0], int(counts.max()) if counts.numel() else 0, dtype=torch.int32, device=kept.device)
    index[row, slot] = column.int()
    return counts.int().view(kept.shape[:-1]), index.view(*kept.shape[:-1], index.shape[1])


def pack(mask: Tensor) -> Tensor:
    """Booleans ``[…, K]`` as int32 ``[…, ⌈K / 32⌉]``."""
    mask = F.pad(mask, (0, -mask.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    weight = torch.ones(WORD, dtype=torch.long, device=mask.device) << torch.arange(WORD, device=mask.device)
    return (mask * weight).sum(-1).to(torch.int32)  # the 32nd bit wraps into the sign


def unpack(bits: Tensor, keys: int) -> Tensor:
    """The inverse of `pack`."""
    return ((bits[..., None] >> torch.arange(WORD, device=bits.device, dtype=torch.int32)) & 1).flatten(-2)[..., :keys].bool()


def from_predicate(f: Predicate, n: int, m: int, block_q: int, block_k: int, device: torch.device | None) -> Lists:
    """Evaluates f some query blocks at a time; only lists and the bitmaps of partial blocks remain."""
    q_blocks, k_blocks = -(-n // block_q), -(-m // block_k)
    step = max(1, AT_ONCE // max(1, block_q * m))
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    patterns = torch.zeros(0, block_q, -(-block_k // WORD), dtype=torch.int32, device=device)
    j = torch.arange(m, device=device)
    for row in range(0, q_blocks, step):
        i = torch.arange(row * block_q, min((row + step) * block_q, n), device=device)
        seen = f(i[:, None], j).to(torch.bool)
        seen = seen.reshape((1,) * (4 - seen.dim()) + tuple(seen.shape)).expand(-1, -1, len(i), m)
        blocks, whole = (_blocks(seen, block_q, block_k, k_blocks, fill) for fill in (False, True))
        some, every = blocks.flatten(-2).any(-1), whole.flatten(-2).all(-1)
        number = torch.full(some.shape, -1, dtype=torch.int32, device=some.device)
        partial = some & ~every
        patterns, of = torch.cat([patterns.to(some.device), pack(blocks[partial])]).unique(dim=0, return_inverse=True)
        old = len(of) - int(partial.sum())
        # earlier pieces name their bitmaps by the old order
        pieces = [(a, b, c.where(c < 0, of[:old].int()[c.clamp(min=0).long()] if old else c)) for a, b, c in pieces]
        number[partial] = of[old:].int()
        counts, index = compact_read(some)
        kept = torch.arange(index.shape[-1], device=index.device) < counts[..., None]
        pieces.append((index, counts, number.gather(-1, index.long()).where(kept, -1)))
    if not pieces:
        empty = torch.zeros(1, 1, 0, 0, dtype=torch.int32, device=device)
        return empty, empty[..., 0], patterns, empty
    capacity = max(piece[0].shape[-1] for piece in pieces)
    index, number = (
        torch.cat([F.pad(piece[x], (0, capacity - piece[x].shape[-1]), value=empty) for piece in pieces], 2)
        for x, empty in ((0, 0), (2, -1))
    )
    return index.contiguous(), torch.cat([piece[1] for piece in pieces], 2), patterns, number.contiguous()


def _blocks(seen: Tensor, block_q: int, block_k: int, k_blocks: int, fill: bool) -> Tensor:
    """``[B, H, rows, M]`` as ``[B, H, row blocks, key blocks, block_q, block_k]``."""
    pad = (0, k_blocks * block_k - seen.shape[-1], 0, -seen.shape[-2] % block_q)
    return F.pad(seen, pad, value=fill).unflatten(-1, (k_blocks, block_k)).unflatten(-3, (-1, block_q)).transpose(-3, -2)


def from_indices(index: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Single keys ``[…, K]`` as lists of blocks of one key: sorted, what is outside 0 … m − 1 and repeated put aside."""
    keys = index.where((index >= 0) & (index < m), m).sort(-1).values
    again = F.pad(keys[..., 1:] == keys[..., :-1], (1, 0))
    keys = keys.masked_fill(again, m).sort(-1).values
    counts = (keys < m).sum(-1, dtype=torch.int32)
    return keys.where(keys < m, 0).to(torch.int32), counts


def blocks_of_runs(starts: Tensor, stops: Tensor, k_blocks: int, block_k: int) -> Tensor:
    """Which key blocks runs ``[…, R]`` touch, ``[…, k_blocks]``."""
    first = torch.arange(k_blocks, device=starts.device) * block_k
    touched = torch.zeros(*starts.shape[:-1], k_blocks, dtype=torch.bool, device=starts.device)
    for r in range(starts.shape[-1]):
        a, b = starts[..., r, None], stops[..., r, None]
        touched |= (a < b) & (a < first + block_k) & (b > first)
    return touched


def in_runs(starts: Tensor, stops: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Whether one of the runs ``[rows, R]`` holds all of the keys first … last ``[rows, K]``."""
    inside = torch.zeros(first.shape, dtype=torch.bool, device=first.device)
    for r in range(starts.shape[-1]):
        inside |= (starts[:, r, None] <= first) & (last < stops[:, r, None])
    return inside


def bitmaps(bits: Tensor, number: Tensor, block_k: int) -> Tensor:
    """What the blocks named by `number` ``[rows, blocks]`` show, ``[rows, block_q, blocks · block_k]``."""
    if not bits.shape[0]:
        return torch.ones(number.shape[0], 1, number.shape[1] * block_k, dtype=torch.bool, device=number.device)
    shown = unpack(bits[number.clamp(min=0).long()], block_k) | (number < 0)[..., None, None]
    return shown.transpose(1, 2).flatten(2)


__all__ = [
    "Lists",
    "Predicate",
    "Rule",
    "bitmaps",
    "blocks_of_runs",
    "compact",
    "compact_read",
    "from_indices",
    "from_predicate",
    "in_runs",
    "pack",
    "unpack",
]
