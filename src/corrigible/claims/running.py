"""Running a claim: seed after seed under fixed conditions, then the verdict."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from corrigible.claims.framework import (
    ALPHA,
    Claim,
    ClaimVerdict,
    EffectResult,
    Outcome,
    alpha_of_look,
    decide,
    outcome_of,
)
from corrigible.errors import BadInputError
from corrigible.events import Alert, Metric, emit, track


@dataclass(frozen=True)
class SeedRun:
    """One seed as it was run: what it measured, or why it failed, and how long it took in seconds."""

    seed: int
    outcome: Outcome | None
    failure: str
    seconds: float


@dataclass(frozen=True)
class ClaimResult:
    """What came out of a claim.

    Attributes:
        effect, also, controls: as they came out; None and empty when fewer than two seeds ran to their end.
        runs: every seed. look: how many times the claim has been looked at with new data, this one included;
            ``alpha`` is the level of this look.
        seconds: of all seeds together; ``over_budget`` says whether that is more than was declared.
    """

    id: str
    title: str
    hypothesis: str
    verdict: ClaimVerdict
    reason: str
    effect: EffectResult | None
    also: tuple[EffectResult, ...]
    controls: tuple[EffectResult, ...]
    runs: tuple[SeedRun, ...]
    look: int
    alpha: float
    seconds: float
    budget: float

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def failures(self) -> dict[int, str]:
        """Why a seed has no outcome, by seed."""
        return {run.seed: run.failure for run in self.runs if run.outcome is None}

    @property
    def over_budget(self) -> bool:
        return self.seconds > self.budget

    @property
    def p(self) -> float | None:
        """The claim's p value, already corrected for its looks.

        All of ``also`` must hold with the primary effect, so it is the largest of theirs; times ``2**look``,
        which makes it comparable with alpha whatever the look.
        """
        if self.effect is None or self.failures:
            return None
        return min(1.0, max(each.p for each in (self.effect, *self.also)) * 2.0**self.look)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = asdict(self)
        runs = found.pop("runs")
        return {
            **found,
            "p": self.p,
            "over_budget": self.over_budget,
            "seeds": list(self.seeds),
            "failures": {str(seed): why for seed, why in self.failures.items()},
            "values": {str(run["seed"]): run["outcome"]["values"] for run in runs if run["outcome"]},
        }

    def __str__(self) -> str:
        parts = [f"{self.id}: {self.verdict}. {self.reason}"]
        if self.effect is not None:
            parts.append(f"{self.effect.name}: {self.effect}.")
        parts += [f"Control, {each.name}: {each}." for each in self.controls]
        over = f", over its budget of {self.budget:.0f} s" if self.over_budget else ""
        return " ".join([*parts, f"{len(self.runs)} seeds, {self.seconds:.1f} s{over}."])


def run_claim(
    claim: Claim,
    seeds: Sequence[int] | None = None,
    *,
    look: int = 1,
    done: Mapping[int, SeedRun] | None = None,
    after_seed: Callable[[SeedRun], None] | None = None,
) -> ClaimResult:
    """Run the experiment on every seed and judge.

    Args:
        seeds: others than the declared ones: more of them (a further look), or trial seeds.
        look: how many times the claim has been looked at, with this one; see
            :func:`corrigible.claims.framework.alpha_of_look`.
        done: seeds that were run already, under the same code; they are not run again.
        after_seed: called with every new seed at once, to keep it.

    A seed that raises or returns a NaN is a failure with a name. It leaves the claim inconclusive: to judge
    by the seeds that happened to survive would choose them by their result.
    """
    runs: list[SeedRun] = []
    spent = 0.0
    for seed in track(tuple(seeds if seeds is not None else claim.seeds), claim.id, unit="seed"):
        if done and seed in done:
            runs.append(done[seed])
        else:
            runs.append(run_seed(claim, seed))
            if after_seed is not None:
                after_seed(runs[-1])
        before, spent = spent, spent + runs[-1].seconds
        if before <= claim.budget < spent:
            emit(Alert(name="over_budget", message=f"{claim.id} has used its {claim.budget:.0f} s."))
    return judge(claim, runs, look=look)


def judge(claim: Claim, runs: Sequence[SeedRun], *, look: int = 1) -> ClaimResult:
    """The verdict on seeds that were run; a pure function of them."""
    alpha = alpha_of_look(look)
    values = [run.outcome.values for run in runs if run.outcome is not None]
    failed = [run for run in runs if run.outcome is None]
    effect: EffectResult | None = None
    also: tuple[EffectResult, ...] = ()
    controls: tuple[EffectResult, ...] = ()
    if len(values) > 1:
        effect = claim.effect.judge(values, alpha)
        also = tuple(each.judge(values, alpha) for each in claim.also)
        # A control's effect speaks against the claim: it gets no stricter level for being looked at again.
        controls = tuple(each.judge(values, ALPHA) for each in claim.controls)
    if failed or effect is None:
        verdict: ClaimVerdict = "inconclusive"
        reason = (
            f"{len(failed)} of {len(runs)} seeds failed; the first, {failed[0].seed}: {failed[0].failure}"
            if failed
            else "One seed alone has no interval."
        )
    else:
        verdict, reason = decide(effect, also, controls)
    if effect is not None:
        emit(Metric(name=f"claim/{claim.id}", value=effect.effect, interval=effect.interval))
    return ClaimResult(
        id=claim.id,
        title=claim.title,
        hypothesis=claim.hypothesis,
        verdict=verdict,
        reason=reason,
        effect=effect,
        also=also,
        controls=controls,
        runs=tuple(runs),
        look=look,
        alpha=alpha,
        seconds=sum(run.seconds for run in runs),
        budget=claim.budget,
    )


def run_seed(claim: Claim, seed: int) -> SeedRun:
    """One seed under fixed conditions: the same seed gives the same numbers, whatever ran before it."""
    start = time.perf_counter()
    outcome, failure = None, ""
    try:
        with reproducible(seed, threads=claim.threads):
            outcome = outcome_of(claim, seed, claim.experiment(seed))
        # An effect that asks for what is not there is found at the first seed, not after the last.
        for each in (claim.effect, *claim.also, *claim.controls):
            each.number(outcome.values)
    except BadInputError:
        raise  # the experiment is written wrongly, or its data are not here: no seed will do better
    except Exception as error:
        outcome, failure = None, f"{type(error).__name__}: {error}"
        emit(Alert(name="seed_failed", message=f"{claim.id}, seed {seed}: {failure}"))
    return SeedRun(seed, outcome, failure, time.perf_counter() - start)


@contextmanager
def reproducible(seed: int, *, threads: int) -> Iterator[None]:
    """Seed every global generator and fix torch's threads; all are put back as they were.

    Experiments should use generators of their own; the global ones are seeded for what they call that does
    not.
    """
    import numpy as np
    import torch

    # The legacy generator is what np.random.shuffle and scikit-learn draw from.
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads_before, dtype_before = torch.get_num_threads(), torch.get_default_dtype()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        torch.set_num_threads(threads_before)
        torch.set_default_dtype(dtype_before)
