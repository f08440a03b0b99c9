"""Recipes: what their files may say, how they are scaled, and that `linearize` is swap, distill, finetune and merge."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

import subquad
from subquad import InputError, contract
from subquad.convert.distill import distill
from subquad.convert.finetune import finetune
from subquad.convert.lora import merge_lora
from subquad.convert.recipe import linearize, parse, recipe, recipes
from subquad.convert.run import seeded
from subquad.convert.swap import swap, swapped

TEXT = """
title = "Mine"
paper = "none"
summary = "A test."
cost = "little"
needs = ["a causal decoder"]
[mechanism]
name = "lolcats"
window = 4
[transfer]
steps = 30
lr = 1e-2
length = 16
[finetune]
steps = 10
lr = 1e-2
accumulate = 2
length = 16
targets = ["q_proj", "k_proj"]
"""
QUIET = {"progress": False}


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TEXT)
    return path


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    return all(torch.equal(x[name], y[name]) for name in x)


def test_every_recipe_can_be_swapped_in_and_names_its_stages():
    known = recipes()
    assert {"lolcats", "hedgehog", "sliding-window"} <= known.keys()
    for name, one in known.items():
        assert one.name == name and one.needs and contract.card(one.mechanism).causal
        model = swap(tiny_llama(), one.mechanism, **one.options)
        learns = any(True for m in swapped(model).values() for _ in m.mechanism.parameters())
        assert learns == (one.transfer is not None) and one.finetune is not None


def test_the_baseline_is_tuned_as_lolcats():
    assert recipe("sliding-window").finetune == recipe("lolcats").finetune
    assert recipe("sliding-window").options == {"window": 64, "sinks": 4}


def test_lolcats_with_sinks_is_lolcats_on_top_of_the_baseline():
    one, paper = recipe("lolcats-sinks"), recipe("lolcats")
    assert one.mechanism == paper.mechanism and one.transfer == paper.transfer
    assert one.finetune == {**paper.finetune, "train_mechanism": True, "own_share": 0.625}
    assert one.options == {**recipe("sliding-window").options, "far_rotary": False}
    assert paper.options == {"window": one.options["window"]}


def test_tokens_and_steps(mine):
    one = recipe(mine)
    assert one.name == "mine" and (one.tokens("transfer"), one.tokens("finetune")) == (30 * 16, 10 * 2 * 16)
    assert [stage["steps"] for stage in one.scaled(8).stages.values()] == [6, 2]
    assert [stage["steps"] for stage in one.scaled(2).stages.values()] == [1, 1]
    assert one.scaled(8).transfer["lr"] == 1e-2
    left = one.changed({"transfer": {"steps": 0}})
    assert left.transfer is None and left.finetune == one.finetune and left.scaled(7).finetune["steps"] == 7
    with pytest.raises(InputError, match="steps: got 1; expected at least 2"):
        one.scaled(1)


def test_a_budget_is_shared_to_half_a_step(mine):
    one = recipe(mine)  # steps of 16 and of 32 tokens
    for tokens in range(48, 400, 7):
        for shares in ({"transfer": 1, "finetune": 1}, {"transfer": 3, "finetune": 1}, {"transfer": 1, "finetune": 1000}):
            made = one.budgeted(tokens, shares)
            assert abs(made.total - tokens) <= 16 and all(stage["steps"] >= 1 for stage in made.stages.values())
            wanted = tokens * shares["transfer"] / sum(shares.values())
            assert abs(made.tokens("transfer") - min(max(wanted, 16), tokens - 32)) <= 16
    assert one.budgeted(one.total, {name: one.tokens(name) for name in one.stages}) == one


def test_linearize_is_its_stages_one_after_another(model, mine, tokens):
    whole, apart = copy.deepcopy(model), model
    result = subquad.linearize(whole, mine, tokens, steps={"transfer": 3, "finetune": 2}, seed=7, **QUIET)
    with seeded(7, -2):
        swap(apart, "lolcats", window=4)
    first = distill(apart, apart, tokens, steps=3, lr=1e-2, length=16, seed=7, **QUIET)
    second = finetune(apart, tokens, steps=2, lr=1e-2, accumulate=2, length=16, targets=["q_proj", "k_proj"], seed=7, **QUIET)
    assert result.transfer.losses == first.losses and result.finetune.losses == second.losses
    assert same(whole, merge_lora(apart)) and len(swapped(whole)) == 3


def test_data_that_can_be_read_once_serve_one_stage(model, mine, tokens):
    def once():
        return (tokens[i : i + 16][None] for i in range(0, 160, 16))

    with pytest.raises(
        InputError, match="data: got generator, which can be read once; expected token ids, or an iterable that begins again"
    ):
        linearize(model, mine, once(), steps={"transfer": 2, "finetune": 1}, **QUIET)
    assert not swapped(model)
    linearize(model, mine, once(), steps={"transfer": 2, "finetune": 0}, **QUIET)


def test_it_goes_on_where_it_stopped_and_gives_a_finished_model_again(model, mine, tokens, tmp_path, monkeypatch):
    expected, broken = copy.deepcopy(model), copy.deepcopy(model)
    steps = {"transfer": 3, "finetune": 4}
    linearize(expected, mine, tokens, steps=steps, **QUIET)
    options = {"steps": steps, "out": tmp_path / "run", "save_every": 1, **QUIET}

    class Stop(Exception):
        pass

    from subquad.convert.finetune import _Engine

    real = _Engine.advance

    def stops(self, run, *rest):
        if run.step == 2:
            raise Stop
        return real(self, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(_Engine, "advance", stops)
        with pytest.raises(Stop):
            linearize(broken, mine, tokens, **options)
    assert same(broken, model) and not swapped(broken)  # as it was
    result = linearize(broken, mine, tokens, **options)
    assert result.transfer.resumed_from == 3 and result.finetune.resumed_from == 2
    assert same(broken, expected)
    again = copy.deepcopy(model)
    linearize(again, mine, tokens, **options)
    assert same(again, expected)


@pytest.mark.parametrize("kind", ["linearize", "linearize-groups"])
def test_runs_killed_in_each_stage_end_with_the_losses_and_weights_of_an_unbroken_one(tmp_path, kind):
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", kind], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (killed, resumed_from), (unbroken, none) = (line.split() for line in done.stdout.strip().splitlines())
    assert killed == unbroken and none == "0,0"
    first, second = map(int, resumed_from.split(","))
    assert first == 12 and 8 <= second < 12


def test_a_transfer_in_groups_is_the_same(model, mine, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # else groups go to the GPU, which rounds otherwise
    steps, models = {"transfer": 4, "finetune": 2}, [copy.deepcopy(model) for _ in range(3)]
    expected = linearize(models[0], mine, tokens, steps=steps, **QUIET)
    found = linearize(models[1], mine, tokens, steps=steps, group=2, out=tmp_path / "asked", **QUIET)
    mine.write_text(TEXT.replace("[finetune]", "group = 2\n[finetune]"))
    said = linearize(models[2], mine, tokens, steps=steps, out=tmp_path / "said", **QUIET)
    assert found.transfer.layer_losses == said.transfer.layer_losses == expected.transfer.layer_losses
    assert same(models[1], models[0]) and same(models[2], models[0])
    assert all((tmp_path / name / "transfer" / "group-001").is_dir() for name in ("asked", "said"))
    for options, message in (
        ({}, "out: got None; expected a folder for the hidden states"),
        ({"group": 0, "out": tmp_path / "none"}, "group: got 0; expected a positive integer"),
        (
            {"steps": {"transfer": 0}, "group": 1, "out": tmp_path / "none"},
            "group: got 1; expected a recipe and steps with something to transfer",
        ),
    ):
        with pytest.raises(InputError, match=message):
            linearize(model, mine, tokens, **options, **QUIET)
    assert not swapped(model) and not (tmp_path / "none").exists()


def test_nothing_to_transfer_is_left_out(model, tokens):
    result = linearize(model, "sliding-window", tokens, steps=2, batch=1, length=16, layers="2:1", **QUIET)
    assert result.transfer is None and result.finetune.steps == 2 and list(swapped(model)) == [0, 1]
    assert result.finetune.tokens == 2 * 8 * 16


def test_what_does_not_fit_shows_before_the_first_stage(model, mine, tokens, tmp_path):
    from transformers import ViTConfig, ViTModel

    mine.write_text(TEXT.replace('"k_proj"', '"kproj"'))
    with pytest.raises(InputError, match="targets: got 'kproj'; expected names of linear layers"):
        linearize(model, mine, tokens, out=tmp_path / "run", **QUIET)
    assert not swapped(model) and not (tmp_path / "run").exists()
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
    }
    with pytest.raises(InputError, match="model: got ViTModel; expected a causal decoder"):
        linearize(ViTModel(ViTConfig(**sizes)), "hedgehog", tokens, **QUIET)


def test_damaged_files_are_named(tmp_path):
    for old, new, message in (
        ('title = "Mine"', "title = 3", "title = 3; expected a text"),
        ('title = "Mine"', "", "no title; expected a text"),
        ("[mechanism]", "[mechanismus]", "'mechanismus'; expected a key; nearest: mechanism"),
        ('name = "lolcats"', 'name = "lolcat"', "'lolcat'; expected a mechanism; nearest: .*lolcats"),
        ("window = 4", "windw = 4", "'mechanism.windw'; expected a key; nearest: mechanism.window"),
        ("steps = 30", "step = 30", "'transfer.step'.*nearest: transfer.steps"),
        ("steps = 30", "", "no transfer.steps; expected an integer"),
        ("steps = 10", "steps = true", "finetune.steps = True; expected an integer"),
        ("accumulate = 2", 'accumulate = "2"', "finetune.accumulate = '2'; expected an integer"),
        ("accumulate = 2", "accumulate = 0", "finetune.accumulate = 0; expected an integer of at least 1"),
        ("accumulate = 2", "rank = -8", "finetune.rank = -8; expected an integer of at least 1"),
        ("accumulate = 2", "warmup = 1.5", "finetune.warmup = 1.5; expected a number from 0 to 1"),
        ("accumulate = 2", "own_share = 0", "finetune.own_share = 0; expected a number above 0 and at most 1"),
        ("accumulate = 2", "alpha = nan", "finetune.alpha = nan; expected a positive number"),
        ("steps = 30", "steps = -1", "transfer.steps = -1; expected an integer of at least 0"),
        ("lr = 1e-2", "lr = -1", "transfer.lr = -1; expected a positive number"),
        ('targets = ["q_proj", "k_proj"]', 'targets = "q_proj"', "finetune.targets = 'q_proj'; expected a list"),
        ("lr = 1e-2", 'group = "2"', "transfer.group = '2'; expected an integer"),
        ("accumulate = 2", 'loss = "ce"', "'ce'; expected a finetune.loss; one of: kl, next-token"),
        ("lr = 1e-2", "lr = ", "TOML that cannot be read"),
    ):
        assert old in TEXT
        with pytest.raises(InputError) as error:
            parse("mine", TEXT.replace(old, new, 1), "mine.toml")
        assert re.match(rf"recipe mine\.toml: got {message}", str(error.value)) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="got no stage; expected"):
        parse("mine", TEXT[: TEXT.index("[transfer]")], "mine.toml")
    with pytest.raises(InputError, match=r"recipe: got 'lolcat'.*nearest: lolcats"):
        recipe("lolcat")
    with pytest.raises(InputError, match=r"none\.toml; expected a recipe's file"):
        recipe(tmp_path / "none.toml")
