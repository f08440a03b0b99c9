"""Multiply–adds: of layers that can be counted by hand, and of models whose published figures are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import subquad
from subquad.bench.flops import flops
from subquad.cli import app

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 24)
        self.mix = subquad.attention("linear-relu", 2, 4, causal=False)

    def forward(self, x):
        x = self.norm(self.depthwise(self.conv(x)).flatten(2).mT)
        q, k, v = self.linear(x).unflatten(-1, (3, 2, 4)).unbind(2)
        return torch.softmax(self.mix(q, k, v).transpose(1, 2) @ self.mix(q, k, v).permute(0, 2, 3, 1), -1)


def test_a_count_by_hand():
    """6 × 4 = 24 tokens."""
    model = Small().train()
    found = flops(model, (24, 16))
    assert found.convolutions == 24 * 8 * (3 * 16 + 9)
    assert found.linear == 24 * 8 * 24
    card = subquad.card("linear-relu").flops(subquad.Shape(24, 2, 4), causal=False) / 2
    assert card > 0 and found.attention == 2 * card + 2 * 24 * 24 * 4  # two mechanisms, and a product that is nobody's
    assert found.norms == 5 * 24 * 8
    assert found.fvcore - found.total == found.norms and found.total == found.convolutions + found.linear + found.attention
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("name", "published"),
    [("deit_small_patch16_224", "4.6"), ("swin_tiny_patch4_window7_224", "4.5"), ("l2vit_t", "4.7"), ("ravlt_t", None)],
)
def test_models(name, published):
    """DeiT and Swin as their papers have them; our backbones also as the table in the documentation has them."""
    model = timm.create_model(name)
    found = flops(model)
    if published is not None:
        assert f"{found.fvcore / 1e9:.1f}" == published
    rows = {row[0]: row for row in json.loads((RESULTS / "flops.json").read_text())["tables"][0]["rows"]}
    if name in rows:
        assert rows[name][3:5] == [f"{found.total / 1e9:.2f}", f"{found.fvcore / 1e9:.2f}"]


def test_published_figures_are_met_to_their_rounding():
    """By fvcore's rule; without norms it would be 47.3."""
    found = flops(timm.create_model("l2vit_b", window=12), 384)
    assert f"{found.fvcore / 1e9:.1f}" == "47.5" and f"{found.total / 1e9:.1f}" == "47.3"


def test_swapping_takes_the_quadratic_part_away():
    before = flops(timm.create_model("swin_tiny_patch4_window7_224"))
    model = subquad.swap(timm.create_model("swin_tiny_patch4_window7_224"), "rala")
    after = flops(model)
    per_token = sum(
        tokens * depth * 2 * heads * (32 * 32 + 2 * 32) for tokens, depth, heads in ((3136, 2, 3), (784, 2, 6), (196, 6, 12), (49, 2, 24))
    )
    assert after.attention == per_token  # rala's card: 2·D·V + 4·D multiply–adds a head and token
    assert after.convolutions == before.convolutions and after.linear == before.linear


def test_the_command():
    done = CliRunner().invoke(app, ["flops", "deit_tiny_patch16_224", "--size", "112x224"])
    assert done.exit_code == 0 and done.output.startswith("deit_tiny_patch16_224, 112 × 224: 5.7 M parameters\n")
    assert float(done.output.split("all")[1].split()[0]) == pytest.approx(0.59, abs=0.02)  # 1.26 at 224², attention a quarter of 0.12
    wrong = CliRunner().invoke(app, ["flops", "deit_tiny_patch16_224", "--size", "big"])
    assert wrong.exit_code == 2 and "--size: got 'big'" in wrong.output


def test_the_page_is_current():
    """The tables that `make docs` writes into docs/vision.md."""
    done = subprocess.run([sys.executable, ROOT / "docs" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_use_is_one_line():
    for model, size, message in ((Small(), 0, "size: got 0"), (timm.create_model("vit_tiny_patch16_224"), 100, "size: got 100 × 100 (")):
        with pytest.raises(subquad.InputError) as error:
            flops(model, size)
        assert message in str(error.value)
