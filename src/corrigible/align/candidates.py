"""Which sampled answers to keep, and which to compare: pure functions of scores and a random generator.

:func:`rejection` draws from the optimal policy by keeping some samples of the starting one (RSO: Liu et al.
2023, "Statistical Rejection Sampling Improves Preference Optimization"). A *pairing* says which of the
candidates meet; who wins is decided by their scores (a ranker, a verifier), hard, as a soft label, or drawn.
Everything is in indices of the candidates; :func:`pairs_of` puts texts to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from corrigible.errors import BadInputError, NumericsError
from corrigible.records.items import messages_text, sha256_of_text
from corrigible.store import Demonstrated, Pair, Ranked
from corrigible.store.signals import Turn

Pairing = Literal["direct", "first_round", "tournament", "best_vs_random", "all_pairs", "best_vs_worst"]
"""Who meets whom; see :func:`meetings`."""

Labels = Literal["hard", "soft", "sampled"]
"""How a meeting is decided: by the higher score, as ``sigma(gap / scale)``, or by a draw with that chance."""


# -- sampling ----------------------------------------------------------------------------------------


def acceptance(scores: ArrayLike, beta: float) -> NDArray[np.float64]:
    """``exp((r - max r) / beta)``, ``(n,)``: the chance of each candidate in one pass; the best has 1."""
    values = _finite(scores)
    gap = values - values.max()
    if beta == 0.0:
        return np.asarray(gap == 0.0, dtype=np.float64)
    return np.ones_like(values) if math.isinf(beta) else np.exp(gap / beta)


def rejection(
    scores: ArrayLike,
    k: int,
    beta: float,
    rng: np.random.Generator,
    *,
    texts: Sequence[Hashable] | None = None,
) -> list[int]:
    """``k`` candidates by statistical rejection sampling: indices, in the order they were accepted.

    Passes over the candidates that are left, in a random order: each is accepted with
    ``exp((r - r_max) / beta)``, ``r_max`` being the best of those left when the pass began, until there are
    ``k``. ``beta`` 0 gives the ``k`` best (ties at random), infinity a plain draw.

    The paper's appendix code differs in three ways that are errors there: equal texts collapse without a
    word, it loops for ever (or fails) when fewer than ``k`` are left, and as it takes candidates in the
    order they came, the early ones win.

    Args:
        scores: of each candidate, ``(n,)``, in the unit that makes ``beta`` mean something (the ranker's
            logits); NaN for one that could not be scored, which is never accepted.
        k: how many, >= 1; if fewer different ones can be had, all of them.
        beta: temperature, >= 0.
        rng: of the order and of the draws.
        texts: of each candidate; of equal ones only the first is kept.

    Raises:
        BadInputError: ``k`` or ``beta`` is out of range, or no candidate has a score.
    """
    values = np.asarray(scores, dtype=np.float64)
    if k < 1:
        raise BadInputError(f"k must be at least 1, got {k}.")
    if math.isnan(beta) or beta < 0.0:
        raise BadInputError(f"beta must be 0 or more, got {beta}.", advice="The paper uses 0.5.")
    left = usable(values, texts)
    if not left:
        raise BadInputError("No candidate has a score.", advice="Score them first; NaN is 'not scored'.")
    found: list[int] = []
    while left and len(found) < k:
        chance = acceptance(values[left], beta)
        accepted: list[int] = []
        for place in rng.permutation(len(left)):
            # The best one has chance 1 and a draw is below 1: every pass accepts at least one.
            if rng.random() < chance[place]:
                accepted.append(left[place])
                if len(found) + len(accepted) == k:
                    break
        found += accepted
        left = [index for index in left if index not in set(accepted)]
    return found


def usable(scores: ArrayLike, texts: Sequence[Hashable] | None = None) -> list[int]:
    """Candidates with a score, and of equal texts the first only.

    Raises:
        BadInputError: not one text per score.
        NumericsError: ``score_infinite``.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or (texts is not None and len(texts) != len(values)):
        raise BadInputError(f"One score and one text per candidate, got scores of shape {values.shape}.")
    if np.isinf(values).any():
        raise NumericsError("score_infinite: a score is infinite; NaN is 'not scored'.")
    seen: set[Hashable] = set()
    found: list[int] = []
    for index in np.flatnonzero(~np.isnan(values)).tolist():
        key = index if texts is None else texts[index]
        if key not in seen:
            seen.add(key)
            found.append(index)
    return found


def _finite(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise NumericsError("score_not_finite: scores must be one finite number per candidate.")
    return values


# -- pairing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """Two candidates that met.

    Attributes:
        chosen: index of the preferred one.
        rejected: index of the other.
        p_chosen: how sure that is; 0.5 for a tie.
        gap: score of chosen minus score of rejected; negative when a draw went against the scores.
    """

    chosen: int
    rejected: int
    p_chosen: float
    gap: float


Decide = Callable[[int, int], Contest]


def build_pairs(
    pairing: Pairing,
    scores: ArrayLike,
    rng: np.random.Generator,
    *,
    texts: Sequence[Hashable] | None = None,
    labels: Labels = "hard",
    scale: float = 1.0,
) -> list[Contest]:
    """The contests of one prompt's candidates.

    * ``direct``: as they came, first against second, third against fourth, ...;
    * ``first_round``: the same after a shuffle (RSO's default);
    * ``tournament``: a knock-out after a shuffle, whose winners go on: n - 1 contests;
    * ``best_vs_random``: the best against one of the others;
    * ``best_vs_worst``; ``all_pairs``: everyone against everyone.

    Args:
        pairing: which.
        scores: of each candidate, ``(n,)``; NaN leaves one out.
        rng: of shuffles, opponents, draws, and of who is named first in a tie.
        texts: of each candidate; equal texts never meet (the first one stands for them).
        labels: how a contest is decided.
        scale: score difference that makes odds of e : 1, > 0; for soft and sampled labels.

    Returns:
        No contest when fewer than two candidates are left.

    Raises:
        BadInputError: an unknown pairing or ``labels``, or a ``scale`` that is not positive.
    """
    if pairing not in get_args(Pairing) or labels not in get_args(Labels) or not scale > 0.0:
        raise BadInputError(
            f"pairing={pairing!r}, labels={labels!r}, scale={scale} will not do.",
            advice=f"Pairings: {', '.join(get_args(Pairing))}. Labels: {', '.join(get_args(Labels))}.",
        )
    values = np.asarray(scores, dtype=np.float64)
    left = usable(values, texts)
    if len(left) < 2:
        return []

    def decide(a: int, b: int) -> Contest:
        return contest(a, b, values, rng, labels, scale)

    return meetings(pairing, left, values, rng, decide)


def meetings(
    pairing: Pairing,
    left: Sequence[int],
    scores: NDArray[np.float64],
    rng: np.random.Generator,
    decide: Decide,
) -> list[Contest]:
    """Who meets whom among ``left``; ``decide`` says who wins (a ranker may be asked each time)."""
    order = list(left) if pairing == "direct" else [left[i] for i in rng.permutation(len(left))]
    if pairing in ("direct", "first_round"):
        return [decide(a, b) for a, b in zip(order[::2], order[1::2], strict=False)]
    if pairing == "all_pairs":
        return [decide(a, b) for a, b in combinations(left, 2)]
    if pairing == "tournament":
        found = []
        while len(order) > 1:
            rounds = [decide(a, b) for a, b in zip(order[::2], order[1::2], strict=False)]
            found += rounds
            # Who has no opponent in a round goes through.
            order = [one.chosen for one in rounds] + (order[-1:] if len(order) % 2 else [])
        return found
    # Shuffled first, so that of equally good ones any may be the best.
    best = max(order, key=lambda i: scores[i])
    others = [i for i in order if i != best]
    other = others[0] if pairing == "best_vs_random" else min(others, key=lambda i: scores[i])
    return [decide(best, other)]


def contest(
    a: int, b: int, scores: NDArray[np.float64], rng: np.random.Generator, labels: Labels, scale: float
) -> Contest:
    """Who of two wins, by their scores."""
    gap = float(scores[a] - scores[b])
    if labels == "sampled":
        # Of the Bradley-Terry model; the draw is the label, and is believed.
        a_wins = bool(rng.random() < _sigmoid(gap / scale))
        return Contest(a, b, 1.0, gap) if a_wins else Contest(b, a, 1.0, -gap)
    if gap == 0.0:
        first, second = (a, b) if rng.random() < 0.5 else (b, a)
        return Contest(first, second, 0.5, 0.0)
    if gap < 0.0:
        a, b, gap = b, a, -gap
    return Contest(a, b, 1.0 if labels == "hard" else _sigmoid(gap / scale), gap)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


# -- with texts ----------------------------------------------------------------------------------------


def pairs_of(
    ranked: Ranked,
    rng: np.random.Generator,
    *,
    pairing: Pairing = "first_round",
    labels: Labels = "hard",
    scale: float = 1.0,
) -> list[Pair]:
    """The contests of a scored set of answers, as pairs; its weight is shared by them."""
    texts = [messages_text(response) for response in ranked.responses]
    found = build_pairs(pairing, ranked.scores, rng, texts=texts, labels=labels, scale=scale)
    episodes = ranked.episodes or (None,) * len(texts)
    return [
        Pair(
            prompt=ranked.prompt,
            chosen=ranked.responses[one.chosen],
            rejected=ranked.responses[one.rejected],
            p_chosen=one.p_chosen,
            weight=ranked.weight / len(found),
            group=ranked.group,
            annotators=ranked.annotators,
            derived_from=ranked.derived_from,
            criterion=ranked.criterion,
            chosen_ref=sha256_of_text(texts[one.chosen]),
            rejected_ref=sha256_of_text(texts[one.rejected]),
            prompt_ref=sha256_of_text(messages_text(ranked.prompt)) if ranked.prompt else None,
            chosen_episode=episodes[one.chosen],
            rejected_episode=episodes[one.rejected],
            margin=one.gap,
        )
        for one in found
    ]


def data_vs_self(demonstrations: Sequence[Demonstrated], samples: Sequence[Sequence[Turn]]) -> list[Pair]:
    """Each demonstration against the policy's own answers to its prompt (SPIN: Chen et al. 2024).

    A sample equal to the demonstration says nothing and is left out; the rest share its weight.

    Args:
        demonstrations: what to prefer.
        samples: per demonstration the policy's own answers, any number.

    Raises:
        BadInputError: not one list of samples per demonstration.
    """
    if len(samples) != len(demonstrations):
        raise BadInputError(f"{len(samples)} lists of samples for {len(demonstrations)} demonstrations.")
    found: list[Pair] = []
    for one, own in zip(demonstrations, samples, strict=True):
        shown = messages_text(one.response)
        said = {messages_text(turn): turn for turn in own}
        said.pop(shown, None)
        found += [
            Pair(
                prompt=one.prompt,
                chosen=one.response,
                rejected=turn,
                p_chosen=1.0,
                weight=one.weight / len(said),
                group=one.group,
                annotators=one.annotators,
                derived_from=one.derived_from,
                criterion=one.criterion,
                chosen_ref=sha256_of_text(shown),
                rejected_ref=sha256_of_text(text),
                prompt_ref=sha256_of_text(messages_text(one.prompt)) if one.prompt else None,
                chosen_episode=one.episode,
            )
            for text, turn in said.items()
        ]
    return found


# -- which rejected answers teach most ---------------------------------------------------------------------


def optimal_rejected(reference_logps: ArrayLike, target_logps: ArrayLike, beta: float) -> NDArray[np.float64]:
    """Log-probs of the best distribution to draw rejected answers from: ``pi_ref (pi_ref / pi*)^beta``.

    With chosen answers from the reference and rejected ones from this, DPO with this ``beta`` has the
    target as its optimum. Source: "Differential Information: An Information-Theoretic Perspective on
    Preference Optimization", 2025, the theorem on the power law.

    Args:
        reference_logps: of every possible answer, ``(n,)`` nats, normalised.
        target_logps: under the target policy, ``(n,)``.
        beta: of the DPO loss, > 0.

    Raises:
        NumericsError: ``logps_not_finite``.
    """
    reference, target = (np.asarray(v, dtype=np.float64) for v in (reference_logps, target_logps))
    if reference.shape != target.shape or not np.isfinite(reference).all() or not np.isfinite(target).all():
        raise NumericsError("logps_not_finite: both policies need a finite log-prob for every answer.")
    logits = reference + beta * (reference - target)
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), dtype=np.float64)


def rejected_weights(log_ratios: ArrayLike, beta: float) -> tuple[NDArray[np.float64], float]:
    """Importance weights that turn samples of the reference into samples of :func:`optimal_rejected`.

    Args:
        log_ratios: ``log pi* - log pi_ref`` of each sample, ``(n,)`` nats; for a reward ``r`` under KL
            coefficient ``b`` that is ``r / b`` up to a constant.
        beta: of the DPO loss.

    Returns:
        Weights ``(n,)`` that sum to 1, and the effective sample size ``1 / sum w^2``: near 1 means that one
        sample is all there is.
    """
    ratios = _finite(log_ratios)
    logits = -beta * ratios
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights, float(1.0 / (weights**2).sum())
