"""Image models at other sizes: their tables of positions, and the grid that mechanisms are given."""

import pytest
import torch
import torch.nn.functional as F
from convert.test_swap_encoders import MODELS, call
from convert.test_swap_swin import hugging as hugging_swin
from convert.test_swap_swin import timm_swin

import subquad
from subquad import InputError
from subquad.convert import resize
from subquad.convert.size import interpolate
from subquad.convert.swap import swapped

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.filterwarnings("ignore")]
PREFIX = {"vit": 1, "deit": 2, "timm": 1, "timm-registers": 5, "timm-no-prefix": 0}


def table_of(model):
    name = next(name for name, _ in model.named_parameters() if name.endswith(("position_embeddings", "pos_embed")))
    return model.get_parameter(name)


@pytest.mark.parametrize("kind", PREFIX)
def test_the_table_is_interpolated_and_prefix_tokens_keep_their_rows(kind):
    model, prefix = MODELS[kind](), PREFIX[kind]
    before = table_of(model).detach().clone()
    assert before.shape == (1, prefix + 16, 32)
    images = torch.randn(2, 3, 32, 32)
    same = call(model, images)
    assert torch.equal(table_of(resize(model, 32)), before) and torch.equal(call(model, images), same)

    resize(model, (48, 24))
    after = table_of(model)
    grid = before[:, prefix:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 3), mode="bicubic", antialias=kind.startswith("timm"))
    assert after.shape == (1, prefix + 18, 32) and after.requires_grad and torch.equal(after[:, :prefix], before[:, :prefix])
    assert torch.allclose(after[:, prefix:], expected.permute(0, 2, 3, 1).reshape(1, 18, 32), atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_a_resized_model_of_transformers_is_what_it_computes_with_interpolation(kind, tmp_path):
    from transformers import AutoModelForImageClassification

    model, wide = MODELS[kind](), torch.randn(2, 3, 24, 56)
    expected = call(model, wide)  # interpolate_pos_encoding=True
    resize(model, (24, 56))
    with torch.no_grad():
        assert torch.allclose(model(wide).logits, expected, atol=1e-5)
    table, square = table_of(model).detach().clone(), resize(model, 40)  # from a table that is not square
    assert torch.equal(table_of(square), interpolate(table, (3, 7), (5, 5))) and tuple(model.config.image_size) == (40, 40)
    subquad.swap(resize(model, (40, 16)), "toy-rows").save_pretrained(tmp_path)
    again, images = AutoModelForImageClassification.from_pretrained(tmp_path).eval(), torch.randn(1, 3, 40, 16)
    with torch.no_grad():
        assert torch.allclose(again(images).logits, model(images).logits, atol=1e-5)


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("first", ["swap", "resize"])
def test_mechanisms_get_the_new_grid(kind, first):
    model, seen = MODELS[kind](), []
    for step in ("swap", "resize") if first == "swap" else ("resize", "swap"):
        subquad.swap(model, "toy-rows", layers=[1]) if step == "swap" else resize(model, (24, 56))
    swapped(model)[1].mechanism.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs["grid"])), with_kwargs=True
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 24, 56))
    assert seen == [(21, (3, 7))]
    subquad.restore(model)
    assert table_of(model).shape[1] == PREFIX[kind] + 21


@pytest.mark.parametrize("absolute", [False, True])
def test_swin(absolute):
    model, seen = hugging_swin(use_absolute_embeddings=absolute), []
    subquad.swap(model, "toy-rows", layers=[2])
    resize(model, (48, 80))
    swapped(model)[2].mechanism.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["grid"]), with_kwargs=True)
    with torch.no_grad():
        model(torch.randn(1, 3, 48, 80))
    assert seen == [(6, 10)]
    if absolute:
        assert table_of(model).shape[1] == 12 * 20

    model = timm_swin()
    bias = model.layers[0].blocks[1].attn.relative_position_bias_table
    subquad.swap(model, "softmax", scope="window")
    resize(model, (48, 80))
    assert swapped(model)[1].relative_position_bias_table is bias and model.layers[0].blocks[1].window_size == (4, 4)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 80)).shape == (1, 5)


def test_wrong_use_is_one_line():
    for model, size, message in (
        (MODELS["timm"](), 33, "size: got 33 × 33; expected multiples of the patch's 8 × 8 pixels"),
        (MODELS["vit"](), (32, 20), "multiples of the patch's 8 × 8"),
        (MODELS["vit"](), "big", "size: got 'big'"),
        (torch.nn.Linear(2, 2), 32, "model: got Linear"),
    ):
        with pytest.raises(InputError) as error:
            resize(model, size)
        assert message in str(error.value) and "\n" not in str(error.value)
