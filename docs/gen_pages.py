"""Pages written from the code when the site is built: one per mechanism, one per primitive, the API, the results.

Run by mkdocs-gen-files. `pages()` gives them all as Markdown, by path, without writing anything.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from render import (
    abilities,
    arguments,
    doc,
    entry,
    linked,
    own_cards,
    quantity,
    result_tables,
    results,
    stamped,
    table,
)

import subquad
from subquad.bench.speed import bytes_text, card_cost
from subquad.contract import FAMILIES, option_defaults

PRIMITIVES = ("linear", "delta", "moments", "sparse", "merge")
API = {
    "reference/contract.md": (
        "The contract",
        "subquad",
        ("attention", "attend", "mechanisms", "card", "mechanism", "reference", "register", "Attention", "Card", "Input", "Shape", "Call",
         "State", "Rotary", "InputError"),
    ),
    "reference/convert.md": (
        "Swap, distil, report",
        "subquad",
        ("swap", "restore", "distill", "finetune", "merge_lora", "linearize", "Report"),
    ),
}  # fmt: skip
FAMILY_NAMES = {"exact": "Exact", "linear": "Linear", "sparse": "Sparse", "hybrid": "Hybrid", "vision": "Vision"}
LENGTHS = (1024, 4096, 16384, 65536)
HEADS, DIM = 16, 64  # of the costs shown
DEFINITION = "## The definition, in code\n\nThe tests hold the fast form against this.\n\n"
RESULTS_INTRO = """# Results

Generated from the files in `benchmarks/results/`, each of which records the device, the versions and the commit. Compare
times within one table only.
"""


# ---- mechanisms --------------------------------------------------------------------------------------------------


def mechanism_page(name: str, card: subquad.Card) -> str:
    cls = subquad.mechanism(name)
    module = sys.modules[cls.__module__]
    parts = [
        f"# `{name}`",
        f"**{card.title}.** {card.summary}",
        f"Paper: {linked(card.paper)}",
        f"**Family** {card.family} · **Can** {'; '.join(abilities(card))}",
        f"## Definition\n\n{doc(module.__doc__)}",
        f"## Use\n\n{python(snippet(name, card))}",
        options_section(cls),
        inputs_section(card),
        costs_section(cls, card),
        keeps_section(cls, card),
        measured_section(name),
        DEFINITION + python(inspect.getsource(subquad.reference(name))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"


def snippet(name: str, card: subquad.Card) -> str:
    """A usage example that runs as it stands."""
    sizes = "heads=4, head_dim=32" + (", hidden_size=128" if card.needs_hidden else "")
    extra = (", grid=(16, 16)" if card.needs_grid else "") + (", hidden=x" if card.needs_hidden else "")
    lines = [
        "import torch, subquad",
        "",
        "q, k, v = (torch.randn(2, 256, 4, 32) for _ in range(3))  # [B, N, H, D]",
        *(["x = torch.randn(2, 256, 128)  # the layer's hidden states, [B, N, hidden_size]"] if card.needs_hidden else []),
        f'attention = subquad.attention("{name}", {sizes})',
        f"o = attention(q, k, v{extra})  # [B, N, H, D]",
    ]
    if card.causal:
        last = ", hidden=x[:, -1:]" if card.needs_hidden else ""
        lines += [
            "",
            "# decoding: the prompt, then one token at a time",
            f"o, state = attention(q, k, v{extra}, return_state=True)",
            f"o, state = attention(q[:, -1:], k[:, -1:], v[:, -1:]{last}, state=state, return_state=True)",
        ]
    return "\n".join(lines)


def options_section(cls: type[subquad.Attention]) -> str:
    defaults, said = option_defaults(cls), arguments(cls) | arguments(cls.__init__)
    if not defaults:
        return "## Options\n\nNone."
    rows = [
        (f"`{name}`", "required" if value is inspect.Parameter.empty else f"`{value!r}`", said.get(name, ""))
        for name, value in defaults.items()
    ]
    return "## Options\n\n" + table(("option", "default", "meaning"), rows)


def inputs_section(card: subquad.Card) -> str:
    if not card.inputs:
        return ""
    rows = [(f"`{name}`", f"`[{', '.join(spec.shape)}]`", spec.doc) for name, spec in card.inputs.items()]
    text = "Passed by name, or projected from `hidden` when the mechanism was made with `hidden_size`."
    return f"## Extra inputs\n\n{text}\n\n" + table(("input", "shape", "meaning"), rows)


def defaults(cls: type[subquad.Attention]) -> dict[str, Any]:
    return {name: value for name, value in option_defaults(cls).items() if value is not inspect.Parameter.empty}


def costs_section(cls: type[subquad.Attention], card: subquad.Card) -> str:
    rows = []
    for tokens in LENGTHS:
        shape = subquad.Shape(tokens, HEADS, DIM)
        flops = card_cost(card.flops, shape, defaults(cls))
        softmax = 4 * tokens**2 * HEADS * DIM / (2 if card.causal else 1)  # two products; half of the map when causal
        moved = bytes_text(card_cost(card.bytes_moved, shape, defaults(cls)))
        rows.append((f"{tokens:,}", f"{quantity(flops)}FLOP", f"{softmax / flops:.3g}", moved))
    said = f"Forward, one sequence, one layer of {HEADS} heads of {DIM}, bf16, default options; counted from the definition, not timed."
    return f"## Costs\n\n{said}\n\n" + table(("tokens", "work", "softmax's work over it", "memory traffic"), rows)


def keeps_section(cls: type[subquad.Attention], card: subquad.Card) -> str:
    if card.state_bytes is None:
        return ""
    rows = []
    for tokens in (LENGTHS[0], LENGTHS[-1]):
        shape = subquad.Shape(tokens, HEADS, DIM)
        kept = bytes_text(card_cost(card.state_bytes, shape, defaults(cls)))
        rows.append((f"{tokens:,}", kept, card.kept(shape, **defaults(cls))))
    return "## What it keeps when decoding\n\nPer sequence and layer, same sizes.\n\n" + table(("after tokens", "bytes", "what"), rows)


def measured_section(name: str) -> str:
    """Rows of the result files that are about this mechanism."""
    parts = []
    for content in results().values():
        for one in result_tables(content):
            rows = [row for row in one["rows"] if str(row[0]).split(":")[0].split(" ")[0] == name]
            if rows:
                parts.append(f"{one['title']} ({stamped(content)})\n\n{table(one['columns'], rows)}")
    return "## Measured\n\n" + "\n\n".join(parts) if parts else ""


def mechanism_index(cards: dict[str, subquad.Card]) -> str:
    parts = ["# Mechanisms\n\nOne page each, generated from its card and its file."]
    for family in FAMILIES:
        rows = [
            (f"[`{name}`]({name}.md)", card.summary, ", ".join(abilities(card))) for name, card in cards.items() if card.family == family
        ]
        if rows:
            parts.append(f"## {FAMILY_NAMES[family]}\n\n" + table(("name", "what it does", "can"), rows))
    return "\n\n".join(parts) + "\n"


# ---- the API -----------------------------------------------------------------------------------------------------


def found(module: str, names: tuple[str, ...]) -> list[tuple[str, Any]]:
    owner = importlib.import_module(module)
    return [(name, getattr(owner, name)) for name in names if hasattr(owner, name)]


def primitive_page(name: str) -> str:
    module = importlib.import_module(f"subquad.ops.{name}")
    parts = [f"# `subquad.ops.{name}`", doc(module.__doc__)]
    parts += [entry(getattr(module, member), member) for member in module.__all__]
    definition = importlib.import_module(f"subquad.ops.{name}.reference")
    parts.append(DEFINITION + python(inspect.getsource(definition)))
    return "\n\n".join(part for part in parts if part) + "\n"


def api_page(title: str, module: str, names: tuple[str, ...]) -> str:
    return f"# {title}\n\n" + "\n\n".join(entry(owner, f"subquad.{name}") for name, owner in found(module, names)) + "\n"


def results_page() -> str:
    parts = [RESULTS_INTRO.strip()]
    for content in results().values():
        parts.append(f"## {content.get('title', 'The demo')}\n\n{stamped(content)}")
        for one in result_tables(content):
            parts.append(f"### {one['title']}\n\n{table(one['columns'], one['rows'])}")
        parts += [f"- {note}" for note in content.get("notes", [])]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, "Not measured yet."]) + "\n"


# ---- the site ----------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Every generated page, by its path in the site's sources."""
    cards = own_cards()
    written = {f"mechanisms/{name}.md": mechanism_page(name, card) for name, card in cards.items()}
    written["mechanisms/index.md"] = mechanism_index(cards)
    written |= {f"primitives/{name}.md": primitive_page(name) for name in PRIMITIVES}
    written |= {path: api_page(*parts) for path, parts in API.items()}
    written["results.md"] = results_page()
    return written


def mechanism_nav() -> list[Any]:
    cards = own_cards()
    families = {family: [f"mechanisms/{name}.md" for name, card in cards.items() if card.family == family] for family in FAMILIES}
    return ["mechanisms/index.md", *({FAMILY_NAMES[family]: paths} for family, paths in families.items() if paths)]


def build() -> None:
    """Hand the pages to mkdocs, and list the mechanisms in its navigation."""
    import mkdocs_gen_files

    for path, text in pages().items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
    for part in mkdocs_gen_files.config.nav:
        if "Mechanisms" in part:
            part["Mechanisms"] = mechanism_nav()


if __name__ == "<run_path>":  # how mkdocs-gen-files runs a script
    build()
