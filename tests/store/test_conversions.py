"""Any feedback to any learner: each conversion by hand, what it keeps, and the way back to the records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from store_examples import FIVE

from corrigible.errors import BadInputError
from corrigible.records import (
    KINDS,
    Adjudication,
    Annotator,
    Approval,
    Comparison,
    Consent,
    Critique,
    Demonstration,
    Edit,
    EditOp,
    Episode,
    Feedback,
    ImplicitEvent,
    Intervention,
    Item,
    Label,
    Message,
    Outcome,
    Principle,
    Ranking,
    Rating,
    Reaction,
    SegmentPreference,
    Span,
    Spans,
    Step,
    StepLabel,
    StepLabels,
    TargetRef,
    TestResult,
    Verdict,
    Verifier,
)
from corrigible.records.payloads import PayloadBase
from corrigible.records.views import Reading
from corrigible.store import Store, learnable, load_pairs, load_signals
from corrigible.store.conversions import (
    CONVERSIONS,
    FROM_RECORDS,
    IMPOSSIBLE,
    REASONS,
    SIGNALS,
    Content,
    Converted,
    Options,
    convert,
    convert_store,
    kinds_for,
    matrix_table,
)
from corrigible.store.conversions.corrections import weighted_spans

ADA = Annotator(pseudonym="ada", type="human")
BOB = Annotator(pseudonym="bob", type="human")
JUDGE = Annotator(pseudonym="judge", type="ai_judge")
PROMPT = Item.of_text("Which one?", "prompt")
KIND = Principle(id="kind", text_sha=Item.of_text("Be kind.").sha256)
PYTEST = Verifier(name="pytest", version="8")


class Said:
    """Records and the items they are about."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {PROMPT.sha256: PROMPT}
        self.records: list[Feedback] = []
        self.episodes: dict[str, Episode] = {}

    def item(self, text: str, type: str = "response") -> Item:
        item = Item.of_text(text, type)  # type: ignore[arg-type]
        self.items[item.sha256] = item
        return item

    def say(self, payload: PayloadBase, *texts: str, type: str = "response", **envelope: Any) -> Feedback:
        targets = [TargetRef.of(self.item(text, type)) for text in texts]
        return self.about(payload, targets, **envelope)

    def about(self, payload: PayloadBase, targets: list[TargetRef], **envelope: Any) -> Feedback:
        envelope = {"annotator": ADA, "context": PROMPT.sha256, "created_at": len(self.records)} | envelope
        record = Feedback.on(targets, payload, **envelope)
        self.records.append(record)
        return record

    def episode(self, name: str, *actions: str, parent: str | None = None, at: int | None = None) -> Episode:
        steps = tuple(
            Step(
                observation=(Message(role="user", content=f"Turn {n}"),),
                action=Message(role="assistant", content=action),
            )
            for n, action in enumerate(actions)
        )
        made = Episode(id=name, task="chat", steps=steps, parent=parent, branch_step=at)
        self.episodes[name] = made
        return made

    def content(self, options: Options | None = None) -> Content:
        beside = tuple(r for r in self.records if isinstance(r.payload, Critique | Edit | Demonstration))
        return Content(items=self.items, episodes=self.episodes, beside=beside, options=options or Options())

    def to(self, signal: str, options: Options | None = None) -> Converted:
        return convert(self.records, signal, self.content(options))

    def store(self, store: Store) -> Store:
        store.add_episodes(self.episodes.values())
        store.add_feedback(self.records, self.items.values())
        return store


@pytest.fixture
def said() -> Said:
    return Said()


def text(turn: Iterable[Message]) -> str:
    return " / ".join(message.text for message in turn)


def pair(one: Any) -> tuple[str, str, float]:
    return text(one.chosen), text(one.rejected), one.p_chosen


def label(one: Any) -> tuple[str, bool, float]:
    return text(one.response), one.desirable, round(one.weight, 9)


# -- the matrix --------------------------------------------------------------------------------------


def test_every_kind_and_signal_has_a_conversion_or_a_reason() -> None:
    cells = {(kind, signal) for kind in KINDS for signal in FROM_RECORDS}
    assert set(CONVERSIONS) | set(IMPOSSIBLE) == cells
    assert not set(CONVERSIONS) & set(IMPOSSIBLE)
    assert all(IMPOSSIBLE.values())
    assert all(c.assumes and c.keeps for c in CONVERSIONS.values())
    assert len(KINDS) == 20 and set(FROM_RECORDS) == set(SIGNALS) - {"groups"}
    for kind in KINDS:
        assert kind in kinds_for("labelled") or IMPOSSIBLE[kind, "labelled"]


def test_the_guide_holds_the_matrix(repository: Any) -> None:
    guide = (repository / "docs" / "guides" / "conversions.md").read_text(encoding="utf-8")
    assert matrix_table() in guide
    for reason, advice in REASONS.items():
        assert f"| `{reason}` | {advice} |" in guide


def test_signals_that_do_not_exist_or_are_not_made_of_records(store: Store) -> None:
    with pytest.raises(BadInputError, match="no signal 'pear'"):
        load_signals(store, "pear")
    with pytest.raises(BadInputError, match="not made of records"):
        load_signals(store, "groups")
    with pytest.raises(BadInputError, match="No such filter"):
        load_signals(store, "pairs", who="ada")
    with pytest.raises(BadInputError, match=r"kind 'click' give no pairs"):
        load_signals(store, "pairs", kind="click")
    with pytest.raises(BadInputError, match="ties"):
        load_signals(store, "pairs", ties="win")  # type: ignore[arg-type]


# -- choices -----------------------------------------------------------------------------------------


def outcome(said: Said, first: str, second: str, better: str, **more: Any) -> Feedback:
    """A comparison of two texts in which ``better`` wins, whatever the order of their hashes."""
    texts = sorted((first, second), key=lambda t: Item.of_text(t).sha256)
    wins = "first" if texts[0] == better else "second"
    p = more.pop("p", None)
    p_first = None if p is None else p if wins == "first" else 1 - p
    payload = Comparison(outcome=wins, p_first=p_first, strength=more.pop("strength", 1))  # type: ignore[arg-type]
    return said.say(payload, *texts, **more)


def test_a_comparison_as_every_signal(said: Said) -> None:
    record = outcome(said, "A", "B", "B", p=0.8, strength=2, annotator=JUDGE, rationale="A is rude.")
    (one,) = said.to("pairs").signals
    assert pair(one) == ("B", "A", pytest.approx(0.8))
    assert (one.margin, one.derived_from, one.prompt_text) == (2.0, (record.id,), "Which one?")
    assert {label(x) for x in said.to("labelled").signals} == {("B", True, 0.6), ("A", False, 0.6)}
    (ranked,) = said.to("ranked").signals
    assert [text(r) for r in ranked.responses] == ["B", "A"]
    assert (ranked.scores, ranked.weight) == ((2.0, 0.0), pytest.approx(0.6))
    (shown,) = said.to("demonstrations").signals
    assert (text(shown.response), shown.weight, shown.quality) == ("B", pytest.approx(0.6), "ai_judge")
    (critiqued,) = said.to("critiqued").signals
    assert (text(critiqued.draft), critiqued.critique, text(critiqued.refined)) == ("A", "A is rude.", "B")
    assert said.to("attempts").signals == []


def test_what_is_undecided_is_a_soft_label_or_is_named(said: Said) -> None:
    tie = said.say(Comparison(outcome="tie"), "A", "B")
    bad = said.say(Comparison(outcome="both_bad"), "A", "C")
    none = said.say(Comparison(outcome="incomparable"), "A", "D")
    found = said.to("pairs")
    assert [one.p_chosen for one in found.signals] == [0.5, 0.5]
    assert [(x.derived_from, x.reason) for x in found.left_out] == [((none.id,), "incomparable")]
    found = said.to("labelled")
    assert {label(x) for x in found.signals} == {("A", False, 1.0), ("C", False, 1.0)}
    assert {x.derived_from[0]: x.reason for x in found.left_out} == {tie.id: "tie", none.id: "incomparable"}
    assert said.to("demonstrations").reasons == {"tie": 1, "failed": 1, "incomparable": 1}
    assert bad.id in {x.derived_from[0] for x in said.to("demonstrations").left_out}


def place(said: Said, payload: dict[str, Any], *texts: str, **more: Any) -> Feedback:
    return said.say(Ranking(**payload), *texts, **more)


def test_a_ranking_keeps_ties_gaps_and_what_nobody_ranked(said: Said) -> None:
    record = place(said, {"levels": ((2,), (0, 1)), "unranked": (3,), "tail": "unknown"}, "a", "b", "c", "d")
    (ranked,) = said.to("ranked").signals
    scores = dict(zip(map(text, ranked.responses), ranked.scores, strict=True))
    assert (scores["c"], scores["a"], scores["b"]) == (2.0, 1.0, 1.0) and math.isnan(scores["d"])
    pairs = said.to("pairs").signals
    assert {(text(p.chosen), text(p.rejected), p.weight) for p in pairs} == {("c", "a", 0.5), ("c", "b", 0.5)}
    assert {label(x) for x in said.to("labelled").signals} == {
        ("c", True, 1.0),
        ("a", False, 1.0),
        ("b", False, 1.0),
    }
    assert [text(x.response) for x in said.to("demonstrations").signals] == ["c"]
    assert all(
        x.derived_from == (record.id,) for s in ("pairs", "labelled", "ranked") for x in said.to(s).signals
    )


def test_a_ranking_that_says_what_is_acceptable(said: Said) -> None:
    place(
        said,
        {"levels": ((0,), (1,), (2,)), "ok_until": 1, "unranked": (3,), "tail": "worse"},
        "a",
        "b",
        "c",
        "d",
    )
    assert {label(x) for x in said.to("labelled").signals} == {
        ("a", True, 1.0),
        ("b", True, 1.0),
        ("c", False, 1.0),
        ("d", False, 1.0),
    }
    assert {(text(x.response), x.weight) for x in said.to("demonstrations").signals} == {
        ("a", 0.5),
        ("b", 0.5),
    }
    (ranked,) = said.to("ranked").signals
    assert dict(zip(map(text, ranked.responses), ranked.scores, strict=True))["d"] == 0.0


def test_a_ranking_of_one_level_orders_nothing(said: Said) -> None:
    place(said, {"levels": ((0, 1, 2),)}, "a", "b", "c")
    for signal in ("pairs", "ranked", "labelled", "demonstrations"):
        assert said.to(signal).reasons == {"no_order": 1}, signal


def test_one_bad_answer_does_not_cost_a_ranking_its_others(said: Said) -> None:
    place(said, {"levels": ((0,), (1,), (2,))}, "a", "  ", "c")
    (ranked,) = said.to("ranked").signals
    assert {text(r) for r in ranked.responses} == {"a", "c"}
    assert said.to("ranked").reasons == {"empty_response": 1}
    assert [pair(p)[:2] for p in said.to("pairs").signals] == [("a", "c")]
    assert said.to("pairs").reasons == {"empty_response": 2}


# -- scores ------------------------------------------------------------------------------------------


def rate(said: Said, value: float | None, answer: str, **more: Any) -> Feedback:
    criterion = more.pop("criterion", "overall")
    return said.say(Rating(value=value, na=value is None, scale=FIVE, criterion=criterion), answer, **more)


def test_ratings_as_pairs_with_margins_as_scores_as_weights_and_as_labels(said: Said) -> None:
    ids = [rate(said, value, answer).id for value, answer in ((5, "a"), (2, "b"), (1, "c"), (2, "d"))]
    other, alone = rate(said, 4, "a", annotator=BOB), rate(said, 3, "x", context=None)
    unrated = rate(said, None, "y")
    found = said.to("pairs")
    assert {(*pair(p)[:2], p.margin) for p in found.signals} == {
        ("a", "b", 3.0),
        ("a", "c", 4.0),
        ("a", "d", 3.0),
        ("b", "c", 1.0),
        ("d", "c", 1.0),
    }
    reasons = {x.derived_from[0]: x.reason for x in found.left_out}
    assert reasons == {other.id: "group_of_one", alone.id: "no_prompt", unrated.id: "not_applicable"}
    (ranked,) = said.to("ranked").signals
    assert ranked.scores == (5.0, 2.0, 1.0, 2.0) and ranked.derived_from == tuple(ids)
    weights = {text(x.response): x.weight for x in said.to("demonstrations").signals}
    assert weights == {"a": 0.75, "b": 0.25, "d": 0.25, "x": 0.5}  # "c" is worth nothing; bob's "a" is apart
    assert said.to("demonstrations").reasons == {"failed": 1, "not_applicable": 1}


def test_ratings_that_are_all_equal_are_named(said: Said) -> None:
    for answer in "abc":
        rate(said, 4, answer)
    assert said.to("ranked").reasons == {"all_equal": 3}
    assert said.to("labelled").reasons == {"at_the_median": 3}
    assert said.to("pairs").signals == []


def test_an_answer_rated_twice_has_the_mean(said: Said) -> None:
    for value, answer in ((5, "a"), (3, "a"), (1, "b")):
        rate(said, value, answer)
    (ranked,) = said.to("ranked").signals
    assert ranked.scores == (4.0, 1.0) and len(ranked.derived_from) == 3


def test_reactions(said: Said) -> None:
    up = said.say(Reaction(value=1), "a")
    down = said.say(Reaction(value=-1, tags=("too long", "rude")), "b")
    back = said.say(Reaction(value=0), "c")
    lonely = said.say(Reaction(value=1), "d", annotator=BOB)
    (one,) = said.to("pairs").signals
    assert pair(one) == ("a", "b", 1.0) and set(one.derived_from) == {up.id, down.id}
    assert said.to("pairs").reasons == {"not_applicable": 1, "group_of_one": 1}
    assert {label(x) for x in said.to("labelled").signals} == {
        ("a", True, 1),
        ("b", False, 1),
        ("d", True, 1),
    }
    assert said.to("ranked").signals[0].scores == (1.0, -1.0)
    assert {text(x.response) for x in said.to("demonstrations").signals} == {"a", "d"}
    (critiqued,) = said.to("critiqued").signals
    assert critiqued.critique == "too long, rude"
    assert {back.id, lonely.id} == {x.derived_from[0] for x in said.to("pairs").left_out}


def test_outcomes_and_the_tries_they_judge(said: Said) -> None:
    failed = TestResult(name="adds", passed=False)
    said.say(Outcome(verifier=PYTEST, passed=False, score=0.25, range=(0, 1), tests=(failed,)), "try 1")
    said.say(Outcome(verifier=PYTEST, passed=True, score=1.0, range=(0, 1)), "try 2")
    crash = said.say(Outcome(verifier=PYTEST, exit="crash"), "try 3")
    remark = said.say(Critique(text="Forgot the carry."), "try 3")
    (one,) = said.to("pairs").signals
    assert (*pair(one), one.margin) == ("try 2", "try 1", 1.0, 0.75)
    assert {label(x) for x in said.to("labelled").signals} == {("try 1", False, 1.0), ("try 2", True, 1.0)}
    assert said.to("ranked").signals[0].scores == (0.25, 1.0)
    (tries,) = said.to("attempts").signals
    assert [t.right for t in tries.attempts] == [False, True, None]
    assert [t.feedback for t in tries.attempts] == ["Failed: adds.", "", "Forgot the carry."]
    assert (tries.attempts[2].error, remark.id in tries.derived_from) == ("crash", True)
    reasons = {one.derived_from[0]: one.reason for one in said.to("labelled").left_out}
    assert reasons == {remark.id: "undecided", crash.id: "undecided"}


def test_a_score_without_passed_is_soft_and_without_a_range_says_nothing(said: Said) -> None:
    said.say(Outcome(verifier=PYTEST, score=8, range=(0, 10)), "a")
    said.say(Outcome(verifier=PYTEST, score=8), "b")
    assert [label(x) for x in said.to("labelled").signals] == [("a", True, 0.6)]
    assert said.to("labelled").reasons == {"no_threshold": 1}


def test_two_runs_that_differ_could_not_be_checked(said: Said) -> None:
    for passed in (True, False):
        said.say(Outcome(verifier=PYTEST, passed=passed), "flaky")
    (tries,) = said.to("attempts").signals
    assert [t.right for t in tries.attempts] == [None] and len(tries.derived_from) == 2


STEPS = "2 + 2 = 4\n4 + 3 = 8\nSo 8."


def steps(*values: float, until: int | None = None, first: int | None = None) -> StepLabels:
    labels = tuple(StepLabel(i=i, value=value) for i, value in enumerate(values))
    return StepLabels(
        labels=labels, judged_until=len(values) - 1 if until is None else until, first_error=first
    )


def test_step_labels_divide_a_text_and_stop_at_the_first_error(said: Said) -> None:
    said.say(steps(1, -1, first=1, until=2), STEPS)
    (tries,) = said.to("attempts").signals
    (one,) = tries.attempts
    assert (one.steps, one.first_wrong, one.right) == (tuple(STEPS.split("\n")), 1, False)
    assert [label(x) for x in said.to("labelled").signals] == [(STEPS, False, 1.0)]
    (shown,) = said.to("demonstrations").signals
    assert shown.spans == ((len("2 + 2 = 4"), len(STEPS), 0.0),)


def test_step_labels_that_find_nothing_wrong_so_far(said: Said) -> None:
    said.say(steps(1, 0.9), STEPS)
    assert said.to("attempts").signals[0].attempts[0].right is None
    assert said.to("labelled").reasons == {"unfinished": 1}
    said.records.clear()
    said.say(steps(1, 0.9, 0.7), STEPS)
    assert [label(x) for x in said.to("labelled").signals] == [(STEPS, True, 0.4)]  # the least sure step
    assert said.to("demonstrations").signals[0].spans == ()
    said.records.clear()
    said.say(steps(1, 1, until=7), STEPS)
    assert said.to("attempts").reasons == {"no_steps": 1}


def test_verdicts(said: Said) -> None:
    def verdict(answer: str, outcome: str, p: float | None = None, **more: Any) -> Feedback:
        return said.say(Verdict(principle=KIND, outcome=outcome, p=p), answer, annotator=JUDGE, **more)  # type: ignore[arg-type]

    verdict("a", "complies", 0.9)
    verdict("b", "violates", 0.2, rationale="It mocks.")
    verdict("c", "unsure")
    assert {(*label(x), x.criterion) for x in said.to("labelled").signals} == {
        ("a", True, 0.8, "kind"),
        ("b", False, 0.6, "kind"),
    }
    assert said.to("labelled").reasons == {"undecided": 1}
    assert said.to("ranked").signals[0].scores == (0.9, 0.2)
    assert [t.right for t in said.to("attempts").signals[0].attempts] == [True, False]
    assert [(x.critique, x.weight) for x in said.to("critiqued").signals] == [
        ("It mocks.", pytest.approx(0.6))
    ]
    assert said.to("pairs").reasons == {"nothing_replaced": 3}
    both = Verdict(principle=KIND, outcome="first", p=0.75, single_order=True)
    record = said.say(both, "d", "e", annotator=JUDGE)
    (one,) = said.to("pairs").signals
    assert (text(one.chosen), one.p_chosen) == ("d", 0.75) or (text(one.chosen), one.p_chosen) == ("e", 0.75)
    assert one.derived_from == (record.id,)


def test_behaviour_needs_an_interpreter(said: Said) -> None:
    event = ImplicitEvent(event="accepted", session="s", seq=0)
    record = said.say(event, "code", type="suggestion", propensity=0.5)
    assert said.to("labelled").reasons == {"needs_interpreter": 1}
    options = Options(interpreter=lambda session: [Reading(e, 1.0, 0.8, "rule") for e in session])
    (one,) = said.to("labelled", options).signals
    assert label(one) == ("code", True, 2.0 * 0.6) and one.derived_from == (record.id,)


def test_approvals_and_labels(said: Said) -> None:
    other = said.item("mv build old", "action")
    instead = Approval(
        decision="alternative", alternative=other.sha256, reversible="never", risk=0.7, source="user"
    )
    said.say(instead, "rm -r build", type="action")
    assert [pair(x) for x in said.to("pairs").signals] == [("mv build old", "rm -r build", 1.0)]
    assert {label(x) for x in said.to("labelled").signals} == {
        ("rm -r build", False, 1.0),
        ("mv build old", True, 1.0),
    }
    said.say(Label(values=("sports",), action="confirm"), "They won 3:1.", context=None)
    shown = said.to("demonstrations").signals
    assert {(text(x.prompt), text(x.response)) for x in shown} == {
        ("Which one?", "mv build old"),
        ("They won 3:1.", "sports"),
    }


# -- corrections -------------------------------------------------------------------------------------


def edit(said: Said, before: str, after: str, *ops: EditOp, **more: Any) -> Feedback:
    fields = {name: more.pop(name) for name in ("final",) if name in more}
    return said.say(Edit(after=said.item(after).sha256, ops=ops, **fields), before, **more)


def test_an_edit_teaches_most_where_it_changed_something(said: Said) -> None:
    swap = EditOp(op="replace", at=(4, 7), before="cat", after="dog", intent="factual")
    record = edit(said, "the cat sat", "the dog sat", swap, rationale="It barks.", final=True)
    (shown,) = said.to("demonstrations").signals
    assert text(shown.response) == "the dog sat" and shown.spans == ((0, 4, 0.1), (7, 11, 0.1))
    assert [pair(x) for x in said.to("pairs").signals] == [("the dog sat", "the cat sat", 1.0)]
    (critiqued,) = said.to("critiqued").signals
    assert (text(critiqued.draft), critiqued.critique) == ("the cat sat", "It barks.")
    (tries,) = said.to("attempts").signals
    assert [(t.right, t.error) for t in tries.attempts] == [(False, "factual"), (True, "")]
    for signal in FROM_RECORDS:
        assert all(x.derived_from == (record.id,) for x in said.to(signal).signals), signal


def test_edits_that_teach_nothing_are_named(said: Said) -> None:
    edit(said, "same", "same")
    edit(said, "gone", " ")
    assert said.to("pairs").reasons == {"unchanged": 1, "empty_response": 1}
    assert said.to("attempts").reasons == {"no_mistake": 2}


def test_a_critique_finds_what_became_of_its_text(said: Said) -> None:
    record = said.say(Critique(text="Too long.", polarity=-1), "a long answer", "another")
    shorter = edit(said, "a long answer", "an answer")
    found = {text(x.draft): x for x in said.to("critiqued").signals}
    assert text(found["a long answer"].refined) == "an answer"
    assert found["a long answer"].derived_from == (record.id, shorter.id)
    assert found["another"].refined == () and found["another"].derived_from == (record.id,)
    assert {label(x) for x in said.to("labelled").signals} >= {("another", False, 1.0)}


def test_a_suggestion_is_the_refinement_and_is_told_once(said: Said) -> None:
    better = said.item("short")
    record = said.say(Critique(text="Too long.", suggestion=better.sha256), "long")
    same = edit(said, "long", "short", judgement_id=record.judgement_id)
    found = said.to("critiqued")
    assert [(x.critique, text(x.refined), x.derived_from) for x in found.signals] == [
        ("Too long.", "short", (record.id, same.id))
    ]
    assert [x.reason for x in found.left_out] == ["no_words"]  # the edit has none of its own
    assert len(said.to("pairs").signals) == 1


def test_an_edit_may_supersede_the_critique_that_asked_for_it(said: Said, store: Store) -> None:
    record = said.say(Critique(text="Wrong year."), "in 1990")
    fixed = edit(said, "in 1990", "in 1991", supersedes=record.id)
    said.store(store)
    (one,) = load_signals(store, "critiqued")
    assert (one.critique, text(one.draft), text(one.refined)) == ("Wrong year.", "in 1990", "in 1991")
    assert set(one.derived_from) == {record.id, fixed.id}


def test_spans_as_weights(said: Said) -> None:
    bad = Span(start=4, end=8, label="wrong", severity=3, note="it is a dog")
    said.say(Spans(spans=(bad,), exhaustive=True), "the cat sat")
    (shown,) = said.to("demonstrations").signals
    assert shown.spans == ((4, 8, 0.0),)
    (pushed,) = said.to("demonstrations", Options(bad_spans="push_down")).signals
    assert pushed.spans == ((4, 8, -1.0),)
    assert [label(x) for x in said.to("labelled").signals] == [("the cat sat", False, 1.0)]
    assert said.to("critiqued").signals[0].critique == "“cat ”: it is a dog"
    said.records.clear()
    said.say(Spans(spans=(Span(start=0, end=3, label="good", polarity=1),)), "the cat sat")
    assert said.to("demonstrations").signals[0].spans == ((3, 11, 0.5),)  # the rest is unknown
    said.records.clear()
    said.say(Spans(spans=(Span(start=0, end=99, label="wrong"),)), "short")
    assert said.to("demonstrations").reasons == {"out_of_range": 1}
    said.records.clear()
    said.say(Spans(spans=(Span(start=0, end=5, label="wrong"),)), "short")
    assert said.to("demonstrations").reasons == {"nothing_good": 1}


def test_overlapping_marks_give_disjoint_spans() -> None:
    marks = [(0, 6, 0.5), (4, 8, 0.0), (4, 5, 1.0)]
    assert weighted_spans(10, marks, 1.0) == ((0, 4, 0.5), (4, 8, 0.0))
    assert weighted_spans(3, [], 0.5) == ((0, 3, 0.5),)
    assert weighted_spans(3, [], 1.0) == ()


def test_demonstrations_by_text_and_by_episode(said: Said) -> None:
    said.say(Demonstration(source="expert", success=True), "like this")
    said.say(Demonstration(source="novice", success=False), "not like this")
    chat = said.episode("chat", "first", "second")
    target = TargetRef.of(said.item("second"), episode=chat.id)
    said.about(Demonstration(source="agent", episode=chat.id), [target])
    found = said.to("demonstrations")
    assert [(text(x.response), x.weight, x.quality) for x in found.signals] == [
        ("like this", 1.0, "expert"),
        ("first", 0.5, "agent"),
        ("second", 0.5, "agent"),
    ]
    assert [m.text for m in found.signals[2].prompt] == ["Turn 0", "first", "Turn 1"]
    assert found.reasons == {"failed": 1}
    assert {label(x) for x in said.to("labelled").signals} == {
        ("like this", True, 1.0),
        ("not like this", False, 1.0),
    }
    said.episodes.clear()
    assert said.to("demonstrations").reasons == {"failed": 1, "missing_episode": 1}


def test_an_intervention_in_a_text_episode(said: Said) -> None:
    said.episode("parent", "one", "wrong", "worse")
    said.episode("child", "one", "right", "good", parent="parent", at=0)
    target = TargetRef.of(said.item("run", "trajectory"), episode="parent")
    taken = Intervention(
        mode="takeover", t_detect=2, t_rewind=0, t_take=1, t_release=3, branch="child", reason="Off track."
    )
    record = said.about(taken, [target], context=None)
    (one,) = said.to("pairs").signals
    assert pair(one) == ("right", "wrong", 1.0) and [m.text for m in one.prompt] == [
        "Turn 0",
        "one",
        "Turn 1",
    ]
    assert {label(x) for x in said.to("labelled").signals} == {
        ("wrong", False, 0.5),
        ("worse", False, 0.5),
        ("right", True, 0.5),
        ("good", True, 0.5),
    }
    assert [text(x.response) for x in said.to("demonstrations").signals] == ["right", "good"]
    (critiqued,) = said.to("critiqued").signals
    assert (text(critiqued.draft), critiqued.critique, text(critiqued.refined)) == (
        "wrong",
        "Off track.",
        "right",
    )
    for signal in ("pairs", "labelled", "demonstrations", "critiqued"):
        assert all(x.derived_from == (record.id,) for x in said.to(signal).signals)


def test_an_intervention_in_control_is_left_out_by_name(said: Said) -> None:
    step = Step(observation=(0.0, 1.0), action=(0.5,))
    said.episodes["arm"] = Episode(id="arm", task="reach", steps=(step,) * 5)
    target = TargetRef.of(said.item("run", "trajectory"), episode="arm")
    said.about(Intervention(mode="takeover", t_detect=1, t_take=1, t_release=3), [target], context=None)
    assert said.to("demonstrations").reasons == {"not_text": 1}
    assert "control" in said.to("demonstrations").left_out[0].detail


def test_segments_of_text_episodes(said: Said) -> None:
    for name, answer in (("e1", "good"), ("e2", "bad")):
        said.episode(name, answer)
    targets = [
        TargetRef.of(said.item(f"segment {name}", "segment"), episode=name, steps=(0, 1))
        for name in ("e1", "e2")
    ]
    better = "a" if targets[0].sort_key < targets[1].sort_key else "b"
    given = sorted(targets, key=lambda t: t.sort_key)
    said.about(SegmentPreference(outcome=better, len_a=1, len_b=1, dt_s=1, view="state"), given, context=None)
    assert [pair(x) for x in said.to("pairs").signals] == [("good", "bad", 1.0)]


def test_an_adjudication_replaces_what_it_settles(said: Said) -> None:
    votes = [outcome(said, "A", "B", "A"), outcome(said, "A", "B", "B", annotator=BOB)]
    gold = votes[1].payload
    settled = said.about(
        Adjudication(resolves=tuple(v.id for v in votes), gold=gold),  # type: ignore[arg-type]
        list(votes[0].targets),
    )
    found = said.to("pairs")
    assert [(pair(x), x.derived_from) for x in found.signals] == [(("B", "A", 1.0), (settled.id,))]
    assert found.reasons == {"adjudicated": 2}
    assert {x.derived_from for x in said.to("labelled").signals} == {(settled.id,)}


# -- all together ------------------------------------------------------------------------------------


def everything(said: Said) -> Said:
    """A record of every kind that texts can give, some of them useless."""
    outcome(said, "A", "B", "A", rationale="Clearer.")
    said.say(Comparison(outcome="tie"), "A", "C")
    place(said, {"levels": ((0,), (1, 2))}, "r1", "r2", "r3")
    for value, answer in ((5, "A"), (3, "B"), (1, " ")):
        rate(said, value, answer)
    said.say(Reaction(value=1), "A", annotator=BOB)
    said.say(Reaction(value=-1), "B", annotator=BOB)
    said.say(Critique(text="Vague.", polarity=-1), "B")
    said.say(Spans(spans=(Span(start=0, end=1, label="odd"),), exhaustive=True), "B again")
    said.say(steps(1, 1, 1), STEPS)
    edit(said, "B", "B, better", EditOp(op="insert", at=(1, 1), after=", better"), rationale="Vague.")
    said.say(Demonstration(source="expert"), "D")
    said.say(Outcome(verifier=PYTEST, passed=True), "A")
    said.say(Outcome(verifier=PYTEST, passed=False), "B")
    said.say(Verdict(principle=KIND, outcome="complies"), "A", annotator=JUDGE)
    said.say(Label(values=("x",), action="confirm"), "A")
    said.say(ImplicitEvent(event="copied", session="s", seq=1), "A", propensity=None)
    said.say(Approval(decision="deny", reversible="maybe", risk=0.5, source="user"), "rm", type="action")
    return said


@pytest.mark.parametrize("signal", FROM_RECORDS)
def test_every_signal_leads_back_to_its_records_and_nothing_is_lost_or_doubled(
    said: Said, signal: str
) -> None:
    everything(said)
    found = said.to(signal)
    ids = {record.id for record in said.records if (record.kind, signal) in CONVERSIONS}
    used = {name for one in found.signals for name in one.derived_from}
    lost = {name for one in found.left_out for name in one.derived_from}
    extra = {r.id for r in said.records if r.kind in ("critique", "edit", "demonstration")}
    assert used <= ids | extra and ids <= used | lost
    assert found.signals and all(one.reason in REASONS for one in found.left_out)
    told = [repr(one) for one in found.signals]
    assert len(told) == len(set(told))
    assert all(one.weight > 0 and one.group and one.annotators for one in found.signals)
    # Taking one record away takes away what derives from it, and changes nothing else that is read alone.
    alone = {record.id for record in said.records if not _together(record.kind, signal)}
    gone = next((r for r in said.records if r.id in used and r.id in alone), None)
    if gone is not None:
        said.records.remove(gone)
        left = [repr(one) for one in said.to(signal).signals]
        assert left == [repr(one) for one in found.signals if gone.id not in one.derived_from]


def _together(kind: str, signal: str) -> bool:
    cell = CONVERSIONS.get((kind, signal))
    return cell is None or cell.together or kind in ("critique", "edit", "demonstration")


def test_a_store_gives_what_the_pure_conversion_gives(said: Said, store: Store) -> None:
    everything(said).store(store)
    for signal in FROM_RECORDS:
        assert sorted(map(repr, convert_store(store, signal).signals)) == sorted(
            map(repr, said.to(signal).signals)
        ), signal
    counts = learnable(store)
    assert counts["attempts"] == {
        "step_labels": 1,
        "edit": 1,
        "demonstration": 1,
        "verdict": 1,
        "outcome": 2,
    }
    assert set(counts) == set(FROM_RECORDS) and "click" not in counts["pairs"]


def test_pairs_are_those_of_load_pairs_and_more(said: Said, store: Store) -> None:
    outcome(said, "A", "B", "A")
    outcome(said, "A", "B", "A", annotator=BOB)
    place(said, {"levels": ((0,), (1,))}, "r1", "r2")
    said.store(store)
    assert load_signals(store, "pairs") == load_pairs(store)
    assert load_signals(store, "pairs", aggregate=True) == load_pairs(store, aggregate=True)


def test_margins_of_votes_are_averaged(said: Said, store: Store) -> None:
    outcome(said, "A", "B", "A", strength=3)
    outcome(said, "A", "B", "A", strength=1, annotator=BOB)
    outcome(said, "A", "B", "B", strength=1, annotator=JUDGE)
    (merged,) = load_signals(said.store(store), "pairs", aggregate=True)
    assert (pair(merged)[0], merged.margin, merged.weight) == ("A", 1.0, 3.0)


def test_votes_on_one_answer_are_balanced(said: Said, store: Store, recorded_events: list[Any]) -> None:
    for who in (ADA, BOB, JUDGE):
        said.say(Reaction(value=-1 if who is JUDGE else 1), "A", annotator=who)
    for who, value in ((ADA, 1), (BOB, -1)):
        said.say(Reaction(value=value), "B", annotator=who)
    said.store(store)
    assert len(load_signals(store, "labelled")) == 5
    (one,) = load_signals(store, "labelled", aggregate=True)
    assert label(one) == ("A", True, 1.0) and len(one.derived_from) == 3
    assert any("contradictory" in getattr(event, "message", "") for event in recorded_events)
    assert load_signals(store, "demonstrations", aggregate=True)[0].weight == 2.0


def test_what_is_not_live_or_not_consented_gives_nothing(said: Said, store: Store) -> None:
    kept, gone = outcome(said, "A", "B", "A"), outcome(said, "C", "D", "C")
    outcome(said, "E", "F", "E", consent=Consent(scope=frozenset({"eval"})))
    said.store(store).withdraw(gone.id, by="ada")
    for signal in ("pairs", "labelled", "ranked", "demonstrations"):
        assert {x.derived_from for x in load_signals(store, signal)} == {(kept.id,)}
    assert len(load_signals(store, "pairs", scope="eval")) == 2


def test_filters_criteria_and_ties(said: Said, store: Store) -> None:
    outcome(said, "A", "B", "A", task_id="t1")
    said.say(Comparison(outcome="tie"), "A", "C")
    rate(said, 5, "A", criterion="tone")
    rate(said, 1, "B", criterion="tone")
    said.store(store)
    assert len(load_signals(store, "pairs")) == 3
    assert len(load_signals(store, "pairs", ties="drop")) == 2
    assert [x.group for x in load_signals(store, "pairs", task="t1")] == ["t1"]
    assert [x.criterion for x in load_signals(store, "pairs", criterion="tone")] == ["tone"]
    assert [x.criterion for x in load_signals(store, "pairs", kind="rating")] == ["tone"]


def test_bad_records_are_counted_and_named_and_the_rest_goes_on(
    said: Said, store: Store, recorded_events: list[Any]
) -> None:
    outcome(said, "A", "B", "A")
    empty = outcome(said, "C", "", "C")
    lost = outcome(said, "E", "F", "E")
    image = Item.of_blob(store.blobs.put_bytes(b"pixels"), "image", "image/png")
    said.items[image.sha256] = image
    seen = sorted((TargetRef.of(image), TargetRef.of(said.item("G"))), key=lambda t: t.sort_key)
    said.about(Comparison(outcome="first"), seen)
    del said.items[Item.of_text("F").sha256]
    found = load_signals(said.store(store), "pairs")
    assert [pair(x)[:2] for x in found] == [("A", "B")]
    (alert,) = [e for e in recorded_events if getattr(e, "name", "") == "signals_left_out"]
    for part in (
        "3 records",
        "1 empty_response",
        empty.id,
        "1 missing_item",
        lost.id,
        "1 not_text",
        "image/png",
    ):
        assert part in alert.message


def test_labels_that_say_one_thing_only_are_said(
    said: Said, store: Store, recorded_events: list[Any]
) -> None:
    for answer in "ab":
        said.say(Reaction(value=1), answer)
    said.say(Comparison(outcome="tie"), "a", "c")
    said.store(store)
    assert len(load_signals(store, "labelled")) == 2
    assert len(load_signals(store, "pairs")) == 1
    named = {getattr(e, "name", ""): e for e in recorded_events}
    assert "All 2 labelled answers are good" in named["single_class"].message
    assert "'demonstrations'" in named["single_class"].message
    assert "ties" in named["labels_all_equal"].message


def test_the_texts_of_many_records_are_fetched_in_pages(
    said: Said, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corrigible.store.conversions import loading

    monkeypatch.setattr(loading, "PAGE", 3)
    for number in range(8):
        outcome(said, f"yes {number}", f"no {number}", f"yes {number}")
    assert len(load_signals(said.store(store), "pairs")) == 8
