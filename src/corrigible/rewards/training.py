"""Fitting a reward model to comparisons.

A frozen backbone needs one convex fit whose penalty and temperature come from cross-validation over
units. A tuned one (full or LoRA) starts from that head and runs AdamW epochs, keeps the epoch with the
best log-loss on a unit-disjoint validation slice, and can be killed and resumed at epoch boundaries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corrigible.errors import BadInputError, NumericsError, StorageError
from corrigible.files import replacing
from corrigible.models.optimiser import Optimiser
from corrigible.rewards.backbones import Backbone, Example, load_backbone
from corrigible.rewards.calibration import fit_temperature, log_loss
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.features import feature_rows
from corrigible.rewards.head import Comparisons, Standardiser, bootstrap_members, cross_validate, fit_linear
from corrigible.rewards.reward_model import RewardModel, raw_rows, restore_state, trained_state, trains
from corrigible.rewards.splits import clusters, folds, resolve_rule, split
from corrigible.rewards.table import FeatureTable
from corrigible.rewards.tuning import TunedReward

if TYPE_CHECKING:
    from corrigible.store.pairs import Pair

MINIMUM_PAIRS = 4


@dataclass(frozen=True)
class Problem:
    """Pairs as comparisons of distinct examples; ``units`` (n,) int64 for the bootstrap."""

    examples: list[Example]
    data: Comparisons
    units: NDArray[np.int64]


def problem(pairs: Sequence[Pair], config: RewardConfig, by: str) -> Problem:
    """The distinct examples of the pairs, and the pairs as row numbers, vote shares and weights."""
    place: dict[str, int] = {}
    examples: list[Example] = []

    def row(prompt: Any, response: Any) -> int:
        example = Example(tuple(prompt), tuple(response))
        if place.setdefault(example.key, len(examples)) == len(examples):
            examples.append(example)
        return place[example.key]

    chosen = [row(pair.prompt, pair.chosen) for pair in pairs]
    rejected = [row(pair.prompt, pair.rejected) for pair in pairs]
    p = np.array([pair.p_chosen for pair in pairs])
    if config.labels == "majority":
        p = np.where(p > 0.5, 1.0, np.where(p < 0.5, 0.0, 0.5))
    weight = np.array([pair.weight for pair in pairs]) if config.weights == "votes" else np.ones(len(pairs))
    if not (weight > 0).any():
        raise NumericsError("every pair has weight zero.", advice='Use weights="equal".')
    numbers: dict[object, int] = {}
    units = np.array([numbers.setdefault(entry[0], len(numbers)) for entry in clusters(pairs, by)])
    data = Comparisons(
        torch.tensor(chosen),
        torch.tensor(rejected),
        torch.from_numpy(p),
        torch.from_numpy(weight / weight.mean()),
    )
    return Problem(examples, data, units)


def fit_reward(
    train: Sequence[Pair],
    *,
    config: RewardConfig | None = None,
    validation: Sequence[Pair] | None = None,
    by: str = "auto",
    backbone: Backbone | None = None,
    table: FeatureTable | None = None,
    work_dir: str | Path | None = None,
    device: str = "auto",
    name: str = "reward_model",
    axis: str = "overall",
) -> RewardModel:
    """Fit a reward model to comparisons.

    Args:
        train: pairs, in either orientation, with vote shares and weights.
        config: the model and how it learns; default `RewardConfig()`.
        validation: pairs for the penalty, early stopping and temperature; default: taken from ``train``
            by the split rule ``by``, so that no unit is on both sides.
        backbone: a loaded reader, to fit many heads on one; a tuned fit changes its weights.
        table: features already computed with a frozen ``backbone``.
        work_dir: where a killed run finds what it had: features of a frozen backbone, epochs of a tuned
            one. Calling again with equal arguments goes on from there to the same numbers.

    Raises:
        BadInputError: fewer than four pairs, or none with a preference.
        NumericsError: scores or loss became NaN.
    """
    config = config or RewardConfig()
    if len(train) < MINIMUM_PAIRS:
        raise BadInputError(
            f"{len(train)} pairs are too few to fit a reward model.", advice=f"Bring {MINIMUM_PAIRS} or more."
        )
    if all(pair.p_chosen == 0.5 for pair in train):
        raise BadInputError("every pair is a tie.", advice="A reward model needs pairs with a preference.")
    by = resolve_rule(train, by)
    reader = backbone or (table.backbone if table is not None else load_backbone(config, device=device))
    if config.tune == "frozen":
        if table is None:
            table = FeatureTable(
                reader, config, Path(work_dir) / "features" if work_dir is not None else None
            )
        table.check(config)
        model = _fit_frozen(train, validation, config, by, table)
    else:
        model = _fit_tuned(
            train, validation, config, by, reader, Path(work_dir) if work_dir is not None else None
        )
    return model.renamed(name, axis)


# -- frozen -----------------------------------------------------------------------------------------


def _fit_frozen(
    train: Sequence[Pair],
    validation: Sequence[Pair] | None,
    config: RewardConfig,
    by: str,
    table: FeatureTable,
) -> RewardModel:
    every = [*train, *(validation or ())]
    made = problem(every, config, by)
    x = table.rows(made.examples)
    n = len(train)
    if validation:
        parts = [(made.data.take(range(n)), made.data.take(range(n, len(every))))]
    else:
        parts = _fold_parts(train, config, by, made.data)
    penalty, losses = config.penalties[len(config.penalties) // 2], None
    temperature = 1.0
    if parts:
        penalty, margins, losses = cross_validate(x, len(config.features), parts, config.penalties)
        temperature = fit_temperature(margins, torch.cat([valid.p for _, valid in parts]).numpy())
    data, units = made.data.take(range(n)), made.units[:n]
    used = torch.unique(torch.cat([data.chosen, data.rejected]))
    standardiser = Standardiser.fit(x[used], len(config.features))
    z = standardiser(x)
    weight = fit_linear(z, data, penalty)
    members = bootstrap_members(z, data, units, penalty, weight, config.members, config.seed)
    offset = float((z[used].double() @ weight).mean())
    fitted = data_margins(z, data, weight)
    history = {
        "pairs": n,
        "texts": len(made.examples),
        "split": by,
        "penalty": penalty,
        "validation_log_loss": None
        if losses is None
        else dict(zip(map(str, config.penalties), losses, strict=True)),
        "train_log_loss": log_loss(fitted, data.p.numpy()),
        "texts_cut": texts_cut(table.backbone, made.examples, config),
    }
    return RewardModel(
        config, table.backbone, standardiser, weight, members, offset, temperature, history=history
    )


def table_margins(model: RewardModel, table: FeatureTable, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """`RewardModel.margins` of a frozen model through a feature table, so that nothing is read twice."""
    table.check(model.config)
    made = problem(pairs, model.config, "topic")
    values = model.heads(table.rows(made.examples))[0]
    return np.asarray(values[made.data.chosen.numpy()] - values[made.data.rejected.numpy()], dtype=np.float64)


def data_margins(z: Tensor, data: Comparisons, weight: Tensor) -> NDArray[np.float64]:
    """(n,) raw score differences of the comparisons."""
    values = z.double() @ weight
    return np.asarray((values[data.chosen] - values[data.rejected]).numpy(), dtype=np.float64)


def _fold_parts(
    pairs: Sequence[Pair], config: RewardConfig, by: str, data: Comparisons
) -> list[tuple[Comparisons, Comparisons]]:
    """Cross-validation folds as comparisons; none when the pairs hold too few units."""
    place = {id(pair): number for number, pair in enumerate(pairs)}
    parts = []
    try:
        for part in folds(pairs, config.folds, by=by, seed=config.seed):
            inside = [place[id(pair)] for pair in part.train]
            outside = [place[id(pair)] for pair in part.held_out]
            parts.append((data.take(inside), data.take(outside)))
    except BadInputError:
        return []
    return parts


def texts_cut(backbone: Backbone, examples: Sequence[Example], config: RewardConfig) -> int:
    """How many examples do not fit into ``max_length`` tokens."""
    parts = backbone.encode(examples, config)
    return sum(any(row.cut for row in rows) for rows in zip(*parts, strict=True))


# -- tuned ------------------------------------------------------------------------------------------


def _fit_tuned(
    train: Sequence[Pair],
    validation: Sequence[Pair] | None,
    config: RewardConfig,
    by: str,
    backbone: Backbone,
    work_dir: Path | None,
) -> RewardModel:
    if validation is None and config.validation > 0:
        try:
            inner = split(train, by=by, held_out=config.validation, seed=config.seed)
            train, validation = inner.train, inner.held_out
        except BadInputError:
            validation = ()
    held = list(validation or ())
    made = problem(train, config, by)
    check = problem(held, config, by) if held else None

    # Its position in the pretrained space fixes the head's scale; with warm_start also its direction.
    start = RewardConfig.from_json({**config.to_json(), "tune": "frozen"})
    with torch.random.fork_rng(devices=_cuda_devices()):
        x = FeatureTable(backbone, start).rows(made.examples)
        standardiser = Standardiser.fit(x, len(config.features))
        penalty = config.penalties[len(config.penalties) // 2]
        weight = torch.zeros(x.shape[1], dtype=torch.float64)
        if config.warm_start:
            parts = _fold_parts(train, config, by, made.data)
            if parts:
                penalty = cross_validate(x, len(config.features), parts, config.penalties)[0]
            weight = fit_linear(standardiser(x), made.data, penalty)
        torch.manual_seed(config.seed)
        for name, value in backbone.module.named_parameters():
            value.requires_grad_(trains(name, backbone, config))
        tuned = TunedReward(backbone, config, standardiser, weight)
        history = _epochs(tuned, made, check, config, work_dir)
    backbone.module.eval()
    model = RewardModel(
        config,
        backbone,
        standardiser,
        tuned.weight.detach().double().cpu(),
        tuned.members.detach().double().cpu(),
        history={
            "pairs": len(train),
            "validation_pairs": len(held),
            "texts": len(made.examples),
            "split": by,
            "texts_cut": texts_cut(backbone, made.examples, config),
            **history,
        },
    )
    values = model.score_examples(made.examples)[0]
    model.offset = float(values.mean())
    if held:
        model.temperature = fit_temperature(model.margins(held), np.array([pair.p_chosen for pair in held]))
    return model


def _epochs(
    tuned: TunedReward, made: Problem, check: Problem | None, config: RewardConfig, work_dir: Path | None
) -> dict[str, Any]:
    """Train, leave the best epoch's weights in ``tuned``, and return what was measured."""
    from corrigible.events import Metric, emit, track

    backbone = tuned.backbone
    optimiser = Optimiser(*tuned.groups(), seed=config.seed)
    per_epoch = -(-len(made.data) // config.batch_pairs)
    total = per_epoch * config.epochs
    warm = max(1, round(config.warmup * total))
    encoded = backbone.encode(made.examples, config)
    named = torch.from_numpy(
        feature_rows(config.features, [example.texts for example in made.examples])
    ).float()
    rng = np.random.default_rng(config.seed)
    times = torch.from_numpy(_bootstrap_times(made.units, config.members, rng))
    state = _Checkpoint(work_dir, config, made)
    curve: list[dict[str, float]] = []
    best_loss, best_state, first, idle = float("inf"), _snapshot(tuned), 0, 0
    resumed = state.load()
    if resumed is not None:
        optimiser.load(resumed["optimiser"])
        curve, best_loss, best_state = resumed["curve"], resumed["best_loss"], resumed["best"]
        first, idle = int(resumed["epoch"]), int(resumed["idle"])
    elif check is not None and config.warm_start:
        best_loss = _validation_loss(tuned, check, config)
        curve.append({"epoch": 0, "validation_log_loss": best_loss})

    for epoch in range(first, config.epochs):
        if check is not None and idle >= config.patience:
            break
        # The order and the dropout of an epoch depend on nothing but the seed and its number.
        order = np.random.default_rng((config.seed, epoch)).permutation(len(made.data))
        torch.manual_seed(config.seed * 100_003 + epoch)
        tuned.inner.train()
        losses = []
        batches = [order[i : i + config.batch_pairs] for i in range(0, len(order), config.batch_pairs)]
        for number, rows in enumerate(
            track(batches, f"train reward model, epoch {epoch + 1}", total=len(batches), unit="batch")
        ):
            step = epoch * per_epoch + number
            share = min((step + 1) / warm, max(0.0, (total - step) / max(1, total - warm)))
            data, drawn = made.data.take(rows), times[torch.from_numpy(rows)]
            losses.append(tuned.update(optimiser, encoded, named, data, drawn, lr=share))
        tuned.inner.eval()
        row = {"epoch": epoch + 1, "train_log_loss": float(np.mean(losses))}
        emit(Metric(name="reward/train_log_loss", value=row["train_log_loss"], step=epoch + 1))
        idle += 1
        if check is None:
            best_state = _snapshot(tuned)
        else:
            row["validation_log_loss"] = _validation_loss(tuned, check, config)
            emit(Metric(name="reward/validation_log_loss", value=row["validation_log_loss"], step=epoch + 1))
            if row["validation_log_loss"] < best_loss:
                best_loss, best_state, idle = row["validation_log_loss"], _snapshot(tuned), 0
        curve.append(row)
        state.save(
            {
                "best": best_state,
                "best_loss": best_loss,
                "optimiser": optimiser.state(),
                "curve": curve,
                "epoch": epoch + 1,
                "idle": idle,
            }
        )
    _restore(tuned, best_state)
    return {"epochs": curve, "best_validation_log_loss": best_loss if check is not None else None}


def _bootstrap_times(units: NDArray[np.int64], members: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(n, members) how often each head counts each pair: Poisson(1) per unit, never all zero."""
    size = int(units.max()) + 1
    draws = rng.poisson(1.0, size=(size, members)).astype(np.float32)
    draws[:, draws.sum(axis=0) == 0] = 1
    return np.asarray(draws[units], dtype=np.float32)


def _validation_loss(tuned: TunedReward, check: Problem, config: RewardConfig) -> float:
    """Log-loss in nats at the best temperature: early stopping should not reward shrinking the scale."""
    tuned.inner.eval()
    values = []
    with torch.no_grad():
        for begin in range(0, len(check.examples), 256):
            rows = raw_rows(tuned.backbone, check.examples[begin : begin + 256], config)
            values.append((tuned.standardiser(rows) @ tuned.weight).float().cpu())
    score = torch.cat(values).double()
    margins = (score[check.data.chosen] - score[check.data.rejected]).numpy()
    p = check.data.p.numpy()
    return log_loss(margins, p, fit_temperature(margins, p))


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def _snapshot(tuned: TunedReward) -> dict[str, Tensor]:
    state = {
        f"inner.{k}": v.detach().cpu().clone() for k, v in trained_state(tuned.backbone, tuned.config).items()
    }
    state["weight"] = tuned.weight.detach().cpu().clone()
    state["members"] = tuned.members.detach().cpu().clone()
    return state


def _restore(tuned: TunedReward, state: dict[str, Tensor]) -> None:
    inner = {key.removeprefix("inner."): value for key, value in state.items() if key.startswith("inner.")}
    restore_state(tuned.backbone, inner)
    with torch.no_grad():
        tuned.weight.copy_(state["weight"])
        tuned.members.copy_(state["members"])


class _Checkpoint:
    """The last finished epoch of one fit, on disk; belongs to one config and one set of pairs."""

    def __init__(self, work_dir: Path | None, config: RewardConfig, made: Problem) -> None:
        self.path: Path | None = None
        if work_dir is not None:
            identity = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
            for example in made.examples:
                identity.update(example.key.encode())
            for column in (made.data.chosen, made.data.rejected, made.data.p, made.data.weight):
                identity.update(column.numpy().tobytes())
            self.path = work_dir / f"epochs-{identity.hexdigest()[:16]}.pt"

    def load(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            state = dict(torch.load(self.path, weights_only=True))
        except Exception as error:
            raise StorageError(
                f"the checkpoint {self.path} cannot be read: {error}.", advice="Delete it to start again."
            ) from error
        if "optimiser" not in state:
            raise StorageError(
                f"the checkpoint {self.path} is of an earlier version.", advice="Delete it to start again."
            )
        return state

    def save(self, state: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with replacing(self.path) as writing:
                torch.save(state, writing)
        except RuntimeError as error:  # torch's word for a write that failed
            raise StorageError(
                f"the epoch cannot be kept at {self.path}: {error}.",
                advice="Free some space and run again: it goes on from the epoch before.",
            ) from error
