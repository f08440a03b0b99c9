"""Fine-tuning on two texts: which rows are the model's own, what each teaches, and that it goes on and refuses as any run does."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

import subquad
from subquad import InputError
from subquad.convert import finetune as file
from subquad.convert.feed import Feed, Mixed
from subquad.convert.finetune import finetune
from subquad.convert.graphs import Graphed
from subquad.convert.lora import adapters, merge_lora
from subquad.convert.recipe import linearize, recipe
from subquad.convert.run import Run, seeded
from subquad.convert.swap import swap, swapped
from subquad.models.text import Batches

pytestmark = pytest.mark.usefixtures("learners")


@pytest.fixture
def own():
    return torch.randint(97, (300,), generator=torch.Generator().manual_seed(6))


@pytest.fixture
def student(model):
    return swap(copy.deepcopy(model), "toy-temperature")


def tune(model, data, **options):
    return finetune(model, data, **{"steps": 4, "length": 16, "lr": 1e-2, "progress": False, **options})


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


# ---- which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.6, 0.625, 1.0])
def test_a_share_holds_over_batches_of_any_size(batch, share):
    mixed = Mixed(Batches(torch.arange(100), 10, 48, batch=batch), torch.arange(1000, 1080), share)
    counts = [mixed.own_rows(step) for step in range(48)]
    assert sum(counts) == int(48 * batch * share + 1e-6) and max(counts) - min(counts) <= 1
    running = 0
    for step, count in enumerate(counts):
        running += count
        assert abs(running - (step + 1) * batch * share) < 1
        assert (mixed[step][:, 0] >= 1000).tolist() == [True] * count + [False] * (batch - count)


def test_eight_batches_of_one_are_one_of_eight():
    text, own = torch.arange(100), torch.arange(1000, 1100)
    small = Mixed(Batches(text, 10, 80), own, 0.625)
    large = Mixed(Batches(text, 10, 10, batch=8), own, 0.625)
    assert [large.own_rows(step) for step in range(10)] == [5] * 10
    assert [small.own_rows(step) for step in range(8)] == [0, 1, 0, 1, 1, 0, 1, 1]
    for step in range(10):
        alone = torch.cat([small[8 * step + row] for row in range(8)])
        assert torch.equal(alone[alone[:, 0] >= 1000], large[step][:5]) and torch.equal(alone[alone[:, 0] < 1000], large[step][5:])


def test_each_text_is_read_as_if_alone():
    """Every epoch takes each piece once, and a batch is a function of its number alone."""
    text, own = torch.arange(100), torch.arange(1000, 1075)
    mixed = Mixed(Batches(text, 10, 20, 3, batch=4), own, 0.375)
    rows = torch.cat([mixed[step] for step in range(20)])
    mine, rest = rows[rows[:, 0] >= 1000], rows[rows[:, 0] < 1000]
    assert torch.equal(mine, torch.cat([Batches(own, 10, 30, 3)[i] for i in range(30)]))
    assert torch.equal(rest, torch.cat([Batches(text, 10, 50, 3)[i] for i in range(50)]))
    assert torch.equal(mixed[13], Mixed(Batches(text, 10, 20, 3, batch=4), own, 0.375)[13])
    with pytest.raises(IndexError):
        mixed[20]


def test_a_row_of_own_text_is_brought_to_the_device_of_the_other():
    mixed = Mixed(Batches(torch.zeros(100, dtype=torch.long, device="meta"), 10, 4, batch=2), torch.arange(100), 0.5)
    assert mixed[0].device.type == "meta" and mixed[0].shape == (2, 10)


# ---- what they teach ----------------------------------------------------------------------------------------------------


def by_hand(student, teacher, batches, weight):
    """The loss of a step, of (token ids, own rows) batches, differentiated in a copy: from the formulas, without a cut of the batch."""
    total, count = 0.0, 0
    for ids, own in batches:
        scores = student(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits[:, :-1].softmax(-1)
        away = (target * (target.log() - scores)).sum(-1)
        said = -scores.gather(-1, ids[:, 1:, None])[..., 0]
        total = total + away[:own].sum() + (weight * away + (1 - weight) * said)[own:].sum()
        count += said.numel()
    (total / count).backward()
    return float(total.detach() / count)


@pytest.mark.parametrize(("loss", "kl_weight"), [("next-token", 1.0), ("kl", 0.25), ("kl", 1.0)])
@pytest.mark.parametrize(("batch", "accumulate", "share"), [(4, 1, 0.5), (2, 3, 0.375)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_step_has_the_gradient_of_both_losses(model, student, tokens, own, monkeypatch, loss, kl_weight, batch, accumulate, share, apart):
    torch.manual_seed(1)
    teacher = tiny_llama() if apart else model
    plain, grads = copy.deepcopy(student), {}
    feed = Feed(tokens, accumulate, batch, 16, 0, student, own, share)
    batches = [(feed[i]["input_ids"], feed.own_rows(i)) for i in range(accumulate)]
    assert [rows for _, rows in batches] == ([2] if batch == 4 else [0, 1, 1])
    expected = by_hand(plain, teacher, batches, kl_weight if loss == "kl" else 0.0)

    class Done(Exception):
        pass

    def update(self, losses, n):
        grads.update({name: p.grad.clone() for name, p in self.parameters.items()})
        grads.update({f"{path}.A": layer.lora_A["default"].weight.clone() for path, layer in adapters(student).items()})
        grads["loss"], grads["tokens"] = losses[0], n
        raise Done

    monkeypatch.setattr(Run, "update", update)
    with pytest.raises(Done):
        tune(
            student, tokens, steps=1, own=own, own_share=share, batch=batch, accumulate=accumulate, train_mechanism=True, loss=loss,
            kl_weight=kl_weight, teacher=teacher if apart else None, max_grad_norm=1e9, rank=4, alpha=12,
        )  # fmt: skip
    assert grads["loss"] == pytest.approx(expected, rel=1e-5) and grads["tokens"] == batch * accumulate * 16
    for index in range(3):  # B is zero in the first step: the model is the one by hand, and dL/dB = alpha / rank · dL/dW Aᵀ
        path = f"model.layers.{index}.self_attn"
        layer = plain.model.layers[index].self_attn
        torch.testing.assert_close(grads[f"{path}.mechanism.temperature"], layer.mechanism.temperature.grad, rtol=1e-4, atol=1e-7)
        lora = 3 * layer.q_proj.weight.grad @ grads[f"{path}.q_proj.A"].T
        assert lora.abs().max() > 1e-4
        torch.testing.assert_close(grads[f"{path}.q_proj.lora_B.default.weight"], lora, rtol=1e-4, atol=1e-6)


def test_all_of_it_own_is_kl_on_it_alone(student, tokens, own):
    other = copy.deepcopy(student)
    first = tune(student, tokens, own=own, own_share=1.0, batch=2)
    second = tune(other, own, loss="kl", batch=2)
    assert first.losses == second.losses and first.tokens == second.tokens and same(merge_lora(student), merge_lora(other))


def test_the_teacher_reads_own_rows_alone(student, tokens, own, monkeypatch):
    read, target = [], file._Judge._target
    monkeypatch.setattr(file._Judge, "_target", lambda self, batch: read.append(batch["input_ids"]) or target(self, batch))
    tune(copy.deepcopy(student), tokens, own=own, own_share=0.375, batch=2, accumulate=2, steps=2)
    mixed = Mixed(Batches(tokens, 16, 4, batch=2), own, 0.375)
    assert [mixed.own_rows(step) for step in range(4)] == [0, 1, 1, 1]
    assert len(read) == 3 and all(torch.equal(ids, mixed[step][:1]) for ids, step in zip(read, (1, 2, 3)))
    read.clear()
    tune(student, tokens, own=own, own_share=0.375, batch=2, steps=1, loss="kl")
    assert [ids.shape[0] for ids in read] == [2]


def test_a_number_of_own_rows_has_a_graph_of_its_own(student, tokens, own, monkeypatch):
    made, calls = [], []

    def call(self, batch, by):
        calls.append(made.index(self))
        return self.step(batch, by)

    monkeypatch.setattr(Graphed, "__init__", lambda self, step, parameters, able: made.append(self) or setattr(self, "step", step))
    monkeypatch.setattr(Graphed, "__call__", call)
    tune(copy.deepcopy(student), tokens, own=own, own_share=0.625, batch=8, steps=3)
    assert calls == [0, 0, 0] and len(made) == 1
    made.clear(), calls.clear()
    tune(copy.deepcopy(student), tokens, own=own, own_share=0.625, accumulate=8, steps=1)
    assert calls == [0, 1, 0, 1, 1, 0, 1, 1] and len(made) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (2, 2)])
def test_captured_steps_teach_the_same(student, tokens, own, monkeypatch, batch, accumulate):
    taught = []
    for mode in ("off", "auto"):
        monkeypatch.setenv("SUBQUAD_GRAPHS", mode)
        one = copy.deepcopy(student).cuda()
        taught.append(
            torch.tensor(tune(one, tokens, own=own, own_share=0.625, batch=batch, accumulate=accumulate, steps=12, lr=1e-3).losses)
        )
    torch.testing.assert_close(*taught, rtol=1e-4, atol=0)


def test_sixteen_bits_learn_from_both(student, tokens, own):
    for precision in ("float32", "bfloat16"):
        one = copy.deepcopy(student) if precision == "bfloat16" else copy.deepcopy(student).bfloat16()
        result = tune(one, tokens[:16], own=own[:16], own_share=0.5, batch=2, steps=40, lr=3e-3, precision=precision)
        assert result.losses[-1] < 0.8 * result.losses[0]


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def test_it_goes_on_to_the_bit(student, tokens, own, tmp_path, monkeypatch):
    options = {"own": own, "own_share": 0.375, "batch": 2, "accumulate": 2, "steps": 6, "train_mechanism": True}
    whole, broken = copy.deepcopy(student), copy.deepcopy(student)
    expected = tune(whole, tokens, **options)
    advance = file._Engine.advance

    class Stop(Exception):
        pass

    def stops(self, run, *rest):
        if run.step == 3:
            raise Stop
        return advance(self, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(file._Engine, "advance", stops)
        with pytest.raises(Stop):
            tune(broken, tokens, out=tmp_path, save_every=1, **options)
    for name, change in {"own_share": {"own_share": 0.5}, "own": {"own": own[1:]}}.items():
        with pytest.raises(InputError, match=f"out: got .*a run with {name} = "):
            tune(copy.deepcopy(student), tokens, out=tmp_path, save_every=1, **{**options, **change})
    with pytest.raises(InputError, match=r"out: got .*a run with"):
        tune(copy.deepcopy(student), tokens, out=tmp_path, save_every=1, **{**options, "own": None})
    found = tune(broken, tokens, out=tmp_path, save_every=1, **options)
    assert found.resumed_from == 3 and found.losses == expected.losses
    assert same(merge_lora(broken), merge_lora(whole))


def test_settings_without_it_are_as_before(student, tokens, own, tmp_path):
    """So that runs that were begun before there was such an argument go on."""
    before = {
        "model", "layers", "targets", "rank", "alpha", "train_mechanism", "loss", "steps", "lr", "schedule", "warmup", "max_grad_norm",
        "precision", "seed", "accumulate", "data", "length", "batch",
    }  # fmt: skip
    for name, options, more in (
        ("plain", {"own_share": 0.3}, set()),
        ("kl", {"loss": "kl"}, {"kl_weight", "teacher"}),
        ("own", {"own": own}, {"own", "own_share", "teacher"}),
    ):
        tune(copy.deepcopy(student), tokens, steps=1, out=tmp_path / name, **options)
        (kept,) = (tmp_path / name / "checkpoint").iterdir()
        assert set(json.loads((kept / "run.json").read_text())["settings"]) == before | more


# ---- what it refuses ----------------------------------------------------------------------------------------------------


def test_misuse_is_one_line(student, tokens, own):
    for match, call in {
        "data: got list; expected token ids": lambda: tune(student, [tokens[None, :16]], own=own),
        "own: got str; expected token ids": lambda: tune(student, tokens, own="text"),
        "data: got Batches; expected token ids": lambda: tune(student, Batches(tokens, 16, 2), own=own),
        r"own: got \[1, 300\] .*; expected token ids": lambda: tune(student, tokens, own=own[None]),
        r"own: got \[300\] float32 .*; expected token ids": lambda: tune(student, tokens, own=own.float()),
        "own: got 15 tokens; expected at least one sequence, 16 tokens": lambda: tune(student, tokens, own=own[:15]),
        "own: got token id 97": lambda: tune(student, tokens, own=own + 1),
        "own_share: got 0; expected a number above 0 and at most 1": lambda: tune(student, tokens, own=own, own_share=0),
        "own_share: got 1.5": lambda: tune(student, tokens, own_share=1.5),
        "own_share: got half": lambda: tune(student, tokens, own_share="half"),
        "own_share: got nan": lambda: tune(student, tokens, own_share=math.nan),
        "teacher: got .*a vocabulary of 98; expected that of the model, 97": lambda: tune(
            student, tokens, own=own, batch=2, teacher=tiny_llama(vocab_size=98)
        ),
    }.items():
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    assert not adapters(student)


# ---- recipes --------------------------------------------------------------------------------------------------------------

TUNED = {"steps": 2, "lr": 1e-2, "batch": 2, "length": 16, "own_share": 0.75}
MINE = replace(recipe("lolcats"), options={"window": 4}, transfer={"steps": 3, "lr": 1e-2, "length": 16}, finetune=TUNED)


def test_linearize_hands_it_to_fine_tuning_alone(model, tokens, own):
    whole, apart = copy.deepcopy(model), model
    result = linearize(whole, MINE, tokens, own=own, seed=7, progress=False)
    with seeded(7, -2):
        swap(apart, "lolcats", window=4)
    first = subquad.distill(apart, apart, tokens, steps=3, lr=1e-2, length=16, seed=7, progress=False)
    second = finetune(apart, tokens, **TUNED, own=own, seed=7, progress=False)
    assert result.transfer.losses == first.losses and result.finetune.losses == second.losses
    assert same(whole, merge_lora(apart))


def test_recipes_refuse_it_before_the_first_stage(model, tokens, own, tmp_path):
    for match, call in {
        "own: got given; expected a recipe and steps with fine-tuning": {"steps": {"finetune": 0}},
        "own: got 9 tokens": {"own": own[:9]},
        "data: got list; expected token ids": {"data": [tokens[None, :16]]},
    }.items():
        with pytest.raises(InputError, match=match):
            linearize(model, MINE, **{"data": tokens, "own": own, **call}, out=tmp_path / "run", progress=False)
    assert not swapped(model) and not (tmp_path / "run").exists()
