"""Writes the generated tables of README.md, the mechanisms from their cards and the results from the result files, those of the
pages on images, and those of the recipes.

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
from subquad.convert.recipe import recipes

README, VISION, EXPERIMENT = ROOT / "README.md", ROOT / "docs" / "vision.md", ROOT / "docs" / "vision_experiment.md"
DISTILL, RECIPES, KERNELS = (ROOT / "docs" / f"{page}.md" for page in ("distill", "recipes", "kernels"))
TOKENS = 65536
SHOWN = {
    "vision_experiment": "Accuracy",
    "flops": (),
    "ranks": (),
    "moments": ("RAVLT-S",),
    "recipes": ("Linearization recipes",),
    "kernels": ("Time on the device", "Delta rules", "Decode step", "First forward", "flash-linear-attention"),
    "sparse": ("Times faster", "Causal window", "First call"),
}  # of long results; the page has all
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


def recipe_table() -> str:
    """One row a recipe, from its file."""
    rows = []
    for name, recipe in recipes().items():
        stages = ", ".join(f"{stage}: {recipe.tokens(stage) / 1e6:.3g} M" for stage in recipe.stages)
        rows.append([f"`{name}`", recipe.summary, stages, ", ".join(recipe.needs), linked(recipe.paper)])
    return table(("name", "what it does", "tokens", "needs", "paper"), rows)


def results_table() -> str:
    parts = []
    for content in results().values():
        for one in result_tables(content):
            if not one["title"].startswith(SHOWN.get(content.get("benchmark", ""), "")):
                continue
            parts.append(f"{one['title']} ({stamped(content)})\n\n{table(one['columns'], one['rows'])}")
    return "\n\n".join(parts) or "Not measured yet."


def experiment_table() -> str:
    """Of every device that the experiment with images was made on."""
    parts = []
    for content in results().values():
        if content.get("benchmark") == "vision_experiment":
            notes = "\n".join(f"- {note}" for note in content.get("notes", []))
            tables = [table(one["columns"], one["rows"]) for one in result_tables(content)]
            parts += [f"{content['tables'][0]['title']} ({stamped(content)})", *tables, notes]
    return "\n\n".join(parts) or "Not measured yet."


def tables_of(benchmark: str, titles: tuple[str, ...] = ("",)) -> str:
    """The tables of the result files of one benchmark whose titles begin so, each under its title."""
    parts = []
    for content in results().values():
        if content.get("benchmark") == benchmark:
            parts += [
                f"{one['title']} ({stamped(content)})\n\n{table(one['columns'], one['rows'])}"
                for one in result_tables(content)
                if one["title"].startswith(titles)
            ]
    return "\n\n".join(parts) or "Not measured yet."


def recipes_part() -> str:
    """The tables of the recipes side by side, and the plot where it was drawn."""
    parts = []
    for stem, content in results().items():
        if content.get("benchmark") == "recipes":
            if (ROOT / "docs" / "img" / f"{stem}.svg").is_file():
                parts.append(f"![Perplexity and recall against the bytes that a sequence keeps](img/{stem}.svg)")
            parts += [f"**{one['title']}** ({stamped(content)})\n\n{table(one['columns'], one['rows'])}" for one in content["tables"]]
            shown = {run["recipe"] for run in content["runs"].values() if run.get("done") and "error" not in run}
            missing = ", ".join(f"`{name}`" for name in recipes() if name not in shown)
            notes = [*content.get("notes", []), *([f"Not measured yet: {missing}."] if missing else [])]
            parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) or "Not measured yet."


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)")


def render(text: str, generated: dict[str, str], name: str = "README.md") -> str:
    """A page with its generated parts, by marker, made anew."""
    for marker, part in generated.items():
        text, count = between(marker).subn(lambda _, part=part: f"\n{part}\n\n", text)
        if count != 1:
            raise SystemExit(f"{name}: got {count} parts marked {marker!r}; expected one")
    return text


def main() -> int:
    pages = {
        README: {"mechanisms": mechanism_table(), "results": results_table()},
        VISION: {name: tables_of(name) for name in ("flops", "ranks")} | {"moments": tables_of("moments", ("Time on", "RAVLT-S", "First"))},
        DISTILL: {"recipes": recipe_table()},
        KERNELS: {"sparse": tables_of("sparse", ("Time on", "Times faster", "Causal window", "First call"))},
        RECIPES: {"measured": recipes_part()},
        EXPERIMENT: {"vision-experiment": experiment_table()},
    }
    stale = False
    for path, generated in pages.items():
        old = path.read_text(encoding="utf-8")
        new = render(old, generated, path.name)
        if new == old:
            continue
        if "--check" in sys.argv[1:]:
            print(f"{path.name} is out of date: run `make docs`", file=sys.stderr)
            stale = True
            continue
        path.write_text(new, encoding="utf-8")
        print(f"{path.name} rewritten")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
