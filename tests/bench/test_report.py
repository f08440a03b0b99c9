import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from subquad import InputError, Report
from subquad.bench.html import bench_page, report_page
from subquad.bench.mechanisms import Point
from subquad.bench.plots import Axis, Dot, Series, dots, lines
from subquad.bench.report import Row


def four_rows():
    def row(mechanism, nll, steps=0, **rest):
        return Row(
            mechanism, steps, nll, math.exp(nll), bytes_64k=1000, tokens_per_s=10.0, layers="4 of 4", keeps=f"It keeps {mechanism}.", **rest
        )

    times = [{"tokens": 256, "prefill_s": 0.5, "decode_ms": 3.0}, {"tokens": 512, "prefill_s": 1.1, "decode_ms": 3.1}]
    sizes = {"kept_bytes": {256: 100, 512: 200, 65536: 25600}, "measured_bytes": {256: 100, 512: 200}, "timings": times}
    return Report(
        [
            row("softmax (original)", 3.0, **sizes),
            row("sliding-window:window=64", 3.25, **sizes),
            row("lolcats", 6.0, **sizes),
            row("lolcats", 3.5, 80, losses=[1.0, 0.5, 0.25], sample="Call me <b>Ishmael</b>."),
        ],
        {"model": "tiny & small"},
        ["One note."],
    ).compare()


def test_ratio_and_gap_closed_are_what_they_say():
    report = four_rows()
    assert [row.ratio for row in report.rows] == pytest.approx([1.0, math.exp(0.25), math.exp(3.0), math.exp(0.5)])
    assert [row.gap_closed for row in report.rows[:3]] == [None, None, None]
    assert report.rows[3].gap_closed == pytest.approx(2.5 / 3.0)


def test_without_a_gap_none_is_closed():
    report = four_rows()
    report.rows[2].nll = report.rows[0].nll + 1e-6  # a window as long as the text: the swap alone loses nothing
    report.rows[2].ppl = math.exp(report.rows[2].nll)
    assert report.compare().rows[3].gap_closed is None
    said = next(s for s in report.verdicts() if s.startswith("80 steps"))
    assert "from perplexity 20.09 to 33.12, 1.65× the original's." in said and "gap" not in said
    report.rows[2].nll = report.rows[0].nll - 0.5
    assert report.compare().rows[3].gap_closed is None


def test_it_is_said_where_the_untrained_window_wins():
    report = four_rows()
    assert any("untrained sliding-window:window=64" in s and "does better than lolcats, 80 steps" in s for s in report.verdicts())
    report.rows[3].nll, report.rows[3].ppl = 3.2, math.exp(3.2)
    assert not any("does better" in s for s in report.compare().verdicts())


def test_json_holds_every_row_and_comes_back_equal(tmp_path):
    report = four_rows()
    report.save(tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    names = {"mechanism", "distilled_steps", "nll", "ppl", "bytes_64k", "tokens_per_s"}
    assert [names <= row.keys() for row in read["rows"]] == [True] * 4
    assert Report.load(tmp_path) == report == Report.load(tmp_path / "report.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_numbers_that_are_not_finite_are_not_measured():
    assert json.loads(Report([Row("a", nll=math.nan, ppl=math.inf)]).to_json())["rows"][0]["ppl"] is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1, "rows": [{"unknown": 1}], "about": {}, "notes": []}'])
def test_a_damaged_report_is_bad_input(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=r"report: got .*expected a report.json"):
        Report.load(tmp_path)


def test_the_terminal_shows_all_rows_and_sentences():
    console = Console(width=200, record=True)
    four_rows().print(console)
    shown = console.export_text()
    for part in ("distilled_steps", "bytes_64k", "tokens/s", "sliding-window:window=64", "83.3%", "It keeps lolcats.", "One note."):
        assert part in shown


class Page(HTMLParser):
    """Collects tags that were opened and not closed, outside references, and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.outside, self.text, self.tags = [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("page", [report_page(four_rows()), bench_page([Point("a<b", 64, 1.0, forward_bytes=10)], {"device": "x"})])
def test_pages_are_whole_and_self_contained(page):
    read = Page(page)
    assert read.open == [] and read.outside == [] and "script" not in read.tags and "link" not in read.tags
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert "svg" in read.tags


def test_the_page_escapes_what_others_wrote_and_draws_every_plot():
    page = report_page(four_rows())
    assert "Call me <b>" not in page and "Call me &lt;b&gt;Ishmael" in page and "tiny &amp; small" in page
    assert len(re.findall("<svg", page)) == 6  # perplexity against bytes, memory, perplexity, prefill, decode, losses
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)


def test_the_frontier_shows_each_mechanism_once_at_its_best():
    report = four_rows()
    for row, recall, ms in zip(report.rows, (0.9, 0.1, 0.0, 0.5), (4.0, 2.0, 3.0, 3.0)):
        row.recall, row.decode_ms = recall, ms
    page = report_page(report)
    found = [re.findall(r"<title>([^<]+)</title>", svg) for svg in re.findall(r"<svg.*?</svg>", page)][:4]
    assert [titles[0] for titles in found] == [
        "Perplexity against bytes kept",
        "Recall against bytes kept",
        "Perplexity against decode time",
        "Recall against decode time",
    ]
    assert found[1][1:] == [
        "softmax (original): 1000 B, 90 %",
        "sliding-window:window=64: 1000 B, 10 %",
        "lolcats, 80 steps: 1000 B, 50 %",
    ]
    assert found[2][3] == "lolcats, 80 steps: 3 ms, 33.1155" and found[3][3] == "lolcats, 80 steps: 3 ms, 50 %"


def test_lines_stand_where_their_numbers_are():
    svg = lines("t", [Series("a", [(1, 1), (10, 10), (100, 100)], 0)], Axis("x", log=10), Axis("y", log=10))
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"/>', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and x2 > x0 and y2 < y0


def test_what_is_computed_is_dotted():
    series = Series("a", [(1, 1), (2, 2), (3, 3), (4, 4)], 0, measured=2)
    svg = lines("t", [series], Axis("x"), Axis("y"), marks=False)
    drawn = re.findall(r'class="line( unmeasured)?" stroke="[^"]+" points="([^"]+)"', svg)
    assert [(bool(dotted), len(points.split())) for dotted, points in drawn] == [(False, 2), (True, 3)]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (3.1, 3.2), (5.0, 5.0), (0.02, 900.0)])
@pytest.mark.parametrize("log", [None, 2, 10])
def test_ticks_cover_the_values(low, high, log):
    if log and not low:
        low = 0.5
    ticks = Axis("x", log=log).ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9


def test_dots_are_ordered_by_value_along_the_axis():
    svg = dots("t", [Dot("a", 10, "10", 0), Dot("b", 40, "40", 1), Dot("c", 20, "20", 2)], Axis("x", log=2))
    a, b, c = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    assert a < c < b and c - a == pytest.approx(b - c, abs=0.2)
