"""The output folder of a job: who may use it, the rows finished so far, and models saved whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subquad.bench.report import Row, write_whole
from subquad.checks import InputError
from subquad.files import save_tokenizer, writing


class Folder:
    """An output folder, or none. Nothing is written before `begin`.

    Args:
        path: the folder; None keeps nothing.
        identity: what makes two runs the same command.

    Raises:
        InputError: the folder exists and is neither empty nor an unfinished run of the same command.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any], command: str = "") -> None:
        self.path = None if path is None else Path(path)
        self.identity, self.command = json.loads(json.dumps(identity)), command
        if self.path is not None:
            self._check(self.path)

    def _check(self, path: Path) -> None:
        should = "a folder that is new, empty, or an unfinished run of the same command"
        check_place("--out", path, should)
        if not path.exists():
            return
        if not any(path.iterdir()):
            return
        if finished(path):
            raise InputError("--out", f"{path}, a finished run", should)
        before = _read_job(path, should)
        for key in {**before, **self.identity}:
            if before.get(key) != self.identity.get(key):
                was = f"{path}, an unfinished run with {key} = {before.get(key)}"
                raise InputError("--out", was, f"{should} ({key} = {self.identity.get(key)})")
        for file in sorted((path / "rows").glob("*.json")):
            _read_row(file)

    def begin(self) -> None:
        if self.path is None:
            return
        with writing("--out", self.path):
            (self.path / "rows").mkdir(parents=True, exist_ok=True)
            write_whole(self.path / "job.json", json.dumps({"job": self.identity, "command": self.command}, indent=1) + "\n")

    def load(self, name: str) -> Row | None:
        """A row finished earlier."""
        file = None if self.path is None else self.path / "rows" / f"{name}.json"
        return _read_row(file) if file is not None and file.exists() else None

    def keep(self, name: str, row: Row) -> None:
        if self.path is None:
            return
        with writing("--out", self.path):
            write_whole(self.path / "rows" / f"{name}.json", json.dumps(asdict(row)) + "\n")

    def checkpoints(self, name: str) -> Path | None:
        return None if self.path is None else self.path / "checkpoints" / name

    def save_model(self, name: str, model: Any, tokenizer: Any, card: str = "") -> str | None:
        """Save a model, its tokenizer and its card to the subfolder `name`, which appears only when it is complete."""
        if self.path is None:
            return None
        from subquad.models.load import quiet

        target, beside = self.path / name, self.path / f".{name}.partial"
        for folder in (target, beside):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            with writing("--out", self.path):
                beside.mkdir(parents=True)
                if card:
                    (beside / "README.md").write_text(card, encoding="utf-8")
                with quiet():
                    model.save_pretrained(beside)
                    save_tokenizer(tokenizer, beside)
                os.replace(beside, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # half a model takes room, and is no use
        return name

    def finish(self, report: Any) -> None:
        """Have the report save itself here; what was only needed to go on is removed."""
        if self.path is not None:
            with writing("--out", self.path):
                report.save(self.path)
            for scratch in ("rows", "checkpoints", "layers"):
                shutil.rmtree(self.path / scratch, ignore_errors=True)


def _read_job(path: Path, should: str) -> dict[str, Any]:
    """What the folder's job.json says that was run."""
    file = path / "job.json"
    if not file.is_file():
        raise InputError("--out", f"{path}, which holds something else", should)
    try:
        job = json.loads(file.read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        job = None
    if not isinstance(job, dict):
        raise InputError("--out", f"{file}, which is damaged", should)
    return job


def _read_row(file: Path) -> Row:
    try:
        return Row(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError("--out", f"{file}, which is damaged", "a finished row; remove the file to measure it again") from None


def check_new(argument: str, path: Path) -> None:
    """Check that a folder is empty, or can be made."""
    should = "a folder that is new or empty"
    check_place(argument, path, should)
    with writing(argument, path):
        if path.exists() and any(path.iterdir()):
            raise InputError(argument, f"{path}, which holds something", should)


def check_place(argument: str, path: Path, should: str = "a folder") -> None:
    """Check that a folder is there, or can be made."""
    if path.exists() and not path.is_dir():
        raise InputError(argument, f"{path}, a file", should)
    above = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(argument, path, f"{should} ({above} cannot be written to)")


def finished(path: str | Path) -> bool:
    """Whether a folder holds a job's report, which is written last."""
    return (Path(path) / "job.json").exists() and (Path(path) / "report.json").exists()
