"""Judgements as pairs with texts."""

from __future__ import annotations

import pytest
from store_examples import FIVE, T0, vote

from corrigible.errors import BadInputError
from corrigible.records import (
    Annotator,
    Consent,
    Edit,
    Feedback,
    Item,
    Message,
    NotJudged,
    NotJudgedReason,
    Ranking,
    Rating,
    Reaction,
    TargetRef,
    comparison,
)
from corrigible.store import Pair, Store, load_pairs

PROMPT = "Which is better?"


def judge(store: Store, chosen: str, rejected: str, who: str = "ada", **more: object) -> Feedback:
    prompt = more.pop("prompt", PROMPT)
    annotator = more.pop("annotator", Annotator(pseudonym=who, type="human"))
    record, items = comparison(prompt, chosen, rejected, annotator=annotator, **more)  # type: ignore[arg-type]
    store.add_feedback([record], items)
    return record


def sides(pair: Pair) -> tuple[str, str, float]:
    return (pair.chosen_text, pair.rejected_text, pair.p_chosen)


def test_a_comparison_becomes_a_pair_with_its_texts(store: Store) -> None:
    record = judge(store, "A", "B", task_id="topic", episodes=("run-a", "run-b"), criterion="tone")
    (pair,) = load_pairs(store)
    assert pair.prompt == (Message(role="user", content=PROMPT),)
    assert pair.chosen == (Message(role="assistant", content="A"),)
    assert pair.prompt_text == PROMPT
    assert sides(pair) == ("A", "B", 1.0)
    assert (pair.weight, pair.group, pair.criterion) == (1.0, "topic", "tone")
    assert (pair.annotators, pair.derived_from) == (("ada",), (record.id,))
    assert pair.chosen_ref == Item.of_text("A").sha256
    assert pair.rejected_ref == Item.of_text("B").sha256
    assert pair.prompt_ref == record.context
    assert (pair.chosen_episode, pair.rejected_episode) == ("run-a", "run-b")


def test_conversations(store: Store) -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
    ]
    judge(store, [{"role": "assistant", "content": "Yes."}], "No.", prompt=prompt)  # type: ignore[arg-type]
    (pair,) = load_pairs(store)
    assert [m.role for m in pair.prompt] == ["system", "user", "assistant", "user"]
    assert pair.prompt_text == "Be brief.\n\nHi\n\nHello.\n\nAnd?"
    assert sides(pair) == ("Yes.", "No.", 1.0)


def test_without_a_task_the_prompt_is_the_group(store: Store) -> None:
    first = judge(store, "A", "B")
    assert load_pairs(store)[0].group == first.context


def test_judgements_without_a_prompt(store: Store) -> None:
    judge(store, "A", "B", context=None)
    (pair,) = load_pairs(store)
    assert pair.prompt == () and pair.prompt_ref is None and pair.prompt_text == ""
    assert pair.group == f"item:{min(pair.chosen_ref, pair.rejected_ref)}"


def test_a_text_may_be_prompt_here_and_response_there(store: Store) -> None:
    echo = Item.of_text("B", "prompt")
    judge(store, "A", "B", context_item=echo)
    (pair,) = load_pairs(store)
    assert pair.prompt == (Message(role="user", content="B"),)
    assert pair.rejected == (Message(role="assistant", content="B"),)


def test_ties(store: Store) -> None:
    judge(store, "A", "B", tie=True)
    judge(store, "A", "C")
    assert [pair.p_chosen for pair in load_pairs(store)] == [0.5, 1.0]
    assert [sides(pair) for pair in load_pairs(store, ties="drop")] == [("A", "C", 1.0)]
    with pytest.raises(BadInputError, match="ties"):
        load_pairs(store, ties="win")  # type: ignore[arg-type]


def test_votes_are_merged_by_prompt_pair_and_criterion(store: Store) -> None:
    ids = [judge(store, "A", "B", who=name).id for name in ("ada", "bob")]
    ids.append(judge(store, "B", "A", who="cy").id)
    ids.append(judge(store, "B", "A", who="di", tie=True).id)
    judge(store, "B", "A", criterion="tone")
    judge(store, "B", "A", prompt="Another?")
    merged = load_pairs(store, aggregate=True)
    assert len(merged) == 3
    # Two votes and half a vote of four.
    assert sides(merged[0]) == ("A", "B", pytest.approx(2.5 / 4))
    assert merged[0].weight == 4.0
    assert merged[0].annotators == ("ada", "bob", "cy", "di")
    assert merged[0].derived_from == tuple(ids)
    assert [sides(pair) for pair in merged[1:]] == [("B", "A", 1.0)] * 2
    assert [pair.criterion for pair in load_pairs(store, aggregate=True, criterion="tone")] == ["tone"]


@pytest.mark.parametrize("votes_for_a", range(6))
def test_the_side_with_more_votes_is_the_chosen_one(store: Store, votes_for_a: int) -> None:
    for number in range(5):
        better, worse = ("A", "B") if number < votes_for_a else ("B", "A")
        judge(store, better, worse, who=f"p{number}")
    (pair,) = load_pairs(store, aggregate=True)
    share = votes_for_a / 5
    expected = ("A", "B", share) if share > 0.5 else ("B", "A", 1 - share)
    assert sides(pair) == (*expected[:2], pytest.approx(expected[2]))


def test_merging_one_half_sure_vote_for_the_other_side(store: Store) -> None:
    crowd = Annotator(pseudonym="crowd", type="human", groups=frozenset({"aggregate"}))
    judge(store, "A", "B", annotator=crowd, p_chosen=0.3)
    (pair,) = load_pairs(store, aggregate=True)
    assert sides(pair) == ("B", "A", pytest.approx(0.7))


def test_what_is_not_live_not_judged_or_not_consented_gives_no_pair(store: Store) -> None:
    withdrawn = judge(store, "A", "B")
    store.withdraw(withdrawn.id, by="ada")
    old = judge(store, "C", "D", created_at=T0)
    judge(store, "D", "C", supersedes=old.id)
    judge(store, "E", "F", consent=Consent(scope=frozenset({"eval"})))
    skipped = NotJudged(intended="comparison", reason=NotJudgedReason("skipped"))
    store.add_feedback(
        [Feedback.on(withdrawn.targets, skipped, annotator=withdrawn.annotator, context=withdrawn.context)]
    )
    assert [sides(pair) for pair in load_pairs(store)] == [("D", "C", 1.0)]
    assert [sides(pair) for pair in load_pairs(store, scope="eval")] == [("D", "C", 1.0), ("E", "F", 1.0)]


def test_every_kind_that_orders_gives_pairs(store: Store) -> None:
    ada = Annotator(pseudonym="ada", type="human")
    texts = [Item.of_text(t, "response") for t in ("one", "two", "three")]
    prompt = Item.of_text(PROMPT, "prompt")
    refs = [TargetRef.of(item) for item in texts]
    given = {"annotator": ada, "context": prompt.sha256}
    store.add_feedback(
        [
            Feedback.on(refs, Ranking(levels=((2,), (0, 1))), **given),  # type: ignore[arg-type]
            Feedback.on(refs[:1], Rating(value=5, scale=FIVE), **given),  # type: ignore[arg-type]
            Feedback.on(refs[1:2], Rating(value=2, scale=FIVE), **given),  # type: ignore[arg-type]
            Feedback.on(refs[1:2], Reaction(value=1), **given),  # type: ignore[arg-type]
        ],
        [prompt, *texts],
    )
    found = {(p.chosen_text, p.rejected_text, p.weight) for p in load_pairs(store)}
    assert found == {("three", "one", 0.5), ("three", "two", 0.5), ("one", "two", 1.0)}
    assert [sides(p) for p in load_pairs(store, kind="rating")] == [("one", "two", 1.0)]


def test_an_edit_is_better_than_what_it_edited(store: Store) -> None:
    before, after = Item.of_text("a smal step", "response"), Item.of_text("a small step", "response")
    edit = Edit(after=after.sha256, medium="text", ops=())
    store.add_feedback(
        [Feedback.on([TargetRef.of(before)], edit, annotator=Annotator(pseudonym="ada", type="human"))],
        [before, after],
    )
    assert [sides(p) for p in load_pairs(store)] == [("a small step", "a smal step", 1.0)]


def test_filters_are_passed_on(store: Store) -> None:
    judge(store, "A", "B", who="ada", task_id="t1")
    judge(store, "C", "D", who="bob", task_id="t2")
    assert [p.chosen_text for p in load_pairs(store, annotator="bob")] == ["C"]
    assert [p.chosen_text for p in load_pairs(store, task="t1")] == ["A"]
    assert load_pairs(store, campaign="none") == []
    with pytest.raises(BadInputError, match="No such filter"):
        load_pairs(store, who="ada")


def test_a_missing_text_is_named(store: Store) -> None:
    record, items = vote(1)
    store.add_feedback([record], items[:2])
    with pytest.raises(BadInputError, match=items[2].sha256):
        load_pairs(store)


def test_pictures_are_left_out_and_counted(store: Store, recorded_events: list[object]) -> None:
    judge(store, "A", "B")
    pictures = [Item.of_blob(store.blobs.put_bytes(b), "image", "image/png") for b in (b"1", b"2")]
    record = judge(store, "C", "D")
    shown = sorted((TargetRef.of(p) for p in pictures), key=lambda t: t.sha256)
    other = record.model_copy(
        update={"id": record.id[:-4] + "0000", "judgement_id": record.id, "targets": tuple(shown)}
    )
    store.add_feedback([other], pictures)
    assert [p.chosen_text for p in load_pairs(store)] == ["A", "C"]
    assert any("1 of 3 pairs" in getattr(event, "text", "") for event in recorded_events)
