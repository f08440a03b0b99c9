"""Layouts held as lists: predicates, single keys, runs, blocks, algebra, parts, FlexAttention's form, and what is shown of them."""

import pytest
import torch
from ops.test_layout_rules import check

from subquad import InputError
from subquad.ops.sparse import Layout, RelativeBias, sparse_attention, sparse_attention_reference
from subquad.ops.sparse.lists import pack, unpack
from subquad.ops.sparse.rules import Causal, Window


def random(*shape, seed=0, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 100])
def test_bitmaps_round_trip(keys):
    mask = random(5, keys)
    assert torch.equal(unpack(pack(mask), keys), mask) and pack(mask).dtype == torch.int32


@pytest.mark.parametrize("lead", [(), (2,), (2, 1), (2, 2)])
@pytest.mark.parametrize("block", [16, (8, 40)])
def test_predicates(lead, block, monkeypatch):
    from subquad.ops.sparse import lists

    monkeypatch.setattr(lists, "AT_ONCE", 3000)  # several pieces
    want = random(*lead, 70, 90, share=0.1)
    want[..., 16:32, 32:64] = True
    want[..., 40:64, :] = False
    layout = Layout.from_predicate(lambda i, j: want[..., i[:, 0], :][..., j], 70, 90, block)
    assert torch.equal(layout.to_mask(), want.squeeze(0) if lead == (1,) else want)
    assert layout.index.dtype == layout.counts.dtype == layout.bits.dtype == layout.bit_index.dtype == torch.int32
    assert layout.density == pytest.approx(want.double().mean().item())
    check(layout, heads=4, batch=2)


def test_a_predicate_holds_its_blocks_alone():
    layout = Layout.from_predicate(lambda i, j: (j <= i) & (j > i - 64), 4096, block=64)
    assert list(layout.index.shape) == [1, 1, 64, 2] and list(layout.bits.shape) == [2, 64, 2], "equal bitmaps are held once"
    assert torch.equal(layout.to_mask(), Layout.window(4096, 64).to_mask())


def test_whole_blocks_of_a_predicate_take_no_mask():
    from subquad.ops.sparse.tiles import Problem

    layout = Layout.from_predicate(lambda i, j: j <= i, 256, block=64)
    assert (layout.bit_index < 0).sum() == 6 + 6  # below the diagonal, and what stands behind the lists' ends
    problem = Problem(layout, 1, 1, 1, 1, torch.float64, torch.device("cpu"))
    assert sum(columns.stop - columns.start for tile in problem.tiles() for columns, _ in tile.masks) == 4 * 64


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("block,m", [(1, 60), (8, 75)])
def test_single_keys(lead, block, m):
    n, rows = 60, -(-60 // block)
    index = torch.randint(-3, m + 2, (*lead, rows, 9), generator=torch.Generator().manual_seed(1))
    index[..., 4, :] = -1
    layout = Layout.from_indices(index, m, n=n, block=block)
    want = torch.zeros(*lead, n, m, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(x) for x in (*lead, n))).tolist():
        named = index[b, h, i // block]
        want[b, h, i, named[(named >= 0) & (named < m)]] = True
    assert torch.equal(layout.to_mask().expand_as(want), want)
    check(layout, heads=4, batch=2)
    check(Layout.from_indices(index, m, n=n, block=block, rule=Causal()), heads=4, batch=2)


@pytest.mark.parametrize("lead", [(1, 1), (2, 4)])
@pytest.mark.parametrize("capacity", [None, 9])
def test_runs(lead, capacity):
    n, m, block = 60, 70, (16, 8)
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(0, m, (*lead, 4, 3), generator=generator)
    stops = (starts + torch.randint(-5, 30, starts.shape, generator=generator)).clamp(max=m)
    layout = Layout.from_runs(starts, stops, m, n=n, block=block, capacity=capacity)
    want = torch.zeros(*lead, n, m, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(x) for x in (*lead, n))).tolist():
        for r in range(3):
            want[b, h, i, starts[b, h, i // 16, r] : max(stops[b, h, i // 16, r], starts[b, h, i // 16, r])] = True
    assert torch.equal(layout.to_mask().expand_as(want), want)
    check(layout, heads=4, batch=2)
    check(Layout.from_runs(starts, stops, m, n=n, block=block, rule=Window(20)), heads=4, batch=2)


MADE = {
    "causal": lambda: Layout.causal(60), "power": lambda: Layout.power(60, block=4),
    "blocks": lambda: Layout.from_block_mask(random(4, 4), 16, n=60, m=60, rule=Window(30)),
    "per head": lambda: Layout.from_block_mask(random(2, 8, 4), (8, 16), n=60, m=60),
    "predicate": lambda: Layout.from_predicate(lambda i, j: (i + j) % 5 == 0, 60, block=16),
    "keys": lambda: Layout.from_indices(torch.randint(-1, 60, (1, 1, 60, 5), generator=torch.Generator().manual_seed(0))),
    "runs": lambda: Layout.from_runs(torch.tensor([[[[0], [9], [20], [0]]]]), torch.tensor([[[[5], [30], [55], [0]]]]), n=60, block=16),
    "parts": lambda: Layout.per_head([Layout.window(60, 9), Layout.strided(60, 2, block=8)]),
}  # fmt: skip


@pytest.mark.parametrize("a", MADE)
@pytest.mark.parametrize("b", MADE)
def test_algebra(a, b):
    x, y = MADE[a](), MADE[b]()
    for got, want in ((x | y, x.to_mask() | y.to_mask()), (x & y, x.to_mask() & y.to_mask())):
        assert torch.equal(got.to_mask().expand_as(want), want)
    check(x | y, heads=2)
    check(x & y, heads=2)


def test_algebra_of_rules_stays_a_rule():
    layout = Layout.power(1 << 20) | Layout.window(1 << 20, 512)
    assert layout.index is None and (layout | layout).inner == layout.inner


def test_parts():
    heads = [Layout.window(50, 9), Layout.from_predicate(lambda i, j: (i + j) % 3 == 0, 50, block=16)]
    rows = [Layout.per_head(heads), Layout.causal(50)]
    mask = torch.stack([layout.to_mask() for layout in heads])
    assert torch.equal(Layout.per_head(heads).to_mask(), mask)
    assert torch.equal(Layout.per_batch(rows).to_mask(), torch.stack([mask, rows[1].to_mask().expand(2, -1, -1)]))
    for layout, batch in ((Layout.per_head(heads), 3), (Layout.per_batch(rows), 2)):
        check(layout, heads=4, batch=batch)
        assert layout.density == pytest.approx(layout.to_mask().double().mean().item())
        for hq, hk, hv in ((4, 2, 2), (4, 1, 1), (2, 4, 1), (12, 3, 6)):
            torch.manual_seed(0)
            q, k, v = (torch.randn(batch, 50, h, 4, dtype=torch.float64) for h in (hq, hk, hv))
            h = max(hq, hk)
            biases = (
                None, torch.rand(h).double(), torch.randn(50, 50).double(), torch.randn(batch, h, 50, 50).double(),
                RelativeBias(torch.randn(h, 9).double()), (torch.randn(batch, 50, h, 2).double(), torch.randn(1, 50, 1, 2).double()),
            )  # fmt: skip
            for bias in biases:
                options = {
                    "bias": bias,
                    "key_bias": torch.randn(batch, 1, 50).double(),
                    "q_pos": torch.arange(50) + torch.zeros(batch, 1).long(),
                }
                got = sparse_attention(q, k, v, layout, return_lse=True, return_max=True, **options)
                for x, want in zip(got, sparse_attention_reference(q, k, v, layout, **options)):
                    torch.testing.assert_close(x, want, rtol=1e-10, atol=1e-10)


def random_blocks(batch=2, heads=2, blocks=6, capacity=3):
    """A selection as a mechanism makes it: the best blocks of each block of queries by random scores."""
    scores = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(0))
    counts = (scores[..., 0] * (capacity + 1)).to(torch.int32).clamp(max=capacity)
    return scores.topk(capacity, dim=-1).indices.to(torch.int32), counts


def test_a_selection_on_the_device_is_never_read(monkeypatch):
    index, counts = random_blocks()
    index = torch.where(torch.arange(3) < counts[..., None], index, 10**6)  # what stands behind the counts does not matter
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 90, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    starts = torch.tensor([[[[0, 40], [9, 9], [20, 80]]]])

    def run():
        made = (
            Layout.from_blocks(index, counts, 16, n=90), Layout.from_blocks(index, counts, 16, n=90, rule=Causal()),
            Layout.from_indices(index, 90, n=90, block=16), Layout.from_runs(starts, starts + 12, n=90, block=32, capacity=3),
        )  # fmt: skip
        for layout in made:
            o, _ = sparse_attention(q, k, v, layout, return_lse=True)
            torch.autograd.grad(o.sum(), (q, k, v))
            yield layout, o

    def read(*_):
        raise AssertionError("a tensor is read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(torch.Tensor, name, read)
        found = list(run())
    for layout, o in found:
        torch.testing.assert_close(o, sparse_attention_reference(q, k, v, layout)[0], rtol=1e-10, atol=1e-10)
        check(layout, batch=2)


@pytest.mark.parametrize("name", MADE)
def test_flex_round_trip(name):
    from torch.nn.attention.flex_attention import create_mask

    layout = MADE[name]()
    flex = layout.to_flex(heads=4, block=32)
    want = layout.to_mask()
    assert torch.equal(create_mask(flex.mask_mod, 1, 4, 60, 60, device="cpu")[0], want.expand(2, 60, 60).repeat_interleave(2, 0))
    back = Layout.from_flex(flex)
    assert torch.equal(back.to_mask(), want.expand(2, 60, 60).repeat_interleave(2, 0)) and (back.block_q, back.block_k) == (32, 32)


def test_flex_of_batch_rows():
    index, counts = random_blocks()
    layout = Layout.from_blocks(index, counts, 16, n=90)
    assert torch.equal(Layout.from_flex(layout.to_flex(heads=2, block=16)).to_mask(), layout.to_mask())
    with pytest.raises(InputError, match="heads"):
        layout.to_flex(heads=3)


def reached(layout, layers):
    """By powers of the mask, over all heads: what each query has reached."""
    step = layout.to_mask().reshape(-1, layout.n, layout.n).any(0).double()
    total = torch.zeros_like(step)
    power = torch.eye(layout.n, dtype=torch.double)
    for layer in range(layers):
        power = (power @ step).clamp(max=1)
        total = power if layer == 0 else (total + power).clamp(max=1)
    return (total > 0).sum(1) if layers else torch.ones(layout.n, dtype=torch.long)


@pytest.mark.parametrize("name", MADE)
def test_reach_by_enumeration(name):
    layout = MADE[name]()
    for layers in (0, 1, 2, 3, 20):
        want = reached(layout, layers).tolist()
        assert [layout.reach(layers, query=i) for i in (0, 17, 31, -1)] == [want[i] for i in (0, 17, 31, -1)]


@pytest.mark.parametrize("block", [1, 4])
def test_power_reaches_two_to_the_layers(block):
    layout = Layout.power(64 * block, window=1, block=block)
    for layers in range(1, 8):
        distances = {0}
        for _ in range(layers):
            distances |= {d + (1 << x) for d in distances for x in range(6) if d + (1 << x) < 64}
        assert set(range(min(1 << layers, 64))) <= distances
        assert layout.reach(layers) == block * len(distances) >= block * min(1 << layers, 64)
    assert Layout.window(64, 3).reach(4) == 4 * 2 + 1


def test_explain_of_lists_and_heads():
    layout = MADE["parts"]()
    assert layout.explain(40, head=0).runs == ((32, 41),)
    assert layout.explain(20, head=1).runs == ((0, 8), (16, 21))
    assert MADE["runs"]().explain(17).runs == ((9, 30),)
    assert "0 of 60" in str(MADE["runs"]().explain(59))
    assert "rows" not in repr(MADE["keys"]()) and "heads" in repr(layout)


GRIDS = [lambda: Layout.neighborhood((6, 10), 3), lambda: Layout.circle((3, 4, 5), 2), lambda: Layout.neighborhood(60, 7)]


@pytest.mark.parametrize("make", [*MADE.values(), *GRIDS])
def test_plots(make):
    from subquad.ops.sparse.show import blocks

    layout = make()
    figure = layout.plot()
    assert len(figure.axes) == (3 if "grid" in repr(layout) else 2)
    part = layout.parts[0] if layout.parts else layout
    mask = part.to_mask().reshape(-1, 60, 60)[0]
    assert blocks(part).shape[0] == 60 and torch.equal(blocks(part), mask.float())


@pytest.mark.parametrize(
    "argument,make",
    [
        ("index", lambda: Layout.from_indices(torch.zeros(4, 3, dtype=torch.long))),
        ("index", lambda: Layout.from_blocks(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4), 16)),
        ("counts", lambda: Layout.from_blocks(torch.zeros(1, 1, 4, 3, dtype=torch.int32), torch.zeros(1, 1, 3), 16)),
        ("counts", lambda: Layout.from_blocks(torch.zeros(1, 1, 4, 3, dtype=torch.int32), torch.zeros(1, 1, 4), 16)),
        ("n", lambda: Layout.from_indices(torch.zeros(1, 1, 4, 3, dtype=torch.int32), n=9, block=2)),
        ("stops", lambda: Layout.from_runs(torch.zeros(1, 1, 4, 3, dtype=torch.int32), torch.zeros(1, 1, 4, 2, dtype=torch.int32))),
        ("capacity", lambda: Layout.from_runs(*[torch.zeros(1, 1, 4, 3, dtype=torch.int32)] * 2, capacity=-1)),
        ("mask", lambda: Layout.from_flex(torch.ones(4, 4))),
        ("layouts", lambda: Layout.per_head([MADE["per head"]()])),
    ],
)
def test_bad_arguments_are_named(argument, make):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.argument == argument
