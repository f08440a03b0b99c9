"""Ranks of attention: the two measures, what they are taken of, and the command."""

import json
import math

import pytest
import timm
import torch
from typer.testing import CliRunner

import subquad
from subquad.bench.spectrum import Layer, buffer, capture, ranks, spectrum
from subquad.cli import app


def matrix(values, rows=9, columns=6):
    """A matrix with these singular values."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (rows, columns))
    return left[:, : len(values)] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


def test_ranks_of_known_singular_values():
    assert ranks(matrix([5.0, 5.0, 5.0])) == pytest.approx((3, 3))
    # 0.03 of the largest counts at rtol 0.01, 0.005 does not; p = 1/2, 1/4, 1/4
    assert ranks(matrix([1.0, 0.03, 0.005]))[0] == 2 and ranks(matrix([1.0, 0.03, 0.005]), rtol=0.001)[0] == 3
    assert ranks(matrix([2.0, 1.0, 1.0]))[1] == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert ranks(matrix([5.0, 5.0], rows=4, columns=9)) == pytest.approx((2, 2))  # wide ones alike
    assert ranks(torch.zeros(4, 4)) == (0, 0)
    assert ranks(torch.stack([matrix([1.0]), matrix([1.0, 1.0, 1.0])])) == pytest.approx((2, 2))  # means


def small_vit():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)


def test_capture_takes_the_model_as_it_is():
    model, pixels = small_vit(), torch.randn(2, 3, 32, 32)
    before = [type(m) for m in model.modules()]
    seen = []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda m, i, o: seen.append(o))
    layers = capture(model, pixels)
    model.eval()(pixels)
    handle.remove()
    q, k, v = seen[-1].detach().unflatten(-1, (3, 2, 12)).unbind(2)
    for name, x in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(getattr(layers[1], name), x, atol=1e-5, rtol=1e-5)
    assert [layer.name for layer in layers] == ["blocks.0", "blocks.1"]
    assert [type(m) for m in model.modules()] == before
    model.train()
    capture(model, pixels)
    assert model.training


def windowed(library):
    """A Swin with a bias of some size, on 8 × 8 tokens in windows of 4 × 4, the second block shifted; two heads of 4."""
    torch.manual_seed(0)
    if library == "timm":
        sizes = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4, "patch_size": 4}
        model = timm.models.SwinTransformer(img_size=32, num_classes=2, **sizes)
    else:
        import transformers

        sizes = {"embed_dim": 8, "depths": (2,), "num_heads": (2,), "window_size": 4, "patch_size": 4}
        model = transformers.SwinModel(transformers.SwinConfig(image_size=32, initializer_range=0.3, **sizes))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias_table", "bias")):
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_capture_joins_a_swins_windows(library):
    """What each block's norm before attention gives, on the grid, through the projections; of the model's own pass, bias and shifts
    included."""
    model, pixels = windowed(library), torch.randn(2, 3, 32, 32)
    blocks = model.layers[0].blocks if library == "timm" else model.encoder.layers[0].blocks
    norms = [block.norm1 if library == "timm" else block.layernorm_before for block in blocks]
    seen = []
    handles = [norm.register_forward_hook(lambda m, i, o: seen.append(o.detach().reshape(2, 64, 8))) for norm in norms]
    model(pixels)
    for handle in handles:
        handle.remove()
    layers = capture(model, pixels)
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["0", "1"] and len(seen) == 2
    for block, x, layer in zip(blocks, seen, layers):
        if library == "timm":
            expected = block.attn.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        else:
            own = block.attention
            expected = [project(x).unflatten(-1, (2, 4)) for project in (own.q_proj, own.k_proj, own.v_proj)]
        for found, wanted in zip((layer.q, layer.k, layer.v), expected):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    rows = spectrum(model, pixels, [("softmax", {}), ("rala", {})])
    assert len(rows) == 4 and rows[0].most == 4


def test_a_swapped_swin_is_watched_as_it_is():
    model, pixels = windowed("timm"), torch.randn(1, 3, 32, 32)
    subquad.swap(model, "rala")
    first = model.layers[0].blocks[0]
    layers = capture(model, pixels)
    with torch.no_grad():
        q = first.attn.qkv(first.norm1(model.patch_embed(pixels)).flatten(1, 2)).unflatten(-1, (3, 2, 4)).unbind(2)[0]
    torch.testing.assert_close(layers[0].q, q, atol=1e-5, rtol=1e-5)
    assert len(layers) == 2


def test_buffers_are_what_the_output_is_read_from():
    """RALA's is Σ α φ(k) vᵀ with its weights α, LightNet's has a softmax over tokens for each channel; softmax has none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    layer = Layer("", q, k, v, None)
    fq, fk = (torch.nn.functional.elu(x[0, :, 0]) + 1 for x in (q, k))
    alpha = (fk @ fq.mean(0) / 8**0.5).softmax(0)
    x = k[0, :, 0]
    for name, keys, options in (
        ("rala", alpha[:, None] * fk, {}), ("lightnet", x.softmax(0), {"causal": False}), ("linear-relu", x.relu(), {"causal": False}),
        ("inline", x, {}), ("inline", x.exp(), {"feature_map": "exp"}),
    ):  # fmt: skip
        M, expected = buffer(layer, subquad.attention(name, 1, 8, **options))[0, 0], keys.T @ v[0, :, 0]
        assert (M / M.norm() - expected / expected.norm()).abs().max() < 1e-5
    assert buffer(layer, subquad.attention("softmax", 1, 8)) is None


def test_spectrum_has_a_row_for_each_layer_and_mechanism():
    model, pixels = small_vit(), torch.randn(2, 3, 32, 32)
    rows = spectrum(model, pixels, [("softmax", {}), ("linear-elu", {}), ("rala", {}), ("l2vit", {"floor": 1.0})])
    assert [(r.layer, r.mechanism) for r in rows[:5]] == [
        ("blocks.0", "softmax"), ("blocks.0", "linear-elu"), ("blocks.0", "rala"), ("blocks.0", "l2vit:floor=1.0"), ("blocks.1", "softmax"),
    ]  # fmt: skip
    layer = capture(model, pixels)[0]
    o = subquad.attention("linear-elu", 2, 12, causal=False)(layer.q, layer.k, layer.v)
    per_head = [ranks(o[b, :, h]) for b in range(2) for h in range(2)]
    assert rows[1].head == pytest.approx([sum(x) / 4 for x in zip(*per_head)])
    assert rows[1].features == pytest.approx([sum(x) / 2 for x in zip(*(ranks(o[b].flatten(1)) for b in range(2)))])
    assert rows[0].buffer is None and 0 < rows[1].buffer[1] <= rows[1].most == 12


@pytest.mark.parametrize("name, options", [("gla", {}), ("sliding-window", {}), ("no-such", {}), ("linear-elu", {"causal": True})])
def test_mechanisms_must_suit_images(name, options):
    with pytest.raises(subquad.InputError):
        spectrum(small_vit(), torch.randn(1, 3, 32, 32), [(name, options)])


def test_variants_of_a_mechanism_stand_apart():
    wanted = [("inline", {}), ("inline", {"feature_map": "relu"}), ("linear-elu", {"causal": False})]
    rows = spectrum(small_vit(), torch.randn(1, 3, 32, 32), wanted)
    assert [r.mechanism for r in rows[:3]] == ["inline", "inline:feature_map=relu", "linear-elu:causal=False"]
    assert rows[0].buffer != rows[1].buffer
    with pytest.raises(subquad.InputError, match="once"):
        spectrum(small_vit(), torch.randn(1, 3, 32, 32), [("rala", {}), ("rala", {})])


@pytest.mark.parametrize("rtol", [1.0, 1e-9])
def test_rtol_is_checked(rtol):
    with pytest.raises(subquad.InputError, match="rtol"):
        spectrum(small_vit(), torch.randn(1, 3, 32, 32), rtol=rtol)


def test_each_mechanism_has_a_colour_of_its_own():
    from subquad.bench import plots
    from subquad.bench.spectrum import DEFAULT

    assert len(DEFAULT) <= plots.COLORS and plots.STYLE.count(f"--c{plots.COLORS - 1}:") == 2


@pytest.fixture
def photo(tmp_path):
    from PIL import Image as image

    torch.manual_seed(0)
    path = tmp_path / "photo.png"
    image.fromarray((255 * torch.rand(40, 50, 3)).byte().numpy()).save(path)
    return path


def test_the_command(photo, tmp_path):
    out = tmp_path / "ranks"
    words = ["spectrum", "ravlt_t", str(photo), "--mechanism", "softmax", "--mechanism", "rala", "--size", "64x96", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads((out / "spectrum.json").read_text())
    assert {r["mechanism"] for r in found["rows"]} == {"softmax", "rala"}
    assert len(found["rows"]) == 2 * (2 + 2 + 6 + 2)  # RAVLT-T's layers
    assert found["rows"][0]["most"] == 64 and found["about"]["size"] == "64 × 96"
    html = (out / "spectrum.html").read_text()
    assert html.count("<svg") == 3 and "rala" in html


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Swin"])
def test_the_command_on_folders_of_transformers(kind, photo, tmp_path):
    import transformers

    torch.manual_seed(0)
    vit = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4} if kind == "Swin" else vit
    config = getattr(transformers, f"{kind}Config")(image_size=32, **sizes)
    getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / "model")
    for size in ((), ("--size", "48x64")):
        out = tmp_path / f"out{len(size)}"
        words = [str(tmp_path / "model"), str(photo), "--mechanism", "softmax", "--mechanism", "rala", "--out", str(out), *size]
        done = CliRunner().invoke(app, ["spectrum", *words])
        assert done.exit_code == 0 and "first made" not in done.stderr, done.output
        found = json.loads((out / "spectrum.json").read_text())
        assert found["about"]["size"] == ("48 × 64" if size else "32 × 32") and found["about"]["weights"] == "the folder's"
        assert len({r["layer"] for r in found["rows"]}) == 3 and len(found["rows"]) == 6


@pytest.mark.parametrize(
    "words, said",
    [
        (["vit_tinny_patch16_224", "PHOTO"], "vit_tiny_patch16_224"),
        (["ravlt_t", "nowhere.png"], "nowhere.png"),
        (["FOLDER", "PHOTO"], "without transformers' config.json"),
        (["ravlt_t", "PHOTO", "--size", "big"], "--size"),
        (["ravlt_t", "PHOTO", "--size", "16"], "32"),
        (["ravlt_t", "PHOTO", "--size", "²"], "--size"),
        (["test_vit", "PHOTO", "--size", "100"], "--size"),
        (["ravlt_t", "PHOTO", "--weights", "LIST"], "list"),
        (["ravlt_t", "PHOTO", "--mechanism", "gla"], "bidirectional"),
        (["ravlt_t", "PHOTO", "--rtol", "2"], "--rtol"),
        (["ravlt_t", "PHOTO", "--weights", "none.pth"], "none.pth"),
    ],
)
def test_errors_are_one_line(words, said, photo, tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    files = {"PHOTO": str(photo), "LIST": str(tmp_path / "list.pth"), "FOLDER": str(tmp_path)}
    done = CliRunner().invoke(app, ["spectrum", *(files.get(word, word) for word in words)])
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1 and said in done.output
