"""Saying what is known rather than what is better: concept correction and answer."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from corrigible.records.base import Record, Sha256
from corrigible.records.items import ItemType
from corrigible.records.payloads.base import PayloadBase

_WORD = re.compile(r"[^\W\d]\w*")
_TOKEN = re.compile(rf"{_WORD.pattern}|[∀∃(),]|[^\w\s]+")
_QUANTIFIERS = {"forall", "exists", "all", "some", "∀", "∃"}
_CONNECTIVES = {"and", "or", "not", "implies", "iff", "xor", "true", "false"}


def rule_atoms(rule: str) -> frozenset[str]:
    """Names of the predicates of a first-order formula, without its variables and connectives.

    >>> sorted(rule_atoms("forall x: striped(x) and not water(x) -> zebra(x)"))
    ['striped', 'water', 'zebra']
    >>> sorted(rule_atoms("smoke & ~fire"))
    ['fire', 'smoke']
    """
    atoms: set[str] = set()
    variables: set[str] = set()
    binding = False  # between a quantifier and the end of its list of variables
    nested = [False]  # for each open parenthesis: does it hold the arguments of a predicate?
    before, end = "", 0
    for match in _TOKEN.finditer(rule):
        token = match.group()
        if token == "(":
            nested.append(nested[-1] or (before in atoms and match.start() == end))
        elif token == ")":
            if len(nested) > 1:
                nested.pop()
        elif token.lower() in _QUANTIFIERS:
            binding = True
        elif binding and _WORD.fullmatch(token) and before.lower() in {",", *_QUANTIFIERS}:
            variables.add(token)
        elif _WORD.fullmatch(token) and token.lower() not in _CONNECTIVES and token not in variables:
            atoms |= set() if nested[-1] else {token}
        if token != "," and token not in variables and token.lower() not in _QUANTIFIERS:
            binding = False
        before, end = token, match.end()
    return frozenset(atoms)


class Concept(Record):
    """A concept with its exemplars: at least five items that show it and five that do not."""

    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    pos: tuple[Sha256, ...]
    neg: tuple[Sha256, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side, shas in (("positive", self.pos), ("negative", self.neg)):
            if len(set(shas)) < 5:
                raise ValueError(f"{len(set(shas))} different {side} exemplars; a concept needs at least 5")
        if set(self.pos) & set(self.neg):
            raise ValueError("an exemplar is both positive and negative")
        return self


class ConceptCorrection(PayloadBase):
    """How one model should use a concept: forbid, require, sign, weigh, rename, merge or split it.

    ``rule`` is a first-order formula whose every atom is the concept or in the ``bank`` of concept names;
    ``lambda`` the weight of its penalty at ``layer``. It changes no label.
    """

    kind: Literal["concept_correction"] = "concept_correction"
    concept: Concept
    class_: str | None = Field(default=None, alias="class")
    action: Literal["forbid", "require", "sign", "weight", "rename", "merge", "split"]
    rule: str = Field(min_length=1)
    lambda_: float = Field(default=1.0, ge=0, alias="lambda")
    layer: str | None = None
    bank: tuple[str, ...] = ()

    target_types: ClassVar[frozenset[ItemType]] = frozenset({"model"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        atoms = rule_atoms(self.rule)
        if not atoms:
            raise ValueError(f"rule {self.rule!r} names no concept")
        missing = sorted(atoms - {self.concept.name, self.concept.id, *self.bank})
        if missing:
            raise ValueError(f"rule uses {missing}, which are not in the concept bank")
        return self


SlotValue = str | bool | int | float


class SlotConstraint(Record):
    """What an answer says of one slot: possible values, a closed interval, excluded values."""

    values: tuple[SlotValue, ...] | None = Field(default=None, min_length=1)
    interval: tuple[float, float] | None = None
    excluded: tuple[SlotValue, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.values is None and self.interval is None and self.excluded is None:
            raise ValueError("a slot constraint holds values, an interval, or excluded values")
        if self.is_empty():
            raise ValueError("nothing satisfies this slot constraint")
        return self

    def allows(self, value: SlotValue) -> bool:
        """Whether a value satisfies the constraint."""
        if self.values is not None and not _among(value, self.values):
            return False
        if self.excluded is not None and _among(value, self.excluded):
            return False
        if self.interval is not None:
            low, high = self.interval
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        return True

    def is_empty(self) -> bool:
        """Whether no value satisfies it."""
        if self.values is not None:
            return not any(self.allows(v) for v in self.values)
        if self.interval is not None:
            low, high = self.interval
            return low > high or (low == high and not self.allows(low))
        return False

    def contradicts(self, other: SlotConstraint) -> bool:
        """Whether no value satisfies both this constraint and another."""
        for mine, theirs in ((self, other), (other, self)):
            if mine.values is not None:
                return not any(mine.allows(v) and theirs.allows(v) for v in mine.values)
        if self.interval is None or other.interval is None:
            return False  # exclusions alone leave an open set of values
        low = max(self.interval[0], other.interval[0])
        high = min(self.interval[1], other.interval[1])
        return low > high or (low == high and not (self.allows(low) and other.allows(low)))


def _among(value: SlotValue, values: tuple[SlotValue, ...]) -> bool:
    # True == 1 in Python, but a yes is not the number one.
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


class Answer(PayloadBase):
    """The answer to one question that an agent asked: constraints on slots, and the words used.

    Each slot's constraint is consistent with earlier live answers, or the record supersedes one.
    """

    kind: Literal["answer"] = "answer"
    slots: dict[Annotated[str, Field(min_length=1)], SlotConstraint] = Field(default_factory=dict)
    unsure: bool = False
    text: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.slots and not self.unsure and not self.text.strip():
            raise ValueError("an answer fills a slot, says unsure, or has a text")
        return self
