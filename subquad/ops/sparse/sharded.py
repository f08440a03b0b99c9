"""What sharded columns keep: the last keys of all heads in a ring, and of the older ones each head's own shard.

Block j of `block` tokens belongs to shard s if (j + s) mod stride = 0. Keys that `near` tokens have followed are evicted from the
ring (`ring`); of these a head of keys keeps, for each shard that its queries read, the tokens in blocks of that shard. Entry x of
a shard is its x-th token: the same block count for all shards, up to the block that is being evicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.ring import holds, store

NAMES = ("k", "v")


@dataclass(frozen=True)
class Shards:
    """Sizes of one layer: query head h reads shard h · stride div heads, and head h · kv_heads div heads of the keys.

    Its tensors, for R rows: k_near, v_near ``[R, near, kv_heads, D]``; k_far, v_far ``[R, far(tokens), pairs, D]``, where pairs are
    those of (head of keys, shard) that occur; and `tokens` ``[R, tokens, 0]``, which holds nothing: its length says on the host how
    many the longest row has seen.
    """

    heads: int
    kv_heads: int
    stride: int
    block: int
    local: int

    @property
    def near(self) -> int:
        """Slots of the ring: all that the local blocks of a query may reach back to."""
        return self.local * self.block

    @property
    def pairs(self) -> int:
        """Pairs of a head of keys and a shard that one of its queries reads."""
        return self.kv_heads + self.stride - gcd(self.kv_heads, self.stride)

    def far(self, tokens: int) -> int:
        """Entries of the shard that has most, of `tokens` seen."""
        gone = max(0, tokens - self.near)
        period = self.stride * self.block
        return gone // period * self.block + min(gone % period, self.block)

    def kept(self, tokens: int) -> int:
        """Keys kept of one row, over all heads."""
        return self.near * self.kv_heads + self.far(tokens) * self.pairs

    def attend(self, q: Tensor, k: Tensor, v: Tensor, old: Mapping[str, Tensor], length: Tensor) -> Tensor:
        """New tokens ``[R, n, …]`` behind what was kept of the `length` ``[R]`` before them."""
        n, outputs = q.shape[1], []
        q_pos = length[:, None] + torch.arange(n, device=q.device)
        held = holds(length, self.near, 0)
        near_pos = torch.cat([held.where(held < length[:, None], -1), q_pos], 1)
        near = [torch.cat([old[f"{name}_near"], x], 1) for name, x in zip(NAMES, (k, v))]
        far_pos, per_shard = self._positions(length, old["k_far"].shape[1]), self.heads // self.stride
        for shard in range(self.stride):
            mine = range(shard * per_shard, (shard + 1) * per_shard)
            kv = [h * self.kv_heads // self.heads for h in mine]
            first, count = kv[0], kv[-1] - kv[0] + 1
            pair = self._of_pairs.index((first, shard))
            keys, values = (
                torch.cat([old[f"{name}_far"].narrow(2, pair, count), x.narrow(2, first, count)], 1) for name, x in zip(NAMES, near)
            )
            if len({kv.count(g) for g in kv}) > 1:  # heads of keys with unequal shares of this shard's queries
                keys, values = (x[:, :, [g - first for g in kv]] for x in (keys, values))
            k_pos = torch.cat([far_pos[..., shard], near_pos], 1)
            layout = Layout.strided(n, self.stride, window=self.local, block=self.block, offset=shard, m=k_pos.shape[1])
            outputs.append(sparse_attention(q[:, :, mine.start : mine.stop], keys, values, layout, q_pos=q_pos, k_pos=k_pos))
        return torch.cat(outputs, 2)

    def start(self, rows: int, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """The tensors of rows that have seen nothing."""
        near, far = ({f"{name}_{part}": x.new_zeros(rows, slots, heads, x.shape[3]) for name, x in zip(NAMES, (k, v))}
                     for part, slots, heads in (("near", self.near, self.kv_heads), ("far", 0, self.pairs)))  # fmt: skip
        return {**near, **far, "tokens": k.new_zeros(rows, 0, 0)}

    def store(self, old: Mapping[str, Tensor], k: Tensor, v: Tensor, length: Tensor, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
        """The tensors after new tokens ``[R, n, …]``, or packed ``[1, total, …]``, behind `length` ``[R]``."""
        if k.shape[1] == 0:
            return {name: old[name] for name in ("k_near", "v_near", "k_far", "v_far", "tokens")}
        rows = old["k_near"].shape[0]
        if cu_seqlens is None:
            row, start, count, most = torch.arange(rows, device=k.device), torch.zeros_like(length), length * 0 + k.shape[1], k.shape[1]
        else:
            row, start, count = torch.zeros_like(length), cu_seqlens[:-1].long(), cu_seqlens.diff().long()
            most = max(cu_seqlens.diff().tolist(), default=0)
        tokens = old["tokens"].shape[1] + most
        new = {"tokens": k.new_zeros(rows, tokens, 0)}
        for name, x in zip(NAMES, (k, v)):
            new[f"{name}_near"] = store(old[f"{name}_near"], x, length, 0, cu_seqlens)
        sources = [(old[f"{name}_far"], old[f"{name}_near"], x) for name, x in zip(NAMES, (k, v))]
        moved = self._move(sources, length, (row, start, count), self.far(tokens), most)
        return {**new, **{f"{name}_far": x for name, x in zip(NAMES, moved)}}

    def _move(
        self, sources: list[tuple[Tensor, Tensor, Tensor]], length: Tensor, at: tuple[Tensor, Tensor, Tensor], entries: int, most: int
    ) -> list[Tensor]:
        """The shards of (far, ring, new) tensors with what is evicted now; token i of row r is ``new[row[r], start[r] + i]``."""
        (row, start, count), (far, ring, new) = at, sources[0]
        rows, seen = torch.arange(far.shape[0], device=far.device)[:, None], length[:, None, None]
        # an entry's old place; what stands in those that had none is never read, as they have no position
        shift = self._counts(length + count) - entries - self._counts(length) + far.shape[1]
        back = (torch.arange(entries, device=far.device) + shift[:, None]).clamp(0, max(0, far.shape[1] - 1))
        # shards differ by a block at most: what is new stands among the last entries
        last = min(entries, (most // (self.stride * self.block) + 2) * self.block)
        heads, shards = zip(*self._of_pairs)
        position = self._positions(length + count, last)[..., shards]
        fresh = ((position >= 0) & (position >= seen - self.near))[..., None]
        in_ring, slot, head = (position < seen)[..., None], position % self.near, torch.tensor(heads, device=far.device)
        token = (start[:, None, None] + position - seen).clamp(0, new.shape[1] - 1)
        moved = []
        for far, ring, new in sources:
            old = far[rows, back] if far.shape[1] else far.new_zeros(far.shape[0], entries, *far.shape[2:])
            came = torch.where(in_ring, ring[rows[..., None], slot, head], new[row[:, None, None], token, head])
            moved.append(torch.cat([old[:, : entries - last], torch.where(fresh, came, old[:, entries - last :])], 1))
        return moved

    @property
    def _of_pairs(self) -> list[tuple[int, int]]:
        """(head of keys, shard) of every pair."""
        return sorted({(h * self.kv_heads // self.heads, h * self.stride // self.heads) for h in range(self.heads)})

    def _counts(self, length: Tensor) -> Tensor:
        """`far` of each row."""
        gone, period = (length - self.near).clamp(min=0), self.stride * self.block
        return gone // period * self.block + (gone % period).clamp(max=self.block)

    def _positions(self, length: Tensor, entries: int) -> Tensor:
        """Of the entries of every shard, ``[R, entries, stride]``; −1 where there is none. They end with the row's last."""
        x = (torch.arange(entries, device=length.device) - entries + self._counts(length)[:, None])[..., None]
        shard = torch.arange(self.stride, device=length.device)
        position = (x // self.block * self.stride + -shard % self.stride) * self.block + x % self.block
        return position.where((x >= 0) & (position < (length - self.near)[:, None, None]), -1)
