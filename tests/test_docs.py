"""The documentation: a page per mechanism, examples that run, links that lead somewhere, tables that are current."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import subquad
from subquad import contract

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import gen_pages  # noqa: E402
import readme  # noqa: E402
import render  # noqa: E402

MECHANISMS = sorted(render.own_cards())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Every page of the site, written by hand or generated, by path."""
    by_hand = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
    return {**by_hand, **gen_pages.pages()}


def anchors(text: str) -> set[str]:
    """The headings of a page as mkdocs names them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"(?s)```.*?```", "", text), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_has_a_page_with_its_facts(pages, name):
    page, card = pages[f"mechanisms/{name}.md"], subquad.card(name)
    assert card.title in page and card.summary in page
    assert "def reference(" in page
    for option in contract.option_defaults(subquad.mechanism(name)):
        assert f"| `{option}` |" in page
    for given in card.inputs:
        assert f"| `{given}` |" in page
    assert f"({name}.md)" in pages["mechanisms/index.md"]


@pytest.mark.parametrize("name", MECHANISMS)
def test_every_option_is_described(name):
    cls = subquad.mechanism(name)
    described = render.arguments(cls) | render.arguments(cls.__init__)
    assert not [option for option in contract.option_defaults(cls) if not described.get(option)]


@pytest.mark.parametrize("name", MECHANISMS)
def test_usage_examples_run(name):
    card, space = subquad.card(name), {}
    exec(gen_pages.snippet(name, card), space)
    assert space["o"].shape == ((2, 1, 4, 32) if card.causal else (2, 256, 4, 32))
    assert space["o"].isfinite().all()
    if card.causal:
        assert space["state"].length.tolist() == [257, 257]


def test_pages_of_primitives_describe_their_functions(pages):
    for name, function in (("linear", "linear_attention"), ("delta", "delta_rule"), ("sparse", "sparse_attention"), ("merge", "merge")):
        assert f"## `{function}`" in pages[f"primitives/{name}.md"]
    for argument in ("log_decay", "initial_state", "cu_seqlens"):
        assert re.search(rf"^- `[^`]*\b{argument}\b[^`]*`: ", pages["primitives/linear.md"], re.MULTILINE)
    assert "## `subquad.swap`" in pages["reference/convert.md"]


def test_links_lead_somewhere(pages):
    dead = []
    for path, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", text)):
            if target.startswith(("http://", "https://")):
                continue
            file, _, anchor = target.partition("#")
            page = (Path(path).parent / file).as_posix() if file else path
            if page.startswith("img/") and (ROOT / "docs" / page).is_file():
                continue
            if page not in pages or (anchor and anchor not in anchors(pages[page])):
                dead.append(f"{path}: {target}")
    assert not dead


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_of_the_repository_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", (ROOT / name).read_text())
    assert not [t for t in targets if not t.startswith("https://") and not ((ROOT / name).parent / t).exists()]


def test_navigation_names_every_page(pages):
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed <= set(pages)
    assert {path for path in pages if not path.startswith("mechanisms/")} <= listed
    in_nav = re.findall(r"mechanisms/[\w-]+\.md", str(gen_pages.mechanism_nav()))
    assert sorted(in_nav) == sorted(path for path in pages if path.startswith("mechanisms/"))


def test_floors_of_the_kernels_follow_from_their_bytes(pages):
    """MiB from the tensors that are named, ms at 3.0 TB/s; operations from the formulas."""
    mib = {"q": 64, "k": 64, "v": 64, "o": 64, "T": 64, "β": 0.5}
    counts = pages["kernels.md"].split("## Bytes and operations")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in counts.splitlines() if line.startswith("| ")]
    timed = [row for row in rows if len(row) == 7 and row[2] != "MiB"]
    for name, forward, one, one_ms, both, two, two_ms in timed:
        size = {**mib, "g": 128 if "channel" in name else 1}
        assert sum(size[tensor] for tensor in re.findall(r"\w", forward)) == float(one)
        assert sum(int(n) * size[tensor] for n, tensor in re.findall(r"(\d+) (\w)", both)) == float(two)
        for amount, ms in ((one, one_ms), (two, two_ms)):
            assert f"{float(amount) * 2**20 / 3.0e9:.3f}" == ms
    counted = [(row[1], row[2]) for row in rows if len(row) == 3 and re.match(r"\d+ C D", row[1])]
    for formula, giga in counted:
        times, c, d = re.fullmatch(r"(\d+) C D \((?:(\d+) )?C \+ (?:(\d+) )?D\)", formula).groups("1")
        assert f"{int(times) * 64 * 128 * (int(c) * 64 + int(d) * 128) * 8 * 16 * 2048 / 64 / 1e9:.1f}" == giga
    assert len(timed) == 5 and len(counted) == 4


def test_readme_rows_are_what_the_cards_say():
    """A new mechanism may be missing until `make docs`; a row that stands must be true."""
    part = readme.between("mechanisms").search((ROOT / "README.md").read_text())[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    truth = readme.table(("",), readme.mechanism_rows().values()).splitlines()
    assert rows and set(rows) <= set(truth)


def test_the_table_of_recipes_is_current():
    part = readme.between("recipes").search((DOCS / "distill.md").read_text())[0]
    assert part.strip() == readme.recipe_table().strip()


def test_readme_results_are_what_the_files_say():
    part = readme.between("results").search((ROOT / "README.md").read_text())[0]
    assert part.strip() == readme.results_table().strip()


def test_worked_example_of_the_contract_keeps_it(monkeypatch):
    code = re.search(r'(?s)```python title="[^"]+"\n(.*?)```', (DOCS / "contract.md").read_text())[1]
    module = types.ModuleType("worked_example")
    monkeypatch.setitem(sys.modules, "worked_example", module)
    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))
    exec(code, module.__dict__)
    attention = subquad.attention("my-retention", 4, 16, kv_heads=2, span=10.0)
    q = torch.randn(2, 70, 4, 16, dtype=torch.float64)
    k, v = (torch.randn(2, 70, 2, 16, dtype=torch.float64) for _ in range(2))
    expected = subquad.reference("my-retention")(attention, q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=1e-10)
    first, state = attention(q[:, :33], k[:, :33], v[:, :33], return_state=True)
    rest = attention(q[:, 33:], k[:, 33:], v[:, 33:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=0, atol=1e-10)


def test_names_in_examples_are_there_after_import_subquad_alone():
    """Every dotted name of an example's code, and of its text where it is called, in a fresh process."""
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *DOCS.glob("*.md")))
    code = "\n".join(re.findall(r"(?s)```python[^\n]*\n(.*?)```", text))
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("import ", "from "))]
    called = re.findall(r"`(subquad(?:\.\w+)+)\(", text)
    names = sorted({*re.findall(r"\bsubquad(?:\.\w+)+", "\n".join(lines)), *called})
    assert {"subquad.swap", "subquad.bench.lm_eval_model", "subquad.convert.resize", "subquad.models.vision.load_released"} <= set(names)
    probe = "import subquad\nfor name in {names}:\n    try: eval(name)\n    except AttributeError: print(name)"
    found = subprocess.run([sys.executable, "-c", probe.format(names=names)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert found.returncode == 0 and not found.stdout, found.stdout + found.stderr


# ---- what the pages are made with ----------------------------------------------------------------------------------


def test_docstrings_become_markdown():
    text = """One line.

        o = q + k

    Then ``code``.

    Args:
        a, b: the first,
            over two lines.
        c: last.

    Returns:
        o ``[B]``.

    >>> f(1)
    2
    """
    assert render.doc(text) == (
        "One line.\n\n```text\no = q + k\n```\n\nThen `code`.\n\n**Args**\n\n- `a, b`: the first, over two lines.\n- `c`: last.\n\n"
        "**Returns**\n\no `[B]`.\n\n```python\n>>> f(1)\n2\n```"
    )


def test_signatures_are_spelled_as_in_the_source():
    def f(self, q: "torch.Tensor", *, size: int = 4, **options: object) -> "tuple[int, ...]": ...

    assert render.signature(f, "f") == "f(q: torch.Tensor, *, size: int = 4, **options: object) -> tuple[int, ...]"


def test_results_become_tables():
    tables = render.result_tables({"tables": [{"title": "t", "columns": ["a", "b"], "rows": [["x|y", 1]]}]})
    assert render.table(tables[0]["columns"], tables[0]["rows"]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |"
    report = {"rows": [{"mechanism": "gla", "distilled_steps": 5, "nll": 2.5, "ppl": 12.182}], "about": {"model": "m"}}
    (made,) = render.result_tables(report)
    assert made["columns"] == ["mechanism", "distilled_steps", "nll", "ppl"]
    assert made["rows"] == [["gla", "5", "2.5000", "12.18"]]


def test_quantities_and_citations():
    assert [render.quantity(x) for x in (999, 1000, 2_560_000, 3.21e12)] == ["999 ", "1 k", "2.56 M", "3.21 T"]
    assert render.linked("A: B (arXiv 2312.06635)") == "A: B ([arXiv 2312.06635](https://arxiv.org/abs/2312.06635))"


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "index.html").is_file()
