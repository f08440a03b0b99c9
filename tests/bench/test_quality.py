import math
from types import SimpleNamespace

import pytest
import torch
from bench.tiny import make_llama
from torch import nn

import subquad
from subquad import InputError
from subquad.bench import quality
from subquad.bench.quality import perplexity, recall, recall_prompts


def log_prob(model, context, token):
    """log p(token | context), from one forward pass over the context alone."""
    return model(input_ids=context[None]).logits[0, -1].log_softmax(-1)[token].item()


@torch.no_grad()
def test_one_window_is_the_mean_over_all_tokens_but_the_first(llama):
    tokens = torch.randint(0, 257, (24,))
    by_hand = -sum(log_prob(llama, tokens[:t], tokens[t]) for t in range(1, 24)) / 23
    found = perplexity(llama, tokens, window=24)
    assert (found.tokens, found.windows) == (23, 1)
    assert found.nll == pytest.approx(by_hand, abs=1e-5)
    assert found.ppl == pytest.approx(math.exp(by_hand), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [4, 16])
def test_strided_windows_score_each_token_once_in_the_first_window_that_predicts_it(llama, stride):
    window, total = 16, 64
    tokens = torch.randint(0, 257, (total,))
    scores = []
    for t in range(1, total):
        starts = [s for s in range(0, total - window + 1, stride) if s < t < s + window]
        if starts:
            scores.append(log_prob(llama, tokens[starts[0] : t], tokens[t]))
    found = perplexity(llama, tokens, window=window, stride=stride)
    assert found.tokens == len(scores)
    assert found.nll == pytest.approx(-sum(scores) / len(scores), abs=1e-5)


def test_limit_takes_the_last_windows(llama):
    tokens = torch.randint(0, 257, (64,))
    assert perplexity(llama, tokens, window=16, limit=2).nll == pytest.approx(perplexity(llama, tokens[32:], window=16).nll, abs=1e-6)


def test_mode_and_gradients_are_left_as_they_were(llama):
    llama.train()
    perplexity(llama, torch.arange(16), window=16)
    assert llama.training and all(p.grad is None for p in llama.parameters())


def test_text_shorter_than_one_window(llama):
    with pytest.raises(InputError, match=r"text: got 15 tokens; expected at least one window, 16 tokens"):
        perplexity(llama, torch.arange(15), window=16)


def test_prompts_come_from_the_seed_and_keep_their_distance():
    made = recall_prompts(5, pairs=4, distance=50, seed=3)
    assert made == recall_prompts(5, pairs=4, distance=50, seed=3) != recall_prompts(5, pairs=4, distance=50, seed=4)
    for prompt in made:
        name = prompt.question.removeprefix("The code of ").removesuffix(" is")
        assert f"The code of {name} is {prompt.answer}." in prompt.pairs
        assert len({code[0] for code in prompt.codes}) == 4 and prompt.answer in prompt.codes
        assert 50 <= len(prompt.filler.split()) < 70
    with pytest.raises(InputError, match="pairs: got 1"):
        recall_prompts(1, pairs=1)


class Scripted(nn.Module):
    """A model that, at the end of a question, continues with what `answer(text so far)` says."""

    def __init__(self, tokenizer, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.answer = tokenizer, answer

    def forward(self, input_ids, use_cache=False):
        self.passes = getattr(self, "passes", 0) + 1
        logits = torch.zeros(*input_ids.shape, 257)
        for row, ids in zip(logits, input_ids):
            text = self.tokenizer.decode(ids)
            question = text.rindex("The code of")
            end = text.index(" is", question) + len(" is")
            says = " " + self.answer(text[:end])
            for offset, token in enumerate(self.tokenizer(says)["input_ids"]):
                if end - 1 + offset < len(ids):
                    row[end - 1 + offset, token] = 1.0
        return SimpleNamespace(logits=logits)


def stated(text):
    return dict(pair.removeprefix("The code of ").split(" is ") for pair in text.split(". ") if " is " in pair and "The code of " in pair)


@pytest.mark.parametrize("most, passes", [(0, {20}), (600, set(range(7, 14))), (10**6, {1})])
def test_a_model_that_remembers_scores_one_and_one_that_forgets_scores_less(tokenizer, monkeypatch, most, passes):
    monkeypatch.setitem(quality._TOKENS, "cpu", most)

    def remembers(text):
        return stated(text)[text[text.rindex("The code of") :].removeprefix("The code of ").removesuffix(" is")]

    def first_pair(text):
        return next(iter(stated(text).values()))

    def nearly(text):  # the right first digit, a wrong rest
        return remembers(text)[0] + "xyz"

    made = recall_prompts(20, distance=40, seed=0, count=lambda t: len(tokenizer(t)["input_ids"]))
    lucky = sum(prompt.answer == prompt.codes[0] for prompt in made) / 20
    assert 0 < lucky < 1
    for answer, exact, ranked in ((remembers, 1.0, 1.0), (first_pair, lucky, lucky), (nearly, 0.0, 1.0)):
        model = Scripted(tokenizer, answer)
        found = recall(model, tokenizer, prompts=20, distance=40)
        assert (found.exact, found.ranked) == (exact, ranked) and model.passes in passes


@pytest.mark.parametrize("mechanism", [None, "lolcats", "gla"])
def test_sequences_side_by_side_are_as_they_are_alone(mechanism, tokenizer, monkeypatch):
    model = make_llama()
    model = model if mechanism is None else subquad.swap(model, mechanism)
    tokens = torch.randint(0, 257, (288,), generator=torch.Generator().manual_seed(0))
    texts = ("one is 17. One is", "two is 5, three is 17. Two and three are 2", "four is 99. It")
    questions = [
        quality.Question.of(lambda text: tokenizer(text)["input_ids"], text, (f"{i}", "3", "4"), f"{i}") for i, text in enumerate(texts)
    ]
    seen = []
    handle = model.register_forward_hook(lambda module, args, out: seen.append(out.logits))
    logits = {}
    for most in (0, 64, 10**6):
        monkeypatch.setitem(quality._TOKENS, "cpu", most)
        seen.clear()
        nll = perplexity(model, tokens, window=24).nll
        logits[most] = nll, [out.shape[0] for out in seen], []
        seen.clear()
        quality.answered(model, questions, lambda: None)
        logits[most][2].extend(row for out in seen for row in out)
    handle.remove()
    assert [found[1] for found in logits.values()] == [[1] * 12, [2] * 6, [12]]
    assert all(found[0] == pytest.approx(logits[0][0], abs=1e-6) for found in logits.values())
    alone, together = logits[0][2], logits[10**6][2]
    longest, first = max(len(q.ids) for q in questions), min(q.start for q in questions)
    for question, one, many in zip(questions, alone, together):
        assert one.shape[0] == len(question.ids) - question.start + 1 and many.shape[0] == longest - first + 1
        at = question.start - first
        torch.testing.assert_close(many[at : at + one.shape[0]], one, rtol=1e-4, atol=1e-5)


def test_no_prompt_is_refused(llama, tokenizer):
    with pytest.raises(InputError, match="prompts: got 0; expected at least 1"):
        recall(llama, tokenizer, prompts=0)
