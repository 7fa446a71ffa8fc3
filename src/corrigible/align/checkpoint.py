"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step-00000050`` with ``tensors.safetensors`` and ``state.json``. It is
written beside its place, synced, and renamed into it; only then are older ones removed. A kill, a
full disk or a power cut at any moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from corrigible.errors import StorageError
from corrigible.events import Alert, emit
from corrigible.files import storage_errors, sync, write_atomically

_FORMAT = "corrigible/checkpoint@1"


@dataclass(frozen=True)
class Checkpoint:
    """A training state: ``step`` finished steps, named tensors, and plain JSON values."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Write the checkpoint of ``step`` under ``folder`` atomically and keep the last ``keep``.

    Raises:
        StorageError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if _read(final) is not None:
            return final
        shutil.rmtree(final, ignore_errors=True)
        writing = folder / f".writing-{step:08d}"
        try:
            writing.mkdir()
            file = writing / "tensors.safetensors"
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
            sync(file)
            document = {
                "format": _FORMAT,
                "step": step,
                "sha256": _sha256(file),
                "state": dict(state),
            }
            write_atomically(writing / "state.json", json.dumps(document, indent=1, sort_keys=True))
            writing.rename(final)
            sync(folder)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint under ``folder``; ``None`` when there is none at all.

    A damaged one (a byte changed, a file missing) is passed over with an alert.

    Raises:
        StorageError: there are checkpoints and every one is damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        checkpoint = _read(path)
        if checkpoint is not None:
            return checkpoint
        emit(Alert(name="checkpoint_damaged", message=f"{path} is damaged; trying the one before it."))
    if found:
        raise StorageError(
            f"Every checkpoint under {folder} is damaged.",
            advice="Remove the folder and start the run again, or restore it from a copy.",
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders under ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _read(path: Path) -> Checkpoint | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        document = json.loads((path / "state.json").read_text())
        file = path / "tensors.safetensors"
        if document["format"] != _FORMAT or _sha256(file) != document["sha256"]:
            return None
        return Checkpoint(int(document["step"]), load_file(file), document["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
