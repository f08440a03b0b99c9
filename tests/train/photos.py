"""A data set of coloured squares, as a folder of images per class."""

from pathlib import Path

from PIL import Image


def folder(root: Path, names: tuple[str, ...] = ("cats", "dogs"), count: int = 5, side: int = 20) -> Path:
    """A folder of images per class; the class is the colour."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (side + number, side), (200 * index, 50, 10 * number)).save(root / name / f"{number}.png")
    return root
