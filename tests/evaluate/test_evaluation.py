from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.collect.gold import GoldSignal, HouseStyle
from corrigible.errors import BadInputError
from corrigible.evaluate.evaluation import compare, evaluate_policy, sample_episodes
from corrigible.evaluate.kl import kl_to_reference
from corrigible.evaluate.win_rate import SignalJudge
from corrigible.models import LanguagePolicy, load_policy
from corrigible.records import Episode, FinishReason, Message, Sampling
from corrigible.rewards.signals import Scores

Make = Callable[..., Episode]
GOLD = GoldSignal(HouseStyle())
JUDGE = SignalJudge(GOLD)
PROMPTS = [(Message(role="user", content=f"Say {word}."),) for word in ("ant", "bee", "cat", "dog", "eel")]
PLAIN = Sampling(max_tokens=12)


class WordCount:
    """A proxy that is easy to hack: it counts words; it has no value for the word "void"."""

    name, axis = "words", "overall"

    def score(self, episodes: Sequence[Episode]) -> Scores:
        texts = [e.response_text() for e in episodes]
        return Scores(
            np.array([float(len(t.split())) for t in texts]),
            tuple("refused" if "void" in t else None for t in texts),
        )


@pytest.fixture(scope="module")
def tiny() -> LanguagePolicy:
    """tiny-random with an adapter that does something."""
    policy = load_policy("tiny-random")
    policy.add_lora(rank=4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def test_proxy_and_gold_stand_side_by_side(episode: Make) -> None:
    """The picture of over-optimisation: the proxy rises with length while the gold falls."""
    short = "You can rinse your rice."
    candidate = [episode(f"q{i}", " ".join(["word"] * (60 + i))) for i in range(12)]
    baseline = [episode(f"q{i}", short + " Now." * (i % 3)) for i in range(12)]
    found = compare(
        candidate, baseline, JUDGE, signals={"proxy": WordCount(), "gold": GOLD}, names=("new", "old")
    )
    assert found.win_rate.value == 0.0
    assert found.scores["proxy"].difference.low > 0 > found.scores["gold"].difference.high
    assert found.scores["proxy"].difference.value == pytest.approx(
        found.scores["proxy"].candidate.value - found.scores["proxy"].baseline.value
    )
    assert found.length.candidate.value == pytest.approx(65.5) and found.length.unit == "tokens"
    assert found.length_ratio > 8
    assert found.finish["candidate"] == {"stop": 12}
    written = json.loads(json.dumps(found.to_json(items=True)))
    assert written["win_rate"] == 0.0 and len(written["win_rates"]["house-style"]["items"]) == 12


def test_missing_values_and_missing_answers_are_left_out_and_counted(episode: Make) -> None:
    candidate = [episode("a", "one two"), episode("b", "void"), episode("c", "", finish=FinishReason.error)]
    baseline = [episode("a", "one"), episode("b", "one"), episode("c", "one two three four")]
    found = compare(candidate, baseline, JUDGE, signals={"proxy": WordCount()})
    proxy = found.scores["proxy"]
    assert (proxy.candidate.value, proxy.baseline.value, proxy.left_out) == (2.0, 1.0, 1)
    assert found.length.candidate.n == 2
    assert found.win_rate.not_judged == {"broken_item": 1}
    assert found.finish["candidate"] == {"stop": 2, "error": 1}


def test_a_signal_without_any_value_is_an_error_not_a_zero(episode: Make) -> None:
    with pytest.raises(BadInputError, match="could score none"):
        compare([episode("a", "void")], [episode("a", "b")], JUDGE, signals={"proxy": WordCount()})


def test_several_judges_by_name(episode: Make) -> None:
    sides = [episode("a", "one two")], [episode("a", "one")]
    found = compare(*sides, [SignalJudge(WordCount()), JUDGE])
    assert list(found.win_rates) == ["words", "house-style"] and found.win_rate.judge == "words"
    for judges in ([], [JUDGE, JUDGE]):
        with pytest.raises(BadInputError, match="different names"):
            compare(*sides, judges)


def test_the_whole_picture_with_a_model(tiny: LanguagePolicy) -> None:
    found, mine, theirs = evaluate_policy(
        tiny, None, PROMPTS, JUDGE, signals={"gold": GOLD}, n=2, sampling=PLAIN
    )
    assert len(mine) == len(theirs) == 10
    assert found.kl is not None and found.kl.on_policy and found.kl.value > 0
    assert found.kl.per_sequence.clusters == 5 and found.win_rate.prompts == 5
    assert {e.policy for e in mine} == {"candidate"} and {e.policy for e in theirs} == {"baseline"}
    assert [e.response_text() for e in mine] != [e.response_text() for e in theirs]


def test_a_policy_ties_with_itself(tiny: LanguagePolicy) -> None:
    found, _, _ = evaluate_policy(tiny, tiny, PROMPTS, JUDGE, sampling=PLAIN)
    assert found.kl is not None and found.kl.value == 0.0 and found.kl.per_token_k3.value == 0.0
    assert found.win_rate.value == 0.5 and found.win_rate.identical == 5
    low, high = found.win_rate.interval
    assert low < 0.45 and high > 0.55, "five ties do not prove a tie"


def test_kl_equals_the_recorded_logprobs_of_the_generation(tiny: LanguagePolicy) -> None:
    """Two independent paths (generation with cache, scoring without) give the same log ratios."""
    with tiny.adapter_disabled():
        reference = sample_episodes(tiny, PROMPTS, sampling=PLAIN, policy_version="ref")
    again = kl_to_reference(reference, tiny)
    from corrigible.models import Rendered, sequence_logprobs

    steps = [e.steps[-1] for e in reference]
    rendered = [Rendered.from_tokens(s.prompt_token_ids or (), s.token_ids or ()) for s in steps]
    under_policy = sequence_logprobs(tiny, rendered).numpy()
    recorded = np.array([sum(s.logprobs or ()) for s in steps])
    found = float((under_policy - recorded).mean())
    assert again.per_sequence_k1.value == pytest.approx(found, abs=1e-3)


def test_kl_is_the_sum_of_whole_distributions_along_each_answer(tiny: LanguagePolicy) -> None:
    """Against transformers' logits of each answer alone, in float64."""
    answers = sample_episodes(tiny, PROMPTS, sampling=PLAIN, policy_version="p")
    got = kl_to_reference(answers, tiny)
    sums, tokens = [], 0
    for step in (e.steps[-1] for e in answers):
        ids = torch.tensor([[*(step.prompt_token_ids or ()), *(step.token_ids or ())]])
        count = len(step.token_ids or ())
        with torch.no_grad():
            p = tiny.model(ids).logits[0, -count - 1 : -1].double().log_softmax(dim=-1)
            with tiny.adapter_disabled():
                q = tiny.model(ids).logits[0, -count - 1 : -1].double().log_softmax(dim=-1)
        sums.append(float((p.exp() * (p - q)).sum()))
        tokens += count
    assert got.estimator == "exact" and got.tokens == tokens and got.on_policy
    assert got.value == pytest.approx(sum(sums) / len(sums), rel=1e-3)
    assert got.per_token.value == pytest.approx(sum(sums) / tokens, rel=1e-3)


def test_policies_of_two_vocabularies_have_no_divergence(tiny: LanguagePolicy, recorded_events: list) -> None:
    """Win rates need none; a number over unlike tokens would mean nothing."""
    other = load_policy("tiny-random")
    other.tokenizer.add_tokens(["a token of its own"])
    found, _, _ = evaluate_policy(tiny, other, PROMPTS, JUDGE, sampling=PLAIN)
    assert found.kl is None and found.win_rate.prompts == 5
    assert any("different vocabularies" in getattr(event, "text", "") for event in recorded_events)
    with pytest.raises(BadInputError, match="vocabulary_mismatch"):
        kl_to_reference(sample_episodes(tiny, PROMPTS, sampling=PLAIN, policy_version="p"), tiny, other)


def test_answers_drawn_another_way_are_said_to_be(tiny: LanguagePolicy, episode: Make) -> None:
    cold = sample_episodes(
        tiny, PROMPTS[:2], sampling=Sampling(max_tokens=6, temperature=0.5), policy_version="p"
    )
    assert kl_to_reference(cold, tiny).on_policy is False
    with pytest.raises(BadInputError, match="token ids"):
        kl_to_reference([episode("a", "")], tiny)


def test_a_prompt_that_does_not_fit_is_counted_and_the_rest_goes_on(tiny: LanguagePolicy) -> None:
    too_long = (Message(role="user", content="long " * tiny.context_length),)
    found, mine, _ = evaluate_policy(tiny, None, [*PROMPTS, too_long], JUDGE, sampling=PLAIN)
    assert len(mine) == 6 and mine[-1].steps[0].finish_reason == FinishReason.context
    assert found.win_rate.not_judged == {"context_overflow": 1} and found.win_rate.n == 5


def test_an_interrupted_sampling_goes_on_and_ends_the_same(
    tiny: LanguagePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from corrigible import models
    from corrigible.evaluate import sampling

    monkeypatch.setattr(sampling, "_CHUNK_PROMPTS", 2)
    keep = tmp_path / "kept" / "candidate.jsonl"
    settings: dict[str, Any] = {"n": 2, "sampling": PLAIN, "policy_version": "p"}
    whole = sample_episodes(tiny, PROMPTS, **settings)
    real: Callable[..., Any] = models.generate
    calls: list[Any] = []

    def stops(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(models, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        sample_episodes(tiny, PROMPTS, keep=keep, **settings)
    with keep.open("a") as file:
        file.write('{"torn": ')
    resumed = sample_episodes(tiny, PROMPTS, keep=keep, **settings)
    assert [len(args[1]) for args in calls[3:]] == [1], "only the last chunk is sampled again"
    assert [e.response_text() for e in resumed] == [e.response_text() for e in whole]
    third = sample_episodes(tiny, PROMPTS, keep=keep, **settings)
    assert third == resumed and len(calls) == 4


def test_kept_answers_of_something_else_are_refused(tiny: LanguagePolicy, tmp_path: Path) -> None:
    keep = tmp_path / "c.jsonl"
    sample_episodes(tiny, PROMPTS[:1], sampling=PLAIN, policy_version="p", keep=keep)
    with pytest.raises(BadInputError, match="another policy"):
        sample_episodes(tiny, PROMPTS[:2], sampling=PLAIN, policy_version="p", keep=keep)
    lines = keep.read_text().splitlines()
    keep.write_text(lines[0] + "\n" + lines[1][:40] + "\n")
    with pytest.raises(BadInputError, match="damaged"):
        sample_episodes(tiny, PROMPTS[:1], sampling=PLAIN, policy_version="p", keep=keep)
    with pytest.raises(BadInputError, match="no prompts"):
        sample_episodes(tiny, [], sampling=PLAIN, policy_version="p")
