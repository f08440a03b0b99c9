"""Prompts of passkey and needle: their lengths, depths and seeds; scores of models that know, forget, or nearly know."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import subquad
from subquad import InputError
from subquad.bench.needle import hidden_prompt, retrieval
from subquad.cli import app


@pytest.fixture
def count(tokenizer):
    return lambda text: len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("task", ["passkey", "needle"])
@pytest.mark.parametrize("length", [600, 3000])
def test_prompts_have_their_length_and_the_fact_its_depth(task, length, count):
    for depth in (0.0, 0.3, 1.0):
        prompt = hidden_prompt(task, length, depth, count=count)
        assert length - 500 < count(prompt.text) <= length
        assert prompt.answer in prompt.choices and len({choice[0] for choice in prompt.choices}) == 4
        body = prompt.text[: prompt.text.rindex("What is")]
        if task == "passkey":
            fact = re.search(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", body)
        else:
            city = re.search(r"What is the number of (\w+)\?", prompt.text)[1]
            fact = re.search(rf"The number of {city} is (\d+)\.", body)
            assert set(re.findall(r"The number of \w+ is (\d+)\.", body)) == set(prompt.choices)
        assert fact[1] == prompt.answer
        opening = body.index(". ", body.index("emember")) + 2
        assert abs((fact.start() - opening) / (len(body) - opening - len(fact[0])) - depth) < 0.15


def test_prompts_come_from_the_seed(count):
    def made(**options):
        return hidden_prompt("needle", 800, 0.5, count=count, **options)

    assert made(seed=3) == made(seed=3) and len({made(seed=3).text, made(seed=4).text, made(seed=3, index=1).text}) == 3


def test_bad_prompts_are_refused(count):
    for words, arguments in (
        ("task: got .*nearest: needle", ("needles", 500, 0.5)), ("depth: got 1.5", ("needle", 500, 1.5)),
        ("length: got 20; expected at least", ("passkey", 20, 0.5)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            hidden_prompt(*arguments, count=count)


class Scripted(nn.Module):
    """A model that continues a prompt with what `answer(prompt)` says."""

    def __init__(self, tokenizer, answer, lead=" "):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer, self.lead = tokenizer, answer, lead

    def forward(self, input_ids, use_cache, logits_to_keep):
        text = self.tokenizer.decode(input_ids[0])
        end = text.index(" is", text.rindex("What is") + 7) + 3
        place = len(self.tokenizer(text[:end])["input_ids"])  # in bytes
        logits = torch.zeros(1, input_ids.shape[1], 257)
        for offset, token in enumerate(self.tokenizer(f"{self.lead}{self.answer(text[:end])}.")["input_ids"]):
            if place - 1 + offset < input_ids.shape[1]:
                logits[0, place - 1 + offset, token] = 1.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def generate(self, ids, max_new_tokens, **_):
        said = self.tokenizer(f"{self.lead}{self.answer(self.tokenizer.decode(ids[0]))}.")["input_ids"][:max_new_tokens]
        return torch.cat([ids, torch.tensor([said])], 1)


def knows(text):
    """Reads the number off the whole prompt."""
    city = re.search(r"What is the number of (\w+)\?", text)
    return re.search(rf"number of {city[1]} is (\d+)" if city else r"pass key is (\d+)", text)[1]


def window(text):
    """Knows what the last 300 characters say, else guesses a number with nothing right."""
    near = text[-300:]
    return knows(near) if re.search(r"(key|of \w+) is \d", near) and knows(text) in near else "00000"


@pytest.mark.parametrize("by", ["forward", "generate"])
def test_scores_by_depth(tokenizer, by):
    def score(answer):
        return retrieval(Scripted(tokenizer, answer), tokenizer, tasks=("passkey",), lengths=(700, 1400), depths=(0.0, 1.0), by=by)

    assert [cell.exact for cell in score(knows).cells] == [1, 1, 1, 1]
    assert [(cell.length, cell.depth, cell.exact) for cell in score(window).cells] == [
        (700, 0.0, 0), (700, 1.0, 1), (1400, 0.0, 0), (1400, 1.0, 1),
    ]  # fmt: skip
    assert score(window).mean("passkey", 700) == 0.5
    nearly = score(lambda text: knows(text)[0] + "xxxx")  # the right first digit, a wrong rest
    assert {cell.exact for cell in nearly.cells} == {0} and {cell.ranked for cell in nearly.cells} == {1 if by == "forward" else None}
    assert {cell.number for cell in nearly.cells} == {0}
    longer = score(lambda text: knows(text) + "7")  # the number runs on: greedy decoding does not stop where the answer does
    assert {cell.exact for cell in longer.cells} == {cell.number for cell in longer.cells} == ({1} if by == "forward" else {0})


@pytest.mark.parametrize("by", ["forward", "generate"])
def test_a_number_after_another_word_is_found_but_not_exact(tokenizer, by):
    """By "forward" after the space that is given, by "generate" after the word that is written."""
    options = {"tasks": ("passkey",), "lengths": (700,), "depths": (0.0, 1.0), "by": by}
    found = retrieval(Scripted(tokenizer, knows, lead="~"), tokenizer, **options)
    assert {(cell.exact, cell.number) for cell in found.cells} == {(0, 1)} and found.mean("passkey", 700) == 0
    assert "0% (100%)" in str(found.table().columns[2]._cells)
    wrong = retrieval(Scripted(tokenizer, lambda text: knows(text)[::-1], lead="~"), tokenizer, **options)
    assert {(cell.exact, cell.number) for cell in wrong.cells} == {(0, 0)}


def test_needle_asks_for_one_city_of_several(tokenizer):
    def first_number(text):
        return re.search(r"The number of \w+ is (\d+)", text)[1]

    options = {"tasks": ("needle",), "lengths": (900,), "depths": (0.0, 1.0), "prompts": 6}
    found = retrieval(Scripted(tokenizer, knows), tokenizer, **options)
    assert {(cell.exact, cell.ranked) for cell in found.cells} == {(1, 1)}
    early, late = retrieval(Scripted(tokenizer, first_number), tokenizer, **options).cells
    assert early.exact == 1 and late.exact == late.ranked == 0


def test_forward_and_generate_agree_on_a_swapped_model(llama, tokenizer):
    """Beyond max_position_embeddings = 512, through a state of fixed size."""
    subquad.swap(llama, "sliding-window", window=16)
    options = {"lengths": (700,), "depths": (1.0,), "prompts": 2}
    one, two = retrieval(llama, tokenizer, **options), retrieval(llama, tokenizer, by="generate", **options)
    assert [cell.exact for cell in one.cells] == [cell.exact for cell in two.cells] == [0, 0]
    read = json.loads(one.to_json())
    assert [cell["task"] for cell in read["cells"]] == ["passkey", "needle"] and read["by"] == "forward"


def test_the_command(folder, tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["needle", *map(str, words)])

    done = call(
        folder, "--to", "sliding-window:window=16", "--lengths", "400", "--depths", "0,100", "--prompts", 1, "--out", tmp_path / "n.json"
    )
    assert done.exit_code == 0 and "passkey" in done.stdout and "depth 100%" in done.stdout, done.output
    assert len(json.loads((tmp_path / "n.json").read_text())["cells"]) == 4
    for words, part in (
        (("--task", "niddle"), "nearest: needle"),
        (("--depths", "0,101"), "--depths"),
        (("--by", "hand"), "--by"),
        (("--lengths", "10"), "length"),
        (("--lengths", "10", "--out", tmp_path / "none" / "n.json"), "--out"),  # before anything is measured
        (("--lengths", "10", "--out", tmp_path), "--out"),
    ):
        refused = call(folder, *words)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and part in refused.stderr


def test_a_tokenizer_that_is_too_wide(narrow, tokenizer):
    """Tokens that no prompt has do no harm."""
    few, wide = narrow
    for folder, code in ((few, 2), (wide, 0)):
        done = CliRunner().invoke(app, ["needle", str(folder), "--task", "passkey", "--lengths", "300", "--depths", "0", "--prompts", "1"])
        assert done.exit_code == code, done.output
        assert code == 0 or re.search(r"tokenizer: got token id \d+, of a tokenizer with 257 tokens; .*below 100,", done.stderr)


def test_no_prompt_is_read_before_all_of_them_are_made(tokenizer):
    with pytest.raises(InputError, match="length: got 20; expected at least"):
        retrieval(Scripted(tokenizer, lambda _: pytest.fail("read")), tokenizer, lengths=(700, 20))
