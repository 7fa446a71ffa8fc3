"""Bootstrap intervals over the highest independent unit: prompts, topics or items, never rows.

Two pairs about one prompt are not two independent facts. Where a pair hangs on one unit, units are drawn
with replacement (Cameron, Gelbach and Miller 2008). Where it hangs on two (its two items), both are drawn
and the pair counts the product of the two draws: the pigeonhole bootstrap (Owen 2007), which errs on the
wide side.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from corrigible.errors import BadInputError

Floats = NDArray[np.float64]
FEW_CLUSTERS = 10


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval; ``n`` rows in ``clusters`` independent units."""

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.95

    def to_json(self) -> dict[str, float | list[float]]:
        return {
            "value": self.value,
            "interval": [self.low, self.high],
            "level": self.level,
            "n": self.n,
            "clusters": self.clusters,
        }

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def cluster_bootstrap(
    values: Floats,
    clusters: Sequence[tuple[Hashable, ...]],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Percentile interval of the mean of ``values`` (n,) under resampling of clusters.

    Args:
        values: (n,) finite.
        clusters: n tuples of the one or two independent units that the row hangs on.
        level: coverage aimed at. With fewer than ten clusters it is not reached: say so where it is shown.
        resamples: draws; the seed fixes them, so equal inputs give equal intervals and two calls with
            equal clusters use the same draws.

    Raises:
        BadInputError: no row, unequal lengths, a non-finite value, or a row with neither one nor two units.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or len(data) != len(clusters):
        raise BadInputError(
            f"values has shape {data.shape} for {len(clusters)} cluster entries.",
            advice="Pass one value and one cluster tuple per row, and at least one row.",
        )
    if not np.isfinite(data).all():
        raise BadInputError("a value is NaN or infinite.", advice="Drop rows without a value first.")
    if any(len(entry) not in (1, 2) for entry in clusters):
        raise BadInputError("a row hangs on neither one nor two units.")
    numbers: dict[Hashable, int] = {}
    index = np.array(
        [[numbers.setdefault(unit, len(numbers)) for unit in (entry[0], entry[-1])] for entry in clusters]
    )
    paired = np.array([len(entry) == 2 for entry in clusters])
    count = len(numbers)
    rng = np.random.default_rng(seed)
    means = np.full(resamples, np.nan)
    for draw in range(resamples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        weight = times[index[:, 0]] * np.where(paired, times[index[:, 1]], 1)
        total = weight.sum()
        if total:
            means[draw] = (weight * data).sum() / total
    means = means[np.isfinite(means)]
    mean = float(data.mean())
    tail = (1 - level) / 2
    low, high = (mean, mean) if len(means) == 0 else np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), len(data), count, level)
