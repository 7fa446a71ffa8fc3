"""The prompt computed once gives the numbers and the gradients of the prompt computed every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.align.shared_prompt import can_share, group_logprobs, group_size
from corrigible.models import LanguagePolicy, Rendered, token_logprobs

TOKENS = st.lists(st.integers(3, 258), min_size=1, max_size=12)
GROUPS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def tiny(request: pytest.FixtureRequest) -> LanguagePolicy:
    from corrigible.models import load_policy

    policy = load_policy("tiny-random", dtype="float32", device="cpu")
    policy.add_lora(rank=4)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.03)
    return policy


@settings(max_examples=60, deadline=None)
@given(GROUPS)
def test_values_equal_those_of_separate_rows(tiny: LanguagePolicy, groups: list) -> None:
    rows = [[Rendered.from_tokens(prompt, tail) for tail in tails] for prompt, tails in groups]
    shared = group_logprobs(tiny, rows)
    plain = token_logprobs(tiny, [row for group in rows for row in group])
    for a, b in zip(shared, plain, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_only_the_prompt_is_saved_and_it_is_saved(tiny: LanguagePolicy) -> None:
    group = [Rendered.from_tokens(range(3, 43), range(50, 50 + n)) for n in (5, 8, 1)]
    # The last token of a response is predicted and never read.
    assert group_size(group) == 40 + 4 + 7 + 0


def test_gradients_equal_those_of_separate_rows(tiny: LanguagePolicy) -> None:
    generator = torch.Generator().manual_seed(2)
    groups = []
    for _ in range(3):
        prompt = torch.randint(3, 259, (17,), generator=generator).tolist()
        tails = [torch.randint(3, 259, (n,), generator=generator).tolist() for n in (9, 4, 13)]
        groups.append([Rendered.from_tokens(prompt, tail) for tail in tails])
    found = []
    for scores in (
        group_logprobs(tiny, groups, grad=True),
        token_logprobs(tiny, [row for group in groups for row in group], grad=True),
    ):
        tiny.model.zero_grad()
        sum((i + 1) * row.sum() for i, row in enumerate(scores)).backward()
        found.append(torch.cat([p.grad.flatten().double() for p in tiny.trainable_parameters()]))
    a, b = found
    assert float(torch.dot(a, b) / (a.norm() * b.norm())) >= 0.999999
    assert abs(float(a.norm() / b.norm()) - 1) <= 1e-5


def test_scored_tokens_may_have_gaps(tiny: LanguagePolicy) -> None:
    """A response of several turns holds tokens that nobody is trained on."""
    from corrigible.models import TokenKind

    kinds = (
        [TokenKind.PROMPT] * 4
        + [TokenKind.NOT_SAMPLED] * 2
        + [TokenKind.SPECIAL] * 3
        + [TokenKind.SAMPLED] * 2
    )
    rows = [Rendered(ids=(9, 8, 7, 6, *range(start, start + 7)), kinds=tuple(kinds)) for start in (20, 90)]
    for a, b in zip(group_logprobs(tiny, [rows]), token_logprobs(tiny, rows), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_a_model_that_ignores_the_mask_is_noticed(
    make_policy: Callable, monkeypatch: pytest.MonkeyPatch, recorded_events: list
) -> None:
    policy = make_policy()
    assert can_share(policy)
    plain = policy.network.base_model.forward
    monkeypatch.setattr(
        policy.network.base_model, "forward", lambda **given: plain(**(given | {"attention_mask": None}))
    )
    assert not can_share(policy)
    assert "does not follow a mask" in recorded_events[-1].text


def test_a_model_with_sliding_windows_takes_the_plain_path(make_policy: Callable) -> None:
    policy = make_policy()
    policy.network.config.layer_types = ["full_attention", "sliding_attention"]
    assert not can_share(policy)
