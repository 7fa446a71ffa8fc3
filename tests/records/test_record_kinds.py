"""Each kind: a valid record survives JSON, and every invariant refuses what breaks it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from record_examples import PAYLOADS, PERSON, make, sha, target

from corrigible.errors import BadInputError
from corrigible.records import KINDS, Annotator, Feedback, Presentation
from corrigible.records.payloads import rule_atoms

GUIDE = (
    "comparison ranking rating reaction critique spans step_labels edit demonstration intervention "
    "segment_preference implicit_event verdict outcome concept_correction click label answer approval "
    "adjudication"
)


def test_the_twenty_kinds_of_the_vocabulary_are_here_and_documented() -> None:
    assert set(KINDS) == set(GUIDE.split()) == set(PAYLOADS)
    assert all((model.__doc__ or "").splitlines()[0].endswith(".") for model in KINDS.values())


@pytest.mark.parametrize("kind", PAYLOADS)
def test_json_round_trip(kind: str) -> None:
    record = make(kind, presentation=Presentation(layout="list", shown_at=5))
    assert record.kind == kind
    assert Feedback.from_json(record.to_json()) == record
    assert Feedback.from_json(record.to_json_text()) == record
    assert Feedback.from_json(json.dumps(record.to_json())).to_json_text() == record.to_json_text()
    assert json.loads(record.to_json_text()) == record.to_json()
    assert record.to_json()["kind"] == record.to_json()["payload"]["kind"] == kind


@pytest.mark.parametrize("kind", PAYLOADS)
def test_an_unknown_key_is_refused_by_name(kind: str) -> None:
    data = make(kind).to_json()
    data["payload"]["wibble"] = 1
    allowed = next(f.alias or n for n, f in KINDS[kind].model_fields.items() if n != "kind")
    for given in (data, json.dumps(data)):
        with pytest.raises(BadInputError, match=f"'wibble'.*{kind!r} may hold: kind, {allowed}"):
            Feedback.from_json(given)


_SPAN = {"start": 0, "end": 3, "label": "x"}
_EXEMPLARS = [sha(str(i)) for i in range(10)]

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("comparison", {"strength": 0}, "strength 0 with outcome 'first'"),
    ("comparison", {"outcome": "tie"}, "strength 2 with outcome 'tie'"),
    ("comparison", {"strength": 4}, "less than or equal to 3"),
    ("comparison", {"p_first": 0.7}, "p_first is for AI judges"),
    ("comparison", {"outcome": "left"}, "outcome"),
    ("comparison", {"criterion": ""}, "criterion"),
    ("ranking", {"levels": [[2], [2, 0]]}, "stands in two levels"),
    ("ranking", {"levels": [[2], [], [0, 1]]}, "at least 1"),
    ("ranking", {"unranked": [4]}, "must name every target"),
    ("ranking", {"levels": [[2], [0]]}, "must name every target"),
    (
        "ranking",
        {"levels": [[0], [1]], "unranked": [], "ok_until": None},
        "names 2 targets and the record has 4",
    ),
    ("ranking", {"ok_until": 2}, "ok_until 2 is no level"),
    ("rating", {"value": 3.3}, "not on scale 's'"),
    ("rating", {"value": 5.5}, "not on scale 's'"),
    ("rating", {"na": True}, "na goes without a value"),
    ("rating", {"value": None}, "na goes without a value"),
    ("rating", {"scale": {"id": "s", "min": 2, "max": 2}}, "is empty"),
    ("rating", {"at": -1}, "at"),
    ("reaction", {"value": 2}, "value"),
    ("critique", {"text": "  "}, "text"),
    ("critique", {"aspects": [{"aspect": "a", "severity": 4}]}, "severity"),
    ("critique", {"aspects": [{"aspect": "a", "severity": 1, "target": 2}]}, "about target 2"),
    ("critique", {"aspects": [{"aspect": "a", "severity": 1, "span": {"start": 2, "end": 2}}]}, "is empty"),
    ("spans", {"spans": [{"start": 3, "end": 3, "label": "wrong"}]}, "is empty"),
    ("spans", {"spans": [{"start": -1, "end": 3, "label": "wrong"}]}, "start"),
    ("spans", {"spans": [{"start": 0, "end": 3, "label": "odd"}]}, r"\['odd'\] are not in the label set"),
    ("spans", {"spans": [{"start": 0, "end": 3, "label": "wrong", "unit": "token"}]}, "tokenizer"),
    (
        "spans",
        {"spans": [{"start": 2, "end": 4, "label": "wrong"}, {"start": 0, "end": 3, "label": "wrong"}]},
        "overlap",
    ),
    ("step_labels", {"labels": [{"i": 1, "value": 1}, {"i": 1, "value": 1}]}, "increase strictly"),
    ("step_labels", {"labels": [{"i": 0, "value": -0.5}]}, "neither -1 nor"),
    ("step_labels", {"judged_until": 2}, "judged_until is 2"),
    ("step_labels", {"first_error": 1}, "needs the label -1"),
    ("step_labels", {"first_error": 2}, "needs the label -1"),
    (
        "step_labels",
        {"labels": [{"i": 0, "value": -1}, {"i": 3, "value": -1}]},
        "step 0 is wrong before first_error 3",
    ),
    ("edit", {"depth": 0}, "depth"),
    ("edit", {"ops": [{"op": "insert", "at": [0, 1], "after": "x"}]}, "an insert has start = end"),
    ("edit", {"ops": [{"op": "delete", "at": [2, 2], "before": ""}]}, "the others start < end"),
    ("edit", {"ops": [{"op": "delete", "at": [0, 2], "before": "the"}]}, "needs the 2 characters"),
    ("edit", {"ops": [{"op": "replace", "at": [0, 1], "before": "t"}]}, "needs the text 'after'"),
    ("edit", {"ops": [{"op": "link", "at": [0, 1], "after": "x"}]}, "operation on trees"),
    ("edit", {"ops": [{"op": "move", "at": [0, 1], "before": "t"}]}, "destination"),
    ("edit", {"ops": [{"op": "delete", "at": "/a"}]}, "not by paths"),
    ("edit", {"medium": "json"}, "not by character ranges"),
    ("edit", {"medium": "json", "ops": [{"op": "delete", "at": "a"}]}, "RFC 6901"),
    (
        "edit",
        {
            "medium": "json",
            "ops": [{"op": "delete", "at": "/a"}, {"op": "replace", "at": "/a/b", "after": 1}],
        },
        "overlap at '/a'",
    ),
    (
        "edit",
        {"medium": "json", "ops": [{"op": "delete", "at": "/a/10"}, {"op": "delete", "at": "/a/9"}]},
        "not sorted",
    ),
    (
        "edit",
        {
            "ops": [
                {"op": "delete", "at": [2, 3], "before": "e"},
                {"op": "delete", "at": [0, 1], "before": "t"},
            ]
        },
        "not sorted",
    ),
    (
        "edit",
        {
            "ops": [
                {"op": "delete", "at": [0, 2], "before": "th"},
                {"op": "delete", "at": [1, 3], "before": "he"},
            ]
        },
        "overlap",
    ),
    ("demonstration", {"episode": "e"}, "not both"),
    ("demonstration", {"source": "dog"}, "source"),
    ("intervention", {"t_rewind": 11}, "t_rewind 11 is after t_detect 10"),
    ("intervention", {"branch": None}, "new branch"),
    ("intervention", {"t_rewind": None}, "new branch"),
    ("intervention", {"t_rewind": None, "branch": None}, "times out of order: t_detect"),
    ("intervention", {"t_take": 5}, "times out of order: t_rewind"),
    ("intervention", {"t_recovered": 10}, "times out of order"),
    ("intervention", {"t_release": 7}, "times out of order"),
    ("intervention", {"actions": [[0.5, 1.0]]}, "needs 2 rows"),
    ("intervention", {"actions": [[0.5, 1.0], [1.0]]}, "differ in length"),
    ("intervention", {"actions": {"sha256": sha("a"), "dtype": "float32", "shape": [3, 2]}}, "needs 2 rows"),
    ("intervention", {"mode": "language"}, "needs its command"),
    ("segment_preference", {"outcome": "equal"}, "strength 1"),
    ("segment_preference", {"len_a": 24}, "allow_unequal"),
    ("segment_preference", {"dt_s": 0}, "dt_s"),
    ("implicit_event", {"value": 1.5}, "kept needs a value in"),
    ("implicit_event", {"value": None}, "kept needs a value in"),
    ("implicit_event", {"delay_s": None}, "kept needs delay_s"),
    ("implicit_event", {"delay_s": 20}, "delay_s"),
    ("implicit_event", {"event": "accepted"}, "delay_s goes with kept"),
    ("verdict", {"orders": ["first"]}, "both orders"),
    ("verdict", {"single_order": True}, "more entries"),
    ("verdict", {"outcome": "complies", "orders": None}, "a verdict about 1, not 2"),
    ("verdict", {"orders": ["first", "violates"]}, "mix verdicts"),
    ("outcome", {"passed": None, "score": None}, "needs passed or score"),
    ("outcome", {"score": 1.5}, "does not lie in the range"),
    ("outcome", {"exit": "crash", "score": None}, "passed must be null"),
    ("outcome", {"exit": "crash", "passed": None}, "has no score"),
    ("outcome", {"exit": "timeout", "score": None}, "on_timeout='unknown', so passed is None"),
    (
        "outcome",
        {
            "exit": "timeout",
            "score": None,
            "passed": None,
            "verifier": {"name": "v", "version": "1", "on_timeout": "fail"},
        },
        "so passed is False",
    ),
    ("concept_correction", {"rule": "duck(x) -> not lake(x)"}, r"\['lake'\].*concept bank"),
    ("concept_correction", {"rule": "forall x"}, "names no concept"),
    (
        "concept_correction",
        {"concept": {"id": "c", "name": "water", "pos": _EXEMPLARS[:4], "neg": _EXEMPLARS[5:]}},
        "4 different positive",
    ),
    (
        "concept_correction",
        {"concept": {"id": "c", "name": "water", "pos": _EXEMPLARS[:5], "neg": _EXEMPLARS[4:]}},
        "both positive and negative",
    ),
    ("click", {"xy": [[0.5, 1.01]]}, "xy"),
    ("click", {"xy": [[0.5, 0.5], [0.1, 0.1]]}, "takes 1 points, not 2"),
    ("click", {"keypoint": None}, "keypoint index"),
    ("click", {"tool": "box", "xy": [[0, 0], [1, 1]]}, "keypoint index"),
    ("click", {"tool": "polygon", "keypoint": None, "xy": [[0, 0], [1, 1]]}, "at least 3"),
    ("click", {"visible": 3}, "visible"),
    ("label", {"previous": ["sports"]}, "differs"),
    ("label", {"previous": None}, "needs a previous"),
    ("label", {"values": ["chess"]}, "not in the label set"),
    ("label", {"action": "out_of_scope"}, "without a value"),
    ("label", {"action": "confirm"}, "keeps the previous value"),
    ("label", {"action": "confirm", "values": None}, "needs a value"),
    ("answer", {"slots": {"a": {}}}, "holds values"),
    ("answer", {"slots": {"a": {"values": []}}}, "at least 1"),
    ("answer", {"slots": {"a": {"values": [3], "excluded": [3]}}}, "nothing satisfies"),
    ("answer", {"slots": {"a": {"values": [3], "interval": [4, 5]}}}, "nothing satisfies"),
    ("answer", {"slots": {"a": {"interval": [5, 4]}}}, "nothing satisfies"),
    ("answer", {"slots": None, "text": " "}, "fills a slot"),
    ("approval", {"alternative": None}, "names the alternative"),
    ("approval", {"decision": "approve"}, "names the alternative"),
    ("approval", {"risk": 1.5}, "risk"),
    ("approval", {"decision": "deny", "alternative": None, "executed_at": 5}, "was not executed"),
    ("adjudication", {"gold": {"kind": "comparison", "outcome": "tie", "strength": 1}}, "strength 1"),
    ("adjudication", {"gold": {"kind": "reaction", "value": 1}}, "does not fit 2 targets"),
    ("adjudication", {"gold": {"kind": "telepathy"}}, "telepathy"),
    ("adjudication", {"resolves": []}, "resolves"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    BROKEN,
    ids=[f"{k}-{'-'.join(c)}-{i}" for i, (k, c, _) in enumerate(BROKEN)],
)
def test_broken_invariant_is_named(kind: str, change: dict[str, Any], message: str) -> None:
    make(kind)  # the unchanged record is fine, so what follows is the change's doing
    with pytest.raises(BadInputError, match=message):
        make(kind, change)


@pytest.mark.parametrize("kind", PAYLOADS)
def test_number_and_type_of_targets(kind: str) -> None:
    given, model = PAYLOADS[kind][0], KINDS[kind]
    other = target("something else", "rule" if model.target_types else given[0].type, episode="other")
    if model.max_targets is not None:
        extra = [target(f"extra {i}", given[0].type, episode="x") for i in range(model.max_targets)]
        with pytest.raises(BadInputError, match=r"takes|does not fit|is a verdict"):
            make(kind, targets=[*given, *extra])
    if model.target_types:
        with pytest.raises(BadInputError, match="is about"):
            make(kind, targets=[*given[:-1], other])
    with pytest.raises(BadInputError):
        make(kind, targets=given[: model.min_targets - 1])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("rating", {"value": None, "na": True}),
        ("rating", {"scale": {"id": "s", "min": 0.1, "max": 0.7, "step": 0.1}, "value": 0.1 + 0.2}),
        ("spans", {"spans": []}),
        (
            "spans",
            {"spans": [{"start": 0, "end": 2, "label": "wrong"}, {"start": 2, "end": 3, "label": "wrong"}]},
        ),
        ("outcome", {"exit": "timeout", "passed": None, "score": None}),
        ("outcome", {"exit": "parse_error", "passed": None, "score": None}),
        ("demonstration", {"success": None}),
        (
            "intervention",
            {"t_rewind": None, "branch": None, "t_take": 10, "t_recovered": 11, "t_release": 12},
        ),
        ("intervention", {"mode": "language", "command": "slower", "actions": None}),
        ("label", {"action": "unsure", "values": None, "previous": None}),
        ("label", {"action": "confirm", "previous": ["sports"]}),
        ("answer", {"slots": None, "text": None, "unsure": True}),
        ("answer", {"slots": {"a": {"values": [True], "excluded": [1]}}}),
        ("verdict", {"orders": ["second"], "single_order": True}),
    ],
)
def test_the_edges_of_the_invariants_are_inside(kind: str, change: dict[str, Any]) -> None:
    record = make(kind, change)
    assert Feedback.from_json(record.to_json_text()) == record


def test_who_may_state_a_probability() -> None:
    judge = Annotator(pseudonym="j", type="ai_judge", version=sha("model+prompt"))
    panel = Annotator(pseudonym="p", type="human", groups=frozenset({"aggregate"}))
    for annotator in (judge, panel):
        assert make("comparison", {"p_first": 0.7}, annotator=annotator).payload is not None
    gold = {"gold": {"kind": "comparison", "outcome": "first", "strength": 1, "p_first": 0.7}}
    with pytest.raises(BadInputError, match="p_first"):
        make("adjudication", gold, annotator=PERSON)


def test_approval_before_execution() -> None:
    approve = {"decision": "approve", "alternative": None, "executed_at": 99}
    with pytest.raises(BadInputError, match="before the user approved"):
        make("approval", approve, created_at=100)
    assert make("approval", approve, created_at=99)
    assert make("approval", {**approve, "source": "policy"}, created_at=100)


def test_an_implicit_event_must_state_its_propensity_if_only_as_unknown() -> None:
    data = make("implicit_event").to_json()
    assert data["propensity"] is None
    del data["propensity"]
    with pytest.raises(BadInputError, match="states its propensity"):
        Feedback.from_json(data)


def test_an_intervention_needs_its_episode() -> None:
    with pytest.raises(BadInputError, match="episode's id"):
        make("intervention", targets=[target("run", "trajectory")])


def test_ranking_implies_the_pairs_of_the_oracle_formula() -> None:
    for m, k in itertools.product(range(2, 7), range(1, 7)):
        if k > m:
            continue
        change = {
            "levels": [[i] for i in range(k)],
            "unranked": list(range(k, m)),
            "tail": "worse",
            "ok_until": None,
        }
        record = make("ranking", change, targets=[target(f"r{i}") for i in range(m)])
        assert len(list(record.payload.strict_pairs())) == k * (k - 1) // 2 + k * (m - k)  # type: ignore[union-attr]


def test_intervention_phases() -> None:
    payload: Any = make("intervention").payload
    assert list(payload.discarded) == [7, 8, 9, 10]  # (t_rewind, t_detect] of the parent
    assert list(payload.recovery) == [7] and list(payload.correction) == [8]


@pytest.mark.parametrize(
    ("rule", "atoms"),
    [
        ("∀x (striped(x) ∧ ¬water(x) → zebra(x))", {"striped", "water", "zebra"}),
        ("forall x, y: near(x, y) and (big(x) or small(y)) implies safe", {"near", "big", "small", "safe"}),
        ("a & b", {"a", "b"}),
        ("exists z (p(f(z)))", {"p"}),
    ],
)
def test_rule_atoms(rule: str, atoms: set[str]) -> None:
    assert rule_atoms(rule) == atoms
