"""Batched log-probabilities equal the plain reference, value and gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy, Rendered, TokenKind, head, logprobs_reference
from corrigible.models.logprobs import sequence_logprobs, token_logprobs


def rendered_batch(count: int = 9, seed: int = 0) -> list[Rendered]:
    """Ragged, with unscored tokens between and after scored ones, and the pad id among the scored."""
    rng = random.Random(seed)
    batch = []
    for _ in range(count):
        length = rng.randint(2, 40)
        ids = [rng.choice([2, rng.randrange(259)]) for _ in range(length)]
        kinds = [TokenKind.PROMPT] + [TokenKind(rng.randrange(4)) for _ in range(length - 1)]
        kinds[rng.randrange(1, length)] = TokenKind.SAMPLED
        batch.append(Rendered(tuple(ids), tuple(kinds)))
    return batch


def reference(policy: LanguagePolicy, rendered: Rendered) -> torch.Tensor:
    table = logprobs_reference(policy, rendered.ids)
    return torch.tensor(
        [
            float(table[i - 1])
            for i, k in enumerate(rendered.kinds)
            if k in (TokenKind.SAMPLED, TokenKind.NOT_SAMPLED)
        ]
    )


@pytest.mark.parametrize("token_budget", [1, 64, 4096])
def test_equals_the_reference(shared_policy: LanguagePolicy, token_budget: int) -> None:
    batch = rendered_batch()
    expected = [reference(shared_policy, r) for r in batch]
    got = token_logprobs(shared_policy, batch, token_budget=token_budget)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    sums = sequence_logprobs(shared_policy, batch, token_budget=token_budget)
    torch.testing.assert_close(sums, torch.stack([e.sum() for e in expected]), atol=1e-4, rtol=0)
    means = sequence_logprobs(shared_policy, batch, reduce="mean", token_budget=token_budget)
    torch.testing.assert_close(means, torch.stack([e.mean() for e in expected]), atol=1e-5, rtol=0)
    ragged = sequence_logprobs(shared_policy, batch, reduce=None)
    assert [len(r) for r in ragged] == [len(e) for e in expected]
    assert not sums.requires_grad


def test_the_reference_by_hand(shared_policy: LanguagePolicy) -> None:
    """The reference itself, against a softmax written out in float64."""
    ids = [1, 70, 80, 2, 2, 90]
    with torch.no_grad():
        logits = shared_policy.model(input_ids=torch.tensor([ids])).logits[0].double()
    for position, value in enumerate(logprobs_reference(shared_policy, ids).tolist()):
        row = logits[position].exp()
        assert value == pytest.approx(float((row[ids[position + 1]] / row.sum()).log()), abs=1e-5)


def test_chunked_head_equals_whole_in_value_and_gradient(
    policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = rendered_batch()

    def gradient() -> tuple[torch.Tensor, list[torch.Tensor]]:
        policy.model.zero_grad()
        total = sequence_logprobs(policy, batch, grad=True).sum()
        total.backward()
        return total.detach(), [p.grad.clone() for p in policy.model.parameters()]

    whole, gradients = gradient()
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * 259 * 7)
    monkeypatch.setattr(head, "KEEP_BYTES", 0)
    chunked, chunked_gradients = gradient()
    torch.testing.assert_close(whole, chunked)
    for one, other in zip(gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)

    # And the gradient is that of the plain computation.
    policy.model.zero_grad()
    total = torch.zeros(())
    for r in batch:
        table = torch.log_softmax(policy.model(input_ids=torch.tensor([r.ids])).logits[0], dim=-1)
        total = total + sum(table[i - 1, r.ids[i]] for i in r.scored)
    total.backward()
    for one, p in zip(gradients, policy.model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, atol=1e-3, rtol=1e-4)


def test_the_end_of_turn_embedding_learns_although_it_is_the_pad(policy: LanguagePolicy) -> None:
    """Read, never predicted here: only the input side of the (tied) embedding can have a gradient of it."""
    model = policy.model
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    rendered = Rendered((1, 2, 70), (TokenKind.PROMPT, TokenKind.PROMPT, TokenKind.SAMPLED))
    sequence_logprobs(policy, [rendered], grad=True).sum().backward()
    assert float(model.get_input_embeddings().weight.grad[2].abs().sum()) > 0


def test_a_head_that_is_not_plain_is_noticed(policy: LanguagePolicy) -> None:
    """Some models cap or scale their logits; the short cut must not be taken for those."""
    batch = rendered_batch(4)
    plain = sequence_logprobs(policy, batch)
    assert policy.head_is_plain
    forward = policy.model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 2) * 2
        return output

    policy.model.forward = capped
    policy._head_is_plain = policy.plain_path = None
    assert not policy.head_is_plain
    got = sequence_logprobs(policy, batch)
    assert not torch.allclose(got, plain, atol=0.1)
    torch.testing.assert_close(
        got, torch.stack([reference(policy, r).sum() for r in batch]), atol=1e-4, rtol=0
    )


def test_what_cannot_be_scored_is_an_error(policy: LanguagePolicy) -> None:
    good = Rendered.from_tokens([1, 70], [80])
    with pytest.raises(BadInputError, match="batch is empty"):
        sequence_logprobs(policy, [])
    with pytest.raises(BadInputError, match=r"Row 1 .* no scored token"):
        sequence_logprobs(policy, [good, Rendered.from_tokens([1, 70], [])])
    with pytest.raises(BadInputError, match="nothing stands before"):
        sequence_logprobs(policy, [Rendered.from_tokens([], [80])])
    with pytest.raises(BadInputError, match=r"Row 0 has 1025 tokens.*reads 1024"):
        sequence_logprobs(policy, [Rendered.from_tokens([1] * 1024, [80])])
    with pytest.raises(BadInputError, match="reduce"):
        sequence_logprobs(policy, [good], reduce="max")  # type: ignore[call-overload]
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[70] = torch.nan
    with pytest.raises(NumericsError, match="row 0 are not finite"):
        sequence_logprobs(policy, [Rendered.from_tokens([1], [2]), good])
