"""Layout: the keys that each query sees, named block by block so that work follows the layout and not N².

Two forms, one class:

* runs: the rule alone says what is seen (dense, causal, window, terrace), the key runs of a block of queries follow
  from it by arithmetic, and nothing is held;
* lists: int32 ``index [B|1, H|1, nq_blocks, capacity]`` with ``counts [B|1, H|1, nq_blocks]`` names the key blocks
  of each block of queries; within them the rule holds too.

Queries and keys stand at positions: query i at i + m − n, key j at j, so that they align at the end.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.sparse.rules import EVERYTHING, Causal, Rule, Terrace, Window

ROWS_AT_ONCE = 16  # query blocks whose visited pairs are counted together


class Layout:
    """Which of `m` keys each of `n` queries sees. Made by the constructors below, not directly.

    >>> Layout.window(16384, 512, sinks=4)
    Layout(16384 x 16384, Window(size=512, sinks=4), density 3.10 %)

    Attributes:
        n, m: queries and keys.
        rule: what holds within the visited blocks, on positions.
        block_q, block_k: tile sizes, free of each other.
        index, counts: the block lists, or None for runs.
    """

    def __init__(
        self,
        n: int,
        m: int,
        rule: Rule,
        block_q: int,
        block_k: int,
        index: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.n, self.m, self.rule = n, m, rule
        self.block_q, self.block_k = block_q, block_k
        self.index, self.counts = index, counts
        self._host_counts: list[int] | None = None

    # ---- makers ----------------------------------------------------------------------------------------------------

    @staticmethod
    def dense(n: int, m: int | None = None) -> Layout:
        """Every query sees every key."""
        m = n if m is None else m
        _check_sizes(n, m, aligned=False)
        return Layout(n, m, EVERYTHING, 128, 128)

    @staticmethod
    def causal(n: int, m: int | None = None) -> Layout:
        """Query i sees the keys j ≤ i + m − n."""
        m = n if m is None else m
        _check_sizes(n, m)
        return Layout(n, m, Causal(), 128, 128)

    @staticmethod
    def window(n: int, size: int, sinks: int = 0, m: int | None = None) -> Layout:
        """Query i, standing at p = i + m − n, sees p − size < j ≤ p, and j < sinks up to p."""
        m = n if m is None else m
        _check_sizes(n, m)
        _check_int("size", size, 1)
        _check_int("sinks", sinks, 0)
        return Layout(n, m, Window(size, sinks), 128 if size >= 256 else 64, 64)

    @staticmethod
    def terrace(n: int, size: int, m: int | None = None) -> Layout:
        """A query sees its own block of `size` positions and the block before it, causally: size … 2·size keys."""
        m = n if m is None else m
        _check_sizes(n, m)
        _check_int("size", size, 1)
        return Layout(n, m, Terrace(size), 128 if size >= 256 else 64, 64)

    @staticmethod
    def from_block_mask(
        mask: Tensor, block: int | tuple[int, int], n: int | None = None, m: int | None = None, *, rule: Rule = EVERYTHING
    ) -> Layout:
        """Key blocks by a boolean mask.

        >>> Layout.from_block_mask(torch.eye(4, dtype=torch.bool), 64, n=250).to_mask().shape
        torch.Size([250, 256])

        Args:
            mask: bool ``[nb, mb]``, ``[H, nb, mb]`` or ``[B, H, nb, mb]`` (B or H may be 1; H divides the heads).
            block: side of a block, or (block_q, block_k).
            n, m: queries and keys (default: all blocks full); the last block may be cut short.
            rule: what also holds inside the blocks.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3, 4):
            was = shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError("mask", was, "a bool tensor [nb, mb], [H, nb, mb] or [B, H, nb, mb]")
        block_q, block_k = block if isinstance(block, tuple) else (block, block)
        _check_int("block", block_q, 1)
        _check_int("block", block_k, 1)
        rows, columns = mask.shape[-2:]
        n = _cut("n", n, rows, block_q)
        m = _cut("m", m, columns, block_k)
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        counts = mask.sum(-1, dtype=torch.int32)
        capacity = int(counts.max()) if counts.numel() else 0
        # a stable descending sort of the mask puts the kept columns in front, in rising order
        index = mask.byte().sort(dim=-1, descending=True, stable=True).indices[..., :capacity].to(torch.int32)
        return Layout(n, m, rule, block_q, block_k, index.contiguous(), counts)

    # ---- what it says ----------------------------------------------------------------------------------------------

    @property
    def q_blocks(self) -> int:
        return -(-self.n // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.m // self.block_k)

    @property
    def host_counts(self) -> list[int]:
        """`counts`, flat, as integers on the host: read once (a synchronisation on a GPU)."""
        if self._host_counts is None:
            assert self.counts is not None
            self._host_counts = self.counts.flatten().tolist()
        return self._host_counts

    def to_mask(self, *, q_pos: Tensor | None = None, k_pos: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The boolean ``[N, M]``, or ``[H, N, M]`` or ``[B, H, N, M]`` when lists differ: for tests and small sizes.

        Positions (``[N]`` or ``[B, N]``) and `cu_seqlens` mean what they mean in `sparse_attention`.
        """
        device = next((x.device for x in (self.index, q_pos, k_pos, cu_seqlens) if x is not None), None)
        i, j = torch.arange(self.n, device=device), torch.arange(self.m, device=device)
        qp, kp = i + (self.m - self.n), j
        mask = torch.ones(self.n, self.m, dtype=torch.bool, device=device)
        if self.index is not None:
            mask = self._block_mask()[..., i // self.block_q, :][..., j // self.block_k]
            mask = mask.squeeze(0) if mask.shape[0] == 1 else mask
            mask = mask.squeeze(0) if mask.shape[0] == 1 and mask.dim() == 3 else mask
        if cu_seqlens is not None:
            sequence = torch.bucketize(i, cu_seqlens[1:].to(i), right=True)
            mask = mask & (sequence[:, None] == sequence[None, :])
            qp = kp = i - cu_seqlens.to(i)[sequence]
        qp, kp = qp if q_pos is None else q_pos, kp if k_pos is None else k_pos
        seen = self.rule.allowed(qp[..., :, None], kp[..., None, :]) & (kp >= 0)[..., None, :]
        return mask & (seen.unsqueeze(1) if seen.dim() == 3 else seen)

    @property
    def density(self) -> float:
        """The share of the N·M pairs that is seen (over all heads)."""
        pairs = self.n * self.m
        if not pairs:
            return 0.0
        shift = self.m - self.n
        if self.index is None:
            seen = 0
            for start in range(0, self.n, self.block_q):
                first, last = start + shift, min(start + self.block_q, self.n) - 1 + shift
                q = torch.arange(first, last + 1)
                for k0, k1, full in segments(self.rule, first, last, self.m):
                    seen += q.numel() * (k1 - k0) if full else int(self.rule.allowed(q[:, None], torch.arange(k0, k1)).sum())
            return seen / pairs
        assert self.counts is not None
        seen, lists = 0, self.counts[..., 0].numel()
        slot = torch.arange(self.index.shape[-1], device=self.index.device)
        for start in range(0, self.q_blocks, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            i = torch.arange(start * self.block_q, min((start + ROWS_AT_ONCE) * self.block_q, self.n), device=slot.device)
            row = i // self.block_q - start
            j = (self.index[:, :, rows, :, None] * self.block_k + torch.arange(self.block_k, device=slot.device))[:, :, row]
            kept = (slot < self.counts[:, :, rows, None])[:, :, row, :, None] & (j < self.m)
            seen += int((kept & self.rule.allowed(i[:, None, None] + shift, j)).sum())
        return seen / (pairs * lists)

    def _block_mask(self) -> Tensor:
        """The lists as a boolean ``[B|1, H|1, nq_blocks, nk_blocks]``."""
        assert self.index is not None and self.counts is not None
        kept = torch.arange(self.index.shape[-1], device=self.index.device) < self.counts[..., None]
        blocks = torch.zeros(*self.counts.shape, self.k_blocks + 1, dtype=torch.bool, device=self.index.device)
        return blocks.scatter_(-1, self.index.long().where(kept, self.k_blocks), True)[..., : self.k_blocks]

    def __repr__(self) -> str:
        lists = "" if self.index is None else f", lists {list(self.index.shape)} of {self.block_q} x {self.block_k}"
        return f"Layout({self.n} x {self.m}, {self.rule}{lists}, density {100 * self.density:.2f} %)"


def segments(rule: Rule, first: int, last: int, m: int) -> list[tuple[int, int, bool]]:
    """The keys of 0 … m−1 that queries at positions first … last see: (start, stop, whether all of them see all of it)."""
    cuts = sorted({0, m, *(min(max(c, 0), m) for c in rule.cuts(first, last))})
    pieces = [(a, b) for a, b in pairwise(cuts) if rule.touches(first, last, a, b - 1)]
    return [(a, b, bool(rule.covers(first, last, a, b - 1))) for a, b in pieces]


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(name, repr(value), f"an integer of at least {least}")


def _check_sizes(n: int, m: int, *, aligned: bool = True) -> None:
    _check_int("n", n, 0)
    _check_int("m", m, 0)
    if aligned and m < n:
        raise InputError("m", m, f"at least n, {n}: positions align at the end")


def _cut(name: str, given: int | None, blocks: int, side: int) -> int:
    """The number of tokens that `blocks` blocks hold: all, or `given`, which must end in the last block."""
    if given is None:
        return blocks * side
    _check_int(name, given, 0)
    if -(-given // side) != blocks:
        raise InputError(name, given, f"a number that fills {blocks} blocks of {side}: {max(0, (blocks - 1) * side + 1)} … {blocks * side}")
    return given
