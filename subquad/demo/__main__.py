"""The demo: `python -m subquad.demo` puts two attentions into SmolLM2-135M, teaches one, and shows what each gains and loses.

It runs the main job on the end of Moby-Dick: softmax as it is; a window of 64 with 4 sinks, untrained, which is the
baseline to beat; LoLCATs before and after a short distillation.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console

from subquad.bench.choice import Choice
from subquad.bench.folder import finished
from subquad.bench.job import Job, run_job
from subquad.bench.report import Report
from subquad.checks import InputError

OUT = Path("demo-out")
JOB = Job(
    model="smollm2-135m",
    to=(Choice("sliding-window", {"window": 64, "sinks": 4}), Choice("lolcats")),
    steps=50,
    windows=8,
    prompts=6,
    lengths=(256, 1024, 2048),
)


def main() -> int:
    console, begin = Console(highlight=False), time.perf_counter()
    if finished(OUT):
        Report.load(OUT).print(console)
        console.print(f"\nThis is the finished run in {OUT}/. To run it again: rm -r {OUT} && make demo", soft_wrap=True)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here: no hub is asked
    try:
        report = run_job(JOB, OUT, command="python -m subquad.demo", progress=True)
    except InputError as error:
        print(f"subquad: {error}", file=sys.stderr)
        return 2
    report.print(console)
    for row in report.rows:
        if row.sample:
            console.print(f"\n{row.name} writes (the beginning is the book's):\n{row.sample}", markup=False)
    console.print(
        f"\nDone in {time.perf_counter() - begin:.0f} s. Open {OUT}/report.html; the distilled model is in {OUT}/lolcats/.", soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
