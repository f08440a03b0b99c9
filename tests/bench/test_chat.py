"""A conversation against one that reads everything anew, its memory, what it keeps when stopped; the command."""

import copy
import itertools
import math
import re

import pytest
import torch
from typer.testing import CliRunner

import subquad
from subquad import InputError
from subquad.bench.chat import Conversation
from subquad.cli import app

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def templated(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


def greedy(model, ids, most, end):
    """Token by token, the whole text read each time."""
    for _ in range(most):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        ids = [*ids, token]
    return ids


@pytest.mark.parametrize("name", [None, "hedgehog", "sliding-window"])
def test_turns_say_what_one_reading_of_the_whole_text_says(llama, templated, name):
    if name is not None:
        subquad.swap(llama, name)
    talk = Conversation(llama, templated, temperature=0, most=12)
    first = "".join(talk.say("Call me"))
    second = "".join(talk.say("Ishmael"))
    ids = templated("<user>Call me<eos><assistant>")["input_ids"]
    said = greedy(llama, ids, 12, 256)
    assert templated.decode(said[len(ids) :], skip_special_tokens=True).startswith(first)
    ids = [*said, *templated("<eos><user>Ishmael<eos><assistant>")["input_ids"]]
    expected = templated.decode(greedy(llama, ids, 12, 256)[len(ids) :], skip_special_tokens=True)
    assert expected.startswith(second) and len(expected) - len(second) <= 1  # a cut character is not shown
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_what_is_kept_stays_the_same_with_a_fixed_state(llama, templated):
    plain, swapped = (Conversation(copy.deepcopy(llama), templated, temperature=0, most=8) for _ in range(2))
    subquad.swap(swapped.model, "hedgehog")
    sizes = {}
    for talk in (plain, swapped):
        for text in ("one", "two", "three"):
            list(talk.say(text))
            sizes.setdefault(talk, []).append((talk.nbytes, talk.tokens))
    assert len({size for size, _ in sizes[swapped]}) == 1
    assert [size for size, _ in sizes[plain]] == [
        tokens * 4 * 2 * 2 * 8 * 4 for _, tokens in sizes[plain]
    ]  # layers, k and v, heads, D, bytes


def test_without_a_template_the_text_goes_on(llama, tokenizer):
    talk = Conversation(llama, tokenizer, temperature=0, most=5)
    list(talk.say("It was the"))
    ids = tokenizer("It was the")["input_ids"]
    assert talk.told == tokenizer.decode(greedy(llama, ids, 5, 256))
    assert talk.tokens == len(ids) + 4 and len(talk.pending) == 1  # the last token is written but not yet read
    talk.reset()
    assert (talk.nbytes, talk.tokens, talk.told) == (0, 0, "")


def test_a_reply_that_is_stopped_is_kept_as_far_as_it_went(llama, templated):
    talk = Conversation(llama, templated, temperature=0, most=40)
    pieces = talk.say("Call me")
    taken = "".join(itertools.islice(pieces, 3))
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": taken} and talk.told.endswith(taken)
    tokens = talk.tokens
    next(talk.say("again"))
    assert talk.tokens > tokens  # went on, did not begin anew


@pytest.mark.parametrize("name", [None, "hedgehog"])
def test_a_reply_that_is_broken_off_between_two_layers_says_the_same_afterwards(llama, templated, name):
    if name is not None:
        subquad.swap(llama, name)
    whole, broken = (Conversation(llama, templated, temperature=0, most=6) for _ in range(2))
    first = next(whole.say("Call me"))
    pieces = broken.say("Call me")
    assert next(pieces) == first

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = llama.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    handle.remove()
    assert list(broken.say("again")) == list(whole.say("again"))
    assert broken.read == whole.read


def test_a_template_that_changes_what_was_said_is_read_anew_whole(llama, templated):
    """A reply that was cut off leaves a token that is not read yet: it is in the new text, once."""
    templated.chat_template = "{{ messages|length }}" + TEMPLATE
    talk = Conversation(llama, templated, temperature=0, most=3)
    list(talk.say("Call me"))
    said = talk.messages[-1]["content"]
    list(talk.say("again"))
    ids = templated(f"3<user>Call me<eos><assistant>{said}<eos><user>again<eos><assistant>")["input_ids"]
    assert talk.read[: len(ids)] == ids and talk.tokens == len(ids) + 2


def test_sampling_keeps_to_the_likeliest_and_to_the_seed(llama, tokenizer):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    talk = Conversation(llama, tokenizer, temperature=1, top_p=0.7)
    drawn = [talk._choose(logits) for _ in range(400)]
    assert set(drawn) == {0, 1} and abs(drawn.count(0) / 400 - 0.625) < 0.08
    assert {Conversation(llama, tokenizer, temperature=1, top_p=0.01)._choose(logits) for _ in range(9)} == {0}
    for cold in (1e-40, 1e-320):
        assert Conversation(llama, tokenizer, temperature=cold)._choose(logits) == 0
    replies = {"".join(Conversation(llama, tokenizer, seed=seed, most=9).say("Ahab")) for seed in (1, 1, 2)}
    assert len(replies) == 2


def test_bad_settings_are_refused(llama, tokenizer):
    for name, value in (("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("most", 0), ("seed", 2**64)):
        with pytest.raises(InputError, match=name):
            Conversation(llama, tokenizer, **{name: value})


def test_the_command(folder):
    said = CliRunner().invoke(app, ["chat", str(folder), "--max-tokens", "6"], input="Call me\n/rest\n/reset\nmore\n/quit\nnever\n")
    assert said.exit_code == 0, said.output
    assert "No command /rest" in said.stderr and "Forgotten." in said.stderr and "no chat template" in said.stderr
    assert said.stderr.count("tokens/s") == 2 and said.stderr.count("kept in") == 2
    latin = CliRunner().invoke(app, ["chat", str(folder), "--max-tokens", "2"], input="caf\u00e9\nmore\n".encode("latin-1"))
    assert latin.exit_code == 0 and latin.stderr.count("tokens/s") == 2
    ended = CliRunner().invoke(app, ["chat", str(folder)], input="")
    assert ended.exit_code == 0 and "tokens/s" not in ended.stderr


def test_text_that_the_model_has_no_embeddings_for_is_refused_and_forgotten(llama, tokenizer):
    wide = copy.deepcopy(tokenizer)
    wide.add_tokens(["<rare>"], special_tokens=True)  # token 257 of a model with 257
    for template in (None, TEMPLATE, "{{ messages|length }}" + TEMPLATE):
        wide.chat_template = template
        talk, plain = (Conversation(llama, wide, temperature=0, most=3) for _ in range(2))
        words = r"tokenizer: got token id 257, of a tokenizer with 258 tokens; expected ids below 257, the tokens that the model has"
        for one in ("Call <rare>", "Call me", "so <rare> it is", "again"):
            if "<rare>" in one:
                with pytest.raises(InputError, match=words):
                    next(talk.say(one))
            else:
                assert list(talk.say(one)) == list(plain.say(one))
        assert talk.read == plain.read and talk.messages == plain.messages


def test_a_model_with_more_embeddings_than_the_tokenizer_has_tokens_talks(tokenizer):
    from bench.tiny import make_llama

    talk = Conversation(make_llama(vocab_size=320), tokenizer, temperature=0, most=1)
    list(talk.say("Call me"))
    assert talk.read == tokenizer("Call me")["input_ids"]


def test_the_command_with_a_tokenizer_that_is_too_wide(narrow):
    few, wide = narrow
    refused = CliRunner().invoke(app, ["chat", str(few)], input="Call me\n")
    assert refused.exit_code == 2 and re.search(
        r"tokenizer: got token id \d+, of a tokenizer with 257 tokens; .*below 100,", refused.stderr
    )
    said = CliRunner().invoke(app, ["chat", str(wide), "--max-tokens", "2"], input="Call me\n<rare>\nmore\n")
    assert said.exit_code == 0 and said.stderr.count("tokens/s") == 2 and said.stderr.count("got token id 257") == 1
