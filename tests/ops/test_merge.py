"""merge: parts of a softmax joined equal the softmax over the union, for values, weights and gradients."""

import pytest
import torch

from subquad import InputError
from subquad.ops.merge import merge, merge_reference
from subquad.ops.sparse import Layout, sparse_attention, sparse_attention_reference

F64 = torch.float64


def parts(count=3, shape=(2, 5, 3), seed=0):
    torch.manual_seed(seed)
    return [tuple(torch.randn(*s, dtype=F64, requires_grad=True) for s in ((*shape, 4), shape)) for _ in range(count)]


def test_union_of_disjoint_keys():
    """Three blocks of columns, seen apart and merged, are one softmax, gradients included."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 48, 3, 4, dtype=F64, requires_grad=True) for _ in range(3))
    whole = torch.rand(3, 6, 6) > 0.3
    whole[:, 0], whole[:, 1, 1:] = False, False  # a row that no part sees, and one that only the first sees
    pieces = []
    for start in (0, 2, 4):
        mask = torch.zeros_like(whole)
        mask[..., start : start + 2] = whole[..., start : start + 2]
        pieces.append(sparse_attention(q, k, v, Layout.from_block_mask(mask, 8), return_lse=True))
    o, lse = merge(pieces)
    want, want_lse, _ = sparse_attention_reference(q, k, v, Layout.from_block_mask(whole, 8))
    torch.testing.assert_close(o, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=1e-10, atol=1e-10)
    assert (lse[:, :8] == -torch.inf).all() and (o[:, :8] == 0).all()
    weight = torch.randn_like(o)
    got, expected = (torch.autograd.grad((x * weight).sum() + y[:, 8:].sin().sum(), (q, k, v)) for x, y in ((o, lse), (want, want_lse)))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["none", "numbers", "tensors"])
def test_equals_reference(kind):
    given = parts()
    tensors = [torch.rand(3, dtype=F64, requires_grad=True), torch.rand(2, 5, 1, dtype=F64, requires_grad=True)]
    weights = {"none": None, "numbers": [0.5, 2.0, 3.0], "tensors": [*tensors, 1.5]}[kind]
    leaves = [x for part in given for x in part] + (tensors if kind == "tensors" else [])
    results = [f(given, weights) for f in (merge, merge_reference)]
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(fast)
        grads = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True, allow_unused=True) for x in (fast, slow)]
        for a, b in zip(*grads):
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
            assert (a - b).abs().max() < 1e-10


def test_order_and_nesting_do_not_matter():
    a, b, c = parts()
    for other in (merge([c, a, b]), merge([merge([a, b]), c]), merge([a, merge([b, c])])):
        for x, y in zip(merge([a, b, c]), other):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_a_part_of_weight_two_counts_twice():
    a, b, _ = parts()
    for x, y in zip(merge([a, b], [2.0, 1.0]), merge([a, b, a])):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_alone_and_beside_an_empty_part():
    a, b, _ = parts()
    empty = (torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf))
    for joined in (merge([a]), merge([a, empty]), merge([empty, a]), merge([a, b], [1.0, 0.0])):
        torch.testing.assert_close(joined[0], a[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(joined[1], a[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite_everywhere(size, dtype):
    """Empty in one part, in all parts, weight zero, weight zero on the largest, and masses far apart."""
    (o1, l1), (o2, l2) = ((o.detach().to(dtype), (size * lse).detach().to(dtype)) for o, lse in parts(2))
    l1[0, 0], l2[0, 1] = -torch.inf, -torch.inf
    l1[0, 2], l2[0, 2] = -torch.inf, -torch.inf
    w1, w2 = torch.ones(2, 5, 3, dtype=dtype), torch.ones(2, 5, 3, dtype=dtype)
    w1[1, 0], w2[1, 1] = 0, 0
    w1[1, 2], w2[1, 2] = 0, 0
    leaves = [x.requires_grad_() for x in (o1, l1, o2, l2, w1, w2)]
    o, lse = merge([(o1, l1), (o2, l2)], [w1, w2])
    assert o.isfinite().all() and (o[0, 2] == 0).all() and (o[1, 2] == 0).all()
    assert (lse[0, 2] == -torch.inf).all() and (lse[1, 2] == -torch.inf).all()
    torch.testing.assert_close(o[1, 0], o2[1, 0])
    torch.testing.assert_close(lse[1, 0], l2[1, 0])
    for loss in (o.sum(), lse.where(lse > -torch.inf, 0).sum()):
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) if g is not None)


def test_half_precision_is_joined_in_float32():
    a, b, _ = parts()
    half = [(o.bfloat16(), lse.float()) for o, lse in (a, b)]
    o, lse = merge(half)
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    want, want_lse = merge_reference([(x.double(), y.double()) for x, y in half])
    assert (o.double() - want).abs().max() <= 2**-8 * want.abs().max()
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "argument,arguments",
    [
        ("parts", ([],)),
        ("parts[1]", ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3, 4)],)),
        ("parts[0]", ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2))],)),
        ("weights", ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))], [1.0, 2.0])),
        ("weights[0]", ([(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3))], [torch.zeros(2, 2, 3)])),
    ],
)
def test_bad_input_names_the_argument(argument, arguments):
    with pytest.raises(InputError) as error:
        merge(*arguments)
    assert error.value.argument == argument and "\n" not in str(error.value)
