"""A person at the keyboard: scripted keys, lines on a pipe, and a real pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corrigible.collect.questions import Question
from corrigible.collect.queue import open_questions
from corrigible.collect.terminal import LineKeys, Tally, TerminalKeys, judge_in_terminal, keyboard
from corrigible.errors import Interrupted, StorageError
from corrigible.records import Annotator, Comparison, Episode, Feedback, comparison
from corrigible.store import Store

PROMPTS = 6


@pytest.fixture
def path(tmp_path: Path, episode: Callable[..., Episode]) -> Path:
    file = tmp_path / "judge.db"
    with Store.open(file) as store:
        store.add_episodes(
            episode(f"question {i}?", f"answer {side} to {i}") for i in range(PROMPTS) for side in "ab"
        )
    return file


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as opened:
        yield opened


class Script:
    """Keys from a list; what an exception type stands for is raised."""

    def __init__(self, *keys: str | type[BaseException] | None) -> None:
        self.keys = list(keys)

    def read(self) -> str | None:
        key = self.keys.pop(0) if self.keys else None
        if isinstance(key, type):
            raise key
        return key


def sit(
    store: Store, *keys: str | type[BaseException] | None, width: int = 120, **more: Any
) -> tuple[Tally, str]:
    out = io.StringIO()
    screen = Console(file=out, width=width)
    tally = judge_in_terminal(
        store, open_questions(store, "kim"), "kim", keys=Script(*keys), screen=screen, **more
    )
    return tally, out.getvalue()


def records(store: Store) -> list[Feedback]:
    return list(store.feedback(annotator="kim"))


def shown(record: Feedback, place: int) -> str:
    assert record.presentation and record.presentation.order
    return record.targets[record.presentation.order[place]].sha256


def test_every_key_becomes_the_record_it_stands_for(store: Store) -> None:
    tally, _ = sit(store, "1", "right", "down", "b", "g", "s", "u")
    assert (tally.judged, tally.skipped, tally.left) == (5, 1, 0)
    found = records(store)
    first, second = found[0], found[1]
    assert isinstance(first.payload, Comparison) and isinstance(second.payload, Comparison)
    chosen = first.targets[0 if first.payload.outcome == "first" else 1].sha256
    assert chosen == shown(first, 0)
    chosen = second.targets[0 if second.payload.outcome == "first" else 1].sha256
    assert chosen == shown(second, 1)
    outcomes = [r.payload.outcome if isinstance(r.payload, Comparison) else r.not_judged for r in found[2:]]
    assert outcomes[:3] == ["tie", "both_bad", "both_good"]
    assert found[5].not_judged is not None and found[5].not_judged.reason.value == "unsafe"
    for record in found:
        assert record.annotator.type == "human" and record.channel == "ui"
        assert record.presentation is not None
        assert record.presentation.layout == "side-by-side" and record.presentation.shown_at
        assert record.created_at >= record.presentation.shown_at
    assert store.items(t.sha256 for r in found for t in r.targets)


def test_nobody_is_asked_twice_but_others_and_other_axes_are(store: Store) -> None:
    sit(store, "1", "2", "s", "c", "q")
    assert len(open_questions(store, "kim")) == PROMPTS - 3
    assert len(open_questions(store, "lee")) == PROMPTS
    assert len(open_questions(store, "kim", criterion="safety")) == PROMPTS
    sit(store, *"111")
    assert open_questions(store, "kim") == []
    contexts = [record.context for record in records(store)]
    assert len(contexts) == len(set(contexts)) == PROMPTS


def test_a_new_sitting_goes_on_in_the_same_order(store: Store) -> None:
    queue = [q.key for q in open_questions(store, "kim")]
    sit(store, "1", "1", "q")
    assert [q.key for q in open_questions(store, "kim")] == queue[2:]
    assert sorted(q.key for q in open_questions(store, "lee", seed=1)) == sorted(queue)


def test_undo_withdraws_and_asks_again_in_the_same_order_of_presentation(store: Store) -> None:
    tally, text = sit(store, "u", "1", "2", "u", "u", "t", "q")
    assert "nothing to undo" in text
    assert (tally.judged, tally.undone, tally.left) == (1, 2, PROMPTS - 1)
    live = records(store)
    assert [r.payload.outcome for r in live if isinstance(r.payload, Comparison)] == ["tie"]
    withdrawn = list(store.feedback(annotator="kim", status="withdrawn"))
    assert len(withdrawn) == 2
    before = next(r for r in withdrawn if r.context == live[0].context)
    assert before.presentation and live[0].presentation
    assert before.presentation.order == live[0].presentation.order
    assert live[0].effort is not None and live[0].effort.undo == 1


def test_wrong_keys_cost_keys_and_cancelled_skips_cost_nothing_else(store: Store) -> None:
    tally, text = sit(store, "z", "", "s", "esc", "2", "q")
    assert (tally.judged, tally.skipped) == (1, 0)
    (record,) = records(store)
    assert record.effort is not None and record.effort.keys == 5
    assert "Skip because" in text


def test_seconds_are_measured_and_long_pauses_are_idle(store: Store) -> None:
    ticks = iter([0.0, 2.5, 2.5, 60.0, 60.0, 61.0])
    sit(store, "1", "2", "q", clock=lambda: next(ticks))
    efforts = [record.effort for record in records(store)]
    assert [(e.active_ms, e.idle_ms) for e in efforts if e] == [(2500, 0), (30_000, 27_500)]


def test_every_judgement_is_stored_before_the_next_question(path: Path, store: Store) -> None:
    seen: list[int] = []

    class Watching(Script):
        def read(self) -> str | None:
            with Store.open(path) as other:
                seen.append(other.count_feedback(annotator="kim"))
            return super().read()

    judge_in_terminal(
        store, open_questions(store, "kim"), "kim", keys=Watching(*"121"), screen=Console(file=io.StringIO())
    )
    assert seen == [0, 1, 2, 3]


def test_ctrl_c_says_what_is_kept(store: Store) -> None:
    with pytest.raises(Interrupted, match="1 judgements") as caught:
        sit(store, "1", KeyboardInterrupt)
    assert caught.value.exit_code == 130
    assert len(records(store)) == 1


def test_a_store_that_goes_away_loses_only_the_judgement_at_hand(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.add_feedback

    def full(*arguments: Any) -> Any:
        if store.count_feedback(annotator="kim"):
            raise StorageError("The disk is full.")
        return real(*arguments)

    monkeypatch.setattr(store, "add_feedback", full)
    with pytest.raises(StorageError):
        sit(store, "1", "2", "1")
    assert len(records(store)) == 1
    assert len(open_questions(store, "kim")) == PROMPTS - 1


def test_an_answer_cannot_command_the_terminal(store: Store, episode: Callable[..., Episode]) -> None:
    store.add_episodes(
        [episode("evil?", "\x1b[2J\x1b]0;pwned\x07gone"), episode("evil?", "[red]not markup[/red]")]
    )
    _, text = sit(store, *"1" * 20, width=80)
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]not markup[/red]" in text


def test_imported_comparisons_are_asked_again(store: Store) -> None:
    record, items = comparison(
        "p", "x", "y", annotator=Annotator(pseudonym="lee", type="human"), task_id="topic"
    )
    store.add_feedback([record], items)
    (asked,) = open_questions(store, "kim", source="comparisons", task="topic")
    assert isinstance(asked, Question) and asked.task_id == "topic"
    judge_in_terminal(store, [asked], "kim", keys=Script("1"), screen=Console(file=io.StringIO()))
    assert open_questions(store, "kim", source="comparisons") == []
    assert open_questions(store, "lee", source="comparisons") == []


def test_line_keys_read_letters_and_arrow_names() -> None:
    keys = LineKeys(io.StringIO("1\nLEFT\n  tie\n\nq"))
    assert [keys.read() for _ in range(6)] == ["1", "left", "t", "", "q", None]


@pytest.mark.parametrize(
    ("pressed", "names"),
    [
        (b"1", ["1"]),
        (b"T", ["t"]),
        (b"\x1b[D", ["left"]),
        (b"\x1bOC", ["right"]),
        (b"\x1b[B2", ["down", "2"]),
        (b"\x1b", [""]),
        (b"\x1b[1;5D1", ["", "1"]),
        ("é".encode() + b"1", ["", "", "1"]),
        (b"\x04", [None]),
    ],
)
def test_keys_of_a_terminal(pressed: bytes, names: Sequence[str | None]) -> None:
    master, slave = pty.openpty()
    try:
        before = termios.tcgetattr(slave)
        with os.fdopen(os.dup(slave), "r") as stream, keyboard(stream) as keys:
            assert isinstance(keys, TerminalKeys)
            os.write(master, pressed)
            assert [keys.read() for _ in names] == list(names)
        assert termios.tcgetattr(slave)[3] == before[3]  # echo and line mode are back
    finally:
        os.close(master)
        os.close(slave)


COMMAND = [sys.executable, "-m", "corrigible", "judge", "--annotator", "kim", "--store"]


def test_the_command_reads_lines_from_a_pipe(path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, str(path), "--limit", "3", "--json"],
        input="1\nt\ns\nx\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert (tally["judged"], tally["skipped"], tally["left"]) == (2, 1, 0)


def test_the_command_without_questions_or_store_says_so(tmp_path: Path) -> None:
    missing = subprocess.run([*COMMAND, str(tmp_path / "no.db")], capture_output=True, text=True, timeout=60)
    assert missing.returncode not in (0, 1)
    Store.open(tmp_path / "empty.db").close()
    empty = subprocess.run(
        [*COMMAND, str(tmp_path / "empty.db"), "--json"], capture_output=True, text=True, timeout=60
    )
    assert empty.returncode == 0 and json.loads(empty.stdout)["judged"] == 0
    assert "nothing left to ask" in empty.stderr


class Session:
    """The command under a pseudo-terminal."""

    def __init__(self, path: Path) -> None:
        self.output = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # pragma: no cover - the child
            os.environ.update(COLUMNS="120", LINES="40", TERM="xterm")
            os.execv(sys.executable, [*COMMAND, str(path)])

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.output.count(text.encode()) < times:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not come {times} times: {self.output.decode()}")
            if select.select([self.fd], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self.fd, 65536)
                except OSError:
                    if self.output.count(text.encode()) < times:
                        raise AssertionError(self.output.decode()) from None

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def end(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_a_whole_sitting_under_a_pseudo_terminal(path: Path) -> None:
    session = Session(path)
    session.wait_for("q quit")
    for count, key in enumerate((b"1", b"\x1b[C", b"t", b"u", b"b"), start=2):
        session.press(key)
        session.wait_for("q quit", count)
    session.press(b"q")
    session.wait_for("3 judged")
    assert session.end() == 0
    with Store.open(path) as store:
        outcomes = [r.payload.outcome for r in records(store) if isinstance(r.payload, Comparison)]
    assert len(outcomes) == 3 and outcomes[2] == "both_bad"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_answered_survives_any_end(path: Path, stop: signal.Signals) -> None:
    session = Session(path)
    session.wait_for("q quit")
    session.press(b"1")
    session.wait_for("q quit", 2)
    if stop is signal.SIGINT:
        session.press(b"\x03")  # Ctrl-C as a person presses it
        session.wait_for("goes on with the next question")
    else:
        os.kill(session.pid, stop)
    assert session.end() == (-9 if stop is signal.SIGKILL else 130)
    with Store.open(path) as store:
        assert len(records(store)) == 1
        assert len(open_questions(store, "kim")) == PROMPTS - 1
