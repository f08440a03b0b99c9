"""Simple GLA: its kin as special cases, values by hand in both forms, and the gates."""

import math

import pytest
import torch

import subquad
from subquad.ops.linear.reference import linear_attention


def inputs(n=70, dtype=torch.float64):
    q = torch.randn(2, n, 4, 16, dtype=dtype)
    k, v = (torch.randn(2, n, 2, 16, dtype=dtype) for _ in range(2))
    return q, k, v, -torch.rand(2, n, 2, dtype=dtype)


def make(name="simple-gla", **options):
    return subquad.attention(name, 4, 16, kv_heads=2, **options).double()


def test_no_decay_is_linear_attention():
    q, k, v, g = inputs()
    assert (make()(q, k, v, log_decay=0 * g) - linear_attention(q, k, v)).abs().max() < 1e-12
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, 2)).tril() / 4
    expected = torch.einsum("bhnm,bmhv->bnhv", scores, v.repeat_interleave(2, 2))
    assert (make()(q, k, v, log_decay=0 * g) - expected).abs().max() < 1e-12


def test_is_gla_with_the_same_gate_in_every_channel():
    q, k, v, g = inputs()
    wide = g[..., None].expand(-1, -1, -1, 16)
    assert (make()(q, k, v, log_decay=g) - make("gla")(q, k, v, log_decay=wide)).abs().max() < 1e-10


def test_is_retnet_with_constant_gates():
    q, _, _, _ = inputs()
    k, v = torch.randn_like(q), torch.randn_like(q)
    g = torch.tensor([math.log(1 - 2.0 ** (-5 - h)) for h in range(4)], dtype=torch.float64).expand(2, 70, 4)
    module = subquad.attention("simple-gla", 4, 16).double()
    assert (module(q, k, v, log_decay=g) - subquad.attend(q, k, v, "retnet", norm="none")).abs().max() < 1e-10


def test_forgetting_all_leaves_the_token_itself():
    q, k, v, g = inputs()
    own = (q * k.repeat_interleave(2, 2)).sum(-1, keepdim=True) / 4 * v.repeat_interleave(2, 2)
    assert (make()(q, k, v, log_decay=g - 1e3) - own).abs().max() < 1e-12


@pytest.mark.parametrize("form, weights", [("gla", [[1, 0], [0.5, 1]]), ("mamba2", [[2 * 4, 0], [2 * 4 / 2, 2 * 1]])])
def test_by_hand(form, weights):
    """q·k = 2, √D = 2, and the state halves before the second token. With e^A = ln 2 Mamba-2's steps are 4 and 1; it has no √D."""
    module = subquad.attention("simple-gla", 1, 4, value_dim=2, form=form).double()
    if form == "mamba2":
        with torch.no_grad():
            module.A_log.fill_(math.log(math.log(2)))
    x = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64).expand(1, 2, 1, 4)
    v = torch.eye(2, dtype=torch.float64)[None, :, None]
    g = -math.log(2) * torch.tensor([4.0, 1], dtype=torch.float64)[None, :, None]
    o = module(x, x, v, log_decay=g)[0, :, 0]
    torch.testing.assert_close(o, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-12)


def test_mamba2_from_hidden_states():
    """The SSD layer's own words: Δ = softplus(W x + b), a = exp(−A Δ), h = a h + B (Δ x), y = C·h."""
    q, k, v, _ = inputs(n=20)
    module = make(form="mamba2", hidden_size=24)
    hidden = torch.randn(2, 20, 24, dtype=torch.float64)
    step = (1 + (hidden @ module.gate.weight.T + module.gate.bias).exp()).log()
    h, out = torch.zeros(2, 4, 16, 16, dtype=torch.float64), []
    for t in range(20):
        a, dx = (-module.A_log.exp() * step[:, t]).exp(), step[:, t, :, None] * v[:, t]
        write = k[:, t, :, :, None] * dx[:, :, None]
        h = (a.repeat_interleave(2, 1)[..., None, None] * h) + write.repeat_interleave(2, 1)
        out.append((q[:, t, :, :, None] * h).sum(2))
    assert (module(q, k, v, hidden=hidden) - torch.stack(out, 1)).abs().max() < 1e-10


def test_gates_as_made():
    """ "gla" begins near 2^{-1/16}; Mamba-2's decay rate is A in (1, 16) times steps in (0.001, 0.1)."""
    hidden = 1e-6 * torch.randn(1, 5, 24)
    module = subquad.attention("simple-gla", 64, 8, hidden_size=24)
    with torch.no_grad():
        module.gate.bias.zero_()
    assert module.project(hidden)["log_decay"].exp().mean().item() == pytest.approx(2 ** (-1 / 16), rel=1e-4)
    half = subquad.attention("simple-gla", 64, 8, hidden_size=24, gate_normalizer=8)
    half.load_state_dict(module.state_dict())
    assert half.project(hidden)["log_decay"].exp().mean().item() == pytest.approx(2 ** (-1 / 8), rel=1e-4)
    module = subquad.attention("simple-gla", 64, 8, hidden_size=24, form="mamba2")
    step = -module.project(hidden)["log_decay"] / module.A_log.exp()
    assert 0.9e-3 < step.min() < 0.01 < step.max() < 0.101
    assert module.A_log.exp().min() > 1 and module.A_log.exp().max() < 16


@pytest.mark.parametrize("change", [{"form": "mamba"}, {"gate_normalizer": 0}])
def test_bad_options(change):
    with pytest.raises(subquad.InputError) as caught:
        subquad.attention("simple-gla", 4, 16, **change)
    assert caught.value.argument == next(iter(change))
