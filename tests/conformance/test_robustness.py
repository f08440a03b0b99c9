"""Nothing breaks: empty batches, extreme inputs, repetition, saving and loading, compiling."""

import io

import pytest
import torch
from conformance.cases import DEVICE, assert_close, causal, error, every, gradients

import subquad


@every()
def test_empty_batch(case):
    module = case.make()
    x = case.inputs(20, module, batch=0)
    assert case.run(module, x).shape == (0, 20, module.heads, module.value_dim)
    for name, g in gradients(module, x, lambda leaves: case.run(module, leaves)).items():
        assert g.abs().sum() == 0, name


@every(causal)
def test_empty_batch_with_state(case):
    module = case.make()
    o, state = case.run(module, case.inputs(20, module, batch=0), return_state=True)
    o, state = case.run(module, case.inputs(1, module, batch=0), state=state, return_state=True)
    assert o.shape[:2] == (0, 1) and state.batch == 0 and state.nbytes == 0


def zeroed(*names):
    return lambda x: {name: torch.zeros_like(t) if name in names else t for name, t in x.items()}


def scaled(factor, *names):
    return lambda x: {name: factor * t if name in names else t for name, t in x.items()}


def half_zeroed(*names):
    def change(x):
        keep = (torch.arange(x["q"].shape[1], device=DEVICE) % 2 == 1)[:, None, None]
        return {name: t * keep if name in names else t for name, t in x.items()}

    return change


EXTREMES = {
    "zero-keys": zeroed("k"),
    "zero-queries": zeroed("q"),
    "zero-values": zeroed("v"),
    "all-zero": zeroed("q", "k", "v"),
    "some-zero": half_zeroed("q", "k"),
    "large-logits": scaled(50, "q", "k"),
    "large-queries": scaled(50, "q"),
    "large-keys": scaled(50, "k"),
    "tiny": scaled(1e-6, "q", "k", "v"),
}


def assert_finite(case, module, x):
    o = case.run(module, x)
    assert torch.isfinite(o).all(), "output"
    for name, g in gradients(module, x, lambda leaves: case.run(module, leaves)).items():
        assert torch.isfinite(g).all(), f"gradient of {name}"
    return o


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", EXTREMES.values(), ids=list(EXTREMES))
@every()
def test_extreme_queries_keys_values(case, change, dtype):
    module = case.make(dtype)
    x = change(case.inputs(100, module, dtype=dtype))
    o = assert_finite(case, module, x)
    if dtype == torch.float32:
        exact = case.twin(module, torch.float64)
        expected = case.define(exact, {name: t.double() for name, t in x.items()})
        own = case.define(module, x)
        ill_conditioned = error(own, expected)
        assert_close(o, expected, max(1e-5, 4 * ill_conditioned))


def extreme_inputs(case):
    """Each extra input at each of its extremes and ends: everywhere, and at every third token among usual values."""
    for name, spec in case.card.inputs.items():
        for value in (*spec.extremes, spec.low, spec.high):
            yield name, value


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "some-tokens"])
@every(lambda case: bool(case.card.inputs))
def test_extreme_inputs(case, everywhere):
    assert all(spec.extremes for spec in case.card.inputs.values()), "every extra input names its extremes"
    for dtype in (torch.float32, torch.bfloat16):
        module = case.make(dtype)
        for name, value in extreme_inputs(case):
            x = case.inputs(130, module, dtype=dtype)
            if everywhere or not case.has_tokens(name):
                x[name] = torch.full_like(x[name], value)
            else:
                x[name][:, ::3] = value
            o = assert_finite(case, module, x)
            if dtype == torch.float32:
                exact = case.define(case.twin(module, torch.float64), {n: t.double() for n, t in x.items()})
                assert_close(o, exact, 1e-5, f"output with {name} = {value}")


@every(causal)
def test_extreme_inputs_with_state(case):
    """Splitting stays exact when every extra input is at an extreme."""
    module = case.make()
    for name, value in extreme_inputs(case):
        x = case.inputs(70, module)
        x[name] = torch.full_like(x[name], value)
        _, state = case.run(module, case.tokens(x, 0, 66), return_state=True)
        assert_close(case.run(module, case.tokens(x, 66, 70), state=state), case.run(module, x)[:, 66:], 1e-10, f"{name} = {value}")


@every(with_variants=True)
def test_deterministic(case):
    module = case.make(torch.float32)
    x = case.inputs(130, module, dtype=torch.float32)
    assert torch.equal(case.run(module, x), case.run(module, x))
    once, again = (gradients(module, x, lambda leaves: case.run(module, leaves)) for _ in range(2))
    for name in once:
        assert torch.equal(once[name], again[name]), f"gradient of {name}"


@every()
def test_inputs_are_left_as_they_were(case):
    module = case.make(torch.float32)
    x = case.inputs(70, module, dtype=torch.float32)
    before = {name: t.clone() for name, t in x.items()}
    gradients(module, x, lambda leaves: case.run(module, leaves))
    with torch.no_grad():
        case.run(module, x)
    for name, t in before.items():
        assert torch.equal(x[name], t), name


@pytest.mark.parametrize("hidden_size", [None, 24])
@every()
def test_state_dict_round_trip(case, hidden_size):
    module = case.make(torch.float32, hidden_size=hidden_size)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    sizes = {name: getattr(module, name) for name in ("kv_heads", "value_dim", "hidden_size", "layer")}
    torch.manual_seed(123)
    loaded = subquad.attention(case.name, module.heads, module.head_dim, **sizes, **module.options).to(DEVICE)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = case.inputs(70, module, dtype=torch.float32)
    hidden = torch.randn(2, 70, hidden_size or 1, device=DEVICE)
    if hidden_size:
        x = {name: x[name] for name in "qkv"}  # the extra inputs come from the loaded projections
    call = {"hidden": hidden} if hidden_size else {}
    assert torch.equal(case.run(loaded, x, **call), case.run(module, x, **call))


@every()
def test_attend(case):
    """Mechanisms without parameters run without a module; the others say that they need one."""
    module = case.make(torch.float32)
    x = case.inputs(70, module, dtype=torch.float32)
    q, k, v = (x.pop(name) for name in "qkv")
    options = {**x, **case.options, **case.grid(70)}
    if any(True for _ in module.parameters()):
        with pytest.raises(subquad.InputError, match=r"subquad\.attention"):
            subquad.attend(q, k, v, case.name, **options)
    else:
        assert torch.equal(subquad.attend(q, k, v, case.name, **options), case.run(module, {"q": q, "k": k, "v": v, **x}))


def assert_compiles(case, backend):
    """Forward and backward, without graph breaks."""
    torch._dynamo.reset()
    module = case.make(torch.float32)
    x = case.inputs(72, module, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    rotary = subquad.Rotary.of(torch.arange(72, device=DEVICE), 16)
    assert_close(case.run(compiled, x, rotary=rotary), case.run(module, x, rotary=rotary), 1e-5)
    expected = gradients(module, x, lambda leaves: case.run(module, leaves, rotary=rotary))
    for name, g in gradients(module, x, lambda leaves: case.run(compiled, leaves, rotary=rotary)).items():
        assert_close(g, expected[name], 1e-4, f"gradient of {name}")


@every()
def test_compiles(case):
    """Traced on the CPU, compiled by inductor on a GPU."""
    assert_compiles(case, "inductor" if DEVICE.type == "cuda" else "aot_eager")


@pytest.mark.slow
@every(with_variants=True)
def test_variants_compile(case):
    assert_compiles(case, "aot_eager")
