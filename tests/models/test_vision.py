"""RAVLT and MAViT against their papers' figures and a written-out model in float64; timm's conventions; released checkpoints."""

import argparse
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subquad import InputError
from subquad.models.vision import vision_model
from subquad.models.vision.ravlt import VARIANTS
from subquad.models.vision.released import load_released

DIMS, DEPTHS, HEADS = (8, 16, 24, 32), (1, 2, 2, 1), (1, 2, 2, 4)
MECHANISMS = {"ravlt_s": ("rala", "rala", "softmax", "softmax"), "mavit_s": ("mala", "mala", "softmax", "softmax")}
SMALL = {"dims": DIMS, "depths": DEPTHS, "heads": HEADS, "head_width": 20, "num_classes": 7, "layer_scale": (1.0,) * 4}


def small(name="ravlt_s", **options):
    """A small model whose weights are large enough that every part of it shows in the output."""
    model = vision_model(name, **{**SMALL, "drop_path_rate": 0.0, **options})
    for p in model.parameters():
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else p + torch.randn_like(p) / 4
    return model


def near(found, expected, tolerance):
    """Whether the largest difference is within the tolerance, relative to the largest number."""
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- published figures -----------------------------------------------------------------------------------------------


def parameters(name):
    with torch.device("meta"):
        return sum(p.numel() for p in vision_model(name).parameters())


MILLIONS = {"ravlt_t": 15, "ravlt_s": 26, "ravlt_b": 48, "ravlt_l": 95, "mavit_t": 16, "mavit_s": 27, "mavit_b": 50, "mavit_l": 98}


@pytest.mark.parametrize("name, millions", MILLIONS.items())
def test_parameters_as_published(name, millions):
    assert round(parameters(name) / 1e6) == millions


def test_parameters_of_ravlt_s_to_two_decimals():
    assert round(parameters("ravlt_s") / 1e6, 2) == 25.59


@pytest.mark.parametrize("size, dim, width", [("t", 512, 2048), ("s", 512, 2048), ("b", 512, 2048), ("l", 640, 2560)])
def test_mavit_differs_from_ravlt_in_the_width_of_its_head(size, dim, width):
    """Each channel of the head has weights from `dim` and a bias, two parameters of its norm, and weights to 1000 classes."""
    assert parameters(f"mavit_{size}") - parameters(f"ravlt_{size}") == (width - 1024) * (dim + 1 + 2 + 1000)


class Pass(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.heads, self.head_dim = attend.heads, attend.head_dim

    def forward(self, q, k, v, **_):
        return v


@pytest.mark.parametrize("name, published", [("ravlt_t", 2.4), ("ravlt_s", 4.6), ("ravlt_b", 9.9), ("ravlt_l", 16.0)])
def test_multiply_adds_as_published(name, published):
    """Of convolutions and projections, in 10⁹ at 224 × 224; attention's own products are left out."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = vision_model(name)
        for stage in model.stages:
            for block in stage.blocks:
                block.attn.attend = Pass(block.attn.attend)
        model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(published, rel=0.025)


# ---- a written-out model, under the key names of the released checkpoints ---------------------------------------------


def released_weights(in_chans=3, classes=7, width=20):
    """A checkpoint of the small model as the released code would write it, with random numbers."""
    w = {}

    def conv(name, out, into, side, groups=1):
        w[f"{name}.weight"] = torch.randn(out, into // groups, side, side) / (into // groups * side**2) ** 0.5
        w[f"{name}.bias"] = torch.randn(out) / 4

    def batch_norm(name, dim):
        w[f"{name}.weight"], w[f"{name}.bias"] = torch.rand(dim) + 0.5, torch.randn(dim) / 4
        w[f"{name}.running_mean"], w[f"{name}.running_var"] = torch.randn(dim) / 4, torch.rand(dim) + 0.5
        w[f"{name}.num_batches_tracked"] = torch.tensor(9)

    half = DIMS[0] // 2
    for i, (out, into) in enumerate([(half, in_chans), (half, half), (half, half), (DIMS[0], half)]):
        conv(f"patch_embed.proj.{3 * i}", out, into, 3)
        batch_norm(f"patch_embed.proj.{3 * i + 1}", out)
    for i, dim in enumerate(DIMS):
        w[f"layers.{i}.RoPE.angle"] = torch.zeros(dim // HEADS[i] // 2)
        for j in range(DEPTHS[i]):
            b, wide = f"layers.{i}.blocks.{j}", int(3.5 * dim)
            w[f"{b}.gamma_1"], w[f"{b}.gamma_2"] = torch.rand(1, dim, 1, 1) + 0.5, torch.rand(1, dim, 1, 1) + 0.5
            for n in (1, 2):
                w[f"{b}.norm{n}.norm.weight"], w[f"{b}.norm{n}.norm.bias"] = torch.rand(dim) + 0.5, torch.randn(dim) / 4
            conv(f"{b}.attn.qkvo", 4 * dim, dim, 1)
            conv(f"{b}.attn.lepe", dim, dim, 5, dim)
            conv(f"{b}.attn.proj", dim, dim, 1)
            conv(f"{b}.ffn.fc1", wide, dim, 1)
            conv(f"{b}.ffn.fc2", dim, wide, 1)
            conv(f"{b}.ffn.dwconv", wide, wide, 3, wide)
            conv(f"{b}.pos", dim, dim, 3, dim)
        if i < 3:
            conv(f"layers.{i}.downsample.reduction", DIMS[i + 1], dim, 3)
            batch_norm(f"layers.{i}.downsample.norm", DIMS[i + 1])
    conv("proj", width, DIMS[-1], 1)
    batch_norm("norm", width)
    conv("head", classes, width, 1)
    return w


def conv2d(w, name, x, stride=1):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])


def batch_norm(w, name, x):
    return F.batch_norm(x, *(w[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def layer_norm(w, name, x):
    dim = x.shape[1]
    return F.layer_norm(x.movedim(1, -1), (dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6).movedim(-1, 1)


def turn(x, rows, columns):
    """Pairs of adjacent channels as complex numbers, turned by the row (first half) or the column; x is [B, H, N, D]."""
    quarter = x.shape[-1] // 4
    frequency = torch.tensor([10000.0 ** -(i / max(quarter - 1, 1)) for i in range(quarter)], dtype=torch.float64)
    row, column = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], 1)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten(-2)


def attention_weights(kind, q, k, grid):
    """The N × N weights, [B, H, N, N]."""
    n, dim = q.shape[-2:]
    if kind == "softmax":
        return (turn(q, *grid) @ turn(k, *grid).mT / dim**0.5).softmax(-1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if kind == "rala":
        alpha = n * (q.mean(2, keepdim=True) @ k.mT / dim**0.5).softmax(-1)  # [B, H, 1, N]
        return (turn(q, *grid) @ turn(k, *grid).mT) * alpha / n / ((q @ k.mT * alpha).mean(-1, keepdim=True) + 1e-6)
    z = (q @ k.mT / dim**0.5).mean(-1, keepdim=True)
    return (1 + 1 / (z + 1e-6)) * (turn(q, *grid) @ turn(k, *grid).mT / dim**0.5) / n - z / n


def written_block(w, name, x, heads, kind):
    x = x + conv2d(w, f"{name}.pos", x)
    q, k, v, gate = conv2d(w, f"{name}.attn.qkvo", layer_norm(w, f"{name}.norm1.norm", x)).chunk(4, 1)
    local, grid = conv2d(w, f"{name}.attn.lepe", v), x.shape[2:]
    q, k, v = (t.unflatten(1, (heads, -1)).flatten(3).mT for t in (q, k, v))  # [B, H, N, D]
    o = (attention_weights(kind, q, k, grid) @ v).mT.reshape(x.shape)
    x = x + w[f"{name}.gamma_1"] * conv2d(w, f"{name}.attn.proj", (o + local) * gate)
    h = F.gelu(conv2d(w, f"{name}.ffn.fc1", layer_norm(w, f"{name}.norm2.norm", x)))
    h = h + conv2d(w, f"{name}.ffn.dwconv", h)
    return x + w[f"{name}.gamma_2"] * conv2d(w, f"{name}.ffn.fc2", h)


def written_model(w, images, mechanisms):
    """Each stage's features, and the logits."""
    x, features = images, []
    for i, stride in enumerate((2, 1, 1, 2)):
        x = batch_norm(w, f"patch_embed.proj.{3 * i + 1}", conv2d(w, f"patch_embed.proj.{3 * i}", x, stride))
        x = F.gelu(x) if i < 3 else x
    for i, kind in enumerate(mechanisms):
        for j in range(DEPTHS[i]):
            x = written_block(w, f"layers.{i}.blocks.{j}", x, HEADS[i], kind)
        features.append(x)
        if i < 3:
            x = batch_norm(w, f"layers.{i}.downsample.norm", conv2d(w, f"layers.{i}.downsample.reduction", x, 2))
    x = batch_norm(w, "norm", conv2d(w, "proj", x))
    pooled = (x * x.sigmoid()).mean((2, 3), keepdim=True)
    return features, conv2d(w, "head", pooled).flatten(1)


def double(w):
    return {name: t.double() if t.is_floating_point() else t for name, t in w.items()}


@pytest.mark.parametrize("kept", ["pth", "wrapped.pth", "safetensors"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_released_weights_give_the_written_out_model(tmp_path, name, kept):
    """Every stage and the logits, from a checkpoint under the authors' names, in float64 on an uneven grid."""
    w, path = released_weights(), tmp_path / f"released.{kept}"
    if kept == "safetensors":
        save_file(w, path)
    else:
        torch.save({"model": w, "epoch": 299, "args": argparse.Namespace(lr=1e-3)} if "wrapped" in kept else w, path)
    model = load_released(small(name), path).double().eval()
    images = torch.randn(2, 3, 70, 45, dtype=torch.float64)
    features, logits = written_model(double(w), images, MECHANISMS[name])
    assert near(model(images), logits, 1e-5)  # the rotary's angles are float32
    _, found = model.forward_intermediates(images)
    for ours, theirs in zip(found, features, strict=True):
        assert near(ours, theirs, 1e-5)


@pytest.mark.parametrize("kind", ["rala", "mala", "softmax"])
def test_block_is_its_definition(kind):
    """One block of two heads with explicit N × N weights; the small tolerance shows that only the angles are float32."""
    model = small(mechanisms=(kind,) * 4).double()
    block = model.stages[1].blocks[0]
    w = {"b.gamma_1": block.gamma1[:, None, None], "b.gamma_2": block.gamma2[:, None, None]}
    pairs = {
        "pos": block.position, "norm1.norm": block.norm1, "norm2.norm": block.norm2, "attn.qkvo": block.attn.qkvg,
        "attn.lepe": block.attn.local, "attn.proj": block.attn.proj, "ffn.fc1": block.ffn.fc1, "ffn.fc2": block.ffn.fc2,
        "ffn.dwconv": block.ffn.conv,
    }  # fmt: skip
    for key, layer in pairs.items():
        as_conv = layer.weight[:, :, None, None] if isinstance(layer, nn.Linear) else layer.weight
        w[f"b.{key}.weight"], w[f"b.{key}.bias"] = as_conv, layer.bias
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    stage = model.stages[1]
    stage.downsample, stage.blocks = nn.Identity(), stage.blocks[:1]
    assert near(stage(x), written_block(w, "b", x, 2, kind), 1e-6)


# ---- what a model does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(224, 224), (96, 160), (32, 32), (33, 50)])
def test_shapes(rows, columns):
    model = small(in_chans=4).eval()
    with torch.no_grad():
        images = torch.randn(2, 4, rows, columns)
        last, features = model.forward_intermediates(images)
        assert model(images).shape == (2, 7)
    sides = [(-(-rows // s), -(-columns // s)) for s in (4, 8, 16, 32)]
    assert [f.shape for f in features] == [(2, dim, *side) for dim, side in zip(DIMS, sides)]
    assert torch.equal(last, features[-1]) and torch.equal(last, model.forward_features(images))


@pytest.mark.parametrize("name", MECHANISMS)
def test_gradients_reach_every_parameter(name):
    model = small(name).double().eval()  # in training, batch norms would hide the biases before them
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().max() > 0]
    assert not dead


def test_channels_last_gives_the_same():
    model, images = small().eval(), torch.randn(2, 3, 64, 96)
    expected = model(images)
    assert near(model(images.contiguous(memory_format=torch.channels_last)), expected, 1e-5)
    model.to(memory_format=torch.channels_last)
    assert near(model(images.contiguous(memory_format=torch.channels_last)), expected, 1e-5)
    assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)


def test_autocast_stays_near_float32():
    model, images = small().eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert low.dtype == torch.bfloat16 and near(low.float(), model(images), 0.1)


def test_checkpointing_gives_the_same_gradients_and_recomputes():
    model, images, calls = small(drop_path_rate=0.5), torch.randn(4, 3, 64, 64), []
    for stage in model.stages:
        for block in stage.blocks:
            block.position.register_forward_hook(lambda *_: calls.append(1))
    grads, runs = [], []
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


def test_stochastic_depth():
    """Rates rise linearly over all blocks; images are dropped whole, the others scaled so that the mean stays; not in eval."""
    model = small(drop_path_rate=0.5)
    drops = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert [d.rate for d in drops] == pytest.approx([i / 10 for i in range(6)])
    x = torch.rand(1000, 2, 3, 4) + 1
    scale = (drops[-1](x) / x).flatten(1)
    assert set(scale.unique().round(decimals=4).tolist()) == {0.0, 2.0} and (scale == scale[:, :1]).all()
    assert abs((scale[:, 0] > 0).float().mean() - 0.5) < 0.08  # five standard deviations
    assert torch.equal(drops[-1].eval()(x), x)


# ---- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_timm_makes_every_variant(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=11, in_chans=5, drop_path_rate=0.3)
    own = VARIANTS[name]
    assert model.get_classifier().out_features == 11 == model.num_classes and model.stem[0].in_channels == 5
    assert [len(stage.blocks) for stage in model.stages] == list(own.size.depths)
    assert model.stages[3].blocks[-1].drop_path.rate == pytest.approx(0.3)
    assert [b.attn.attend.card.name for b in (s.blocks[0] for s in model.stages)] == [own.linear, own.linear, "softmax", "softmax"]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224) and not model.default_cfg.get("url")
    assert dict(model.named_modules())[model.pretrained_cfg["classifier"]] is model.get_classifier()
    assert dict(model.named_modules())[model.pretrained_cfg["first_conv"]] is model.stem[0]


def test_features_only():
    whole = small().eval()
    model = timm.create_model("ravlt_s", features_only=True, out_indices=(0, 2), **SMALL).eval()
    assert model.feature_info.channels() == [8, 24] and model.feature_info.reduction() == [4, 16]
    assert not any(name.startswith(("model.head", "model.stages.3")) for name, _ in model.named_parameters())
    model.model.load_state_dict({n: t for n, t in whole.state_dict().items() if not n.startswith(("head", "stages.3"))})
    images = torch.randn(1, 3, 96, 160)
    found = model(images)
    assert [f.shape for f in found] == [(1, 8, 24, 40), (1, 24, 6, 10)]
    assert all(torch.equal(a, b) for a, b in zip(found, whole.forward_intermediates(images, (0, 2))[1]))
    all_stages = timm.create_model("mavit_s", features_only=True, **SMALL)
    assert all_stages.feature_info.reduction() == [4, 8, 16, 32] and len(all_stages(images)) == 4


def test_head_and_its_classifier():
    model, images = small().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size) == (2, 20) and features.shape[1] == model.num_features
    assert near(model(images), F.linear(before, model.head.fc.weight, model.head.fc.bias), 1e-5)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5) and model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(images), before)
    model.reset_classifier(0, global_pool="")
    assert near(model(images).mean((2, 3)), before, 1e-5)


def test_parameter_groups():
    from timm.models import group_parameters

    model = small()
    assert model.no_weight_decay() == set()
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {n for n, _ in model.named_parameters()}
    depth = [layers[n] for n in ("stem.0.weight", "stages.0.blocks.0.gamma1", "stages.1.blocks.1.gamma1", "stages.3.blocks.0.gamma1")]
    assert depth == sorted(set(depth)) and layers["head.fc.weight"] >= depth[-1]


@pytest.mark.parametrize("order", ["subquad, timm", "timm, subquad"])
def test_timm_knows_the_models_whichever_is_imported_first(order):
    done = subprocess.run([sys.executable, "-c", f"import {order}; print(*timm.list_models(['ravlt_*', 'mavit_*']))"], capture_output=True)
    assert done.returncode == 0 and set(done.stdout.decode().split()) == set(VARIANTS)


def test_vision_model_serves_every_name_and_loads_nothing_before_it_is_called():
    from subquad.models.vision.variants import VARIANTS as ALL

    script = (
        "import sys, subquad.models.vision as v; assert not [m for m in sys.modules if m.startswith('subquad.models.vision.')]; "
        "v.vision_model('ravlt_t'); assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with torch.device("meta"):
        for name, variant in ALL.items():
            assert type(vision_model(name, num_classes=3)) is variant.model
    with pytest.raises(InputError, match=r"nearest: .*mavit_s"):
        vision_model("mavit_small")


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, use",
    [
        ("images", lambda: small()(torch.randn(1, 3, 31, 64))),
        ("images", lambda: small()(torch.randn(1, 4, 64, 64))),
        ("images", lambda: small()(torch.randn(3, 64, 64))),
        ("images", lambda: small()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))),
        ("images", lambda: timm.create_model("ravlt_s", features_only=True, **SMALL)(torch.randn(1, 3, 64, 16))),
        ("indices", lambda: small().forward_intermediates(torch.randn(1, 3, 64, 64), 5)),
        ("indices", lambda: small().forward_intermediates(torch.randn(1, 3, 64, 64), (0, 4))),
        ("output_fmt", lambda: small().forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")),
        ("dims", lambda: small(dims=(8, 16, 24))),
        ("heads", lambda: small(heads=(1, 2, 5, 4))),
        ("depths", lambda: small(depths=(1, 0, 1, 1))),
        ("drop_path_rate", lambda: small(drop_path_rate=1.0)),
        ("in_chans", lambda: small(in_chans=0)),
        ("name", lambda: small(mechanisms=("rala", "ralla", "softmax", "softmax"))),
        ("name", lambda: vision_model("ravlt_x")),
        ("options", lambda: vision_model("nalaformer_xt", num_class=3)),
        ("num_classes", lambda: small().reset_classifier(-1)),
        ("global_pool", lambda: small(global_pool="max")),
        ("global_pool", lambda: small(global_pool="")),
    ],
)
def test_refuses(argument, use):
    with pytest.raises(InputError) as error:
        use()
    assert error.value.argument == argument


def without(w):
    del w["layers.1.blocks.1.attn.lepe.weight"]


def misshapen(w):
    w["layers.2.blocks.0.ffn.fc1.weight"] = torch.zeros(83, 24, 1, 1)


def with_more(w):
    w["layers.1.blocks.2.pos.weight"] = torch.zeros(16, 1, 3, 3)


@pytest.mark.parametrize(
    "change, named",
    [
        (without, "stages.1.blocks.1.attn.local.weight"),
        (misshapen, "stages.2.blocks.0.ffn.fc1.weight"),
        (with_more, "stages.1.blocks.2.position.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, change, named):
    w, path, model = released_weights(), tmp_path / "released.pth", small()
    change(w)
    torch.save({"model": w}, path)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_released(model, path)
    assert str(path) in str(error.value) and named in str(error.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.write_bytes(b"PK\x03\x04 not really"),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"model": Evil()}, path),
        lambda path: torch.save([torch.zeros(2)], path),
        lambda path: torch.save({"model": {"epoch": 3}}, path),
    ],
)
def test_a_file_that_cannot_be_read_safely(tmp_path, write, capsys):
    path = tmp_path / "released.pth"
    write(path)
    with pytest.raises(InputError, match=r"released\.pth") as error:
        load_released(small(), path)
    assert "\x1b" not in str(error.value) and "weights_only" not in str(error.value), "no colours, and no way to load it all the same"
    assert "run" not in capsys.readouterr().out


def test_a_damaged_safetensors_file_and_a_model_of_another_kind(tmp_path):
    path = tmp_path / "released.safetensors"
    path.write_bytes(b"\x09")
    with pytest.raises(InputError, match=r"released\.safetensors"):
        load_released(small(), path)
    with pytest.raises(InputError, match="model: got Linear"):
        load_released(nn.Linear(2, 2), path)


@pytest.mark.parametrize("mechanism", ["softmax", "linear-elu", "lightnet"])
def test_every_patch_sees_the_last_one_whatever_the_mechanism(mechanism):
    model = vision_model("ravlt_t", mechanisms=(mechanism, "rala", "softmax", "softmax"), depths=(1, 1, 1, 1), num_classes=0).eval()
    block = model.stages[0].blocks[0].attn
    x = torch.randn(1, 8, 8, 64)
    other = x.clone()
    other[0, -1, -1] += 1
    change = block.attend(*(t.flatten(1, 2)[:, :, None] for t in (x, x, other)), grid=(8, 8)) - block.attend(
        *(x.flatten(1, 2)[:, :, None],) * 3, grid=(8, 8)
    )
    assert (change[0, 0].abs() > 0).any(), "the first patch does not see the last"


def test_a_checkpoint_of_the_data_parallel_wrapper_is_the_same_one(tmp_path):
    w = released_weights()
    torch.save(w, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{name}": t for name, t in w.items()}}, tmp_path / "wrapped.pth")
    name = next(iter(MECHANISMS))
    plain, wrapped = (load_released(small(name), tmp_path / f"{kind}.pth").state_dict() for kind in ("plain", "wrapped"))
    assert all(torch.equal(plain[key], wrapped[key]) for key in plain)
