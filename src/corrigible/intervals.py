"""Every number with an interval in Corrigible is an `Estimate`, and rests on units that are independent.

Two answers to one prompt, or two votes on one item, are not two independent facts, so every bootstrap
resamples *clusters* (prompts, topics, items, annotators), never rows (Cameron, Gelbach and Miller 2008).
Percentile bootstraps are too narrow when clusters are few; the correction of Hesterberg (2015), "What
Teachers Should Know About the Bootstrap", section 3.3 and table 3 (expanded percentile interval), is
applied throughout. Where no resample can move the number, it is not certain either: "five of five right"
has Wilson's interval, not [1, 1].

Claims are the one exception: their units are a handful of seeds, and their interval is Student's t.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from corrigible.errors import BadInputError, NumericsError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_CHUNK_CELLS = 2_000_000  # at most this many resampling weights in memory at once (16 MB)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    ``low`` to ``high`` covers the true value with probability about ``level``; ``clusters`` is the number
    of independent units it rests on and ``n`` the number of rows. ``method`` names the interval. An end
    is infinite where the data say nothing about it; :meth:`between` then says so to people.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.95
    method: str = "cluster bootstrap"

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def to_json(self) -> dict[str, float | int | str | list[float | None]]:
        """As plain JSON values; an infinite end is null."""
        return {
            "value": self.value,
            "interval": [end if isfinite(end) else None for end in self.interval],
            "level": self.level,
            "n": self.n,
            "clusters": self.clusters,
            "method": self.method,
        }

    def between(self, unit: str = "unit", joint: str = " to ") -> str:
        """The two ends for people, or why there are none; ``unit`` is what a cluster is here.

        >>> cluster_bootstrap([1.0, 3.0], ["a", "a"]).between("prompt")
        'one prompt: no interval'
        """
        if isfinite(self.low) and isfinite(self.high):
            return f"{self.low:.3f}{joint}{self.high:.3f}"
        return (
            f"one {unit}: no interval" if self.clusters == 1 else f"no two {unit}s stand apart: no interval"
        )

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.between(joint=', ')}]"


def wilson_interval(successes: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson (1927) score interval for a proportion.

    ``successes`` may be fractional (a tie counts half); ``n`` is the number of independent trials,
    positive. Never degenerate: 10 wins of 10 gives [0.722, 1], not [1, 1].

    >>> low, high = wilson_interval(10, 10)
    >>> round(low, 3), high
    (0.722, 1.0)
    """
    _check_level(level)
    if not n > 0 or not 0 <= successes <= n:
        raise BadInputError(
            f"a proportion needs 0 <= successes <= n and n > 0, not {successes} of {n}",
            advice="count the judged items first; with none judged there is no proportion",
        )
    z = float(special.ndtri((1 + level) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula is exact in real numbers and off by an ulp in floats.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    per: ArrayLike | None = None,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``values`` (or the ratio sum(values) / sum(per)) with an interval over clusters.

    Args:
        values: (n,) finite numbers.
        clusters: (n,) the independent unit of each row: rows with one label are resampled together. A
            tuple holds the one or two units of one population that a row hangs on, for example the two
            items of a comparison. None: every row alone.
        per: (n,) non-negative denominators, for example tokens when ``values`` are sums over
            tokens. None: ones, so the estimate is the mean over rows.
        bounds: the smallest and largest value a row can take, when known. They give an interval where
            no resample moves the estimate (all units equal, or one unit only): with k independent
            units alike, a further one differs with a probability of at most Wilson's upper end for
            0 of k, and then by no more than the bounds allow. For k wins of k that is Wilson's own
            interval.
        level: coverage. draws: resamples. seed: of the resampling; calls with equal clusters and seed
            use the same draws.

    With two units to a row both are drawn and the row counts the product of the two draws: the pigeonhole
    bootstrap (Owen 2007), which errs on the wide side.

    Raises:
        BadInputError: no rows, shapes that differ, a tuple of neither one nor two units, or a
            denominator that sums to nothing.
        NumericsError: NaN or infinity among the rows: drop and count them before.

    >>> print(cluster_bootstrap([1, 1, 1, 1, 1], bounds=(0, 1)))
    1.000 [0.566, 1.000]
    """
    _check_level(level)
    v = _finite("values", values)
    d = np.ones_like(v) if per is None else _finite("per", per)
    if d.shape != v.shape:
        raise BadInputError(f"values have shape {v.shape} and per has shape {d.shape}")
    if (d < 0).any() or d.sum() <= 0:
        raise BadInputError("denominators (per) must be non-negative and not all zero")
    rows = _grouped(v, d, clusters)
    value = float(v.sum() / d.sum())
    k, independent = rows.units, rows.independent()
    resampled = rows.resample(draws, seed) if independent > 1 else np.empty(0)
    if not len(resampled) or float(np.ptp(resampled)) <= 1e-12 * max(1.0, abs(value)):
        if bounds is not None and bounds[0] < bounds[1]:
            _, differs = wilson_interval(0, independent, level=level)
            low = value - differs * max(0.0, value - bounds[0])
            high = value + differs * max(0.0, bounds[1] - value)
            return Estimate(value, low, high, len(v), k, level, "Wilson")
        # One unit says nothing about others; equal units show no spread at all.
        width = inf if independent == 1 else 0.0
        return Estimate(value, value - width, value + width, len(v), k, level)
    expanded = float(special.ndtr(sqrt(k / (k - 1)) * special.stdtrit(k - 1, (1 - level) / 2)))
    low, high = (float(end) for end in np.quantile(resampled, [expanded, 1 - expanded]))
    # Very skewed rows can push a percentile past the estimate itself; an interval holds its value.
    return Estimate(value, min(low, value), max(high, value), len(v), k, level)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``first - second`` over paired rows (n,), with an interval over clusters.

    Pairing takes out what the two sides share (an easy prompt is easy for both), so the interval is
    narrower than the difference of two separate ones. ``bounds`` are those of a difference; the rest is
    as in `cluster_bootstrap`.
    """
    a, b = _finite("first", first), _finite("second", second)
    if a.shape != b.shape:
        raise BadInputError(f"paired rows must match one to one: {a.shape} and {b.shape}")
    return cluster_bootstrap(a - b, clusters, bounds=bounds, level=level, draws=draws, seed=seed)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInputError(f"level must be between 0 and 1, not {level}", advice="0.95 is usual")


def _finite(name: str, rows: ArrayLike) -> Floats:
    array = np.asarray(rows, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise BadInputError(f"{name} must be a non-empty list of numbers, shape (n,), not {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise NumericsError(
            f"{bad} of {array.size} {name} are NaN or infinite",
            advice="leave out what could not be judged and report how many there were",
        )
    return array


@dataclass(frozen=True)
class _Grouped:
    """Rows that hang on the same units, summed: m groups over ``units`` independent units.

    Group i hangs on the units ``first[i]`` and ``second[i]``, which are equal where there is one only.
    """

    sums: Floats
    sizes: Floats
    first: Indices
    second: Indices
    units: int

    @property
    def two_way(self) -> bool:
        return bool((self.first != self.second).any())

    def independent(self) -> int:
        """Groups that share no unit with each other, picked greedily: with one unit to a row, all of them."""
        if not self.two_way:
            return self.units
        used: set[int] = set()
        count = 0
        for pair in zip(self.first.tolist(), self.second.tolist(), strict=True):
            if used.isdisjoint(pair):
                used.update(pair)
                count += 1
        return count

    def resample(self, draws: int, seed: int) -> Floats:
        """At most ``draws`` re-estimates; each takes as many units as there are, with replacement.

        A resample in which no group is left has no estimate and is dropped.
        """
        rng = np.random.default_rng(seed)
        k, two_way = self.units, self.two_way
        found = []
        step = max(1, _CHUNK_CELLS // max(k, len(self.sums)))
        for start in range(0, draws, step):
            size = min(step, draws - start)
            drawn = rng.integers(k, size=(size, k)) + k * np.arange(size)[:, None]
            times = np.bincount(drawn.ravel(), minlength=size * k).reshape(size, k).astype(np.float64)
            weight = times
            if two_way:
                weight = times[:, self.first]
                weight *= np.where(self.first != self.second, times[:, self.second], 1.0)
            denominator = weight @ self.sizes
            left = denominator > 0
            found.append((weight @ self.sums)[left] / denominator[left])
        return np.concatenate(found)


def _grouped(values: Floats, per: Floats, clusters: Sequence[Hashable] | None) -> _Grouped:
    if clusters is None:
        alone = np.arange(len(values))
        return _Grouped(values, per, alone, alone, len(values))
    if len(clusters) != len(values):
        raise BadInputError(f"{len(values)} values and {len(clusters)} cluster labels")
    unit: dict[Hashable, int] = {}
    group: dict[tuple[int, int], int] = {}
    index = np.empty(len(values), dtype=np.int64)
    for row, label in enumerate(clusters):
        entry = label if isinstance(label, tuple) else (label,)
        if len(entry) not in (1, 2):
            raise BadInputError(f"row {row} hangs on {len(entry)} units; it can hang on one or two")
        first, second = (unit.setdefault(one, len(unit)) for one in (entry[0], entry[-1]))
        index[row] = group.setdefault((min(first, second), max(first, second)), len(group))
    sums, sizes = np.zeros(len(group)), np.zeros(len(group))
    np.add.at(sums, index, values)
    np.add.at(sizes, index, per)
    ends = np.array(list(group), dtype=np.int64)
    return _Grouped(sums, sizes, ends[:, 0], ends[:, 1], len(unit))
