"""Stretching a converted model for longer contexts, against the definition written out."""

import math

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.swap import swapped

SIZES = {"window": 4, "feature_dim": 8}


def module(**options):
    torch.manual_seed(0)
    made = subquad.attention("lolcats", heads=2, head_dim=8, init="kaiming", **SIZES, **options).double()
    with torch.no_grad():
        made.window_factor.copy_(torch.tensor([-1.0, 1.5]))  # g = 0.27 and 0.82: times 4 more than 1
        for weight in (made.W_q, made.W_k):
            weight.mul_(4)
    return made


def weights(made, q, k, by):
    """a_ij by loops over pairs, with W times by^0.09 and g times by^(2/3), f being that of the module before: ``[H, N, N]``."""
    g = made.window_factor.detach().sigmoid()
    f = 1 - g if made.affine_factors else torch.ones_like(g)
    n = q.shape[1]
    a = torch.zeros(made.heads, n, n, dtype=torch.float64)
    for h in range(made.heads):
        phi = []
        for x, w in ((q, made.W_q), (k, made.W_k)):
            y = x[0, :, h] @ (w[h].detach() * by**0.09)
            phi.append(torch.cat([y.softmax(-1), (-y).softmax(-1)], -1))
        for i in range(n):
            near = [j for j in range(i + 1) if j > i - made.window or j < made.sinks]
            scores = {j: float(q[0, i, h] @ k[0, j, h]) / math.sqrt(made.head_dim) for j in near}
            for j in range(i + 1):
                inside = math.exp(scores[j] - max(scores.values())) if j in near else None
                a[h, i, j] = f[h] * (phi[0][i] @ phi[1][j]) if inside is None else by ** (2 / 3) * g[h] * inside
    return a / a.sum(-1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"affine_factors": True}, {"sinks": 2, "far_rotary": False}])
def test_weights_are_the_definitions(options):
    made = module(**options)
    q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    expected = torch.einsum("hnm,bmhv->bnhv", weights(made, q, k, 8.0), v)
    before = made(q, k, v)
    assert subquad.stretch(made, 8) is made and made.affine_factors
    o = made(q, k, v)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    assert (o[:, -1] - before[:, -1]).abs().max() > 1e-3
    torch.testing.assert_close(o[:, :4], before[:, :4], rtol=1e-12, atol=1e-12)  # all of it in the window

    part, state = made(q[:, :9], k[:, :9], v[:, :9], return_state=True)
    steps = [part]
    for i in range(9, 12):
        one, state = made(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], state=state, return_state=True)
        steps.append(one)
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-10, atol=1e-10)


def test_by_two_and_by_four_is_by_eight_and_back():
    q, k, v = torch.randn(3, 1, 12, 2, 8, dtype=torch.float64)
    plain = module()(q, k, v)
    once, twice = subquad.stretch(module(), 8), subquad.stretch(subquad.stretch(module(), 2), 4)
    torch.testing.assert_close(twice(q, k, v), once(q, k, v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(subquad.stretch(once, 1 / 8)(q, k, v), plain, rtol=1e-12, atol=1e-12)


def test_a_model_saves_as_it_was_stretched(decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = subquad.swap(decoder(), "lolcats", layers=[0, 2], sinks=1, far_rotary=False, **SIZES)
    ids = torch.randint(5, 97, (1, 30))
    before = model(ids).logits
    assert subquad.stretch(model, 4) is model
    now = model(ids).logits
    assert (now - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [m.mechanism.affine_factors for m in swapped(again).values()] == [True, True]
    assert torch.equal(again(ids).logits, now)
    for one in swapped(model).values():
        assert one.mechanism.W_q.requires_grad and one.mechanism.W_q.is_leaf


def test_bad_input_changes_nothing(decoder):
    with pytest.raises(InputError, match=r"model.*its own attention.*lolcats"):
        subquad.stretch(decoder(), 8)
    with pytest.raises(InputError, match=r"model.*gla.*lolcats"):
        subquad.stretch(subquad.swap(decoder(), "gla"), 8)
    made = module()
    for by in (0, -1, math.inf, math.nan, "8", True, 10**400):
        with pytest.raises(InputError, match="by"):
            subquad.stretch(made, by)
    assert not made.affine_factors
    model = subquad.swap(decoder(), "lolcats", **SIZES)
    swapped(model)[2].mechanism.half()
    with pytest.raises(InputError, match=r"by: got 1e\+99; expected a smaller number: W_q .* float16"):
        subquad.stretch(model, 1e99)  # W is 1e9 then, more than float16 has
    assert not any(one.mechanism.affine_factors for one in swapped(model).values())
    assert all(one.mechanism.W_q.max() == 1 for one in swapped(model).values())


def test_the_command_line_stretches_before_it_asks(decoder, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    import subquad.bench.needle
    import subquad.models.load
    from subquad.cli import app

    model = subquad.swap(decoder(), "lolcats", **SIZES)
    factor = swapped(model)[0].mechanism.window_factor.detach().clone()
    seen, nothing = [], subquad.bench.needle.Retrieval((), "forward", 0)
    monkeypatch.setattr(subquad.models.load, "load_model", lambda *_: (model, None))
    monkeypatch.setattr(subquad.bench.needle, "retrieval", lambda model, *_, **__: seen.append(model) or nothing)
    done = CliRunner().invoke(app, ["needle", "anything", "--stretch", "8", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    layer = swapped(seen[0])[0].mechanism
    ratio = layer.window_factor.exp() / factor.sigmoid()  # σ(x) / (1 − σ(x)) = exp x
    torch.testing.assert_close(ratio, torch.full_like(ratio, 4.0))
    monkeypatch.setattr(subquad.models.load, "load_model", lambda *_: pytest.fail("the number is wrong before anything is loaded"))
    for command in ("needle", "chat"):
        failed = CliRunner().invoke(app, [command, "anything", "--stretch", "0", "--device", "cpu"])
        assert failed.exit_code != 0 and len(seen) == 1 and "--stretch: got 0.0; expected a positive number" in failed.output
