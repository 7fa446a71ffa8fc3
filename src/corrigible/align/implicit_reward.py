"""The reward a policy implies, read as a preference model and tested on comparisons it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from corrigible.align.config import ReferenceMode
from corrigible.align.passes import passes
from corrigible.align.reference import reference_logprobs
from corrigible.align.reference_cache import ReferenceLogprobs
from corrigible.align.sources import PairSource, row_key
from corrigible.errors import BadInputError
from corrigible.events import Metric, Progress, emit
from corrigible.intervals import Estimate, cluster_bootstrap
from corrigible.models import LanguagePolicy
from corrigible.models.scoring import Scorer
from corrigible.rewards.baselines import accuracy_rows
from corrigible.rewards.splits import clusters, resolve_rule
from corrigible.store import Pair


@dataclass(frozen=True)
class ImplicitReward:
    """How well a policy's implicit reward orders comparisons.

    Attributes:
        accuracy: share of the pairs with a majority that are ordered like it, with its interval over
            independent units (prompts, topics or items).
        margins: ``beta * (h_chosen - h_rejected)`` of every scored pair, ``(n,)`` nats.
        ties: pairs without a majority, which accuracy leaves out.
        skipped: pairs that could not be scored, by reason.
    """

    accuracy: Estimate
    margins: NDArray[np.float64]
    ties: int
    skipped: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single margins, as plain data."""
        return {
            "accuracy": self.accuracy.to_json(),
            "mean_margin": float(self.margins.mean()),
            "ties": self.ties,
            "skipped": self.skipped,
        }


def implicit_reward_accuracy(
    policy: LanguagePolicy,
    pairs: Sequence[Pair] | PairSource,
    *,
    beta: float = 0.1,
    reference: ReferenceMode | ReferenceLogprobs = "base",
    max_length: int = 512,
    micro_batch_tokens: int = 4096,
    by: str = "auto",
) -> ImplicitReward:
    """Accuracy of ``beta * (log pi - log pi_ref)`` as a predictor of which side people prefer.

    Args:
        policy: the trained policy.
        pairs: held-out comparisons, or a source that has rendered them.
        beta: the one it was trained with; scales margins, not accuracy.
        reference: where the reference log-probs come from: the model without its adapter
            (``"base"``), or those that were computed before training.
        max_length: longest row in tokens, as in training.
        micro_batch_tokens: most tokens in one forward pass.
        by: which pairs hang together, for the interval (:mod:`corrigible.rewards.splits`).

    Raises:
        BadInputError: no pair can be scored, every one is a tie, or there is no reference: the
            policy has no adapter and no log-probs were given.
    """
    if isinstance(pairs, PairSource):
        source = pairs
    else:
        source = PairSource(pairs, policy.renderer, max_length=max_length, invalid="skip")
    if isinstance(reference, str):
        if not policy.has_adapter:
            raise BadInputError(
                "A policy without adapter is its own reference, so it implies no reward.",
                advice="Pass reference=reference_logprobs(...) computed with the starting weights.",
            )
        reference = reference_logprobs(
            policy, source.examples, mode=reference, micro_batch_tokens=micro_batch_tokens
        )
    score = Scorer(policy)
    examples = source.examples
    ratios = np.zeros((len(examples), 2))
    done = 0
    with torch.inference_mode():
        for batch in passes(score, [example.rows for example in examples], micro_batch_tokens):
            scores = iter(score([examples[i].rows for i in batch]))
            for index in batch:
                for side, row in enumerate(examples[index].rows):
                    policy_logp = float(next(scores).double().sum())
                    ratios[index, side] = policy_logp - float(reference[row_key(row)].double().sum())
            done += len(batch)
            emit(Progress(task="implicit reward", done=done, total=len(examples), unit="pair"))
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    right = accuracy_rows(margins, np.array([example.p_chosen for example in source.examples]))
    decided = np.isfinite(right)
    if not decided.any():
        raise BadInputError("Every held-out pair is a tie.", advice="Accuracy needs pairs with a majority.")
    units = clusters(source.pairs, resolve_rule(source.pairs, by))
    estimate = cluster_bootstrap(
        right[decided],
        [unit for unit, keep in zip(units, decided, strict=True) if keep],
        bounds=(0.0, 1.0),
    )
    emit(
        Metric(
            name="held_out/implicit_reward_accuracy",
            value=estimate.value,
            interval=estimate.interval,
        )
    )
    return ImplicitReward(estimate, margins, int((~decided).sum()), dict(source.skipped))
