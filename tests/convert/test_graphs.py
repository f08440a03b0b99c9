"""Training steps as CUDA graphs: gradients add up as without, and only plain batches are captured."""

import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subquad
from subquad.convert import graphs
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
    for replayed in ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]):
        before = [x.grad for x in (p, still)]
        held.copy_(torch.tensor(replayed))
        graphed._add([held, None], before)  # as a capture leaves them
    assert p.grad.tolist() == [11.0, 22.0, 33.0] and still.grad is None
    held.zero_()
    assert p.grad.tolist() == [11.0, 22.0, 33.0]


def test_on_the_cpu_every_step_runs_as_it_is():
    seen = []
    graphed = Graphed(lambda batch, scale: seen.append(scale) or batch["input_ids"].sum() * scale, [])
    found = [graphed({"input_ids": torch.full((1, 2), n)}, torch.tensor(10)).item() for n in range(WARM + 3)]
    assert found == [20 * n for n in range(WARM + 3)] and len(seen) == WARM + 3 and graphed.captured is None


def test_a_graph_goes_when_another_kind_of_batch_comes(monkeypatch):
    """It holds memory that the other may need, and what a step notes of its batch, such as its tokens, no replay notes anew."""
    monkeypatch.delenv("SUBQUAD_GRAPHS", raising=False)
    p, replays = nn.Parameter(torch.zeros(1)), []

    def step(batch):
        p.grad = torch.ones(1) if p.grad is None else p.grad + 1
        return torch.zeros(())

    def captured(device, run):
        return SimpleNamespace(replay=lambda: replays.append(1)), run()

    monkeypatch.setattr(Graphed, "_key", lambda self, batch: batch["input_ids"].shape if plain(batch) else None)
    monkeypatch.setattr("subquad.convert.graphs.capture", captured)
    graphed, ids = Graphed(step, [p, p]), torch.zeros(1, 2, dtype=torch.long)
    found = []
    for kind in "pppppmppppl":
        batch = {"input_ids": ids[:, :1] if kind == "l" else ids} | ({"attention_mask": ids} if kind == "m" else {})
        graphed(batch)
        found.append(graphed.captured is not None)
    assert found == [False] * WARM + [True, True, False] + [False] * WARM + [True, False]
    assert len(replays) == 3 and p.grad.item() == len(found)


def test_labels_and_what_stands_beside_a_batch_are_those_of_each_call(monkeypatch):
    p = nn.Parameter(torch.zeros(1))

    def step(batch, by):
        loss = (p * batch["labels"].clamp(min=0).sum() / by).sum()
        loss.backward()
        return (batch["input_ids"].sum() / by).detach()

    def captured(device, run):
        result, held = run(), p.grad

        def replay():
            before, p.grad = p.grad, None
            result.copy_(run())
            held.copy_(p.grad)
            p.grad = before

        return SimpleNamespace(replay=replay), result

    monkeypatch.delenv("SUBQUAD_GRAPHS", raising=False)
    monkeypatch.setattr(Graphed, "_key", lambda self, batch: tuple(batch))
    monkeypatch.setattr("subquad.convert.graphs.capture", captured)
    graphed, total = Graphed(step, [p]), 0.0
    for n in range(1, WARM + 4):
        batch = {"input_ids": torch.full((1, 2), n), "labels": torch.tensor([[-100, n]])}
        assert graphed(batch, torch.tensor(2.0 * n)).item() == 1.0
        total += n / (2 * n)
    assert p.grad.item() == pytest.approx(total) and graphed.captured is not None


def test_one_thread_captures_at_a_time(monkeypatch):
    """All of a device's captures are on one stream."""
    inside, most = [], []

    def _capture(device, run):
        inside.append(1)
        most.append(len(inside))
        run()
        inside.pop()

    monkeypatch.setattr(graphs, "_capture", _capture)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: graphs.capture(torch.device("cuda", 0), lambda: time.sleep(0.02)), range(4)))
    assert most == [1] * 4


def test_nothing_is_copied_to_the_device_between_the_batches_of_a_step(monkeypatch):
    """A copy would wait for the batch before."""
    order = []
    monkeypatch.setattr("subquad.convert.finetune.moved", lambda batch, device: order.append("copy") or batch)
    seen = []
    monkeypatch.setattr(Graphed, "__call__", lambda self, batch, by: order.append("learn") or seen.append(by) or self.step(batch, by))
    tokens = torch.arange(2000) % 50
    finetune(subquad.swap(tiny(), "gla"), tokens, steps=1, batch=2, length=8, accumulate=3, progress=False)
    assert order == ["copy"] * 3 + ["learn"] * 3
    assert [by.item() for by in seen] == [3 * 2 * 7] * 3 and all(by is seen[0] for by in seen)


def tiny():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=50))
    with torch.no_grad():
        for layer in model.model.layers:  # scores that tell keys apart, so that there is something to learn
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


# lolcats is exact where a sequence is no longer than its window: its loss would be rounding alone.
CASES = {"lolcats": {"window": 16}, "hedgehog": {}, "gla": {}, "liger": {}, "lizard": {}, "lawcat": {}}


def answered(tokens):
    """Batches in which some places alone are predicted, of each batch another number."""
    batches = tokens[:1920].view(15, 2, 64)
    return [{"input_ids": ids, "labels": ids.where(torch.arange(64) % (2 + n % 3) == 0, -100)} for n, ids in enumerate(batches)]


def losses_of(name, device, accumulate, labels=False):
    """Of eight steps of both stages, of the second alone where there is nothing to transfer."""
    tokens = torch.randint(50, (2000,), generator=torch.Generator().manual_seed(0))
    data = answered(tokens) if labels else tokens
    model, options = subquad.swap(tiny().to(device), name, **CASES[name]), {"steps": 8, "batch": 2, "length": 64, "progress": False}
    losses = []
    if any(True for module in swapped(model).values() for _ in module.mechanism.parameters()):
        losses += subquad.distill(model, tiny().to(device), tokens, **options).losses
    return torch.tensor(losses + finetune(model, data, accumulate=accumulate, lr=1e-3, **options).losses)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("accumulate", "labels"), [(1, False), (3, False), (3, True)])
def test_captured_steps_teach_the_same(name, accumulate, labels, monkeypatch):
    taught = []
    for mode in ("off", "auto"):
        monkeypatch.setenv("SUBQUAD_GRAPHS", mode)
        taught.append(losses_of(name, "cuda", accumulate, labels))
    torch.testing.assert_close(*taught, rtol=1e-4, atol=0)  # the libraries' matrix products may cut their sums otherwise


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", [False, True])
def test_losses_that_are_compared_are_more_than_rounding(name, labels):
    losses = losses_of(name, "cpu", 1, labels)
    assert len(losses) == (8 if name == "liger" else 16) and losses.isfinite().all() and (losses > 1e-4).all()


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
    assert torch.cuda.current_stream() == torch.cuda.default_stream() and torch.rand(1, device="cuda").isfinite().all()
    after, learn = nn.Parameter(torch.zeros(1, device="cuda")), []
    good = Graphed(
        lambda batch: (after * batch["input_ids"]).sum().backward() or learn.append(1) or torch.zeros((), device="cuda"), [after]
    )
    for _ in range(WARM + 3):
        good({"input_ids": ids})
    assert after.grad.item() == 2 * (WARM + 3) and len(learn) == WARM + 1


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = nn.Parameter(torch.zeros(1, device="cuda:1"))

    def step(batch):
        loss = (p * batch["input_ids"]).sum()
        loss.backward()
        return loss.detach()

    graphed = Graphed(step, [p])
    for i in range(WARM + 3):
        graphed({"input_ids": torch.full((1, 2), i, device="cuda:1")})
    assert p.grad.item() == 2 * sum(range(WARM + 3)) and graphed.captured is not None
    assert torch.cuda.current_device() == 0
