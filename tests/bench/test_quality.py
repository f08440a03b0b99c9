import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from subquad import InputError
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
        text = self.tokenizer.decode(input_ids[0])
        question = text.rindex("The code of")
        end = text.index(" is", question) + len(" is")
        says = " " + self.answer(text[:end])
        logits = torch.zeros(1, input_ids.shape[1], 257)
        for offset, token in enumerate(self.tokenizer(says)["input_ids"]):
            if end - 1 + offset < input_ids.shape[1]:
                logits[0, end - 1 + offset, token] = 1.0
        return SimpleNamespace(logits=logits)


def stated(text):
    return dict(pair.removeprefix("The code of ").split(" is ") for pair in text.split(". ") if " is " in pair and "The code of " in pair)


def test_a_model_that_remembers_scores_one_and_one_that_forgets_scores_less(tokenizer):
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
        found = recall(Scripted(tokenizer, answer), tokenizer, prompts=20, distance=40)
        assert (found.exact, found.ranked) == (exact, ranked)
