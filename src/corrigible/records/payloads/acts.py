"""Acting: demonstration, intervention, approval, and what users do unasked (implicit event)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from corrigible.records.base import Micros, Millis, Probability, Record, Sha256
from corrigible.records.items import ItemType
from corrigible.records.payloads.base import PayloadBase


class ArrayRef(Record):
    """An array kept as a blob: content hash, element type, shape."""

    sha256: Sha256
    dtype: str
    shape: tuple[int, ...]


class Demonstration(PayloadBase):
    """How it should be done: an episode or a text by an expert, novice, script or agent.

    The actions were taken by ``source``. ``success`` None is unknown, which is not False. Give ``episode``
    or ``text``, or neither when the target itself is the demonstration.
    """

    kind: Literal["demonstration"] = "demonstration"
    episode: str | None = None
    text: str | None = None
    source: Literal["expert", "novice", "scripted", "agent"]
    success: bool | None = None
    assisted: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.episode is not None and self.text is not None:
            raise ValueError("a demonstration is an episode or a text, not both")
        return self


class Intervention(PayloadBase):
    """A person steps into an episode: takes over, vetoes, pauses, blends, nudges, or says what to do.

    Times are environment steps. ``t_detect`` and ``t_rewind`` count in the parent episode, the rest in the
    working branch: the parent itself, or, after a rewind, the episode ``branch`` (which stores its parent
    and branch step). ``actions`` are float32 rows (n, A), one per step of a takeover. ``outcome`` says how
    it ended.
    """

    kind: Literal["intervention"] = "intervention"
    mode: Literal["takeover", "veto", "pause", "blend", "nudge", "language"]
    t_detect: int = Field(ge=0)
    t_rewind: int | None = Field(default=None, ge=0)
    t_take: int = Field(ge=0)
    t_recovered: int | None = Field(default=None, ge=0)
    t_release: int = Field(ge=0)
    branch: str | None = None
    actions: tuple[tuple[float, ...], ...] | ArrayRef | None = None
    command: str | None = None
    reason: str | None = None
    outcome: str | None = None

    target_types: ClassVar[frozenset[ItemType]] = frozenset({"trajectory"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.t_rewind is not None and self.t_rewind > self.t_detect:
            raise ValueError(f"t_rewind {self.t_rewind} is after t_detect {self.t_detect}")
        if (self.t_rewind is None) != (self.branch is None):
            raise ValueError("a rewind goes on in a new branch episode, and only a rewind does")
        start = self.t_detect if self.t_rewind is None else self.t_rewind
        times = [start, self.t_take, self.t_release]
        if self.t_recovered is not None:
            times.insert(2, self.t_recovered)
        if times != sorted(times):
            raise ValueError(
                f"times out of order: {'t_detect' if self.t_rewind is None else 't_rewind'}, t_take, "
                f"{'' if self.t_recovered is None else 't_recovered, '}t_release = {times}"
            )
        if self.mode == "language" and not (self.command or "").strip():
            raise ValueError("an intervention in language needs its command")
        self._check_actions()
        return self

    def _check_actions(self) -> None:
        if self.actions is None:
            return
        if isinstance(self.actions, ArrayRef):
            if len(self.actions.shape) != 2:
                raise ValueError(f"actions have shape (n, A), not {list(self.actions.shape)}")
            rows = self.actions.shape[0]
        else:
            rows = len(self.actions)
            if len({len(row) for row in self.actions}) > 1:
                raise ValueError("rows of actions differ in length")
        steps = self.t_release - self.t_take
        if self.mode == "takeover" and rows != steps:
            raise ValueError(f"a takeover of {steps} steps needs {steps} rows of actions, not {rows}")

    @property
    def discarded(self) -> range:
        """Parent steps ``(t_rewind, t_detect]`` that a rewind flags as discarded (never deleted)."""
        return range(0) if self.t_rewind is None else range(self.t_rewind + 1, self.t_detect + 1)

    @property
    def recovery(self) -> range:
        """Steps of the working branch that undo the trouble: ``[t_take, t_recovered)``."""
        return range(self.t_take, self.t_take if self.t_recovered is None else self.t_recovered)

    @property
    def correction(self) -> range:
        """Steps of the working branch after recovery and before the release."""
        return range(self.t_take if self.t_recovered is None else self.t_recovered, self.t_release)


class Approval(PayloadBase):
    """Whether one proposed action may run: approved, denied, replaced by an alternative, or deferred.

    ``risk`` is the estimated probability of harm. ``executed_at`` is never before the user's approval.
    """

    kind: Literal["approval"] = "approval"
    decision: Literal["approve", "deny", "alternative", "defer"]
    alternative: Sha256 | None = None
    scope: Literal["once", "session", "rule"] = "once"
    reversible: Literal["always", "maybe", "never"]
    risk: Probability
    source: Literal["user", "session", "policy", "classifier"]
    executed_at: Micros | None = None

    target_types: ClassVar[frozenset[ItemType]] = frozenset({"action"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.decision == "alternative") != (self.alternative is not None):
            raise ValueError("decision 'alternative' names the alternative, and only it does")
        if self.decision in ("deny", "defer") and self.executed_at is not None:
            raise ValueError(f"an action with decision {self.decision!r} was not executed")
        return self


ImplicitEventName = Literal[
    "shown",
    "accepted",
    "rejected",
    "ignored",
    "partial_accept",
    "browsed",
    "kept",
    "edited_after",
    "copied",
    "clicked",
    "skipped",
    "dwell",
    "scrolled",
    "retried",
    "regenerated",
    "reformulated",
    "follow_up",
    "interrupted",
    "abandoned",
    "undone",
    "reported",
    "completed",
]


class ImplicitEvent(PayloadBase):
    """What a user did, unasked. Never a training row by itself: an Interpreter says what it may mean.

    ``seq`` increases strictly within a session. ``kept`` holds 1 - edit ratio after ``delay_s`` seconds.
    ``shown_set`` are the hashes shown together, ``position`` the place among them. The record must state its
    ``propensity``, if only as null (unknown).
    """

    kind: Literal["implicit_event"] = "implicit_event"
    event: ImplicitEventName
    value: float | None = None
    session: str = Field(min_length=1)
    seq: int = Field(ge=0)
    position: int | None = Field(default=None, ge=0)
    shown_set: tuple[Sha256, ...] = ()
    latency_ms: Millis | None = None
    delay_s: Literal[15, 30, 120, 300, 600] | None = None

    max_targets: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.event == "kept":
            if self.value is None or not 0 <= self.value <= 1:
                raise ValueError("kept needs a value in [0, 1]: 1 - edit ratio")
            if self.delay_s is None:
                raise ValueError("kept needs delay_s, the fixed delay after which it was measured")
        elif self.delay_s is not None:
            raise ValueError("delay_s goes with kept")
        return self
