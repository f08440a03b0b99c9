"""MD-TPE and MD-LRPE against explicit Toeplitz matrices and explicit scores, on one, two and three axes."""

import pytest
import torch
from torch.nn.functional import silu

import subquad
from subquad import InputError
from subquad.layers.md_lrpe import md_lrpe
from subquad.layers.md_tpe import MDTPE

GRIDS = [(70,), (5, 7), (3, 4, 5)]


def places(grid):
    return torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, len(grid))


def tpe(grid, dim=12, heads=3):
    torch.manual_seed(0)
    layer = MDTPE(dim, heads, len(grid)).double()
    for p in layer.parameters():
        p.data = torch.randn_like(p)
    return layer, torch.randn(2, len(places(grid)), dim, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS)
def test_tpe_is_its_toeplitz_matrix(grid):
    """Pair by pair: λ^(i−j) along an axis for tokens that are on one line along it."""
    layer, x = tpe(grid)
    at, expected = places(grid), torch.zeros_like(x)
    for axis in range(len(grid)):
        difference = at[:, None] - at[None]
        others = torch.cat([difference[..., :axis], difference[..., axis + 1 :]], -1)
        seen = (others == 0).all(-1) & (difference[..., axis] >= 0)
        for head in range(3):
            decay = layer.logits[axis, head].sigmoid()
            matrix = layer.scale[axis, head] * torch.where(seen, decay ** difference[..., axis].clamp(min=0), 0)
            expected[..., 4 * head : 4 * head + 4] += matrix @ x[..., 4 * head : 4 * head + 4]
    found = layer.filter(x, grid)
    assert (found - expected).abs().max() < 1e-11
    normed = found / (found.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm.weight
    assert (layer(x, grid) - normed @ layer.proj.weight.T).abs().max() < 1e-11


def test_tpe_is_its_convolution_by_fft():
    layer, x = tpe((70,))
    decay = layer.logits.sigmoid().repeat_interleave(4, 1)[0] ** torch.arange(70)[:, None]
    wave = torch.fft.rfft(decay * layer.scale.repeat_interleave(4, 1), 140, dim=0) * torch.fft.rfft(x, 140, dim=1)
    assert (layer.filter(x, (70,)) - torch.fft.irfft(wave, 140, dim=1)[:, :70]).abs().max() < 1e-11


@pytest.mark.parametrize("grid", GRIDS)
def test_tpe_without_memory_scales_each_token(grid):
    layer, x = tpe(grid)
    layer.logits.data.fill_(-60)
    assert (layer.filter(x, grid) - layer.scale.sum(0).repeat_interleave(4) * x).abs().max() < 1e-12


def test_tpe_learns():
    layer, x = tpe((5, 7))
    layer(x, (5, 7)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().min() > 0 for p in (layer.logits, layer.scale))
    assert torch.autograd.gradcheck(lambda a: torch.func.functional_call(layer, {"logits": a}, (x[:1, :6], (2, 3))), layer.logits)


def scores(grid, start, extra=0, theta=None, head_dim=8):
    """Scores of a constant query and constant weights, up to 1/N: cosines summed over channels, of a grid moved by `start`."""
    whole = md_lrpe([side + first for side, first in zip(grid, start)], head_dim, extra=extra, theta=theta)
    at = places([side + first for side, first in zip(grid, start)])
    kept = torch.cat([torch.ones(extra, dtype=torch.bool), (at >= torch.tensor(start)).all(-1)])
    cos, sin = whole.cos[kept], whole.sin[kept]
    return cos @ cos.T + sin @ sin.T


@pytest.mark.parametrize("grid", [(9,), (3, 5), (2, 3, 4)])
def test_lrpe_is_relative_along_each_axis(grid):
    theta = torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001], dtype=torch.float64)[: -(-8 // len(grid))]
    here = scores(grid, [0] * len(grid), theta=theta)
    for axis in range(len(grid)):
        moved = scores(grid, [3 if i == axis else 0 for i in range(len(grid))], theta=theta)
        assert (moved - here).abs().max() < 1e-12
    at = places(grid)
    expected = torch.cat([(at[:, None] - at[None])[..., axis, None] * theta for axis in range(len(grid))], -1)[..., :8].cos().sum(-1)
    assert (here - expected).abs().max() < 1e-12 and (here - 8).abs().max() > 0.5


def test_lrpe_frequencies_and_cut():
    """Five channels an axis for three axes of fourteen: the last axis has one less."""
    rotary = md_lrpe((1, 2, 3), 14)
    theta = 10000.0 ** (-2 * torch.arange(5) / 5)
    assert torch.allclose(torch.atan2(rotary.sin, rotary.cos)[5], torch.cat([0 * theta, theta, ((2 * theta)[:4])]), atol=1e-6)


def test_extra_tokens_have_angle_zero():
    rotary = md_lrpe((2, 3), 8, extra=2)
    assert rotary.tokens == 8 and (rotary.cos[:3] == 1).all() and (rotary.sin[:3] == 0).all() and (rotary.sin[3:] != 0).any(-1).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [(11,), (3, 4), (2, 2, 3)])
def test_lightnet_with_lrpe_is_its_explicit_scores(grid, causal):
    """o_i = Σ_c silu(q_ic) Σ_j W_jc cos(Θ_ic − Θ_jc) v_j, and with θ = 0 the same without positions."""
    torch.manual_seed(0)
    tokens, extra = len(places(grid)) + 1, 1
    q, k, v = (torch.randn(2, tokens, 2, 8, dtype=torch.float64) for _ in range(3))
    rotary = md_lrpe(grid, 8, extra=extra)
    module = subquad.attention("lightnet", 2, 8, causal=causal, lrpe="cosine")
    count = -(-8 // len(grid))
    angle = torch.cat([place[:, None] * 10000.0 ** (-2 * torch.arange(count) / count) for place in places(grid).T], -1)[:, :8]
    angle = torch.cat([torch.zeros(1, 8), angle])
    weights = k[:, None].expand(-1, tokens, -1, -1, -1)
    if causal:
        weights = weights.masked_fill(torch.ones(tokens, tokens).triu(1).bool()[..., None, None], -torch.inf)
    apart = (angle[:, None] - angle[None]).double().cos()[None, :, :, None]
    score = (silu(q)[:, :, None] * weights.softmax(2) * apart).sum(-1)
    assert (module(q, k, v, rotary=rotary) - torch.einsum("bnmh,bmhv->bnhv", score, v)).abs().max() < 1e-5  # float32 angles
    still = md_lrpe(grid, 8, extra=extra, theta=torch.zeros(count))
    assert (module(q, k, v, rotary=still) - module(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "argument, use",
    [
        ("head_dim", lambda: md_lrpe((3,), 7)),
        ("grid", lambda: md_lrpe((), 8)),
        ("grid", lambda: md_lrpe((3, 0), 8)),
        ("extra", lambda: md_lrpe((3,), 8, extra=-1)),
        ("theta", lambda: md_lrpe((3, 3), 8, theta=torch.ones(8))),
        ("heads", lambda: MDTPE(10, 3, 1)),
        ("axes", lambda: MDTPE(9, 3, 0)),
        ("grid", lambda: MDTPE(9, 3, 2)(torch.zeros(1, 6, 9), (2, 2))),
        ("grid", lambda: MDTPE(9, 3, 2)(torch.zeros(1, 6, 9), (6,))),
        ("x", lambda: MDTPE(9, 3, 1)(torch.zeros(1, 6, 8), (6,))),
    ],
)
def test_refuses(argument, use):
    with pytest.raises(InputError) as error:
        use()
    assert error.value.argument == argument
