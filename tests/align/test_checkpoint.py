"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from corrigible.align.checkpoint import checkpoints, load_latest, save_checkpoint
from corrigible.errors import StorageError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.files import write_atomically


def test_round_trip_keeps_the_last_two(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), float(step))}, {"note": step})
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert (latest.step, latest.tensors["w"].tolist(), latest.state) == (3, [3.0] * 3, {"note": 3})


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "no tensors", "no state", "not json"])
def test_a_damaged_checkpoint_is_passed_over_with_an_alert(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, {"w": torch.ones(64)}, {})
    newest = save_checkpoint(tmp_path, 2, {"w": torch.zeros(64)}, {})
    tensors, state = newest / "tensors.safetensors", newest / "state.json"
    match damage:
        case "flip":
            data = bytearray(tensors.read_bytes())
            data[-1] ^= 1
            tensors.write_bytes(data)
        case "truncate":
            tensors.write_bytes(tensors.read_bytes()[:-7])
        case "no tensors":
            tensors.unlink()
        case "no state":
            state.unlink()
        case "not json":
            state.write_text("{")
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 1
    assert [event.name for event in seen if isinstance(event, Alert)] == ["checkpoint_damaged"]


def test_when_every_checkpoint_is_damaged_it_says_so(tmp_path: Path) -> None:
    newest = save_checkpoint(tmp_path, 2, {"w": torch.zeros(64)}, {})
    (newest / "tensors.safetensors").unlink()
    with pytest.raises(StorageError, match="damaged"):
        load_latest(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint_as_it_was(tmp_path: Path) -> None:
    """The limit on file size is real: the kernel refuses the write half way, as a full disk does."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import torch
        from corrigible.align.checkpoint import load_latest, save_checkpoint
        from corrigible.errors import StorageError
        from corrigible.files import write_atomically

        folder = Path(sys.argv[1])
        save_checkpoint(folder, 1, {"w": torch.ones(1000)}, {})
        write_atomically(folder / "cache", b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for attempt in (
            lambda: save_checkpoint(folder, 2, {"w": torch.ones(100_000)}, {}),
            lambda: write_atomically(folder / "cache", b"n" * 100_000),
        ):
            try:
                attempt()
            except StorageError as error:
                print(error.exit_code, error.message)
        latest = load_latest(folder)
        print(latest.step, float(latest.tensors["w"].sum()), (folder / "cache").read_bytes())
        print(sorted(path.name for path in folder.iterdir()))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("5 The disk is full") and lines[1].startswith("5 The disk is full")
    assert lines[2] == "1 1000.0 b'old'"
    assert lines[3] == "['cache', 'step-00000001']"


def test_a_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Could not write"):
        write_atomically(tmp_path / "file" / "cache", b"x")
    with pytest.raises(StorageError, match="Could not write"):
        save_checkpoint(tmp_path / "file", 1, {}, {})


def test_saving_the_same_step_again_keeps_the_whole_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, {"w": torch.ones(2)}, {"run": 1})
    save_checkpoint(tmp_path, 4, {"w": torch.ones(2)}, {"run": 2})
    latest = load_latest(tmp_path)
    assert latest is not None and latest.state == {"run": 1}
