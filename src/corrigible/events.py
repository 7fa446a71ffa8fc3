"""Typed events: what long-running work says while it runs.

Library code never prints. It calls :func:`emit` (or wraps a loop in :func:`track`), and whoever
started the work decides who listens: the terminal, a JSONL file, TensorBoard, W&B, MLflow, a test.

    with use_bus(EventBus()) as bus:
        bus.subscribe(jsonl_subscriber("run.jsonl"))
        for pair in track(pairs, "scoring", unit="pair"):
            ...
            emit(Metric(name="loss", value=0.61, step=12))

The current bus is a context variable: a new thread starts on the process-wide default bus unless
it is given a copy of the context. The subscribers themselves live in
:mod:`corrigible.subscribers`, and are named here for convenience.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from corrigible.errors import BadInputError

T = TypeVar("T")


def _now_us() -> int:
    return time.time_ns() // 1000


class Event(BaseModel):
    """What every event has: ``at``, microseconds since the epoch (UTC), and the ``run`` it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    at: int = Field(default_factory=_now_us)
    run: str | None = None


class Progress(Event):
    """``done`` of ``total`` units of ``task`` (``total`` None when nobody knows)."""

    kind: Literal["progress"] = "progress"
    task: str
    done: float
    total: float | None = None
    unit: str = "item"


class Metric(Event):
    """One measured number, at an optional ``step``, with its interval (low, high) when it has one."""

    kind: Literal["metric"] = "metric"
    name: str
    value: float
    step: int | None = None
    interval: tuple[float, float] | None = None


class Artefact(Event):
    """A file or folder that now exists."""

    kind: Literal["artefact"] = "artefact"
    name: str
    path: str
    sha256: str | None = None


class Alert(Event):
    """Something a person should know: ``name`` is stable (``nan_loss``), ``message`` is for reading."""

    kind: Literal["alert"] = "alert"
    name: str
    message: str


class Message(Event):
    """A line for the person watching."""

    kind: Literal["message"] = "message"
    text: str


AnyEvent = Annotated[Progress | Metric | Artefact | Alert | Message, Field(discriminator="kind")]
_ANY_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)


def parse_event(line: str | dict[str, Any]) -> AnyEvent:
    """Read an event back from a line that :func:`jsonl_subscriber` wrote.

    Raises:
        BadInputError: not JSON, an unknown kind, or a field that does not belong.
    """
    try:
        return _ANY_EVENT.validate_python(json.loads(line) if isinstance(line, str) else line)
    except (ValidationError, json.JSONDecodeError) as error:
        raise BadInputError(f"Not an event: {error}") from error


Subscriber = Callable[[AnyEvent], None]


class EventBus:
    """Hands each event to every subscriber, in the order they subscribed, in the emitting thread.

    A subscriber that raises never stops the work: its first failure is told to the others as an
    ``Alert(name="subscriber_failed")``, later ones are silent. ``KeyboardInterrupt`` passes through.
    """

    def __init__(self, run: str | None = None) -> None:
        self.run = run
        self._subscribers: list[Subscriber] = []
        self._failed: set[int] = set()
        self._lock = threading.RLock()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Add a subscriber; the returned function takes it away again (twice is harmless)."""
        with self._lock:
            self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            with self._lock, suppress(ValueError):
                self._subscribers.remove(subscriber)

        return unsubscribe

    def emit(self, event: AnyEvent) -> None:
        """Deliver ``event``; one without a run takes the bus's."""
        if event.run is None and self.run is not None:
            event = event.model_copy(update={"run": self.run})
        with self._lock:  # held while delivering, so that subscribers see one event at a time
            for subscriber in list(self._subscribers):
                try:
                    subscriber(event)
                except Exception as error:
                    self._report(subscriber, error)

    def close(self) -> None:
        """Close every subscriber that can be closed (flush files, end tracker runs) and forget all."""
        with self._lock:
            subscribers, self._subscribers = self._subscribers, []
            for subscriber in reversed(subscribers):
                with suppress(Exception):
                    getattr(subscriber, "close", lambda: None)()

    def _report(self, subscriber: Subscriber, error: Exception) -> None:
        if id(subscriber) in self._failed:
            return
        self._failed.add(id(subscriber))
        name = getattr(subscriber, "__name__", type(subscriber).__name__)
        alert = Alert(
            name="subscriber_failed",
            message=f"{name} could not take an event and may miss more: {type(error).__name__}: {error}",
            run=self.run,
        )
        for other in list(self._subscribers):
            if other is not subscriber:
                with suppress(Exception):
                    other(alert)


_DEFAULT = EventBus()
_CURRENT: ContextVar[EventBus | None] = ContextVar("corrigible_event_bus", default=None)


def default_bus() -> EventBus:
    """The process-wide bus; nobody listens on it until somebody subscribes."""
    return _DEFAULT


def current_bus() -> EventBus:
    """The bus that :func:`emit` uses here: the innermost :func:`use_bus`, or the default one."""
    return _CURRENT.get() or _DEFAULT


@contextmanager
def use_bus(bus: EventBus) -> Iterator[EventBus]:
    """Make ``bus`` the current one inside the block. Does not close it."""
    token = _CURRENT.set(bus)
    try:
        yield bus
    finally:
        _CURRENT.reset(token)


def emit(event: AnyEvent) -> None:
    """Deliver ``event`` on the current bus."""
    current_bus().emit(event)


def track(
    iterable: Iterable[T],
    task: str,
    total: float | None = None,
    unit: str = "item",
    *,
    every_seconds: float = 0.1,
) -> Iterator[T]:
    """Iterate, emitting :class:`Progress` at the start, at most every ``every_seconds``, and at the end.

    ``total`` defaults to ``len(iterable)`` where it has one. An item counts as done when the next
    one is asked for. When the loop is left early the last event says how far it came.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    done = 0
    said_at = time.monotonic()
    said = 0
    emit(Progress(task=task, done=0, total=total, unit=unit))
    finished = False
    try:
        for item in iterable:
            yield item
            done += 1
            if done != total and time.monotonic() - said_at >= every_seconds:
                said_at, said = time.monotonic(), done
                emit(Progress(task=task, done=done, total=total, unit=unit))
        finished = True
    finally:
        # The end is always told; when nobody knew the total, the end is what it was.
        if finished or said != done:
            emit(
                Progress(task=task, done=done, total=done if finished and total is None else total, unit=unit)
            )


def jsonl_subscriber(path: Any) -> Any:
    """See :class:`corrigible.subscribers.JsonlSubscriber`."""
    from corrigible.subscribers import JsonlSubscriber

    return JsonlSubscriber(path)


def rich_subscriber(console: Any = None) -> Any:
    """See :class:`corrigible.subscribers.RichSubscriber`."""
    from corrigible.subscribers import RichSubscriber

    return RichSubscriber(console)


def tensorboard_subscriber(directory: Any) -> Any:
    """See :class:`corrigible.subscribers.TensorBoardSubscriber`."""
    from corrigible.subscribers import TensorBoardSubscriber

    return TensorBoardSubscriber(directory)


def wandb_subscriber(**settings: Any) -> Any:
    """See :class:`corrigible.subscribers.WandbSubscriber`."""
    from corrigible.subscribers import WandbSubscriber

    return WandbSubscriber(**settings)


def mlflow_subscriber(**settings: Any) -> Any:
    """See :class:`corrigible.subscribers.MlflowSubscriber`."""
    from corrigible.subscribers import MlflowSubscriber

    return MlflowSubscriber(**settings)
