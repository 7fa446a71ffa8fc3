"""Easy things first: how much of the data (or of the vocabulary) a run may see at each step.

A *pacing* is a pure function of the progress of a run. It starts at a share of what there is, grows to all of
it, and what it means is one of two things: the data up to that percentile of difficulty
(:class:`CurriculumSource`, an order for any list of examples), or the vocabulary up to that share
(:class:`corrigible.align.corruptors.VocabularyLimit` takes a pacing as it is).

Source: Diehl Martinez et al. 2023, "CLIMB: Curriculum Learning for Infant-inspired Model Building", whose
own finding is that no curriculum helps consistently; the pacing functions are those of its code, which uses
a start of 0.1, growing from 1/16 to 7/8 of the steps.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corrigible.align.sources import ListSource
from corrigible.errors import BadInputError, NumericsError

Shape = Literal["linear", "quad", "root", "step", "exp", "log"]
"""How a pacing grows between its start and its end."""

STAIRS = 4
"""Equal stairs of the ``step`` shape (ours: the paper's code leaves their number to the user)."""


@dataclass(frozen=True)
class Pacing:
    """The share that is let in at a progress in [0, 1] of the run; callable.

    With ``u`` the share of the way from ``begin`` to ``end`` and ``b`` the ``start``: linear
    ``b + (1-b) u``, quad ``b + (1-b) u^2``, root ``b + (1-b) sqrt(u)``, exp
    ``b + (1-b) (e^10u - 1) / (e^10 - 1)``, log ``b + (1-b) (1 + ln(u + e^-10) / 10)`` (past half of its way
    at u = 1 %), step: stairs. ``start`` before ``begin``, 1 after ``end``, never more than 1.

    Attributes:
        shape: which of them.
        start: share at the beginning, in [0, 1].
        begin: progress at which it begins to grow.
        end: progress at which everything is let in.

    Raises:
        BadInputError: an unknown shape, or a number out of range.
    """

    shape: Shape = "linear"
    start: float = 0.1
    begin: float = 0.0625
    end: float = 0.875

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise BadInputError(
                f"There is no pacing {self.shape!r}.", advice=f"Shapes: {', '.join(get_args(Shape))}."
            )
        if not (0.0 <= self.start <= 1.0 and 0.0 <= self.begin < self.end <= 1.0):
            raise BadInputError(
                f"A pacing starts at a share in [0, 1] and grows between 0 <= begin < end <= 1, got "
                f"start={self.start}, begin={self.begin}, end={self.end}."
            )

    def __call__(self, progress: float) -> float:
        """The share at ``progress``, in [start, 1]; it never falls."""
        u = (progress - self.begin) / (self.end - self.begin)
        if u <= 0.0:
            return self.start
        if u >= 1.0:
            return 1.0
        match self.shape:
            case "linear":
                grown = u
            case "quad":
                grown = u * u
            case "root":
                grown = math.sqrt(u)
            case "exp":
                grown = math.expm1(10.0 * u) / math.expm1(10.0)
            case "log":
                grown = 1.0 + math.log(u + math.exp(-10.0)) / 10.0
            case "step":
                grown = math.floor(u * STAIRS) / STAIRS
        return min(1.0, self.start + (1.0 - self.start) * grown)


def percentiles(
    difficulty: ArrayLike, *, ties: Literal["together", "apart"] = "together"
) -> NDArray[np.float64]:
    """The percentile of each item's difficulty, ``(n,)`` in (0, 1]: the share that is let in with it.

    With few different levels, letting in all items whose level begins below a share lets in far more
    than that share. ``"together"`` gives equal items the share up to the *last* of them, so that
    never more than a share is let in; ``"apart"`` orders equal items by their place, so that it is exactly
    that share.

    Raises:
        BadInputError: not one number per item, or there are none.
        NumericsError: ``difficulty_not_finite``.
    """
    values = np.asarray(difficulty, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise BadInputError(f"difficulty must be one number per item, got shape {values.shape}.")
    if not np.isfinite(values).all():
        where = np.flatnonzero(~np.isfinite(values))[:8].tolist()
        raise NumericsError(
            f"difficulty_not_finite: items {where} have no difficulty.",
            advice="Leave them out, or score them.",
        )
    if ties == "together":
        ranks = np.searchsorted(np.sort(values), values, side="right")
    else:
        ranks = np.empty(len(values), dtype=np.int64)
        ranks[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return np.asarray(ranks / len(values), dtype=np.float64)


def sampling_weights(
    percentile: ArrayLike,
    share: float,
    *,
    at_least: int = 1,
    favour: Literal["none", "easy", "hard"] = "none",
) -> NDArray[np.float64]:
    """The probability of each item when the easiest ``share`` is let in, ``(n,)``, summing to 1.

    Args:
        percentile: of each item, ``(n,)``, as :func:`percentiles` gives it.
        share: what is let in, in [0, 1].
        at_least: if fewer items are let in, so are the next easiest, a whole level at a time: a batch that
            is drawn without replacement needs as many as it is large.
        favour: weigh all alike, or in proportion to the percentile (``"hard"``, the non-uniform mode
            of the paper's code) or to what is left above it (``"easy"``).

    Raises:
        BadInputError: ``at_least`` is more than there are.
    """
    values = np.asarray(percentile, dtype=np.float64)
    if not 1 <= at_least <= len(values):
        raise BadInputError(f"at_least must be 1 to {len(values)}, the number of items, got {at_least}.")
    limit = max(share, float(np.sort(values)[at_least - 1]))
    let_in = values <= limit * (1 + 1e-12)
    worth = {"none": np.ones_like(values), "easy": 1.0 + 1.0 / len(values) - values, "hard": values}[favour]
    weights = np.where(let_in, worth, 0.0)
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def length_difficulty(source: ListSource[Any]) -> NDArray[np.float64]:
    """Tokens of each example's longest row, ``(n,)``: short is easy."""
    return np.array([max(len(row) for row in example.rows) for example in source.examples], dtype=np.float64)


def uncertainty_difficulty(source: ListSource[Any]) -> NDArray[np.float64]:
    """``1 - |2 p_chosen - 1|`` of each comparison, ``(n,)``: agreement is easy, a tie is hardest."""
    return np.array([1.0 - abs(2.0 * example.p_chosen - 1.0) for example in source.examples])


class CurriculumSource:
    """A list of examples in the order of a curriculum: batches are drawn from the easiest so far.

    Which examples form a step is a pure function of the seed and the step, as for every source: each batch
    is drawn without replacement, independently of the ones before it.

    Args:
        source: whose examples.
        difficulty: of each of them, ``(n,)``; finite.
        pacing: how much is let in.
        total_steps: of the run; the trainer sets it (:meth:`over`).
        ties: see :func:`percentiles`.
        favour: see :func:`sampling_weights`.

    Raises:
        BadInputError: not one difficulty per example.
        NumericsError: ``difficulty_not_finite``.
    """

    def __init__(
        self,
        source: ListSource[Any],
        difficulty: ArrayLike,
        *,
        pacing: Callable[[float], float] | None = None,
        total_steps: int = 1,
        ties: Literal["together", "apart"] = "together",
        favour: Literal["none", "easy", "hard"] = "none",
    ) -> None:
        self.source = source
        self.percentile = percentiles(difficulty, ties=ties)
        if len(self.percentile) != len(source.examples):
            raise BadInputError(
                f"{len(self.percentile)} difficulties for {len(source.examples)} examples.",
                advice="One per example that the source kept, in its order.",
            )
        self.pacing = pacing or Pacing()
        self.total_steps = total_steps
        self.favour = favour

    @property
    def kind(self) -> str:
        """The kind of the source's examples."""
        return self.source.kind

    @property
    def examples(self) -> Sequence[Any]:
        """All examples, in the source's order."""
        return self.source.examples

    @property
    def skipped(self) -> Counter[str]:
        """What the source left out, by reason."""
        return self.source.skipped

    def over(self, total_steps: int) -> Self:
        """The same curriculum over a run of so many optimiser steps."""
        paced = copy.copy(self)
        paced.total_steps = total_steps
        return paced

    def steps_per_epoch(self, batch_size: int) -> int:
        """As many as the source has."""
        return self.source.steps_per_epoch(batch_size)

    def weights(self, step: int, batch_size: int) -> NDArray[np.float64]:
        """The probability of each example at step ``step``, ``(n,)``."""
        share = self.pacing(step / max(self.total_steps, 1))
        at_least = min(batch_size, len(self.percentile))
        return sampling_weights(self.percentile, share, at_least=at_least, favour=self.favour)

    def batch(self, step: int, batch_size: int) -> Sequence[Any]:
        """The examples of step ``step`` (from 0), as the source would give them as a batch."""
        weights = self.weights(step, batch_size)
        rng = np.random.default_rng([self.source.seed, 1 + step])
        size = min(batch_size, len(weights))
        picked = rng.choice(len(weights), size=size, replace=False, p=weights)
        # The source itself may add to a batch what no single example knows (mismatched answers).
        part = copy.copy(self.source)
        part.examples = [self.source.examples[i] for i in picked]
        return part.batch(0, size)

    def derived_from(self) -> list[str]:
        """Ids of all feedback records behind the examples, sorted."""
        return self.source.derived_from()

    def digest(self) -> str:
        """Sha256 over everything that decides the batches."""
        pace = [self.pacing(moment / 64) for moment in range(65)]
        settings = f"{pace!r} {self.favour} {self.percentile.tolist()!r}"
        return hashlib.sha256(f"curriculum/1 {self.source.digest()} {settings}".encode()).hexdigest()


def report(source: CurriculumSource, batch_size: int, moments: int = 8) -> list[dict[str, float]]:
    """What the curriculum lets in over a run: per moment its ``step``, the ``share`` asked for, the
    ``admitted`` share of examples and the effective number of them (``1 / sum w^2``)."""
    found = []
    for moment in range(moments):
        step = moment * source.total_steps // moments
        weights = source.weights(step, batch_size)
        found.append(
            {
                "step": float(step),
                "share": source.pacing(step / max(source.total_steps, 1)),
                "admitted": float((weights > 0).mean()),
                "effective": float(1.0 / (weights**2).sum()),
            }
        )
    return found
