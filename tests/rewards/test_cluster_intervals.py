"""Cluster bootstrap: covers where rows are not independent, and a row bootstrap would not."""

from __future__ import annotations

import numpy as np
import pytest

from corrigible.errors import BadInputError
from corrigible.rewards import cluster_bootstrap


def test_one_row_per_cluster_is_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = cluster_bootstrap(values, [(i,) for i in range(400)], seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_repeating_every_row_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).integers(0, 2, 80).astype(float)
    once = cluster_bootstrap(values, [(i,) for i in range(80)])
    many = cluster_bootstrap(np.repeat(values, 10), [(i,) for i in range(80) for _ in range(10)])
    assert (many.low, many.high) == pytest.approx((once.low, once.high))
    assert many.clusters == 80 and many.n == 800


def test_coverage_with_correlated_rows() -> None:
    # 40 clusters of 10 rows that share most of their noise: intervals over rows would cover about half.
    rng = np.random.default_rng(3)
    clustered = rowwise = 0
    for trial in range(120):
        values = (rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 10))).ravel()
        units = [(i // 10,) for i in range(400)]
        found = cluster_bootstrap(values, units, resamples=300, seed=trial)
        clustered += found.low <= 0 <= found.high
        naive = cluster_bootstrap(values, [(i,) for i in range(400)], resamples=300, seed=trial)
        rowwise += naive.low <= 0 <= naive.high
    assert clustered / 120 > 0.87
    assert rowwise / 120 < 0.70


def test_pairs_of_items_are_wider_than_pairs_alone() -> None:
    # A value that is a property of the item, seen in many pairs: the pairs are far from independent.
    rng = np.random.default_rng(4)
    quality = rng.normal(size=30)
    edges = [tuple(int(i) for i in rng.choice(30, 2, replace=False)) for _ in range(600)]
    values = np.array([quality[a] + quality[b] for a, b in edges])
    both = cluster_bootstrap(values, edges)
    alone = cluster_bootstrap(values, [(i,) for i in range(600)])
    assert (both.high - both.low) > 3 * (alone.high - alone.low)
    assert both.clusters == 30


def test_same_inputs_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    units = [(i % 7,) for i in range(50)]
    assert cluster_bootstrap(values, units, seed=9) == cluster_bootstrap(values, units, seed=9)
    assert cluster_bootstrap(values, units, seed=9) != cluster_bootstrap(values, units, seed=8)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [([], []), ([1.0], []), ([float("nan")], [(0,)]), ([1.0], [()]), ([1.0], [(0, 1, 2)])],
)
def test_refusals(values: list[float], clusters: list[tuple[int, ...]]) -> None:
    with pytest.raises(BadInputError):
        cluster_bootstrap(np.array(values), clusters)
