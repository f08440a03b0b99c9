"""`kernels.py`'s look for memory errors and races: all forms on small inputs under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from common import Report
from kernel_cases import FORMS, Shape, inputs

SMALL: list[tuple[Shape, torch.dtype]] = [
    ((1, 130, 2, 64), torch.bfloat16),
    ((1, 70, 1, 128), torch.bfloat16),
    ((2, 33, 2, 48), torch.float32),
]
TOOLS = "memcheck", "racecheck"
SECONDS = 160  # each, side by side


def small(device: torch.device) -> None:
    """Every form forward and backward with states, of equal and of packed sequences, with gates weak and strong; and a decode step."""
    for form in FORMS.values():
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
    torch.cuda.synchronize()


def sanitize(bench: Report) -> dict[str, Any]:
    """What each tool says, and how many errors or hazards it found."""
    add = bench.table("compute-sanitizer on small inputs", "tool", "says")
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer, of NVIDIA's CUDA toolkit, is not on the PATH")

    def one(tool: str) -> str:
        words = [program, "--tool", tool, "--target-processes", "all", sys.executable, str(__file__)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        said = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout + done.stderr)
        if done.returncode or not said:
            raise RuntimeError(f"{tool} ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}")
        return said[-1]

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        said = dict(zip(TOOLS, pool.map(one, TOOLS)))
    for tool, words in said.items():
        add(tool, words)
    counts = {tool: int(re.findall(r"(\d+) (?:error|hazard)", words)[0]) for tool, words in said.items()}
    return {"said": said, "found": counts}


if __name__ == "__main__":
    small(torch.device("cuda"))
