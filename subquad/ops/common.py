"""What the primitives share: head groups, and sequences cut into chunks.

Tokens come as ``[B, N, heads, D]``. The recurrent primitives work on *tiles* ``[P, m, C, r, D]``: P = B·Hs rows of the
state, m chunks of C tokens, and r query heads that share one state head (query head h reads state head h // r).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subquad.checks import autocasts

CHUNK = 64  # tokens in a chunk: the fastest of 32, 64, 128 on CPU, and the tile that GPUs prefer
CPU_ROWS = 4096  # rows of a tile worked on at once: keeps temporaries in the cache
GPU_ROWS = 131072  # enough to fill a GPU, while temporaries stay a small part of memory

# glibc gives freed heap back to the system beyond twice the largest block it has seen freed, and each segment's
# temporaries would be faulted in anew. One block, never touched and freed here, lets them stay.
torch.empty(24 << 20, dtype=torch.uint8)

Result = TypeVar("Result")


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, Hx, …]`` to ``[B, N, heads, …]``: head h is head h // (heads / Hx) of x."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def reduce_heads(x: Tensor, heads: int) -> Tensor:
    """The adjoint of `expand_heads`: ``[B, N, H, …]`` to ``[B, N, heads, …]``, groups summed."""
    return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3)


def full_precision(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run without autocast: states and accumulators keep their dtype in mixed-precision training."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Result:
        if first.is_meta or (not torch.compiler.is_compiling() and not autocasts(first)):  # as turning it off takes time, too
            return function(first, *args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run


_level = torch._C._functorch.maybe_current_level


def transformed() -> bool:
    """Whether a call is inside torch.func or forward mode, which know neither kernels nor autograd Functions of the common kind."""
    return not torch.compiler.is_compiling() and (_level() is not None or forward_ad._current_level >= 0)


@cache
def _capable(device: torch.device) -> bool:
    """Whether Triton is there and the device has what the kernels use: bfloat16 and TF32, so NVIDIA's from Ampere on."""
    right = device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))
    return right and importlib.util.find_spec("triton") is not None


def kernels_serve(x: Tensor, *widths: int) -> bool:
    """Whether the Triton kernels serve tensors like x with these head dims: on CUDA, or wherever SUBQUAD_KERNELS=on; not =off."""
    if transformed():
        return False
    wish = os.environ.get("SUBQUAD_KERNELS", "auto")
    if wish == "off" or x.dtype == torch.float64 or max(0, *widths) > 256:
        return False
    if not x.is_cuda and wish != "on":
        return False
    return torch.compiler.is_compiling() or _capable(x.device)  # what compiles has Triton


def traced(x: Tensor) -> bool:
    """Whether a call is being traced (compiled, exported, run on fake tensors), so that it must be an operator."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def batch_to_cut(x: Tensor) -> int:
    """The rows of x, by which work is cut to fit a cache; one in an exported program, whose cuts are those of any batch."""
    return 1 if torch.compiler.is_exporting() else x.shape[0]


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up; Triton's own is slow on the host."""
    return -(-n // by)


def by_rows(x: Tensor) -> Tensor:
    """x, as the kernels read it: by strides, with neighbouring channels side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def padded(width: int) -> int:
    """A width as the kernels hold it: a power of two, 16 at least."""
    return max(16, power_of_two(width))


class Span(NamedTuple):
    """A sequence (or a batch of equal ones): rows of the state, and tokens start … stop-1."""

    rows: slice
    start: int
    stop: int


def spans(tokens: int, cu_seqlens: Tensor | None) -> tuple[Span, ...]:
    """The sequences of a batch: all rows at once, or each packed sequence by itself."""
    if cu_seqlens is None:
        return (Span(slice(None), 0, tokens),)
    ends = cu_seqlens.tolist()
    return tuple(Span(slice(i, i + 1), start, stop) for i, (start, stop) in enumerate(pairwise(ends)))


class Segment(NamedTuple):
    """`chunks` chunks of `size` tokens from token `start` on."""

    start: int
    chunks: int
    size: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.size)


def segments(span: Span, like: Tensor, heads: int, *, reverse: bool = False, powers_of_two: bool = False) -> Iterator[Segment]:
    """Cut a span into segments of whole chunks that fit the cache, and its tail into shorter chunks; nothing is padded."""
    rows = CPU_ROWS if like.device.type == "cpu" else GPU_ROWS
    group = max(1, rows // (CHUNK * max(1, batch_to_cut(like) * heads)))
    whole = (span.stop - span.start) // CHUNK
    cut = [Segment(span.start + i * CHUNK, min(group, whole - i), CHUNK) for i in range(0, whole, group)]
    start, left = span.start + whole * CHUNK, span.stop - span.start - whole * CHUNK
    while left:
        size = 1 << (left.bit_length() - 1) if powers_of_two else left
        cut.append(Segment(start, 1, size))
        start, left = start + size, left - size
    yield from reversed(cut) if reverse else cut


def load(x: Tensor, segment: Segment, heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens of x ``[B, N, Hx, D]`` as tiles ``[B·heads, m, C, r, D]``; fewer heads than `heads` are repeated."""
    x = x[:, segment.tokens].to(dtype)
    x = expand_heads(x, heads) if x.shape[2] < heads else x
    batch, _, total, width = x.shape
    group = total // heads
    x = x.reshape(batch, segment.chunks, segment.size, heads, group, width).permute(0, 3, 1, 2, 4, 5)
    return x.reshape(batch * heads, segment.chunks, segment.size, group, width)


def store(out: Tensor, tiles: Tensor, segment: Segment) -> None:
    """Write tiles ``[B·heads, m, C, r, V]`` to their tokens of out ``[B, N, heads·r, V]``."""
    _, m, size, group, width = tiles.shape
    batch, _, total, _ = out.shape
    tiles = tiles.view(batch, total // group, m, size, group, width).permute(0, 2, 3, 1, 4, 5)
    out[:, segment.tokens].view(tiles.shape).copy_(tiles)


def rows(tiles: Tensor) -> Tensor:
    """Tiles ``[P, m, C, r, D]`` as a batch of matrices ``[P·m, C·r, D]``."""
    return tiles.reshape(-1, tiles.shape[2] * tiles.shape[3], tiles.shape[4])
