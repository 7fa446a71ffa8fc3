"""The linear head: a convex Bradley-Terry fit on fixed vectors.

With standardised vectors z, score(x) = w·z(x), and w minimises the weighted log-loss plus penalty/2·|w|².
There is one solution and L-BFGS finds it, so the fit is the same every time and needs no learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corrigible.errors import NumericsError
from corrigible.rewards.losses import bradley_terry_loss

FEATURE_SCALE = 3.0
"""Named features are few and carry main effects: they are shrunk nine times less than a coordinate of the
embedding (the penalty is on the weight, and the feature is this much larger)."""


@dataclass(frozen=True)
class Comparisons:
    """Pairs as row numbers into a table of vectors: ``chosen`` and ``rejected``, with ``p`` and ``weight``.

    All are (n,): int64 rows, vote shares in [0, 1], weights >= 0.
    """

    chosen: Tensor
    rejected: Tensor
    p: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Comparisons:
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return Comparisons(self.chosen[index], self.rejected[index], self.p[index], self.weight[index])

    def reweighted(self, times: Tensor) -> Comparisons:
        return Comparisons(self.chosen, self.rejected, self.p, self.weight * times)


@dataclass(frozen=True)
class Standardiser:
    """z = (x − mean) / scale per coordinate, (width,) each."""

    mean: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x)) / self.scale.to(x)

    @classmethod
    def fit(cls, x: Tensor, features: int) -> Standardiser:
        """From the training rows ``x`` (n, width), whose last ``features`` columns are named features.

        A coordinate that never varies gets scale 1 and thus counts nothing.
        """
        wide = x.double()
        scale = wide.std(dim=0, unbiased=False)
        scale = torch.where(scale > 1e-8 * (1 + wide.abs().amax(dim=0)), scale, torch.ones_like(scale))
        if features:
            scale[-features:] /= FEATURE_SCALE
        return cls(wide.mean(dim=0).float(), scale.float())


def fit_linear(z: Tensor, data: Comparisons, penalty: float, start: Tensor | None = None) -> Tensor:
    """Weights (width,) float64 for standardised rows ``z`` (m, width).

    Args:
        z: (m, width) table that ``data`` points into.
        data: comparisons; pairs of weight zero are ignored.
        penalty: L2 strength, per unit of mean log-loss.
        start: where to begin; only speed depends on it.

    Raises:
        NumericsError: the fit ends in a non-finite weight.
    """
    used, places = torch.unique(torch.cat([data.chosen, data.rejected]), return_inverse=True)
    chosen, rejected = places.view(2, -1)
    wide = z.double()[used]
    # Many pairs over few items: score the items, not the pairs.
    few = len(used) < len(data)
    table = wide if few else wide[chosen] - wide[rejected]
    weight = (torch.zeros(z.shape[1]) if start is None else start).double().clone().requires_grad_(True)
    zero = torch.zeros(len(data), dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=300, tolerance_grad=1e-7, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        score = table @ weight
        sides = (score[chosen], score[rejected]) if few else (score, zero)
        loss = bradley_terry_loss(*sides, p_chosen=data.p, weight=data.weight).loss
        total = loss + 0.5 * penalty * (weight**2).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = weight.detach()
    if not bool(torch.isfinite(fitted).all()):
        raise NumericsError("the linear head diverged.", advice="Check the features for extreme values.")
    return fitted


def cross_validate(
    x: Tensor,
    features: int,
    parts: Sequence[tuple[Comparisons, Comparisons]],
    penalties: Sequence[float],
) -> tuple[float, NDArray[np.float64], list[float]]:
    """Choose the penalty by log-loss on held-out parts.

    Args:
        x: (m, width) raw rows; each fold standardises with its own training rows only.
        parts: (training, validation) comparisons per fold.

    Returns:
        the best penalty, the held-out margins of all parts in order under it, and the mean log-loss of
        every penalty.
    """
    losses = np.zeros(len(penalties))
    margins: list[list[NDArray[np.float64]]] = [[] for _ in penalties]
    weights = 0.0
    order = np.argsort(penalties)[::-1]  # the strongest first: each is a warm start for the next
    for train, valid in parts:
        rows = torch.unique(torch.cat([train.chosen, train.rejected]))
        z = Standardiser.fit(x[rows], features)(x)
        difference = z.double()[valid.chosen] - z.double()[valid.rejected]
        start: Tensor | None = None
        weights += float(valid.weight.sum())
        for place in order:
            start = fit_linear(z, train, penalties[place], start)
            delta = (difference @ start).numpy()
            p, w = valid.p.numpy(), valid.weight.numpy()
            losses[place] += float(
                (w * (p * np.logaddexp(0, -delta) + (1 - p) * np.logaddexp(0, delta))).sum()
            )
            margins[place].append(delta)
    best = int(losses.argmin())
    return penalties[best], np.concatenate(margins[best]), list(losses / weights)


def bootstrap_members(
    z: Tensor,
    data: Comparisons,
    units: NDArray[np.int64],
    penalty: float,
    start: Tensor,
    count: int,
    seed: int,
) -> Tensor:
    """(count, width) heads, each fitted on units drawn with replacement: their spread is the uncertainty.

    ``units`` (n,) says which independent unit each comparison belongs to.
    """
    rng = np.random.default_rng(seed)
    heads: list[Tensor] = []
    size = int(units.max()) + 1
    while len(heads) < count:
        times = np.bincount(rng.integers(size, size=size), minlength=size)[units].astype(np.float64)
        if times.sum() == 0:
            continue
        heads.append(fit_linear(z, data.reweighted(torch.from_numpy(times)), penalty, start))
    return torch.stack(heads) if heads else torch.zeros((0, z.shape[1]), dtype=torch.float64)
