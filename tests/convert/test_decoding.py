"""Decoded tokens as CUDA graphs: what they give is what the passes give that they stand for. On the CPU a pass stands for its graph."""

import contextlib
import copy
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subquad
from subquad.convert import decoding
from subquad.convert.cache import CACHE, SubquadCache
from subquad.convert.graphs import WARM, NotCaptured
from subquad.convert.lora import adapters, add_lora, projections, without_lora
from subquad.state import State

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {
    "lolcats": {"window": 4, "sinks": 2, "far_rotary": False},
    "sliding-window": {"window": 4},
    "gla": {},
    "gated-deltanet": {},
    "lawcat": {"window": 4},
    "lizard": {"window": 4},
}


@pytest.fixture
def replays(monkeypatch):
    """A one for each replay of a graph; on the CPU a graph is the pass that it was made of."""
    monkeypatch.delenv("SUBQUAD_GRAPHS", raising=False)
    found = []
    if DEVICE.type == "cuda":
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (found.append(1), replay(self))[1])
        return found

    def capture(device, run):
        with monkeypatch.context() as patch:
            patch.setattr(State, "assign", lambda self, other: self)  # a capture does nothing yet
            hidden = run()
        return SimpleNamespace(replay=lambda: (found.append(1), hidden.copy_(run()))), hidden

    monkeypatch.setattr(decoding, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(decoding, "capture", capture)
    return found


def made(name="lolcats", layers="all", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=128)).eval()
    return subquad.swap(model, name, layers=layers, **{**KINDS[name], **options}).to(DEVICE)


def prompt(rows=2, tokens=9):
    return torch.randint(50, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def written(model, monkeypatch, **options):
    """Logits of generated tokens, by passes and by graphs."""
    found = []
    for mode in ("off", "auto"):
        monkeypatch.setenv("SUBQUAD_GRAPHS", mode)
        found.append(model.generate(**{"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True, **options}))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_written_text_is_that_of_passes(name, replays, monkeypatch):
    passes, graphs = written(made(name), monkeypatch, input_ids=prompt(), do_sample=False)
    assert torch.equal(passes.sequences, graphs.sequences) and len(replays) == 11 - WARM
    torch.testing.assert_close(torch.stack(passes.logits), torch.stack(graphs.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_rows_and_beams(beams, replays, monkeypatch):
    """Beams put rows of the states elsewhere between two replays."""
    ids = prompt(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    passes, graphs = written(made(), monkeypatch, input_ids=ids, attention_mask=mask, do_sample=False, num_beams=beams)
    assert torch.equal(passes.sequences, graphs.sequences) and len(replays) == 11 - WARM
    torch.testing.assert_close(torch.stack(passes.logits), torch.stack(graphs.logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_can_be_copied_and_given_more_at_once(replays):
    model, ids = made(), prompt(1, 40)
    whole = model(ids, use_cache=False).logits
    cache = SubquadCache(model)
    found = [model(ids[:, :8], **{CACHE: cache}).logits]
    found += [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(8, 16)]
    assert len(replays) == 8 - WARM
    other = copy.deepcopy(cache)
    wrong = [model(ids[:, :1], **{CACHE: cache}).logits for _ in range(3)]  # goes on otherwise; the copy does not hear of it
    found += [model(ids[:, i : i + 1], **{CACHE: other}).logits for i in range(16, 22)]
    found += [model(ids[:, 22:30], **{CACHE: other}).logits]
    found += [model(ids[:, i : i + 1], **{CACHE: other}).logits for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)
    assert other.get_seq_length() == 40 and cache.get_seq_length() == 19 and len(wrong) == 3
    assert len(replays) == (8 - WARM) + 3 + (6 - WARM) + 10
    assert all(layer.state.length.tolist() == [40] for layer in other.layers)


@torch.no_grad()
def test_other_weights_make_another_graph(replays):
    model, ids = made("gla"), prompt(1, 2)
    cache, twin = SubquadCache(model), SubquadCache(model)

    def step(graph):
        one = model(ids[:, :1], **{CACHE: cache if graph else twin}, output_hidden_states=not graph)
        return one.logits

    for _ in range(WARM + 3):  # the first has no state to go on from
        torch.testing.assert_close(step(True), step(False))
    before = len(replays)
    model.model.norm.weight.data = model.model.norm.weight.data * 2  # elsewhere in memory
    torch.testing.assert_close(step(True), step(False))
    assert before == 2 and len(replays) == 2


def reloaded(model):
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)


CHANGES = {
    "another weight": lambda model: setattr(model.model.norm, "weight", torch.nn.Parameter(2 * model.model.norm.weight)),
    "all weights": reloaded,
    "adapters": lambda model: add_lora(model, projections(model, ("q_proj",)), 4, 8.0),
    "another module": lambda model: setattr(model.model.layers[0], "mlp", torch.nn.Identity()),
    "training": lambda model: model.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_is_changed_needs_another_graph(what, replays):
    """Where the weights that the graph reads are still there."""
    model, ids = made("gla"), prompt(1)
    cache = SubquadCache(model)
    for i in range(WARM + 3):  # the first has no state to go on from
        model(ids[:, i : i + 1], **{CACHE: cache})
    other = copy.deepcopy(cache)
    assert len(replays) == 2
    CHANGES[what](model)
    found = model(ids[:, 6:7], **{CACHE: cache}).logits
    torch.testing.assert_close(found, model(ids[:, 6:7], **{CACHE: other}, output_hidden_states=True).logits)
    assert len(replays) == 2


@torch.no_grad()
@pytest.mark.parametrize("how", ["off", "merged"])
def test_adapters_that_are_switched_need_another_graph(how, replays):
    """Merged into the weights, these stay where they were."""
    model, ids = made("gla"), prompt(1)
    for name, p in add_lora(model, projections(model, ("q_proj",)), 4, 8.0).items():
        p.normal_() if ".lora_B." in name else None
    cache = SubquadCache(model)
    for i in range(WARM + 3):  # the first has no state to go on from
        model(ids[:, i : i + 1], **{CACHE: cache})
    other = copy.deepcopy(cache)
    assert len(replays) == 2
    if how == "merged":
        for layer in adapters(model).values():
            layer.merge()
    with without_lora(model) if how == "off" else contextlib.nullcontext():
        found = model(ids[:, 6:7], **{CACHE: cache}).logits
        torch.testing.assert_close(found, model(ids[:, 6:7], **{CACHE: other}, output_hidden_states=True).logits)
    assert len(replays) == 2


@torch.no_grad()
def test_a_model_that_is_asked_for_a_tuple_gives_one(replays):
    model, ids = made("gla").model, prompt(1)
    cache = SubquadCache(model)
    kinds = [type(model(ids[:, i : i + 1], **{CACHE: cache}, use_cache=True, return_dict=False)) for i in range(WARM + 3)]
    assert kinds == [tuple] * (WARM + 3) and not replays


@torch.no_grad()
def test_a_cache_keeps_no_model_and_no_graph_keeps_a_cache(replays, monkeypatch):
    def capture(device, run):
        hidden = run()
        return SimpleNamespace(replay=lambda: replays.append(1)), hidden

    monkeypatch.setattr(decoding, "capture", capture)
    model, ids = made("gla"), prompt(1)
    caches = [SubquadCache(model) for _ in range(2)]
    for cache in caches:
        for i in range(WARM + 3):
            model(ids[:, i : i + 1], **{CACHE: cache})
    assert len(replays) == 4
    there, weight = weakref.ref(caches.pop(0)), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del cache
    gc.collect()
    assert there() is None and weight() is not None
    del model
    gc.collect()
    assert weight() is None and caches[0].get_seq_length() == WARM + 3


@torch.no_grad()
def test_a_model_that_cannot_be_captured_is_seldom_tried_again(replays, monkeypatch):
    tried = []

    def capture(device, run):
        tried.append(1)
        raise NotCaptured("it reads the device")

    monkeypatch.setattr(decoding, "capture", capture)
    model, ids = made("gla"), prompt(1)
    with pytest.warns(UserWarning, match="without a CUDA graph: it reads the device"):
        for _ in range(5):
            cache = SubquadCache(model)
            found = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(9)]
    assert len(tried) == 3 and not replays
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("why", ["gradients", "hidden states", "a watcher", "a kept layer", "recording", "autocast"])
def test_steps_that_no_graph_serves(why, replays):
    model, ids, extra = made(layers=[0, 1] if why == "a kept layer" else "all"), prompt(1), {}
    cache, seen = SubquadCache(model), []
    if why == "hidden states":
        extra = {"output_hidden_states": True}
    if why == "a watcher":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    if why == "recording":
        for layer in cache.layers:
            layer.activate_past_recording()
    with warnings.catch_warnings(), torch.set_grad_enabled(why == "gradients"):
        warnings.simplefilter("error")
        for i in range(9):
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=why == "autocast"):
                out = model(ids[:, i : i + 1], **{CACHE: cache}, **extra)
    assert not replays and cache.get_seq_length() == 9
    assert len(seen) == (9 if why == "a watcher" else 0)
    assert out.logits.requires_grad == (why == "gradients") and (out.hidden_states is not None) == (why == "hidden states")


@torch.no_grad()
@pytest.mark.parametrize("of", ["a layer", "all modules"])
def test_a_watcher_that_comes_later_is_called(of, replays):
    model, ids = made(), prompt(1)
    cache, seen = SubquadCache(model), []
    for _ in range(WARM + 3):  # the first has no state to go on from
        model(ids[:, :1], **{CACHE: cache})
    layer = model.model.layers[1]
    register = layer.register_forward_hook if of == "a layer" else torch.nn.modules.module.register_module_forward_hook
    handle = register(lambda module, *_: seen.append(1) if module is layer else None)
    try:
        for _ in range(4):
            model(ids[:, :1], **{CACHE: cache})
    finally:
        handle.remove()
    assert len(replays) == 2 and len(seen) == 4


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_that_reads_the_device_runs_as_it_is(monkeypatch):
    monkeypatch.delenv("SUBQUAD_GRAPHS", raising=False)
    model, ids = made("gla"), prompt(1)
    mix = type(model.model.layers[0].self_attn.mechanism).mix
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn.mechanism), "mix", lambda self, q, *a, **k: (q.sum().item(), mix(self, q, *a, **k))[1]
    )
    cache = SubquadCache(model)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph"):
        found = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(9)]
    torch.testing.assert_close(torch.cat(found, 1), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_a_state_is_written_where_it_is():
    """Also from views of itself, whose memory is written meanwhile."""
    x, y = torch.arange(4.0)[None], torch.zeros(1, 2)
    state = State({"x": x, "y": y}, torch.tensor([1]))
    state.assign(State({"x": x.flip(1), "y": x[:, 1:3]}, torch.tensor([2])))
    assert state["x"] is x and x.tolist() == [[3, 2, 1, 0]] and y.tolist() == [[1, 2]] and state.length.tolist() == [2]
    with pytest.raises(subquad.InputError, match="other"):
        state.assign(State({"x": x[:, :2], "y": y}, torch.tensor([2])))
