"""The whole picture of one candidate against one baseline, on the same prompts.

:func:`compare` works on episodes that exist; :func:`evaluate_policy` samples them first, keeping
what it sampled so that an interrupted evaluation goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from corrigible.errors import BadInputError
from corrigible.evaluate.kl import KLEstimate, kl_to_reference
from corrigible.evaluate.sampling import sample_episodes
from corrigible.evaluate.win_rate import PairJudge, WinRate, no_answer, pair_by_prompt, win_rate
from corrigible.events import Message as Note
from corrigible.events import Metric, emit
from corrigible.intervals import Estimate, cluster_bootstrap, paired_bootstrap
from corrigible.records import Episode, Message, Sampling

if TYPE_CHECKING:
    from corrigible.models import LanguagePolicy
    from corrigible.rewards.signals import Signal

__all__ = ["Evaluation", "SideBySide", "compare", "evaluate_policy", "sample_episodes"]


@dataclass(frozen=True)
class SideBySide:
    """One quantity for both policies over the same pairs, and the paired difference.

    ``difference`` is candidate minus baseline; ``left_out`` counts pairs where a side has no value.
    """

    name: str
    unit: str
    candidate: Estimate
    baseline: Estimate
    difference: Estimate
    left_out: int = 0

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "unit": self.unit,
            "candidate": self.candidate.to_json(),
            "baseline": self.baseline.to_json(),
            "difference": self.difference.to_json(),
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Evaluation:
    """What :func:`compare` found.

    Attributes:
        candidate, baseline: names of the two policies.
        win_rates: by judge; the first one is the headline, ``win_rate``.
        scores: by signal name ("gold", "proxy", ...): mean value side by side. A proxy that rises
            while the gold does not is over-optimisation.
        length: mean length of an answer side by side, in tokens (words where ids were not recorded).
        kl: divergence of the candidate from its reference, when it was measured.
        finish: why answers ended, counts, for "candidate" and "baseline".
    """

    candidate: str
    baseline: str
    win_rates: Mapping[str, WinRate]
    scores: Mapping[str, SideBySide]
    length: SideBySide
    kl: KLEstimate | None = None
    finish: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def win_rate(self) -> WinRate:
        return next(iter(self.win_rates.values()))

    @property
    def length_ratio(self) -> float:
        """Mean length of the candidate's answers over the baseline's."""
        return self.length.candidate.value / max(self.length.baseline.value, 1e-9)

    def to_json(self, *, items: bool = False) -> dict[str, object]:
        """JSON form; ``items`` adds every judged item."""
        return {
            "candidate": self.candidate,
            "baseline": self.baseline,
            "win_rate": self.win_rate.value,
            "win_rate_interval": list(self.win_rate.interval),
            "win_rates": {name: rate.to_json(items=items) for name, rate in self.win_rates.items()},
            "scores": {name: side.to_json() for name, side in self.scores.items()},
            "length": self.length.to_json(),
            "length_ratio": self.length_ratio,
            "kl": None if self.kl is None else self.kl.to_json(),
            "finish": {side: dict(counts) for side, counts in self.finish.items()},
        }


def compare(
    candidate: Sequence[Episode],
    baseline: Sequence[Episode],
    judges: PairJudge | Sequence[PairJudge],
    *,
    signals: Mapping[str, Signal] | None = None,
    kl: KLEstimate | None = None,
    names: tuple[str, str] = ("candidate", "baseline"),
    level: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Compare the answers of two policies, paired by prompt.

    Args:
        judges: one or more; the first gives the headline win rate.
        signals: name to signal; each is reported side by side with its paired difference.
        kl: measured divergence to report with the rest.

    Raises:
        BadInputError: no judge, two judges of one name, or no prompt in common.
    """
    asked = [*judges] if isinstance(judges, Sequence) else [judges]
    if not asked or len({judge.name for judge in asked}) < len(asked):
        raise BadInputError(
            f"an evaluation needs judges with different names, not {[judge.name for judge in asked]}"
        )
    rates = {judge.name: win_rate(candidate, baseline, judge, level=level, seed=seed) for judge in asked}
    # An answer that does not exist has no length and no score; win rates count it with its reason.
    pairs = [
        (prompt, a, b)
        for prompt, a, b in pair_by_prompt(candidate, baseline).pairs
        if no_answer(a) is None and no_answer(b) is None
    ]
    prompts = [prompt for prompt, _, _ in pairs]
    mine, theirs = [a for _, a, _ in pairs], [b for _, _, b in pairs]
    scores = {
        name: _scored(name, signal, mine, theirs, prompts, level=level, seed=seed)
        for name, signal in (signals or {}).items()
    }
    evaluation = Evaluation(
        candidate=names[0],
        baseline=names[1],
        win_rates=rates,
        scores=scores,
        length=_lengths(mine, theirs, prompts, level=level, seed=seed),
        kl=kl,
        finish={"candidate": _finish(candidate), "baseline": _finish(baseline)},
    )
    emit(Metric(name="win_rate", value=evaluation.win_rate.value, interval=evaluation.win_rate.interval))
    if kl is not None:
        emit(Metric(name="kl", value=kl.value, interval=kl.interval))
    return evaluation


def evaluate_policy(
    candidate: LanguagePolicy,
    baseline: LanguagePolicy | None,
    prompts: Sequence[Sequence[Message]],
    judges: PairJudge | Sequence[PairJudge],
    *,
    signals: Mapping[str, Signal] | None = None,
    n: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    names: tuple[str, str] = ("candidate", "baseline"),
    versions: tuple[str, str] | None = None,
    keep: str | Path | None = None,
    measure_kl: bool = True,
    level: float = 0.95,
) -> tuple[Evaluation, list[Episode], list[Episode]]:
    """Sample ``n`` answers per prompt from both policies and compare them.

    Args:
        baseline: None means the candidate without its adapter: nothing is loaded twice.
        sampling: default plain sampling of up to 128 tokens, which the divergence needs to be exact.
        names, versions: what the two are called, and the policy version ids written into their
            episodes (default: the names).
        keep: directory in which episodes are kept as they come; the same call goes on from them.
        measure_kl: also measure the divergence of the candidate from the baseline, where they have the
            same vocabulary.

    Returns:
        The evaluation, the candidate's episodes, the baseline's episodes.
    """
    from corrigible.models import same_vocabulary

    settings = sampling or Sampling(max_tokens=128)
    sides: dict[str, list[Episode]] = {}
    for side, name, version in zip(("candidate", "baseline"), names, versions or names, strict=True):
        policy = candidate if side == "candidate" or baseline is None else baseline
        off = side == "baseline" and baseline is None
        with policy.adapter_disabled() if off else nullcontext():
            sides[side] = sample_episodes(
                policy,
                prompts,
                n=n,
                sampling=settings,
                seed=seed,
                policy_version=version,
                variant="adapter disabled" if off else "",
                task="evaluate",
                keep=None if keep is None else Path(keep) / f"{side}.jsonl",
                label=f"sampling {name}",
            )
    kl = None
    if measure_kl and baseline is not None and not same_vocabulary(candidate, baseline):
        emit(Note(text=f"No divergence: {names[0]} and {names[1]} have different vocabularies."))
    elif measure_kl:
        kl = kl_to_reference(sides["candidate"], candidate, baseline, level=level, seed=seed)
    evaluation = compare(
        sides["candidate"],
        sides["baseline"],
        judges,
        signals=signals,
        kl=kl,
        names=names,
        level=level,
        seed=seed,
    )
    return evaluation, sides["candidate"], sides["baseline"]


def _scored(
    name: str,
    signal: Signal,
    mine: Sequence[Episode],
    theirs: Sequence[Episode],
    prompts: Sequence[str],
    *,
    level: float,
    seed: int,
) -> SideBySide:
    ours, others = signal.score(mine), signal.score(theirs)
    both = ours.valid & others.valid
    if not both.any():
        raise BadInputError(
            f"signal {name} could score none of {len(both)} pairs",
            advice=f"reasons: {dict(Counter(r for r in (*ours.reasons, *others.reasons) if r))}",
        )
    used = [prompt for prompt, ok in zip(prompts, both, strict=True) if ok]
    return _side_by_side(
        name, "score", ours.values[both], others.values[both], used, int((~both).sum()), level, seed
    )


def _lengths(
    mine: Sequence[Episode], theirs: Sequence[Episode], prompts: Sequence[str], *, level: float, seed: int
) -> SideBySide:
    recorded = all(episode.steps[-1].token_ids is not None for episode in (*mine, *theirs))
    unit: Literal["tokens", "words"] = "tokens" if recorded else "words"

    def lengths(episodes: Sequence[Episode]) -> list[int]:
        if recorded:
            return [len(episode.steps[-1].token_ids or ()) for episode in episodes]
        return [len(episode.response_text().split()) for episode in episodes]

    a, b = np.array(lengths(mine), float), np.array(lengths(theirs), float)
    return _side_by_side("length", unit, a, b, prompts, 0, level, seed)


def _side_by_side(
    name: str,
    unit: str,
    mine: np.ndarray[tuple[int], np.dtype[np.float64]],
    theirs: np.ndarray[tuple[int], np.dtype[np.float64]],
    prompts: Sequence[str],
    left_out: int,
    level: float,
    seed: int,
) -> SideBySide:
    return SideBySide(
        name=name,
        unit=unit,
        candidate=cluster_bootstrap(mine, prompts, level=level, seed=seed),
        baseline=cluster_bootstrap(theirs, prompts, level=level, seed=seed),
        difference=paired_bootstrap(mine, theirs, prompts, level=level, seed=seed),
        left_out=left_out,
    )


def _finish(episodes: Sequence[Episode]) -> dict[str, int]:
    reasons = (episode.steps[-1].finish_reason for episode in episodes)
    return dict(Counter("unknown" if reason is None else reason.value for reason in reasons))
