"""Sweeps of `subquad swap`: settings of an option, and what they see, keep, lose and gain."""

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

import subquad
from subquad import InputError, Report
from subquad.bench import quality, speed
from subquad.bench.choice import Choice, parse_choice, sweep
from subquad.bench.density import sweep_figures, sweeps
from subquad.bench.html import report_page
from subquad.bench.job import Job, run_job
from subquad.bench.report import Row

WINDOWS = (4, 16, 64)


def swept(to, *texts):
    return tuple(sweep("--sweep", [parse_choice("--to", one) for one in to], texts))


@pytest.fixture
def job(folder, text):
    return Job(
        model=str(folder), to=swept(["sliding-window:sinks=0", "gla"], "window=4,16,64"), text=(str(text),), window=64, windows=2,
        prompts=2, distance=20, lengths=(16, 32),
    )  # fmt: skip


def test_settings_are_spread_over_the_mechanisms_that_have_the_option():
    found = swept(["sliding-window:sinks=2", "gla", "powerattention"], "window=8,16", "block=32,64")
    assert [c.label for c in found] == [
        "sliding-window:window=8,sinks=2",
        "sliding-window:window=16,sinks=2",
        "gla",
        "powerattention:block=32",
        "powerattention:block=64",
    ]
    assert [(c.base, c.setting) for c in found[1:4]] == [
        ("sliding-window:sinks=2", "window=16"),
        ("gla", ""),
        ("powerattention", "block=32"),
    ]
    crossed = swept(["s2"], "block=32,64", "stride=none,2")
    assert [c.setting for c in crossed] == ["block=32,stride=None", "block=32,stride=2", "block=64,stride=None", "block=64,stride=2"]
    assert swept(["gla"]) == (Choice("gla"),)


@pytest.mark.parametrize(
    "to, texts, message",
    [
        (["sliding-window"], ["window"], "--sweep: got 'window'; expected OPTION=value"),
        (["sliding-window"], ["windw=3,4"], "nearest: window"),
        (["gla"], ["window=3,4"], "option of gla"),
        (["sliding-window"], ["window=3,3"], "once"),
        (["sliding-window"], ["window=3", "window=4"], "once"),
        (["sliding-window:window=8"], ["window=3,4"], "not both"),
    ],
)
def test_what_cannot_be_swept_is_named(to, texts, message):
    with pytest.raises(InputError, match=message):
        swept(to, *texts)


@pytest.mark.parametrize(
    "name, options",
    [
        ("sliding-window", {"window": 5, "sinks": 0}),
        ("sliding-window", {"window": 5, "sinks": 3}),
        ("powerattention", {"block": 4, "local": 1, "sinks": 0}),
        ("s2", {"block": 4, "local": 1, "stride": 2}),
        ("softmax", {}),
    ],
)
def test_pairs_seen_are_counted_pair_by_pair(llama, name, options):
    """The weights of unit values: a pair is seen where its weight is above 0."""
    n = 37
    with torch.no_grad():
        module = subquad.attention(name, 4, 8, value_dim=n, **options).double()
        torch.manual_seed(0)
        q, k = (torch.randn(1, n, 4, 8, dtype=torch.float64) for _ in range(2))
        weights = module(q, k, torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, 4, n))
    seen = (weights > 0).sum().item() / (4 * n * (n + 1) / 2)
    assert speed.pairs_seen(llama, n) == 1
    assert speed.pairs_seen(subquad.swap(llama, name, **options), n) == pytest.approx(seen, rel=1e-12)
    half = subquad.swap(subquad.restore(llama), name, layers="1:1", **options)
    assert speed.pairs_seen(half, n) == pytest.approx((1 + seen) / 2, rel=1e-12)


def test_linear_attention_names_no_keys(llama):
    assert speed.pairs_seen(subquad.swap(llama, "gla", layers=[0]), 16) is None
    assert speed.pairs_seen(subquad.swap(subquad.restore(llama), "lolcats", layers=[0]), 16) is None


def test_a_sweep_on_a_model(job, tmp_path):
    report = run_job(job, tmp_path / "out")
    assert [r.setting for r in report.rows] == ["", "window=4", "window=16", "window=64", ""]
    windows, seen = report.rows[1:4], [w * (w + 1) / 2 + (64 - w) * w for w in WINDOWS]
    assert [r.pairs for r in windows] == pytest.approx([x / (64 * 65 / 2) for x in seen], rel=1e-12)
    assert [r.bytes_64k for r in windows] == [w * 4 * 2 * 2 * 8 * 4 for w in WINDOWS]
    assert report.original.pairs == 1 and report.rows[4].pairs is None
    assert windows[2].nll == pytest.approx(report.original.nll, abs=1e-5) and windows[0].nll != windows[1].nll
    assert all(r.recall is not None and r.tokens_per_s > 0 and r.decode_ms > 0 for r in windows)
    assert Report.load(tmp_path / "out") == report
    assert list(sweeps(report)) == ["sliding-window:sinks=0"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Against density" in page and "sliding-window:sinks=0: setting" in page


def test_an_interrupted_sweep_goes_on(job, tmp_path, monkeypatch):
    job = replace(job, to=job.to[:3])
    measured, real = [], quality.perplexity

    def interrupted(*args, **options):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **options)

    monkeypatch.setattr(quality, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "out")
    again = []
    monkeypatch.setattr(quality, "perplexity", lambda *a, **o: again.append(1) or real(*a, **o))
    report = run_job(job, tmp_path / "out")
    assert len(again) == 1 and len(report.rows) == 4
    assert [r.setting for r in sweeps(report)["sliding-window:sinks=0"]] == [f"window={w}" for w in WINDOWS]


def test_a_bad_setting_writes_nothing(job, tmp_path):
    with pytest.raises(InputError, match="window: got -1"):
        run_job(replace(job, to=swept(["sliding-window"], "window=8,-1")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---- the report ----------------------------------------------------------------------------------------------------


def made(ratios=(2.0, 1.04, 1.01), shares=(0.1, 0.4, 0.8), sizes=(1000, 4000, 8000)):
    def row(mechanism, ppl, **rest):
        return Row(mechanism, 0, math.log(ppl), ppl, tokens_per_s=100.0, decode_ms=2.0, recall=0.5, **rest)

    rows = [
        row(f"w:window={i}", 20.0 * ratio, pairs=share, bytes_64k=size, base="w", setting=f"window={i}")
        for i, (ratio, share, size) in enumerate(zip(ratios, shares, sizes))
    ]
    return Report(
        [row("softmax (original)", 20.0, pairs=1.0, bytes_64k=65536), *reversed(rows), row("gla", 30.0)], {"model": "m"}
    ).compare()


def test_settings_stand_by_density_and_the_least_that_is_near_is_named():
    report = made()
    (rows,) = sweeps(report).values()
    assert [r.setting for r in rows] == ["window=0", "window=1", "window=2"]
    assert report.verdicts() == [
        "w comes within 5% of the original’s perplexity with window=1: 40.0% of the pairs and 3.91 KiB kept at 65,536 tokens."
    ]
    assert made(ratios=(3.0, 2.0, 1.5)).verdicts() == ["w comes no nearer to the original’s perplexity than 1.5×, with window=2."]


def test_the_terminal_shows_the_sweep():
    console = Console(width=200, record=True)
    made().print(console)
    shown = console.export_text()
    order = [shown.index(f"\n window={i}") for i in range(3)]
    assert "w, by density" in shown and order == sorted(order) and "10.0%     1000 B" in shown


def test_each_measure_is_drawn_against_what_is_seen_and_kept():
    page = sweep_figures(made())
    figures = re.findall(r"<h3>(.*?)</h3>", page)
    assert [f.split(" against ") for f in figures] == [
        [measure, x] for x in ("pairs seen", "bytes kept") for measure in ("Perplexity", "Recall", "Prefill speed", "Decode time")
    ]
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
        points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"/>', svg)[1].split()]
        assert len(points) == 3 and points == sorted(points)
    assert "softmax (original)" in page and "gla" not in page


def test_what_does_not_differ_or_is_not_known_is_not_drawn():
    assert "bytes kept" not in sweep_figures(made(sizes=(8000, 8000, 8000)))
    assert "pairs seen" not in sweep_figures(made(shares=(None, None, None)))
    plain = Report([replace(row, base="", setting="") for row in made().rows], {"model": "m"}).compare()
    assert "Against density" not in report_page(plain) and sweep_figures(plain) == ""


def test_perplexities_far_apart_stand_on_a_logarithmic_axis():
    near, far = (re.search(r"<svg.*?</svg>", sweep_figures(made(ratios=r)))[0] for r in ((2.0, 1.04, 1.01), (64.0, 4.0, 1.01)))

    def heights(svg):
        return [float(p.split(",")[1]) for p in re.search(r'points="([^"]+)"/>', svg)[1].split()]

    (a, b, c), (x, y, z) = heights(near), heights(far)
    assert (b - a) / (c - a) == pytest.approx((2.0 - 1.04) / (2.0 - 1.01), abs=0.01)
    assert (y - x) / (z - x) == pytest.approx(math.log(64 / 4) / math.log(64 / 1.01), abs=0.01)
