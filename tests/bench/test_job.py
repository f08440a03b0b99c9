import json
import math

import pytest
import torch

from subquad import InputError, Report
from subquad.bench import job as job_file
from subquad.bench import quality
from subquad.bench.choice import Choice
from subquad.bench.job import Job, run_job
from subquad.bench.job_rows import ORIGINAL
from subquad.bench.quality import perplexity
from subquad.models.load import load_model
from subquad.models.text import encode, load_text

WINDOW = Choice("sliding-window", {"window": 8, "sinks": 2})
LOLCATS = Choice("lolcats", {"window": 8})


@pytest.fixture
def job(folder, text):
    return Job(
        model=str(folder), to=(WINDOW, LOLCATS), steps=8, text=(str(text),), window=64, windows=3, length=32,
        prompts=2, distance=20, lengths=(32, 64),
    )  # fmt: skip


def nll(model, job):
    tokens = encode(load_text(job.text), load_model(job.model)[1])
    return perplexity(model, tokens[-192:], window=64).nll


def test_before_and_after(job, tmp_path):
    out = tmp_path / "out"
    report = run_job(job, out, command="subquad swap …")
    assert [(r.mechanism, r.distilled_steps) for r in report.rows] == [
        (ORIGINAL, 0),
        (WINDOW.label, 0),
        (LOLCATS.label, 0),
        (LOLCATS.label, 8),
    ]
    original, window, before, after = report.rows
    model, _ = load_model(job.model)
    assert original.nll == pytest.approx(nll(model, job), abs=1e-6)
    saved, _ = load_model(out / LOLCATS.folder)  # a fresh load of what was saved is the model that was measured
    assert after.nll == pytest.approx(nll(saved, job), abs=1e-4) and after.saved == LOLCATS.folder == "lolcats_window=8"
    assert len(after.losses) == 8 and min(after.losses) > 0 and after.nll != before.nll
    assert after.gap_closed == pytest.approx((before.nll - after.nll) / (before.nll - original.nll))
    assert original.params == window.params < before.params == original.params + before.new_params
    assert original.bytes_64k == 65536 * 4 * 2 * 2 * 8 * 4 > before.bytes_64k
    assert {32, 64, 1024, 65536} <= original.kept_bytes.keys() and original.measured_bytes == {n: original.kept_bytes[n] for n in (32, 64)}
    assert len(after.sample) > 48 and after.timings == before.timings
    assert all(math.isclose(r.ppl, math.exp(r.nll)) for r in report.rows)
    assert Report.load(out) == report
    assert report.notes[-1] == f"Without parameters of their own there is nothing to distil: {WINDOW.label}."
    assert sorted(p.name for p in out.iterdir()) == ["job.json", LOLCATS.folder, "report.html", "report.json"]
    with pytest.raises(InputError, match="a finished run"):
        run_job(job, out)


def test_an_interrupted_run_goes_on_and_ends_the_same(job, tmp_path, monkeypatch):
    whole = run_job(job, tmp_path / "whole")
    measured = []
    real = quality.perplexity

    def interrupted(*args, **options):
        if len(measured) == 3:  # original, window and untrained lolcats are done: fail while measuring the distilled one
            raise KeyboardInterrupt
        measured.append(1)
        return real(*args, **options)

    monkeypatch.setattr(quality, "perplexity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "broken")
    assert not (tmp_path / "broken" / "report.json").exists() and not (tmp_path / "broken" / LOLCATS.folder).exists()

    calls = []
    monkeypatch.setattr(quality, "perplexity", lambda *a, **o: calls.append(1) or real(*a, **o))
    resumed = run_job(job, tmp_path / "broken")
    assert len(calls) == 1
    assert [r.nll for r in resumed.rows] == pytest.approx([r.nll for r in whole.rows], abs=1e-9)
    assert resumed.rows[3].sample == whole.rows[3].sample


def test_without_a_folder_nothing_is_written(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run_job(Job(model=job.model, to=(WINDOW,), text=job.text, window=64, windows=1, prompts=0, lengths=(16,)))
    assert [r.distilled_steps for r in report.rows] == [0, 0] and report.rows[0].recall is None
    assert "recall was not measured." in report.notes
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_left_alone(job, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("important")
    with pytest.raises(InputError, match="which holds something else"):
        run_job(job, other)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="a file; expected"):
        run_job(job, file)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_of_another_command_is_named(job, tmp_path):
    from dataclasses import replace

    from subquad.bench.folder import Folder

    identity = {**job_file._plain(replace(job, steps=7)), "text_sha256": "0"}
    Folder(tmp_path / "out", identity).begin()
    with pytest.raises(InputError, match=r"an unfinished run with steps = 7.*steps = 8"):
        run_job(job, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"to": ()}, "--to: got nothing"),
        ({"to": (WINDOW, WINDOW)}, "each mechanism once"),
        ({"to": (Choice("rala"),)}, "--to: got rala; expected a causal mechanism"),
        ({"layers": "some"}, "--layers"),
        ({"layers": "0,9"}, "9"),
        ({"dtype": "flot32"}, "nearest: .*float32"),
        ({"to": (Choice("gla"), Choice("gla", {"gate_rank": 16}))}, "each mechanism once"),
        ({"lr": -1.0}, "--lr: got -1.0"),
        ({"seed": 2**63}, "--seed: got 9223372036854775808"),
        ({"seed": -1}, "--seed: got -1"),
        ({"stride": 65}, "--stride: got 65"),
        ({"windows": 99}, "text: got 2120 tokens; expected at least 6368 tokens"),
        ({"text": ("/nowhere.txt",)}, "/nowhere.txt"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"device": "cuda:77"}, "--device"),
    ],
)
def test_bad_input_writes_nothing(job, tmp_path, change, message):
    from dataclasses import replace

    with pytest.raises(InputError, match=message):
        run_job(replace(job, **change), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_swapped_writes_nothing(tokenizer, text, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=128, n_embd=16, n_layer=1, n_head=2, eos_token_id=256, bos_token_id=256))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="GPT2Attention"):
        run_job(Job(model=str(tmp_path / "gpt2"), to=(WINDOW,), text=(str(text),), window=64, windows=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_says_what_it_was_made_with(job, tmp_path):
    from subquad.bench.folder import Folder

    Folder(tmp_path / "out", job_file._plain(job), "the command").begin()
    read = json.loads((tmp_path / "out" / "job.json").read_text())
    assert read["command"] == "the command" and read["job"]["to"] == [WINDOW.label, LOLCATS.label]


@pytest.mark.parametrize("content", ["{", "[]", '{"job": [1]}'])
def test_a_damaged_job_file_is_named(job, tmp_path, content):
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(InputError, match=r"job\.json, which is damaged"):
        run_job(job, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["job.json"] and (tmp_path / "job.json").read_text() == content


@pytest.mark.parametrize("content", ["{", "[]", '{"unknown": 1}'])
def test_a_damaged_row_file_is_named(tmp_path, content):
    from subquad.bench.folder import Folder

    Folder(tmp_path, {"steps": 1}).begin()
    (tmp_path / "rows" / "original.json").write_text(content)
    with pytest.raises(InputError, match=r"original\.json, which is damaged"):
        Folder(tmp_path, {"steps": 1})


def test_what_the_system_refuses_names_the_folder(tmp_path):
    from subquad.bench.folder import Folder

    folder = Folder(tmp_path / "out", {})
    (tmp_path / "out").write_text("came in between")
    with pytest.raises(InputError, match=r"--out: got .*out .*a folder that can be written to"):
        folder.begin()
