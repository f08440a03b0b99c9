"""Planting a fault turns the conformance suite red: for every mechanism to which the fault can happen.

First the faults of a mechanism's own code, planted around `mix` of every mechanism; then those inside a primitive,
planted in its source. A check that a fault does not turn red is a hole in the suite.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conformance import test_causality, test_heads, test_packed, test_reference, test_state
from conformance.cases import Case, causal, every, modes
from faults.plant import edited

import subquad
from subquad import Attention, State
from subquad.contract import mechanism

CHECKS = {
    "output": lambda case: test_reference.test_output(case, torch.float64),
    "output in float32": lambda case: test_reference.test_output(case, torch.float32),
    "gradients": lambda case: test_reference.test_gradients_of_each_input_and_parameter(case, torch.float64),
    "leak": test_causality.test_outputs_before_a_changed_token_stay,
    "leak of gradients": test_causality.test_no_gradient_from_the_future,
    "steps": lambda case: test_state.test_split_equals_one_pass(case, test_state.SPLITS["ones"]),
    "split": lambda case: test_state.test_split_equals_one_pass(case, test_state.SPLITS["odd"]),
    "split in float32": lambda case: test_state.test_split_in_float32(case, test_state.SPLITS["odd"]),
    "packed": test_packed.test_packed_equals_separate,
    "packed gradients": test_packed.test_packed_gradients,
    "heads": test_heads.test_heads_keep_to_themselves,
}


def red(case: Case, check: str) -> bool:
    try:
        CHECKS[check](case)
    except (AssertionError, subquad.InputError):
        return True
    return False


def assert_red(plant, case, *checks):
    """Each check is green, turns red while the fault is planted, and is green again."""
    for check in checks:
        assert not red(case, check), f"{check} is red without the fault"
    with plant:
        blind = [check for check in checks if not red(case, check)]
    assert not blind, f"not noticed by: {', '.join(blind)}"
    assert not red(case, checks[0]), "the fault stayed"


# ---- faults around mix() ---------------------------------------------------------------------------------------------


@contextmanager
def around_mix(change):
    """Every mechanism's mix becomes ``change(mix, self, q, k, v, call, **inputs)``."""
    with ExitStack() as stack:
        for cls in {base for name in subquad.mechanisms() for base in mechanism(name).__mro__ if issubclass(base, Attention)} - {Attention}:
            if "mix" not in vars(cls):
                continue  # inherited, and planted there
            stack.enter_context(patch.object(cls, "mix", faulty(cls.mix, change)))
        yield


def faulty(mix, change):
    return lambda self, q, k, v, call, **inputs: change(mix, self, q, k, v, call, **inputs)


def swap_two_heads(mix, self, q, k, v, call, **inputs):
    o, tensors = mix(self, q, k, v, call, **inputs)
    return o[:, :, [0, 2, 1, 3][: o.shape[2]]], tensors


def swap_two_key_heads(mix, self, q, k, v, call, **inputs):
    return mix(self, q, k.flip(2), v.flip(2), call, **inputs)


def scale_twice(mix, self, q, k, v, call, **inputs):
    return mix(self, q * self.head_dim**-0.5, k, v, call, **inputs)


def ignore_cu_seqlens(mix, self, q, k, v, call, **inputs):
    return mix(self, q, k, v, replace(call, cu_seqlens=None), **inputs)


def rounded(state: State) -> State:
    return state.map(lambda x: x.bfloat16().to(x.dtype) if x.is_floating_point() else x)


@contextmanager
def states_rounded_to_bfloat16():
    original = Attention._next_state
    with patch.object(Attention, "_next_state", lambda self, *args: rounded(original(self, *args))):
        yield


@every()
def test_swapped_heads(case):
    assert_red(around_mix(swap_two_heads), case, "output", "heads")


@every()
def test_swapped_key_heads(case):
    assert_red(around_mix(swap_two_key_heads), case, "output", "heads")


@every(lambda case: case.name != "linear-relu")  # relu and its denominator both grow with a query: no scale is seen
def test_scale_applied_twice(case):
    assert_red(around_mix(scale_twice), case, "output", "output in float32", "gradients")


@every()
def test_cu_seqlens_ignored(case):
    assert_red(around_mix(ignore_cu_seqlens), case, "packed", "packed gradients")


@every(causal)
def test_state_carried_in_bfloat16(case):
    assert_red(states_rounded_to_bfloat16(), case, "steps", "split", "split in float32")


# ---- faults inside a primitive ---------------------------------------------------------------------------------------

LINEAR, DECAY, DELTA = "subquad.ops.linear.chunked", "subquad.ops.linear.decay", "subquad.ops.delta.chunked"
LINEARIZED = ("liger", "lizard", "lawcat")
CARRIED = "carried = state[span.rows].flatten(0, 1)"
LEAK, OUTPUT, STEPS = (
    ("output", "leak", "leak of gradients"),
    ("output", "output in float32", "split"),
    ("steps", "split", "split in float32"),
)
PLANTED = [  # what it is, the module, the text and what takes its place, mechanisms, checks that turn red
    ("no causal mask, without decay", DECAY, ".tril_()", "", ("hedgehog", "based", "lolcats", "deltanet"), LEAK),
    (
        "no causal mask, with decay", DECAY, ".masked_fill_(later, -torch.inf)", "",
        ("lightning", "retnet", "simple-gla", "gated-deltanet", "lizard"), LEAK,
    ),
    (
        "no causal mask, decay per channel", DECAY, "a.new_zeros(p, m, c * ra, c * rb)",
        "torch.bmm(rows(a), rows(b).mT).view(p, m, c * ra, c * rb)", ("gla", "hgrn2", "kda", "liger", "lawcat"), LEAK,
    ),
    (
        "no causal mask inside a block", "subquad.ops.sparse.tiles",
        "p.layout.rule.allowed(p.arange(first, last + 1)[:, None], p.arange(a, b))",
        "p.arange(first, last + 1)[:, None] + p.arange(a, b) > -1", ("sliding-window", "lolcats", *LINEARIZED), LEAK,
    ),
    (
        "bfloat16 between chunks", LINEAR, "starts.append(state)", "state = state.bfloat16().to(state.dtype); starts.append(state)",
        ("hedgehog", "based", "lolcats", "lightning", "retnet", "simple-gla", "gla", "hgrn2", *LINEARIZED), OUTPUT,
    ),
    (
        "bfloat16 between chunks", DELTA, "u = torch.baddbmm(fresh", "state = state.bfloat16().to(state.dtype); u = torch.baddbmm(fresh",
        ("deltanet", "gated-deltanet", "kda"), OUTPUT,
    ),
    (
        "bfloat16 in a step", LINEAR, "torch.addcmul(state, k", "torch.addcmul(state.bfloat16().to(state.dtype), k",
        ("hedgehog", "based", "lightning", "retnet", "simple-gla", "gla", "hgrn2", *LINEARIZED), STEPS,
    ),
    (
        "bfloat16 in a step", DELTA, "torch.addcmul(state, k", "torch.addcmul(state.bfloat16().to(state.dtype), k",
        ("deltanet", "gated-deltanet", "kda"), STEPS,
    ),
    (
        "no decay between chunks", LINEAR, "torch.addcmul(sums[:, i], total[:, min(i, total.shape[1] - 1)], state)", "sums[:, i] + state",
        ("lightning", "retnet", "simple-gla", "gla", "hgrn2", *LINEARIZED), OUTPUT,
    ),
    ("no decay between chunks", DELTA, "if total is not None:", "if False:", ("gated-deltanet", "kda"), OUTPUT),
    (
        "no decay in a step", LINEAR, "if log_decay is not None:\n        a = ", "if False:\n        a = ",
        ("lightning", "retnet", "simple-gla", "gla", "hgrn2", *LINEARIZED), STEPS,
    ),
    ("no decay in a step", DELTA, "if log_decay is not None:\n        a = ", "if False:\n        a = ", ("gated-deltanet", "kda"), STEPS),
    (
        "sequences run together", LINEAR, CARRIED, f"{CARRIED} if not span.start else carried",
        ("lightning", "retnet", "simple-gla", "gla", "hgrn2", "based", *LINEARIZED), ("packed",),
    ),
    (
        "sequences run together", DELTA, CARRIED, f"{CARRIED} if not span.start else carried",
        ("deltanet", "gated-deltanet", "kda"), ("packed",),
    ),
    *(
        (
            "scaled twice", f"subquad.ops.{primitive}", "q.shape[-1] ** -0.5 if scale is None", "q.shape[-1] ** -1.0 if scale is None",
            names, ("output", "output in float32", "steps"),
        )
        for primitive, names in (
            ("linear", ("gla", "simple-gla")), ("delta", ("deltanet", "gated-deltanet", "kda")),
            ("sparse", ("sliding-window", "lolcats", *LINEARIZED)),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "module, old, new, name, checks",
    [
        pytest.param(module, old, new, name, checks, id=f"{module.split('.')[2]}-{what}-{name}")
        for what, module, old, new, names, checks in PLANTED
        for name in names
    ],
)
def test_planted(module, old, new, name, checks):
    [case] = [case for case in modes(name) if case.causal]
    assert_red(edited(module, (old, new)), case, *checks)
