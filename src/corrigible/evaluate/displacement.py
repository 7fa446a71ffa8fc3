"""Likelihood displacement: whether training on preferences made even the preferred answers less likely.

A preference loss only asks that chosen answers gain on rejected ones; both may fall. That is harmless while
what gains is better, and is the first sign of trouble when the policy's entropy grows with it (Razin et al.
2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization").
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corrigible.errors import BadInputError, NumericsError
from corrigible.intervals import Estimate, cluster_bootstrap

if TYPE_CHECKING:
    from corrigible.align import PairSource
    from corrigible.models import LanguagePolicy


@dataclass(frozen=True)
class Displacement:
    """What happened to the answers of comparisons since training began.

    Attributes:
        chosen: mean change of the chosen answers' log-prob, nats, with its interval.
        rejected: of the rejected ones'.
        margin: mean change of the difference; what the loss asks to be positive.
        both_fell: share of comparisons in which both sides became less likely.
        displaced: share in which the chosen side did.
        entropy: mean change of the policy's entropy per token on these answers, nats; ``None`` if unknown.
    """

    chosen: Estimate
    rejected: Estimate
    margin: Estimate
    both_fell: float
    displaced: float
    entropy: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "chosen": self.chosen.to_json(),
            "rejected": self.rejected.to_json(),
            "margin": self.margin.to_json(),
            "both_fell": self.both_fell,
            "displaced": self.displaced,
            "entropy": self.entropy,
        }


def displacement(
    chosen_change: ArrayLike,
    rejected_change: ArrayLike,
    *,
    entropy_change: float | None = None,
    clusters: Sequence[Hashable] | None = None,
) -> Displacement:
    """Sum up the changes of comparisons.

    Args:
        chosen_change: log-prob of each chosen answer now minus at the start, ``(n,)`` nats.
        rejected_change: of each rejected answer, ``(n,)``.
        entropy_change: mean change of the entropy per token, nats.
        clusters: what hangs together (prompts, topics), one a comparison; each its own when absent.

    Raises:
        BadInputError: shapes differ, or there are none.
        NumericsError: ``logps_not_finite``.
    """
    chosen, rejected = (np.asarray(v, dtype=np.float64) for v in (chosen_change, rejected_change))
    if chosen.ndim != 1 or chosen.shape != rejected.shape or not len(chosen):
        raise BadInputError(f"Both changes must be (n,), got {chosen.shape} and {rejected.shape}.")
    if not np.isfinite(chosen).all() or not np.isfinite(rejected).all():
        raise NumericsError("logps_not_finite: a change of log-prob is NaN or infinite.")
    return Displacement(
        chosen=cluster_bootstrap(chosen, clusters),
        rejected=cluster_bootstrap(rejected, clusters),
        margin=cluster_bootstrap(chosen - rejected, clusters),
        both_fell=float(((chosen < 0) & (rejected < 0)).mean()),
        displaced=float((chosen < 0).mean()),
        entropy=entropy_change,
    )


def measure_displacement(
    policy: LanguagePolicy, source: PairSource, *, micro_batch_tokens: int = 4096
) -> Displacement:
    """Displacement of a trained policy from itself without its adapter, on rendered comparisons; no gradient.

    Raises:
        BadInputError: the policy has no adapter, so that its starting weights are not held.
        NumericsError: the model gives NaN or an infinite value.
    """
    now = _scored(policy, source, micro_batch_tokens)
    with policy.adapter_disabled():
        before = _scored(policy, source, micro_batch_tokens)
    change = now.logps - before.logps
    return displacement(
        change[:, 0],
        change[:, 1],
        entropy_change=now.entropy - before.entropy,
        clusters=[example.group for example in source.examples],
    )


@dataclass(frozen=True)
class _Scored:
    logps: NDArray[np.float64]
    entropy: float


def _scored(policy: LanguagePolicy, source: PairSource, budget: int) -> _Scored:
    """Summed log-probs of both sides, ``(n, 2)``, and the mean entropy per token."""
    import torch

    from corrigible.align.passes import passes
    from corrigible.models.scoring import Scorer

    score = Scorer(policy)
    examples = source.examples
    logps = np.zeros((len(examples), 2))
    entropies: dict[tuple[int, int], NDArray[np.float64]] = {}
    with torch.inference_mode():
        for batch in passes(score, [example.rows for example in examples], budget):
            found = score.scores([examples[i].rows for i in batch], entropy=True)
            assert found.entropies is not None
            sides = [(index, side) for index in batch for side in (0, 1)]
            for place, logprobs, entropy in zip(sides, found.logprobs, found.entropies, strict=True):
                logps[place] = float(logprobs.double().sum())
                entropies[place] = entropy.double().cpu().numpy()
    return _Scored(logps, float(np.concatenate(list(entropies.values())).mean()))
