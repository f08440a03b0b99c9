"""Report: what every attention costs and keeps on one model and one text, as a table, as JSON and as a page.

>>> report = Report.load("demo-out/report.json")
>>> report.original.ppl, [(row.mechanism, row.distilled_steps, row.ppl) for row in report.rows]
>>> report.print(); report.save("elsewhere")
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from subquad.bench.speed import bytes_text
from subquad.checks import InputError
from subquad.files import whole

FORMAT = 1
_GAP = 1e-3  # nats between untrained and original, below which their share says nothing


@dataclass
class Row:
    """One attention in the model. None is "not measured", except that rows without training have no `gap_closed`.

    Args:
        mechanism: as `--to` takes it; the unchanged model is "softmax (original)".
        distilled_steps: steps of attention transfer before these numbers.
        nll, ppl: nats per token and perplexity on the held-out text.
        bytes_64k: bytes kept per sequence after 65,536 tokens, from the cards.
        tokens_per_s, decode_ms: prefill speed and time per generated token at `speed_at` tokens of context.
        ratio: perplexity over the original's.
        gap_closed: share of the nats between untrained and original that distillation closed; None where the untrained one lacks none.
        recall, recall_ranked: key-value recall, exact by greedy decoding, and ranked among the prompt's numbers.
        layers: layers swapped, of how many.
        pairs: share of the pairs of a token with itself or one before it that is seen in a window, mean over layers.
        base, setting: of a sweep over options: the mechanism without these options, and their values.
        flops: of a prefill of one window.
        keeps: what it keeps per sequence at 65,536 tokens, in one sentence.
        kept_bytes: length → bytes kept per sequence, from the cards; `measured_bytes` from real caches.
        timings: measured prefill and decode times, a dictionary a length.
        losses: the loss of every distillation step; `distill_seconds` what they took.
        tuned_steps: steps of fine-tuning after those; `tune_losses` and `tune_seconds` of them.
        distill_tokens, tune_tokens: read in each stage; `taught_tokens` in both.
        recipe: that made it, if one did.
        peak_memory: most bytes that a prefill of `speed_at` tokens takes beyond the weights.
    """

    mechanism: str
    distilled_steps: int = 0
    nll: float | None = None
    ppl: float | None = None
    bytes_64k: int | None = None
    tokens_per_s: float | None = None
    decode_ms: float | None = None
    speed_at: int | None = None
    ratio: float | None = None
    gap_closed: float | None = None
    recall: float | None = None
    recall_ranked: float | None = None
    layers: str = ""
    pairs: float | None = None
    base: str = ""
    setting: str = ""
    params: int | None = None
    new_params: int | None = None
    flops: float | None = None
    keeps: str = ""
    kept_bytes: dict[int, int] = field(default_factory=dict)
    measured_bytes: dict[int, int] = field(default_factory=dict)
    timings: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distill_seconds: float | None = None
    peak_memory: int | None = None
    tuned_steps: int = 0
    tune_losses: list[float] = field(default_factory=list)
    tune_seconds: float | None = None
    distill_tokens: int | None = None
    tune_tokens: int | None = None
    taught_tokens: int | None = None
    recipe: str = ""
    saved: str | None = None
    sample: str | None = None

    def __post_init__(self) -> None:  # JSON turns integer keys into strings
        self.kept_bytes = {int(n): size for n, size in self.kept_bytes.items()}
        self.measured_bytes = {int(n): size for n, size in self.measured_bytes.items()}

    @property
    def name(self) -> str:
        if not self.tuned_steps:
            return f"{self.mechanism}, {self.distilled_steps} steps" if self.distilled_steps else self.mechanism
        return f"{self.mechanism}, {f'{self.distilled_steps} + ' if self.distilled_steps else ''}{self.tuned_steps} steps tuned"

    @property
    def taught(self) -> bool:
        """Whether anything was learnt before these numbers."""
        return bool(self.distilled_steps or self.tuned_steps)

    @property
    def teaching(self) -> str:
        """What it learnt from, in words."""
        stages = (
            (self.distilled_steps, "distillation", self.distill_tokens, self.distill_seconds),
            (self.tuned_steps, "fine-tuning", self.tune_tokens, self.tune_seconds),
        )
        parts = []
        for steps, of, tokens, seconds in (stage for stage in stages if stage[0]):
            known = ", ".join(form.format(n) for form, n in (("{:,} tokens", tokens), ("{:.0f} s", seconds)) if n)
            parts.append(f"{steps} steps of {of}" + (f" ({known})" if known else ""))
        return " and ".join(parts)

    @property
    def stage_tokens(self) -> str:
        """Tokens of each stage that there was, in words."""
        return " + ".join(f"{tokens:,}" for tokens in (self.distill_tokens, self.tune_tokens) if tokens)


@dataclass
class Report:
    """Rows, the original first, and what they were measured on.

    Args:
        about: model, text, device, versions, commit, command and the like, in words.
        notes: sentences on how to read the numbers.
    """

    rows: list[Row] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def original(self) -> Row | None:
        return self.rows[0] if self.rows else None

    def compare(self) -> Report:
        """Fill in each row's ratio to the original, and the share of the gap that distillation closed."""
        first = self.original
        for row in self.rows:
            row.ratio = row.ppl / first.ppl if first and first.ppl and row.ppl else None
            row.gap_closed = self._gap_closed(row)
        return self

    def _gap_closed(self, row: Row) -> float | None:
        before = next((r for r in self.rows if r.mechanism == row.mechanism and not r.taught), None)
        first = self.original
        if not row.taught or before is None or first is None:
            return None
        if row.nll is None or before.nll is None or first.nll is None or before.nll - first.nll < _GAP:
            return None
        return (before.nll - row.nll) / (before.nll - first.nll)

    def verdicts(self) -> list[str]:
        """Plain sentences: what distillation gained, where an attention that was not trained does better, what a sweep found."""
        from subquad.bench.density import sweep_sentences

        said, first = [], self.original
        for row in self.rows:
            before = next((r for r in self.rows if r.mechanism == row.mechanism and not r.taught), None)
            if before is None or before is row or before is first or before.ppl is None or row.ppl is None or row.ratio is None:
                continue
            closed = "" if row.gap_closed is None else f": {row.gap_closed:.1%} of the gap in nats is closed"
            said.append(
                f"{row.teaching} bring {row.mechanism} from perplexity {before.ppl:.4g} to "
                f"{row.ppl:.4g}, {row.ratio:.3g}× the original's{closed}."
            )
        trained = [r for r in self.rows if r.taught and r.ppl is not None and first is not None and r.mechanism != first.mechanism]
        untrained = [r for r in self.rows[1:] if not r.taught and r.ppl is not None]
        for row in trained:
            for other in untrained:
                if other.mechanism != row.mechanism and other.ppl < row.ppl:  # type: ignore[operator]
                    said.append(
                        f"On this text the untrained {other.mechanism} (perplexity {other.ppl:.4g}) does better than {row.name}"
                        f"{'' if row.tuned_steps else ' of distillation'} (perplexity {row.ppl:.4g})."
                    )
        return said + self._tuned_sentences(trained) + sweep_sentences(self)

    def _tuned_sentences(self, trained: list[Row]) -> list[str]:
        """How fine-tuning alone does: on the original, and on a window that has nothing else to learn."""
        said, first = [], self.original
        for row in self.rows[1:]:
            if first is not None and row.mechanism == first.mechanism and row.tuned_steps and row.ppl is not None:
                said.append(f"The original, tuned in the same way, goes from perplexity {first.ppl:.4g} to {row.ppl:.4g}.")
        windows = [r for r in trained if r.tuned_steps and r.mechanism.startswith("sliding-window")]
        for row in trained:
            for window in windows:
                if row.tuned_steps and row not in windows:
                    word = "better" if row.ppl < window.ppl else "no better"  # type: ignore[operator]
                    said.append(
                        f"{row.name} (perplexity {row.ppl:.4g}) does {word} than the baseline, {window.name} (perplexity {window.ppl:.4g})."
                    )
        return said

    def keeps(self) -> list[str]:
        """One sentence a row: what it keeps per sequence at 64k tokens."""
        return [f"{row.name}: {row.keeps}" for row in self.rows if row.keeps]

    # ---- as JSON ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **_finite(asdict(self))}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read `report.json`, or the folder that holds it."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read.pop("format") != FORMAT:
                raise ValueError("format")
            return cls([Row(**row) for row in read.pop("rows")], **read)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError("report", path, f"a report.json written by subquad ({type(error).__name__})") from None

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, then `report.json`, each whole or not at all; returns the folder."""
        from subquad.bench.html import report_page

        save_report(folder, report_page(self), self.to_json())
        return Path(folder)

    # ---- in the terminal -------------------------------------------------------------------------------------------

    def table(self, names: Sequence[str] | None = None) -> Table:
        """The rows as a table of some columns (default: all), without those in which nothing was measured."""
        texts = {"row": lambda row: row.name, **dict(COLUMNS)}
        columns = {name: [texts[name](row) for row in self.rows] for name in names or dict(COLUMNS)}
        shown = [name for name, cells in columns.items() if name in ("row", *FIRST_COLUMNS) or any(cell != "–" for cell in cells)]
        table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in shown:
            left = name in ("row", "mechanism")
            table.add_column(name.replace(" ", "\n"), justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for index in range(len(self.rows)):
            table.add_row(*(columns[name][index] for name in shown))
        return table

    def print(self, console: Console | None = None) -> None:
        """The table (in two parts where the terminal is narrow), one for each sweep, then the sentences."""
        from subquad.bench.density import sweep_table, sweeps

        console = console or Console()
        wide = console.width >= 130
        for names in (None,) if wide else (FIRST_COLUMNS, ("row", *_REST)):
            console.print(self.table(names))
        for name, rows in sweeps(self).items():
            console.print(sweep_table(name, rows))
        for sentence in [*self.verdicts(), *self.keeps(), *self.notes]:
            console.print(f"• {sentence}", highlight=False, soft_wrap=True, markup=False)


def _number(value: float | None, form: str = "{:.4g}", absent: str = "–") -> str:
    return absent if value is None else form.format(value)


COLUMNS = (
    ("mechanism", lambda r: r.mechanism),
    ("distilled_steps", lambda r: str(r.distilled_steps)),
    ("tuned_steps", lambda r: str(r.tuned_steps) if r.tuned_steps else "–"),
    ("tokens taught", lambda r: r.stage_tokens or "–"),
    ("layers", lambda r: r.layers),
    ("nll", lambda r: _number(r.nll, "{:.4f}")),
    ("ppl", lambda r: _number(r.ppl)),
    ("ratio", lambda r: _number(r.ratio, "{:.3g}×")),
    ("gap closed", lambda r: _number(r.gap_closed, "{:.1%}")),
    ("recall", lambda r: _number(r.recall, "{:.0%}")),
    ("pairs seen", lambda r: _number(r.pairs, "{:.1%}")),
    ("bytes_64k", lambda r: "–" if r.bytes_64k is None else bytes_text(r.bytes_64k)),
    ("tokens/s", lambda r: _number(r.tokens_per_s, "{:,.0f}")),
    ("decode ms", lambda r: _number(r.decode_ms, "{:.3g}")),
    ("prefill memory", lambda r: "–" if r.peak_memory is None else bytes_text(r.peak_memory)),
    ("params", lambda r: "–" if r.params is None else f"{r.params / 1e6:.4g} M"),
)


FIRST_COLUMNS = ("mechanism", "distilled_steps", "nll", "ppl", "bytes_64k", "tokens/s")
_REST = tuple(name for name, _ in COLUMNS if name not in FIRST_COLUMNS)


def _finite(value: Any) -> Any:
    """JSON has no infinities: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_report(folder: str | Path, html: str, content: str) -> None:
    """Write `report.html`, then `report.json`, each whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.html", html)
    write_whole(folder / "report.json", content)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, never meets half of it."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
