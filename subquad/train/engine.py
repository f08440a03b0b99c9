"""Where and in which precision a step runs: by accelerate, or by torch alone, behind one door; a test holds the two against each other."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from subquad.checks import InputError, nearest

PRECISIONS = ("float32", "bfloat16")
ENGINES = ("accelerate", "torch")


class Engine(Protocol):
    """What the loop asks for."""

    device: torch.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]: ...
    def autocast(self) -> contextlib.AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def clip(self, model: nn.Module, most: float) -> None: ...


class TorchEngine:
    """torch's own autocast, backward and clipping."""

    def __init__(self, device: str, precision: str) -> None:
        self.device, self.precision = torch.device(device), precision

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return model.to(self.device), optimizer

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, most: float) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), most)


class AccelerateEngine:
    """accelerate's, on one device of this process."""

    def __init__(self, device: str, precision: str) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
        except ImportError as error:
            raise InputError(
                "engine", f"'accelerate', without accelerate ({error})", "pip install 'subquad[convert]', or 'torch'"
            ) from None
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one a process, and an earlier run's device may have been another
        mixed = "bf16" if precision == "bfloat16" else "no"
        self.accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision=mixed)
        if self.accelerator.num_processes > 1:
            raise InputError("engine", f"{self.accelerator.num_processes} processes of accelerate", "one: a run is on one device")
        self.device = self.accelerator.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        return self.accelerator.prepare(model.to(self.device), optimizer)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, most: float) -> None:
        self.accelerator.clip_grad_norm_(model.parameters(), most)


def make_engine(name: str, device: str, precision: str | None) -> Engine:
    """An engine by name; the default precision is bfloat16 on CUDA and float32 elsewhere."""
    if name not in ENGINES:
        raise nearest("engine", name, ENGINES, "engine")
    precision = precision or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    if precision not in PRECISIONS:
        raise nearest("precision", precision, PRECISIONS, "precision")
    return AccelerateEngine(device, precision) if name == "accelerate" else TorchEngine(device, precision)
