"""The job with recipes and fine-tuning: its rows, its saved models, that it goes on, and text that the model writes itself."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from subquad import InputError, Report
from subquad.bench import quality
from subquad.bench.choice import Choice
from subquad.bench.folder import Folder
from subquad.bench.html import report_page
from subquad.bench.job import Job, run_job
from subquad.bench.job_rows import ORIGINAL, JobRun
from subquad.bench.report import COLUMNS
from subquad.bench.subjects import subjects
from subquad.convert.distill import distill
from subquad.convert.finetune import finetune
from subquad.convert.recipe import recipes
from subquad.convert.swap import swap
from subquad.models.load import load_model
from subquad.models.self_text import sample, self_text
from subquad.models.text import encode, load_text, split

RECIPE = """
title = "Small"
paper = "arXiv 0000.00000"
summary = "A test."
cost = "little"
needs = ["a causal decoder"]
[mechanism]
name = "lolcats"
window = 8
[transfer]
steps = 4
lr = 1e-2
length = 32
[finetune]
steps = 3
lr = 1e-2
accumulate = 2
length = 32
targets = ["q_proj", "v_proj"]
"""
WINDOW = Choice("sliding-window", {"window": 8, "sinks": 2})


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Groups of layers go to a GPU where there is one, which rounds otherwise than the CPU that the rest is computed on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def job(folder, text, recipe):
    return Job(
        model=str(folder), to=(WINDOW,), recipes=(recipe,), text=(str(text),), window=64, windows=3, prompts=0, lengths=(32,),
        finetune=2, length=32, tune_original=True,
    )  # fmt: skip


def held_out(model, job):
    tokens = encode(load_text([path for path in job.text if path != "self"]), load_model(job.model)[1])
    return quality.perplexity(model, tokens[-192:], window=64).nll


def test_the_rows_of_every_stage(job, tmp_path):
    out = tmp_path / "out"
    report = run_job(job, out)
    label = "lolcats:window=8 (recipe small)"
    assert [(r.mechanism, r.distilled_steps, r.tuned_steps, r.taught_tokens) for r in report.rows] == [
        (ORIGINAL, 0, 0, None),
        (ORIGINAL, 0, 2, 2 * 32),
        (WINDOW.label, 0, 0, None),
        (WINDOW.label, 0, 2, 2 * 32),
        (label, 0, 0, None),
        (label, 4, 0, 4 * 32),
        (label, 4, 2, 4 * 32 + 2 * 2 * 32),
    ]
    assert len({r.nll for r in report.rows}) == 7  # each stage changes something
    model, tokenizer = load_model(job.model)
    assert report.rows[0].nll == pytest.approx(held_out(model, job), abs=1e-6)
    for row, name in ((report.rows[3], WINDOW.folder), (report.rows[6], "recipe-small")):
        saved, _ = load_model(out / name)  # merged: a plain folder is the model that was measured
        assert held_out(saved, job) == pytest.approx(row.nll, abs=1e-4) and row.saved == name and len(row.sample) > 48
        assert not any("lora" in key for key in load_file(out / name / "model.safetensors"))
    train, _ = split(encode(load_text(job.text), tokenizer), 192)
    finetune(model, train, steps=2, length=32, progress=False)  # what tuning the original is
    assert report.rows[1].nll == pytest.approx(held_out(model, job), abs=1e-5)
    card = (out / "recipe-small" / "README.md").read_text()
    for part in (
        "recipe `small` (arXiv 0000.00000)",
        f"{report.rows[6].ppl:.4g}",
        f"{report.rows[0].ppl:.4g}",
        "| 256 |",
        "## Swapped attention",
    ):
        assert part in card
    assert Report.load(out) == report and [len(r.tune_losses) for r in report.rows] == [0, 2, 0, 2, 0, 0, 2]
    said = " ".join(report.verdicts())
    assert "The original, tuned in the same way" in said and "than the baseline, sliding-window" in said
    assert report.rows[6].gap_closed == pytest.approx(
        (report.rows[4].nll - report.rows[6].nll) / (report.rows[4].nll - report.rows[0].nll)
    )  # fmt: skip
    assert "Fine-tuning</h3>" in report_page(report) and "<h3>Distillation</h3>" in report_page(report)
    assert sorted(p.name for p in out.iterdir()) == sorted(["job.json", WINDOW.folder, "recipe-small", "report.html", "report.json"])


@pytest.mark.parametrize("done", [2, 4, 6])
def test_an_interrupted_run_goes_on_and_ends_the_same(job, tmp_path, monkeypatch, done):
    """Stopped while measuring a row, after its teaching: what was taught and measured before is not done again."""
    whole = run_job(job, tmp_path / "whole")
    real, calls = quality.perplexity, []

    def interrupted(*args, **options):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "perplexity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, tmp_path / "broken")
    counted = []
    monkeypatch.setattr(quality, "perplexity", lambda *a, **o: counted.append(1) or real(*a, **o))
    resumed = run_job(job, tmp_path / "broken")
    assert len(counted) == 7 - done
    assert [r.nll for r in resumed.rows] == pytest.approx([r.nll for r in whole.rows], abs=1e-9)
    assert [r.sample for r in resumed.rows] == [r.sample for r in whole.rows]


def test_a_recipe_may_leave_stages_out(job, tmp_path):
    report = run_job(replace(job, to=(), tune_original=False, steps=0, finetune=0))
    assert [(r.distilled_steps, r.tuned_steps) for r in report.rows] == [(0, 0), (0, 0)]
    report = run_job(replace(job, to=(), tune_original=False, finetune=None, batch=2))
    assert [(r.distilled_steps, r.tuned_steps, r.taught_tokens) for r in report.rows[1:]] == [
        (0, 0, None),
        (4, 0, 4 * 2 * 32),
        (4, 3, 4 * 2 * 32 + 3 * 2 * 32),  # a step of the tuning is two sequences, as in the file
    ]


# ---- a few layers at a time --------------------------------------------------------------------------------------------


def test_a_transfer_in_groups_is_the_same_and_goes_on_in_its_group(job, tmp_path, monkeypatch):
    from subquad.convert import blockwise

    short = replace(job, to=(Choice("lolcats", {"window": 4}),), steps=3, finetune=1, tune_original=False)
    expected = run_job(short, tmp_path / "whole")
    real, begun = blockwise.only, []

    def stops(body, first, *rest):
        if len(begun) == 3:  # in the second group of the second subject
            raise KeyboardInterrupt
        begun.append(first)
        return real(body, first, *rest)

    grouped = replace(short, group=3)
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "only", stops)
        with pytest.raises(KeyboardInterrupt):
            run_job(grouped, tmp_path / "groups")
    assert begun == [0, 3, 0]
    kept = tmp_path / "groups" / "checkpoints" / "recipe-small"
    assert sorted(p.name for p in kept.iterdir()) == ["group-000", "hidden-001"] and len(list((kept / "hidden-001").iterdir())) == 3
    with pytest.raises(InputError, match=r"--out: got .*an unfinished run with group = 3"):
        run_job(replace(grouped, group=2), tmp_path / "groups")
    found = run_job(grouped, tmp_path / "groups")
    assert [r.losses for r in found.rows] == [pytest.approx(r.losses) for r in expected.rows]
    assert [r.nll for r in found.rows] == pytest.approx([r.nll for r in expected.rows], abs=1e-9)
    assert not (tmp_path / "groups" / "checkpoints").exists()


def test_a_model_that_is_taught_in_groups_stays_on_the_cpu(job):
    for group, home in ((None, "cuda"), (2, "cpu")):
        asked = replace(job, group=group)
        run = JobRun(asked, subjects(asked), Folder(None, {}), "cuda", False)
        assert (run.device, run.teaching) == (home, "cuda")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "--group: got 2; expected something to transfer: --distill, or a recipe that transfers"),
        ({"to": (Choice("lolcats"),), "recipes": (), "steps": 0}, "--group: got 2; expected something to transfer"),
        ({"out": None}, "--group: got no --out; expected a folder for the hidden states"),
    ],
)
def test_what_groups_need(job, tmp_path, change, message):
    out = change.pop("out", tmp_path / "out")
    with pytest.raises(InputError, match=message):
        run_job(replace(job, group=2, **change), out)
    assert not (tmp_path / "out").exists()


# ---- equal budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, length", [(None, None), (None, 32), (1, 32), (3, 16), (8, None), (64, 32)])
@pytest.mark.parametrize("steps", [None, 0, 1, 7])
@pytest.mark.parametrize("finetune", [None, 1, 5])
def test_recipes_that_are_compared_read_the_same_to_less_than_a_step(batch, length, steps, finetune):
    wanted = subjects(Job("m", recipes=tuple(recipes()), steps=steps, finetune=finetune, batch=batch, length=length))
    totals, largest = [], 0
    for one in wanted:
        assert [name for name in ("transfer", "finetune") if getattr(one, name)] == [
            name for name in recipes()[one.recipe].stages if steps != 0 or name == "finetune"
        ]
        sizes = [s.get("batch", 1) * s.get("accumulate", 1) * s.get("length", 512) for s in one.stages]
        totals.append(sum(stage["steps"] * size for stage, size in zip(one.stages, sizes)))
        largest = max(largest, *sizes)
        if (steps, finetune) == (None, None) and len(sizes) == 2:  # the files' stages are all of the same tokens
            first, second = (stage["steps"] * size for stage, size in zip(one.stages, sizes))
            assert abs(first - second) <= sum(sizes)
    assert max(totals) - min(totals) < largest


def test_a_step_of_tuning_reads_what_the_recipe_says():
    for batch, expected in ((1, (1, 8)), (2, (2, 4)), (3, (3, 3)), (8, (8, 1)), (16, (16, 1))):
        for one in subjects(Job("m", recipes=tuple(recipes()), batch=batch)):
            assert (one.finetune["batch"], one.finetune["accumulate"]) == expected
            assert one.transfer is None or (one.transfer["batch"], "accumulate" in one.transfer) == (batch, False)


def test_steps_that_are_asked_for_are_those_of_the_recipe_that_reads_most():
    lolcats, liger = subjects(Job("m", recipes=("lolcats", "liger"), steps=10, finetune=5, batch=1, length=32))
    assert (lolcats.transfer["steps"], lolcats.finetune["steps"]) == (10, 5)  # 10 + 5 × 8 sequences
    assert liger.finetune["steps"] == 6  # of 8 sequences: 48
    (alone,) = subjects(Job("m", recipes=("liger",), steps=10, finetune=5, batch=1, length=32))
    assert alone.finetune["steps"] == 5


def test_every_recipe_is_taught_with_the_same_number_of_tokens(job, tmp_path, monkeypatch):
    """Counted where the loops hand a batch to the model."""
    from subquad.convert.finetune import _Engine
    from subquad.convert.transfer import _Teacher

    read, names = [], tuple(recipes())
    teach, advance = _Teacher.__call__, _Engine.advance

    def transfers(self, batch):
        read.append(("transfer", batch["input_ids"].numel()))
        return teach(self, batch)

    def tunes(self, run, judge, batches, norm):
        read.append(("finetune", sum(batch["input_ids"].numel() for batch, _ in batches)))
        return advance(self, run, judge, batches, norm)

    monkeypatch.setattr(_Teacher, "__call__", transfers)
    monkeypatch.setattr(_Engine, "advance", tunes)
    short = replace(job, to=(), recipes=names, tune_original=False, steps=3, finetune=2, batch=1, length=32, windows=1, lengths=(16,))
    report = run_job(short, tmp_path / "out")
    totals = {}
    for name in names:
        last = [row for row in report.rows if row.recipe == name][-1]
        mine, read = read[: last.distilled_steps + last.tuned_steps], read[last.distilled_steps + last.tuned_steps :]
        counted = {stage: sum(n for of, n in mine if of == stage) for stage in ("transfer", "finetune")}
        assert counted == {"transfer": last.distill_tokens or 0, "finetune": last.tune_tokens}
        totals[name] = sum(counted.values())
        assert totals[name] == last.taught_tokens
    assert not read and max(totals.values()) == (3 + 2 * 8) * 32 and max(totals.values()) - min(totals.values()) < 8 * 32
    (note,) = (note for note in report.notes if note.startswith("Tokens that each recipe was taught with"))
    assert "lolcats 96 in transfer and 512 in fine-tuning, 608 in all" in note and "liger 512 in fine-tuning;" in note
    assert [text(report.rows[-1]) for name, text in COLUMNS if name == "tokens taught"] == ["512"]


def test_what_a_recipe_does_not_say_is_as_without_one(job, tmp_path):
    path = tmp_path / "short.toml"
    path.write_text(RECIPE[: RECIPE.index("[transfer]")] + "[finetune]\nsteps = 1\n")
    report = run_job(replace(job, to=(), recipes=(str(path),), tune_original=False, finetune=None, length=None))
    assert [(r.tuned_steps, r.taught_tokens) for r in report.rows[1:]] == [(0, None), (1, 512)]
    with pytest.raises(InputError, match=r"text: got 2120 tokens.*one batch of 2048"):
        run_job(replace(job, to=(), recipes=(str(path),), tune_original=False, finetune=None, length=2048))


def test_layers_that_cost_most_are_kept(job, tmp_path):
    from subquad.convert.sensitivity import layer_costs

    report = run_job(replace(job, recipes=(), finetune=None, tune_original=False, layers="auto:3"), tmp_path / "out")
    model, tokenizer = load_model(job.model)
    before, _ = split(encode(load_text(job.text), tokenizer), 192)
    batches = [{"input_ids": ids[None]} for ids in before[-256:].split(64)]
    costs = layer_costs(model, batches, WINDOW.name, WINDOW.options, progress=False)
    kept = sorted(sorted(costs, key=costs.get)[1:])
    assert report.rows[1].layers == "1 of 4"
    assert any(note.endswith(f"held-out end: {', '.join(map(str, kept))}.") for note in report.notes)
    with pytest.raises(InputError, match="layers: got auto:4; expected fewer"):
        run_job(replace(job, layers="auto:4"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"to": (), "recipes": ()}, "--to: got nothing"),
        ({"recipes": ("lolcat",)}, "recipe: got 'lolcat'.*nearest: lolcats"),
        ({"recipes": ("lolcats", "lolcats")}, "--recipe: got lolcats, lolcats; expected each recipe once"),
        ({"recipes": (), "finetune": None}, "--tune-original: got nothing else"),
        ({"own_share": 0.5}, "--own-share: got 0.5; expected text that the model writes itself beside the other: --text self"),
        ({"own_share": 0.0, "text": ("self",)}, "--own-share: got 0.0; expected a number above 0 and at most 1"),
        (
            {"own_share": 0.5, "text": ("self",), "finetune": 0, "tune_original": False},
            "--own-share: got 0.5; expected something that is tuned",
        ),
        ({"text": ("self",), "self_tokens": 16}, "--self-tokens: got 16; expected at least one batch, 32 tokens"),
    ],
)
def test_bad_input_writes_nothing(job, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run_job(replace(job, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_model_writes_nothing(job, tokenizer, tmp_path):
    from bench.tiny import make_llama
    from transformers import MistralConfig, MistralForCausalLM

    few = make_llama(vocab_size=100, eos_token_id=99)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2, sliding_window=8))
    converted = swap(make_llama(), "gla", layers=[0, 1])
    for name, model, change, message in (
        (
            "sliding",
            sliding,
            {"recipes": ("hedgehog",), "to": ()},
            "objective: got 'weights' for .*whose original has a window of 8, for a length of 32",
        ),
        (
            "sliding",
            sliding,
            {"recipes": ("hedgehog",), "to": (), "layers": "auto:1"},
            "objective: got 'weights' for .*whose original has a window of 8, for a length of 32",
        ),
        (
            "few",
            few,
            {},
            r"tokenizer: got token id \d+, of a tokenizer with .* tokens; expected ids below 100, .*a tokenizer of the model's own",
        ),
        ("converted", converted, {"layers": "3"}, "model: got .*of whose layers 2 are swapped to gla already"),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=message):
            run_job(replace(job, model=str(tmp_path / name), tune_original=False, **change), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- text that the model writes itself --------------------------------------------------------------------------------


def test_tokens_come_as_often_as_the_model_says(llama):
    """The first token of many sequences, against the model's own distribution after the first."""
    with torch.no_grad():
        p = (llama(torch.tensor([[256]])).logits[0, -1] / 2).softmax(0)
    found = sample(llama, first=256, length=1, batch=20000, temperature=2.0, seed=0, index=0).flatten()
    share = torch.bincount(found, minlength=257) / 20000
    assert (share - p).abs().max() < 5 * (p * (1 - p) / 20000).sqrt().max()
    assert p.max() > 2 / 257  # not flat


def test_a_sequence_is_sampled_with_its_whole_past(llama):
    """At a temperature near zero each token is the likeliest after all before it."""
    made = sample(llama, first=256, length=12, batch=1, temperature=1e-6, seed=3, index=0)[0]
    ids = torch.cat([torch.tensor([256]), made])
    with torch.no_grad():
        assert llama(ids[None, :-1]).logits[0].argmax(-1).tolist() == made.tolist()


def test_batches_are_kept_and_gone_on_with(llama, tmp_path, monkeypatch):
    import subquad.models.self_text as file

    def ask(tokens=100, **options):
        return self_text(llama, tokens, **{"length": 8, "batch": 4, "cache": tmp_path, "progress": False, **options})

    expected = ask(cache=tmp_path / "other")
    assert expected.shape == (100,) and expected.dtype == torch.long and int(expected.min()) >= 0 and int(expected.max()) < 257
    real, calls = file.sample, []

    def stops(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(options["index"])
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(file, "sample", stops)
        with pytest.raises(KeyboardInterrupt):
            ask()
    (folder,) = tmp_path.glob("self-text-*")
    assert sorted(p.name for p in folder.iterdir()) == ["part-000000.safetensors", "part-000001.safetensors"]
    (folder / "part-000001.safetensors").write_bytes(b"half")
    indices = []
    monkeypatch.setattr(file, "sample", lambda *a, **o: indices.append(o["index"]) or real(*a, **o))
    assert torch.equal(ask(), expected) and indices == [1, 2, 3]
    assert torch.equal(ask(40), expected[:40]) and indices == [1, 2, 3]
    assert not torch.equal(ask(seed=1), expected) and len(list(tmp_path.glob("self-text-*"))) == 2


def test_a_job_teaches_with_what_the_model_wrote(job, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    own = replace(job, text=("self", *job.text), self_tokens=256, to=(), steps=0, tune_original=True)
    report = run_job(own, tmp_path / "out")
    model, _ = load_model(job.model)
    taught = self_text(model, 256, length=32, cache=tmp_path / "cache", progress=False)
    finetune(model, taught, steps=2, lr=1e-2, accumulate=2, length=32, targets=["q_proj", "v_proj"], progress=False)
    assert report.rows[1].nll == pytest.approx(held_out(model, job), abs=1e-5)  # on the text of the file
    assert "256 tokens that the model wrote itself" in report.about["text"] and math.isfinite(report.rows[-1].ppl)


def test_a_job_teaches_with_both_texts(job, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    own = replace(job, text=("self", *job.text), self_tokens=256, own_share=0.5, to=(), steps=2, layers="1:1")
    report = run_job(own, tmp_path / "out")
    whole, tokenizer = load_model(job.model)
    made = self_text(whole, 256, length=32, cache=tmp_path / "cache", progress=False)
    train, _ = split(encode(load_text(job.text), tokenizer), 192)
    options = {"steps": 2, "lr": 1e-2, "accumulate": 2, "length": 32, "targets": ["q_proj", "v_proj"], "progress": False}
    torch.manual_seed(0)
    model = swap(load_model(job.model)[0], "lolcats", window=8, layers=[0, 2])
    distill(model, model, torch.cat([made, train]), steps=2, lr=1e-2, length=32, progress=False)
    assert report.rows[3].nll == pytest.approx(held_out(model, job), abs=1e-5)
    finetune(model, train, own=made, own_share=0.5, **options)
    assert report.rows[4].nll == pytest.approx(held_out(model, job), abs=1e-5)
    finetune(whole, torch.cat([made, train]), **options)
    assert report.rows[1].nll == pytest.approx(held_out(whole, job), abs=1e-5)
    assert "taught with the text before the held-out end and 256 tokens that the model wrote itself;" in report.about["text"]
    (note,) = (note for note in report.notes if note.startswith("Fine-tuning"))
    assert "; 0.5 of the sequences are its own and teach by its distribution, the others by the next token" in note


def test_a_recipes_share_stands_alone_with_the_flag(job):
    for share, expected in ((None, {}), (0.25, {"own_share": 0.25})):
        (one,) = subjects(replace(job, to=(), recipes=("lolcats-sinks",), own_share=share))
        assert {key: value for key, value in one.finetune.items() if key == "own_share"} == expected


def test_misuse_of_self_text_is_one_line(llama, tmp_path):
    (tmp_path / "file").write_text("")
    for match, options in {
        "tokens: got 0": {"tokens": 0},
        "temperature: got 0": {"temperature": 0},
        "cache: got .*file.*a folder that can be written to": {"cache": tmp_path / "file"},
    }.items():
        with pytest.raises(InputError, match=match) as error:
            self_text(llama, **{"tokens": 4, "length": 2, "batch": 2, "progress": False, **options})
        assert "\n" not in str(error.value)
    llama.config.eos_token_id = None
    with pytest.raises(InputError, match="without bos_token_id and eos_token_id"):
        self_text(llama, 4)
