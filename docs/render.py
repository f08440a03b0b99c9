"""Markdown from what the code says of itself: docstrings, signatures, cards and result files."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import subquad
from subquad.bench.report import COLUMNS, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = ("Args", "Returns", "Raises", "Yields")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is set left, the others as they come."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *(line(row) for row in rows)])


def quantity(value: float) -> str:
    """Three significant digits with a prefix: ``1.23 G``."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def linked(paper: str) -> str:
    """A citation with its arXiv number made a link."""
    return re.sub(r"arXiv[: ]\s?(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


# ---- docstrings --------------------------------------------------------------------------------------------------


def doc(text: str | None) -> str:
    """A docstring as Markdown: sections become lists, indented formulas and ``>>>`` examples become code."""
    lines = inspect.cleandoc(text or "").splitlines()
    out: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if line.endswith(":") and line[:-1] in SECTIONS:
            body, i = indented(lines, i + 1)
            out += ["", f"**{line[:-1]}**", "", *section(body), ""]
        elif line.startswith(">>>"):
            block, i = taken(lines, i, lambda x: bool(x.strip()))
            out += ["", "```python", *block, "```", ""]
        elif line.startswith("    ") and (i == 0 or not lines[i - 1].strip() or out[-1:] == [""]):
            block, i = indented(lines, i)
            out += ["", "```text", *block, "```", ""]
        else:
            out.append(line.replace("``", "`"))
            i += 1
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def taken(lines: list[str], i: int, keep: Any) -> tuple[list[str], int]:
    start = i
    while i < len(lines) and keep(lines[i]):
        i += 1
    return lines[start:i], i


def indented(lines: list[str], i: int) -> tuple[list[str], int]:
    """The indented block at line `i`, without its indent, and the line after it."""
    block, i = taken(lines, i, lambda line: line.startswith("    ") or not line.strip())
    while block and not block[-1].strip():
        block.pop()
    return inspect.cleandoc("\n".join(block)).splitlines(), i


def items(body: list[str]) -> list[tuple[str, str]]:
    """``name: text`` entries with their continuation lines; an entry without a name has an empty one."""
    found: list[tuple[str, str]] = []
    for line in body:
        entry = re.match(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)", line)
        if entry and not line.startswith(" "):
            found.append((entry[1], entry[2]))
        elif found and (line.startswith(" ") or not found[-1][0]):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif line.strip():
            found.append(("", line.strip()))
    return found


def section(body: list[str]) -> list[str]:
    return [(f"- `{name}`: {text}" if name else text).replace("``", "`") for name, text in items(body)]


def arguments(owner: Any) -> dict[str, str]:
    """What a class or function says of its arguments, by name."""
    lines = inspect.cleandoc(owner.__doc__ or "").splitlines()
    if "Args:" not in lines:
        return {}
    body, _ = indented(lines, lines.index("Args:") + 1)
    return {name.strip("* "): text for names, text in items(body) for name in names.split(",")}


# ---- signatures --------------------------------------------------------------------------------------------------


def signature(owner: Any, name: str) -> str:
    """``name(parameters) -> result``, one parameter a line when long."""
    try:
        found = inspect.signature(owner)
    except (TypeError, ValueError):
        return name
    shown = [p for p in found.parameters.values() if p.name not in ("self", "cls")]
    parameters = [spelled(p) for p in shown]
    first = next((i for i, p in enumerate(shown) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None and not any(p.kind is p.VAR_POSITIONAL for p in shown):
        parameters.insert(first, "*")
    result = "" if found.return_annotation is found.empty else f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(parameters)}){result}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){result}"


def spelled(p: inspect.Parameter) -> str:
    """One parameter as it is written in the source."""
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = "" if p.annotation is p.empty else f": {annotation(p.annotation)}"
    default = "" if p.default is p.empty else f" = {p.default!r}" if kind else f"={p.default!r}"
    return f"{star}{p.name}{kind}{default}"


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def entry(owner: Any, name: str, level: int = 2) -> str:
    """A function or class: heading, signature, docstring, and for a class its public methods."""
    parts = [f"{'#' * level} `{name}`", f"```python\n{signature(owner, name)}\n```", doc(owner.__doc__)]
    if inspect.isclass(owner):
        for member, value in vars(owner).items():
            held = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if member.startswith("_") or not getattr(held, "__doc__", None):
                continue
            if isinstance(held, property):
                parts.append(f"{'#' * (level + 1)} `{name}.{member}`\n\n{doc(held.__doc__)}")
            elif inspect.isfunction(held):
                parts.append(entry(held, f"{name}.{member}", level + 1))
    return "\n\n".join(part for part in parts if part)


# ---- results -----------------------------------------------------------------------------------------------------


def results() -> dict[str, dict[str, Any]]:
    """Result files by name, in order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def result_tables(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A benchmark's tables, or the one table of a report, without its empty columns."""
    if "tables" in content:
        return list(content["tables"])
    rows = [[text(Row(**row)) for _, text in COLUMNS] for row in content["rows"]]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] not in ("", "–") for row in rows)]
    title = ", ".join(content["about"][key] for key in ("model", "text") if key in content["about"])
    return [{"title": title, "columns": [COLUMNS[i][0] for i in shown], "rows": [[row[i] for i in shown] for row in rows]}]


def stamped(content: dict[str, Any]) -> str:
    """Where and when a result was measured, in one line."""
    about = {**content.get("about", {}), **content}
    versions = about.get("versions", "")
    torch = f"torch {versions['torch']}" if isinstance(versions, dict) else versions
    commit = f"commit `{about['commit']}`" if about.get("commit") else ""
    return ", ".join(part for part in (about.get("device"), torch, about.get("date"), commit) if part)


# ---- cards -------------------------------------------------------------------------------------------------------


def own_cards() -> dict[str, subquad.Card]:
    """Cards of the mechanisms that live in the package (not of ones a test or a user registered)."""
    return {name: card for name, card in subquad.mechanisms().items() if subquad.mechanism(name).__module__.startswith("subquad.")}


def abilities(card: subquad.Card) -> list[str]:
    """What a mechanism can do, in words."""
    words = {
        "causal": "causal (language models)",
        "bidirectional": "bidirectional (encoders, images)",
        "needs_grid": "works on a grid of tokens",
        "recurrent": "keeps a state of fixed size when decoding",
        "training_free": "works in a pretrained model untrained",
    }
    return [text for key, text in words.items() if getattr(card, key)]
