"""What `subquad train vision` shows: accuracy over seeds, curves, and how it was trained, as a table, as JSON and as a page."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from subquad.bench import html
from subquad.bench.plots import Axis, Dot, Series, dots, lines
from subquad.bench.report import save_report
from subquad.train.loop import Result

FORMAT = 1
HEADS = ("model", "parameters", "accuracy", "by seed", "test loss", "images/s")
NOTE = (
    "Accuracy: on the images held out, after the last epoch, of the averaged weights; mean ± standard deviation over seeds. All were given "
    "the same batches, augmented and mixed alike, for the same seed. Images/s: of training, without tests, and without the first step, "
    "which compiles and warms up."
)


@dataclass
class Trained:
    """One model, trained with each of the seeds.

    Args:
        name: the model, and the mechanism put into it.
        runs: a result for each seed.
        batch_size: of its steps.
    """

    name: str
    parameters: int
    batch_size: int
    runs: list[Result] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        return [run.accuracy for run in self.runs]

    @property
    def rate(self) -> float | None:
        """Images trained on in a second, tests and first steps left out; None where no step is left."""
        steps = sum(run.steps - run.starts for run in self.runs)
        seconds = sum(run.seconds - run.start_seconds for run in self.runs)
        return steps * self.batch_size / max(seconds, 1e-9) if steps else None

    def curve(self, of: str) -> list[tuple[float, float]]:
        """(epoch, mean over seeds)."""
        columns = zip(*[[row[of] for row in run.history] for run in self.runs])
        return [(epoch, statistics.fmean(column)) for epoch, column in enumerate(columns, 1)]

    def cells(self) -> list[str]:
        loss = statistics.fmean(run.test_loss for run in self.runs)
        seeds = ", ".join(f"{value:.1%}" for value in self.accuracies)
        rate = "–" if self.rate is None else f"{self.rate:,.0f}"
        return [self.name, f"{self.parameters / 1e6:.3g} M", spread(self.accuracies), seeds, f"{loss:.4f}", rate]


def spread(shares: Sequence[float]) -> str:
    """Mean ± standard deviation (of a sample, n − 1) in per cent; the mean alone where there is one."""
    mean = f"{100 * statistics.fmean(shares):.2f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.2f} %" if len(shares) > 1 else f"{mean} %"


@dataclass
class VisionReport:
    rows: list[Trained] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def print(self, console: Console | None = None) -> None:
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, head in enumerate(HEADS):
            table.add_column(head, justify="right" if index else "left", overflow="fold", min_width=0 if index else 12)
        for row in self.rows:
            table.add_row(*row.cells())
        console = console or Console()
        console.print(table)
        console.print(f"• {NOTE}", highlight=False, soft_wrap=True, markup=False)

    def to_json(self) -> str:
        cells = [{"title": self.about.get("data", ""), "columns": HEADS, "rows": [row.cells() for row in self.rows]}]
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"format": FORMAT, "about": self.about, "rows": rows, "tables": cells}, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `report.html`, then `report.json`, each whole or not at all."""
        save_report(folder, page(self), self.to_json())


def page(report: VisionReport) -> str:
    """The report as a page that needs nothing else."""
    names = [(row.name, index) for index, row in enumerate(report.rows)]
    epoch, share = Axis("epoch"), Axis("accuracy", text=lambda value: f"{value:.0%}")

    def curves(of: str) -> list[Series]:
        return [Series(row.name, row.curve(of), index) for index, row in enumerate(report.rows)]

    ends = [Dot(row.name, sum(row.accuracies) / len(row.accuracies), spread(row.accuracies), i) for i, row in enumerate(report.rows)]
    plots = (
        html.figure("Accuracy", dots("Accuracy of each model", ends, share), "On the images held out, mean over seeds.")
        + html.figure("Accuracy by epoch", lines("Accuracy by epoch", curves("accuracy"), epoch, share), "Mean over seeds.", names)
        + html.figure(
            "Training loss", lines("Training loss by epoch", curves("loss"), epoch, Axis("loss")), "Of mixed and smoothed targets.", names
        )
        + html.figure("Test loss", lines("Test loss by epoch", curves("test_loss"), epoch, Axis("loss")), "Of the averaged weights.", names)
    )
    title = f"Trained on {report.about.get('data', 'images')}"
    body = (
        f"<h1>{escape(title)}</h1>"
        + html.table(HEADS, [row.cells() for row in report.rows])
        + html.soft(NOTE)
        + f'<h2>Plots</h2><div class="plots">{plots}</div><h2>How they were trained</h2>'
        + html.facts(report.about)
    )
    return html.page(f"subquad: {title}", body)
