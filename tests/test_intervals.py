"""Intervals: they cover at their level where rows are not independent, and a row bootstrap would not."""

from __future__ import annotations

import json
import random
from itertools import product

import numpy as np
import pytest
from scipy import stats

from corrigible.errors import BadInputError, NumericsError
from corrigible.intervals import Estimate, cluster_bootstrap, paired_bootstrap, wilson_interval


def test_an_estimate_reads_as_text_and_as_json() -> None:
    found = Estimate(0.6123, 0.56, 0.6641, n=40, clusters=8)
    assert str(found) == "0.612 [0.560, 0.664]"
    assert found.interval == (0.56, 0.6641)
    assert found.to_json() == {
        "value": 0.6123,
        "interval": [0.56, 0.6641],
        "level": 0.95,
        "n": 40,
        "clusters": 8,
        "method": "cluster bootstrap",
    }


# -- Wilson -----------------------------------------------------------------------------------------


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


# -- known numbers ----------------------------------------------------------------------------------


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


def test_two_way_bootstrap_of_a_tiny_sample_equals_full_enumeration() -> None:
    """All 256 resamples of four items: a pair counts the product of how often its two items are drawn."""
    pairs, values = [(0, 1), (2, 3), (0, 2)], [0.0, 1.0, 5.0]
    means = []
    for pick in product(range(4), repeat=4):
        weight = [pick.count(a) * pick.count(b) for a, b in pairs]
        if sum(weight):
            means.append(np.dot(weight, values) / sum(weight))
    means.sort()
    estimate = cluster_bootstrap(values, pairs, draws=60_000, level=0.5)
    alpha = stats.norm.cdf(np.sqrt(4 / 3) * stats.t.ppf(0.25, 3))
    cumulative = np.arange(1, len(means) + 1) / len(means)
    low = means[int(np.searchsorted(cumulative, alpha))]
    high = means[int(np.searchsorted(cumulative, 1 - alpha))]
    assert estimate.interval == pytest.approx((low, high))
    assert (estimate.value, estimate.n, estimate.clusters) == (2.0, 3, 4)


def test_bootstrap_agrees_with_the_t_interval_on_gaussian_rows() -> None:
    rows = np.random.default_rng(3).normal(size=40)
    mine = cluster_bootstrap(rows, draws=20_000)
    expected = stats.t.interval(0.95, 39, loc=rows.mean(), scale=stats.sem(rows))
    assert mine.interval == pytest.approx(expected, abs=0.03)


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
    assert many.interval == pytest.approx(once.interval)
    assert many.clusters == 80 and many.n == 800


def test_ratio_is_weighted_by_its_denominator() -> None:
    estimate = cluster_bootstrap([2.0, 9.0], per=[1.0, 3.0])
    assert estimate.value == pytest.approx(11 / 4)


# -- coverage ---------------------------------------------------------------------------------------


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


def test_coverage_with_many_correlated_rows() -> None:
    # 40 clusters of 10 rows that share most of their noise: intervals over rows would cover about half.
    rng = np.random.default_rng(3)
    clustered = rowwise = 0
    for trial in range(120):
        values = (rng.normal(size=(40, 1)) + 0.3 * rng.normal(size=(40, 10))).ravel()
        units = [(i // 10,) for i in range(400)]
        found = cluster_bootstrap(values, units, draws=300, seed=trial)
        clustered += found.low <= 0 <= found.high
        naive = cluster_bootstrap(values, [(i,) for i in range(400)], draws=300, seed=trial)
        rowwise += naive.low <= 0 <= naive.high
    assert clustered / 120 > 0.87
    assert rowwise / 120 < 0.70


def test_coverage_of_pairs_that_share_items() -> None:
    """Sixty comparisons among twelve items whose quality is most of the value: the pigeonhole covers."""
    rng = np.random.default_rng(5)
    runs, covered, naive = 300, 0, 0
    for run in range(runs):
        quality = rng.normal(size=12)
        pairs = [tuple(int(i) for i in rng.choice(12, 2, replace=False)) for _ in range(60)]
        values = [quality[a] + quality[b] + 0.3 * rng.normal() for a, b in pairs]
        found = cluster_bootstrap(values, pairs, draws=300, seed=run)
        covered += found.low <= 0 <= found.high
        rowwise = cluster_bootstrap(values, draws=300, seed=run)
        naive += rowwise.low <= 0 <= rowwise.high
    assert covered / runs >= 0.92
    assert naive / runs < 0.80


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


def test_pairing_takes_out_what_the_sides_share() -> None:
    rng = np.random.default_rng(0)
    shared = 10 * rng.normal(size=200)
    first, second = shared + 0.5 + 0.1 * rng.normal(size=200), shared + 0.1 * rng.normal(size=200)
    paired = paired_bootstrap(first, second)
    assert paired.low < 0.5 < paired.high
    assert paired.high - paired.low < 0.1
    alone = cluster_bootstrap(first)
    assert alone.high - alone.low > 2


# -- what the units are -----------------------------------------------------------------------------


def test_a_label_and_a_tuple_of_one_unit_are_the_same_and_so_is_a_unit_paired_with_itself() -> None:
    values = np.random.default_rng(0).normal(size=30)
    labels = [i % 6 for i in range(30)]
    assert cluster_bootstrap(values, labels) == cluster_bootstrap(values, [(i,) for i in labels])
    assert cluster_bootstrap(values, labels) == cluster_bootstrap(values, [(i, i) for i in labels])


def test_which_item_of_a_pair_comes_first_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(int(i) for i in rng.choice(9, 2, replace=False)) for _ in range(40)]
    values = rng.normal(size=40)
    turned = [*pairs[:10], *((b, a) for a, b in pairs[10:])]
    assert cluster_bootstrap(values, pairs).value == cluster_bootstrap(values, turned).value
    wide = cluster_bootstrap(values, pairs, draws=40_000)
    assert cluster_bootstrap(values, turned, draws=40_000).interval == pytest.approx(wide.interval, abs=0.03)


def test_the_interval_does_not_depend_on_how_many_draws_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=60)
    pairs = [(int(a), int(b)) for a, b in rng.integers(25, size=(60, 2))]
    at_once = cluster_bootstrap(values, pairs, draws=200)
    monkeypatch.setattr("corrigible.intervals._CHUNK_CELLS", 7 * 60)
    assert cluster_bootstrap(values, pairs, draws=200).interval == pytest.approx(at_once.interval)


def test_same_seed_same_interval_and_row_order_is_irrelevant_to_the_value() -> None:
    rows = [random.Random(i).random() for i in range(30)]
    labels = [i % 7 for i in range(30)]
    assert cluster_bootstrap(rows, labels, seed=5) == cluster_bootstrap(rows, labels, seed=5)
    assert cluster_bootstrap(rows, labels, seed=5) != cluster_bootstrap(rows, labels, seed=6)
    assert cluster_bootstrap(rows[::-1], labels[::-1]).value == pytest.approx(
        cluster_bootstrap(rows, labels).value
    )


# -- where no resample moves the number -------------------------------------------------------------


def test_unanimous_wins_do_not_claim_certainty() -> None:
    estimate = cluster_bootstrap([1.0] * 5, bounds=(0.0, 1.0))
    assert estimate.method == "Wilson"
    assert estimate.interval == pytest.approx(wilson_interval(5, 5))
    one = cluster_bootstrap([1.0] * 5, ["p"] * 5, bounds=(0.0, 1.0))
    assert one.clusters == 1
    assert one.low < 0.25
    lost = cluster_bootstrap([0.0] * 5, bounds=(0.0, 1.0))
    assert lost.interval == pytest.approx(wilson_interval(0, 5))


@pytest.mark.parametrize(
    ("pairs", "independent"),
    [
        ([(0, 1), (2, 3), (4, 5)], 3),  # three pairs, six items
        ([(0, 1), (1, 2), (2, 3), (3, 0)], 2),  # a ring of four
        ([(0, 1), (0, 2), (0, 3), (0, 4)], 1),  # always the same opponent
    ],
)
def test_unanimous_pairs_count_only_those_that_share_no_item(
    pairs: list[tuple[int, int]], independent: int
) -> None:
    found = cluster_bootstrap([1.0] * len(pairs), pairs, bounds=(0.0, 1.0))
    assert found.interval == pytest.approx(wilson_interval(independent, independent))


def test_units_that_all_agree_in_the_middle_may_still_differ_from_the_next_one() -> None:
    """Twenty differences of zero: the next unit differs with at most Wilson's upper end for 0 of 20."""
    _, differs = wilson_interval(0, 20)
    same = paired_bootstrap([1.0] * 20, [1.0] * 20, bounds=(-1.0, 1.0))
    assert (same.value, same.method) == (0.0, "Wilson")
    assert same.interval == pytest.approx((-differs, differs))


def test_the_fallback_covers() -> None:
    """Five units that are right with probability 0.9: mostly unanimous, and still covered."""
    rng = np.random.default_rng(2)
    covered = 0
    for run in range(300):
        right = (rng.random(5) < 0.9).astype(float)
        found = cluster_bootstrap(right, bounds=(0.0, 1.0), draws=300, seed=run)
        covered += found.low <= 0.9 <= found.high
    assert covered / 300 >= 0.95


def test_one_unbounded_cluster_has_no_finite_interval() -> None:
    found = cluster_bootstrap([1.0, 3.0], ["a", "a"])
    assert found.interval == (-np.inf, np.inf)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["interval"] == [None, None]
    assert found.between("prompt") == "one prompt: no interval"
    assert str(found) == "2.000 [one unit: no interval]"
    tied = cluster_bootstrap([1.0, 3.0], [("a", "b"), ("b", "c")])
    assert tied.between("item") == "no two items stand apart: no interval"
    assert cluster_bootstrap([0.1] * 7, list("abcdefg")).between() == "0.100 to 0.100"


def test_equal_unbounded_clusters_show_no_spread() -> None:
    assert cluster_bootstrap([0.1] * 7, list("abcdefg")).interval == pytest.approx((0.1, 0.1))


def test_resamples_without_a_denominator_are_left_out() -> None:
    found = cluster_bootstrap([3.0, 0.0, 0.0], per=[1.0, 0.0, 0.0], draws=500)
    assert found.interval == pytest.approx((3.0, 3.0))


# -- refusals ---------------------------------------------------------------------------------------


def test_bad_rows_are_named() -> None:
    with pytest.raises(NumericsError, match="1 of 2 values"):
        cluster_bootstrap([0.5, float("nan")])
    with pytest.raises(BadInputError, match="non-empty"):
        cluster_bootstrap([])
    with pytest.raises(BadInputError, match="non-empty"):
        cluster_bootstrap([], [])
    with pytest.raises(BadInputError, match="cluster labels"):
        cluster_bootstrap([1.0, 2.0], ["a"])
    with pytest.raises(BadInputError, match="cluster labels"):
        cluster_bootstrap([1.0], [])
    with pytest.raises(BadInputError, match="one to one"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(BadInputError, match="denominators"):
        cluster_bootstrap([1.0], per=[0.0])
    with pytest.raises(BadInputError, match="level"):
        cluster_bootstrap([1.0], level=95)


@pytest.mark.parametrize("units", [(), (0, 1, 2)])
def test_a_row_hangs_on_one_or_two_units(units: tuple[int, ...]) -> None:
    with pytest.raises(BadInputError, match="row 1 hangs on"):
        cluster_bootstrap([1.0, 2.0], [(0,), units])
