"""`subquad train vision`, from the shell's side: a run, its report, an interruption, and bad input."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from train.photos import folder
from typer.testing import CliRunner

from subquad.bench import vision_job
from subquad.bench.vision_report import Trained, spread
from subquad.cli import app
from subquad.train import images, models
from subquad.train.loop import Result

TINY = ["--size", "32", "--epochs", "2", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu"]


def call(*words: str):
    return CliRunner().invoke(app, ["train", "vision", *words])


@pytest.fixture
def photos(tmp_path) -> str:
    return str(folder(tmp_path / "photos", count=8))


def test_a_model_and_its_baselines_with_seeds(photos, tmp_path):
    out = tmp_path / "out"
    words = ["--model", "test_vit", "--data", photos, "--mechanism", "rala", "--baseline", "softmax", "--baseline", "test_resnet", *TINY]
    done = call(*words, "--seeds", "2", "--out", str(out))
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["test_vit + rala", "test_vit + softmax", "test_resnet"]
    for row in report["rows"]:
        assert len(row["runs"]) == 2 and all(len(run["history"]) == 2 and run["steps"] == 6 for run in row["runs"])
    assert report["rows"][0]["parameters"] == report["rows"][1]["parameters"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4 and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    weights = load_file(out / "weights" / "test_resnet-seed1.safetensors")
    models.build("test_resnet", images.load(photos, 32)).load_state_dict(weights)
    again = call(*words, "--seeds", "2", "--out", str(out))
    assert again.exit_code == 2 and "a finished run" in again.stderr
    assert call(*words, "--out", str(out), "--fresh").exit_code == 0


def test_an_interrupted_command_goes_on(photos, tmp_path, monkeypatch):
    words = ["--model", "test_vit", "--data", photos, "--baseline", "mala", *TINY]
    assert call(*words, "--out", str(tmp_path / "whole")).exit_code == 0
    train, made = vision_job.loop.train, []

    def interrupted(*args, advance, **rest):
        def note(step, text):
            made.append(step)
            if len(made) == 8:  # within the second model
                os.kill(os.getpid(), signal.SIGINT)
            advance(step, text)

        return train(*args, advance=note, **rest)

    monkeypatch.setattr(vision_job.loop, "train", interrupted)
    stopped = call(*words, "--out", str(tmp_path / "parts"))
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr and len(made) == 8
    other = call(*words, "--seeds", "2", "--out", str(tmp_path / "parts"))
    assert other.exit_code == 2 and "seeds = 1" in other.stderr
    assert call(*words, "--out", str(tmp_path / "parts")).exit_code == 0
    assert len(made) == 12  # no step is made twice
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("whole", "parts")]
    for one, two in zip(*rows):
        for a, b in zip(one["runs"][0]["history"], two["runs"][0]["history"]):
            assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--model", "vit_tiny_patch16_225", "--data", "mnist"], "nearest: vit_tiny_patch16_224"),
        (["--model", "vit_tiny_patch16_224", "--data", "mnist", "--size", "28"], "a multiple of vit_tiny_patch16_224's patch, 16"),
        (["--model", "ravlt_t", "--data", "mnist", "--size", "28"], "at least 32, the stride of ravlt_t"),
        (["--model", "test_vit", "--data", "mnist", "--baseline", "ralaa", "--size", "32"], "nearest: rala"),
        (["--model", "test_vit", "--data", "mnist", "--baseline", "test_vit", "--size", "32"], "test_vit twice"),
        (["--model", "test_vit", "--data", "mnist", "--mechanism", "gla", "--size", "32"], "causal only"),
        (["--model", "test_resnet", "--data", "mnist", "--mechanism", "rala", "--size", "32"], "timm's VisionTransformer"),
        (["--model", "l2vit_t", "--data", "mnist", "--mechanism", "rala", "--size", "32"], "a ViT of timm, RAVLT"),
        (["--model", "test_vit", "--data", "mnist", "--size", "32", "--batch-size", "9000"], "at most the images to train on, 8000"),
        (["--model", "test_vit", "--data", "mnist", "--size", "32", "--precision", "float8"], "float32"),
        (["--model", "test_vit", "--data", "nowhere/at/all"], "a folder of images"),
        (["--model", "test_vit", "--data", "mnist", "--lr", "0"], "lr: got 0.0"),
        (["--model", "test_vit", "--data", "mnist", "--drop-path", "1"], "drop_path: got 1.0; expected at least 0 and less than 1"),
        (["--model", "test_vit", "--data", "mnist", "--drop-path", "-0.1"], "drop_path: got -0.1"),
        (["--model", "test_vit", "--data", "mnist", "--drop-path", "nan"], "drop_path: got nan"),
        (["--model", "vgg11", "--data", "mnist", "--size", "32", "--drop-path", "0.1"], "0, as vgg11 has no stochastic depth"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words, expected):
    done = call(*words)
    assert done.exit_code == 2 and expected in done.stderr and done.stderr.count("\n") == 1


def test_another_attention_in_a_backbone_of_this_library():
    data = images.load("mnist", 32)
    published = models.build("ravlt_t", data, seed=3)
    swapped = models.build("ravlt_t", data, mechanism="linear-elu", seed=3)
    names = [block.attn.attend.card.name for stage in swapped.stages for block in stage.blocks]
    assert names == ["linear-elu"] * 4 + ["softmax"] * 8
    assert not any(block.attn.attend.causal for stage in swapped.stages for block in stage.blocks)
    torch.testing.assert_close(swapped.state_dict(), published.state_dict(), rtol=0, atol=0)


def test_weights_are_of_the_seed_and_the_callers_randomness_stays():
    data = images.load("mnist", 32)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, two, three = (models.build("test_vit", data, mechanism="l2vit", seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], three[key]) for key in one)


def test_spread_is_of_a_sample():
    assert spread([0.9, 0.92, 0.94]) == "92.00 ± 2.00 %"
    assert spread([0.5]) == "50.00 %"
    runs = [Result(0.5, 1.0, [{"accuracy": a}], 10, 2.0) for a in (0.4, 0.6)]
    row = Trained("m", 1000, 32, runs)
    assert row.rate == 160 and row.curve("accuracy") == [(1, 0.5)]


def test_images_per_second_are_without_first_steps():
    """Ten steps of which the first took 6 of 9 seconds, and eight of which two, before and after an interruption, took 5 of 6."""
    runs = [Result(0.5, 1.0, [], 10, 9.0, starts=1, start_seconds=6.0), Result(0.5, 1.0, [], 8, 6.0, 4, starts=2, start_seconds=5.0)]
    assert Trained("m", 1000, 32, runs).rate == pytest.approx((9 + 6) * 32 / (3 + 1))
    one = Trained("m", 1000, 32, [Result(0.5, 1.0, [], 1, 9.0, starts=1, start_seconds=9.0)])
    assert one.rate is None and one.cells()[-1] == "–"
