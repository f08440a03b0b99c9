"""Another attention in an image model: what is measured, against direct definitions; the command; models and images by name."""

import copy
import json

import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

import subquad
from subquad import InputError
from subquad.bench.choice import Choice
from subquad.bench.flops import flops
from subquad.bench.image_swap import ImageJob, cosine, features, run_image_job
from subquad.bench.images import find_images, is_image_model, load_image_model, own_sides, read_image
from subquad.cli import app
from subquad.convert import resize

SIZES = {
    "ViT": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8},
    "Swin": {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 2, "window_size": 4},
}


def made(kind, head="ForImageClassification", **changes):
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(image_size=32, initializer_range=0.3, **SIZES[kind], **changes)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    for name, parameter in model.named_parameters():  # zeros would hide a bias, or a table, that is dropped
        if name.endswith("bias_table"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in SIZES:
        made(kind).save_pretrained(root / kind)
    (root / "ViT" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]}))
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    from PIL import Image as image

    root = tmp_path_factory.mktemp("photos")
    torch.manual_seed(0)
    for name in ("b.png", "a.png"):
        image.fromarray((255 * torch.rand(40, 50, 3)).byte().numpy()).save(root / name)
    (root / "notes.txt").write_text("no image")
    return root


def quick(model, *to, **options):
    return ImageJob(str(model), tuple(Choice(*one) if isinstance(one, tuple) else Choice(one) for one in to), budget=0.0, **options)


# ---- measures ------------------------------------------------------------------------------------------------------


def test_features_are_the_tokens_after_the_last_norm():
    model = made("ViT")
    pixels = torch.randn(2, 3, 32, 32)
    seen = []
    handle = model.vit.layernorm.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model(pixels)
    handle.remove()
    assert features(model, pixels).shape == (2, 17, 32) and torch.allclose(features(model, pixels), seen[0], atol=1e-5)
    swin = timm.models.SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 1)).eval()
    with torch.no_grad():
        expected = swin.forward_features(pixels).reshape(2, 16, 16)
    assert torch.allclose(features(swin, pixels), expected, atol=1e-5)


def test_cosine_by_hand():
    a = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    b = torch.tensor([[[4.0, 3.0], [0.0, 5.0]]])
    assert cosine(a, b) == pytest.approx((24 / 25 + 0) / 2) and cosine(a, 7 * a) == pytest.approx(1) and cosine(a, a / 0) is None


def test_rows_are_what_swapping_by_hand_gives(folders, photos):
    """At the model's own size, and at one to which its positions are interpolated."""
    sizes = ((32, 32), (48, 64))
    report = run_image_job(quick(folders / "ViT", "softmax", "rala", images=(photos,), sizes=sizes, layers="1:1", batch=3))
    original, exact, rala = report.rows
    assert [row.layers for row in report.rows] == ["0 of 2", "1 of 2", "1 of 2"] and rala.mechanism == "rala"
    assert [at.cosine for row in (original, exact) for at in row.at] == pytest.approx([1.0] * 4, abs=1e-6)
    model = made("ViT")
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.5, 1.0, 2.0]))
    for sides, at, before in zip(sizes, rala.at, original.at):
        one = resize(copy.deepcopy(model), sides)
        x = (torch.stack([read_image(photos / name, sides) for name in ("a.png", "b.png")]) - mean) / deviation
        with torch.no_grad():
            f = one.vit(x).last_hidden_state
            assert before.multiply_adds == flops(one, sides).total
            subquad.swap(one, "rala", layers=[0])
            g = one.vit(x).last_hidden_state
        expected = ((f * g).sum(-1) / (f.norm(dim=-1) * g.norm(dim=-1))).mean()
        assert at.cosine == pytest.approx(float(expected), abs=1e-5) and at.cosine < 0.999
        assert at.multiply_adds == flops(one, sides).total and at.sides == sides
        assert at.parameters == sum(p.numel() for p in one.parameters())
        assert at.ms > 0 and at.peak_bytes > 3 * x[0].numel()
    assert original.at[1].peak_bytes > 2 * original.at[0].peak_bytes  # three times the pixels


def test_new_parameters_are_counted_and_made_from_the_seed(folders, photos):
    job = quick(folders / "ViT", ("hedgehog", {"feature_dim": 4}), images=(photos,))
    one, two = run_image_job(job).rows[1], run_image_job(job).rows[1]
    inside = subquad.swap(made("ViT"), "hedgehog", feature_dim=4)
    assert one.at[0].parameters == sum(p.numel() for p in inside.parameters()) > sum(p.numel() for p in made("ViT").parameters())
    assert one.at[0].cosine == two.at[0].cosine


@pytest.mark.parametrize("scope, same", [("window", True), ("image", False), (None, False)])
def test_a_swin_keeps_its_windows_or_not(scope, same, folders, photos):
    row = run_image_job(quick(folders / "Swin", "softmax", images=(photos,), scope=scope)).rows[1]
    assert (abs(row.at[0].cosine - 1) < 1e-5) is same


# ---- the command ---------------------------------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(app, ["swap", *map(str, words)])


def test_the_command(folders, photos, tmp_path):
    out = tmp_path / "run"
    done = call(folders / "ViT", "--to", "rala", "--to", "inline:feature_map=exp", "--image", photos, "--size", "32,48x32", "--out", out)
    assert done.exit_code == 0, done.output
    assert "48×32" in done.stdout and "Nothing was trained" in done.stdout and "first made" not in done.stdout
    read = json.loads((out / "report.json").read_text())
    assert [row["mechanism"] for row in read["rows"]] == ["softmax (original)", "rala", "inline:feature_map=exp"]
    assert [at["sides"] for at in read["rows"][2]["at"]] == [[32, 32], [48, 32]]
    assert read["about"]["images"] == "a.png, b.png" and read["about"]["weights"] == "the folder's"
    html = (out / "report.html").read_text()
    assert html.count("<svg") == 3 + 2 and html.count("<td>rala</td>") == 2
    assert "holds something" in call(folders / "ViT", "--to", "rala", "--image", photos, "--out", out).stderr


def test_a_name_of_timm_and_the_photographs_of_scikit_learn():
    done = call("test_vit", "--to", "mala", "--layers", "0")
    assert done.exit_code == 0, done.output
    assert "mala" in done.stdout and "the weights that it was first made with" in done.stdout and "Nothing was written" in done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["VIT"], "--to: got nothing"),
        (["VIT", "--to", "gla"], "a bidirectional mechanism"),
        (["VIT", "--to", "rala", "--to", "rala"], "each mechanism once"),
        (["VIT", "--to", "rala", "--scope", "window"], "scope"),
        (["VIT", "--to", "rala", "--size", "32,32"], "each size once"),
        (["VIT", "--to", "rala", "--size", "32,33"], "multiples of the patch's 8 × 8"),
        (["VIT", "--to", "rala", "--size", "big"], "--size"),
        (["VIT", "--to", "rala", "--layers", "auto:1"], "--layers"),
        (["VIT", "--to", "rala", "--pretrained"], "--pretrained"),
        (["VIT", "--to", "rala", "--image", "nowhere.png"], "nowhere.png"),
        (["VIT", "--to", "rala", "--text", "a.txt"], "--text: got given; expected without it"),
        (["ravlt_t", "--to", "rala"], "timm's VisionTransformer"),
        (["SWIN", "--to", "rala", "--scope", "both"], "'image' or 'window'"),
    ],
)
def test_errors_are_one_line(words, said, folders):
    done = call(*({"VIT": folders / "ViT", "SWIN": folders / "Swin"}.get(word, word) for word in words))
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.output


# ---- by name -------------------------------------------------------------------------------------------------------


def test_folders_are_read_at_any_size(folders, tmp_path):
    assert is_image_model(str(folders / "Swin")) and is_image_model("ravlt_t")
    assert not is_image_model("smollm2-135m") and not is_image_model(str(tmp_path)) and not is_image_model("owner/name")
    assert own_sides(str(folders / "ViT")) == (32, 32) and own_sides("swin_base_patch4_window12_384") == (384, 384)
    model, (mean, deviation) = load_image_model(str(folders / "Swin"))
    assert torch.equal(mean, torch.full((3, 1, 1), 0.5)) and torch.equal(mean, deviation)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in made("Swin").state_dict().items())
    wide, _ = load_image_model(str(folders / "ViT"), (32, 64))
    assert wide.vit.embeddings.position_embeddings.shape == (1, 1 + 4 * 8, 32)
    counted = CliRunner().invoke(app, ["flops", str(folders / "ViT")]).stdout
    assert f", 32 × 32: {sum(p.numel() for p in made('ViT').parameters()) / 1e6:.1f} M parameters" in counted
    bare = tmp_path / "bare"
    made("ViT", "Model").save_pretrained(bare)
    assert type(load_image_model(str(bare))[0]).__name__ == "ViTModel"


def test_folders_of_other_things_are_refused(folders, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(InputError, match="without transformers"):
        load_image_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="a folder of 'llama'"):
        load_image_model(str(tmp_path))
    copied = shutil.copytree(folders / "ViT", tmp_path / "copy")
    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if "layernorm" in name)
    del tensors[name]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"without weights for .*layernorm"):
        load_image_model(str(copied))
    (copied / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="a folder of an image model and its weights"):
        load_image_model(str(copied))


def test_images_are_files_and_what_folders_hold(photos, tmp_path):
    assert [p.name for p in find_images([photos / "b.png", photos])] == ["b.png", "a.png", "b.png"]
    with pytest.raises(InputError, match="a folder without images"):
        find_images([tmp_path])
