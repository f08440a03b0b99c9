"""Block-wise attention transfer: the same as the whole, with a part of the model on the device, from disk and after a kill."""

import copy

import pytest
import torch
from convert.toy_mechanisms import tiny_llama

from subquad import InputError
from subquad.convert import blockwise
from subquad.convert.distill import distill
from subquad.convert.run import Bar
from subquad.convert.swap import swap, swapped

pytestmark = pytest.mark.usefixtures("learners")


@pytest.fixture
def teacher():
    return tiny_llama()


def temperatures(model):
    return torch.stack([module.mechanism.temperature.detach() for module in swapped(model).values()])


def student_of(teacher, **options):
    return swap(copy.deepcopy(teacher), "toy-temperature", **options)


OPTIONS = {"steps": 7, "length": 16, "batch": 2, "lr": 0.05, "progress": False, "save_every": 3, "device": "cpu"}


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("shared", [False, True])
def test_groups_learn_what_the_whole_learns(teacher, tokens, tmp_path, size, shared):
    whole, parts = student_of(teacher), student_of(teacher)
    expected = distill(whole, whole if shared else teacher, tokens, **OPTIONS)
    found = distill(parts, parts if shared else teacher, tokens, group=size, out=tmp_path / "run", **OPTIONS)
    assert torch.equal(temperatures(parts), temperatures(whole)) and not torch.equal(temperatures(parts), temperatures(student_of(teacher)))
    assert found.layer_losses == expected.layer_losses and found.losses == pytest.approx(expected.losses)
    assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
    assert not list((tmp_path / "run").glob("hidden-*")), "hidden states are removed once they are read"


def test_some_layers_only_and_groups_between_them(teacher, tokens, tmp_path):
    layers = {0: "toy-temperature", 2: {"name": "toy-temperature", "start": 0.5}}
    whole, parts = (swap(copy.deepcopy(teacher), None, layers=layers) for _ in range(2))
    expected = distill(whole, teacher, tokens, **OPTIONS)
    assert distill(parts, teacher, tokens, group=1, out=tmp_path, **OPTIONS).layer_losses == expected.layer_losses
    assert torch.equal(temperatures(parts), temperatures(whole))


@pytest.mark.parametrize("killed_at", [2, 9, 13, 17])
def test_a_run_that_dies_goes_on(teacher, tokens, tmp_path, killed_at, monkeypatch):
    """Killed after so many steps of all groups; checkpoints are three steps apart."""
    expected = distill(whole := student_of(teacher), teacher, tokens, **OPTIONS)
    save, made = blockwise.Hidden.save, []

    class Killed(BaseException):
        pass

    def dying(self, step, hidden):
        made.append(step)
        if len(made) == killed_at:
            raise Killed
        save(self, step, hidden)

    monkeypatch.setattr(blockwise.Hidden, "save", dying)
    if killed_at < 15:
        with pytest.raises(Killed):
            distill(student_of(teacher), teacher, tokens, group=1, out=tmp_path, **OPTIONS)
    monkeypatch.setattr(blockwise.Hidden, "save", save)
    again = student_of(teacher)
    found = distill(again, teacher, tokens, group=1, out=tmp_path, **OPTIONS)
    assert found.layer_losses == expected.layer_losses and torch.equal(temperatures(again), temperatures(whole))


def test_the_model_is_left_whole_and_where_it_was(teacher, tokens, tmp_path):
    student, before = student_of(teacher), copy.deepcopy(teacher)
    layers, norm = teacher.model.layers, teacher.model.norm
    on_device = []
    enter = blockwise.nn.ModuleList.to

    def moved(self, device):
        on_device.append((len(self), torch.device(device).type))
        return enter(self, device)

    blockwise.nn.ModuleList.to = moved
    try:
        distill(student, teacher, tokens, group=2, out=tmp_path, **OPTIONS)
    finally:
        blockwise.nn.ModuleList.to = enter
    assert teacher.model.layers is layers and teacher.model.norm is norm and len(student.model.layers) == 3
    assert {count for count, _ in on_device} == {2, 1}, "never more than a group"
    ids = tokens[None, :20]
    assert torch.equal(teacher(ids).logits, before(ids).logits)
    assert not any(module._forward_hooks for module in teacher.modules())


@pytest.mark.parametrize("shared", [False, True])
def test_mechanisms_come_back_too(teacher, tokens, tmp_path, shared, monkeypatch):
    student, went = student_of(teacher), []
    real = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: went.append((self, str(device))) or real(self, "cpu"))
    distill(student, student if shared else teacher, tokens, group=2, out=tmp_path, **{**OPTIONS, "steps": 1, "device": "cpu:0"})
    for module in swapped(student).values():
        assert [device for of, device in went if of is module.mechanism] == ["cpu:0", "cpu"]


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_groups_on_a_gpu_of_a_model_on_the_cpu(teacher, tokens, tmp_path, shared):
    whole, parts = student_of(teacher), student_of(teacher)
    expected = distill(whole, whole if shared else teacher, tokens, **OPTIONS)
    found = distill(parts, parts if shared else teacher, tokens, group=2, out=tmp_path, **{**OPTIONS, "device": "cuda"})
    assert found.losses == pytest.approx(expected.losses, rel=1e-2)
    assert {x.device.type for x in [*parts.parameters(), *parts.buffers(), *teacher.parameters()]} == {"cpu"}
    assert parts(tokens[None, :20], use_cache=False).logits.isfinite().all()


def test_a_finished_run_is_refused_or_taken(teacher, tokens, tmp_path):
    first = distill(student_of(teacher), teacher, tokens, group=2, out=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="a finished run"):
        distill(student_of(teacher), teacher, tokens, group=2, out=tmp_path, **OPTIONS)
    taken = distill(other := student_of(teacher), teacher, tokens, group=2, out=tmp_path, take_finished=True, **OPTIONS)
    assert taken.layer_losses == first.layer_losses and not torch.equal(temperatures(other), temperatures(student_of(teacher)))


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4, 5])
def test_a_run_with_layers_that_learn_nothing_goes_on_and_is_taken(tokens, tmp_path, killed_after, monkeypatch):
    """Groups 0, 3 and 5 of six learn; killed when so many groups are through and their inputs have been removed."""
    teacher = tiny_llama(num_hidden_layers=6)
    layers = dict.fromkeys((0, 3, 5), "toy-temperature")
    students = [swap(copy.deepcopy(teacher), None, layers=layers) for _ in range(4)]
    expected = distill(students[0], teacher, tokens, **OPTIONS)
    real, passed = blockwise.only, []

    class Killed(BaseException):
        pass

    def dying(body, *rest):
        if len(passed) == killed_after:
            raise Killed
        passed.append(rest)
        return real(body, *rest)

    groups = {"group": 1, "out": tmp_path, **OPTIONS}
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "only", dying)
        with pytest.raises(Killed):
            distill(students[1], students[1], tokens, **groups)
    assert distill(students[2], students[2], tokens, **groups).layer_losses == expected.layer_losses
    distill(students[3], students[3], tokens, take_finished=True, **groups)
    assert all(torch.equal(temperatures(one), temperatures(students[0])) for one in students[2:])


@pytest.mark.parametrize("saved", range(1, 16, 2))
def test_a_run_killed_while_hidden_states_are_written_goes_on(tokens, tmp_path, saved, monkeypatch):
    """Also within a group that learns nothing: of five layers 1 and 4 learn."""
    teacher = tiny_llama(num_hidden_layers=5)
    students = [swap(copy.deepcopy(teacher), None, layers=dict.fromkeys((1, 4), "toy-temperature")) for _ in range(3)]
    expected = distill(students[0], teacher, tokens, **OPTIONS)
    real, written = blockwise.Hidden.save, []

    class Killed(BaseException):
        pass

    def dying(*given):
        if len(written) == saved:
            raise Killed
        written.append(real(*given))

    with monkeypatch.context() as patch:
        patch.setattr(blockwise.Hidden, "save", dying)
        with pytest.raises(Killed):
            distill(students[1], students[1], tokens, group=1, out=tmp_path, **OPTIONS)
    assert distill(students[2], students[2], tokens, group=1, out=tmp_path, **OPTIONS).layer_losses == expected.layer_losses


def test_hidden_states_that_are_gone_are_named(teacher, tokens, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    real = blockwise.Hidden.load

    def dying(self, step):
        if step == 2:
            raise Killed
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(blockwise.Hidden, "load", dying)
        with pytest.raises(Killed):
            distill(student_of(teacher), teacher, tokens, group=1, out=tmp_path, **OPTIONS)
    for damage in (lambda file: file.write_bytes(b"half"), lambda file: file.unlink()):
        damage(tmp_path / "hidden-001" / "step-00000002.safetensors")
        with pytest.raises(InputError, match=r"out: got damaged or missing hidden states .*step-00000002"):
            distill(student_of(teacher), teacher, tokens, group=1, out=tmp_path, **OPTIONS)


def test_groups_that_learn_nothing_belong_to_their_run_too(teacher, tokens, tmp_path):
    student = swap(copy.deepcopy(teacher), None, layers={2: "toy-temperature"})
    distill(student, teacher, tokens, group=1, out=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match=r"group = layers 0-0\b.*layers 0-1"):
        distill(student, teacher, tokens, group=2, out=tmp_path, **OPTIONS)


def test_a_bar_says_which_layers(teacher, tokens, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(blockwise, "Bar", lambda label, *rest: labels.append(label) or Bar(label, *rest))
    distill(student_of(teacher), teacher, tokens, group=2, out=tmp_path, **OPTIONS)
    assert labels == ["distill layers 0-1", "distill layers 2-2"]


def test_bad_input(teacher, tokens, tmp_path):
    with pytest.raises(InputError) as error:
        distill(student_of(teacher), teacher, tokens, group=2, **OPTIONS)
    assert error.value.argument == "out"
    with pytest.raises(InputError) as error:
        distill(student_of(teacher), teacher, tokens, group=0, out=tmp_path, **OPTIONS)
    assert error.value.argument == "group"
    distill(student_of(teacher), teacher, tokens, group=2, out=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="group = layers 0-1"):
        distill(student_of(teacher), teacher, tokens, group=3, out=tmp_path, **OPTIONS)
