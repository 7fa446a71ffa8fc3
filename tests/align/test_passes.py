"""Forward passes: everything once, within the budget, as few as need be, about equally large."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.align.passes import micro_batches, passes
from corrigible.models import LanguagePolicy, Rendered
from corrigible.models.scoring import Scorer

SIZES = st.lists(st.integers(1, 50), max_size=30)


def load(batch: list[int], sizes: list[int], padded: bool = False) -> int:
    return len(batch) * max(sizes[i] for i in batch) if padded else sum(sizes[i] for i in batch)


def loads(batches: list[list[int]], sizes: list[int], padded: bool = False) -> list[int]:
    return [load(batch, sizes, padded) for batch in batches]


def fewest(sizes: list[int], budget: int) -> int:
    """The least number of batches there is, by trying everything: set by set of items (bit masks)."""
    whole = (1 << len(sizes)) - 1
    total = [sum(size for i, size in enumerate(sizes) if mask >> i & 1) for mask in range(whole + 1)]
    best = {0: 0}
    for mask in range(1, whole + 1):
        first = mask & -mask  # somebody must take it
        best[mask] = min(
            best[mask ^ part] + 1
            for part in range(1, mask + 1)
            if part & mask == part and part & first and (total[part] <= budget or part == first)
        )
    return best[whole]


def first_fit_decreasing(sizes: list[int], budget: int) -> list[int]:
    """Loads of the textbook heuristic."""
    found: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((n for n, used in enumerate(found) if used + size <= budget), None)
        if place is None:
            found.append(size)
        else:
            found[place] += size
    return found


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 120), st.booleans())
def test_everything_is_there_once_within_the_budget(sizes: list[int], budget: int, padded: bool) -> None:
    batches = micro_batches(sizes, budget, padded=padded)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(batch) == 1 or load(batch, sizes, padded) <= budget for batch in batches)
    found = loads(batches, sizes, padded)
    assert found == sorted(found, reverse=True)  # what is too large for memory is met at once


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(10, 60))
def test_hardly_more_passes_than_the_fewest_possible(sizes: list[int], budget: int) -> None:
    most = 11 / 9 * fewest(sizes, budget) + 6 / 9  # Dosa 2007, of first and best fit decreasing
    assert len(micro_batches(sizes, budget)) <= most


def test_few_examples_of_every_kind_take_the_fewest_passes() -> None:
    for sizes in itertools.combinations_with_replacement((3, 7, 10), 5):
        assert len(micro_batches(list(sizes), 20)) == fewest(list(sizes), 20)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 120), st.randoms(use_true_random=False), st.booleans())
def test_the_order_of_the_items_changes_nothing(
    sizes: list[int], budget: int, shuffle: random.Random, padded: bool
) -> None:
    def as_sizes(given: list[int]) -> list[list[int]]:
        return sorted(
            sorted(given[i] for i in batch) for batch in micro_batches(given, budget, padded=padded)
        )

    other = sizes[:]
    shuffle.shuffle(other)
    assert as_sizes(other) == as_sizes(sizes)


def side_by_side(sizes: list[int], budget: int) -> list[int]:
    """Loads of passes that are filled one after the other, padded to the largest of each."""
    found: list[tuple[int, int]] = []
    for size in sorted(sizes, reverse=True):
        if found and (found[-1][0] + 1) * found[-1][1] <= budget:
            found[-1] = (found[-1][0] + 1, found[-1][1])
        else:
            found.append((1, size))
    return [count * largest for count, largest in found]


@pytest.mark.parametrize(
    ("padded", "textbook", "share"), [(False, first_fit_decreasing, 0.3), (True, side_by_side, 0.9)]
)
def test_passes_are_about_equally_large(padded: bool, textbook: Any, share: float) -> None:
    """Lengths as real answers have them, against the textbook, which fills one pass after the other."""
    rng = random.Random(4)
    ours = plain = 0.0
    for count in (16, 64) * 20:
        sizes = [min(512, max(20, int(rng.lognormvariate(5.2, 0.6)))) for _ in range(count)]
        found = loads(micro_batches(sizes, 1024, padded=padded), sizes, padded)
        other = textbook(sizes, 1024)
        assert len(found) <= len(other)
        ours += (max(found) - min(found)) / max(found)
        plain += (max(other) - min(other)) / max(other)
    assert ours < share * plain


def test_a_tight_fit_stays_within_the_budget() -> None:
    """Emptiest first would make 6 4 4 and 6 4 of these, of 14 and 10 tokens."""
    sizes = [6, 6, 4, 4, 4]
    assert loads(micro_batches(sizes, 12), sizes) == [12, 12]


def test_a_large_one_goes_alone() -> None:
    assert micro_batches([5, 300, 4], 100) == [[1], [0, 2]]
    assert micro_batches([], 100) == []


def test_rows_of_a_policy(policy: LanguagePolicy) -> None:
    """Packed rows share their prompt and cost their sum; padded ones cost the longest, each."""
    rows = [Rendered.from_tokens([1] * 20, [5] * length) for length in (2, 4, 30)]
    packed, plain = Scorer(policy), Scorer(policy)
    plain.network = None
    assert passes(packed, [[row] for row in rows], 100) == [[2, 1, 0]]
    assert passes(plain, [[row] for row in rows], 100) == [[2], [1, 0]]
