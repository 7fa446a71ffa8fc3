from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from corrigible.collect.gold import GoldSignal
from corrigible.collect.simulated import Panel, SimulatedAnnotator
from corrigible.errors import BadInputError
from corrigible.evaluate.win_rate import (
    Judged,
    PanelJudge,
    PreferenceJudge,
    Shown,
    SignalJudge,
    pair_by_prompt,
    win_rate,
)
from corrigible.records import Episode, FinishReason, Message
from corrigible.rewards.signals import Scores

Make = Callable[..., Episode]


class Marked:
    """A gold preference that a text states itself: "0.3 ..." is worth 0.3."""

    name = "marked"

    def score(self, prompt: Sequence[Message], text: str) -> float:
        return float(text.split()[0])

    def declaration(self) -> dict[str, object]:
        return {"gold": "marked"}


GOLD = SignalJudge(GoldSignal(Marked()))


class ByRule:
    """A judge from a function of the two texts as shown."""

    name = "rule"

    def __init__(self, rule: Callable[[str, str], Judged]) -> None:
        self.rule = rule

    def compare(self, shown: Sequence[Shown]) -> list[Judged]:
        return [self.rule(s.first.response_text(), s.second.response_text()) for s in shown]


def test_counts_and_value_by_hand(episode: Make) -> None:
    candidate = [episode("a", "0.9"), episode("b", "0.1"), episode("c", "0.5 x"), episode("d", "0.7")]
    baseline = [episode("d", "0.7"), episode("c", "0.5 y"), episode("b", "0.2"), episode("a", "0.3")]
    rate = win_rate(candidate, baseline, GOLD)
    assert (rate.wins, rate.losses, rate.ties, rate.identical) == (1, 1, 2, 1)
    assert rate.value == 0.5 and rate.n == rate.prompts == 4
    assert rate.position_effect.value == 0.0
    assert rate.to_json(items=True)["judge"] == "marked"


def test_the_same_by_the_definition(episode: Make) -> None:
    rng = random.Random(0)
    candidate = [episode(f"q{i}", f"{rng.random():.3f} c") for i in range(60)]
    baseline = [episode(f"q{i}", f"{rng.random():.3f} b") for i in range(60)]
    rate = win_rate(candidate, baseline, GOLD)
    wins = sum(
        float(c.response_text().split()[0]) > float(b.response_text().split()[0])
        for c, b in zip(candidate, baseline, strict=True)
    )
    assert rate.value == pytest.approx(wins / 60)
    assert rate.interval[0] < rate.value < rate.interval[1]


def test_a_judge_of_position_gives_one_half_and_is_found_out(episode: Make) -> None:
    candidate = [episode(f"q{i}", "0.9 c") for i in range(30)]
    baseline = [episode(f"q{i}", "0.1 b") for i in range(30)]
    always_first = win_rate(candidate, baseline, ByRule(lambda first, second: 1.0))
    assert always_first.value == 0.5 and always_first.ties == 30
    assert always_first.position_effect.value == 0.5
    leaning = win_rate(
        candidate, baseline, ByRule(lambda first, second: 0.9 if first.startswith("0.9") else 0.3)
    )
    assert leaning.value == pytest.approx((0.9 + 1 - 0.3) / 2)
    assert leaning.position_effect.value == pytest.approx((0.9 + 0.3) / 2 - 0.5)
    assert leaning.wins == 30


def test_swapping_the_policies_mirrors_the_rate(episode: Make) -> None:
    rng = random.Random(1)
    candidate = [episode(f"q{i % 10}", f"{rng.random():.2f} c{i}") for i in range(40)]
    baseline = [episode(f"q{i % 10}", f"{rng.random():.2f} b{i}") for i in range(40)]
    judge = ByRule(lambda first, second: 0.8 if first > second else 0.4)
    forward, backward = win_rate(candidate, baseline, judge), win_rate(baseline, candidate, judge)
    assert forward.value == pytest.approx(1 - backward.value)
    assert forward.position_effect.value == pytest.approx(backward.position_effect.value)
    assert forward.prompts == 10 and forward.n == 40


def test_what_cannot_be_judged_is_counted_and_never_a_loss(episode: Make) -> None:
    candidate = [episode("a", "0.9"), episode("b", "0.9"), episode("c", "", finish=FinishReason.error)]
    baseline = [episode("a", "0.1"), episode("b", "0.1 refuse"), episode("c", "0.9")]
    judge = ByRule(lambda first, second: "refused" if "refuse" in second else float(first > second))
    rate = win_rate(candidate, baseline, judge)
    assert rate.value == 1.0 and rate.n == 1
    assert rate.not_judged == {"refused": 1, "broken_item": 1}
    assert rate.interval[0] < 0.5, "one win of one says little"
    overflow = [episode("a", "", finish=FinishReason.context)]
    with pytest.raises(BadInputError, match=r"none of 1 items.*context_overflow"):
        win_rate(overflow, [episode("a", "0.1")], GOLD)


def test_an_empty_answer_is_an_answer(episode: Make) -> None:
    rate = win_rate(
        [episode("a", "")], [episode("a", "0.1")], ByRule(lambda first, second: float(first > second))
    )
    assert rate.losses == 1


def test_a_signal_without_a_value_gives_its_reason(episode: Make) -> None:
    class Half:
        name, axis = "half", "overall"

        def score(self, episodes: Sequence[Episode]) -> Scores:
            reasons = tuple("context_overflow" if "x" in e.response_text() else None for e in episodes)
            return Scores(np.arange(len(episodes), dtype=float), reasons)

    rate = win_rate(
        [episode("a", "x"), episode("b", "z")], [episode("a", "y"), episode("b", "w")], SignalJudge(Half())
    )
    assert rate.not_judged == {"context_overflow": 1} and rate.n == 1


def test_answers_are_paired_in_order_and_leftovers_are_counted(episode: Make) -> None:
    candidate = [episode("a", "0.1"), episode("a", "0.2"), episode("z", "0.3")]
    baseline = [episode("a", "0.4"), episode("b", "0.5")]
    pairing = pair_by_prompt(candidate, baseline)
    assert [(a.response_text(), b.response_text()) for _, a, b in pairing.pairs] == [("0.1", "0.4")]
    assert pairing.unpaired == 3
    with pytest.raises(BadInputError, match="no prompt is common"):
        win_rate([episode("a", "1")], [episode("b", "1")], GOLD)


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan")])
def test_a_judge_that_returns_no_probability_is_refused(episode: Make, wrong: float) -> None:
    with pytest.raises(BadInputError, match="presentation"):
        win_rate([episode("a", "1")], [episode("a", "2")], ByRule(lambda first, second: wrong))


def test_the_interval_covers_and_rests_on_prompts(episode: Make) -> None:
    """Four answers a prompt that win or lose together: rows would claim twice the precision."""
    covered, runs = 0, 120
    for run in range(runs):
        rng = random.Random(run)
        fate = [rng.random() < 0.6 for _ in range(40)]
        candidate = [
            episode(f"q{i}", f"{0.9 if won else 0.1} c{j}") for i, won in enumerate(fate) for j in range(4)
        ]
        baseline = [episode(f"q{i}", f"0.5 b{j}") for i in range(40) for j in range(4)]
        rate = win_rate(candidate, baseline, GOLD, draws=500)
        covered += rate.interval[0] <= 0.6 <= rate.interval[1]
    assert covered / runs > 0.88
    assert rate.interval[1] - rate.interval[0] > 3 * math.sqrt(0.24 / 160)


def test_preference_judge_takes_sides_or_keeps_probabilities(episode: Make) -> None:
    class Lean:
        def prefer(self, a: Sequence[Episode], b: Sequence[Episode]) -> np.ndarray:
            return np.array(
                [0.8 if x.response_text() > y.response_text() else 0.3 for x, y in zip(a, b, strict=True)]
            )

    sides = [episode("a", "2")], [episode("a", "1")]
    assert win_rate(*sides, PreferenceJudge(Lean())).value == 1.0
    assert win_rate(*sides, PreferenceJudge(Lean(), hard=False)).value == pytest.approx((0.8 + 0.7) / 2)


def test_panel_judge_recovers_the_declared_rate_despite_a_shared_position_bias(episode: Make) -> None:
    annotators = tuple(
        SimulatedAnnotator(f"a{i}", Marked(), reliability=1.0, sharpness=10, position_bias=1.0)
        for i in range(3)
    )
    n = 400
    candidate = [episode(f"q{i}", "0.6 c") for i in range(n)]
    baseline = [episode(f"q{i}", "0.5 b") for i in range(n)]
    rate = win_rate(candidate, baseline, PanelJudge(Panel(annotators)))

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    value = (s(1 + 1) + s(1 - 1)) / 2
    position = (s(1 + 1) + s(-1 + 1)) / 2 - 0.5
    assert rate.value == pytest.approx(value, abs=4 * math.sqrt(0.25 / (6 * n)))
    assert rate.position_effect.value == pytest.approx(position, abs=4 * math.sqrt(0.25 / (6 * n)))
    silent = Panel((SimulatedAnnotator("a", Marked(), abstain=0.999999),))
    with pytest.raises(BadInputError, match="cannot_judge"):
        win_rate(candidate[:3], baseline[:3], PanelJudge(silent))
