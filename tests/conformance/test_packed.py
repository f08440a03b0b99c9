"""Packed sequences (`cu_seqlens`) equal separate ones: outputs, gradients, states, and what follows from them."""

import itertools

import pytest
import torch
from conformance.cases import DEVICE, Case, assert_all_close, assert_close, causal, every, gradients, split

from subquad import Rotary, State

RAGGED = (5, 0, 1, 64, 70, 1, 129, 0)


def lengths_of(case: Case) -> tuple[int, ...]:
    return (35, 35, 35) if case.card.needs_grid else RAGGED


def offsets(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)


def sequences(case, module, lengths, dtype=None):
    return [case.inputs(n, module, batch=1, seed=i, dtype=dtype) for i, n in enumerate(lengths)]


def packed(case, module, x, lengths, **call):
    return case.run(module, x, cu_seqlens=offsets(lengths), **case.grid(lengths[0]), **call)


@every(with_variants=True)
def test_packed_equals_separate(case):
    module, lengths = case.make(), lengths_of(case)
    parts = sequences(case, module, lengths)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])
    rotary = Rotary.of(positions, 16, theta=100.0)
    alone = [case.run(module, x, rotary=Rotary.of(torch.arange(x["q"].shape[1], device=DEVICE), 16, theta=100.0)) for x in parts]
    assert_close(packed(case, module, case.pack(parts), lengths, rotary=rotary), torch.cat(alone, 1), 1e-10)


@every()
def test_packed_gradients(case):
    module, lengths = case.make(), lengths_of(case)
    x = case.pack(sequences(case, module, lengths))
    ends = offsets(lengths).tolist()

    def alone(leaves):
        return torch.cat([case.run(module, case.tokens(leaves, a, b)) for a, b in itertools.pairwise(ends)], 1)

    found = gradients(module, x, lambda leaves: packed(case, module, leaves, lengths))
    assert_all_close(found, gradients(module, x, alone), 1e-10, "gradient of")


@every()
def test_packed_in_bfloat16_and_with_int64_offsets(case):
    module, lengths = case.make(torch.bfloat16), lengths_of(case)
    parts = sequences(case, module, lengths, torch.bfloat16)
    alone = torch.cat([case.run(module, x) for x in parts], 1)
    o = case.run(module, case.pack(parts), cu_seqlens=offsets(lengths, torch.int64), **case.grid(lengths[0]))
    assert o.dtype == torch.bfloat16
    assert_close(o, alone, 2e-2)


@every()
def test_one_packed_sequence_is_a_batch_of_one(case):
    module = case.make()
    x = case.inputs(77, module, batch=1)
    assert_close(packed(case, module, x, (77,)), case.run(module, x), 1e-10)


@every(causal)
def test_ragged_rows_go_on_as_a_batch(case):
    """The states of a packed prefill decode together, row by row, and equal each sequence on its own."""
    module, more = case.make(), 9
    parts = sequences(case, module, [n + more for n in RAGGED])
    prefill = case.pack([case.tokens(x, 0, n) for x, n in zip(parts, RAGGED)])
    rest = [case.tokens(x, n, n + more) for x, n in zip(parts, RAGGED)]
    batch = {name: torch.cat([r[name] for r in rest]) if case.has_tokens(name) else rest[0][name] for name in rest[0]}
    positions = torch.tensor(RAGGED, device=DEVICE)[:, None] + torch.arange(more, device=DEVICE)
    turn = {"theta": 100.0}
    with torch.no_grad():
        rotary = Rotary.of(torch.cat([torch.arange(n, device=DEVICE) for n in RAGGED]), 16, **turn)
        _, state = packed(case, module, prefill, RAGGED, return_state=True, rotary=rotary)
        assert state.length.tolist() == list(RAGGED)
        whole = [case.run(module, x, rotary=Rotary.of(torch.arange(x["q"].shape[1], device=DEVICE), 16, **turn)) for x in parts]
        per_row = Rotary.of(positions, 16, **turn)
        o, state = split(case, module, batch, [1, 1, 4, 1, 2], state, rotary=per_row)
    assert_close(o, torch.cat([w[:, n:] for w, n in zip(whole, RAGGED)]), 1e-10)
    assert state.length.tolist() == [n + more for n in RAGGED]


@every(causal)
def test_packed_calls_carry_states(case):
    """Two packed calls, the second from the states of the first, equal one."""
    module = case.make()
    first, second = (5, 0, 64, 33, 2), (7, 3, 1, 0, 66)
    parts = sequences(case, module, [a + b for a, b in zip(first, second)])
    with torch.no_grad():
        whole = [case.run(module, x, return_state=True) for x in parts]
        one = case.pack([case.tokens(x, 0, a) for x, a in zip(parts, first)])
        two = case.pack([case.tokens(x, a, a + b) for x, a, b in zip(parts, first, second)])
        _, state = packed(case, module, one, first, return_state=True)
        o, state = packed(case, module, two, second, state=state, return_state=True)
        assert_close(o, torch.cat([w[:, a:] for (w, _), a in zip(whole, first)], 1), 1e-10)
        assert state.length.tolist() == [a + b for a, b in zip(first, second)]
        # the states too: what follows from them is what follows from the separate ones
        after = case.inputs(3, module, batch=len(first), seed=99)
        assert_close(case.run(module, after, state=state), case.run(module, after, state=State.join([s for _, s in whole])), 1e-10)


@pytest.mark.parametrize("index", [[1, 0, 2], [2, 2]])
@every(causal)
def test_packed_states_reorder(case, index):
    module, lengths = case.make(), (30, 66, 2)
    parts = sequences(case, module, lengths)
    index = torch.tensor(index, device=DEVICE)
    with torch.no_grad():
        _, state = packed(case, module, case.pack(parts), lengths, return_state=True)
        separate = State.join([case.run(module, x, return_state=True)[1] for x in parts])
        after = case.inputs(4, module, batch=len(index), seed=99)
        expected = case.run(module, after, state=separate.reorder(index))
        assert_close(case.run(module, after, state=state.reorder(index)), expected, 1e-10)
