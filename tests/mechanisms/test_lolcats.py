"""LoLCATs: both windows by the keys that they name, and what is left when either part is empty."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import subquad
from subquad import Rotary

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


@BY_FORM
def test_a_window_longer_than_the_text_changes_nothing_in_a_model(window_form):
    """Swapped and untrained, a model of Llama's kind says what it said, and generates the same with its cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, eos_token_id=None, **sizes)).eval()
    ids = torch.randint(3, 50, (2, 20))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before, generated = model(ids).logits, model.generate(ids, **greedy)
        subquad.swap(model, "lolcats", window=32, window_form=window_form)
        assert (model(ids).logits - before).abs().max() < 1e-4 * before.abs().max()
        assert torch.equal(model.generate(ids, **greedy), generated)
