"""The Triton pass and its backward against the token-by-token definition in float64; on CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad.ops.linear import linear_attention as public
from subquad.ops.linear import reference
from subquad.ops.linear.fused import linear_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("q", "k", "v", "log_decay", "state")
KINDS = ("none", "head", "token", "channel")
SHAPES = {  # B, N, heads of q, k, v, D, V
    "one chunk and a bit": (1, 70, 2, 2, 2, 16, 16),
    "odd sizes": (1, 65, 1, 1, 1, 48, 20),
    "state held turned, over two tiles": (1, 67, 1, 1, 1, 16, 80),
    "grouped queries": (1, 66, 4, 1, 2, 16, 16),
    "fewer query heads": (1, 33, 2, 4, 4, 16, 16),
    "one token": (2, 1, 1, 1, 1, 16, 16),
}


def make(shape: tuple, kind: str, strength: float = 0.1, sequences: int | None = None) -> dict[str, Tensor]:
    batch, tokens, hq, hk, hv, width, columns = shape
    heads = max(hk, hv)
    sizes = {"head": (heads,), "token": (batch, tokens, heads), "channel": (batch, tokens, heads, width)}
    x = {
        "q": torch.randn(batch, tokens, hq, width),
        "k": torch.randn(batch, tokens, hk, width),
        "v": torch.randn(batch, tokens, hv, columns),
        "state": torch.randn(sequences or batch, heads, width, columns),
    }
    if kind != "none":
        x["log_decay"] = -torch.rand(sizes[kind]) * strength
    return {name: t.to(DEVICE) for name, t in x.items()}


def differentiate(outputs: tuple[Tensor, Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradients of everything given, for gradients of the outputs that are the same whoever asks."""
    torch.manual_seed(1)
    weights = [torch.randn(x.shape, dtype=torch.float64).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(given.values()), weights)]


def by_kernels(x: dict[str, Tensor], cu: Tensor | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    given = {name: t.to(torch.float32 if name in ("state", "log_decay") else dtype).requires_grad_() for name, t in x.items()}
    outputs = linear_attention(*(given.get(name) for name in NAMES), cu, 0.3, True, dtype)
    return [t.detach() for t in differentiate(outputs, given)]


def by_definition(x: dict[str, Tensor], cu: Tensor | None = None) -> list[Tensor]:
    given = {name: t.double().requires_grad_() for name, t in x.items()}
    outputs = reference.linear_attention(
        given["q"], given["k"], given["v"], log_decay=given.get("log_decay"), scale=0.3, initial_state=given["state"],
        return_state=True, cu_seqlens=cu,
    )  # fmt: skip
    return [t.detach() for t in differentiate(outputs, given)]


def by_kernels_sum(x: dict[str, Tensor]) -> list[Tensor]:
    given = {name: t.requires_grad_() for name, t in x.items()}
    _, final = linear_attention(*(given.get(name) for name in NAMES), None, 0.3, True, torch.float32)
    return list(torch.autograd.grad(final.sum(), [t for name, t in given.items() if name != "q"]))


def by_definition_sum(x: dict[str, Tensor]) -> list[Tensor]:
    given = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    _, final = reference.linear_attention(
        given["q"], given["k"], given["v"], log_decay=given.get("log_decay"), scale=0.3, initial_state=given["state"], return_state=True
    )
    return list(torch.autograd.grad(final.sum(), [t for name, t in given.items() if name != "q"]))


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_the_definition_s(shape, kind):
    x = make(SHAPES[shape], kind)
    for i, (got, want) in enumerate(zip(by_kernels(x), by_definition(x), strict=True)):
        assert got.shape == want.shape
        assert error(got, want) < (5e-5 if kind == "head" and i == 6 else 5e-6)  # few numbers, what is left of large ones


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(kind):
    cu = torch.tensor([0, 3, 70, 70, 140], dtype=torch.int32, device=DEVICE)
    x = make((1, 140, 2, 2, 2, 16, 16), kind, sequences=4)
    for i, (got, want) in enumerate(zip(by_kernels(x, cu), by_definition(x, cu), strict=True)):
        assert error(got, want) < (5e-5 if kind == "head" and i == 6 else 5e-6)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_strong_decays_stay_exact(kind):
    """Gates from e^-50 to 1: products of factors overflow within a chunk, and running sums reach thousands."""
    x = make((1, 130, 2, 2, 2, 16, 16), kind, strength=50.0)
    x["log_decay"] = torch.where(torch.rand_like(x["log_decay"]) < 0.3, 0.0, x["log_decay"])
    for i, (got, want) in enumerate(zip(by_kernels(x), by_definition(x), strict=True)):
        assert got.isfinite().all()
        if kind != "head" or i != 6:  # a decay per head has no weak tokens, and next to no gradient
            assert error(got, want) < (2e-5 if i == 6 else 5e-6), i


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_gate_of_minus_infinity_forgets_all(kind):
    x = make((1, 90, 1, 1, 1, 16, 16), kind)
    if kind == "head":
        x["log_decay"].fill_(-torch.inf)
    else:
        x["log_decay"][:, 40] = -torch.inf
    x["state"] = None
    o, _ = linear_attention(*(x[name] for name in NAMES), None, 1.0, True, torch.float32)
    start = 89 if kind == "head" else 40
    want = reference.linear_attention(*(x[name][:, start:].double() for name in "qkv"), scale=1.0)
    if kind == "head":
        assert error(o[:, 89:], want) < 1e-6
    else:
        later = reference.linear_attention(
            *(x[name][:, 40:].double() for name in "qkv"), scale=1.0,
            log_decay=torch.cat([torch.zeros_like(x["log_decay"][:, :1]), x["log_decay"][:, 41:]], 1).double(),
        )  # fmt: skip
        assert error(o[:, 40:], later) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_and_no_more(kind, dtype):
    """At most twice the error of computing in float32 and rounding at the end."""
    x = {n: t if n in ("state", "log_decay") else t.to(dtype).float() for n, t in make((1, 200, 2, 2, 2, 32, 64), kind).items()}
    for i, (got, exact, want) in enumerate(zip(by_kernels(x, dtype=dtype), by_kernels(x), by_definition(x), strict=True)):
        rounding = torch.finfo(dtype).eps / 4  # of a few numbers, which may happen to be near what they are rounded to
        most = 2.0
        if dtype == torch.float16 and got.is_cuda:  # tensor cores cut float32 to tf32, all towards 0; of the decay's gradient much cancels
            most = 7.0 if i == 6 else 3.5
        assert error(got, want) < most * max(error(exact.to(dtype), want), rounding), i


def test_strides_are_followed():
    """Tensors kept as [B, H, N, D], as slices, and with reversed last dimensions give what their copies give."""
    x = make((2, 70, 2, 2, 2, 32, 32), "token")
    views = {
        "q": x["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([x["k"], x["k"]], -1)[..., :32],
        "v": x["v"].transpose(2, 3).contiguous().transpose(2, 3),
        "log_decay": x["log_decay"].transpose(1, 2).contiguous().transpose(1, 2),
        "state": x["state"],
    }
    assert all(not views[n].is_contiguous() for n in ("q", "k", "v", "log_decay"))
    plain = linear_attention(*(x[n] for n in NAMES), None, 1.0, True, torch.float32)
    for got, want in zip(linear_attention(*(views[n] for n in NAMES), None, 1.0, True, torch.float32), plain):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_their_gradients_may_have_any_strides(kind):
    """A transposed first state, and the expanded gradient that a plain sum of the final state sends back."""
    x = make((1, 70, 2, 2, 2, 16, 16), kind)
    turned = x["state"].mT.contiguous().mT
    assert not turned.is_contiguous()
    for state in (turned, x["state"][:, :1].expand(1, 2, 16, 16)):
        given = {**x, "state": state}
        assert all(error(a, b.double()) < 1e-6 for a, b in zip(by_kernels(given), by_kernels({**x, "state": state.contiguous()})))
    for i, (got, want) in enumerate(zip(by_kernels_sum(x), by_definition_sum(x), strict=True)):
        assert error(got, want) < (5e-5 if kind == "head" and i == 3 else 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weak_decays_keep_their_digits_after_gates_of_minus_infinity(dtype):
    x = make((1, 128, 2, 2, 2, 32, 32), "token")
    x["log_decay"] = x["log_decay"] * 0 - 0.02
    x["log_decay"][:, 5:20] = -torch.inf
    x = {name: t.to(dtype).float() if name in "qkv" else t for name, t in x.items()}
    o, _ = linear_attention(*(x[n].to(dtype) if n in "qkv" else x[n] for n in NAMES), None, 0.3, True, dtype)
    want = reference.linear_attention(*(x[n].double() for n in "qkv"), log_decay=x["log_decay"].double(), scale=0.3,
                                      initial_state=x["state"].double())  # fmt: skip
    assert error(o, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
def test_segments_change_nothing_but_rounding(kind, monkeypatch, request):
    from subquad.ops import launch as table
    from subquad.ops.linear import launch

    x = make((1, 300, 2, 1, 1, 16, 64), kind)
    want = by_definition(x)
    monkeypatch.setattr(table, "SEGMENT", 1)
    monkeypatch.setattr(table, "processors", lambda device: 16)
    seen = []
    monkeypatch.setattr(launch, "choose", lambda *a: seen.append(table.choose.__wrapped__(*a)) or seen[-1])
    table.use({})  # forgets what was chosen before, and afterwards what is chosen here
    request.addfinalizer(lambda: table.use({}))
    for i, (got, exact) in enumerate(zip(by_kernels(x), want, strict=True)):
        assert error(got, exact) < (1e-4 if kind == "head" and i == 6 else 5e-6)  # one number, what is left of large ones
    assert max(segments for _, segments in seen) > 1


@pytest.mark.parametrize(
    ("decay", "width", "programs", "chunks", "narrow", "segments"),
    [
        ("none", 128, 64, 64, False, 1),  # 128 programs fill 132 processors of one each
        ("none", 128, 32, 128, False, 2),  # 64 would leave half of them idle
        ("scalar", 128, 128, 32, False, 1),
        ("scalar", 128, 32, 128, False, 8),  # 4 would do, of which twice as many are faster
        ("scalar", 128, 16, 512, False, 8),  # 8 would do
        ("scalar", 128, 4, 2048, False, 33),
        ("channel", 128, 16, 64, False, 4),  # 8 would do, of less than 16 chunks
        ("none", 64, 64, 64, True, 1),
    ],
)
def test_few_programs_get_narrow_tiles_or_segments(decay, width, programs, chunks, narrow, segments, monkeypatch):
    from subquad.ops import launch as table

    monkeypatch.setattr(table, "processors", lambda device: 132)
    found = table.choose.__wrapped__("pass", width, width, 16, DEVICE, decay, programs, chunks)
    assert found == (table.config("pass", width, 16, decay, few=narrow), segments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strength", [0.1, 4.0])  # the latter's chunks are risky
@pytest.mark.parametrize("heads", [1, 2])
def test_decays_of_channels_flow_through_all_parts_of_a_sequence(packed, strength, heads, monkeypatch):
    from subquad.ops.linear import channel

    parts = []
    monkeypatch.setattr(channel, "_parts", lambda *given: parts.append(3) or 3)
    cu = torch.tensor([0, 3, 70, 70, 400], dtype=torch.int32, device=DEVICE) if packed else None
    x = make((1, 400, 2, heads, 1, 16, 16), "channel", strength, sequences=4 if packed else None)
    for got, want in zip(by_kernels(x, cu), by_definition(x, cu), strict=True):
        assert error(got, want) < 5e-6
    assert parts == [3]


@pytest.mark.parametrize(
    ("programs", "chunks", "parts"), [(256, 32, 1), (198, 1000, 1), (128, 64, 4), (32, 256, 16), (64, 20, 2), (1, 7, 1)]
)
def test_few_programs_get_parts_of_eight_chunks_at_least(programs, chunks, parts, monkeypatch):
    from subquad.ops.linear import channel

    monkeypatch.setattr(channel, "processors", lambda device: 132)
    assert channel._parts(programs, chunks, DEVICE) == parts


@pytest.mark.parametrize("tokens", [1, 64, 128])
def test_whole_chunks_and_single_tokens(tokens):
    x = make((1, tokens, 1, 1, 1, 16, 16), "token")
    for got, want in zip(by_kernels(x), by_definition(x), strict=True):
        assert got.shape == want.shape
        assert error(got, want) < 5e-6


def test_no_tokens_keep_the_state():
    x = make((1, 0, 2, 2, 2, 16, 16), "none")
    _, final = linear_attention(*(x.get(n) for n in NAMES), None, 1.0, True, torch.float32)
    assert torch.equal(final, x["state"])


def test_ten_runs_are_equal_in_every_bit():
    x = make((1, 130, 2, 2, 2, 16, 16), "token")
    first = by_kernels(x)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(by_kernels(x), first))


def test_the_public_call_takes_the_kernels(monkeypatch):
    """The switch SUBQUAD_KERNELS=on takes them on CPU too, and =off takes the plain form; both give the same."""
    from subquad.ops.linear import fused

    x = make((1, 70, 2, 2, 2, 16, 16), "channel")
    calls = []
    original = fused.linear_attention
    monkeypatch.setattr(fused, "linear_attention", lambda *a: calls.append(1) or original(*a))
    results = []
    for wish in ("on", "off"):
        monkeypatch.setenv("SUBQUAD_KERNELS", wish)
        results.append(public(x["q"], x["k"], x["v"], log_decay=x["log_decay"], initial_state=x["state"], return_state=True))
    assert len(calls) == 1
    for a, b in zip(*results):
        assert error(a, b.double()) < 2e-6


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_the_operator_is_well_formed(kind):
    """Schema, fake implementation and autograd registration, as torch.library checks them."""
    x = make((1, 66, 2, 1, 1, 16, 16), kind)
    arguments = [x.get(n).requires_grad_() if x.get(n) is not None else None for n in NAMES]
    torch.library.opcheck(
        torch.ops.subquad.linear_attention, (*arguments, None, 0.5, True, torch.float32),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_compiled_whole_and_exported(monkeypatch):
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    x = make((1, 66, 1, 1, 1, 16, 16), "token")
    q, k, v, g = (x[n] for n in ("q", "k", "v", "log_decay"))

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            return public(q, k, v, log_decay=g) * 2

    want = Layer()(q, k, v, g)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v, g), want)
    grown = q.clone().requires_grad_()
    compiled(grown, k, v, g).sum().backward()
    plain = q.clone().requires_grad_()
    Layer()(plain, k, v, g).sum().backward()
    assert torch.allclose(grown.grad, plain.grad)
    exported = torch.export.export(Layer(), (q, k, v, g))
    assert any("linear_attention" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(q, k, v, g), want)


@pytest.mark.parametrize("kind", ["none", "token", "channel"])
def test_one_export_serves_every_length(kind, monkeypatch):
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    x = make((1, 66, 1, 1, 1, 16, 16), kind)

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
            return public(q, k, v, log_decay=g)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    given = [x["q"], x["k"], x["v"], x.get("log_decay")]
    shapes = [None if t is None else {1: tokens} for t in given]
    exported = torch.export.export(Layer(), tuple(given), dynamic_shapes=shapes).module()
    for n in (20, 64, 66):
        part = [None if t is None else t[:, :n] for t in given]
        assert torch.allclose(exported(*part), Layer()(*part), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_in_a_cuda_graph(kind):
    x = make((1, 200, 2, 2, 2, 64, 64), kind)
    q = x["q"].bfloat16().requires_grad_()

    def call() -> Tensor:
        return torch.autograd.grad(public(q, x["k"].bfloat16(), x["v"].bfloat16(), log_decay=x.get("log_decay")).sum(), q)[0]

    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    assert torch.equal(got, want)


def test_checkpointing_and_autocast(monkeypatch):
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    x = make((1, 66, 1, 1, 1, 16, 16), "token")
    q = x["q"].clone().requires_grad_()
    o = torch.utils.checkpoint.checkpoint(lambda q: public(q, x["k"], x["v"], log_decay=x["log_decay"]), q, use_reentrant=False)
    o.sum().backward()
    plain = x["q"].clone().requires_grad_()
    public(plain, x["k"], x["v"], log_decay=x["log_decay"]).sum().backward()
    assert torch.equal(q.grad, plain.grad)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(public(x["q"], x["k"], x["v"], log_decay=x["log_decay"]), o)
