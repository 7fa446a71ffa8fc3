from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from scipy import stats

from corrigible.errors import BadInputError, NumericsError
from corrigible.evaluate.statistics import cluster_bootstrap, paired_bootstrap, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe (1998), Statistics in Medicine 17, table I, method 3 (score, no correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_numbers(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_the_inverse_of_the_score_test() -> None:
    low, high = wilson_interval(7.5, 20, level=0.9)
    z = stats.norm.ppf(0.95)
    for edge in (low, high):
        assert abs(7.5 / 20 - edge) == pytest.approx(z * np.sqrt(edge * (1 - edge) / 20))


@pytest.mark.parametrize(("successes", "n"), [(3, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(BadInputError, match="proportion"):
        wilson_interval(successes, n)


def test_bootstrap_of_a_tiny_sample_equals_full_enumeration() -> None:
    """All 27 resamples of three clusters, counted by hand, against the drawn quantiles."""
    values = [0.0, 1.0, 5.0]
    means = sorted(sum(pick) / 3 for pick in product(values, repeat=3))
    estimate = cluster_bootstrap(values, draws=60_000, level=0.5)
    alpha = stats.norm.cdf(np.sqrt(3 / 2) * stats.t.ppf(0.25, 2))
    cumulative = np.arange(1, 28) / 27
    low = means[int(np.searchsorted(cumulative, alpha))]
    high = means[int(np.searchsorted(cumulative, 1 - alpha))]
    assert estimate.value == 2.0
    assert estimate.interval == pytest.approx((low, high))


@pytest.mark.parametrize("clusters", [8, 60])
def test_cluster_bootstrap_covers_at_its_level_where_the_naive_one_does_not(clusters: int) -> None:
    """Five rows a cluster, strongly alike: resampling rows would claim far too much."""
    rng = np.random.default_rng(1)
    runs, covered, naive = 400, 0, 0
    labels = np.repeat(np.arange(clusters), 5)
    for run in range(runs):
        centre = rng.normal(size=clusters)
        rows = centre[labels] + 0.3 * rng.normal(size=5 * clusters)
        mine = cluster_bootstrap(rows, labels.tolist(), draws=400, seed=run)
        covered += mine.low <= 0 <= mine.high
        rowwise = cluster_bootstrap(rows, draws=400, seed=run)
        naive += rowwise.low <= 0 <= rowwise.high
    assert 0.92 <= covered / runs <= 0.98
    assert naive / runs < 0.80


def test_ratio_is_weighted_by_its_denominator() -> None:
    estimate = cluster_bootstrap([2.0, 9.0], per=[1.0, 3.0])
    assert estimate.value == pytest.approx(11 / 4)


def test_unanimous_wins_do_not_claim_certainty() -> None:
    estimate = cluster_bootstrap([1.0] * 5, bounds=(0.0, 1.0))
    assert estimate.method == "Wilson"
    assert estimate.interval == pytest.approx(wilson_interval(5, 5))
    one = cluster_bootstrap([1.0] * 5, ["p"] * 5, bounds=(0.0, 1.0))
    assert one.clusters == 1
    assert one.low < 0.25


def test_one_unbounded_cluster_has_no_finite_interval() -> None:
    assert cluster_bootstrap([1.0, 3.0], ["a", "a"]).interval == (-np.inf, np.inf)


def test_pairing_takes_out_what_the_sides_share() -> None:
    rng = np.random.default_rng(0)
    shared = 10 * rng.normal(size=200)
    first, second = shared + 0.5 + 0.1 * rng.normal(size=200), shared + 0.1 * rng.normal(size=200)
    paired = paired_bootstrap(first, second)
    assert paired.low < 0.5 < paired.high
    assert paired.high - paired.low < 0.1
    alone = cluster_bootstrap(first)
    assert alone.high - alone.low > 2


def test_bootstrap_agrees_with_the_t_interval_on_gaussian_rows() -> None:
    rows = np.random.default_rng(3).normal(size=40)
    mine = cluster_bootstrap(rows, draws=20_000)
    expected = stats.t.interval(0.95, 39, loc=rows.mean(), scale=stats.sem(rows))
    assert mine.interval == pytest.approx(expected, abs=0.03)


def test_same_seed_same_interval_and_row_order_is_irrelevant_to_the_value() -> None:
    rows = [random.Random(i).random() for i in range(30)]
    labels = [i % 7 for i in range(30)]
    assert cluster_bootstrap(rows, labels, seed=5) == cluster_bootstrap(rows, labels, seed=5)
    assert cluster_bootstrap(rows[::-1], labels[::-1]).value == pytest.approx(
        cluster_bootstrap(rows, labels).value
    )


def test_bad_rows_are_named() -> None:
    with pytest.raises(NumericsError, match="1 of 2 values"):
        cluster_bootstrap([0.5, float("nan")])
    with pytest.raises(BadInputError, match="non-empty"):
        cluster_bootstrap([])
    with pytest.raises(BadInputError, match="cluster labels"):
        cluster_bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(BadInputError, match="one to one"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(BadInputError, match="denominators"):
        cluster_bootstrap([1.0], per=[0.0])
    with pytest.raises(BadInputError, match="level"):
        cluster_bootstrap([1.0], level=95)
