"""Reference passes that later runs take over: the same bits or none, proved right, and not too many."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrigible.align import ALGORITHMS, PairSource, TrainConfig, Trainer
from corrigible.align import reference_cache as module
from corrigible.errors import NumericsError
from corrigible.events import Alert, EventBus, Message
from corrigible.models import LanguagePolicy
from corrigible.models.scoring import Scorer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORRIGIBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def run(
    folder: Path,
    tmp_path: Path,
    make_policy: Callable,
    make_pairs: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Trainer, int, list[object]]]:
    """Trains in a folder of its own; gives the trainer, the reference's forward passes, and what was said."""
    calls: list[int] = []
    plain = Scorer.__call__

    def counted(self: Scorer, *given: object, grad: bool = False, **options: object) -> object:
        calls.append(not grad)
        return plain(self, *given, grad=grad, **options)

    monkeypatch.setattr(Scorer, "__call__", counted)
    names = iter(range(100))

    def train(
        policy: LanguagePolicy | None = None, pairs: int = 10, **settings: object
    ) -> tuple[Trainer, int, list[object]]:
        policy = policy or make_policy()
        source = PairSource(make_pairs(pairs), policy.renderer)
        config = {"steps": 2, "batch_size": 4, "reuse_reference": True} | settings
        bus, seen = EventBus(), []
        bus.subscribe(seen.append)
        calls.clear()
        trainer = Trainer(
            policy,
            ALGORITHMS["dpo"],
            source,
            TrainConfig.model_validate(config),
            out=tmp_path / f"run{next(names)}",
            bus=bus,
        )
        trainer.train()
        return trainer, sum(calls), seen

    return train


def test_another_run_on_the_same_data_computes_nothing_again(run: Callable, folder: Path) -> None:
    first, computed, _ = run(lr=1e-3)
    assert computed and len(list(folder.glob("*.safetensors"))) == 1
    second, again, seen = run(lr=1e-4, schedule="cosine")
    assert again == 0
    assert any(
        isinstance(event, Message) and "20 rows are those of an earlier" in event.text for event in seen
    )
    assert first.reference.keys() == second.reference.keys()
    assert all(torch.equal(first.reference[key], second.reference[key]) for key in first.reference)


def test_nobody_finds_or_leaves_anything_unasked(run: Callable, folder: Path) -> None:
    assert run(reuse_reference=False)[1] and not folder.exists()
    run()
    assert run(reuse_reference=False)[1]


def test_whatever_decides_the_bits_is_another_pass(
    run: Callable, folder: Path, make_policy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    moved = make_policy()
    with torch.no_grad():
        for name, parameter in moved.model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.01)
    assert run(moved)[1]
    for change in ({"pairs": 9}, {"micro_batch_tokens": 300}, {"share_prompts": False}):
        assert run(**change)[1], change
    assert run(make_policy(dtype="bfloat16"))[1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert run()[1]
    assert len(list(folder.glob("*.safetensors"))) == 7


def test_a_damaged_file_is_said_and_replaced(run: Callable, folder: Path) -> None:
    first, _, _ = run()
    [file] = folder.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:-3] + b"abc", b""):
        file.write_bytes(damaged)
        again, computed, seen = run()
        assert computed and "cache_damaged" in [e.name for e in seen if isinstance(e, Alert)]
        assert all(torch.equal(first.reference[key], again.reference[key]) for key in first.reference)
        assert run()[1] == 0


def test_a_reference_that_proves_wrong_is_not_handed_on(
    run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Scorer.__call__

    def wrong(self: Scorer, *given: object, grad: bool = False, **options: object) -> object:
        found = plain(self, *given, grad=grad, **options)
        return found if grad else [values - 1.0 for values in found]

    monkeypatch.setattr(Scorer, "__call__", wrong)
    with pytest.raises(NumericsError, match="reference_mismatch"):
        run()
    assert not folder.exists()


def test_what_was_not_used_for_longest_makes_room(
    run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pairs=8)
    [old] = folder.glob("*.safetensors")
    run(pairs=9)
    [other] = set(folder.glob("*.safetensors")) - {old}
    os.utime(old, (1, 1))
    os.utime(other, (2, 2))
    run(pairs=8)  # used again
    assert old.stat().st_mtime > 2
    monkeypatch.setattr(module, "SHARED_BYTES", 2 * other.stat().st_size + 1000)
    run(pairs=10)
    left = set(folder.glob("*.safetensors"))
    assert old in left and other not in left and len(left) == 2


def test_no_room_for_later_runs_does_not_stop_this_one(
    run: Callable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    trainer, _, seen = run()
    assert (trainer.out / "adapter").is_dir() and not list(folder.iterdir())
    assert any(isinstance(event, Message) and "not kept for later runs" in event.text for event in seen)
