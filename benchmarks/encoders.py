"""Sentence embeddings of MiniLM with hedgehog, before and after attention transfer, by each objective: about six minutes on two cores.

python benchmarks/encoders.py [--steps 200]
"""

from __future__ import annotations

import argparse

from common import RESULTS, slug, stamp, write_json

from subquad.bench.choice import parse_choice
from subquad.bench.encoder_job import COLUMNS, EncoderJob, EncoderRow, run_encoder_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    rows: list[EncoderRow] = []
    for objective in ("output", "weights"):
        job = EncoderJob("minilm", (parse_choice("--to", "hedgehog"),), steps=steps, objective=objective, device="cpu")
        rows += run_encoder_job(job, progress=True).rows[1 if rows else 0 :]
        title = (
            f"Embeddings of {rows[0].fidelity.sentences} held-out sentences of Moby-Dick against the original's, all-MiniLM-L6-v2, on CPU"
        )
        made = {"title": title, "columns": list(COLUMNS), "rows": [list(row.cells()) for row in rows]}
        losses = {row.objective: row.losses for row in rows if row.steps}
        result = {"benchmark": "encoders", "title": "Sentence encoders", **stamp("cpu"), "tables": [made], "losses": losses}
        write_json(RESULTS / f"encoders-{slug('cpu')}.json", result)  # after each: the second takes the longer


if __name__ == "__main__":
    main()
