"""Learning from demonstrations token by token: one weighted loss, and the kernels that shape it.

What a token costs is its *kernel*, a function of its log-prob (and, for some, of the whole distribution);
what it counts is its *weight*; what the sum is divided by is the *normaliser*. Rendering decides which
tokens have which weights (:mod:`corrigible.align.tokens`); nothing here knows a model or a file.

========================  =============================================================================
kernel                    a token with log-prob ``l``, ``p = exp(l)`` costs
========================  =============================================================================
``ce``                    ``-l``
``dft``                   ``-sg(p) l`` (Wu et al. 2025)
``otr``                   ``-[sg(q(x)) l + b sum_{a != x} sg(q(a)) log p(a)]``, ``q`` the sampling policy
``label_smoothing``       ``-(1 - e) l - e mean_a log p(a)`` (Szegedy et al. 2016, section 7)
``unlikelihood``          ``-l`` where the weight is positive, ``-log(1 - p)`` where it is negative
========================  =============================================================================

``sg`` is "no gradient". Sums over the vocabulary are what :func:`corrigible.models.head.score` gives as
``expected``; :func:`read_logits` makes them of the logits of a small model.

Accumulation. Loss and metrics are sums over tokens divided by ``totals``. With those of the *whole* batch
the outputs of its micro-batches add up exactly to the output of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from corrigible.align.losses import LossOutput, widen
from corrigible.errors import BadInputError, NumericsError

__all__ = ["Kernel", "Normaliser", "TokenScores", "TokenTotals", "read_logits", "token_loss"]

Kernel = Literal["ce", "dft", "otr", "label_smoothing", "unlikelihood"]
"""What one token costs."""

Normaliser = Literal["tokens", "weights", "sequences"]
"""What the weighted sum is divided by: tokens that are learnt from, their weights, or their sequences."""

LEAST_DOUBT = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Smallest ``1 - p`` that is told from 0: log-probs near 0 are no more exact than this."""


@dataclass(frozen=True)
class TokenTotals:
    """What a batch holds, of tokens whose weight is not 0.

    Attributes:
        tokens: how many.
        weights: sum of their weights' sizes.
        sequences: how many sequences have any.
        unwanted: how many of the tokens have a negative weight.
    """

    tokens: float
    weights: float
    sequences: float
    unwanted: float = 0.0

    @classmethod
    def of(cls, sequences: Iterable[Sequence[float]]) -> TokenTotals:
        """Of the weights of each sequence's tokens."""
        live = [[w for w in weights if w != 0.0] for weights in sequences]
        return cls(
            tokens=float(sum(map(len, live))),
            weights=math.fsum(abs(w) for weights in live for w in weights),
            sequences=float(sum(map(bool, live))),
            unwanted=float(sum(w < 0.0 for weights in live for w in weights)),
        )


@dataclass(frozen=True)
class TokenScores:
    """What a loss may want to know of the distribution before each token; nats.

    Attributes:
        logprobs: of the tokens themselves, with gradient.
        expected: ``sum_a q(a) log p(a)`` over the vocabulary, with gradient through ``p`` alone.
        sampling_logprobs: ``log q`` of the tokens themselves, without gradient.
    """

    logprobs: Tensor
    expected: Tensor | None = None
    sampling_logprobs: Tensor | None = None


def read_logits(logits: Tensor, targets: Tensor, *, expected_at: float | None = None) -> TokenScores:
    """What :func:`token_loss` needs, from the logits of a model that is small enough to have them all.

    Args:
        logits: ``(..., vocabulary)``, before the tokens.
        targets: ``(...)`` int64. What stands in slots that weigh nothing does not matter (-100, say).
        expected_at: temperature of the sampling policy ``q = softmax(logits / expected_at)``; infinity
            makes it uniform; absent, nothing is expected.

    Returns:
        Tensors of the shape of ``targets``, float32 or wider.
    """
    wide = widen(logits)
    at = targets.clamp(min=0)[..., None]
    every = wide.log_softmax(dim=-1)
    logprobs = every.gather(-1, at)[..., 0]
    if expected_at is None:
        return TokenScores(logprobs)
    sampling = (wide.detach() / expected_at).log_softmax(dim=-1)
    return TokenScores(logprobs, (sampling.exp() * every).sum(dim=-1), sampling.gather(-1, at)[..., 0])


def token_loss(
    logprobs: Tensor,
    weights: Tensor | None = None,
    *,
    kernel: Kernel = "ce",
    normaliser: Normaliser = "weights",
    row: Tensor | None = None,
    expected: Tensor | None = None,
    sampling_logprobs: Tensor | None = None,
    smoothing: float = 0.1,
    wrong_reward: float = -0.1,
    entropy: Tensor | None = None,
    totals: TokenTotals | None = None,
) -> LossOutput:
    """Weighted loss of demonstrated tokens.

    Sources: maximum likelihood; ``dft``: Wu et al. 2025, "On the Generalization of SFT"
    (arXiv:2508.05629); ``otr``: Ming et al. 2025, "One-Token Rollout" (arXiv:2509.26313), the
    exact expectation of its sampled loss; ``unlikelihood``: Welleck et al. 2020, "Neural Text
    Generation with Unlikelihood Training" (arXiv:1908.04319).

    Args:
        logprobs: of the tokens under the policy, ``(tokens,)`` or ``(sequences, length)``, nats.
        weights: what each token counts, same shape; 1 when absent. A token of weight 0 is not there:
            whatever its slot holds (NaN, too) reaches neither loss, metrics nor gradient. Below 0 only
            for ``unlikelihood``.
        kernel: what a token costs.
        normaliser: what the sum is divided by. ``"weights"`` makes it a weighted mean; ``"tokens"``
            lets small weights count as fewer examples; ``"sequences"`` gives nats a sequence.
        row: which sequence each token belongs to, ``(tokens,)`` int64; needed for ``"sequences"`` and only
            where neither a second dimension nor ``totals`` says it.
        expected: for ``otr`` and ``label_smoothing``, :attr:`TokenScores.expected` under the sampling
            policy and under the uniform distribution.
        sampling_logprobs: for ``otr``, :attr:`TokenScores.sampling_logprobs`.
        smoothing: for ``label_smoothing``, the probability given away to all tokens alike, in [0, 1).
        wrong_reward: for ``otr``, the reward ``b`` of a token that is not the demonstrated one, below 1.
        entropy: of the distribution before each token, nats, to log.
        totals: of the whole batch when this is one of its micro-batches; of these tokens when absent.

    Returns:
        The loss, and the metrics: ``loss``; over wanted tokens (those of positive weight) ``nll``, nats a
        token (its exponential is the perplexity), and ``probability``, both plain means; ``nll/sequence``,
        their sum a sequence; ``weight``, the mean weight of a token; ``grad_weight``, the mean slope of
        the loss of a token after its own log-prob; for ``unlikelihood``, ``unwanted/probability``; and
        ``entropy`` when given.

    Raises:
        BadInputError: shapes differ, a setting out of range, a negative weight where it means nothing, or
            the kernel needs what is not given.
        NumericsError: ``logprobs_not_finite``, ``logprobs_positive``, ``weights_not_finite``, or
            ``nothing_to_average`` (every token weighs 0).
    """
    columns = {"expected": expected, "sampling_logprobs": sampling_logprobs, "entropy": entropy}
    weight = torch.ones_like(logprobs) if weights is None else weights
    live = _check(logprobs, weight, columns, kernel, smoothing, wrong_reward)
    totals = totals or _totals(weight, live, row, normaliser)
    divisors = {"tokens": totals.tokens, "weights": totals.weights, "sequences": totals.sequences}
    if normaliser not in divisors:
        raise BadInputError(
            f"There is no normaliser {normaliser!r}.", advice="One of tokens, weights, sequences."
        )
    if not (totals.tokens > 0.0 and divisors[normaliser] > 0.0):
        raise NumericsError(
            "nothing_to_average: no token of the batch is learnt from.",
            advice="Every token weighs 0; leave such examples out.",
        )

    # What a slot without weight holds must not reach the gradient either: replaced before any use.
    def held(column: Tensor) -> Tensor:
        return torch.where(live, widen(column), 0.0)

    logp = held(logprobs)
    weight = held(weight).detach().to(logp)
    size = weight.abs()
    unwanted = weight < 0.0
    if kernel == "dft":
        slope = logp.detach().exp()
        losses = -slope * logp
    elif kernel == "otr":
        assert expected is not None and sampling_logprobs is not None
        slope = (1.0 - wrong_reward) * held(sampling_logprobs).detach().exp()
        losses = -slope * logp - wrong_reward * held(expected)
    elif kernel == "label_smoothing":
        assert expected is not None
        slope = torch.full_like(logp, 1.0 - smoothing).detach()
        losses = -(1.0 - smoothing) * logp - smoothing * held(expected)
    elif kernel == "unlikelihood":
        # Each side is replaced where the other is meant: an infinite slope times 0 would be NaN.
        wrong = unlikelihood(torch.where(unwanted, logp, -1.0))
        losses = torch.where(unwanted, wrong, -logp)
        slope = torch.where(unwanted, wrong.detach().expm1(), torch.ones_like(logp))
    else:
        losses, slope = -logp, torch.ones_like(logp)
    loss = (size * losses).sum() / divisors[normaliser]

    with torch.no_grad():
        wanted = (live & ~unwanted).to(logp)
        count = totals.tokens - totals.unwanted
        sums = {
            "nll": ((wanted * -logp).sum(), count),
            "probability": ((wanted * logp.exp()).sum(), count),
            "nll/sequence": ((wanted * -logp).sum(), totals.sequences),
            "weight": (size.sum(), totals.tokens),
            "grad_weight": ((size * slope).sum(), totals.tokens),
        }
        if kernel == "unlikelihood":
            sums["unwanted/probability"] = ((unwanted * logp.exp()).sum(), totals.unwanted)
        if entropy is not None:
            sums["entropy"] = (held(entropy).sum(), totals.tokens)
        metrics = {name: float(total) / over if over else 0.0 for name, (total, over) in sums.items()}
    return LossOutput(loss, {"loss": float(loss.detach()), **metrics})


def unlikelihood(logprobs: Tensor) -> Tensor:
    """``-log(1 - p)`` of tokens with log-prob ``log p``, >= 0, any shape.

    ``1 - p`` is known as exactly as the log-prob is, so of a token that the policy is nearly certain of less
    and less of it is known. One that it is certain of (``1 - p`` below :data:`LEAST_DOUBT`) costs what it
    would at that bound, and keeps its slope there, so that it is pushed down as hard as any.
    """
    logprobs = widen(logprobs)
    most = math.log1p(-LEAST_DOUBT[logprobs.dtype])
    bounded = logprobs + (logprobs.clamp(max=most) - logprobs).detach()
    # log(1 - exp(x)) loses everything near 0 written one way, and far from it written the other
    # (Maechler 2012, "Accurately computing log(1 - exp(-|a|))"). Each way sees only its own side.
    near = bounded > -math.log(2.0)
    close = torch.where(near, bounded, -1.0)
    far = torch.where(near, -1.0, bounded)
    return -torch.where(near, (-close.expm1()).log(), (-far.exp()).log1p())


def _totals(weight: Tensor, live: Tensor, row: Tensor | None, normaliser: Normaliser) -> TokenTotals:
    """Of the tokens at hand."""
    if row is not None and row.shape != weight.shape:
        raise BadInputError(f"row must have shape {tuple(weight.shape)}, got {tuple(row.shape)}.")
    if row is None and weight.ndim == 2:
        row = torch.arange(len(weight), device=weight.device)[:, None].expand_as(weight)
    if row is None and normaliser == "sequences":
        raise BadInputError(
            "A mean over sequences must know which sequence each token belongs to.",
            advice="Give row, totals, or log-probs of shape (sequences, length).",
        )
    return TokenTotals(
        tokens=float(live.sum()),
        weights=float(weight[live].detach().double().abs().sum()),
        sequences=1.0 if row is None else float(len(set(row[live].tolist()))),
        unwanted=float((weight[live] < 0.0).sum()),
    )


def _check(
    logprobs: Tensor,
    weight: Tensor,
    columns: dict[str, Tensor | None],
    kernel: Kernel,
    smoothing: float,
    wrong_reward: float,
) -> Tensor:
    """Raise on anything that is not what :func:`token_loss` says; return which tokens are learnt from."""
    needs = {
        "ce": (),
        "dft": (),
        "otr": ("expected", "sampling_logprobs"),
        "label_smoothing": ("expected",),
        "unlikelihood": (),
    }
    if kernel not in needs:
        raise BadInputError(f"There is no kernel {kernel!r}.", advice=f"One of {', '.join(needs)}.")
    missing = [name for name in needs[kernel] if columns[name] is None]
    if missing:
        raise BadInputError(
            f"The kernel {kernel} needs {' and '.join(missing)}.",
            advice="Scorer.scores(..., expected_at=...) or read_logits(..., expected_at=...) gives them.",
        )
    if not 0.0 <= smoothing < 1.0:
        raise BadInputError(f"smoothing must be in [0, 1), got {smoothing}.", advice="0.1 is usual.")
    if not -math.inf < wrong_reward < 1.0:
        raise BadInputError(
            f"wrong_reward must be below 1, the reward of the right token, got {wrong_reward}.",
            advice="0 or slightly below.",
        )
    given = {"logprobs": logprobs, "weights": weight}
    given |= {name: column for name, column in columns.items() if column is not None}
    if len({tuple(column.shape) for column in given.values()}) != 1 or logprobs.ndim not in (1, 2):
        listed = ", ".join(f"{name} {tuple(column.shape)}" for name, column in given.items())
        raise BadInputError(
            f"All columns must have one shape, (tokens,) or (sequences, length), got {listed}."
        )
    for name, column in given.items():
        if name != "weights" and not column.is_floating_point():
            raise BadInputError(f"{name} must hold floating-point numbers, got {column.dtype}.")
    if not bool(torch.isfinite(weight).all()):
        raise NumericsError("weights_not_finite: a weight is NaN or infinite.")
    if kernel != "unlikelihood" and bool((weight < 0.0).any()):
        raise BadInputError(
            f"A weight is below 0, where the kernel {kernel} has no minimum.",
            advice="Use the kernel unlikelihood, which pushes such tokens down to a probability of 0.",
        )
    live = weight != 0.0
    for name, column in given.items():
        known = column.detach()[live]
        if not bool(torch.isfinite(known).all()):
            places = (live & ~torch.isfinite(column.detach())).nonzero().tolist()[:8]
            raise NumericsError(f"logprobs_not_finite: {name} is NaN or infinite at tokens {places}.")
        if name in ("logprobs", "expected", "sampling_logprobs") and bool((known > 1e-3).any()):
            raise NumericsError(
                f"logprobs_positive: {name} is above 0.", advice="Log-probabilities are never positive."
            )
    return live
