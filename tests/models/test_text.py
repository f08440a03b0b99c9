"""The book, files of text, and how tokens are cut."""

import gzip
import hashlib
import lzma
import sys
import types
from pathlib import Path

import pytest
import torch

from subquad import InputError
from subquad.models import text
from subquad.models.text import Batches, book, encode, load_text, split, windows


class Characters:
    """A tokenizer that gives each character's code, and 0 where asked for special tokens."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": ([0] if add_special_tokens else []) + [ord(c) for c in text]}


def test_the_book_is_the_one_that_data_md_names():
    digest = hashlib.sha256(book().encode()).hexdigest()
    assert digest == "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"


def test_files_folders_and_compressed_files_are_read_in_order(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "b.md").write_text("second", encoding="utf-8")
    (tmp_path / "folder" / "a.txt").write_bytes("\ufefffirst é".encode())
    (tmp_path / "folder" / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "folder" / "picture.png").write_bytes(b"\xff\xff")
    (tmp_path / "last.xz").write_bytes(lzma.compress(b"fourth"))
    assert load_text([tmp_path / "folder", tmp_path / "last.xz"]) == "first é\n\nsecond\n\nthird\n\nfourth"
    assert load_text(str(tmp_path / "folder" / "b.md")) == "second"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("gone.txt", None, "exists"),
        ("binary.txt", b"abc\xff\xfe", "byte 3"),
        ("cut.xz", lzma.compress(b"text" * 1000)[:40], "undamaged"),
        ("cut.gz", gzip.compress(b"text" * 1000, mtime=0)[:20], "undamaged"),
        ("empty.txt", b" \n", "text in it"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{says}"):
        load_text(tmp_path / name)


def test_a_folder_without_text_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"1")
    with pytest.raises(InputError, match=r"holds \.txt or \.md"):
        load_text(tmp_path)


def test_encoding_adds_no_special_tokens():
    assert encode("ab", Characters()).tolist() == [97, 98]


def test_the_end_is_held_out():
    tokens = torch.arange(100)
    assert [part.tolist() for part in split(tokens, 10)] == [list(range(90)), list(range(90, 100))]
    assert split(tokens, 0.25)[1].tolist() == list(range(75, 100))
    for held_out in (0, 100, 1.0, 0.0, -3):
        with pytest.raises(InputError, match="held_out"):
            split(tokens, held_out)


@pytest.mark.parametrize("total", [10, 11, 12, 37, 40])
@pytest.mark.parametrize("stride", [1, 3, 9, 10])
def test_every_token_with_context_is_scored_once(total, stride):
    size, seen = 10, []
    for window in windows(torch.arange(total), size, stride):
        assert window.tokens.shape == (size,)
        assert window.tokens.diff().eq(1).all()  # a window is one piece of the text
        assert 0 < window.scored < size
        seen += window.tokens[-window.scored :].tolist()
    assert seen == sorted(set(seen))
    first = {0} if stride < size else set(range(0, total - size + 1, size))  # the first of a window that overlaps no other
    assert set(range(total)) - set(seen) == first


def test_strided_windows_leave_full_context():
    spans = list(windows(torch.arange(30), 10, 4))
    assert [(int(s.tokens[0]), s.scored) for s in spans] == [(0, 9), (4, 4), (8, 4), (12, 4), (16, 4), (20, 4)]


def test_text_shorter_than_a_window_is_an_error():
    for cut in (lambda t: windows(t, 10), lambda t: Batches(t, 10, 5)):
        with pytest.raises(InputError, match="text: got 9 tokens; expected at least one window, 10 tokens"):
            cut(torch.arange(9))
    with pytest.raises(InputError, match="stride"):
        windows(torch.arange(20), 10, 11)


def test_batches_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000)
    batches = Batches(tokens, 30, 50, seed=1, batch=2)
    later = Batches(tokens, 30, 50, seed=1, batch=2)[37]
    assert torch.equal(batches[37], later)
    assert batches[0].shape == (2, 30) and len(batches) == 50
    assert not torch.equal(batches[0], Batches(tokens, 30, 50, seed=2, batch=2)[0])
    assert all(row.diff().eq(1).all() for batch in batches for row in batch)


def test_an_epoch_takes_no_token_twice_and_the_next_is_cut_otherwise():
    tokens = torch.arange(1000)
    pieces = Batches(tokens, 30, 32, seed=0).pieces
    assert pieces == 32  # (1000 - 30) // 30
    epoch = torch.cat([batch[0] for batch in Batches(tokens, 30, pieces, seed=0)])
    assert epoch.unique().numel() == pieces * 30
    following = torch.cat([Batches(tokens, 30, 2 * pieces, seed=0)[pieces + i][0] for i in range(pieces)])
    assert following.unique().numel() == pieces * 30
    assert not torch.equal(epoch, following)


def test_text_of_exactly_one_piece_still_trains():
    assert Batches(torch.arange(10), 10, 3)[2].tolist() == [list(range(10))]


def test_a_data_set_is_read_from_its_beginning(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "no/where":
            raise ConnectionError("cannot\nreach it")
        column = "body" if name == "no/text" else "text"
        return ({column: f"row {i}"} for i in range(10**9))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(text, "_MOST_CHARACTERS", 12)
    (tmp_path / "a.txt").write_text("a file")
    assert text.load_text([tmp_path / "a.txt", Path("hub:me/mine:small")]) == "a file\n\nrow 0\n\nrow 1"
    assert asked == [("me/mine", "small", "train", True)]
    for given, words in (("hub:no/where", "cannot reach it"), ("hub:no/text", "with columns body")):
        with pytest.raises(InputError, match=words) as error:
            text.load_text(given)
        assert error.value.argument == "text" and "\n" not in str(error.value) and given in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        text.load_text("hub:me/mine")
