"""Checkpoints of a run: each appears whole or not at all, and the newest says whose run it is.

    out/checkpoint/step-00000025/tensors.safetensors    parameters, optimizer, history
    out/checkpoint/step-00000025/run.json               settings, step, seconds

A checkpoint is written to a draft folder, flushed to disk, and renamed; only then is the one before it removed. A process
that is killed at any moment leaves a complete checkpoint and perhaps a draft, which the next save sweeps away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from subquad.checks import InputError
from subquad.files import REFUSALS, reason

_TENSORS, _RUN = "tensors.safetensors", "run.json"
SHOULD = "a folder that is new, empty, or an unfinished run of the same command"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    seconds: float


class Checkpoints:
    """The checkpoints of one run in a folder. Nothing is written before the first `save`.

    Args:
        out: the folder.
        settings: what makes two runs the same command; JSON values.
        steps: at this step the run is finished.
        take_finished: accept the folder of a finished run of the same command too.

    Raises:
        InputError: the folder exists and is none of these; the message names the setting that differs.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any], steps: int, *, take_finished: bool = False) -> None:
        self.out, self.folder = Path(out), Path(out) / "checkpoint"
        self.settings = json.loads(json.dumps(dict(settings)))
        newest = self._newest()
        if newest is None:
            self._check_free()
            return
        run = self._run(newest)
        self._compare(run["settings"])
        if run["step"] >= steps and not take_finished:
            raise InputError("out", f"{self.out}, a finished run", SHOULD)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, or None if the run has not begun."""
        newest = self._newest()
        if newest is None:
            return None
        run = self._run(newest)
        try:
            tensors = load_file(newest / _TENSORS)
        except (SafetensorError, OSError) as error:
            raise InputError("out", f"damaged checkpoint {newest / _TENSORS} ({error})", "a whole file, or another folder") from None
        return Checkpoint(run["step"], tensors, run["seconds"])

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove the one before.

        Raises:
            InputError: the system refuses (no space, no permission); the checkpoint before is still there then.
        """
        draft = self.folder / f".draft-{os.getpid()}"
        try:
            self._write(checkpoint, draft)
        except REFUSALS as error:
            shutil.rmtree(draft, ignore_errors=True)
            kept = self._newest()
            left = "" if kept is None else f"; {kept.name} is kept"
            should = "a folder that can be written to, with room for a checkpoint"
            raise InputError("out", f"{self.out} ({reason(error)}{left})", should) from None

    def _write(self, checkpoint: Checkpoint, draft: Path) -> None:
        name = f"step-{checkpoint.step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        run = {"step": checkpoint.step, "seconds": checkpoint.seconds, "settings": self.settings}
        save_file({key: x.detach().cpu().contiguous() for key, x in checkpoint.tensors.items()}, draft / _TENSORS)
        (draft / _RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        for file in (draft / _TENSORS, draft / _RUN, draft):
            _flush(file)
        draft.rename(self.folder / name)
        _flush(self.folder)
        for other in self.folder.iterdir():
            if other.name != name and other.name.startswith((".draft-", "step-")):
                shutil.rmtree(other, ignore_errors=True)

    # ---- whose folder it is --------------------------------------------------------------------------------------------

    def _newest(self) -> Path | None:
        found = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        return found[-1] if found else None

    def _run(self, folder: Path) -> dict[str, Any]:
        try:
            run = json.loads((folder / _RUN).read_text(encoding="utf-8"))
            return {"step": int(run["step"]), "seconds": float(run["seconds"]), "settings": dict(run["settings"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError("out", f"damaged checkpoint {folder / _RUN}", "a checkpoint's run.json, or another folder") from None

    def _check_free(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise InputError("out", f"{self.out}, a file", SHOULD)
        drafts = self.folder.iterdir() if self.folder.is_dir() else []
        others = [x for x in self.out.iterdir() if x != self.folder] + [x for x in drafts if not x.name.startswith(".draft-")]
        if others:
            raise InputError("out", f"{self.out}, which holds {others[0].name}", SHOULD)

    def _compare(self, before: dict[str, Any]) -> None:
        for key in {**before, **self.settings}:
            if before.get(key) != self.settings.get(key):
                was = f"{self.out}, a run with {key} = {before.get(key)}"
                raise InputError("out", was, f"a run with the same settings ({key} is now {self.settings.get(key)}), or another folder")


def _flush(path: Path) -> None:
    """Make sure that a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
