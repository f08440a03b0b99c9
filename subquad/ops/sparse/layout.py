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

from subquad.checks import InputError
from subquad.ops.sparse import lists
from subquad.ops.sparse.by_list import ByList
from subquad.ops.sparse.by_rule import ByRule
from subquad.ops.sparse.count import pairs_of
from subquad.ops.sparse.patterns import Intersection, Listed, Union, join
from subquad.ops.sparse.rules import EVERYTHING, Rule

if TYPE_CHECKING:
    from subquad.ops.sparse.show import Seen

ROWS_AT_ONCE = 16  # query blocks whose visited pairs are counted together


class Layout(ByRule, ByList):
    """Which of `m` keys each of `n` queries sees. Made by the constructors of `by_rule` and `by_list`, and those below.

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
            if (counted := pairs_of(self.inner, self.n, self.m)) is not None:
                return counted / pairs
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
