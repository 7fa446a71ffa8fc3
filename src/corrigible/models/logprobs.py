"""Log-probabilities of completions, batched, equal to the plain reference.

What carries no signal is not computed: tokens after the last scored one are cut, the output head
(a third of SmolLM2) runs on scored positions only, rows are sorted by length so that little is
padding, and the logits of at most a bounded number of positions exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from torch.utils.checkpoint import checkpoint

from corrigible.errors import BadInputError, NumericsError
from corrigible.models.policy import LanguagePolicy
from corrigible.models.renderer import Rendered

TOKEN_BUDGET = 4096
"""Tokens (padding included) in one forward pass unless told otherwise."""

LOGITS_BYTES = 128 << 20
"""How much memory the logits may take at a time."""


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
    scored = _check(policy, batch)
    results: list[torch.Tensor | None] = [None] * len(batch)
    with torch.set_grad_enabled(grad):
        for rows in _micro_batches(scored, token_budget):
            flat = _forward(policy, [batch[i] for i in rows], [scored[i] for i in rows])
            for i, values in zip(rows, torch.split(flat, [len(scored[i]) for i in rows]), strict=True):
                results[i] = values
    finished = [values for values in results if values is not None]
    for i, values in enumerate(finished):
        if not bool(values.detach().isfinite().all()):
            raise NumericsError(
                f"The log-probabilities of row {i} are not finite.",
                advice="Something overflowed: lower the learning rate, or use float32 or bfloat16.",
            )
    return finished


def _check(policy: LanguagePolicy, batch: Sequence[Rendered]) -> list[tuple[int, ...]]:
    if not batch:
        raise BadInputError("The batch is empty: there is nothing to score.")
    scored = [rendered.scored for rendered in batch]
    for i, (rendered, positions) in enumerate(zip(batch, scored, strict=True)):
        if not positions:
            raise BadInputError(
                f"Row {i} of the batch has no scored token (an answer of length zero?).",
                advice="Leave it out, or render it with its end-of-turn token.",
            )
        if positions[0] == 0:
            raise BadInputError(f"Row {i} of the batch scores its first token, but nothing stands before it.")
        if len(rendered) > policy.context_length:
            raise BadInputError(
                f"Row {i} has {len(rendered)} tokens; {policy.name} reads {policy.context_length}.",
                advice="Leave it out, or use renderer.fit(rendered, max_length, policy='truncate_prompt').",
            )
    return scored


def _micro_batches(scored: Sequence[tuple[int, ...]], token_budget: int) -> Iterator[list[int]]:
    rows: list[int] = []
    # Longest first, so that a batch that does not fit fails at once.
    for i in sorted(range(len(scored)), key=lambda i: -scored[i][-1]):
        if rows and scored[rows[0]][-1] * (len(rows) + 1) > token_budget:
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def _forward(
    policy: LanguagePolicy, batch: Sequence[Rendered], scored: Sequence[tuple[int, ...]]
) -> torch.Tensor:
    """``(all scored tokens of the batch,)``, row after row."""
    # The last scored token is predicted, never read. Padding stands on the right, so with causal
    # attention no scored position sees it: no mask is needed, and positions count from 0 in each row.
    width = max(positions[-1] for positions in scored)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    read, targets = [], []
    for row, (rendered, positions) in enumerate(zip(batch, scored, strict=True)):
        ids[row, : positions[-1]] = torch.tensor(rendered.ids[: positions[-1]])
        read += [row * width + position - 1 for position in positions]
        targets += [rendered.ids[position] for position in positions]
    device = policy.device
    ids, where, wanted = (
        ids.to(device),
        torch.tensor(read, device=device),
        torch.tensor(targets, device=device),
    )
    if policy.head_is_plain:
        states = policy.hidden_states(ids)
        states = states.reshape(-1, states.shape[-1]).index_select(0, where)
        head = policy.head
    else:
        logits = policy.network(input_ids=ids, use_cache=False).logits
        states = logits.reshape(-1, logits.shape[-1]).index_select(0, where)

        def head(hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    def score(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = head(hidden).float()
        return logits.gather(-1, target[:, None])[:, 0] - logits.logsumexp(dim=-1)

    chunk = max(1, LOGITS_BYTES // (4 * int(policy.network.config.vocab_size)))
    if len(targets) <= chunk:
        return score(states, wanted)
    parts = zip(torch.split(states, chunk), torch.split(wanted, chunk), strict=True)
    if torch.is_grad_enabled():
        # Each chunk's logits are computed again in the backward pass instead of being kept.
        return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in parts])
    return torch.cat([score(h, t) for h, t in parts])
