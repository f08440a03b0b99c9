"""`linear_attention` against its definition, and against identities that hold without it."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from subquad.checks import InputError
from subquad.ops.linear import linear_attention, linear_sums
from subquad.ops.linear.reference import linear_attention as reference

KINDS = ("none", "head", "token", "channel")
SHAPES = {  # B, N, heads of q, k, v, D, V, cu_seqlens
    "plain": (2, 150, 2, 2, 2, 8, 8, None),
    "values wider, tail of one": (1, 65, 2, 2, 2, 4, 7, None),
    "grouped queries": (2, 77, 6, 2, 2, 6, 5, None),
    "grouped keys": (1, 70, 4, 1, 2, 5, 6, None),
    "grouped values": (1, 70, 4, 2, 1, 5, 6, None),
    "one query head": (2, 64, 1, 3, 3, 4, 4, None),
    "one token": (3, 1, 4, 2, 2, 8, 6, None),
    "few tokens": (2, 7, 4, 2, 2, 4, 4, None),
    "no rows": (0, 20, 2, 2, 2, 4, 4, None),
    "no tokens": (2, 0, 2, 2, 2, 4, 4, None),
    "packed": (1, 215, 4, 2, 2, 6, 5, [0, 0, 1, 65, 150, 150, 215]),
}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.isfinite(got).all()
    if got.numel():
        assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


def decay_of(kind: str, batch: int, tokens: int, heads: int, width: int, low: float = -1.0) -> Tensor | None:
    shape = {"none": (), "head": (heads,), "token": (batch, tokens, heads), "channel": (batch, tokens, heads, width)}[kind]
    return torch.rand(shape, dtype=torch.float64) * low if shape else None


def make(shape: tuple, kind: str, normalize: bool) -> dict:
    batch, tokens, hq, hk, hv, width, value, ends = shape
    torch.manual_seed(0)
    draw = torch.rand if normalize else torch.randn  # positive, so that denominators stay away from zero
    q, k = draw(batch, tokens, hq, width, dtype=torch.float64), draw(batch, tokens, hk, width, dtype=torch.float64)
    v = torch.randn(batch, tokens, hv, value, dtype=torch.float64)
    rows = batch if ends is None else len(ends) - 1
    S = torch.randn(rows, max(hk, hv), width, value, dtype=torch.float64)
    z = torch.rand(rows, max(hk, hv), width, dtype=torch.float64) if normalize else None
    leaves = {"q": q, "k": k, "v": v, "log_decay": decay_of(kind, batch, tokens, max(hk, hv), width), "S": S, "z": z}
    return {name: x.requires_grad_() for name, x in leaves.items() if x is not None}


def run(function, leaves: dict, normalize: bool, ends: list[int] | None, weigh_o: float = 1.0, weigh_state: float = 1.0) -> dict:
    """Outputs, states, and the gradient of a random combination of both with respect to each leaf."""
    state = (leaves["S"], leaves["z"]) if normalize else leaves["S"]
    o, after = function(
        leaves["q"], leaves["k"], leaves["v"], log_decay=leaves.get("log_decay"), normalize=normalize, initial_state=state,
        return_state=True, cu_seqlens=None if ends is None else torch.tensor(ends),
    )  # fmt: skip
    after = after if normalize else (after,)
    torch.manual_seed(1)
    loss = weigh_o * (o * torch.randn_like(o)).sum() + weigh_state * sum((x * torch.randn_like(x)).sum() for x in after)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"o": o, **{f"state {i}": x for i, x in enumerate(after)}, **{f"d {n}": g for n, g in zip(leaves, grads)}}


@pytest.mark.parametrize("normalize", [False, True], ids=["sum", "normalized"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_its_definition(shape: tuple, kind: str, normalize: bool) -> None:
    leaves = make(shape, kind, normalize)
    got, want = run(linear_attention, leaves, normalize, shape[-1]), run(reference, leaves, normalize, shape[-1])
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weigh_o, weigh_state", [(1.0, 0.0), (0.0, 1.0)], ids=["output alone", "state alone"])
def test_gradients_through_one_result_alone(kind: str, weigh_o: float, weigh_state: float) -> None:
    leaves = make(SHAPES["grouped queries"], kind, False)
    got, want = (run(f, leaves, False, None, weigh_o, weigh_state) for f in (linear_attention, reference))
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "log_decay", "S"])
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_each_gradient_alone(kind: str, wanted: str) -> None:
    leaves = make(SHAPES["plain"], kind, False)
    want = run(reference, leaves, False, None)[f"d {wanted}"]
    alone = {name: x.detach().requires_grad_(name == wanted) for name, x in leaves.items()}
    o, S = linear_attention(
        alone["q"], alone["k"], alone["v"], log_decay=alone["log_decay"], initial_state=alone["S"], return_state=True
    )  # fmt: skip
    torch.manual_seed(1)
    ((o * torch.randn_like(o)).sum() + (S * torch.randn_like(S)).sum()).backward()
    close(alone[wanted].grad, want)
    assert all(x.grad is None for name, x in alone.items() if name != wanted)


def test_gradient_when_the_state_is_not_asked_for() -> None:
    leaves = make(SHAPES["plain"], "token", False)
    q, k, v, g, _ = leaves.values()
    grads = [torch.autograd.grad(f(q, k, v, log_decay=g).square().sum(), (q, k, v, g)) for f in (linear_attention, reference)]
    for got, want in zip(*grads):
        close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_splits_carry_the_state(kind: str) -> None:
    leaves = {name: x.detach() for name, x in make((2, 140, 4, 2, 2, 6, 5, None), kind, True).items()}
    g = leaves.get("log_decay")
    whole, end = linear_attention(
        leaves["q"], leaves["k"], leaves["v"], log_decay=g, normalize=True, initial_state=(leaves["S"], leaves["z"]), return_state=True
    )
    state, outs = (leaves["S"], leaves["z"]), []
    for start, stop in [(0, 1), (1, 70), (70, 71), (71, 135), (135, 140)]:
        part = g if g is None or g.dim() == 1 else g[:, start:stop]
        q, k, v = (leaves[n][:, start:stop] for n in "qkv")
        o, state = linear_attention(q, k, v, log_decay=part, normalize=True, initial_state=state, return_state=True)
        outs.append(o)
    close(torch.cat(outs, 1), whole)
    for got, want in zip(state, end):
        close(got, want)


@pytest.mark.parametrize("kind", ["head", "token", "channel"])
def test_equals_the_quadratic_form(kind: str) -> None:
    """Written with explicit products of decays, without logs or sums of them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 67, 2, 4, dtype=torch.float64) for _ in range(3))
    g = decay_of(kind, 1, 67, 2, 4)
    a = g.exp() if g.dim() == 4 else g.exp()[..., None].expand(1, 67, 2, 4)
    want = torch.zeros_like(v)
    for t in range(67):
        weight = torch.ones(1, 2, 4, dtype=torch.float64)
        for s in range(t, -1, -1):
            want[:, t] += (q[:, t] * weight * k[:, s]).sum(-1, keepdim=True) * v[:, s] * 0.5
            weight = weight * a[:, s]
    close(linear_attention(q, k, v, log_decay=g), want)


def test_no_decay_is_a_running_sum_and_one_head_decay_a_constant_token_decay() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 90, 3, 6, dtype=torch.float64) for _ in range(3))
    sums = (k[..., :, None] * v[..., None, :]).cumsum(1)
    close(linear_attention(q, k, v, scale=1.0), torch.einsum("bnhd,bnhdv->bnhv", q, sums))
    close(linear_attention(q, k, v, log_decay=torch.zeros(2, 90, 3).double()), linear_attention(q, k, v))
    head = -torch.rand(3, dtype=torch.float64)
    token = head.expand(2, 90, 3)
    want = linear_attention(q, k, v, log_decay=head)
    close(linear_attention(q, k, v, log_decay=token), want)
    close(linear_attention(q, k, v, log_decay=token[..., None].expand(2, 90, 3, 6)), want)


def test_normalizer_averages_values() -> None:
    """With constant features each output is the mean of the values so far, and constant values are returned."""
    torch.manual_seed(0)
    ones, v = torch.ones(1, 100, 1, 4, dtype=torch.float64), torch.randn(1, 100, 1, 3, dtype=torch.float64)
    means = v.cumsum(1) / torch.arange(1, 101).view(1, -1, 1, 1)
    close(linear_attention(ones, ones, v, normalize=True, eps=0.0), means)
    q, k = torch.rand(1, 100, 1, 4, dtype=torch.float64), torch.rand(1, 100, 1, 4, dtype=torch.float64)
    g = -torch.rand(1, 100, 1, 4, dtype=torch.float64)
    close(linear_attention(q, k, torch.full_like(v, 2.5), log_decay=g, normalize=True, eps=0.0), torch.full_like(v, 2.5))


def test_state_of_the_true_length() -> None:
    """The last chunk's missing tokens do not decay the state: S = Σ λ^(N−j) k_j v_jᵀ with N = 70."""
    torch.manual_seed(0)
    k, v = torch.randn(1, 70, 1, 4, dtype=torch.float64), torch.randn(1, 70, 1, 4, dtype=torch.float64)
    _, S = linear_attention(k, k, v, log_decay=torch.tensor([-0.3], dtype=torch.float64), return_state=True)
    weights = (-0.3 * torch.arange(69, -1, -1, dtype=torch.float64)).exp()
    close(S[0, 0], (k[0, :, 0] * weights[:, None]).T @ v[0, :, 0])


@pytest.mark.parametrize("gate", [-1e3, -1e5, -torch.inf])
@pytest.mark.parametrize("kind", ["head", "token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_gates_leave_the_token_alone(kind: str, gate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 4, dtype=dtype).requires_grad_() for _ in range(3))
    g = torch.full_like(decay_of(kind, 1, 100, 2, 4), gate).to(dtype).requires_grad_()
    o = linear_attention(q, k, v, log_decay=g, scale=1.0)
    close(o, (q * k).sum(-1, keepdim=True) * v, 1e-6)
    o.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v, g))
    close(v.grad, (q * k).sum(-1, keepdim=True).expand_as(v), 1e-6)


@pytest.mark.parametrize("kind", ["token", "channel"])
def test_a_closed_gate_costs_its_neighbours_no_digits(kind: str) -> None:
    """Float32, gates of −1000 between gates near 0: sums of thousands must not blur the small ones."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 128, 2, 8) for _ in range(3))
    g = (decay_of(kind, 1, 128, 2, 8) * 0.01).float()
    g[:, [3, 20, 21, 22, 40, 90]] = -1e3
    g[:, 50:55] = 0.0
    leaves = [x.double().requires_grad_() for x in (q, k, v, g)]
    want = reference(*leaves[:3], log_decay=leaves[3])
    small = [x.clone().requires_grad_() for x in (q, k, v, g)]
    got = linear_attention(*small[:3], log_decay=small[3])
    close(got.double(), want, 2e-6)
    for x, y in zip(torch.autograd.grad(got.square().sum(), small), torch.autograd.grad(want.square().sum(), leaves)):
        close(x.double(), y, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("tokens", [1, 300])
def test_half_precision_keeps_states_in_float32(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 8).to(dtype) for _ in range(3))
    g = -torch.rand(1, tokens, 2) * 0.01
    o, S = linear_attention(q, k, v, log_decay=g, return_state=True)
    want_o, want_S = reference(q.double(), k.double(), v.double(), log_decay=g.double(), return_state=True)
    assert o.dtype == dtype and S.dtype == torch.float32
    close(S.double(), want_S, 1e-6)
    close(o.double(), want_o, tolerance)


def test_autocast_does_not_touch_the_state() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 130, 2, 8) for _ in range(3))
    want = linear_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_attention(q, k, v)
    assert torch.equal(got, want)


def test_inputs_are_left_alone() -> None:
    leaves = make(SHAPES["plain"], "channel", False)
    before = {name: x.detach().clone() for name, x in leaves.items()}
    run(linear_attention, leaves, False, None)
    assert all(torch.equal(x, before[name]) for name, x in leaves.items())


@pytest.mark.parametrize(
    "argument, change",
    [
        ("log_decay", {"log_decay": torch.zeros(3)}),
        ("log_decay", {"log_decay": -0.5}),
        ("initial_state", {"initial_state": torch.zeros(1, 2, 4, 5)}),
        ("initial_state", {"initial_state": torch.zeros(1, 2, 4, 4), "normalize": True}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
        ("v", {"v": torch.zeros(1, 9, 2, 4)}),
    ],
)
def test_bad_input_names_the_argument(argument: str, change: dict) -> None:
    given = {"q": torch.zeros(1, 8, 4, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4), **change}
    with pytest.raises(InputError) as error:
        linear_attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert error.value.argument == argument and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_gradients_compiled_by_inductor():
    """A whole chunk and a tail: inductor once added in place to the zero state that both directions start from."""
    q, k, v, w = (torch.randn(1, 72, 1, 16, requires_grad=name != "w") for name in "qkvw")
    compiled = torch.compile(lambda q, k, v: linear_attention(q, k, v, scale=1.0), fullgraph=True, backend="inductor")
    expected = torch.autograd.grad((linear_attention(q, k, v, scale=1.0) * w).sum(), (q, k, v))
    for found, right in zip(torch.autograd.grad((compiled(q, k, v) * w).sum(), (q, k, v)), expected):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (2, 1)], ids=str)
def test_sums_of_values_and_of_weights(kernels, heads, monkeypatch):
    """Against all pairs: Σ_j (q_i·k_j) v_j and Σ_j (q_i·k_j) c_j, behind sums that came before."""
    if kernels == "on":
        pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setenv("SUBQUAD_KERNELS", kernels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (torch.rand(1, 70, h, d, device=device, requires_grad=True) for h, d in ((4, 32), (heads[0], 32), (heads[1], 16)))
    counts = (torch.arange(70, device=device) % 3 > 0).float()[None, :, None, None]
    start = torch.rand(1, 2, 32, 17, device=device)
    o, total, state = linear_sums(q, k, v, counts=counts, initial_state=start, return_state=True)
    wide = [x.repeat_interleave(4 // x.shape[2], 2).double() for x in (q, k, v)]
    values = torch.cat([wide[2], counts.double().expand(1, 70, 4, 1)], -1)
    pairs = torch.einsum("bnhd,bmhd->bhnm", *wide[:2]).tril()
    every = torch.einsum("bhnm,bmhv->bnhv", pairs, values)
    want = every + torch.einsum("bnhd,bhdv->bnhv", wide[0], start.double().repeat_interleave(2, 1))
    last = start + torch.einsum("bmhd,bmhv->bhdv", wide[1], values)[:, ::2]
    close(torch.cat([o, total], -1).double(), want, 1e-5)
    close(state.double(), last, 1e-5)
    found = torch.autograd.grad(o.sum() + total.square().sum(), (q, k, v))
    expected = torch.autograd.grad(want[..., :-1].sum() + want[..., -1].square().sum(), (q, k, v))
    for a, b in zip(found, expected):
        close(a, b, 1e-5)


@pytest.mark.parametrize("name", ["linear", "sparse"])
def test_exported_calls_keep_out_of_autocast(name):
    """What is exported without autocast and run under it computes in the dtype of its inputs all the same."""
    from subquad.ops.sparse import Layout, sparse_attention

    class Call(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v) if name == "linear" else sparse_attention(q, k, v, Layout.causal(40))

    x = tuple(torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exported = torch.export.export(Call(), x).module()
    with torch.autocast("cpu", torch.bfloat16):
        found = exported(*x)
    torch.testing.assert_close(found, Call()(*x), rtol=1e-6, atol=1e-6)
