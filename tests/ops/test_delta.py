"""`delta_rule` against its definition, and against identities that hold without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from subquad.checks import InputError
from subquad.ops.delta import delta_rule
from subquad.ops.delta.reference import delta_rule as reference
from subquad.ops.linear import linear_attention

KINDS = ("none", "token", "channel")
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


def decay_of(kind: str, batch: int, tokens: int, heads: int, width: int) -> Tensor | None:
    shape = {"none": (), "token": (batch, tokens, heads), "channel": (batch, tokens, heads, width)}[kind]
    return -torch.rand(shape, dtype=torch.float64) if shape else None


def make(shape: tuple, kind: str) -> dict:
    batch, tokens, hq, hk, hv, width, value, ends = shape
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, h, width, dtype=torch.float64) for h in (hq, hk))
    v, heads = torch.randn(batch, tokens, hv, value, dtype=torch.float64), max(hk, hv)
    rows = batch if ends is None else len(ends) - 1
    S = torch.randn(rows, heads, width, value, dtype=torch.float64)
    beta = torch.rand(batch, tokens, heads, dtype=torch.float64)
    leaves = {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": beta, "log_decay": decay_of(kind, batch, tokens, heads, width), "S": S}
    return {name: x.requires_grad_() for name, x in leaves.items() if x is not None}


def run(function, leaves: dict, ends: list[int] | None, weigh_o: float = 1.0, weigh_state: float = 1.0) -> dict:
    """o, the state, and the gradient of a random combination of both with respect to each leaf."""
    o, S = function(
        leaves["q"], leaves["k"], leaves["v"], leaves["beta"], log_decay=leaves.get("log_decay"), initial_state=leaves["S"],
        return_state=True, cu_seqlens=None if ends is None else torch.tensor(ends),
    )  # fmt: skip
    torch.manual_seed(1)
    loss = weigh_o * (o * torch.randn_like(o)).sum() + weigh_state * (S * torch.randn_like(S)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"o": o, "state": S, **{f"d {n}": g for n, g in zip(leaves, grads)}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_its_definition(shape: tuple, kind: str) -> None:
    leaves = make(shape, kind)
    got, want = run(delta_rule, leaves, shape[-1]), run(reference, leaves, shape[-1])
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weigh_o, weigh_state", [(1.0, 0.0), (0.0, 1.0)], ids=["output alone", "state alone"])
def test_gradients_through_one_result_alone(kind: str, weigh_o: float, weigh_state: float) -> None:
    leaves = make(SHAPES["grouped queries"], kind)
    got, want = (run(f, leaves, None, weigh_o, weigh_state) for f in (delta_rule, reference))
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "beta", "log_decay", "S"])
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_each_gradient_alone(kind: str, wanted: str) -> None:
    leaves = make(SHAPES["plain"], kind)
    want = run(reference, leaves, None)[f"d {wanted}"]
    alone = {name: x.detach().requires_grad_(name == wanted) for name, x in leaves.items()}
    q, k, v, beta, S = (alone[n] for n in ("q", "k", "v", "beta", "S"))
    o, S = delta_rule(q, k, v, beta, log_decay=alone.get("log_decay"), initial_state=S, return_state=True)
    torch.manual_seed(1)
    ((o * torch.randn_like(o)).sum() + (S * torch.randn_like(S)).sum()).backward()
    close(alone[wanted].grad, want)
    assert all(x.grad is None for name, x in alone.items() if name != wanted)


def test_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of two chunks, as a long sequence is cut: the state and its gradient pass from each to the next."""
    monkeypatch.setattr("subquad.ops.common.CPU_ROWS", 128)
    leaves = make((1, 330, 2, 1, 1, 6, 5, None), "token")
    got, want = run(delta_rule, leaves, None), run(reference, leaves, None)
    for name in want:
        close(got[name], want[name])


@pytest.mark.parametrize("kind", KINDS)
def test_splits_carry_the_state(kind: str) -> None:
    leaves = {name: x.detach() for name, x in make((2, 140, 4, 2, 2, 6, 5, None), kind).items()}
    g, names = leaves.get("log_decay"), ("q", "k", "v", "beta")
    whole, end = delta_rule(*(leaves[n] for n in names), log_decay=g, initial_state=leaves["S"], return_state=True)
    state, outs = leaves["S"], []
    for start, stop in [(0, 1), (1, 70), (70, 71), (71, 135), (135, 140)]:
        part = None if g is None else g[:, start:stop]
        o, state = delta_rule(*(leaves[n][:, start:stop] for n in names), log_decay=part, initial_state=state, return_state=True)
        outs.append(o)
    close(torch.cat(outs, 1), whole)
    close(state, end)


def test_orthonormal_keys_recall_their_values() -> None:
    """β = 1 and orthonormal keys: Sᵀk_i = v_i exactly, and the rule is plain linear attention."""
    torch.manual_seed(0)
    k = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64))[0].view(1, 80, 1, 80)
    q, v, ones = torch.randn_like(k), torch.randn(1, 80, 1, 6, dtype=torch.float64), torch.ones(1, 80, 1, dtype=torch.float64)
    o, S = delta_rule(q, k, v, ones, return_state=True)
    close(k[0, :, 0] @ S[0, 0], v[0, :, 0])
    close(o, linear_attention(q, k, v))


@pytest.mark.parametrize("first", [3, 69])
def test_a_key_seen_again_forgets_its_old_value(first: int) -> None:
    torch.manual_seed(0)
    k, v = normalize(torch.randn(1, 90, 1, 6, dtype=torch.float64), dim=-1), torch.randn(1, 90, 1, 4, dtype=torch.float64)
    k[:, 70] = k[:, first]
    o = delta_rule(k, k, v, torch.ones(1, 90, 1, dtype=torch.float64), scale=1.0)
    close(o, v)  # what was just written with β = 1 is what its own key reads, whatever the state held


def test_no_correction_leaves_the_state() -> None:
    leaves = {name: x.detach() for name, x in make(SHAPES["plain"], "token").items()}
    q, k, v, beta, g, S = leaves.values()
    o, after = delta_rule(q, k, v, torch.zeros_like(beta), initial_state=S, return_state=True, scale=1.0)
    close(after, S)
    close(o, torch.einsum("bnhd,bhdv->bnhv", q, S))
    _, after = delta_rule(q, k, v, torch.zeros_like(beta), log_decay=g, initial_state=S, return_state=True)
    close(after, g.sum(1).exp()[..., None, None] * S)


def test_open_gates_are_no_gates_and_equal_channels_one_gate() -> None:
    leaves = {name: x.detach() for name, x in make(SHAPES["plain"], "token").items()}
    q, k, v, beta, g, _ = leaves.values()
    close(delta_rule(q, k, v, beta, log_decay=torch.zeros_like(g)), delta_rule(q, k, v, beta))
    close(delta_rule(q, k, v, beta, log_decay=g[..., None].expand_as(k)), delta_rule(q, k, v, beta, log_decay=g))


@pytest.mark.parametrize("gate", [-1e3, -1e5, -torch.inf])
@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_gates_leave_the_token_alone(kind: str, gate: float, dtype: torch.dtype) -> None:
    leaves = {name: x.detach().to(dtype) for name, x in make(SHAPES["plain"], kind).items()}
    q, k, v, beta, g, _ = (x.requires_grad_() for x in leaves.values())
    g = torch.full_like(g, gate).requires_grad_()
    o = delta_rule(q, k, v, beta, log_decay=g, scale=1.0)
    close(o, (q * k).sum(-1, keepdim=True) * beta[..., None] * v, 1e-6)
    o.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v, beta, g))


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_equal_keys_in_float32(kind: str) -> None:
    """The worst case for the triangular solve: keys within a few degrees, β near 1; also keys of zero."""
    torch.manual_seed(0)
    k = normalize(torch.randn(1, 1, 1, 16) + 0.05 * torch.randn(1, 200, 1, 16), dim=-1)
    k[:, 40:43] = 0.0
    q, v, beta = torch.randn(1, 200, 1, 16), torch.randn(1, 200, 1, 16), torch.full((1, 200, 1), 0.99)
    g = decay_of(kind, 1, 200, 1, 16)
    g = g if g is None else (g * 0.05).float()
    given = [x.requires_grad_() for x in (q, k, v, beta)]
    exact = [x.detach().double().requires_grad_() for x in given]
    want = reference(*exact, log_decay=g if g is None else g.double())
    got = delta_rule(*given, log_decay=g)
    close(got.double(), want, 1e-5)
    for x, y in zip(torch.autograd.grad(got.square().sum(), given), torch.autograd.grad(want.square().sum(), exact)):
        close(x.double(), y, 1e-4)


@pytest.mark.parametrize("tokens", [1, 300])
def test_half_precision_keeps_states_in_float32(tokens: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 2, 8).bfloat16() for _ in range(3))
    k, beta = normalize(k.float(), dim=-1).bfloat16(), torch.rand(1, tokens, 2)
    o, S = delta_rule(q, k, v, beta, return_state=True)
    want_o, want_S = reference(q.double(), k.double(), v.double(), beta.double(), return_state=True)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    close(S.double(), want_S, 1e-5)
    close(o.double(), want_o, 1e-2)


def test_autocast_does_not_touch_the_state() -> None:
    leaves = {name: x.detach().float() for name, x in make(SHAPES["plain"], "none").items()}
    given = [leaves[n].requires_grad_() for n in ("q", "k", "v", "beta")]
    want = delta_rule(*given)
    grads = torch.autograd.grad(want.square().sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        got = delta_rule(*given)
        found = torch.autograd.grad(got.square().sum(), given)
    assert torch.equal(got, want) and all(torch.equal(x, y) for x, y in zip(found, grads))


@pytest.mark.parametrize(
    "argument, change",
    [
        ("beta", {"beta": torch.zeros(1, 8, 3)}),
        ("beta", {"beta": None}),
        ("log_decay", {"log_decay": torch.zeros(2)}),
        ("initial_state", {"initial_state": torch.zeros(1, 2, 4, 5)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 5])}),
        ("k", {"k": torch.zeros(1, 8, 3, 4)}),
    ],
)
def test_bad_input_names_the_argument(argument: str, change: dict) -> None:
    given = {"q": torch.zeros(1, 8, 4, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4), "beta": torch.ones(1, 8, 2)}
    given |= change
    with pytest.raises(InputError) as error:
        delta_rule(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("beta"), **given)
    assert error.value.argument == argument and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "width, values, dtype, served",
    [
        (128, 128, torch.float32, True),
        (64, 129, torch.float32, False),
        (64, 256, torch.bfloat16, True),
        (129, 64, torch.bfloat16, False),
        (64, 257, torch.bfloat16, False),
    ],
)
def test_kernels_are_asked_for_what_fits_them(monkeypatch, width, values, dtype, served):
    asked = []

    def kernels(q, k, v, *_):
        asked.append(v.shape[-1])
        return torch.zeros_like(v), None

    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    monkeypatch.setattr("subquad.ops.delta.fused.delta_rule", kernels)
    q, k, v = (torch.ones(1, 2, 1, w, dtype=dtype) for w in (width, width, values))
    o = delta_rule(q, k / width, v, torch.ones(1, 2, 1, dtype=dtype))
    assert bool(asked) == served and bool(o.any()) != served
