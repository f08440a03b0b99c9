"""Layouts made of lists: of key blocks, of single keys, of runs, or of what a predicate gives."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.sparse import lists
from subquad.ops.sparse.fields import Fields, check_int, check_lists, check_sizes, cut_short, sides_of
from subquad.ops.sparse.rules import EVERYTHING, Rule


class ByList(Fields):
    """Makers of layouts that hold int32 lists with a capacity."""

    @classmethod
    def from_block_mask(
        cls, mask: Tensor, block: int | tuple[int, int], n: int | None = None, m: int | None = None, *, rule: Rule = EVERYTHING
    ) -> Self:
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
        block_q, block_k = sides_of(block)
        rows, columns = mask.shape[-2:]
        n = cut_short("n", n, rows, block_q)
        m = cut_short("m", m, columns, block_k)
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        counts, index = lists.compact_read(mask)
        return cls(n, m, rule, block_q, block_k, index.contiguous(), counts)

    @classmethod
    def from_predicate(
        cls,
        f: lists.Predicate,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 64,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Evaluates f(i, j) on query indices ``[rows, 1]`` and key indices ``[m]``, now, and keeps block lists and bitmaps.

        >>> Layout.from_predicate(lambda i, j: (i - j).abs() % 7 == 0, 1000)

        f gives bool ``[rows, m]``, ``[H, rows, m]`` or ``[B, H, rows, m]``. The time is that of n · m pairs, the memory that of the
        blocks with a seen pair.
        """
        m = n if m is None else m
        check_sizes(n, m, aligned=False)
        block_q, block_k = sides_of(block)
        index, counts, bits, number = lists.from_predicate(f, n, m, block_q, block_k, torch.device(device) if device else None)
        return cls(n, m, EVERYTHING, block_q, block_k, index, counts, bits=bits, bit_index=number)

    @classmethod
    def from_blocks(
        cls, index: Tensor, counts: Tensor, block: int | tuple[int, int], n: int | None = None, m: int | None = None, *,
        rule: Rule = EVERYTHING,
    ) -> Self:  # fmt: skip
        """Block lists chosen on the device: nothing is read back, here nor in `sparse_attention`.

        Args:
            index: integers ``[B|1, H|1, nq_blocks, capacity]``, the key blocks of every block of queries, none twice; what stands
                behind the first counts is ignored.
            counts: ``[B|1, H|1, nq_blocks]``, how many are meant, at most the capacity.
            block, n, rule: as in `from_block_mask`.
            m: keys (default: n).
        """
        check_lists("index", index)
        fits = isinstance(counts, Tensor) and counts.shape == index.shape[:3] and counts.device == index.device
        if not fits or counts.is_floating_point() or counts.dtype == torch.bool:
            was = shape_of(counts) if isinstance(counts, Tensor) else type(counts).__name__
            raise InputError("counts", was, f"integers {list(index.shape[:3])} on {index.device}")
        block_q, block_k = sides_of(block)
        n = cut_short("n", n, index.shape[2], block_q)
        m = n if m is None else m
        check_sizes(n, m, aligned=False)
        slot = torch.arange(index.shape[3], device=index.device)
        index = index.where(slot < counts[..., None], 0).to(torch.int32).contiguous()
        return cls(n, m, rule, block_q, block_k, index, counts.to(torch.int32), dynamic=True)

    @classmethod
    def from_indices(cls, index: Tensor, m: int | None = None, *, n: int | None = None, block: int = 1, rule: Rule = EVERYTHING) -> Self:
        """Single keys for every query, or for every block of queries: built on the device, nothing is read back.

        Args:
            index: integers ``[B|1, H|1, n / block, K]``; what lies outside of 0 … m − 1, as −1 does, names no key, and a key named
                twice counts once.
            m: keys (default: n).
            n: queries (default: all blocks full).
            block: queries that share a list.
            rule: what also holds.
        """
        check_lists("index", index)
        check_int("block", block, 1)
        n = cut_short("n", n, index.shape[2], block)
        m = n if m is None else m
        check_sizes(n, m, aligned=False)
        keys, counts = lists.from_indices(index, m)
        return cls(n, m, rule, block, 1, keys.contiguous(), counts, dynamic=True)

    @classmethod
    def from_runs(
        cls, starts: Tensor, stops: Tensor, m: int | None = None, *, n: int | None = None, block: int | tuple[int, int] = 64,
        capacity: int | None = None, rule: Rule = EVERYTHING,
    ) -> Self:  # fmt: skip
        """Runs of keys, start … stop − 1, for every block of queries; they may overlap, and empty ones are ignored.

        Args:
            starts, stops: integers ``[B|1, H|1, nq_blocks, R]``.
            m, n, rule: as in `from_indices`.
            block: queries that share a list, and the side of the key blocks that are visited.
            capacity: key blocks that the runs of one list may touch (those beyond are dropped); None counts them, which on a
                GPU is a synchronisation.
        """
        check_lists("starts", starts)
        if not isinstance(stops, Tensor) or stops.shape != starts.shape or stops.device != starts.device:
            was = shape_of(stops) if isinstance(stops, Tensor) else type(stops).__name__
            raise InputError("stops", was, f"{list(starts.shape)} on {starts.device}, as starts")
        block_q, block_k = sides_of(block)
        n = cut_short("n", n, starts.shape[2], block_q)
        m = n if m is None else m
        check_sizes(n, m, aligned=False)
        touched = lists.blocks_of_runs(starts, stops, -(-m // block_k), block_k)
        if capacity is None:
            most = int(touched.sum(-1).max()) if touched.numel() else 0
        else:
            check_int("capacity", capacity, 0)
            most = min(capacity, touched.shape[-1])
        counts, index = lists.compact(touched, most)
        a, b = (x.to(torch.int32).contiguous() for x in (starts, stops))
        return cls(n, m, rule, block_q, block_k, index.contiguous(), counts, starts=a, stops=b, dynamic=capacity is not None)
