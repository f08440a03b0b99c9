"""The recipe's parts against closed forms."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from subquad.checks import InputError
from subquad.train.recipe import Mixer, Recipe, make_optimizer, make_schedule, seeded


def test_schedule_is_the_closed_form():
    recipe = Recipe(epochs=4, warmup=1, lr=2e-3)
    optimizer = make_optimizer(nn.Linear(4, 4), recipe)
    schedule = make_schedule(optimizer, recipe, epoch_steps=10)
    for step in range(40):
        schedule.step_update(step)
        if step < 10:
            expected = 2e-5 + step * (2e-3 - 2e-5) / 10
        else:
            expected = 2e-5 + (2e-3 - 2e-5) * (1 + math.cos(math.pi * step / 40)) / 2
        assert all(group["lr"] == pytest.approx(expected, rel=1e-12) for group in optimizer.param_groups)


def test_vectors_are_spared_from_weight_decay():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    groups = make_optimizer(model, Recipe(weight_decay=0.3)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    assert decayed == {id(model[0].weight), id(model[2].weight)}
    assert all(group["weight_decay"] in (0.3, 0.0) for group in groups)


@pytest.mark.parametrize("mix", [{"mixup": 0.0}, {"mixup": 0.4}, {"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_targets_sum_to_one_and_follow_the_pixels(mix):
    labels = torch.arange(8)
    mixer = Mixer(Recipe(smoothing=0.2, **mix), 8)
    images = torch.eye(8)[:, :, None, None].expand(8, 8, 16, 16).clone()  # channel c is 1 in the images of class c alone
    with seeded(0, 1):
        mixed, targets = mixer(images, labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    shares = mixed.mean((2, 3))  # so the channels' means are the shares of the classes
    torch.testing.assert_close(targets, 0.8 * shares + 0.2 / 8, rtol=0, atol=1e-6)


def test_randomness_is_of_seed_and_step_alone_and_leaves_the_rest_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    drawn = []
    for seed, step in ((1, 2), (1, 2), (1, 3), (2, 2)):
        with seeded(seed, step):
            drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"batch_size": 33},
        {"warmup": 11.0},
        *({name: value} for name in ("lr", "clip") for value in (0.0, -1.0, math.nan, math.inf)),
        *({name: value} for name in ("weight_decay", "warmup", "mixup", "cutmix") for value in (-1.0, math.nan, math.inf)),
        *({name: value} for name in ("smoothing", "ema") for value in (-0.1, 1.0, math.nan)),
    ],
)
def test_bad_recipes_are_named(bad):
    with pytest.raises(InputError) as caught:
        Recipe(**bad)
    assert caught.value.argument == next(iter(bad))
