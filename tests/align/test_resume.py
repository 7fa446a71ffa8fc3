"""Killed, interrupted, out of disk: the run goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrigible.align import ALGORITHMS, DPOConfig, PairSource, TrainConfig, Trainer, train_dpo
from corrigible.align.checkpoint import load_latest
from corrigible.errors import BadInputError, Interrupted, StorageError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.records import PolicyVersion

SETTINGS = {"steps": 16, "batch_size": 4, "lr": 5e-3, "checkpoint_every": 3, "micro_batch_tokens": 400}

RUN = textwrap.dedent(
    """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from conftest import build_pairs, build_policy
    import torch
    from corrigible.align import TrainConfig, train_dpo
    from corrigible.errors import CorrigibleError

    torch.set_num_threads(1)
    try:
        version = train_dpo(
            build_pairs(20), build_policy(), out=sys.argv[2], resume=True,
            config=TrainConfig(**json.loads(sys.argv[3])),
            resume_hint="corrigible train dpo --resume",
        )
    except CorrigibleError as error:
        print(type(error).__name__, error, flush=True)
        raise SystemExit(error.exit_code)
    print(version.weights)
    """
)


def start(out: Path, **settings: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), str(out), json.dumps(SETTINGS | settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, process: subprocess.Popen[str], lines: int = 1) -> None:
    """Until ``path`` has so many lines, or the process has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.005)


def final_tensors(out: Path) -> dict[str, torch.Tensor]:
    latest = load_latest(out / "checkpoints")
    assert latest is not None and latest.step == SETTINGS["steps"]
    return latest.tensors


def test_killed_at_random_points_it_ends_with_bitwise_the_same_weights(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    sha, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors

    out, rng = tmp_path / "killed", random.Random(11)
    for attempt, line in enumerate(sorted(rng.sample(range(1, 15), 3))):
        process = start(out)
        wait_for(out / "metrics.jsonl", process, line)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {attempt} came too late"
    last = start(out)
    resumed, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors

    assert resumed == sha
    a, b = final_tensors(tmp_path / "whole"), final_tensors(out)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == list(range(1, 17))
    assert [row["loss"] for row in kept] == [row["loss"] for row in wanted]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    process = start(out, steps=5000, checkpoint_every=5000)
    wait_for(out / "metrics.jsonl", process, 4)
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert said.startswith("Interrupted Interrupted after step") and "train dpo --resume" in said
    latest = load_latest(out / "checkpoints")
    assert latest is not None
    assert latest.step == len((out / "metrics.jsonl").read_text().splitlines()) >= 4


class _StopAt(Exception):
    pass


def run(
    out: Path, make_policy: Callable, make_pairs: Callable, *, resume: bool = False, **settings: object
) -> Trainer:
    policy = make_policy()
    source = PairSource(make_pairs(20), policy.renderer)
    trainer = Trainer(
        policy, ALGORITHMS["dpo"], source, TrainConfig.model_validate(SETTINGS | settings), out=out
    )
    trainer.train(resume=resume)
    return trainer


def test_an_interrupt_within_a_step_undoes_that_step(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two micro-batches: half a gradient must not leak into the resumed run."""
    whole = run(tmp_path / "whole", make_policy, make_pairs, micro_batch_tokens=1)
    calls = {"n": 0}
    plain = Trainer.accumulate

    def accumulate(self: Trainer, examples: list) -> dict:
        calls["n"] += 1
        if calls["n"] == 7:
            check = self._stop

            def check_later() -> None:
                calls["micro"] = calls.get("micro", 0) + 1
                if calls["micro"] == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                check()

            self._stop = check_later
        return plain(self, examples)

    monkeypatch.setattr(Trainer, "accumulate", accumulate)
    with pytest.raises(Interrupted, match="after step 6 of 16") as caught:
        run(tmp_path / "cut", make_policy, make_pairs, micro_batch_tokens=1)
    assert caught.value.exit_code == 130 and "resume=True" in caught.value.advice
    monkeypatch.undo()
    resumed = run(tmp_path / "cut", make_policy, make_pairs, resume=True, micro_batch_tokens=1)
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_an_interrupt_while_the_reference_is_scored_keeps_what_was_scored(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import corrigible.align.reference as module

    plain, calls = module.token_logprobs, []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **options)

    monkeypatch.setattr(module, "token_logprobs", interrupted)
    with pytest.raises(Interrupted, match="what was scored is kept"):
        run(tmp_path, make_policy, make_pairs)
    done = len(calls)
    resumed = run(tmp_path, make_policy, make_pairs, resume=True)
    total = len(calls) - done
    calls.clear()
    whole = run(tmp_path / "whole", make_policy, make_pairs)
    assert len(calls) == total + 3
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_full_disk_stops_the_run_and_the_previous_checkpoint_goes_on(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import corrigible.align.checkpoint as module

    plain, writes = module._sync, []

    def full(path: Path) -> None:
        writes.append(path)
        if path.name == "tensors.safetensors" and "00000009" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path)

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(StorageError, match="disk is full") as caught:
        run(tmp_path / "cut", make_policy, make_pairs)
    assert caught.value.exit_code == 5
    latest = load_latest(tmp_path / "cut" / "checkpoints")
    assert latest is not None and latest.step == 6
    monkeypatch.undo()
    resumed = run(tmp_path / "cut", make_policy, make_pairs, resume=True)
    whole = run(tmp_path / "whole", make_policy, make_pairs)
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    whole = run(tmp_path, make_policy, make_pairs)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        resumed = run(tmp_path, make_policy, make_pairs, resume=True)
    assert "checkpoint_damaged" in [event.name for event in seen if isinstance(event, Alert)]
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    run(tmp_path, make_policy, make_pairs, steps=2)
    with pytest.raises(BadInputError, match="already holds a run") as caught:
        run(tmp_path, make_policy, make_pairs, steps=2)
    assert "--resume" in caught.value.advice


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 1e-3}, "lr was 0.005, is 0.001"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"steps": 20}, "steps was 16, is 20"),
    ],
)
def test_other_settings_are_no_resume(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, change: dict, says: str
) -> None:
    run(tmp_path, make_policy, make_pairs)
    with pytest.raises(BadInputError, match=says):
        run(tmp_path, make_policy, make_pairs, resume=True, **change)


def test_other_data_or_another_start_are_no_resume(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    run(tmp_path, make_policy, make_pairs)
    with pytest.raises(BadInputError, match=r"resume_mismatch.*data"):
        run(tmp_path, make_policy, lambda n: make_pairs(n, seed=3), resume=True)

    def moved() -> object:
        policy = make_policy()
        with torch.no_grad():
            next(p for p in policy.model.parameters() if p.requires_grad).add_(1.0)
        return policy

    with pytest.raises(BadInputError, match=r"resume_mismatch.*start weights"):
        run(tmp_path, moved, make_pairs, resume=True)


def test_another_number_of_threads_is_said(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, make_policy, make_pairs, steps=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        run(tmp_path, make_policy, make_pairs, steps=2, resume=True)
    assert "threads_changed" in [event.name for event in seen if isinstance(event, Alert)]


def test_resuming_a_finished_run_gives_the_same_version(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    def once(resume: bool) -> PolicyVersion:
        return train_dpo(
            make_pairs(12),
            make_policy(),
            out=tmp_path,
            config=TrainConfig(steps=3, batch_size=4),
            dpo=DPOConfig(beta=0.2),
            resume=resume,
        )

    first = once(False)
    assert once(True) == first
    assert PolicyVersion.from_json(json.loads((tmp_path / "policy.json").read_text())) == first
