"""The kernels of learned softmax features against their definition in float64; on CPU in Triton's interpreter, every address checked."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from subquad.ops.feature_maps import project_softmax_halves

pytestmark = pytest.mark.usefixtures("kernels")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def defined(x, weight):
    y = torch.einsum("bnhd,hdf->bnhf", x.repeat_interleave(weight.shape[0] // x.shape[2], 2), weight)
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp(min=1e-12)


def make(n=150, heads=(4, 2), width=16, features=16, batch=2):
    return {"x": 2 * torch.randn(batch, n, heads[1], width), "weight": torch.randn(heads[0], width, features) * width**-0.5}


def grads_of(function, given, names):
    given = {name: t.detach().requires_grad_(name in names) for name, t in given.items()}
    f = function(given["x"], given["weight"])
    by = torch.randn(f.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(f)
    return [f.detach(), *torch.autograd.grad(f, [given[name] for name in names], by)]


def compare(given, names, dtype=torch.float32, share=3e-6, **dtypes):
    found = grads_of(project_softmax_halves, {name: t.to(DEVICE, dtypes.get(name, dtype)) for name, t in given.items()}, names)
    rounded = {name: t.to(dtypes.get(name, dtype)).double().to(DEVICE) for name, t in given.items()}
    for got, wanted in zip(found, grads_of(defined, rounded, names)):
        assert got.shape == wanted.shape and got.device.type == DEVICE.type
        assert (got.double() - wanted).abs().max() <= share * wanted.abs().max()


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("sizes", [(16, 16), (8, 24), (48, 20), (64, 33)])
def test_every_gradient(heads, sizes):
    compare(make(heads=heads, width=sizes[0], features=sizes[1]), ["x", "weight"])


@pytest.mark.parametrize("names", [["x"], ["weight"], ["x", "weight"]])
def test_only_the_gradients_that_are_asked_for(names):
    compare(make(), names)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(16, 16), (70, 96)])
def test_sixteen_bits_are_rounded_once(weights, sizes):
    """Gradients are made of rounded features. The interpreter cuts where a GPU rounds."""
    given = make(width=sizes[0], features=sizes[1])
    compare(given, ["x", "weight"], torch.bfloat16, 2**-8 if DEVICE.type == "cuda" else 2**-7, weight=weights)


def test_half_precision_gives_float32_features():
    x = make()
    f = project_softmax_halves(x["x"].half().to(DEVICE), x["weight"].half().to(DEVICE))
    assert f.dtype == torch.float32
    wanted = defined(x["x"].half().double(), x["weight"].half().double()).to(DEVICE)
    assert (f.double() - wanted).abs().max() <= 1e-6


def test_extreme_maps_keep_the_least_feature():
    x = {"x": torch.tensor([300.0, -300.0]).repeat(8)[None, None, None].clone(), "weight": torch.eye(16)[None]}
    f, grad = grads_of(project_softmax_halves, {name: t.to(DEVICE) for name, t in x.items()}, ["x"])
    assert f.min() == 1e-12 and f.max().item() == pytest.approx(1 / 8) and grad.isfinite().all()


@pytest.mark.parametrize("layout", ["heads first", "a part of the channels", "a part of the tokens"])
def test_strided_inputs(layout):
    given = make()
    x = given["x"]
    if layout == "heads first":
        given["x"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "a part of the channels":
        given["x"] = torch.cat([torch.full_like(x, torch.nan), x], -1)[..., x.shape[-1] :]
    else:
        given["x"] = torch.cat([torch.full_like(x, torch.nan), x], 1)[:, x.shape[1] :]
    assert not given["x"].is_contiguous()
    compare(given, ["x", "weight"])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_few_tokens(shape):
    given = {name: t.to(DEVICE) for name, t in make(n=shape[1], batch=shape[0]).items()}
    found = grads_of(project_softmax_halves, given, ["x", "weight"])
    for got, wanted in zip(found, grads_of(defined, {name: t.double() for name, t in given.items()}, ["x", "weight"])):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_many_runs_are_added_up(monkeypatch):
    from subquad.ops import launch

    monkeypatch.setattr("subquad.ops.features.processors", lambda device: 2)
    launch.forget()
    compare(make(n=500), ["x", "weight"])
    monkeypatch.undo()
    launch.forget()


def test_operators_are_well_formed():
    import subquad.ops.features  # noqa: F401  registers them

    given = make(n=20)
    args = [given[name].to(DEVICE).requires_grad_() for name in ("x", "weight")]
    torch.library.opcheck(torch.ops.subquad.softmax_features.default, [*args, torch.float32])


def test_compiles_whole():
    given = {name: t.to(DEVICE) for name, t in make(n=20).items()}
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    found = grads_of(torch.compile(project_softmax_halves, fullgraph=True, backend=backend), given, ["x", "weight"])
    for got, wanted in zip(found, grads_of(project_softmax_halves, given, ["x", "weight"])):
        torch.testing.assert_close(got, wanted)


def test_gradients_of_gradients_are_refused_not_wrong():
    given = make(n=5)
    x = given["x"].to(DEVICE).requires_grad_()
    f = project_softmax_halves(x, given["weight"].to(DEVICE))
    with pytest.raises(RuntimeError, match="SUBQUAD_KERNELS=off"):
        torch.autograd.grad(f.square().sum(), x, create_graph=True)
