"""Win rate of a candidate against a baseline: paired by prompt, shown in both orders.

Each item is one prompt with one answer of each side. A judge sees it twice, with the candidate first
and with the candidate second; with p the probability that what is shown first wins,

    value = (p(candidate first) + 1 - p(baseline first)) / 2

so a judge that only follows position gives exactly one half, and two hard verdicts that contradict
each other are a tie. What could not be judged is left out and counted; it is never a loss.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from corrigible.collect.questions import Answer, Question
from corrigible.collect.simulated import Panel
from corrigible.errors import BadInputError
from corrigible.intervals import Estimate, cluster_bootstrap
from corrigible.records import Comparison, Episode, FinishReason

if TYPE_CHECKING:
    from corrigible.rewards.signals import Preference, Signal


@dataclass(frozen=True)
class Shown:
    """One presentation: the prompt's key and the two episodes in the order they are shown."""

    first: Episode
    second: Episode


Judged = float | str
"""P(what was shown first wins) in [0, 1], 0.5 a tie; or the reason why there is no judgement."""


class PairJudge(Protocol):
    """Says, for each presentation, how likely the first one shown is the better."""

    @property
    def name(self) -> str: ...

    def compare(self, shown: Sequence[Shown]) -> Sequence[Judged]:
        """One number or reason per presentation, in order."""
        ...


@dataclass(frozen=True)
class SignalJudge:
    """The higher score wins; scores within ``tie`` of each other tie."""

    signal: Signal
    tie: float = 1e-9

    @property
    def name(self) -> str:
        return self.signal.name

    def compare(self, shown: Sequence[Shown]) -> list[Judged]:
        # Every episode comes up in two presentations: score it once.
        episodes = {episode.id: episode for pair in shown for episode in (pair.first, pair.second)}
        scores = self.signal.score(list(episodes.values()))
        by_id: dict[str, Judged] = {
            episode: float(value) if reason is None else reason
            for episode, value, reason in zip(episodes, scores.values, scores.reasons, strict=True)
        }
        verdicts: list[Judged] = []
        for pair in shown:
            a, b = by_id[pair.first.id], by_id[pair.second.id]
            if isinstance(a, str) or isinstance(b, str):
                verdicts.append(a if isinstance(a, str) else str(b))
            else:
                verdicts.append(_verdict(a - b, self.tie))
        return verdicts


@dataclass(frozen=True)
class PreferenceJudge:
    """Asks a preference model; ``hard`` (the default) takes the side above one half."""

    preference: Preference
    name: str = "preference"
    hard: bool = True

    def compare(self, shown: Sequence[Shown]) -> list[Judged]:
        p = self.preference.prefer([pair.first for pair in shown], [pair.second for pair in shown])
        return [_verdict(float(x) - 0.5, 1e-9) if self.hard else float(x) for x in p]


@dataclass(frozen=True)
class PanelJudge:
    """Asks every annotator of a simulated panel; the mean of their votes, ties half.

    An annotator who abstains drops out of the mean; when all do the item is not judged.
    """

    panel: Panel
    name: str = "panel"

    def compare(self, shown: Sequence[Shown]) -> list[Judged]:
        verdicts: list[Judged] = []
        for number, pair in enumerate(shown):
            sides = (Answer.of_episode(pair.first), Answer.of_episode(pair.second))
            question = Question.between(pair.first.prompt_messages(), *sides)
            order = (0, 1) if question.answers[0].item.sha256 == sides[0].item.sha256 else (1, 0)
            votes = [
                _vote(annotator.judge(question, order=order, occasion=number).payload, order)
                for annotator in self.panel.annotators
            ]
            cast = [vote for vote in votes if vote is not None]
            verdicts.append(float(np.mean(cast)) if cast else "cannot_judge")
        return verdicts


def _vote(payload: object, order: tuple[int, int]) -> float | None:
    if not isinstance(payload, Comparison):
        return None
    by_hash = {"first": 1.0, "second": 0.0}.get(payload.outcome, 0.5)
    return by_hash if order == (0, 1) else 1 - by_hash


def _verdict(difference: float, tie: float) -> float:
    return 0.5 if abs(difference) <= tie else float(difference > 0)


@dataclass(frozen=True)
class WinRateItem:
    """One judged item; ``value`` in [0, 1] is the candidate's share."""

    prompt: str
    candidate: str
    baseline: str
    value: float
    p_candidate_first: float
    p_baseline_first: float


@dataclass(frozen=True)
class WinRate:
    """How often the candidate is preferred, ties half, and what the number rests on.

    ``estimate`` has the interval over prompts. ``position_effect`` is the mean of P(first shown wins)
    minus one half, in [-0.5, 0.5]: 0 for a judge without position bias. ``identical`` items (both
    sides said the same) are ties that needed no judge. ``not_judged`` maps reasons to counts, and
    ``unpaired`` counts the answers whose prompt has no answer left on the other side.
    """

    judge: str
    estimate: Estimate
    position_effect: Estimate
    wins: int
    losses: int
    ties: int
    identical: int
    not_judged: dict[str, int]
    unpaired: int
    items: tuple[WinRateItem, ...] = field(repr=False)

    @property
    def value(self) -> float:
        return self.estimate.value

    @property
    def interval(self) -> tuple[float, float]:
        return self.estimate.interval

    @property
    def n(self) -> int:
        """Judged items."""
        return self.estimate.n

    @property
    def prompts(self) -> int:
        """Different prompts among the judged items: the units of the interval."""
        return self.estimate.clusters

    def to_json(self, *, items: bool = False) -> dict[str, object]:
        """JSON form; ``items`` adds one entry per judged item."""
        out: dict[str, object] = {
            "judge": self.judge,
            "value": self.value,
            "interval": list(self.interval),
            "level": self.estimate.level,
            "method": self.estimate.method,
            "n": self.n,
            "prompts": self.prompts,
            "wins": self.wins,
            "losses": self.losses,
            "ties": self.ties,
            "identical": self.identical,
            "not_judged": self.not_judged,
            "unpaired": self.unpaired,
            "position_effect": self.position_effect.to_json(),
        }
        if items:
            out["items"] = [vars(item) for item in self.items]
        return out


@dataclass(frozen=True)
class Pairing:
    """Episodes of two policies, matched: the same prompt and the k-th answer to it on each side."""

    pairs: tuple[tuple[str, Episode, Episode], ...]
    unpaired: int


def pair_by_prompt(candidate: Sequence[Episode], baseline: Sequence[Episode]) -> Pairing:
    """Match answers by the content of their prompt; each pair starts with the prompt's sha256.

    Raises:
        BadInputError: no prompt is common to both sides.
    """
    sides: list[dict[str, list[Episode]]] = []
    for episodes in (candidate, baseline):
        by_prompt: dict[str, list[Episode]] = defaultdict(list)
        for episode in episodes:
            by_prompt[episode.prompt_item().sha256].append(episode)
        sides.append(by_prompt)
    pairs = [
        (prompt, mine, theirs)
        for prompt, answers in sides[0].items()
        for mine, theirs in zip(answers, sides[1].get(prompt, []), strict=False)
    ]
    if not pairs:
        raise BadInputError(
            f"no prompt is common to the {len(candidate)} candidate and {len(baseline)} baseline answers",
            advice="generate both from the same prompts; a win rate is paired by prompt",
        )
    return Pairing(tuple(pairs), len(candidate) + len(baseline) - 2 * len(pairs))


def win_rate(
    candidate: Sequence[Episode],
    baseline: Sequence[Episode],
    judge: PairJudge,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Judge every pair in both orders and estimate the candidate's share of wins.

    Raises:
        BadInputError: nothing to pair, nothing could be judged, or a judge that returned something
            that is neither a probability nor a reason.
    """
    pairing = pair_by_prompt(candidate, baseline)
    reasons: Counter[str] = Counter()
    to_judge: list[tuple[str, Episode, Episode]] = []
    items: list[WinRateItem] = []
    for prompt, mine, theirs in pairing.pairs:
        missing = no_answer(mine) or no_answer(theirs)
        if missing:
            reasons[missing] += 1
        elif mine.response_text() == theirs.response_text():
            items.append(WinRateItem(prompt, mine.id, theirs.id, 0.5, 0.5, 0.5))
        else:
            to_judge.append((prompt, mine, theirs))
    identical = len(items)
    shown = [Shown(a, b) for _, x, y in to_judge for a, b in ((x, y), (y, x))]
    verdicts = list(judge.compare(shown)) if shown else []
    if len(verdicts) != len(shown):
        raise BadInputError(f"judge {judge.name} gave {len(verdicts)} verdicts on {len(shown)} presentations")
    for number, (prompt, mine, theirs) in enumerate(to_judge):
        ours_first, theirs_first = verdicts[2 * number], verdicts[2 * number + 1]
        if isinstance(ours_first, str) or isinstance(theirs_first, str):
            reasons[ours_first if isinstance(ours_first, str) else str(theirs_first)] += 1
            continue
        for p in (ours_first, theirs_first):
            if not 0 <= p <= 1:  # NaN fails this too
                raise BadInputError(
                    f"judge {judge.name} returned {p} for one presentation",
                    advice="a judgement is a probability in [0, 1], or a reason as a string",
                )
        value = (ours_first + 1 - theirs_first) / 2
        items.append(WinRateItem(prompt, mine.id, theirs.id, value, ours_first, theirs_first))
    if not items:
        raise BadInputError(
            f"judge {judge.name} could judge none of {len(pairing.pairs)} items: {dict(reasons)}",
            advice="look at the reasons; a win rate of nothing is not a number",
        )
    prompts = [item.prompt for item in items]
    position = [(item.p_candidate_first + item.p_baseline_first) / 2 - 0.5 for item in items]
    values = np.array([item.value for item in items])
    tied = np.abs(values - 0.5) <= 1e-9
    return WinRate(
        judge=judge.name,
        estimate=cluster_bootstrap(values, prompts, bounds=(0.0, 1.0), level=level, draws=draws, seed=seed),
        position_effect=cluster_bootstrap(position, prompts, level=level, draws=draws, seed=seed),
        wins=int(((values > 0.5) & ~tied).sum()),
        losses=int(((values < 0.5) & ~tied).sum()),
        ties=int(tied.sum()),
        identical=identical,
        not_judged=dict(reasons),
        unpaired=pairing.unpaired,
        items=tuple(items),
    )


def no_answer(episode: Episode) -> str | None:
    """Why an episode holds no answer to judge; an answer that is merely empty is an answer."""
    finish = episode.steps[-1].finish_reason
    if finish == FinishReason.error:
        return "broken_item"
    if finish == FinishReason.context and not episode.response_text():
        return "context_overflow"
    if finish == FinishReason.interrupted:
        return "interrupted"
    return None
