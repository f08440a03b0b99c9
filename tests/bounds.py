"""Triton's interpreter with every address checked: kernels may touch the tensors that they were given, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


class OutOfBounds(AssertionError):
    pass


def check_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, a kernel that reads or writes outside its arguments raises, and says which kernel and how far off it was."""
    from triton.runtime import interpreter as triton

    known: dict[str, Any] = {}
    prepare = triton.GridExecutor._init_args_hst
    load, store = triton.InterpreterBuilder.create_masked_load, triton.InterpreterBuilder.create_masked_store

    def remember(self: Any, args: Any, kwargs: Any) -> Any:
        found = prepare(self, args, kwargs)
        tensors = [x for x in (*found[0], *found[1].values()) if hasattr(x, "data_ptr")]
        known["kernel"] = self.fn.__name__
        known["ranges"] = [(x.data_ptr(), x.data_ptr() + span(x)) for x in tensors]
        return found

    def span(x: Any) -> int:
        """Bytes from the first element to the end of the last."""
        return (sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1) * x.element_size() if x.numel() else 0

    def inside(pointers: Any, mask: Any) -> None:
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = pointers.data[np.broadcast_to(np.asarray(mask.data).astype(bool), pointers.data.shape)].astype(np.int64).ravel()
        fine = np.zeros(at.shape, bool)
        for start, stop in known["ranges"]:
            fine |= (at >= start) & (at + width <= stop)
        if not fine.all():
            stray = int(at[~fine][0])
            near = min(known["ranges"], key=lambda r: min(abs(stray - r[0]), abs(stray - r[1])))
            raise OutOfBounds(f"{known['kernel']} touches {stray - near[0]} bytes into a tensor of {near[1] - near[0]} bytes")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        inside(pointers, mask)
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        inside(pointers, mask)
        return store(self, pointers, value, mask, *rest, **named)

    monkeypatch.setattr(triton.GridExecutor, "_init_args_hst", remember)
    monkeypatch.setattr(triton.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(triton.InterpreterBuilder, "create_masked_store", checked_store)
