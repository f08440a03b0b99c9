"""LightNet networks: sizes by formula, a block written out in float64, and positions that images of any size share."""

import pytest
import timm
import torch

from subquad import InputError
from subquad.layers.md_lrpe import md_lrpe
from subquad.models.vision import lightnet, vision_model
from subquad.models.vision.lightnet import LightNetBlock


def spread(module):
    """Weights large enough that every part of it shows in the output."""
    for p in module.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else p + torch.randn_like(p) / 4
    return module


@pytest.mark.parametrize(
    "name, dim, heads, count", [("lightnet_t", 192, 3, 5_988_148), ("lightnet_s", 384, 6, 22_665_856), ("lightnet_b", 768, 12, 88_092_952)]
)
def test_parameters(name, dim, heads, count):
    with torch.device("meta"):
        model = timm.create_model(name, in_chans=3, drop_path_rate=0.2)
    width = {192: 512, 384: 1024, 768: 2048}[dim]
    block = 4 * dim**2 + 2 * dim * 64 + 3 * dim * width + 3 * dim
    tpe, patches, head = dim**2 + dim + 4 * heads, 768 * dim + dim, 1000 * dim + 1000
    assert sum(p.numel() for p in model.parameters()) == 12 * block + tpe + patches + dim + head == count
    assert model.blocks[-1].drop_path.rate == pytest.approx(0.2) and len(model.blocks) == 12
    assert model.pretrained_cfg["first_conv"] == "stem.1" and model.pretrained_cfg["input_size"] == (3, 224, 224)


def rms(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def swish(x):
    return x * x.sigmoid()


def test_block_is_its_definition():
    """Explicit cosines of the differences of places: half of a head's channels for rows, half for columns."""
    block, grid = spread(LightNetBlock(16, 2, 2.5, 0.0)).double(), (3, 5)
    x = torch.randn(2, 15, 16, dtype=torch.float64)
    normed = rms(block.norm1, x)
    q, k, v = (t.unflatten(-1, (2, 8)) for t in (normed @ block.attn.qkv.weight.T).chunk(3, -1))
    theta = 10000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 4)
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    angle = torch.cat([(place[:, None] - place)[..., None] * theta for place in (row, column)], -1)
    scores = torch.einsum("bnhd,bmhd,nmd->bhnm", swish(q), k.softmax(1), angle.cos())
    o = torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2)
    gate = swish(normed @ block.attn.gate[0].weight.T @ block.attn.gate[1].weight.T)
    y = x + (rms(block.attn.norm, o) * gate) @ block.attn.proj.weight.T
    first, second = (rms(block.norm2, y) @ block.ffn.fc1.weight.T).chunk(2, -1)
    y = y + (swish(first) * second) @ block.ffn.fc2.weight.T
    assert first.shape[-1] == 40 and block.attn.gate[0].out_features == 8
    found = block(x, md_lrpe(grid, 8))
    assert (found - y).abs().max() < 1e-5 * y.abs().max()  # the angles are float32


def test_network_is_its_parts():
    model = spread(vision_model("lightnet_t", dim=16, heads=2, depth=2, num_classes=7, drop_path_rate=0.0)).eval()
    images = torch.randn(2, 3, 40, 64)
    with torch.no_grad():
        x = model.position(model.stem(images).flatten(2).mT, (3, 4))
        for block in model.blocks:
            x = block(x, md_lrpe((3, 4), 8))
        x = rms(model.norm, x)
        assert torch.allclose(model(images), x.mean(1) @ model.head.fc.weight.T + model.head.fc.bias, atol=1e-5)


def test_tokens_know_where_they_are():
    """Patches that are all alike become different tokens, and exchanged patches give another image."""
    model = spread(vision_model("lightnet_t", dim=16, heads=2, depth=2, num_classes=7, drop_path_rate=0.0)).eval()
    with torch.no_grad():
        alike = model.forward_features(torch.ones(1, 3, 64, 64))[0]
        assert torch.pdist(alike).min() > 1e-4
        images = torch.randn(1, 3, 64, 64)
        assert (model(images) - model(images.flip(3))).abs().max() > 1e-2


@pytest.mark.parametrize(
    "argument, options", [("heads", {"dim": 12, "heads": 4}), ("global_pool", {"global_pool": "token"}), ("name", {"name": "lightnet_x"})]
)
def test_refuses(argument, options):
    with pytest.raises(InputError) as error:
        vision_model(options.pop("name", "lightnet_t"), **options)
    assert error.value.argument == argument


def test_sizes_are_those_of_deit():
    assert {name: (v["dim"], v["dim"] // v["heads"]) for name, v in lightnet.VARIANTS.items()} == {
        "lightnet_t": (192, 64), "lightnet_s": (384, 64), "lightnet_b": (768, 64)
    }  # fmt: skip
