"""LightNet: the causal form's prefix softmax, its recurrence, and which positions are relative under its decay."""

import pytest
import torch
from torch.nn.functional import silu

import subquad
from subquad import InputError, Rotary
from subquad.mechanisms.vision.lightnet import log_sums

N, D = 40, 8


def qkv(heads=2):
    torch.manual_seed(0)
    return tuple(torch.randn(2, N, heads, D, dtype=torch.float64) for _ in range(3))


def run(q, k, v, **given):
    options = {name: given.pop(name) for name in ("causal", "lrpe") if name in given}
    return subquad.attention("lightnet", q.shape[2], D, value_dim=v.shape[3], **options)(q, k, v, **given)


def angles(positions, theta=50.0):
    """An angle of its own for every channel."""
    angle = positions[:, None].double() * theta ** (-torch.arange(D, dtype=torch.float64) / D)
    return Rotary(angle.cos(), angle.sin())


@pytest.mark.parametrize("given", [{}, {"lrpe": "cosine", "rotary": angles(torch.arange(N))}], ids=["plain", "cosine"])
def test_the_last_token_sees_the_same_causal_or_not(given):
    q, k, v = qkv()
    assert (run(q, k, v, **given) - run(q, k, v, causal=False, **given))[:, -1].abs().max() < 1e-12


def test_recurrence_token_by_token():
    """Δ_t = Δ_{t−1} + exp(k_t), from Δ_0 = 0: the first token has weight 1."""
    q, k, v = qkv()
    S, delta, found = torch.zeros(2, 2, D, D, dtype=torch.float64), torch.zeros(2, 2, D, dtype=torch.float64), []
    for t in range(N):
        grown = delta + k[:, t].exp()
        S = (delta / grown)[..., None] * S + (k[:, t].exp() / grown)[..., None] * v[:, t, :, None]
        delta = grown
        found.append(torch.einsum("bhd,bhdv->bhv", silu(q[:, t]), S))
    assert (run(q, k, v) - torch.stack(found, 1)).abs().max() < 1e-12
    assert (run(q, k, v)[:, 0] - silu(q[:, 0]).sum(-1, keepdim=True) * v[:, 0]).abs().max() < 1e-12


def test_weights_of_a_channel_sum_to_one_and_keys_have_no_offset():
    q, k, v = qkv()
    assert (run(q, k, torch.ones_like(v)) - silu(q).sum(-1, keepdim=True)).abs().max() < 1e-12
    k.requires_grad_()
    o = run(q, k, v)
    assert (run(q, k + torch.randn(1, 1, 2, D), v) - o).abs().max() < 1e-6  # the offset's own rounding is float32's
    o.square().sum().backward()
    assert k.grad.sum(1).abs().max() < 1e-11 * k.grad.abs().max() * N
    means = v.cumsum(1) / torch.arange(1, N + 1).view(1, N, 1, 1)
    assert (run(q, torch.zeros_like(k), v) - silu(q).sum(-1, keepdim=True) * means).abs().max() < 1e-12


def test_the_cosine_form_is_relative_and_pairs_are_not():
    q, k, v = qkv()
    near, far = angles(torch.arange(N)), angles(torch.arange(N) + 1000)
    cosine = run(q, k, v, lrpe="cosine", rotary=near)
    assert (run(q, k, v, lrpe="cosine", rotary=far) - cosine).abs().max() < 1e-9
    assert (cosine - run(q, k, v)).abs().max() > 0.1
    near, far = (Rotary.of(torch.arange(N) + start, D, theta=50.0) for start in (0, 1000))
    assert (run(q, k, v, rotary=near) - run(q, k, v, rotary=far)).abs().max() > 0.01
    not_causal = [run(q, k, v, rotary=rotary, causal=False) for rotary in (near, far)]
    assert (not_causal[0] - not_causal[1]).abs().max() < 1e-3  # float32 angles


def test_cosine_form_with_angles_of_zero_or_none_is_plain():
    q, k, v = qkv()
    zero = Rotary(torch.ones(N, D), torch.zeros(N, D))
    for causal in (True, False):
        plain = run(q, k, v, causal=causal)
        for rotary in (zero, zero.narrow(0, N), None):
            assert (run(q, k, v, causal=causal, lrpe="cosine", rotary=rotary) - plain).abs().max() < 1e-12


def test_log_sums_of_packed_sequences():
    torch.manual_seed(0)
    lengths = (3, 0, 1, 20, 7)
    x, bounds = 30 * torch.randn(1, 31, 2, 3, dtype=torch.float64), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    expected = torch.cat([part.logcumsumexp(1) for part in x.split(lengths, 1)], 1)
    assert (log_sums(x, bounds) - expected).abs().max() < 1e-12


def test_a_late_rise_of_a_logit_takes_over():
    """A key larger by 200 than all before it: weight 1 there, and nothing overflows on the way."""
    q, k, v = qkv()
    k[:, 20] += 200
    o = run(q, k, v)
    assert (o[:, 20] - silu(q[:, 20]).sum(-1, keepdim=True) * v[:, 20]).abs().max() < 1e-12 and o.isfinite().all()


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="lrpe"):
        subquad.attention("lightnet", 1, D, lrpe="cosin")
