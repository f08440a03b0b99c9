"""The README.md of a model that a job saved: what it is, what it was taught with, and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from subquad.bench.report import Row
from subquad.bench.subjects import Subject

if TYPE_CHECKING:
    from subquad.bench.job import Job


def model_card(job: Job, subject: Subject, rows: Sequence[Row], held_out: int) -> str:
    """Markdown, without the part on loading that saving adds.

    Args:
        rows: the original's, then the subject's as far as they are.
        held_out: tokens of text that perplexity was measured on.
    """
    how = f"by subquad's recipe `{subject.recipe}` ({subject.paper})" if subject.recipe else "by subquad"
    stages = []
    for name, stage in (("Attention transfer", subject.transfer), ("Low-rank fine-tuning, merged", subject.finetune)):
        if stage is not None:
            words = ", ".join(f"{key} {' '.join(value) if isinstance(value, list | tuple) else value}" for key, value in stage.items())
            stages.append(f"- {name}: {words}.")
    lines = [f"| {_state(row)} | {row.taught_tokens or 0:,} | {_perplexity(row)} |" for row in rows]
    text = ", ".join(job.text) or "Moby-Dick"
    parts = [
        "---\nlibrary_name: transformers\n---\n",
        f"# {job.model} with `{subject.choice.label}` attention\n",
        f"Converted {how}; layers: {job.layers}.\n",
        *stages,
        f"\nPerplexity on {held_out:,} held-out tokens of {text}, in windows of {job.window:,}:\n",
        "| model | tokens taught | perplexity |\n|---|---|---|",
        *lines,
    ]
    return "\n".join(parts) + "\n"


def _state(row: Row) -> str:
    return row.name + ("" if row.taught or row.layers.startswith("0 of") else ", untrained")


def _perplexity(row: Row) -> str:
    return "–" if row.ppl is None else f"{row.ppl:.4g}"
