"""Training steps as CUDA graphs: gradients add up as without, and only plain batches are captured."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subquad
from subquad.convert.finetune import finetune
from subquad.convert.graphs import WARM, Graphed, plain
from subquad.convert.swap import swapped

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_plain_batches_hold_token_ids_alone():
    ids = torch.zeros(1, 2, dtype=torch.long)
    assert plain({"input_ids": ids})
    assert not plain({"input_ids": ids, "attention_mask": ids})
    assert not plain({"inputs_embeds": ids})


def test_replayed_gradients_are_added_to_those_that_are_there_and_not_written_over():
    p, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
    graphed = Graphed(lambda batch: torch.zeros(()), [p, still])
    held = torch.tensor([1.0, 2.0, 3.0])
    graphed.grads = [held, None]  # as a capture leaves them
    for replayed in ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]):
        before = [x.grad for x in (p, still)]
        held.copy_(torch.tensor(replayed))
        graphed._add(before)
    assert p.grad.tolist() == [11.0, 22.0, 33.0] and still.grad is None
    held.zero_()
    assert p.grad.tolist() == [11.0, 22.0, 33.0]


def test_on_the_cpu_every_step_runs_as_it_is():
    seen = []
    graphed = Graphed(lambda batch, scale: seen.append(scale) or batch["input_ids"].sum() * scale, [])
    found = [graphed({"input_ids": torch.full((1, 2), n)}, 10).item() for n in range(WARM + 3)]
    assert found == [20 * n for n in range(WARM + 3)] and len(seen) == WARM + 3 and graphed.graph is None


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50)).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lolcats", "hedgehog", "gla", "liger", "lizard", "lawcat"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_captured_steps_teach_the_same(name, accumulate, monkeypatch):
    tokens, taught = torch.randint(50, (2000,)), []
    for mode in ("off", "auto"):
        monkeypatch.setenv("SUBQUAD_GRAPHS", mode)
        model = subquad.swap(tiny(), name)
        losses = []
        if any(True for module in swapped(model).values() for _ in module.mechanism.parameters()):
            losses += subquad.distill(model, copy.deepcopy(tiny()), tokens, steps=8, batch=2, length=64, progress=False).losses
        losses += finetune(model, tokens, steps=8, batch=2, length=64, accumulate=accumulate, lr=1e-3, progress=False).losses
        taught.append(torch.tensor(losses))
    torch.testing.assert_close(*taught, rtol=1e-4, atol=0)  # the libraries' matrix products may cut their sums otherwise


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_as_it_is():
    p = nn.Parameter(torch.zeros(1, device="cuda"))

    def step(batch):
        loss = p * float(batch["input_ids"].sum())  # reads the device
        loss.sum().backward()
        return loss.detach().sum()

    graphed, ids = Graphed(step, [p]), torch.ones(1, 2, dtype=torch.long, device="cuda")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        for _ in range(WARM + 2):
            graphed({"input_ids": ids})
    assert p.grad.item() == 2 * (WARM + 2) and not graphed.able
