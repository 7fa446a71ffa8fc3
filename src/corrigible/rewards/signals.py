"""What scores an episode, and what prefers one episode to another.

A *signal* gives each episode a value; a *preference* says with which probability one episode is better
than another. Everything that judges (reward model, verifier, rule, simulator, person) is one of the two,
and the adapters here turn one into the other. A value that could not be computed is a reason, never a
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from corrigible.errors import BadInputError, NumericsError

if TYPE_CHECKING:
    from corrigible.records import Episode

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """The values of n episodes on one axis, each a number or the reason why there is none.

    Attributes:
        values: (n,) float64, finite. Where ``reasons[i]`` is set the entry is a placeholder 0.0 that
            must not be read: go through ``valid``, ``mean`` or ``require_all``.
        reasons: n entries, ``None`` for a value, else why it could not be given (a `NotJudged` reason).
        axis: what is measured ("overall", "helpfulness", ...).
        steps: ragged, one array per episode with a value per step, where the signal has them.
        tokens: ragged, one array per episode with a value per action token, where the signal has them.
        uncertainty: (n,) >= 0, one standard deviation in the units of the values.
    """

    values: Floats
    reasons: tuple[str | None, ...] = ()
    axis: str = "overall"
    steps: tuple[Floats, ...] | None = None
    tokens: tuple[Floats, ...] | None = None
    uncertainty: Floats | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 1:
            raise BadInputError(f"values has shape {values.shape}, expected (n,).", advice="One per episode.")
        object.__setattr__(self, "values", values)
        if not self.reasons:
            object.__setattr__(self, "reasons", (None,) * len(values))
        if len(self.reasons) != len(values):
            raise BadInputError(
                f"{len(self.reasons)} reasons for {len(values)} values.",
                advice="Give one reason or None each.",
            )
        if not np.isfinite(values).all():
            where = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NumericsError(
                f"value {where} is NaN or infinite.",
                advice="Give 0.0 and a reason when a value cannot be computed.",
            )
        for name, ragged in (("steps", self.steps), ("tokens", self.tokens)):
            if ragged is not None and len(ragged) != len(values):
                raise BadInputError(f"{name} has {len(ragged)} rows for {len(values)} values.")
        if self.uncertainty is not None:
            spread = np.asarray(self.uncertainty, dtype=np.float64)
            if spread.shape != values.shape or not (np.isfinite(spread).all() and (spread >= 0).all()):
                raise BadInputError("uncertainty must be (n,), finite and not negative.")
            object.__setattr__(self, "uncertainty", spread)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(n,) True where the entry of ``values`` is a value."""
        return np.array([reason is None for reason in self.reasons], dtype=np.bool_)

    def mean(self) -> float:
        """Mean over the valid values; NumericsError when there is none."""
        valid = self.valid
        if not valid.any():
            raise NumericsError("no episode has a score.", advice=f"First reason: {self._first_reason()}.")
        return float(self.values[valid].mean())

    def require_all(self) -> Floats:
        """The (n,) values when every episode has one; NumericsError that names the first missing one."""
        missing = np.flatnonzero(~self.valid)
        if len(missing):
            raise NumericsError(
                f"{len(missing)} of {len(self)} episodes have no score; episode {missing[0]}: "
                f"{self.reasons[missing[0]]}.",
                advice="Leave these episodes out first (Scores.valid says which).",
            )
        return self.values

    def _first_reason(self) -> str:
        return next((reason for reason in self.reasons if reason is not None), "there are no episodes")


@runtime_checkable
class Signal(Protocol):
    """Anything that scores an episode."""

    @property
    def name(self) -> str: ...

    @property
    def axis(self) -> str: ...

    def score(self, episodes: Sequence[Episode]) -> Scores:
        """One value or reason per episode."""
        ...


@runtime_checkable
class Preference(Protocol):
    """Anything that compares two episodes."""

    def prefer(self, a: Sequence[Episode], b: Sequence[Episode]) -> Floats:
        """(n,) in [0, 1]: probability that ``a[i]`` is better than ``b[i]``; 0.5 is a tie."""
        ...


def sigmoid(x: Floats) -> Floats:
    """Logistic function without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), dtype=np.float64)


def logit(p: Floats, clip: float = 1e-6) -> Floats:
    """Inverse of the logistic function on [clip, 1 - clip]."""
    q = np.clip(p, clip, 1 - clip)
    return np.asarray(np.log(q) - np.log1p(-q), dtype=np.float64)


@dataclass(frozen=True)
class SignalPreference:
    """P(a ≻ b) = σ((score(a) − score(b)) / scale): Bradley and Terry over a signal.

    ``scale`` is the value difference (in the signal's units) at which the odds are e to one. Where either
    side has no score the answer is 0.5: nothing is known.
    """

    signal: Signal
    scale: float = 1.0

    def prefer(self, a: Sequence[Episode], b: Sequence[Episode]) -> Floats:
        if len(a) != len(b):
            raise BadInputError(f"{len(a)} episodes against {len(b)}.", advice="Pass aligned lists.")
        left, right = self.signal.score(a), self.signal.score(b)
        p = sigmoid((left.values - right.values) / self.scale)
        p[~(left.valid & right.valid)] = 0.5
        return p


def preference_from_signal(signal: Signal, scale: float = 1.0) -> SignalPreference:
    """A preference that follows a signal; ``scale`` > 0 in the signal's units per nat."""
    if not (np.isfinite(scale) and scale > 0):
        raise BadInputError(f"scale is {scale}.", advice="It must be a positive number.")
    return SignalPreference(signal, scale)


@dataclass(frozen=True)
class AnchoredSignal:
    """Score of an episode = mean log-odds (nats) of being preferred to each anchor, in both orders."""

    preference: Preference
    anchors: tuple[Episode, ...]
    name: str = "anchored preference"
    axis: str = "overall"

    def score(self, episodes: Sequence[Episode]) -> Scores:
        n = len(episodes)
        odds = np.zeros((len(self.anchors), n))
        for row, anchor in enumerate(self.anchors):
            forward = self.preference.prefer(episodes, [anchor] * n)
            backward = 1.0 - self.preference.prefer([anchor] * n, episodes)
            odds[row] = logit((forward + backward) / 2)
        values = odds.mean(axis=0)
        spread = odds.std(axis=0, ddof=1) / np.sqrt(len(odds)) if len(odds) > 1 else None
        return Scores(values, axis=self.axis, uncertainty=spread)


def signal_from_preference(
    preference: Preference,
    anchors: Sequence[Episode],
    *,
    name: str = "anchored preference",
    axis: str = "overall",
) -> AnchoredSignal:
    """A signal that compares every episode with fixed anchor episodes (BadInputError when there is none).

    Both orders are asked, so a preference with a position bias gives an unbiased score.
    """
    if not anchors:
        raise BadInputError("no anchor episode was given.", advice="Pass one or more reference episodes.")
    return AnchoredSignal(preference, tuple(anchors), name, axis)
