"""How good a reward model is on pairs it has not seen, and how much better than trivial ones.

Accuracy is over pairs with a majority; ties are counted and left out. Every interval resamples the
independent units behind the pairs, and differences to baselines are paired: both models answer the same
pairs, so most of the noise cancels.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from corrigible.errors import BadInputError
from corrigible.intervals import Estimate, cluster_bootstrap, paired_bootstrap
from corrigible.rewards.baselines import BASELINES, accuracy_rows
from corrigible.rewards.calibration import Calibration, calibration
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.splits import Split, clusters, folds, resolve_rule, subset

if TYPE_CHECKING:
    from corrigible.rewards.table import FeatureTable
    from corrigible.store.pairs import Pair

Floats = NDArray[np.float64]
SHARES = (0.10, 0.25, 0.50, 1.0)
CLEAR_MAJORITY = 0.75
FEW_CLUSTERS = 10
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)


class ScoresPairs(Protocol):
    """What a report needs of a model."""

    def margins(self, pairs: Sequence[Pair]) -> Floats:
        """(n,) score(chosen) − score(rejected), nats."""
        ...


@dataclass(frozen=True)
class BaselineResult:
    """A baseline's accuracy, and the model's accuracy minus it on the same pairs."""

    accuracy: Estimate
    difference: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy.to_json(), "difference": self.difference.to_json()}


@dataclass(frozen=True)
class CurvePoint:
    """Held-out accuracy after training on ``share`` of the training units (``pairs`` pairs)."""

    share: float
    pairs: int
    accuracy: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"share": self.share, "pairs": self.pairs, "accuracy": self.accuracy.to_json()}


@dataclass(frozen=True)
class RewardReport:
    """Held-out quality of a reward model.

    ``clear`` is the accuracy on pairs with at least three quarters of the judges on one side, None when
    every pair has one judge or there is no such pair. ``notes`` say what a reader must know to trust the
    numbers (few units, texts cut, pairs dropped).
    """

    accuracy: Estimate
    ties: int
    calibration: Calibration
    baselines: Mapping[str, BaselineResult]
    clear: Estimate | None
    split: str
    n_train: int
    learning_curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy.to_json(),
            "accuracy_clear_majority": None if self.clear is None else self.clear.to_json(),
            "ties": self.ties,
            "calibration": self.calibration.to_json(),
            "baselines": {name: result.to_json() for name, result in self.baselines.items()},
            "learning_curve": [point.to_json() for point in self.learning_curve],
            "split": self.split,
            "n_train": self.n_train,
            "notes": list(self.notes),
            **self.extra,
        }


def accuracy(
    margins: Floats, pairs: Sequence[Pair], *, by: str = "auto", seed: int = 0
) -> tuple[Estimate, int]:
    """Accuracy over the pairs with a majority, with its cluster-bootstrap interval, and the number of ties.

    Raises:
        BadInputError: every pair is a tie.
    """
    rows, units = _decided(margins, pairs, by)
    return cluster_bootstrap(rows, units, bounds=SHARE, seed=seed), len(pairs) - len(rows)


def _decided(margins: Floats, pairs: Sequence[Pair], by: str) -> tuple[Floats, list[tuple[Hashable, ...]]]:
    rows = accuracy_rows(margins, np.array([pair.p_chosen for pair in pairs]))
    keep = np.isfinite(rows)
    if not keep.any():
        raise BadInputError(
            "every held-out pair is a tie, so there is no accuracy.",
            advice="Hold out more pairs, or drop ties.",
        )
    units = clusters(pairs, resolve_rule(pairs, by) if by == "auto" else by)
    return rows[keep], [unit for unit, kept in zip(units, keep, strict=True) if kept]


def report_margins(
    margins: Floats,
    pairs: Sequence[Pair],
    baselines: Mapping[str, Floats],
    *,
    by: str,
    n_train: int,
    dropped: int = 0,
    learning_curve: Sequence[CurvePoint] = (),
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> RewardReport:
    """A report from held-out margins (n,) of the model and of each baseline on the same pairs."""
    by = resolve_rule(pairs, by) if by == "auto" else by
    rows, units = _decided(margins, pairs, by)
    measured = cluster_bootstrap(rows, units, bounds=SHARE, seed=seed)
    results = {}
    for name, other in baselines.items():
        theirs, _ = _decided(other, pairs, by)
        results[name] = BaselineResult(
            cluster_bootstrap(theirs, units, bounds=SHARE, seed=seed),
            paired_bootstrap(rows, theirs, units, bounds=DIFFERENCE, seed=seed),
        )
    p = np.array([pair.p_chosen for pair in pairs])
    share = np.maximum(p, 1 - p)
    clear = [i for i in range(len(pairs)) if share[i] >= CLEAR_MAJORITY]
    told = list(notes)
    if measured.clusters < FEW_CLUSTERS:
        told.append(
            f"only {measured.clusters} independent {by} units are held out, which say little about others; "
            "use folds to test on all of them"
        )
    if dropped:
        told.append(f"{dropped} pairs lie across the item split and are on neither side")
    return RewardReport(
        accuracy=measured,
        ties=len(pairs) - len(rows),
        calibration=calibration(margins, p),
        baselines=results,
        clear=accuracy(margins[clear], [pairs[i] for i in clear], by=by, seed=seed)[0]
        if clear and len(clear) < len(rows)
        else None,
        split=by,
        n_train=n_train,
        learning_curve=tuple(learning_curve),
        notes=tuple(told),
        extra=extra or {},
    )


def reward_report(
    model: ScoresPairs,
    test_pairs: Sequence[Pair],
    *,
    train_pairs: Sequence[Pair] = (),
    by: str = "auto",
    dropped: int = 0,
    learning_curve: Sequence[CurvePoint] = (),
    seed: int = 0,
) -> RewardReport:
    """Held-out report of a model; the baselines are fitted on ``train_pairs`` (none given: none shown)."""
    by = resolve_rule([*train_pairs, *test_pairs], by)
    fitted = (
        {name: fit(train_pairs, test_pairs, by=by) for name, fit in BASELINES.items()} if train_pairs else {}
    )
    return report_margins(
        model.margins(test_pairs),
        test_pairs,
        fitted,
        by=by,
        n_train=len(train_pairs),
        dropped=dropped,
        learning_curve=learning_curve,
        seed=seed,
    )


def learning_curve(
    parts: Split,
    *,
    config: RewardConfig,
    shares: Sequence[float] = SHARES,
    table: FeatureTable | None = None,
    full: Floats | None = None,
    device: str = "auto",
    work_dir: str | Path | None = None,
    seed: int = 0,
) -> list[CurvePoint]:
    """Held-out accuracy after training on nested shares of the training units.

    Args:
        parts: the split; every point is tested on the same held-out pairs.
        table: features of a frozen backbone, so that nothing is read twice.
        full: held-out margins of the model trained on everything, when it is there already.
        work_dir: where a killed run goes on from (see `fit_reward`).

    Shares that leave fewer than four pairs, or only ties, are left out.
    """
    points = []
    for share in shares:
        chosen = subset(parts.train, share, by=parts.by, seed=seed)
        if share == 1 and full is not None:
            margins = full
        else:
            try:
                margins = _fit_and_score(chosen, parts.held_out, config, parts.by, table, device, work_dir)
            except BadInputError:
                continue
        points.append(
            CurvePoint(share, len(chosen), accuracy(margins, parts.held_out, by=parts.by, seed=seed)[0])
        )
    return points


def _fit_and_score(
    train: Sequence[Pair],
    test: Sequence[Pair],
    config: RewardConfig,
    by: str,
    table: FeatureTable | None,
    device: str,
    work_dir: str | Path | None,
) -> Floats:
    from corrigible.rewards.training import fit_reward, table_margins

    model = fit_reward(train, config=config, by=by, table=table, device=device, work_dir=work_dir)
    return table_margins(model, table, test) if table is not None else model.margins(test)


def cross_validated(
    pairs: Sequence[Pair],
    k: int,
    *,
    config: RewardConfig,
    by: str = "auto",
    table: FeatureTable | None = None,
    device: str = "auto",
    work_dir: str | Path | None = None,
    seed: int = 0,
) -> RewardReport:
    """The report over k folds: every unit is tested once by a model that has not seen it.

    A tuned backbone is loaded afresh for every fold; ``work_dir`` is where a killed run goes on from.
    """
    tested: list[Pair] = []
    margins: list[Floats] = []
    baselines: dict[str, list[Floats]] = {name: [] for name in BASELINES}
    trained = []
    dropped = 0
    rule = resolve_rule(pairs, by)
    for part in folds(pairs, k, by=rule, seed=seed):
        tested.extend(part.held_out)
        trained.append(len(part.train))
        dropped += part.dropped
        margins.append(_fit_and_score(part.train, part.held_out, config, rule, table, device, work_dir))
        for name, fit in BASELINES.items():
            baselines[name].append(fit(part.train, part.held_out, by=rule))
    return report_margins(
        np.concatenate(margins),
        tested,
        {name: np.concatenate(rows) for name, rows in baselines.items()},
        by=rule,
        n_train=round(float(np.mean(trained))),
        notes=(f"{k}-fold cross-validation by {rule}",),
        extra={"folds": k, "never_tested": len(pairs) - len(tested)} if dropped else {"folds": k},
        seed=seed,
    )
