"""Invariants that need the targets' content, episodes, or other records."""

from __future__ import annotations

from typing import Any

import pytest
from record_examples import make, sha, target

from corrigible.records import (
    Episode,
    Feedback,
    Item,
    Step,
    validate,
    validate_together,
)

ITEMS = {item.sha256: item for item in (Item.of_text(f"response {i}") for i in range(4))}


def rules(record: Feedback, episodes: dict[str, Episode] | None = None) -> list[str]:
    return [v.rule for v in validate(record, ITEMS, episodes)]


def episode(id: str, length: int, **fields: Any) -> Episode:
    return Episode(
        id=id, task="t", steps=tuple(Step(observation=(0.0,), action=(1.0,)) for _ in range(length)), **fields
    )


def test_spans_lie_within_the_text_in_code_points() -> None:
    text = "a😀é"  # 3 code points, 4 UTF-16 units, 7 bytes
    items = {sha(text): Item.of_text(text)}
    for end, expected in ((3, []), (4, ["span.range"])):
        spans = [{"start": 0, "end": end, "label": "wrong"}]
        record = make("spans", {"spans": spans}, targets=[target(text)])
        assert [v.rule for v in validate(record, items)] == expected
    assert [v.rule for v in validate(record, {})] == ["unresolved"]


def test_turn_spans_critiques_and_evidence() -> None:
    chat = Item.of_messages([{"role": "user", "content": "q"}], "response")
    for end, expected in ((1, []), (2, ["span.range"])):
        spans = [{"start": 0, "end": end, "unit": "turn", "label": "wrong"}]
        record = make("spans", {"spans": spans}, targets=[target(str(chat.text))])
        assert [v.rule for v in validate(record, {chat.sha256: chat})] == expected
    assert rules(make("critique")) == [] and rules(make("verdict")) == []
    long = [{"aspect": "a", "severity": 1, "span": {"start": 0, "end": 99}}]
    assert rules(make("critique", {"aspects": long})) == ["span.range"]


def test_demonstration_text_is_the_target() -> None:
    assert rules(make("demonstration")) == []
    assert rules(make("demonstration", {"text": "something else"})) == ["demonstration.text"]


@pytest.mark.parametrize(
    ("parent", "branch", "expected"),
    [
        (episode("parent", 11), episode("child", 9, parent="parent", branch_step=6), []),
        (episode("parent", 10), None, ["intervention.parent"]),
        (None, episode("child", 8, parent="parent", branch_step=6), ["intervention.branch"]),
        (None, episode("child", 9, parent="another", branch_step=6), ["intervention.branch"]),
        (None, episode("child", 9, parent="parent", branch_step=5), ["intervention.branch"]),
    ],
)
def test_intervention_times_fit_parent_and_branch(parent: Any, branch: Any, expected: list[str]) -> None:
    episodes = {e.id: e for e in (parent, branch) if e is not None}
    assert rules(make("intervention"), episodes) == expected


def test_segments_fit_their_episodes() -> None:
    env = {"spec": "s"}
    fine = {f"e{i}": episode(f"e{i}", 30, env=env) for i in range(2)}
    assert rules(make("segment_preference"), fine) == []
    assert rules(make("segment_preference"), {**fine, "e1": episode("e1", 29, env=env)}) == ["target.steps"]
    assert rules(make("segment_preference"), {**fine, "e1": episode("e1", 30)}) == ["segment.env"]
    assert rules(make("segment_preference", {"len_a": 20, "len_b": 20})) == ["segment.length"] * 2


def test_steps_exist() -> None:
    for length, expected in ((5, []), (4, ["step.range"])):
        record = make("step_labels", targets=[target("run", episode="e")])
        assert rules(record, {"e": episode("e", length)}) == expected
    rated = make("rating", {"at": 2}, targets=[target("run", episode="e", steps=(1, 3))])
    assert rules(rated, {"e": episode("e", 9)}) == ["step.range"]


# --- between records ------------------------------------------------------------------------------


def together(*records: Feedback) -> list[tuple[str, str]]:
    return [(v.rule, v.record) for v in validate_together(records)]


def event(name: str, seq: int, at: int, content: str = "s", session: str = "1") -> Feedback:
    fields = {"event": name, "seq": seq, "session": session, "value": None, "delay_s": None, "shown_set": []}
    return make("implicit_event", fields, targets=[target(content, "suggestion")], created_at=at)


def test_sessions_are_in_order_and_respond_to_what_was_shown() -> None:
    shown, accepted = event("shown", 0, 10), event("accepted", 1, 11)
    assert together(shown, accepted) == together(accepted, shown) == []
    assert together(accepted) == [("implicit.shown", accepted.id)]
    other = event("rejected", 2, 12, "another")
    assert together(shown, accepted, other) == [("implicit.shown", other.id)]
    elsewhere = event("accepted", 1, 11, session="2")
    assert together(shown, elsewhere) == [("implicit.shown", elsewhere.id)]
    again = event("clicked", 1, 12)
    assert together(shown, accepted, again) == [("implicit.seq", again.id)]


def test_click_rounds_are_contiguous_and_points_frozen() -> None:
    clicks = [make("click", {"round": r, "keypoint": k}) for r, k in ((0, 1), (0, 2), (1, 3))]
    assert together(*clicks) == []
    gap = make("click", {"round": 3, "keypoint": 4})
    assert together(*clicks, gap) == [("click.rounds", gap.id)]
    late = make("click", {"round": 1, "keypoint": 3})
    assert together(late) == [("click.rounds", late.id)]
    again = make("click", {"round": 2, "keypoint": 1})
    assert together(*clicks, again) == [("click.frozen", again.id)]
    undone = again.model_copy(update={"supersedes": clicks[0].id})
    assert together(clicks[1], clicks[2], clicks[0], undone) == []


def test_answers_do_not_contradict_earlier_live_ones() -> None:
    def answer(slots: dict[str, Any], at: int, **envelope: Any) -> Feedback:
        return make("answer", {"slots": slots}, created_at=at, **envelope)

    first = answer({"size": {"values": ["m", "l"]}}, 1)
    assert together(first, answer({"size": {"values": ["l"]}, "colour": {"values": ["red"]}}, 2)) == []
    clash = answer({"size": {"values": ["s"]}}, 2)
    assert together(clash, first) == [("answer.consistent", clash.id)]
    assert together(first, answer({"size": {"values": ["s"]}}, 2, supersedes=first.id)) == []
    assert together(first, answer({"size": {"values": ["s"]}}, 2, task_id="another")) == []
    excluded = answer({"size": {"excluded": ["m", "l"]}}, 2)
    assert together(first, excluded) == [("answer.consistent", excluded.id)]
    price = answer({"price": {"interval": [0, 5]}}, 1)
    dear = answer({"price": {"interval": [6, 9]}}, 2)
    assert together(price, dear) == [("answer.consistent", dear.id)]
    assert together(price, answer({"price": {"interval": [5, 9]}}, 2)) == []


def test_a_suggestion_has_its_edit() -> None:
    critique = make("critique")
    assert together(critique) == [("critique.suggestion", critique.id)]
    edit = make("edit", {"after": sha("better")})
    assert together(critique, edit) == [("critique.suggestion", critique.id)]
    same = edit.model_copy(update={"judgement_id": critique.judgement_id})
    assert together(critique, same) == []


def test_deterministic_verifiers_replay_identically() -> None:
    first, replay = make("outcome"), make("outcome", {"runtime_ms": 99})
    assert together(first, replay) == []
    other = make("outcome", {"score": 0.75}, created_at=2**60)
    assert together(first, other) == [("outcome.replay", other.id)]
    free = {"verifier": {"name": "judge", "version": "1"}}
    assert together(make("outcome", free), make("outcome", {**free, "score": 0.75})) == []


def test_an_adjudication_is_about_what_it_resolves() -> None:
    voted = make("comparison")
    gold = make("adjudication", {"resolves": [voted.id]})
    assert together(voted, gold) == []
    elsewhere = make("adjudication", {"resolves": [voted.id]}, targets=[target("x"), target("y")])
    assert together(voted, elsewhere) == [("adjudication.targets", elsewhere.id)]
    assert together(elsewhere) == []  # what it resolves is not here, so nothing can be said
