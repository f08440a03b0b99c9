"""S2-Attention when decoding: each head keeps its own shard and the local blocks, and nothing that is seen is missing."""

import itertools

import pytest
import torch

import subquad
from subquad import State
from subquad.ops.sparse.sharded import Shards

N = 150
# heads, heads of keys, shards: as many, fewer, more, and of no common measure, where heads of keys share shards unequally
SIZES = [(4, 4, 4), (8, 8, 2), (6, 2, 6), (6, 6, 1), (4, 1, 4), (12, 4, 6), (12, 6, 4), (14, 2, 7)]
BY_SIZE = pytest.mark.parametrize("heads, kv_heads, stride", SIZES)


def make(heads, kv_heads, stride, **options):
    return subquad.attention("s2", heads, 8, kv_heads=kv_heads, stride=stride, block=4, local=2, **options)


def inputs(n, heads, kv_heads, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, n, h, 8, dtype=torch.float64, generator=generator) for h in (heads, kv_heads, kv_heads)]


def go(module, x, pieces, state=None):
    outputs = []
    for part in zip(*(t.split(pieces, 1) for t in x)):
        o, state = module(*part, state=state, return_state=True)
        outputs.append(o)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("pieces", [[1] * N, [1, 7, 70, 1, 8, 60, 3], [100, 50]], ids=["ones", "odd", "halves"])
@BY_SIZE
def test_any_split_is_one_pass(heads, kv_heads, stride, pieces):
    module, x = make(heads, kv_heads, stride), inputs(N, heads, kv_heads, 2)
    o, state = go(module, x, pieces)
    torch.testing.assert_close(o, subquad.reference("s2")(module, *x))
    shape = subquad.Shape(N, heads, 8, kv_heads=kv_heads, batch=2, itemsize=8)
    assert state.nbytes == module.card.state_bytes(shape, **module.options)


@BY_SIZE
def test_what_is_kept_is_what_may_be_read(heads, kv_heads, stride):
    """Keys hold their own position: those found in the state are the local ones and the columns of the head's own shards."""
    module, (q, _, v) = make(heads, kv_heads, stride), inputs(N, heads, kv_heads)
    k = torch.arange(1.0, N + 1, dtype=torch.float64)[None, :, None, None].expand(1, N, kv_heads, 8)
    state = go(module, (q, k, v), [60, 1, 1, 88])[1]
    old = N - 8  # all before the ring
    for head in range(kv_heads):
        mine = {h * stride // heads for h in range(heads) if h * kv_heads // heads == head}
        pairs = sorted({(h * kv_heads // heads, h * stride // heads) for h in range(heads)})
        assert set(state["k_near"][0, :, head, 0].tolist()) == {float(p + 1) for p in range(old, N)}
        for shard in mine:
            held = state["k_far"][0, :, pairs.index((head, shard)), 0].tolist()
            column = [float(p + 1) for p in range(old) if (p // 4 + shard) % stride == 0]
            assert set(column) <= set(held) and len(held) <= len(column) + 4


@BY_SIZE
def test_bytes_shrink_by_the_stride(heads, kv_heads, stride):
    shards = Shards(heads, kv_heads, stride, 64, 4)
    all_of_them, kept = 2**20 * kv_heads, shards.kept(2**20)
    assert kept / all_of_them == pytest.approx(shards.pairs / (kv_heads * stride), rel=0.01)
    if kv_heads % stride == 0:
        assert kept / all_of_them == pytest.approx(1 / stride, rel=0.01)


@BY_SIZE
def test_gradients_through_the_shards(heads, kv_heads, stride):
    module, x = make(heads, kv_heads, stride), [t.requires_grad_() for t in inputs(60, heads, kv_heads)]
    whole, parts = module(*x), go(module, x, [30, 1, 1, 20, 8])[0]
    weight = torch.randn_like(whole)
    for got, expected in zip(*(torch.autograd.grad((o * weight).sum(), x) for o in (parts, whole))):
        torch.testing.assert_close(got, expected)


def test_rows_at_other_blocks_go_on_together():
    module, lengths = make(12, 4, 6), (2, 8, 37, 90)
    rows = [inputs(n + 30, 12, 4, seed=n) for n in lengths]
    states = [module(*(t[:, :-30] for t in row), return_state=True)[1] for row in rows]
    o = go(module, [torch.cat([row[i][:, -30:] for row in rows]) for i in range(3)], [1, 20, 1, 8], State.join(states))[0]
    for got, row in zip(o, rows):
        torch.testing.assert_close(got, module(*row)[0, -30:])


def test_packed_rows_of_a_state():
    module, first, second = make(4, 2, 4), (30, 0, 70, 5), (1, 40, 0, 33)
    rows = [inputs(a + b, 4, 2, seed=a) for a, b in zip(first, second)]
    ends = [torch.tensor([0, *itertools.accumulate(n)]) for n in (first, second)]
    one, two = ([torch.cat([row[i][:, a:b] for row, a, b in zip(rows, lo, hi)], 1) for i in range(3)]
                for lo, hi in (([0] * 4, first), (first, [a + b for a, b in zip(first, second)])))  # fmt: skip
    _, state = module(*one, cu_seqlens=ends[0], return_state=True)
    o = module(*two, cu_seqlens=ends[1], state=state)
    torch.testing.assert_close(o, torch.cat([module(*row)[:, a:] for row, a in zip(rows, first)], 1))
