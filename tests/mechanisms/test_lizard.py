"""Lizard: each part alone, meta memory as keys without values, the gate in log space, and how it starts."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import subquad
from subquad import Rotary


def qkv(n=70, heads=4, kv_heads=2, dim=16):
    return tuple(torch.randn(2, n, h, dim, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))


def make(*, alpha=None, meta=None, shake=0.0, normalize=True, **options):
    module = subquad.attention("lizard", 4, 16, kv_heads=2, normalize=normalize, **options).double()
    with torch.no_grad():
        for p in (module.W_q, module.W_k):
            p.add_(shake * torch.randn_like(p))
        module.alpha.fill_(1.0 if alpha is None else alpha)
        module.meta.fill_(-4.0 if meta is None else meta)
    return module


def gates(n=70, low=-1.0):
    return low * torch.rand(2, n, dtype=torch.float64)


def exact(q, k, v, rotary=None):
    return subquad.attention("softmax", 4, 16, kv_heads=2)(q, k, v, rotary=rotary)


def test_an_open_gate_is_hedgehog():
    q, k, v = qkv()
    module = make(alpha=0.0, shake=0.2)
    hedgehog = subquad.attention("hedgehog", 4, 16, kv_heads=2).double()
    hedgehog.load_state_dict({name: module.state_dict()[name] for name in ("W_q", "W_k")})
    o = module(q, k, v, log_decay=torch.zeros(2, 70, dtype=torch.float64))
    assert (o - hedgehog(q, k, v)).abs().max() < 1e-10


def test_a_shut_gate_leaves_the_token_itself():
    q, k, v = qkv()
    o = make(alpha=0.0)(q, k, v, log_decay=torch.full((2, 70), -1e3, dtype=torch.float64))
    assert (o - v.repeat_interleave(2, 2)).abs().max() < 1e-12


@pytest.mark.parametrize("window_rotary", [False, True])
def test_the_window_over_all_tokens_is_softmax(window_rotary):
    """Without sinks; the published student has no rotary, whatever is handed to it."""
    q, k, v = qkv()
    rotary = Rotary.of(torch.arange(70), 16, theta=100.0)
    call = {"rotary": rotary, "log_decay": gates()}
    both, gated = (make(alpha=a, meta=-1e4, window=70, window_rotary=window_rotary)(q, k, v, **call) for a in (1.0, 0.0))
    expected = exact(q, k, v, rotary if window_rotary else None)
    assert (both - gated - expected).abs().max() < 1e-12
    assert (exact(q, k, v) - exact(q, k, v, rotary)).abs().max() > 0.1
    without = make(window=70, sinks=0, window_rotary=window_rotary)(q, k, v, **call)
    assert (without - both).abs().max() < 1e-12


def test_meta_memory_is_keys_of_those_scores_and_values_of_zero():
    """Seen by all queries of all heads, the first token's too, and by those that have left the start behind."""
    q, k, v = qkv()
    module = make(window=12, sinks=3)
    meta = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)
    with torch.no_grad():
        module.meta.copy_(meta)
    i, j = torch.arange(70)[:, None], torch.arange(70)
    hidden = torch.zeros(70, 70, dtype=torch.float64).masked_fill((j > i) | (j <= i - 12), -torch.inf)
    scores = torch.cat([meta.expand(70, 3), hidden], 1)
    x, y, z = (torch.nn.functional.pad(t, (0, 0, 0, 0, 3, 0)).transpose(1, 2) for t in (q, k, v))
    expected = scaled_dot_product_attention(x[:, :, 3:], y, z, attn_mask=scores, enable_gqa=True).transpose(1, 2)
    call = {"log_decay": gates()}
    with torch.no_grad():
        o = module(q, k, v, **call)
        module.alpha.zero_()
        assert (o - module(q, k, v, **call) - expected).abs().max() < 1e-12


def test_weights_add_up():
    """The gated part's to 1, the window's to its share beside the sinks: with scores of 0, i of i + m."""
    q, k, v = qkv()
    module, one = make(alpha=0.5, meta=0.0, window=20, shake=0.2), torch.ones_like(v)
    o = module(torch.zeros_like(q), k, one, log_decay=gates())
    seen = torch.arange(1.0, 71.0, dtype=torch.float64).clamp(max=20)
    assert (o - (1 + 0.5 * seen / (seen + 4))[None, :, None, None]).abs().max() < 1e-12


@pytest.mark.parametrize("normalize", [True, False])
def test_the_papers_training_form(normalize):
    """log C inside the exponentials of φ(q), −log C inside those of φ(k), and one product of matrices."""
    q, k, v = qkv(30)
    module, log_decay = make(alpha=0.0, shake=0.2, feature_map="exp", normalize=normalize), gates(30)
    log_c = log_decay.cumsum(1)[:, :, None, None]
    y_q, y_k = torch.einsum("bnhd,hdf->bnhf", q, module.W_q), torch.einsum("bnhd,hdf->bnhf", k, module.W_k).repeat_interleave(2, 2)
    fq, fk = (torch.cat([(y + c).exp(), (-y + c).exp()], -1) for y, c in ((y_q, log_c), (y_k, -log_c)))
    weights = torch.einsum("bnhf,bmhf->bhnm", fq, fk).tril()
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    expected = torch.einsum("bhnm,bmhv->bnhv", weights, v.repeat_interleave(2, 2))
    o = module(q, k, v, log_decay=log_decay)
    assert (o - expected).abs().max() < 1e-10 * expected.abs().max()


def test_softmax_features_keep_their_gate():
    """There the paper's form would lose it: a softmax does not see what is added to all of its logits."""
    q, k, v = qkv()
    module, log_decay = make(alpha=0.0), gates()
    shifted = q + log_decay.cumsum(1)[:, :, None, None]
    assert (shifted.softmax(-1) - q.softmax(-1)).abs().max() < 1e-12
    o, ungated = (module(q, k, v, log_decay=g) for g in (log_decay, 0 * log_decay))
    assert (o - ungated).abs().max() > 0.1


def test_long_sequences_at_half_open_gates():
    """float32 goes far past the 127 tokens at which C = ½^t leaves its range."""
    q, k, v = qkv(1000)
    g = torch.full((2, 1000), -math.log(2), dtype=torch.float64)
    module = make(alpha=0.0, feature_map="exp")
    expected = module(q, k, v, log_decay=g)
    o = module.float()(q.float(), k.float(), v.float(), log_decay=g.float())
    assert (o - expected).abs().max() < 1e-4
    late = module(q[:, 900:].float(), k[:, 900:].float(), v[:, 900:].float(), log_decay=g[:, 900:].float())
    assert (o[:, 950:] - late[:, 50:]).abs().max() < 1e-4  # ½^50: what came before is forgotten


def test_how_it_starts():
    """γ = ½, or sigmoid(gate_bias); φ the identity's; a sink of m e⁻⁴ beside the window's exp(s)."""
    hidden = torch.randn(2, 9, 24)
    module = subquad.attention("lizard", 4, 16, kv_heads=2, hidden_size=24)
    assert module.project(hidden)["log_decay"].shape == (2, 9)
    assert (module.project(hidden)["log_decay"] + math.log(2)).abs().max() < 1e-6
    biased = subquad.attention("lizard", 4, 16, kv_heads=2, hidden_size=24, gate_bias=4.0)
    assert (biased.project(hidden)["log_decay"].exp() - 1 / (1 + math.exp(-4))).abs().max() < 1e-6
    with torch.no_grad():
        biased.gate.weight.normal_()
    gamma = biased.project(hidden)["log_decay"].exp()
    assert (gamma > 0).all() and (gamma < 1).all() and gamma.std() > 0.01
    assert torch.equal(module.W_q, torch.eye(16).expand(4, 16, 16)) and torch.equal(module.W_k, torch.eye(16).expand(2, 16, 16))
    assert module.alpha == 1 and (module.meta.exp().sum() - 4 * math.exp(-4)).abs() < 1e-6


def test_the_gated_part_starts_small():
    """By default, for small q and k: two tokens' worth of 2/F at γ = ½, beside a window whose sinks take next to nothing."""
    q, k, v = (0.1 * x for x in qkv(dim=64))
    module = subquad.attention("lizard", 4, 64, kv_heads=2, window=70).double()
    half = torch.full((2, 70), -math.log(2), dtype=torch.float64)
    weights = module(q, k, torch.ones_like(v), log_decay=half)
    seen = torch.arange(1.0, 71.0, dtype=torch.float64)
    window = seen / (seen + 4 * math.exp(-4))
    assert (weights[:, 1:] - window[None, 1:, None, None]).min() > 0.04  # at least 3/2 tokens of 2/64
    assert (weights - window[None, :, None, None]).max() < 0.08


def test_parameters_of_a_layer():
    """Two maps per head, a gate of one number a token, four sinks and α."""
    module = subquad.attention("lizard", 32, 64, kv_heads=8, hidden_size=2048, feature_dim=128)
    assert sum(p.numel() for p in module.parameters()) == (32 + 8) * 64 * 128 + 2048 + 4 + 1


BAD = [{"feature_map": "relu"}, {"feature_dim": 0}, {"window": 0}, {"sinks": -1}, {"gate_bias": "high"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_options(bad):
    with pytest.raises(subquad.InputError, match=next(iter(bad))):
        subquad.attention("lizard", 4, 16, **bad)
