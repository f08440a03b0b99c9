"""The matched experiment: that only the attention differs, and that its table says what was measured."""

import importlib
import sys
from pathlib import Path

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
    images = torch.rand(2, 1, experiment.SIDE, experiment.SIDE)
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
        return {"mechanism": mechanism, "seed": seed, "accuracy": {"4": share, "0": 0.9, "8": 0.3}, "half_way": half, "seconds": 4.0}

    runs = [run("rala", 0, 0.70), run("rala", 1, 0.72), run("mala", 0, 0.80), {"mechanism": "inline", "seed": 0, "error": "OutOfMemory: x"}]
    rows = experiment.rows(runs, {"rala": 3.21})
    assert rows[0] == ["mala", "1", "80.00", "90.00", "30.00", "50.00", "–", "4"]
    assert rows[1] == ["rala", "2", "71.00 ± 1.41", "90.00 ± 0.00", "30.00 ± 0.00", "50.00 ± 0.00", "3.2", "4"]
    assert ["inline", "0", "OutOfMemory: x", *["–"] * 5] in rows and len(rows) == 9
    assert all(len(row) == len(experiment.COLUMNS) for row in rows)


def test_a_run_that_fails_says_so_and_the_others_go_on(experiment):
    found = experiment.run_one((experiment.QUICK, "softmx", 0, "cpu"))
    assert found["mechanism"] == "softmx" and "nearest: softmax" in found["error"]
