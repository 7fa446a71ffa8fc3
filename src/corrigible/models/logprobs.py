"""Log-probabilities of completions, and divergences along them, cut into forward passes of a bounded size.

Equal to the plain reference; how, is :mod:`corrigible.models.scoring`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch

from corrigible.errors import BadInputError
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered
from corrigible.models.scoring import RowDivergences, Scorer, check_rows

TOKEN_BUDGET = 4096
"""Tokens (padding included) in one forward pass unless told otherwise."""


@overload
def sequence_logprobs(
    policy: LanguagePolicy,
    batch: Sequence[Rendered],
    *,
    reduce: Literal["sum", "mean"] = "sum",
    grad: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> torch.Tensor: ...


@overload
def sequence_logprobs(
    policy: LanguagePolicy,
    batch: Sequence[Rendered],
    *,
    reduce: None,
    grad: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> list[torch.Tensor]: ...


def sequence_logprobs(
    policy: LanguagePolicy,
    batch: Sequence[Rendered],
    *,
    reduce: Literal["sum", "mean"] | None = "sum",
    grad: bool = False,
    token_budget: int = TOKEN_BUDGET,
) -> torch.Tensor | list[torch.Tensor]:
    """Log-probability of each completion given what stands before it, at temperature 1, in nats.

    Args:
        policy: the model; dropout follows its train/eval mode.
        batch: ``n`` rendered conversations; scored are the tokens of kind SAMPLED and NOT_SAMPLED.
        reduce: ``"sum"`` over a completion's tokens, ``"mean"`` per token, or None: all of them.
        grad: build the graph for a backward pass.
        token_budget: tokens in one forward pass.

    Returns:
        ``(n,)`` float32, or with ``reduce=None`` a list of ``n`` tensors ``(scored tokens,)``.

    Raises:
        BadInputError: an empty batch, nothing to score in a row (it would count as certain), a
            scored token with nothing before it, a row longer than the context.
        NumericsError: the model gives NaN or an infinite value for a row.
    """
    ragged = token_logprobs(policy, batch, grad=grad, token_budget=token_budget)
    if reduce is None:
        return ragged
    if reduce not in ("sum", "mean"):
        raise BadInputError(f"reduce is 'sum', 'mean' or None, not {reduce!r}.")
    return torch.stack([row.sum() if reduce == "sum" else row.mean() for row in ragged])


def token_logprobs(
    policy: LanguagePolicy, batch: Sequence[Rendered], *, grad: bool = False, token_budget: int = TOKEN_BUDGET
) -> list[torch.Tensor]:
    """As :func:`sequence_logprobs` with ``reduce=None``: one float32 tensor ``(scored tokens,)`` per row."""
    check_rows(policy, batch)
    scorer = Scorer(policy)
    results: list[torch.Tensor | None] = [None] * len(batch)
    for rows in _micro_batches(batch, token_budget):
        for i, values in zip(rows, scorer([[batch[i] for i in rows]], grad=grad), strict=True):
            results[i] = values
    return [values for values in results if values is not None]


def token_divergences(
    policy: LanguagePolicy,
    batch: Sequence[Rendered],
    other: LanguagePolicy | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
) -> RowDivergences:
    """KL(policy || other) of the whole next-token distribution before each scored token; no gradient.

    Args:
        policy: the model.
        batch: ``n`` rendered conversations.
        other: a policy of the same vocabulary; by default ``policy`` with its adapter disabled.
        token_budget: tokens in one forward pass.

    Returns:
        Per row ``(scored tokens,)`` float32 nats: the divergences, and the log-probs of the scored tokens
        under both.

    Raises:
        BadInputError: as :func:`sequence_logprobs` does; two vocabularies; no ``other`` and no adapter.
        NumericsError: either model gives NaN or an infinite value.
    """
    check_rows(policy, batch)
    scorer, reference = Scorer(policy), None if other is None else Scorer(other)
    found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] = [None] * len(batch)
    for rows in _micro_batches(batch, token_budget):
        part = scorer.divergence([[batch[i] for i in rows]], reference, logprobs=True)
        each = (part.divergences, part.logprobs or [], part.other_logprobs or [])
        for i, *values in zip(rows, *each, strict=True):
            found[i] = (values[0], values[1], values[2])
    divergences, mine, theirs = zip(*(values for values in found if values is not None), strict=True)
    return RowDivergences(list(divergences), list(mine), list(theirs))


def _micro_batches(batch: Sequence[Rendered], token_budget: int) -> Iterator[list[int]]:
    lengths = [row.scored[-1] for row in batch]
    rows: list[int] = []
    # Longest first, so that a batch that does not fit fails at once.
    for i in sorted(range(len(batch)), key=lambda i: -lengths[i]):
        if rows and lengths[rows[0]] * (len(rows) + 1) > token_budget:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows
