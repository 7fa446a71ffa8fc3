"""The token losses once more: scalar loops in float64 from their equations, slopes derived by hand.

Nothing of the code under test is used, and no automatic differentiation. Every kernel is written as
``sum_a c(a) * -log p(a)`` over the vocabulary with constants ``c`` (or, for unlikelihood, from ``dp/dz``),
so that its slope after the logit ``z_j`` is ``p(j) sum_a c(a) - c(j)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Logits = Sequence[Sequence[Sequence[float]]]
"""Per sequence, per token, one number for each entry of the vocabulary."""

Answer = tuple[float, list[list[list[float]]]]
"""The loss, and its slope after every logit."""

Token = tuple[float, list[float]]
"""What one token costs, and its slope after the logits before it."""


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    most = max(logits)
    weights = [math.exp((z - most) / temperature) for z in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def log_softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    log_total = most + math.log(math.fsum(math.exp(z - most) for z in logits))
    return [z - log_total for z in logits]


def weighed(logits: Sequence[float], constants: Sequence[float]) -> Token:
    """``-sum_a c(a) log p(a)``."""
    logp, p = log_softmax(logits), softmax(logits)
    whole = math.fsum(constants)
    cost = -math.fsum(c * x for c, x in zip(constants, logp, strict=True))
    return cost, [pj * whole - cj for pj, cj in zip(p, constants, strict=True)]


def ce(logits: Sequence[float], target: int, weight: float, **_: float) -> Token:
    return weighed(logits, [float(a == target) for a in range(len(logits))])


def dft(logits: Sequence[float], target: int, weight: float, **_: float) -> Token:
    p = softmax(logits)[target]
    return weighed(logits, [p if a == target else 0.0 for a in range(len(logits))])


def otr(
    logits: Sequence[float], target: int, weight: float, *, kappa: float, beta: float, **_: float
) -> Token:
    """``-sum_a q(a) R(a) log p(a)`` with ``q`` the policy at temperature ``kappa``, R 1 or beta (S165)."""
    q = softmax(logits, kappa)
    return weighed(logits, [q[a] * (1.0 if a == target else beta) for a in range(len(logits))])


def label_smoothing(
    logits: Sequence[float], target: int, weight: float, *, smoothing: float, **_: float
) -> Token:
    """Cross-entropy with ``(1 - e) [a = x] + e / V``."""
    even = smoothing / len(logits)
    return weighed(logits, [(1.0 - smoothing) * (a == target) + even for a in range(len(logits))])


def unlikelihood(logits: Sequence[float], target: int, weight: float, **_: float) -> Token:
    """``-log(1 - p)`` where the weight is negative: ``dp/dz_j = p ([j = x] - p_j)``; else cross-entropy."""
    if weight > 0.0:
        return ce(logits, target, weight)
    p = softmax(logits)
    rest = math.fsum(x for a, x in enumerate(p) if a != target)  # 1 - p, without losing it near p = 1
    slopes = [p[target] * ((a == target) - p[a]) / rest for a in range(len(logits))]
    slopes[target] = p[target]  # (1 - p) / (1 - p) = 1, exactly
    return -math.log(rest), slopes


KERNELS: dict[str, Callable[..., Token]] = {
    "ce": ce,
    "dft": dft,
    "otr": otr,
    "label_smoothing": label_smoothing,
    "unlikelihood": unlikelihood,
}


def token_oracle(
    kernel: str,
    logits: Logits,
    targets: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]],
    *,
    normaliser: str,
    **settings: float,
) -> Answer:
    """Sum over tokens of ``|w| * cost``, divided; tokens of weight 0 are not there."""
    live = [[w for w in row if w != 0.0] for row in weights]
    divisor = {
        "tokens": float(sum(len(row) for row in live)),
        "weights": math.fsum(abs(w) for row in live for w in row),
        "sequences": float(sum(1 for row in live if row)),
    }[normaliser]
    costs: list[float] = []
    slopes: list[list[list[float]]] = []
    for row, wanted, heavy in zip(logits, targets, weights, strict=True):
        slopes.append([])
        for z, target, w in zip(row, wanted, heavy, strict=True):
            if w == 0.0:
                slopes[-1].append([0.0] * len(z))
                continue
            cost, slope = KERNELS[kernel](z, target, w, **settings)
            costs.append(abs(w) * cost / divisor)
            slopes[-1].append([abs(w) * x / divisor for x in slope])
    return math.fsum(costs), slopes


def algorithm_oracle(kernel: str) -> Callable[..., Answer]:
    """The oracle of an algorithm whose tokens cost this."""

    def oracle(
        logits: Logits,
        targets: Sequence[Sequence[int]],
        weights: Sequence[Sequence[float]],
        *,
        normaliser: str = "weights",
        **settings: float,
    ) -> Answer:
        return token_oracle(kernel, logits, targets, weights, normaliser=normaliser, **settings)

    return oracle


TOKEN_ORACLES: dict[str, Callable[..., Answer]] = {
    "sft": algorithm_oracle("label_smoothing"),
    "weighted-sft": algorithm_oracle("ce"),
    "dft": algorithm_oracle("dft"),
    "otr": algorithm_oracle("otr"),
    "unlikelihood-tokens": algorithm_oracle("unlikelihood"),
    "mft": algorithm_oracle("ce"),
}
"""By the name of the algorithm; every one of the family ``tokens`` has one (test_token_loss.py)."""
