"""Every mechanism equals its own reference: outputs and gradients, in each dtype, at awkward sizes, with rotary."""

import pytest
import torch
from conformance.cases import (
    DEVICE,
    GRADIENT_TOLERANCE,
    LENGTHS,
    TOLERANCE,
    assert_all_close,
    assert_close,
    every,
    gradients,
    takes_value_dim,
)
from torch import Tensor

from subquad import Rotary

FULL, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
BY_DTYPE = pytest.mark.parametrize("dtype", FULL, ids=lambda d: str(d)[6:])
BY_HALF = pytest.mark.parametrize("dtype", HALF, ids=lambda d: str(d)[6:])


def double(x):
    return {name: t.double() for name, t in x.items()}


@BY_DTYPE
@every(with_variants=True)
def test_output(case, dtype):
    module = case.make(dtype)
    x = case.inputs(130, module, dtype=dtype)
    o = case.run(module, x)
    assert o.dtype == dtype and o.device.type == DEVICE.type
    assert_close(o, case.define(case.twin(module, torch.float64), double(x)), TOLERANCE[dtype])


@BY_DTYPE
@every(with_variants=True)
def test_gradients_of_each_input_and_parameter(case, dtype):
    module = case.make(dtype)
    x = case.inputs(130, module, dtype=dtype)
    exact = case.twin(module, torch.float64)
    expected = gradients(exact, double(x), lambda leaves: case.define(exact, leaves))
    found = gradients(module, x, lambda leaves: case.run(module, leaves))
    assert_all_close(found, expected, GRADIENT_TOLERANCE[dtype], "gradient of")
    for name, t in x.items():
        assert found[name].dtype == t.dtype


@pytest.mark.parametrize("n", LENGTHS)
@every()
def test_lengths(case, n):
    module = case.make()
    x = case.inputs(n, module, seed=n)
    assert_close(case.run(module, x), case.define(module, x), 1e-10)


@every()
def test_long(case):
    """Long enough for anything that is done once every few chunks."""
    module = case.make(torch.float32)
    x = case.inputs(600, module, batch=1, dtype=torch.float32)
    expected = case.define(case.twin(module, torch.float64), double(x))
    assert_close(case.run(module, x), expected, TOLERANCE[torch.float32])


@pytest.mark.slow
@BY_DTYPE
@every()
def test_very_long(case, dtype):
    module = case.make(dtype, heads=2, kv_heads=1)
    x = case.inputs(2050, module, batch=1, dtype=dtype)
    exact = case.twin(module, torch.float64)
    assert_close(case.run(module, x), case.define(exact, double(x)), TOLERANCE[dtype])
    expected = gradients(exact, double(x), lambda leaves: case.define(exact, leaves))
    assert_all_close(gradients(module, x, lambda leaves: case.run(module, leaves)), expected, GRADIENT_TOLERANCE[dtype], "gradient of")


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def assert_half_precision(case, dtype, extra_dtype):
    module = case.make(dtype)
    x, other = (case.inputs(200, module, dtype=d) for d in (dtype, extra_dtype))
    x = {name: x[name] if name in "qkv" else other[name] for name in x}
    exact = case.define(case.twin(module, torch.float64), double(x))
    own = case.define(case.twin(module, torch.float32), {name: t.float() for name, t in x.items()}).to(dtype)
    o = case.run(module, x)
    assert o.dtype == dtype
    assert rms(o - exact) <= case.card.bf16_factor * rms(own - exact)


@BY_HALF
@every(with_variants=True)
def test_half_precision(case, dtype):
    """Error against float64 within `bf16_factor` of the reference's own, which computes in float32 and rounds its output."""
    assert_half_precision(case, dtype, dtype)


@every(lambda case: bool(case.card.inputs))
def test_half_precision_with_inputs_in_float32(case):
    assert_half_precision(case, torch.bfloat16, torch.float32)


@BY_HALF
@every()
def test_half_precision_gradients(case, dtype):
    """As above with twice the factor: a backward pass starts from an output and products that were rounded once already.

    A single number sums a term of each output, each rounded: its error grows with their norm, however small the sum is.
    """
    module = case.make(dtype)
    x = case.inputs(130, module, dtype=dtype)
    exact, single = case.twin(module, torch.float64), case.twin(module, torch.float32)
    weight = torch.randn((*x["q"].shape[:3], module.value_dim), device=DEVICE).to(dtype)
    expected = gradients(exact, double(x), lambda leaves: case.define(exact, leaves), weight)
    own = gradients(single, {name: t.float() for name, t in x.items()}, lambda leaves: case.define(single, leaves), weight)
    found = gradients(module, x, lambda leaves: case.run(module, leaves), weight)
    for name, g in expected.items():
        allowed = 2 * case.card.bf16_factor * rms(own[name].to(dtype) - g) + 1e-6 * rms(g)
        if g.numel() == 1:
            allowed = max(allowed, torch.finfo(dtype).eps / 2 * (case.define(exact, double(x)) * weight).norm().item())
        assert found[name].dtype == dtype
        assert rms(found[name] - g) <= allowed, name


@pytest.mark.parametrize("head_dim", [8, 48, 64])
@every()
def test_head_dims(case, head_dim):
    module = case.make(head_dim=head_dim)
    x = case.inputs(70, module)
    assert_close(case.run(module, x), case.define(module, x), 1e-10)


@pytest.mark.parametrize("value_dim", [8, 40])
@every(lambda case: takes_value_dim(case.name))
def test_value_dim_differs(case, value_dim):
    module = case.make(value_dim=value_dim)
    x = case.inputs(70, module)
    o = case.run(module, x)
    assert o.shape[-1] == value_dim
    expected = gradients(module, x, lambda leaves: case.define(module, leaves))
    assert_close(o, case.define(module, x), 1e-10)
    assert_all_close(gradients(module, x, lambda leaves: case.run(module, leaves)), expected, 1e-10, "gradient of")


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 3), (6, 2), (4, 1)])
@every()
def test_head_counts(case, heads, kv_heads):
    module = case.make(heads=heads, kv_heads=kv_heads)
    x = case.inputs(70, module)
    assert_close(case.run(module, x), case.define(module, x), 1e-10)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "adjacent"])
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per-row"])
@every()
def test_rotary(case, per_row, width, interleaved):
    module = case.make()
    x = case.inputs(70, module)
    positions = torch.arange(70, device=DEVICE) + 5
    if per_row:
        positions = torch.stack([positions, 3 * positions])
    rotary = Rotary.of(positions, width, theta=100.0, interleaved=interleaved)
    assert_close(case.run(module, x, rotary=rotary), case.define(module, x, rotary), 1e-10)


@every()
def test_rotary_gradients(case):
    module = case.make()
    x = case.inputs(70, module)
    rotary = Rotary.of(torch.arange(70, device=DEVICE), 16, theta=100.0)
    expected = gradients(module, x, lambda leaves: case.define(module, leaves, rotary))
    found = gradients(module, x, lambda leaves: case.run(module, leaves, rotary=rotary))
    assert_all_close(found, expected, 1e-10, "gradient of")


@pytest.mark.parametrize("layer", [(0, 3), (1, 3), (2, 3)], ids=str)
@every(with_variants=True)
def test_depth(case, layer):
    """Constants that depend on the layer's place."""
    module = case.make(layer=layer)
    x = case.inputs(100, module)
    assert_close(case.run(module, x), case.define(module, x), 1e-10)


@every(with_variants=True)
def test_constants_keep_their_precision(case):
    """Constants are as exact as the inputs' dtype: not rounded for good when a module is cast to bfloat16, nor kept in float32."""
    module = case.make(torch.bfloat16, layer=(1, 3))
    cast_back, fresh = case.twin(module, torch.float64), case.twin(module, torch.float64)
    cast_back.to(torch.bfloat16).double()
    x = case.inputs(100, fresh, dtype=torch.float64)
    assert_close(case.run(cast_back, x), case.run(fresh, x), 1e-6)
