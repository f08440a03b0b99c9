"""sparse_attention against its dense definition, and what its definition implies."""

import itertools

import pytest
import torch

from subquad import InputError
from subquad.ops.sparse import Layout, RelativeBias, sparse_attention, sparse_attention_reference
from subquad.ops.sparse.rules import Causal, Window

F64 = torch.float64


def make(b, n, h, d, *, m=None, hk=None, hv=None, dv=None, dtype=F64, seed=0):
    torch.manual_seed(seed)
    m, hk = m or n, hk or h
    shapes = (b, n, h, d), (b, m, hk, d), (b, m, hv or hk, dv or d)
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)


def compare(inputs, layout, *, parameters=(), tolerance=1e-10, **options):
    """Outputs and every gradient, each separately, through o, lse and max with unequal weights."""
    fast = sparse_attention(*inputs, layout, return_lse=True, return_max=True, **options)
    slow = sparse_attention_reference(*inputs, layout, **options)
    wrt = [*inputs, *parameters]
    for name, a, b in zip(("o", "lse", "max"), fast, slow):
        empty = b.isinf()
        assert torch.equal(a.isinf(), empty), name
        torch.testing.assert_close(a[~empty], b[~empty], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
        weight = torch.randn(b.shape, generator=torch.Generator().manual_seed(7), dtype=b.dtype).masked_fill(empty, 0)
        got, want = (
            torch.autograd.grad((x.masked_fill(empty, 0) * weight).sum(), wrt, retain_graph=True, allow_unused=True) for x in (a, b)
        )
        for i, (x, y) in enumerate(zip(got, want)):
            x, y = (torch.zeros_like(wrt[i]) if g is None else g for g in (x, y))
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda text, n=name, i=i: f"d{n}/d input {i}: {text}")
    return fast


STATIC = {
    "dense": lambda n, m: Layout.dense(n, m),
    "causal": lambda n, m: Layout.causal(n, m),
    "window": lambda n, m: Layout.window(n, 37, m=m),
    "sinks": lambda n, m: Layout.window(n, 40, sinks=5, m=m),
    "many sinks": lambda n, m: Layout.window(n, 9, sinks=70, m=m),
    "sinks filling a block": lambda n, m: Layout.window(n, 5, sinks=64, m=m),
    "wide window": lambda n, m: Layout.window(n, 300, sinks=2, m=m),
    "terrace": lambda n, m: Layout.terrace(n, 16, m=m),
}


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("n,m", [(150, 150), (70, 203), (5, 90), (1, 130), (1, 1)])
def test_static_layouts(name, n, m):
    compare(make(2, n, 2, 4, m=m), STATIC[name](n, m))


@pytest.mark.parametrize("hq,hk,hv", [(6, 2, 2), (6, 1, 1), (6, 2, 3), (2, 6, 6), (3, 6, 2)])
@pytest.mark.parametrize("name", ["sinks", "lists"])
def test_grouped_heads(hq, hk, hv, name):
    layout = Layout.window(90, 20, 3) if name == "sinks" else Layout.from_block_mask(torch.rand(6, 3, 3) > 0.4, 32, n=90, m=90)
    compare(make(2, 90, hq, 4, hk=hk, hv=hv, dv=3), layout)


@pytest.mark.parametrize("lists", [(), (2,), (6,), (2, 1), (2, 6), (1, 3)])
@pytest.mark.parametrize("block", [(16, 32), (32, 8)])
def test_block_lists(lists, block):
    torch.manual_seed(1)
    n, m = 100, 135
    mask = torch.rand(*lists, -(-n // block[0]), -(-m // block[1])) > 0.6
    mask[..., 1, :] = False  # a block of queries that sees nothing
    mask[..., 2, :] = True  # and one that sees everything, next to it
    for rule in (None, Causal(), Window(30, 4)):
        layout = Layout.from_block_mask(mask, block, n=n, m=m, **({"rule": rule} if rule else {}))
        o, lse, _ = compare(make(2, n, 6, 4, m=m, hk=2), layout)
        assert (o[:, block[0] : 2 * block[0]] == 0).all() and (lse[:, block[0] : 2 * block[0]] == -torch.inf).all()


@pytest.mark.parametrize(
    "make_layout",
    [lambda n: Layout.dense(n), lambda n: Layout.causal(n), lambda n: Layout.window(n, 20, 3), lambda n: Layout.terrace(n, 8)],
)
def test_packed_equals_separate(make_layout):
    lengths = [50, 0, 1, 130, 19]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = make(1, 200, 4, 4, hk=2)
    o = compare((q, k, v), make_layout(200), cu_seqlens=cu)[0]
    for a, b in itertools.pairwise(cu.tolist()):
        alone = sparse_attention(q[:, a:b], k[:, a:b], v[:, a:b], make_layout(b - a))
        torch.testing.assert_close(o[:, a:b], alone, rtol=1e-12, atol=1e-12)


def test_packed_block_lists_keep_to_their_sequence():
    cu = torch.tensor([0, 33, 33, 100])
    mask = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(3)) > 0.5
    for rule in ({}, {"rule": Causal()}):
        compare(make(1, 100, 4, 4, hk=2), Layout.from_block_mask(mask, 16, n=100, m=100, **rule), cu_seqlens=cu)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("packed", [False, True])
def test_explicit_positions(name, packed):
    n, m = 150, 150 if packed else 310
    batch = 1 if packed else 2
    g = torch.Generator().manual_seed(0)
    start = torch.tensor([[200], [140]])[:batch]
    k_pos = torch.arange(m) + start - (m - n)  # right-aligned, as a streaming cache is
    k_pos[0, 3:40] = -1
    k_pos[:, :5] = torch.randint(0, 3, (batch, 5), generator=g)
    q_pos = torch.arange(n) + start
    q_pos[0, 60] = -1
    cu = torch.tensor([0, 70, 150]) if packed else None
    inputs = make(batch, n, 2, 4, m=m)
    compare(inputs, STATIC[name](n, m), q_pos=q_pos, k_pos=k_pos, cu_seqlens=cu)
    compare(inputs, STATIC[name](n, m), k_pos=k_pos[0], cu_seqlens=cu)
    compare(inputs, STATIC[name](n, m), q_pos=q_pos, cu_seqlens=cu)


@pytest.mark.parametrize("name", STATIC)
def test_few_queries_at_positions(name):
    """As in decoding: rows of different length, right-aligned; a row that has seen nothing is empty."""
    k_pos = torch.arange(40) + torch.tensor([[-40], [-3], [100]])
    q_pos = torch.arange(40, 43) + torch.tensor([[-80], [-3], [100]])
    o, _, _ = compare(make(3, 3, 4, 4, m=40, hk=2), STATIC[name](3, 40), q_pos=q_pos, k_pos=k_pos)
    assert (o[0] == 0).all() and (o[1:] != 0).all()
    compare(make(3, 3, 4, 4, m=40, hk=2), STATIC[name](3, 40), k_pos=k_pos[1])


def test_explicit_positions_with_lists():
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)) > 0.3
    layout = Layout.from_block_mask(mask, 16, n=40, m=75, rule=Window(25, 2))
    k_pos = torch.stack([torch.arange(75), torch.arange(75) - 11])
    compare(make(2, 40, 2, 4, m=75), layout, q_pos=torch.arange(40) + torch.tensor([[30], [9]]), k_pos=k_pos)


LAYOUTS = {
    "causal": lambda: Layout.causal(70, 90),
    "sinks": lambda: Layout.window(70, 20, 3, m=90),
    "lists": lambda: Layout.from_block_mask(torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(5)) > 0.4, (16, 16), n=70, m=90),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "kind", ["slopes", "table", "shared table", "factors", "shared factors", "dense", "dense per head", "dense per row", "key", "softcap"]
)
def test_biases(name, kind):
    torch.manual_seed(2)
    b, n, m, h = 2, 70, 90, 4

    def leaf(*shape):
        return torch.randn(*shape, dtype=F64, requires_grad=True)

    bias = {
        "slopes": lambda: torch.rand(h, dtype=F64).requires_grad_(),
        "table": lambda: RelativeBias(leaf(h, 31)),
        "shared table": lambda: RelativeBias(leaf(1, 301)),
        "factors": lambda: (leaf(b, n, h, 3), leaf(b, m, h, 3)),
        "shared factors": lambda: (leaf(1, n, h, 3), leaf(b, m, 1, 3)),
        "dense": lambda: leaf(n, m),
        "dense per head": lambda: leaf(h, n, m),
        "dense per row": lambda: leaf(b, 1, n, m),
        "key": lambda: leaf(b, h, m),
    }.get(kind, lambda: None)()
    parameters = (
        list(bias) if isinstance(bias, tuple) else [bias.table] if isinstance(bias, RelativeBias) else [bias] if bias is not None else []
    )
    options = {"key_bias": bias} if kind == "key" else {"bias": bias}
    if kind == "softcap":
        options = {"softcap": 1.5, "key_bias": (key := leaf(b, 1, m))}
        parameters = [key]
    compare(make(b, n, h, 4, m=m, hk=2), LAYOUTS[name](), parameters=parameters, scale=0.7, **options)


def test_key_bias_is_a_log_weight():
    """A key with log-weight log 3 counts like three copies of it, and −inf like its absence."""
    q, k, v = make(1, 5, 2, 4, m=6)
    weight = torch.tensor([1.0, 3.0, 1.0, 0.0, 2.0, 1.0], dtype=F64)
    o, lse = sparse_attention(q, k, v, Layout.dense(5, 6), key_bias=weight.log().expand(1, 2, 6), return_lse=True)
    copies = weight.long().tolist()
    again = [x.repeat_interleave(torch.tensor(copies), 1) for x in (k, v)]
    o2, lse2 = sparse_attention(q, *again, Layout.dense(5, sum(copies)), return_lse=True)
    torch.testing.assert_close(o, o2)
    torch.testing.assert_close(lse, lse2)


def test_rows_hidden_by_key_bias_are_empty_with_finite_gradients():
    q, k, v = make(2, 9, 2, 4)
    bias = torch.zeros(2, 2, 9, dtype=F64)
    bias[1] = -torch.inf
    o, lse, top = sparse_attention(q, k, v, Layout.causal(9), key_bias=bias, return_lse=True, return_max=True)
    assert (o[1] == 0).all() and (lse[1] == -torch.inf).all() and (top[1] == -torch.inf).all()
    grads = torch.autograd.grad(o.sum() + lse.exp().sum() + top[0].sum(), (q, k, v))
    assert all(g.isfinite().all() and (g[1] == 0).all() for g in grads)


@pytest.mark.parametrize("n", [1, 100])
def test_max_gradient_is_shared_among_ties(n):
    """As amax's is: each of n equal queries gives half of its gradient to each of the two keys that tie."""
    q = torch.ones(1, n, 1, 2, dtype=F64, requires_grad=True)
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=F64).view(1, 3, 1, 2)
    k = torch.cat([k, -torch.ones(1, 120, 1, 2, dtype=F64)], 1).requires_grad_()
    _, top = sparse_attention(q, k, k.detach(), Layout.dense(n, 123), scale=1.0, return_max=True)
    (dk,) = torch.autograd.grad(top.sum(), k)
    assert dk[0, :2, 0].tolist() == [[n / 2, n / 2], [n / 2, n / 2]] and (dk[0, 2:] == 0).all()


def test_small_budget_splits_over_units(monkeypatch):
    """Tiles split over batch rows and heads when the budget is small; results do not change."""
    from subquad.ops.sparse import tiles

    monkeypatch.setitem(tiles.BUDGET, "cpu", 3000)
    compare(make(3, 80, 4, 4, hk=2), Layout.window(80, 30, 2))
    compare(make(3, 80, 4, 4, hk=2), Layout.window(80, 30, 2), k_pos=torch.arange(80) - torch.tensor([[0], [7], [20]]))
    compare(make(3, 80, 4, 4, hk=2), Layout.from_block_mask(torch.rand(4, 5, 5) > 0.5, 16))


def test_list_order_and_large_scores():
    q, k, v = make(1, 64, 2, 8, dtype=torch.float32)
    q, k = (q * 1e4).detach().requires_grad_(), (k * 1e4).detach().requires_grad_()
    o, lse = sparse_attention(q, k, v, Layout.window(64, 16), return_lse=True)
    assert o.isfinite().all() and lse.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-6)])
def test_low_precision_computes_in_float32(dtype, tolerance):
    q, k, v = make(1, 100, 2, 16, dtype=dtype)
    o, lse = sparse_attention(q, k, v, Layout.window(100, 30, 2), return_lse=True)
    want, want_lse, _ = sparse_attention_reference(q.double(), k.double(), v.double(), Layout.window(100, 30, 2))
    assert o.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(o.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(o.float().sum(), q)[0].dtype == dtype


def test_gradient_of_a_bias_in_half_precision_is_summed_in_float32():
    """Thousands of small terms into one slope: summed in bfloat16 they would stall."""
    q, k, v = make(1, 1500, 1, 4, dtype=torch.bfloat16)
    slopes = torch.tensor([0.01], dtype=torch.bfloat16, requires_grad=True)
    double = slopes.detach().double().requires_grad_()
    o = sparse_attention(q, k, v, Layout.window(1500, 40), bias=slopes)
    want, _, _ = sparse_attention_reference(q.double(), k.double(), v.double(), Layout.window(1500, 40), bias=double)
    weight = v.detach().double()  # correlated with the output, so that the terms do not cancel
    (got,) = torch.autograd.grad((o * weight.to(o.dtype)).sum(), slopes)
    (exact,) = torch.autograd.grad((want * weight).sum(), double)
    assert (got.double() - exact).abs().item() <= 2**-7 * exact.abs().item()


def test_empty_inputs():
    for layout in (Layout.window(0, 4), Layout.from_block_mask(torch.ones(0, 0, dtype=torch.bool), 4)):
        assert sparse_attention(*make(2, 0, 2, 4), layout).shape == (2, 0, 2, 4)
    q, k, v = make(0, 8, 2, 4)
    o = sparse_attention(q, k, v, Layout.window(8, 4))
    assert o.shape == (0, 8, 2, 4) and torch.autograd.grad(o.sum(), q)[0].shape == q.shape


def test_work_follows_the_density(monkeypatch):
    """Scores formed per query do not grow with N for a window, nor with the longest list for lists."""
    from subquad.ops.sparse import chunked

    formed = []
    inner = chunked.scores

    def counted(*args):
        s, bend = inner(*args)
        formed.append(s.numel())
        return s, bend

    monkeypatch.setattr(chunked, "scores", counted)

    def scores(n, layout, **options):
        formed.clear()
        with torch.no_grad():
            sparse_attention(*make(1, n, 1, 4, dtype=torch.float32), layout, **options)
        return sum(formed)

    assert scores(4096, Layout.window(4096, 64, 4)) <= 4096 * (64 + 64 + 4)
    assert scores(4096, Layout.window(4096, 64, 4), k_pos=torch.arange(4096)) <= 4096 * (64 + 64 + 2 * 64 + 64)
    mask = torch.eye(64, dtype=torch.bool)
    mask[0] = True
    assert scores(4096, Layout.from_block_mask(mask, 64)) <= 64 * 64 * (63 + 64)


def test_traced_without_breaks():
    q, k, v = make(1, 100, 4, 8, hk=2, dtype=torch.float32)

    def run(q, k, v):
        return sparse_attention(q, k, v, Layout.window(100, 30, 2), return_lse=True, return_max=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(q, k, v), run(q, k, v)):
        torch.testing.assert_close(got, want)
        weight = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v), retain_graph=True, allow_unused=True) for x in (got, want))):
            torch.testing.assert_close(*(torch.zeros_like(q[:1, :1, :1, :1]) if x is None else x for x in (a, b)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "argument,change",
    [
        ("layout", {"layout": Layout.causal(7)}),
        ("layout", {"layout": "causal"}),
        ("layout", {"layout": Layout.from_block_mask(torch.ones(3, 1, 1, dtype=torch.bool), 8)}),
        ("q_pos", {"q_pos": torch.zeros(8)}),
        ("k_pos", {"k_pos": torch.zeros(7, dtype=torch.long)}),
        ("k_pos", {"k_pos": torch.arange(8, device="meta")}),
        ("q_pos", {"q_pos": list(range(8))}),
        ("bias", {"bias": torch.zeros(3)}),
        ("bias", {"bias": torch.zeros(8, 7)}),
        ("bias", {"bias": "alibi"}),
        ("bias", {"bias": torch.zeros(2, device="meta")}),
        ("key_bias", {"key_bias": [0.0] * 8}),
        ("bias.table", {"bias": RelativeBias(torch.zeros(2, 4))}),
        ("bias[1]", {"bias": (torch.zeros(1, 8, 2, 3), torch.zeros(1, 8, 2, 4))}),
        ("softcap", {"bias": (torch.zeros(1, 8, 2, 3), torch.zeros(1, 8, 2, 3)), "softcap": 5.0}),
        ("softcap", {"softcap": -1.0}),
        ("key_bias", {"key_bias": torch.zeros(1, 2, 7)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 9])}),
    ],
)
def test_bad_input_names_the_argument(argument, change):
    q, k, v = make(1, 8, 2, 4)
    with pytest.raises(InputError) as error:
        sparse_attention(q, k, v, **{"layout": Layout.causal(8), **change})
    assert error.value.argument == argument and "\n" not in str(error.value)
