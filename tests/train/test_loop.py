"""The loop: it learns, resumes exactly, averages by the formula, and gives every model the same batches."""

import itertools
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import subquad
from subquad.checks import InputError
from subquad.train import engine, images, loop
from subquad.train.recipe import Recipe


@pytest.fixture(scope="module")
def digits() -> images.Images:
    data = images.load("mnist", 16)
    return replace(
        data, images=data.images[:96], labels=data.labels[:96], test_images=data.test_images[:64], test_labels=data.test_labels[:64]
    )


def vit(mechanism: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg", "drop_path_rate": 0.2}
    model = VisionTransformer(img_size=16, patch_size=4, in_chans=1, num_classes=10, **sizes)
    return model if mechanism is None else subquad.swap(model, mechanism)


def cnn() -> nn.Module:
    """With batch norm, whose buffers are part of the state."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


RECIPE = Recipe(epochs=3, batch_size=16, lr=3e-3, mixup=0.3, cutmix=0.5)


@pytest.mark.parametrize("make", [vit, cnn])
@pytest.mark.parametrize("stop", [1, 6, 8, 17])  # in an epoch, at its end, after it, before the last step
def test_a_resumed_run_is_the_run_that_was_not_stopped(digits, tmp_path, make, stop):
    whole = make()
    expected = loop.train(whole, digits, RECIPE, seed=4)

    def interrupt(step, words):
        if step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # not Python's own where a shell started this in the background
    with pytest.raises(KeyboardInterrupt):
        loop.train(make(), digits, RECIPE, seed=4, out=tmp_path, advance=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make()
    found = loop.train(resumed, digits, RECIPE, seed=4, out=tmp_path)
    assert found.resumed_from == stop and found.steps == expected.steps == 18
    assert (expected.starts, found.starts) == (1, 2) and 0 < found.start_seconds < found.seconds
    for key, x in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], x, rtol=0, atol=1e-6)
    for a, b in zip(found.history, expected.history):
        assert a == pytest.approx(b, abs=1e-6)
    again = cnn() if make is cnn else vit()
    finished = loop.train(again, digits, RECIPE, seed=4, out=tmp_path)  # a finished run gives its result again
    assert (finished.history, finished.starts, finished.start_seconds) == (found.history, found.starts, found.start_seconds)
    torch.testing.assert_close(again.state_dict(), resumed.state_dict())


def test_the_first_step_is_timed_apart(digits, monkeypatch):
    """On a clock that goes by a second each time it is read, but by a hundred in each first step."""
    clock, now = itertools.count(), [0.0]

    def read():
        now[0] += 1.0 + 99.0 * (next(clock) == 1)  # the second reading ends the first step
        return now[0]

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=read))
    result = loop.train(vit(), digits, replace(RECIPE, epochs=1), engine="torch")
    assert (result.starts, result.start_seconds, result.seconds) == (1, 100.0, 100.0 + 5 + 1)  # and a wait at the epoch's end


def test_weights_are_averaged_by_the_formula(digits):
    recipe = Recipe(epochs=1, batch_size=16, lr=1e-2, ema=0.6, warmup=0.5)
    run = loop.Run(vit(), digits, recipe, 0, "cpu", None, "torch", None, {})
    name = "blocks.0.attn.qkv.weight"
    average = run.raw.state_dict()[name].clone()
    for step in range(1, 6):
        run.advance()
        decay = min(0.6, 1 - step ** (-2 / 3)) if step > 1 else 0.0
        average = decay * average + (1 - decay) * run.raw.state_dict()[name]
        torch.testing.assert_close(run.ema.module.state_dict()[name], average, rtol=1e-5, atol=1e-7)
    assert run.tested is run.ema.module


def test_every_mechanism_is_given_the_same_batches(digits, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("softmax", "rala", "l2vit"):
        model, seen[name] = vit(name), []
        model.register_forward_pre_hook(lambda _, args, into=seen[name]: into.append(args[0].clone()))
        loop.train(model, digits, replace(RECIPE, epochs=1, ema=0.0), seed=2, engine="torch")
    first = torch.stack([x for x in seen["softmax"] if len(x) == 16])
    assert len(first) == 6
    for name in ("rala", "l2vit"):
        assert torch.equal(first, torch.stack([x for x in seen[name] if len(x) == 16]))


def test_both_engines_do_the_same(digits):
    results = []
    for name in engine.ENGINES:
        model = vit("mala")
        results.append((loop.train(model, digits, RECIPE, engine=name).history, model.state_dict()))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


def test_recomputing_blocks_changes_nothing(digits):
    states = []
    for wanted in (False, True):
        model = vit()
        loop.train(model, digits, replace(RECIPE, epochs=1, checkpointing=wanted), engine="torch")
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="cannot recompute"):
        loop.train(cnn(), digits, replace(RECIPE, checkpointing=True))


def test_a_small_model_learns_digits():
    data = images.load("mnist", 16)
    result = loop.train(cnn(), data, Recipe(epochs=3, batch_size=64, lr=1e-2, mixup=0.0), engine="torch")
    assert result.accuracy > 0.8
    assert result.history[0]["loss"] > result.history[-1]["loss"]


def test_autocast_is_off_in_float32_and_on_in_bfloat16(digits):
    dtypes = []
    model = cnn()
    model[-1].register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    for precision in engine.PRECISIONS:
        loop.train(model, digits, replace(RECIPE, epochs=1, ema=0.0), precision=precision, engine="torch")
    assert set(dtypes[: len(dtypes) // 2]) == {torch.float32} and set(dtypes[len(dtypes) // 2 :]) == {torch.bfloat16}


def test_bad_runs_are_one_clear_line(digits, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="at most the images"):
        loop.train(vit(), digits, Recipe(batch_size=128))
    with pytest.raises(InputError, match="nearest: accelerate"):
        loop.train(vit(), digits, RECIPE, engine="acelerate")
    with pytest.raises(InputError, match="not finite"):
        loop.train(cnn(), digits, Recipe(epochs=1, batch_size=16, lr=1e30, warmup=0, clip=1e30), engine="torch")
    one = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 10))
    with pytest.raises(InputError, match="batch_size: got 1; expected a larger one, or larger images"):
        loop.train(one, digits, Recipe(epochs=1, batch_size=1, mixup=0.0), engine="torch")
    loop.train(vit(), digits, replace(RECIPE, epochs=1), out=tmp_path / "a", engine="torch")
    with pytest.raises(InputError, match="epochs"):
        loop.train(vit(), digits, RECIPE, out=tmp_path / "a", engine="torch")
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(InputError, match="without accelerate"):
        loop.train(vit(), digits, RECIPE)
