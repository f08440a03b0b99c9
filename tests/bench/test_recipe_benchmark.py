"""The benchmark of recipes: equal budgets, shares of a gap, tables, and what its worker measures."""

import importlib
import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from bench.tiny import make_llama

import subquad
from subquad.bench.quality import recall_prompts
from subquad.checks import InputError
from subquad.convert.recipe import recipes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PLAN = {"tokens": 6_000_000, "length": 1024, "batch": 8, "micro": 8, "share": None, "tune_lr": None, "transfer_lr": None, "loss": None}
STEPS = 732  # 6,000,000 / 8,192, rounded down


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(BENCHMARKS))
    yield Namespace(**{name: importlib.import_module(f"recipes{name}") for name in ("", "_tables", "_worker", "_text", "_pool")})
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def main(parts):
    return getattr(parts, "")


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_reads_the_same_number_of_tokens(parts, name):
    for changes in ({}, {"micro": 2}, {"share": 0.25}, {"loss": "kl", "tune_lr": 3e-4, "transfer_lr": 5e-3}):
        stages = parts._tables.stages_of(name, PLAN | changes)
        assert parts._tables.tokens_read(stages) == STEPS * 8192
        assert set(stages) == set(recipes()[name].stages)
        assert {stage["batch"] * stage.get("accumulate", 1) for stage in stages.values()} == {8}


def test_stages_share_the_budget(parts):
    def steps(changes):
        return {name: stage["steps"] for name, stage in parts._tables.stages_of("lolcats", PLAN | changes).items()}

    assert steps({}) == {"transfer": 366, "finetune": 366}
    assert steps({"share": 0.25}) == {"transfer": 183, "finetune": 549}
    assert steps({"share": 1.0}) == {"transfer": 732}
    assert steps({"share": 0.0}) == {"finetune": 732}
    tuned = parts._tables.stages_of("original", PLAN | {"loss": "kl", "tune_lr": 3e-4})
    assert list(tuned) == ["finetune"] and tuned["finetune"]["steps"] == 366  # as many as two-stage recipes tune with
    assert tuned["finetune"]["loss"] == "next-token" and tuned["finetune"]["lr"] == 3e-4
    assert parts._tables.stages_of("lizard", PLAN)["finetune"]["lr"] == 5e-4  # its own


def test_the_table_of_runs(main):
    assert {job.recipe for job in main.JOBS} == {"original", *recipes()}
    assert len({job.label for job in main.JOBS}) == len(main.JOBS)
    runs = main.jobs(None, ("lolcats", "lizard"))
    assert [(job.label, job.seed) for job in runs[len(main.JOBS) :]] == [("lizard", 1), ("lolcats", 1), ("lizard", 2), ("lolcats", 2)]
    assert max(job.cost for job in runs if job.seed) < min(job.cost for job in runs if not job.seed)  # further seeds come last
    with pytest.raises(SystemExit, match="lolcat"):
        main.jobs(("lolcat",), ())
    swapped = [make_llama(num_hidden_layers=8) for _ in range(2)]
    for model, layers in zip(swapped, ("all", next(job.layers for job in main.JOBS if job.label == "lolcats 3:1"))):
        subquad.swap(model, "lolcats", layers=layers)
    assert [len(subquad.convert.swap.swapped(model)) for model in swapped] == [8, 6]


def test_keys_tell_settings_apart(main):
    task = {"kind": "recipe", "label": "lolcats", "seed": 1, "stages": {"finetune": {"lr": 1e-4}}, "cost": 1.0}
    assert main.key_of(task) == main.key_of(task | {"cost": 2.0, "data": "somewhere"})
    assert main.key_of(task).startswith("recipe/lolcats/1/")
    assert main.key_of(task) != main.key_of(task | {"stages": {"finetune": {"lr": 2e-4}}})


def test_the_share_of_a_gap(parts):
    closed = parts._tables.closed
    assert closed(5.0, 3.5, 3.0) == 0.75
    assert closed(5.0, 5.5, 3.0) == -0.25
    assert closed(5.0, 2.0, 3.0) == 1.5
    assert closed(3.0, 2.9, 3.0) is None


def test_curves_are_thinned_to_means(parts):
    assert parts._tables.thinned([1.0, 3.0, 5.0]) == [1.0, 3.0, 5.0]
    thin = parts._tables.thinned([float(i) for i in range(450)])
    assert len(thin) == 150 and thin[:2] == [1.0, 4.0] and thin[-1] == 448.0
    assert parts._tables.thinned([1.0, 2.0, 6.0], most=2) == [1.5, 6.0]


def run(label, seed=0, plan=PLAN, **points):
    """A finished run, of nats on the book."""
    stages = {name: {"tokens": 3_000_000, "seconds": 50.0, "tokens_per_s": 60_000, "peak_mib": 2048} for name in points if name != "start"}
    found = [{"distance": 256, "ranked": 0.5, "exact": 0.25}]
    return {
        "kind": "recipe", "label": label, "recipe": label, "seed": seed, "plan": plan, "measured": {"windows": 32}, "done": True,
        "stages": stages,
        "points": {name: {"book": nats, "other": 2.0} for name, nats in points.items()}, "recall": found, "bytes_64k": 2**20,
        "new_parameters": 1000,
    }  # fmt: skip


def test_texts_sampled_anew_are_the_same_settings_and_named(parts, main):
    plans = [PLAN | {"text": f"book + 1000 of its own ({digest})"} for digest in ("0123456789ab", "ba9876543210")]
    runs = [run(f"recipe {i}", plan=plan, start=4.0, finetune=3.0) for i, plan in enumerate(plans)]
    assert parts._tables.main_runs(runs) == runs
    other = run("other", plan=PLAN | {"text": "book (0123456789ab)"}, start=4.0, finetune=3.0)
    assert parts._tables.main_runs([*runs, other]) == runs
    assert main.sampled_anew(dict(enumerate(runs))) and not main.sampled_anew({0: runs[0], 1: other})


def test_tables_say_what_was_measured(parts):
    lolcats = [run("lolcats", seed, start=4.0, transfer=3.5 + 0.25 * seed, finetune=3.25) for seed in range(2)]
    lolcats = [one | {"window_alone": {"nats": {"book": 3.75}, "recall": one["recall"]}} for one in lolcats]
    other = run("lolcats", plan=PLAN | {"tune_lr": 1e-3}, start=4.0, transfer=3.5, finetune=3.125)
    failed = {"kind": "recipe", "label": "liger", "seed": 0, "plan": PLAN, "error": "ValueError: no", "done": True}
    under_way = {"kind": "recipe", "label": "lizard", "seed": 0, "plan": PLAN, "points": {"start": {"book": 9.0}}}
    every = [run("original", plan=None, start=3.0), *lolcats, other, failed, under_way]
    made = {table["title"]: table for table in parts._tables.tables({str(i): one for i, one in enumerate(every)})}
    quality = made["Linearization recipes, perplexity, 6 M tokens each"]
    original, best, alone = quality["rows"]
    assert original[:6] == ["original", "1", "–", "20.09", "–", "20.09"]
    mean, deviation = math.exp(3.625), (math.exp(3.75) - math.exp(3.5)) / math.sqrt(2)
    assert best[:5] == ["lolcats", "2", "3 M", "54.60 ± 0.00", f"{mean:.2f} ± {deviation:.2f}"]
    assert best[5:] == ["25.79 ± 0.00", "38 % ± 18 %", "75 % ± 0 %", "7.39 ± 0.00", "50 %", "25 %"]
    assert alone[0] == "lolcats without its linear part" and alone[5] == "42.52 ± 0.00" and alone[7] == "25 % ± 0 %"
    others = made["Recipes with other settings"]["rows"]
    assert others == [["lolcats", "1", "tune_lr 0.001", "22.76", "50 %", "88 %", "7.39", "50 %", "25 %"]]
    assert made["What failed"]["rows"] == [["liger", "recipe", "0", "ValueError: no"]]
    costs = made["What the recipes cost, 6 M tokens each"]["rows"][1]
    assert costs == ["lolcats", "1", "1 MiB", "1,000", "50 s, 60,000 tokens/s", "2 GiB", "50 s, 60,000 tokens/s", "2 GiB"]
    assert all(len(row) == len(table["columns"]) for table in made.values() for row in table["rows"])


def test_passkeys_are_taught_to_runs_by_label(main):
    given = {"passkey_loss": "answer", "passkey_lengths": (1024,), "passkey_prompts": 1, "distances": (256,), "passkey_shortest": None}
    given |= {"passkey_for": ("lolcats 3:1", "lawcat", "original tuned", "original"), "seeds_for": ("lolcats 3:1",)}
    tasks = main.passkey_tasks(Namespace(**given), PLAN)
    found = [(task["label"], task["layers"], task["seed"], list(task["stages"])) for task in tasks]
    both = ["transfer", "finetune"]
    assert found[:4] == [("original", "all", 0, []), *[("lolcats 3:1", "3:1", seed, both) for seed in range(3)]]
    assert found[4:] == [("lawcat", "all", 0, both), ("original tuned", "all", 0, ["finetune"]), ("original", "all", 0, [])]
    assert main.key_of(tasks[0]) == main.key_of(tasks[-1])  # measured once
    assert [task["cost"] for task in tasks[1:4]] == [2.5, 0.025, 0.025]
    with pytest.raises(InputError, match="lolcat"):
        main.passkey_tasks(Namespace(**given | {"passkey_for": ("lolcat 3:1",)}), PLAN)


def test_labels_with_a_comma_can_be_asked_for(main):
    every = [job.label for job in main.JOBS]
    assert main.labels(",".join(every)) == main.labels(", ".join(every)) == tuple(every)
    assert main.labels("lolcats-sinks, lawcat") == ("lolcats-sinks", "lawcat") and main.labels("") == ()


def test_passkeys_of_several_seeds_are_one_row(parts):
    def taught(seed, *shares, tokens=1_000_000, **more):
        cells = [{"length": 1024, "exact": share, **more} for share in shares] + [{"length": 2048, "exact": 1.0}]
        stages = {"finetune": {"tokens": tokens}}
        return {"kind": "passkey", "label": "lolcats", "seed": seed, "plan": PLAN, "answers": True, "stages": stages, "cells": cells}

    runs = [taught(0, 1.0, 0.5), taught(1, 0.25, 0.25), taught(0, 0.5, 0.0, tokens=2_000_000, number=0.75)]
    table = parts._tables.passkey_table(runs)
    assert table["columns"][:3] == ["recipe", "settings", "tokens taught"] and table["columns"][4:] == [
        "passkeys",
        "runs",
        "1,024 tokens",
        "2,048 tokens",
    ]
    exact, number, longer, _ = parts._tables.COUNTED.values()
    assert [row[2:3] + row[4:] for row in table["rows"]] == [
        ["1 M", exact, "2", "50 % (25–75)", "100 % (100–100)"], ["2 M", exact, "1", "25 %", "100 %"], ["2 M", number, "1", "75 %", "–"],
    ]  # fmt: skip
    long = taught(0, 1.0) | {"shortest": 768, "stretched": [{"length": 2048, "depth": depth, "exact": depth} for depth in (0.5, 1.0)]}
    rows = parts._tables.passkey_table([taught(0, 1.0), long])["rows"]
    assert [row[4:] for row in rows] == [
        [exact, "1", "100 %", "100 %"], [exact, "1", "100 %", "100 %"], [longer, "1", "–", "75 %"],
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["loss of the answers", *2 * ["loss of the answers, passkeys in 768 tokens or more"]]


def test_longer_windows_have_a_table(parts):
    runs = [run("lolcats", seed, start=4.0, finetune=3.0) | {"long": {"as taught": 3.5, "stretched": 3.0 + seed}} for seed in (0, 1)]
    runs.append(run("original", plan=None, start=4.0) | {"long": {"as taught": 2.0}})
    runs.append(run("lolcats", plan=PLAN | {"tune_lr": 2e-3}, start=4.0, finetune=3.0) | {"long": {"as taught": 1.0, "stretched": 1.5}})
    for one in runs:
        one["measured"] = one["measured"] | {"long": 8192}
    mean, spread = (math.exp(3.0) + math.exp(4.0)) / 2, (math.exp(4.0) - math.exp(3.0)) / math.sqrt(2)
    assert parts._tables.long_table(runs)["rows"] == [
        ["lolcats", "–", "8,192", "6 M", "2", f"{math.exp(3.5):.2f} ± 0.00", f"{mean:.2f} ± {spread:.2f}"],
        ["original", "–", "8,192", "–", "1", f"{math.exp(2.0):.2f}", "–"],
        ["lolcats", "tune_lr 0.002", "8,192", "6 M", "1", f"{math.exp(1.0):.2f}", f"{math.exp(1.5):.2f}"],
    ]
    assert parts._tables.main_settings(runs) == parts._tables.main_settings([run("lolcats", start=4.0, finetune=3.0)])


def test_seeds_of_other_settings_are_one_row(parts):
    main = [run(f"recipe {i}", start=4.0, finetune=3.0) for i in range(4)]
    others = [run("lolcats", seed, PLAN | {"tokens": 7_000_000}, start=4.0, transfer=3.5, finetune=3.25 + 0.25 * seed) for seed in (0, 1)]
    others.append(run("lolcats", 0, PLAN | {"tokens": 9_000_000}, start=4.0, transfer=3.5, finetune=3.25))
    table = next(one for one in parts._tables.recipe_tables([*main, *others]) if one["title"] == "Recipes with other settings")
    mean, deviation = math.exp(3.375), (math.exp(3.5) - math.exp(3.25)) / math.sqrt(2)
    assert [row[:3] for row in table["rows"]] == [["lolcats", "2", "tokens 7000000"], ["lolcats", "1", "tokens 9000000"]]
    assert [row[3] for row in table["rows"]] == [f"{mean:.2f} ± {deviation:.2f}", f"{math.exp(3.25):.2f}"]


def test_a_conversion_is_measured_at_every_point(parts, tokenizer, tmp_path):
    worker, tables = parts._worker, parts._tables
    bench = worker.Bench.__new__(worker.Bench)
    bench.model, bench.tokenizer, bench.device, bench.cuda, bench.files = make_llama(), tokenizer, "cpu", False, {}
    tokens = torch.randint(257, (4096,), generator=torch.Generator().manual_seed(0))
    torch.save({"train": tokens[:3072], "book": tokens[3072:], "other": tokens[:0]}, tmp_path / "tokens.pt")
    stages = tables.stages_of("lolcats", PLAN | {"tokens": 2048, "length": 128, "batch": 2, "micro": 1})
    measured = {"length": 128, "windows": 2, "prompts": 1, "distances": [64], "long": 512}
    task = {"data": str(tmp_path / "tokens.pt"), "recipe": "lolcats", "mechanism": "lolcats", "options": {"window": 8}, "layers": "3:1"}
    told = []
    record = worker.recipe(bench, task | {"stages": stages, "measured": measured, "seed": 0}, lambda one: told.append(json.dumps(one)))
    assert list(record["points"]) == ["start", "transfer", "finetune"] and record["finite"] is True
    assert record["stages"]["transfer"]["tokens"] == record["stages"]["finetune"]["tokens"] == 1024
    assert len(record["stages"]["finetune"]["losses"]) == 4
    assert record["new_parameters"] == 3 * 4 * (2 * 8 * 64 + 1)  # of three layers, four heads: two maps and a factor
    assert [list(json.loads(one)["points"]) for one in told] == [["start"], ["start", "transfer"]]
    assert list(record["long"]) == ["as taught", "stretched"] and record["long"]["as taught"] != record["long"]["stretched"]
    assert record["window_alone"]["nats"]["book"] != record["points"]["finetune"]["book"]
    for sinks in (0, 2):
        window = subquad.swap(make_llama(), "sliding-window", window=8, sinks=sinks, layers="3:1")
        expected = worker.nats(window, bench.tokens(task["data"]), measured)
        model = worker.placed(bench.fresh(), task | {"options": {"window": 8, "sinks": sinks}})
        assert worker.window_alone(model)
        assert worker.nats(model, bench.tokens(task["data"]), measured)["book"] == pytest.approx(expected["book"], abs=1e-5)


def test_passkeys_are_looked_for_stretched_too(parts, tokenizer, tmp_path, monkeypatch):
    import subquad.bench.needle

    worker, tables = parts._worker, parts._tables
    bench = worker.Bench.__new__(worker.Bench)
    bench.model, bench.tokenizer, bench.device, bench.cuda, bench.files = make_llama(), tokenizer, "cpu", False, {}
    torch.save({"train": torch.full((2048,), 7)}, tmp_path / "tokens.pt")
    asked = []

    def retrieval(model, *given, lengths, **more):
        asked.append((lengths[0], float(model.model.layers[0].self_attn.mechanism.window_factor.detach()[0])))
        return subquad.bench.needle.Retrieval((), "forward", 0)

    monkeypatch.setattr(subquad.bench.needle, "retrieval", retrieval)
    stages = {"finetune": tables.stages_of("lolcats", PLAN | {"tokens": 1400, "length": 700, "batch": 1, "micro": 1})["finetune"]}
    task = {"data": str(tmp_path / "tokens.pt"), "recipe": "lolcats", "mechanism": "lolcats", "options": {"window": 8}, "layers": "all"}
    task |= {"stages": stages, "answers": True, "seed": 0, "lengths": [700, 1400, 5600], "prompts": 1, "distances": [], "shortest": 600}
    record = worker.passkey(bench, task, lambda _: None)
    assert [length for length, _ in asked] == [700, 1400, 5600, 1400, 5600] and record["stretched"] == []
    factors = [factor for _, factor in asked]
    ratios = [math.exp(factor) / (1 / (1 + math.exp(-factors[0]))) for factor in factors[3:]]
    assert factors[0] == factors[1] == factors[2] and ratios == pytest.approx([2 ** (2 / 3), 4.0], rel=1e-5)


def test_a_share_of_its_own_text_is_asked_of_all_that_are_converted(parts, main):
    plain = {"self_tokens": 300, "text": ("book",), "recall_tokens": 0, "model": "m", "dtype": "d", **PLAN}
    plans = [main.plan_of(Namespace(**plain, own_share=share), torch.arange(9)) for share in (None, 0.625)]
    assert plans[1] == plans[0] | {"own": 300, "own_share": 0.625} and plans[0].keys() == {"model", "dtype", "text", *PLAN}
    for name in ("original", *recipes()):
        without, asked = (parts._tables.stages_of(name, plan)["finetune"] for plan in plans)
        assert "own_share" not in without  # the recipe's share is of text that is not there, and keys of runs stay
        assert asked == without | ({} if name == "original" else {"own_share": 0.625})
    given = {
        "passkey_loss": "all",
        "passkey_lengths": (64,),
        "passkey_prompts": 1,
        "distances": (16,),
        "passkey_for": ("lolcats-sinks",),
        "passkey_shortest": None,
    }
    first, second = (main.passkey_tasks(Namespace(**given, seeds_for=()), plan) for plan in plans)
    assert [main.key_of(task) for task in first] == [main.key_of(task) for task in second]


def test_its_own_text_has_as_many_tokens_as_are_asked_for(main, tmp_path):
    """Which are then the last of all that is trained on, although places write equal parts."""

    class Writers:
        def run(self, tasks, keep):
            for task in tasks:
                torch.save(torch.full((task["tokens"],), task["seed"]), task["file"])

    made = main.own_text(Namespace(device="cuda", length=64, self_tokens=1001), Writers(), tmp_path)
    assert made.shape == (1001,) and made.unique().tolist() == [0, 1, 2, 3]


def test_tables_name_the_share_of_its_own_text(parts):
    text = {"text": "book + 1000 of its own (0123456789ab)"}
    shared = PLAN | text | {"own": 1000, "own_share": 0.625}
    some = [run(f"recipe {i}", plan=PLAN | text, start=4.0, finetune=3.0) for i in range(2)]
    more = [run(f"shared {i}", plan=shared, start=4.0, finetune=3.0) for i in range(3)]
    title, named = "Linearization recipes, perplexity, 6 M tokens each", "own text by distribution, share 0.625"
    for runs, expected, settings in (
        ([*some, more[0]], title, named),
        ([*more, some[0]], f"{title}, {named}", "own text as the other"),
    ):
        made = parts._tables.recipe_tables(runs)
        assert made[0]["title"] == expected and len(made[0]["rows"]) == len(runs) - 1
        assert [row[2] for row in made[2]["rows"]] == [settings]


def test_a_worker_tunes_on_its_own_text_by_distribution(parts, tokenizer, tmp_path):
    worker = parts._worker
    bench = worker.Bench.__new__(worker.Bench)
    bench.model, bench.tokenizer, bench.device, bench.cuda, bench.files = make_llama(), tokenizer, "cpu", False, {}
    tokens = torch.randint(257, (2048,), generator=torch.Generator().manual_seed(0))
    torch.save({"train": tokens[:1500], "book": tokens[1500:], "other": tokens[:0]}, tmp_path / "tokens.pt")
    plan = PLAN | {"tokens": 1024, "length": 64, "batch": 2, "micro": 2, "own": 400, "own_share": 0.5}
    task = {"data": str(tmp_path / "tokens.pt"), "recipe": "lolcats", "mechanism": "lolcats", "options": {"window": 8}, "layers": "all"}
    task |= {"stages": parts._tables.stages_of("lolcats", plan), "plan": plan, "seed": 3}
    record = worker.recipe(bench, task | {"measured": {"length": 64, "windows": 2, "prompts": 0, "distances": []}}, lambda one: None)
    model = worker.placed(make_llama(), task)
    transfer, tune = task["stages"].values()
    first = subquad.distill(model, model, tokens[:1500], **transfer, seed=3, progress=False)
    assert first.losses == pytest.approx(record["stages"]["transfer"]["losses"], abs=1e-5)
    second = subquad.finetune(model, tokens[:1100], **tune, own=tokens[1100:1500], seed=3, progress=False)
    assert second.losses == pytest.approx(record["stages"]["finetune"]["losses"], abs=1e-5) and tune["own_share"] == 0.5


def test_prompts_are_in_half_of_the_sequences(parts, tokenizer):
    tokens = torch.full((2000,), 7)
    shape = {"tokenizer": tokenizer, "tokens": tokens, "count": 3, "batch": 4, "length": 700, "seed": 1}
    mixed, asked = (parts._worker.Questions(**shape, answers=answers)[2] for answers in (False, True))
    assert mixed["input_ids"].shape == asked["labels"].shape == (4, 700) and "labels" not in mixed
    assert [bool((row == 7).all()) for row in mixed["input_ids"]] == [False, True, False, True]
    kinds = ["pass key is", "code of"]
    assert [[word in tokenizer.decode(row) for word in kinds] for row in mixed["input_ids"][::2]] == [[True, False], [False, True]]
    for number, (ids, labels) in enumerate(zip(asked["input_ids"], asked["labels"])):
        where, text = (labels != -100).nonzero().flatten(), tokenizer.decode(ids)
        answer, digits = tokenizer.decode(labels[where]), 4 if number % 2 else 5
        assert answer[0] == " " and answer[1:-1].isdigit() and answer[-1] == "." and len(where) == len(answer) == digits + 2
        assert torch.equal(ids[where], labels[where])
        if number % 2:
            name = re.search(r"The code of (\w+) is" + re.escape(answer), text[400:])[1]  # the question's
            assert f"The code of {name} is{answer}" in text[:200]
        else:
            assert f"The pass key is {answer[1:-1]}. Remember it." in text
    sizes = {}
    for shortest in (256, 600):
        made = parts._worker.Questions(**shape | {"count": 12}, answers=True, shortest=shortest)
        rows = [labels for index in range(12) for labels in made[index]["labels"][::2]]
        sizes[shortest] = [int((row != -100).nonzero()[0]) for row in rows]
    assert min(sizes[256]) < 500 and min(sizes[600]) > 500 and max(sizes[600]) <= 684  # as near as whole sentences allow
    again = parts._worker.Questions(**shape, answers=True)[2]
    assert torch.equal(again["input_ids"], asked["input_ids"])


def test_many_sequences_go_on_from_one_that_was_read(parts):
    for mechanism, layers in ((None, "all"), ("lolcats", "3:1")):
        model = make_llama() if mechanism is None else subquad.swap(make_llama(), mechanism, layers=layers, window=8)
        tokens = torch.arange(200)
        found = parts._worker.many(model, tokens, 48, 3, 2)
        one = parts._worker.many(model, tokens, 48, 1, 2)
        assert found["cache_bytes"] == 3 * one["cache_bytes"] and found["tokens_per_s"] == 3e3 / found["decode_ms"]


def test_the_other_text_comes_from_a_package(parts):
    text = parts._text.gpl()
    assert text is not None and text.startswith("GNU GENERAL PUBLIC LICENSE") and 30_000 < len(text) < 36_000


def test_documents_to_recall_state_every_code_twice(parts, tokenizer):
    pages = torch.tensor(tokenizer("whale " * 3000)["input_ids"])
    text = tokenizer.decode(parts._text.recall_text(tokenizer, pages, 6000))
    documents = re.findall(r"((?:The code of \w+ is \d{4}\. ?){4})\D*?((?:The code of \w+ is \d{4}\. ?){4})", text)
    assert len(documents) >= 4 and "whale whale" in text
    for stated, again in documents:
        assert sorted(stated.strip(" .").split(". ")) == sorted(again.strip(" .").split(". "))
    asked = {prompt.pairs for prompt in recall_prompts(64)}
    assert not asked & {stated.strip() for stated, _ in documents}  # other numbers than those that are measured with


def test_runs_side_by_side_take_every_gpu_first(main, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert main.places("cuda", 2) == [("2", 0), ("5", 0), ("2", 1), ("5", 1)]
    assert main.places("cpu", 1) == [(None, 0)]
