"""Marking what is right or wrong inside a target: critique, spans, click."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from corrigible.records.base import Record, Sha256
from corrigible.records.items import ItemType
from corrigible.records.payloads.base import PayloadBase

Severity = Annotated[int, Field(ge=0, le=3)]
Polarity = Literal[-1, 0, 1]
SpanUnit = Literal["char", "token", "turn", "frame", "cell"]


class SpanRange(Record):
    """Half-open ``[start, end)``, counted from 0; characters are Unicode code points of the stored text."""

    start: int = Field(ge=0)
    end: int
    unit: SpanUnit = "char"

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"span [{self.start}, {self.end}) is empty: it is half-open, start < end")
        return self


class Span(SpanRange):
    """A marked stretch of a target: its label, whether it is good or bad, how much it matters."""

    label: str
    polarity: Polarity = -1
    severity: Severity = 1
    note: str = ""


class Aspect(Record):
    """One aspect a critique speaks of, where in which target, and how severe it is."""

    aspect: str = Field(min_length=1)
    severity: Severity
    span: SpanRange | None = None
    target: int = Field(default=0, ge=0)


class Critique(PayloadBase):
    """Free text about one or more targets, with the aspects it touches.

    A ``suggestion`` (hash of the proposed text) also yields an ``edit`` record of the same judgement.
    """

    kind: Literal["critique"] = "critique"
    text: str = Field(pattern=r"\S")
    aspects: tuple[Aspect, ...] = ()
    polarity: Polarity = 0
    suggestion: Sha256 | None = None
    lang: str | None = None

    max_targets: ClassVar[int | None] = None

    def fault_with_targets(self, count: int) -> str | None:
        """See :meth:`PayloadBase.fault_with_targets`."""
        wrong = next((a.target for a in self.aspects if a.target >= count), None)
        return None if wrong is None else f"an aspect is about target {wrong} and the record has {count}"

    def permuted(self, new_index: Sequence[int]) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        aspects = tuple(a.model_copy(update={"target": new_index[a.target]}) for a in self.aspects)
        return self.model_copy(update={"aspects": aspects})


class Spans(PayloadBase):
    """Marked stretches of one target.

    ``exhaustive`` asserts that unmarked content is fine; otherwise unmarked means unknown. ``exclusive``
    forbids overlaps. Token spans only as a projection of character spans: they name the ``tokenizer`` hash.
    """

    kind: Literal["spans"] = "spans"
    spans: tuple[Span, ...]
    exhaustive: bool = False
    label_set: tuple[str, ...] | None = None
    exclusive: bool = False
    tokenizer: Sha256 | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_set is not None:
            unknown = sorted({s.label for s in self.spans} - set(self.label_set))
            if unknown:
                raise ValueError(f"labels {unknown} are not in the label set {list(self.label_set)}")
        if self.tokenizer is None and any(s.unit == "token" for s in self.spans):
            raise ValueError("token spans are a projection of character spans: name the tokenizer's hash")
        if self.exclusive:
            ordered = sorted(self.spans, key=lambda s: (s.unit, s.start, s.end))
            for before, after in itertools.pairwise(ordered):
                if before.unit == after.unit and after.start < before.end:
                    raise ValueError(
                        f"spans [{before.start}, {before.end}) and [{after.start}, {after.end}) overlap, "
                        "which exclusive forbids"
                    )
        return self


Coordinate = Annotated[float, Field(ge=0.0, le=1.0)]
_POINTS: dict[str, tuple[int, int | None]] = {
    "point+": (1, 1),
    "point-": (1, 1),
    "keypoint": (1, 1),
    "box": (2, 2),
    "polygon": (3, None),
    "scribble": (1, None),
    "erase": (1, None),
}


class Click(PayloadBase):
    """One correcting act on an image: a point, keypoint, box, polygon, scribble or erasure.

    ``xy`` are fractions of the original pixel grid ``size`` (width, height), origin top-left; the centre of
    pixel column j is (j + 0.5) / width. ``visible`` is COCO's code: 0 absent, 1 hidden, 2 visible. ``round``
    counts from 0; ``before`` and ``after`` are the annotation's hashes. What was clicked stays until undone.
    """

    kind: Literal["click"] = "click"
    tool: Literal["point+", "point-", "keypoint", "box", "polygon", "scribble", "erase"]
    object_id: str
    xy: tuple[tuple[Coordinate, Coordinate], ...]
    keypoint: int | None = Field(default=None, ge=0)
    visible: Literal[0, 1, 2] | None = None
    round: int = Field(ge=0)
    before: Sha256 | None = None
    after: Sha256 | None = None
    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None

    target_types: ClassVar[frozenset[ItemType]] = frozenset({"image"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = _POINTS[self.tool]
        if len(self.xy) < low or (high is not None and len(self.xy) > high):
            wanted = str(low) if high == low else f"at least {low}"
            raise ValueError(f"tool {self.tool!r} takes {wanted} points, not {len(self.xy)}")
        if (self.tool == "keypoint") != (self.keypoint is not None):
            raise ValueError("the keypoint index goes with tool 'keypoint', and only with it")
        return self
