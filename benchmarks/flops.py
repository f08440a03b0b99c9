"""Parameters and multiply–adds of the vision backbones beside the published ones: writes benchmarks/results/flops.json.

python benchmarks/flops.py                                  minutes on a CPU: RAVLT also runs on 800 × 1280
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from common import RESULTS, stamp, write_json

import subquad  # noqa: F401  registers the backbones with timm
from subquad.bench.flops import flops

# Millions of parameters and "GFLOPs" as published, at each model's own size: in the authors' READMEs (RAVLT: qhfan/RALA; NaLaFormer:
# ZacharyMeng/NaLaFormer; L2ViT: ChuanyangZheng/L2ViT; InLine: LeapLabTHU/InLine) and, for MAViT-S, in the abstract of arXiv 2507.00698.
# MAViT-T, -B and -L are as other papers cite that one's tables, which could not be had themselves.
PUBLISHED = {
    "ravlt_t": ("15", "2.4"), "ravlt_s": ("26", "4.6"), "ravlt_b": ("48", "9.9"), "ravlt_l": ("95", "16.0"),
    "mavit_t": ("16", "2.5"), "mavit_s": ("27", "4.6"), "mavit_b": ("50", "9.9"), "mavit_l": ("98", "16.1"),
    "nalaformer_xt": ("8", "1.0"), "nalaformer_t": ("15", "2.7"), "nalaformer_s": ("26", "5.1"), "nalaformer_b": ("52", "12"),
    "nalaformer_l": ("95", "18"),
    "l2vit_t": ("29", "4.7"), "l2vit_s": ("50", "9.0"), "l2vit_b": ("89", "15.9"),
    "inline_deit_tiny": ("6.5", "1.1"), "inline_deit_small": ("16.7", "5.0"), "inline_deit_base": ("23.8", "17.2"),
    "inline_swin_tiny": ("30", "4.5"), "inline_swin_small": ("50", "8.7"), "inline_swin_base": ("88", "15.4"),
    "lightnet_t": None, "lightnet_s": None, "lightnet_b": None,
}  # fmt: skip
# Feed-forward layers of another width, for sizes whose published figures are then met.
OTHER = {"ravlt": 3.0, "mavit": 3.0, "nalaformer_t": 3.5}

RETINANET = (
    "0",
    "43",
    "152",
    "281",
)  # of RAVLT T, S, B and L, in the same README, less T's 201: what the detector's own heads take is gone


def accountings() -> list[list[str]]:
    """RAVLT's four sizes under what a published figure may contain."""
    rows: dict[str, list[str]] = {}

    def add(name: str, *figures: float) -> None:
        rows.setdefault(name, []).extend(f"{figure / 1e9:.2f}" for figure in figures)

    base: dict[str, float] = {}
    for size in "tsbl":
        model: Any = timm.create_model(f"ravlt_{size}")
        dims, depths = [info["num_chs"] for info in model.feature_info], [len(stage.blocks) for stage in model.stages]
        gate = sum(depth * (56 >> i) ** 2 * dim**2 for i, (dim, depth) in enumerate(zip(dims, depths)))  # a quarter of qkvg
        head = 7 * 7 * dims[-1] * model.head_hidden_size
        count = flops(model, 224)
        add("fvcore's rule", count.fvcore)
        add("without norms", count.total)
        add("without products between tokens", count.fvcore - count.attention)
        add("without either", count.total - count.attention)
        add("feed-forward layers of ratio 3", flops(timm.create_model(f"ravlt_{size}", mlp_ratio=3.0)).fvcore)
        add("without the output gate's projection", count.fvcore - gate)
        add("without it and the head's convolution", count.fvcore - gate - head)
        # The detector: RAVLT without its head on 800 × 1280, and FPN's convolutions, whose sizes follow from RAVLT's.
        large, cells = flops(model, (800, 1280)), [200 * 320 >> 2 * i for i in range(4)]
        rest = sum(n * dim * 256 for n, dim in zip(cells[1:], dims[1:])) + 13 * 20 * 9 * dims[3] * 256
        rest -= cells[3] * dims[3] * model.head_hidden_size + model.head_hidden_size * 1000
        for name, found in (
            ("RetinaNet: fvcore's rule", large.fvcore), ("RetinaNet: without products between tokens", large.fvcore - large.attention)
        ):  # fmt: skip
            add(name, found + rest - base.setdefault(name, found + rest))
    published = [PUBLISHED[f"ravlt_{size}"][1] for size in "tsbl"]
    split = list(rows.items())
    return [["published", *published], *([k, *v] for k, v in split[:-2]), ["RetinaNet: published, less T's", *RETINANET],
            *([k, *v] for k, v in split[-2:])]  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for name, published in PUBLISHED.items():
        model = timm.create_model(name)
        side = model.pretrained_cfg["input_size"][1]
        count, parameters = flops(model, side), sum(p.numel() for p in model.parameters())
        ratio = OTHER.get(name, OTHER.get(name.partition("_")[0]))
        other = "–"
        if ratio is not None:
            other = f"{flops(timm.create_model(name, mlp_ratio=ratio)).fvcore / 1e9:.2f}"
        figures = [str(side), f"{parameters / 1e6:.1f}", f"{count.total / 1e9:.2f}", f"{count.fvcore / 1e9:.2f}", other]
        rows.append([name, *figures, *(published or ("–", "–"))])
        print(*rows[-1])
    columns = [
        "backbone", "size", "M parameters", "GMACs", "by fvcore's rule", "the same, narrower FFN", "published M parameters",
        "published GFLOPs",
    ]  # fmt: skip
    tables = [{"title": "Vision backbones", "columns": columns, "rows": rows}]
    tables.append({"title": "RAVLT by what is counted, G", "columns": ["accounting", "T", "S", "B", "L"], "rows": accountings()})
    about = {"benchmark": "flops", "title": "Multiply–adds of vision backbones", **stamp("cpu")}
    write_json(RESULTS / "flops.json", {**about, "tables": tables})


if __name__ == "__main__":
    main()
