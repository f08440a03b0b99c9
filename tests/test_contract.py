"""The contract by itself, on a mechanism of a few lines: registry, cards, input checks, state, rotary."""

import math
import pickle
import types

import pytest
import torch

import subquad
from subquad import Attention, Call, Card, Input, InputError, Rotary, Shape, State, contract
from subquad.checks import check_cu_seqlens, check_qkv, check_tensor, compute_dtype, nearest
from subquad.rotary import rotate
from subquad.state import RECORD_TOKENS


def card(**changes):
    fields = {
        "title": "Running sum", "paper": "none", "family": "linear", "summary": "o_t = a_1 v_1 + … + a_t v_t.", "causal": True,
        "flops": lambda s, **_: s.tokens, "bytes_moved": lambda s, **_: s.tensor_bytes, "state_bytes": lambda s, **_: 4 * s.kv * s.values,
        "keeps": "{kv_heads} sums of {value_dim}, gain {gain}",
    }  # fmt: skip
    return Card(**{**fields, **changes})


@pytest.fixture
def running_sum(monkeypatch):
    """Registered for one test only: a running sum of values, weighted by the input `a`."""
    monkeypatch.setattr(contract, "_REGISTRY", dict(contract._REGISTRY))

    @subquad.register("running-sum")
    class RunningSum(Attention):
        card = card(inputs={"a": Input("weights", ("B", "N", "Hs"), 0.0, 1.0)})

        def __init__(self, heads: int, head_dim: int, *, gain: float = 1.0, **sizes):
            super().__init__(heads, head_dim, **sizes)
            self.gain = gain

        def project(self, hidden):
            return {"a": hidden[..., : self.kv_heads]}

        def mix(self, q, k, v, call: Call, a):
            sums = (a[..., None] * v * self.gain).cumsum(1)
            if call.state is not None:
                sums = sums + call.state["sum"][:, None]
            last = sums[:, -1] if q.shape[1] else call.state["sum"]
            return sums.repeat_interleave(self.heads // self.kv_heads, 2), {"sum": last}

    return RunningSum


def tensors(n=10, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, a = (torch.randn(batch, n, h, d, generator=generator) for h, d in ((4, 8), (2, 8), (2, 8), (2, 1)))
    return {"q": q, "k": k, "v": v, "a": a[..., 0]}


def part(x, start, stop):
    return {name: t[:, start:stop] for name, t in x.items()}


def make(**options):
    return subquad.attention("running-sum", 4, 8, kv_heads=2, **options)


# ---- registry and cards ----------------------------------------------------------------------------------------------


def test_registered_mechanism_is_known_everywhere(running_sum):
    assert "running-sum" in subquad.mechanisms() and list(subquad.mechanisms()) == sorted(subquad.mechanisms())
    assert subquad.card("running-sum") is running_sum.card and running_sum.card.name == "running-sum"
    assert subquad.mechanism("running-sum") is running_sum
    module = make(gain=2.0)
    assert type(module) is running_sum and module.options == {"gain": 2.0}
    x = tensors()
    expected = (2.0 * x["a"][..., None] * x["v"]).cumsum(1)[:, :, [0, 0, 1, 1]]
    torch.testing.assert_close(module(**x), expected)
    torch.testing.assert_close(subquad.attend(**x, name="running-sum", gain=2.0), expected)


def test_unknown_names_get_the_nearest(running_sum):
    with pytest.raises(InputError, match=r"name: got 'runing-sum'; expected a mechanism; nearest: running-sum"):
        subquad.attention("runing-sum", 4, 8)
    with pytest.raises(InputError, match=r"gian: got 'gian'; expected an option of running-sum; nearest: gain"):
        make(gian=1)
    with pytest.raises(InputError, match="one of: a, b"):
        raise nearest("x", "zzzz", ["b", "a"], "letter")


def test_a_taken_name_is_refused(running_sum):
    with pytest.raises(InputError, match="name: got 'running-sum'; expected a name not taken by"):

        @subquad.register("running-sum")
        class Other(Attention):
            card = card()


def test_reference_is_found_beside_the_class(running_sum):
    module = types.ModuleType("somewhere")
    running_sum.__module__ = "somewhere"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "somewhere", module)
        with pytest.raises(InputError, match="a mechanism whose file defines reference"):
            subquad.reference("running-sum")
        module.reference = lambda module, q, k, v: "found"
        assert subquad.reference("running-sum")(None, 0, 0, 0) == "found"


def test_options_are_those_of_the_init_that_ran(running_sum):
    """Also of a class that gets its `__init__` after it was made, as from a decorator."""

    class Louder(running_sum):
        def __init__(self, heads: int, head_dim: int, *, gain: float = 2.0, more: int = 3, **sizes):
            super().__init__(heads, head_dim, gain=gain, **sizes)
            self.more = more

    class Late(running_sum): ...

    assert Louder(4, 8, more=5).options == {"gain": 2.0, "more": 5} and Late(4, 8).options == {"gain": 1.0}
    Late.__init__ = lambda self, heads, head_dim, *, tail=1: (running_sum.__init__(self, heads, head_dim), setattr(self, "tail", tail))[0]
    assert Late(4, 8, tail=7).options == {"tail": 7}
    again = pickle.loads(pickle.dumps(subquad.attention("lolcats", 2, 8, window=5)))
    assert again.options["window"] == 5 and "window=5" in again._sizes


def test_classes_may_have_arguments_of_a_mixin(running_sum):
    class Named:
        def __init_subclass__(cls, label="", **rest):
            super().__init_subclass__(**rest)
            cls.label = label

    class Both(running_sum, Named, label="both"): ...

    assert Both.label == "both" and Both(4, 8).options == {"gain": 1.0}


def test_attend_refuses_mechanisms_with_parameters(running_sum):
    def with_parameter(self, *args, **options):
        Attention.__init__(self, *args, **options)
        self.gain = torch.nn.Parameter(torch.ones(1))

    running_sum.__init__ = with_parameter
    with pytest.raises(InputError, match=r"without parameters; make this one with subquad\.attention"):
        subquad.attend(**tensors(), name="running-sum")


@pytest.mark.parametrize(
    "changes, argument",
    [
        ({"family": "liner"}, "card.family"),
        ({"causal": False}, "card"),
        ({"state_bytes": None}, "card.state_bytes"),
    ],
)
def test_cards_are_validated(changes, argument):
    with pytest.raises(InputError) as caught:
        card(**changes)
    assert caught.value.argument == argument


def test_what_a_card_says_it_keeps():
    assert card().kept(Shape(10, 4, 8, kv_heads=2), gain=3) == "2 sums of 8, gain 3"
    assert not card().needs_hidden and card(inputs={"a": Input("", ("B",), 0, 1)}).needs_hidden


def test_shape_counts_bytes():
    # q and o: 100 tokens of 8 heads of 64 + 32; k and v: of 2 heads; two rows, four bytes
    assert Shape(100, 8, 64, kv_heads=2, value_dim=32, batch=2, itemsize=4).tensor_bytes == 2 * 100 * (8 * 96 + 2 * 96) * 4
    assert Shape(1, 3, 5).tensor_bytes == 4 * 3 * 5 * 2
    assert (Shape(1, 3, 5).kv, Shape(1, 3, 5).values) == (3, 5)


# ---- input checks ----------------------------------------------------------------------------------------------------


def test_input_errors_have_three_parts_and_survive_pickling():
    error = pickle.loads(pickle.dumps(InputError("window", -1, "a positive integer")))
    assert isinstance(error, ValueError) and error.argument == "window"
    assert str(error) == "window: got -1; expected a positive integer"


@pytest.mark.parametrize(
    "argument, change",
    [
        ("q", lambda q, k, v: ("q", k, v)),
        ("v", lambda q, k, v: (q, k, v[0])),
        ("q", lambda q, k, v: (q.long(), k, v)),
        ("k", lambda q, k, v: (q, k.double(), v)),
        ("v", lambda q, k, v: (q, k, v.to("meta"))),
        ("k", lambda q, k, v: (q, k[:1], v)),
        ("v", lambda q, k, v: (q, k, v[:, 1:])),
        ("k", lambda q, k, v: (q, k[:, 1:], v[:, 1:])),
        ("k", lambda q, k, v: (q, k[..., 1:], v)),
        ("k", lambda q, k, v: (q, torch.cat([k, k[:, :, :1]], 2), v)),
        ("v", lambda q, k, v: (q, k, v[:, :, :0])),
    ],
)
def test_check_qkv_names_the_culprit(argument, change):
    x = tensors()
    with pytest.raises(InputError) as caught:
        check_qkv(*change(x["q"], x["k"], x["v"]))
    assert caught.value.argument == argument


def test_check_qkv_gives_the_head_count_and_lets_keys_be_longer():
    x = tensors()
    assert check_qkv(x["q"], x["k"], x["v"]) == 4
    assert check_qkv(x["k"], x["k"], x["q"]) == 4  # more value heads than query heads
    assert check_qkv(x["q"][:, 6:], x["k"], x["v"], longer_keys=True) == 4
    with pytest.raises(InputError, match=r"q: got .* at most as many tokens as k, 6"):
        check_qkv(x["q"], x["k"][:, 4:], x["v"][:, 4:], longer_keys=True)


@pytest.mark.parametrize("bad", [[0, 5], [1, 10], [0, 7, 3, 10], [], [[0, 10]], [0.0, 10.0]])
def test_bad_cu_seqlens(bad):
    with pytest.raises(InputError, match="cu_seqlens: got"):
        check_cu_seqlens(torch.tensor(bad, dtype=None if bad else torch.int32), tensors(batch=1)["q"])


def test_cu_seqlens_need_a_batch_of_one():
    check_cu_seqlens(torch.tensor([0, 4, 4, 10]), tensors(batch=1)["q"])
    with pytest.raises(InputError, match="given with batch size 2"):
        check_cu_seqlens(torch.tensor([0, 10]), tensors()["q"])
    with pytest.raises(InputError, match="expected an integer tensor"):
        check_cu_seqlens([0, 10], tensors(batch=1)["q"])


def test_check_tensor():
    q = tensors()["q"]
    check_tensor("beta", None, (1,), q)
    check_tensor("beta", torch.zeros(3), (3,), q)
    for bad in (torch.zeros(4), 3.0, torch.zeros(3, device="meta")):
        with pytest.raises(InputError, match="beta: got"):
            check_tensor("beta", bad, (3,), q)


def test_compute_dtype():
    found = [compute_dtype(torch.zeros(1, dtype=d)) for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    assert found == [torch.float32] * 3 + [torch.float64]


@pytest.mark.parametrize(
    "sizes, argument",
    [
        ({"heads": 0}, "heads"), ({"head_dim": 8.0}, "head_dim"), ({"kv_heads": 3}, "kv_heads"), ({"kv_heads": 0}, "kv_heads"),
        ({"value_dim": -2}, "value_dim"), ({"layer": (3, 3)}, "layer"), ({"layer": (-1, 3)}, "layer"),
    ],
)  # fmt: skip
def test_bad_sizes(running_sum, sizes, argument):
    with pytest.raises(InputError) as caught:
        subquad.attention("running-sum", **{"heads": 4, "head_dim": 8, **sizes})
    assert caught.value.argument == argument


def test_extra_inputs_are_passed_or_projected(running_sum):
    x = tensors()
    hidden = torch.randn(2, 10, 6)
    qkv = {name: x[name] for name in "qkv"}
    projected = make(hidden_size=6)(**qkv, hidden=hidden)
    torch.testing.assert_close(projected, make()(**qkv, a=hidden[..., :2]))
    torch.testing.assert_close(make(hidden_size=6)(**x, hidden=hidden), make()(**x))  # what is passed goes first
    for call, argument in (({}, "a"), ({"hidden": hidden}, "a"), ({"b": x["a"], "a": x["a"]}, "b"), ({"a": x["a"][:, 1:]}, "a")):
        with pytest.raises(InputError) as caught:
            make()(**qkv, **call)
        assert caught.value.argument == argument
    with pytest.raises(InputError, match=r"hidden: got \[2, 9, 6\]"):
        make(hidden_size=6)(**qkv, hidden=hidden[:, 1:])


def test_a_grid_must_fit(running_sum):
    running_sum.card = card(needs_grid=True, inputs=running_sum.card.inputs)
    assert make()(**tensors(), grid=(2, 5)).shape == (2, 10, 4, 8)
    assert make()(**tensors(12), grid=(2, 2, 3)).shape == (2, 12, 4, 8)
    for grid in (None, (3, 3)):
        with pytest.raises(InputError, match="grid: got"):
            make()(**tensors(), grid=grid)
    packed = tensors(batch=1)
    with pytest.raises(InputError, match="the length of every sequence"):
        make()(**packed, grid=(2, 2), cu_seqlens=torch.tensor([0, 4, 10]))


# ---- state -----------------------------------------------------------------------------------------------------------


def test_state_goes_on_where_it_stopped(running_sum):
    x = tensors()
    whole, last = make()(**x, return_state=True)
    first, state = make()(**part(x, 0, 7), return_state=True)
    second, state = make()(**part(x, 7, 10), state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state["sum"], last["sum"])
    assert state.length.tolist() == [10, 10] and state.batch == 2 and state.nbytes == 2 * 2 * 8 * 4
    assert repr(state) == "State(sum=[2, 2, 8], length=[10, 10])"


def test_state_lengths_of_packed_calls(running_sum):
    packed = tensors(batch=1)
    running_sum.mix = lambda self, q, k, v, call, a: (q, {"sum": q.new_zeros(3, 1)})
    _, state = make()(**packed, cu_seqlens=torch.tensor([0, 4, 4, 10]), return_state=True)
    assert state.length.tolist() == [4, 0, 6]
    _, state = make()(**packed, cu_seqlens=torch.tensor([0, 1, 3, 10]), state=state, return_state=True)
    assert state.length.tolist() == [5, 2, 13]


def test_reorder_join_and_move():
    state = State({"S": torch.arange(3.0)[:, None]}, torch.tensor([5, 6, 7]))
    beams = state.reorder(torch.tensor([2, 0, 0, 1]))
    assert beams["S"].flatten().tolist() == [2, 0, 0, 1] and beams.length.tolist() == [7, 5, 5, 6]
    joined = State.join([state, beams])
    assert joined["S"].flatten().tolist() == [0, 1, 2, 2, 0, 0, 1] and joined.batch == 7
    longer = State({"S": torch.full((1, 3), 9.0)}, torch.tensor([3]))  # grows along dim 1: aligned at the last token
    assert State.join([state, longer])["S"].tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [9, 9, 9]]
    assert state.to("meta")["S"].device.type == "meta"
    grown = State({"S": torch.ones(3, 1, requires_grad=True)}, state.length)
    assert grown["S"].requires_grad and not grown.detach()["S"].requires_grad


def test_states_that_do_not_fit(running_sum):
    x = tensors()
    _, state = make()(**x, return_state=True)
    with pytest.raises(InputError, match=r"state.S: got \[2, 1\].*expected batch size 3"):
        State({"S": torch.zeros(2, 1)}, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match="state: got one of S; expected a state of this mechanism, with sum"):
        make()(**x, state=State({"S": torch.zeros(2, 1)}, torch.tensor([1, 2])))
    foreign = State(state.tensors, state.length, "another mechanism")
    for bad in ({"sum": 0}, state.reorder(torch.tensor([0])), state.to("meta"), foreign):
        with pytest.raises(InputError, match="state: got"):
            make()(**x, state=bad)
    running_sum.card = card(causal=False, bidirectional=True, inputs=running_sum.card.inputs)
    for call, argument in (({"state": state}, "state"), ({"return_state": True}, "return_state")):
        with pytest.raises(InputError, match=f"{argument}: got given; expected none") as caught:
            make()(**x, **call)
        assert caught.value.argument == argument


def steps(x, sizes, state):
    at = 0
    for n in sizes:
        _, state = make()(**part(x, at, at + n), state=state, return_state=True)
        at += n
    return state


@pytest.mark.parametrize("sizes", [[1] * 60, [60], [5, 40, 15], [16] * 3 + [12], [33, 1, 26]], ids=str)
def test_crop_goes_back_to_any_recorded_token(running_sum, sizes):
    x = tensors(70)
    _, prefix = make()(**part(x, 60, 70), return_state=True)  # recorded from here on
    state = steps(x, sizes, prefix.record())
    for drop in range(1, 61):
        cropped = state.crop(-drop)
        expected = prefix["sum"] + (x["a"][..., None] * x["v"])[:, : 60 - drop].sum(1)
        torch.testing.assert_close(cropped["sum"], expected, atol=1e-5, rtol=1e-5)
        assert cropped.length.tolist() == [70 - drop] * 2
        assert torch.equal(state.crop(70 - drop)["sum"], cropped["sum"])
        assert cropped.recording
    with pytest.raises(InputError, match=r"n: got -61; expected to go back at most the 60 tokens recorded \(recording is on\)"):
        state.crop(-61)
    with pytest.raises(InputError, match="n: got 71"):
        state.crop(71)


def test_crop_again_after_a_crop(running_sum):
    x = tensors(40)
    state = steps(x, [1] * 30, make()(**part(x, 0, 0), state=empty(), return_state=True)[1].record())
    cropped = state.crop(25)
    _, regrown = make()(**part(x, 25, 40), state=cropped, return_state=True)
    for n in (40, 33, 25, 20, 3, 0):
        torch.testing.assert_close(regrown.crop(n)["sum"], (x["a"][..., None] * x["v"])[:, :n].sum(1), atol=1e-5, rtol=1e-5)


def empty():
    return State({"sum": torch.zeros(2, 2, 8)}, torch.zeros(2, dtype=torch.long))


def test_recording_is_bounded_and_survives_reordering(running_sum):
    x = tensors(300)
    state = steps(x, [1] * 300, empty().record())
    kept = sum(step.tokens for step in state.steps)
    assert RECORD_TOKENS <= kept <= 2 * RECORD_TOKENS and len(state.steps) <= 2 * RECORD_TOKENS // 8
    other = state.reorder(torch.tensor([1])).crop(-50)
    torch.testing.assert_close(other["sum"], (x["a"][..., None] * x["v"])[1:, :250].sum(1), atol=1e-4, rtol=1e-4)
    assert state.record(False).steps == ()
    with pytest.raises(InputError, match="recording is off"):
        state.crop(-1)


def test_crop_by_position_needs_equal_lengths():
    state = State({"S": torch.zeros(2, 1)}, torch.tensor([3, 4]))
    with pytest.raises(InputError, match=r"n: got 2; expected a negative number \(rows differ in length: \[3, 4\]\)"):
        state.crop(2)


def test_crop_with_rotary_replays_the_angles(running_sum):
    def turned_sum(self, q, k, v, call, a):
        (v,) = rotate(call.rotary, v)
        return q, {"sum": call.state["sum"] + v.sum(1)}

    running_sum.mix = turned_sum
    x, angles = tensors(12), Rotary.of(torch.arange(12), 8)
    _, state = make()(**x, rotary=angles, state=empty().record(), return_state=True)
    torch.testing.assert_close(state.crop(7)["sum"], angles.narrow(0, 7).apply(x["v"][:, :7]).sum(1))


# ---- rotary ----------------------------------------------------------------------------------------------------------


def test_rotary_turns_pairs_by_position_times_frequency():
    x = torch.zeros(1, 3, 1, 4)
    x[..., 0] = 1
    # D = 4, θ = 100: frequencies 1 and 0.1; a unit vector in the first pair turns by 0, 1, 2 radians
    for interleaved, partner in ((False, 2), (True, 1)):
        turned = Rotary.of(torch.arange(3), 4, theta=100.0, interleaved=interleaved).apply(x)[0, :, 0]
        for t in range(3):
            assert turned[t, 0] == pytest.approx(math.cos(t), abs=1e-6)
            assert turned[t, partner] == pytest.approx(math.sin(t), abs=1e-6)
            assert turned[t].square().sum() == pytest.approx(1, abs=1e-6)
    x = torch.zeros(1, 1, 1, 4)
    x[..., 1] = 1  # the second pair when halves are paired
    assert Rotary.of(torch.tensor([5]), 4, theta=100.0).apply(x)[0, 0, 0, 3] == pytest.approx(math.sin(0.5), abs=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_products_depend_on_distance_alone(interleaved):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i, j):
        turn = [Rotary.of(torch.tensor([t]), 16, interleaved=interleaved).apply(x) for t, x in ((i, q), (j, k))]
        return float((turn[0] * turn[1]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert abs(product(7, 3) - product(7, 5)) > 1e-3


def test_rotary_leaves_channels_past_its_width():
    x = torch.randn(2, 5, 3, 8)
    turned = Rotary.of(torch.arange(5) + 1, 6).apply(x)
    assert torch.equal(turned[..., 6:], x[..., 6:]) and not torch.equal(turned[..., :6], x[..., :6])


def test_rotary_per_row_dtype_and_none():
    positions = torch.tensor([[0, 1, 2], [10, 11, 12]])
    x = torch.randn(2, 3, 1, 4)
    turned = Rotary.of(positions, 4).apply(x)
    for row in range(2):
        torch.testing.assert_close(turned[row : row + 1], Rotary.of(positions[row], 4).apply(x[row : row + 1]))
    half = Rotary.of(positions, 4).apply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, Rotary.of(positions, 4).apply(x.bfloat16().float()).bfloat16())  # float32 inside
    assert rotate(None, x)[0] is x
    assert Rotary.of(positions, 4).to(x.double()).cos.dtype == torch.float64


def test_bad_rotary():
    cos = torch.zeros(5, 4)
    for bad in (lambda: Rotary(cos, cos[1:]), lambda: Rotary(cos[0], cos[0]), lambda: Rotary(cos[:, :3], cos[:, :3])):
        with pytest.raises(InputError, match="rotary"):
            bad()
    with pytest.raises(InputError, match="rotary: got"):
        Rotary(cos, cos).apply(torch.zeros(1, 5, 1, 2))
    with pytest.raises(InputError, match="rotary: got"):
        Rotary(cos, cos).apply(torch.zeros(1, 4, 1, 8))


@pytest.mark.parametrize("positions, width", [((5,), 8), ((10,), 10), ((3, 10), 8)], ids=str)
def test_rotary_that_does_not_fit_the_call(running_sum, positions, width):
    with pytest.raises(InputError, match="rotary: got"):
        make()(**tensors(), rotary=Rotary.of(torch.zeros(positions, dtype=torch.long), width))


@pytest.mark.parametrize(
    ("name", "options", "argument"),
    [
        ("deltanet", {"negative_eigenvalues": "no"}, "negative_eigenvalues"),
        ("softmax", {"causal": "maybe"}, "causal"),
        ("sliding-window", {"window": True}, "window"),
        ("gla", {"gate_normalizer": "abc"}, "gate_normalizer"),
        ("hedgehog", {"feature_map": [1]}, "feature_map"),
        ("gla", {"layer": 3}, "layer"),
        ("gla", {"hidden_size": 0}, "hidden_size"),
    ],
)
def test_options_of_another_type_are_refused(name, options, argument):
    with pytest.raises(subquad.InputError) as error:
        subquad.attention(name, 2, 8, **options)
    assert error.value.argument == argument


def test_a_state_of_other_options_is_refused():
    q = torch.randn(1, 10, 2, 8)
    state = subquad.attention("sliding-window", 2, 8, window=8, sinks=1)(q, q, q, return_state=True)[1]
    with pytest.raises(subquad.InputError, match=r"window=8, sinks=1; expected .*window=5, sinks=4"):
        subquad.attention("sliding-window", 2, 8, window=5, sinks=4)(q[:, :1], q[:, :1], q[:, :1], state=state)
