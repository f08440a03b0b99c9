"""Swapped encoders: transformers' ViT and DeiT, timm's VisionTransformer."""

import copy

import pytest
import torch

import subquad
from subquad import InputError
from subquad.convert.swap import swapped

pytestmark = [pytest.mark.usefixtures("toys"), pytest.mark.filterwarnings("ignore")]
IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32, "patch_size": 8}


def hugging(family):
    from transformers import AutoConfig, DeiTForImageClassification, ViTForImageClassification

    config = AutoConfig.for_model(family, **IMAGE, num_labels=5, initializer_range=0.3)
    return {"vit": ViTForImageClassification, "deit": DeiTForImageClassification}[family](config).eval()


def timm_model(**changes):
    from timm.models.vision_transformer import VisionTransformer

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5, "dynamic_img_size": True}
    model = VisionTransformer(**{**options, **changes}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("bias"):  # ones and zeros would hide a dropped norm or bias
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


MODELS = {
    "vit": lambda: hugging("vit"),
    "deit": lambda: hugging("deit"),
    "timm": timm_model,
    "timm-registers": lambda: timm_model(reg_tokens=4, qk_norm=True, qkv_bias=False),
    "timm-scale-norm": lambda: timm_model(scale_attn_norm=True, proj_bias=False),
    "timm-no-prefix": lambda: timm_model(class_token=False, global_pool="avg"),
}


def read(output):
    return getattr(output, "logits", output)


def call(model, images):
    wide = {"interpolate_pos_encoding": True} if hasattr(model, "config") and images.shape[-2:] != (32, 32) else {}
    with torch.no_grad():
        return read(model(images, **wide))


@pytest.mark.parametrize("kind", MODELS)
def test_exact_attention_changes_nothing_and_restore_is_exact(kind):
    model = MODELS[kind]()
    images, wide = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 48, 24)
    before, before_wide, names = call(model, images), call(model, wide), list(model.state_dict())
    assert subquad.swap(model, "toy-softmax", layers=[0, 2]) is model
    assert list(swapped(model)) == [0, 2] and not swapped(model)[0].mechanism.causal
    for after, original in ((call(model, images), before), (call(model, wide), before_wide)):
        assert (after - original).abs().max() <= 1e-5 * original.abs().max()
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    subquad.restore(model)
    assert torch.equal(call(model, images), before) and not swapped(model) and list(swapped(twin)) == [0, 2]
    assert (call(twin, wide) - before_wide).abs().max() <= 1e-5 * before_wide.abs().max()
    subquad.restore(twin)
    for restored in (model, twin):
        assert not any("subquad" in name for module in restored.modules() for name in vars(module))
        assert not any(module._forward_hooks for module in restored.modules())


@pytest.mark.parametrize("kind", MODELS)
def test_heads_output_is_what_the_projection_reads(kind):
    model, images = MODELS[kind](), torch.randn(2, 3, 32, 32)
    subquad.swap(model, "toy-softmax", layers=[1])
    module = swapped(model)[1]
    read = []
    hooks = [
        getattr(module.original, module.projection).register_forward_pre_hook(lambda _, args: read.append(args[0])),
        module.register_forward_pre_hook(lambda _, args, kwargs: read.append((args, kwargs)), with_kwargs=True),
    ]
    call(model, images)
    for hook in hooks:
        hook.remove()
    (args, kwargs), projected = read
    with torch.no_grad():
        assert torch.equal(module.heads_output(*args, **kwargs), projected)
        module.original(args[0])  # works on its own, for a teacher
    assert module.path in dict(model.named_modules())


@pytest.mark.parametrize("kind", MODELS)
def test_the_grid_is_that_of_the_image_at_hand(kind):
    """toy-rows averages values over each row of patches; prefix tokens read all tokens by softmax."""
    model, images = MODELS[kind](), torch.randn(2, 3, 24, 56)  # 3 × 7 patches
    subquad.swap(model, "toy-rows", layers=[1])
    module, seen = swapped(model)[1], {}
    module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    call(model, images)
    x = seen["x"]
    prefix = x.shape[1] - 21
    assert prefix == {"vit": 1, "deit": 2, "timm": 1, "timm-registers": 5, "timm-scale-norm": 1, "timm-no-prefix": 0}[kind]
    with torch.no_grad():
        if hasattr(module, "qkv"):
            q, k, v = module.qkv(x).reshape(2, -1, 3, 4, 8).unbind(2)
            q, k = module.q_norm(q), module.k_norm(k)
        else:
            q, k, v = (p(x).reshape(2, -1, 4, 8) for p in (module.q_proj, module.k_proj, module.v_proj))
        weights = (torch.einsum("bnhd,bmhd->bhnm", q[:, :prefix], k) * 8**-0.5).softmax(-1)
        first = torch.einsum("bhnm,bmhd->bnhd", weights, v)
        rows = [v[:, prefix + 7 * r : prefix + 7 * (r + 1)].mean(1, keepdim=True).expand(-1, 7, -1, -1) for r in range(3)]
        expected = torch.cat([first, *rows], 1).flatten(2)
        if hasattr(module, "norm"):
            expected = module.norm(expected)
        assert torch.allclose(module.heads_output(x), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "deit"])
def test_transformers_round_trip(family, tmp_path):
    from transformers import AutoModelForImageClassification

    images = torch.randn(2, 3, 32, 32)
    hugging(family).save_pretrained(tmp_path / "plain")  # in the checkpoint's own names, which are not the modules'
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    subquad.swap(model, "toy-rows", layers="2:1").save_pretrained(tmp_path / "swapped")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "swapped").eval()
    assert type(again) is type(model) and again.config.model_type == f"subquad_{family}" and list(swapped(again)) == [0, 1]
    assert torch.equal(call(again, images), call(model, images))
    wide = torch.randn(1, 3, 40, 24)
    assert torch.allclose(call(again, wide), call(model, wide), atol=1e-5)


def test_timm_state_dict():
    model, images = timm_model(), torch.randn(2, 3, 32, 32)
    subquad.swap(model, "toy-softmax")
    other = subquad.swap(timm_model(), "toy-softmax")
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other, images), call(model, images))


def test_training_and_checkpointing():
    model, images = timm_model(), torch.randn(2, 3, 32, 32)
    subquad.swap(model, "toy-rows").train()
    model(images).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert plain["blocks.1.attn.qkv.weight"].abs().max() > 0
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).square().sum().backward()
    for name, p in model.named_parameters():
        if name in plain:
            assert torch.allclose(p.grad, plain[name], atol=1e-5)


def test_wrong_use_is_one_line():
    from timm.models.eva import Eva

    def refuses(message, action):
        with pytest.raises(InputError) as error:
            action()
        assert message in str(error.value) and "\n" not in str(error.value)

    model, images = timm_model(), torch.randn(1, 3, 32, 32)
    refuses("'toy-causal-only', which is causal only; expected a bidirectional mechanism", lambda: subquad.swap(model, "toy-causal-only"))
    refuses("causal: got True", lambda: subquad.swap(model, "toy-softmax", causal=True))
    assert not swapped(model)
    subquad.swap(model, "toy-softmax")
    refuses("is_causal=True", lambda: model.forward_features(images, is_causal=True))
    refuses("attention_mask", lambda: model.forward_features(images, attn_mask=torch.ones(17, 17)))
    dropping = subquad.swap(timm_model(patch_drop_rate=0.5), "toy-rows").train()
    refuses("1 + 4 × 4 tokens", lambda: dropping(images))
    eva = Eva(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2)
    refuses("2 × EvaAttention", lambda: subquad.swap(eva, "toy-softmax"))
    vit = subquad.swap(hugging("vit"), "toy-softmax")
    refuses("attention_mask", lambda: vit(images, attention_mask=torch.tensor([[1] * 16 + [0]])))
