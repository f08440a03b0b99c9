"""Saving and loading swapped models: in this process and in fresh ones, whole and damaged."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.saving import check_folder
from subquad.convert.swap import swapped

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.filterwarnings("ignore")]
LAYERS = {0: "toy-linear", 2: {"name": "toy-linear", "bias": 0.5}, 3: "toy-softmax"}


@pytest.fixture
def saved(decoder, tmp_path):
    """(model, folder, ids): a swapped Qwen3 model and the folder it was saved to."""
    model = subquad.swap(decoder("qwen3"), None, layers=LAYERS)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model", torch.randint(5, 97, (2, 9))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_round_trip(saved):
    from transformers import AutoModelForCausalLM

    model, folder, ids = saved
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(model) and again.config.model_type == "subquad_qwen3"
    assert {i: (m.name, m.mechanism.options) for i, m in swapped(again).items()} == {
        0: ("toy-linear", {"bias": 1.0}), 2: ("toy-linear", {"bias": 0.5}), 3: ("toy-softmax", {"causal": True}),
    }  # fmt: skip
    assert torch.equal(swapped(again)[0].mechanism.constant, torch.linspace(0.3, 0.9, 4))  # not in the file
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False))
    again.save_pretrained(folder.parent / "again")
    assert json.loads((folder / "config.json").read_text()) == json.loads((folder.parent / "again" / "config.json").read_text())
    assert torch.equal(logits(subquad.restore(again), ids), logits(subquad.restore(model), ids))


def test_dtype_is_kept(decoder, tmp_path):
    from transformers import AutoModelForCausalLM

    subquad.swap(decoder().to(torch.bfloat16), "toy-linear").save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        mechanism = swapped(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))[1].mechanism
        assert mechanism.gate.weight.dtype == expected
        assert torch.equal(mechanism.constant, torch.linspace(0.3, 0.9, 4))


def test_weights_missing_from_the_file_get_the_mechanisms_first_values(saved):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model, folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    for layer in (0, 2):
        del weights[f"model.layers.{layer}.self_attn.mechanism.gate.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    again = swapped(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(again[0].mechanism.gate.bias, torch.full((2,), 1.0))
    assert torch.equal(again[2].mechanism.gate.bias, torch.full((2,), 0.5))
    assert torch.equal(again[2].mechanism.gate.weight, swapped(model)[2].mechanism.gate.weight)


def test_the_plain_class_gives_softmax_and_the_card_says_so(saved):
    from transformers import Qwen3ForCausalLM

    model, folder, ids = saved
    plain = Qwen3ForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(plain, ids), logits(subquad.restore(model), ids))
    card = (folder / "README.md").read_text()
    assert "Qwen3ForCausalLM.from_pretrained`: that silently\ngives softmax" in card
    assert "3 of 4 layers by `toy-linear`, `toy-softmax`" in card and "import AutoModelForCausalLM\n" in card


def test_a_card_that_is_there_is_kept(saved):
    model, folder, _ = saved
    (folder / "README.md").write_text("# Mine\n")
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("# Mine\n") and card.count("## Swapped attention") == 1


FRESH = """
import sys
{imports}
sys.path[:0] = {paths!r}
import conftest, torch
for name, cls in conftest.TOYS.items():
    subquad.register(name)(cls)
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}).eval()
torch.save(model(torch.load({ids!r})).logits, {out!r})
"""


AFTER = "from transformers import AutoModelForCausalLM\nimport transformers, subquad"


@pytest.mark.parametrize("imports", ["import subquad, transformers", AFTER])
def test_a_fresh_process_in_either_order_of_imports(saved, imports):
    model, folder, ids = saved
    torch.save(ids, folder / "ids.pt")
    here = [str(place) for place in Path(__file__).parents[:2]]
    code = FRESH.format(imports=imports, paths=here, folder=str(folder), ids=str(folder / "ids.pt"), out=str(folder / "out.pt"))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (torch.load(folder / "out.pt") - logits(model, ids)).abs().max() <= 1e-6


def test_importing_subquad_imports_neither_transformers_nor_timm():
    code = "import sys, subquad; print([name for name in ('transformers', 'timm', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


def test_swapped_models_can_be_pickled(saved):
    model, _, ids = saved
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_the_tokenizer_of_the_family_is_found(saved):
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    _, folder, _ = saved
    made = Tokenizer(models.WordLevel({"whale": 0, "sea": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("sea")["input_ids"] == [1]
    assert AutoConfig.from_pretrained(folder).subquad["layers"]["2"] == {"name": "toy-linear", "bias": 0.5}


def test_damaged_folders_are_named(saved):
    from transformers import AutoModelForCausalLM

    _, folder, _ = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    assert check_folder(folder) == folder

    def refuses(message, load=check_folder):
        with pytest.raises(InputError) as error:
            load(folder)
        assert message in str(error.value) and "\n" not in str(error.value)

    weights.write_bytes(whole[:-10])
    refuses(f"{weights}, which is damaged ({len(whole) - 10} bytes); expected {len(whole)} bytes")
    refuses("damaged", AutoModelForCausalLM.from_pretrained)
    weights.write_bytes(whole[:5])
    refuses(f"{weights}, which is damaged (its header cannot be read)")
    weights.write_bytes(b"\xff" * len(whole))
    refuses("its header cannot be read")
    weights.unlink()
    refuses(f"no file {weights}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    refuses("no file " + str(folder / "model-00001.safetensors"))
    (folder / "config.json").write_text('{"model_type": "subq')
    refuses(f"{folder / 'config.json'}, which is damaged")
    (folder / "config.json").unlink()
    refuses(f"no file {folder / 'config.json'}")
    with pytest.raises(InputError, match="not a folder"):
        check_folder(folder / "nothing")
