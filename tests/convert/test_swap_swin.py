"""Swapped Swin models of timm and transformers: windows, shifts, regions, and attention over the whole image."""

import copy

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.swap import swapped
from subquad.convert.windows import Windows

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.filterwarnings("ignore")]
VISION = ("rala", "mala", "nalaformer", "inline", "l2vit", "lightnet", "linear-relu", "linear-elu")
SIZE = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}


def timm_swin(**changes):
    from timm.models.swin_transformer import SwinTransformer

    options = {"img_size": 56, "patch_size": 4, "window_size": 4, "num_classes": 5, **SIZE, **changes}  # 14 × 14, of 4 × 4 windows
    return randomised(SwinTransformer(**options))


def hugging(cls="SwinForImageClassification", **changes):
    import transformers

    options = {"image_size": 56, "patch_size": 4, "window_size": 4, "num_labels": 5, "initializer_range": 0.3, **SIZE, **changes}
    return randomised(getattr(transformers, cls)(transformers.SwinConfig(**options)))


def randomised(model):
    for name, parameter in model.named_parameters():
        if name.endswith(("bias_table", "bias", "norm.weight")):  # zeros would hide a dropped bias
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.5)
    return model.eval()


MODELS = {
    "timm": timm_swin,
    "timm-dynamic": lambda: timm_swin(dynamic_img_size=True),
    "timm-oblong": lambda: timm_swin(img_size=(32, 80), window_size=(4, 5), always_partition=True),
    "transformers": hugging,
    "transformers-model": lambda: hugging("SwinModel"),
    "transformers-backbone": lambda: hugging("SwinBackbone"),
}


def images_for(kind):
    return torch.randn(2, 3, *((32, 80) if kind == "timm-oblong" else (56, 56)))


def call(model, images):
    with torch.no_grad():
        output = model(images)
    for part in ("logits", "last_hidden_state", "feature_maps"):
        output = getattr(output, part, output)
    return output[-1] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", MODELS)
def test_softmax_in_windows_changes_nothing_and_restore_is_exact(kind):
    model, images = MODELS[kind](), images_for(kind)
    before, names = call(model, images), list(model.state_dict())
    shifted = [
        any(m.shift_size) if isinstance(m.shift_size, tuple) else m.shift_size > 0 for m in model.modules() if hasattr(m, "shift_size")
    ]
    assert sum(shifted) == 2
    subquad.swap(model, "softmax", scope="window", layers=[0, 1, 3])
    assert list(swapped(model)) == [0, 1, 3] and all(m.keeps_bias for m in swapped(model).values())
    assert (call(model, images) - before).abs().max() <= 1e-5 * before.abs().max()
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    subquad.restore(model)
    assert torch.equal(call(model, images), before) and list(swapped(twin)) == [0, 1, 3]
    subquad.restore(twin)
    for restored in (model, twin):
        assert torch.equal(call(restored, images), before)
        assert not any("subquad" in name for module in restored.modules() for name in vars(module))
        assert not any(module._forward_pre_hooks for module in restored.modules())


def test_other_sizes_in_windows():
    """Grids that windows do not fit are filled up with zeros, which take part, as in the originals."""
    for model, images in ((timm_swin(dynamic_img_size=True), torch.randn(1, 3, 72, 48)), (hugging(), torch.randn(1, 3, 72, 48))):
        before = call(model, images)
        subquad.swap(model, "softmax", scope="window")
        assert (call(model, images) - before).abs().max() <= 1e-5 * before.abs().max()


def test_a_small_image_leaves_no_trace():
    """transformers' own blocks keep the windows that a small image shrank."""
    model, images = hugging(), torch.randn(1, 3, 56, 56)
    before = call(model, images)
    subquad.swap(model, "rala")
    swapped_before = call(model, images)
    call(model, torch.randn(1, 3, 12, 12))
    assert torch.allclose(call(model, images), swapped_before, atol=1e-5)
    call(model, torch.randn(1, 3, 12, 12))
    assert torch.equal(call(subquad.restore(model), images), before)


@pytest.mark.parametrize("roll_first", [True, False])
def test_joining_undoes_cutting(roll_first):
    cut = Windows((5, 7), (4, 3), (2, 1), roll_first)
    x = torch.arange(70.0).reshape(1, 5, 7, 2)
    windows = cut.cut(x)
    assert windows.shape == (2 * 3, 12, 2) and torch.equal(cut.join(windows), x)
    assert windows[0, 0, 0] == x[0, 2, 1, 0]  # the first window begins at the shift


@pytest.mark.parametrize("make", [timm_swin, hugging], ids=["timm", "transformers"])
@pytest.mark.parametrize("name", VISION)
def test_regions_of_shifted_windows_are_what_the_mask_leaves(make, name):
    """Each region by itself, with its own grid, found from the original's mask: tokens of one region see each other and no others."""
    model, seen = make(), {}
    subquad.swap(model, name, layers=[1], scope="window")
    module = swapped(model)[1].eval()
    for parameter in module.mechanism.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0], mask=[*args[1:], *kwargs.values()][0]), with_kwargs=True
    )
    call(model, torch.randn(1, 3, 56, 56))
    x, mask = seen["x"], seen["mask"]
    assert x.shape[1] == 16 and mask.shape == (16, 16, 16)
    with torch.no_grad():
        found, sizes = module.heads_output(x, mask), set()
        q, k, v = module.project(x)
        for window in range(16):
            for token in range(16):
                group = (mask[window, token] == 0).nonzero()[:, 0]
                rows, columns = (group // 4).unique().numel(), (group % 4).unique().numel()
                sizes.add((rows, columns))
                a, b, c = (t[window, group][None] for t in (q, k, v))
                expected = module.mechanism(a, b, c, grid=(rows, columns)).flatten(2)[0]
                assert torch.allclose(found[window, group], expected, atol=1e-5)
    assert sizes == {(4, 4), (4, 2), (2, 4), (2, 2)}


@pytest.mark.parametrize("make", [timm_swin, hugging], ids=["timm", "transformers"])
@pytest.mark.parametrize("name", ["toy-rows", "rala", "softmax"])
def test_image_scope_is_the_mechanism_on_the_whole_grid(make, name):
    """In a shifted layer, whose windows hold zeros too: 6 × 11 tokens, and windows of 4 × 4."""
    model, seen = make(), {}
    subquad.swap(model, name)
    module = swapped(model)[1]
    block = module.block
    module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    norm = getattr(block, "norm1", None) or block.layernorm_before
    norm.register_forward_hook(lambda _, args, output: seen.update(tokens=output))
    call(model, torch.randn(2, 3, 24, 44))
    tokens = seen["tokens"].reshape(2, 66, 16)
    with torch.no_grad():
        given = {"grid": (6, 11)} if name != "softmax" else {}
        expected = module.mechanism(*module.project(tokens), **given).reshape(2, 6, 11, 16)
        found = module.windows().join(module.heads_output(seen["x"]))
    assert module.windows().shift == (2, 2) and torch.allclose(found, expected, atol=1e-5)
    assert "without the relative position bias" in repr(module)


@pytest.mark.parametrize("cls", ["SwinModel", "SwinForImageClassification"])
def test_transformers_round_trip(cls, tmp_path):
    from transformers import AutoModel, AutoModelForImageClassification

    model, images = hugging(cls), torch.randn(1, 3, 56, 56)
    subquad.swap(model, "rala", layers={0: "inline", 1: {"name": "rala", "scope": "window"}, 2: "softmax"}, scope="image")
    model.save_pretrained(tmp_path / "swapped")
    auto = AutoModel if cls == "SwinModel" else AutoModelForImageClassification
    again = auto.from_pretrained(tmp_path / "swapped").eval()
    assert type(again) is type(model) and again.config.model_type == "subquad_swin"
    assert [m.scope for m in swapped(again).values()] == ["image", "window", "image"]
    assert torch.allclose(call(again, images), call(model, images), rtol=1e-5, atol=1e-5)
    assert "3 of 4 layers" in (tmp_path / "swapped" / "README.md").read_text()


def test_training_checkpointing_and_resizing():
    model, images = timm_swin(drop_path_rate=0.0), torch.randn(2, 3, 56, 56)
    subquad.swap(model, "rala", layers=[0, 3])
    subquad.swap(model, "softmax", layers=[1, 2], scope="window").train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0]["layers.0.blocks.1.attn.relative_position_bias_table"].abs().max() > 0
    assert all(torch.allclose(g, grads[1][name], rtol=1e-4, atol=1e-4) for name, g in grads[0].items())

    plain = timm_swin(img_size=64)
    twin = subquad.swap(copy.deepcopy(plain), "softmax", scope="window")
    for one in (plain, twin):
        one.set_input_size((128, 96))
    wide = torch.randn(1, 3, 128, 96)
    assert torch.allclose(call(twin, wide), call(plain, wide), atol=1e-5)
    assert torch.equal(call(subquad.restore(twin), wide), call(plain, wide))


def test_distillation_reads_the_teachers_windows():
    from subquad.convert.transfer import lessons

    teacher = hugging("SwinModel")
    student = subquad.swap(copy.deepcopy(teacher), "l2vit", layers=[1])
    with lessons(student, teacher, swapped(student)) as teach:
        first, tokens = teach({"pixel_values": torch.randn(1, 3, 64, 40)})
    assert 0 < first[0] < 10 and tokens == 16 * 3 * 4  # windows of 4 × 4, 4 down and 3 across


def test_wrong_use_is_one_line():
    def refuses(message, action):
        with pytest.raises(InputError) as error:
            action()
        assert message in str(error.value) and "\n" not in str(error.value)

    from timm.models.swin_transformer_v2 import SwinTransformerV2

    model = hugging()
    refuses("scope: got 'all'; expected 'image' or 'window'", lambda: subquad.swap(model, "rala", scope="all"))
    refuses("'gla', which is causal only", lambda: subquad.swap(model, "gla"))
    assert not swapped(model)
    v2 = SwinTransformerV2(img_size=32, window_size=4, num_classes=2, **SIZE)
    refuses("4 × WindowAttention", lambda: subquad.swap(v2, "rala"))
    subquad.swap(model, "softmax", scope="window")
    refuses("relative position bias for 16 tokens", lambda: model(torch.randn(1, 3, 8, 8)))
