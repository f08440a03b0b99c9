"""The static layouts against definitions of their own, for every query, and attention over them against softmax."""

import itertools
import math
import tracemalloc

import pytest
import torch

from subquad import InputError
from subquad.ops.sparse import Layout, sparse_attention, sparse_attention_reference
from subquad.ops.sparse.layout import segments
from subquad.ops.sparse.rules import Causal, Window


def natten_axis(size, window, stride, dilation, causal):
    """The keys of each query on one axis: the `window` keys of its residue nearest to the leader of its group, the left first."""
    found = []
    for i in range(size):
        same = list(range(i % dilation, size, dilation))
        place = same.index(i)
        group = same[place // stride * stride :][:stride]
        if causal:
            leader = group[-1]
            keys = [key for key in same if key <= leader][-window:]
            found.append({key for key in keys if key <= i})
        else:
            leader = group[stride // 2] if stride // 2 < len(group) else group[-1]
            found.append(set(sorted(same, key=lambda key: (abs(key - leader), key))[:window]))
    return found


def mask_of(sets, size):
    mask = torch.zeros(len(sets), size, dtype=torch.bool)
    for i, keys in enumerate(sets):
        mask[i, list(keys)] = True
    return mask


def axis_cases(size):
    for d in range(1, size + 1):
        for w in range(1, size // d + 1):
            for s in range(1, w + 1):
                for causal in (False, True):
                    yield w, s, d, causal


@pytest.mark.parametrize("size", range(1, 13))
def test_neighborhood_on_one_axis(size):
    for w, s, d, causal in axis_cases(size):
        layout = Layout.neighborhood(size, w, stride=s, dilation=d, causal=causal)
        want = mask_of(natten_axis(size, w, s, d, causal), size)
        assert torch.equal(layout.to_mask(), want), (size, w, s, d, causal)


def test_even_windows_reach_one_further_to_the_left():
    assert Layout.neighborhood(12, 4).explain(6).runs == ((4, 8),)
    assert Layout.neighborhood(12, 5).explain(6).runs == ((4, 9),)
    assert Layout.neighborhood(12, 4).explain(0).runs == ((0, 4),)
    assert Layout.neighborhood(12, 4).explain(11).runs == ((8, 12),)


@pytest.mark.parametrize("rows", range(1, 13))
def test_neighborhood_on_two_axes(rows):
    """All sizes up to 12 x 12, and on each axis another window, stride, dilation and order."""
    generator = torch.Generator().manual_seed(rows)
    for columns in range(1, 13):
        for _ in range(3):
            cases = [list(axis_cases(size)) for size in (rows, columns)]
            picked = [c[int(torch.randint(len(c), (1,), generator=generator))] for c in cases]
            w, s, d, causal = zip(*picked)
            got = Layout.neighborhood((rows, columns), w, stride=s, dilation=d, causal=causal).to_mask()
            a, b = (mask_of(natten_axis(size, *case), size) for size, case in zip((rows, columns), picked))
            assert torch.equal(got, torch.kron(a.int(), b.int()).bool()), (rows, columns, picked)


def test_neighborhood_on_three_axes():
    grid, cases = (3, 5, 4), ((2, 1, 1, True), (2, 2, 2, False), (3, 1, 1, False))
    got = Layout.neighborhood(
        grid, *([c[0] for c in cases],), **{n: [c[x] for c in cases] for x, n in ((1, "stride"), (2, "dilation"), (3, "causal"))}
    )
    axes = [mask_of(natten_axis(size, *case), size).int() for size, case in zip(grid, cases)]
    assert torch.equal(got.to_mask(), torch.kron(torch.kron(axes[0], axes[1]), axes[2]).bool())


def by_pairs(n, seen, m=None):
    m = n if m is None else m
    return torch.tensor([[bool(seen(i + m - n, j)) for j in range(m)] for i in range(n)])


@pytest.mark.parametrize("grid", [(9,), (5, 7), (8, 3), (3, 4, 5)])
@pytest.mark.parametrize("radius", [1, 2, 2.5, 4, 100])
def test_circle(grid, radius):
    at = list(itertools.product(*(range(side) for side in grid)))
    want = by_pairs(len(at), lambda i, j: math.dist(at[i], at[j]) < radius)
    assert torch.equal(Layout.circle(grid, radius).to_mask(), want)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("text", [1, 4, 50])
def test_circle_beside_text(text, first):
    at = list(itertools.product(range(5), range(7)))
    at = [None] * text + at if first else at + [None] * text
    want = by_pairs(len(at), lambda i, j: at[i] is None or at[j] is None or math.dist(at[i], at[j]) < 2.5)
    layout = Layout.circle((5, 7), 2.5, text_tokens=text, text_first=first)
    assert torch.equal(layout.to_mask(), want) and layout.density == pytest.approx(want.double().mean().item(), rel=1e-12)


def test_circle_has_the_published_number_of_keys():
    for radius, keys in ((8, 193), (16, 793), (32, 3205)):
        layout = Layout.circle((65, 65), radius)
        assert layout.explain(65 * 32 + 32).count == keys


@pytest.mark.parametrize("n,m", [(40, 40), (13, 50)])
def test_strided_and_power(n, m):
    for block, stride, window, offset in itertools.product((1, 4, 5), (1, 2, 3, 7), (1, 3), (0, 1, 2)):

        def seen(i, j, block=block, stride=stride, window=window, offset=offset):
            return j <= i and (i // block - j // block < window or (j // block + offset) % stride == 0)

        got = Layout.strided(n, stride, window=window, block=block, offset=offset, m=m).to_mask()
        assert torch.equal(got, by_pairs(n, seen, m))
    powers = {1 << x for x in range(10)}
    for block, window, sinks in itertools.product((1, 3, 8), (1, 2, 4), (0, 1, 2)):
        got = Layout.power(n, window=window, sinks=sinks, block=block, m=m).to_mask()
        want = by_pairs(n, lambda i, j: j <= i and (i // block - j // block in {*range(window), *powers} or j // block < sinks), m)  # noqa: B023
        assert torch.equal(got, want)


def test_band_and_global_tokens():
    for left, right, count in itertools.product((0, 2, 30), (0, 1, 5), (0, 1, 4, 50)):
        want = by_pairs(20, lambda i, j: -left <= j - i <= right or i < count or j < count)  # noqa: B023
        assert torch.equal(Layout.band(20, left, right, global_tokens=count).to_mask(), want)
        assert torch.equal((Layout.band(20, left, right) | Layout.global_tokens(20, count)).to_mask(), want)


STATIC = {
    "one axis": lambda: Layout.neighborhood(150, 17),
    "one axis, strided": lambda: Layout.neighborhood(150, 16, stride=8),
    "one axis, dilated": lambda: Layout.neighborhood(150, 16, dilation=7),
    "one axis, causal": lambda: Layout.neighborhood(150, 100, causal=True, stride=3),
    "two axes": lambda: Layout.neighborhood((12, 13), (5, 4)),
    "two axes, all at once": lambda: Layout.neighborhood((12, 13), (3, 4), stride=(1, 2), dilation=(3, 2), causal=(True, False)),
    "wide": lambda: Layout.neighborhood((3, 150), (2, 9)),
    "three axes": lambda: Layout.neighborhood((4, 6, 7), 3),
    "circle": lambda: Layout.circle((11, 14), 4.5),
    "ball": lambda: Layout.circle((5, 6, 7), 3),
    "circle behind text": lambda: Layout.circle((11, 14), 4.5, text_tokens=9),
    "circle before text": lambda: Layout.circle((11, 14), 2.5, text_tokens=70, text_first=False),
    "strided": lambda: Layout.strided(170, 3, window=2, block=8, offset=1),
    "strided keys": lambda: Layout.strided(100, 7, window=5, block=1),
    "power": lambda: Layout.power(200, window=2, sinks=1, block=8),
    "power of long blocks": lambda: Layout.power(500, block=100),
    "power, fewer queries": lambda: Layout.power(70, block=8, m=200),
    "longformer": lambda: Layout.band(170, 10, 12, global_tokens=3),
    "band": lambda: Layout.band(150, 90, 3),
    "union": lambda: Layout.power(160, block=8) | Layout.window(160, 20, 5),
    "intersection": lambda: Layout.strided(160, 2, block=8) & Layout.window(160, 50),
    "nested": lambda: (Layout.neighborhood((12, 13), 5) | Layout.global_tokens(156, 2)) & Layout.causal(156),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_attention_is_softmax_under_the_mask(name):
    layout = STATIC[name]()
    check(layout)
    assert layout.density == pytest.approx(layout.to_mask().double().mean().item(), rel=1e-12)


def check(layout, heads=2, batch=1, tolerance=1e-10, **options):
    """o, lse and the gradients of q, k and v against the dense definition."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, t, heads, 4, dtype=torch.float64, requires_grad=True) for t in (layout.n, layout.m, layout.m))
    o, lse = sparse_attention(q, k, v, layout, return_lse=True, **options)
    want, want_lse, _ = sparse_attention_reference(q, k, v, layout, **options)
    torch.testing.assert_close(o, want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)
    weight, finite = torch.randn_like(o), ~want_lse.isinf()
    for got, exact in zip(*(torch.autograd.grad((x * weight).sum() + y[finite].sum(), (q, k, v)) for x, y in ((o, lse), (want, want_lse)))):
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", STATIC)
def test_at_given_positions(name):
    layout = STATIC[name]()
    torch.manual_seed(0)
    k_pos = torch.arange(layout.m) - torch.randint(0, 9, (layout.m,))
    check(layout, q_pos=torch.arange(layout.m - layout.n, layout.m).flip(0), k_pos=k_pos)


RULES = {name: make().inner for name, make in {
    "line": lambda: Layout.neighborhood(30, 5, stride=2), "dilated": lambda: Layout.neighborhood(30, 5, dilation=3),
    "causal": lambda: Layout.neighborhood((5, 6), 3, causal=(True, False)), "grid": lambda: Layout.neighborhood((5, 6), (2, 4)),
    "video": lambda: Layout.neighborhood((2, 3, 5), (2, 3, 3)), "circle": lambda: Layout.circle((5, 6), 2.5),
    "behind text": lambda: Layout.circle((5, 5), 2, text_tokens=5),
    "before text": lambda: Layout.circle((4, 6), 2, text_tokens=6, text_first=False),
    "strided": lambda: Layout.strided(30, 3, window=2, block=4, offset=1), "power": lambda: Layout.power(30, sinks=1, block=2),
    "band": lambda: Layout.band(30, 3, 4), "longformer": lambda: Layout.band(30, 3, 4, global_tokens=2),
    "both": lambda: Layout.power(30, block=2) & Layout.window(30, 9),
}.items()}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_ranges_agree_with_pairs(name):
    """touches and covers are never wrong, on integers and on tensors; segments miss no key that is seen."""
    rule, size = RULES[name], 30
    pairs = rule.allowed(torch.arange(size)[:, None], torch.arange(size))
    for q0 in range(size):
        for q1 in range(q0, size):
            rows = pairs[q0 : q1 + 1]
            outside = torch.ones(size, dtype=torch.bool)
            for a, b, full in segments(rule, q0, q1, size):
                outside[a:b] = False
                assert not full or rows[:, a:b].all()
            assert not rows[:, outside].any()
            k0, k1 = (x.flatten() for x in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
            k0, k1 = k0[k0 <= k1], k1[k0 <= k1]
            before = torch.nn.functional.pad(rows.any(0).cumsum(0), (1, 0)), torch.nn.functional.pad(rows.all(0).cumsum(0), (1, 0))
            some, every = (x[k1 + 1] - x[k0] for x in before)
            one = torch.ones_like(k0)
            assert (rule.touches(q0 * one, q1 * one, k0, k1) | (some == 0)).all()
            assert (~rule.covers(q0 * one, q1 * one, k0, k1) | (every == k1 - k0 + 1)).all()


@pytest.mark.parametrize("name", RULES)
def test_pieces_of_one_pattern_look_alike(name):
    rule, found = RULES[name], {}
    for first in range(26):
        for a, b in [(a, b) for a, b, full in segments(rule, first, first + 3, 30) if not full]:
            pattern = rule.pattern(first, a, b - 1)
            piece = rule.allowed(torch.arange(first, first + 4)[:, None], torch.arange(a, b))
            assert pattern is None or torch.equal(piece, found.setdefault((b - a, pattern), piece))


def test_work_follows_the_neighborhood():
    """On a grid the visited keys are the lines that the window touches, not all that lie between the first and the last."""
    layout = Layout.neighborhood((64, 256), 13)
    visited = sum(b - a for a, b, _ in segments(layout.inner, 64 * 118, 64 * 118 + 63, layout.m))
    assert visited == 13 * (64 + 12)
    layout = Layout.neighborhood((16, 32, 256), 7)
    visited = sum(b - a for a, b, _ in segments(layout.inner, 64 * 1089, 64 * 1089 + 63, layout.m))
    assert visited == 7 * 7 * (64 + 6)


def test_a_window_of_everything_is_dense():
    assert Layout.neighborhood((5, 6), (5, 6)).to_mask().all()
    assert Layout.circle((5, 6), 8).to_mask().all()
    assert torch.equal(Layout.strided(30, 1).to_mask(), Layout.causal(30).to_mask())
    assert torch.equal(Layout.neighborhood(30, 30, causal=True).to_mask(), Layout.causal(30).to_mask())


def test_static_layouts_of_a_million_tokens_hold_nothing():
    n = 1 << 20
    tracemalloc.start()
    for layout in (
        Layout.neighborhood((1024, 1024), 13, stride=2), Layout.neighborhood((64, 128, 128), 7), Layout.circle((1024, 1024), 16),
        Layout.strided(n, 64), Layout.power(n), Layout.band(n, 256, 256, global_tokens=4), Layout.power(n) | Layout.window(n, 4096),
    ):  # fmt: skip
        assert layout.n == n and not any(isinstance(x, torch.Tensor) for x in vars(layout).values())
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "argument,make",
    [
        ("grid", lambda: Layout.neighborhood((4, 0), 1)),
        ("grid", lambda: Layout.neighborhood((2, 2, 2, 2), 1)),
        ("grid", lambda: Layout.circle("4", 1)),
        ("window", lambda: Layout.neighborhood((4, 4), 5)),
        ("window", lambda: Layout.neighborhood((9, 9), 4, dilation=3)),
        ("window", lambda: Layout.neighborhood((9, 9), (3, 3, 3))),
        ("stride", lambda: Layout.neighborhood((9, 9), 3, stride=4)),
        ("dilation", lambda: Layout.neighborhood(9, 3, dilation=0)),
        ("causal", lambda: Layout.neighborhood((9, 9), 3, causal=(True,))),
        ("radius", lambda: Layout.circle((9, 9), 0)),
        ("radius", lambda: Layout.circle((9, 9), float("inf"))),
        ("stride", lambda: Layout.strided(9, 0)),
        ("block", lambda: Layout.power(9, block=0)),
        ("left", lambda: Layout.band(9, -1, 2)),
        ("count", lambda: Layout.global_tokens(9, -1)),
        ("other", lambda: Layout.causal(9) | Layout.causal(8)),
        ("other", lambda: Layout.causal(9) & Causal()),
        ("layouts", lambda: Layout.per_head([])),
        ("layouts", lambda: Layout.per_head([Layout.causal(9), Layout.causal(8)])),
        ("i", lambda: Layout.causal(9).explain(9)),
        ("head", lambda: Layout.causal(9).explain(1, head=1)),
        ("layers", lambda: Layout.causal(9).reach(-1)),
        ("query", lambda: Layout.causal(9).reach(1, query=9)),
        ("layout", lambda: Layout.causal(8, 9).reach(1)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(argument, make):
    with pytest.raises(InputError) as error:
        make()
    assert error.value.argument == argument and "\n" not in str(error.value)


def test_words():
    seen = Layout.window(4096, 512, sinks=4).explain(4000)
    assert seen.runs == ((0, 4), (3489, 4001)) and seen.count == 516
    assert str(seen).splitlines() == [
        "query 4000 sees 516 of 4096 keys: 0–3, 3489–4000", "by the rule: the last 512 keys up to its own position and the first 4"
    ]  # fmt: skip
    for make in STATIC.values():
        assert make().rule.words
    assert Window(3).words == "the last 3 keys up to its own position"
