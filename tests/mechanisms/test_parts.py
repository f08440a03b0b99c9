"""Parts under one normaliser: LoLCATs is the merge of its two, and what remains of a hybrid where one part is empty."""

import math

import pytest
import torch

import subquad
from subquad.ops.merge import merge
from subquad.ops.sparse import Layout, sparse_attention

F64 = torch.float64
N, H, KV, D, V = 24, 4, 2, 6, 5


def make(seed=0, **options):
    """A module with a map and factors that are not the initial ones."""
    torch.manual_seed(seed)
    module = subquad.attention("lolcats", H, D, kv_heads=KV, value_dim=V, feature_dim=5, **options).double()
    with torch.no_grad():
        for parameter in (module.W_q, module.W_k, module.window_factor):
            parameter.add_(torch.randn_like(parameter))
    return module


def inputs(n=N, batch=2, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(batch, n, h, d, dtype=F64, requires_grad=True) for h, d in ((H, D), (KV, D), (KV, V))]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def far_part(module, q, k, v, start):
    """Linear attention over the keys before `start` ``[N]`` alone, quadratically: (o, log of the weights' sum)."""
    k, v = (x.repeat_interleave(H // KV, 2) for x in (k, v))
    fq, fk = module.features("W_q", q), module.features("W_k", k)
    a = torch.einsum("bnhf,bmhf->bhnm", fq, fk) * (torch.arange(q.shape[1]) < start[:, None])
    mass = a.sum(-1).transpose(1, 2)
    o = torch.einsum("bhnm,bmhv->bnhv", a, v) / mass.clamp(min=1e-300)[..., None]
    return o, mass.clamp(min=1e-300).log().masked_fill(mass == 0, -torch.inf)


WHOLE = [{"window": N}, {"window": 1000}, {"window": N // 2, "window_form": "tk"}, {"window": N + 7, "window_form": "tk"}]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("options", WHOLE, ids=lambda o: "-".join(map(str, o.values())))
def test_a_window_over_everything_is_softmax(options, affine):
    """No key is left to the linear part: values and gradients are softmax attention's, whatever the map and the factors are."""
    module, x = make(affine_factors=affine, **options), inputs()
    with torch.no_grad():
        module.window_factor.copy_(torch.tensor([-30.0, -1.0, 2.0, 30.0]))
    o, want = module(*x), subquad.attend(*x, "softmax", causal=True)
    close(o, want)
    weight = torch.randn_like(want)
    got = torch.autograd.grad((o * weight).sum(), [*x, *module.parameters()])
    for a, b in zip(got[:3], torch.autograd.grad((want * weight).sum(), x)):
        close(a, b)
    assert all(g.abs().max() < 1e-12 for g in got[3:])


@pytest.mark.parametrize("form, window", [("sw", 1), ("sw", 7), ("tk", 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_it_is_the_merge_of_its_parts(form, window, affine):
    """Gradients too, and in the first rows, where the linear part is empty, the merge is of one part alone."""
    module, (q, k, v) = make(window=window, window_form=form, affine_factors=affine), inputs()
    i = torch.arange(N)
    start = i - window + 1 if form == "sw" else (i // window - 1) * window
    o, lse, top = sparse_attention(q, k, v, module.layout(N, N), return_lse=True, return_max=True)
    far, g = far_part(module, q, k, v, start), module.window_factor.sigmoid()
    joined, _ = merge([(o, lse - top), far], [g, 1 - g if affine else 1.0])
    alone = start <= 0
    assert alone.sum() == (window if form == "sw" else 2 * window) and (far[1][:, alone] == -torch.inf).all()
    close(joined[:, alone], o[:, alone], 1e-12)
    got = module(q, k, v)
    close(got, joined)
    weight, leaves = torch.randn_like(got), [q, k, v, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (got, joined))):
        close(a, b, 1e-9)


def test_a_window_without_weight_is_linear_attention():
    """As g falls to 0 the rows with a past become linear attention over it; those without remain softmax."""
    module, (q, k, v) = make(window=3), inputs()
    with torch.no_grad():
        module.window_factor.fill_(-60.0)
        o, i = module(q, k, v), torch.arange(N)
        far, _ = far_part(module, q, k, v, i - 2)
        near = sparse_attention(q, k, v, Layout.window(N, 3))
    close(o[:, 3:], far[:, 3:])
    close(o[:, :3], near[:, :3])


def test_a_window_without_keys_leaves_the_linear_part():
    """`merge` of a part that sees no key and the linear part is the linear part, with its gradient; and the other way round."""
    module, (q, k, v) = make(), inputs()
    nothing = Layout.from_block_mask(torch.zeros(3, 3, dtype=torch.bool), 8)
    empty = sparse_attention(q, k, v, nothing, return_lse=True)
    far = far_part(module, q, k, v, torch.arange(N) + 1)
    whole = sparse_attention(q, k, v, Layout.causal(N), return_lse=True)
    for part in (far, whole):
        for pair in ([empty, part], [part, empty]):
            joined, lse = merge(pair, [0.3, 0.3])
            close(joined, part[0], 1e-12)
            close(lse, part[1] + math.log(0.3), 1e-12)
            weight = torch.randn_like(joined)
            for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v), retain_graph=True) for o in (joined, part[0]))):
                close(a, b)


def test_halves_of_two_parts():
    """½ + ½ under one normaliser: the mean where the masses are equal, and the other part where one is empty."""
    _, (q, k, v) = make(), inputs()
    mask = torch.ones(3, 3).tril().bool()
    mask[1] = False  # the second block of queries sees nothing here
    one = sparse_attention(q, k, v, Layout.from_block_mask(mask, 8), return_lse=True)
    two = sparse_attention(q, k, v, Layout.window(N, 4), return_lse=True)
    o, lse = merge([one, two], [0.5, 0.5])
    close(o[:, 8:16], two[0][:, 8:16], 1e-12)
    close(lse[:, 8:16], two[1][:, 8:16] - math.log(2), 1e-12)
    even, same = merge([one, (two[0], one[1])], [0.5, 0.5])
    rest = torch.cat([torch.arange(8), torch.arange(16, N)])
    close(even[:, rest], (one[0] + two[0])[:, rest] / 2, 1e-12)
    close(same[:, rest], one[1][:, rest], 1e-12)
    assert (even[:, 8:16] == 0).all() and (same[:, 8:16] == -torch.inf).all()
