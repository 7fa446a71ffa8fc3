"""Intervals for means of judged items, honest about which units are independent.

Answers to the same prompt are not independent draws, so every bootstrap here resamples *clusters*
(prompts, topics, annotators), never rows. Percentile bootstraps are too narrow when there are few
clusters; the correction of Hesterberg (2015), "What Teachers Should Know About the Bootstrap",
section 3.3 and table 3 (expanded percentile interval), is applied throughout.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from corrigible.errors import BadInputError, NumericsError

FloatArray = NDArray[np.float64]

_CHUNK_CELLS = 4_000_000  # at most this many resampling weights in memory at once (32 MB)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    ``interval`` covers the true value with probability about ``level``; ``clusters`` is the number
    of independent units it rests on and ``n`` the number of rows. ``method`` names the interval.
    """

    value: float
    interval: tuple[float, float]
    n: int
    clusters: int
    level: float = 0.95
    method: str = "cluster bootstrap"

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    def to_dict(self) -> dict[str, object]:
        """JSON form; the interval is a list of two numbers."""
        return {
            "value": self.value,
            "interval": list(self.interval),
            "n": self.n,
            "clusters": self.clusters,
            "level": self.level,
            "method": self.method,
        }

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


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
    z = float(stats.norm.ppf((1 + level) / 2))
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
        clusters: (n,) labels; rows with one label are resampled together. None: every row alone.
        per: (n,) non-negative denominators, for example tokens when ``values`` are sums over
            tokens. None: ones, so the estimate is the mean over rows.
        bounds: the smallest and largest value a row can take, when known. If no resample moves the
            estimate (all rows equal, or one cluster only) the interval is then Wilson's on the
            number of clusters, because "five wins of five" does not mean "wins always".
        level: coverage. draws: resamples. seed: of the resampling.

    Raises:
        BadInputError: no rows, shapes that differ, or a denominator that sums to nothing.
        NumericsError: NaN or infinity among the rows: drop and count them before.

    Source: percentile interval, quantiles expanded as in Hesterberg (2015).
    """
    _check_level(level)
    v = _finite("values", values)
    d = np.ones_like(v) if per is None else _finite("per", per)
    if d.shape != v.shape:
        raise BadInputError(f"values have shape {v.shape} and per has shape {d.shape}")
    if (d < 0).any() or d.sum() <= 0:
        raise BadInputError("denominators (per) must be non-negative and not all zero")
    sums, sizes = _by_cluster(v, d, clusters)
    value = float(sums.sum() / sizes.sum())
    k = len(sums)
    resampled = _resample(sums, sizes, draws, seed) if k > 1 else np.full(draws, value)
    if k == 1 or bool(np.ptp(resampled) < 1e-15):
        if bounds is not None and bounds[1] > bounds[0]:
            low, high = bounds
            share = min(max((value - low) / (high - low), 0.0), 1.0)
            w_low, w_high = wilson_interval(share * k, k, level=level)
            interval = (low + (high - low) * w_low, low + (high - low) * w_high)
            return Estimate(value, interval, len(v), k, level, "Wilson")
        # One cluster says nothing about others; equal clusters show no spread at all.
        width = float("inf") if k == 1 else 0.0
        return Estimate(value, (value - width, value + width), len(v), k, level)
    alpha = (1 - level) / 2
    expanded = float(stats.norm.cdf(sqrt(k / (k - 1)) * stats.t.ppf(alpha, k - 1)))
    low, high = np.quantile(resampled, [expanded, 1 - expanded])
    # Very skewed rows can push a percentile past the estimate itself; an interval holds its value.
    return Estimate(value, (min(float(low), value), max(float(high), value)), len(v), k, level)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of ``first - second`` over paired rows (n,), with an interval over clusters.

    Pairing takes out what the two sides share (an easy prompt is easy for both), so the interval is
    narrower than the difference of two separate ones.
    """
    a, b = _finite("first", first), _finite("second", second)
    if a.shape != b.shape:
        raise BadInputError(f"paired rows must match one to one: {a.shape} and {b.shape}")
    return cluster_bootstrap(a - b, clusters, level=level, draws=draws, seed=seed)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInputError(f"level must be between 0 and 1, not {level}", advice="0.95 is usual")


def _finite(name: str, rows: ArrayLike) -> FloatArray:
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


def _by_cluster(
    values: FloatArray, per: FloatArray, clusters: Sequence[Hashable] | None
) -> tuple[FloatArray, FloatArray]:
    if clusters is None:
        return values, per
    if len(clusters) != len(values):
        raise BadInputError(f"{len(values)} values and {len(clusters)} cluster labels")
    number: dict[Hashable, int] = {}
    index = np.fromiter((number.setdefault(c, len(number)) for c in clusters), dtype=np.int64)
    sums, sizes = np.zeros(len(number)), np.zeros(len(number))
    np.add.at(sums, index, values)
    np.add.at(sizes, index, per)
    return sums, sizes


def _resample(sums: FloatArray, sizes: FloatArray, draws: int, seed: int) -> FloatArray:
    """(draws,) re-estimates; each draw takes k clusters with replacement (multinomial counts)."""
    rng = np.random.default_rng(seed)
    k = len(sums)
    out = np.empty(draws)
    step = max(1, _CHUNK_CELLS // k)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        counts = rng.multinomial(k, np.full(k, 1 / k), size=size).astype(np.float64)
        denominator = counts @ sizes
        # A resample made only of empty clusters has no estimate; it says nothing, so the centre.
        empty = denominator <= 0
        out[start : start + size] = np.where(
            empty, sums.sum() / sizes.sum(), (counts @ sums) / np.where(empty, 1.0, denominator)
        )
    return out
