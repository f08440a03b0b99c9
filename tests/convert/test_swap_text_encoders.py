"""Swapped BERT and RoBERTa: exact attention changes nothing, padding reaches nobody, saving, teaching, and what is refused."""

import copy

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.swap import swap, swapped

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}


def make(family="bert", part="Model", **changes):
    import transformers

    name = {"bert": "Bert", "roberta": "Roberta"}[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "initializer_range": 0.3, "max_position_embeddings": 64, **changes})
    model = getattr(transformers, f"{name}{part}")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):  # zeros would hide a dropped bias
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model


def batch():
    """Three rows of 9, 1 and 5 tokens, padded in turn on the right, on the left and on both sides."""
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, (start, stop) in enumerate(((0, 9), (8, 9), (2, 7))):
        ids[row, start:stop], mask[row, start:stop] = torch.randint(1, 61, (stop - start,)), 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_exact_attention_changes_nothing_and_restore_is_exact(family, implementation):
    model, given = make(family, attn_implementation=implementation), batch()
    before, names, real = hidden(model, **given), list(model.state_dict()), given["attention_mask"].bool()
    assert swap(model, "softmax", layers=[0, 2]) is model and list(swapped(model)) == [0, 2]
    assert not swapped(model)[0].mechanism.causal
    assert (hidden(model, **given) - before)[real].abs().max() <= 1e-5 * before.abs().max()
    assert list(model.state_dict()) == names
    subquad.restore(model)
    assert torch.equal(hidden(model, **given), before)


@pytest.mark.parametrize("name", ["hedgehog", "linear-elu", "longformer", "lightnet"])
def test_a_padded_row_is_the_row_alone(name):
    model, given = swap(make(), name), batch()
    together = hidden(model, **given)
    for row, real in enumerate(given["attention_mask"].bool()):
        positions = real.nonzero().T
        alone = hidden(model, input_ids=given["input_ids"][row : row + 1, real], position_ids=positions)
        torch.testing.assert_close(together[row, real], alone[0], atol=1e-5, rtol=1e-5)


def test_saved_models_load_through_the_auto_classes(tmp_path):
    from transformers import AutoModelForMaskedLM

    model, given = swap(make(part="ForMaskedLM"), "hedgehog", feature_dim=5), batch()
    torch.nn.init.normal_(swapped(model)[1].mechanism.W_q)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert swapped(loaded)[1].mechanism.feature_dim == 5
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert "AutoModelForMaskedLM.from_pretrained" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("objective", ["output", "weights"])
def test_layers_learn_from_padded_sentences(objective):
    teacher, given = make(), batch()
    filled = {**given, "input_ids": given["input_ids"].where(given["attention_mask"].bool(), 7)}  # other ids at padding

    def teach(inputs, steps):
        student = swap(copy.deepcopy(teacher), "hedgehog")
        return subquad.distill(student, teacher, [inputs], steps=steps, lr=3e-2, objective=objective, progress=False)

    result = teach(given, 40)
    assert result.tokens == 40 * 15 and result.losses[-1] < (0.9 if objective == "output" else 0.99) * result.losses[0]
    assert teach(filled, 3).losses == pytest.approx(teach(given, 3).losses, rel=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="is causal only; expected a bidirectional mechanism"):
        swap(make(), "gla")
    with pytest.raises(InputError, match="is_decoder=True"):
        swap(make(is_decoder=True), "hedgehog")
    model, ids = swap(make(), "hedgehog"), torch.randint(1, 61, (1, 6))
    with pytest.raises(InputError, match="attention_mask: got a mask that differs between queries"):
        model(input_ids=ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool).tril())
