"""Rankings as training examples: what is kept of them, what is left out and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from corrigible.align import RankedSource, Unusable
from corrigible.errors import BadInputError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models import LanguagePolicy, generate, to_episode
from corrigible.records import Message, PolicyVersion, Sampling
from corrigible.store.signals import Ranked

NAN = math.nan


def said(text: str, role: str = "assistant") -> tuple[Message, ...]:
    return (Message.model_validate({"role": role, "content": text}),)


def ranked(prompt: str, *answers: str, scores: tuple[float, ...] | None = None, **changes: Any) -> Ranked:
    fields: dict[str, Any] = {
        "prompt": said(prompt, "user"),
        "responses": tuple(said(text) for text in answers),
        "scores": scores or tuple(float(-i) for i in range(len(answers))),
        "weight": 1.0,
        "group": prompt,
        "annotators": ("ada",),
        "derived_from": (f"record of {prompt}",),
    }
    return Ranked(**(fields | changes))


def alerts(make: Callable[[], object]) -> dict[str, str]:
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        make()
    return {event.name: event.message for event in seen if isinstance(event, Alert)}


def test_answers_share_their_prompt_and_keep_their_scores(policy: LanguagePolicy) -> None:
    signal = ranked("Why?", "one", "two words", "three", scores=(3.0, 1.0, 3.0), weight=2.0)
    source = RankedSource([signal], policy.renderer)
    (example,) = source.examples
    assert example.scores == (3.0, 1.0, 3.0) and example.weight == 2.0 and example.group == "Why?"
    for answer, row in zip(signal.responses, example.rows, strict=True):
        assert policy.renderer.pair(signal.prompt, answer).ids[: len(row)] == row.ids
    start = example.rows[0].scored[0]
    assert {row.ids[:start] for row in example.rows} == {example.rows[0].ids[:start]}
    assert source.derived_from() == ["record of Why?"] and source.ranked == [signal]
    assert all(math.isnan(value) for value in example.logq) and source.proposal_unknown == 3


def test_a_long_ranking_loses_the_same_prompt_tokens_everywhere(policy: LanguagePolicy) -> None:
    whole = RankedSource([ranked("x" * 60, "a", "b" * 30)], policy.renderer).examples[0]
    cut = RankedSource([ranked("x" * 60, "a", "b" * 30)], policy.renderer, max_length=64).examples[0]
    assert max(map(len, cut.rows)) == 64 and cut.prompt_tokens_cut > 0
    for short, full in zip(cut.rows, whole.rows, strict=True):
        assert short.ids[0] == full.ids[0]  # where a text begins stays
        assert short.ids[1:] == full.ids[1 + cut.prompt_tokens_cut :]


def test_an_unjudged_answer_and_a_doubled_one_are_left_out_of_their_ranking(policy: LanguagePolicy) -> None:
    signal = ranked("A?", "a", "b", "a", "c", scores=(1.0, NAN, 2.0, 0.0))
    source = RankedSource([signal], policy.renderer)
    assert source.examples[0].scores == (1.5, 0.0)  # both scores of "a" count
    assert source.skipped == {"no_score": 1, "duplicate_answer": 1}
    found = alerts(lambda: RankedSource([signal], policy.renderer))
    assert found["answers_skipped"] == "Left out of training: 1 duplicate_answer, 1 no_score."


@pytest.mark.parametrize(
    ("reason", "bad"),
    [
        ("one_answer", ranked("B?", "b")),
        ("one_answer", ranked("B?", "b", "c", scores=(1.0, NAN))),
        ("one_answer", ranked("B?", "b", "b", scores=(1.0, 0.0))),  # both sides identical
        ("no_order", ranked("B?", "b", "c", scores=(2.0, 2.0))),
        ("bad_weight", ranked("B?", "b", "c", weight=NAN)),
        ("bad_score", ranked("B?", "b", "c", scores=(1.0, math.inf))),
        ("bad_score", ranked("B?", "b", "c", scores=(1.0, 2.0, 3.0))),
    ],
)
def test_an_unusable_ranking_names_its_record_the_reason_and_what_to_do(
    policy: LanguagePolicy, reason: str, bad: Ranked
) -> None:
    good = ranked("A?", "yes", "no")
    with pytest.raises(Unusable, match=f"^{reason}: ranking 1 of 2 from record record of B") as caught:
        RankedSource([good, bad], policy.renderer)
    assert caught.value.advice
    source = RankedSource([good, bad], policy.renderer, invalid="skip")
    assert source.ranked == [good] and source.skipped[reason] == 1
    found = alerts(lambda: RankedSource([good, bad], policy.renderer, invalid="skip"))
    assert f"1 {reason} (it came from record record of B?)" in found["rankings_skipped"]


@pytest.mark.parametrize(("reason", "text"), [("empty_completion", "  "), ("too_long", "y" * 200)])
def test_an_unusable_answer_is_left_out_and_its_ranking_goes_on(
    policy: LanguagePolicy, reason: str, text: str
) -> None:
    signal = ranked("A?", "yes", text, "no")
    with pytest.raises(Unusable, match=f"^{reason}: ranking 0 of 1"):
        RankedSource([signal], policy.renderer, max_length=100)
    source = RankedSource([signal], policy.renderer, max_length=100, invalid="skip")
    assert source.examples[0].scores == (0.0, -2.0) and source.skipped == {reason: 1}


def test_gaps_and_ties_of_ranks_are_kept(policy: LanguagePolicy) -> None:
    source = RankedSource([ranked("A?", "a", "b", "c", scores=(10.0, 3.0, 3.0))], policy.renderer)
    assert source.examples[0].scores == (10.0, 3.0, 3.0)


def test_equal_scores_are_kept_where_they_say_something(policy: LanguagePolicy) -> None:
    source = RankedSource([ranked("A?", "a", "b", scores=(1.0, 1.0))], policy.renderer, equal_scores=True)
    assert source.examples[0].scores == (1.0, 1.0)


def test_nothing_left_is_an_error_that_says_why(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match=r"no ranking to train on .*2 no_order"):
        tied = [ranked(text, "a", "b", scores=(1.0, 1.0)) for text in ("A?", "B?")]
        RankedSource(tied, policy.renderer, invalid="skip")


def test_sampled_answers_keep_their_tokens_and_what_they_were_sampled_with(policy: LanguagePolicy) -> None:
    version = PolicyVersion(name="start", base_model="tiny-random", weights=policy.weights_sha256("base"))
    sampling = Sampling(max_tokens=6, n=2, seed=0)
    prompt = said("A?", "user")
    (group,) = generate(policy, [list(prompt)], n=2, sampling=sampling, seed=0)
    episodes = [to_episode(prompt, answer, version.id, "test", sampling) for answer in group]
    signal = dataclasses.replace(ranked("A?", "x", "y", "z"), episodes=(episodes[0].id, episodes[1].id, None))
    source = RankedSource([signal], policy.renderer, episodes={one.id: one for one in episodes})
    (example,) = source.examples
    for row, answer, logq in zip(example.rows[:2], group, example.logq[:2], strict=True):
        assert tuple(row.ids[row.scored[0] :]) == tuple(answer.ids)
        assert logq == pytest.approx(sum(answer.logprobs))
    assert math.isnan(example.logq[2]) and source.proposal_unknown == 1
    assert "1 of 3 answers" in alerts(source.say_proposal)["proposal_unknown"]


def test_the_digest_knows_everything_that_decides_the_batches(policy: LanguagePolicy) -> None:
    signals = [ranked("A?", "a", "b"), ranked("B?", "c", "d")]

    def digest(changed: list[Ranked], **options: Any) -> str:
        return RankedSource(changed, policy.renderer, **options).digest()

    changes = [
        digest(signals),
        digest(signals, seed=1),
        digest(signals[::-1]),
        digest([dataclasses.replace(signals[0], scores=(0.0, 1.0)), signals[1]]),
        digest([dataclasses.replace(signals[0], weight=2.0), signals[1]]),
    ]
    assert len(set(changes)) == len(changes) and digest(signals) == digest(signals)
