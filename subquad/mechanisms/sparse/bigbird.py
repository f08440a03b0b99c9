"""BigBird: softmax over near blocks, global blocks and a few random ones, for each block of queries.

    o_i = Σ_j softmax_j(q_i·k_j / √D) v_j   over the keys of the blocks that block(i) sees:
    near     |block(i) − block(j)| < local
    global   the first `global_blocks` and as many last ones, which see all keys themselves
    random   `random_blocks` of the others, drawn for each head and block of queries; all of them where they are fewer

The internal form (ITC: global tokens are the sequence's own) by blocks, local = 2 and one block at either end global, as released.
No block is counted twice: random blocks are neither near nor global. Nothing wraps around at the ends, where the released code too
leaves blocks out. Draws are uniform over the whole sequence, while the released ones keep to a plan of its beginning; they follow
by a hash from seed, layer, head, block of queries and how many blocks there are to draw from, so that they are the same on every
device and, causally, at every length. With `causal`, which is not in the paper, a token sees no later key: near blocks are those
before, the first blocks are global to read from, and random blocks are drawn from earlier ones. Rotary turns q and k. The state
is every key (turned) and value.
Zaheer et al.: Big Bird: Transformers for Longer Sequences (arXiv 2007.14062), section 2.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.contract import Attention, Call, Card, Shape, register
from subquad.ops.sparse import sparse_attention
from subquad.ops.sparse.cached import cached_attention
from subquad.ops.sparse.layout import Layout
from subquad.ops.sparse.rules import EVERYTHING, Causal
from subquad.rotary import Rotary, rotate

WORD = 0xFFFFFFFF


def _flops(
    s: Shape, block: int = 64, local: int = 2, global_blocks: int = 1, random_blocks: int = 3, causal: bool = True, **_: object
) -> float:
    if causal:
        pairs, most = s.tokens * block * (local - 0.5 + global_blocks + random_blocks), s.tokens * (s.tokens + 1) / 2
    else:
        pairs, most = s.tokens * block * (2 * local - 1 + 4 * global_blocks + random_blocks), s.tokens**2
    return 2 * s.batch * s.heads * min(pairs, most) * (s.head_dim + s.values)


CARD = Card(
    title="BigBird",
    paper="arXiv 2007.14062",
    family="sparse",
    summary="Softmax over near blocks, global blocks and a few random ones: linear cost, and any two tokens a few layers apart.",
    causal=True,
    bidirectional=True,
    flops=_flops,
    bytes_moved=lambda s, **_: s.tensor_bytes,
    state_bytes=lambda s, **_: s.batch * s.tokens * s.kv * (s.head_dim + s.values) * s.itemsize,
    keeps="every key and value: {tokens} tokens of {kv_heads} heads × ({head_dim} + {value_dim}) numbers",
)


@register("bigbird")
class BigBird(Attention):
    """Attention to near, global and random blocks.

    Args:
        block: tokens of a block.
        local: blocks seen on each side of a token, its own counted on both.
        global_blocks: blocks at either end that see all and are seen by all; when causal, first blocks that all later ones see.
        random_blocks: further blocks that a block of queries sees.
        seed: of the draws, 0 … 2³² − 1.
        causal: whether later keys are hidden.
    """

    card = CARD

    def __init__(
        self, heads: int, head_dim: int, *, block: int = 64, local: int = 2, global_blocks: int = 1, random_blocks: int = 3,
        seed: int = 0, causal: bool = True, **sizes: object,
    ) -> None:  # fmt: skip
        super().__init__(heads, head_dim, **sizes)  # type: ignore[arg-type]
        named = (("block", block, 1), ("local", local, 1), ("global_blocks", global_blocks, 0), ("random_blocks", random_blocks, 0))
        for name, value, least in named:
            if type(value) is not int or value < least:
                raise InputError(name, value, f"an integer of at least {least}")
        if type(seed) is not int or not 0 <= seed <= WORD:
            raise InputError("seed", seed, "an integer of 0 … 2³² − 1")
        self.block, self.local, self.global_blocks, self.random_blocks = block, local, global_blocks, random_blocks
        self.seed, self.causal = seed, causal

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
        q, k = rotate(call.rotary, q, k)
        if call.state is not None or call.return_state:
            return cached_attention(q, k, v, call, lambda n, _: self.layout(n, q.device), self._behind)
        if call.cu_seqlens is None:
            return self._whole(q, k, v), None
        ends = pairwise(call.cu_seqlens.tolist())
        return torch.cat(
            [v.new_zeros(1, 0, self.heads, v.shape[3]), *(self._whole(*(x[:, a:b] for x in (q, k, v))) for a, b in ends)], 1
        ), None

    def layout(self, n: int, device: torch.device | str | None = None) -> Layout:
        """The keys of a sequence of n that its queries see; when bidirectional, of those between the global blocks."""
        count, ends = -(-n // self.block), 0 if self.causal else self.global_blocks
        rows = torch.arange(ends, max(ends, count - ends), device=device)
        index = self.blocks(rows[None], count).sort(-1, descending=True).values
        queries = len(rows) * self.block if ends else n
        rule = Causal() if self.causal else EVERYTHING
        return Layout.from_blocks(index, (index >= 0).sum(-1), self.block, queries, n, rule=rule)

    def blocks(self, rows: Tensor, count: int) -> Tensor:
        """The key blocks that the query blocks `rows` ``[B, R]`` of `count` see, ``[B, H, R, capacity]``; −1 stands for none.

        Bidirectional rows are those between the global blocks.
        """
        i, g = rows[:, None, :, None], self.global_blocks
        near = i + torch.arange(1 - self.local, 1 if self.causal else self.local, device=rows.device)
        near = near.where((near >= g) & (near < (count if self.causal else count - g)), -1)
        first = torch.arange(g, device=rows.device)
        ends = [first.where(first <= i, -1)] if self.causal else [first, first + (count - g)]
        parts = [near, *ends, self.random(rows, count)]
        return torch.cat([part.expand(rows.shape[0], self.heads, rows.shape[1], -1) for part in parts], -1)

    def random(self, rows: Tensor, count: int) -> Tensor:
        """The random blocks of the query blocks `rows` ``[B, R]`` of `count`, ``[B, H, R, random_blocks]``; −1 stands for none."""
        i, g, r = rows[:, None, :], self.global_blocks, self.random_blocks
        # the candidates are those between the first blocks and the near ones, and those from `resume` on
        before = (i - self.local + 1).clamp(max=count - (0 if self.causal else g)).sub(g).clamp(min=0)
        resume = (i + self.local).clamp(min=g)
        choice = before if self.causal else before + (count - g - resume).clamp(min=0)
        key = _hash(_hash(torch.full_like(i, self.seed)) + self.layer[0])
        key = _hash(_hash(key + torch.arange(self.heads, device=rows.device)[:, None]) + i)
        picks: list[Tensor] = []
        for t in range(r):  # a subset without repetition (Floyd): the t-th of the first choice − r + t + 1, or if taken the last of them
            last = choice - r + t
            pick = _hash(key + t) % (last + 1).clamp(min=1)
            taken = torch.stack([pick == other for other in picks]).any(0) if picks else torch.zeros_like(pick, dtype=torch.bool)
            few = torch.full_like(pick, t).where(t < choice, -1)  # all that there are
            picks.append(torch.where(choice > r, torch.where(taken, last, pick), few))
        x = torch.stack(picks, -1) if r else key[..., None][..., :0]
        before, resume = before[..., None], resume[..., None]
        return torch.where(x < 0, -1, torch.where(x < before, g + x, resume + x - before))

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One whole sequence, of each row of the batch."""
        n = q.shape[1]
        first, stop = self.global_blocks * self.block, (-(-n // self.block) - self.global_blocks) * self.block
        if self.causal or not first:
            return sparse_attention(q, k, v, self.layout(n, q.device))
        if stop <= first:  # all blocks are global
            return sparse_attention(q, k, v, Layout.dense(n))
        between = sparse_attention(q[:, first:stop], k, v, self.layout(n, q.device))
        ends = torch.cat([q[:, :first], q[:, stop:]], 1)
        ends = sparse_attention(ends, k, v, Layout.dense(ends.shape[1], n))
        return torch.cat([ends[:, :first], between, ends[:, first:]], 1)

    def _behind(self, q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        """New tokens behind the `length` ``[B]`` that each row has seen; its last key is the last of k ``[B, M, …]``."""
        n, m, side = q.shape[1], k.shape[1], self.block
        shift = (m - n) - length  # from a key's position to its place
        if n < side:
            position = length[:, None] + torch.arange(n, device=q.device)
            keys = self.blocks(position // side, -(-m // side))[..., None] * side + torch.arange(side, device=q.device)
            seen = (keys >= 0) & (keys <= position[:, None, :, None, None])
            place = torch.where(seen, keys + shift[:, None, None, None, None], -1).flatten(3)
            return sparse_attention(q, k, v, Layout.from_indices(place, m, n=n))
        # every row is set so that its blocks fall into place: keys by their positions, queries from the start of a block on
        rows, tiles = torch.arange(q.shape[0], device=q.device)[:, None], -(-(n + side - 1) // side)
        slots = (length % side)[:, None] + torch.arange(n, device=q.device)
        first, queries = length // side, q.new_zeros(q.shape[0], tiles * side, *q.shape[2:]).index_put((rows, slots), q)
        wide = max(m, tiles * side)
        k, v = (x[rows, (torch.arange(wide, device=q.device) + shift[:, None]).clamp(0, m - 1)] for x in (k, v))
        index = self.blocks(first[:, None] + torch.arange(tiles, device=q.device), -(-wide // side))
        index = index.where(index * side < wide, -1).sort(-1, descending=True).values  # blocks behind the last token have no queries
        layout = Layout.from_blocks(index, (index >= 0).sum(-1), side, tiles * side, wide, rule=Causal())
        q_pos = first[:, None] * side + torch.arange(tiles * side, device=q.device)
        return sparse_attention(queries, k, v, layout, q_pos=q_pos)[rows, slots]


def _hash(x: Tensor) -> Tensor:
    """32 well mixed bits of each integer (Wellons: hash-prospector); factors are below 2³¹, so that int64 holds all products."""
    x = (x + 0x9E3779B9) & WORD
    x = (x ^ (x >> 16)) * 0x21F0AAAD & WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & WORD
    return x ^ (x >> 15)


def reference(module: BigBird, q: Tensor, k: Tensor, v: Tensor, *, rotary: Rotary | None = None, **_: object) -> Tensor:
    q, k = rotate(rotary, q, k)
    k, v = (x.repeat_interleave(module.heads // module.kv_heads, 2) for x in (k, v))
    token = torch.arange(q.shape[1], device=q.device)
    count, g = -(-q.shape[1] // module.block), module.global_blocks
    row = torch.arange(count, device=q.device)
    drawn = (module.random(row[None], count)[0][..., None] == row).any(-2)  # [H, query blocks, key blocks]
    i, j = row[:, None], row
    ends = j < g if module.causal else (j < g) | (j >= count - g) | (i < g) | (i >= count - g)
    blocks = ((i - j).abs() < module.local) | ends | drawn
    seen = blocks[:, token[:, None] // module.block, token // module.block]
    seen = seen & (token <= token[:, None]) if module.causal else seen
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * module.head_dim**-0.5
    return torch.einsum("bhnm,bmhv->bnhv", s.masked_fill(~seen, -torch.inf).softmax(-1), v)
