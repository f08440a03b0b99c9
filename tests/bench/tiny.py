"""A random Llama of 4 layers with a tokenizer of bytes, saved to a folder as any pretrained model is."""

import copy

import pytest
import torch


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, "<eos>": len(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def make_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": True,
        "initializer_range": 0.2, "eos_token_id": 256, "bos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def narrow(tmp_path, tokenizer):
    """Two folders: of a model without embeddings for most bytes, and of one without for a token that was added and is rarely written."""
    few, wide = tmp_path / "few", tmp_path / "wide"
    make_llama(vocab_size=100, eos_token_id=99).save_pretrained(few)
    tokenizer.save_pretrained(few)
    make_llama().save_pretrained(wide)
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<rare>"], special_tokens=True)
    added.save_pretrained(wide)
    return few, wide


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    return path
