"""Launches of the sparse kernels: tile sizes from a table, and arguments in the kernels' order."""

from __future__ import annotations

from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import padded
from subquad.ops.launch import forget, remembered
from subquad.ops.launcher import Described, Grid, Launcher, describable, launcher, token_step
from subquad.ops.sparse import kernels
from subquad.ops.sparse.compiled import triton_rule
from subquad.ops.sparse.patterns import Listed
from subquad.ops.sparse.rules import EVERYTHING, Causal, Rule, Terrace, Window
from subquad.ops.sparse.visits import Lists, Tiling, tiling

Sizes = tuple[int, ...]


class Tile(NamedTuple):
    """Queries and keys of a tile, warps of a program, stages of the pipeline, and whether loads go by tensor descriptors.

    Descriptors serve tiles of neighbouring tokens in 16-byte aligned memory; elsewhere loads go by addresses.
    """

    q: int
    k: int
    warps: int
    stages: int
    described: bool = False


# (kernel, padded width of q and v, bits of an element, whether tiles are boxes of a grid) -> tile. Measured on an H200, see
# benchmarks/results/sparse-tiles-*.json: by the geometric mean over windows and all before a position, which counts half. Of boxes forward
# at width 64, stages as for lines, as loads run further ahead since; of lines there, what grids in raster order are fastest with.
TABLE: dict[tuple[str, int, int, bool], Tile] = {
    ("forward", 64, 16, False): Tile(64, 64, 4, 3),
    ("forward", 128, 16, False): Tile(64, 64, 4, 3, True),
    ("query", 64, 16, False): Tile(64, 64, 4, 3),
    ("query", 128, 16, False): Tile(64, 64, 4, 2, True),
    ("key", 64, 16, False): Tile(128, 64, 4, 2, True),
    ("key", 128, 16, False): Tile(64, 64, 4, 2, True),
    ("forward", 64, 16, True): Tile(64, 64, 4, 3),
    ("forward", 128, 16, True): Tile(64, 32, 4, 3),
    ("query", 64, 16, True): Tile(64, 32, 4, 3),
    ("query", 128, 16, True): Tile(64, 32, 4, 3),
    ("key", 64, 16, True): Tile(32, 64, 4, 3),
    ("key", 128, 16, True): Tile(32, 64, 4, 3),
}
BELOW = Causal, Window, Terrace  # no key after the query is seen, and so none after the last: nothing asks whether a key is there
DESCRIBE_FROM = 256  # tokens: with fewer, making descriptors takes longer than they save
CAREFUL = Tile(64, 32, 4, 1)  # what was not measured


def tile_of(kernel: str, width: int, bits: int, boxes: bool, block_q: int = 0, block_k: int = 0) -> Tile:
    """The table's tile, cut so that it divides the blocks of lists (0: any)."""
    width = max(32, padded(width))
    keys = [(kernel, wide, bits, kind) for wide in (width, max(64, width)) for kind in (boxes, False)]
    wide = Tile(32, 16, 4, 1) if bits == 32 else CAREFUL._replace(warps=8)  # as shared memory has to hold it
    found = next((TABLE[key] for key in keys if key in TABLE), wide if width > 128 else CAREFUL)
    return Tile(gcd(found.q, block_q), gcd(found.k, block_k), *found[2:])  # powers of two


@remembered
def tiles_of(kernel: str, rule: Rule, width: int, bits: int, boxes: bool, block_q: int, block_k: int) -> Tiling:
    """How a kernel's tiles lie."""
    tile = tile_of(kernel, width, bits, boxes, block_q, block_k)
    return tiling(rule, tile.q, tile.k, boxes)


def use(table: dict[tuple[str, int, int, bool], Tile]) -> None:
    """Take this table of tiles from now on."""
    rows = dict(table)
    TABLE.clear()
    TABLE.update(rows)
    forget()


class Inputs(NamedTuple):
    """What the kernels read: strided tensors ``[B, tokens, heads, D]``, and optional ones.

    Args:
        bits, starts, stops: of a layout's lists.
        q_pos, k_pos: ``[B|1, tokens]``.
        sequence: ``[N]``, of each token, for packed input.
        slopes: ``[H]``.
        key_bias: ``[B|1, H|1, M]``.
        table: ``[H|1, 2R + 1]``, by relative position; it has no gradient here.
        q_factor, k_factor: ``[B|1, tokens, H|1, R]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bits: Tensor | None = None
    starts: Tensor | None = None
    stops: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    sequence: Tensor | None = None
    slopes: Tensor | None = None
    key_bias: Tensor | None = None
    table: Tensor | None = None
    q_factor: Tensor | None = None
    k_factor: Tensor | None = None

    @property
    def heads(self) -> int:
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2])


class How(NamedTuple):
    """All about a call that is no tensor: the rule, the sides of the blocks of lists (0 for none), scale and cap (0 for none)."""

    rule: Rule
    block_q: int
    block_k: int
    scale: float
    softcap: float


class Rows(NamedTuple):
    """What the gradients of keys read of each query, in the order of that kernel's tiles ``[B, H, span]``.

    Args:
        log, delta: lse in units of log 2, and Σ o·ȯ less the gradient of lse.
        top, arg: the gradient of the maximum and the key that has it, or None.
    """

    log: Tensor
    delta: Tensor
    top: Tensor | None
    arg: Tensor | None


def forward_pass(
    x: Inputs, how: How, tiles: Tiling, lists: Lists, stats: bool, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o, lse and, for `stats`, the maximum and, if it `learns`, the key that has it."""
    shape = (*x.q.shape[:2], x.heads)
    o, lse = x.q.new_empty(*shape, x.v.shape[3]), x.q.new_empty(shape, dtype=torch.float32)
    top = torch.empty_like(lse) if stats else None
    arg = torch.empty_like(lse, dtype=torch.int32) if stats and learns else None
    _run("forward", x, how, tiles, lists, tiles, x.heads, None, (o, lse, top, arg, *[None] * 10))
    return o, lse, top, arg


def query_pass(
    x: Inputs, how: How, tiles: Tiling, lists: Lists, order: Tiling, o: Tensor, lse: Tensor, arg: Tensor | None,
    do: Tensor, d_lse: Tensor | None, d_top: Tensor | None,
) -> tuple[dict[str, Tensor], Rows]:  # fmt: skip
    """Gradients of q, of slopes ``[B, H, tiles]`` and of the factor of queries; and what `key_pass` reads, in the `order` of its tiles."""
    shape = (*x.q.shape[:2], x.heads)
    span = order.counts(shape[1], 0)[0] * order.q
    held = lse.new_empty(3 if d_top is not None else 2, shape[0], shape[2], span)
    args = None if d_top is None else lse.new_empty(held.shape[1:], dtype=torch.int32)
    if span > shape[1]:  # rows that are not there weigh nothing
        held[0].fill_(torch.inf)
        held[1:].zero_()
        args = args if args is None else args.fill_(-1)
    rows = Rows(held[0], held[1], None if d_top is None else held[2], args)
    found = {"q": x.q.new_empty(*shape, x.q.shape[3])}
    if x.slopes is not None:
        found["slopes"] = lse.new_empty(shape[0], shape[2], tiles.counts(shape[1], x.k.shape[1])[0])
    if x.q_factor is not None:
        found["q_factor"] = lse.new_empty(*shape, x.q_factor.shape[3])
    outputs = (o, lse, None, arg, do, d_lse, d_top, *rows, found["q"], found.get("slopes"), found.get("q_factor"))
    _run("query", x, how, tiles, lists, order, x.heads, do, outputs)
    return found, rows


def key_pass(x: Inputs, how: How, tiles: Tiling, lists: Lists, do: Tensor, rows: Rows) -> dict[str, Tensor]:
    """Gradients: of k and v, by their heads or by all, of the bias and of the factor of keys by all heads."""
    batch, m, heads = x.k.shape[0], x.k.shape[1], x.heads
    shared = x.k.shape[2] if x.k.shape[2] == x.v.shape[2] and x.k.shape[2] % lists.heads == 0 else heads
    found = {"k": x.k.new_empty(batch, m, shared, x.k.shape[3]), "v": x.v.new_empty(batch, m, shared, x.v.shape[3])}
    if x.key_bias is not None:
        found["key_bias"] = rows.log.new_empty(batch, heads, m)
    if x.k_factor is not None:
        found["k_factor"] = rows.log.new_empty(batch, m, heads, x.k_factor.shape[3])
    outputs = (*rows, do, found["k"], found["v"], found.get("key_bias"), found.get("k_factor"))
    _run("key", x, how, tiles, lists, tiles, shared, do, outputs)
    return found


def _run(
    kernel: str, x: Inputs, how: How, tiles: Tiling, lists: Lists, order: Tiling, shared: int, do: Tensor | None,
    outputs: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    """Launch for every tile, head (of `shared`) and batch row."""
    q, k, v = x.q, x.k, x.v
    batch, n, m = q.shape[0], q.shape[1], k.shape[1]
    read = (q, do) if kernel == "key" else (k, v)
    bare = all(one is None for one in x[3:])
    ready = _ready(
        kernel, how, tiles, order, shared, lists.heads, lists.rows > 1, lists.items.shape[1], q.dtype, q.shape, q.stride(),
        k.shape, k.stride(), v.shape, v.stride(), None if do is None else do.shape, None if do is None else do.stride(),
        (0, 0, 0, True, True) if bare else _besides(x),
        min(n, m) >= DESCRIBE_FROM and describable(read[0], batch) and describable(read[1], batch),
    )  # fmt: skip
    if not ready.grid[0]:
        return
    left, right = [said.at(one) for said, one in zip(ready.read, read) if one is not None] if ready.read else (None, None)
    ready.launch(
        ready.grid,
        (q, k, v, left, right, lists.offsets, lists.items, lists.order, lists.numbers, *x[3:], *outputs),
        (*ready.strides, *(NO_STRIDES if bare else _strides(x))),
        ready.numbers,
    )


class _Ready(NamedTuple):
    """A launch but for its tensors, and what is loaded by descriptors, if it is."""

    launch: Launcher
    read: tuple[Described, ...]
    grid: Grid
    strides: tuple[int, ...]
    numbers: tuple[Any, ...]


@remembered
def _ready(
    kernel: str, how: How, tiles: Tiling, order: Tiling, shared: int, list_heads: int, list_rows: bool, entries: int, dtype: torch.dtype,
    q: Sizes, by_q: Sizes, k: Sizes, by_k: Sizes, v: Sizes, by_v: Sizes, do: Sizes | None, by_do: Sizes | None,
    besides: tuple[int, int, int, bool, bool], aligned: bool,
) -> _Ready:  # fmt: skip
    """Found again by position, as the host has less time than the kernels take."""
    batch, n, m, heads, (rank, runs, reach, unbiased, by_index) = q[0], q[1], k[1], max(q[2], k[2], v[2]), besides
    count, operands = tiles.counts(n, m)[kernel == "key"], ((q, by_q), (k, by_k), (v, by_v), (do, by_do))
    plain = how.scale > 0 and not how.softcap and unbiased
    launch, side = _launcher(
        tuple(token_step(*one) for one in operands), kernel, how.rule, tiles, order, dtype, q[3], v[3], rank, heads, shared, q[2], k[2],
        v[2], list_heads, list_rows, how.block_q, how.block_k, runs, reach, how.softcap, plain, by_index and isinstance(how.rule, BELOW),
        aligned,
    )  # fmt: skip
    strides = tuple(step for one in operands for step in _by(*one)[::2])
    blocks = -(-n // how.block_q) if how.block_q else 0
    numbers = (n, m, count, blocks, entries, order.counts(n, m)[0], how.scale)
    read = (operands[::3] if kernel == "key" else operands[1:3]) if side else ()
    described = tuple(Described.of(shape, steps, side, padded(shape[3])) for shape, steps in read if shape and steps)
    return _Ready(launch, described, (count * shared * batch, 1, 1), strides, numbers)


NO_STRIDES = (0,) * 11  # of inputs that are q, k and v alone


def _besides(x: Inputs) -> tuple[int, int, int, bool, bool]:
    """What the kernels are compiled for of what stands beside q, k and v."""
    rank = 0 if x.q_factor is None else x.q_factor.shape[3]
    reach = 0 if x.table is None else x.table.shape[1] // 2
    unbiased = x.slopes is None and x.key_bias is None and x.q_factor is None and x.table is None
    return rank, 0 if x.starts is None else x.starts.shape[3], reach, unbiased, x.q_pos is None


def _strides(x: Inputs) -> tuple[int, ...]:
    factors = (step for one in (x.q_factor, x.k_factor) for step in _by(*((None, None) if one is None else (one.shape, one.stride()))))
    return (_row(x.q_pos), _row(x.k_pos), *_bias(x.key_bias), _row(x.table), *factors)


def _by(shape: Sizes | None, steps: Sizes | None) -> tuple[int, ...]:
    """Strides of batch rows, tokens and heads; 0 along what is shared."""
    return (0, 0, 0) if shape is None or steps is None else tuple(0 if size == 1 else step for size, step in zip(shape[:3], steps))


def _row(x: Tensor | None) -> int:
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def _bias(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (_row(x), 0 if x.shape[1] == 1 else x.stride(1))


@remembered
def _launcher(
    steps: tuple[int, ...],
    kernel: str, rule: Rule, tiles: Tiling, order: Tiling, dtype: torch.dtype, width: int, values: int, rank: int, heads: int,
    shared: int, q_heads: int, k_heads: int, v_heads: int, list_heads: int, rows: bool, block_q: int, block_k: int, runs: int,
    reach: int, softcap: float, plain: bool, below: bool, aligned: bool,
) -> tuple[Launcher, int]:  # fmt: skip
    """And the tokens of the tiles that are loaded by descriptors, or 0."""
    tile = tile_of(kernel, max(width, values), 8 * dtype.itemsize, bool(tiles.grid), block_q, block_k)

    def sides(box: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * (3 - len(box)) + box  # a plane is a volume one deep

    grid = sides(tiles.grid) if tiles.grid else (0, 0, 0)
    boxes = {"G": grid, "A": sides(tiles.q_box), "B": sides(tiles.k_box)}
    if kernel != "key":
        boxes["S"] = sides(order.q_box)
    named = {f"{letter}{axis}": side for letter, box in boxes.items() for axis, side in enumerate(box)}
    everything = rule == EVERYTHING or isinstance(rule, Listed)
    rows_by = dict(zip(("QN", "KN", "VN", "ON"), steps))  # known when compiled: a tile's rows then need one address, not one each
    which: dict[str, Any] = {"HS": shared} if kernel == "key" else {"GRAD": kernel == "query", "S": order.q, "BELOW": below}
    heads_of = {"H": heads, "GQ": heads // q_heads, "GK": heads // k_heads, "GV": heads // v_heads, "LISTS": list_heads, "ROWS": rows}
    launch = launcher(
        kernels.key_kernel if kernel == "key" else kernels.query_kernel, **which, **rows_by, **heads_of, **named, D=width, BD=padded(width),
        V=values, BV=padded(values),
        R=rank, BR=padded(max(rank, 1)), M=tiles.q, N=tiles.k,
        RULE=None if everything else triton_rule(rule, bool(tiles.grid)), BLOCK_Q=block_q, BLOCK_K=block_k, RUNS=runs, REACH=reach,
        CAP=softcap, PLAIN=plain, IP="tf32x3" if dtype == torch.float32 else "tf32", num_warps=tile.warps,
        num_stages=1 if rank > 16 else tile.stages,  # factors of higher rank leave no room for more
    )  # fmt: skip
    described = tile.described and aligned and not tiles.grid
    return launch, (tiles.q if kernel == "key" else tiles.k) if described else 0
