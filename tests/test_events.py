"""Events reach everyone who listens, and listening never stops the work."""

from __future__ import annotations

import io
import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corrigible.errors import BadInputError, MissingError
from corrigible.events import (
    Alert,
    AnyEvent,
    Artefact,
    EventBus,
    Message,
    Metric,
    Progress,
    default_bus,
    emit,
    jsonl_subscriber,
    mlflow_subscriber,
    parse_event,
    rich_subscriber,
    tensorboard_subscriber,
    track,
    use_bus,
    wandb_subscriber,
)

ONE_OF_EACH: list[AnyEvent] = [
    Progress(task="scoring", done=3, total=10, unit="pair"),
    Metric(name="win_rate", value=0.61, step=4, interval=(0.55, 0.67)),
    Artefact(name="report", path="report.html", sha256="ab" * 32),
    Alert(name="nan_loss", message="The loss is NaN at step 3."),
    Message(text="hello"),
]


def test_subscribers_get_events_in_order_and_can_leave() -> None:
    bus, seen = EventBus(run="r1"), []
    leave = bus.subscribe(seen.append)
    bus.emit(Message(text="one"))
    leave()
    leave()
    bus.emit(Message(text="two"))
    assert [(event.text, event.run) for event in seen] == [("one", "r1")]


def test_a_failing_subscriber_is_reported_once_and_the_others_go_on() -> None:
    bus, seen = EventBus(), []

    def broken(event: AnyEvent) -> None:
        raise OSError("the disk is gone")

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    for text in ("one", "two"):
        bus.emit(Message(text=text))
    assert [event.kind for event in seen] == ["alert", "message", "message"]
    assert "broken" in seen[0].message and "the disk is gone" in seen[0].message


def test_ctrl_c_in_a_subscriber_is_not_swallowed() -> None:
    bus = EventBus()

    def interrupt(event: AnyEvent) -> None:
        raise KeyboardInterrupt

    bus.subscribe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bus.emit(Message(text="one"))


def test_use_bus_nests_and_restores() -> None:
    outer, inner, fallback = [], [], []
    leave = default_bus().subscribe(fallback.append)
    a, b = EventBus(), EventBus()
    a.subscribe(outer.append)
    b.subscribe(inner.append)
    with use_bus(a):
        emit(Message(text="a"))
        with use_bus(b):
            emit(Message(text="b"))
        emit(Message(text="a again"))
    emit(Message(text="default"))
    leave()
    assert [e.text for e in outer] == ["a", "a again"]
    assert [e.text for e in inner] == ["b"]
    assert [e.text for e in fallback] == ["default"]


def test_emitting_from_many_threads_delivers_one_at_a_time() -> None:
    bus, inside, worst = EventBus(), [0], [0]

    def slow(event: AnyEvent) -> None:
        inside[0] += 1
        worst[0] = max(worst[0], inside[0])
        threading.Event().wait(0.001)
        inside[0] -= 1

    bus.subscribe(slow)
    threads = [
        threading.Thread(target=lambda: [bus.emit(Message(text="x")) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1]


def test_track_counts_what_was_done(recorded_events: list[Any]) -> None:
    assert list(track([1, 2, 3], "reading", every_seconds=0)) == [1, 2, 3]
    assert [(e.done, e.total) for e in recorded_events] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_track_says_how_far_it_came_when_left_early(recorded_events: list[Any]) -> None:
    with pytest.raises(RuntimeError):
        for number in track(range(10), "reading", every_seconds=1e9):
            if number == 4:
                raise RuntimeError
    assert recorded_events[-1].done == 4 and recorded_events[-1].total == 10


def test_track_of_an_unsized_iterable_knows_its_total_at_the_end(recorded_events: list[Any]) -> None:
    list(track(iter("ab"), "reading", every_seconds=1e9))
    assert [(e.done, e.total) for e in recorded_events] == [(0, None), (2, 2)]


def test_track_rate_is_limited(recorded_events: list[Any]) -> None:
    list(track(range(10_000), "reading"))
    assert len(recorded_events) < 100


def test_events_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ONE_OF_EACH[0].done = 4  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="speed"):
        Progress(task="x", done=0, speed=3)  # type: ignore[call-arg]


def test_jsonl_round_trip_keeps_every_event(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    subscriber = jsonl_subscriber(path)
    for event in ONE_OF_EACH:
        subscriber(event)
    # Flushed line by line: a run that is killed now has lost nothing.
    assert [parse_event(line) for line in path.read_text().splitlines()] == ONE_OF_EACH
    subscriber.close()
    again = jsonl_subscriber(path)
    again(ONE_OF_EACH[0])
    again.close()
    assert len(path.read_text().splitlines()) == len(ONE_OF_EACH) + 1


@pytest.mark.parametrize("line", ["", "{", '{"kind": "nope"}', '{"kind": "message"}', "[1]"])
def test_parse_event_refuses_what_is_not_one(line: str) -> None:
    with pytest.raises(BadInputError, match="Not an event"):
        parse_event(line)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_every_kind(terminal: bool) -> None:
    out = io.StringIO()
    subscriber = rich_subscriber(Console(file=out, force_terminal=terminal, width=120))
    for event in [*ONE_OF_EACH, Progress(task="scoring", done=10, total=10, unit="pair")]:
        subscriber(event)
    subscriber.close()
    text = out.getvalue()
    for expected in ("scoring", "10 pairs", "report.html", "The loss is NaN", "hello"):
        assert expected in text
    assert ("\x1b[" in text) is terminal


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    out = io.StringIO()
    rich_subscriber(Console(file=out, width=120))(Message(text="[/bold] and [red]"))
    assert "[/bold] and [red]" in out.getvalue()


def test_tensorboard_gets_scalars_with_their_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    subscriber = tensorboard_subscriber(tmp_path)
    for event in [*ONE_OF_EACH, Metric(name="loss", value=0.7), Metric(name="loss", value=0.5)]:
        subscriber(event)
    subscriber.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path)).Reload()
    assert [(s.step, round(s.value, 6)) for s in written.Scalars("win_rate")] == [(4, 0.61)]
    assert [round(s.value, 6) for s in written.Scalars("win_rate/low")] == [0.55]
    assert [s.step for s in written.Scalars("loss")] == [0, 1]


@pytest.mark.parametrize(
    ("subscriber", "module"), [(wandb_subscriber, "wandb"), (mlflow_subscriber, "mlflow")]
)
def test_a_missing_tracker_says_what_to_install(
    subscriber: Any, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=r"corrigible\[trackers\]"):
        subscriber()


def test_wandb_and_mlflow_get_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins with the two libraries' call signatures (neither is in the tested set)."""
    calls: list[tuple[Any, ...]] = []

    class Run:
        def log(self, data: dict[str, float]) -> None:
            calls.append(("wandb", json.dumps(data)))

        def alert(self, title: str, text: str) -> None:
            calls.append(("alert", title))

        def finish(self) -> None:
            calls.append(("finish",))

    wandb = types.SimpleNamespace(init=lambda **settings: Run())
    mlflow = types.SimpleNamespace(
        start_run=lambda **settings: calls.append(("start", settings)),
        log_metric=lambda key, value, step=None: calls.append((key, value, step)),
        set_tag=lambda key, value: calls.append((key, value)),
        end_run=lambda: calls.append(("end",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for make in (wandb_subscriber, lambda: mlflow_subscriber(run_name="r")):
        subscriber = make()
        for event in ONE_OF_EACH:
            subscriber(event)
        subscriber.close()
    assert calls == [
        ("wandb", '{"win_rate": 0.61, "win_rate/low": 0.55, "win_rate/high": 0.67, "step": 4}'),
        ("alert", "nan_loss"),
        ("finish",),
        ("start", {"run_name": "r"}),
        ("win_rate", 0.61, 4),
        ("win_rate_low", 0.55, 4),
        ("win_rate_high", 0.67, 4),
        ("alert.nan_loss", "The loss is NaN at step 3."),
        ("end",),
    ]
