"""Sampling: equal to the plain reference, whatever the batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError, NumericsError
from corrigible.models import (
    Generation,
    LanguagePolicy,
    generate,
    generate_reference,
    sequence_logprobs,
    to_episode,
    token_logprobs,
)
from corrigible.models.reference import distribution_reference
from corrigible.models.sampling import draw, sequence_seed, uniforms
from corrigible.records import FinishReason, Sampling


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


PROMPTS = [
    user("Hi"),
    user("A rather longer prompt, to need padding."),
    user("?"),
    user("Hi"),
    user("日本語"),
]
SETTINGS = [
    Sampling(max_tokens=24, temperature=0.0),
    Sampling(max_tokens=24, temperature=1.0),
    Sampling(max_tokens=24, temperature=0.7, top_p=0.8),
    Sampling(max_tokens=24, temperature=1.5, top_k=12),
    Sampling(max_tokens=24, temperature=1.2, min_p=0.1),
    Sampling(max_tokens=24, temperature=0.9, top_k=30, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=["greedy", "plain", "top_p", "top_k", "min_p", "all"])
def test_equals_the_reference(shared_policy: LanguagePolicy, sampling: Sampling) -> None:
    answers = generate(shared_policy, PROMPTS, n=3, sampling=sampling, seed=5, batch_size=8)
    for generations in answers:
        for generation in generations:
            expected = generate_reference(shared_policy, generation.prompt_ids, sampling, generation.seed)
            assert generation.ids == expected.ids
            assert (generation.text, generation.finish_reason) == (expected.text, expected.finish_reason)
            np.testing.assert_allclose(generation.logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(generation.sampling_logprobs, expected.sampling_logprobs, atol=1e-4)


def test_batch_size_and_order_change_nothing(shared_policy: LanguagePolicy) -> None:
    sampling = Sampling(max_tokens=20)
    texts = [f"{'long ' * (i % 4)}{i}" for i in range(7)]
    whole = generate(shared_policy, [user(t) for t in texts], n=3, sampling=sampling, seed=1, batch_size=64)
    for batch_size in (1, 2, 5):
        again = generate(
            shared_policy, [user(t) for t in texts], n=3, sampling=sampling, seed=1, batch_size=batch_size
        )
        assert [[g.ids for g in a] for a in again] == [[g.ids for g in a] for a in whole]
    backwards = generate(shared_policy, [user(t) for t in texts[::-1]], n=3, sampling=sampling, seed=1)
    assert [[g.ids for g in a] for a in backwards[::-1]] == [[g.ids for g in a] for a in whole]
    # The first answers do not depend on how many are asked for, nor on how long they may get.
    fewer = generate(shared_policy, [user(t) for t in texts], n=2, sampling=Sampling(max_tokens=9), seed=1)
    assert [[g.ids for g in a] for a in fewer] == [[g.ids[:9] for g in a[:2]] for a in whole]


def test_equal_prompts_and_answers_differ_seeds_matter(shared_policy: LanguagePolicy) -> None:
    sampling = Sampling(max_tokens=20)
    answers = generate(shared_policy, [user("Hi"), user("Hi")], n=2, sampling=sampling, seed=0)
    assert len({g.ids for a in answers for g in a}) == 4
    assert len({g.seed for a in answers for g in a}) == 4
    other = generate(shared_policy, [user("Hi")], n=1, sampling=sampling, seed=1)
    assert other[0][0].ids != answers[0][0].ids
    taken = generate(shared_policy, [user("Hi")], n=2, sampling=sampling, seed=0, occurrences=[1])
    assert [g.ids for g in taken[0]] == [g.ids for g in answers[1]]
    from_sampling = generate(shared_policy, [user("Hi")], sampling=Sampling(max_tokens=20, seed=1, n=1))
    assert from_sampling == other


def test_the_callers_random_state_is_left_alone(shared_policy: LanguagePolicy) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    generate(shared_policy, [user("Hi")], n=1, sampling=Sampling(max_tokens=3))
    assert torch.equal(torch.rand(3), expected)


def test_recorded_logprobs_are_what_scoring_gives(shared_policy: LanguagePolicy) -> None:
    answers = generate(shared_policy, PROMPTS, n=2, sampling=Sampling(max_tokens=30, temperature=0.7), seed=2)
    flat = [g for a in answers for g in a]
    for generation, scored in zip(
        flat, token_logprobs(shared_policy, [g.rendered() for g in flat]), strict=True
    ):
        np.testing.assert_allclose(generation.logprobs, scored.numpy(), atol=1e-4)
    # The same through the renderer, which knows the messages.
    renderer = shared_policy.renderer
    again = [
        renderer.with_sampled(renderer.prompt(p), g.ids, g.ended)
        for p, a in zip(PROMPTS, answers, strict=True)
        for g in a
    ]
    torch.testing.assert_close(
        sequence_logprobs(shared_policy, again),
        sequence_logprobs(shared_policy, [g.rendered() for g in flat]),
    )


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([None, 1, 3, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_against_an_independent_float64_oracle(
    logits: list[float], temperature: float, top_p: float, top_k: int | None, min_p: float, uniform: float
) -> None:
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    ids, plain, chosen = draw(torch.tensor([logits]), sampling, torch.tensor([uniform], dtype=torch.float64))
    token = int(ids)
    exact = np.array(logits, dtype=np.float64)
    assert float(plain) == pytest.approx(exact[token] - math.log(np.exp(exact).sum()), abs=1e-5)
    expected = distribution_reference(logits, sampling)
    near_an_edge = _near_an_edge(exact, sampling)
    if not near_an_edge:
        assert expected[token] > 0
        assert float(chosen) == pytest.approx(math.log(expected[token]), abs=1e-5)
        reached = np.cumsum(expected)
        assert reached[token] >= uniform - 1e-6
        assert reached[token] - expected[token] <= uniform + 1e-6


def _near_an_edge(logits: Any, sampling: Sampling) -> bool:
    """Whether float32 and float64 may rightly keep different tokens."""
    if sampling.temperature == 0:
        return False
    scaled = np.sort(logits / sampling.temperature)[::-1]
    gaps = np.abs(np.diff(scaled))
    weights = np.exp(scaled - scaled[0])
    kept = weights[: sampling.top_k] if sampling.top_k else weights
    cumulative = np.cumsum(kept) / kept.sum()
    return bool(
        ((gaps > 0) & (gaps < 1e-5)).any()
        or (np.abs(cumulative - sampling.top_p) < 1e-5).any() & (sampling.top_p < 1)
        or (np.abs(weights - sampling.min_p) < 1e-5).any()
    )


def test_top_p_beyond_the_first_sorted_block() -> None:
    """A flat distribution over many tokens: the nucleus is longer than what is sorted first."""
    logits = torch.linspace(0, 0.1, 3000)[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    sampling = Sampling(max_tokens=1, top_p=0.7)
    expected = np.array(distribution_reference(logits.tolist(), sampling))
    kept = set()
    for uniform in np.linspace(0, 0.9999, 300):
        token, _, chosen = draw(logits[None], sampling, torch.tensor([uniform], dtype=torch.float64))
        kept.add(int(token))
        assert float(chosen) == pytest.approx(math.log(expected[int(token)]), abs=2e-3)
    assert len(kept) > 250


def test_draws_follow_the_distribution() -> None:
    """A chi-square test, which a wrong cumulative sum or a reused uniform would fail."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    count = 20_000
    ids, _, _ = draw(
        logits.expand(count, -1),
        Sampling(max_tokens=1),
        torch.from_numpy(uniforms(sequence_seed(0, [1], 0, 0), count)),
    )
    found = Counter(ids.tolist())
    expected = torch.softmax(logits.double(), -1) * count
    chi_square = sum((found[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_end_of_turn_length_context_and_stop_strings(policy: LanguagePolicy) -> None:
    sampling = Sampling(max_tokens=400)
    answers = [g for a in generate(policy, [user("Hi")], n=12, sampling=sampling, seed=0) for g in a]
    ended = [g for g in answers if g.finish_reason is FinishReason.stop]
    assert ended, "with 259 tokens and 400 steps most answers end"
    for generation in ended:
        assert generation.ids[-1] == 2 and 2 not in generation.ids[:-1]
        assert generation.text == policy.renderer.decode(generation.ids[:-1])
    for generation in answers:
        assert generation.finish_reason in (FinishReason.stop, FinishReason.length)
        assert len(generation.logprobs) == len(generation.ids) == len(generation.sampling_logprobs)

    # Two ASCII letters that were written next to each other somewhere in the middle.
    stop = next(
        t[i : i + 2]
        for t in (g.text for g in answers)
        for i in range(3, len(t))
        if t[i : i + 2].isalnum() and t[i : i + 2].isascii()
    )
    stopping = Sampling(max_tokens=400, stop=(stop,))
    cut = generate(policy, [user("Hi")], n=12, sampling=stopping, seed=0)[0]
    for before, after in zip(answers, cut, strict=True):
        if stop in before.text:
            assert after.finish_reason is FinishReason.stop_string
            assert after.text == before.text[: before.text.index(stop)]
            assert after.ids == before.ids[: len(after.ids)]
        else:
            assert after.ids == before.ids

    short = generate(policy, [user("x" * 985)], n=1, sampling=Sampling(max_tokens=100, temperature=0))[0][0]
    room = policy.context_length - len(short.prompt_ids)
    assert 0 < room < 100
    if short.finish_reason is not FinishReason.stop:
        assert (short.finish_reason, len(short.ids), short.error) == (FinishReason.context, room, None)


def test_a_prompt_that_cannot_be_answered_does_not_lose_the_others(shared_policy: LanguagePolicy) -> None:
    done: dict[int, list[Generation]] = {}
    prompts: list[Any] = [user("Hi"), user("x" * 2000), [], user("there")]
    answers = generate(shared_policy, prompts, n=2, sampling=Sampling(max_tokens=4), on_done=done.__setitem__)
    assert [a[0].finish_reason.value for a in answers][1:3] == ["context", "error"]
    assert "reads 1024" in str(answers[1][0].error) and "no messages" in str(answers[2][1].error)
    assert all(g.ids and g.error is None for i in (0, 3) for g in answers[i])
    assert dict(enumerate(answers)) == done
    alone = generate(shared_policy, [user("Hi")], n=2, sampling=Sampling(max_tokens=4))
    assert [g.ids for g in alone[0]] == [g.ids for g in answers[0]]
    with pytest.raises(BadInputError, match="no answer to record"):
        to_episode(user("x"), answers[1][0], None, "t", Sampling())


def test_interrupting_keeps_what_was_done(shared_policy: LanguagePolicy) -> None:
    done: list[int] = []

    def stop_after_two(index: int, answers: list[Generation]) -> None:
        done.append(index)
        if len(done) == 2:
            raise KeyboardInterrupt

    shared_policy.model.train()
    with pytest.raises(KeyboardInterrupt):
        generate(
            shared_policy, PROMPTS, n=1, sampling=Sampling(max_tokens=3), batch_size=1, on_done=stop_after_two
        )
    assert len(done) == 2
    assert shared_policy.model.training, "the mode comes back, interrupted or not"
    shared_policy.model.eval()


def test_bad_use(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match="no prompts"):
        generate(policy, [])
    with pytest.raises(BadInputError, match="at least 1"):
        generate(policy, [user("a")], n=0)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[100] = torch.inf
    with pytest.raises(NumericsError, match="not finite"):
        generate(policy, [user("a")], n=1)


def test_an_episode_keeps_everything_that_training_needs(
    shared_policy: LanguagePolicy, recorded_events: list[Any]
) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.5)
    generation = generate(shared_policy, [user("Hi")], n=1, sampling=sampling)[0][0]
    episode = to_episode(user("Hi"), generation, "v1", "greeting", sampling)
    step = episode.steps[0]
    assert (step.token_ids, step.prompt_token_ids) == (generation.ids, generation.prompt_ids)
    assert step.logprobs == generation.logprobs
    assert step.info["sampling_logprobs"] == list(generation.sampling_logprobs)
    assert (episode.policy, episode.task, episode.sampling) == ("v1", "greeting", sampling)
    assert episode.response_text() == generation.text
    assert type(episode).from_json(episode.to_json()) == episode
    plain = generate(shared_policy, [user("Hi")], n=1, sampling=Sampling(max_tokens=6))[0][0]
    assert "sampling_logprobs" not in to_episode(user("Hi"), plain, None, "t", sampling).steps[0].info
    progress = [e for e in recorded_events if e.kind == "progress"]
    assert progress and progress[-1].done == progress[-1].total == 1


def test_a_sliding_window_model_takes_the_general_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from corrigible.models.tiny import tiny_tokenizer

    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        sliding_window=8,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    policy = LanguagePolicy(MistralForCausalLM(config), tiny_tokenizer(), name="tiny-mistral")
    sampling = Sampling(max_tokens=15)
    for answers in generate(policy, PROMPTS[:3], n=2, sampling=sampling, seed=4):
        for g in answers:
            assert g.ids == generate_reference(policy, g.prompt_ids, sampling, g.seed).ids
