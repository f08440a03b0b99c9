"""The sparse mechanisms on weights `[N, N]` of one head: who sees whom, and what their papers say of it."""

import pytest
import torch

import subquad
from subquad import InputError
from subquad.ops.merge import merge
from subquad.ops.sparse import Layout, sparse_attention
from subquad.ops.sparse.layout import segments


def rows(name, n, heads=1, *, grid=None, **options):
    """The weights ``[heads, N, N]``: values are unit vectors."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, n, heads, 8, dtype=torch.float64) for _ in range(2))
    v = torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, heads, n)
    module = subquad.attention(name, heads, 8, value_dim=n, **options)
    o = module(q, k, v, **({} if grid is None else {"grid": grid}))
    torch.testing.assert_close(o, subquad.reference(name)(module, q, k, v, **({} if grid is None else {"grid": grid})))
    return o[0].transpose(0, 1)


@pytest.mark.parametrize("grid", [(30,), (6, 9), (9, 6), (3, 5, 4)])
@pytest.mark.parametrize("options", [
    {"window": 3}, {"window": 4, "stride": 2}, {"window": 3, "dilation": 2}, {"window": (5,), "stride": (4,)}, {"window": 99, "stride": 99}
])  # fmt: skip
def test_neighborhood_on_grids(grid, options):
    n = torch.Size(grid).numel()
    weights = rows("neighborhood", n, grid=grid, **options)[0]
    seen = (weights > 0).sum(1)
    assert (seen == seen[0]).all(), "windows keep their size at the borders"


def test_neighborhood_takes_one_number_an_axis():
    weights = rows("neighborhood", 60, grid=(3, 4, 5), window=(1, 2, 3), stride=(1, 2, 1))[0]
    assert ((weights > 0).sum(1) == 6).all()
    with pytest.raises(InputError, match="window"):
        rows("neighborhood", 60, grid=(6, 10), window=(1, 2, 3))
    with pytest.raises(InputError, match="stride"):
        subquad.attention("neighborhood", 1, 8, stride=0)


def test_a_stride_of_the_window_is_blocked_attention():
    weights = rows("neighborhood", 64, grid=(8, 8), window=4, stride=4)[0]
    block = torch.arange(8) // 4
    same = (block[:, None] == block).int()
    assert torch.equal(weights > 0, torch.kron(same, same).bool())


@pytest.mark.parametrize("grid", [(5, 11), (11, 5), (3, 4, 5)])
def test_clear_sees_a_disc(grid):
    n = torch.Size(grid).numel()
    assert torch.equal(rows("clear", n, grid=grid, radius=2.5)[0] > 0, Layout.circle(grid, 2.5).to_mask())
    assert torch.equal(rows("clear", n, grid=grid, radius=1)[0], torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("grid", [(5, 11), (11, 5)])
def test_clear_joins_image_and_text(grid, first):
    """The image's rows are the disc merged with the text by their log-sum-exp; the text's are plain attention to all."""
    torch.manual_seed(0)
    n, text = 55, 7
    module = subquad.attention("clear", 2, 8, kv_heads=1, radius=2.5, text_tokens=text, text_first=first)
    x = [torch.randn(2, n + text, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    o = module(*x, grid=grid)
    image, words = (slice(text, None), slice(0, text)) if first else (slice(0, n), slice(n, None))
    q, k, v = (t.repeat_interleave(2 // t.shape[2], 2) for t in x)
    disc = sparse_attention(q[:, image], k[:, image], v[:, image], Layout.circle(grid, 2.5), return_lse=True)
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k[:, words]) * 8**-0.5
    read = torch.einsum("bnhm,bmhd->bnhd", scores.softmax(-1), v[:, words]), scores.logsumexp(-1)
    joined = merge([disc, (read[0][:, image], read[1][:, image])])[0]
    all_of_it = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2)[:, :, words], k.transpose(1, 2), v.transpose(1, 2))
    expected = torch.empty_like(o)
    expected[:, image], expected[:, words] = joined, all_of_it.transpose(1, 2)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(o, subquad.reference("clear")(module, *x, grid=grid))
    weight = torch.randn_like(o)
    for got, want in zip(*(torch.autograd.grad((y * weight).sum(), x) for y in (o, expected))):
        torch.testing.assert_close(got, want)


def test_clear_packs_images_with_their_text():
    torch.manual_seed(0)
    module = subquad.attention("clear", 2, 8, radius=2, text_tokens=3)
    x = [torch.randn(2, 27, 2, 8, dtype=torch.float64) for _ in range(3)]
    packed = module(*(t.flatten(0, 1)[None] for t in x), grid=(4, 6), cu_seqlens=torch.tensor([0, 27, 54]))
    torch.testing.assert_close(packed[0], module(*x, grid=(4, 6)).flatten(0, 1))
    with pytest.raises(InputError, match=r"grid: got .3, 9.; expected .* beside 3 of text, 24"):
        module(*x, grid=(3, 9))


@pytest.mark.parametrize("side, radius, published", [(64, 8, 0.0635), (64, 16, 0.0866), (64, 32, 0.154), (512, 8, 3.92)])
def test_clear_costs_what_was_published(side, radius, published):
    """Tera-operations of a layer of FLUX with 512 text tokens (the paper's table), up to the discs' ragged edges."""
    flops = subquad.card("clear").flops(subquad.Shape(side * side + 512, 24, 128), radius=float(radius), text_tokens=512)
    assert flops == pytest.approx(published * 1e12, rel=0.03)


def test_clear_visits_what_it_should():
    """Pairs that are computed, of a 64 x 64 image behind 512 text tokens: the text's, and a few times the disc's."""
    seen = Layout.circle((64, 64), 8, text_tokens=512)
    image = [sum(b - a for a, b, _ in segments(seen.inner, q, q + 63, seen.m)) * 64 for q in range(512, seen.n, 64)]
    text = [sum(b - a for a, b, _ in segments(seen.inner, q, q + 63, seen.m)) * 64 for q in range(0, 512, 64)]
    assert sum(text) == 512 * seen.m
    assert sum(image) <= 4096 * (512 + 64 * 15)


def test_powerattention_reaches_two_to_the_layers():
    step = (rows("powerattention", 128, block=2, local=1, sinks=0)[0] > 0).double()
    power = torch.eye(128, dtype=torch.float64)
    for layers in range(1, 7):
        power = (power @ step).clamp(max=1)
        assert power[-1, -(2 << layers) + 1 :].all(), "every block at a distance below 2^layers"
    assert (step.sum(1) <= 2 * 8).all()


def test_s2_covers_everything():
    weights = rows("s2", 96, 4, block=4, local=1)
    assert torch.equal((weights > 0).any(0), torch.ones(96, 96, dtype=torch.bool).tril())
    assert (weights > 0).double().mean((1, 2)).std() < 0.02, "shards are equal"
    assert not (weights > 0).all(0).equal((weights > 0).any(0))
    assert subquad.attention("s2", 9, 8).shards == 3 and subquad.attention("s2", 32, 8).shards == 8
    with pytest.raises(InputError, match="stride"):
        subquad.attention("s2", 9, 8, stride=2)


def test_longformer():
    seen = rows("longformer", 60, window=8, global_tokens=2)[0] > 0
    i = torch.arange(60)
    assert torch.equal(seen, ((i[:, None] - i).abs() <= 4) | (i < 2) | (i[:, None] < 2))
    with pytest.raises(InputError, match="window"):
        subquad.attention("longformer", 1, 8, window=7)


@pytest.mark.parametrize("name", ["powerattention", "s2"])
def test_rows_of_different_length_go_on(name):
    """States of 3 and 50 tokens as one batch: each row keeps to its own positions."""
    torch.manual_seed(0)
    module = subquad.attention(name, 4, 8, kv_heads=2, block=4, local=1)
    x = [[torch.randn(1, n + 6, h, 8, dtype=torch.float64) for h in (4, 2, 2)] for n in (3, 50)]
    states = [module(*(t[:, :-6] for t in row), return_state=True)[1] for row in x]
    o = module(*(torch.cat([row[i][:, -6:] for row in x]) for i in range(3)), state=subquad.State.join(states))
    for got, row in zip(o, x):
        torch.testing.assert_close(got, module(*row)[0, -6:])
