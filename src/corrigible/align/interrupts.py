"""Ctrl-C as a wish: long work ends between two whole pieces, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """Raised between micro-batches after Ctrl-C or SIGTERM."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], None]]:
    """Turn the first SIGINT or SIGTERM into a wish that the yielded function grants by raising.

    A second one acts at once, as if this were not here. Outside the main thread nothing is changed.
    """
    wished = threading.Event()

    def check() -> None:
        if wished.is_set():
            raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def wish(number: int, frame: FrameType | None) -> None:
        wished.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, wish)
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
