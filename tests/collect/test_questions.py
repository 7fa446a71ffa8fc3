from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from corrigible.collect.questions import (
    Answer,
    Question,
    asked_key,
    question_key,
    questions_from_comparisons,
    questions_from_episodes,
)
from corrigible.errors import BadInputError
from corrigible.records import Annotator, Comparison, Feedback, Item, Message, NotJudgedReason, comparison

KIM = Annotator(pseudonym="kim", type="human")
PROMPT = (Message(role="user", content="Name a colour."),)


def question(a: str = "Red.", b: str = "Blue.") -> Question:
    return Question.between(PROMPT, Answer(Item.of_text(a, "response")), Answer(Item.of_text(b, "response")))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("outcome", ["first", "second"])
def test_the_record_names_the_text_that_was_chosen_on_screen(order, outcome) -> None:  # type: ignore[no-untyped-def]
    asked = question()
    record = asked.judged(outcome, order, annotator=KIM, channel="ui")
    chosen_on_screen = asked.shown(order)[0 if outcome == "first" else 1]
    assert isinstance(record.payload, Comparison)
    chosen_in_record = record.targets[0 if record.payload.outcome == "first" else 1]
    assert chosen_in_record.sha256 == chosen_on_screen.item.sha256
    assert record.presentation is not None and record.presentation.order == order
    assert record.payload.strength == 1


def test_which_side_is_called_a_does_not_matter() -> None:
    assert question("Red.", "Blue.") == question("Blue.", "Red.")
    assert question("Red.", "Blue.").key != question("Red.", "Green.").key


@pytest.mark.parametrize("outcome", ["tie", "both_bad", "both_good", "incomparable"])
def test_undecided_outcomes_have_no_strength_and_no_direction(outcome) -> None:  # type: ignore[no-untyped-def]
    for order in ((0, 1), (1, 0)):
        record = question().judged(outcome, order, annotator=KIM, channel="ui", strength=3)
        assert isinstance(record.payload, Comparison)
        assert (record.payload.outcome, record.payload.strength) == (outcome, 0)


def test_records_survive_a_round_trip_and_keep_lineage(episode) -> None:  # type: ignore[no-untyped-def]
    first, second = episode("q", "one answer"), episode("q", "another answer", policy="p2")
    (asked,) = questions_from_episodes([first, second])
    record = asked.judged("first", (0, 1), annotator=KIM, channel="ui", rationale="shorter")
    assert Feedback.from_json(record.to_json()) == record
    assert {target.episode for target in record.targets} == {first.id, second.id}
    assert record.policy is not None
    assert {ref.snapshot for ref in record.policy if ref} == {"p1", "p2"}
    assert all(ref is not None and ref.logprob == -0.75 for ref in record.policy)
    assert record.context == first.prompt_item().sha256
    assert {item.sha256 for item in asked.items()} >= {t.sha256 for t in record.targets} | {record.context}


def test_a_skip_is_a_reason_and_counts_as_asked() -> None:
    asked = question()
    record = asked.not_judged(NotJudgedReason.unsafe, (1, 0), annotator=KIM, channel="ui")
    assert record.payload is None and record.not_judged is not None
    assert asked_key(record) == question_key(asked)
    answered = asked.judged("tie", (1, 0), annotator=KIM, channel="ui")
    assert asked_key(answered) == question_key(asked)
    other = Question.between(PROMPT, *asked.answers, criterion="safety")
    assert question_key(other) not in {asked_key(record), asked_key(answered)}


def test_equal_sides_are_refused() -> None:
    with pytest.raises(BadInputError, match="same text"):
        question("Red.", "Red.")


def test_the_drawn_order_is_fair_and_depends_on_the_seed_only() -> None:
    orders = [question("x", f"y{i}").order(3) for i in range(2000)]
    share = Counter(orders)[(0, 1)] / 2000
    assert abs(share - 0.5) < 4 * (0.25 / 2000) ** 0.5
    assert orders == [question("x", f"y{i}").order(3) for i in range(2000)]
    assert orders != [question("x", f"y{i}").order(4) for i in range(2000)]


def test_pairs_use_every_answer_evenly_and_ignore_order_and_duplicates(episode) -> None:  # type: ignore[no-untyped-def]
    texts = ["a", "b", "c", "d", "d", "   "]
    episodes = [episode("q", text) for text in texts] + [episode("alone", "x"), episode("same", "y")]
    asked = questions_from_episodes(episodes, pairs_per_prompt=2)
    used = Counter(answer.text for q in asked for answer in q.answers)
    assert used == {"a": 1, "b": 1, "c": 1, "d": 1}
    again = questions_from_episodes(episodes[::-1], pairs_per_prompt=2)
    assert {q.key for q in asked} == {q.key for q in again}
    everything = questions_from_episodes(episodes, pairs_per_prompt=99)
    assert {frozenset(a.text for a in q.answers) for q in everything} == {
        frozenset(pair) for pair in combinations("abcd", 2)
    }
    with pytest.raises(BadInputError, match="pairs_per_prompt"):
        questions_from_episodes(episodes, pairs_per_prompt=0)


def test_stored_comparisons_can_be_asked_again_once() -> None:
    record, items = comparison("q", "good", "bad", annotator=KIM)
    twin, _ = comparison("q", "bad", "good", annotator=Annotator(pseudonym="lee", type="human"))
    lost, _ = comparison("unknown prompt", "good", "bad", annotator=KIM)
    asked = questions_from_comparisons([record, twin, lost], {item.sha256: item for item in items})
    assert len(asked) == 1
    assert {answer.text for answer in asked[0].answers} == {"good", "bad"}
    assert asked[0].prompt == (Message(role="user", content="q"),)
