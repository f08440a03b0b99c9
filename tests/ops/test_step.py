"""`recurrent_step` against the token-by-token definitions in float64; on CPU its kernel runs in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad.ops import step
from subquad.ops.delta.reference import delta_rule
from subquad.ops.linear.reference import linear_attention
from subquad.ops.step import available, recurrent_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("none", "head", "token", "channel")
SHAPES = {  # B, T, heads of q, k, v, D, V
    "plain": (2, 1, 2, 2, 2, 16, 16),
    "several tokens": (2, 5, 2, 2, 2, 32, 16),
    "most tokens": (1, 16, 1, 1, 1, 16, 16),
    "odd sizes": (1, 3, 2, 2, 2, 20, 9),
    "odd size over several tiles": (1, 2, 1, 1, 1, 80, 70),
    "value one wider, as with a normaliser": (1, 2, 1, 1, 1, 64, 65),
    "grouped queries": (2, 3, 6, 2, 2, 16, 16),
    "grouped keys and values": (1, 2, 8, 2, 4, 16, 16),
    "one query head": (2, 2, 1, 4, 4, 16, 16),
    "widest": (1, 1, 1, 1, 1, 256, 256),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}  # relative to the largest value: rounding alone


def make(shape: tuple, kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, tokens, hq, hk, hv, width, columns = shape
    q, k = (torch.randn(batch, tokens, h, width, device=DEVICE).to(dtype) for h in (hq, hk))
    v, heads = torch.randn(batch, tokens, hv, columns, device=DEVICE).to(dtype), max(hk, hv)
    sizes = {"none": None, "head": (heads,), "token": (batch, tokens, heads), "channel": (batch, tokens, heads, width)}[kind]
    x = {"q": q, "k": normalize(k, dim=-1), "v": v, "beta": torch.rand(batch, tokens, heads, device=DEVICE).to(dtype)}
    x["state"] = torch.randn(batch, heads, width, columns, device=DEVICE)
    return x if sizes is None else x | {"log_decay": -torch.rand(sizes, device=DEVICE)}


def run(x: dict[str, Tensor], delta: bool) -> tuple[Tensor, Tensor]:
    return recurrent_step(x["q"], x["k"], x["v"], x.get("log_decay"), x["beta"] if delta else None, x["state"], 0.3)


def define(x: dict[str, Tensor], delta: bool) -> tuple[Tensor, Tensor]:
    x = {name: t.double() for name, t in x.items()}
    given = {"log_decay": x.get("log_decay"), "scale": 0.3, "initial_state": x["state"], "return_state": True}
    if not delta:
        return linear_attention(x["q"], x["k"], x["v"], **given)
    if given["log_decay"] is not None and given["log_decay"].dim() == 1:
        given["log_decay"] = given["log_decay"].expand(x["beta"].shape)
    return delta_rule(x["q"], x["k"], x["v"], x["beta"], **given)


def check(x: dict[str, Tensor], delta: bool) -> None:
    got, want = run(x, delta), define(x, delta)
    for result, exact, dtype in zip(got, want, (x["q"].dtype, torch.float32)):
        assert result.shape == exact.shape and result.dtype == dtype
        assert (result.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_its_definition(shape: tuple, kind: str, delta: bool) -> None:
    check(make(shape, kind), delta)


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_only_its_output(dtype: torch.dtype, delta: bool) -> None:
    check(make(SHAPES["several tokens"], "channel", dtype), delta)


@pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])
def test_reads_views_as_they_are(delta: bool) -> None:
    """Heads before tokens, one tensor for q, k and v, a transposed state, the last tokens of longer inputs."""
    x = make(SHAPES["several tokens"], "channel")
    joint = torch.cat([x["q"], x["k"], x["v"]], -1).transpose(1, 2).contiguous().transpose(1, 2)
    x["q"], x["k"], x["v"] = joint.split([32, 32, 16], -1)
    x["state"] = x["state"].mT.contiguous().mT
    x["log_decay"] = torch.stack([x["log_decay"]] * 2, -1)[..., 1]
    x = {name: t if name == "state" else t[:, 2:] for name, t in x.items()}
    assert not any(t.is_contiguous() for t in x.values())
    before = x["state"].clone()
    check(x, delta)
    assert torch.equal(x["state"], before)


def test_tokens_at_once_equal_one_at_a_time() -> None:
    x = make(SHAPES["several tokens"], "token")
    o, state = run(x, True)
    outs, carried = [], x["state"]
    for t in range(x["q"].shape[1]):
        token = {name: u[:, t : t + 1] for name, u in x.items() if name != "state"}
        one, carried = run(token | {"state": carried}, True)
        outs.append(one)
    assert torch.equal(torch.cat(outs, 1), o) and torch.equal(carried, state)


def test_extreme_gates() -> None:
    x = make(SHAPES["several tokens"], "channel")
    x["log_decay"] = torch.where(torch.rand_like(x["log_decay"]) < 0.5, -torch.inf, -1e4)
    x["log_decay"][:, 0] = 0
    check(x, True)


def test_empty_batch() -> None:
    x = {name: t[:0] for name, t in make(SHAPES["plain"], "token").items()}
    o, state = run(x, False)
    assert o.shape == (0, 1, 2, 16) and state.shape == (0, 2, 16, 16)


def test_output_dtype() -> None:
    x = make(SHAPES["plain"], "none", torch.bfloat16)
    o, _ = recurrent_step(x["q"], x["k"], x["v"], None, None, x["state"], 0.3, torch.float32)
    exact, _ = define(x, False)
    assert o.dtype == torch.float32 and (o - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_custom_operator() -> None:
    x = make(SHAPES["grouped queries"], "token")
    arguments = (x["q"], x["k"], x["v"], x["log_decay"], x["beta"], x["state"], 0.3, torch.float32)
    torch.library.opcheck(torch.ops.subquad.recurrent_step.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_compiles_whole() -> None:
    x = make(SHAPES["several tokens"], "token")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step_if_served(q: Tensor) -> tuple[Tensor, Tensor]:
        assert available(q, x["k"])
        return recurrent_step(q, x["k"], x["v"], x["log_decay"], None, x["state"], 0.3)

    for got, want in zip(step_if_served(x["q"]), run(x, False)):
        assert torch.equal(got, want)


def test_available(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 16, 2, 32, device=DEVICE)
    assert available(q) and available(q.bfloat16(), None, q)
    assert not available(q.double())
    assert not available(q.new_zeros(1, 17, 2, 32)) and not available(q[:, :0]) and not available(q.new_zeros(1, 1, 1, 257))
    state = torch.zeros(1, requires_grad=True)
    assert not available(q, None, state)
    with torch.no_grad():
        assert available(q, None, state)
    monkeypatch.setattr(step, "_INTERPRETED", False)
    assert available(q) == q.is_cuda
    monkeypatch.setattr(step, "_TRITON", False)
    assert not available(q)
