"""The contrast losses once more: scalar loops in float64 from their equations, slopes derived by hand.

Nothing of the code under test is used, no tensors, and no automatic differentiation. A case is a list of
groups; every oracle takes it with the settings of the algorithm of that name, and gives the loss and its
slope after the log-prob of every token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Row:
    """One answer: log-probs of its tokens under policy and reference, credit of each, and what is known."""

    policy: list[float]
    reference: list[float]
    credit: list[float]
    score: float = 0.0
    logq: float = math.nan
    wanted: bool = True


@dataclass
class Group:
    """The answers to one prompt; of a pair the first is the chosen one, with probability ``p``."""

    rows: list[Row]
    weight: float = 1.0
    p: float = 1.0
    rate: float | None = None


@dataclass
class Case:
    """A batch; ``z0`` for KTO."""

    groups: list[Group]
    denominator: float | None = None
    z0: float = 0.0


Slopes = list[list[list[float]]]
"""Per group, per row, per token."""

Answer = tuple[float, Slopes]


@dataclass
class Tally:
    """Adds up a loss: ``sum of weight * loss`` of groups that compare anything, over their weight."""

    case: Case
    value: float = 0.0
    weight: float = 0.0
    slopes: Slopes = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slopes = [[[0.0] * len(row.policy) for row in group.rows] for group in self.case.groups]

    def add(self, g: int, loss: float, by_row: dict[int, float], power: float, counts: bool = True) -> None:
        """A loss of group ``g`` with its slopes after the reduced log-prob of rows."""
        group = self.case.groups[g]
        self.value += group.weight * loss
        self.weight += group.weight if counts else 0.0
        for i, slope in by_row.items():
            row = group.rows[i]
            for t, credit in enumerate(row.credit):
                self.slopes[g][i][t] += group.weight * slope * credit / len(row.policy) ** power

    def likelihood(self, g: int, i: int, coefficient: float, mean: bool) -> None:
        """``coefficient * NLL`` of one row: every token counts, whatever its credit."""
        group, row = self.case.groups[g], self.case.groups[g].rows[i]
        share = coefficient / (len(row.policy) if mean else 1)
        self.value -= group.weight * share * math.fsum(row.policy)
        for t in range(len(row.policy)):
            self.slopes[g][i][t] -= group.weight * share

    def answer(self) -> Answer:
        divisor = self.weight if self.case.denominator is None else self.case.denominator
        return self.value / divisor, [[[x / divisor for x in row] for row in group] for group in self.slopes]


def reduced(row: Row, power: float) -> float:
    return math.fsum(c * x for c, x in zip(row.credit, row.policy, strict=True)) / len(row.policy) ** power


def reduced_reference(row: Row, power: float) -> float:
    return math.fsum(c * x for c, x in zip(row.credit, row.reference, strict=True)) / len(row.policy) ** power


def ratio(row: Row, power: float = 0.0) -> float:
    return reduced(row, power) - reduced_reference(row, power)


def there(group: Group) -> list[int]:
    """The rows that say anything."""
    return [i for i, row in enumerate(group.rows) if row.policy]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigma(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


Cost = Callable[[float], tuple[float, float]]
"""Of a difference whose first side won: what it costs, and the slope of that."""


def logistic(d: float) -> tuple[float, float]:
    return softplus(-d), -sigma(-d)


def hinge(d: float) -> tuple[float, float]:
    return (1.0 - d, -1.0) if d < 1.0 else (0.0, 0.0)


def either_way(cost: Cost, d: float, p: float, margin: float = 0.0) -> tuple[float, float]:
    """The mean over a label that is right with probability ``p``."""
    (won, rising), (lost, falling) = cost(d - margin), cost(-d - margin)
    return p * won + (1 - p) * lost, p * rising - (1 - p) * falling


def smooth(p: float, e: float) -> float:
    return p * (1 - e) + (1 - p) * e


def margins(
    case: Case,
    cost: Callable[[float, Group], tuple[float, float]],
    *,
    power: float = 0.0,
    reference: bool = True,
    sft: float = 0.0,
    sft_mean: bool = False,
    confidence: bool = False,
) -> Answer:
    """Losses of ``h_w - h_l`` (``s_w - s_l`` without a reference) and the likelihood of the chosen one."""
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        if there(group) != [0, 1]:
            continue
        chosen, rejected = group.rows
        of = ratio if reference else reduced
        loss, slope = cost(of(chosen, power) - of(rejected, power), group)
        if confidence:
            mean = [math.fsum(row.policy) / len(row.policy) for row in group.rows]
            loss, slope = loss * math.exp(sum(mean)), slope * math.exp(sum(mean))
        tally.add(g, loss, {0: slope, 1: -slope}, power)
        tally.likelihood(g, 0, sft, sft_mean)
    return tally.answer()


def scaled(cost: Cost, beta: float, d: float, p: float, margin: float = 0.0) -> tuple[float, float]:
    loss, slope = either_way(cost, beta * d, p, margin)
    return loss, beta * slope


# -- pairs ----------------------------------------------------------------------------------------


def dpo(case: Case, *, beta: float, label_smoothing: float = 0.0) -> Answer:
    """In sequence form, where an answer without tokens has log-prob 0 (the trainer refuses such rows)."""
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        d = ratio_of_any(group.rows[0]) - ratio_of_any(group.rows[1])
        loss, slope = scaled(logistic, beta, d, smooth(group.p, label_smoothing))
        tally.add(g, loss, {0: slope, 1: -slope}, 0.0)
    return tally.answer()


def ratio_of_any(row: Row) -> float:
    return math.fsum(row.policy) - math.fsum(row.reference)


def cdpo(case: Case, *, beta: float, label_smoothing: float) -> Answer:
    return margins(case, lambda d, g: scaled(logistic, beta, d, smooth(g.p, label_smoothing)))


def rdpo(
    case: Case,
    *,
    beta: float,
    flip_rate: float,
    largest_margin: float | None = None,
    annotator_flip_rates: object = None,
) -> Answer:
    """``((1 - e) l(d) - e l(-d)) / (1 - 2 e)``, mean over the label; flat beyond the largest margin."""

    def cost(d: float, group: Group) -> tuple[float, float]:
        e = flip_rate if group.rate is None else group.rate

        def clean(x: float) -> tuple[float, float]:
            (won, rising), (lost, falling) = logistic(x), logistic(-x)
            return ((1 - e) * won - e * lost) / (1 - 2 * e), ((1 - e) * rising + e * falling) / (1 - 2 * e)

        # What multiplies l(d) over all is above 1, or below 0, exactly where the loss falls for ever.
        p = (group.p - e) / (1 - 2 * e)
        flat = False
        if largest_margin is not None:
            if p > 1 and beta * d > largest_margin:
                d, flat = largest_margin / beta, True
            elif p < 0 and beta * d < -largest_margin:
                d, flat = -largest_margin / beta, True
        loss, slope = scaled(clean, beta, d, group.p)
        return loss, 0.0 if flat else slope

    return margins(case, cost)


def ipo(case: Case, *, tau: float, length_normalised: bool = False) -> Answer:
    def square(x: float) -> tuple[float, float]:
        return (x - 1 / (2 * tau)) ** 2, 2 * (x - 1 / (2 * tau))

    return margins(case, lambda d, g: either_way(square, d, g.p), power=float(length_normalised))


def slic(case: Case, *, gamma: float, sft_weight: float) -> Answer:
    def cost(x: float) -> tuple[float, float]:
        return (1 / gamma - x, -1.0) if x < 1 / gamma else (0.0, 0.0)

    return margins(case, lambda d, g: either_way(cost, d, g.p), reference=False, sft=sft_weight)


def hinge_norm(case: Case, *, gamma: float) -> Answer:
    return margins(case, lambda d, g: scaled(hinge, gamma, d, g.p))


def simpo(case: Case, *, beta: float, gamma: float, sft_weight: float = 0.0) -> Answer:
    return margins(
        case,
        lambda d, g: scaled(logistic, beta, d, g.p, gamma),
        power=1.0,
        reference=False,
        sft=sft_weight,
        sft_mean=True,
    )


def orpo(case: Case, *, odds_weight: float) -> Answer:
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        if there(group) != [0, 1]:
            continue
        means = [reduced(row, 1.0) for row in group.rows]
        odds = [m - math.log(-math.expm1(m)) for m in means]
        loss, slope = either_way(logistic, odds[0] - odds[1], group.p)
        by_row = {
            0: odds_weight * slope / -math.expm1(means[0]),
            1: -odds_weight * slope / -math.expm1(means[1]),
        }
        tally.add(g, odds_weight * loss, by_row, 1.0)
        tally.likelihood(g, 0, 1.0, mean=True)
    return tally.answer()


def f_dpo(case: Case, *, beta: float, divergence: str, alpha: float = 0.5) -> Answer:
    def link(h: float) -> tuple[float, float]:
        if divergence == "jensen_shannon":
            return math.log(2) - softplus(-h), sigma(-h)
        a = {"forward_kl": 0.0, "alpha": alpha}[divergence]
        if a == 1.0:
            return h, 1.0
        power = (a - 1) * h
        grown = math.exp(min(power, 80.0))
        return (grown - 1) / (a - 1), grown if power < 80.0 else 0.0

    tally = Tally(case)
    for g, group in enumerate(case.groups):
        if there(group) != [0, 1]:
            continue
        (u_w, by_w), (u_l, by_l) = (link(ratio(row)) for row in group.rows)
        loss, slope = scaled(logistic, beta, u_w - u_l, group.p)
        tally.add(g, loss, {0: slope * by_w, 1: -slope * by_l}, 0.0)
    return tally.answer()


def wpo(case: Case, *, beta: float) -> Answer:
    return margins(case, lambda d, g: scaled(logistic, beta, d, g.p), confidence=True)


def unlikelihood(case: Case, *, rejected_weight: float, length_normalised: bool = False) -> Answer:
    tally, power = Tally(case), float(length_normalised)
    for g, group in enumerate(case.groups):
        if there(group) != [0, 1]:
            continue
        s = [reduced(row, power) for row in group.rows]
        up = group.p - (1 - group.p) * rejected_weight
        down = (1 - group.p) - group.p * rejected_weight
        tally.add(g, -up * s[0] - down * s[1], {0: -up, 1: -down}, power)
    return tally.answer()


def pref_ft(case: Case, *, length_normalised: bool = False) -> Answer:
    return unlikelihood(case, rejected_weight=0.0, length_normalised=length_normalised)


# -- single answers -------------------------------------------------------------------------------


def kto(case: Case, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Answer:
    """In sequence form, as :func:`dpo`."""
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        x = beta * (ratio_of_any(group.rows[0]) - case.z0)
        if group.rows[0].wanted:
            loss, slope = desirable_weight * sigma(-x), -desirable_weight * beta * sigma(x) * sigma(-x)
        else:
            loss, slope = undesirable_weight * sigma(x), undesirable_weight * beta * sigma(x) * sigma(-x)
        tally.add(g, loss, {0: slope}, 0.0)
    return tally.answer()


def f_sft(case: Case, *, beta: float, divergence: str, length_normalised: bool = False) -> Answer:
    def gain(v: float) -> tuple[float, float]:
        if divergence == "total_variation":
            return v, 1.0
        if divergence == "pearson":
            return v - v * v / 4, 1 - v / 2
        if divergence == "kl":
            grown = math.exp(min(-v - 1, 80.0))
            return -grown, grown if -v - 1 < 80.0 else 0.0
        at = max(v, -0.5)
        if divergence == "hellinger":
            value, slope = at / (1 + at), 1 / (1 + at) ** 2
        else:
            value, slope = math.log(2 - math.exp(-at)), math.exp(-at) / (2 - math.exp(-at))
        return value + slope * (v - at), slope

    tally, power = Tally(case), float(length_normalised)
    for g, group in enumerate(case.groups):
        for i in there(group):
            # Under total variation the reference is a constant of the loss, and not computed.
            h = (
                reduced(group.rows[i], power)
                if divergence == "total_variation"
                else ratio(group.rows[i], power)
            )
            value, slope = gain(beta * h)
            tally.add(g, -value, {i: -beta * slope}, power)
    return tally.answer()


# -- several answers ------------------------------------------------------------------------------


def ordered(group: Group) -> list[tuple[int, list[int]]]:
    """Every row with those that are strictly worse."""
    rows = there(group)
    found = [(k, [j for j in rows if group.rows[j].score < group.rows[k].score]) for k in rows]
    return [(k, worse) for k, worse in found if worse]


def log_sum(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(math.fsum(math.exp(x - most) for x in values))


def best_of(group: Group) -> int:
    return max(there(group), key=lambda i: group.rows[i].score)


def plackett_luce(case: Case, *, beta: float) -> Answer:
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        v = {i: beta * ratio(group.rows[i]) for i in there(group)}
        for number, (k, worse) in enumerate(ordered(group)):
            total = log_sum([v[k], *(v[j] for j in worse)])
            slopes = {j: beta * math.exp(v[j] - total) for j in worse}
            slopes[k] = -beta * math.fsum(math.exp(v[j] - total) for j in worse)
            tally.add(g, total - v[k], slopes, 0.0, counts=number == 0)
    return tally.answer()


def rrhf(case: Case, *, sft_weight: float, sft_reduce: str) -> Answer:
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        pairs = ordered(group)
        s = {i: reduced(group.rows[i], 1.0) for i in there(group)}
        for number, (k, worse) in enumerate(pairs):
            for j in worse:
                if s[j] > s[k]:
                    tally.add(g, s[j] - s[k], {j: 1.0, k: -1.0}, 1.0, counts=False)
            tally.weight += group.weight if number == 0 else 0.0
        if pairs:
            tally.likelihood(g, best_of(group), sft_weight, sft_reduce == "mean")
    return tally.answer()


def pro(case: Case, *, sft_weight: float, standardise_scores: bool) -> Answer:
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        rows, pairs = there(group), ordered(group)
        p = {i: reduced(group.rows[i], 1.0) for i in rows}
        scores = {i: group.rows[i].score for i in rows}
        if standardise_scores and pairs:
            mean = math.fsum(scores.values()) / len(rows)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in scores.values()) / len(rows))
            scores = {i: x / spread for i, x in scores.items()}
        for number, (k, worse) in enumerate(pairs):
            gap = {j: scores[k] - scores[j] for j in worse}
            most = max(gap.values())
            total = log_sum([p[k] * most, *(p[j] * gap[j] for j in worse)])
            slopes = {j: gap[j] * math.exp(p[j] * gap[j] - total) for j in worse}
            slopes[k] = -most * math.fsum(math.exp(p[j] * gap[j] - total) for j in worse)
            tally.add(g, total - p[k] * most, slopes, 1.0, counts=number == 0)
        if pairs:
            tally.likelihood(g, best_of(group), sft_weight * (len(rows) - 1) ** 2, mean=False)
    return tally.answer()


def brain(case: Case, *, beta: float, log_weight_cap: float | None = None, hard: bool = False) -> Answer:
    """A proposal that nobody recorded is the reference."""
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        rows = there(group)
        if len(rows) < 2:
            continue
        prior = {i: reduced_reference(group.rows[i], 0.0) for i in rows}
        q = {i: prior[i] if math.isnan(group.rows[i].logq) else group.rows[i].logq for i in rows}
        cap = math.inf if log_weight_cap is None else log_weight_cap
        a = {i: min(max(prior[i] - q[i], -cap), cap) + group.rows[i].score / beta for i in rows}
        total = log_sum(list(a.values()))
        alpha = {i: math.exp(a[i] - total) for i in rows}
        if hard:
            top = [i for i in rows if a[i] == max(a.values())]
            alpha = {i: (i in top) / len(top) for i in rows}
        b = {i: reduced(group.rows[i], 0.0) - q[i] for i in rows}
        whole = log_sum(list(b.values()))
        loss = math.fsum(alpha[i] * (math.log(alpha[i]) - (b[i] - whole)) for i in rows if alpha[i] > 0)
        tally.add(g, loss, {i: math.exp(b[i] - whole) - alpha[i] for i in rows}, 0.0)
    return tally.answer()


def copg(case: Case, *, beta: float) -> Answer:
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        rows = there(group)
        two = [(i, j) for n, i in enumerate(rows) for j in rows[n + 1 :]]
        for number, (i, j) in enumerate(two):
            regularised = [group.rows[k].score - beta * ratio(group.rows[k]) for k in (i, j)]
            gap = regularised[0] - regularised[1]
            slope = -gap / (2 * len(two))
            tally.add(g, gap**2 / (4 * beta * len(two)), {i: slope, j: -slope}, 0.0, counts=number == 0)
    return tally.answer()


def imitation(
    case: Case, weigh: Callable[[Group, list[int]], list[float]], power: float, whole: bool
) -> Answer:
    """``-sum of w s``: the mean over a group's answers, or (``whole``) the sum."""
    tally = Tally(case)
    for g, group in enumerate(case.groups):
        rows = there(group)
        share = 1.0 if whole else 1 / max(1, len(rows))
        for number, (i, w) in enumerate(zip(rows, weigh(group, rows), strict=True)):
            tally.add(
                g,
                -share * w * reduced(group.rows[i], power),
                {i: -share * w},
                power,
                counts=number == 0,
            )
    return tally.answer()


def rwr(case: Case, *, beta: float, length_normalised: bool = False) -> Answer:
    def weigh(group: Group, rows: list[int]) -> list[float]:
        total = log_sum([group.rows[i].score / beta for i in rows]) if rows else 0.0
        return [math.exp(group.rows[i].score / beta - total) for i in rows]

    return imitation(case, weigh, float(length_normalised), whole=True)


def awr(
    case: Case, *, beta: float, baseline: str, weight_cap: float, length_normalised: bool = False
) -> Answer:
    def weigh(group: Group, rows: list[int]) -> list[float]:
        scores = [group.rows[i].score for i in rows]
        if not rows:
            return []
        base = {"zero": 0.0, "group_mean": math.fsum(scores) / len(rows), "group_best": max(scores)}[baseline]
        return [min(weight_cap, math.exp(min(80.0, (score - base) / beta))) for score in scores]

    return imitation(case, weigh, float(length_normalised), whole=False)


def sft(case: Case, *, length_normalised: bool = False) -> Answer:
    return imitation(case, lambda group, rows: [1.0] * len(rows), float(length_normalised), whole=False)


CONTRAST_ORACLES: dict[str, Callable[..., Answer]] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "rdpo": rdpo,
    "ipo": ipo,
    "slic": slic,
    "hinge-norm": hinge_norm,
    "simpo": simpo,
    "orpo": orpo,
    "f-dpo": f_dpo,
    "wpo": wpo,
    "spin": lambda case, *, beta: cdpo(case, beta=beta, label_smoothing=0.0),
    "pref-ft": pref_ft,
    "unlikelihood": unlikelihood,
    "f-sft": f_sft,
    "kto": kto,
    "plackett-luce": plackett_luce,
    "rrhf": rrhf,
    "pro": pro,
    "brain": brain,
    "copg": copg,
    "rwr": rwr,
    "awr": awr,
}
"""By the name of the algorithm; the settings are its config's."""
