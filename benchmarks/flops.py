"""Parameters and multiply–adds of the vision backbones beside the published ones: writes benchmarks/results/flops.json.

python benchmarks/flops.py
"""

from __future__ import annotations

import timm
import torch
from common import RESULTS, stamp, write_json

import subquad  # noqa: F401  registers the backbones with timm
from subquad.bench.flops import flops

# Millions of parameters and "GFLOPs" as published, at each model's own size: in the authors' READMEs (RAVLT: qhfan/RALA; NaLaFormer:
# ZacharyMeng/NaLaFormer; L2ViT: ChuanyangZheng/L2ViT; InLine: LeapLabTHU/InLine) and, for MAViT-S, in the abstract of arXiv 2507.00698.
PUBLISHED = {
    "ravlt_t": ("15", "2.4"), "ravlt_s": ("26", "4.6"), "ravlt_b": ("48", "9.9"), "ravlt_l": ("95", "16.0"),
    "mavit_t": None, "mavit_s": ("27", "4.6"), "mavit_b": None, "mavit_l": None,
    "nalaformer_xt": ("8", "1.0"), "nalaformer_t": ("15", "2.7"), "nalaformer_s": ("26", "5.1"), "nalaformer_b": ("52", "12"),
    "nalaformer_l": ("95", "18"),
    "l2vit_t": ("29", "4.7"), "l2vit_s": ("50", "9.0"), "l2vit_b": ("89", "15.9"),
    "inline_deit_tiny": ("6.5", "1.1"), "inline_deit_small": ("16.7", "5.0"), "inline_deit_base": ("23.8", "17.2"),
    "inline_swin_tiny": ("30", "4.5"), "inline_swin_small": ("50", "8.7"), "inline_swin_base": ("88", "15.4"),
    "lightnet_t": None, "lightnet_s": None, "lightnet_b": None,
}  # fmt: skip
# Feed-forward layers of another width, for sizes whose published figures are then met.
OTHER = {"ravlt": 3.0, "mavit": 3.0, "nalaformer_t": 3.5}


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
    about = {"benchmark": "flops", "title": "Multiply–adds of vision backbones", **stamp("cpu")}
    write_json(RESULTS / "flops.json", {**about, "tables": tables})


if __name__ == "__main__":
    main()
