"""A disk that fills while something is written: one line that names the argument, no half files, and what was there before stays."""

import contextlib
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from subquad import InputError
from subquad.bench.folder import Folder
from subquad.bench.vision_job import _keep_weights
from subquad.convert.blockwise import Hidden
from subquad.files import save_tokenizer, whole, writing
from subquad.models.self_text import self_text


@contextlib.contextmanager
def no_room():
    """No file may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_tokenizer_says_of_a_full_disk_is_the_systems_word(tmp_path):
    import tokenizers
    import transformers

    words = {f"word{i}": i for i in range(2000)}
    whole_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "word0"))
    )
    with no_room(), pytest.raises(InputError) as error, writing("--out", tmp_path):
        save_tokenizer(whole_tokenizer, tmp_path)
    assert error.value.argument == "--out" and "too large" in str(error.value).lower()

    class Broken:
        def save_pretrained(self, _):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        save_tokenizer(Broken(), tmp_path)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def refused(argument):
    with no_room(), pytest.raises(InputError) as error:
        yield
    assert error.value.argument == argument and "File too large" in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    for text in ("a" * 5000, b"bytes"):  # the disk's refusal, and an error of ours
        with pytest.raises((InputError, TypeError)), no_room(), writing("out", path), whole(path) as draft:
            draft.write_text(text)
        assert files(tmp_path) == ["x"] and path.read_text() == "before"
    with whole(path) as draft:
        draft.write_text("after")
    assert files(tmp_path) == ["x"] and path.read_text() == "after"


def test_safetensors_refusals_count_as_the_systems(tmp_path):
    with refused("here"), writing("here", tmp_path):
        save_file({"x": torch.zeros(9000)}, tmp_path / "x")


def test_a_model_is_saved_whole_or_not_at_all(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    folder = Folder(tmp_path, {})
    with refused("--out"):
        folder.save_model("taught", model, Tokenizer(), "a card")
    assert not list(tmp_path.iterdir()), "half a model takes room"
    folder.save_model("taught", model, Tokenizer(), "a card")
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= {path.name for path in (tmp_path / "taught").iterdir()}


def test_weights_of_an_image_model(tmp_path):
    model = nn.Linear(64, 64)
    with refused("--out"):
        _keep_weights(tmp_path, "one", model)
    assert not files(tmp_path)
    _keep_weights(tmp_path, "one", model)
    assert torch.equal(load_file(tmp_path / "weights" / "one.safetensors")["weight"], model.weight)


def test_hidden_states_between_groups(tmp_path):
    kept, states = Hidden(tmp_path / "hidden"), torch.randn(1, 64, 64)
    kept.save(0, states[:, :4])
    with refused("out"):
        kept.save(1, states)
    assert files(tmp_path) == ["hidden/step-00000000.safetensors"] and torch.equal(kept.load(0), states[:, :4])


def test_sampled_text(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with refused("cache"):
        self_text(model, 1600, length=2, batch=800, cache=tmp_path)
    assert not files(tmp_path)


def test_an_embedded_model_loads_without_room_for_its_copy(tmp_path, monkeypatch):
    from pathlib import Path

    from transformers import LlamaConfig, LlamaForCausalLM

    from subquad.models import load

    class Tokenizer:
        save_pretrained = staticmethod(lambda folder: None)

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    monkeypatch.setattr(load, "embedded_file", lambda: Path("a.gguf"))
    monkeypatch.setattr(load, "_gguf", lambda *_: (model, Tokenizer()))
    with no_room():
        assert load.load_model(load.DEFAULT)[0] is model
    assert not list(tmp_path.iterdir())
