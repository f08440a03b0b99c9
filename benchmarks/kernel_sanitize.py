"""`kernels.py`'s look for memory errors and races: all forms on small inputs under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from common import Report
from kernel_cases import FORMS, Form, Shape, inputs

from subquad.bench.machine import synchronize

SMALL: list[tuple[Shape, torch.dtype]] = [
    ((1, 130, 2, 64), torch.bfloat16),
    ((1, 70, 1, 128), torch.bfloat16),
    ((1, 2100, 1, 64), torch.bfloat16),  # long enough to be cut into segments
    ((2, 33, 2, 48), torch.float32),
]
TOOLS = "memcheck", "racecheck"
SECONDS = 240  # each form and tool, side by side


def small(form: Form, device: torch.device) -> None:
    """Forward and backward with states, of equal and of packed sequences, with gates weak and strong; and a decode step."""
    for shape, dtype in SMALL:
        for strong in (False, True) if form.decay in ("token", "channel") else (False,):
            x = inputs(form, shape, device, dtype, state=True)
            if strong:
                x["log_decay"] = x["log_decay"] * 300
            grown = {name: t.requires_grad_() for name, t in x.items()}
            options: dict[str, Any] = {}
            if shape[0] == 1:
                ends = [0, 5, 5, shape[1]]
                options["cu_seqlens"] = torch.tensor(ends, device=device)
                grown["initial_state"] = x["initial_state"].detach().expand(len(ends) - 1, -1, -1, -1).contiguous().requires_grad_()
            o, state = form(grown, return_state=True, **options)
            (o.float().sum() + state.sum()).backward()
        with torch.no_grad():
            x = inputs(form, (shape[0], 1, *shape[2:]), device, dtype, state=True)
            form(x, return_state=True)
    synchronize(device)


def sanitize(bench: Report, names: Iterable[str] = FORMS, script: str = __file__) -> dict[str, Any]:
    """What each tool says of each of the names, which `script` is told, and how many errors or hazards it found in all of them."""
    add = bench.table("compute-sanitizer on small inputs", "tool", "form", "says")
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer, of NVIDIA's CUDA toolkit, is not on the PATH")

    def run(words: list[str], form: str) -> str:
        """Its output; an error where it failed and no tool summed up why."""
        done = subprocess.run([*words, sys.executable, script, form], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode and "SUMMARY" not in done.stdout:
            raise RuntimeError(f"{form} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
        return done.stdout + done.stderr

    def attempt(words: list[str], form: str) -> str:
        try:
            return run(words, form)
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # the other forms are still looked at
            return str(error).splitlines()[-1]

    def one(job: tuple[str, str]) -> str:
        tool, form = job
        found = attempt([program, "--tool", tool, "--target-processes", "all"], form)
        said = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", found)
        return said[-1] if said else found[-200:]

    jobs = [(tool, form) for tool in TOOLS for form in names]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda form: attempt([], form), names))  # compiled first, so that the tools watch the kernels alone
        said = dict(zip(jobs, pool.map(one, jobs)))
    for (tool, form), words in said.items():
        add(tool, form, words)
    counts: dict[str, int | None] = {}
    for tool in TOOLS:
        found = [re.findall(r"SUMMARY: (\d+) (?:error|hazard)", said[tool, form]) for form in names]
        counts[tool] = sum(int(one[0]) for one in found) if all(found) else None
    return {"said": {f"{tool}, {form}": words for (tool, form), words in said.items()}, "found": counts}


if __name__ == "__main__":
    small(FORMS[sys.argv[1]], torch.device("cuda"))
