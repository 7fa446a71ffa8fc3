"""The envelope: targets, presentation, value or reason, unknown kinds, swap, restrict, errors."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from record_examples import PAYLOADS, PERSON, make, target

from corrigible.errors import BadInputError
from corrigible.records import (
    KINDS,
    Annotator,
    Comparison,
    Feedback,
    Item,
    NotJudged,
    NotJudgedReason,
    PolicyRef,
    Presentation,
    UnknownPayload,
    comparison,
    restrict,
    swap,
)
from corrigible.records.base import Record

JUDGE = Annotator(pseudonym="judge", type="ai_judge")


def chosen_text(record: Feedback, items: list[Item]) -> str:
    assert isinstance(record.payload, Comparison)
    winner = record.targets[0 if record.payload.outcome == "first" else 1].sha256
    return next(str(i.text) for i in items if i.sha256 == winner)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), st.floats(0, 1))
def test_comparison_keeps_the_winner_whatever_the_hashes(a: str, b: str, p: float) -> None:
    if a == b:
        with pytest.raises(BadInputError, match="equal"):
            comparison("q", a, b, annotator=PERSON)
        return
    shown = Presentation(order=(1, 0))  # the rejected one was shown first
    policy = (PolicyRef(snapshot="good"), None)
    record, items = comparison(
        "q", a, b, annotator=JUDGE, p_chosen=p, presentation=shown, policy=policy, episodes=("ea", "eb")
    )
    assert [t.sha256 for t in record.targets] == sorted(t.sha256 for t in record.targets)
    assert chosen_text(record, items) == a
    assert isinstance(record.payload, Comparison) and record.payload.p_first is not None
    index = 0 if record.payload.outcome == "first" else 1
    p_chosen = record.payload.p_first if index == 0 else 1 - record.payload.p_first
    assert p_chosen == pytest.approx(p, abs=1e-9)
    assert record.presentation is not None and record.presentation.order == (1 - index, index)
    assert record.policy is not None and record.policy[index] == PolicyRef(snapshot="good")
    assert record.targets[index].episode == "ea"
    assert record.context == items[0].sha256
    assert Feedback.from_json(record.to_json_text()) == record


def test_a_prompt_is_one_user_message_and_a_chat_response_is_messages() -> None:
    record, items = comparison("q", [{"role": "assistant", "content": "a"}], "b", annotator=PERSON)
    assert [(m.role, m.content) for m in items[0].messages()] == [("user", "q")]
    assert items[1].messages()[0].text == "a" and items[2].text == "b"
    assert record.judgement_id == record.id and record.kind == "comparison"


@pytest.mark.parametrize("outcome", ["tie", "both_bad", "both_good", "incomparable"])
def test_undecided_comparisons_have_no_strength(outcome: Any) -> None:
    record, _ = comparison("q", "a", "b", annotator=PERSON, outcome=outcome, strength=3)
    assert isinstance(record.payload, Comparison)
    assert (record.payload.outcome, record.payload.strength) == (outcome, 0)


@given(
    st.sampled_from(["first", "second", "tie", "both_bad", "both_good", "incomparable"]),
    st.none() | st.floats(0, 1),
    st.none() | st.permutations([0, 1]),
)
def test_swap_is_an_involution(outcome: Any, p: float | None, order: list[int] | None) -> None:
    shown = None if order is None else Presentation(order=tuple(order))
    targets = [target("x"), target("y")]
    record = Feedback.on(targets, Comparison(outcome=outcome, p_first=p), annotator=JUDGE, presentation=shown)
    mirror = swap(record)
    assert swap(mirror) == record and swap(mirror).to_json_text() == record.to_json_text()
    assert mirror.targets == record.targets
    assert isinstance(mirror.payload, Comparison) and isinstance(record.payload, Comparison)
    assert {mirror.payload.outcome, record.payload.outcome} in (
        [{"first", "second"}] if outcome in ("first", "second") else [{outcome}]
    )
    if p is not None:
        assert mirror.payload.p_first == pytest.approx(1 - p, abs=1e-9)
    if order is not None and outcome in ("first", "second"):

        def first_shown_won(r: Feedback) -> bool:
            assert r.presentation is not None and r.presentation.order is not None
            return r.presentation.order[0] == (0 if r.payload.outcome == "first" else 1)  # type: ignore[union-attr]

        assert first_shown_won(mirror) == first_shown_won(record)
    assert Feedback.from_json(mirror.to_json()) == mirror


@pytest.mark.parametrize("kind", ["verdict", "segment_preference", "critique", "adjudication"])
def test_swap_of_every_kind_about_two(kind: str) -> None:
    record = make(kind)
    assert swap(record) != record or kind == "adjudication"  # a tie is its own mirror
    assert swap(swap(record)) == record
    assert Feedback.from_json(swap(record).to_json()) == swap(record)


def test_swap_refuses_what_has_no_mirror() -> None:
    with pytest.raises(BadInputError, match="no mirror"):
        swap(make("reaction"))


def test_value_or_reason() -> None:
    skipped = NotJudged(intended="comparison", reason=NotJudgedReason.timeout, detail="60 s")
    record = Feedback.on([target("a"), target("b")], skipped, annotator=PERSON)
    assert record.kind == "comparison" and record.payload is None
    assert Feedback.from_json(record.to_json_text()) == record
    for both in ({}, {"payload": Comparison(outcome="first"), "not_judged": skipped}):
        with pytest.raises(ValidationError, match="exactly one"):
            Feedback(targets=record.targets, annotator=PERSON, **both)
    with pytest.raises(ValidationError, match="reason"):
        NotJudged(intended="rating", reason="because")


def test_every_optional_field_may_be_left_out() -> None:
    """Records are written without their Nones, so a None that is not a default could not be read back."""
    seen: set[type] = set()
    queue: list[type[Record]] = [Record]
    while queue:
        model = queue.pop()
        queue += model.__subclasses__()
        if model in seen:
            continue
        seen.add(model)
        for name, field in model.model_fields.items():
            if type(None) in get_args(field.annotation):
                assert not field.is_required() and field.default is None, f"{model.__name__}.{name}"
    assert len(seen) > 40


# --- envelope invariants --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "not-a-uuid"}, "id"),
        ({"presentation": {"order": [0, 0]}}, "no permutation"),
        ({"presentation": {"order": [0]}}, "no permutation"),
        ({"created_at": 4, "presentation": {"shown_at": 5}}, "before presentation.shown_at"),
        ({"confidence": 1.2}, "confidence"),
        ({"propensity": 0.0}, "propensity"),
        ({"policy": [{"snapshot": "p"}]}, "policy names 1 of 2"),
        ({"kind": "ranking"}, "says kind 'ranking' and its payload 'comparison'"),
        ({"consent": {"scope": ["everything"]}}, "consent.scope"),
        ({"effort": {"clicks": -1}}, "effort.clicks"),
        ({"effort": {"tea": 1}}, "'tea'.*Effort may hold: active_ms"),
        ({"annotator": {"type": "human"}}, "annotator.pseudonym"),
        ({"channel": "pigeon"}, "channel"),
        ({"context": "abc"}, "context"),
        ({"targets": []}, "targets"),
        ({"colour": "red"}, "'colour'.*Feedback may hold"),
        ({"payload": {"outcome": "first", "kind": 7}}, "payload"),
        ({"payload": None}, "exactly one"),
        ({"created_at": float("nan")}, "created_at"),
    ],
)
def test_broken_envelope_is_named(change: dict[str, Any], message: str) -> None:
    data = make("comparison").to_json()
    assert Feedback.from_json(data)
    with pytest.raises(BadInputError, match=message):
        Feedback.from_json({**data, **change})


def test_targets_are_in_hash_order() -> None:
    record = make("comparison")
    data = record.to_json()
    data["targets"].reverse()
    with pytest.raises(BadInputError, match="ordered by content hash"):
        Feedback.from_json(data)
    with pytest.raises(BadInputError, match="supersede itself"):
        Feedback.from_json({**record.to_json(), "supersedes": record.id})


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"id": }', b"\xff\xfe", "[" * 100_000, '{"a": "\\ud800"}']
)
def test_what_is_no_record_is_refused_with_a_reason(text: str | bytes) -> None:
    with pytest.raises(BadInputError):
        Feedback.from_json(text)


def test_records_are_frozen_and_equal_ones_have_equal_bytes() -> None:
    record = make("comparison")
    with pytest.raises(ValidationError, match="frozen"):
        record.status = "withdrawn"  # type: ignore[misc]
    groups = frozenset("abcdefgh")
    texts = {
        Annotator(pseudonym="p", type="human", groups=frozenset(order)).to_json_text()
        for order in ("abcdefgh", "hgfedcba")
    }
    assert len(texts) == 1 and json.loads(texts.pop())["groups"] == sorted(groups)


def test_a_payload_may_leave_its_kind_to_the_envelope() -> None:
    data = make("reaction").to_json()
    del data["payload"]["kind"]
    assert isinstance(Feedback.from_json(data).payload, KINDS["reaction"])
    assert isinstance(Feedback.from_json(json.dumps(data)).payload, KINDS["reaction"])
    assert "kind" not in data["payload"]  # the caller's object is left alone


# --- unknown kinds --------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_unknown_kinds_survive_to_the_byte(data: dict[str, Any], ascii_only: bool, indent: Any) -> None:
    envelope = make("reaction").to_json()
    payload = json.dumps({**data, "kind": "telepathy"}, ensure_ascii=ascii_only, indent=indent)
    try:
        payload.encode()
    except UnicodeEncodeError:
        return
    head = json.dumps({**envelope, "kind": "telepathy", "payload": 0}, separators=(",", ":"))[:-2]
    text = f"{head}{payload}}}"
    if "\\ud" in text:
        return  # an escaped lone surrogate is JSON but no text; it is refused, see above
    record = Feedback.from_json(text)
    assert isinstance(record.payload, UnknownPayload) and record.kind == "telepathy"
    assert record.payload.data == {k: v for k, v in data.items() if k != "kind"}
    assert record.to_json_text() == text
    again = Feedback.from_json(record.to_json())
    assert again.to_json() == record.to_json() == json.loads(text)


def test_numbers_of_an_unknown_payload_keep_their_spelling() -> None:
    text = make("reaction").to_json_text()
    odd = '{ "kind":"telepathy", "x":1.10, "y":1e5,\n"z":123456789012345678901234567890, "k":"\\u00e9" }'
    text = text[: text.index('"payload":')].replace("reaction", "telepathy") + f'"payload":{odd}}}'
    assert Feedback.from_json(text).to_json_text() == text
    assert Feedback.from_json(text.encode()).to_json_text() == text


def test_an_unknown_payload_made_here() -> None:
    record = Feedback.on([target("a")], UnknownPayload.of("telepathy", {"x": 1}), annotator=PERSON)
    assert Feedback.from_json(record.to_json_text()) == record == Feedback.from_json(record.to_json())
    with pytest.raises(BadInputError, match="'outlook'"):  # the envelope is ours, whatever the kind
        Feedback.from_json({**record.to_json(), "outlook": 1})


# --- restrict -------------------------------------------------------------------------------------


def test_restrict_keeps_what_is_said_on_a_criterion() -> None:
    record = make("comparison")
    assert restrict(record, "helpfulness") is record and restrict(record, "overall") is None
    assert restrict(make("reaction"), "overall") is not None and restrict(make("reaction"), "facts") is None
    verdict = make("verdict")
    assert restrict(verdict, "P1") is verdict and restrict(verdict, "P2") is None
    two = [{"aspect": "facts", "severity": 3}, {"aspect": "tone", "severity": 1}]
    critique: Any = restrict(make("critique", {"aspects": two}), "tone")
    assert [a.aspect for a in critique.payload.aspects] == ["tone"]
    spans: Any = restrict(make("spans"), "wrong")
    assert len(spans.payload.spans) == 1 and restrict(make("spans"), "right") is None


@pytest.mark.parametrize("kind", PAYLOADS)
def test_restrict_never_invents(kind: str) -> None:
    assert restrict(make(kind), "no such criterion") is None
