"""InLine networks against published sizes and written-out layers in float64; positions; windows; released checkpoints' names."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import subquad
from subquad import InputError
from subquad.models.vision import inline, vision_model
from subquad.models.vision.inline import InLineAttend, MapAttend, PatchMerging, ShiftedWindowAttend
from subquad.models.vision.released import load_released

DEIT = {"img_size": 64, "dim": 16, "depth": 2, "heads": 2, "num_classes": 7, "drop_path_rate": 0.0}
SWIN = {"dims": (8, 16, 24, 32), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4), "linear": (2, 1, 0, 0), "window": 3, "num_classes": 7}
NAMES = [*inline.DEIT, *inline.SWIN]


def spread(module):
    """Weights large enough that every part of it shows in the output."""
    for p in module.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else p + torch.randn_like(p) / 4
    return module


def near(found, expected, tolerance=1e-9):
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- sizes ----------------------------------------------------------------------------------------------------------


class Pass(nn.Module):
    """Values as they come, and a count of the multiply-adds that linear attention would have had."""

    def __init__(self, attend, counts):
        super().__init__()
        self.heads, self.head_dim, self.counts = attend.heads, attend.head_dim, counts

    def forward(self, q, k, v, **_):
        self.counts.append(2 * q.shape[1] * self.heads * self.head_dim**2)
        return v


@pytest.mark.parametrize(
    "name, side, parameters, published, multiply_adds",
    [
        ("inline_deit_tiny", 224, 6_477_736, 6.5, 1.1),
        ("inline_deit_small", 288, 16_734_760, 16.7, 5.0),
        ("inline_deit_base", 448, 23_797_096, 23.8, 17.2),
        ("inline_swin_tiny", 224, 29_223_544, 29.2, 4.5),  # published as 30 M, which the authors' code has not either
        ("inline_swin_small", 224, 49_793_296, 49.8, 8.7),
        ("inline_swin_base", 224, 88_350_120, 88.4, 15.4),
    ],
)
def test_sizes_as_published(name, side, parameters, published, multiply_adds):
    """Of convolutions, projections and attention, in 10⁹; parameters of the authors' code to the last, published in 10⁶."""
    counts = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = vision_model(name)
        for module in model.modules():
            if isinstance(module, InLineAttend):
                module.attend = Pass(module.attend, counts)
        model(torch.empty(1, 3, side, side))
    found = sum(p.numel() for p in model.parameters())
    assert found == parameters and round(found / 1e6, 1) == published
    assert round(counter.get_total_flops() / 2e9 + sum(counts) / 1e9, 1) == multiply_adds


@pytest.mark.parametrize("name", NAMES)
def test_timm_makes_every_variant(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=11, in_chans=5, drop_path_rate=0.3)
    assert model.get_classifier().out_features == 11 == model.num_classes
    blocks = list(model.blocks) if "deit" in name else [block for stage in model.stages for block in stage.blocks]
    assert blocks[-1].drop_path.rate == pytest.approx(0.3) and blocks[0].drop_path.rate == 0
    modules, config = dict(model.named_modules()), model.pretrained_cfg
    assert modules[config["first_conv"]].in_channels == 5 and modules[config["classifier"]] is model.get_classifier()
    side = {"inline_deit_small": 288, "inline_deit_base": 448}.get(name, 224)
    assert config["input_size"] == (3, side, side)
    linear = {"inline_swin_tiny": [2, 2, 6, 0], "inline_swin_small": [2, 2, 0, 0], "inline_swin_base": [2, 2, 2, 0]}.get(name, [12])
    used = [isinstance(block.attn, InLineAttend) for block in blocks]
    stages = [used] if "deit" in name else [[isinstance(block.attn, InLineAttend) for block in stage.blocks] for stage in model.stages]
    assert [sum(stage) for stage in stages] == linear and all(sorted(stage, reverse=True) == stage for stage in stages)


# ---- layers, written out ----------------------------------------------------------------------------------------------


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def grouped(conv, x, heads):
    """A 1×1 grouped convolution of vectors ``[B, C]``, head by head."""
    parts = zip(x.chunk(heads, -1), conv.weight[..., 0].chunk(heads), conv.bias.chunk(heads))
    return torch.cat([part @ weight.T + bias for part, weight, bias in parts], -1)


def written_layer(layer, x, grid, extra, heads):
    """Explicit weights that sum to one, and a 3×3 correlation written as nine shifts."""
    q, k, v = linear(layer.qkv, x).chunk(3, -1)
    qh, kh, vh = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    tokens = x.shape[1]
    scores = qh @ kh.mT / (qh.shape[-1] ** 0.5 * tokens)
    weights = scores - scores.mean(-1, keepdim=True) + 1 / tokens
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    o = (weights @ vh).transpose(1, 2).reshape(x.shape)
    hidden = F.gelu(grouped(layer.local.predict[0], x.mean(1), heads))
    w = grouped(layer.local.predict[2], hidden, heads).unflatten(-1, (-1, 3, 3))  # [B, C, 3, 3]
    image = v[:, extra:].unflatten(1, grid)
    padded = F.pad(image, (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + grid[0], j : j + grid[1]] * w[:, :, i, j][:, None, None] for i in range(3) for j in range(3)]
    o[:, extra:] += torch.stack(shifted).sum(0).flatten(1, 2)
    return linear(layer.proj, o)


@pytest.mark.parametrize("extra", [0, 1])
def test_layer_is_its_definition(extra):
    """Two images get two convolutions; a class token enters the mean and the attention, not the convolution."""
    layer, grid = spread(InLineAttend(16, 2, extra)).double(), (3, 5)
    x = torch.randn(2, extra + 15, 16, dtype=torch.float64)
    assert near(layer(x, grid), written_layer(layer, x, grid, extra, 2))
    if not extra:
        on_maps = MapAttend(16, 2).double()
        on_maps.load_state_dict(layer.state_dict())
        assert near(on_maps(x.unflatten(1, grid)), written_layer(layer, x, grid, 0, 2).unflatten(1, grid))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (3, 8), (2, 2)])
def test_windows_are_their_definition(grid, shifted):
    """Pair by pair: attended to if in one window of the map moved by half a window, unless only by going around the map."""
    layer, (rows, columns) = spread(ShiftedWindowAttend(16, 2, 3, shifted)).double(), grid
    x = torch.randn(2, rows, columns, 16, dtype=torch.float64)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    together = torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    for place, count in ((row, rows), (column, columns)):
        shift = 1 if shifted and count > 3 else 0
        window = (place - shift).div(3, rounding_mode="floor")  # places before the shift are a window of their own
        together &= window[:, None] == window
    down, across = ((place[:, None] - place).clamp(-2, 2) + 2 for place in (row, column))  # those beyond a window are not read
    bias = layer.bias[down * 5 + across].permute(2, 0, 1)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2) for t in linear(layer.qkv, x).chunk(3, -1))
    scores = (q @ k.mT / 8**0.5 + bias).masked_fill(~together, -torch.inf)
    expected = linear(layer.proj, (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
    assert near(layer(x), expected)


def test_patch_merging_takes_neighbours_column_by_column():
    merge = PatchMerging(2, 8).double()
    nn.init.eye_(merge.reduction.weight)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 1))
    expected = torch.cat([padded[:, :, 2:, 2:][..., r, c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
    assert near(merge(x)[0, :, 1, 1], F.layer_norm(expected, (8,))[0])


# ---- positions ------------------------------------------------------------------------------------------------------


def test_positions_are_interpolated_and_the_class_token_keeps_its_own():
    model = spread(vision_model("inline_deit_tiny", **DEIT)).eval()
    assert model.positions((4, 4)) is model.pos_embed
    wide = model.positions((6, 9))
    assert wide.shape == (1, 55, 16) and torch.equal(wide[:, 0], model.pos_embed[:, 0])
    model.pos_embed.data[:, 1:] = torch.arange(16.0) + 1  # the same everywhere
    assert near(model.positions((6, 9))[0, 1:], (torch.arange(16.0) + 1).expand(54, 16), 1e-5)
    model.pos_embed.data[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # rows 0 … 3: between them, a line
    rows = model.positions((8, 4))[0, 1:].view(8, 4, 16)
    assert (rows == rows[:, :1]).all() and near(rows[2:6, 0, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), 0.05)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 90, 130)).shape == (1, 7)


def test_images_are_extended_to_whole_patches():
    model, images = spread(vision_model("inline_deit_tiny", **DEIT)).eval(), torch.randn(1, 3, 50, 64)
    assert near(model(images), model(F.pad(images, (0, 0, 0, 14))), 1e-5)


# ---- released checkpoints ---------------------------------------------------------------------------------------------


def layer_keys(name, dim, heads, linear):
    keys = {
        f"{name}.norm1.weight": (dim,), f"{name}.norm1.bias": (dim,), f"{name}.norm2.weight": (dim,), f"{name}.norm2.bias": (dim,),
        f"{name}.attn.qkv.weight": (3 * dim, dim), f"{name}.attn.qkv.bias": (3 * dim,), f"{name}.attn.proj.weight": (dim, dim),
        f"{name}.attn.proj.bias": (dim,), f"{name}.mlp.fc1.weight": (4 * dim, dim), f"{name}.mlp.fc1.bias": (4 * dim,),
        f"{name}.mlp.fc2.weight": (dim, 4 * dim), f"{name}.mlp.fc2.bias": (dim,),
    }  # fmt: skip
    if linear:
        keys |= {f"{name}.attn.residual.0.weight": (dim, dim // heads, 1), f"{name}.attn.residual.0.bias": (dim,)}
        keys |= {f"{name}.attn.residual.2.weight": (9 * dim, dim // heads, 1), f"{name}.attn.residual.2.bias": (9 * dim,)}
    return keys


def deit_keys():
    keys = {"cls_token": (1, 1, 16), "pos_embed": (1, 17, 16), "patch_embed.proj.weight": (16, 3, 16, 16), "patch_embed.proj.bias": (16,)}
    keys |= {"norm.weight": (16,), "norm.bias": (16,), "head.weight": (7, 16), "head.bias": (7,)}
    return keys | layer_keys("blocks.0", 16, 2, True) | layer_keys("blocks.1", 16, 2, True)


def swin_keys():
    keys = {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,), "patch_embed.norm.weight": (8,)}
    keys |= {"patch_embed.norm.bias": (8,), "norm.weight": (32,), "norm.bias": (32,), "head.weight": (7, 32), "head.bias": (7,)}
    for i, (dim, heads) in enumerate(zip(SWIN["dims"], SWIN["heads"])):
        for j in range(2):
            linear = j < SWIN["linear"][i]
            keys |= layer_keys(f"layers.{i}.blocks.{j}", dim, heads, linear)
            if not linear:
                keys[f"layers.{i}.blocks.{j}.attn.relative_position_bias_table"] = (25, heads)
                keys[f"layers.{i}.blocks.{j}.attn.relative_position_index"] = (9, 9)
                keys[f"layers.{i}.blocks.{j}.attn_mask"] = (4, 9, 9)
        if i < 3:
            merge = f"layers.{i}.downsample"
            keys |= {f"{merge}.reduction.weight": (SWIN["dims"][i + 1], 4 * dim), f"{merge}.norm.weight": (4 * dim,)}
            keys |= {f"{merge}.norm.bias": (4 * dim,)}
    return keys


def l2vit_keys():
    dims, keys = SWIN["dims"], {"norm.weight": (32,), "norm.bias": (32,), "head.weight": (7, 32), "head.bias": (7,)}

    def conv(name, out, into, side):
        keys.update({f"{name}.weight": (out, into, side, side), f"{name}.bias": (out,)})

    def batch_norm(name, dim):
        keys.update({f"{name}.{part}": (dim,) for part in ("weight", "bias", "running_mean", "running_var")})
        keys[f"{name}.num_batches_tracked"] = ()

    conv("downsample_layers.0.proj.proj.0", 4, 3, 3), batch_norm("downsample_layers.0.proj.proj.1", 4)
    conv("downsample_layers.0.proj.proj.3", 8, 4, 3), batch_norm("downsample_layers.0.proj.proj.4", 8)
    for i, dim in enumerate(dims):
        before = dims[i - 1] if i else dim
        keys |= {f"downsample_layers.{i}.norm.weight": (before,), f"downsample_layers.{i}.norm.bias": (before,)}
        if i:
            conv(f"downsample_layers.{i}.proj", dim, before, 2)
        for j in range(2):
            block = f"stages.{i}.{j}"
            keys |= layer_keys(block, dim, 1, False)
            conv(f"{block}.cpe.0.proj", dim, 1, 3)
            if j == 0:
                conv(f"{block}.cpe.1.proj", dim, 1, 3)
            else:
                keys |= {f"{block}.attn.temperature": (SWIN["heads"][i], 1, 1)}
                keys |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
                conv(f"{block}.local_mp.conv1", dim, 1, 7), conv(f"{block}.local_mp.conv2", dim, 1, 7)
                batch_norm(f"{block}.local_mp.bn", dim)
    return keys


L2VIT = {name: SWIN[name] for name in ("dims", "depths", "heads", "num_classes")}
RELEASED = {"inline_deit_tiny": (DEIT, deit_keys), "inline_swin_tiny": (SWIN, swin_keys), "l2vit_t": (L2VIT, l2vit_keys)}
PLACES = {
    "inline_deit_tiny": {
        "blocks.1.attn.residual.2.weight": "blocks.1.attn.local.predict.2.weight", "blocks.0.mlp.fc2.bias": "blocks.0.ffn.2.bias",
        "patch_embed.proj.weight": "stem.1.weight", "norm.bias": "norm.bias", "head.weight": "head.fc.weight", "pos_embed": "pos_embed",
    },
    "inline_swin_tiny": {
        "layers.1.blocks.1.attn.relative_position_bias_table": "stages.1.blocks.1.attn.bias",
        "layers.0.blocks.1.attn.residual.0.bias": "stages.0.blocks.1.attn.local.predict.0.bias",
        "layers.2.downsample.reduction.weight": "stages.3.downsample.reduction.weight", "norm.weight": "head.norm.weight",
        "layers.0.downsample.norm.bias": "stages.1.downsample.norm.bias", "patch_embed.norm.weight": "stem.2.weight",
    },
    "l2vit_t": {
        "downsample_layers.0.proj.proj.4.running_var": "stem.5.running_var", "downsample_layers.0.norm.bias": "stem.6.bias",
        "downsample_layers.2.norm.weight": "stages.2.downsample.0.weight", "downsample_layers.3.proj.bias": "stages.3.downsample.2.bias",
        "stages.1.0.cpe.1.proj.weight": "stages.1.blocks.0.position2.weight", "stages.2.1.mlp.fc1.bias": "stages.2.blocks.1.ffn.0.bias",
        "stages.3.1.attn.temperature": "stages.3.blocks.1.attn.attend.temperature", "head.bias": "head.fc.bias",
        "stages.0.1.local_mp.bn.running_mean": "stages.0.blocks.1.local.norm.running_mean", "norm.weight": "head.norm.weight",
        "stages.0.1.local_mp.conv2.weight": "stages.0.blocks.1.local.conv2.weight",
        "stages.3.0.cpe.0.proj.bias": "stages.3.blocks.0.position.bias",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_names(tmp_path, name):
    """Every tensor of a checkpoint under the authors' names finds its place, and no other is left."""
    options, keys = RELEASED[name]
    w = {key: torch.randn(shape) if shape else torch.tensor(5) for key, shape in keys().items()}
    torch.save({"model": w, "epoch": 299}, tmp_path / "released.pth")
    model = load_released(vision_model(name, **options), tmp_path / "released.pth")
    own = model.state_dict()
    for theirs, ours in PLACES[name].items():
        assert torch.equal(own[ours], w[theirs].reshape(own[ours].shape))
    assert len(own) == len([key for key in w if "mask" not in key and "position_index" not in key])
    del w[next(iter(PLACES[name]))]
    torch.save(w, tmp_path / "less.pth")
    with pytest.raises(InputError, match=next(iter(PLACES[name].values()))):
        load_released(model, tmp_path / "less.pth")


def test_a_network_without_released_weights(tmp_path):
    with pytest.raises(InputError, match="Linear"):
        load_released(nn.Linear(2, 2), tmp_path / "none.pth")


@pytest.mark.parametrize(
    "argument, name, options",
    [
        ("img_size", "inline_deit_tiny", {"img_size": 15}),
        ("img_size", "inline_deit_tiny", {"img_size": 64.0}),
        ("heads", "inline_deit_tiny", {"heads": 5}),
        ("depth", "inline_deit_tiny", {"depth": 0}),
        ("patch_size", "inline_deit_tiny", {"patch_size": 0}),
        ("drop_path_rate", "inline_deit_tiny", {"drop_path_rate": -0.1}),
        ("global_pool", "inline_deit_tiny", {"global_pool": "max"}),
        ("linear", "inline_swin_tiny", {"linear": (2, 2, 7, 0)}),
        ("linear", "inline_swin_tiny", {"linear": (2, 2)}),
        ("window", "inline_swin_tiny", {"window": 1}),
        ("heads", "inline_swin_tiny", {"heads": (3, 6, 12, 23)}),
        ("name", "inline_swin_big", {}),
    ],
)
def test_refuses(argument, name, options):
    with pytest.raises(subquad.InputError) as error:
        vision_model(name, **options)
    assert error.value.argument == argument
