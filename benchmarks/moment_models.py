"""`moments.py`'s models: RAVLT-S as it is here and as its authors wrote it, timed at inference and in training."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import failure
from torch import nn

from subquad.bench.machine import synchronize
from subquad.models.vision import vision_model

BATCHES = [(224, 128), (512, 32), (1024, 8)]


def our_model() -> nn.Module:
    return vision_model("ravlt_s")


def author_model(folder: Path) -> nn.Module:
    """RAVLT-S of a checkout of qhfan/RALA; fvcore, which it only counts with, may be missing."""
    if "fvcore" not in sys.modules and importlib.util.find_spec("fvcore") is None:
        names = ("FlopCountAnalysis", "flop_count_table")
        sys.modules["fvcore"] = types.ModuleType("fvcore")
        sys.modules["fvcore.nn"] = types.ModuleType("fvcore.nn")
        for name in names:
            setattr(sys.modules["fvcore.nn"], name, None)
    if "authors_rala" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = next(folder.rglob("RALA.py"))
            spec = importlib.util.spec_from_file_location("authors_rala", found)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["authors_rala"] = module
            spec.loader.exec_module(module)
    made: nn.Module = sys.modules["authors_rala"].RAVLT_S(None)
    return made


def images_per_second(step: Callable[[], Any], batch: int, device: torch.device, seconds: float = 2.0) -> float:
    """After two steps of warming up, as many as fit the time."""
    for _ in range(2):
        step()
    synchronize(device)
    start, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - start < seconds:
        step()
        synchronize(device)
        count += 1
    return batch * count / (time.perf_counter() - start)


def train_and_infer(make: Callable[[], nn.Module], size: int, batch: int, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """Images a second, and the peak GiB of training; or the error."""
    try:
        torch.manual_seed(0)
        model = make().to(device)
        run: Any = torch.compile(model) if compiled else model
        images = torch.randn(batch, 3, size, size, device=device)
        labels = torch.randint(0, 1000, (batch,), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")

        def infer() -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                run(images)

        def train() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        model.eval()
        found: dict[str, Any] = {"infer": images_per_second(infer, batch, device)}
        model.train()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found["train"] = images_per_second(train, batch, device)
        found["gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return found
    except Exception as error:  # the other sizes and models are still measured
        return {"error": failure(error)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
