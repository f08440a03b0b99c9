"""NaLaFormer and L²ViT against published and hand-derived sizes and written-out blocks in float64; timm's conventions; errors."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from subquad import InputError
from subquad.models.vision import l2vit, nalaformer, vision_model
from subquad.models.vision.l2vit import GlobalBlock, LocalBlock, LocalConcentration, WindowAttend
from subquad.models.vision.nalaformer import NaLaBlock
from subquad.rotary import Rotary

DIMS, DEPTHS, HEADS = (8, 16, 24, 32), (2, 2, 2, 2), (1, 2, 2, 4)
SMALL = {"dims": DIMS, "depths": DEPTHS, "heads": HEADS, "num_classes": 7, "drop_path_rate": 0.0}
EXTRA = {"nalaformer_s": {"head_width": 20, "layer_scale": (1.0,) * 4}, "l2vit_t": {}}
NAMES = list(EXTRA)


def spread(module):
    """Weights large enough that every part of it shows in the output."""
    for p in module.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else p + torch.randn_like(p) / 4
    return module


def small(name, **options):
    return spread(vision_model(name, **{**SMALL, **EXTRA[name], **options}))


def near(found, expected, tolerance=1e-9):
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, count",
    [
        ("nalaformer_xt", {}, 6_142_248),
        ("nalaformer_t", {}, 15_907_752),
        ("nalaformer_t", {"mlp_ratio": 3.5}, 14_933_096),
        ("nalaformer_s", {}, 25_654_184),
        ("nalaformer_b", {}, 52_002_952),
        ("nalaformer_l", {}, 95_426_760),
        ("l2vit_t", {}, 28_596_781),
        ("l2vit_s", {}, 50_199_157),
        ("l2vit_b", {}, 88_577_188),
        ("l2vit_b", {"window": 12}, 88_577_188),
    ],
)
def test_parameters(name, options, count):
    """Counts of the authors' layers, by formula."""
    with torch.device("meta"):
        assert sum(p.numel() for p in vision_model(name, **options).parameters()) == count


@pytest.mark.parametrize("name", [*nalaformer.VARIANTS, *l2vit.VARIANTS])
def test_timm_makes_every_variant(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=11, in_chans=5, drop_path_rate=0.3)
    assert model.get_classifier().out_features == 11 == model.num_classes
    assert model.stages[3].blocks[-1].drop_path.rate == pytest.approx(0.3) and model.stages[0].blocks[0].drop_path.rate == 0
    modules = dict(model.named_modules())
    assert modules[model.pretrained_cfg["first_conv"]].in_channels == 5
    assert modules[model.pretrained_cfg["classifier"]] is model.get_classifier()
    used = [[block.attn.attend.card.name for block in stage.blocks] for stage in model.stages]
    if name.startswith("nala"):
        assert [set(stage) for stage in used] == [{"nalaformer"}, {"nalaformer"}, {"softmax"}, {"softmax"}]
    else:
        assert all(stage == ["softmax", "l2vit"] * (len(stage) // 2) for stage in used)


def test_initial_weights():
    """Convolutions: 0.02. Linear layers: as PyTorch makes them in NaLaFormer, uniform up to 1/√C; 0.02 in L²ViT."""
    nala, l2 = vision_model("nalaformer_xt", depths=(1,) * 4), vision_model("l2vit_t", depths=(2, 1, 1, 1), dims=(96,) * 4, heads=(3,) * 4)
    for conv in (nala.stages[3].downsample[0], l2.stages[1].downsample[2], nala.head.fc, l2.stages[0].blocks[1].attn.qkv, l2.head.fc):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1) and not conv.bias.any()
    for linear in (nala.stages[3].blocks[0].attn.qkvg, nala.head.conv):
        assert 0.95 * 384**-0.5 < linear.weight.abs().max() <= 384**-0.5 and linear.bias.any()


# ---- blocks, written out ----------------------------------------------------------------------------------------------


def depthwise(conv, x):
    side = conv.weight.shape[-1]
    return F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, padding=side // 2, groups=x.shape[-1]).movedim(1, -1)


def normed(layer, x, eps=1e-5):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * layer.weight + layer.bias


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def heads_first(x, heads):
    """``[B, rows, columns, C]`` as ``[B, H, N, D]``."""
    return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def softmax_rows(q, k):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def nala_rows(q, k):
    """Same-sign scores of the definition over their sum, without rotary."""
    norm = q.norm(dim=-1, keepdim=True)
    power, same = 3 * (0.5 + norm.tanh()), (q[:, :, :, None] * k[:, :, None] > 0)
    scores = (((q / norm).abs() ** power)[:, :, :, None] * k.abs()[:, :, None] ** 3 * same).sum(-1)
    return scores / (scores.sum(-1, keepdim=True) + 1e-6 * k.shape[2])


def l2vit_rows(temperature):
    def rows(q, k):
        scores = q.relu() @ k.relu().mT
        return temperature[:, None, None] * scores / scores.sum(-1, keepdim=True).clamp(min=100)

    return rows


def attended(rows, qkv, heads):
    q, k, v = (heads_first(t, heads) for t in qkv.chunk(3, -1))
    return (rows(q, k) @ v).transpose(1, 2).reshape(*qkv.shape[:3], -1)


@pytest.mark.parametrize("mechanism, rows", [("nalaformer", nala_rows), ("softmax", softmax_rows)])
def test_nalaformer_block_is_its_definition(mechanism, rows):
    block = spread(NaLaBlock(16, 2, mechanism, 3.5, 1.0, 0.0)).double()
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    none = Rotary(torch.ones(35, 8), torch.zeros(35, 8), interleaved=True)
    y = x + depthwise(block.position, x)
    qkv, gate = linear(block.attn.qkvg, normed(block.norm1, y, 1e-6)).split((48, 16), -1)
    o = attended(rows, qkv, 2) + depthwise(block.attn.local, qkv[..., 32:])
    y = y + block.gamma1 * linear(block.attn.proj, normed(block.attn.norm, o) * gate * gate.sigmoid())
    y = y + depthwise(block.position2, y)
    h = F.gelu(linear(block.ffn.fc1, normed(block.norm2, y, 1e-6)))
    y = y + block.gamma2 * linear(block.ffn.fc2, h + depthwise(block.ffn.conv, h))
    assert near(block(x, none), y)


def feed_forward(block, y):
    return y + linear(block.ffn[2], F.gelu(linear(block.ffn[0], normed(block.norm2, y))))


@pytest.mark.parametrize("scale", [1.0, 10.0])  # the sum of scores is below, then above, its floor
def test_global_block_is_its_definition(scale):
    block = spread(GlobalBlock(16, 2, 4.0, 0.0)).double().eval()
    block.norm1.weight.data *= scale
    lcm = block.local
    lcm.norm.running_mean, lcm.norm.running_var = torch.randn(16).double(), torch.rand(16).double() + 0.5
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    y = x + depthwise(block.position, x)
    y = y + linear(block.attn.proj, attended(l2vit_rows(block.attn.attend.temperature), linear(block.attn.qkv, normed(block.norm1, y)), 2))
    h = F.gelu(depthwise(lcm.conv1, normed(block.norm3, y)))
    h = (h - lcm.norm.running_mean) / (lcm.norm.running_var + 1e-5).sqrt() * lcm.norm.weight + lcm.norm.bias
    assert near(block(x), feed_forward(block, y + depthwise(lcm.conv2, h)))


def test_local_block_is_its_definition():
    """Windows of 3 × 3 on 5 × 7: those at the right and bottom hold zeros put there after the norm, which are attended to."""
    block = spread(LocalBlock(16, 2, 3, 4.0, 0.0)).double()
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    y = x + depthwise(block.position, x)
    padded = torch.zeros(2, 6, 9, 16, dtype=torch.float64)
    padded[:, :5, :7] = normed(block.norm1, y)
    o = torch.zeros_like(padded)
    for r in (0, 3):
        for c in (0, 3, 6):
            window = padded[:, r : r + 3, c : c + 3]
            o[:, r : r + 3, c : c + 3] = linear(block.attn.proj, attended(softmax_rows, linear(block.attn.qkv, window), 2))
    y = y + o[:, :5, :7]
    y = y + depthwise(block.position2, y)
    assert near(block(x), feed_forward(block, y))


def test_a_window_as_large_as_the_map_is_full_attention():
    attend, x = spread(WindowAttend(16, 2, 6)).double(), torch.randn(2, 6, 6, 16, dtype=torch.float64)
    q, k, v = (heads_first(t, 2) for t in linear(attend.qkv, x).chunk(3, -1))
    full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    assert near(attend(x), linear(attend.proj, full))
    attend.window = 3
    assert not near(attend(x), linear(attend.proj, full), 1e-2)


def test_local_concentration_with_zero_second_convolution_adds_nothing():
    block, x = spread(GlobalBlock(16, 2, 4.0, 0.0)), torch.randn(2, 5, 7, 16)
    assert sum(p.numel() for p in LocalConcentration(16).parameters()) == 102 * 16
    seen = []
    block.norm3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(x)
    assert not torch.equal(*seen)
    seen.clear()
    nn.init.zeros_(block.local.conv2.weight), nn.init.zeros_(block.local.conv2.bias)
    block(x)
    assert torch.equal(*seen)


# ---- what a model does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows, columns", [(224, 224), (96, 160), (32, 32), (33, 50)])
def test_shapes(name, rows, columns):
    model = small(name, in_chans=4).eval()
    with torch.no_grad():
        images = torch.randn(2, 4, rows, columns)
        last, features = model.forward_intermediates(images)
        assert model(images).shape == (2, 7)
        assert torch.equal(last, features[-1]) and torch.equal(last, model.forward_features(images))
    sides = [(-(-rows // s), -(-columns // s)) for s in (4, 8, 16, 32)]
    assert [f.shape for f in features] == [(2, dim, *side) for dim, side in zip(DIMS, sides)]


def test_l2vit_pads_images_and_grids_after_the_norm():
    """Of 33 columns, the stem sees 36; of 9 columns, the second stage's convolution sees 10, the last one zero."""
    model, images = small("l2vit_t").eval(), torch.randn(1, 3, 32, 33)
    assert torch.equal(model.stem(images), model.stem(F.pad(images, (0, 3))))
    down, x = model.stages[1].downsample, torch.randn(1, 8, 8, 9)
    expected = F.conv2d(F.pad(down[0](x), (0, 1)), down[2].weight, down[2].bias, 2)
    assert near(down(x), expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = small(name).double().eval()  # in training, batch norms would hide the biases before them
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    whole = small(name).eval()
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), **SMALL, **EXTRA[name]).eval()
    assert model.feature_info.channels() == [8, 24] and model.feature_info.reduction() == [4, 16]
    model.model.load_state_dict({n: t for n, t in whole.state_dict().items() if not n.startswith(("head", "stages.3"))})
    images = torch.randn(1, 3, 96, 160)
    found = model(images)
    assert [f.shape for f in found] == [(1, 8, 24, 40), (1, 24, 6, 10)]
    assert all(torch.equal(a, b) for a, b in zip(found, whole.forward_intermediates(images, (0, 2))[1]))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients_and_recomputes(name):
    model, images, calls, grads, runs = small(name, drop_path_rate=0.5), torch.randn(4, 3, 32, 64), [], [], []
    for stage in model.stages:
        for block in stage.blocks:
            block.position.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        runs.append(len(calls))
    largest = max(g.abs().max() for g in grads[0])
    assert runs == [sum(DEPTHS), 2 * sum(DEPTHS)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * largest) for a, b in zip(*grads))


@pytest.mark.parametrize("name, width", [("nalaformer_s", 20), ("l2vit_t", 32)])
def test_head_and_its_classifier(name, width):
    from timm.models import group_parameters

    model, images = small(name).eval(), torch.randn(2, 3, 64, 64)
    before = model.forward_head(model.forward_features(images), pre_logits=True)
    assert before.shape == (2, model.head_hidden_size) == (2, width)
    assert near(model(images), linear(model.head.fc, before), 1e-5)
    if name == "l2vit_t":  # the norm comes before the mean
        tokens = normed(model.head.norm, model.forward_features(images).movedim(1, -1))
        assert near(before, tokens.mean((1, 2)), 1e-5)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5) and model.num_classes == 5 and model.get_classifier().out_features == 5
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()} and model.no_weight_decay() == set()
    model.reset_classifier(0, global_pool="")
    assert near(model(images).mean((2, 3)), before, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "argument, options, images",
    [
        ("images", {}, torch.zeros(1, 3, 31, 64)),
        ("images", {}, torch.zeros(1, 4, 64, 64)),
        ("images", {}, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)),
        ("dims", {"dims": (8, 16, 24)}, None),
        ("heads", {"heads": (1, 2, 5, 4)}, None),
        ("depths", {"depths": (1, 0, 1, 1)}, None),
        ("drop_path_rate", {"drop_path_rate": 1.0}, None),
        ("num_classes", {"num_classes": -1}, None),
    ],
)
def test_refuses(name, argument, options, images):
    with pytest.raises(InputError) as error:
        small(name, **options)(images)
    assert error.value.argument == argument


@pytest.mark.parametrize(
    "argument, use",
    [
        ("window", lambda: small("l2vit_t", window=0)),
        ("window", lambda: small("l2vit_t", window=3.5)),
        ("name", lambda: small("nalaformer_s", mechanisms=("nalaformerr",) * 4)),
        ("name", lambda: vision_model("nalaformer_x")),
        ("name", lambda: vision_model("l2vit_l")),
    ],
)
def test_refuses_of_its_own(argument, use):
    with pytest.raises(InputError) as error:
        use()
    assert error.value.argument == argument
