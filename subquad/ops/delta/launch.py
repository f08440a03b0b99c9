"""Launches of the delta kernels: operands by strides, parameters from the table."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import CHUNK, cdiv, padded
from subquad.ops.delta import kernels
from subquad.ops.launch import INTERPRETED, bits_of, choose, config, remembered
from subquad.ops.launcher import Grid, Launcher, launcher, steps_of
from subquad.ops.linear.launch import Decays, chunks, count_sequences, slots, ways


class Mirrored(NamedTuple):
    """Results of the mirrored solve: β x, −β u̇, gradients of v, of beta by column tiles ``[B, H, tiles, N]``, and of the first state."""

    u: Tensor
    w: Tensor
    dv: Tensor
    dots: Tensor
    start: Tensor | None


def inverse_shape(q: Tensor, heads: int, cu: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of M."""
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype  # fp16 would overflow for large keys
    return (q.shape[0], heads, slots(q.shape[1], count_sequences(q, cu), cu), CHUNK, CHUNK), wide


def inverse(k: Tensor, beta: Tensor, decay: Decays, cu: Tensor | None) -> Tensor:
    """M ``[B, H, slots, C, C]`` of all chunks; k may have fewer heads than beta ``[B, N, H]``."""
    heads, width, sequences = beta.shape[2], k.shape[-1], count_sequences(k, cu)
    shape, dtype = inverse_shape(k, heads, cu)
    out = torch.empty(shape, dtype=dtype, device=k.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out
    row = config("inverse", width, bits_of(k.dtype), decay.family, few=False)
    launcher(
        kernels.inverse_kernel, sk_n=steps_of(k)[0], H=heads, GK=heads // k.shape[2], D=width, BD=padded(width), C=CHUNK,
        DECAY=decay.values is not None, PACKED=cu is not None, WIDE=k.dtype == torch.float16,
        IP="tf32x3" if k.dtype == torch.float32 or INTERPRETED else "bf16x3", num_warps=min(4, row.warps),
    )(
        (chunks(k.shape[1], cu) * shape[0] * heads, 1, 1), (k, beta, decay.values, cu, out), k.stride()[:3:2],
        (*beta.stride(), k.shape[1], sequences),
    )  # fmt: skip
    return out


def solve(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, M: Tensor, decay: Decays, cu: Tensor | None, *,
    scale: float, start: Tensor | None, final: bool, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """o ``[B, N, H, V]``, x ``[B, N, H, V]`` if `save`, and the final state ``[sequences, H, D, V]`` if `final`."""
    heads, columns = beta.shape[2], v.shape[-1]
    plan = _plan("solve", q, k, v, beta, decay, cu, start is not None, final, save)
    o = torch.empty(*q.shape[:2], heads, columns, dtype=q.dtype, device=q.device)
    x = torch.empty_like(o) if save else None
    last = _last(final, start, 1.0, q, heads, columns, plan.sequences)
    if q.shape[1] and plan.sequences:
        plan.run[0](
            plan.grid, (q, k, v, beta, M, decay.values, cu, start, o, x, last),
            (*q.stride()[:3:2], *k.stride()[:3:2], *v.stride()[:3:2]), (*beta.stride(), q.shape[1], scale),
        )  # fmt: skip
    return o, x, last


def mirror(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, M: Tensor, x: Tensor, decay: Decays, cu: Tensor | None, *,
    scale: float, start: Tensor | None, final: bool,
) -> Mirrored:  # fmt: skip
    """The mirrored solve; `start` is the gradient of the last state, and what is found is in units of 1/scale but for dv and dots."""
    heads, columns = beta.shape[2], do.shape[-1]
    plan = _plan("mirror", q, k, do, beta, decay, cu, start is not None, final, True)
    u, w, dv = (torch.empty_like(x) for _ in range(3))
    dots = torch.empty(x.shape[0], heads, plan.tiles, x.shape[1], dtype=torch.float32, device=q.device)
    last = _last(final, start, 1 / scale, q, heads, columns, plan.sequences)
    if q.shape[1] and plan.sequences:
        for launch in plan.run:
            launch(
                plan.grid, (q, k, do, beta, M, decay.values, cu, start, x, u, w, dv, dots, last),
                (*q.stride()[:3:2], *k.stride()[:3:2], *do.stride()[:3:2]), (*beta.stride(), q.shape[1], scale, 1 / scale),
            )  # fmt: skip
    return Mirrored(u, w, dv, dots, last)


class _Plan(NamedTuple):
    """The launches of a solve."""

    sequences: int
    tiles: int
    run: list[Launcher]
    grid: Grid


def _plan(
    name: str, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decays, cu: Tensor | None, started: bool, final: bool, save: bool
) -> _Plan:
    """A plan for operands like these."""
    return _made(
        name, steps_of(q, k, v), q.shape[3], v.shape[3], q.shape[2], k.shape[2], v.shape[2], beta.shape[2],
        q.dtype, q.device, decay.family, decay.both, count_sequences(q, cu), cu is not None, started, final, save,
    )  # fmt: skip


@remembered
def _made(
    name: str, steps: tuple[int, ...], width: int, columns: int, q_heads: int, k_heads: int, v_heads: int, heads: int,
    dtype: torch.dtype, device: torch.device, family: str, both: bool, sequences: int, packed: bool, started: bool, final: bool, save: bool,
) -> _Plan:  # fmt: skip
    """Found again by position, as the host has less time than the kernels take."""
    row, _ = choose(name, width, columns, bits_of(dtype), device, family, sequences * heads, 1)
    tile, decays = min(row.columns, padded(columns)), family != "none"
    common: dict[str, Any] = {
        "sq_n": steps[0], "sk_n": steps[1], "sv_n" if name == "solve" else "sd_n": steps[2],
        "H": heads, "GQ": heads // q_heads, "GK": heads // k_heads, "D": width, "V": columns, "BD": padded(width), "BV": tile, "C": CHUNK,
        "DECAY": decays, "START": started, "FINAL": final, "PACKED": packed, "WIDE": dtype == torch.float16,
        "IP": "tf32x3" if dtype == torch.float32 else "tf32", "num_warps": row.warps, "num_stages": row.stages,
    }  # fmt: skip
    if name == "solve":
        run = [launcher(kernels.solve_kernel, GV=heads // v_heads, SAVE=save, BOTH=decays and both, **common)]
    else:
        run = [launcher(kernels.mirror_kernel, **way, **common) for way in ways(decays, both)]
    tiles = cdiv(columns, tile)
    return _Plan(sequences, tiles, run, (tiles * sequences * heads, 1, 1))


def _last(wanted: bool, start: Tensor | None, scale: float, q: Tensor, heads: int, columns: int, sequences: int) -> Tensor | None:
    """Room for a final state; without tokens it is the first."""
    if not wanted:
        return None
    out = torch.empty(sequences, heads, q.shape[-1], columns, dtype=torch.float32, device=q.device)
    if q.shape[1] == 0:
        return out.zero_() if start is None else out.copy_(start * scale)
    return out
