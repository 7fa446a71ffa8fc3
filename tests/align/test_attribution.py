"""Origins from records, and one injected cause at a time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from corrigible.align import ALGORITHMS, GroupSource, TrainConfig, Trainer
from corrigible.align.attribution import (
    CAUSES,
    Attribution,
    Ledger,
    Origin,
    Recorded,
    Stretch,
    TracedRow,
    attribute,
    score_with,
    split_log_ratio,
    trace_correction,
    trace_demonstration,
    trace_episode,
    trace_generation,
)
from corrigible.errors import BadInputError
from corrigible.events import EventBus, Metric
from corrigible.models import (
    Generation,
    LanguagePolicy,
    Rendered,
    TokenKind,
    generate,
    logprobs_reference,
    to_episode,
)
from corrigible.records import Episode, FinishReason, Message, Sampling, Step
from corrigible.rewards.signals import Scores

PROMPTS = [[{"role": "user", "content": f"Say {word}."}] for word in ("amber", "birch", "cedar", "delta")]


def sample(policy: LanguagePolicy, sampling: Sampling | None = None) -> list[Generation]:
    sampling = sampling or Sampling(max_tokens=24)
    return [answer for group in generate(policy, PROMPTS, n=2, sampling=sampling, seed=3) for answer in group]


def trace(answers: Sequence[Generation], version: str) -> list[TracedRow]:
    """As one version's, whatever checksum the engine noted."""
    return [trace_generation(replace(answer, segments=()), version=version) for answer in answers]


def moved(policy: LanguagePolicy, scale: float) -> LanguagePolicy:
    """The same policy some updates later."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


# -- one cause at a time --------------------------------------------------------------------------


def main_share(found: Attribution, cause: str) -> float:
    assert sum(found.shares.values()) == pytest.approx(1.0)
    return found.shares[cause]


@pytest.mark.parametrize("scale", [0.003, 0.1])
def test_an_older_adapter_is_staleness(make_policy: Callable[..., LanguagePolicy], scale: float) -> None:
    old = make_policy()
    found = attribute(trace(sample(old), "v1"), moved(old, scale), {"v1": old})
    assert main_share(found, "staleness") >= 0.9
    # The policy that sampled prefers what it sampled: on average the newer one finds it less likely.
    assert found.means["log_ratio"].value < 0.0
    assert found.means["log_ratio"].value == pytest.approx(found.means["staleness"].value, abs=1e-4)


def test_another_precision_is_numerics(make_policy: Callable[..., LanguagePolicy]) -> None:
    low = make_policy(lora=False, dtype="bfloat16")
    high = make_policy(lora=False)
    with torch.no_grad():
        for here, there in zip(high.model.parameters(), low.model.parameters(), strict=True):
            here.copy_(there)
    found = attribute(trace(sample(low), "v1"), high, {"v1": high})
    assert main_share(found, "numerics") >= 0.9
    assert found.means["staleness"].value == 0.0


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=24, top_p=0.8),
        Sampling(max_tokens=24, top_k=20),
        Sampling(max_tokens=24, min_p=0.1),
        Sampling(max_tokens=24, temperature=0.7),
    ],
    ids=["top-p", "top-k", "min-p", "temperature"],
)
def test_the_sampler_is_truncation(policy: LanguagePolicy, sampling: Sampling) -> None:
    found = attribute(trace(sample(policy, sampling), "v1"), policy, {"v1": policy})
    assert main_share(found, "truncation") >= 0.9
    assert abs(found.means["truncation"].value) > 0.01


def test_a_plain_run_is_nothing(policy: LanguagePolicy) -> None:
    found = attribute(trace(sample(policy), "v1"), policy, {"v1": policy})
    assert abs(found.means["log_ratio"].value) < 1e-5
    assert found.tokens == {Origin.sampled: found.known} and found.unknown == 0


def test_scoring_at_the_sampling_temperature_leaves_nothing(policy: LanguagePolicy) -> None:
    """The objective's own temperature belongs to the log-ratio: on both sides it is no departure."""
    rows = trace(sample(policy, Sampling(max_tokens=24, temperature=0.7)), "v1")
    found = attribute(rows, policy, {"v1": policy}, temperature=0.7)
    for name, estimate in found.means.items():
        assert abs(estimate.value) < 1e-5, name


def test_without_the_weights_it_is_unresolved(policy: LanguagePolicy) -> None:
    sampling = Sampling(max_tokens=24, top_p=0.8)
    rows = trace(sample(policy, sampling), "v1")
    known = attribute(rows, moved(policy, 0.1), {"v1": policy})
    unknown = attribute(rows, moved(policy, 0.1), {})
    assert unknown.shares["staleness"] == unknown.shares["numerics"] == 0.0
    assert unknown.means["truncation"].value == pytest.approx(known.means["truncation"].value, abs=1e-9)
    assert unknown.means["log_ratio"].value == pytest.approx(known.means["log_ratio"].value, abs=1e-9)
    both = known.means["staleness"].value + known.means["numerics"].value
    assert unknown.means["unresolved"].value == pytest.approx(both, abs=1e-9)


# -- the arithmetic -------------------------------------------------------------------------------


def test_the_causes_are_those_of_the_equation(policy: LanguagePolicy) -> None:
    """Every mean again, token by token in float64, with the plain one-row forward pass."""
    other = moved(policy, 0.05)
    answers = sample(policy, Sampling(max_tokens=12, top_p=0.8))
    found = attribute(trace(answers, "v1"), other, {"v1": policy})
    totals = dict.fromkeys(("log_ratio", *CAUSES), 0.0)
    count = 0
    for answer in answers:
        ids = (*answer.prompt_ids, *answer.ids)
        now, again = logprobs_reference(other, ids), logprobs_reference(policy, ids)
        for place in range(len(answer.ids)):
            at = len(answer.prompt_ids) + place - 1
            totals["staleness"] += float(now[at]) - float(again[at])
            totals["numerics"] += float(again[at]) - answer.logprobs[place]
            totals["truncation"] += answer.logprobs[place] - answer.sampling_logprobs[place]
            totals["log_ratio"] += float(now[at]) - answer.sampling_logprobs[place]
            count += 1
    assert found.known == count
    for name, total in totals.items():
        assert found.means[name].value == pytest.approx(total / count, abs=2e-6), name


def test_the_causes_sum_to_the_log_ratio_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    for recomputed in (0, 1, 2):
        now, plain, drawn, *again = (
            -torch.rand(50, generator=generator) * 10.0 ** float(i) for i in range(3 + recomputed)
        )
        split = split_log_ratio(now, plain, drawn, *(again or [None]))
        assert torch.allclose(split.log_ratio, now.double() - drawn.double(), rtol=0, atol=1e-12)


def test_intervals_are_over_clusters(policy: LanguagePolicy) -> None:
    """Two answers to one prompt are one fact: pretending otherwise narrows the interval."""
    answers = sample(policy)
    rows = trace(answers, "v1")
    assert {row.cluster for row in rows} == {answer.prompt_ids for answer in answers}
    found = attribute(rows, moved(policy, 0.1), {"v1": policy})
    assert found.means["staleness"].clusters == len(PROMPTS)
    low, high = found.means["staleness"].interval
    assert low < found.means["staleness"].value < high


def test_metrics_and_events_say_the_same(policy: LanguagePolicy) -> None:
    found = attribute(trace(sample(policy), "v1"), moved(policy, 0.1), {"v1": policy})
    metrics = found.metrics()
    assert metrics["tokens/sampled"] == found.known and metrics["tokens/edited"] == 0.0
    for event in found.events(7):
        assert event.step == 7 and event.interval is not None
        assert metrics[event.name.removeprefix("train/")] == event.value


# -- origins --------------------------------------------------------------------------------------


def episodes(policy: LanguagePolicy, sampling: Sampling) -> list[Episode]:
    return [
        to_episode(prompt, answer, "v1", "task", sampling)
        for prompt, [answer] in zip(
            PROMPTS, generate(policy, PROMPTS, n=1, sampling=sampling, seed=1), strict=True
        )
    ]


def test_recorded_episodes_are_replayed_unless_they_are_this_runs_own(policy: LanguagePolicy) -> None:
    [episode, *_] = episodes(policy, Sampling(max_tokens=8, top_p=0.5))
    old, own = trace_episode(episode), trace_episode(episode, fresh={"v1"})
    assert [s.origin for s in old.stretches] == [Origin.replayed]
    assert [s.origin for s in own.stretches] == [Origin.sampled]
    [stretch] = old.stretches
    assert stretch.version == "v1" and stretch.recorded is not None
    assert stretch.recorded.plain == episode.steps[0].logprobs != stretch.recorded.drawn


def test_log_probs_of_a_filter_that_nobody_recorded_are_unknown(policy: LanguagePolicy) -> None:
    [episode, *_] = episodes(policy, Sampling(max_tokens=8))
    [plain] = trace_episode(episode).stretches
    assert plain.recorded is not None and plain.recorded.plain == plain.recorded.drawn
    for sampling in (None, Sampling(max_tokens=8, top_p=0.9), Sampling(max_tokens=8, temperature=0.5)):
        [stretch] = trace_episode(episode.model_copy(update={"sampling": sampling})).stretches
        assert stretch.recorded is None
    found = attribute([trace_episode(episode.model_copy(update={"sampling": None}))], policy, {"v1": policy})
    assert found.known == 0 and found.unknown == len(episode.steps[0].token_ids or ()) and not found.means
    assert set(found.shares.values()) == {0.0}


def conversation(policy: LanguagePolicy, *, retokenised: bool = False) -> Episode:
    """Two turns; the second prompt goes on from the very ids of the first, or is one id off."""
    renderer = policy.renderer
    first = renderer.prompt(PROMPTS[0])
    said = (50, 60, 70, *policy.end_ids[:1])
    second = renderer.continue_(renderer.with_sampled(first, said, True), [{"role": "user", "content": "On"}])
    prompt = list(second.ids)
    if retokenised:
        prompt[len(first)] += 1
    steps = []
    for ids in (first.ids, tuple(prompt)):
        steps.append(
            Step(
                observation=(Message(role="user", content="On"),),
                action=Message(role="assistant", content="x"),
                token_ids=said,
                prompt_token_ids=ids,
                logprobs=(-1.0,) * len(said),
                finish_reason=FinishReason.stop,
            )
        )
    return Episode(task="t", policy="v1", sampling=Sampling(), steps=tuple(steps))


def test_every_turn_of_a_conversation_is_traced_by_its_own_ids(policy: LanguagePolicy) -> None:
    traced = trace_episode(conversation(policy), end_ids=policy.end_ids)
    assert [stretch.tokens for stretch in traced.stretches] == [4, 4]
    assert [traced.row.ids[place] for place in traced.row.scored] == [50, 60, 70, policy.end_ids[0]] * 2


def test_a_conversation_that_was_tokenised_again_is_refused(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match="retokenised: the prompt of step 1"):
        trace_episode(conversation(policy, retokenised=True))


def test_a_cut_answer_recorded_as_ended_is_refused(policy: LanguagePolicy) -> None:
    episode = conversation(policy)
    step = episode.steps[0]
    cut = step.model_copy(update={"token_ids": (50, 60, 70, 80)})
    lying = step.model_copy(update={"finish_reason": FinishReason.length})
    for wrong in (cut, lying):
        with pytest.raises(BadInputError, match="finish_reason"):
            trace_episode(episode.model_copy(update={"steps": (wrong,)}), end_ids=policy.end_ids)


def test_a_correction_keeps_what_was_said_before_the_first_change(policy: LanguagePolicy) -> None:
    prompt = policy.renderer.prompt(PROMPTS[0])
    said = tuple(policy.tokenizer("good morning", add_special_tokens=False)["input_ids"]) + policy.end_ids[:1]
    answer = Generation(
        prompt.ids,
        said,
        "good morning",
        tuple(-0.1 * i for i in range(len(said))),
        tuple(-0.05 * i for i in range(len(said))),
        FinishReason.stop,
        0,
    )
    original = trace_generation(answer, version="v1")
    corrected = Message(role="assistant", content="good evening")
    traced = trace_correction(PROMPTS[0], corrected, policy.renderer, original, cluster="c")
    kept, edited = traced.stretches
    assert (kept.origin, kept.tokens, kept.version) == (Origin.sampled, len("good "), "v1")
    assert kept.recorded == Recorded(answer.logprobs[:5], answer.sampling_logprobs[:5])
    # The "ing" that stayed stands behind another word: nobody sampled it there.
    assert (edited.origin, edited.tokens) == (Origin.edited, len("evening") + 1)
    assert edited.recorded is None
    found = attribute([traced], policy, {"v1": policy})
    assert (found.known, found.unknown) == (5, 8)
    assert found.tokens == {Origin.sampled: 5, Origin.edited: 8}

    same = trace_correction(
        PROMPTS[0], Message(role="assistant", content="good morning"), policy.renderer, original, cluster="c"
    )
    assert [s.origin for s in same.stretches] == [Origin.sampled] and same.row.ids == original.row.ids
    elsewhere = trace_correction(PROMPTS[1], corrected, policy.renderer, original, cluster="c")
    assert [s.origin for s in elsewhere.stretches] == [Origin.edited]


def test_demonstrations_have_no_behaviour(policy: LanguagePolicy) -> None:
    response = [Message(role="assistant", content="like so")]
    traced = trace_demonstration(PROMPTS[0], response, policy.renderer, cluster="c")
    assert [s.origin for s in traced.stretches] == [Origin.demonstrated]
    assert attribute([traced], policy, {}).unknown == len("like so") + 1


def test_weights_that_changed_within_an_answer_are_told_apart(policy: LanguagePolicy) -> None:
    from corrigible.models.rollout_records import Segment

    new = moved(policy, 0.2)
    [answer, *_] = sample(policy)
    half = len(answer.ids) // 2
    ids = (*answer.prompt_ids, *answer.ids)
    later = logprobs_reference(new, ids)[len(answer.prompt_ids) - 1 :].tolist()
    mixed = (*answer.logprobs[:half], *later[half:])
    two = replace(
        answer,
        logprobs=mixed,
        sampling_logprobs=mixed,
        segments=(Segment("old", half), Segment("new", len(answer.ids) - half)),
    )
    traced = trace_generation(two)
    assert traced.versions == {"old", "new"}
    found = attribute([traced], new, {"old": policy, "new": new})
    assert main_share(found, "staleness") >= 0.9
    wrong = trace_generation(replace(two, segments=(Segment("new", len(answer.ids)),)))
    assert main_share(attribute([wrong], new, {"new": new}), "numerics") >= 0.9


# -- bad input ------------------------------------------------------------------------------------


def test_a_number_cannot_stand_in_for_an_unknown_behaviour() -> None:
    for origin in (Origin.edited, Origin.demonstrated):
        with pytest.raises(BadInputError, match="not_sampled"):
            Stretch(origin, 1, None, Recorded((-1.0,), (-1.0,)))
        with pytest.raises(BadInputError, match="not_sampled"):
            Stretch(origin, 1, "v1")
    for value in (math.nan, -math.inf, 0.5):
        with pytest.raises(BadInputError, match="behaviour_not_finite"):
            Stretch(Origin.sampled, 1, "v1", Recorded((value,), (-1.0,)))
    with pytest.raises(BadInputError, match="behaviour_shape"):
        Stretch(Origin.sampled, 2, "v1", Recorded((-1.0,), (-1.0, -1.0)))


def test_origins_must_fit_the_row() -> None:
    row = Rendered.from_tokens((5, 6), (7, 8))
    with pytest.raises(BadInputError, match="origin_shape"):
        TracedRow(row, (Stretch(Origin.sampled, 1),), "c")
    with pytest.raises(BadInputError, match="origin_mismatch"):
        TracedRow(row, (Stretch(Origin.demonstrated, 2),), "c")
    written = replace(row, kinds=(TokenKind.PROMPT,) * 2 + (TokenKind.NOT_SAMPLED,) * 2)
    with pytest.raises(BadInputError, match="origin_mismatch"):
        TracedRow(written, (Stretch(Origin.replayed, 2),), "c")


def test_a_row_that_nobody_traced_is_refused(policy: LanguagePolicy) -> None:
    ledger = Ledger(trace(sample(policy)[:1], "v1"), {"v1": score_with(policy)})
    with pytest.raises(BadInputError, match="origin_unknown"):
        ledger.attribute([Rendered.from_tokens((5, 6), (7, 8))], [torch.zeros(2)])


def test_a_failed_answer_has_no_trace() -> None:
    failed = Generation((1, 2), (), "", (), (), FinishReason.error, 0, "too long")
    with pytest.raises(BadInputError, match=r"empty_answer.*too long"):
        trace_generation(failed)


# -- in the trainer -------------------------------------------------------------------------------


def test_every_step_of_a_run_is_attributed(policy: LanguagePolicy, tmp_path: Path) -> None:
    """On the policy's own answers the first step has no log-ratio; every update adds staleness alone."""
    groups = generate(policy, PROMPTS, n=3, sampling=Sampling(max_tokens=12), seed=2)
    source = GroupSource(groups, [Scores(np.arange(3.0)) for _ in groups])
    rows = [trace_generation(answer) for group in groups for answer in group]
    [version] = {name for row in rows for name in row.versions}
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    result = Trainer(
        policy,
        ALGORITHMS["grpo"],
        source,
        TrainConfig(steps=3, batch_size=4, lr=5e-3, schedule="constant", warmup=0, micro_batch_tokens=100),
        out=tmp_path,
        ledger=Ledger(rows, {version: score_with(policy)}),
        bus=bus,
    ).train()
    history = [json.loads(line) for line in result.history.read_text().splitlines()]
    ratios = [abs(row["off_policy/log_ratio"]) for row in history]
    assert ratios[0] < 1e-5 < 1e-4 < ratios[1]
    for row in history:
        assert row["off_policy/log_ratio"] == pytest.approx(row["log_ratio"], abs=1e-5)
        assert row["tokens/sampled"] == sum(len(answer.ids) for group in groups for answer in group)
        assert row["tokens/behaviour_unknown"] == 0.0
    assert min(row["off_policy/staleness_share"] for row in history[1:]) >= 0.9
    intervals = [e for e in seen if isinstance(e, Metric) and e.interval is not None]
    assert {e.name for e in intervals} >= {"train/off_policy/staleness", "train/off_policy/numerics"}
