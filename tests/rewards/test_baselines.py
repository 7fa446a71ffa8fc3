"""The baselines learn what they can, only from training pairs, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from corrigible.errors import BadInputError
from corrigible.rewards import length_baseline, split, tfidf_baseline
from corrigible.rewards.baselines import accuracy_rows, length_margins, tfidf_margins
from corrigible.store.pairs import Pair

MakePair = Callable[..., Pair]


def worded(pair: MakePair, n: int, seed: int, *, shuffled: bool = False) -> list[Pair]:
    """The side with "kind" rather than "rude" wins in nine of ten; filler words mean nothing."""
    rng = np.random.default_rng(seed)
    filler = [f"word{i}" for i in range(30)]
    pairs = []
    for number in range(n):
        sides = [" ".join([*rng.choice(filler, 6), word]) for word in ("kind", "rude")]
        if rng.random() < (0.5 if shuffled else 0.1):
            sides.reverse()
        pairs.append(pair(*sides, prompt=f"q{number % 60}"))
    return pairs


def lengthy(pair: MakePair, n: int, *, longer_wins: bool) -> list[Pair]:
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(n):
        short, long = ("x " * int(k) for k in sorted(rng.choice(40, 2, replace=False) + 1))
        sides = (long, short) if longer_wins else (short, long)
        pairs.append(pair(*sides, prompt=f"q{number % 40}"))
    return pairs


@pytest.mark.parametrize("longer_wins", [True, False])
def test_length_learns_its_direction(pair: MakePair, longer_wins: bool) -> None:
    parts = split(lengthy(pair, 200, longer_wins=longer_wins), by="prompt")
    assert length_baseline(parts.train, parts.held_out) > 0.95


def test_words_are_learned_and_lengths_are_not_needed(pair: MakePair) -> None:
    parts = split(worded(pair, 400, 0), by="prompt", held_out=0.4)
    assert tfidf_baseline(parts.train, parts.held_out) > 0.82
    assert 0.35 < length_baseline(parts.train, parts.held_out) < 0.65


def test_nothing_is_learned_from_shuffled_labels(pair: MakePair) -> None:
    found = []
    for seed in range(4):
        parts = split(worded(pair, 300, seed, shuffled=True), by="prompt", held_out=0.5, seed=seed)
        found.append(tfidf_baseline(parts.train, parts.held_out))
    assert 0.42 < np.mean(found) < 0.58


@pytest.mark.parametrize("margins", [length_margins, tfidf_margins])
def test_turning_pairs_round_changes_only_the_sign(
    pair: MakePair, margins: Callable[..., np.ndarray]
) -> None:
    def turned(p: Pair) -> Pair:
        return pair(p.rejected_text, p.chosen_text, prompt=p.prompt_text, p=1 - p.p_chosen)

    pairs = worded(pair, 120, 3)
    parts = split(pairs, by="prompt")
    straight = margins(parts.train, parts.held_out)
    reversed_train = margins([turned(p) for p in parts.train], parts.held_out)
    reversed_test = margins(parts.train, [turned(p) for p in parts.held_out])
    assert reversed_train == pytest.approx(straight, abs=1e-4)
    assert reversed_test == pytest.approx(-straight, abs=1e-4)


def test_votes_weigh_like_single_judgements(pair: MakePair) -> None:
    """One pair with p = 0.75 and four votes is the same as three judgements for and one against."""
    base = worded(pair, 80, 5)
    kind, rude = "kind word1", "rude word2 and more"
    voted = [pair(kind, rude, prompt="v", p=0.75, weight=4.0)]
    single = [pair(kind, rude, prompt="v")] * 3 + [pair(rude, kind, prompt="v")]
    test = worded(pair, 20, 6)
    together = length_margins([*base, *voted], test)
    assert together == pytest.approx(length_margins([*base, *single], test), abs=0.05)


def test_vocabulary_comes_from_training_only(pair: MakePair) -> None:
    train = worded(pair, 100, 0)
    test = [pair("never seen this", "nor that", prompt="new")]
    assert tfidf_margins(train, test) == pytest.approx([0.0])


def test_ties_are_neither_right_nor_wrong() -> None:
    rows = accuracy_rows(np.array([1.0, -1.0, 0.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.8, 0.2, 0.5]))
    assert rows[:4].tolist() == [1.0, 0.0, 0.5, 0.0] and np.isnan(rows[4])


def test_texts_without_words_and_empty_sides(pair: MakePair) -> None:
    odd = [pair("…", "—", prompt=f"q{i}") for i in range(8)]
    assert tfidf_margins(odd, odd) == pytest.approx(np.zeros(8))
    for margins in (length_margins, tfidf_margins):
        with pytest.raises(BadInputError):
            margins(odd, [])
    with pytest.raises(BadInputError, match="tie"):
        length_baseline(worded(pair, 20, 0), [pair("a", "b", p=0.5)])
