"""Attention transfer teaches what Lizard and LAWCAT add; Liger adds nothing that could be taught, and says so."""

import copy

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

import subquad
from subquad import InputError

TOKENS = torch.randint(97, (2000,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "name, options",
    [
        ("lizard", {"window": 8}),
        ("lawcat", {}),
        ("lawcat", {"window": 8}),
        ("lolcats", {"window": 8}),
        ("lolcats", {"window": 8, "sinks": 2}),
    ],
)
def test_forty_steps_bring_each_layer_nearer_to_softmax(name, options):
    teacher = tiny_llama()
    student = subquad.swap(copy.deepcopy(teacher), name, **options)
    result = subquad.distill(student, teacher, [TOKENS[:96].view(2, 48)], steps=40, progress=False)  # one batch again and again
    for losses in result.layer_losses.values():
        assert losses[-1] < 0.8 * losses[0]


def test_liger_has_nothing_to_teach():
    teacher = tiny_llama()
    with pytest.raises(InputError, match="nothing to learn"):
        subquad.distill(subquad.swap(copy.deepcopy(teacher), "liger"), teacher, TOKENS, steps=1, length=48)
