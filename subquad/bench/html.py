"""The pages: self-contained HTML, styles and plots inline, made for phones and dark rooms as well."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from subquad.bench.plots import STYLE, Axis, Dot, Series, dots, legend, lines
from subquad.bench.speed import bytes_text

if TYPE_CHECKING:
    from subquad.bench.mechanisms import Point
    from subquad.bench.report import Report, Row

_CSS = (
    STYLE
    + """
* { box-sizing:border-box; }
body { margin:0 auto; max-width:1080px; padding:20px 16px 60px; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
h1 { font-size:1.5rem; line-height:1.25; margin:.4em 0; } h2 { font-size:1.15rem; margin:1.8em 0 .4em; }
p, li { max-width:75ch; } .soft, figcaption { color:var(--soft); font-size:.9rem; }
.scroll { overflow-x:auto; border:1px solid var(--grid); border-radius:8px; }
table { border-collapse:collapse; width:100%; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:7px 10px; text-align:right; white-space:nowrap; border-bottom:1px solid var(--grid); }
th { color:var(--soft); font-weight:600; } tr:last-child td { border-bottom:0; }
th:first-child, td:first-child { text-align:left; position:sticky; left:0; background:var(--paper);
  white-space:normal; overflow-wrap:anywhere; min-width:14em; }
@media (max-width:700px) { th:first-child, td:first-child { min-width:8.5em; } }
.plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr)); gap:14px; }
figure { margin:0; padding:12px; background:var(--panel); border-radius:8px; }
figure h3 { font-size:1rem; margin:0 0 4px; } .legend { display:flex; flex-wrap:wrap; gap:2px 14px; margin:0 0 6px; font-size:.85rem; }
.legend i { display:inline-block; width:10px; height:10px; border-radius:2px; margin-right:5px; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:2px 14px; font-size:.9rem; }
dt { color:var(--soft); } dd { margin:0; overflow-wrap:anywhere; }
blockquote { margin:0; padding:10px 14px; background:var(--panel); border-radius:8px; white-space:pre-wrap; overflow-wrap:anywhere; }
"""
)


def page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>'


def figure(title: str, svg: str, caption: str, names: Sequence[tuple[str, int]] = ()) -> str:
    if not svg:
        return ""
    key = legend(names) if names else ""
    return f"<figure><h3>{escape(title)}</h3>{key}{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def facts(about: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items()) + "</dl>"


def items(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>" if sentences else ""


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def length_text(tokens: float) -> str:
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 256 == 0 else f"{tokens:g}"


CONTEXT = Axis("context length, tokens", log=2, text=length_text)


# ---- the report of a job -------------------------------------------------------------------------------------------


def report_page(report: Report) -> str:
    from subquad.bench.density import sweep_figures, sweep_tables
    from subquad.bench.report import COLUMNS

    swept = sweep_tables(report)
    rows = [[text(row) for _, text in COLUMNS] for row in report.rows]
    model = report.about.get("model", "a model")
    samples = "".join(
        f"<h2>Written by {escape(row.name)}</h2><blockquote>{escape(row.sample)}</blockquote>" for row in report.rows if row.sample
    )
    body = (
        f"<h1>Attention of {escape(model)}: what a cheaper one gains and loses</h1>"
        + items(report.verdicts())
        + table([head for head, _ in COLUMNS], rows)
        + soft(
            "nll: nats per token on held-out text. ratio: perplexity over the original’s. gap closed: share of the nats between the "
            "untrained and the original model that distillation recovers. recall: key–value prompts answered exactly. pairs seen: of the "
            "pairs of a token with itself or one before it. "
            "A dash means: not measured, or not applicable."
        )
        + (f'<h2>Against density</h2>{swept}<div class="plots">{sweep_figures(report)}</div>' if swept else "")
        + "<h2>What each keeps per sequence at 64k tokens</h2>"
        + items(report.keeps())
        + f'<h2>Plots</h2><div class="plots">{report_figures(report)}</div>'
        + samples
        + "<h2>How this was measured</h2>"
        + items(report.notes)
        + facts(report.about)
    )
    return page(f"subquad: {model}", body)


def frontier(report: Report, number: dict[str, int]) -> str:
    """What a user chooses from: quality of every row against what it keeps and how fast it decodes, the best row of each mechanism."""
    best: dict[str, Row] = {}
    for row in report.rows:
        known = best.get(row.mechanism)
        if row.ppl is not None and (known is None or known.ppl is None or row.ppl < known.ppl):
            best[row.mechanism] = row
    drawn = ""
    perplexity = Axis("perplexity, lower is better", log=2, text=lambda v: f"{v:g}")
    share = Axis("recall", zero=True, text=lambda v: f"{100 * v:g} %")
    size = Axis("bytes kept per sequence at 65,536 tokens, fewer is better", log=4, text=bytes_text)
    time = Axis("ms per generated token", zero=True, text=lambda v: f"{v:g} ms")
    for title, of, y, against, x in (
        ("Perplexity against bytes kept", "ppl", perplexity, "bytes_64k", size),
        ("Recall against bytes kept", "recall", share, "bytes_64k", size),
        ("Perplexity against decode time", "ppl", perplexity, "decode_ms", time),
        ("Recall against decode time", "recall", share, "decode_ms", time),
    ):
        points = [(row, getattr(row, against), getattr(row, of)) for row in best.values()]
        series = [Series(row.name, [(a, b)], number[row.mechanism]) for row, a, b in points if a and b is not None]
        if len(series) > 1:
            side = "above" if of == "recall" else "below"
            caption = f"The best row of each mechanism. Those with none {side} and to the left of them are the ones to choose from."
            drawn += figure(title, lines(title, series, x, y), caption, [(one.name, one.color) for one in series])
    return drawn


def report_figures(report: Report) -> str:
    """Every plot that the report has numbers for."""
    first: dict[str, Row] = {}
    for row in report.rows:
        first.setdefault(row.mechanism, row)
    names = [(name, index) for index, name in enumerate(first)]
    number = dict(names)

    def series(of: str) -> list[Series]:
        drawn = []
        for name, row in first.items():
            points = [(t["tokens"], t[of]) for t in row.timings if t.get(of)]
            drawn.append(Series(name, points, number[name]))
        return drawn

    kept = [
        Series(
            n, [(t, b) for t, b in sorted({**r.kept_bytes, **r.measured_bytes}.items()) if b], number[n], max(r.measured_bytes, default=0)
        )
        for n, r in first.items()
    ]

    def curves(of: str) -> list[Series]:
        drawn = [(row, getattr(row, of)) for row in report.rows]
        return [
            Series(row.name, list(enumerate(losses, 1)), number[row.mechanism])
            for row, losses in drawn
            if len(losses) > 1 and min(losses) > 0
        ]

    losses, tuned = curves("losses"), curves("tune_losses")
    losses = [one for one in losses if not any(row.name == one.name and row.tuned_steps for row in report.rows)]
    perplexities = [
        Dot(row.name + ("" if row.taught or index == 0 else ", untrained"), row.ppl, f"{row.ppl:.4g}", number[row.mechanism])
        for index, row in enumerate(report.rows)
        if row.ppl is not None and row.ppl < 1e30
    ]
    seconds = Axis("seconds", log=2, text=lambda v: f"{v:g} s")
    return frontier(report, number) + (
        figure(
            "Memory against context length",
            lines("Bytes kept per sequence against context length", kept, CONTEXT, Axis("bytes", log=4, text=bytes_text)),
            "Bytes kept per sequence. Solid: measured from a real cache; dotted: computed from each mechanism’s card.",
            names,
        )
        + figure(
            "Perplexity",
            dots("Perplexity of each row", perplexities, Axis("perplexity on held-out text, logarithmic; lower is better", log=2)),
            "Logarithmic axis. The original model is the first row.",
        )
        + figure(
            "Prefill time against context length",
            lines("Prefill seconds against context length", series("prefill_s"), CONTEXT, seconds),
            "Time to read a prompt of that length, measured. Longer prompts were not measured.",
            names,
        )
        + figure(
            "Decode time against context length",
            lines(
                "Milliseconds per generated token against context length",
                series("decode_ms"),
                CONTEXT,
                Axis("ms", zero=True, text=lambda v: f"{v:g} ms"),
            ),
            "Time per generated token after a prompt of that length, measured.",
            names,
        )
        + figure(
            "Distillation",
            lines("Loss of each distillation step", losses, Axis("step"), Axis("loss", log=10), marks=False),
            "Attention transfer: squared error of the attentions’ outputs relative to the original’s, mean over layers.",
            [(one.name, one.color) for one in losses],
        )
        + figure(
            "Fine-tuning",
            lines("Loss of each step of fine-tuning", tuned, Axis("step"), Axis("loss", log=10), marks=False),
            "Nats per token: of the next token, or of the divergence from the original model.",
            [(one.name, one.color) for one in tuned],
        )
    )


# ---- the page of `subquad bench` -----------------------------------------------------------------------------------

BENCH_HEADS = ("mechanism", "tokens", "forward ms", "× sdpa", "memory", "train ms", "× sdpa", "memory")


def bench_cells(point: Point) -> list[str]:
    """One table line of a point."""
    if point.error:
        return [point.mechanism, f"{point.tokens:,}", point.error, *[""] * 5]
    cells = [point.mechanism, f"{point.tokens:,}"]
    for spent, ratio, size in (
        (point.forward_ms, point.speedup, point.forward_bytes), (point.train_ms, point.train_speedup, point.train_bytes)
    ):  # fmt: skip
        cells.append("–" if spent is None else f"{spent:,.0f}" if spent >= 100 else f"{spent:.3g}")
        cells.append("–" if ratio is None else f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.0f}×")
        cells.append("–" if size is None else bytes_text(size))
    return cells


def bench_page(points: Sequence[Point], about: dict[str, str]) -> str:
    names = [(name, index) for index, name in enumerate(dict.fromkeys(p.mechanism for p in points))]

    def series(of: str) -> list[Series]:
        return [
            Series(name, [(p.tokens, getattr(p, of)) for p in points if p.mechanism == name and getattr(p, of)], c) for name, c in names
        ]

    milliseconds, size = Axis("ms", log=10, text=lambda v: f"{v:g} ms"), Axis("bytes", log=4, text=bytes_text)
    plots = "".join(
        figure(f"{title} against tokens", lines(f"{title} against tokens", series(of), CONTEXT, axis), caption, names)
        for title, of, axis, caption in (
            ("Forward time", "forward_ms", milliseconds, "Median of repeated calls."),
            ("Forward memory", "forward_bytes", size, "Peak of torch’s allocator above the inputs."),
            ("Training time", "train_ms", milliseconds, "Forward and backward, median of repeated calls."),
            ("Training memory", "train_bytes", size, "Forward and backward, peak of torch’s allocator above the inputs."),
        )
    )
    body = (
        "<h1>Attention mechanisms on this machine</h1>"
        + table(BENCH_HEADS, [bench_cells(p) for p in points])
        + soft("× sdpa: how many times as fast as torch’s scaled_dot_product_attention in the same run. Memory: peak above the inputs.")
        + f'<h2>Plots</h2><div class="plots">{plots}</div><h2>How this was measured</h2>'
        + facts(about)
    )
    return page("subquad bench", body)
