import json

import pytest
from bench import tiny
from typer.testing import CliRunner

import subquad
from subquad.cli import app

folder, text, tokenizer = tiny.folder, tiny.text, tiny.tokenizer  # fixtures


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *parts):
    """Exit status 2, one line on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("subquad: ") and result.stdout == ""
    for part in parts:
        assert part in result.stderr
    return True


def test_version():
    assert call("--version").stdout == f"subquad {subquad.__version__}\n"


def test_list_knows_every_mechanism():
    read = json.loads(call("list", "--json").stdout)
    assert [c["name"] for c in read] != [] and {c["name"] for c in read} == set(subquad.mechanisms())
    shown = call("list")
    assert shown.exit_code == 0 and all(name in shown.stdout for name in subquad.mechanisms())


def test_list_filters():
    read = json.loads(call("list", "--family", "linear", "--can", "recurrent", "--json").stdout)
    wanted = {name for name, card in subquad.mechanisms().items() if card.family == "linear" and card.recurrent}
    assert {c["name"] for c in read} == wanted != set()
    refused(call("list", "--family", "linaer"), "--family", "nearest: linear")
    refused(call("list", "--can", "recurent"), "--can", "recurrent")


@pytest.mark.parametrize("name", ["softmax", "sliding-window", "lolcats", "gla", "rala"])
def test_show_has_the_card_options_and_costs(name):
    card, shown = subquad.card(name), call("show", name, "--tokens", "4096")
    assert shown.exit_code == 0
    assert card.summary in shown.stdout and card.paper in shown.stdout and f'subquad.attention("{name}"' in shown.stdout
    read = json.loads(call("show", name, "--tokens", "4096", "--json").stdout)
    assert set(read["options"]) == set(subquad.attention(name, 2, 16, hidden_size=32).options)
    assert read["costs"]["flops"] > 0 and ("state_bytes" in read["costs"]) == (card.state_bytes is not None)


def test_show_takes_options():
    def bytes_of(text):
        return json.loads(call("show", text, "--json").stdout)["costs"]["state_bytes"]

    assert bytes_of("sliding-window:window=128,sinks=0") == 2 * bytes_of("sliding-window:window=64,sinks=0")
    refused(call("show", "sliding-windo"), "nearest: sliding-window")
    refused(call("show", "sliding-window:windows=3"), "nearest: window")


def test_usage_of_show_runs():
    import re

    shown = call("show", "sliding-window:window=8", "--heads", 4, "--kv-heads", 2, "--head-dim", 8).stdout
    line = re.search(r"module = (subquad\.attention\(.*\))", shown)[1]
    module = eval(line, {"subquad": subquad})
    assert module.options["window"] == 8 and (module.heads, module.kv_heads, module.head_dim) == (4, 2, 8)


def test_swap_before_and_after(folder, text, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "swap", folder, "--to", "sliding-window:window=8,sinks=2", "--to", "lolcats", "--layers", "1:1", "--distill", 2, "--text", text,
        "--window", 64, "--windows", 2, "--length", 32, "--prompts", 0, "--lengths", "16,32", "--out", out,
    ]  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [r["distilled_steps"] for r in rows] == [0, 0, 0, 2] and [r["layers"] for r in rows] == ["0 of 4", *["2 of 4"] * 3]
    assert "report.html" in result.stdout and (out / "lolcats" / "model.safetensors").exists()
    refused(call(*arguments), "--out", "a finished run")


def test_alternating_layers(folder, text, tmp_path):
    """Three layers swapped, the fourth kept: windows as long as the held-out ones change nothing, and only the fourth grows."""
    out = tmp_path / "out"
    arguments = [
        "swap", folder, "--to", "sliding-window:window=64,sinks=0", "--to", "lolcats:window=64", "--to", "sliding-window:window=8,sinks=0",
        "--layers", "3:1", "--distill", 1, "--text", text, "--window", 64, "--windows", 2, "--length", 32, "--prompts", 0,
        "--lengths", "32", "--out", out,
    ]  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    original, window, lolcats, short, taught = (subquad.Report.load(out).rows[i] for i in (0, 1, 2, 4, 3))
    assert [row.layers for row in (original, window, lolcats, short)] == ["0 of 4", *["3 of 4"] * 3]
    assert window.nll == pytest.approx(original.nll, abs=1e-5)
    assert lolcats.nll == pytest.approx(original.nll, abs=1e-5)
    assert abs(short.nll - original.nll) > 1e-3
    # per layer and token 2 heads of 8 keys and 8 values in float32
    assert original.bytes_64k == 4 * 65536 * 128 and short.bytes_64k == (3 * 8 + 65536) * 128
    config = json.loads((out / taught.saved / "config.json").read_text())
    assert set(config["subquad"]["layers"]) == {"0", "1", "2"}


def test_swap_by_a_recipe(folder, text, tmp_path):
    out = tmp_path / "out"
    result = call(
        "swap", folder, "--recipe", "sliding-window", "--recipe", "lolcats", "--distill", 2, "--finetune", 1, "--batch", 1, "--length", 16,
        "--tune-original", "--text", text, "--window", 64, "--windows", 2, "--prompts", 0, "--lengths", 16, "--out", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(r["recipe"], r["distilled_steps"], r["tuned_steps"]) for r in rows] == [
        ("", 0, 0),
        ("", 0, 1),
        ("sliding-window", 0, 0),
        ("sliding-window", 0, 1),
        ("lolcats", 0, 0),
        ("lolcats", 2, 0),
        ("lolcats", 2, 1),
    ]
    assert rows[-1]["taught_tokens"] == 2 * 16 + 8 * 16  # LoLCATs accumulates eight batches
    assert "recipe `lolcats` (arXiv 2410.10254)" in (out / "recipe-lolcats" / "README.md").read_text()
    refused(call("swap", folder, "--recipe", "lolcat", "--text", text), "recipe", "nearest: lolcats")


def test_swap_takes_a_share_of_the_models_own_text(folder, text, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    arguments = [
        "swap", folder, "--to", "sliding-window:window=8,sinks=2", "--finetune", 2, "--length", 16, "--text", text, "--window", 64,
        "--windows", 2, "--prompts", 0, "--lengths", 16, "--self-tokens", 64,
    ]  # fmt: skip
    refused(call(*arguments, "--own-share", "0.5"), "--own-share", "--text self")
    notes = []
    for name, share in (("all", ()), ("half", ("--own-share", "0.5"))):
        result = call(*arguments, "--text", "self", *share, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        notes.append(" ".join(json.loads((tmp_path / name / "report.json").read_text())["notes"]))
    assert "0.5 of the sequences are its own" in notes[1] and "of the sequences" not in notes[0]


def test_swap_in_groups(folder, text, tmp_path):
    arguments = [
        "swap", folder, "--to", "lolcats", "--distill", 2, "--group", 3, "--text", text, "--window", 64, "--windows", 1, "--length", 32,
        "--prompts", 0, "--lengths", 16,
    ]  # fmt: skip
    refused(call(*arguments), "--group", "named with --out")
    refused(call(*arguments, "--group", 0, "--out", tmp_path / "out"), "--group")
    assert call(*arguments, "--out", tmp_path / "out").exit_code == 0
    assert len(subquad.Report.load(tmp_path / "out").rows[-1].losses) == 2


def test_recipes_are_listed():
    listed = json.loads(call("recipes", "--json").stdout)
    assert {"lolcats", "hedgehog", "liger", "lizard", "lawcat", "sliding-window"} <= {one["name"] for one in listed}
    one = json.loads(call("recipes", "liger", "--json").stdout)
    assert one["mechanism"] == "liger" and one["transfer"] is None and one["tokens"] == {"finetune": 2400 * 8 * 1024}
    table = call("recipes").stdout
    assert all(part in table for part in ("lolcats", "lawcat", "transfer 19.7 M"))
    shown = call("recipes", "lolcats").stdout
    for part in ("arXiv 2410.10254", "targets q_proj k_proj v_proj o_proj", "19.7 M tokens", "subquad.linearize("):
        assert part in shown
    refused(call("recipes", "lolcat"), "recipe", "nearest: lolcats")


def test_swap_refuses_in_one_line(folder, text, tmp_path):
    out = tmp_path / "out"
    base = ["swap", folder, "--text", text, "--out", out, "--window", 64, "--windows", 1]
    refused(call(*base, "--to", "lolcat"), "--to", "nearest: lolcats")
    refused(call(*base, "--to", "rala"), "rala", "causal")
    refused(call(*base, "--to", "sliding-window:windw=3"), "nearest: window")
    refused(call("swap", tmp_path / "missing", "--to", "lolcats", "--text", text, "--out", out), "missing")
    refused(call(*base[:-4], "--window", 4096, "--to", "lolcats"), "text", "2120 tokens")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: 500 if file.suffix == ".safetensors" else None])
    refused(call("swap", damaged, *base[2:], "--to", "lolcats"), "damaged", "model.safetensors")
    assert not out.exists()


def test_bench_writes_numbers_and_plots(tmp_path):
    result = call(
        "bench", "sliding-window:window=16", "--tokens", "64,128", "--heads", 2, "--head-dim", 16, "--budget", 0.01, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    read = json.loads((tmp_path / "bench.json").read_text())
    assert [(p["mechanism"], p["tokens"]) for p in read["points"]] == [
        (name, n) for n in (64, 128) for name in ("torch sdpa", "sliding-window:window=16")
    ]  # fmt: skip
    assert {"device", "versions", "commit", "command"} <= read["about"].keys()
    assert "<svg" in (tmp_path / "bench.html").read_text()
    refused(call("bench", "softmax", "--tokens", "many"), "--tokens")
    refused(call("bench", "softmax", "--dtype", "float31"), "--dtype", "float32")


def test_doctor_says_what_runs():
    result = call("doctor")
    assert result.exit_code == 0 and "Traceback" not in result.output
    for name in ("torch", "cuda", "triton", "transformers", "memory", "embedded model", "mechanisms run"):
        assert name in result.stdout
    total = len(subquad.mechanisms())
    assert f"{total} of {total}, forward and backward" in result.stdout


def test_a_broken_part_is_a_finding_not_a_traceback(monkeypatch):
    from subquad.bench import doctor

    def broken():
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(doctor, "_torch", broken)
    found = doctor._safely(doctor._torch)
    assert (found.state, found.found) == ("broken", "RuntimeError: two")


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("swap", "smollm2-135m"), "--to"),
        (("swap",), "model"),
        (("swap", "smollm2-135m", "--to", "lolcats", "--window", "wide"), "--window"),
        (("swap", "smollm2-135m", "--to", "lolcats", "--seed", "9" * 23), "--seed"),
        (("swap", "smollm2-135", "--to", "lolcats"), "nearest: smollm2-135m"),
        (("swap", "vit_tiny_patch16_224", "--to", "rala", "--distill", "3"), "--distill: got given; expected without it"),
        (("swap", "smollm2-135m", "--to", "lolcats", "--size", "224"), "--size: got given; expected an image model"),
        (("flops", "ravlt_z"), "nearest: ravlt_t"),
        (("swop",), "swop"),
        (("--bogus",), "--bogus"),
    ],
)
def test_misuse_is_one_line(arguments, part):
    refused(call(*arguments), part)


def test_help_stays():
    for arguments in (("--help",), ("swap", "--help")):
        shown = call(*arguments)
        assert shown.exit_code == 0 and "Usage" in shown.stdout


def test_bench_leaves_folders_of_others_alone(tmp_path):
    (tmp_path / "bench.json").write_text("important")
    refused(call("bench", "softmax", "--tokens", "64", "--out", tmp_path), "--out", "new or empty")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"] and (tmp_path / "bench.json").read_text() == "important"


def test_bench_asks_for_its_folder_before_it_measures(tmp_path, monkeypatch):
    from pathlib import Path

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    monkeypatch.setattr("subquad.bench.mechanisms.bench", lambda *_, **__: pytest.fail("measured"))
    refused(call("bench", "softmax", "--tokens", "64", "--out", tmp_path / "out"), "--out", "No space left on device")
    monkeypatch.undo()
    refused(call("bench", "softmax", "--kv-heads", "4", "--tokens", "64", "--out", tmp_path / "out"), "heads")
    assert not (tmp_path / "out").exists()


GNA = ["simulate-gna", "--grid", "30x48x80", "--window", "18x24x24"]


def test_simulate_gna_counts_what_it_is_asked(tmp_path):
    """HunyuanVideo at 91 %: 900 key tiles, of which 9 · 3 · 3 are visited at the stride that needs no mask."""
    one = [*GNA, "--stride", "16x8x8", "--tiles-q", "4x8x8", "--tiles-k", "2x8x8", "--share", "0.607"]
    (row,) = json.loads(call(*one, "--json").stdout)["rows"]
    assert row["worst"] == 81 and row["bound"] == pytest.approx(900 / 81) and row["partial"] == 0
    assert row["end_to_end"] == pytest.approx(1 / (0.393 + 0.607 * 81 / 900))
    assert [(axis["first"][0], axis["last"][0]) for (axis,) in row["axes"]] == [(0, 8), (0, 2), (0, 2)]
    shown = call(*one).stdout
    assert "16x8x8" in shown and "2.23×" in shown and "ideal 11.11×" in shown
    read = json.loads(call(*GNA, "--stride", "all", "--tiles-q", "4x8x8", "--tiles-k", "2x8x8", "--json").stdout)
    assert [tuple(row["stride"]) for row in read["rows"]][-1] == (16, 8, 8) and len(read["rows"]) == 7
    for stride, name in (("all", "strides.png"), ("1", "tiles.svg")):
        assert call(*GNA, "--stride", stride, "--tiles-q", "64,128", "--top", 3, "--plot", tmp_path / name).exit_code == 0
        assert (tmp_path / name).stat().st_size > 5000


def test_simulate_gna_takes_dilation_and_causal_axes():
    shape = ["--grid", "8x12", "--window", "2x3", "--dilation", "1x4", "--causal", "0"]
    read = json.loads(call("simulate-gna", *shape, "--tiles-q", "1x1", "--tiles-k", "1x1", "--json").stdout)
    assert read["causal"] == [True, False] and read["dilation"] == [1, 4]
    assert read["rows"][0]["density"] == pytest.approx((15 / 64) * (3 / 12))  # one key in the first row, two after; three in each column


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--grid", "30x48"], "expected at most 30"),
        (["--grid", "30x48x80x2"], "--grid"),
        (["--window", "0x3x3"], "--window: got '0x3x3'"),
        (["--window", "3x3"], "--window: got '3x3'; expected one or 3 positive integers"),
        (["--stride", "some"], "--stride"),
        (["--stride", "32x1x1"], "stride: got 32"),
        (["--causal", "3"], "axes of 0 … 2"),
        (["--tiles-q", "4x8"], "--tiles-q: got '4x8'; expected 3 sides"),
        (["--tiles-k", "0"], "--tiles-k"),
        (["--share", "1.5"], "--share"),
        (["--plot", "out.xyz"], "--plot"),
        (["--plot", "/nowhere/out.png"], "--plot"),
    ],
)
def test_simulate_gna_refuses_in_one_line(arguments, part):
    given = dict(zip(GNA[1::2], GNA[2::2])) | dict(zip(arguments[::2], arguments[1::2]))
    if arguments[0] == "--grid":
        given["--window"] = "40"
    refused(call("simulate-gna", *(x for pair in given.items() for x in pair)), part)


def test_swap_sweeps_a_setting(folder, text, tmp_path):
    out = tmp_path / "out"
    base = [
        "swap",
        folder,
        "--to",
        "sliding-window:sinks=0",
        "--text",
        text,
        "--window",
        64,
        "--windows",
        1,
        "--prompts",
        0,
        "--lengths",
        "16",
    ]
    result = call(*base, "--sweep", "window=8,64", "--out", out)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [(r["base"], r["setting"]) for r in rows[1:]] == [("sliding-window:sinks=0", f"window={w}") for w in (8, 64)]
    assert "by density" in result.stdout
    refused(call(*base, "--sweep", "windw=8,64", "--out", tmp_path / "new"), "--sweep", "nearest: window")
