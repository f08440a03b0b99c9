"""Input checks: one place that turns any misuse into one line naming the argument, what it was, what it should be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64


class InputError(ValueError):
    """Raised for every kind of bad input. The message names the argument, what it was, and what it should be."""

    def __init__(self, argument: str, was: object, should: str) -> None:
        super().__init__(f"{argument}: got {was}; expected {should}")
        self.argument = argument

    def __reduce__(self) -> tuple[Any, ...]:  # pickles across processes, although the message is made of parts
        return (_rebuild, (self.argument, str(self)))


def _rebuild(argument: str, message: str) -> InputError:
    error = InputError.__new__(InputError)
    ValueError.__init__(error, message)
    error.argument = argument
    return error


def nearest(argument: str, name: object, known: Iterable[str], kind: str) -> InputError:
    """The error for an unknown name: suggests the nearest known ones, or lists them all when none is near."""
    names, kind = sorted(known), f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if close:
        return InputError(argument, repr(name), f"{kind}; nearest: {', '.join(close)}")
    return InputError(argument, repr(name), f"{kind}; one of: {', '.join(names) or 'none'}")


def shape_of(tensor: Tensor) -> str:
    """A tensor's shape, dtype and device in a few characters, for messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _alike(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all are floating-point tensors of four dimensions, of one batch size, dtype and device: asked at once, as it is usual."""
    return (
        isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == k.dim() == v.dim() == 4
        and q.dtype == k.dtype == v.dtype and q.dtype in FLOATING and q.device == k.device == v.device
        and q.shape[0] == k.shape[0] == v.shape[0]
    )  # fmt: skip


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, longer_keys: bool = False) -> int:
    """Check q, k, v ``[B, N, H, D]`` against each other; returns the largest head count.

    Head counts each divide the largest; k and v have equal N, q's N is theirs (or, with `longer_keys`, at most
    theirs); q and k have equal D; all are floating point, of one dtype, on one device.
    """
    for name, x in () if _alike(q, k, v) else (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InputError(name, type(x).__name__, "a tensor [B, N, H, D]")
        if x.dim() != 4:
            raise InputError(name, shape_of(x), "four dimensions [B, N, H, D]")
        if x.dtype not in FLOATING:
            raise InputError(name, shape_of(x), "a floating-point tensor (float16, bfloat16, float32 or float64)")
        if x.dtype != q.dtype:
            raise InputError(name, shape_of(x), f"the dtype of q, {str(q.dtype).removeprefix('torch.')}")
        if x.device != q.device:
            raise InputError(name, shape_of(x), f"the device of q, {q.device}")
        if x.shape[0] != q.shape[0]:
            raise InputError(name, shape_of(x), f"the batch size of q, {q.shape[0]}")
    if k.shape[1] != v.shape[1]:
        raise InputError("v", shape_of(v), f"as many tokens as k, {k.shape[1]}")
    if longer_keys:
        if q.shape[1] > k.shape[1]:
            raise InputError("q", shape_of(q), f"at most as many tokens as k, {k.shape[1]}")
    elif q.shape[1] != k.shape[1]:
        raise InputError("k", shape_of(k), f"as many tokens as q, {q.shape[1]}")
    if q.shape[3] != k.shape[3]:
        raise InputError("k", shape_of(k), f"the head dim of q, {q.shape[3]}")
    counts = q.shape[2], k.shape[2], v.shape[2]
    heads = max(counts)
    for name, x, count in zip("qkv", (q, k, v), counts):
        if count == 0 or heads % count:
            raise InputError(name, shape_of(x), f"a head count that divides the largest, {heads}")
    return heads


def check_beside(name: str, x: object, q: Tensor) -> None:
    """A tensor on the device of q."""
    if not isinstance(x, Tensor):
        raise InputError(name, type(x).__name__, "a tensor")
    if x.device != q.device:
        raise InputError(name, shape_of(x), f"the device of q, {q.device}")


def check_tensor(name: str, x: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    """Check that an optional tensor has one exact shape and lives beside `like`."""
    if x is None:
        return
    if not isinstance(x, Tensor):
        raise InputError(name, type(x).__name__, f"a tensor {list(shape)}")
    if tuple(x.shape) != tuple(shape):
        raise InputError(name, shape_of(x), f"shape {list(shape)}")
    if x.device != like.device:
        raise InputError(name, shape_of(x), f"the device of q, {like.device}")


def check_cu_seqlens(cu_seqlens: Tensor | None, q: Tensor, *, name: str = "cu_seqlens") -> None:
    """Check `cu_seqlens` ``[S+1]`` (int32 or int64) against packed input ``[1, total, H, D]``."""
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        was = shape_of(cu_seqlens) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise InputError(name, was, "an integer tensor [S + 1]")
    if q.shape[0] != 1:
        raise InputError(name, f"given with batch size {q.shape[0]}", "packed input [1, total, H, D]")
    if torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # values cannot be read while tracing, nor while a graph is captured
    ends = cu_seqlens.tolist()
    if len(ends) < 1 or ends[0] != 0 or ends[-1] != q.shape[1] or any(a > b for a, b in pairwise(ends)):
        shown = ends if len(ends) <= 6 else f"[{ends[0]}, …, {ends[-1]}]"
        raise InputError(name, shown, f"offsets that rise from 0 to the number of tokens, {q.shape[1]}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is; meta tensors, which have shapes alone, know none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor) -> torch.dtype:
    """States, accumulators and decays are float32, and float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
