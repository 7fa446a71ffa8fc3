"""How far a policy is from its reference: KL(policy || reference), on answers that the policy gave.

An answer is one of more than can be counted, so the divergence is a mean over sampled ones. Before each
token y_t of a sampled answer both policies give a whole distribution, though, and its part of the
divergence needs no sampling. That is the estimator reported (Amini et al. 2025, "Better Estimation of
the Kullback-Leibler Divergence Between Language Models", arXiv:2504.10637; the Rao-Blackwell
estimator), with l_t = log policy(y_t | y_<t) - log reference(y_t | y_<t)::

    exact = sum_t KL(policy(. | y_<t) || reference(. | y_<t)) = sum_t E[l_t | y_<t]

It is unbiased, every term is >= 0, and of chance only which answers were drawn is left, not which token
at each place. Beside it the two that need the log-probs of the sampled tokens alone (Schulman 2020,
"Approximating KL divergence")::

    k1 = sum_t l_t                          unbiased, may be negative
    k3 = sum_t (exp(-l_t) - 1 + l_t)        unbiased, every term >= 0

All expect samples from the policy itself, at temperature 1 and without truncation of the
distribution; :class:`KLEstimate` says when they were not. ``max_tokens`` cuts the sum: the value is
then the divergence over the first tokens, a lower bound of the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corrigible.errors import BadInputError, NumericsError
from corrigible.intervals import Estimate, cluster_bootstrap
from corrigible.records import Episode

if TYPE_CHECKING:
    from corrigible.models import LanguagePolicy

Floats = NDArray[np.float64]

_LARGEST_EXPONENT = 700.0  # exp of more overflows float64


@dataclass(frozen=True)
class KLEstimate:
    """KL(policy || reference) in nats, per answer and per token.

    Attributes:
        per_sequence, per_token: by ``estimator``.
        per_sequence_k1, per_token_k1, per_sequence_k3, per_token_k3: from the sampled tokens alone.
        estimator: ``"exact"`` at each position, or ``"k1"`` where only log-probs of the tokens were known.
        sequences, tokens: how many were used.
        on_policy: False when the answers were not plain samples of the policy (temperature other than
            1, top-p, top-k, min-p): the numbers are then means over what the sampler wrote, still a
            measure of drift but no longer a KL divergence.
    """

    per_sequence: Estimate
    per_token: Estimate
    per_sequence_k1: Estimate
    per_token_k1: Estimate
    per_sequence_k3: Estimate
    per_token_k3: Estimate
    estimator: str
    sequences: int
    tokens: int
    on_policy: bool

    @property
    def value(self) -> float:
        """Nats per answer."""
        return self.per_sequence.value

    @property
    def interval(self) -> tuple[float, float]:
        return self.per_sequence.interval

    def to_json(self) -> dict[str, object]:
        return {
            "per_sequence": self.per_sequence.to_json(),
            "per_token": self.per_token.to_json(),
            "per_sequence_k1": self.per_sequence_k1.to_json(),
            "per_token_k1": self.per_token_k1.to_json(),
            "per_sequence_k3": self.per_sequence_k3.to_json(),
            "per_token_k3": self.per_token_k3.to_json(),
            "estimator": self.estimator,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "on_policy": self.on_policy,
        }


def kl_terms(policy_logprobs: ArrayLike, reference_logprobs: ArrayLike) -> tuple[float, float]:
    """(k1, k3) of one answer from the log-probs (tokens,) of its tokens under both, in nats.

    Raises:
        BadInputError: shapes that differ, or log-probs above 0.
        NumericsError: a log-prob that is NaN or infinite (the reference excludes a sampled token).
    """
    p = np.asarray(policy_logprobs, dtype=np.float64)
    q = np.asarray(reference_logprobs, dtype=np.float64)
    if p.ndim != 1 or p.shape != q.shape:
        raise BadInputError(
            f"log-probs of one answer must be two rows of shape (tokens,), not {p.shape} and {q.shape}"
        )
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        raise NumericsError(
            "a token has log-prob NaN or minus infinity under one of the two policies",
            advice="the divergence is infinite or undefined; check that both share one vocabulary",
        )
    if (p > 1e-4).any() or (q > 1e-4).any():
        raise BadInputError("log-probs above 0: were probabilities or logits passed?")
    ratio = p - q
    return float(ratio.sum()), float((np.exp(np.minimum(-ratio, _LARGEST_EXPONENT)) - 1 + ratio).sum())


def kl_estimate(
    policy_logprobs: Sequence[ArrayLike],
    reference_logprobs: Sequence[ArrayLike],
    clusters: Sequence[Hashable] | None = None,
    *,
    divergences: Sequence[ArrayLike] | None = None,
    on_policy: bool = True,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> KLEstimate:
    """Estimate from n answers, each (tokens,) log-probs under both, with intervals over ``clusters``.

    Args:
        policy_logprobs, reference_logprobs: of each answer's sampled tokens.
        clusters: pass the prompt of each answer. Per token is the ratio of sums, so long answers weigh more.
        divergences: of each answer, ``(tokens,)`` divergences of the two next-token distributions before
            each token; with them the estimate is the exact one, without them k1.
        on_policy: whether the answers are plain samples of the policy.
        level, draws, seed: of the intervals (:func:`~corrigible.intervals.cluster_bootstrap`).

    Raises:
        BadInputError: no answers, no tokens, shapes that differ, log-probs above 0, divergences below 0.
        NumericsError: a value that is NaN or infinite.
    """
    if len(policy_logprobs) != len(reference_logprobs) or not len(policy_logprobs):
        raise BadInputError(
            f"{len(policy_logprobs)} answers under the policy and {len(reference_logprobs)} under the "
            "reference; at least one, and the same, are needed"
        )
    terms = np.array([kl_terms(p, q) for p, q in zip(policy_logprobs, reference_logprobs, strict=True)])
    lengths = np.array([len(np.asarray(p)) for p in policy_logprobs], dtype=np.float64)
    if not lengths.sum():
        raise BadInputError("no answer has a token: there is nothing to estimate a divergence from")
    sampled = {"k1": terms[:, 0], "k3": terms[:, 1]}
    best = sampled["k1"] if divergences is None else _exact_terms(divergences, lengths)

    def estimate(values: Floats, per: ArrayLike | None) -> Estimate:
        return cluster_bootstrap(values, clusters, per=per, level=level, draws=draws, seed=seed)

    return KLEstimate(
        per_sequence=estimate(best, None),
        per_token=estimate(best, lengths),
        per_sequence_k1=estimate(sampled["k1"], None),
        per_token_k1=estimate(sampled["k1"], lengths),
        per_sequence_k3=estimate(sampled["k3"], None),
        per_token_k3=estimate(sampled["k3"], lengths),
        estimator="k1" if divergences is None else "exact",
        sequences=len(terms),
        tokens=int(lengths.sum()),
        on_policy=on_policy,
    )


def _exact_terms(divergences: Sequence[ArrayLike], lengths: Floats) -> Floats:
    """Each answer's sum over its tokens, ``(n,)``."""
    rows = [np.asarray(row, dtype=np.float64) for row in divergences]
    if [row.shape for row in rows] != [(int(length),) for length in lengths]:
        raise BadInputError("divergences must be one row of shape (tokens,) an answer, one per log-prob")
    if any((row < 0).any() for row in rows):
        raise BadInputError("a divergence below 0: were log ratios passed?")
    return np.array([row.sum() for row in rows])


def kl_to_reference(
    episodes: Sequence[Episode],
    policy: LanguagePolicy,
    reference: LanguagePolicy | None = None,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> KLEstimate:
    """Estimate from episodes that ``policy`` produced, on the token ids that it sampled.

    Without ``reference`` it is the same model with its adapter disabled, so nothing is loaded twice.
    Both distributions are computed here, by the same code, so rounding of the generation path does not
    enter. Episodes without sampled tokens (a prompt that did not fit) are left out.

    Raises:
        BadInputError: no episode has sampled token ids, or the two have different vocabularies.
    """
    from corrigible.models import Rendered, token_divergences

    used = [e for e in episodes if e.steps[-1].token_ids and e.steps[-1].prompt_token_ids is not None]
    if not used:
        raise BadInputError(
            "none of the episodes carries the token ids that were sampled",
            advice="generate with this version of Corrigible; text alone is never tokenised again",
        )
    steps = [episode.steps[-1] for episode in used]
    rendered = [Rendered.from_tokens(s.prompt_token_ids or (), s.token_ids or ()) for s in steps]
    found = token_divergences(policy, rendered, reference)
    divergences, mine, theirs = (
        [row.double().cpu().numpy() for row in rows or ()]
        for rows in (found.divergences, found.logprobs, found.other_logprobs)
    )
    plain = all(
        s is not None and (s.temperature, s.top_p, s.top_k, s.min_p) == (1.0, 1.0, None, 0.0)
        for s in (episode.sampling for episode in used)
    )
    return kl_estimate(
        mine,
        theirs,
        [episode.prompt_item().sha256 for episode in used],
        divergences=divergences,
        on_policy=plain,
        level=level,
        draws=draws,
        seed=seed,
    )
