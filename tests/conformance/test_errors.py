"""Bad input of each kind raises InputError: one line that names the argument, what it was, and what it should be."""

import pytest
import torch
from conformance.cases import DEVICE, DIM, HEADS, KV_HEADS, bidirectional, causal, every, takes_value_dim

import subquad
from subquad import InputError, Rotary, State

N = 40


@pytest.fixture
def good(case):
    module = case.make()
    return module, case.inputs(N, module)


def refuses(case, module, x, argument, **call):
    with pytest.raises(InputError) as caught:
        case.run(module, x, **call)
    message = str(caught.value)
    assert caught.value.argument.split(".")[0] == argument, message
    assert "\n" not in message and ": got " in message and "; expected " in message


@every()
def test_wrong_sizes(case, good):
    module, x = good
    for name in "qkv":
        t = x[name]
        refuses(case, module, {**x, name: t[..., :-1]}, name if name != "q" else "k")  # head dim
        refuses(case, module, {**x, name: torch.cat([t, t], 2)}, name)  # heads
        refuses(case, module, {**x, name: t[0]}, name)  # dimensions
        refuses(case, module, {**x, name: t.long()}, name)
    refuses(case, module, {**x, "k": x["k"][:, 1:], "v": x["v"][:, 1:]}, "k")
    refuses(case, module, {**x, "v": x["v"][:, 1:]}, "v")
    refuses(case, module, {**x, "k": x["k"][:1]}, "k")


@every()
def test_mixed_dtypes(case, good):
    module, x = good
    refuses(case, module, {**x, "k": x["k"].float()}, "k")
    refuses(case, module, {**x, "v": x["v"].bfloat16()}, "v")


@every()
def test_mixed_devices(case, good):
    module, x = good
    refuses(case, module, {**x, "v": x["v"].to("meta")}, "v")
    for name in case.card.inputs:
        refuses(case, module, {**x, name: x[name].to("meta")}, name)


@every(lambda case: bool(case.card.inputs))
def test_extra_inputs(case, good):
    module, x = good
    for name in case.card.inputs:
        rest = {other: t for other, t in x.items() if other != name}
        refuses(case, module, rest, name)
        refuses(case, module, {**x, name: x[name][..., :-1]}, name)
        refuses(case, module, {**x, name: x[name][None]}, name)
        refuses(case, module, {**x, name: 0.5}, name)
        refuses(case, module, rest, name, hidden=torch.zeros(2, N, 8, device=DEVICE))  # made without hidden_size
    made = case.make(hidden_size=8)
    only = {name: x[name] for name in "qkv"}
    refuses(case, made, only, "hidden", hidden=torch.zeros(2, N, 9, device=DEVICE, dtype=torch.float64))
    refuses(case, made, only, next(iter(case.card.inputs)))


@every()
def test_unknown_input(case, good):
    module, x = good
    refuses(case, module, x, "querries", querries=x["q"])


@every()
def test_cu_seqlens(case, good):
    module, x = good
    one = {name: t[:1] if case.has_tokens(name) else t for name, t in x.items()}
    grid = case.grid(N)
    for bad in ([0, 10], [1, N], [0, 20, 10, N], [0, N + 1], [], [0.0, float(N)], [[0, N]]):
        refuses(case, module, one, "cu_seqlens", cu_seqlens=torch.tensor(bad, device=DEVICE, dtype=None if bad else torch.int32), **grid)
    refuses(case, module, one, "cu_seqlens", cu_seqlens=[0, N], **grid)
    refuses(case, module, x, "cu_seqlens", cu_seqlens=torch.tensor([0, N], device=DEVICE), **grid)  # batch of two


@every()
def test_rotary(case, good):
    module, x = good
    for positions, width in ((N + 1, DIM), (N - 1, DIM), (N, DIM + 2)):
        refuses(case, module, x, "rotary", rotary=Rotary.of(torch.arange(positions, device=DEVICE), width))
    refuses(case, module, x, "rotary", rotary=Rotary.of(torch.arange(3 * N, device=DEVICE).reshape(3, N), DIM))  # three rows for two


@every(lambda case: case.card.needs_grid)
def test_grid(case, good):
    module, x = good
    for bad in (None, (5, 7), (N, N)):
        refuses(case, module, x, "grid", grid=bad)
    one = {name: t[:1] if case.has_tokens(name) else t for name, t in x.items()}
    refuses(case, module, one, "grid", grid=(4, 5), cu_seqlens=torch.tensor([0, 10, N], device=DEVICE))


@every(causal)
def test_bad_states(case, good):
    module, x = good
    _, state = case.run(module, x, return_state=True)
    refuses(case, module, x, "state", state={"S": torch.zeros(2)})
    refuses(case, module, x, "state", state=state.reorder(torch.tensor([0], device=DEVICE)))  # one row for two
    refuses(case, module, x, "state", state=state.to("meta"))
    refuses(case, module, x, "state", state=State({}, state.length))
    refuses(case, module, x, "state", state=State({f"{name}_": t for name, t in state.tensors.items()}, state.length))
    for sizes in ({"head_dim": 24}, {"kv_heads": HEADS}, {"value_dim": 24} if takes_value_dim(case.name) else {"heads": 2, "kv_heads": 2}):
        other = case.make(**sizes)
        refuses(case, module, x, "state", state=case.run(other, case.inputs(N, other), return_state=True)[1])


@every(lambda case: bidirectional(case) and not case.card.causal)
def test_states_of_what_keeps_none(case, good):
    module, x = good
    refuses(case, module, x, "return_state", return_state=True)
    refuses(case, module, x, "state", state=State({}, torch.zeros(2, dtype=torch.long, device=DEVICE)))


@every(lambda case: bidirectional(case) and case.card.causal)
def test_states_when_made_bidirectional(case, good):
    module, x = good
    refuses(case, module, x, "return_state", return_state=True)
    made_causal = type(case)(case.name, True).make()
    _, state = made_causal(x["q"], x["k"], x["v"], return_state=True, **{name: x[name] for name in case.card.inputs})
    refuses(case, module, x, "state", state=state)


@every()
def test_making_it(case):
    def make(**changes):
        with pytest.raises(InputError) as caught:
            subquad.attention(case.name, **{"heads": HEADS, "head_dim": DIM, **changes})
        assert "\n" not in str(caught.value)
        return caught.value

    assert make(heads=0).argument == "heads"
    assert make(head_dim=1.5).argument == "head_dim"
    assert make(kv_heads=3).argument == "kv_heads"
    assert make(value_dim=-1).argument == "value_dim"
    assert make(layer=(2, 2)).argument == "layer"
    assert make(no_such_option=1).argument == "no_such_option"
    for option in case.make().options:
        error = make(**{f"{option}x": 1})
        assert error.argument == f"{option}x" and option in str(error), "the nearest option is named"


@every()
def test_options_of_the_wrong_kind(case):
    """Whole-number options refuse what is not one, named options refuse other names."""
    module = case.make()
    for option, value in module.options.items():
        for bad in [0.5, "many"] if type(value) is int else ["no-such"] if isinstance(value, str) else []:
            with pytest.raises(InputError) as caught:
                subquad.attention(case.name, HEADS, DIM, kv_heads=KV_HEADS, **{option: bad})
            assert caught.value.argument == option
