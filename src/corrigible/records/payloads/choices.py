"""Choosing between targets: comparison, ranking, segment preference, verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from corrigible.records.base import Probability, Record, Sha256
from corrigible.records.items import ItemType
from corrigible.records.payloads.base import PayloadBase
from corrigible.records.payloads.marks import Span

ComparisonOutcome = Literal["first", "second", "tie", "both_bad", "both_good", "incomparable"]
Strength = Annotated[int, Field(ge=0, le=3)]

# 12 decimals are finer than the float32 that the vocabulary asks for, and make p -> 1 - p exactly
# reversible, so that mirroring a record twice gives the record.
MirrorProbability = Annotated[Probability, AfterValidator(lambda p: round(p, 12))]

_MIRROR_OUTCOME: dict[Any, Any] = {"first": "second", "second": "first", "a": "b", "b": "a"}


def _mirror_outcome(outcome: Any) -> Any:
    return _MIRROR_OUTCOME.get(outcome, outcome)


def _mirror_p(p: float | None) -> float | None:
    return None if p is None else round(1.0 - p, 12)


def _default_strength(fields: dict[str, Any]) -> int:
    return 1 if fields.get("outcome") in _MIRROR_OUTCOME else 0


class Comparison(PayloadBase):
    """Which of two targets is better on one criterion, and by how much.

    ``outcome`` names targets by index (hash order), never by screen position. ``strength`` 1..3 goes with a
    decided outcome, 0 with every other. ``p_first`` is the probability that the first is better, for AI
    judges and aggregates only. One record per criterion.
    """

    kind: Literal["comparison"] = "comparison"
    outcome: ComparisonOutcome
    strength: Strength = Field(default_factory=_default_strength)
    criterion: str = Field(default="overall", min_length=1)
    p_first: MirrorProbability | None = None

    min_targets: ClassVar[int] = 2
    max_targets: ClassVar[int | None] = 2

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.strength == 0) == (self.outcome in _MIRROR_OUTCOME):
            raise ValueError(f"strength {self.strength} with outcome {self.outcome!r}: {_STRENGTH_RULE}")
        return self

    @property
    def is_tie(self) -> bool:
        """Whether pair losses see a tie (both_bad and both_good are ties for them)."""
        return self.outcome in ("tie", "both_bad", "both_good")

    def mirrored(self) -> Self:
        """The judgement with the roles of the two targets exchanged; an involution."""
        return self.model_copy(
            update={"outcome": _mirror_outcome(self.outcome), "p_first": _mirror_p(self.p_first)}
        )

    def permuted(self, new_index: Sequence[int]) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        return self.mirrored() if tuple(new_index) == (1, 0) else self


_STRENGTH_RULE = "a decided outcome has strength 1 to 3, every other has strength 0"


class Ranking(PayloadBase):
    """An order of k targets, best level first; targets within a level are equal.

    ``unranked`` targets are worse than every ranked one when ``tail`` is ``worse``, else nothing is said of
    them. Levels up to and including ``ok_until`` are acceptable in themselves.
    """

    kind: Literal["ranking"] = "ranking"
    levels: tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...] = Field(min_length=1)
    unranked: tuple[int, ...] = ()
    tail: Literal["worse", "unknown"] = "unknown"
    ok_until: int | None = Field(default=None, ge=0)
    criterion: str = Field(default="overall", min_length=1)

    min_targets: ClassVar[int] = 2
    max_targets: ClassVar[int | None] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [i for level in self.levels for i in level] + list(self.unranked)
        if len(set(named)) != len(named):
            raise ValueError("a target stands in two levels (or twice): levels and unranked are disjoint")
        if sorted(named) != list(range(len(named))):
            raise ValueError(f"levels and unranked together must name every target 0..{len(named) - 1} once")
        if self.ok_until is not None and self.ok_until >= len(self.levels):
            raise ValueError(f"ok_until {self.ok_until} is no level: there are {len(self.levels)}")
        return self

    def fault_with_targets(self, count: int) -> str | None:
        """See :meth:`PayloadBase.fault_with_targets`."""
        named = sum(map(len, self.levels)) + len(self.unranked)
        return None if named == count else f"the ranking names {named} targets and the record has {count}"

    def strict_pairs(self) -> Iterator[tuple[int, int]]:
        """All (better, worse) target indices that the ranking implies."""
        levels = [*self.levels, self.unranked] if self.tail == "worse" else list(self.levels)
        for rank, level in enumerate(levels):
            for worse_level in levels[rank + 1 :]:
                for better in level:
                    for worse in worse_level:
                        yield better, worse

    def permuted(self, new_index: Sequence[int]) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        return self.model_copy(
            update={
                "levels": tuple(tuple(new_index[i] for i in level) for level in self.levels),
                "unranked": tuple(new_index[i] for i in self.unranked),
            }
        )


class SegmentPreference(PayloadBase):
    """Which of two trajectory segments has the larger summed reward.

    Lengths are environment steps, ``dt_s`` seconds per step, ``env`` the hash of the environment spec that
    both segments share.
    """

    kind: Literal["segment_preference"] = "segment_preference"
    outcome: Literal["a", "b", "equal", "incomparable"]
    strength: Strength = Field(default_factory=_default_strength)
    len_a: int = Field(ge=1)
    len_b: int = Field(ge=1)
    dt_s: float = Field(gt=0)
    view: Literal["state", "video"]
    env: Sha256 | None = None
    allow_unequal: bool = False

    min_targets: ClassVar[int] = 2
    max_targets: ClassVar[int | None] = 2
    target_types: ClassVar[frozenset[ItemType]] = frozenset({"segment"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.strength == 0) == (self.outcome in _MIRROR_OUTCOME):
            raise ValueError(f"strength {self.strength} with outcome {self.outcome!r}: {_STRENGTH_RULE}")
        if self.len_a != self.len_b and not self.allow_unequal:
            raise ValueError(f"segments of {self.len_a} and {self.len_b} steps need allow_unequal=true")
        return self

    def mirrored(self) -> Self:
        """The judgement with the roles of the two segments exchanged; an involution."""
        return self.model_copy(
            update={"outcome": _mirror_outcome(self.outcome), "len_a": self.len_b, "len_b": self.len_a}
        )

    def permuted(self, new_index: Sequence[int]) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        return self.mirrored() if tuple(new_index) == (1, 0) else self


class Principle(Record):
    """One principle of a constitution: its id, the hash of its text, the constitution's name."""

    id: str = Field(min_length=1)
    text_sha: Sha256
    constitution: str | None = None


_SINGLE = ("complies", "violates", "na", "unsure")
VerdictOutcome = Literal["complies", "violates", "na", "unsure", "first", "second", "tie"]


class Verdict(PayloadBase):
    """What exactly one principle says about a target, or about which of two targets follows it better.

    ``p`` is the probability that the target complies, or that the first is better. A pairwise verdict holds
    what was concluded in each of the two presentation ``orders``, or says ``single_order``.
    """

    kind: Literal["verdict"] = "verdict"
    principle: Principle
    outcome: VerdictOutcome
    p: MirrorProbability | None = None
    orders: tuple[VerdictOutcome, ...] = ()
    single_order: bool = False
    evidence: tuple[Span, ...] | None = None

    max_targets: ClassVar[int | None] = 2

    @property
    def is_pairwise(self) -> bool:
        """Whether the verdict is about two targets."""
        return self.outcome not in _SINGLE

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any((o not in _SINGLE) != self.is_pairwise for o in self.orders):
            raise ValueError("orders mix verdicts about one target with verdicts about two")
        if not self.is_pairwise and (self.orders or self.single_order):
            raise ValueError("orders belong to verdicts about two targets")
        if self.is_pairwise and len(self.orders) > (1 if self.single_order else 2):
            raise ValueError("orders has more entries than orders were shown")
        if self.is_pairwise and not self.single_order and len(self.orders) != 2:
            raise ValueError("a verdict about two targets carries both orders, or single_order=true")
        return self

    def fault_with_targets(self, count: int) -> str | None:
        """See :meth:`PayloadBase.fault_with_targets`."""
        if self.is_pairwise == (count == 2):
            return None
        return f"outcome {self.outcome!r} is a verdict about {2 if self.is_pairwise else 1}, not {count}"

    def mirrored(self) -> Self:
        """The verdict with the roles of two targets exchanged; an involution. About one: itself."""
        if not self.is_pairwise:
            return self
        return self.model_copy(
            update={
                "outcome": _mirror_outcome(self.outcome),
                "p": _mirror_p(self.p),
                "orders": tuple(_mirror_outcome(o) for o in self.orders),
            }
        )

    def permuted(self, new_index: Sequence[int]) -> Self:
        """See :meth:`PayloadBase.permuted`."""
        return self.mirrored() if tuple(new_index) == (1, 0) else self
