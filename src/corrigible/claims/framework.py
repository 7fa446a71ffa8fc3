"""What a claim is, how it is registered, and how its verdict is reached."""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Metric, emit, track

Experiment = Callable[[int], float]
ClaimVerdict = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True)
class Claim:
    """A registered claim.

    Attributes:
        name: how it is called on the command line.
        hypothesis: one sentence that can be false, with its number.
        paper: where it is made.
        experiment: seed -> effect, in the hypothesis's own unit.
        control: seed -> effect of the same experiment without its cause.
        threshold: the effect that the hypothesis promises to exceed.
        seeds: the seeds, fixed in advance; at least 3.
    """

    name: str
    hypothesis: str
    paper: str
    experiment: Experiment
    control: Experiment
    threshold: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class ClaimResult:
    """What came out: mean effect over seeds with its 95 % interval, the control's, and the verdict."""

    name: str
    hypothesis: str
    verdict: ClaimVerdict
    reason: str
    threshold: float
    effect: float
    interval: tuple[float, float]
    control_effect: float
    control_interval: tuple[float, float]
    effects: tuple[float, ...]
    control_effects: tuple[float, ...]
    seeds: tuple[int, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        (low, high), (control_low, control_high) = self.interval, self.control_interval
        return (
            f"{self.name}: {self.verdict}. {self.reason} Effect {self.effect:.3f} [{low:.3f}, {high:.3f}], "
            f"control {self.control_effect:.3f} [{control_low:.3f}, {control_high:.3f}], "
            f"{len(self.seeds)} seeds, {self.seconds:.1f} s."
        )


CLAIMS: dict[str, Claim] = {}


def claim(
    name: str,
    *,
    hypothesis: str,
    paper: str,
    control: Experiment,
    threshold: float,
    seeds: Sequence[int] = range(8),
) -> Callable[[Experiment], Experiment]:
    """Register the decorated experiment as a claim.

    Raises:
        BadInputError: the name is taken, or there are fewer than three different seeds (no interval).
    """
    if name in CLAIMS:
        raise BadInputError(f"There is a claim {name!r} already.", advice="Choose another name.")
    if len(set(seeds)) < 3 or len(set(seeds)) != len(seeds):
        raise BadInputError(f"Claim {name!r} needs at least three different seeds.")

    def register(experiment: Experiment) -> Experiment:
        CLAIMS[name] = Claim(name, hypothesis, paper, experiment, control, threshold, tuple(seeds))
        return experiment

    return register


def load_claims() -> dict[str, Claim]:
    """Import every module of this package and return the registered claims by name."""
    package = importlib.import_module("corrigible.claims")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"corrigible.claims.{module.name}")
    return CLAIMS


def run_claim(claim: Claim) -> ClaimResult:
    """Run the experiment and its control on every seed and judge.

    *supported*: the whole 95 % interval of the effect lies above the threshold, and the control's
    does not. *not supported*: the whole interval lies at or below the threshold. *inconclusive*:
    neither, or the control shows the effect too, so that it has another cause than the one claimed.

    The interval is Student's t over seeds; seeds are the only source of independence.

    Raises:
        NumericsError: an experiment returned NaN or infinity (a failed run is not a small effect).
    """
    start = time.perf_counter()
    effects, controls = [], []
    for seed in track(claim.seeds, claim.name, unit="seed"):
        effects.append(_finite(claim, seed, "experiment", claim.experiment(seed)))
        controls.append(_finite(claim, seed, "control", claim.control(seed)))
    effect, interval = _mean_with_interval(effects)
    control_effect, control_interval = _mean_with_interval(controls)
    verdict: ClaimVerdict
    if interval[0] > claim.threshold and control_interval[0] > claim.threshold:
        verdict, reason = "inconclusive", "The negative control shows the effect too."
    elif interval[0] > claim.threshold:
        verdict, reason = "supported", f"The interval lies above {claim.threshold:g}."
    elif interval[1] <= claim.threshold:
        verdict, reason = "not supported", f"The interval does not lie above {claim.threshold:g}."
    else:
        verdict, reason = "inconclusive", f"The interval contains {claim.threshold:g}; more seeds would tell."
    emit(Metric(name=f"claim/{claim.name}", value=effect, interval=interval))
    return ClaimResult(
        name=claim.name,
        hypothesis=claim.hypothesis,
        verdict=verdict,
        reason=reason,
        threshold=claim.threshold,
        effect=effect,
        interval=interval,
        control_effect=control_effect,
        control_interval=control_interval,
        effects=tuple(effects),
        control_effects=tuple(controls),
        seeds=claim.seeds,
        seconds=time.perf_counter() - start,
    )


def _finite(claim: Claim, seed: int, what: str, value: float) -> float:
    if not math.isfinite(value):
        raise NumericsError(f"The {what} of claim {claim.name!r} returned {value} for seed {seed}.")
    return float(value)


def _mean_with_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    from scipy import stats

    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance / n)
    return mean, (mean - half, mean + half)
