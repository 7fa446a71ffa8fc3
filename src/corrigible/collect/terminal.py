"""A person at a keyboard: one key per judgement, and every judgement on disk before the next question.

On a terminal single keys are read as they are pressed; otherwise (a pipe, a test, an editor's
console) the same letters are read line by line. Ctrl-C, a closed window or a kill lose nothing:
what was answered is stored, what was not is asked the next time.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from corrigible.collect.questions import Answer, Order, Outcome, Question
from corrigible.errors import Interrupted
from corrigible.records import Annotator, Effort, Feedback, NotJudgedReason, now_us

if TYPE_CHECKING:
    from corrigible.store import Store

GUIDELINE_VERSION = "corrigible-judge@1"
"""Version of what people are told here; change it with the wording."""

OUTCOME_KEYS: dict[str, Outcome] = {
    "1": "first",
    "left": "first",
    "2": "second",
    "right": "second",
    "t": "tie",
    "down": "tie",
    "b": "both_bad",
    "g": "both_good",
}
SKIP_KEYS: dict[str, NotJudgedReason] = {
    "c": NotJudgedReason.cannot_judge,
    "u": NotJudgedReason.unsafe,
    "x": NotJudgedReason.broken_item,
    "n": NotJudgedReason.not_applicable,
    "s": NotJudgedReason.skipped,
}
HELP = "1/← first   2/→ second   t/↓ tie   b both bad   g both good   s skip   u undo   q quit"
SKIP_HELP = (
    "Skip because: c cannot judge   u unsafe   x broken   n does not apply   s no reason   (other: back)"
)

_LONGEST_GAP_MS = 30_000  # longer pauses between keys are idle, not active, time
_ESCAPE_WAIT = 0.05  # seconds in which the rest of an arrow key's sequence arrives
_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}


class Keys(Protocol):
    """Where keys come from."""

    def read(self) -> str | None:
        """The next key: a letter or digit in lower case, an arrow's name, "" for anything else; None
        when there will be no more."""
        ...


class TerminalKeys:
    """Single keys from a terminal, without waiting for a line; Ctrl-C stays Ctrl-C."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self) -> str | None:
        import termios

        try:
            self.single_keys()  # again each time: a shell changes the mode over Ctrl-Z and fg
            byte = os.read(self._fd, 1)
        except (OSError, termios.error):  # the terminal is gone
            return None
        if byte in (b"", b"\x04"):
            return None
        if byte == b"\x1b":
            return self._escape()
        return byte.decode("ascii", "ignore").lower() if byte.isalnum() else ""

    def single_keys(self) -> None:
        """Have keys come one by one and unechoed; Ctrl-C still interrupts."""
        import termios
        import tty

        # Now, because the default would throw away keys that were typed ahead.
        tty.setcbreak(self._fd, termios.TCSANOW)

    def _escape(self) -> str:
        sequence = ""
        while select.select([self._fd], [], [], _ESCAPE_WAIT)[0]:
            sequence += os.read(self._fd, 1).decode("latin-1")
            if sequence[0] not in "[O" or (len(sequence) > 1 and "@" <= sequence[-1] <= "~"):
                break
        return _ARROWS.get(sequence[1:], "") if sequence[:1] in ("[", "O") else ""


class LineKeys:
    """The first letter of each line of a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str | None:
        line = self._stream.readline()
        if not line:
            return None
        word = line.strip().lower()
        return word if word in _ARROWS.values() else word[:1]


@contextmanager
def keyboard(stream: TextIO) -> Iterator[Keys]:
    """Single keys when ``stream`` is a terminal, lines otherwise; the terminal is put back at the end."""
    try:
        import termios

        fd = stream.fileno()
        before = termios.tcgetattr(fd) if os.isatty(fd) else None
    except (ImportError, OSError, ValueError):  # no termios (Windows), or a stream without a descriptor
        before = None
    if before is None:
        yield LineKeys(stream)
        return
    try:
        terminal = TerminalKeys(fd)
        terminal.single_keys()
        yield terminal
    finally:
        # Not "drain": a terminal whose window was closed never drains.
        with suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSANOW, before)


@dataclass
class Tally:
    """What one sitting came to. ``active_ms`` leaves out pauses longer than 30 s."""

    judged: int = 0
    skipped: int = 0
    undone: int = 0
    left: int = 0
    active_ms: int = 0

    def to_json(self) -> dict[str, int]:
        return dict(vars(self))


class _Stopwatch:
    """Active and idle time of one question, by the gaps between keys."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last = clock()
        self.active_ms = self.idle_ms = self.keys = 0

    def key(self) -> None:
        now = self._clock()
        gap = max(0, round((now - self._last) * 1000))
        self.active_ms += min(gap, _LONGEST_GAP_MS)
        self.idle_ms += max(0, gap - _LONGEST_GAP_MS)
        self._last = now
        self.keys += 1

    def effort(self, undo: int) -> Effort:
        return Effort(active_ms=self.active_ms, idle_ms=self.idle_ms, keys=self.keys, undo=undo)


def judge_in_terminal(
    store: Store,
    questions: Sequence[Question],
    annotator: str,
    *,
    keys: Keys,
    screen: Console,
    limit: int | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Tally:
    """Ask ``questions`` one after the other until they, ``limit`` or the person's patience end.

    Every judgement is committed to ``store`` before the next question is shown. Undo withdraws the
    last record of this sitting and asks its question again, in the same order of presentation.

    Raises:
        Interrupted: Ctrl-C; everything judged so far is stored.
        StorageError: a judgement could not be stored; the ones before it were.
    """
    sitting = _Sitting(store, annotator, keys, screen, seed, clock)
    waiting = list(questions)[:limit]
    place = 0
    redone = False
    try:
        while place < len(waiting):
            sitting.tally.left = len(waiting) - place
            answer = sitting.ask(waiting[place], undo=int(redone))
            redone = False
            if answer == "quit":
                break
            if answer == "undo":
                if sitting.undo():
                    place -= 1
                    redone = True
                continue
            place += 1
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped; {sitting.tally.judged} judgements and {sitting.tally.skipped} skips of this sitting "
            "are stored.",
            advice="The same command goes on with the next question.",
        ) from None
    sitting.tally.left = len(waiting) - place
    return sitting.tally


class _Sitting:
    """One person's sitting: what is on the screen, and what was stored so far."""

    def __init__(
        self,
        store: Store,
        annotator: str,
        keys: Keys,
        screen: Console,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.keys, self.screen, self.seed, self.clock = store, keys, screen, seed, clock
        self.annotator = Annotator(pseudonym=annotator, type="human", version=GUIDELINE_VERSION)
        self.tally = Tally()
        self.stored: list[Feedback] = []
        self.last = ""

    def ask(self, question: Question, *, undo: int) -> str:
        """Show a question and deal with keys until it is answered: "done", "undo" or "quit"."""
        order = question.order(self.seed, self.annotator.pseudonym)
        layout = self._show(question, order)
        shown_at, watch = now_us(), _Stopwatch(self.clock)
        while True:
            key = self.keys.read()
            watch.key()
            if key is None or key == "q":
                return "quit"
            if key == "u":
                return "undo"
            if key in OUTCOME_KEYS:
                outcome = OUTCOME_KEYS[key]
                record = question.judged(
                    outcome, order, annotator=self.annotator, channel="ui", layout=layout,
                    shown_at=shown_at, effort=watch.effort(undo),
                )  # fmt: skip
                said = {"first": "1 is better", "second": "2 is better"}.get(
                    outcome, outcome.replace("_", " ")
                )
                return self._keep(record, question, said)
            if key == "s":
                self.screen.print(SKIP_HELP, style="yellow", markup=False)
                pressed = self.keys.read()
                watch.key()
                if pressed is None:
                    return "quit"
                if (reason := SKIP_KEYS.get(pressed)) is not None:
                    record = question.not_judged(
                        reason, order, annotator=self.annotator, channel="ui", layout=layout,
                        shown_at=shown_at, effort=watch.effort(undo),
                    )  # fmt: skip
                    return self._keep(record, question, f"skipped ({reason.value.replace('_', ' ')})")
            self.screen.print(HELP, style="dim", markup=False)

    def undo(self) -> bool:
        """Take the last record back; False when this sitting has none."""
        if not self.stored:
            self.last = "nothing to undo in this sitting"
            return False
        record = self.stored.pop()
        self.store.withdraw(record.id, by=self.annotator.pseudonym, reason="undo")
        if record.payload is None:
            self.tally.skipped -= 1
        else:
            self.tally.judged -= 1
        self.tally.undone += 1
        self.last = "taken back"
        return True

    def _keep(self, record: Feedback, question: Question, said: str) -> str:
        self.store.add_feedback([record], question.items())
        self.stored.append(record)
        if record.payload is None:
            self.tally.skipped += 1
        else:
            self.tally.judged += 1
        self.tally.active_ms += record.effort.active_ms if record.effort else 0
        self.last = f"stored: {said}"
        return "done"

    def _show(self, question: Question, order: Order) -> str:
        if self.screen.is_terminal:
            self.screen.clear()
        state = f"{self.tally.judged} judged, {self.tally.left} to go" + (
            f"   {self.last}" if self.last else ""
        )
        self.screen.rule(Text(state))
        for message in question.prompt:
            self.screen.print(Text.assemble((f"{message.role}: ", "bold cyan"), _visible(message.text)))
        panels = [
            _panel(answer, title) for answer, title in zip(question.shown(order), ("1", "2"), strict=True)
        ]
        side_by_side = self.screen.width >= 100
        if side_by_side:
            self.screen.print(Columns(panels, width=self.screen.width // 2 - 1, equal=True))
        else:
            for panel in panels:
                self.screen.print(panel)
        self.screen.print(Text(question.guideline, style="bold"))
        self.screen.print(HELP, style="dim", markup=False)
        return "side-by-side" if side_by_side else "stacked"


def _panel(answer: Answer, title: str) -> Panel:
    return Panel(Text(_visible(answer.text)), title=title, title_align="left")


def _visible(text: str) -> str:
    """Text without control characters: an answer must not be able to command the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
