"""HGRN2: the lower bound at its ends and by depth, values by hand, GLA with tied keys, and gates near 0 and 1."""

import math

import pytest
import torch

import subquad
from subquad.mechanisms.linear.hgrn2 import forget_gate


def qkv(n=70, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    return tuple(torch.randn(2, n, h, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))


def make(**options):
    return subquad.attention("hgrn2", 4, 16, kv_heads=2, **options)


def test_a_lower_bound_of_one_keeps_everything():
    """f = 1: the state stays as it was, and nothing is written."""
    q, k, v = qkv()
    module = make(lower_bound=1.0)
    assert module(q, k, v).abs().max() == 0
    _, state = make(lower_bound=0.5)(q, k, v, return_state=True)
    state.origin = ""  # of the same sizes, whatever the bound
    o, after = module(q, k, v, state=state, return_state=True)
    assert torch.equal(after["S"], state["S"])
    expected = torch.einsum("bnhd,bhdv->bnhv", q.sigmoid(), state["S"].repeat_interleave(2, 1))
    assert (o - expected).abs().max() < 1e-12


def test_by_hand():
    """Gates of 3/4 and 1/4 with bound 0 are 7/8 and 5/8 with bound 1/2; q's sigmoid is 1/2 in both channels."""
    k = math.log(3) * torch.tensor([[1.0, -1], [-1, 1]], dtype=torch.float64)[None, :, None]
    v = torch.eye(2, dtype=torch.float64)[None, :, None]
    q = torch.zeros_like(k)
    for bound, (a, b) in ((0, (3 / 4, 1 / 4)), (0.5, (7 / 8, 5 / 8))):
        o = subquad.attend(q, k, v, "hgrn2", lower_bound=bound, v_activation="none")
        first = [(1 - a + 1 - b) / 2, 0]
        second = [((1 - a) * b + (1 - b) * a) / 2, (1 - b + 1 - a) / 2]
        torch.testing.assert_close(o[0, :, 0], torch.tensor([first, second], dtype=torch.float64), rtol=0, atol=1e-15)
    o = subquad.attend(q, k, v, "hgrn2", lower_bound=0)
    assert o[0, 0, 0, 0].item() == pytest.approx(0.5 / (1 + math.exp(-1)))  # silu(1)
    assert subquad.attend(q, k, v, "hgrn2", q_activation="silu").abs().max() == 0  # silu(0)


@pytest.mark.parametrize("layer, bound", [((0, 4), 0.0), ((1, 4), 0.25), ((3, 4), 0.75)])
def test_the_bound_rises_with_depth(layer, bound):
    """As at the start of training: the running sum of a softmax of equal numbers, without the layer's own."""
    q, k, v = qkv()
    assert torch.equal(make(layer=layer)(q, k, v), make(lower_bound=bound)(q, k, v))
    shares = torch.zeros(layer[1]).softmax(0)
    assert shares[: layer[0]].sum().item() == pytest.approx(bound)


def test_is_gla_with_keys_tied_to_the_gate():
    q, k, v = qkv()
    f = 0.3 + 0.7 / (1 + (-k).exp())
    gla = subquad.attention("gla", 4, 16, kv_heads=2)
    expected = gla(4 * q, 1 - f, v, log_decay=f.log())  # √D = 4
    assert (make(lower_bound=0.3, q_activation="none", v_activation="none")(q, k, v) - expected).abs().max() < 1e-10


def test_constant_inputs_settle_at_the_input():
    """Each channel of the state is a running mean: from zero it rises as 1 − fⁿ towards the value."""
    k, v = torch.full((1, 9, 1, 3), math.log(3), dtype=torch.float64), torch.full((1, 9, 1, 2), 5.0, dtype=torch.float64)
    o = subquad.attend(torch.ones_like(k), k, v, "hgrn2", q_activation="none", v_activation="none")
    expected = 3 * 5 * (1 - 0.75 ** torch.arange(1, 10, dtype=torch.float64))
    assert (o[0, :, 0, 1] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("bound", [0, 1e-30, 1e-3, 0.5, 0.999, 1])
def test_gates_keep_their_digits_at_both_ends(bound):
    logits = torch.tensor([-300.0, -80, -20, -1, 0, 1, 9, 16, 40, 90])
    x = logits.requires_grad_()
    log_f, free = forget_gate(x, bound)
    wide = logits.detach().double()
    f = bound + (1 - bound) / (1 + (-wide).exp())
    exact_free = (1 - bound) / (1 + wide.exp())
    exact = torch.where(exact_free < 0.5, torch.log1p(-exact_free), f.log())
    torch.testing.assert_close(free.double(), exact_free, rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(log_f.double(), exact, rtol=2e-6, atol=1e-38)
    if bound != 1:
        (grad,) = torch.autograd.grad(log_f.sum() + free.sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("change", [{"lower_bound": 1.5}, {"lower_bound": True}, {"q_activation": "relu"}, {"v_activation": "sigmoid"}])
def test_bad_options(change):
    with pytest.raises(subquad.InputError) as caught:
        subquad.attention("hgrn2", 4, 16, **change)
    assert caught.value.argument == next(iter(change))
