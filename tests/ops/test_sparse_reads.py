"""column_mass, block_max and block_mean against their quadratic definitions, and what these imply."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subquad import InputError
from subquad.ops.sparse import Layout, block_max, block_mean, column_mass, sparse_attention
from subquad.ops.sparse.reference import block_max_reference, block_mean_reference, column_mass_reference
from subquad.ops.sparse.rules import Window

F64 = torch.float64
READS = {
    "mass": (column_mass, column_mass_reference),
    "max": (block_max, block_max_reference),
    "mean": (block_mean, block_mean_reference),
}


def make(b, n, h, d, *, m=None, hk=None, dtype=F64, seed=0):
    torch.manual_seed(seed)
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in ((b, n, h, d), (b, m or n, hk or h, d)))


def compare(read, inputs, layout, *, extra=(), **options):
    """Values and every gradient, with unequal weights."""
    fast, slow = (f(*inputs, layout, **options) for f in READS[read])
    empty = slow.isinf()
    assert fast.shape == slow.shape and torch.equal(fast.isinf(), empty)
    torch.testing.assert_close(fast[~empty], slow[~empty], rtol=1e-10, atol=1e-10)
    weight = torch.randn(slow.shape, generator=torch.Generator().manual_seed(7), dtype=slow.dtype)
    wrt = [*inputs, *extra]
    got, want = (torch.autograd.grad((x.masked_fill(empty, 0) * weight).sum(), wrt, allow_unused=True) for x in (fast, slow))
    for i, (x, y) in enumerate(zip(got, want)):
        torch.testing.assert_close(x, torch.zeros_like(wrt[i]) if y is None else y, rtol=1e-10, atol=1e-10, msg=lambda t, i=i: f"{i}: {t}")
    with torch.no_grad():  # another way through
        torch.testing.assert_close(READS[read][0](*inputs, layout, **options), fast, rtol=1e-12, atol=1e-12)
    return fast


def options_of(read, block=(16, 24)):
    return {} if read == "mass" else {"block": block}


def drawn(*shape, seed=5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = {
    "dense": lambda: Layout.dense(70, 90),
    "causal": lambda: Layout.causal(70, 90),
    "window and sinks": lambda: Layout.window(70, 20, 3, m=90),
    "terrace": lambda: Layout.terrace(70, 16, m=90),
    "strided": lambda: Layout.strided(70, 3, block=8, m=90),
    "lists": lambda: Layout.from_block_mask(drawn(2, 5, 6) > 0.5, (16, 16), n=70, m=90),
    "lists with a rule": lambda: Layout.from_block_mask(drawn(4, 5, 6) > 0.3, (16, 16), n=70, m=90, rule=Window(40, 3)),
    "lists for rows": lambda: Layout.from_block_mask(drawn(2, 1, 5, 3) > 0.3, (16, 32), n=70, m=90),
    "single keys": lambda: Layout.from_indices((drawn(1, 2, 9, 12) * 90).int(), 90, n=70, block=8),
    "bitmaps": lambda: Layout.from_predicate(lambda i, j: (i * 7 + j * 3) % 11 < 4, 70, 90, 16),
    "chosen on the device": lambda: Layout.from_blocks(
        torch.arange(6).int().expand(1, 1, 5, 6).contiguous(), torch.tensor([[[0, 6, 2, 1, 3]]]).int(), (16, 16), n=70, m=90
    ),
    "per head": lambda: Layout.per_head([Layout.causal(70, 90), Layout.window(70, 9, m=90)]),
    "per row": lambda: Layout.per_batch([Layout.window(70, 9, m=90), Layout.from_block_mask(drawn(5, 6) > 0.5, 16, n=70, m=90)]),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, read):
    compare(read, make(2, 70, 4, 5, m=90, hk=2), LAYOUTS[name](), **options_of(read))


@pytest.mark.parametrize("read", ["max", "mean"])
@pytest.mark.parametrize("block", [(1, 1), (7, 5), (16, 16), (32, 8), (200, 300), (64, 1), (128, 64)])
@pytest.mark.parametrize("name", ["causal", "window and sinks", "lists", "single keys"])
def test_any_block(name, block, read):
    compare(read, make(2, 70, 2, 3, m=90), LAYOUTS[name](), block=block)


@pytest.mark.parametrize("read", READS)
def test_grids(read):
    for layout in (Layout.neighborhood((9, 14), (4, 5), stride=(2, 1)), Layout.circle((9, 14), 3.2)):
        compare(read, make(2, 126, 2, 4), layout, **options_of(read, (14, 20)))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("hq, hk", [(6, 2), (6, 1), (2, 6), (1, 3)])
def test_grouped_heads(hq, hk, read):
    for layout in (Layout.window(40, 9), Layout.from_block_mask(drawn(5, 5) > 0.4, 8)):
        assert compare(read, make(2, 40, hq, 4, hk=hk), layout, **options_of(read, (8, 8))).shape[1] == max(hq, hk)


@pytest.mark.parametrize("read", READS)
def test_packed_sequences(read):
    cu = torch.tensor([0, *itertools.accumulate([50, 0, 1, 130, 19])], dtype=torch.int32)
    for layout in (Layout.causal(200), Layout.window(200, 20, 3), Layout.from_block_mask(drawn(2, 13, 13) > 0.5, 16, n=200, m=200)):
        compare(read, make(1, 200, 2, 4), layout, cu_seqlens=cu, **options_of(read, (32, 16)))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["causal", "window and sinks", "lists with a rule"])
def test_explicit_positions(name, read):
    k_pos = torch.arange(90) + torch.tensor([[180], [120]])
    k_pos[0, 3:40] = -1
    q_pos = torch.arange(70) + torch.tensor([[200], [140]])
    q_pos[1, 60] = -1  # sees nothing
    inputs = make(2, 70, 4, 4, m=90)
    compare(read, inputs, LAYOUTS[name](), q_pos=q_pos, k_pos=k_pos, scale=0.7, **options_of(read))
    compare(read, inputs, LAYOUTS[name](), k_pos=k_pos[0], **options_of(read))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", ["causal", "lists", "per head"])
def test_small_budgets(name, read, monkeypatch):
    from subquad.ops.sparse import tiles

    monkeypatch.setitem(tiles.BUDGET, "cpu", 1)
    compare(read, make(2, 70, 4, 5, m=90, hk=2), LAYOUTS[name](), **options_of(read))


# ---- what the definitions imply ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "lists", "single keys", "per head"])
def test_mass_sums_to_the_rows_that_see_a_key(name):
    q, k = make(2, 70, 4, 5, m=90)
    layout = LAYOUTS[name]()
    mask = layout.to_mask()
    seeing = mask.any(-1).double().expand(2, 4, 70) if mask.dim() == 2 else mask.any(-1).double()
    seeing = seeing if seeing.shape[-2] == 4 else seeing.expand(2, -1, -1).repeat_interleave(2, 1)
    torch.testing.assert_close(column_mass(q, k, layout).sum(-1), seeing.sum(-1).expand(2, 4))


def test_mass_is_attention_to_values_of_one():
    """Attention to the unit vector of key j, summed over queries, is the mass of key j."""
    q, k = make(1, 30, 2, 4)
    o = sparse_attention(q, k, torch.eye(30, dtype=F64).view(1, 30, 1, 30), Layout.window(30, 9, 2))
    torch.testing.assert_close(column_mass(q, k, Layout.window(30, 9, 2)), o.sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["causal", "window and sinks", "lists"])
def test_given_lse(name):
    """With the lse of these scores the value is the same; the gradient then has one more input, and rows at −inf give nothing."""
    q, k = make(2, 70, 4, 5, m=90)
    layout = LAYOUTS[name]()
    lse = sparse_attention(q, k, k, layout, return_lse=True)[1]
    torch.testing.assert_close(column_mass(q, k, layout, lse=lse), column_mass(q, k, layout), rtol=1e-10, atol=1e-10)
    wide = torch.randn(2, 70, 4, dtype=F64)
    wide[0, 3], wide[1, 69, 2] = -torch.inf, -torch.inf
    compare("mass", (q, k), layout, lse=wide.requires_grad_(), extra=[wide])
    fixed = column_mass(q, k, layout, lse=lse.detach())
    through, whole = (torch.autograd.grad((x * x).sum(), q)[0] for x in (column_mass(q, k, layout, lse=lse), column_mass(q, k, layout)))
    torch.testing.assert_close(through, whole, rtol=1e-10, atol=1e-10)
    assert (torch.autograd.grad((fixed * fixed).sum(), q)[0] - whole).abs().max() > 1e-3


def test_mass_of_the_last_queries_over_all_keys():
    """A segment of queries with the lse of the whole: the masses of segments add up."""
    q, k = make(1, 60, 2, 4)
    whole = column_mass(q, k, Layout.causal(60))
    parts = [column_mass(q[:, a:b], k[:, :b], Layout.causal(b - a, b)) for a, b in ((0, 13), (13, 52), (52, 60))]
    for b, part in zip((13, 52, 60), parts):
        whole = torch.cat([whole[..., :b] - part, whole[..., b:]], -1)
    assert whole.abs().max() < 1e-12


def test_whole_blocks_have_the_product_of_their_means():
    q, k = make(1, 64, 2, 4)
    mean, top = (f(q, k, Layout.causal(64), block=8) for f in (block_mean, block_max))
    pooled = torch.einsum("bihd,bjhd->bhij", *(x.unflatten(1, (8, 8)).mean(2) for x in (q, k))) / 2
    below = torch.ones(8, 8).tril(-1).bool()
    torch.testing.assert_close(mean[..., below], pooled[..., below], rtol=1e-12, atol=1e-12)
    assert (mean[..., torch.ones(8, 8).triu(1).bool()] == -torch.inf).all()
    assert (top >= mean).all() and (top[..., below] > mean[..., below]).all()


def test_a_tie_gives_its_gradient_once():
    q = torch.ones(1, 8, 1, 2, dtype=F64, requires_grad=True)
    k = torch.zeros(1, 8, 1, 2, dtype=F64, requires_grad=True)
    top = block_max(q, k, Layout.dense(8), block=4, scale=1.0)
    (dk,) = torch.autograd.grad(top.sum(), k)
    assert dk[0, :, 0, 0].sum() == 4 and dk[0, :4, 0, 0].sum() == 2


def test_the_layout_names_the_blocks_where_none_are_given():
    q, k = make(1, 70, 2, 4, m=90)
    layout = LAYOUTS["lists for rows"]
    q, k = (x.expand(2, -1, -1, -1) for x in (q, k))
    top = block_max(q, k, layout())
    assert top.shape == (2, 2, 5, 3)
    assert torch.equal(top > -torch.inf, (drawn(2, 1, 5, 3) > 0.3).expand(2, 2, 5, 3))


# ---- memory, precision, ends ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", ["causal", "window", "lists"])
def test_no_map_is_formed(kind, read, monkeypatch):
    """4,096 tokens: nothing larger than a tile of queries against all keys exists, forwards and backwards."""
    from subquad.ops.sparse import tiles

    monkeypatch.setitem(tiles.BUDGET, "cpu", 1 << 16)
    n = 4096
    layout = {
        "causal": lambda: Layout.causal(n),
        "window": lambda: Layout.window(n, 256),
        "lists": lambda: Layout.from_block_mask(torch.ones(64, 64).tril().bool(), 64),
    }[kind]()
    q, k = make(1, n, 2, 8, dtype=torch.float32)
    with Largest() as seen:
        out = READS[read][0](q, k, layout, **options_of(read, (64, 64)))
        out.masked_fill(out.isinf(), 0).sum().backward()
    tile = 128 * n if kind != "window" else 128 * (256 + 128 + 64)
    assert seen.elements <= max(tile, 2 * n * 16)  # a head's whole map has 4096 · 4096; q, k and what is kept have 2 · n · 8


@pytest.mark.parametrize("read", READS)
def test_half_precision_computes_in_float32(read):
    q, k = make(1, 100, 2, 16, dtype=torch.bfloat16)
    fast = READS[read][0](q, k, Layout.window(100, 30), **options_of(read))
    slow = READS[read][1](q.double(), k.double(), Layout.window(100, 30), **options_of(read))
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(fast.masked_fill(fast.isinf(), 0).sum(), q)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("read", READS)
def test_large_scores_and_empty_rows_are_finite(read):
    q, k = make(2, 64, 2, 8, dtype=torch.float32)
    q, k = ((x * 1e4).detach().requires_grad_() for x in (q, k))
    mask = torch.ones(8, 8).tril().bool()
    mask[3] = False
    out = READS[read][0](q, k, Layout.from_block_mask(mask, 8), **options_of(read, (8, 8)))
    out = out.masked_fill(out == -torch.inf, 0)
    grads = torch.autograd.grad(out.sum(), (q, k))
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads) and (grads[0][:, 24:32] == 0).all()


@pytest.mark.parametrize("read", READS)
def test_empty_inputs(read):
    for b, n, m in ((2, 0, 9), (0, 8, 8), (2, 0, 0)):
        q, k = make(b, n, 2, 4, m=m) if m else make(b, n, 2, 4)
        out = READS[read][0](q, k, Layout.causal(n, m), **options_of(read, (4, 4)))
        assert out.shape == ((b, 2, m) if read == "mass" else (b, 2, -(-n // 4), -(-m // 4)))
        assert (out == 0).all() and torch.autograd.grad(out.sum(), q)[0].shape == q.shape


@pytest.mark.parametrize("read", READS)
def test_traced_without_breaks(read):
    q, k = make(1, 100, 4, 8, hk=2, dtype=torch.float32)

    def run(q, k):
        return READS[read][0](q, k, Layout.window(100, 30, 2), **options_of(read, (50, 25)))

    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k), run(q, k)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x.masked_fill(x.isinf(), 0).square().sum(), (q, k)) for x in (got, want)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "argument, read, change",
    [
        ("layout", "mass", {"layout": Layout.causal(7)}),
        ("layout", "max", {"layout": "causal"}),
        ("lse", "mass", {"lse": torch.zeros(1, 2, 8)}),
        ("block", "mean", {"block": 0}),
        ("block", "max", {"block": (4, 2.0)}),
        ("q_pos", "mean", {"q_pos": torch.zeros(8)}),
        ("cu_seqlens", "mass", {"cu_seqlens": torch.tensor([0, 9])}),
        ("k", "max", {"k": torch.zeros(1, 8, 2, 5, dtype=F64)}),
        ("q", "mean", {"k": torch.zeros(1, 8, 3, 4, dtype=F64)}),
    ],
)
def test_bad_input_names_the_argument(argument, read, change):
    q, k = make(1, 8, 2, 4)
    given = {"q": q, "k": k, "layout": Layout.causal(8), **change}
    with pytest.raises(InputError) as error:
        READS[read][0](given.pop("q"), given.pop("k"), given.pop("layout"), **given)
    assert error.value.argument == argument and "\n" not in str(error.value)
