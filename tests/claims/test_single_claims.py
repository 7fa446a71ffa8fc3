"""Parts of the tabular claims that have exact answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from corrigible.claims import s065_r_to_q as r_to_q
from corrigible.claims import s129_budget_schedule as budgets
from corrigible.claims import s169_reward_augmented as goals
from corrigible.claims import s176_rso as rso
from corrigible.claims import s178_differential_information as did
from corrigible.claims import s185_spin as spin
from corrigible.claims.fixtures.outcomes import kl, normal_policy
from corrigible.claims.fixtures.tabular import generator, tab_pref
from corrigible.claims.fixtures.tree import tree_lm


def test_the_widest_beam_finds_the_likeliest_answer_and_one_is_greedy() -> None:
    tree = tree_lm(1000, arity=3, horizon=4)
    policy = tree.solve().policy
    assert r_to_q.beam(tree, policy, 3**4) == int(tree.totals(policy).argmax())
    place = 0
    for t in range(tree.horizon):
        place = place * 3 + int(tree.level(policy, t)[place].argmax())
    assert r_to_q.beam(tree, policy, 1) == place


def test_the_optimum_has_exact_credit_and_the_reference_none() -> None:
    tree = tree_lm(1000, arity=3, horizon=3)
    tokens, everything = tree.sequences(), torch.arange(27)
    assert r_to_q.credit_correlation(tree, tree.solve().policy, everything, tokens) == pytest.approx(1.0)
    half = r_to_q.credit_correlation(tree, 0.5 * (tree.solve().policy + tree.reference), everything, tokens)
    assert half == pytest.approx(1.0)  # half the log-ratio is the same credit in another unit


def test_votes_both_ways_are_put_together_rightly() -> None:
    """Two answers of one token: DPO's log-odds are those of the votes but for the prior's pull."""
    tree = tree_lm(1000, arity=2, horizon=1, beta=1.0)
    places = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 0]] * 2000)
    won = torch.tensor([True, False, True, True, True] * 2000)  # answer 0 wins three of four
    policy = r_to_q.dpo(tree, places, won)
    ratio = (policy - tree.reference)[0]
    assert float(ratio[0] - ratio[1]) == pytest.approx(math.log(3.0), abs=2e-3)


def test_a_round_of_self_play_in_expectation_has_the_slope_it_should() -> None:
    random = generator(1000, 1)
    data, policy = normal_policy(9, 1.0, random), normal_policy(9, 1.0, random)
    for strength in (0.5, 1.0, 4.0):
        after = torch.log_softmax((1 - 1 / strength) * policy + data / strength, dim=0)
        assert spin.slope(policy, after, data) == pytest.approx(1 - 1 / strength)


def test_targets_lie_at_the_distance_that_was_asked_for() -> None:
    random = generator(1000, 2)
    reference = normal_policy(did.OUTCOMES, 1.5, random)
    for direction in did.directions(reference, random).values():
        assert kl(did.at_distance(reference, direction, did.DISTANCE), reference) == pytest.approx(
            did.DISTANCE
        )


@pytest.mark.parametrize("flat", [False, True])
def test_expected_losses_are_the_mean_of_many_runs(flat: bool) -> None:
    rng = np.random.default_rng(1000)
    curvature, start = budgets.problem(rng, condition=100.0)
    shape = budgets.shapes(50)["cosine"]
    exact = budgets.expected_losses(shape, curvature[None], start[None], flat=flat)[:, 0]
    at = 12
    runs = [
        budgets.measured_loss(shape, float(budgets.PEAKS[at]), curvature, start, seed, flat=flat)
        for seed in range(200)
    ]
    assert np.mean(runs) == pytest.approx(exact[at], abs=4 * np.std(runs) / len(runs) ** 0.5)
    assert exact[at] < exact[0]


def test_goals_are_read_back_as_they_were_written() -> None:
    world = goals.scored_world(1000, 0)
    both = goals.augmented(goals.written(world, 1000))
    score = world.rewards[both.context, both.chosen]
    assert float((both.goal - score).abs().max()) <= 0.05 + 1e-9
    # One after the other, each pair both ways round.
    assert torch.equal(both.chosen[::2], both.rejected[1::2]) and torch.equal(
        both.rejected[::2], both.chosen[1::2]
    )
    once = goals.plain(both, world)
    assert 2 * len(once) == len(both)
    assert bool((world.rewards[once.context, once.chosen] > world.rewards[once.context, once.rejected]).all())


def test_a_new_goal_policy_is_the_reference() -> None:
    world = goals.scored_world(1000, 0)
    assert torch.equal(goals.GoalPolicy(1000).table(world, 10.0), torch.log_softmax(world.reference, dim=1))


def test_rejection_keeps_better_pairs_and_shuffled_rewards_do_not() -> None:
    world = tab_pref(1000, contexts=6, arms=100, features=4, beta=0.3, spread=2.0)

    def mean(how: str) -> float:
        pairs = rso.kept_pairs(world, 1000, how=how)
        assert bool(
            (world.rewards[pairs.context, pairs.chosen] > world.rewards[pairs.context, pairs.rejected]).all()
        )
        assert len(pairs) == 6 * rso.SETS * rso.KEPT // 2
        return float(
            world.rewards[pairs.context, pairs.chosen].mean()
            + world.rewards[pairs.context, pairs.rejected].mean()
        )

    plain, shuffled, kept = mean("plain"), mean("shuffled"), mean("rejection")
    assert kept > plain + 2.0 and abs(shuffled - plain) < 1.0
