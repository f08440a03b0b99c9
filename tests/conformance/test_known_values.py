"""Values worked out by hand, against which the mechanism and its reference could both be wrong.

Tokens are few and one-hot, so that each expected value is a line of arithmetic in the test.
"""

import math

import pytest
import torch
from conformance.cases import DEVICE

import subquad

LN2, LN3 = math.log(2), math.log(3)
V = torch.eye(4, dtype=torch.float64)  # value j is the j-th unit vector: outputs are the weights themselves


def tokens(*rows):
    """One batch row, one head: ``[1, N, 1, D]``."""
    return torch.tensor(rows, dtype=torch.float64, device=DEVICE)[None, :, None]


def weights(name, q, k, *, head_dim=None, parameters=None, options=None, **call):
    """The weights ``[N, N]`` with which a one-headed mechanism mixes N ≤ 4 values, by its fast path and by its reference."""
    n, dim = q.shape[1], q.shape[-1]
    module = subquad.attention(name, 1, head_dim or dim, value_dim=4, **(options or {})).to(DEVICE, torch.float64)
    with torch.no_grad():
        for parameter, value in (parameters or {}).items():
            module.get_parameter(parameter).copy_(torch.as_tensor(value))
    v = V[:n].to(DEVICE)[None, :, None]
    o = module(q, k, v, **call)
    torch.testing.assert_close(subquad.reference(name)(module, q, k, v, **call), o)
    if subquad.card(name).causal and options is None:  # the same token by token
        state, steps = None, []
        for t in range(n):
            extra = {key: x[:, t : t + 1] for key, x in call.items()}
            step, state = module(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], state=state, return_state=True, **extra)
            steps.append(step)
        torch.testing.assert_close(torch.cat(steps, 1), o)
    return o[0, :, 0, :n].detach().cpu()


def expect(found, *rows):
    torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), atol=2e-6, rtol=2e-6)


def test_softmax():
    # √D = 2: the logits of the second query are ln 3 and 0
    q, k = tokens([0, 0, 0, 0], [2 * LN3, 0, 0, 0]), tokens([1, 0, 0, 0], [0, 1, 0, 0])
    expect(weights("softmax", q, k), [1, 0], [0.75, 0.25])


def test_softmax_bidirectional():
    q, k = tokens([0, 0, 0, 0], [2 * LN3, 0, 0, 0]), tokens([1, 0, 0, 0], [0, 1, 0, 0])
    expect(weights("softmax", q, k, options={"causal": False}), [0.5, 0.5], [0.75, 0.25])


def test_sliding_window():
    q = tokens(*[[2 * LN3, 0, 0, 0]] * 4)
    k = tokens([1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0])
    two = [[1, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.75, 0.25]]
    expect(weights("sliding-window", q, k, options={"window": 2, "sinks": 0}), *two)
    one_sink = [[1, 0, 0, 0], [3 / 4, 1 / 4, 0, 0], [3 / 7, 1 / 7, 3 / 7, 0], [3 / 7, 0, 3 / 7, 1 / 7]]
    expect(weights("sliding-window", q, k, options={"window": 2, "sinks": 1}), *one_sink)


def test_based():
    # f = D = 4 and W the identity: s = q·k / 2 is 1 for the first key and 0 for the second; 1 + s + s²/2 is 2.5 and 1
    q, k = tokens([2, 0, 0, 0], [2, 0, 0, 0]), tokens([1, 0, 0, 0], [0, 1, 0, 0])
    identity = {"W_q": V, "W_k": V}
    expect(weights("based", q, k, parameters=identity, options={"feature_dim": 4}), [1, 0], [2.5 / 3.5, 1 / 3.5])
    both = weights("based", q, k, parameters=identity, options={"feature_dim": 4, "causal": False})
    expect(both, [2.5 / 3.5, 1 / 3.5], [2.5 / 3.5, 1 / 3.5])


@pytest.mark.parametrize(
    "slopes, layer, log_decays",
    [
        # ALiBi's slopes of three heads: those of two, 2⁻⁴ and 2⁻⁸, then the first of four, 2⁻²; in the middle of three layers half of it
        ("alibi", (1, 3), [-(2**-s) * (0.5 + 1e-5) for s in (4, 8, 2)]),
        ("paper", (1, 3), [-8 * h / 3 * (2 / 3) for h in range(3)]),
        ("paper", (0, 3), [0, -8 / 3, -16 / 3]),
    ],
)
def test_lightning(slopes, layer, log_decays):
    # no scale and no denominator: q·k = 2, one token apart decays once, two tokens twice
    module = subquad.attention("lightning", 3, 2, layer=layer, slopes=slopes).to(DEVICE)
    x = torch.ones(1, 3, 3, 2, dtype=torch.float64, device=DEVICE)
    v = torch.zeros_like(x)
    v[:, 0, :, 0], v[:, 1, :, 1] = 1, 1
    o = module(x, x, v)
    torch.testing.assert_close(subquad.reference("lightning")(module, x, x, v), o)
    for head, g in enumerate(log_decays):
        expect(o[0, :, head].cpu(), [2, 0], [2 * math.exp(g), 2], [2 * math.exp(2 * g), 2 * math.exp(g)])


def test_gla():
    # √D = 2; channel 0 halves and channel 1 quarters at the second token, channel 0 halves again at the third
    q, k = tokens(*[[1, 1, 0, 0]] * 3), tokens([2, 4, 0, 0], [0, 2, 0, 0], [6, 0, 0, 0])
    log_decay = -LN2 * tokens([9, 9, 9, 9], [1, 2, 0, 0], [1, 0, 0, 0])
    expect(weights("gla", q, k, log_decay=log_decay), [3, 0, 0], [(1 + 1) / 2, 1, 0], [(0.5 + 1) / 2, 1, 3])


def delta(name, k, beta, log_decay=None):
    """Queries are the keys; without the activation q and k have norm 1 (up to 1e-6)."""
    gate = {} if log_decay is None else {"log_decay": torch.tensor(log_decay, dtype=torch.float64, device=DEVICE)[None, :, None]}
    beta = torch.tensor(beta, dtype=torch.float64, device=DEVICE)[None, :, None]
    return weights(name, k, k, options={"qk_activation": "none"}, beta=beta, **gate)


@pytest.mark.parametrize("name, decays", [("deltanet", None), ("gated-deltanet", [0.0] * 4)])
def test_delta_rule(name, decays):
    # √D = 2. β = 1 stores a value and recalls it whole; the same key again replaces it; a step of ½ goes half way
    a, b = [3, 0, 0, 0], [0, 5, 0, 0]
    stored = delta(name, tokens(a, b, a, a), [1, 1, 1, 0.5], decays)
    expect(stored, [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.5, 0], [0, 0, 0.25, 0.25])


def test_gated_delta_rule():
    # the state halves before the second token, so half of the first value is left to be corrected by half
    found = delta("gated-deltanet", tokens([1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]), [1, 0.5, 0], [-9.0, -LN2, 0.0])
    expect(found, [0.5, 0, 0], [0.125, 0.25, 0], [0, 0, 0])


@pytest.mark.parametrize(
    "feature_map, x, same, other",
    [
        # softmax of (ln 3, 0) is (3/4, 1/4), of its negative (1/4, 3/4)
        ("softmax", LN3, 2 * (9 + 1) / 16, 4 * 3 / 16),
        # exp of (ln 2, 0, −ln 2, 0) is (2, 1, 1/2, 1)
        ("exp", LN2, 4 + 1 + 1 / 4 + 1, 1 + 1 + 1 + 1),
        # exp of twice that is (4, 1, 1/4, 1), which sums to 25/4
        ("softmax2", LN2, 16 + 1 + 1 / 16 + 1, 1 + 1 + 1 + 1),
    ],
)
def test_hedgehog(feature_map, x, same, other):
    q, k = tokens([x, 0], [x, 0]), tokens([x, 0], [-x, 0])
    total = same + other
    expect(weights("hedgehog", q, k, options={"feature_map": feature_map}), [1, 0], [same / total, other / total])


@pytest.mark.parametrize("affine", [False, True])
def test_lolcats(affine):
    # window of 2 on three tokens, g = 0.1; the window's weights are relative to its own maximum, 5 + ln 2
    scale = math.sqrt(2) / LN3
    q, k = tokens([0, 0], [0, 0], [LN3, 0]), tokens([-LN3, 0], [scale * (5 + LN2), 0], [scale * 5, 0])
    identity = {"W_q": torch.eye(2), "W_k": torch.eye(2), "window_factor": -2 * LN3}  # sigmoid: 1 / (1 + 9)
    found = weights("lolcats", q, k, parameters=identity, options={"window": 2, "feature_dim": 2, "affine_factors": affine})
    row = torch.tensor([0.9 * 0.75 if affine else 0.75, 0.1, 0.05])  # φ(q)·φ(−q) = 4 · 3/4 · 1/4
    expect(found, [1, 0, 0], [0.5, 0.5, 0], (row / row.sum()).tolist())
    # a window of 1 and a sink: the maximum is over both, and only the token between them is the past
    options = {"window": 1, "sinks": 1, "feature_dim": 2, "affine_factors": affine}
    found = weights("lolcats", q, k[:, [2, 0, 1]], parameters=identity, options=options)
    expect(found, [1, 0, 0], [0.5, 0.5, 0], (row / row.sum())[[2, 0, 1]].tolist())


def test_rala():
    # D = 1: φ(q) = 1, φ(k) = (2, 1); the token weights are ∝ e², e, so the keys weigh 2e² and e
    q, k = tokens([0], [0]), tokens([1], [0])
    row = [2 * math.e / (2 * math.e + 1), 1 / (2 * math.e + 1)]
    expect(weights("rala", q, k, grid=(1, 2)), row, row)


def test_mala():
    # D = 1: φ(q) = 2, φ(k) = (2, 1), so s = (4, 2) and z = 3; a = (4/3 · 4 − 3, 4/3 · 2 − 3) / 2
    row = [(16 / 3 - 3) / 2, (8 / 3 - 3) / 2]
    expect(weights("mala", tokens([1], [1]), tokens([1], [0]), grid=(1, 2)), row, row)


def test_nalaformer():
    # signs must agree: the first query sees the first key alone, the second query weighs (½)³ · 3⁄5^p against 1 · 4⁄5^p
    q, k = tokens([-1, 0], [3, 4]), tokens([-20, 5], [5, 10])  # far above eps
    p = 3 * (0.5 + math.tanh(5))
    first, second = 0.8**p * 0.5**3, 0.6**p * 0.5**3 + 0.8**p
    expect(weights("nalaformer", q, k, grid=(1, 2)), [1, 0], [first / (first + second), second / (first + second)])


def test_inline():
    # D = 1: s = (2, 1) / 2, of mean 3/4; a = s − 3/4 + 1/2
    expect(weights("inline", tokens([1], [2]), tokens([2], [1]), grid=(1, 2)), [0.75, 0.25], [1, 0])


def test_l2vit():
    # τ = ½; the first row's sum, 3, is under the floor of 4, and the second's, 6, is not
    found = weights("l2vit", tokens([1], [2]), tokens([2], [1]), parameters={"temperature": 0.5}, options={"floor": 4.0}, grid=(1, 2))
    expect(found, [0.5 * 2 / 4, 0.5 * 1 / 4], [0.5 * 2 / 3, 0.5 * 1 / 3])


def test_lightnet():
    # the keys' only channel is a softmax over tokens, (3, 1) / 4; silu(1) = 1 / (1 + 1/e)
    silu = 1 / (1 + math.exp(-1))
    q, k = tokens([1], [1], [0]), tokens([LN3], [0], [0])
    expect(weights("lightnet", q[:, :2], k[:, :2], options={"causal": False}), *[[0.75 * silu, 0.25 * silu]] * 2)
    expect(weights("lightnet", q, k), [silu, 0, 0], [0.75 * silu, 0.25 * silu, 0], [0, 0, 0])


@pytest.mark.parametrize("name, last", [("linear-elu", [4 / 6, 2 / 6]), ("linear-relu", [1, 0])])
def test_plain_linear_attention(name, last):
    # D = 1: φ = (x + 1) for x ≥ 0, or x: keys 1 and 0, queries 1
    expect(weights(name, tokens([1], [1]), tokens([1], [0])), [1, 0], last)
    expect(weights(name, tokens([1], [1]), tokens([1], [0]), options={"causal": False}), last, last)
