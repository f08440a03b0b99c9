"""Layout: the keys that each query sees, named block by block so that work follows the layout and not N².

Three forms, one class:

* runs: the rule alone says what is seen (dense, causal, window, neighbourhood, …), the key runs of a block of queries
  follow from it by arithmetic, and nothing is held;
* lists: int32 ``index [B|1, H|1, nq_blocks, capacity]`` with ``counts [B|1, H|1, nq_blocks]`` names the key blocks
  of each block of queries; within them the rule holds too, and so do bitmaps or runs of keys where a layout has them;
* parts: a layout for each share of the heads, or for each row of the batch.

Queries and keys stand at positions: query i at i + m − n, key j at j, so that they align at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of
from subquad.ops.sparse import lists
from subquad.ops.sparse.grids import Circle, Neighborhood
from subquad.ops.sparse.patterns import Band, Globals, Intersection, Listed, Power, Strided, Union, join
from subquad.ops.sparse.rules import EVERYTHING, Causal, Rule, Terrace, Window

if TYPE_CHECKING:
    from subquad.ops.sparse.show import Seen

ROWS_AT_ONCE = 16  # query blocks whose visited pairs are counted together
PerAxis = int | Sequence[int]


class Layout:
    """Which of `m` keys each of `n` queries sees. Made by the constructors below, not directly.

    >>> Layout.window(16384, 512, sinks=4)
    Layout(16384 x 16384, Window(size=512, sinks=4), density 3.10 %)

    Attributes:
        n, m: queries and keys.
        inner: the rule that holds within the visited blocks, on positions.
        block_q, block_k: tile sizes, free of each other.
        index, counts: the block lists, or None for runs.
        bits, bit_index: bitmaps of partial blocks (`lists`), or None.
        starts, stops: int32 ``[B|1, H|1, nq_blocks, R]``, the runs of keys that are seen, or None.
        dynamic: whether the lists follow from data: then nothing of them is read on the host, and every list costs its capacity.
        parts, parts_of: layouts of the "heads" or the "rows" of the batch, in order; empty for other forms.
    """

    def __init__(
        self, n: int, m: int, rule: Rule, block_q: int, block_k: int, index: Tensor | None = None, counts: Tensor | None = None, *,
        bits: Tensor | None = None, bit_index: Tensor | None = None, starts: Tensor | None = None, stops: Tensor | None = None,
        dynamic: bool = False, parts: Sequence[Layout] = (), parts_of: str = "",
    ) -> None:  # fmt: skip
        self.n, self.m, self.inner = n, m, rule
        self.block_q, self.block_k = block_q, block_k
        self.index, self.counts = index, counts
        self.bits, self.bit_index, self.starts, self.stops = bits, bit_index, starts, stops
        self.dynamic, self.parts, self.parts_of = dynamic, tuple(parts), parts_of
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
    def band(n: int, left: int, right: int, *, global_tokens: int = 0) -> Layout:
        """Query i sees the keys i − left … i + right; the first `global_tokens` see all and are seen by all.

        Beltagy et al.: Longformer (arXiv 2004.05150), section 3.1, with a window of left + right.
        """
        _check_sizes(n, n)
        for name, value in (("left", left), ("right", right), ("global_tokens", global_tokens)):
            _check_int(name, value, 0)
        rule = join(Union, Band(left, right), Globals(global_tokens)) if global_tokens else Band(left, right)
        return Layout(n, n, rule, 128 if left + right >= 256 else 64, 64)

    @staticmethod
    def global_tokens(n: int, count: int) -> Layout:
        """The first `count` tokens see every key, and every query sees them: to be joined with another layout by ``|``."""
        _check_sizes(n, n)
        _check_int("count", count, 0)
        return Layout(n, n, Globals(count), 64, 64)

    @staticmethod
    def neighborhood(
        grid: PerAxis, window: PerAxis, *, stride: PerAxis = 1, dilation: PerAxis = 1, causal: bool | Sequence[bool] = False
    ) -> Layout:
        """The nearest keys on a grid of one to three axes, tokens in row-major order; windows slide inwards at borders.

        >>> Layout.neighborhood((64, 64), 13)
        Layout(4096 x 4096, Neighborhood(grid=(64, 64), window=(13, 13), ...), density 4.13 %)

        Args:
            grid: its sides, or the length of a sequence.
            window: keys along each axis; even ones reach window/2 to the left and window/2 − 1 to the right.
            stride: queries that share the window of their group's leader, at most the window.
            dilation: distance of the keys along each axis; window · dilation is at most the side.
            causal: whether later coordinates are hidden.

        Each is a number or one per axis. Hassani et al. (arXiv 2504.16922).
        """
        sides = _axes("grid", grid, 0)
        windows, strides, dilations = (
            _axes(name, x, len(sides)) for name, x in (("window", window), ("stride", stride), ("dilation", dilation))
        )
        flags = (causal,) * len(sides) if isinstance(causal, bool) else tuple(causal)
        if len(flags) != len(sides) or not all(isinstance(c, bool) for c in flags):
            raise InputError("causal", repr(causal), f"True or False, or one for each of the {len(sides)} axes")
        for side, w, s, d in zip(sides, windows, strides, dilations):
            if w * d > side:
                at = f" under dilation {d}" if d > 1 else ""
                raise InputError("window", w, f"at most {side // d}{at} on an axis of {side}")
            if s > w:
                raise InputError("stride", s, f"at most the window, {w}")
        return _on_grid(sides, Neighborhood(sides, windows, strides, dilations, flags))

    @staticmethod
    def circle(grid: PerAxis, radius: float) -> Layout:
        """Keys at a Euclidean distance below `radius` on a grid of one to three axes (CLEAR, arXiv 2412.16112)."""
        sides = _axes("grid", grid, 0)
        if isinstance(radius, bool) or not isinstance(radius, int | float) or not radius > 0:
            raise InputError("radius", repr(radius), "a positive number")
        return _on_grid(sides, Circle(sides, min(math.ceil(radius * radius) - 1, sum(side * side for side in sides))))

    @staticmethod
    def strided(n: int, stride: int, *, window: int = 1, block: int = 64, offset: int = 0, m: int | None = None) -> Layout:
        """Causal, by blocks: the last `window` blocks and the blocks j with (j + offset) mod stride = 0.

        Lin et al.: S2-Attention (arXiv 2407.17678); Child et al.: Sparse Transformers (arXiv 1904.10509) with block = 1.
        """
        m = n if m is None else m
        _check_sizes(n, m)
        for name, value, least in (("stride", stride, 1), ("window", window, 1), ("block", block, 1), ("offset", offset, 0)):
            _check_int(name, value, least)
        return Layout(n, m, Strided(block, window, stride, offset % stride), _side(block), 64)

    @staticmethod
    def power(n: int, *, window: int = 2, sinks: int = 0, block: int = 64, m: int | None = None) -> Layout:
        """Causal, by blocks: the last `window` blocks, those at distances 1, 2, 4, 8, …, and the first `sinks` blocks.

        Chen et al.: PowerAttention (arXiv 2503.03588): d layers reach every block at a distance below 2^d.
        """
        m = n if m is None else m
        _check_sizes(n, m)
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0), ("block", block, 1)):
            _check_int(name, value, least)
        return Layout(n, m, Power(block, window, sinks), _side(block), 64)

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
        block_q, block_k = _block(block)
        rows, columns = mask.shape[-2:]
        n = _cut("n", n, rows, block_q)
        m = _cut("m", m, columns, block_k)
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        counts, index = lists.compact(mask, int(mask.sum(-1).max()) if mask.shape[:-1].numel() else 0)
        return Layout(n, m, rule, block_q, block_k, index.contiguous(), counts)

    @staticmethod
    def from_predicate(
        f: lists.Predicate, n: int, m: int | None = None, block: int | tuple[int, int] = 64, *, device: torch.device | str | None = None
    ) -> Layout:
        """Evaluates f(i, j) on query indices ``[rows, 1]`` and key indices ``[m]``, now, and keeps block lists and bitmaps.

        >>> Layout.from_predicate(lambda i, j: (i - j).abs() % 7 == 0, 1000)

        f gives bool ``[rows, m]``, ``[H, rows, m]`` or ``[B, H, rows, m]``. The time is that of n · m pairs, the memory that of the
        blocks with a seen pair.
        """
        m = n if m is None else m
        _check_sizes(n, m, aligned=False)
        block_q, block_k = _block(block)
        index, counts, bits, number = lists.from_predicate(f, n, m, block_q, block_k, torch.device(device) if device else None)
        return Layout(n, m, EVERYTHING, block_q, block_k, index, counts, bits=bits, bit_index=number)

    @staticmethod
    def from_blocks(
        index: Tensor, counts: Tensor, block: int | tuple[int, int], n: int | None = None, m: int | None = None, *,
        rule: Rule = EVERYTHING,
    ) -> Layout:  # fmt: skip
        """Block lists chosen on the device: nothing is read back, here nor in `sparse_attention`.

        Args:
            index: integers ``[B|1, H|1, nq_blocks, capacity]``, the key blocks of every block of queries, none twice; what stands
                behind the first counts is ignored.
            counts: ``[B|1, H|1, nq_blocks]``, how many are meant, at most the capacity.
            block, n, rule: as in `from_block_mask`.
            m: keys (default: n).
        """
        _check_lists("index", index)
        if not isinstance(counts, Tensor) or counts.shape != index.shape[:3] or counts.device != index.device:
            was = shape_of(counts) if isinstance(counts, Tensor) else type(counts).__name__
            raise InputError("counts", was, f"{list(index.shape[:3])} on {index.device}")
        block_q, block_k = _block(block)
        n = _cut("n", n, index.shape[2], block_q)
        m = n if m is None else m
        _check_sizes(n, m, aligned=False)
        slot = torch.arange(index.shape[3], device=index.device)
        index = index.where(slot < counts[..., None], 0).to(torch.int32).contiguous()
        return Layout(n, m, rule, block_q, block_k, index, counts.to(torch.int32), dynamic=True)

    @staticmethod
    def from_indices(index: Tensor, m: int | None = None, *, n: int | None = None, block: int = 1, rule: Rule = EVERYTHING) -> Layout:
        """Single keys for every query, or for every block of queries: built on the device, nothing is read back.

        Args:
            index: integers ``[B|1, H|1, n / block, K]``; what lies outside of 0 … m − 1, as −1 does, names no key, and a key named
                twice counts once.
            m: keys (default: n).
            n: queries (default: all blocks full).
            block: queries that share a list.
            rule: what also holds.
        """
        _check_lists("index", index)
        _check_int("block", block, 1)
        n = _cut("n", n, index.shape[2], block)
        m = n if m is None else m
        _check_sizes(n, m, aligned=False)
        keys, counts = lists.from_indices(index, m)
        return Layout(n, m, rule, block, 1, keys.contiguous(), counts, dynamic=True)

    @staticmethod
    def from_runs(
        starts: Tensor, stops: Tensor, m: int | None = None, *, n: int | None = None, block: int | tuple[int, int] = 64,
        capacity: int | None = None, rule: Rule = EVERYTHING,
    ) -> Layout:  # fmt: skip
        """Runs of keys, start … stop − 1, for every block of queries; they may overlap, and empty ones are ignored.

        Args:
            starts, stops: integers ``[B|1, H|1, nq_blocks, R]``.
            m, n, rule: as in `from_indices`.
            block: queries that share a list, and the side of the key blocks that are visited.
            capacity: key blocks that the runs of one list may touch (those beyond are dropped); None counts them, which on a
                GPU is a synchronisation.
        """
        _check_lists("starts", starts)
        if not isinstance(stops, Tensor) or stops.shape != starts.shape or stops.device != starts.device:
            was = shape_of(stops) if isinstance(stops, Tensor) else type(stops).__name__
            raise InputError("stops", was, f"{list(starts.shape)} on {starts.device}, as starts")
        block_q, block_k = _block(block)
        n = _cut("n", n, starts.shape[2], block_q)
        m = n if m is None else m
        _check_sizes(n, m, aligned=False)
        touched = lists.blocks_of_runs(starts, stops, -(-m // block_k), block_k)
        if capacity is None:
            most = int(touched.sum(-1).max()) if touched.numel() else 0
        else:
            _check_int("capacity", capacity, 0)
            most = min(capacity, touched.shape[-1])
        counts, index = lists.compact(touched, most)
        a, b = (x.to(torch.int32).contiguous() for x in (starts, stops))
        return Layout(n, m, rule, block_q, block_k, index.contiguous(), counts, starts=a, stops=b, dynamic=capacity is not None)

    @staticmethod
    def from_flex(mask: Any) -> Layout:
        """From FlexAttention's `BlockMask`: its whole blocks as they are, its partial ones as bitmaps."""
        from subquad.ops.sparse.show import from_flex

        return from_flex(mask)

    @staticmethod
    def per_head(layouts: Sequence[Layout]) -> Layout:
        """A layout for each equal share of the heads: head h of H takes layouts[h · len(layouts) div H].

        Each names the same keys for all heads of its share.
        """
        return _parts("heads", layouts)

    @staticmethod
    def per_batch(layouts: Sequence[Layout]) -> Layout:
        """A layout for each row of the batch."""
        return _parts("rows", layouts)

    def __or__(self, other: Layout) -> Layout:
        """What a query sees by either. Rules join as rules; otherwise lists with bitmaps are made, pair by pair, now."""
        return _combine(self, other, Union)

    def __and__(self, other: Layout) -> Layout:
        """What a query sees by both. A rule joins the rule inside another's lists; two lists make a new one, now."""
        return _combine(self, other, Intersection)

    # ---- what it says ----------------------------------------------------------------------------------------------

    @property
    def rule(self) -> Rule:
        """What holds within the visited blocks; `Listed` where bitmaps, runs of keys or parts say more than a rule does."""
        more = self.bits is not None or self.starts is not None or bool(self.parts)
        return self.inner if not more else Listed() if self.inner == EVERYTHING else join(Intersection, Listed(), self.inner)

    @property
    def q_blocks(self) -> int:
        return -(-self.n // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.m // self.block_k)

    @property
    def rows(self) -> int:
        """Batch rows that it tells apart: 1 or B."""
        return len(self.parts) if self.parts_of == "rows" else 1 if self.index is None else self.index.shape[0]

    @property
    def heads(self) -> int:
        """Heads that it tells apart: a divisor of H."""
        if self.parts:
            return len(self.parts) if self.parts_of == "heads" else math.lcm(*(part.heads for part in self.parts))
        return 1 if self.index is None else self.index.shape[1]

    @property
    def device(self) -> torch.device | None:
        """Where its lists are; None for rules."""
        if self.parts:
            return next((part.device for part in self.parts if part.device is not None), None)
        return None if self.index is None else self.index.device

    @property
    def host_counts(self) -> list[int]:
        """`counts`, flat, as integers on the host: read once (a synchronisation on a GPU)."""
        if self._host_counts is None:
            assert self.counts is not None
            self._host_counts = self.counts.flatten().tolist()
        return self._host_counts

    def listed(self, at: tuple[Tensor, Tensor, Tensor], blocks: Tensor, slots: Tensor) -> Tensor | None:
        """What bitmaps and runs show of key blocks ``[R, C]``, in slots ``[R, C]`` of the lists at (batch row, head, query block).

        ``[R, block_q or 1, C · block_k]``; None where every pair of every block is.
        """
        if self.bit_index is not None and self.bits is not None:
            return lists.bitmaps(self.bits, self.bit_index[at].gather(1, slots), self.block_k)
        if self.starts is None or self.stops is None:
            return None
        keys = (blocks[:, :, None] * self.block_k + torch.arange(self.block_k, device=blocks.device)).flatten(1)
        return lists.in_runs(self.starts[at], self.stops[at], keys, keys)[:, None]

    def whole(self, at: tuple[Tensor, Tensor, Tensor], blocks: Tensor, slots: Tensor) -> Tensor | None:
        """Which of these blocks bitmaps and runs show whole, ``[R, C]``."""
        if self.bit_index is not None:
            return self.bit_index[at].gather(1, slots) < 0
        if self.starts is None or self.stops is None:
            return None
        first = blocks * self.block_k
        return lists.in_runs(self.starts[at], self.stops[at], first, first + self.block_k - 1)

    def queries(self, start: int, stop: int) -> Tensor:
        """The rows start … stop − 1 of the mask, ``[B|1, H|1, stop − start, m]``."""
        if self.parts:
            return _stack([part.queries(start, stop) for part in self.parts], self.parts_of)
        seen = torch.ones(1, 1, stop - start, self.m, dtype=torch.bool, device=self.device)
        i, j = torch.arange(start, stop, device=self.device), torch.arange(self.m, device=self.device)
        if self.index is not None and self.counts is not None and stop > start:
            first, last = start // self.block_q, (stop - 1) // self.block_q + 1
            batch, heads, _, capacity = self.index.shape
            at = tuple(
                x.flatten() for x in torch.meshgrid(
                    *(torch.arange(a, b, device=self.device) for a, b in ((0, batch), (0, heads), (first, last))), indexing="ij"
                )
            )  # fmt: skip
            slots = torch.arange(capacity, device=self.device).expand(len(at[0]), -1)
            kept = slots < self.counts[at][:, None]
            blocks = self.index[at].long().where(kept, self.k_blocks)
            named = self.listed(at, blocks, slots)  # type: ignore[arg-type]
            named = torch.ones(1, 1, 1, dtype=torch.bool, device=self.device) if named is None else named
            named = named.expand(len(kept), self.block_q, capacity * self.block_k) & kept.repeat_interleave(self.block_k, 1)[:, None]
            keys = (blocks[:, :, None] * self.block_k + torch.arange(self.block_k, device=self.device)).flatten(1)
            wide = torch.zeros(len(kept), self.block_q, (self.k_blocks + 1) * self.block_k, dtype=torch.bool, device=self.device)
            wide.scatter_(2, keys[:, None].expand(-1, self.block_q, -1), named)
            pairs = wide.unflatten(0, (batch, heads, last - first)).flatten(2, 3)
            seen = pairs[:, :, start - first * self.block_q : stop - first * self.block_q, : self.m]
        if self.inner == EVERYTHING:
            return seen
        return seen & self.inner.allowed(i[:, None] + (self.m - self.n), j)

    def to_mask(self, *, q_pos: Tensor | None = None, k_pos: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """The boolean ``[N, M]``, or ``[H, N, M]`` or ``[B, H, N, M]`` when lists differ: for tests and small sizes.

        Positions (``[N]`` or ``[B, N]``) and `cu_seqlens` mean what they mean in `sparse_attention`.
        """
        mask = self._mask(q_pos, k_pos, cu_seqlens)
        mask = mask.squeeze(0) if mask.shape[0] == 1 else mask
        return mask.squeeze(0) if mask.shape[0] == 1 and mask.dim() == 3 else mask

    def _mask(self, q_pos: Tensor | None, k_pos: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """``[B|1, H|1, N, M]``."""
        if self.parts:
            rows = self.parts_of == "rows"
            own = [[x[i] if rows and x is not None and x.dim() == 2 else x for x in (q_pos, k_pos)] for i in range(len(self.parts))]
            return _stack([part._mask(x[0], x[1], cu_seqlens) for part, x in zip(self.parts, own)], self.parts_of)
        device = next((x.device for x in (self.index, q_pos, k_pos, cu_seqlens) if x is not None), None)
        bare = Layout(self.n, self.m, EVERYTHING, self.block_q, self.block_k, self.index, self.counts,
                      bits=self.bits, bit_index=self.bit_index, starts=self.starts, stops=self.stops)  # fmt: skip
        mask = bare.queries(0, self.n).to(device)
        i, j = torch.arange(self.n, device=device), torch.arange(self.m, device=device)
        qp, kp = i + (self.m - self.n), j
        if cu_seqlens is not None:
            sequence = torch.bucketize(i, cu_seqlens[1:].to(i), right=True)
            mask = mask & (sequence[:, None] == sequence[None, :])
            qp = kp = i - cu_seqlens.to(i)[sequence]
        qp, kp = qp if q_pos is None else q_pos, kp if k_pos is None else k_pos
        seen = self.inner.allowed(qp[..., :, None], kp[..., None, :]) & (kp >= 0)[..., None, :]
        return mask & (seen.unsqueeze(1) if seen.dim() == 3 else seen)

    @property
    def density(self) -> float:
        """The share of the N·M pairs that is seen (over all heads)."""
        pairs = self.n * self.m
        if not pairs:
            return 0.0
        if self.parts:
            return sum(part.density for part in self.parts) / len(self.parts)
        shift, seen = self.m - self.n, 0
        if self.index is None:
            for start in range(0, self.n, self.block_q):
                first, last = start + shift, min(start + self.block_q, self.n) - 1 + shift
                q = torch.arange(first, last + 1)
                for k0, k1, full in segments(self.inner, first, last, self.m):
                    seen += q.numel() * (k1 - k0) if full else int(self.inner.allowed(q[:, None], torch.arange(k0, k1)).sum())
            return seen / pairs
        step = ROWS_AT_ONCE * self.block_q
        total = sum(int(self.queries(a, min(a + step, self.n)).sum()) for a in range(0, self.n, step))
        return total / (pairs * self.rows * self.heads)

    def explain(self, i: int, *, head: int = 0, row: int = 0) -> Seen:
        """The keys that query i sees (of the head and batch row, of those it tells apart), as runs, and the rule in words.

        >>> print(Layout.window(4096, 512, sinks=4).explain(4000))
        query 4000 sees 516 of 4096 keys: 0–3, 3489–4000
        by the rule: the last 512 keys up to its own position and the first 4
        """
        from subquad.ops.sparse.show import explain

        return explain(self, i, head, row)

    def reach(self, layers: int, *, query: int = -1, row: int = 0) -> int:
        """The receptive field: how many keys a query (default: the last) has reached after so many layers, over all heads."""
        from subquad.ops.sparse.show import reach

        return reach(self, layers, query, row)

    def plot(self, *, query: int | None = None, head: int = 0, row: int = 0) -> Any:
        """A matplotlib figure: the share of each block that is seen and, on a grid, the keys of one query (default: the middle)."""
        from subquad.ops.sparse.show import plot

        return plot(self, query, head, row)

    def to_flex(self, *, batch: int | None = None, heads: int | None = None, block: int = 128) -> Any:
        """FlexAttention's `BlockMask` of this layout; `heads` is H where heads differ."""
        from subquad.ops.sparse.show import to_flex

        return to_flex(self, batch, heads, block)

    def __repr__(self) -> str:
        if self.parts:
            return f"Layout({self.n} x {self.m}, {len(self.parts)} {self.parts_of}: {', '.join(repr(part) for part in self.parts[:4])})"
        held = "" if self.index is None else f", lists {list(self.index.shape)} of {self.block_q} x {self.block_k}"
        density = "" if self.dynamic else f", density {100 * self.density:.2f} %"
        return f"Layout({self.n} x {self.m}, {self.rule}{held}{density})"


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


def _block(block: int | tuple[int, int]) -> tuple[int, int]:
    block_q, block_k = block if isinstance(block, tuple) else (block, block)
    _check_int("block", block_q, 1)
    _check_int("block", block_k, 1)
    return block_q, block_k


def _side(block: int) -> int:
    """Queries of a tile: whole blocks of the rule, about 64."""
    return block * max(1, 64 // block) if block <= 128 else 64


def _axes(name: str, value: Any, axes: int) -> tuple[int, ...]:
    """A positive integer for each axis; a single number stands for all of them."""
    given = (value,) * max(axes, 1) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    good = all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in given)
    if not good or (len(given) != axes if axes else not 1 <= len(given) <= 3):
        raise InputError(name, repr(value), f"positive integers, {axes if axes else 'one to three'} of them")
    return given


def _on_grid(grid: tuple[int, ...], rule: Rule) -> Layout:
    n, side = math.prod(grid), grid[-1]
    # whole lines, so that a tile's keys are few long runs
    return Layout(n, n, rule, side * max(1, 64 // side) if side <= 128 else 64, 64)


def _check_lists(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        was = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
        raise InputError(name, was, "integers [B or 1, H or 1, blocks of queries, capacity]")


def _parts(of: str, layouts: Sequence[Layout]) -> Layout:
    parts = list(layouts)
    if not parts or not all(isinstance(part, Layout) for part in parts):
        raise InputError("layouts", repr(layouts), "at least one Layout")
    n, m = parts[0].n, parts[0].m
    for part in parts:
        if (part.n, part.m) != (n, m):
            raise InputError("layouts", f"{part.n} queries and {part.m} keys", f"layouts of one size, {n} x {m}")
        if part.rows > 1 or (of == "heads" and part.heads > 1):
            raise InputError("layouts", f"one of {part.rows} rows and {part.heads} heads", f"each the same for all {of}")
    return Layout(n, m, EVERYTHING, parts[0].block_q, parts[0].block_k, parts=parts, parts_of=of)


def _share(layout: Layout, of: str, number: int, count: int) -> Layout:
    """What lists name for one of `count` heads or rows."""
    dim = 1 if of == "heads" else 0
    if layout.index is None or layout.counts is None or layout.index.shape[dim] == 1:
        return layout
    if layout.index.shape[dim] != count:
        raise InputError("other", f"lists for {layout.index.shape[dim]} {of}", f"for 1 or {count}, as the other has")
    held = {name: getattr(layout, name) for name in ("index", "counts", "bit_index", "starts", "stops")}
    held = {name: x if x is None else x.narrow(dim, number, 1) for name, x in held.items()}
    return Layout(
        layout.n, layout.m, layout.inner, layout.block_q, layout.block_k, bits=layout.bits, dynamic=layout.dynamic, **held
    )  # fmt: skip


def _stack(masks: list[Tensor], of: str) -> Tensor:
    """Masks ``[B|1, H|1, …]`` of parts as one."""
    heads = math.lcm(*(mask.shape[1] for mask in masks))
    batch = max(mask.shape[0] for mask in masks)
    same = [mask.expand(batch, *mask.shape[1:]).repeat_interleave(heads // mask.shape[1], 1) for mask in masks]
    return torch.cat(same, 1 if of == "heads" else 0)


def _combine(a: Layout, b: Layout, kind: type[Union] | type[Intersection]) -> Layout:
    if not isinstance(b, Layout) or (a.n, a.m) != (b.n, b.m):
        was = f"{b.n} x {b.m}" if isinstance(b, Layout) else type(b).__name__
        raise InputError("other", was, f"a Layout of the same size, {a.n} x {a.m}")
    for x, y in ((a, b), (b, a)):
        if x.parts:
            others = (
                y.parts if y.parts and y.parts_of == x.parts_of else [_share(y, x.parts_of, p, len(x.parts)) for p in range(len(x.parts))]
            )
            if len(others) != len(x.parts):
                raise InputError("other", f"{len(others)} {y.parts_of}", f"as many as the other has, {len(x.parts)}")
            return _parts(x.parts_of, [_combine(p, q, kind) for p, q in zip(x.parts, others)])
    if a.index is None and b.index is None:
        wide = a if a.block_q >= b.block_q else b
        return Layout(a.n, a.m, join(kind, a.inner, b.inner), wide.block_q, wide.block_k)
    if a.index is None or b.index is None:
        lists_of, rule = (a, b.inner) if b.index is None else (b, a.inner)
        if kind is Intersection:
            return Layout(
                a.n, a.m, rule if lists_of.inner == EVERYTHING else join(kind, lists_of.inner, rule), lists_of.block_q, lists_of.block_k,
                lists_of.index, lists_of.counts, bits=lists_of.bits, bit_index=lists_of.bit_index, starts=lists_of.starts,
                stops=lists_of.stops, dynamic=lists_of.dynamic,
            )  # fmt: skip
    block = min(a.block_q, b.block_q), max(min(a.block_k, b.block_k), 16)

    def seen(i: Tensor, _: Tensor) -> Tensor:
        rows = [x.queries(int(i[0]), int(i[-1]) + 1).to(i.device) for x in (a, b)]
        return rows[0] | rows[1] if kind is Union else rows[0] & rows[1]

    return Layout.from_predicate(seen, a.n, a.m, block, device=a.device or b.device)


__all__ = ["Layout", "segments"]
