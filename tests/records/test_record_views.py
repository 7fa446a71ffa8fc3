"""Views: the rows they give, by hand; consent, status and withdrawal for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_examples import PAYLOADS, make, sha, target

from corrigible.errors import BadInputError
from corrigible.records import Annotator, Consent, Feedback
from corrigible.records.views import (
    VIEWS,
    Reading,
    answer_beliefs,
    comparison_pairs,
    comparison_reactions,
    concept_penalties,
    edit_targets,
    implicit_signals,
    intervention_rows,
    outcome_pairs,
    outcome_rewards,
    pairs,
    project,
    ranking_pairs,
    rating_pairs,
    rating_reactions,
    reaction_pairs,
    segment_pairs,
    span_rewards,
    step_rewards,
    usable,
    verdict_pairs,
)

CONTEXT = sha("prompt")
WHO = {name: Annotator(pseudonym=name, type="human") for name in "abc"}


def rating(value: float | None, content: str, who: str = "a", **change: Any) -> Feedback:
    change = {"value": value, "na": value is None, **change}
    return make("rating", change, targets=[target(content)], context=CONTEXT, annotator=WHO[who])


# --- comparisons and rankings ---------------------------------------------------------------------


def test_comparison_pairs_by_hand() -> None:
    record = make("comparison", context=CONTEXT, task_id="t")
    (row,) = comparison_pairs(record)
    assert row.chosen == PAYLOADS["comparison"][0][0].sha256 and row.rejected != row.chosen
    assert (row.p_chosen, row.margin, row.weight, row.criterion) == (1.0, 2.0, 1.0, "helpfulness")
    assert (row.context, row.task_id, row.annotator) == (CONTEXT, "t", "ada")
    assert row.derived_from == (record.id,)
    for outcome in ("tie", "both_bad", "both_good"):
        tie = make("comparison", {"outcome": outcome, "strength": 0})
        assert [r.p_chosen for r in comparison_pairs(tie)] == [0.5]
        assert list(comparison_pairs(tie, ties="drop")) == []
    assert list(comparison_pairs(make("comparison", {"outcome": "incomparable", "strength": 0}))) == []


@pytest.mark.parametrize("outcome", ["first", "second", "tie"])
def test_a_stated_probability_is_the_soft_label_of_the_chosen(outcome: str) -> None:
    judge = Annotator(pseudonym="j", type="ai_judge")
    strength = 0 if outcome == "tie" else 1
    record = make("comparison", {"outcome": outcome, "strength": strength, "p_first": 0.8}, annotator=judge)
    (row,) = comparison_pairs(record)
    first_given = PAYLOADS["comparison"][0][0].sha256  # "first" in the order given to make
    p_of_first_given = row.p_chosen if row.chosen == first_given else 1 - row.p_chosen
    assert p_of_first_given == pytest.approx(0.8)
    if outcome != "tie":
        assert (row.chosen == first_given) == (outcome == "first")


@given(st.permutations(range(6)), st.integers(1, 6), st.integers(0, 6), st.sampled_from(["worse", "unknown"]))
def test_ranking_pairs_count_and_weigh_one(order: list[int], levels: int, unranked: int, tail: Any) -> None:
    ranked, rest = order[: 6 - unranked], order[6 - unranked :]
    levels = min(levels, len(ranked))
    if not ranked:
        return
    groups = [ranked[i::levels] for i in range(levels)]
    change = {"levels": groups, "unranked": rest, "tail": tail, "ok_until": None}
    record = make("ranking", change, targets=[target(f"r{i}") for i in range(6)])
    rows = list(ranking_pairs(record))
    sizes = [len(g) for g in groups] + ([len(rest)] if tail == "worse" else [])
    expected = sum(sizes[a] * sizes[b] for a in range(len(sizes)) for b in range(a + 1, len(sizes)))
    assert len(rows) == expected == len({(r.chosen, r.rejected) for r in rows})
    if rows:
        assert math.fsum(r.weight for r in rows) == pytest.approx(1.0)
    place = {target(f"r{i}").sha256: rank for rank, group in enumerate([*groups, rest]) for i in group}
    assert all(place[r.chosen] < place[r.rejected] for r in rows)  # names survive the sorting by hash


# --- likes and runs -------------------------------------------------------------------------------


def test_reaction_pairs_stay_within_annotator_and_prompt() -> None:
    def like(value: int, content: str, who: str = "a", context: str | None = CONTEXT) -> Feedback:
        return make(
            "reaction", {"value": value}, targets=[target(content)], context=context, annotator=WHO[who]
        )

    records = [
        like(1, "x"),
        like(-1, "y"),
        like(-1, "x"),  # of two minds: no pair with itself
        like(0, "z"),
        like(-1, "z", "b"),
        like(1, "w", context=None),
        like(-1, "v", context=sha("other prompt")),
    ]
    (row,) = reaction_pairs(records)
    assert (row.chosen, row.rejected, row.p_chosen) == (sha("x"), sha("y"), 1.0)
    assert row.derived_from == (records[0].id, records[1].id) and row.margin is None
    assert "within annotator" in row.assumption


def test_outcome_pairs_stay_within_verifier_and_prompt() -> None:
    def ran(content: str, name: str = "pytest", context: str = CONTEXT, **change: Any) -> Feedback:
        fields = {"verifier": {"name": name, "version": "8"}, "score": None, "range": None, **change}
        return make("outcome", fields, targets=[target(content)], context=context)

    records = [
        ran("x", passed=True),
        ran("y", passed=False),
        ran("z", passed=None, exit="crash"),
        ran("w", name="ruff", passed=True),
        ran("v", context=sha("other prompt"), passed=True),
        ran("u", passed=True, score=0.5),
    ]
    found = {(row.chosen, row.rejected, row.margin) for row in outcome_pairs(records)}
    assert found == {(sha("x"), sha("y"), 1.0), (sha("x"), sha("u"), 0.5), (sha("u"), sha("y"), 0.5)}
    assert {row.assumption for row in outcome_pairs(records)} == {"verifier exact"}


# --- ratings --------------------------------------------------------------------------------------


def test_rating_pairs_stay_within_annotator_prompt_criterion_and_scale() -> None:
    other_scale = {"scale": {"id": "other", "min": 1, "max": 5}}
    records = [
        rating(2, "x"),
        rating(4, "y"),
        rating(3, "z", "b"),
        rating(1, "z", criterion="tone"),
        rating(5, "z", **other_scale),
        rating(None, "w"),
        rating(5, "v", at=3),
        rating(2, "x"),
    ]
    rows = list(rating_pairs(records))
    assert {(r.chosen, r.rejected, r.margin) for r in rows} == {(sha("y"), sha("x"), 2.0)}
    assert sorted(r.derived_from for r in rows) == sorted(
        [(records[1].id, records[0].id), (records[1].id, records[7].id)]
    )
    assert all("within annotator" in r.assumption for r in rows)
    close = [rating(3, "x"), rating(3.5, "y")]
    assert len(list(rating_pairs(close))) == 1  # one step of the scale
    assert list(rating_pairs(close, min_gap=1.0)) == []
    nominal = {"scale": {"id": "n", "min": 0, "max": 9, "level": "nominal"}}
    assert list(rating_pairs([rating(1, "x", **nominal), rating(5, "y", **nominal)])) == []


def test_rating_reactions_use_the_annotators_own_median() -> None:
    lenient = [rating(v, f"l{v}", "a") for v in (4, 4.5, 5)]
    strict = [rating(v, f"s{v}", "b") for v in (1, 1.5, 2)]
    got = {(r.annotator, r.target): r.value for r in rating_reactions([*lenient, *strict])}
    assert got == {("a", sha("l4")): -1, ("a", sha("l5")): 1, ("b", sha("s1")): -1, ("b", sha("s2")): 1}


def test_comparison_reactions_by_hand() -> None:
    first, second = (t.sha256 for t in PAYLOADS["comparison"][0])

    def got(outcome: str, strength: int) -> dict[str, int]:
        record = make("comparison", {"outcome": outcome, "strength": strength})
        return {r.target: r.value for r in comparison_reactions(record)}

    assert got("first", 1) == {first: 1}
    assert got("second", 2) == {second: 1, first: -1}
    assert got("both_bad", 0) == {first: -1, second: -1}
    assert got("both_good", 0) == {first: 1, second: 1}
    assert got("tie", 0) == got("incomparable", 0) == {}


# --- corrections ----------------------------------------------------------------------------------


def test_edit_gives_a_pair_a_target_and_token_weights() -> None:
    record = make("edit")  # "the cat sat" -> "a cat sat"
    (pair,) = pairs([record])
    assert (pair.chosen, pair.rejected) == (sha("a cat sat"), sha("the cat sat"))
    (row,) = edit_targets(record, w_rest=0.25)
    assert row.target == sha("a cat sat") and row.changed == ((0, 1),)
    assert row.token_weights([(0, 0), (0, 1), (1, 5), (5, 9)]) == [0.25, 1.0, 0.25, 0.25]
    unchanged = make("edit", {"after": sha("the cat sat"), "ops": []})
    assert list(pairs([unchanged])) == []


def test_intervention_rows_by_hand() -> None:
    demo, bad, pair = list(intervention_rows(make("intervention"), window=3))
    assert (demo.steps.episode, demo.steps.start, demo.steps.stop) == ("child", 7, 9)  # type: ignore[union-attr]
    assert (bad.steps.episode, bad.steps.start, bad.steps.stop, bad.label) == ("parent", 7, 10, -1)  # type: ignore[union-attr]
    assert pair.chosen == demo.steps and (pair.rejected.start, pair.rejected.stop) == (7, 11)  # type: ignore[union-attr]
    words = make(
        "intervention",
        {"mode": "language", "command": "slower", "actions": None, "t_rewind": None, "branch": None,
         "t_take": 10, "t_recovered": None, "t_release": 10, "t_detect": 0},
    )  # fmt: skip
    assert list(intervention_rows(words)) == []  # nobody acted, and nothing came before


def test_spans_and_steps_become_rewards() -> None:
    (row,) = span_rewards(make("spans"))
    assert row.rewards == ((0, 3, -2.0),) and row.rest_known
    assert row.token_rewards([(0, 2), (2, 4), (4, 6)]) == ([-2.0, -2.0, 0], [True, True, True])
    (row,) = span_rewards(make("spans", {"exhaustive": False}))
    assert row.token_rewards([(0, 2), (4, 6)]) == ([-2.0, 0], [True, False])
    (steps,) = step_rewards(make("step_labels"))
    assert steps.rewards == ((0, 1.0), (1, 0.4), (3, -1.0))


def test_outcome_rewards_and_exit_policy() -> None:
    assert [r.reward for r in outcome_rewards(make("outcome"))] == [0.5]
    passed = make("outcome", {"score": None, "passed": True})
    assert [r.reward for r in outcome_rewards(passed)] == [1.0]
    crash = make("outcome", {"exit": "crash", "score": None, "passed": None})
    assert list(outcome_rewards(crash)) == []
    assert [r.reward for r in outcome_rewards(crash, on_error="zero")] == [0.0]


def test_verdicts_mix_over_principles() -> None:
    def verdict(principle: str, outcome: str, p: float | None = None) -> Feedback:
        change = {
            "principle": {"id": principle, "text_sha": sha(principle)},
            "outcome": outcome,
            "p": p,
            "orders": [outcome, outcome],
            "evidence": None,
        }
        return make("verdict", change)

    records = [verdict("kind", "first"), verdict("true", "second", 0.4), verdict("brief", "tie")]
    (row,) = verdict_pairs(records, weights={"kind": 1, "true": 3, "brief": 0})
    first = PAYLOADS["verdict"][0][0].sha256
    assert row.chosen == first and row.p_chosen == pytest.approx((1 + 3 * 0.4) / 4)
    assert row.derived_from == (records[0].id, records[1].id)
    (row,) = verdict_pairs(records[1:2])
    assert row.rejected == first and row.p_chosen == pytest.approx(0.6)


def test_segment_pairs() -> None:
    (row,) = segment_pairs(make("segment_preference"))
    assert (row.chosen.episode, row.rejected.episode) == ("e1", "e0")  # b won
    assert (row.chosen.start, row.chosen.stop, row.p_chosen) == (5, 30, 1.0)
    equal = make("segment_preference", {"outcome": "equal", "strength": 0})
    assert [r.p_chosen for r in segment_pairs(equal)] == [0.5]
    assert list(segment_pairs(equal, ties="drop")) == []


def test_answers_become_beliefs() -> None:
    rows = list(answer_beliefs(make("answer")))
    assert {r.slot for r in rows} == {"size", "price"} and all(math.isinf(r.likelihood_ratio) for r in rows)
    rows = list(answer_beliefs(make("answer"), error_rate=0.2))
    assert rows[0].likelihood_ratio == pytest.approx(4.0)
    assert rows[0].constraint.allows("m") and not rows[0].constraint.allows("s")
    with pytest.raises(BadInputError, match="error_rate"):
        list(answer_beliefs(make("answer"), error_rate=0.6))


def test_concept_penalty_by_hand() -> None:
    (row,) = concept_penalties(make("concept_correction"))
    got = row.penalty(np.array([1.0, -2.0, 3.0]), np.array([1.0, 1.0, 0.0]))
    assert got == pytest.approx(0.1 * (1 + 4))


# --- behaviour ------------------------------------------------------------------------------------


def test_behaviour_needs_an_interpreter_and_its_propensity() -> None:
    events = [
        make("implicit_event", {"event": e, "value": None, "delay_s": None, "seq": i}, propensity=p)
        for i, (e, p) in enumerate([("shown", 0.5), ("accepted", 0.01), ("rejected", None)])
    ]

    def accepted(session: Sequence[Feedback]) -> Iterable[Reading]:
        assert [r.payload.seq for r in session] == sorted(r.payload.seq for r in session)  # type: ignore[union-attr]
        for record in session:
            if record.payload.event in ("accepted", "rejected"):  # type: ignore[union-attr]
                yield Reading(record, 1.0, 0.9, "accept-v1")

    rows = list(implicit_signals(events[::-1], accepted))
    assert [(r.weight, r.rule_id, r.derived_from) for r in rows] == [(20.0, "accept-v1", (events[1].id,))]
    assert len(list(implicit_signals(events, accepted, unknown_propensity="unweighted"))) == 2
    assert list(pairs(events)) == []
    assert all(list(project(events, view)) == [] for view in VIEWS)


# --- consent, status, withdrawal ------------------------------------------------------------------

consents = st.builds(
    Consent,
    scope=st.frozensets(st.sampled_from(["train", "eval", "publish"])),
    retention_days=st.none() | st.integers(0, 3),
)
DAY = 86_400_000_000


@st.composite
def campaigns(draw: st.DrawFn) -> list[Feedback]:
    """Records of all kinds about the same few answers, with any consent and status, some superseded."""
    records: list[Feedback] = []
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(sorted(PAYLOADS)))
        earlier = [r.id for r in records]
        envelope: dict[str, Any] = {
            "consent": draw(consents),
            "status": draw(st.sampled_from(["live", "live", "live", "withdrawn", "superseded"])),
            "created_at": draw(st.integers(0, 2)) * DAY,
            "supersedes": draw(st.sampled_from([None, None, *earlier])),
            "context": CONTEXT,
        }
        change = {"value": draw(st.integers(1, 5))} if kind == "rating" else {}
        targets = [target(draw(st.sampled_from("xyz")))] if kind == "rating" else PAYLOADS[kind][0]
        records.append(make(kind, change, targets=targets, **envelope))
    return records


@given(campaigns(), st.sampled_from(sorted(VIEWS)), st.sampled_from(["train", "eval", "publish"]))
def test_no_row_without_consent_and_life(records: list[Feedback], view: str, scope: Any) -> None:
    at = 2 * DAY
    by_id = {r.id: r for r in records}
    replaced = {r.supersedes for r in records}
    for row in project(records, view, scope=scope, at=at):
        assert row.derived_from and row.assumption and row.weight > 0
        for record in (by_id[i] for i in row.derived_from):
            assert scope in record.consent.scope and record.status == "live" and record.id not in replaced
            days = record.consent.retention_days
            assert days is None or at < record.created_at + days * DAY


@given(campaigns(), st.data())
def test_withdrawing_a_record_removes_exactly_its_rows(records: list[Feedback], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(records))
    withdrawn = [r.model_copy(update={"status": "withdrawn"}) if r is gone else r for r in records]
    # The annotator's median and the mixture of verdicts are statistics of several records: there the rows of
    # the others may change their value, and they are tested by hand above.
    for view in sorted(set(VIEWS) - {"rating->reactions", "verdict->pairs"}):
        before = list(project(records, view, at=0))
        after = list(project(withdrawn, view, at=0))
        assert after == [row for row in before if gone.id not in row.derived_from]


def test_a_correction_takes_the_place_of_what_it_supersedes() -> None:
    old = make("reaction")
    new = make("reaction", {"value": 1}, supersedes=old.id)
    assert list(usable([old, new])) == list(usable([new, old])) == [new]
    assert list(usable(iter([old, new]), superseded=())) == [old, new]  # the store has sorted them out


def test_unknown_views_are_refused_by_name() -> None:
    with pytest.raises(BadInputError, match="ranking->pairs"):
        project([], "ranking->gold")
