"""Data sets: what is in them, how they are split, what is drawn, and what is refused."""

import sys

import pytest
import torch
from train.photos import folder

from subquad.checks import InputError
from subquad.train import images


def test_digits_of_the_package_are_mnist_split_evenly():
    data = images.load("mnist", 28)
    assert data.images.shape == (8000, 1, 28, 28) and data.test_images.shape == (2000, 1, 28, 28)
    every = torch.cat([data.labels, data.test_labels]).bincount()
    assert every.tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert (data.test_labels.bincount() - every / 5).abs().max() < 1  # stratified to the nearest whole number
    assert torch.equal(data.images, images.load("mnist", 28).images)
    mean, deviation = data.statistics
    assert abs(mean.item() - 0.1307) < 2e-3 and abs(deviation.item() - 0.3081) < 2e-3  # the known ones of MNIST


def test_no_image_is_both_trained_and_tested_on():
    data = images.load("mnist", 28)
    rows = {bytes(x.flatten().tolist()) for x in data.images}
    assert len(rows) == 8000 and not any(bytes(x.flatten().tolist()) in rows for x in data.test_images)


def test_split_rounds_by_the_largest_remainders():
    labels = torch.tensor([0] * 7 + [1] * 11 + [2] * 4)
    kept, held = images.split(labels, 6, seed=3)
    assert labels[held].bincount().tolist() == [2, 3, 1]  # 1.91, 3.00, 1.09
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(22))
    assert not torch.equal(held, images.split(labels, 6, seed=4)[1])


def test_order_is_of_seed_and_epoch_alone():
    first = torch.stack(list(images.order(103, 10, 0, 5)))
    assert first.shape == (10, 10) and len(first.unique()) == 100  # the incomplete batch is left out
    assert torch.equal(first, torch.stack(list(images.order(103, 10, 0, 5))))
    for other in (images.order(103, 10, 1, 5), images.order(103, 10, 0, 6)):
        assert not torch.equal(first, torch.stack(list(other)))


def test_drawn_images_are_shifted_and_mirrored_only_where_they_may():
    x = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    x[0, 0, 7, 4:8] = torch.tensor([10, 20, 30, 40])
    data = images.Images("one", x, torch.zeros(1).long(), x, torch.zeros(1).long(), ("a", "b"))
    draws = data.draw(torch.zeros(200).long(), torch.Generator().manual_seed(0))[:, 0]
    found = {(int(r), int(c)) for one in draws for r, c in (one == 10).nonzero()}
    assert found == {(7 + a, 4 + b) for a in range(-2, 3) for b in range(-2, 3)}  # up to an eighth of 16
    ordered = [one[one > 0].tolist() for one in draws]
    assert all(row == [10, 20, 30, 40] for row in ordered)
    free = images.Images("one", x, data.labels, x, data.labels, ("a", "b"), mirror=True)
    seen = [one[one > 0].tolist() for one in free.draw(torch.zeros(200).long(), torch.Generator().manual_seed(0))[:, 0]]
    assert 60 < sum(row == [40, 30, 20, 10] for row in seen) < 140
    assert all(row in ([10, 20, 30, 40], [40, 30, 20, 10]) for row in seen)


def test_canvases_hold_the_digit_whole_and_pieces_of_others():
    data = images.load("cluttered-mnist", 64)
    assert isinstance(data, images.Cluttered) and data.shape == (1, 64, 64) and data.test_images.shape == (2000, 1, 64, 64)
    digit = torch.full((3, 1, 28, 28), 255, dtype=torch.uint8)
    pool = torch.full((2, 1, 28, 28), 100, dtype=torch.uint8)
    bare = images.canvases(digit, pool, 64, 0, torch.Generator().manual_seed(1))
    assert [int((x == 255).sum()) for x in bare] == [784] * 3 and int((bare > 0).sum()) == 3 * 784
    full = images.canvases(digit, pool, 64, 8, torch.Generator().manual_seed(1))
    assert [int((x == 255).sum()) for x in full] == [784] * 3  # the brighter pixel shows
    assert all(0 < int((x == 100).sum()) <= 8 * 64 for x in full)
    indices = torch.arange(4)
    one, two, other = (data.draw(indices, torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_folder_is_split_by_class(tmp_path):
    data = images.load(folder(tmp_path, count=10), 16)
    assert data.classes == ("cats", "dogs") and data.mirror
    assert data.images.shape == (16, 3, 16, 16) and data.test_labels.bincount().tolist() == [2, 2]
    assert [int(x[0].max()) for x in data.images] == [200 * y for y in data.labels.tolist()]  # images and labels belong together


def test_a_folder_may_bring_its_own_split(tmp_path):
    folder(tmp_path / "train", count=4)
    folder(tmp_path / "val", count=1)
    data = images.load(tmp_path, 16)
    assert (len(data.images), len(data.test_images)) == (8, 2)
    assert data.digest != images.load("mnist", 28).digest


def test_bad_data_is_one_clear_line(tmp_path, monkeypatch):
    folder(tmp_path / "lone" / "train")
    folder(tmp_path / "odd" / "train")
    folder(tmp_path / "odd" / "val", names=("cats", "cows"))
    folder(tmp_path / "single", names=("cats",))
    (tmp_path / "empty").mkdir()
    broken = folder(tmp_path / "broken")
    (broken / "cats" / "x.png").write_text("no image")
    for name, size, words in (
        ("mnits", None, "nearest: mnist"), (tmp_path / "nowhere", None, "a folder of images"),
        (tmp_path / "empty", None, "no image is found"), (tmp_path / "single", None, "with 1 class"),
        (tmp_path / "lone", None, "train and no val"), (tmp_path / "odd", None, "'cows'|'dogs'"),
        (broken, None, "Pillow"), ("mnist", 4, "a side of 8 to 1024"), ("cluttered-mnist", 24, "at least 32"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words) as caught:
            images.load(name, size)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        images.load("digits")


def test_digits_of_scikit_learn():
    data = images.load("digits", 16)
    assert data.images.shape == (1438, 1, 16, 16) and len(data.test_images) == 359
