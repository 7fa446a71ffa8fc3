"""The oracle: what annotators do must be what they declare, within binomial intervals."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from corrigible.collect.gold import HouseStyle
from corrigible.collect.questions import Answer, Order, Question
from corrigible.collect.simulated import Panel, SimulatedAnnotator
from corrigible.errors import BadInputError
from corrigible.records import Comparison, Feedback, Item, Message

PROMPT = (Message(role="user", content="q"),)
N = 4000


class Marked:
    """A gold preference that a text states itself: "0.3 ..." is worth 0.3."""

    name = "marked"

    def score(self, prompt: Any, text: str) -> float:
        return float(text.split()[0])

    def declaration(self) -> dict[str, object]:
        return {"gold": "marked"}


def questions(first: str, second: str, n: int = N) -> list[Question]:
    """n questions about answers of fixed gold and length, ``first`` and ``second`` as given."""
    return [
        Question.between(
            (Message(role="user", content=f"q{i}"),),
            Answer(Item.of_text(first, "response")),
            Answer(Item.of_text(second, "response")),
        )
        for i in range(n)
    ]


def order_showing(question: Question, text: str) -> Order:
    return (0, 1) if question.answers[0].text == text else (1, 0)


def chose_first(record: Feedback) -> bool:
    assert isinstance(record.payload, Comparison) and record.presentation and record.presentation.order
    return record.presentation.order.index(0 if record.payload.outcome == "first" else 1) == 0


def declared(
    gap: float,
    words: tuple[int, int],
    *,
    reliability: float,
    sharpness: float,
    position: float,
    length: float,
) -> float:
    """The model of the module's docstring, written again from the docstring."""

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    u = sharpness * gap + length * math.log((words[0] + 1) / (words[1] + 1))
    return reliability * s(u + position) + (1 - reliability) * s(position)


@pytest.mark.parametrize(
    ("first", "second", "annotator", "expected"),
    [
        ("0.6 a", "0.5 b", {}, declared(0.1, (2, 2), reliability=0.9, sharpness=10, position=0, length=0)),
        ("0.5 a", "0.6 b", {}, declared(-0.1, (2, 2), reliability=0.9, sharpness=10, position=0, length=0)),
        (
            "0.5 a", "0.5 b", {"position_bias": 0.8},
            declared(0, (2, 2), reliability=0.9, sharpness=10, position=0.8, length=0),
        ),
        (
            "0.5 a b c d e f g", "0.5 b", {"length_bias": 0.7},
            declared(0, (8, 2), reliability=0.9, sharpness=10, position=0, length=0.7),
        ),
        (
            "0.9 a", "0.1 b b b", {"reliability": 0.0, "position_bias": -1.0},
            declared(0.8, (2, 4), reliability=0.0, sharpness=10, position=-1, length=0),
        ),
        (
            "0.55 a b", "0.5 b", {"reliability": 0.7, "position_bias": 0.5, "length_bias": -0.4},
            declared(0.05, (3, 2), reliability=0.7, sharpness=10, position=0.5, length=-0.4),
        ),
    ],
)  # fmt: skip
def test_choice_rates_are_the_declared_ones(
    first: str, second: str, annotator: dict[str, float], expected: float
) -> None:
    who = SimulatedAnnotator("ann", Marked(), **{"reliability": 0.9, "sharpness": 10.0, **annotator})
    records = []
    for question in questions(first, second):
        order = order_showing(question, first)
        assert who.probability_first(question, order) == pytest.approx(expected)
        records.append(who.judge(question, order=order))
    rate = sum(map(chose_first, records)) / N
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / N)


def test_abstention_rate_and_reason() -> None:
    who = SimulatedAnnotator("ann", Marked(), abstain=0.2)
    reasons = Counter(
        record.not_judged.reason.value if record.not_judged else "judged"
        for record in map(who.judge, questions("0.4 a", "0.5 b"))
    )
    assert set(reasons) == {"judged", "cannot_judge"}
    assert abs(reasons["cannot_judge"] / N - 0.2) < 4 * math.sqrt(0.16 / N)


def test_judgements_depend_on_the_seed_and_never_on_call_order() -> None:
    who = SimulatedAnnotator("ann", Marked(), reliability=0.5, seed=3)
    asked = questions("0.4 a", "0.5 b", 200)

    def outcomes(annotator: SimulatedAnnotator, ordered: list[Question]) -> dict[str, Any]:
        records = {q.key: annotator.judge(q) for q in ordered}
        return {key: (r.payload, r.presentation and r.presentation.order) for key, r in records.items()}

    shuffled = random.Random(0).sample(asked, len(asked))
    assert outcomes(who, asked) == outcomes(who, shuffled)
    assert outcomes(who, asked) != outcomes(replace(who, seed=4), asked)
    assert outcomes(who, asked) != outcomes(replace(who, name="bob"), asked)
    again = [who.judge(asked[0], order=(0, 1), occasion=k).payload for k in range(40)]
    assert len(set(again)) == 2


def test_records_say_who_how_and_that_it_was_simulated() -> None:
    who = SimulatedAnnotator("ann", HouseStyle(), position_bias=0.4)
    record = who.judge(questions("0.4 a", "0.5 b", 1)[0])
    assert record.annotator.type == "simulated" and record.channel == "sim"
    declaration = who.declaration()
    assert record.annotator.version == declaration.sha256
    assert declaration.json_value()["position_bias"] == 0.4
    assert declaration.json_value()["gold"]["gold"] == "HouseStyle"
    assert record.effort is not None and record.effort.active_ms == 1500 + 250 * 4
    assert Feedback.from_json(record.to_json()) == record


def test_a_panel_balances_the_order_within_each_question_and_shares_the_work() -> None:
    panel = Panel(tuple(SimulatedAnnotator(f"a{i}", Marked()) for i in range(5)), seed=1)
    asked = questions("0.4 a", "0.5 b", 600)
    result = panel.judge(asked, votes=4)
    by_context: dict[str, list[Feedback]] = {}
    for record in result.records:
        by_context.setdefault(str(record.context), []).append(record)
    assert len(by_context) == 600
    for records in by_context.values():
        assert Counter(r.presentation.order for r in records if r.presentation) == {(0, 1): 2, (1, 0): 2}
        assert len({r.annotator.pseudonym for r in records}) == 4
    work = Counter(record.annotator.pseudonym for record in result.records)
    assert min(work.values()) > 0.9 * 2400 / 5
    stored = {item.sha256 for item in result.items}
    for record in result.records:
        assert {record.context, record.annotator.version, *(t.sha256 for t in record.targets)} <= stored


def test_an_odd_vote_still_starts_on_a_fair_side() -> None:
    panel = Panel((SimulatedAnnotator("a", Marked()),))
    result = panel.judge(questions("0.4 a", "0.5 b", 2000), votes=1)
    first = sum(r.presentation.order == (0, 1) for r in result.records if r.presentation)
    assert abs(first / 2000 - 0.5) < 4 * math.sqrt(0.25 / 2000)


def test_a_position_biased_panel_is_unbiased_on_balanced_votes() -> None:
    """The reason for balance: two votes in opposite orders cancel a shared bias on equal answers."""
    panel = Panel(tuple(SimulatedAnnotator(f"a{i}", Marked(), position_bias=2.0) for i in range(2)))
    result = panel.judge(questions("0.5 a", "0.5 b", 1500), votes=2)
    for_a = sum(
        (r.payload.outcome == "first") == (r.targets[0].sha256 == Item.of_text("0.5 a").sha256)
        for r in result.records
        if isinstance(r.payload, Comparison)
    )
    first = sum(map(chose_first, result.records))
    assert first / 3000 > 0.8
    assert abs(for_a / 3000 - 0.5) < 4 * math.sqrt(0.25 / 3000)


def test_judging_episodes_pairs_them_first(episode: Any) -> None:
    episodes = [episode(f"q{i}", f"0.{j} words", policy="p1") for i in range(3) for j in range(4)]
    result = Panel.demo(Marked()).judge_episodes(episodes, pairs_per_prompt=2, votes=3)
    assert (result.questions, len(result.records)) == (6, 18)
    assert result.judged + sum(result.not_judged.values()) == 18


def test_impossible_panels_are_refused() -> None:
    ann = SimulatedAnnotator("ann", Marked())
    with pytest.raises(BadInputError, match="different names"):
        Panel((ann, ann))
    with pytest.raises(BadInputError, match="different names"):
        Panel(())
    with pytest.raises(BadInputError, match="2 votes from a panel of 1"):
        Panel((ann,)).judge([], votes=2)
    with pytest.raises(BadInputError, match="reliability"):
        SimulatedAnnotator("x", Marked(), reliability=1.2)
    with pytest.raises(BadInputError, match="abstain"):
        SimulatedAnnotator("x", Marked(), abstain=1.0)
