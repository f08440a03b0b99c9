"""Launches of Triton kernels with little work on the host, and first launches whose kernels are compiled side by side."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from subquad.ops.launch import INTERPRETED

Grid = tuple[int, int, int]
Result = TypeVar("Result")

_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)  # without the checks of the public one


class _Thread(threading.local):
    jobs: dict[tuple[Launcher, Any], tuple[Any, ...]] | None = None  # kernels that a rehearsal found missing, and arguments
    strict = False  # raise `Missing` rather than compile
    grad = False  # whether a call is to be differentiated


_thread = _Thread()


def _watched() -> bool:
    """Whether a profiler of Triton's wants to hear of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _stand_in(x: TensorDescriptor) -> TensorDescriptor:
    """A descriptor like x that keeps nothing large."""
    found = copy(x)
    found.base = x.base.new_empty(1)
    return found


def _kind(x: Tensor | TensorDescriptor) -> Any:
    """What Triton specialises on of a tensor: its dtype, and whether it is aligned. All descriptors of a launcher are alike."""
    return False if type(x) is TensorDescriptor else x.dtype if not x.data_ptr() & 15 else (x.dtype,)


@lru_cache(4096, typed=True)
def _kinds(strides: tuple[int, ...], *plain: float) -> tuple[Any, ...]:
    """The same of strides and of plain numbers."""
    return tuple([(x & 15 == 0, x == 1, x >> 31) for x in strides]), tuple([x >> 31 if type(x) is int else float for x in plain])


class Missing(Exception):
    """A kernel is not compiled yet."""


class Launcher:
    """Launches one Triton kernel with one set of constants.

    Triton binds and specialises every argument anew at each launch, which takes longer than some of the kernels. Here the
    compiled kernel is remembered by what Triton specialises on: dtypes, alignment, and integers that are 1 or multiples of 16.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        self.kernel, self.constants, self.options = kernel, constants, options
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.known: dict[Any, Any] = {}
        self.coming: dict[Any, Future[None]] = {}  # being compiled in threads

    def __call__(self, grid: Grid, tensors: tuple[Any, ...], strides: tuple[int, ...], plain: tuple[Any, ...]) -> None:
        """Arguments in order: tensors and descriptors (None where there is none, but the first), strides (specialised), plain
        numbers (not), constants."""
        assert isinstance(tensors[0], Tensor)
        device = tensors[0].device
        if device.type == "cuda" and device.index != _current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, strides, plain)
        key = (
            device,
            tuple([x if x is None else _kind(x) for x in tensors]),
            _kinds(strides, *plain),
        )
        found = self.known.get(key)
        if found is None or _thread.jobs is not None or _watched():
            return self._first(key, grid, tensors, strides, plain)
        run, function, packed, _ = found
        stream = driver.active.get_current_stream(device.index)
        run(*grid, stream, function, packed, None, None, None, *tensors, *strides, *plain, *self.values)

    def _first(self, key: Any, grid: Any, tensors: tuple[Any, ...], strides: tuple[int, ...], plain: tuple[Any, ...]) -> None:
        """A launch that is rehearsed, watched by a profiler's hooks, or the first of its kind, which compiles."""
        if _thread.jobs is not None:
            if key not in self.known and key not in self.coming:
                # a dtype stands for an aligned tensor, so that none is kept for as long as the compiler takes
                like = [
                    _stand_in(x) if isinstance(x, TensorDescriptor) else x if x is None or x.data_ptr() & 15 else x.dtype for x in tensors
                ]
                _thread.jobs[self, key] = (*like, *strides, *plain)
            return
        coming = self.coming.pop(key, None)
        if coming is not None:
            coming.result()
        elif key not in self.known and _thread.strict:
            raise Missing
        compiled = self.kernel[grid](*tensors, *strides, *plain, **self.constants, **self.options)
        if compiled is not None:  # the interpreter has none
            self.known[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled  # which would else be unloaded

    def compile(self, device: torch.device, arguments: tuple[Any, ...]) -> None:
        """Compile and load for arguments like these, without a launch."""
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(*arguments, grid=(1, 1, 1), **self.constants, **self.options)
            _ = compiled.run  # makes and loads what launches it


@cache
def _compilers() -> ThreadPoolExecutor:
    """The threads that compile, all started here, by the thread that first calls forward, and joined when Python ends.

    Autograd's own threads, in which a backward may find more to compile, are none of Python's: what they start are daemons.
    """
    count, begun = min(os.cpu_count() or 1, 32), threading.Event()
    pool = ThreadPoolExecutor(count, thread_name_prefix="subquad-compile")
    for _ in range(count):  # each waits, so that the next one needs a thread of its own
        pool.submit(begun.wait)
    begun.set()
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compilers.cache_clear)  # the child has none of its threads


def rehearse(call: Callable[[], Any]) -> None:
    """Have all kernels that a call would launch compiled side by side in threads: the call runs without launching any.

    Returns at once; a launch waits for its own kernel. Compiled one after another where there is no memory for the rehearsal.
    """
    before, _thread.jobs = _thread.jobs, {}
    try:
        call()
        jobs = _thread.jobs
    except torch.OutOfMemoryError:
        return
    finally:
        _thread.jobs = before
    if jobs:
        pool = _compilers()
        for (self, key), arguments in jobs.items():
            if (caches := getattr(self.kernel, "device_caches", None)) is not None:
                _ = caches[key[0].index]  # made here, as two threads would make two
            self.coming[key] = pool.submit(self.compile, key[0], arguments)


def prepared(call: Callable[[], Result], rehearsal: Callable[[], Any]) -> Result:
    """The call's result; where kernels are missing, it starts anew after `rehearsal` has been rehearsed.

    While a graph is captured nothing may run twice: then kernels are compiled one after another.
    """
    if INTERPRETED or torch.cuda.is_current_stream_capturing():
        return call()
    before, _thread.strict = _thread.strict, True
    try:
        return call()
    except Missing:
        pass
    finally:
        _thread.strict = before
    rehearse(rehearsal)
    return call()


def token_step(shape: tuple[int, ...] | None, steps: tuple[int, ...] | None) -> int:
    """Of ``[B, N, H, D]`` the stride of tokens, which kernels are compiled for: then a tile's rows need one address, not one each."""
    return 0 if shape is None or steps is None else steps[1] if shape[1] != 1 else shape[2] * shape[3]


def steps_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """The strides of tokens of ``[B, N, H, D]``, 0 for None."""
    return tuple([0 if x is None else token_step(x.shape, x.stride()) for x in tensors])


@cache
def _copies(device: torch.device) -> bool:
    """Whether the device has copies by descriptor, as NVIDIA's from Hopper on; on CPU the interpreter has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describable(x: Tensor | None, batch: int) -> bool:
    """Whether `Described` can name x ``[batch, N, H, D]``: all must lie multiples of 16 bytes apart, and none on another."""
    if x is None or x.shape[0] != batch or x.shape[1] < 2 or not _copies(x.device):
        return False
    steps = x.stride()[:3]
    return min(steps) > 0 and not (x.data_ptr() | (steps[0] | steps[1] | steps[2]) * x.itemsize) & 15


class Described(NamedTuple):
    """Of ``[B, N, H, D]`` what a descriptor says beside the address: it as ``[B, H, N, D]``, and tiles of some tokens of a head."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    @classmethod
    def of(cls, shape: tuple[int, ...], steps: tuple[int, ...], rows: int, columns: int) -> Described:
        batch, n, heads, width = shape
        return cls([batch, heads, n, width], [steps[0], steps[2], steps[1], 1], [1, 1, rows, columns])

    def at(self, x: Tensor) -> TensorDescriptor:
        """A descriptor of x, from which a kernel loads tiles, zero beyond the last token and channel. Made here and not in the
        kernel, where it takes each program as long as some of its tiles; and past its checks, which take longer than all else."""
        found = TensorDescriptor.__new__(TensorDescriptor)
        found.base, found.shape, found.strides, found.block_shape, found.padding = x, *self, "zero"
        return found


@cache
def launcher(kernel: Any, *, num_warps: int, num_stages: int = 1, **constants: Any) -> Launcher:
    """The launcher of a kernel with these constants."""
    return Launcher(kernel, constants, num_warps=num_warps, num_stages=num_stages)


class _Context(SimpleNamespace):
    """Stands for an autograd context, in a rehearsal and where a backward starts anew: saved tensors may be unpacked only once."""

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def set_materialize_grads(self, _: bool) -> None: ...


def eager(name: str, forward: Any, setup: Any, backward: Any) -> Any:
    """An operator as a call of an autograd Function, without the dispatch of operators, which takes as long as the kernels: for
    calls that nothing traces. `forward` gives o, the final state and a list of what is kept; `setup` and `backward` are the operator's.

    Where kernels are missing, those of the forward and of the backward are compiled side by side.
    """

    def run(ctx: Any, *inputs: Any) -> Any:
        def rehearsal() -> None:
            o, final, kept = forward(*inputs)
            if _thread.grad:
                stand_in = _Context(needs_input_grad=ctx.needs_input_grad)
                setup(stand_in, inputs, (o, final, kept))
                backward(stand_in, o, None)

        o, final, kept = prepared(lambda: forward(*inputs), rehearsal)
        setup(ctx, inputs, (o, final, kept))
        return o, final, *kept

    def refuse_twice(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph: a gradient linear in its input would silently count as constant
            raise RuntimeError("gradients of gradients are not available from the kernels; SUBQUAD_KERNELS=off has them")
        return once(ctx, *grads)

    def run_back(ctx: Any, *grads: Any) -> Any:
        once = _Context(saved_tensors=ctx.saved_tensors, needs_input_grad=ctx.needs_input_grad, **vars(ctx))
        call = partial(backward, once, *grads)
        return prepared(call, call)

    once = once_differentiable(run_back)
    methods = {"forward": staticmethod(run), "backward": staticmethod(refuse_twice)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        _thread.grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        if not _thread.grad:  # an autograd Function takes as long as a small kernel
            run_once = partial(forward, *inputs)
            o, final, kept = prepared(run_once, run_once)
            return o, final, *kept
        return function.apply(*inputs)

    return call
