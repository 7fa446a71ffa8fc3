"""Which tokens a preference was about: a policy trained on preferences, read as a Q-function.

In the deterministic token process with KL coefficient beta the optimal policy is
``pi*(a|s) = exp((Q*(s,a) - V*(s)) / beta)``, so that (Rafailov et al. 2024, "From r to Q*: Your Language
Model is Secretly a Q-Function", section 4)::

    Q(s, a) = beta * logits(s)[a] + c(s)        V(s) = beta * logsumexp(logits(s)) + c(s)
    beta * log(pi / pi_ref)(a|s) = r(s, a) + V*(s') - V*(s)

The right side is the token's *credit*: how much better the token is than what the reference would have got,
shaped by a potential that telescopes over a response. ``c(s)`` is not identified: values of two states
cannot be compared, only actions of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from corrigible.align.config import ReferenceMode
from corrigible.align.passes import passes
from corrigible.align.reference_cache import ReferenceLogprobs
from corrigible.align.sources import row_key
from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy, Rendered
from corrigible.models.scoring import Scorer


@dataclass(frozen=True)
class SoftValues:
    """What logits say as a Q-function, up to one constant per state.

    Attributes:
        q: ``beta * logits``, ``(..., actions)``.
        v: ``beta * logsumexp(logits)``, ``(...,)``.
    """

    q: Tensor
    v: Tensor

    @property
    def advantage(self) -> Tensor:
        """``Q - V = beta * log pi``, ``(..., actions)``: at most 0; the constant cancels."""
        return self.q - self.v.unsqueeze(-1)


def soft_values(logits: Tensor, *, beta: float) -> SoftValues:
    """Logits ``(..., actions)`` read as Q-values.

    Args:
        logits: of one state each; float32 at least.
        beta: the KL coefficient that the policy was trained with, > 0.

    Raises:
        BadInputError: ``beta`` is not positive.
        NumericsError: ``logits_not_finite``: NaN, or +infinity (an impossible action is -infinity).
    """
    _check_beta(beta)
    if bool(torch.isnan(logits).any()) or bool((logits == torch.inf).any()):
        raise NumericsError("logits_not_finite: logits are NaN or infinite.")
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    return SoftValues(beta * wide, beta * torch.logsumexp(wide, dim=-1))


def token_credit(
    policy_logprobs: Sequence[Tensor],
    reference_logprobs: Sequence[Tensor],
    *,
    beta: float,
    visits: Sequence[Tensor] | None = None,
    at_least: int = 1,
) -> list[Tensor]:
    """``beta * (log pi - log pi_ref)`` of each token, per row.

    Args:
        policy_logprobs: per row, of its scored tokens, ``(tokens,)`` nats.
        reference_logprobs: the same under the reference.
        beta: the KL coefficient that the policy was trained with, > 0.
        visits: per row, how often each token was seen after what precedes it, ``(tokens,)``: what was
            never trained on has arbitrary credit.
        at_least: tokens seen less often have no credit (NaN).

    Returns:
        Per row ``(tokens,)``; NaN where there is none. The sum of a row without NaN is its implicit reward.

    Raises:
        BadInputError: rows that do not match, or ``beta`` is not positive.
        NumericsError: ``logps_not_finite``.
    """
    _check_beta(beta)
    found = []
    counts = visits if visits is not None else [None] * len(policy_logprobs)
    try:
        for mine, theirs, seen in zip(policy_logprobs, reference_logprobs, counts, strict=True):
            if mine.shape != theirs.shape or (seen is not None and seen.shape != mine.shape):
                raise BadInputError(
                    f"A row has {tuple(mine.shape)} log-probs under the policy and {tuple(theirs.shape)} "
                    "under the reference; both, and the visits, are of its scored tokens."
                )
            if not bool(torch.isfinite(mine).all()) or not bool(torch.isfinite(theirs).all()):
                raise NumericsError("logps_not_finite: a log-prob is NaN or infinite.")
            credit = beta * (mine - theirs)
            found.append(credit if seen is None else torch.where(seen >= at_least, credit, torch.nan))
    except ValueError as error:
        if isinstance(error, BadInputError):
            raise
        raise BadInputError("There must be as many rows under policy, reference and visits.") from error
    return found


def row_credit(
    policy: LanguagePolicy,
    rows: Sequence[Rendered],
    *,
    beta: float,
    reference: ReferenceMode | ReferenceLogprobs = "base",
    micro_batch_tokens: int = 4096,
) -> list[Tensor]:
    """The credit of every scored token of rendered rows under a trained policy; no gradient.

    Args:
        policy: the trained policy.
        rows: rendered conversations; :attr:`Rendered.scored` says which of their tokens the numbers are of.
        beta: the one it was trained with.
        reference: the policy without its adapter (``"base"``), or the log-probs that were computed before
            training (:func:`~corrigible.align.reference.reference_logprobs`).
        micro_batch_tokens: most tokens in one forward pass.

    Raises:
        BadInputError: no rows, a row that cannot be scored, or no reference: the policy has no adapter and
            no log-probs were given.
        NumericsError: the model gives NaN or an infinite value.
    """
    mine = _scored(policy, rows, micro_batch_tokens, without_adapter=False)
    if not isinstance(reference, str):
        missing = [index for index, row in enumerate(rows) if row_key(row) not in reference]
        if missing:
            raise BadInputError(
                f"The reference log-probs lack rows {missing[:8]}.",
                advice="Compute them with reference_logprobs(...) on the same rows.",
            )
        theirs = [reference[row_key(row)].to(mine[0]) for row in rows]
    else:
        if not policy.has_adapter:
            raise BadInputError(
                "A policy without adapter is its own reference, so its tokens have no credit.",
                advice="Pass reference=reference_logprobs(...) computed with the starting weights.",
            )
        theirs = _scored(policy, rows, micro_batch_tokens, without_adapter=True)
    return token_credit(mine, theirs, beta=beta)


def _scored(
    policy: LanguagePolicy, rows: Sequence[Rendered], budget: int, *, without_adapter: bool
) -> list[Tensor]:
    if not rows:
        raise BadInputError("There are no rows to give credit to.")
    score = Scorer(policy)
    found: dict[int, Tensor] = {}
    with torch.inference_mode(), policy.adapter_disabled() if without_adapter else nullcontext():
        for batch in passes(score, [(row,) for row in rows], budget):
            found |= dict(zip(batch, score([(rows[i],) for i in batch]), strict=True))
    return [found[index] for index in range(len(rows))]


def _check_beta(beta: float) -> None:
    if not 0.0 < beta < float("inf"):
        raise BadInputError(
            f"beta must be a positive number, got {beta}.", advice="It is the one of the training."
        )
