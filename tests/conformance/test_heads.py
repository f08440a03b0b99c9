"""Heads keep to themselves, grouped queries equal repeated heads, and memory layout does not matter."""

import pytest
import torch
from conformance.cases import DEVICE, HEADS, KV_HEADS, assert_close, causal, every, gradients

GROUP = HEADS // KV_HEADS


def repeat_parameters(few, many):
    """Give `many`, with a key head per query head, the parameters of `few`: each key head's part, repeated."""
    with torch.no_grad():
        for new, old in zip(many.parameters(), few.parameters(), strict=True):
            for dim, (wide, narrow) in enumerate(zip(new.shape, old.shape)):
                if wide != narrow:
                    old = old.unflatten(dim, (KV_HEADS, -1)).repeat_interleave(GROUP, dim).flatten(dim, dim + 1)
            new.copy_(old)


def repeat_inputs(case, x):
    def is_state_head(name):
        return ("B", "N", "Hs").index("Hs") if name in "kv" else [*case.card.inputs[name].shape, "Hs"].index("Hs")

    return {
        name: t if name == "q" or is_state_head(name) == t.dim() else t.repeat_interleave(GROUP, is_state_head(name))
        for name, t in x.items()
    }


@every(with_variants=True)
def test_grouped_queries_equal_repeated_heads(case):
    few, many = case.make(), case.make(kv_heads=HEADS)
    repeat_parameters(few, many)
    x = case.inputs(130, few)
    assert_close(case.run(few, x), case.run(many, repeat_inputs(case, x)), 1e-10)
    found = gradients(few, x, lambda leaves: case.run(few, leaves))
    expected = gradients(few, x, lambda leaves: case.run(many, repeat_inputs(case, leaves)))
    for name in x:
        assert_close(found[name], expected[name], 1e-10, f"gradient of {name}")


def defined_by(case, module, x, changed):
    """Whether the definition gives other outputs for `changed` than for x."""
    return bool((case.define(module, changed) - case.define(module, x)).abs().max() > 1e-9)


@every(with_variants=True)
def test_heads_keep_to_themselves(case):
    """Other values, keys or queries in one head change that head's outputs (its group's, for k and v), and no others."""
    module = case.make()
    x, other = case.inputs(130, module), case.inputs(130, module, seed=1)
    o = case.run(module, x)
    for name in "qkv":
        for head in range(x[name].shape[2]):
            changed = {**x, name: x[name].clone()}
            changed[name][:, :, head] = other[name][:, :, head]
            moved = (case.run(module, changed) - o).abs().amax((0, 1, 3)) > 1e-9
            expected = [h == head if name == "q" else h // GROUP == head for h in range(HEADS)]
            if name != "v" and not defined_by(case, module, x, changed):  # the definition does not look at it
                expected = [False] * HEADS
            assert moved.tolist() == expected, f"{name} of head {head} moves the outputs of heads {moved.nonzero().flatten().tolist()}"


@every(causal)
def test_heads_keep_to_themselves_when_stepping(case):
    module = case.make()
    x, other = case.inputs(75, module), case.inputs(75, module, seed=1)
    _, state = case.run(module, case.tokens(x, 0, 70), return_state=True)
    for name in "kv":
        changed = {**x, name: x[name].clone()}
        changed[name][:, :, 1] = other[name][:, :, 1]
        _, moved_state = case.run(module, case.tokens(changed, 0, 70), return_state=True)
        for n in (1, 5):
            rest = case.tokens(x, 70, 70 + n)
            moved = (case.run(module, rest, state=state) - case.run(module, rest, state=moved_state)).abs().amax((0, 1, 3)) > 1e-9
            depends = name == "v" or defined_by(case, module, x, changed)
            assert moved.tolist() == [depends and h // GROUP == 1 for h in range(HEADS)]


def as_bhnd(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 2 else t


def as_slices(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), dtype=t.dtype, device=DEVICE)
    wide[..., 1 : 1 + 2 * t.shape[-1] : 2] = t
    return wide[..., 1 : 1 + 2 * t.shape[-1] : 2]


def as_expanded(t):
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("layout", [as_bhnd, as_slices, as_expanded])
@every()
def test_strides_do_not_matter(case, layout):
    module = case.make()
    x = case.inputs(70, module)
    strided = {name: layout(t) for name, t in x.items()}
    plain = {name: t.contiguous() for name, t in strided.items()}
    expected = gradients(module, plain, lambda leaves: case.run(module, leaves))
    assert_close(case.run(module, strided), case.run(module, plain), 1e-10)
    found = gradients(module, x, lambda leaves: case.run(module, {name: layout(t) for name, t in leaves.items()}))
    if layout is not as_expanded:
        for name in x:
            assert_close(found[name], expected[name], 1e-10, f"gradient of {name}")


@every()
def test_rows_of_a_batch_keep_to_themselves(case):
    module = case.make()
    x = case.inputs(70, module, batch=3)
    alone = [case.run(module, {name: t[row : row + 1] if t.shape[0] == 3 else t for name, t in x.items()}) for row in range(3)]
    assert_close(case.run(module, x), torch.cat(alone), 1e-10)
