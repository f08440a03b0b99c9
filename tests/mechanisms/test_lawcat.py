"""LAWCAT: its convolutions, its kin as special cases, both parts alone, the gate, how it starts; and all contracts without a window."""

import math

import pytest
import torch
from conformance import test_causality, test_packed, test_reference, test_state
from conformance.cases import Case, variants
from torch.nn.functional import conv1d, pad

import subquad
from subquad import Rotary

PLAIN = Case("lawcat", True, (("window", 0),))  # the suite's own cases have one


def qkv(n=70, heads=4, kv_heads=2, dim=16):
    return tuple(torch.randn(2, n, h, dim, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))


def gates(n=70):
    return -torch.rand(2, n, 2, 16, dtype=torch.float64)


def make(*, shake=0.2, taps=None, **options):
    module = subquad.attention("lawcat", 4, 16, kv_heads=2, **options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(shake * torch.randn_like(p))
        if taps is not None:
            for p in (module.q_taps, module.k_taps):
                p.copy_(torch.tensor(taps, dtype=torch.float64).expand_as(p))
    return module


def test_without_a_window_against_the_definition():
    for case in (PLAIN, *variants(PLAIN)):
        test_reference.test_output(case, torch.float64)
        test_reference.test_gradients_of_each_input_and_parameter(case, torch.float64)
    for size in (1, 2, 7):
        test_reference.test_output(Case("lawcat", True, (("window", 0), ("conv_size", size))), torch.float32)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_without_a_window_in_pieces_and_packed(size):
    case = Case("lawcat", True, (("window", 0), ("conv_size", size)))
    for pieces in ("ones", "odd"):
        test_state.test_split_equals_one_pass(case, test_state.SPLITS[pieces])
    test_state.test_nbytes_are_the_cards(case, 20, torch.bfloat16)
    test_state.test_gradients_through_the_state(case)
    test_packed.test_packed_equals_separate(case)
    test_packed.test_packed_calls_carry_states(case)
    test_packed.test_ragged_rows_go_on_as_a_batch(case)
    test_causality.test_outputs_before_a_changed_token_stay(case)


def test_q_and_k_are_convolved_by_conv1d_and_v_is_not():
    """The same as without convolutions on what torch's depthwise conv1d, padded on the left, makes of q and the repeated k."""
    q, k, v = qkv()
    k, v, g = (x.repeat_interleave(2, 2) for x in (k, v, gates()))
    module = subquad.attention("lawcat", 4, 16).double()
    plain = subquad.attention("lawcat", 4, 16, conv_size=1).double()
    with torch.no_grad():
        module.q_taps.normal_(), module.k_taps.normal_(), plain.q_taps.fill_(1), plain.k_taps.fill_(1)
        convolved = [
            conv1d(pad(x.flatten(2).mT, (3, 0)), w.flatten(0, 1)[:, None], groups=64).mT.unflatten(2, (4, 16))
            for x, w in ((q, module.q_taps), (k, module.k_taps))
        ]
        expected = plain(*convolved, v, log_decay=g)
        assert (module(q, k, v, log_decay=g) - expected).abs().max() < 1e-9


def test_taps_of_the_token_alone_and_open_gates_are_hedgehog():
    q, k, v = qkv()
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    module = subquad.attention("lawcat", 4, 16, conv_size=1).double()
    hedgehog = subquad.attention("hedgehog", 4, 16, feature_dim=8).double()
    with torch.no_grad():
        module.W.add_(0.2 * torch.randn_like(module.W))
        module.q_taps.fill_(1), module.k_taps.fill_(1), hedgehog.W_q.copy_(module.W), hedgehog.W_k.copy_(module.W)
        o = module(q, k, v, log_decay=torch.zeros(2, 70, 4, 16, dtype=torch.float64))
        assert (o - hedgehog(q, k, v)).abs().max() < 1e-8


def test_it_starts_close_to_no_convolution():
    (q, k, v), g = qkv(), gates()
    module, plain = make(shake=0.0), make(shake=0.0, taps=[0, 0, 0, 1])
    assert 0 < (module(q, k, v, log_decay=g) - plain(q, k, v, log_decay=g)).abs().max() < 0.02
    assert torch.equal(module.W[3], torch.eye(16, 8, dtype=torch.float64))


@pytest.mark.parametrize("window", [0, 12])
def test_weights_add_up_to_one(window):
    q, k, v = qkv()
    module, g = make(window=window), gates()
    assert (module(q, k, torch.ones_like(v), log_decay=g) - 1).abs().max() < 1e-8
    o = module(q, k, v, log_decay=g)
    assert (o.amax((1, 2)) <= v.amax((1, 2))).all() and (o.amin((1, 2)) >= v.amin((1, 2))).all()


def test_shut_gates_leave_the_token_itself():
    q, k, v = qkv()
    o = make()(q, k, v, log_decay=torch.full((2, 70, 2, 16), -1e3, dtype=torch.float64))
    assert (o - v.repeat_interleave(2, 2)).abs().max() < 1e-7


def test_a_window_over_all_tokens_alone_is_softmax():
    """With affine factors g = 1 takes the linear part away; rotary turns the window's q and k and nothing else."""
    q, k, v = qkv()
    rotary = Rotary.of(torch.arange(70), 16, theta=100.0)
    module = make(window=70, affine_factors=True)
    with torch.no_grad():
        module.window_factor.fill_(50)
    expected = subquad.attention("softmax", 4, 16, kv_heads=2)(q, k, v, rotary=rotary)
    assert (module(q, k, v, log_decay=gates(), rotary=rotary) - expected).abs().max() < 1e-9
    with torch.no_grad():
        module.window_factor.fill_(-50)
    g, linear = gates(), make(affine_factors=False)
    linear.load_state_dict({name: x for name, x in module.state_dict().items() if name != "window_factor"})
    assert (module(q, k, v, log_decay=g, rotary=rotary) - linear(q, k, v, log_decay=g)).abs().max() < 1e-9


def test_the_windows_tokens_count_in_both_parts():
    """Two tokens, equal scores, equal features: the window weighs each by g = ½, the linear part by φ·φ and once by the gate."""
    module = subquad.attention("lawcat", 1, 2, window=2).double()
    x, v = torch.zeros(1, 2, 1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None, :, None]
    g = torch.full((1, 2, 1, 2), -math.log(4), dtype=torch.float64)
    # F = 1: both halves' softmax is 1, so φ·φ = 2
    first, second = 0.5 + 2 / 4, 0.5 + 2
    row = torch.tensor([first, second], dtype=torch.float64) / (first + second)
    assert (module(x, x, v, log_decay=g)[0, 1, 0] - row).abs().max() < 1e-9


def test_gates():
    """½^(1/16) at the start, within (0, 1), and not below the clamp."""
    hidden = torch.randn(2, 9, 24)
    module = subquad.attention("lawcat", 4, 16, kv_heads=2, hidden_size=24, clamp_min=-0.05)
    assert (module.project(hidden)["log_decay"].exp() - 0.5 ** (1 / 16)).abs().max() < 1e-3
    with torch.no_grad():
        for p in module.gate.parameters():
            p.normal_()
    found = module.project(hidden)["log_decay"]
    assert found.shape == (2, 9, 2, 16) and found.min() == -0.05 and found.max() < 0
    module.clamp_min = None
    free = module.project(hidden)["log_decay"]
    assert free.min() < -0.2 and torch.equal(free.clamp(min=-0.05), found)


def test_parameters_of_a_layer_of_llama():
    """Llama-3.2-1B: two convolutions of 2048 channels by 4, a gate of rank 16, tied maps of 64 by 32 for 32 heads."""
    sizes = {"heads": 32, "head_dim": 64, "kv_heads": 8, "hidden_size": 2048}
    module = subquad.attention("lawcat", **sizes)
    assert sum(p.numel() for p in module.parameters()) == 2 * 8192 + 41472 + 65536
    windowed = subquad.attention("lawcat", window=64, **sizes)
    assert sum(p.numel() for p in windowed.parameters()) == 2 * 8192 + 41472 + 65536 + 32


def test_odd_heads_are_refused():
    with pytest.raises(subquad.InputError, match="head_dim"):
        subquad.attention("lawcat", 4, 15)


@pytest.mark.parametrize("bad", [{"window": -1}, {"conv_size": 0}, {"clamp_min": 0.5}], ids=str)
def test_bad_options(bad):
    with pytest.raises(subquad.InputError, match=next(iter(bad))):
        subquad.attention("lawcat", 4, 16, **bad)
