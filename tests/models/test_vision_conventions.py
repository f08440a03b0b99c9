"""What timm expects of a network, for those whose own tests leave it out: features, classifier, groups, recomputing, errors."""

import copy
import functools

import pytest
import timm
import torch

from subquad import InputError
from subquad.models.vision import vision_model
from subquad.models.vision.variants import VARIANTS as ALL
from subquad.ops.moments import chunked

STAGED = {"dims": (8, 16, 24, 32), "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4), "linear": (2, 1, 0, 0), "window": 3}
SMALL = {
    "inline_deit_tiny": {"img_size": 64, "dim": 32, "depth": 4, "heads": 4},
    "inline_swin_tiny": STAGED,
    "lightnet_t": {"dim": 32, "depth": 4, "heads": 4},
}
PLAIN = [name for name in SMALL if "swin" not in name]
STAGES = {name: STAGED[name] for name in ("dims", "depths", "heads")}
EVERY = {**SMALL, "l2vit_t": STAGES, "ravlt_s": {**STAGES, "head_width": 20}, "nalaformer_s": {**STAGES, "head_width": 20}}


def small(name, **options):
    model = vision_model(name, **{"num_classes": 7, "drop_path_rate": 0.0, **EVERY[name], **options})
    for p in model.parameters():  # large enough that every part shows in the output
        p.data = torch.randn_like(p) / p[0].numel() ** 0.5 if p.dim() > 1 else p + torch.randn_like(p) / 4
    return model


def near(found, expected, tolerance=1e-5):
    return found.shape == expected.shape and (found - expected).abs().max() <= tolerance * expected.abs().max()


def blocks_of(model):
    return list(model.blocks) if hasattr(model, "blocks") else [block for stage in model.stages for block in stage.blocks]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rows, columns", [(64, 64), (96, 160), (32, 32), (33, 50)])
def test_shapes(name, rows, columns):
    model, images = small(name, in_chans=4).eval(), torch.randn(2, 4, rows, columns)
    with torch.no_grad():
        last, features = model.forward_intermediates(images)
        assert model(images).shape == (2, 7) and torch.equal(last, model.forward_features(images))
    strides = [16] * 4 if name in PLAIN else [4, 8, 16, 32]
    dims = [32] * 4 if name in PLAIN else STAGED["dims"]
    assert [f.shape for f in features] == [(2, dim, -(-rows // s), -(-columns // s)) for dim, s in zip(dims, strides)]
    extra = last.shape[1] - features[-1].shape[2:].numel()
    assert name not in PLAIN or extra == (1 if "inline" in name else 0)


@pytest.mark.parametrize("name", PLAIN)
def test_features_of_blocks_are_maps_of_the_tokens(name):
    model, images = small(name).eval(), torch.randn(2, 3, 48, 80)
    last, (feature,) = model.forward_intermediates(images, 1, norm=True)
    assert torch.equal(feature, last[:, -15:].mT.reshape(2, 32, 3, 5))
    bare = model.forward_intermediates(images, [3], intermediates_only=True)[0]
    assert near(model.norm(bare.movedim(1, -1)), feature.movedim(1, -1))


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    whole = small(name).eval()
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), num_classes=7, **SMALL[name]).eval()
    assert model.feature_info.channels() == ([32, 32] if name in PLAIN else [8, 24])
    assert model.feature_info.reduction() == ([16, 16] if name in PLAIN else [4, 16])
    last = "blocks.3" if name in PLAIN else "stages.3"
    assert not any(n.startswith(("model.head", f"model.{last}")) for n, _ in model.named_parameters())
    model.model.load_state_dict({n: t for n, t in whole.state_dict().items() if not n.startswith(("head", last))})
    images = torch.randn(1, 3, 96, 160)
    assert all(torch.equal(a, b) for a, b in zip(model(images), whole.forward_intermediates(images, (0, 2))[1], strict=True))
    default = timm.create_model(name, features_only=True, **SMALL[name])
    assert default.feature_info.reduction() == ([16] * 3 if name in PLAIN else [4, 8, 16, 32])


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_an_image_size_is_taken_as_timm_gives_it(name, features_only):
    """A side, or rows and columns. InLine-DeiT's positions are learned for it, and nothing else depends on it."""
    make = functools.partial(timm.create_model, name, features_only=features_only, num_classes=7, in_chans=1)
    with torch.device("meta"):
        default, images = make().eval(), torch.zeros(1, 1, 64, 96)
        for size, cells in ((64, 16), ((64, 96), 24), ([64, 96], 24)):
            model = make(img_size=size).eval()
            shapes = {key: t.shape for key, t in default.state_dict().items()}
            if "deit" in name:
                shapes |= {key: (1, 1 + cells, shape[2]) for key, shape in shapes.items() if key.endswith("pos_embed")}
            assert {key: t.shape for key, t in model.state_dict().items()} == shapes
            assert model(images)[0].shape[0] == (1 if features_only else 7)
        for size in (15, 64.0, "64", (64,), (64, 64, 3), True):
            with pytest.raises(InputError, match="img_size"):
                make(img_size=size)


def test_positions_are_learned_for_rows_and_columns():
    model, images = small("inline_deit_tiny", img_size=(32, 64)).eval(), torch.randn(1, 3, 32, 64)
    assert torch.equal(model.positions((2, 4)), model.pos_embed)
    seen = torch.nn.functional.interpolate(model.pos_embed[:, 1:].mT.unflatten(2, (2, 4)), (3, 5), mode="bicubic")
    assert torch.equal(model.positions((3, 5))[:, 1:], seen.flatten(2).mT) and torch.equal(
        model.positions((3, 5))[:, 0], model.pos_embed[:, 0]
    )
    with torch.no_grad():
        before = model(images)
        model.pos_embed[:, 3] += torch.randn(32)
        assert not near(model(images), before, 1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    model = small(name, global_pool="avg").double()  # the class token alone sees nothing of the last local residual
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().max() > 0]
    assert not dead


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_gives_the_same_gradients_and_recomputes(name):
    model, images, calls, grads, runs = small(name, drop_path_rate=0.5), torch.randn(4, 3, 32, 64), [], [], []
    for block in blocks_of(model):
        block.norm1.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        calls.clear()
        torch.manual_seed(3)
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        runs.append(len(calls))
    largest = max(g.abs().max() for g in grads[0])
    assert runs == [len(blocks_of(model)), 2 * len(blocks_of(model))]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * largest) for a, b in zip(*grads))


@pytest.mark.parametrize("name, compiled", [*((name, False) for name in EVERY if name not in PLAIN), ("l2vit_t", True)])
def test_checkpointing_leaves_the_same_state_after_two_steps(name, compiled):
    """Weights and batch norms' statistics and counts; blocks are computed twice, an average of batches is taken once."""
    torch.compiler.reset()  # models share a forward, which one process compiles for a few only
    start, images, states = small(name, drop_path_rate=0.5), torch.randn(4, 3, 64, 64), []
    norms = [m for block in blocks_of(start) for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == (4 if name == "l2vit_t" else 0)
    for norm in () if compiled else norms[1:]:
        norm.momentum = None  # the mean over all batches, which no graph has
    for enable in (False, True):
        model = copy.deepcopy(start)
        model.set_grad_checkpointing(enable)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for step in range(2):
            torch.manual_seed(step)
            run(images * (1 + step)).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()
        states.append(model.state_dict())
        assert all(count == 2 for key, count in model.state_dict().items() if key.endswith("num_batches_tracked"))
        assert [getattr(m, "momentum", 0) for m in model.modules()] == [getattr(m, "momentum", 0) for m in start.modules()]
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_head_and_its_classifier(name):
    from timm.models import group_parameters

    model, images = small(name).eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (2, model.head_hidden_size) == (2, 32) and model.num_features == 32
    assert near(model(images), model.get_classifier()(before))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()} and groups["head.fc.weight"] == max(groups.values())
    assert model.no_weight_decay() <= set(groups)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5) and model.num_classes == 5 and model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert torch.equal(model(images), before)
    if name == "inline_deit_tiny":
        assert torch.equal(before, features[:, 0])
        model.reset_classifier(0, "avg")
        assert near(model(images), features[:, 1:].mean(1))
    model.reset_classifier(0, "")
    whole = model(images)
    assert near(whole.mean((2, 3)), before) if name not in PLAIN else torch.equal(whole, features)


@pytest.mark.parametrize("name", SMALL)
def test_autocast_stays_near_float32(name):
    model, images = small(name).eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images)
    assert low.dtype == torch.bfloat16 and near(low.float(), model(images), 0.1)


@pytest.mark.parametrize("name", SMALL)
def test_compiles_whole_and_takes_no_images(name):
    torch.compiler.reset()  # as above
    model, images = small(name, **({"depth": 1} if name in PLAIN else {})).eval(), torch.randn(2, 3, 64, 96)
    assert near(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))
    assert model(images[:0]).shape == (0, 7)


# numbers in a cache: one piece of the first map, for up to two images, or two
@pytest.mark.parametrize("name, block", [*((name, 1 << 12) for name in EVERY), ("lightnet_t", 1 << 10), ("ravlt_s", 1 << 10)])
def test_an_export_serves_any_batch(name, block, monkeypatch):
    monkeypatch.setattr(chunked, "CPU_BLOCK", block)
    model = small(name).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=shapes).module()
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 64, 64)
        assert near(exported(images), model(images))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "argument, options, images",
    [
        ("images", {}, torch.zeros(1, 3, 15, 64)),
        ("images", {}, torch.zeros(1, 4, 64, 64)),
        ("images", {}, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)),
        ("images", {}, torch.zeros(3, 64, 64)),
        ("heads", {"heads": 3}, None),
        ("drop_path_rate", {"drop_path_rate": 1.0}, None),
        ("drop_rate", {"drop_rate": 1.5}, None),
        ("in_chans", {"in_chans": 0}, None),
        ("num_classes", {"num_classes": -1}, None),
        ("global_pool", {"global_pool": ""}, None),
    ],
)
def test_refuses(name, argument, options, images):
    if name not in PLAIN and argument == "heads":
        options = {"heads": (1, 2, 5, 4)}
    with pytest.raises(InputError) as error:
        small(name, **options)(images)
    assert error.value.argument == argument


@pytest.mark.parametrize("name", SMALL)
def test_indices_are_checked(name):
    model, images = small(name), torch.zeros(1, 3, 64, 64)
    for indices in (5, (0, 4), ()):
        with pytest.raises(InputError, match="indices"):
            model.forward_intermediates(images, indices)
    with pytest.raises(InputError, match="output_fmt"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("name", [*SMALL, "ravlt_t"])
@pytest.mark.parametrize("features_only", [False, True])
def test_images_of_a_wrong_dtype(name, features_only):
    """What torch would refuse in its own words, and nothing else."""
    options = SMALL.get(name, {"dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "heads": (1, 1, 1, 1)})
    model = timm.create_model(name, features_only=features_only, **options).eval()
    images = torch.rand(1, 3, 64, 64)
    for dtype in (torch.uint8, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(InputError, match=f"^images: got .* {str(dtype)[6:]} on cpu; expected floating-point images .*, normalised"):
            model(images.to(dtype))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(InputError, match=f"^images: got .* {str(dtype)[6:]} on cpu; expected images of the weights' dtype, float32"):
            model(images.to(dtype))
    with pytest.raises(InputError, match="the weights' dtype, bfloat16"):
        model.bfloat16()(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.float()(images.bfloat16())
        with pytest.raises(InputError, match="float64"):
            model(images.double())
    with torch.no_grad():
        assert model.double()(images.double()) is not None
