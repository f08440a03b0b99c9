"""The card keeps its word: claims that a program can check, costs, and inputs projected from hidden states."""

import pytest
import torch
from conformance.cases import DEVICE, HEADS, KV_HEADS, assert_close, causal, every, gradients, shape_of, split

import subquad
from subquad import Shape


@every(lambda case: case.card.causal and case.card.bidirectional)
def test_what_claims_both_modes_has_the_option(case):
    assert case.make().options["causal"] is case.causal


@every(lambda case: case.card.training_free)
def test_training_free_is_softmax_on_short_input(case):
    """As made, without training: on eight tokens, within any window or budget, it is what the model was trained with."""
    module = subquad.attention(case.name, HEADS, 16, kv_heads=KV_HEADS, **{"causal": case.causal} if "causal" in case.options else {})
    x = case.inputs(8, module, dtype=torch.float64)
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=True).transpose(1, 2)
    assert_close(case.run(module.to(DEVICE), x), exact, 1e-6)


@every()
def test_costs_are_plausible(case):
    card, options = case.card, case.make().options
    cost = {n: card.flops(Shape(n, 8, 64), **options) for n in (4096, 8192)}
    least = Shape(4096, 8, 64).tensor_bytes
    assert cost[4096] >= 4096 * 8 * 64, "fewer operations than one for each number of the output"
    assert 1.9 <= cost[8192] / cost[4096] <= 4.1
    assert card.bytes_moved(Shape(4096, 8, 64), **options) >= least
    assert card.flops(Shape(4096, 8, 64, batch=3), **options) == pytest.approx(3 * cost[4096])
    if card.recurrent:
        assert cost[8192] / cost[4096] < 2.2, "a fixed state gives a cost linear in the tokens"


@every(causal)
def test_state_bytes_scale_with_the_batch(case):
    options = case.make().options
    one, three = (case.card.state_bytes(Shape(100, 8, 64, batch=b), **options) for b in (1, 3))
    assert three == 3 * one > 0


@every()
def test_words(case):
    card, module = case.card, case.make()
    kept = card.kept(shape_of(module, 1000, batch=1, dtype=torch.float32), **module.options)
    assert kept and "{" not in kept and "}" not in kept
    for text in (card.title, card.paper, card.summary, *(spec.doc for spec in card.inputs.values())):
        assert text.strip() and "\n" not in text
    assert (subquad.mechanism(case.name).__doc__ or subquad.mechanism(case.name).__module__) and card.name == case.name


@every(lambda case: bool(case.card.inputs))
def test_inputs_from_hidden_states(case):
    """Projected inputs equal passed ones, fit their usual range, and their projections learn."""
    module = case.make(hidden_size=24)
    x = case.inputs(70, module)
    qkv = {name: x[name] for name in "qkv"}
    hidden = torch.randn(2, 70, 24, dtype=torch.float64, device=DEVICE)
    projected = module.project(hidden)
    assert projected.keys() == case.card.inputs.keys()
    assert_close(case.run(module, qkv, hidden=hidden), case.run(module, {**qkv, **projected}), 1e-12)
    for name, spec in case.card.inputs.items():
        ends = (*spec.extremes, spec.low, spec.high)
        assert min(ends) - 1e-6 <= projected[name].min() and projected[name].max() <= max(ends) + 1e-6, name
    found = gradients(module, {**qkv, "hidden": hidden}, lambda leaves: module(**leaves))
    for name, g in found.items():
        assert g.abs().max() > 0, f"{name} has no gradient"


@every(lambda case: bool(case.card.inputs) and case.causal)
def test_inputs_from_hidden_states_in_pieces(case):
    module = case.make(hidden_size=24)
    x = case.inputs(70, module)
    hidden = torch.randn(2, 70, 24, dtype=torch.float64, device=DEVICE)
    qkv = {name: x[name] for name in "qkv"}
    state, outputs = None, []
    for a, b in ((0, 64), (64, 65), (65, 70)):
        o, state = case.run(module, case.tokens(qkv, a, b), hidden=hidden[:, a:b], state=state, return_state=True)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), case.run(module, qkv, hidden=hidden), 1e-10)


@every(lambda case: bool(case.card.inputs))
def test_hidden_states_in_half_precision(case):
    module = case.make(torch.bfloat16, hidden_size=24)
    x = case.inputs(70, module, dtype=torch.bfloat16)
    hidden = torch.randn(2, 70, 24, device=DEVICE).bfloat16()
    o = case.run(module, {name: x[name] for name in "qkv"}, hidden=hidden)
    assert o.dtype == torch.bfloat16 and torch.isfinite(o).all()


@every(causal)
def test_the_first_token_sees_itself_alone(case):
    """A first token sees only itself, whatever follows: by itself or ahead of others, it has the same output."""
    module = case.make()
    x = case.inputs(30, module)
    alone = case.run(module, case.tokens(x, 0, 1))
    assert_close(case.run(module, x)[:, :1], alone, 1e-12)
    assert_close(split(case, module, x, [1, 29])[0][:, :1], alone, 1e-12)
