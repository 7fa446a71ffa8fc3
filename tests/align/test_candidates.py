"""Rejection sampling and pairings against exact probabilities by enumeration, and their papers' traps."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from corrigible.align.candidates import (
    acceptance,
    build_pairs,
    data_vs_self,
    optimal_rejected,
    pairs_of,
    rejected_weights,
    rejection,
    usable,
)
from corrigible.errors import BadInputError, NumericsError
from corrigible.records import Message
from corrigible.store import Demonstrated, Ranked

# p = 0.001 at 1, 2, ... degrees of freedom
CRITICAL = dict(
    enumerate((10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26), start=1)
)


def fits(counts: Counter, expected: dict, draws: int) -> None:
    """Chi-square test of counts against exact probabilities."""
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    assert set(counts) <= {key for key, p in expected.items() if p > 0}
    live = [key for key, p in expected.items() if p > 0]
    chi2 = sum((counts[key] - draws * expected[key]) ** 2 / (draws * expected[key]) for key in live)
    assert chi2 < CRITICAL[max(len(live) - 1, 1)], (chi2, counts, expected)


def exact(scores: list[float], k: int, beta: float) -> dict[tuple[int, ...], float]:
    """Probabilities of the sequences of accepted candidates, by enumerating orders and draws of each pass."""
    found: dict[tuple[int, ...], float] = {}

    def run(left: tuple[int, ...], taken: tuple[int, ...], p: float) -> None:
        if len(taken) == min(k, len(scores)) or not left:
            found[taken] = found.get(taken, 0.0) + p
            return
        best = max(scores[i] for i in left)
        for order in itertools.permutations(left):
            walk(order, left, taken, p / math.factorial(len(left)), best)

    def walk(
        order: tuple[int, ...], left: tuple[int, ...], taken: tuple[int, ...], p: float, best: float
    ) -> None:
        if len(taken) == min(k, len(scores)) or not order:
            rest = tuple(i for i in left if i not in taken)
            run(rest, taken, p)
            return
        chance = math.exp((scores[order[0]] - best) / beta)
        walk(order[1:], left, (*taken, order[0]), p * chance, best)
        if chance < 1:
            walk(order[1:], left, taken, p * (1 - chance), best)

    run(tuple(range(len(scores))), (), 1.0)
    return found


@pytest.mark.parametrize(("k", "beta"), [(1, 0.5), (2, 0.5), (2, 2.0), (3, 1.0)])
def test_rejection_has_the_exact_distribution(k: int, beta: float) -> None:
    scores, draws = [1.0, 0.2, 0.8], 4000
    rng = np.random.default_rng(k)
    counts = Counter(tuple(rejection(scores, k, beta, rng)) for _ in range(draws))
    fits(counts, exact(scores, k, beta), draws)


def test_one_draw_with_many_candidates_follows_the_optimal_policy() -> None:
    """Of many samples of a starting policy, one accepted in a pass is one of pi_ref exp(r / beta)."""
    rng = np.random.default_rng(0)
    reference, reward, beta = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.6, 1.0]), 0.8
    target = reference * np.exp(reward / beta)
    target /= target.sum()
    draws = 3000
    counts: Counter[int] = Counter()
    for _ in range(draws):
        samples = rng.choice(3, size=60, p=reference)
        counts[int(samples[rejection(reward[samples], 1, beta, rng)[0]])] += 1
    fits(counts, dict(enumerate(target.tolist())), draws)


def test_the_limits_of_the_temperature() -> None:
    rng = np.random.default_rng(0)
    scores = [0.3, 2.0, 1.0, 1.5, -1.0]
    for _ in range(20):
        assert rejection(scores, 3, 0.0, rng) == [1, 3, 2]
    counts = Counter(rejection(scores, 1, math.inf, rng)[0] for _ in range(3000))
    fits(counts, dict.fromkeys(range(5), 0.2), 3000)
    ties = Counter(rejection([1.0, 1.0, 0.0], 1, 0.0, rng)[0] for _ in range(2000))
    fits(ties, {0: 0.5, 1: 0.5, 2: 0.0}, 2000)
    assert acceptance([1.0, 3.0], 2.0).tolist() == pytest.approx([math.exp(-1), 1.0])


def test_it_ends_when_fewer_than_k_different_ones_are_there() -> None:
    rng = np.random.default_rng(0)
    assert sorted(rejection([1.0, 2.0], 8, 0.5, rng)) == [0, 1]
    assert sorted(rejection([1.0, 1.0, 2.0, math.nan], 8, 0.5, rng, texts=["a", "a", "b", "c"])) == [0, 2]
    assert (
        len(rejection([5.0, -1e6, -1e6], 2, 1e-3, rng)) == 2
    )  # chances that underflow to 0, until they are best
    with pytest.raises(BadInputError, match="No candidate"):
        rejection([math.nan], 1, 0.5, rng)
    for k, beta in ((0, 0.5), (1, -1.0), (1, math.nan)):
        with pytest.raises(BadInputError):
            rejection([1.0], k, beta, rng)
    with pytest.raises(NumericsError, match="score_infinite"):
        rejection([math.inf, 0.0], 1, 0.5, rng)


def test_equal_scores_do_not_favour_who_came_first() -> None:
    rng = np.random.default_rng(3)
    counts = Counter(rejection([1.0] * 4, 1, 0.5, rng)[0] for _ in range(2000))
    fits(counts, dict.fromkeys(range(4), 0.25), 2000)


def test_usable_keeps_the_first_of_equal_texts() -> None:
    assert usable([1.0, math.nan, 2.0, 3.0], ["a", "b", "c", "a"]) == [0, 2]
    with pytest.raises(BadInputError):
        usable([1.0, 2.0], ["a"])


# -- pairings ----------------------------------------------------------------------------------------

SCORES = [0.4, 3.0, 1.0, -2.0]


def meet(contests: Iterable) -> list[tuple[int, int]]:
    return [(one.chosen, one.rejected) for one in contests]


def test_direct_meets_as_they_came_and_the_higher_score_wins() -> None:
    rng = np.random.default_rng(0)
    found = build_pairs("direct", SCORES, rng)
    assert meet(found) == [(1, 0), (2, 3)]
    assert [(one.p_chosen, one.gap) for one in found] == [(1.0, pytest.approx(2.6)), (1.0, 3.0)]
    assert meet(build_pairs("direct", [*SCORES, 9.0], rng)) == [(1, 0), (2, 3)]  # the odd one has no opponent


def test_first_round_is_every_matching_alike() -> None:
    rng, draws = np.random.default_rng(0), 3000
    counts = Counter(frozenset(meet(build_pairs("first_round", SCORES, rng))) for _ in range(draws))
    matchings = [{(1, 0), (2, 3)}, {(0, 3), (1, 2)}, {(2, 0), (1, 3)}]
    fits(counts, {frozenset(m): 1 / 3 for m in matchings}, draws)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_a_tournament_has_one_loss_for_everyone_but_the_best(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(30):
        scores = rng.permutation(n).astype(float)
        found = meet(build_pairs("tournament", scores, rng))
        assert sorted(loser for _, loser in found) == sorted(set(range(n)) - {int(scores.argmax())})
        assert all(scores[a] > scores[b] for a, b in found)


def test_tournaments_of_four_are_exactly_distributed() -> None:
    """The runner-up meets the best in the first round with chance 1/3; else it is in the final."""
    rng, draws = np.random.default_rng(0), 3000
    counts = Counter(
        (2, 1) in [(b, a) for a, b in meet(build_pairs("tournament", SCORES, rng))] for _ in range(draws)
    )
    assert counts[True] == draws  # best and runner-up always meet: whoever loses to the best is out by then
    lasts = Counter(meet(build_pairs("tournament", SCORES, rng))[-1] for _ in range(draws))
    fits(lasts, {(1, 2): 2 / 3, (1, 0): 1 / 3, (1, 3): 0.0}, draws)


def test_best_against_worst_random_and_all() -> None:
    rng, draws = np.random.default_rng(0), 3000
    assert meet(build_pairs("best_vs_worst", SCORES, rng)) == [(1, 3)]
    others = Counter(meet(build_pairs("best_vs_random", SCORES, rng))[0] for _ in range(draws))
    fits(others, {(1, 0): 1 / 3, (1, 2): 1 / 3, (1, 3): 1 / 3}, draws)
    every = meet(build_pairs("all_pairs", SCORES, rng))
    assert sorted(every) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 0), (2, 3)]
    bests = Counter(meet(build_pairs("best_vs_worst", [2.0, 2.0, 0.0], rng))[0][0] for _ in range(draws))
    fits(bests, {0: 0.5, 1: 0.5}, draws)


def test_labels_hard_soft_and_sampled() -> None:
    rng, draws = np.random.default_rng(0), 4000
    (soft,) = build_pairs("direct", [0.0, 1.5], rng, labels="soft", scale=0.75)
    chance = 1 / (1 + math.exp(-2.0))
    assert (soft.chosen, soft.p_chosen, soft.gap) == (1, pytest.approx(chance), 1.5)
    drawn = [build_pairs("direct", [0.0, 1.5], rng, labels="sampled", scale=0.75)[0] for _ in range(draws)]
    fits(Counter(one.chosen for one in drawn), {1: chance, 0: 1 - chance}, draws)
    assert all(one.p_chosen == 1.0 and one.gap == (1.5 if one.chosen == 1 else -1.5) for one in drawn)


def test_ties_missing_scores_and_equal_texts() -> None:
    rng = np.random.default_rng(0)
    ties = [build_pairs("all_pairs", [1.0, 1.0], rng)[0] for _ in range(200)]
    assert {(one.p_chosen, one.gap) for one in ties} == {(0.5, 0.0)} and {one.chosen for one in ties} == {
        0,
        1,
    }
    assert meet(build_pairs("all_pairs", [1.0, math.nan, 0.0], rng)) == [(0, 2)]
    assert meet(build_pairs("all_pairs", [1.0, 0.5, 0.0], rng, texts=["a", "a", "b"])) == [(0, 2)]
    assert build_pairs("tournament", [1.0, math.nan], rng) == [] == build_pairs("all_pairs", [1.0], rng)
    for wrong in ({"pairing": "worst"}, {"labels": "firm"}, {"scale": 0.0}):
        with pytest.raises(BadInputError, match="will not do"):
            build_pairs(**({"pairing": "direct", "scores": [1.0, 2.0], "rng": rng} | wrong))  # type: ignore[arg-type]


# -- with texts ----------------------------------------------------------------------------------------


def turn(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


def test_scored_answers_as_pairs_that_share_their_weight() -> None:
    ranked = Ranked(
        prompt=(Message(role="user", content="?"),),
        responses=(turn("a"), turn("b"), turn("a"), turn("c")),
        scores=(1.0, 3.0, 1.0, math.nan),
        weight=2.0,
        group="g",
        annotators=("rm",),
        derived_from=("r1",),
        episodes=("e0", "e1", "e2", "e3"),
    )
    rng = np.random.default_rng(0)
    (one,) = pairs_of(ranked, rng, pairing="all_pairs")
    assert (one.chosen_text, one.rejected_text, one.margin, one.weight) == ("b", "a", 2.0, 2.0)
    assert (one.chosen_episode, one.rejected_episode, one.derived_from) == ("e1", "e0", ("r1",))
    more = pairs_of(
        Ranked(**{**ranked.__dict__, "scores": (1.0, 3.0, 2.0, 0.0)}),
        rng,
        pairing="all_pairs",  # type: ignore[arg-type]
    )
    assert len(more) == 3 and sum(one.weight for one in more) == pytest.approx(
        2.0
    )  # the third is the first again


def test_data_against_self_drops_what_is_the_same() -> None:
    def shown(text: str) -> Demonstrated:
        return Demonstrated(
            prompt=(Message(role="user", content="?"),),
            response=turn(text),
            weight=1.0,
            group="g",
            annotators=("ada",),
            derived_from=(text,),
        )

    found = data_vs_self(
        [shown("good"), shown("same")], [[turn("bad"), turn("worse"), turn("bad")], [turn("same")]]
    )
    assert [(p.chosen_text, p.rejected_text, p.weight) for p in found] == [
        ("good", "bad", 0.5),
        ("good", "worse", 0.5),
    ]
    with pytest.raises(BadInputError, match="lists of samples"):
        data_vs_self([shown("good")], [])


# -- the optimal rejected distribution -----------------------------------------------------------------


def test_the_optimal_rejected_distribution_makes_the_power_law_hold() -> None:
    rng = np.random.default_rng(0)
    reference = np.log(rng.dirichlet(np.ones(6)))
    target = np.log(rng.dirichlet(np.ones(6)))
    for beta in (0.1, 0.5, 2.0):
        rejected = optimal_rejected(reference, target, beta)
        loop = [
            math.exp(r) * (math.exp(r) / math.exp(t)) ** beta for r, t in zip(reference, target, strict=True)
        ]
        assert np.exp(rejected).tolist() == pytest.approx([p / sum(loop) for p in loop], rel=1e-12)
        # log(pi_ref / pi_l) = beta log(pi* / pi_ref) + constant
        left = (reference - rejected) - beta * (target - reference)
        assert np.ptp(left) < 1e-12


def test_weights_turn_reference_samples_into_rejected_ones() -> None:
    rng = np.random.default_rng(1)
    reference, target = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    wanted = np.exp(optimal_rejected(np.log(reference), np.log(target), 0.5))
    samples = rng.choice(5, size=40_000, p=reference)
    weights, ess = rejected_weights(np.log(target / reference)[samples], 0.5)
    found = np.bincount(samples, weights=weights, minlength=5)
    assert found == pytest.approx(wanted, abs=0.01)
    assert weights.sum() == pytest.approx(1.0) and 1.0 < ess < 40_000
    assert rejected_weights([0.0, 0.0], 0.5)[1] == pytest.approx(2.0)
    assert rejected_weights([0.0, 2000.0], 0.5)[1] == pytest.approx(1.0)
    with pytest.raises(NumericsError):
        optimal_rejected([0.0], [-math.inf], 0.5)
