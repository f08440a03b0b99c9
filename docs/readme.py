"""Writes the generated tables of README.md (the mechanisms, from their cards, and the results, from the result files) and of
docs/vision.md (from the result files of the vision backbones).

python docs/readme.py            rewrite what stands between the markers
python docs/readme.py --check    exit with 1 if that would change anything
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from render import ROOT, linked, own_cards, result_tables, results, stamped, table

import subquad
from subquad.bench.speed import bytes_text, card_cost
from subquad.contract import FAMILIES, option_defaults

README = ROOT / "README.md"
TOKENS = 65536
VISION = ROOT / "docs" / "vision.md"
SHOWN = {
    "kernels": ("Time on the device", "Decode step", "First forward", "flash-linear-attention"),
    "flops": (),
    "ranks": (),
}  # the page has all
LAYER = {"heads": 9, "kv_heads": 3, "head_dim": 64}  # of SmolLM2-135M


def mechanism_rows() -> dict[str, list[str]]:
    """One row a mechanism, by name, in the order of the families."""
    rows = {}
    for name, card in sorted(own_cards().items(), key=lambda item: (FAMILIES.index(item[1].family), item[0])):
        kinds = (("text", card.causal), ("images" if card.needs_grid else "encoders", card.bidirectional))
        kind = " and ".join(word for word, meant in kinds if meant)
        kept = "–"
        if card.state_bytes is not None:
            size = card_cost(card.state_bytes, subquad.Shape(TOKENS, **LAYER), option_defaults(subquad.mechanism(name)))
            kept = bytes_text(size)
        rows[name] = [f"`{name}`", card.summary, kind, "no" if card.training_free else "yes", kept, linked(card.paper)]
    return rows


def mechanism_table() -> str:
    columns = ("name", "what it does", "for", "needs training", "keeps at 64k tokens", "paper")
    return table(columns, mechanism_rows().values())


def results_table() -> str:
    parts = []
    for content in results().values():
        for one in result_tables(content):
            if not one["title"].startswith(SHOWN.get(content.get("benchmark", ""), "")):
                continue
            parts.append(f"{one['title']} ({stamped(content)})\n\n{table(one['columns'], one['rows'])}")
    return "\n\n".join(parts) or "Not measured yet."


def tables_of(benchmark: str) -> str:
    """The tables of the result files of one benchmark, each under its title."""
    parts = []
    for content in results().values():
        if content.get("benchmark") == benchmark:
            parts += [f"{one['title']} ({stamped(content)})\n\n{table(one['columns'], one['rows'])}" for one in result_tables(content)]
    return "\n\n".join(parts) or "Not measured yet."


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)")


def render(path: Path) -> str:
    """A page with its generated parts made anew."""
    pages = {README: {"mechanisms": mechanism_table, "results": results_table}}
    pages[VISION] = {name: lambda name=name: tables_of(name) for name in ("flops", "ranks")}
    text = path.read_text(encoding="utf-8")
    for name, make in pages[path].items():
        part = make()
        text, count = between(name).subn(lambda _, part=part: f"\n{part}\n\n", text)
        if count != 1:
            raise SystemExit(f"{path.name}: got {count} parts marked {name!r}; expected one")
    return text


def main() -> int:
    for path in (README, VISION):
        new = render(path)
        if new == path.read_text(encoding="utf-8"):
            continue
        if "--check" in sys.argv[1:]:
            print(f"{path.name} is out of date: run `make docs`", file=sys.stderr)
            return 1
        path.write_text(new, encoding="utf-8")
        print(f"{path.name} rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
