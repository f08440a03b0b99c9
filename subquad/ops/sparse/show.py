"""How a layout is shown and how it travels: explain, reach, plot, and FlexAttention's BlockMask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.ops.sparse import lists
from subquad.ops.sparse.layout import Layout, segments
from subquad.ops.sparse.rules import Rule

SHOWN = 12  # runs that are written out
PICTURE = 512  # blocks a side of a picture
AT_ONCE = 1 << 22  # pairs read together


@dataclass(frozen=True)
class Seen:
    """The keys of one query: runs (start, stop) in rising order, of `keys` keys in all, and the rule in words."""

    query: int
    keys: int
    runs: tuple[tuple[int, int], ...]
    words: str

    @property
    def count(self) -> int:
        return sum(b - a for a, b in self.runs)

    def __str__(self) -> str:
        shown = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in self.runs[:SHOWN]]
        rest = [f"and {len(self.runs) - SHOWN} more runs"] if len(self.runs) > SHOWN else []
        named = f": {', '.join(shown + rest)}" if self.runs else ""
        return f"query {self.query} sees {self.count} of {self.keys} keys{named}\nby the rule: {self.words}"


def part_of(layout: Layout, head: int, row: int) -> tuple[Layout, int, int]:
    """The layout without parts that a head and a batch row fall to, and their numbers in it."""
    for name, number, limit in (("head", head, layout.heads), ("row", row, layout.rows)):
        if not 0 <= number < limit:
            raise InputError(name, number, f"one of the {limit} that the layout tells apart, from 0")
    while layout.parts:
        if layout.parts_of == "rows":
            heads = layout.heads
            layout, row = layout.parts[row], 0
            head = head * layout.heads // heads
        else:
            layout, head = layout.parts[head], 0
    return layout, head, row


def explain(layout: Layout, i: int, head: int, row: int) -> Seen:
    if not isinstance(i, int) or not 0 <= i < layout.n:
        raise InputError("i", repr(i), f"a query, 0 … {layout.n - 1}")
    layout, head, row = part_of(layout, head, row)
    edge = torch.nn.functional.pad(layout.queries(i, i + 1)[row, head, 0].to("cpu", torch.int8), (1, 1)).diff()
    runs = zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist())
    return Seen(i, layout.m, tuple(runs), layout.rule.words)


def reach(layout: Layout, layers: int, query: int, row: int) -> int:
    if layout.n != layout.m:
        raise InputError("layout", f"{layout.n} queries and {layout.m} keys", "as many queries as keys: layers follow one another")
    if not isinstance(layers, int) or layers < 0:
        raise InputError("layers", repr(layers), "an integer of at least 0")
    if not isinstance(query, int) or not -layout.n <= query < layout.n:
        raise InputError("query", repr(query), f"a query, 0 … {layout.n - 1}, or counted from the end")
    reached = torch.zeros(layout.n, dtype=torch.bool)
    reached[query] = True
    new = reached.clone()
    step = max(1, AT_ONCE // max(1, layout.m))
    for layer in range(layers):
        found = torch.zeros_like(reached)
        rows = new.nonzero()[:, 0]
        while rows.numel():
            first = int(rows[0])
            now = rows[rows < first + step]
            seen = _rows(layout, first, int(now[-1]) + 1, row)
            found |= seen[:, now - first].flatten(0, 1).any(0)
            rows = rows[now.numel() :]
        # the first layer replaces the query itself, which need not be among its keys
        new, reached = (found, found) if layer == 0 else (found & ~reached, found | reached)
        if not new.any():
            break
    return int(reached.sum())


def _rows(layout: Layout, start: int, stop: int, row: int) -> Tensor:
    """``[H|1, stop − start, m]`` of one batch row."""
    seen = layout.queries(start, stop)
    return seen[row if seen.shape[0] > 1 else 0].cpu()


def plot(layout: Layout, query: int | None, head: int, row: int) -> Any:
    from matplotlib.figure import Figure

    part, head, row = part_of(layout, head, row)
    query = layout.n // 2 + (grid_of(part) or (0,))[-1] // 2 if query is None else query
    grid = grid_of(part)
    figure = Figure(figsize=(5.2 if grid is None else 10, 4.6), layout="constrained")
    axes = figure.subplots(1, 1 if grid is None else 2, squeeze=False)[0]
    image = axes[0].imshow(
        blocks(part, head, row).numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", extent=(0, part.m, part.n, 0)
    )
    axes[0].set(xlabel="key", ylabel="query", title=f"{part.n} x {part.m}, share of each block that is seen")
    figure.colorbar(image, ax=axes[0], shrink=0.8)
    if grid is not None:
        query = min(query, part.n - 1)
        seen = part.queries(query, query + 1)[row if part.rows > 1 else 0, head, 0].cpu().reshape(grid)
        at = [int(x) for x in torch.unravel_index(torch.tensor(query), grid)]
        plane = seen.reshape(1, -1) if len(grid) == 1 else seen if len(grid) == 2 else seen[at[0]]
        axes[1].imshow(plane.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes[1].plot(at[-1], 0 if len(grid) == 1 else at[-2], "o", color="tab:red", markersize=5)
        where = f" in frame {at[0]}" if len(grid) == 3 else ""
        axes[1].set(xlabel="column", ylabel="row", title=f"the {int(seen.sum())} keys of query {query}{where}")
    return figure


def grid_of(layout: Layout) -> tuple[int, ...] | None:
    """The grid that a rule of the layout works on, if any."""
    rules: list[Rule] = [layout.inner]
    while rules:
        rule = rules.pop()
        if hasattr(rule, "grid"):
            return tuple(rule.grid)
        rules += getattr(rule, "rules", ())
    return None


def blocks(layout: Layout, head: int = 0, row: int = 0) -> Tensor:
    """The share that is seen of each block of a picture of at most `PICTURE` blocks a side, float32."""
    side = max(1, -(-max(layout.n, layout.m) // PICTURE))
    rows, columns = -(-layout.n // side), -(-layout.m // side)
    share = torch.zeros(rows, columns)
    width = (torch.arange(1, columns + 1) * side).clamp(max=layout.m) - torch.arange(columns) * side
    of = torch.arange(layout.m) // side
    for i in range(rows):
        a, b = i * side, min((i + 1) * side, layout.n)
        if layout.index is None:  # by the rule's own runs: the picture of a long layout takes as long as it has blocks
            seen = torch.zeros(layout.m)
            shift = layout.m - layout.n
            for k0, k1, full in segments(layout.inner, a + shift, b - 1 + shift, layout.m):
                q = torch.arange(a + shift, b + shift)
                seen[k0:k1] = b - a if full else layout.inner.allowed(q[:, None], torch.arange(k0, k1)).sum(0).float()
        else:
            seen = layout.queries(a, b)[row if layout.rows > 1 else 0, head].sum(0).float().cpu()
        share[i] = torch.zeros(columns).index_add_(0, of, seen) / (width * (b - a))
    return share


def to_flex(layout: Layout, batch: int | None, heads: int | None, block: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if layout.heads > 1 and (heads is None or heads % layout.heads):
        raise InputError("heads", heads, f"the number of heads, a multiple of the {layout.heads} that the layout tells apart")
    if layout.rows > 1 and batch not in (None, layout.rows):
        raise InputError("batch", batch, f"the batch size, {layout.rows}")
    rows = layout.rows if layout.rows > 1 else None
    device = layout.device or torch.device("cpu")
    return create_block_mask(
        _mask_mod(layout, heads or 1), rows or batch, heads, layout.n, layout.m, device=str(device), BLOCK_SIZE=block
    )  # fmt: skip


def _mask_mod(layout: Layout, heads: int) -> Any:
    """The layout as FlexAttention's function of (batch row, head, query, key), in tensor operations alone."""
    if layout.parts:
        parts = [_mask_mod(part, max(1, heads // len(layout.parts)) if layout.parts_of == "heads" else heads) for part in layout.parts]
        share = heads // len(parts)

        def by_part(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            number = h // share if layout.parts_of == "heads" else b
            own_h = h % share if layout.parts_of == "heads" else h
            seen = (i != i) & (j != j)
            for at, part in enumerate(parts):
                seen = seen | ((number == at) & part(b * 0 if layout.parts_of == "rows" else b, own_h, i, j))
            return seen

        return by_part
    shift, rule = layout.m - layout.n, layout.inner
    if layout.index is None:
        return lambda b, h, i, j: rule.allowed(i + shift, j)
    assert layout.counts is not None
    kept = torch.arange(layout.index.shape[-1], device=layout.index.device) < layout.counts[..., None]
    slot = torch.full((*layout.counts.shape, layout.k_blocks + 1), -1, dtype=torch.long, device=layout.index.device)
    numbers = torch.arange(layout.index.shape[-1], device=layout.index.device).expand(layout.index.shape)
    slot.scatter_(-1, layout.index.long().where(kept, layout.k_blocks), numbers)
    rows, own, share = layout.rows, layout.heads, max(1, heads // layout.heads)
    number = None if layout.bit_index is None or not len(layout.bits) else layout.bit_index.long()  # type: ignore[arg-type]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        b, h = b * (rows > 1), h // share if own > 1 else h * 0
        bq, bk = i // layout.block_q, j // layout.block_k
        at = slot[b, h, bq, bk]
        found = (at >= 0) & rule.allowed(i + shift, j)
        if number is not None and layout.bits is not None:
            named = number[b, h, bq, at.clamp(min=0)]
            key = j % layout.block_k
            word = layout.bits[named.clamp(min=0), i % layout.block_q, key // lists.WORD]
            found = found & ((named < 0) | ((word >> (key % lists.WORD)) & 1 == 1))
        if layout.starts is not None and layout.stops is not None:
            inside = (i != i) & (j != j)
            for r in range(layout.starts.shape[-1]):
                inside = inside | ((layout.starts[b, h, bq, r] <= j) & (j < layout.stops[b, h, bq, r]))
            found = found & inside
        return found

    return seen


def from_flex(mask: Any) -> Layout:
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask):
        raise InputError("mask", type(mask).__name__, "a torch.nn.attention.flex_attention.BlockMask")
    n, m = mask.seq_lengths
    (block_q, block_k), f = mask.BLOCK_SIZE, mask.mask_mod
    partial, whole = mask.kv_num_blocks, mask.full_kv_num_blocks
    shape = (*partial.shape, -(-m // block_k))
    some = _named(mask.kv_indices, partial, shape)
    every = torch.zeros_like(some) if whole is None or mask.full_kv_indices is None else _named(mask.full_kv_indices, whole, shape)
    b, h = (torch.arange(size, device=partial.device) for size in shape[:2])

    def seen(i: Tensor, j: Tensor) -> Tensor:
        at = (slice(None), slice(None), i[:, 0] // block_q)
        inside = f(b[:, None, None, None], h[:, None, None], i, j).expand(*shape[:2], len(i), m)
        return every[at][..., j // block_k] | (some[at][..., j // block_k] & inside)

    return Layout.from_predicate(seen, n, m, (block_q, block_k), device=partial.device)


def _named(index: Tensor, counts: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Block lists as booleans ``[B, H, nq, nk]``."""
    kept = torch.arange(index.shape[-1], device=index.device) < counts[..., None]
    found = torch.zeros(*shape[:-1], shape[-1] + 1, dtype=torch.bool, device=index.device)
    return found.scatter_(-1, index.long().where(kept, shape[-1]), True)[..., : shape[-1]]


__all__ = ["Seen", "blocks", "explain", "from_flex", "grid_of", "plot", "reach", "to_flex"]
