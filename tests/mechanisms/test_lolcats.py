"""LoLCATs: both windows and the sinks by the keys that they name, and what is left when either part is empty."""

import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import subquad
from subquad import InputError, Rotary, Shape
from subquad.ops import feature_maps
from subquad.ops.feature_maps import RowsProduct

FORMS = ("sw", "tk")
BY_FORM = pytest.mark.parametrize("window_form", FORMS)
N, W = 70, 12


def qkv(n=N):
    return tuple(torch.randn(2, n, h, 16, dtype=torch.float64) for h in (4, 2, 2))


def make(factor=None, **options):
    module = subquad.attention("lolcats", 4, 16, kv_heads=2, feature_dim=16, **options).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if factor is not None:
            module.window_factor.fill_(factor)
    return module


def window_of(i, window_form):
    """The keys in query i's window, as the paper draws them: the last W, or its block of W and the one before."""
    if window_form == "sw":
        return range(max(0, i - W + 1), i + 1)
    return range(max(0, (i // W - 1) * W), i + 1)


def softmax_over(q, k, v, keys):
    """Exact softmax of each query over the keys that `keys` gives for its place."""
    mask = torch.zeros(N, N, dtype=torch.bool)
    for i in range(N):
        mask[i, list(keys(i))] = True
    x, y, z = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(x, y, z, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("affine_factors", [False, True])
@pytest.mark.parametrize("window", [N, N + 1, 4 * N])
@BY_FORM
def test_a_window_over_all_tokens_is_softmax(window_form, window, affine_factors):
    """Whatever the maps and factors are; with rotary, in one call and token by token."""
    q, k, v = qkv()
    rotary = Rotary.of(torch.arange(N), 16, theta=100.0)
    expected = subquad.attention("softmax", 4, 16, kv_heads=2)(q, k, v, rotary=rotary)
    module = make(window=window, window_form=window_form, affine_factors=affine_factors)
    assert (module(q, k, v, rotary=rotary) - expected).abs().max() < 1e-12
    state = None
    for t in range(N):
        now = {"rotary": rotary.narrow(t, t + 1), "state": state, "return_state": True}
        o, state = module(*(x[:, t : t + 1] for x in (q, k, v)), **now)
        assert (o - expected[:, t : t + 1]).abs().max() < 1e-12
    assert state["S"].abs().max() == 0  # nothing has left the window


@BY_FORM
def test_terraces_reach_between_one_and_two_windows_back(window_form):
    seen = [len(window_of(i, window_form)) for i in range(5 * W)]
    assert max(seen) == (W if window_form == "sw" else 2 * W) and min(seen[W:]) == (W if window_form == "sw" else W + 1)


@BY_FORM
def test_without_the_past_each_window_is_softmax_over_its_keys(window_form):
    q, k, v = qkv()
    module = make(50.0, window=W, window_form=window_form, affine_factors=True)  # g = 1, and so the past weighs nothing
    expected = softmax_over(q, k, v, lambda i: window_of(i, window_form))
    assert (module(q, k, v) - expected).abs().max() < 1e-9


@BY_FORM
def test_without_the_window_it_is_linear_attention_over_the_past(window_form):
    q, k, v = qkv()
    module = make(-80.0, window=W, window_form=window_form)
    fq, fk = module.features("W_q", q), module.features("W_k", k)
    a = torch.einsum("bnhf,bmhf->bhnm", fq, fk)
    for i in range(N):
        a[:, :, i, window_of(i, window_form).start :] = 0
    rows = slice(2 * W, N)  # those with a past
    a = a[:, :, rows] / a[:, :, rows].sum(-1, keepdim=True)
    expected = torch.einsum("bhnm,bmhv->bnhv", a, v.repeat_interleave(2, 2))
    assert (module(q, k, v)[:, rows] - expected).abs().max() < 1e-9


@BY_FORM
def test_weights_add_up_to_one(window_form):
    q, k, v = qkv()
    o = make(window=W, window_form=window_form)(q, k, torch.ones_like(v))
    assert (o - 1).abs().max() < 1e-12


def test_the_two_windows_differ():
    q, k, v = qkv()
    outputs = []
    for form in FORMS:
        torch.manual_seed(3)
        outputs.append(make(window=W, window_form=form)(q, k, v))
    apart = (outputs[0] - outputs[1]).abs().amax((0, 2, 3)) > 1e-9
    same = [window_of(i, "sw") == window_of(i, "tk") for i in range(N)]
    assert apart.tolist() == [not x for x in same] and 0 < sum(same) < N


# ---- sinks ----

BY_SINKS = pytest.mark.parametrize("sinks", [1, 4])


def by_definition(module, q, k, v):
    """Query by query: which keys are near, their weights relative to their maximum, the others' by features, and one sum."""
    fq, fk = (x.transpose(1, 2) for x in module.feature_pair(q, k))
    k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    g = module.window_factor.sigmoid()[:, None]
    rows = []
    for i in range(q.shape[1]):
        near = sorted({*range(min(module.sinks, i + 1)), *range(max(0, i - module.window + 1), i + 1)})
        far = sorted({*range(i + 1)} - {*near})
        scores = torch.einsum("bhd,bhmd->bhm", q[:, i], k[:, :, near]) / 4
        a = g * (scores - scores.amax(-1, keepdim=True)).exp()
        b = torch.einsum("bhf,bhmf->bhm", fq[:, :, i], fk[:, :, far]) * (1 - g if module.affine_factors else 1)
        total = torch.einsum("bhm,bhmv->bhv", a, v[:, :, near]) + torch.einsum("bhm,bhmv->bhv", b, v[:, :, far])
        rows.append(total / (a.sum(-1) + b.sum(-1))[..., None])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("affine_factors", [False, True])
@pytest.mark.parametrize("window", [1, W])
@BY_SINKS
def test_sinks_by_definition(sinks, window, affine_factors):
    """Of any length around what the softmax part holds: values, gradients, and the same token by token."""
    module = make(window=window, sinks=sinks, affine_factors=affine_factors)
    for n in sorted({1, sinks, sinks + 1, *range(window - 1, window + 2), *range(window + sinks - 1, window + sinks + 3), 40} - {0}):
        x = [t.requires_grad_() for t in qkv(n)]
        expected, found = by_definition(module, *x), module(*x)
        assert (found - expected).abs().max() < 1e-12
        weight, leaves = torch.randn_like(expected), [*x, *module.parameters()]
        for a, b in zip(*(torch.autograd.grad((o * weight).sum(), leaves, materialize_grads=True) for o in (found, expected))):
            assert (a - b).abs().max() < 1e-11
        state = None
        for t in range(n):
            o, state = module(*(y[:, t : t + 1] for y in x), state=state, return_state=True)
            assert (o - expected[:, t : t + 1]).abs().max() < 1e-12


@BY_SINKS
def test_packed_sequences_have_sinks_of_their_own(sinks):
    """Behind their states as well, and with states that both ways of reading leave alike."""
    module, lengths, more = make(window=W, sinks=sinks), (3, W, 0, W + sinks, 1, 40), (2, 20, 5, 0, W, 7)
    parts = [qkv(a + b) for a, b in zip(lengths, more)]
    parts = [[x[:1] for x in part] for part in parts]
    ends, later = (torch.tensor([0, *counts]).cumsum(0) for counts in (lengths, more))
    first = [torch.cat([part[i][:, :n] for part, n in zip(parts, lengths)], 1) for i in range(3)]
    rest = [torch.cat([part[i][:, n:] for part, n in zip(parts, lengths)], 1) for i in range(3)]
    o, state = module(*first, cu_seqlens=ends, return_state=True)
    behind, last = module(*rest, cu_seqlens=later, state=state, return_state=True)
    for row, (part, n) in enumerate(zip(parts, lengths)):
        expected = by_definition(module, *part)
        assert (o[:, ends[row] : ends[row + 1]] - expected[:, :n]).abs().amax((0, 2, 3)).lt(1e-12).all()
        assert (behind[:, later[row] : later[row + 1]] - expected[:, n:]).abs().amax((0, 2, 3)).lt(1e-12).all()
        _, alone = module(*part, return_state=True)
        for name in ("S", "k", "v"):
            assert (last[name][row] - alone[name][0]).abs().max() < 1e-12


@BY_SINKS
def test_a_state_is_handed_over_at_every_cut(sinks):
    w, n = 5, 5 + 2 * sinks + 6
    module, x = make(window=w, sinks=sinks), qkv(n)
    expected = by_definition(module, *x)
    _, whole = module(*x, return_state=True)
    for cut in range(n + 1):
        before, state = module(*(y[:, :cut] for y in x), return_state=True)
        for step in (n, 1, 2):
            now, outputs = state, [before]
            for t in range(cut, n, step):
                o, now = module(*(y[:, t : t + step] for y in x), state=now, return_state=True)
                outputs.append(o)
            assert (torch.cat(outputs, 1) - expected).abs().max() < 1e-12
            for name in ("S", "k", "v"):
                assert (now[name] - whole[name]).abs().max() < 1e-12


@pytest.mark.parametrize("affine_factors", [False, True])
@BY_SINKS
def test_window_and_sinks_over_all_tokens_are_softmax(sinks, affine_factors):
    q, k, v = qkv()
    expected = subquad.attention("softmax", 4, 16, kv_heads=2)(q, k, v)
    o, state = make(window=N - sinks, sinks=sinks, affine_factors=affine_factors)(q, k, v, return_state=True)
    assert (o - expected).abs().max() < 1e-12 and state["S"].abs().max() == 0
    assert (make(window=N - sinks - 1, sinks=sinks)(q, k, v) - expected)[:, -1].abs().max() > 1e-6  # one token is past


@BY_SINKS
def test_without_the_past_it_is_a_sliding_window_with_sinks(sinks):
    q, k, v = qkv()
    baseline = subquad.attention("sliding-window", 4, 16, kv_heads=2, window=W, sinks=sinks)
    module = make(50.0, window=W, sinks=sinks, affine_factors=True)  # g = 1, and so the past weighs nothing
    expected, found = baseline(q, k, v), module(q, k, v)
    assert (found - expected).abs().max() < 1e-12
    seen = softmax_over(q, k, v, lambda i: {*range(min(sinks, i + 1)), *window_of(i, "sw")})
    assert (found - seen).abs().max() < 1e-12


def test_what_sinks_cost_and_say():
    options, shape = {"window": W, "sinks": 4, "feature_dim": 16}, Shape(1000, 4, 16, kv_heads=2, batch=3, itemsize=8)
    module, plain = make(window=W, sinks=4), make(window=W)
    q, k, v = (torch.cat([x, x[:1]]) for x in qkv())
    _, state = module(q, k, v, return_state=True)
    assert state.nbytes == module.card.state_bytes(shape, **options)
    assert state.nbytes - plain(q, k, v, return_state=True)[1].nbytes == 3 * 4 * 2 * (16 + 16) * 8  # 4 keys and values of 2 heads
    pairs = (module.card.flops(shape, **options) - module.card.flops(shape, **{**options, "sinks": 0})) / (2 * 3 * 4 * (16 + 16))
    assert pairs == 4 * 1000
    kept, paper = (m.card.kept(shape, **m.options) for m in (module, plain))
    assert "the first 4 tokens" in kept and kept.startswith(paper) and "first" not in paper


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sinks": 1, "window_form": "tk"}, "sinks: got 1; expected 0 with window_form 'tk'"),
        ({"sinks": -1}, "sinks: got -1; expected an integer of at least 0"),
        ({"sinks": 2.0}, "sinks: got 2.0; expected an integer"),
    ],
)
def test_sinks_that_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options", [*({"window": 32, "window_form": form} for form in FORMS), {"window": 20, "sinks": 6}], ids=[*FORMS, "sinks"]
)
def test_a_window_longer_than_the_text_changes_nothing_in_a_model(options):
    """Swapped and untrained, a model of Llama's kind says what it said, and generates the same with its cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, eos_token_id=None, **sizes)).eval()
    ids = torch.randint(3, 50, (2, 20))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before, generated = model(ids).logits, model.generate(ids, **greedy)
        subquad.swap(model, "lolcats", **options)
        assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()
        assert torch.equal(model.generate(ids, **greedy), generated)


# ---- a linear part without rotary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_form, sinks", [("sw", 0), ("sw", 3), ("tk", 0)])
def test_what_is_far_is_weighed_by_unturned_features(window_form, sinks):
    """Weight by weight, from the formulas; and the same in one call, behind a state at every cut, token by token and packed."""
    n, w = 23, 4
    module = make(window=w, window_form=window_form, sinks=sinks, far_rotary=False)
    q, k, v = qkv(n)
    rotary = Rotary.of(torch.arange(n), 16, theta=100.0)
    turned_q, turned_k = (rotary.apply(x) for x in (q, k))
    expected = torch.zeros(2, n, 4, 16, dtype=torch.float64)
    for h in range(4):
        phi = [(x @ W[h]) for x, W in ((q[:, :, h], module.W_q), (k[:, :, h // 2], module.W_k))]
        fq, fk = (torch.cat([y.softmax(-1), (-y).softmax(-1)], -1) for y in phi)
        g = module.window_factor[h].sigmoid()
        for i in range(n):
            start = max(0, i - w + 1) if window_form == "sw" else max(0, (i // w - 1) * w)
            near = sorted({*range(min(sinks, i + 1)), *range(start, i + 1)})
            far = [j for j in range(i) if j not in near]
            s = torch.stack([(turned_q[:, i, h] * turned_k[:, j, h // 2]).sum(-1) / 4 for j in near], -1)
            a = g * (s - s.amax(-1, keepdim=True)).exp()
            a = torch.cat([a, *((fq[:, i] * fk[:, j]).sum(-1, keepdim=True) for j in far)], -1)
            expected[:, i, h] = (a[..., None] * v[:, near + far, h // 2]).sum(1) / a.sum(-1, keepdim=True)
    o, whole = module(q, k, v, rotary=rotary, return_state=True)
    assert (o - expected).abs().max() < 1e-12
    assert whole.nbytes == module.card.state_bytes(
        Shape(n, 4, 16, kv_heads=2, batch=2, itemsize=8), window=w, window_form=window_form, sinks=sinks, feature_dim=16, far_rotary=False
    )
    for cut in range(n + 1):
        for size in (n, 1):
            first, state = module(*(x[:, :cut] for x in (q, k, v)), rotary=rotary.narrow(0, cut), return_state=True)
            outputs = [first]
            for t in range(cut, n, size):
                part = {"rotary": rotary.narrow(t, min(n, t + size)), "state": state, "return_state": True}
                o, state = module(*(x[:, t : t + size] for x in (q, k, v)), **part)
                outputs.append(o)
            assert (torch.cat(outputs, 1) - expected).abs().max() < 1e-12
            assert all((state[name] - whole[name]).abs().max() < 1e-12 for name in ("S", "k", "v"))
    packed = tuple(x.flatten(0, 1)[None] for x in (q, k, v))
    both = Rotary.of(torch.arange(n).repeat(2), 16, theta=100.0)
    o = module(*packed, rotary=both, cu_seqlens=torch.tensor([0, n, 2 * n]))
    assert (o[0].unflatten(0, (2, n)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("far_rotary", [False, True])
@pytest.mark.parametrize("n", [0, 2, 5, 9, 30])
def test_a_batch_from_the_start_is_its_sequences_packed(n, far_rotary):
    """Read where it is, or side by side with what is not turned: outputs, states, and every gradient, through the states too."""
    module = make(window=4, sinks=3, far_rotary=far_rotary)
    q, k, v = (x.detach().requires_grad_() for x in qkv(n))
    rotary = Rotary.of(torch.arange(n).repeat(2), 8, theta=100.0)  # half of the channels
    o, state = module(q, k, v, rotary=rotary.narrow(0, n), return_state=True)
    packed = {"rotary": rotary, "cu_seqlens": torch.tensor([0, n, 2 * n]), "return_state": True}
    other, expected = module(*(x.flatten(0, 1)[None] for x in (q, k, v)), **packed)
    found, wanted = (o.flatten(0, 1)[None], *(state[x] for x in "Skv")), (other, *(expected[x] for x in "Skv"))
    assert state["k"].shape == (2, 7, 2, 16 if far_rotary else 32)
    by = [torch.randn_like(x) for x in wanted]
    into = q, k, v, *module.parameters()
    grads = [torch.autograd.grad(all_of, into, by, allow_unused=True, materialize_grads=True) for all_of in (found, wanted)]
    torch.testing.assert_close([*found, *grads[0]], [*wanted, *grads[1]], rtol=0, atol=1e-11)


def test_far_weights_do_not_change_with_distance():
    """However far apart tokens stand: only the window's part turns."""
    q, k, v = qkv()
    for far_rotary in (False, True):
        module = make(-50.0, window=2, far_rotary=far_rotary)  # the window weighs nothing
        o = [module(q, k, v, rotary=Rotary.of(torch.arange(N) * step, 16, theta=100.0)) for step in (1, 6)]
        assert bool((o[0] - o[1])[:, 2:].abs().max() > 1e-3) == far_rotary


@pytest.mark.parametrize("tokens", [0, 3, 8, 21])
def test_the_gradient_of_maps_in_pieces_is_that_of_one_product(tokens, monkeypatch):
    monkeypatch.setattr(feature_maps, "PIECE", 4)
    rows, weight, grad = (torch.randn(*s, dtype=torch.float64) for s in ((3, tokens, 5), (3, 5, 7), (3, tokens, 7)))
    found, expected = [], []
    for product, into in ((RowsProduct.apply, found), (torch.matmul, expected)):
        x, w = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        into += torch.autograd.grad(product(x, w), (x, w), grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for learns, kept in ((0, weight), (1, rows)):  # of two operands that alone which the other's gradient needs
        saved = []
        x, w = (t.clone().requires_grad_(i == learns) for i, t in enumerate((rows, weight)))
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            RowsProduct.apply(x, w)
        assert saved == [kept.shape]
    x, w = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(RowsProduct.apply, (x, w)) and torch.autograd.gradgradcheck(RowsProduct.apply, (x, w))


def test_a_module_with_sinks_is_pickled():
    module = subquad.attention("lolcats", 2, 4, sinks=1, far_rotary=False)
    again = pickle.loads(pickle.dumps(module))
    q = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(q, q, q), module(q, q, q)) and again.card == module.card
