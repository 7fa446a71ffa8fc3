"""How far a policy is from its reference: KL(policy || reference), by Monte Carlo.

With y sampled from the policy and l_t = log policy(y_t | y_<t) - log reference(y_t | y_<t), two
estimators (Schulman 2020, "Approximating KL divergence"), summed over the tokens of an answer::

    k1 = sum_t l_t                          unbiased, may be negative
    k3 = sum_t (exp(-l_t) - 1 + l_t)        unbiased, every term >= 0, usually less variance

Both expect samples from the policy itself, at temperature 1 and without truncation of the
distribution; :class:`KLEstimate` says when they were not. ``max_tokens`` cuts the sum: the value is
then the divergence over the first tokens, a lower bound of the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from corrigible.errors import BadInputError, NumericsError
from corrigible.intervals import Estimate, cluster_bootstrap
from corrigible.records import Episode

if TYPE_CHECKING:
    from corrigible.models import LanguagePolicy

_LARGEST_EXPONENT = 700.0  # exp of more overflows float64


@dataclass(frozen=True)
class KLEstimate:
    """KL(policy || reference) in nats, per answer and per token, by both estimators.

    ``on_policy`` is False when the answers were not plain samples of the policy (temperature other
    than 1, top-p, top-k, min-p): the numbers are then mean log ratios under the sampler, still
    a measure of drift but no longer a KL divergence. ``sequences`` and ``tokens`` count what was used.
    """

    per_sequence: Estimate
    per_token: Estimate
    per_sequence_k3: Estimate
    per_token_k3: Estimate
    sequences: int
    tokens: int
    on_policy: bool

    @property
    def value(self) -> float:
        """Nats per answer, k1."""
        return self.per_sequence.value

    @property
    def interval(self) -> tuple[float, float]:
        return self.per_sequence.interval

    def to_json(self) -> dict[str, object]:
        return {
            "per_sequence": self.per_sequence.to_json(),
            "per_token": self.per_token.to_json(),
            "per_sequence_k3": self.per_sequence_k3.to_json(),
            "per_token_k3": self.per_token_k3.to_json(),
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
    on_policy: bool = True,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> KLEstimate:
    """Estimate from n answers, each (tokens,) log-probs under both, with intervals over ``clusters``.

    Pass the prompt of each answer as its cluster. Per token is the ratio of sums, so long answers
    weigh more.
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

    def estimate(column: int, per: ArrayLike | None) -> Estimate:
        return cluster_bootstrap(terms[:, column], clusters, per=per, level=level, draws=draws, seed=seed)

    return KLEstimate(
        per_sequence=estimate(0, None),
        per_token=estimate(0, lengths),
        per_sequence_k3=estimate(1, None),
        per_token_k3=estimate(1, lengths),
        sequences=len(terms),
        tokens=int(lengths.sum()),
        on_policy=on_policy,
    )


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
    Both log-probs are computed here, by the same code, so rounding of the generation path does not
    enter. Episodes without sampled tokens (a prompt that did not fit) are left out.

    Raises:
        BadInputError: no episode has sampled token ids.
    """
    from corrigible.models import Rendered, token_logprobs

    used = [e for e in episodes if e.steps[-1].token_ids and e.steps[-1].prompt_token_ids is not None]
    if not used:
        raise BadInputError(
            "none of the episodes carries the token ids that were sampled",
            advice="generate with this version of Corrigible; text alone is never tokenised again",
        )
    steps = [episode.steps[-1] for episode in used]
    rendered = [Rendered.from_tokens(s.prompt_token_ids or (), s.token_ids or ()) for s in steps]
    under_policy = token_logprobs(policy, rendered)
    if reference is None:
        with policy.adapter_disabled():
            under_reference = token_logprobs(policy, rendered)
    else:
        under_reference = token_logprobs(reference, rendered)
    plain = all(
        s is not None and (s.temperature, s.top_p, s.top_k, s.min_p) == (1.0, 1.0, None, 0.0)
        for s in (episode.sampling for episode in used)
    )
    return kl_estimate(
        [row.double().numpy() for row in under_policy],
        [row.double().numpy() for row in under_reference],
        [episode.prompt_item().sha256 for episode in used],
        on_policy=plain,
        level=level,
        draws=draws,
        seed=seed,
    )
