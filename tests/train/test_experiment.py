"""The matched experiment: that only the attention differs, and that its table says what was measured."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("vision_experiment")
    sys.path.remove(str(BENCHMARKS))


def test_only_the_mechanism_differs(experiment):
    plan = experiment.FULL
    first = experiment.backbone(plan, "softmax", 1).eval()
    images = torch.rand(2, 1, 42, 42)
    outputs = [first(images)]
    assert first.patch_embed(images).shape == (2, 196, plan.width)
    for name in experiment.MECHANISMS[1:]:
        model = experiment.backbone(plan, name, 1).eval()
        assert {block.attn.mechanism.card.name for block in model.blocks} == {name}
        shared = {key: x for key, x in model.state_dict().items() if ".mechanism." not in key}
        torch.testing.assert_close(shared, first.state_dict(), rtol=0, atol=0)
        outputs.append(model(images))
        assert all((outputs[-1] - other).abs().max() > 0 for other in outputs[:-1])


def test_the_harder_canvases_hold_the_same_digits(experiment):
    trained, bare, full = experiment.data_sets(experiment.QUICK)
    assert torch.equal(trained.images, full.images) and torch.equal(trained.test_labels, bare.test_labels)
    lit = [float((data.test_images > 0).float().mean()) for data in (bare, trained, full)]
    assert lit[0] < lit[1] < lit[2]


def test_a_row_is_of_its_own_runs_and_the_best_comes_first(experiment):
    def run(mechanism, seed, share, half=0.5):
        return {
            "mechanism": mechanism,
            "seed": seed,
            "accuracy": {"4": share, "0": 0.9, "8": 0.3},
            "half_way": half,
            "rank": 2.5,
            "seconds": 4.0,
        }

    task = experiment.TASKS["cluttered"]
    runs = [run("rala", 0, 0.70), run("rala", 1, 0.72), run("mala", 0, 0.80), {"mechanism": "inline", "seed": 0, "error": "OutOfMemory: x"}]
    rows = experiment.rows(runs, {"rala": 3.21}, task)
    assert rows[0] == ["mala", "1", "80.00", "90.00", "30.00", "50.00", "2.50", "–", "4"]
    assert rows[1] == ["rala", "2", "71.00 ± 1.41", "90.00 ± 0.00", "30.00 ± 0.00", "50.00 ± 0.00", "2.50", "3.2", "4"]
    assert ["inline", "0", "OutOfMemory: x", *["–"] * 6] in rows and len(rows) == 9
    assert all(len(row) == len(task.columns) for row in rows)


@pytest.mark.parametrize("data, tokens, shape", [("mnist", 196, (1, 56, 56)), ("digits", 64, (1, 32, 32))])
def test_plain_digits_of_either_source_and_their_tokens(experiment, data, tokens, shape):
    plan = replace(experiment.QUICK, data=data)
    (only,) = experiment.data_sets(plan)
    assert only.shape == shape and only.name == data and len(only.labels) == 128
    assert experiment.backbone(plan, "rala", 0).patch_embed(torch.rand(1, *shape)).shape[1] == tokens
    assert plan.task.columns[2:4] == ("accuracy", "half-way")


def test_the_rank_is_of_what_attention_gives(experiment):
    """Each layer's output made to be of rank 2 with equal singular values, then of rank 1."""
    plan = replace(experiment.QUICK, depth=2)
    model = experiment.backbone(plan, "softmax", 0)

    def given(count):
        def hook(module, args, output):
            kept = torch.zeros_like(output).flatten(2)
            kept[:, range(count), range(count)] = 3.0
            return kept.view_as(output)

        return hook

    for count in (2, 1):
        handles = [block.attn.mechanism.register_forward_hook(given(count)) for block in model.blocks]
        assert experiment.rank(model, torch.rand(3, 1, 42, 42)) == pytest.approx(count)
        for handle in handles:
            handle.remove()


def test_a_run_that_fails_says_so_and_the_others_go_on(experiment):
    found = experiment.run_one((experiment.QUICK, "softmx", 0, "cpu"))
    assert found["mechanism"] == "softmx" and "nearest: softmax" in found["error"]


def test_an_earlier_result_is_gone_on_from(experiment):
    plan = experiment.QUICK
    runs = [
        {"mechanism": "rala", "seed": 0, "accuracy": {}},
        {"mechanism": "mala", "seed": 0, "error": "x"},
        {"mechanism": "rala", "seed": 5},
    ]
    earlier = {"benchmark": "vision_experiment", "device": "card", "commit": "abc", "plan": {**vars(plan), "seeds": 1}, "training": runs}
    report = SimpleNamespace(result={"device": "card"})
    assert experiment.kept(earlier, report, plan) == [{**runs[0], "commit": "abc"}]
    with pytest.raises(SystemExit, match="epochs 2 there, 3 here"):
        experiment.kept(earlier, report, replace(plan, epochs=3))
    with pytest.raises(SystemExit, match="another benchmark"):
        experiment.kept({"benchmark": "kernels"}, report, plan)
    with pytest.raises(SystemExit, match="device 'card' there, 'other' here"):
        experiment.kept(earlier, SimpleNamespace(result={"device": "other"}), plan)


def test_times_of_an_earlier_result_keep_their_commit(experiment):
    earlier = {"commit": "b", "speed": {"rala": 2.0, "mala": 3.0, "other": 1.0}, "speed_commits": {"rala": "a"}}
    assert experiment.timed(earlier) == ({"rala": 2.0, "mala": 3.0}, {"rala": "a", "mala": "b"})
    assert experiment.timed({}) == ({}, {})
    assert experiment.timed({"commit": "b", "speed": {"error": "late", "traceback": ""}}) == ({}, {})
