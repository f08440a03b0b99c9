"""States: any split into segments equals one pass; reordering, size, and cropping."""

import copy

import pytest
import torch
from conformance.cases import DEVICE, TOLERANCE, Case, assert_all_close, assert_close, causal, every, gradients, shape_of, split

from subquad import InputError, Rotary, State

N = 140
SPLITS = {
    "ones": [1] * N,
    "first": [1, N - 1],
    "last": [N - 1, 1],
    "border": [64, 64, 12],
    "odd": [3, 17, 1, 1, 45, 2, 70, 1],
    "prefill": [65, *[1] * (N - 65)],
}
BY_SPLIT = pytest.mark.parametrize("pieces", SPLITS.values(), ids=list(SPLITS))


@BY_SPLIT
@every(causal, with_variants=True)
def test_split_equals_one_pass(case, pieces):
    module = case.make()
    x = case.inputs(N, module)
    rotary = Rotary.of(torch.arange(N, device=DEVICE), 16, theta=100.0)
    with torch.no_grad():
        o, state = split(case, module, x, pieces, rotary=rotary)
        whole, last = case.run(module, x, rotary=rotary, return_state=True)
    assert_close(whole, case.define(module, x, rotary), 1e-10)
    assert_close(o, whole, 1e-10)
    assert state.length.tolist() == last.length.tolist() == [N, N]


@pytest.mark.parametrize("pieces", [SPLITS["odd"], SPLITS["prefill"]], ids=["odd", "prefill"])
@every(causal)
def test_split_in_float32(case, pieces):
    module = case.make(torch.float32)
    x = case.inputs(N, module, dtype=torch.float32)
    exact = case.define(case.twin(module, torch.float64), {name: t.double() for name, t in x.items()})
    o, _ = split(case, module, x, pieces)
    assert_close(o, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("pieces", [SPLITS["ones"], SPLITS["border"]], ids=["ones", "border"])
@every(causal)
def test_split_in_bfloat16(case, pieces):
    """Carrying the state adds no error: within `bf16_factor` of the reference rounded to bfloat16."""
    module = case.make(torch.bfloat16)
    x = case.inputs(N, module, dtype=torch.bfloat16)
    exact = case.define(case.twin(module, torch.float64), {name: t.double() for name, t in x.items()})
    own = case.define(case.twin(module, torch.float32), {name: t.float() for name, t in x.items()}).bfloat16()
    with torch.no_grad():
        o, _ = split(case, module, x, pieces)
    assert o.dtype == torch.bfloat16
    late = slice(N // 2, None)  # where an error of the state has had time to build up
    assert (o - exact)[:, late].square().mean().sqrt() <= case.card.bf16_factor * (own - exact)[:, late].square().mean().sqrt()


@pytest.mark.parametrize("pieces", [[N], [70, 1, 1, N - 72], [1] * N], ids=["one", "odd", "ones"])
@every(causal, with_variants=True)
def test_states_of_bfloat16_inputs_are_exact(case, pieces):
    """What is accumulated is kept in float32: only what came in bfloat16 is kept in bfloat16.

    A card's `bf16_state` says so where features are rounded to bfloat16 first: 2^-9 each, less in sums.
    """
    module = case.make(torch.bfloat16)
    x = case.inputs(N, module, dtype=torch.bfloat16)
    x.update({name: t for name, t in case.inputs(N, module, dtype=torch.float32).items() if name not in "qkv"})  # as projected
    with torch.no_grad():
        _, state = split(case, module, x, pieces)
        _, exact = split(case, case.twin(module, torch.float64), {name: t.double() for name, t in x.items()}, pieces)
    for name, t in state.tensors.items():
        if not t.numel():
            continue
        off = (t - exact[name]).square().mean().sqrt() / exact[name].square().mean().sqrt()
        assert off <= (0 if t.dtype == torch.bfloat16 else case.card.bf16_state), f"{name} ({t.dtype}): off by {off:.1e}"


@every(causal)
def test_gradients_through_the_state(case):
    module = case.make()
    x = case.inputs(N, module)
    expected = gradients(module, x, lambda leaves: case.run(module, leaves))
    for pieces in ([64, 1, 75], [1, 1, 68, 70]):
        found = gradients(module, x, lambda leaves: split(case, module, leaves, pieces)[0])  # noqa: B023
        assert_all_close(found, expected, 1e-10, f"gradient over pieces {pieces} of")


@every(causal)
def test_a_call_leaves_the_old_state_as_it_was(case):
    module = case.make()
    x = case.inputs(N, module)
    _, old = case.run(module, case.tokens(x, 0, 100), return_state=True)
    before = {name: t.clone() for name, t in old.tensors.items()}
    once = case.run(module, case.tokens(x, 100, N), state=old, return_state=True)[0]
    for name, t in before.items():
        assert torch.equal(old[name], t), name
    assert old.length.tolist() == [100, 100]
    assert torch.equal(case.run(module, case.tokens(x, 100, N), state=old), once)  # nor does return_state change the output


@every(causal)
def test_a_call_without_tokens_changes_nothing(case):
    module = case.make()
    x = case.inputs(100, module)
    _, state = case.run(module, case.tokens(x, 0, 70), return_state=True)
    o, same = case.run(module, case.tokens(x, 70, 70), state=state, return_state=True)
    assert o.shape == (2, 0, module.heads, module.value_dim) and same.length.tolist() == [70, 70]
    rest = case.tokens(x, 70, 100)
    assert_close(case.run(module, rest, state=same), case.run(module, rest, state=state), 1e-12)


@every(causal)
def test_reorder(case):
    """Rows of a batch in another order, one of them twice, go on as those rows."""
    module = case.make()
    x = case.inputs(90, module, batch=3)
    index = torch.tensor([2, 0, 0, 1], device=DEVICE)
    _, state = case.run(module, case.tokens(x, 0, 70), return_state=True)
    rows = {name: t[index] if t.shape[0] == 3 else t for name, t in x.items()}
    with torch.no_grad():
        o, _ = split(case, module, case.tokens(rows, 70, 90), [1, 1, 18], state.reorder(index))
        expected = case.run(module, rows)[:, 70:]
    assert_close(o, expected, 1e-10)


@every(causal)
def test_join(case):
    """Rows of separate states go on as one batch, each with its own length."""
    module = case.make()
    parts = [(case.inputs(n + 5, module, batch=1, seed=n), n) for n in (3, 70, 129)]
    states = [case.run(module, case.tokens(x, 0, n), return_state=True)[1] for x, n in parts]
    wholes = [case.run(module, x)[:, n:] for x, n in parts]
    rest = [case.tokens(x, n, n + 5) for x, n in parts]
    batch = {name: torch.cat([r[name] for r in rest]) for name in rest[0]}
    with torch.no_grad():
        o, state = split(case, module, batch, [1, 3, 1], State.join(states))
    assert_close(o, torch.cat(wholes), 1e-10)
    assert state.length.tolist() == [8, 75, 134]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 20, 64, 130])
@every(causal)
def test_nbytes_are_the_cards(case, n, dtype):
    module = case.make(dtype)
    x = case.inputs(n, module, batch=3, dtype=dtype)
    with torch.no_grad():
        whole = case.run(module, x, return_state=True)[1]
        stepped = split(case, module, x, [1] * n)[1]
    expected = case.card.state_bytes(shape_of(module, n, batch=3, dtype=dtype), **module.options)
    assert whole.nbytes == expected
    assert stepped.nbytes == expected


@every(lambda case: case.causal and case.card.recurrent)
def test_recurrent_states_do_not_grow(case):
    module = case.make(torch.float32)
    limit = max([64, *(v for v in module.options.values() if type(v) is int)])
    x = case.inputs(4 * limit, module, batch=1, dtype=torch.float32)
    with torch.no_grad():
        sizes = {case.run(module, case.tokens(x, 0, n), return_state=True)[1].nbytes for n in (limit, limit + 1, 2 * limit, 4 * limit)}
    assert len(sizes) == 1
    assert case.card.state_bytes(shape_of(module, 10**4, batch=1, dtype=torch.float32), **module.options) == sizes.pop()


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotary"])
@every(causal)
def test_crop_is_never_having_seen(case, rotated):
    module = case.make()
    x = case.inputs(120, module)
    rotary = Rotary.of(torch.arange(120, device=DEVICE), 16, theta=100.0) if rotated else None

    def go(a: int, b: int, pieces: list[int], state: State | None) -> tuple[torch.Tensor, State]:
        call = {} if rotary is None else {"rotary": rotary.narrow(a, b)}
        return split(case, module, case.tokens(x, a, b), pieces, state, **call)

    with torch.no_grad():
        _, prefix = go(0, 70, [70], None)
        _, state = go(70, 96, [1] * 6 + [5, 15], prefix.record())
        for drop in (1, 4, 15, 16, 20, 26):
            cropped = state.crop(-drop)
            assert cropped.length.tolist() == [96 - drop] * 2
            expected, _ = go(96 - drop, 120, [24 + drop], go(0, 96 - drop, [96 - drop], None)[1])
            again, _ = go(96 - drop, 120, [1, 1, 22 + drop], cropped)
            assert_close(again, expected, 1e-10)
        assert state.crop(80).length.tolist() == [80, 80]
        twice = go(90, 96, [6], state.crop(90))[1].crop(88)  # draft, reject, draft, reject
        assert_close(go(88, 120, [32], twice)[0], go(88, 120, [32], go(0, 88, [88], None)[1])[0], 1e-10)
    for n in (-27, 60, 97):
        with pytest.raises(InputError, match="n: got"):
            state.crop(n)


@every(causal)
def test_crop_of_ragged_rows(case: Case):
    module = case.make()
    lengths = (70, 9)
    rows = [case.inputs(n + 12, module, batch=1, seed=n) for n in lengths]
    with torch.no_grad():
        starts = [case.run(module, case.tokens(x, 0, n), return_state=True)[1] for x, n in zip(rows, lengths)]
        rest = [case.tokens(x, n, n + 12) for x, n in zip(rows, lengths)]
        batch = {name: torch.cat([r[name] for r in rest]) for name in rest[0]}
        _, state = split(case, module, case.tokens(batch, 0, 6), [1, 5], State.join(starts).record())
        cropped = state.crop(-4)
        o, _ = split(case, module, case.tokens(batch, 2, 12), [1, 9], cropped)
        expected = torch.cat([case.run(module, x)[:, n + 2 :] for x, n in zip(rows, lengths)])
    assert cropped.length.tolist() == [72, 11]
    assert_close(o, expected, 1e-10)
    with pytest.raises(InputError, match="negative"):
        state.crop(60)


@every(causal)
def test_states_can_be_copied_and_moved(case):
    module = case.make()
    x = case.inputs(80, module)
    _, state = case.run(module, case.tokens(x, 0, 70), return_state=True)
    rest = case.tokens(x, 70, 80)
    expected = case.run(module, rest, state=state)
    for other in (state.detach(), state.to("cpu").to(DEVICE), copy.deepcopy(state.detach())):
        assert torch.equal(case.run(module, rest, state=other), expected)
