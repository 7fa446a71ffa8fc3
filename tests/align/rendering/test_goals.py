"""Reward-augmented pairs: both halves of a pair swap with the goal."""

from __future__ import annotations

import math

import pytest
from feedback_texts import ranked

from corrigible.align import PairSource, Unusable
from corrigible.align.rendering import GoalScale, goal_pairs
from corrigible.errors import BadInputError
from corrigible.models import Renderer
from corrigible.records import Message

SCALE = GoalScale(1.0, 10.0, {"overall": (0.0, 9.0)})
SAYS = "The overall quality score of your answer should be {} out of 10."


def test_every_pair_is_learnt_both_ways_round() -> None:
    made = goal_pairs(ranked(["mid", "best", "worst"], [4.0, 9.0, 0.0]), SCALE)
    assert [(p.prompt[0].text, p.chosen_text, p.rejected_text) for p in made] == [
        (SAYS.format("10.0"), "best", "worst"),
        (SAYS.format("1.0"), "worst", "best"),
    ]
    assert all(p.prompt[0].role == "system" and p.prompt[1].text == "Q?" for p in made)
    assert {p.derived_from for p in made} == {("f1",)} and {p.p_chosen for p in made} == {1.0}


def test_a_prompt_with_a_system_message_of_its_own_swaps_as_well() -> None:
    """The reference's script forgets to swap in its other branch; here there is one branch."""
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="Q?"))
    made = goal_pairs(ranked(["good", "bad"], [9.0, 0.0], prompt=prompt), SCALE)
    assert [(p.prompt[0].text, p.chosen_text) for p in made] == [
        ("Be brief.\n" + SAYS.format("10.0"), "good"),
        ("Be brief.\n" + SAYS.format("1.0"), "bad"),
    ]


def test_all_pairs_leave_ties_and_unscored_answers_out() -> None:
    made = goal_pairs(ranked(["a", "b", "c", "d"], [9.0, 4.5, 4.5, math.nan]), SCALE, choice="all")
    assert [(p.chosen_text, p.rejected_text) for p in made] == [
        ("a", "b"),
        ("b", "a"),
        ("a", "c"),
        ("c", "a"),
    ]


def test_scores_are_put_on_the_scale_of_goals_by_criterion() -> None:
    signals = [ranked(["a", "b"], [5.0, 1.0]), ranked(["a", "b"], [100.0, 0.0], criterion="kind")]
    scale = GoalScale.of(signals)
    assert scale.goal(3.0, "overall") == 5.5
    assert (scale.goal(0.0, "kind"), scale.goal(100.0, "kind")) == (1.0, 10.0)
    with pytest.raises(Unusable, match="off_scale"):
        scale.goal(6.0, "overall")
    with pytest.raises(Unusable, match="off_scale"):
        scale.goal(1.0, "other")


def test_scores_that_say_nothing_are_named() -> None:
    with pytest.raises(BadInputError, match="scores_all_equal"):
        GoalScale.of([ranked(["a", "b"], [2.0, 2.0])])
    with pytest.raises(BadInputError, match="none is a number"):
        GoalScale.of([ranked(["a", "b"], [math.nan, math.nan])])
    with pytest.raises(BadInputError, match="must go up"):
        GoalScale.of([ranked(["a", "b"], [1.0, 2.0])], 10.0, 1.0)
    with pytest.raises(Unusable, match="tie"):
        goal_pairs(ranked(["a", "b"], [2.0, 2.0]), SCALE)
    with pytest.raises(Unusable, match="tie"):  # equal as written: the two halves would contradict each other
        goal_pairs(ranked(["a", "b"], [2.0, 2.01]), SCALE)
    with pytest.raises(Unusable, match="too_few_scores: 1 of 2"):
        goal_pairs(ranked(["a", "b"], [2.0, math.nan]), SCALE)


def test_policy_and_reference_see_the_goal(renderer: Renderer) -> None:
    """They score the same rows, and the goal stands in them though the answers were sampled without one."""
    signal = ranked(["good", "bad"], [9.0, 0.0], episodes=("e1", "e2"))
    source = PairSource(goal_pairs(signal, SCALE), renderer)
    for example, goal in zip(source.examples, ("10.0", "1.0"), strict=True):
        for row in example.rows:
            assert SAYS.format(goal) in renderer.decode(row.ids)
