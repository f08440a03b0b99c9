"""Launches of the linear kernels: operands by strides, decays prepared once, and few heads split into segments."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import CHUNK, cdiv, padded, power_of_two
from subquad.ops.launch import Config, bits_of, choose
from subquad.ops.launcher import Launcher, launcher
from subquad.ops.linear import kernels

SAFE = -100.0  # log2 of what a chunk may decay by, for its pairs to be weighed by products


class Decays(NamedTuple):
    """What a pass weighs with: its kind (none, token, channel), and the kernel's P and risky."""

    kind: str = "none"
    values: Tensor | None = None
    risky: Tensor | None = None
    both: bool = True  # per token: pairs may be weighed by products where a sequence is not risky

    @property
    def family(self) -> str:
        """As the table of launch parameters names it."""
        return "scalar" if self.kind == "token" else self.kind


class Passed(NamedTuple):
    """Results of a pass: the output, the final state, and row sums for the decay's gradient."""

    o: Tensor
    final: Tensor | None
    dots: Tensor | None


def prepare(log_decay: Tensor | None, like: Tensor, cu: Tensor | None) -> Decays:
    """Decays per head or token, for all passes over tokens like ``[B, N, ·, ·]``; `channel.weigh` prepares those per channel."""
    if log_decay is None:
        return Decays()
    batch, tokens = like.shape[:2]
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(batch, tokens, -1)
    heads, sequences = log_decay.shape[2], count_sequences(like, cu)
    exact = like.dtype == torch.float32  # sums of strong decays would cost weak ones their digits
    dtype = torch.float64 if exact else torch.float32
    sums = torch.empty(batch, heads, slots(tokens, sequences, cu), CHUNK, dtype=dtype, device=like.device)
    risky = torch.empty(sequences, heads, dtype=torch.int32, device=like.device)
    if sums.numel() and risky.numel():
        launcher(kernels.sums_kernel, HP=heads, C=CHUNK, PACKED=cu is not None, num_warps=1)(
            (chunks(tokens, cu), batch, heads), (log_decay, sums, cu), log_decay.stride(), (tokens, sequences)
        )  # fmt: skip
        launcher(kernels.risky_kernel, HP=heads, C=CHUNK, PACKED=cu is not None, SAFE=SAFE, num_warps=4)(
            (sequences, heads, 1), (sums, cu, risky), (), (tokens,)
        )  # fmt: skip
    # float16 has no room for the two factors, and wide float32 would compile for long
    both = like.dtype == torch.bfloat16 or (exact and like.shape[-1] <= 64)
    return Decays("token", sums, risky, both)


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
    strict: bool = False,
    add: Tensor | None = None,
) -> Passed:
    """One pass, see `kernels.pass_kernel`. `left` weighs b where it enters the state, `split` reads the state in full, and `dots`
    asks for the row sums of the output times x."""
    batch, tokens, _, width = a.shape
    columns = c.shape[-1]
    sequences = count_sequences(a, cu)
    x = x if dots else None
    device = a.device
    kind = {"none": 0, "token": 1, "channel": 3 if column else 2}[decay.kind]
    kernel = "heavy" if dots or split or add is not None else "pass"
    rows, segments = choose(kernel, width, columns, bits_of(a.dtype), device, decay.family, sequences * heads, cdiv(tokens, CHUNK))
    tiles = cdiv(columns, min(rows.columns, padded(columns)))

    start = None if start is None else start.contiguous()
    o = torch.empty(batch, tokens, heads, columns, dtype=dtype, device=device)
    sums = torch.empty(batch, heads, tiles, tokens, dtype=torch.float32, device=device) if dots else None
    state_heads = heads if once else heads // group
    last = torch.empty(sequences, state_heads, width, columns, dtype=torch.float32, device=device) if final else None
    if tokens == 0 or sequences == 0 or batch == 0:
        if last is not None:
            last.zero_() if start is None else last.copy_((first_of_group(start, heads) if once else start) * start_scale)
        return Passed(o, last, None if sums is None else sums.zero_())
    per = 1 if decay.values is None else decay.values.shape[1]

    def run(n_heads: int, before: Tensor | None, after: Tensor | None, totals: Tensor | None, grouped: int, out: bool) -> None:
        groups = _group(a, n_heads), _group(b, n_heads), _group(c, n_heads), _group(c if x is None else x, n_heads)
        launch = _launcher(
            rows, width, columns, a.dtype, kind, decay.both, reverse, strict, cu is not None, n_heads, groups, max(1, n_heads // per),
            grouped, once and segments == 1, before is not None, after is not None, left, out, out and add is not None, out and dots,
            out and (split or dots),
        )  # fmt: skip
        launch(
            (tiles * segments * sequences * n_heads, 1, 1),
            (a, b, c, x, add, decay.values, decay.risky, cu, before, o, after, sums, totals),
            (*a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *strides(x)),
            (tokens, segments, scale, start_scale if segments == 1 else 1.0),
        )  # fmt: skip

    if segments == 1:
        run(heads, start, last, None, group, True)
        return Passed(o, last, sums)
    states = torch.empty(sequences, state_heads, segments, width, columns, dtype=torch.float32, device=device)
    wide = width if kind == 2 else columns
    totals = torch.empty(sequences, state_heads, segments, wide, dtype=torch.float32, device=device) if kind else None
    run(state_heads, None, states, totals, 1, False)
    block = 1024
    launcher(
        kernels.join_kernel, H=state_heads, GS=group if once else 1, D=width, V=columns, DECAY=kind, REVERSE=reverse,
        START=start is not None, FINAL=last is not None, BLOCK=block, num_warps=4,
    )(
        (sequences * state_heads, cdiv(width * columns, block), 1),
        (states, totals, start, last), (), (segments, start_scale),
    )  # fmt: skip
    run(heads, states, None, None, 1 if once else group, True)
    return Passed(o, last, sums)


@cache
def _launcher(
    rows: Config, width: int, columns: int, dtype: torch.dtype, kind: int, both: bool, reverse: bool, strict: bool, packed: bool,
    heads: int, groups: tuple[int, int, int, int], per: int, grouped: int, once: bool, start: bool, final: bool, left: bool,
    out: bool, add: bool, dots: bool, split: bool,
) -> Launcher:  # fmt: skip
    """The pass kernel with its constants; found again by position, which is faster than by name."""
    return launcher(
        kernels.pass_kernel, H=heads, GA=groups[0], GB=groups[1], GC=groups[2], GX=groups[3], GP=per, GS=grouped, ONCE=once, D=width,
        V=columns, BD=padded(width), BV=min(rows.columns, padded(columns)), C=CHUNK, DECAY=kind, BOTH=both, REVERSE=reverse,
        STRICT=strict, START=start, FINAL=final, LEFT=left and dtype == torch.bfloat16, OUT=out, ADD=add, DOT=dots,
        SPLIT=split and dtype == torch.bfloat16, PACKED=packed,
        WIDE=dtype == torch.float16, IP="tf32x3" if dtype == torch.float32 else "tf32", num_warps=rows.warps, num_stages=rows.stages,
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


def _group(x: Tensor, heads: int) -> int:
    return max(1, heads // x.shape[2])


def by_rows(x: Tensor) -> Tensor:
    """x, as the kernels read it: by strides, with neighbouring channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


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


def strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def first_of_group(x: Tensor, heads: int) -> Tensor:
    """x ``[sequences, groups, …]`` at the first of each group of `heads` heads, zero at the others."""
    if x.shape[1] == heads:
        return x.contiguous()
    out = x.new_zeros(x.shape[0], heads, *x.shape[2:])
    out[:, :: heads // x.shape[1]] = x
    return out
