"""What `recipes.py` computes and shows: how a budget is shared, how much of a gap is closed, and the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ORIGINAL = "original"
POINTS = 200  # of a curve of losses
DASH = "–"


# ---- the budget ----------------------------------------------------------------------------------------------------------


def stages_of(recipe: str, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of `distill` and `finetune` with which a recipe reads `plan["tokens"]` tokens in all.

    Args:
        recipe: its name; "original" for the tuning of lolcats on next tokens, without its transfer: what a model that keeps its
            attention gains from as many tuned tokens.
        plan: tokens, length, batch (sequences of a step), micro (of them at once in fine-tuning); share (of the steps that go to the
            transfer), tune_lr, transfer_lr and loss, each None for the recipe's own. `own_share`, if there, is what all recipes take of the
            model's own text in fine-tuning; without it none takes any so.
    """
    from subquad.convert.recipe import recipe as find

    chosen = find("lolcats").sharing(None) if recipe == ORIGINAL else find(recipe).sharing(plan.get("own_share"))
    steps = plan["tokens"] // (plan["batch"] * plan["length"])
    if plan["share"] is not None and len(chosen.stages) == 2:
        first = round(plan["share"] * steps)
        chosen = chosen.changed({"transfer": {"steps": first}, "finetune": {"steps": steps - first}})
    else:
        chosen = chosen.scaled(steps)
    shapes: dict[str, dict[str, Any]] = {
        "transfer": {"batch": plan["batch"], "lr": plan["transfer_lr"]},
        "finetune": {"batch": plan["micro"], "accumulate": plan["batch"] // plan["micro"], "lr": plan["tune_lr"], "loss": plan["loss"]},
    }
    made = {
        name: {**stage, "length": plan["length"], **{key: value for key, value in shapes[name].items() if value is not None}}
        for name, stage in chosen.stages.items()
    }
    if recipe == ORIGINAL:
        made = {"finetune": {**made["finetune"], "loss": "next-token"}} if "finetune" in made else {}
    return made


def tokens_read(stages: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(stage["steps"] * stage["batch"] * stage.get("accumulate", 1) * stage["length"] for stage in stages.values())


# ---- figures --------------------------------------------------------------------------------------------------------------


def closed(start: float, now: float, original: float) -> float | None:
    """The share of the gap in nats between an untrained swap and the original that is closed; None where there is no gap."""
    return (start - now) / (start - original) if start > original else None


def thinned(losses: Sequence[float], most: int = POINTS) -> list[float]:
    """At most `most` means of neighbours, all of as many steps but the last."""
    each = -(-len(losses) // most) or 1
    return [round(statistics.fmean(losses[i : i + each]), 5) for i in range(0, len(losses), each)]


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The mean, and of several the standard deviation of a sample."""
    if not values:
        return DASH
    mean = text(statistics.fmean(values))
    return f"{mean} ± {text(statistics.stdev(values))}" if len(values) > 1 else mean


def ppl(nats: float) -> str:
    return f"{math.exp(nats):.2f}" if nats < 10 else f"{math.exp(min(nats, 700)):.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


# ---- tables ---------------------------------------------------------------------------------------------------------------


def tables(runs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all that is in a result file; those of nothing are left out."""
    every = list(runs.values())
    made = [*recipe_tables(every)]
    made += [speed_table(every), many_table(every), passkey_table(every), long_table(every), memory_table(every), failure_table(every)]
    return [table for table in made if table["rows"]]


def settings_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What a run shares with others, rates and budget asked for among it: of an untrained model only how it was measured.

    Of the text what it is made of: what a model writes itself is never twice the same on a GPU.
    """
    plan = {key: value for key, value in (run["plan"] or {}).items() if key != "own"}  # which the text says
    if " of its own" in plan.get("text", ""):
        plan.setdefault("own_share", None)  # a setting too
    measured = {name: value for name, value in run["measured"].items() if name != "long"}  # which changes nothing else
    return {**measured, **plan, **({"text": plan["text"].rpartition(" (")[0]} if "text" in plan else {})}


def _in_words(key: str, value: Any) -> str:
    """A setting in a table."""
    if key == "own_share":
        return "own text as the other" if value is None else f"own text by distribution, share {value:g}"
    return "other texts to measure on" if key == "held_out" else f"{key} {value}"


def _otherwise(run: Mapping[str, Any], main: Mapping[str, Any]) -> str:
    """The settings of a run that are not the main ones."""
    return ", ".join(_in_words(key, value) for key, value in settings_of(run).items() if main.get(key) != value)


def main_settings(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Those of most trained runs, or of the first if none was trained."""
    found = [settings_of(run) for run in runs if run["plan"]] or [settings_of(run) for run in runs[:1]]
    return max(found, key=found.count) if found else {}


def good_runs(every: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [run for run in every if run["kind"] == "recipe" and run.get("done") and "error" not in run]


def main_runs(every: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The finished runs of recipes with the main settings, and the untrained ones that were measured like them."""
    good = good_runs(every)
    main = main_settings(good)
    return [run for run in good if settings_of(run).items() <= main.items()]


def recipe_tables(every: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    good, mine = good_runs(every), main_runs(every)
    main = main_settings(good)
    others = [run for run in good if run not in mine]
    start = _start(mine[0], good) if mine else None
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in mine:
        groups.setdefault(run["label"], []).append(run)
    for label, some in list(groups.items()):
        if all("window_alone" in run for run in some):
            groups[f"{label} without its linear part"] = [alone(run) for run in some]
    rows = sorted(groups.items(), key=lambda item: statistics.fmean(end(run) for run in item[1]))
    size = f", {main['tokens'] / 1e6:.3g} M tokens each" if "tokens" in main else ""
    size += "".join(f", {words} {main[name]:g}" for name, words in RATES.items() if main.get(name) is not None)
    size += f", loss {main['loss']}" if main.get("loss") else ""
    size += f", {_in_words('own_share', main['own_share'])}" if main.get("own_share") else ""
    quality = [[label, str(len(some)), *_quality(some, start)] for label, some in rows]
    costs = [[label, *_costs(some)] for label, some in rows if "without its" not in label]
    distances = ", ".join(str(one["distance"]) for one in mine[0]["recall"]) if mine else ""
    columns = [*QUALITY, f"recall at {distances}: right number likeliest", "written in full"]
    return [
        {"title": f"Linearization recipes, perplexity{size}", "columns": columns, "rows": quality},
        {"title": f"What the recipes cost{size}", "columns": COSTS, "rows": costs},
        {"title": "Recipes with other settings", "columns": OTHERS, "rows": _others(others, main, good)},
    ]


def _start(run: Mapping[str, Any], good: Sequence[Mapping[str, Any]]) -> float | None:
    """Nats of the original on the book, measured as this run was."""
    same = ("model", "dtype", "length", "windows")
    alike = [one for one in good if one["recipe"] == ORIGINAL and all(one["measured"].get(k) == run["measured"].get(k) for k in same)]
    return alike[0]["points"]["start"]["book"] if alike else None


RATES = {"transfer_lr": "transfer at", "tune_lr": "tuning at", "share": "transfer's share"}  # asked for instead of the recipes' own
QUALITY = ["recipe", "seeds", "tokens tuned", "swapped", "transferred", "in the end", "gap closed by transfer", "in all", "other text"]
COSTS = ["recipe", "runs at once", "kept at 64k tokens", "new parameters", "transfer", "peak", "fine-tuning", "peak"]
OTHERS = [
    "recipe", "seeds", "settings", "in the end", "gap closed by transfer", "in all", "other text", "recall, right number likeliest",
    "written in full",
]  # fmt: skip


def end(run: Mapping[str, Any], text: str = "book") -> float:
    """Nats a token on a text after the last stage."""
    return list(run["points"].values())[-1].get(text, math.nan)


def alone(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of LoLCATs as it was measured without the linear part."""
    found = run["window_alone"]
    return {**run, "points": {"start": run["points"]["start"], "end": found["nats"]}, "recall": found["recall"]}


def _nats(some: Sequence[Mapping[str, Any]], point: str) -> list[float]:
    return [run["points"][point]["book"] for run in some if point in run["points"]]


def _closed(some: Sequence[Mapping[str, Any]], now: Sequence[float], original: float | None) -> str:
    if original is None or len(now) != len(some):
        return DASH
    shares = [closed(run["points"]["start"]["book"], nll, original) for run, nll in zip(some, now)]
    return spread([share for share in shares if share is not None], percent)


def _quality(some: Sequence[dict[str, Any]], original: float | None) -> list[str]:
    ends = [end(run) for run in some]
    taught = [run for run in some if len(run["points"]) > 1]
    other = [nll for run in some if math.isfinite(nll := end(run, "other"))]
    tuned = [run["stages"]["finetune"]["tokens"] for run in some if "finetune" in run["stages"]]
    return [
        f"{statistics.fmean(tuned) / 1e6:.3g} M" if tuned else DASH,
        _ppl(_nats(some, "start")),
        _ppl(_nats(some, "transfer")),
        _ppl(ends),
        _closed(some, _nats(some, "transfer"), original),
        _closed(some, ends, original) if taught else DASH,
        _ppl(other),
        _recall(some, "ranked"),
        _recall(some, "exact"),
    ]


def _ppl(nats: Sequence[float]) -> str:
    """Perplexity at the mean, and the standard deviation of the perplexities."""
    if len(nats) < 2:
        return ppl(nats[0]) if nats else DASH
    return f"{ppl(statistics.fmean(nats))} ± {statistics.stdev(math.exp(min(x, 700)) for x in nats):.2f}"


def _recall(some: Sequence[Mapping[str, Any]], what: str) -> str:
    found = [[one[what] for one in run["recall"]] for run in some]
    return ", ".join(f"{100 * statistics.fmean(column):.0f}" for column in zip(*found)) + " %" if found and found[0] else DASH


def _costs(some: Sequence[Mapping[str, Any]]) -> list[str]:
    from subquad.bench.speed import bytes_text

    cells = [str(max(run.get("at_once", 1) for run in some)), bytes_text(some[0]["bytes_64k"]), f"{some[0]['new_parameters']:,}"]
    for name in ("transfer", "finetune"):
        stages = [run["stages"][name] for run in some if name in run["stages"]]
        if not stages:
            cells += [DASH, DASH]
            continue
        seconds = statistics.fmean(stage["seconds"] for stage in stages)
        rate = statistics.fmean(stage["tokens"] for stage in stages) / seconds
        peak = stages[0]["peak_mib"]
        cells += [f"{seconds:.0f} s, {rate:,.0f} tokens/s", f"{peak / 1024:.3g} GiB" if peak else DASH]
    return cells


def _others(runs: Sequence[dict[str, Any]], main: Mapping[str, Any], good: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Runs of other settings, those that differ in the seed alone in one row."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["label"], _otherwise(run, main)), []).append(run)
    return [[label, str(len(some)), differs, *_quality(some, _start(some[0], good))[3:]] for (label, differs), some in groups.items()]


def latest(runs: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Of each label the run that was made last."""
    return list({run["label"]: run for run in runs if run["kind"] == kind and "error" not in run}.values())


def _commit(run: Mapping[str, Any]) -> str:
    """A result file has runs of several, and the commit in its head is that of the last."""
    return str(run.get("commit", DASH))


def speed_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By context: prefill and decoding of one sequence."""
    found = latest(runs, "speed")
    lengths = sorted({one["tokens"] for run in found for one in run["timings"]})
    rows = []
    for run in found:
        at = {one["tokens"]: one for one in run["timings"]}
        for what, key, text in (("decode, ms a token", "decode_ms", "{:.2f}"), ("prefill, s", "prefill_s", "{:.3f}")):
            cells = [text.format(at[n][key]) if n in at and key in at[n] else at.get(n, {}).get("error", DASH) for n in lengths]
            rows.append([run["label"], what, *cells, _commit(run)])
    return {"title": "One sequence, by context", "columns": ["attention", "", *(f"{n:,}" for n in lengths), "at commit"], "rows": rows}


def many_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from subquad.bench.speed import bytes_text

    rows = []
    for run in latest(runs, "speed"):
        if (one := run.get("many")) is not None:
            figures = [one.get("error", DASH), DASH, DASH]
            if "error" not in one:
                figures = [f"{one['tokens_per_s']:,.0f}", f"{one['decode_ms']:.2f}", bytes_text(one["cache_bytes"])]
            rows.append([run["label"], f"{one['sequences']} × {one['tokens']:,}", *figures, _commit(run)])
    columns = ["attention", "sequences × context", "tokens/s", "ms a step", "kept", "at commit"]
    return {"title": "Decoding many sequences", "columns": columns, "rows": rows}


def passkey_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By length of the prompt: the share of passkeys written in full, over all depths."""
    found = [run for run in runs if run["kind"] == "passkey" and run.get("cells")]
    lengths = sorted({cell["length"] for run in found for cell in run["cells"]})
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in found:
        tokens, plan = sum(stage["tokens"] for stage in run["stages"].values()), run["plan"] or {}
        settings = [f"{key} {plan[key]}" for key in ("share", "tune_lr", "transfer_lr", "loss") if plan.get(key) is not None]
        settings += ["loss of the answers"] if plan and run["answers"] else []
        settings += [f"passkeys in {run['shortest']:,} tokens or more"] if plan and run.get("shortest") else []
        key = run["label"], ", ".join(settings) or DASH, f"{tokens / 1e6:.3g} M" if tokens else DASH
        groups.setdefault(key, []).append(run)
    rows = []
    for key, some in groups.items():
        known = [run for run in some if run.get("recall")]
        recall = _recall(known, "exact") if known else DASH
        for (cells, counted), words in COUNTED.items():
            at = [[share for run in some if (share := _at(run, cells, n, counted)) is not None] for n in lengths]
            if any(at):
                rows.append([*key, recall, words, str(max(map(len, at))), *map(_found, at)])
    distances = ", ".join(str(one["distance"]) for one in next((run["recall"] for run in found if run.get("recall")), []))
    columns = ["recipe", "settings", "tokens taught", f"codes {distances} tokens back", "passkeys", "runs"]
    columns += [f"{n:,} tokens" for n in lengths]
    return {"title": "Taught on prompts: codes written in full, and passkeys by the length of the prompt", "columns": columns, "rows": rows}


COUNTED = {  # of passkeys; what is counted but the first is looked at since later commits
    ("cells", "exact"): "the answer begins with the number",
    ("cells", "number"): "every digit likeliest, a space given",
    ("stretched", "exact"): "stretched to the prompt: the answer begins with the number",
    ("stretched", "number"): "stretched to the prompt: every digit likeliest, a space given",
}


def _at(run: Mapping[str, Any], cells: str, length: int, counted: str) -> float | None:
    """The share of passkeys that a run found in prompts of a length."""
    found = [cell[counted] for cell in run.get(cells, ()) if cell["length"] == length and counted in cell]
    return statistics.fmean(found) if found else None


def _found(shares: Sequence[float]) -> str:
    """The mean over runs, and of several the least and the most."""
    mean = percent(statistics.fmean(shares)) if shares else DASH
    return f"{mean} ({100 * min(shares):.0f}–{100 * max(shares):.0f})" if len(shares) > 1 else mean


def long_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Perplexity of the book in longer windows than were taught, and where a model can be stretched to them, after that."""
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    good = good_runs(list(runs))
    main = main_settings(good)
    for run in good:
        if "long" in run:
            taught = f"{run['plan']['tokens'] / 1e6:.3g} M" if run["plan"] else DASH
            otherwise = _otherwise(run, {**main, "tokens": (run["plan"] or {}).get("tokens")})  # which have a column
            key = run["label"], otherwise or DASH, f"{run['measured']['long']:,}", taught
            groups.setdefault(key, []).append(run["long"])
    rows = []
    for key, some in groups.items():
        cells = [[math.exp(one[name]) for one in some if name in one] for name in ("as taught", "stretched")]
        rows.append([*key, str(len(some)), *(spread(found, "{:.2f}".format) for found in cells)])
    columns = ["recipe", "settings", "window, tokens", "tokens taught", "seeds", "as taught", "stretched"]
    return {"title": "Perplexity of the book in long windows", "columns": columns, "rows": rows}


def memory_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = []
    for run in latest(runs, "memory"):
        peak = f"{run['peak_mib']:,}" if run["peak_mib"] else DASH
        rows.append([run["label"], f"{run['parameters'] / 1e6:,.0f} M", peak, f"{1024 * run['bar_gib']:,}", _commit(run)])
    return {
        "title": "Memory of attention transfer, MiB",
        "columns": ["what", "parameters", "peak", "at most wanted", "at commit"],
        "rows": rows,
    }


def failure_table(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [[run["label"], run["kind"], str(run.get("seed", "")), run["error"]] for run in runs if "error" in run]
    return {"title": "What failed", "columns": ["what", "of", "seed", "how"], "rows": rows}
