"""With the least memory allowed for temporaries, every loop over segments, groups and tiles turns more than once.

By convention such limits are constants named CPU_… and GPU_…, or a table BUDGET by device; on real sizes they are
reached at many thousands of tokens.
"""

import sys

import pytest
import torch
from conformance.cases import GRADIENT_TOLERANCE, TOLERANCE, assert_all_close, assert_close, causal, every, gradients, split
from conformance.test_packed import offsets

N = 300


@pytest.fixture
def tight(monkeypatch):
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith(("subquad.ops", "subquad.mechanisms"))]
    found = 0
    for module in modules:
        for name, value in list(vars(module).items()):
            if name.startswith(("CPU_", "GPU_")) and isinstance(value, int):
                monkeypatch.setattr(module, name, 1)
                found += 1
            elif name == "BUDGET":
                monkeypatch.setattr(module, name, dict.fromkeys(value, 1))
                found += 1
    assert found, "no limits found: the convention has changed"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every()
def test_output_and_gradients(case, dtype, tight):
    module = case.make(dtype)
    x = case.inputs(N, module, dtype=dtype)
    exact, wide = case.twin(module, torch.float64), {name: t.double() for name, t in x.items()}
    assert_close(case.run(module, x), case.define(exact, wide), TOLERANCE[dtype])
    with torch.no_grad():
        assert_close(case.run(module, x), case.define(exact, wide), TOLERANCE[dtype])
    expected = gradients(exact, wide, lambda leaves: case.define(exact, leaves))
    assert_all_close(gradients(module, x, lambda leaves: case.run(module, leaves)), expected, GRADIENT_TOLERANCE[dtype], "gradient of")


@every(causal)
def test_split(case, tight):
    module = case.make()
    x = case.inputs(N, module)
    whole = case.run(module, x)
    assert_close(split(case, module, x, [150, 1, 149])[0], whole, 1e-10)
    expected = gradients(module, x, lambda leaves: case.run(module, leaves))
    found = gradients(module, x, lambda leaves: split(case, module, leaves, [150, 1, 149])[0])
    assert_all_close(found, expected, 1e-10, "gradient of")


@every()
def test_packed(case, tight):
    module = case.make()
    lengths = (130, 130, 130) if case.card.needs_grid else (3, 129, 0, 1, 140, 70, 260)
    parts = [case.inputs(n, module, batch=1, seed=i) for i, n in enumerate(lengths)]
    x, call = case.pack(parts), case.grid(lengths[0])
    o = case.run(module, x, cu_seqlens=offsets(lengths), **call)
    assert_close(o, torch.cat([case.define(module, part) for part in parts], 1), 1e-10)
    ends = offsets(lengths).tolist()
    expected = gradients(
        module, x, lambda leaves: torch.cat([case.define(module, case.tokens(leaves, a, a + n)) for a, n in zip(ends, lengths)], 1)
    )
    found = gradients(module, x, lambda leaves: case.run(module, leaves, cu_seqlens=offsets(lengths), **call))
    assert_all_close(found, expected, 1e-10, "gradient of")
    if case.causal:
        states = case.run(module, x, cu_seqlens=offsets(lengths), return_state=True, **call)[1]
        after = case.inputs(2, module, batch=len(lengths), seed=99)
        rows = [{name: t[i : i + 1] if case.has_tokens(name) else t for name, t in after.items()} for i in range(len(lengths))]
        whole = [case.define(module, case.pack([part, row]))[:, -2:] for part, row in zip(parts, rows)]
        assert_close(case.run(module, after, state=states), torch.cat(whole), 1e-10)
