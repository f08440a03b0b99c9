"""KDA: its kin as special cases, what beta does at its ends, one step by hand, and the gates' projections."""

import math

import pytest
import torch

import subquad


def inputs(n=70):
    q = torch.randn(2, n, 4, 16, dtype=torch.float64)
    k, v = (torch.randn(2, n, 2, 16, dtype=torch.float64) for _ in range(2))
    return q, k, v, torch.rand(2, n, 2, dtype=torch.float64), -torch.rand(2, n, 2, 16, dtype=torch.float64)


def make(name="kda", **options):
    return subquad.attention(name, 4, 16, kv_heads=2, **options)


def test_equal_gates_are_gated_deltanet():
    q, k, v, beta, g = inputs()
    g = g[..., :1]
    o = make()(q, k, v, beta=beta, log_decay=g.expand(-1, -1, -1, 16))
    assert (o - make("gated-deltanet")(q, k, v, beta=beta, log_decay=g[..., 0])).abs().max() < 1e-10
    o = make()(q, k, v, beta=beta, log_decay=torch.zeros(2, 70, 2, 16, dtype=torch.float64))
    assert (o - make("deltanet")(q, k, v, beta=beta)).abs().max() < 1e-10


def test_channels_that_forget_apart_are_not_gated_deltanet():
    q, k, v, beta, g = inputs()
    o = make()(q, k, v, beta=beta, log_decay=g)
    assert (o - make("gated-deltanet")(q, k, v, beta=beta, log_decay=g.mean(-1))).abs().max() > 0.01


def test_without_beta_nothing_is_written():
    q, k, v, beta, g = inputs()
    assert make()(q, k, v, beta=0 * beta, log_decay=g).abs().max() == 0
    _, state = make()(q, k, v, beta=beta, log_decay=g, return_state=True)
    _, after = make()(q, k, v, beta=0 * beta, log_decay=g, state=state, return_state=True)
    assert (after["S"] - g.sum(1).exp()[..., None] * state["S"]).abs().max() < 1e-12


def test_by_hand():
    """√D = 2. Along k = (3, 4, 0, 0)/5 the first value is stored; channel 0 then halves, channel 1 quarters."""
    module = subquad.attention("kda", 1, 4, value_dim=2, qk_activation="none")
    k = torch.tensor([[3.0, 4, 0, 0]] * 2, dtype=torch.float64)[None, :, None] * 1e6  # so that 1e-6 does not count
    v = torch.eye(2, dtype=torch.float64)[None, :, None]
    g = -math.log(2) * torch.tensor([[9.0, 9, 9, 9], [1, 2, 0, 0]], dtype=torch.float64)[None, :, None]
    o, state = module(k, k, v, beta=torch.tensor([[[1.0], [0.5]]], dtype=torch.float64), log_decay=g, return_state=True)
    recalled = 0.6**2 / 2 + 0.8**2 / 4  # 0.34 of the first value; half of that is taken back
    expected = torch.tensor([[1 / 2, 0], [recalled / 2 / 2, 0.5 / 2]], dtype=torch.float64)
    torch.testing.assert_close(o[0, :, 0], expected, rtol=0, atol=1e-12)
    first = torch.tensor([0.3 - 0.5 * 0.34 * 0.6, 0.2 - 0.5 * 0.34 * 0.8, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(state["S"][0, 0, :, 0], first, rtol=0, atol=1e-12)


def test_decay_comes_before_the_correction():
    """diag(α) and I − β k kᵀ do not commute: the other order gives another state."""
    q, k, v, beta, g = (x[:, :2] for x in inputs())
    _, S = make(qk_activation="none")(q, k, v, beta=beta, log_decay=g, return_state=True)
    unit = k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    state = beta[:, 0, :, None, None] * unit[:, 0, :, :, None] * v[:, 0, :, None]
    erase = torch.eye(16) - beta[:, 1, :, None, None] * unit[:, 1, :, :, None] * unit[:, 1, :, None]
    write = beta[:, 1, :, None, None] * unit[:, 1, :, :, None] * v[:, 1, :, None]
    decay = torch.diag_embed(g[:, 1].exp())
    assert (S["S"] - (erase @ decay @ state + write)).abs().max() < 1e-12
    assert (S["S"] - (decay @ erase @ state + write)).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_gates_by_hand(gate, rank):
    module = make(hidden_size=24, gate=gate, gate_rank=rank, gate_floor=-2.0).double()
    hidden = torch.randn(2, 9, 24, dtype=torch.float64)
    assert module.decay[0].weight.shape == (rank or 16, 24)
    x = (hidden @ module.decay[0].weight.T @ module.decay[1].weight.T).view(2, 9, 2, 16) + module.dt_bias
    A = module.A_log.exp().view(2, 1)
    expected = -A * (1 + x.exp()).log() if gate == "softplus" else -2 / (1 + (-A * x).exp())
    assert (module.project(hidden)["log_decay"] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("gate", ["softplus", "sigmoid"])
def test_gates_begin_as_mamba2s(gate):
    """Decay rates A in (1, 16) times steps in (0.001, 0.1), different in each channel, whichever the gate."""
    module = subquad.attention("kda", 64, 16, hidden_size=24, gate=gate)
    rate = -module.project(torch.zeros(1, 1, 24))["log_decay"][0, 0]
    assert rate.shape == (64, 16) and (rate.std(-1) > 0).all()
    assert 0.9e-3 < rate.min() < 0.02 and 0.4 < rate.max() < 1.61
    step = rate / module.A_log.exp()
    assert 0.9e-3 < step.min() < 2e-3 and 0.08 < step.max() < 0.101


@pytest.mark.parametrize("change", [{"gate": "tanh"}, {"gate_floor": 0.0}, {"gate_rank": 0}, {"qk_activation": "relu"}])
def test_bad_options(change):
    with pytest.raises(subquad.InputError) as caught:
        subquad.attention("kda", 4, 16, **change)
    assert caught.value.argument == next(iter(change))
