"""Scoring one target: rating, reaction, step labels, label, outcome."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from corrigible.records.base import Millis, Record
from corrigible.records.payloads.base import PayloadBase


class Scale(Record):
    """What a number means: bounds, grid, level of measurement, and words for some values.

    Values of scales with different ids are never mixed in one statistic.
    """

    id: str = Field(min_length=1)
    min: float
    max: float
    step: float | None = Field(default=None, gt=0)
    level: Literal["nominal", "ordinal", "interval", "ratio"] = "ordinal"
    anchors: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"scale {self.id!r} is empty: min {self.min} is not below max {self.max}")
        return self

    def holds(self, value: float) -> bool:
        """Whether the value lies within the bounds and on the grid ``min + k * step``."""
        if not self.min <= value <= self.max:
            return False
        if self.step is None:
            return True
        steps = (value - self.min) / self.step
        return math.isclose(steps, round(steps), rel_tol=1e-9, abs_tol=1e-6)


class Rating(PayloadBase):
    """A value on a scale for one target, or for one step of it (``at``); ``na`` says it does not apply."""

    kind: Literal["rating"] = "rating"
    value: float | None = None
    scale: Scale
    criterion: str = Field(default="overall", min_length=1)
    at: int | None = Field(default=None, ge=0)
    na: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.na != (self.value is None):
            raise ValueError("na goes without a value, and every other rating has one")
        if self.value is not None and not self.scale.holds(self.value):
            grid = f" in steps of {self.scale.step}" if self.scale.step is not None else ""
            raise ValueError(
                f"value {self.value} is not on scale {self.scale.id!r}: "
                f"{self.scale.min} to {self.scale.max}{grid}"
            )
        return self


class Reaction(PayloadBase):
    """A thumb on one target: +1, -1, or 0 when it was taken back. Unpaired, as KTO learns from."""

    kind: Literal["reaction"] = "reaction"
    value: Literal[-1, 0, 1]
    tags: tuple[str, ...] = ()


class StepLabel(Record):
    """The label of step ``i``: -1, 0, +1, or a probability in [0, 1] that it is right."""

    i: int = Field(ge=0)
    value: float

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value != -1 and not 0 <= self.value <= 1:
            raise ValueError(f"value {self.value} is neither -1 nor in [0, 1]")
        return self


class StepLabels(PayloadBase):
    """Which steps of one target are right, up to and including step ``judged_until``.

    ``first_error`` e says that step e is wrong (-1) and none before it is. Nothing is said of later steps.
    """

    kind: Literal["step_labels"] = "step_labels"
    labels: tuple[StepLabel, ...] = Field(min_length=1)
    first_error: int | None = Field(default=None, ge=0)
    judged_until: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = [label.i for label in self.labels]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise ValueError(f"step numbers must increase strictly: {steps}")
        if steps[-1] > self.judged_until:
            raise ValueError(f"step {steps[-1]} is labelled, but judged_until is {self.judged_until}")
        if self.first_error is not None:
            values = {label.i: label.value for label in self.labels}
            if values.get(self.first_error) != -1:
                raise ValueError(f"first_error {self.first_error} needs the label -1 at that step")
            early = [i for i, value in values.items() if i < self.first_error and value < 0]
            if early:
                raise ValueError(f"step {early[0]} is wrong before first_error {self.first_error}")
        return self


class Label(PayloadBase):
    """A class, or several, for one target: confirmed, replaced, out of scope, or unsure.

    ``label_set`` lists the classes to choose from; empty when it is open.
    """

    kind: Literal["label"] = "label"
    values: tuple[str, ...] = ()
    label_set: tuple[str, ...] = ()
    action: Literal["confirm", "replace", "out_of_scope", "unsure"]
    previous: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"a class is named twice: {list(self.values)}")
        unknown = sorted(set(self.values) - set(self.label_set)) if self.label_set else []
        if unknown:
            raise ValueError(f"classes {unknown} are not in the label set {list(self.label_set)}")
        if self.action == "out_of_scope" and self.values:
            raise ValueError("out_of_scope goes without a value")
        if self.action in ("confirm", "replace") and not self.values:
            raise ValueError(f"{self.action} needs a value")
        same = self.previous is not None and set(self.previous) == set(self.values)
        if self.action == "replace" and (self.previous is None or same):
            raise ValueError("replace needs a previous value that differs from the new one")
        if self.action == "confirm" and self.previous is not None and not same:
            raise ValueError("confirm keeps the previous value; use replace to change it")
        return self


class Verifier(Record):
    """What ran: name, version, configuration, and its declared policies.

    ``on_timeout`` says whether a timeout is a failure of the target or unknown. A ``deterministic`` verifier
    gives the same outcome for the same target, seed and environment.
    """

    name: str = Field(min_length=1)
    version: str
    config: dict[str, JsonValue] = Field(default_factory=dict)
    on_timeout: Literal["fail", "unknown"] = "unknown"
    deterministic: bool = False


class TestResult(Record):
    """One test of a verifier's run; ``passed`` None when it did not come to run."""

    __test__ = False  # not a test class for pytest

    name: str
    passed: bool | None = None
    weight: float = Field(default=1.0, ge=0)
    ms: Annotated[float, Field(ge=0)] | None = None


class Outcome(PayloadBase):
    """What a verifier or the environment found about one target, and how its run ended.

    An error of the verifier is not a failure of the target: only ``exit`` ok has a score, and only a timeout
    may count as failed, when the verifier declares so. ``log`` is text or a blob's hash.
    """

    kind: Literal["outcome"] = "outcome"
    verifier: Verifier
    passed: bool | None = None
    score: float | None = None
    range: tuple[float, float] | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    tests: tuple[TestResult, ...] = ()
    exit: Literal["ok", "timeout", "crash", "resource", "parse_error", "unsupported"] = "ok"
    runtime_ms: Millis | None = None
    seed: int | None = None
    env_digest: str | None = None
    log: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.exit == "ok" and self.passed is None and self.score is None:
            raise ValueError("exit ok needs passed or score")
        if self.exit != "ok" and self.score is not None:
            raise ValueError(f"exit {self.exit!r} has no score: an error is not a value")
        if self.exit == "timeout":
            declared = False if self.verifier.on_timeout == "fail" else None
            if self.passed is not declared:
                raise ValueError(
                    f"the verifier declares on_timeout={self.verifier.on_timeout!r}, so passed is {declared}"
                )
        elif self.exit != "ok" and self.passed is not None:
            raise ValueError(f"exit {self.exit!r} says nothing about the target: passed must be null")
        if self.range is not None:
            low, high = self.range
            if low > high or (self.score is not None and not low <= self.score <= high):
                raise ValueError(f"score {self.score} does not lie in the range {[low, high]}")
        return self

    def replay_key(self) -> tuple[Any, ...]:
        """What a deterministic verifier must reproduce: equal for a true replay, whatever its duration."""
        tests = tuple((t.name, t.passed, t.weight) for t in self.tests)
        return (self.passed, self.score, self.range, tuple(sorted(self.parts.items())), tests, self.exit)
