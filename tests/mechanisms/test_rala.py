"""RALA: what its card says of special cases, and its rotary."""

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad.layers.rotary2d import rala_rotary

GRID = (5, 7)


def qkv(heads=3, kv_heads=3, dim=16, batch=2):
    return tuple(torch.randn(batch, 35, h, dim, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))


def phi(x):
    return F.elu(x) + 1


def test_equal_keys_likeness_gives_plain_linear_attention():
    """Keys whose features are equally like the mean query have α = 1: here, permuted channels under a constant query."""
    q, k, v = qkv()
    q = torch.full_like(q, 0.3)
    k = torch.stack([k[:, 0, :, torch.randperm(16)] for _ in range(35)], 1)
    o = subquad.attend(q, k, v, "rala", grid=GRID)
    scores = torch.einsum("bnhd,bmhd->bhnm", phi(q), phi(k))
    plain = torch.einsum("bhnm,bmhv->bnhv", scores / scores.sum(-1, keepdim=True), v)
    assert (o - plain).abs().max() < 1e-6  # eps


def test_written_token_by_token():
    """One head, one image, with loops over tokens and explicit weights α."""
    q, k, v = qkv(heads=1, kv_heads=1, batch=1)
    turn = rala_rotary(GRID, 16)
    fq, fk = phi(q), phi(k)
    rq, rk = turn.apply(fq)[0, :, 0], turn.apply(fk)[0, :, 0]
    fq, fk, values = fq[0, :, 0], fk[0, :, 0], v[0, :, 0]
    mean = fq.mean(0)
    alpha = torch.stack([(mean @ f / 4).exp() for f in fk])
    alpha = 35 * alpha / alpha.sum()
    expected = []
    for i in range(35):
        top = sum(alpha[j] * (rq[i] @ rk[j]) * values[j] for j in range(35)) / 35
        expected.append(top / (sum(alpha[j] * (fq[i] @ fk[j]) for j in range(35)) / 35 + 1e-6))
    o = subquad.attend(q, k, v, "rala", grid=GRID, rotary=turn)
    assert (o[0, :, 0] - torch.stack(expected)).abs().max() < 1e-12


def test_rotary_changes_the_numerator_alone():
    """v = 1 without rotary gives 1 (weights sum to one); with it, the published form does not."""
    q, k, v = qkv()
    ones = torch.ones_like(v)
    assert (subquad.attend(q, k, ones, "rala", grid=GRID) - 1).abs().max() < 1e-6
    assert (subquad.attend(q, k, ones, "rala", grid=GRID, rotary=rala_rotary(GRID, 16)) - 1).abs().max() > 0.1


def test_values_scale_and_tokens_permute():
    q, k, v = qkv(heads=4, kv_heads=2)
    o = subquad.attend(q, k, v, "rala", grid=GRID)
    assert (subquad.attend(q, k, -3 * v, "rala", grid=GRID) + 3 * o).abs().max() < 1e-12
    order = torch.randperm(35)
    moved = subquad.attend(q[:, order], k[:, order], v[:, order], "rala", grid=GRID)
    assert (moved - o[:, order]).abs().max() < 1e-12


@pytest.mark.parametrize("dim", [4, 32, 96])
def test_rala_rotary(dim):
    """Turning by (row, column): half the channels by each, D/4 frequencies from 1 down to 1e-4; only differences count."""
    rotary = rala_rotary((6, 9), dim)
    assert rotary.interleaved and rotary.cos.shape == (54, dim)
    row, column = torch.arange(54) // 9, torch.arange(54) % 9
    frequency = [10000.0 ** -(i / max(dim // 4 - 1, 1)) for i in range(dim // 4)]
    for pair in range(dim // 2):
        place = row if pair < dim // 4 else column
        angle = place * frequency[pair % (dim // 4)]
        for channel in (2 * pair, 2 * pair + 1):
            assert (rotary.cos[:, channel] - angle.cos()).abs().max() < 1e-5
            assert (rotary.sin[:, channel] - angle.sin()).abs().max() < 1e-5
    q, k = torch.randn(2, 1, 1, 1, dim, dtype=torch.float64).expand(2, 1, 54, 1, dim)
    s = (rotary.apply(q)[0, :, 0] @ rotary.apply(k)[0, :, 0].T).view(6, 9, 6, 9)
    assert (s[0, 0, 2, 3] - s[3, 4, 5, 7]).abs() < 1e-4 and (s[0, 0, 2, 3] - s[0, 0, 3, 2]).abs() > 1e-4


@pytest.mark.parametrize("grid, dim", [((3, 4), 6), ((3, 4), 2), ((3,), 8), ((0, 4), 8)])
def test_rala_rotary_refuses(grid, dim):
    with pytest.raises(subquad.InputError):
        rala_rotary(grid, dim)
