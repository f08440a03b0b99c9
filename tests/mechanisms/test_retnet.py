"""RetNet: the parallel form by hand, the decays, what the norms take away, and where rotary goes."""

import math

import pytest
import torch

import subquad


def qkv(n=70, heads=4, dim=16, dtype=torch.float64):
    return tuple(torch.randn(2, n, heads, dim, dtype=dtype) for _ in range(3))


def parallel(q, k, v, gammas):
    """(Q Kᵀ ⊙ D) V with k scaled by 1/√D and D_nm = γ^(n−m): eq. 5, head by head."""
    heads = []
    for h, gamma in enumerate(gammas):
        D = torch.tensor([[gamma ** (n - m) if n >= m else 0.0 for m in range(q.shape[1])] for n in range(q.shape[1])], dtype=q.dtype)
        heads.append((q[:, :, h] @ (k[:, :, h] / q.shape[-1] ** 0.5).mT * D) @ v[:, :, h])
    return torch.stack(heads, 2)


def test_parallel_form():
    q, k, v = qkv()
    raw = parallel(q, k, v, [31 / 32, 63 / 64, 127 / 128, 255 / 256])
    assert (subquad.attend(q, k, v, "retnet", norm="none") - raw).abs().max() < 1e-12
    mean, var = raw.mean(-1, keepdim=True), raw.var(-1, correction=0, keepdim=True)
    assert (subquad.attend(q, k, v, "retnet") - (raw - mean) / (var + 1e-6).sqrt()).abs().max() < 1e-10
    rms = raw / (raw.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (subquad.attend(q, k, v, "retnet", norm="rms") - rms).abs().max() < 1e-10


def test_rotary_with_decay_is_xpos():
    """With c = (γ e^{iθ}): Re Σ q_n c^n (k_m c^{-m})* v_m is what rotary and decay give (sec. 2.1, adjacent channels complex)."""
    q, k, v = qkv(n=12, heads=1, dim=2)
    rotary = subquad.Rotary.of(torch.arange(12), 2, interleaved=True)  # θ = 1
    n = torch.arange(12, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(n), n)[None, :, None]
    zq, zk = (torch.view_as_complex(x)[..., 0:] for x in (q, k))
    zq, zk = zq * turn * (31 / 32) ** n[:, None], zk * turn * (31 / 32) ** -n[:, None]
    scores = torch.einsum("bnh,bmh->bhnm", zq, zk.conj()).real.tril() / 2**0.5
    expected = torch.einsum("bhnm,bmhv->bnhv", scores, v)
    assert (subquad.attend(q, k, v, "retnet", norm="none", rotary=rotary) - expected).abs().max() < 1e-6  # angles in float32
    plain = subquad.attend(q, k, v, "retnet", norm="none")
    assert torch.equal(subquad.attend(q, k, v, "retnet", norm="none", rotate=False, rotary=rotary), plain)


@pytest.mark.parametrize(
    "decays, heads, gammas",
    [
        ("default", 3, [1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128]),
        ("equal", 3, [1 - 1 / 32, 1 - 1 / math.sqrt(32 * 512), 1 - 1 / 512]),
        ("equal", 1, [1 - 1 / 32]),
    ],
)
def test_decays(decays, heads, gammas):
    module = subquad.attention("retnet", heads, 8, decays=decays)
    assert module.log_decay.exp().tolist() == pytest.approx(gammas, abs=1e-15)
    assert module.half().log_decay.exp().tolist() == pytest.approx(gammas, abs=1e-15)


def test_decays_of_many_heads_do_not_round_to_one():
    """1 − 2^{-5-h} is 1 in float32 from the 20th head on; its logarithm is not 0."""
    log_decay = subquad.attention("retnet", 60, 8).float().log_decay
    assert (log_decay < 0).all() and log_decay[59].item() == pytest.approx(-(2.0**-64))


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_the_norm_forgets_the_size_of_each_row(norm):
    """The paper's score normalisers multiply rows of weights by positive numbers: nothing changes."""
    q, k, v = qkv()
    rows = torch.rand(2, 70, 4, 1, dtype=torch.float64) + 0.5
    o = subquad.attend(1e3 * q, k, v, "retnet", norm=norm)  # large, so that ε does not count
    assert (subquad.attend(1e3 * rows * q, k, v, "retnet", norm=norm) - o).abs().max() < 1e-4
    assert (o.pow(2).mean(-1) - 1).abs().max() < 1e-4
    assert (o.mean(-1).abs().max() < 1e-12).item() is (norm == "group")


def test_half_precision_is_normalised_before_it_is_rounded():
    q, k, v = (x.bfloat16() for x in qkv())
    exact = subquad.attend(q.double(), k.double(), v.double(), "retnet")
    assert (subquad.attend(q, k, v, "retnet") - exact).abs().max() < 2**-8 * exact.abs().max()


@pytest.mark.parametrize("change", [{"decays": "defaults"}, {"norm": "layer"}, {"rotate": 1}, {"value_dim": 1}])
def test_bad_options(change):
    with pytest.raises(subquad.InputError) as caught:
        subquad.attention("retnet", 4, 16, **change)
    assert caught.value.argument == next(iter(change))
