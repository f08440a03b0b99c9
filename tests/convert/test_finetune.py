"""Fine-tuning with adapters: what its loss is, that it changes its targets alone, that it merges and resumes exactly."""

import copy
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

import subquad
from subquad import InputError
from subquad.convert.checkpoint import Checkpoints
from subquad.convert.finetune import finetune, share
from subquad.convert.lora import adapters, merge_lora
from subquad.convert.swap import restore, swap, swapped

pytestmark = pytest.mark.usefixtures("learners")


def tune(model, data, **options):
    return finetune(model, data, **{"steps": 4, "length": 16, "lr": 1e-2, "progress": False, **options})


def values(model):
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


# ---- what it learns from ------------------------------------------------------------------------------------------------


def test_next_token_loss_is_that_of_transformers(model, tokens):
    ids = tokens[:48].reshape(2, 24)
    expected = float(model(ids, labels=ids).loss.detach())
    assert tune(model, [ids], steps=1).losses == pytest.approx([expected], rel=1e-5)


def divergence(teacher, student):
    p, q = teacher[:, :-1].double().softmax(-1), student[:, :-1].double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("own", [True, False])
def test_kl_is_the_divergence_from_the_original_or_from_a_teacher(model, tokens, own):
    ids = tokens[:48].reshape(2, 24)
    student = swap(copy.deepcopy(model), "toy-temperature")
    torch.manual_seed(1)
    teacher = None if own else tiny_llama()
    kl = divergence(logits(model if own else teacher, ids), logits(student, ids))
    nll = float(student(ids, labels=ids, use_cache=False).loss.detach())
    assert kl > 0.1
    found = [tune(copy.deepcopy(student), [ids], steps=1, loss="kl", teacher=teacher, kl_weight=w).losses[0] for w in (1.0, 0.25)]
    assert found == pytest.approx([kl, 0.25 * kl + 0.75 * nll], rel=1e-5)


def test_the_models_own_teacher_has_no_adapters(model, tokens):
    """From the second step on the adapters are not zero: its losses are those of a teacher apart."""
    student = swap(copy.deepcopy(model), "toy-temperature")
    alone = tune(copy.deepcopy(student), tokens, loss="kl").losses
    assert alone == pytest.approx(tune(student, tokens, loss="kl", teacher=model).losses, rel=1e-6)


def test_kl_at_its_defaults_goes_down(model, tokens):
    student = swap(copy.deepcopy(model), "toy-temperature")
    losses = finetune(student, [tokens[:128].reshape(4, 32)], steps=40, loss="kl", progress=False).losses
    assert max(losses) < 1.01 * losses[0] and losses[-1] < losses[20] < 0.99 * losses[0]


def test_padding_does_not_count(model, tokens):
    row = tokens[None, :20]
    padded = {
        "input_ids": torch.nn.functional.pad(row, (7, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (7, 0)),
        "position_ids": torch.nn.functional.pad(torch.arange(20)[None], (7, 0)),
    }
    first, second = tune(copy.deepcopy(model), [row]), tune(model, [padded])
    assert second.tokens == first.tokens == 80
    assert second.losses == pytest.approx(first.losses, rel=1e-4)


def test_accumulation_is_a_larger_batch(model, tokens):
    whole, parts = copy.deepcopy(model), model
    first = tune(whole, tokens, batch=4)
    second = tune(parts, tokens, batch=1, accumulate=4)
    assert second.losses == pytest.approx(first.losses, rel=1e-5) and second.tokens == first.tokens
    torch.testing.assert_close(values(merge_lora(parts)), values(merge_lora(whole)), atol=2e-5, rtol=1e-4)


def test_accumulated_batches_weigh_by_their_tokens(model, tokens):
    long, short = tokens[None, :24], tokens[None, 24:30]
    expected = float(model(long, labels=long).loss) * 23 / 28 + float(model(short, labels=short).loss) * 5 / 28
    assert tune(model, [long, short], steps=1, accumulate=2).losses == pytest.approx([expected], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "own"])
def test_two_processes_are_one(kind):
    script, env = Path(__file__).parent / "spread_run.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        done = subprocess.run([sys.executable, *launch, script, kind], capture_output=True, text=True, timeout=240, env=env)
        assert done.returncode == 0, done.stderr
        lines += [[float(x) for x in line.split()] for line in done.stdout.strip().splitlines()]
    alone, first, second = lines
    assert first == second == pytest.approx(alone, abs=2e-5)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_sixteen_bits_learn(model, tokens, kind):
    model = swap(model if kind == "autocast" else model.bfloat16(), "toy-temperature")
    dtype = next(model.parameters()).dtype
    before = values(model)
    precision = "bfloat16" if kind == "autocast" else "float32"
    result = tune(model, [tokens[None, :32]], steps=60, lr=3e-4, precision=precision, train_mechanism=True)
    assert result.losses[-1] < result.losses[0]
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    # 60 steps of at most 3e-4: in bfloat16, where numbers near 1 lie 4e-3 apart, none of them would move a parameter.
    name = "model.layers.0.self_attn.mechanism.temperature"
    assert (model.state_dict()[name] - before[name]).abs().max() > 3e-3


# ---- what it changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [True, False])
def test_only_the_targets_change_and_by_low_rank(model, tokens, mechanism):
    student = swap(model, "toy-temperature")
    before = values(student)
    result = tune(student, tokens, targets=("q_proj", "down_proj"), rank=2, train_mechanism=mechanism)
    own = 3 * 4 if mechanism else 0
    assert result.parameters == 3 * 2 * (32 + 32 + 32 + 48) + own
    after = values(merge_lora(student))
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    ends = ["self_attn.q_proj.weight", "mlp.down_proj.weight"] + ["self_attn.mechanism.temperature"] * mechanism
    assert changed == {f"model.layers.{i}.{end}" for i in range(3) for end in ends}
    difference = after["model.layers.1.self_attn.q_proj.weight"] - before["model.layers.1.self_attn.q_proj.weight"]
    sizes = torch.linalg.svdvals(difference)
    assert sizes[1] > 1e-4 > 1e-5 > sizes[2]


def test_alpha_over_rank_scales_what_is_merged(model, tokens):
    tune(model, tokens, rank=4, alpha=6)
    layer = adapters(model)["model.layers.2.self_attn.v_proj"]
    a, b, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight.clone()
    merge_lora(model)
    torch.testing.assert_close(model.model.layers[2].self_attn.v_proj.weight, weight + 1.5 * b @ a, atol=1e-6, rtol=0)


def test_merged_is_unmerged_and_saves_as_any_other(model, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    student, ids = swap(model, "toy-temperature"), tokens[None, :40]
    tune(student, tokens, train_mechanism=True)
    before = logits(student, ids)
    merge_lora(student)
    assert (logits(student, ids) - before).abs().max() < 1e-5 * before.abs().max()
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(student, ids), atol=1e-5, rtol=0)
    tuned = student.model.layers[0].self_attn.q_proj.weight
    assert restore(student).model.layers[0].self_attn.q_proj.weight is tuned


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_left_as_it_was(model, tokens, fails):
    student = swap(copy.deepcopy(model), "toy-temperature", noise=0.1)
    student.train(), model.train()
    student.model.embed_tokens.requires_grad_(False)
    kept = {name: (p.requires_grad, p.detach().clone()) for name, p in student.named_parameters()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    if fails:
        with pytest.raises(InputError, match="data: got a batch that is str"):
            tune(student, [tokens[None, :16], "text"], loss="kl", teacher=model)
        assert {name for name, _ in student.named_parameters()} == kept.keys() and not adapters(student)
    else:
        tune(student, tokens, loss="kl", teacher=model)
    assert torch.equal(torch.rand(3), expected)
    assert all(m.training for m in model.modules()) and all(m.training for m in student.modules())
    for name, p in student.named_parameters():
        if "lora" not in name:
            flag, value = kept[name.replace(".base_layer", "")]
            assert p.requires_grad is flag and torch.equal(p, value) and p.grad is None


def test_the_learning_rate_rises_and_falls_to_zero():
    for kind in ("cosine", "linear"):
        rates = [share(step, 100, kind, 0.1) for step in range(101)]
        assert rates[10] == max(rates) == 1.0 and rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[0] == pytest.approx(1 / 11) and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert share(20, 100, "linear", 0.0) == pytest.approx(0.8)
    assert share(20, 100, "cosine", 0.0) == pytest.approx(math.cos(0.1 * math.pi) ** 2)


def test_a_long_run_shows_its_loss_and_rate(model, tokens, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.75)
            return super().__getitem__(index)

    result = tune(model, Slow([tokens[None, :16]]), progress=True)
    shown = capsys.readouterr()
    assert re.search(rf"finetune .*4/4 .*loss {result.losses[-1]:.4f} .*steps/s, +\d+ *tokens/s", " ".join(shown.err.split()))
    tune(copy.deepcopy(merge_lora(model)), [tokens[None, :16]], progress=True)
    assert capsys.readouterr().err == "" == shown.out  # too short for a bar


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def test_killed_runs_end_with_the_weights_of_an_unbroken_one(tmp_path):
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", "finetune"], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (killed, resumed_from), (unbroken, none) = (line.split() for line in done.stdout.strip().splitlines())
    assert killed == unbroken
    assert int(resumed_from) >= 8 and none == "0"


def test_a_finished_run_is_refused_or_taken(model, tokens, tmp_path):
    other = copy.deepcopy(model)
    first = tune(model, tokens, out=tmp_path)
    with pytest.raises(InputError, match="a finished run"):
        tune(other, tokens, out=tmp_path)
    taken = tune(other, tokens, out=tmp_path, take_finished=True)
    assert taken.losses == first.losses and taken.resumed_from == 4
    torch.testing.assert_close(values(other), values(model), atol=0, rtol=0)


def test_another_setting_is_named(model, tokens, tmp_path):
    tune(copy.deepcopy(model), tokens, out=tmp_path, teacher=None)
    for name, change in {
        "lr": {"lr": 3e-2}, "rank": {"rank": 4}, "alpha": {"alpha": 8}, "targets": {"targets": ["q_proj"]}, "loss": {"loss": "kl"},
        "schedule": {"schedule": "linear"}, "accumulate": {"accumulate": 2}, "seed": {"seed": 1}, "data": {"data": tokens[1:]},
    }.items():  # fmt: skip
        call = {"data": tokens, **change}
        with pytest.raises(InputError, match=f"out: got .*a run with {name} = "):
            tune(copy.deepcopy(model), call.pop("data"), out=tmp_path, take_finished=True, **call)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(model, tokens, tmp_path):
    with pytest.raises(InputError, match=r"lr: got 1e\+30; expected a smaller one: the loss is not finite at step 2"):
        tune(model, tokens, lr=1e30, warmup=0.0, out=tmp_path)
    assert not adapters(model)
    (kept,) = (tmp_path / "checkpoint").iterdir()
    assert kept.name == "step-00000000" and (kept / "tensors.safetensors").exists()


class Fills(list):
    """Batches of which one comes with the news that files may not grow any more."""

    def __getitem__(self, index):
        if index == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().__getitem__(index)


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(model, tokens, tmp_path):
    batches = [tokens[None, 16 * i : 16 * i + 16] for i in range(6)]
    expected = tune(copy.deepcopy(model), batches, steps=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match=r"out: got .*step-00000002 is kept.*room for a checkpoint"):
            tune(model, Fills(batches), steps=6, out=tmp_path, save_every=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["step-00000002"]
    assert Checkpoints.load(_reader(tmp_path)).step == 2
    resumed = tune(model, batches, steps=6, out=tmp_path, save_every=2)
    assert resumed.resumed_from == 2 and resumed.losses == expected.losses


def _reader(out):
    reader = object.__new__(Checkpoints)
    reader.out, reader.folder = out, out / "checkpoint"
    return reader


# ---- what it refuses ----------------------------------------------------------------------------------------------------


def test_misuse_is_one_line(model, tokens):
    tuned = copy.deepcopy(model)
    tune(tuned, tokens, steps=1)
    for match, call in {
        "targets: got 'qkv'; expected names of linear layers; there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj": lambda: tune(
            model, tokens, targets=["qkv"]
        ),
        "targets: got 'q_proj'; expected names": lambda: tune(model, tokens, targets="q_proj"),
        "loss: got 'ce'": lambda: tune(model, tokens, loss="ce"),
        "schedule: got 'flat'": lambda: tune(model, tokens, schedule="flat"),
        "precision: got 'float8'": lambda: tune(model, tokens, precision="float8"),
        "kl_weight: got 2": lambda: tune(model, tokens, kl_weight=2),
        "steps: got 0": lambda: tune(model, tokens, steps=0),
        "accumulate: got 0.5": lambda: tune(model, tokens, accumulate=0.5),
        "lr: got -1": lambda: tune(model, tokens, lr=-1),
        "text: got 9 tokens": lambda: tune(model, tokens[:9]),
        "data: got a step without a token to predict": lambda: tune(model, [tokens[None, :1]]),
        r"data: got a batch with labels \[1, 8\]": lambda: tune(model, [{"input_ids": tokens[None, :9], "labels": tokens[None, :8]}]),
        "data: got token id 97": lambda: tune(model, tokens + 1),
        "teacher: got .*a vocabulary of 98; expected that of the model, 97": lambda: tune(
            model, tokens, loss="kl", teacher=tiny_llama(vocab_size=98)
        ),
        "data: got a batch of pixel_values": lambda: tune(model, [{"pixel_values": torch.zeros(1, 3, 4, 4)}]),
        "model: got .*with low-rank adapters": lambda: tune(tuned, tokens),
        "model: got .*without low-rank adapters": lambda: merge_lora(model),
    }.items():
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    assert not adapters(model) and adapters(tuned)


def test_a_mechanism_without_parameters_is_tuned_too(model, tokens):
    student = swap(model, "sliding-window", window=4)
    result = subquad.finetune(student, [tokens[None, :32]], steps=30, lr=1e-2, train_mechanism=True, progress=False)
    assert result.losses[-1] < 0.8 * result.losses[0] and len(swapped(student)) == 3


def test_adapters_compute_in_16_bits_and_learn_in_32(model, tokens):
    half = copy.deepcopy(model).bfloat16()
    seen = []

    def look(module, *_):
        layers = [layer.lora_B["default"].weight for layer in adapters(half).values()]
        seen.append(({x.dtype for x in layers}, torch.cat([x.detach().flatten() for x in layers]).float()))

    handle = half.register_forward_pre_hook(look)
    tune(half, tokens, steps=3, lr=1e-5)
    handle.remove()
    assert [dtypes for dtypes, _ in seen] == 3 * [{torch.bfloat16}]
    learnt = torch.cat([layer.lora_B["default"].weight.detach().flatten() for layer in adapters(half).values()])
    assert learnt.dtype == torch.float32 and not torch.equal(learnt, learnt.bfloat16().float())  # not what 16 bits hold
    assert (learnt - seen[-1][1]).abs().max() < 2e-5 and learnt.abs().max() > 5e-6
    merged = merge_lora(half)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
