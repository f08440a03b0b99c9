"""Launches of the linear kernels: operands by strides, decays prepared once, and few heads split into segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import CHUNK, cdiv, padded, power_of_two
from subquad.ops.launch import INTERPRETED, bits_of, choose, remembered
from subquad.ops.launcher import Grid, Launcher, launcher, steps_of
from subquad.ops.linear import kernels


class Decays(NamedTuple):
    """What a pass weighs with: its kind (none, token, channel), and the kernel's P and risky."""

    kind: str = "none"
    values: Tensor | None = None
    risky: Tensor | None = None  # per channel only
    both: bool = True  # per token: pairs may be weighed by products where chunks do not decay much

    @property
    def family(self) -> str:
        """As the table of launch parameters names it."""
        return "scalar" if self.kind == "token" else self.kind

    @property
    def kept(self) -> list[Tensor]:
        """What the backward reads again."""
        return [x for x in (self.values, self.risky) if x is not None]


class Passed(NamedTuple):
    """Results of a pass: the output, the final state, row sums for the decay's gradient, and what further queries give."""

    o: Tensor
    final: Tensor | None
    dots: Tensor | None
    more: Tensor | None = None


def ways(decays: bool, both: bool) -> list[dict[str, bool]]:
    """Constants of the launches for decays per token: products first, then one by one what these leave."""
    if decays and both:
        return [{"EXACT": False, "OTHER": True}, {"EXACT": True, "OTHER": True}]
    return [{"EXACT": decays, "OTHER": False}]


def sums_like(log_decay: Tensor, like: Tensor, cu: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the P of decays per head or token."""
    exact = like.dtype == torch.float32 or (
        INTERPRETED and like.dtype == torch.bfloat16
    )  # sums of strong decays would cost weak ones their digits
    room = slots(like.shape[1], count_sequences(like, cu), cu)
    return (like.shape[0], log_decay.shape[-1], room, CHUNK), torch.float64 if exact else torch.float32


def prepare(log_decay: Tensor | None, like: Tensor, cu: Tensor | None, kept: list[Tensor] | None = None) -> Decays:
    """Decays per head or token, for all passes over tokens like ``[B, N, ·, D]``, or those kept from an earlier call.

    `channel.weigh` prepares those per channel.
    """
    if log_decay is None:
        return Decays()
    # float16 has no room for the two factors, and wide float32 would compile for long
    both = like.dtype == torch.bfloat16 or (like.dtype == torch.float32 and like.shape[-1] <= 64)
    if kept:
        return Decays("token", kept[0], None, both)
    batch, tokens = like.shape[:2]
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, tokens, -1)
    shape, dtype = sums_like(log_decay, like, cu)
    sums = torch.empty(shape, dtype=dtype, device=like.device)
    if sums.numel() and tokens and count_sequences(like, cu):
        launcher(kernels.sums_kernel, HP=shape[1], C=CHUNK, PACKED=cu is not None, num_warps=1)(
            (chunks(tokens, cu), batch, shape[1]), (log_decay, sums, cu), log_decay.stride(), (tokens, count_sequences(like, cu))
        )  # fmt: skip
    return Decays("token", sums, None, both)


def linear_pass(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    decay: Decays,
    *,
    cu: Tensor | None,
    heads: int,
    dtype: torch.dtype,
    reverse: bool = False,
    column: bool = False,
    scale: float = 1.0,
    start: Tensor | None = None,
    start_scale: float = 1.0,
    group: int = 1,
    once: bool = False,
    final: bool = False,
    left: bool = False,
    split: bool = False,
    x: Tensor | None = None,
    dots: bool = False,
    more_keys: Tensor | None = None,
    more_queries: Tensor | None = None,
    add: Tensor | None = None,
) -> Passed:
    """One pass, see `kernels.pass_kernel`. `left` weighs b where it enters the state, `split` reads the state in full, and `dots`
    asks for the row sums of the output times x. `more_keys` are those of a second sum, of values x; `more_queries` read the same state,
    and with `dots` what they give times c is summed too. Both are ``[B, N, heads, D]``, contiguous, and strict."""
    batch, tokens, _, width = a.shape
    columns, device, sequences = c.shape[3], a.device, count_sequences(a, cu)
    more, which = more_queries, 0 if more_queries is None else kernels.QUERIES.value
    if more_keys is not None:
        more, which = more_keys, kernels.KEYS.value
    x, start = x if dots or more_keys is not None else None, None if start is None else start.contiguous()
    by = (*a.stride()[:3:2], *b.stride()[:3:2], *c.stride()[:3:2], *((0, 0) if x is None else x.stride()[:3:2]))
    plan = _plan(
        steps_of(a, b, c, x), cdiv(tokens, CHUNK), width, columns,
        a.shape[2], b.shape[2], c.shape[2], (c if x is None else x).shape[2], a.dtype, device,
        decay.family, column, decay.both, 1 if decay.values is None else decay.values.shape[1], sequences, cu is not None, heads, group,
        once, reverse, start is not None, final, left, which, add is not None, dots, dots or split,
    )  # fmt: skip
    o = torch.empty(batch, tokens, heads, columns, dtype=dtype, device=device)
    second = None if more_queries is None else torch.empty_like(o)
    sums = torch.empty(batch, heads, plan.tiles, tokens, dtype=torch.float32, device=device) if dots else None
    last = torch.empty(sequences, plan.state_heads, width, columns, dtype=torch.float32, device=device) if final else None
    if tokens == 0 or sequences == 0 or batch == 0:
        if last is not None:
            last.zero_() if start is None else last.copy_((first_of_group(start, heads) if once else start) * start_scale)
        return Passed(o, last, None if sums is None else sums.zero_(), second)

    tensors = a, b, c, x, more, add, decay.values, decay.risky, cu
    if plan.segments == 1:
        for launch in plan.run:
            launch(plan.grid, (*tensors, start, o, second, last, sums, None, None), by, (tokens, 1, scale, start_scale))
        return Passed(o, last, sums, second)
    states = torch.empty(sequences, plan.state_heads, plan.segments, width, columns, dtype=torch.float32, device=device)
    channels = width if decay.kind == "channel" and not column else columns
    totals = torch.empty(*states.shape[:3], channels, dtype=torch.float32, device=device) if decay.values is not None else None
    plan.add(plan.add_grid, (*tensors, None, None, None, None, None, states, totals), by, (tokens, plan.segments, scale, 1.0))
    for launch in plan.run:
        launch(plan.grid, (*tensors, start, o, second, last, sums, states, totals), by, (tokens, plan.segments, scale, start_scale))
    return Passed(o, last, sums, second)


class _Plan(NamedTuple):
    """The launches of a pass; where it is cut into segments, all but the last are first added up."""

    segments: int
    tiles: int
    state_heads: int
    run: list[Launcher]
    grid: Grid
    add: Launcher
    add_grid: Grid


@remembered
def _plan(
    steps: tuple[int, ...], chunks: int, width: int, columns: int, a_heads: int, b_heads: int, c_heads: int, x_heads: int,
    dtype: torch.dtype, device: torch.device, family: str, column: bool, both: bool, decay_heads: int, sequences: int, packed: bool,
    heads: int, group: int, once: bool, reverse: bool, started: bool, final: bool, left: bool, more: int, add: bool,
    dots: bool, split: bool,
) -> _Plan:  # fmt: skip
    """Found again by position, as the host has less time than the kernels take."""
    kernel = ("heavy" if split or add else "pass", "keys", "queries")[more]
    rows, segments = choose(kernel, width, columns, bits_of(dtype), device, family, sequences * heads, chunks)
    tile = min(rows.columns, padded(columns))
    tiles, state_heads, whole = cdiv(columns, tile), heads if once else heads // group, segments == 1
    rows_by = dict(zip(("sa_n", "sb_n", "sc_n", "sx_n"), steps))
    kind, bf16 = {"none": 0, "scalar": 1, "channel": 3 if column else 2}[family], dtype == torch.bfloat16

    def launch(n: int, grouped: int, out: bool, **way: bool) -> Launcher:
        per_head = dict(zip(("GA", "GB", "GC", "GX", "GP"), (max(1, n // x) for x in (a_heads, b_heads, c_heads, x_heads, decay_heads))))
        return launcher(
            kernels.pass_kernel, **rows_by, H=n, **per_head, GS=grouped, ONCE=once and (started or final or not whole), D=width, V=columns,
            BD=padded(width), BV=tile, C=CHUNK, DECAY=kind, **way, REVERSE=reverse, START=out and started, CUT=out and not whole,
            FINAL=out and final, LEFT=left and bf16 and kind == 1, OUT=out, MORE=more, ADD=out and add, DOT=out and dots,
            SPLIT=out and split and bf16, PACKED=packed, WIDE=dtype == torch.float16, IP="tf32x3" if dtype == torch.float32 else "tf32",
            num_warps=rows.warps, num_stages=rows.stages,
        )  # fmt: skip

    return _Plan(
        segments, tiles, state_heads, [launch(heads, group, True, **way) for way in ways(kind == 1, both)],
        (tiles * segments * sequences * heads, 1, 1), launch(state_heads, 1, False, EXACT=False, OTHER=False),
        (tiles * (segments - 1) * sequences * state_heads, 1, 1),
    )  # fmt: skip


def gate_gradient(dq: Tensor, dk: Tensor, at_end: Tensor | None, cu: Tensor | None, heads: int) -> Tensor:
    """ġ ``[B, N, Hs]`` from the row sums of two passes, ``[B, H, tiles, N]``, and what the final state adds ``[sequences, Hs]``."""
    batch, total, tiles_q, tokens = dq.shape
    rows_q, rows_k = (total // heads) * tiles_q, (dk.shape[1] // heads) * dk.shape[2]
    dg = torch.empty(batch, tokens, heads, device=dq.device)
    sequences = count_sequences(dq, cu)
    if dg.numel():
        powers = [power_of_two(r) for r in (rows_q, rows_k)]
        launcher(
            kernels.gate_kernel, HS=heads, TQ=rows_q, TK=rows_k, BQ=powers[0], BK=powers[1], BLOCK=max(64, 2048 // max(powers)),
            END=at_end is not None, PACKED=cu is not None, num_warps=4,
        )((sequences, heads, 1), (dq, dk, at_end, cu, dg), (), (tokens,))  # fmt: skip
    return dg


def chunks(tokens: int, cu: Tensor | None) -> int:
    """Programs that find all chunks of a row of the batch: one for each, or where sequences are packed for each slot."""
    return cdiv(tokens, CHUNK) if cu is None else slots(tokens, cu.shape[0] - 1, cu)


def slots(tokens: int, sequences: int, cu: Tensor | None) -> int:
    """Room for what is kept of each chunk of a row: the chunk of sequence i that starts at token t has slot t // C + i.

    It is never 1, on which tracing with a symbolic number of tokens would specialise.
    """
    return tokens // CHUNK + 2 + (0 if cu is None else sequences)


def count_sequences(like: Tensor, cu: Tensor | None) -> int:
    return like.shape[0] if cu is None else cu.shape[0] - 1


def first_of_group(x: Tensor, heads: int) -> Tensor:
    """x ``[sequences, groups, …]`` at the first of each group of `heads` heads, zero at the others."""
    if x.shape[1] == heads:
        return x.contiguous()
    out = x.new_zeros(x.shape[0], heads, *x.shape[2:])
    out[:, :: heads // x.shape[1]] = x
    return out
