"""`subquad tune`: candidates, which of them count, the file, and how the kernels take it up."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from typer.testing import CliRunner

from subquad import InputError
from subquad.bench import tune
from subquad.cli import app
from subquad.ops import launch
from subquad.ops.launch import Config

CASE = tune.Case("solve", "none", 128, 16)


def command(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


def table_in_a_process(path):
    code = "from subquad.ops import launch; print(launch.config('solve', 128, 16, 'none', False), len(launch.TABLE))"
    environment = {**os.environ, "SUBQUAD_LAUNCH": str(path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("bits", [16, 32])
def test_candidates_hold_the_row_in_use_once_and_no_tile_wider_than_the_head(bits):
    for kernel, decays in tune.KERNELS.items():
        for case in (tune.Case(kernel, decay, width, bits) for decay in decays for width in (16, 64, 128)):
            for regime in tune.regimes(case, quick=False):
                found = tune.candidates(case, regime)
                assert tune.current(case, regime) in found and len(set(found)) == len(found) > 2
                assert kernel == "inverse" or all(config.columns <= max(64, case.width) for config in found)


def test_every_row_of_the_table_can_be_measured():
    assert {(kernel, decay) for kernel, _, _, decay in launch.TABLE} == {(k, d) for k, decays in tune.KERNELS.items() for d in decays}


def test_wrong_numbers_and_what_does_not_launch_do_not_count(monkeypatch):
    configs = [Config(32, 4, 1), Config(64, 8, 1), Config(64, 4, 3), Config(64, 4, 2), Config(16, 4, 1)]

    def operation(case, *_):
        def call():
            now = tune.current(case, "many")
            if now.stages == 3:
                raise RuntimeError("out of resource: shared memory")
            bad = {8: 0.1, 4: 0.0}[now.warps] if now.columns != 16 else float("nan")
            return {"o": torch.ones(4, 3) + bad, "dots": torch.full((1, 1, 128 // now.columns, 2), now.columns / 128), "none": None}

        return call

    monkeypatch.setattr(tune, "operation", operation)
    before = dict(launch.TABLE)
    try:
        tried, wrong = tune.try_all(CASE, "many", configs, torch.bfloat16, "cpu")
        assert set(tried) == {Config(32, 4, 1), Config(64, 4, 2)} and wrong == [Config(64, 8, 1), Config(16, 4, 1)]
        with pytest.raises(RuntimeError, match="shared memory"):
            tune.try_all(CASE, "many", [Config(64, 4, 3)], torch.bfloat16, "cpu")
    finally:
        launch.use(before)


def test_what_loses_the_device_is_left_out_in_another_process(monkeypatch):
    """The process that loses it is replaced; what lost it is named among the wrong ones, and another is the reference."""
    deadly, started = Config(*tune.REFERENCE), []

    class Worker:
        def __init__(self, *_, **__):
            started.append(self)

        def submit(self, function, *given):
            done = Future()
            try:
                done.set_result(function(*given[:3], "cpu", *given[4:]))
            except tune.Lost as lost:
                done.set_exception(pickle.loads(pickle.dumps(lost)))  # as it comes from a process
            return done

        def shutdown(self, **_): ...

    def operation(case, *_):
        def call():
            if tune.current(case, "many") == deadly:
                raise RuntimeError("an illegal memory access")
            return {"o": torch.ones(2)}

        return call

    def synchronize(_):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Worker)
    monkeypatch.setattr(tune, "operation", operation)
    monkeypatch.setattr(tune, "synchronize", synchronize)
    before, workers = dict(launch.TABLE), []
    row = tune.find_apart(CASE, False, torch.bfloat16, workers)
    assert len(started) == 2 and started[1:] == workers and row.wrong == [deadly] and dict(launch.TABLE) == before
    assert deadly not in row.tried["many"] and len(row.tried["many"]) >= 4


def test_a_process_that_dies_leaves_the_row_in_use(monkeypatch):
    class Worker:
        def __init__(self, *_, **__): ...

        def submit(self, *_):
            done = Future()
            done.set_exception(BrokenProcessPool("it was killed"))
            return done

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Worker)
    workers = []
    row = tune.find_apart(CASE, False, torch.bfloat16, workers)
    assert (row.many, row.few) == launch.TABLE[CASE.key] and not workers and not row.tried and "many" not in row.line.split("#")[1]


def test_the_row_in_use_stays_unless_another_is_clearly_faster():
    now, other, barred = Config(64, 4, 2), Config(64, 4, 3), Config(128, 8, 2)
    assert tune.pick({now: 1.01, other: 1.0, barred: 0.1}, now, {now, other}) == now
    assert tune.pick({now: 1.1, other: 1.0, barred: 0.1}, now, {now, other}) == other
    assert tune.pick({other: 1.0}, now, {other}) == other  # the row in use does not launch
    assert tune.pick({}, now, set()) == now


def test_few_programs_may_be_served_best_by_segments(monkeypatch):
    """The row for many in both places: `choose` then cuts the sequences."""
    case, many, narrow = tune.Case("pass", "none", 128, 16), Config(64, 4, 2), Config(32, 4, 4)
    ms = {"many": {many: 1.0}, "few": {many: 1.0, narrow: 2.0, launch.config(*case.key, few=True): 3.0}}
    monkeypatch.setattr(tune, "try_all", lambda case, regime, configs, *_: ({c: ms[regime].get(c, 9.0) for c in configs}, []))
    monkeypatch.setattr(tune, "taken", lambda case, regime, config, device: regime == "many" or config.columns <= 32)
    found = tune.find(case, False, torch.bfloat16, "cpu")
    assert (found.many, found.few, found.ms["few"][0]) == (many, many, 1.0)
    ms["few"][narrow] = 0.5
    assert tune.find(case, False, torch.bfloat16, "cpu").few == narrow


def test_a_row_is_what_the_table_holds_and_the_file_is_read_at_import(tmp_path):
    row = tune.Row(
        CASE, Config(32, 8, 1), Config(16, 4, 2), {"many": (0.1234, None)}, {"many": {Config(32, 8, 1): 0.1234}}, [Config(64, 4, 3)]
    )
    assert eval("{" + row.line + "\n}", {"Config": Config}) == {CASE.key: (row.many, row.few)}
    assert "many 0.123 ms, was –" in row.line and "WRONG: (64, 4, 3)" in row.line
    path = tmp_path / "launch.json"
    path.write_text(tune.save([row, row], {"device": "none"}))
    assert json.loads(path.read_text())["device"] == "none"
    assert launch.read_rows(str(path), "x") == {CASE.key: (row.many, row.few)}
    done = table_in_a_process(path)
    assert done.stdout.split() == ["Config(columns=32,", "warps=8,", "stages=1)", str(len(launch.TABLE))], done.stderr


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", 'no "rows"'),
        ('{"rows": [{"kernel": "pass"}]}', "without kernel"),
        ('{"rows": [{"kernel": "pas", "width": 64, "bits": 16, "decay": "none", "many": [64, 4, 1], "few": [64, 4, 1]}]}', "'pas'"),
        ('{"rows": [{"kernel": [], "width": 64, "bits": 16, "decay": "none", "many": [64, 4, 1], "few": [64, 4, 1]}]}', "a row for"),
        ('{"rows": [{"kernel": "pass", "width": 64, "bits": 16, "decay": "none", "many": [64, 4], "few": [64, 4, 1]}]}', "[64, 4]"),
        ('{"rows": [{"kernel": "pass", "width": 64, "bits": 16, "decay": "none", "many": [64, 4, 1], "few": [48, 4, 1]}]}', "[48, 4, 1]"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, said):
    path = tmp_path / "launch.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        launch.read_rows(str(path), "SUBQUAD_LAUNCH")
    assert str(caught.value).startswith("SUBQUAD_LAUNCH: ") and said in str(caught.value) and "subquad tune" in str(caught.value)


def test_a_malformed_file_stops_the_import(tmp_path):
    (tmp_path / "launch.json").write_text("{}")
    done = table_in_a_process(tmp_path / "launch.json")
    assert done.returncode and "InputError: SUBQUAD_LAUNCH: " in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device it would measure")
def test_without_cuda_one_line(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = [(), ("--device", "cpu"), ("--dtype", "float16"), ("--head-dim", "512"), ("--head-dim", "no")]
    said = ["CUDA", "TRITON_INTERPRET", "bfloat16", "256", "--head-dim"]
    for arguments, part in zip(cases, said):
        result = command(*arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and part in result.stderr, result.output


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton compiles here")
def test_tiny_run_in_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "WIDE", tune.WIDE[:1])
    before, out = dict(launch.TABLE), tmp_path / "launch.json"
    kernels = [word for name in ("inverse", "solve", "mirror", "keys", "queries") for word in ("--kernel", name)]
    result = command("--device", "cpu", "--head-dim", "16", "--out", str(out), *kernels)
    assert result.exit_code == 0, result.output
    assert before == launch.TABLE
    rows = launch.read_rows(str(out), "x")
    assert result.stdout.count("Config(") == 2 * len(rows) == 20
    assert eval("{" + result.stdout + "\n}", {"Config": Config}) == rows
    assert "--kernel" in command("--device", "cpu", "--kernel", "pas").stderr


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton compiles here")
@pytest.mark.parametrize("decay", tune.KERNELS["pass"])
def test_the_pass_is_the_whole_operator(decay):
    call = tune.operation(tune.Case("pass", decay, 16, 32), (1, 10, 1, 16), torch.float32, "cpu")
    found = tune.values(call())
    assert set(found) == set("oqkvg") and found["g"].numel() == {"none": 0, "scalar": 10, "channel": 160}[decay]
    assert tune.same(tune.values(call()), found, 0.0)


@pytest.mark.skipif(not launch.INTERPRETED, reason="Triton compiles here")
@pytest.mark.parametrize("decay", tune.KERNELS["keys"])
def test_passes_of_two_sums_are_compared_in_all_that_they_give(decay):
    given = (1, 10, 1, 16), torch.float32, "cpu"
    sums = {"dots"} if decay == "scalar" else set()
    assert set(tune.values(tune.operation(tune.Case("queries", decay, 16, 32), *given)())) == {"o", "more"} | sums
    assert set(tune.values(tune.operation(tune.Case("keys", decay, 16, 32), *given)())) == {"o"} | sums
