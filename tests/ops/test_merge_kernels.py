"""The kernels of `merge_sums` against its definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad import InputError
from subquad.ops.merge import merge_sums

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = "o", "lse", "top", "far", "mass", "factor"


def make(n=37, m=37, heads=3, width=16, batch=2):
    top = torch.randn(batch, n, heads)
    made = torch.randn(batch, n, heads, width), top + torch.rand(batch, n, heads), top, torch.randn(batch, m, heads, width)
    return dict(zip(NAMES, (*made, 3 * torch.rand(batch, m, heads, 1), torch.randn(heads))))


def defined(o, lse, top, far, mass, factor, affine):
    g, late = factor.sigmoid(), o.shape[1] - far.shape[1]
    near = (g * (lse - top).exp())[..., None]
    beyond = [torch.cat([x.new_zeros(x.shape[0], late, *x.shape[2:]), x], 1) for x in (far, mass)]
    weight = (1 - g)[:, None] if affine else 1.0
    return (near * o + weight * beyond[0]) / (near + weight * beyond[1])


def grads_of(function, given, affine, names=NAMES):
    given = {name: t.detach().requires_grad_(name in names) for name, t in given.items()}
    if function is defined:
        out = function(**given, affine=affine)
    else:
        out = function(
            tuple(given[name] for name in NAMES[:3]), *(given[name] for name in NAMES[3:]), affine=affine, dtype=given["o"].dtype
        )
    by = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, [given[name] for name in names], by)]


def compare(given, affine, **how):
    found = grads_of(merge_sums, {name: t.to(DEVICE) for name, t in given.items()}, affine, **how)
    for got, wanted in zip(found, grads_of(defined, {name: t.double().to(DEVICE) for name, t in given.items()}, affine, **how)):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-6 * max(1.0, wanted.abs().max().item()) if wanted.numel() else 0)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("m", [37, 20, 0])
def test_every_gradient(affine, m):
    compare(make(m=m), affine)


@pytest.mark.parametrize(("heads", "width"), [(1, 8), (2, 70), (5, 16)])
def test_sizes(heads, width):
    compare(make(heads=heads, width=width), False)


@pytest.mark.parametrize("names", [("o",), ("lse",), ("top",), ("far", "mass"), ("factor",)])
def test_only_the_gradients_that_are_asked_for(names):
    compare(make(), True, names=names)


def test_strided_inputs():
    given = make()
    given["o"] = given["o"].transpose(1, 2).contiguous().transpose(1, 2)
    given["lse"] = given["lse"].transpose(1, 2).contiguous().transpose(1, 2)
    joined = torch.cat([given["far"], given["mass"]], -1)
    given |= {"far": joined[..., :-1], "mass": joined[..., -1:]}
    assert not any(given[name].is_contiguous() for name in ("o", "lse", "far", "mass"))
    compare(given, True)


@pytest.mark.parametrize("shared", [False, True])
def test_factors_of_any_stride(shared):
    """One number for all heads, or every other of twice as many."""
    compare(make(heads=5) | {"factor": torch.randn(1).expand(5) if shared else torch.randn(5, 2)[:, 0]}, True)


def test_more_sums_than_tokens_are_refused():
    given = make(n=5, m=6)
    with pytest.raises(InputError, match="far"):
        merge_sums(tuple(given[name] for name in NAMES[:3]), *(given[name] for name in NAMES[3:]), affine=False, dtype=torch.float32)


def test_sixteen_bits_are_computed_in_float32():
    given = make()
    given |= {name: given[name].bfloat16() for name in ("o", "far", "factor")}
    found = grads_of(merge_sums, {name: t.to(DEVICE) for name, t in given.items()}, True, ("o", "lse", "far", "factor"))
    wanted = grads_of(defined, {name: t.double().to(DEVICE) for name, t in given.items()}, True, ("o", "lse", "far", "factor"))
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    for got, exact in zip(found, wanted):
        assert (got.double() - exact).abs().max() <= 2**-6 * exact.abs().max()  # the interpreter cuts bfloat16 off


def test_operators_are_well_formed():
    import subquad.ops.merge.fused  # noqa: F401  registers them

    given = {name: t.to(DEVICE).requires_grad_() for name, t in make(n=7, m=5).items()}
    args = [given[name] if name != "mass" else given[name].detach()[..., 0].requires_grad_() for name in NAMES]
    torch.library.opcheck(torch.ops.subquad.merge_sums.default, [*args, True, torch.float32])


def test_compiles_whole():
    given = {name: t.to(DEVICE) for name, t in make(n=9, m=6).items()}
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(merge_sums, fullgraph=True, backend=backend)
    for got, wanted in zip(grads_of(compiled, given, True), grads_of(merge_sums, given, True)):
        torch.testing.assert_close(got, wanted)
