"""The kernel of rotary embedding against its definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad import InputError, Rotary
from subquad.ops import rotary as room

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "adjacent"])
# the interpreter cuts bfloat16 off where a GPU rounds
ROUNDING = {torch.float32: 3e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE.type == "cuda" else 2**-7}


@pytest.fixture
def launches(monkeypatch):
    """A list that gets the name of each launch: by the kernel, and the transposed one."""
    found, real = [], room.forward

    def counted(x, cos, sin, interleaved, transpose):
        found.append("back" if transpose else "forth")
        return real(x, cos, sin, interleaved, transpose)

    monkeypatch.setattr(room, "forward", counted)
    monkeypatch.setattr(room, "prepared", lambda call, rehearsal: call())  # which on a GPU would start some calls anew
    return found


def make(n=13, heads=3, width=16, turned=16, batch=2, rows=None):
    """x, and angles' cosines and sines that are any numbers, unequal within a pair; tables of `rows` sequences, or of none."""
    table = (n, turned) if rows is None else (rows, n, turned)
    return torch.randn(batch, n, heads, width), torch.randn(table), torch.randn(table)


def defined(x, cos, sin, interleaved):
    """Pair by pair."""
    half = cos.shape[-1] // 2
    out = list(x.unbind(-1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        out[a] = cos[..., None, a] * x[..., a] - sin[..., None, a] * x[..., b]
        out[b] = cos[..., None, b] * x[..., b] + sin[..., None, b] * x[..., a]
    return torch.stack(out, -1)


def apply(x, cos, sin, interleaved):
    return Rotary(cos, sin, interleaved).apply(x)


def compare(x, cos, sin, interleaved, function=apply):
    """Values and the gradient, to a rounding of the largest terms."""
    share, exact = ROUNDING[x.dtype], [t.detach().double().to(DEVICE) for t in (x, cos, sin)]
    x, cos, sin = (t.to(DEVICE) for t in (x, cos, sin))
    out, wanted = function(x.requires_grad_(), cos, sin, interleaved), defined(exact[0].requires_grad_(), *exact[1:], interleaved)
    by = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grad = torch.autograd.grad(out, x, by)[0], torch.autograd.grad(wanted, exact[0], by.double())[0]
    for (got, want), given in zip(((out, wanted), grad), (exact[0], by.double())):
        assert got.dtype == x.dtype and got.shape == want.shape and got.is_contiguous()
        if x.numel():
            scale = want.abs() if x.dtype != torch.float32 else 0  # a rounding of the result, beside those of float32 before it
            least = 3e-7 * max(1.0, given.abs().max() * max(t.abs().max() for t in exact[1:]))
            assert ((got.double() - want).abs() <= share * scale + least + (2**-24 if x.dtype == torch.float16 else 0)).all()


@PAIRINGS
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8), (24, 24), (70, 34), (9, 6), (2, 2), (256, 192)])
@pytest.mark.parametrize("heads", [1, 6])
def test_sizes(sizes, heads, interleaved, launches):
    compare(*make(heads=heads, width=sizes[0], turned=sizes[1]), interleaved)
    assert launches == ["forth", "back"]


@PAIRINGS
@pytest.mark.parametrize("n, batch", [(1, 1), (1, 5), (300, 1), (67, 3)])
def test_tokens(n, batch, interleaved):
    compare(*make(n=n, batch=batch, width=32, turned=32), interleaved)


@PAIRINGS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tables", [torch.float32, torch.bfloat16, torch.float64])
def test_sixteen_bits_are_rounded_once(dtype, tables, interleaved):
    x, cos, sin = make(turned=12)
    compare(x.to(dtype), cos.to(tables).float().to(tables), sin.to(tables).float().to(tables), interleaved)


@PAIRINGS
@pytest.mark.parametrize("rows", [1, 2])
def test_tables_of_sequences(rows, interleaved, launches):
    compare(*make(rows=rows), interleaved)
    x, cos, sin = make(rows=1)
    compare(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1), interleaved)
    assert launches == ["forth", "back"] * 2


@PAIRINGS
@pytest.mark.parametrize("kind", ["heads first", "a part of the channels", "one head for all", "one token for all", "every other channel"])
def test_strided_inputs(kind, interleaved):
    x, cos, sin = make()
    if kind == "heads first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "a part of the channels":
        x = torch.cat([torch.full_like(x, torch.nan), x], -1)[..., 16:]
        cos = torch.cat([torch.full_like(cos, torch.nan), cos], -1)[..., 16:]
    elif kind == "one head for all":
        x = x[:, :, :1].expand(-1, -1, 5, -1)
    elif kind == "one token for all":
        x, cos = x[:, :1].expand(-1, 13, -1, -1), cos[:1].expand(13, -1)
    else:
        x, cos, sin = (torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] for t in (x, cos, sin))
    assert not x.is_contiguous()
    compare(x, cos, sin, interleaved)


def test_the_usual_angles_are_a_turn_of_the_plane():
    """As a product of complex numbers; queries and keys, whose scores depend on the distance alone."""
    position, x = torch.tensor([3, 7, 100]), torch.randn(1, 3, 2, 8, device=DEVICE)
    frequency = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(3, 4, dtype=torch.float64), position[:, None] * frequency)[:, None].to(DEVICE)
    for interleaved, halves in ((True, x.double().unflatten(-1, (4, 2))), (False, x.double().unflatten(-1, (2, 4)).mT)):
        parts = torch.view_as_real(torch.view_as_complex(halves.contiguous()) * turn)
        wanted = (parts if interleaved else parts.mT).flatten(-2)
        got = Rotary.of(position.to(DEVICE), 8, interleaved=interleaved).apply(x)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)  # angles of 100 in float32


@PAIRINGS
def test_it_is_what_plain_torch_gives(interleaved, monkeypatch):
    x, cos, sin = (t.to(DEVICE) for t in make(width=20, turned=12))
    found = apply(x, cos, sin, interleaved), apply(x.bfloat16(), cos, sin, interleaved)
    monkeypatch.setenv("SUBQUAD_KERNELS", "off")
    for got, wanted, share in zip(found, (apply(x, cos, sin, interleaved), apply(x.bfloat16(), cos, sin, interleaved)), (3e-7, 2**-7)):
        torch.testing.assert_close(got, wanted, rtol=share, atol=1e-6)


@PAIRINGS
def test_gradients_of_gradients(interleaved, launches):
    def penalty(function, x, cos, sin):
        (g,) = torch.autograd.grad(function(x, cos, sin, interleaved).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return [g, second, torch.autograd.grad(second.pow(2).sum(), x)[0]]

    x, cos, sin = (t.to(DEVICE) / 2 for t in make(turned=10))
    found = penalty(apply, x.requires_grad_(), cos, sin)
    assert set(launches) == {"forth", "back"} and len(launches) > 4
    for got, wanted in zip(found, penalty(defined, x.detach().double().requires_grad_(), cos.double(), sin.double())):
        assert (got.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@PAIRINGS
def test_a_batch_of_gradients(interleaved):
    x, cos, sin = (t.to(DEVICE) for t in make(n=3))
    x.requires_grad_()
    by = torch.randn(4, *x.shape, device=DEVICE)
    out = apply(x, cos, sin, interleaved)
    found = torch.func.vmap(lambda g: torch.autograd.grad(out, x, g)[0])(by)
    exact = x.detach().double().requires_grad_()
    for got, each in zip(found, by):
        (wanted,) = torch.autograd.grad(defined(exact, cos.double(), sin.double(), interleaved), exact, each.double())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learns", [0, 1])
@PAIRINGS
def test_angles_learn(learns, interleaved, launches):
    x, *tables = (t.to(DEVICE) for t in make(turned=8))
    tables[learns].requires_grad_()
    exact = [t.detach().double() for t in tables]
    exact[learns].requires_grad_()
    got = torch.autograd.grad(apply(x, *tables, interleaved).square().sum(), tables[learns])[0]
    wanted = torch.autograd.grad(defined(x.double(), *exact, interleaved).square().sum(), exact[learns])[0]
    assert (got.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max() and not launches
    with torch.no_grad():
        apply(x, *tables, interleaved)
    assert launches == ["forth"]


@PAIRINGS
def test_forward_mode(interleaved, launches):
    """In plain torch: the kernel knows no tangents."""
    (x, cos, sin), (along, *_) = make(turned=12), make()
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(apply(forward_ad.make_dual(x, along), cos, sin, interleaved))
    for got, given in ((out, x), (tangent, along)):
        wanted = defined(given.double(), cos.double(), sin.double(), interleaved)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)
    assert not launches


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_nothing_to_turn(shape):
    batch, n, heads = shape
    compare(*make(n=n, batch=batch, heads=heads), False)


def test_what_the_kernel_does_not_take_is_plain_torch(launches, monkeypatch):
    x, cos, sin = make()
    exact = defined(x.double(), cos.double(), sin.double(), False)
    assert (apply(x.double(), cos.double(), sin.double(), False) - exact).abs().max() < 1e-14
    each = torch.func.vmap(lambda row: apply(row[None], cos, sin, False)[0])(x)
    assert (each.double() - exact).abs().max() < 1e-5
    assert apply(x.to("meta"), cos.to("meta"), sin.to("meta"), False).shape == x.shape
    monkeypatch.setenv("SUBQUAD_KERNELS", "off")
    assert (apply(x, cos, sin, False).double() - exact).abs().max() < 1e-5
    assert not launches


def test_angles_of_other_tokens_are_refused():
    x, cos, sin = make()
    for tables in ((cos[:-1], sin[:-1]), (cos.repeat(1, 2), sin.repeat(1, 2))):
        with pytest.raises(InputError, match="rotary"):
            apply(x, *tables, False)


def test_autocast_changes_nothing():
    x, cos, sin = (t.to(DEVICE) for t in make())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = apply(x, cos, sin, False)
    assert found.dtype == torch.float32 and torch.equal(found, apply(x, cos, sin, False))


@pytest.mark.parametrize("transpose", [False, True])
def test_the_operator_is_well_formed(transpose):
    x, cos, sin = (t.to(DEVICE) for t in make(n=5, turned=12))
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(torch.ops.subquad.rotary.default, [given.requires_grad_(), cos, sin, True, transpose])


@PAIRINGS
def test_compiles_whole(interleaved):
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compare(*make(n=9), interleaved, torch.compile(apply, fullgraph=True, backend=backend))


def test_fake_tensors_have_the_shape():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, cos, sin = make()
        found = apply(x.bfloat16().transpose(0, 2), cos[:, :8], sin[:, :8], True)
    assert found.shape == (3, 13, 2, 16) and found.dtype == torch.bfloat16


def test_exports():
    class Turn(torch.nn.Module):
        def forward(self, x, cos, sin):
            return Rotary(cos, sin).apply(x)

    given = tuple(t.to(DEVICE) for t in make(n=6))
    program = torch.export.export(Turn(), given)
    assert any("subquad.rotary" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*given).double(), defined(*(t.double() for t in given), False), rtol=0, atol=1e-5)
