"""Which layers to keep: costs are differences of the model's own loss, one layer at a time; they are kept and gone on with."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

from subquad import InputError
from subquad.convert import sensitivity
from subquad.convert.recipe import linearize, recipe
from subquad.convert.sensitivity import auto_keep, choose_layers, layer_costs
from subquad.convert.swap import swap, swapped

WINDOW = ("sliding-window", {"window": 3, "sinks": 1})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def batches():
    ids = torch.randint(97, (3, 2, 24), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": one} for one in ids]


def loss(model, batches):
    with torch.no_grad():
        return sum(float(model(b["input_ids"], labels=b["input_ids"], use_cache=False).loss) for b in batches) / len(batches)


def test_a_cost_is_what_one_layer_alone_adds(model, batches):
    before = loss(model, batches)
    expected = {i: loss(swap(copy.deepcopy(model), WINDOW[0], layers=[i], **WINDOW[1]), batches) - before for i in range(4)}
    found = layer_costs(model, batches, *WINDOW, progress=False)
    assert found == pytest.approx(expected, abs=1e-5) and max(map(abs, expected.values())) > 1e-3
    assert not swapped(model) and loss(model, batches) == before
    order = sorted(expected, key=expected.get)
    assert choose_layers(model, batches, WINDOW[0], 1, WINDOW[1], progress=False) == sorted(order[:3])
    assert choose_layers(model, batches, WINDOW[0], 3, WINDOW[1], progress=False) == order[:1]
    assert choose_layers(model, batches, WINDOW[0], 0, WINDOW[1], progress=False) == [0, 1, 2, 3]


def test_what_replaces_nothing_costs_nothing(model, batches):
    assert layer_costs(model, batches, "sliding-window", {"window": 24, "sinks": 0}, progress=False) == pytest.approx(
        dict.fromkeys(range(4), 0.0), abs=1e-5
    )


def test_measured_layers_are_kept(model, batches, tmp_path, monkeypatch):
    expected = layer_costs(model, batches, *WINDOW, progress=False)
    real, calls = sensitivity._nll, []

    def stops(*args):
        if len(calls) == 3:  # the original and two layers are done
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "_nll", stops)
        with pytest.raises(KeyboardInterrupt):
            layer_costs(model, batches, *WINDOW, cache=tmp_path / "a" / "costs.json", progress=False)
    assert not swapped(model)
    assert list(json.loads((tmp_path / "a" / "costs.json").read_text())["costs"]) == ["0", "1"]
    again = []
    monkeypatch.setattr(sensitivity, "_nll", lambda *a: again.append(1) or real(*a))
    for count, cache in ((3, "costs.json"), (3, "costs.json")):
        assert layer_costs(model, batches, *WINDOW, cache=tmp_path / "a" / cache, progress=False) == expected and len(again) == count
    other = layer_costs(model, batches, "sliding-window", {"window": 4, "sinks": 1}, cache=tmp_path / "a" / "costs.json", progress=False)
    assert other != expected and len(again) == 8  # another setting is measured anew


def test_linearize_keeps_the_layers_that_cost_most(model, batches, tmp_path):
    tokens = torch.randint(97, (600,), generator=torch.Generator().manual_seed(5))
    linearize(model, "sliding-window", tokens, layers="auto:3", steps=1, batch=1, length=128, out=tmp_path / "run", progress=False)
    costs = {int(layer): cost for layer, cost in json.loads((tmp_path / "run" / "layers.json").read_text())["costs"].items()}
    assert list(swapped(model)) == [min(costs, key=costs.get)] and len(costs) == 4


def test_layers_that_are_swapped_stay_as_they_are(model, batches):
    tokens = torch.cat([b["input_ids"].flatten() for b in batches] * 12)
    swap(model, "gla", layers=[3])
    gla, before = swapped(model)[3], loss(model, batches)
    with pytest.raises(
        InputError, match=r"model: got SubquadLlama.*, of whose layers 1 are swapped to gla already; expected a model with its"
    ):
        linearize(model, "sliding-window", tokens, layers="auto:1", steps=1, batch=1, length=128, progress=False)
    with pytest.raises(InputError, match="text: got 24 tokens"):
        linearize(model, "sliding-window", tokens[:24], layers=[0, 1], steps=1, batch=1, length=128, progress=False)
    assert swapped(model) == {3: gla} and loss(model, batches) == before
    linearize(model, "sliding-window", tokens, layers=[0, 1], steps=1, batch=1, length=128, progress=False)
    assert {index: module.name for index, module in swapped(model).items()} == {0: "sliding-window", 1: "sliding-window", 3: "gla"}


def test_misuse_is_one_line(model, batches):
    assert [auto_keep(x) for x in ("auto:3", "auto:0", "all", "3:1", [0], "auto:x")] == [3, 0, None, None, None, None]
    with pytest.raises(InputError, match="layers: got auto:4; expected fewer layers to keep than the model has, 4"):
        choose_layers(model, batches, WINDOW[0], 4, WINDOW[1], progress=False)


def of_windows(*layers):
    """A decoder whose layers see 8 tokens back where `layers` is true."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in layers]
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(
        Qwen2Config(**sizes, num_hidden_layers=len(layers), sliding_window=8, use_sliding_window=True, layer_types=kinds)
    )


WEIGHTS = replace(recipe("hedgehog"), mechanism="gla", finetune=None)


@pytest.mark.parametrize(
    "given, options, words",
    [
        (WEIGHTS, {}, "objective: got 'weights' for gla; expected .*hedgehog, lolcats"),
        (replace(WEIGHTS, options={"causal": False}), {}, "causal"),
        (recipe("lolcats"), {"group": 1}, "out: got None; expected a folder for the hidden states"),
        (recipe("lolcats").changed({"transfer": {"length": 16}, "finetune": {"length": 700}}), {"length": None}, "text: got 600 tokens"),
        (recipe("lolcats"), {"save_every": 0}, "save_every: got 0"),
        (recipe("lolcats"), {"layers": "auto:4"}, "layers: got auto:4; expected fewer"),
    ],
)
def test_nothing_is_measured_before_what_is_refused_anyway(model, monkeypatch, given, options, words):
    monkeypatch.setattr(sensitivity, "_nll", lambda *_: pytest.fail("measured"))
    tokens = torch.randint(97, (600,), generator=torch.Generator().manual_seed(5))
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=words):
        linearize(model, given, tokens, **{"layers": "auto:1", "steps": {"transfer": 1}, "length": 16, "progress": False, **options})
    assert not swapped(model) and torch.equal(torch.get_rng_state(), before)


def test_layers_that_cannot_be_taught_may_be_among_the_kept_ones(monkeypatch):
    """One or two of three layers have windows, and one layer is kept: the objective fits if it is the one, and cannot with two."""
    tokens = torch.randint(97, (64,), generator=torch.Generator().manual_seed(5))
    options = {"layers": "auto:1", "steps": {"transfer": 1, "finetune": 0}, "batch": 1, "length": 16, "progress": False}
    monkeypatch.setattr(sensitivity, "layer_costs", lambda *_, **__: {0: 1.0, 1: 2.0, 2: 0.5})
    model = of_windows(False, True, False)
    linearize(model, "hedgehog", tokens, **options)
    assert list(swapped(model)) == [0, 2]
    monkeypatch.setattr(sensitivity, "layer_costs", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"'weights' for model.layers.0.self_attn, whose original has a window of 8"):
        linearize(of_windows(True, False, True), "hedgehog", tokens, **options)
