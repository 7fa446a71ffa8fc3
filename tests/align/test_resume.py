"""Killed, interrupted, out of disk: the run goes on and ends with the same bits."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from corrigible.align import ALGORITHMS, DPOConfig, PairSource, TrainConfig, Trainer, train_dpo
from corrigible.align.checkpoint import load_latest
from corrigible.errors import BadInputError, Interrupted, NumericsError, OutOfMemory, StorageError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models.scoring import Scorer
from corrigible.records import PolicyVersion

SETTINGS = {"steps": 16, "batch_size": 4, "lr": 5e-3, "checkpoint_every": 3, "micro_batch_tokens": 400}

NURSERY = textwrap.dedent(
    """
    import json, os, signal, sys, traceback
    sys.path.insert(0, sys.argv[1])
    from conftest import build_pairs, build_policy
    import safetensors.torch
    import torch
    from corrigible.align import TrainConfig, Trainer, checkpoint, reference, train_dpo
    from corrigible.errors import CorrigibleError

    torch.set_num_threads(1)
    build_policy()  # whatever is imported late is imported before the first fork

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def die(at):
        # Half of a file or of a line is there when the kill comes, or the next thing to do is not done.
        number = [0]

        def before(owner, name, when=lambda *given: True, nth=1):
            plain = getattr(owner, name)
            def patched(*given, **options):
                number[0] += when(*given)
                if number[0] == nth:
                    kill()
                return plain(*given, **options)
            setattr(owner, name, patched)

        def half(tensors, file):
            file.write_bytes(safetensors.torch.save(tensors)[:-9])
            kill()

        def cut(trainer, step, metrics):
            with (trainer.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **metrics})[:-9])
            kill()

        if at == "the reference pass":
            before(reference.Scorer, "__call__", nth=3)
        elif at == "a file of tensors":
            safetensors.torch.save_file = half
        elif at == "a checkpoint without its state":
            before(checkpoint, "sync")
        elif at == "a checkpoint that is not in its place":
            before(checkpoint.Path, "rename", when=lambda path, *to: path.name.startswith(".writing"))
        elif at == "a checkpoint in its place, the old ones still there":
            before(checkpoint, "sync", nth=2)
        elif at == "a line of metrics":
            Trainer._log = cut

    for line in sys.stdin:
        out, settings, made, at = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                die(at)
                version = train_dpo(
                    build_pairs(20), build_policy(**made), out=out, config=TrainConfig(**settings),
                    resume=True, resume_hint="corrigible train dpo --resume",
                )
                said, code = version.weights, 0
            except CorrigibleError as error:
                said, code = f"{type(error).__name__} {error}", error.exit_code
            except BaseException:
                said = traceback.format_exc()
            with open(out + ".said", "w") as file:
                file.write(said)
            os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
)

STAGES = (
    *("the reference pass", "a file of tensors", "a checkpoint without its state"),
    *("a checkpoint that is not in its place", "a checkpoint in its place, the old ones still there"),
    "a line of metrics",
)
"""What a kill may leave half done."""

KINDS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "adapter": ({}, {}),
    "all weights in bfloat16": ({"moments": "bfloat16"}, {"lora": False, "dtype": "bfloat16"}),
    "rounded at random": ({"master_weights": "stochastic"}, {"lora": False, "dtype": "bfloat16"}),
}
"""What is trained: settings of the trainer, and how the policy is made."""


class Run:
    """A training run in a process of its own; ``die`` names a stage (:data:`STAGES`) that kills it."""

    def __init__(
        self, nursery: subprocess.Popen[str], out: Path, kind: str, die: str, settings: dict[str, object]
    ) -> None:
        assert nursery.stdin and nursery.stdout
        self.out, self._answers = out, nursery.stdout
        more, made = KINDS[kind]
        nursery.stdin.write(json.dumps([str(out), SETTINGS | more | settings, made, die]) + "\n")
        nursery.stdin.flush()
        self.pid = int(self._answers.readline())

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.pid, number)

    def end(self) -> tuple[int, str]:
        """Its exit code (minus the signal's number if that ended it) and what it said last."""
        code = int(self._answers.readline())
        said = self.out.with_name(self.out.name + ".said")
        return code, said.read_text() if said.exists() else ""

    def wait_for_step(self, step: int) -> None:
        history = self.out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (history.exists() and history.read_bytes().count(b"\n") >= step):
            assert time.monotonic() < deadline and not self.out.with_name(self.out.name + ".said").exists()
            time.sleep(0.002)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Run]]:
    """Starts runs as forks of one process that has imported everything: a kill -9 costs no new import."""
    nursery = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NURSERY, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    yield lambda out, kind="adapter", die="", **settings: Run(nursery, out, kind, die, settings)
    nursery.communicate()


@dataclasses.dataclass(frozen=True)
class End:
    """Where a run ended: weights, everything in its last checkpoint, metrics of every step."""

    sha: str
    tensors: dict[str, torch.Tensor]
    metrics: list[dict[str, float]]
    seconds: float = 0.0

    @classmethod
    def of(cls, out: Path, sha: str, seconds: float = 0.0) -> End:
        latest = load_latest(out / "checkpoints")
        assert latest is not None and latest.step == SETTINGS["steps"]
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for row in metrics:
            del row["tokens_per_second"]
        return cls(sha, latest.tensors, metrics, seconds)


@pytest.fixture(scope="module")
def whole(start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], End]:
    """The end of the run that nobody kills."""

    @functools.cache
    def run(kind: str) -> End:
        out = tmp_path_factory.mktemp("whole") / "run"
        started, began = start(out, kind), time.monotonic()  # its process has just been forked
        code, sha = started.end()
        assert code == 0, sha
        return End.of(out, sha, time.monotonic() - began)

    return run


def assert_bitwise(found: End, wanted: End) -> None:
    assert found.sha == wanted.sha
    assert found.metrics == wanted.metrics
    assert [row["step"] for row in found.metrics] == list(range(1, 17))
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in wanted.tensors.items())


@pytest.mark.parametrize(
    "kills", [2, pytest.param(25, marks=pytest.mark.slow)], ids=["two kills", "many kills"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_it_ends_with_bitwise_the_same(
    tmp_path: Path, start: Callable[..., Run], whole: Callable[[str], End], kind: str, kills: int
) -> None:
    wanted, seed = whole(kind), random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when it fails
    out, rng, landed = tmp_path / "killed", random.Random(seed), 0
    while landed < kills:
        run = start(out, kind)
        time.sleep(rng.random() * wanted.seconds)
        run.send(signal.SIGKILL)
        code, said = run.end()
        assert code in (0, -signal.SIGKILL), said
        if code == 0:  # it came too late: this one is whole, the next one begins again
            assert_bitwise(End.of(out, said), wanted)
            out = tmp_path / f"killed after {landed}"
            continue
        landed += 1
    code, said = start(out, kind).end()
    assert code == 0, said
    assert_bitwise(End.of(out, said), wanted)


def test_killed_in_the_middle_of_writing_it_ends_with_bitwise_the_same(
    tmp_path: Path, start: Callable[..., Run], whole: Callable[[str], End]
) -> None:
    for stage in STAGES:
        assert start(tmp_path / "killed", die=stage).end()[0] == -signal.SIGKILL, stage
    code, said = start(tmp_path / "killed").end()
    assert code == 0, said
    assert_bitwise(End.of(tmp_path / "killed", said), whole("adapter"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(
    tmp_path: Path, start: Callable[..., Run], number: signal.Signals
) -> None:
    out = tmp_path / "run"
    run = start(out, steps=5000, checkpoint_every=5000)
    run.wait_for_step(4)
    run.send(number)
    code, said = run.end()
    assert code == 130, said
    assert said.startswith("Interrupted Interrupted after step") and "train dpo --resume" in said
    latest = load_latest(out / "checkpoints")
    assert latest is not None
    assert latest.step == len((out / "metrics.jsonl").read_text().splitlines()) >= 4


def train(
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
    whole = train(tmp_path / "whole", make_policy, make_pairs, steps=8, micro_batch_tokens=1)
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
    with pytest.raises(Interrupted, match="after step 6 of 8") as caught:
        train(tmp_path / "cut", make_policy, make_pairs, steps=8, micro_batch_tokens=1)
    assert caught.value.exit_code == 130 and "resume=True" in caught.value.advice
    monkeypatch.undo()
    resumed = train(tmp_path / "cut", make_policy, make_pairs, resume=True, steps=8, micro_batch_tokens=1)
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_an_interrupt_while_the_reference_is_scored_keeps_what_was_scored(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls, cut = Scorer.__call__, [], []

    def interrupted(self: Scorer, *args: object, grad: bool = False, **options: object) -> object:
        if grad:  # a training step
            return plain(self, *args, grad=grad, **options)
        calls.append(1)
        if len(calls) == 3 and not cut:
            cut.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **options)

    monkeypatch.setattr(Scorer, "__call__", interrupted)
    with pytest.raises(Interrupted, match="what was scored is kept"):
        train(tmp_path / "cut", make_policy, make_pairs)
    assert len(calls) == 3
    calls.clear()
    resumed = train(tmp_path / "cut", make_policy, make_pairs, resume=True)
    rest = len(calls)
    calls.clear()
    whole = train(tmp_path / "whole", make_policy, make_pairs)
    assert len(calls) == rest + 3
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_full_disk_stops_the_run_and_the_previous_checkpoint_goes_on(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import corrigible.align.checkpoint as module

    plain, writes = module.sync, []

    def full(path: Path) -> None:
        writes.append(path)
        if path.name == "tensors.safetensors" and "00000009" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path)

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(StorageError, match="disk is full") as caught:
        train(tmp_path / "cut", make_policy, make_pairs)
    assert caught.value.exit_code == 5
    latest = load_latest(tmp_path / "cut" / "checkpoints")
    assert latest is not None and latest.step == 6
    monkeypatch.undo()
    resumed = train(tmp_path / "cut", make_policy, make_pairs, resume=True)
    whole = train(tmp_path / "whole", make_policy, make_pairs)
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    whole = train(tmp_path, make_policy, make_pairs)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = newest / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        resumed = train(tmp_path, make_policy, make_pairs, resume=True)
    assert "checkpoint_damaged" in [event.name for event in seen if isinstance(event, Alert)]
    assert resumed.policy.weights_sha256() == whole.policy.weights_sha256()


def test_a_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    train(tmp_path, make_policy, make_pairs, steps=2)
    with pytest.raises(BadInputError, match="already holds a run") as caught:
        train(tmp_path, make_policy, make_pairs, steps=2)
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
    train(tmp_path, make_policy, make_pairs)
    with pytest.raises(BadInputError, match=says):
        train(tmp_path, make_policy, make_pairs, resume=True, **change)


def test_other_data_or_another_start_are_no_resume(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    train(tmp_path, make_policy, make_pairs)
    with pytest.raises(BadInputError, match=r"resume_mismatch.*data"):
        train(tmp_path, make_policy, lambda n: make_pairs(n, seed=3), resume=True)

    def moved() -> object:
        policy = make_policy()
        with torch.no_grad():
            next(p for p in policy.model.parameters() if p.requires_grad).add_(1.0)
        return policy

    with pytest.raises(BadInputError, match=r"resume_mismatch.*start weights"):
        train(tmp_path, moved, make_pairs, resume=True)


def test_another_number_of_threads_is_said(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, make_policy, make_pairs, steps=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        train(tmp_path, make_policy, make_pairs, steps=2, resume=True)
    assert "threads_changed" in [event.name for event in seen if isinstance(event, Alert)]


def test_no_memory_keeps_the_checkpoint_and_a_run_goes_on_in_smaller_passes(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, steps = Scorer.__call__, []

    def full(self: Scorer, *args: object, grad: bool = False, **options: object) -> object:
        steps.append(grad)
        if sum(steps) == 9:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return plain(self, *args, grad=grad, **options)

    monkeypatch.setattr(Scorer, "__call__", full)
    with pytest.raises(OutOfMemory, match=r"out_of_memory: .*can't allocate memory") as caught:
        train(tmp_path, make_policy, make_pairs, micro_batch_tokens=1 << 20)
    assert isinstance(caught.value, NumericsError)
    for setting in ("micro_batch_tokens", "gradient_checkpointing", "moments", "last checkpoint is intact"):
        assert setting in caught.value.advice
    assert "LoRA" not in caught.value.advice and "lora" not in caught.value.advice  # it is one
    latest = load_latest(tmp_path / "checkpoints")
    assert latest is not None and latest.step == 6
    monkeypatch.undo()
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        train(
            *(tmp_path, make_policy, make_pairs),
            resume=True,
            micro_batch_tokens=200,
            gradient_checkpointing=True,
        )
    alerts = [event.name for event in seen if isinstance(event, Alert)]
    assert alerts == ["micro_batch_tokens_changed", "gradient_checkpointing_changed"]


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
