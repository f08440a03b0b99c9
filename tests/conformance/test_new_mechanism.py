"""One new file under subquad/mechanisms is all that a mechanism takes: `toy.py`, beside this file, shows it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import subquad

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package, to which the toy's file is added and nothing else."""
    folder = tmp_path_factory.mktemp("copy")
    package = Path(subquad.__file__).parent
    shutil.copytree(package, folder / "subquad", ignore=shutil.ignore_patterns("__pycache__", "*.xz"))
    shutil.copy(HERE / "toy.py", folder / "subquad" / "mechanisms" / "linear" / "toy_retention.py")
    return folder


def python(copy, *arguments):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=300)


def test_the_toy_is_short():
    assert len((HERE / "toy.py").read_text().splitlines()) < 40


def test_it_is_registered(copy):
    script = "import subquad; print(subquad.__file__); print(subquad.card('toy-retention').title, 'toy-retention' in subquad.mechanisms())"
    done = python(copy, "-c", script)
    assert done.stdout.splitlines() == [str(copy / "subquad" / "__init__.py"), "Toy retention True"], done.stderr


def test_the_command_line_lists_it(copy):
    done = python(copy, "-m", "subquad.cli", "list")
    assert done.returncode == 0 and "toy-retention" in done.stdout, done.stdout + done.stderr


def test_the_suite_runs_it(copy):
    """Every kind of test that its card calls for is collected for the toy, and passes."""
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-p", "no:xdist", "-rA"]
    done = python(copy, "-m", "pytest", str(HERE), *options, "-m", "not slow", "-k", "toy-retention and not compiles")
    assert done.returncode == 0, done.stdout[-5000:]
    for test in ("test_output", "test_split_equals_one_pass", "test_packed_equals_separate", "test_no_gradient_from_the_future"):
        assert f"::{test}[toy-retention" in done.stdout
