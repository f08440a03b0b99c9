"""Launches of the kernels for decays per channel: `weigh.py` before and after the pass, `pairs.py` for strong decays."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import CHUNK, by_rows, cdiv, padded
from subquad.ops.launch import processors
from subquad.ops.launcher import launcher
from subquad.ops.linear.launch import Decays, chunks, count_sequences, slots
from subquad.ops.linear.pairs import pairs_backward_kernel, pairs_kernel
from subquad.ops.linear.weigh import carry_kernel, unweigh_kernel, weigh_kernel


class Weighed(NamedTuple):
    """q̂ ``[B, N, H, D]``, k̃ ``[B, N, Hs, D]``, and the decays of the state."""

    q: Tensor
    k: Tensor
    decay: Decays

    def tensors(self) -> list[Tensor]:
        return [self.q, self.k, *self.decay.kept]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Weighed:
        q, k, values, risky = tensors
        return cls(q, k, Decays("channel", values, risky))


def weighed_like(q: Tensor, cu: Tensor | None, total: int, heads: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of `Weighed.tensors`."""
    batch, tokens, _, width = q.shape
    room = slots(tokens, count_sequences(q, cu), cu)
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype  # weights reach 2^100
    return [
        ((batch, tokens, total, width), dtype),
        ((batch, tokens, heads, width), dtype),
        ((batch, heads, room, width), torch.float32),
        ((batch, heads, room), torch.int32),
    ]


def weigh(q: Tensor, k: Tensor, g: Tensor, cu: Tensor | None, total: int, heads: int) -> Weighed:
    """Weigh q and k by their decays per channel g ``[B, N, heads, D]``; `total` query heads."""
    batch, tokens, _, width = q.shape
    tensors = [torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in weighed_like(q, cu, total, heads)]
    sequences, g = count_sequences(q, cu), by_rows(g)
    if tensors[0].numel():
        launcher(
            weigh_kernel, H=total, HS=heads, GQ=total // q.shape[2], GK=heads // k.shape[2], D=width, BD=padded(width), C=CHUNK,
            PACKED=cu is not None, num_warps=8 if width > 64 else 4, **_exact(q),
        )(
            (chunks(tokens, cu), heads, batch), (q, k, g, cu, *tensors),
            (*q.stride()[:3], *k.stride()[:3], *g.stride()[:3]), (tokens, sequences),
        )  # fmt: skip
    return Weighed.of(tensors)


def unweigh(
    g: Tensor, weighed: Weighed, aq: Tensor, ak: Tensor, dq: Tensor, dk: Tensor, dg: Tensor | None, at_end: Tensor | None,
    cu: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """From the passes' aq and ak to dq, dk ``[B, N, H, D]`` and dg ``[B, N, Hs, D]``, which hold what `pairs_backward` gave."""
    total, width = aq.shape[2:]
    heads, sequences, g = weighed.k.shape[2], count_sequences(aq, cu), by_rows(g)
    if at_end is None and dg is not None:
        at_end = aq.new_zeros(sequences, heads, width)
    tile = min(64 if total == heads else 32, padded(width))  # groups are walked head by head, which more programs make up for
    if not aq.numel():
        return
    tiles = cdiv(width, tile)
    parts = _parts(sequences * heads * tiles, cdiv(aq.shape[1], CHUNK), aq.device)
    sums = aq.new_empty(sequences, heads, parts, width) if parts > 1 and dg is not None else None
    launcher(
        unweigh_kernel, H=total, HS=heads, D=width, BT=tile, C=CHUNK, GATE=dg is not None, CUT=sums is not None, PACKED=cu is not None,
        STAGES=2, num_warps=4, **_exact(dq),
    )(
        (sequences, heads, tiles * parts),
        (g, cu, weighed.q, weighed.k, aq, ak, weighed.tensors()[3], at_end, sums, dq, dk, dg),
        g.stride()[:3], (aq.shape[1], parts, scale),
    )  # fmt: skip
    if sums is not None:
        launcher(carry_kernel, HS=heads, D=width, BD=padded(width), C=CHUNK, PACKED=cu is not None, num_warps=4)(
            (sequences, heads, parts - 1), (sums, cu, dg), (), (aq.shape[1], parts)
        )


def _parts(programs: int, chunks: int, device: torch.device) -> int:
    """Parts of a sequence for `unweigh`, so that few programs fill the chip."""
    slots = processors(device)
    return 1 if programs >= 1.5 * slots else max(1, min(chunks // PART, 4 * slots // programs))


def pairs(a: Tensor, b: Tensor, c: Tensor, g: Tensor, decay: Decays, o: Tensor, *, cu: Tensor | None, reverse: bool, scale: float) -> None:
    """Add the pairs of risky chunks to o ``[B, N, H, V]``; a, b, c and g are as given, not weighed."""
    heads, columns = o.shape[2:]
    g, tile = by_rows(g), min(32 if a.dtype != torch.bfloat16 else 64, padded(columns))
    groups = dict(zip(("GA", "GB", "GC", "GG"), (heads // x.shape[2] for x in (a, b, c, g))))
    if o.numel():
        launcher(
            pairs_kernel, H=heads, **groups, D=a.shape[3], V=columns, BD=min(32, padded(a.shape[3])), BV=tile, REVERSE=reverse,
            **_shared(a, cu),
        )(
            (a.shape[0] * heads, cdiv(columns, tile), _looks(a, cu)), (a, b, c, g, cu, _risky(decay), o),
            (*a.stride()[:3], *b.stride()[:3], *c.stride()[:3], *g.stride()[:3]), (a.shape[1], count_sequences(a, cu), scale),
        )  # fmt: skip


def pairs_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, g: Tensor, decay: Decays, dq: Tensor, dk: Tensor, dg: Tensor | None, *,
    cu: Tensor | None, scale: float,
) -> None:  # fmt: skip
    """What the pairs of risky chunks give to dq, dk ``[B, N, H, D]`` and to the flow dg ``[B, N, Hs, D]``."""
    g, total, width = by_rows(g), dq.shape[2], q.shape[3]
    heads, tile = g.shape[2], min(32, padded(width))
    groups = {"GQ": total // q.shape[2], "GK": heads // k.shape[2], "GV": heads // v.shape[2]}
    if dq.numel():
        launcher(
            pairs_backward_kernel, H=total, HS=heads, **groups, D=width, V=v.shape[3], BD=tile, BV=padded(v.shape[3]),
            GATE=dg is not None, **_shared(q, cu),
        )(
            (q.shape[0] * heads, cdiv(width, tile), _looks(q, cu)),
            (q, k, v, do, g, cu, _risky(decay), dq, dk, dg),
            (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *g.stride()[:3]),
            (q.shape[1], count_sequences(q, cu), scale),
        )  # fmt: skip


PART = 8  # chunks in a part, at least
LOOK = 16  # chunks that a program of the pairs looks through: most have nothing to do


def _looks(x: Tensor, cu: Tensor | None) -> int:
    return cdiv(chunks(x.shape[1], cu), LOOK)


def _risky(decay: Decays) -> Tensor:
    assert decay.risky is not None
    return decay.risky


def _shared(x: Tensor, cu: Tensor | None) -> dict[str, Any]:
    """Constants of both kernels for pairs."""
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {
        "C": CHUNK, "CHUNKS": LOOK, "PACKED": cu is not None,
        "WIDE": x.dtype == torch.float16, "IP": precision, "num_warps": 8 if x.shape[3] > 64 else 4,
    }  # fmt: skip


def _exact(q: Tensor) -> dict[str, Any]:
    """Sums in float64 for float32 inputs: strong decays would otherwise cost weak ones their digits."""
    return {"EXACT": q.dtype == torch.float32}
