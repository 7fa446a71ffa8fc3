"""What a claim is: one experiment, its effects, its controls, and how a verdict follows from the numbers.

The vocabulary is that of a planned study. What is measured, on which seeds, with which test and against which
threshold is declared before anything runs; running (:mod:`corrigible.claims.running`) only fills it in.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from corrigible.claims.fixtures.statistics import TestName, bootstrap, sign_test, student_t, tost
from corrigible.errors import BadInputError, NumericsError

ALPHA = 0.05
"""Chance of a wrong verdict that a claim may run over all its looks together."""
FEWEST_SEEDS = 5

Values = Mapping[str, float]
Curve = tuple[Sequence[float], Sequence[float]]
ClaimVerdict = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True)
class Outcome:
    """What one seed of an experiment measured.

    Attributes:
        values: one number for every arm and measure. A name may have a panel before a slash,
            ``"n=5000, 40 % flips/rdpo"``: what shares a panel is drawn together.
        curves: (xs, ys) of equal length by name, for the page only; the same xs on every seed are averaged.
            Panels as in ``values``.
    """

    values: Values
    curves: Mapping[str, Curve] = field(default_factory=dict)


Experiment = Callable[[int], "Outcome | Mapping[str, float]"]


@dataclass(frozen=True)
class Effect:
    """A number that is computed from one seed's values, and what is asked of it over all seeds.

    Attributes:
        name: what it is, in words ("reward of rDPO minus DPO at 40 % flips").
        of: values of one seed -> the number. Larger is what the claim promises.
        above: the threshold; the effect is *shown* when its whole interval lies above.
        within: (low, high) instead: the effect is shown to be next to none (equivalence, by TOST).
        test: "t" (Student's t over seeds), "bootstrap" (skewed effects, ten seeds or more) or "sign"
            (sign test on the median, seven seeds or more).
        unit: of the number, for the page ("nats", "points").
    """

    name: str
    of: Callable[[Values], float]
    above: float = 0.0
    within: tuple[float, float] | None = None
    test: TestName = "t"
    unit: str = ""

    def __post_init__(self) -> None:
        if self.within is not None and self.test != "t":
            raise BadInputError(f"Effect {self.name!r}: equivalence is tested by TOST; leave out test.")

    @property
    def asks(self) -> str:
        """What is asked of the number, in words."""
        return f"within {self.within[0]:g} to {self.within[1]:g}" if self.within else f"above {self.above:g}"

    def judge(self, seeds: Sequence[Values], alpha: float) -> EffectResult:
        """The effect over seeds, tested at ``alpha``.

        Raises:
            BadInputError: ``of`` asks for a value that the experiment does not return.
            NumericsError: the number of some seed is not finite.
        """
        numbers = tuple(self.number(values) for values in seeds)
        if self.within is not None:
            low, high = self.within
            tested = tost(numbers, low=low, high=high, alpha=alpha)
            shown = tested.low > low and tested.high < high
            refuted = tested.low >= high or tested.high <= low
        else:
            tests = {"t": student_t, "bootstrap": bootstrap, "sign": sign_test}
            tested = tests[self.test](numbers, above=self.above, alpha=alpha)
            shown, refuted = tested.low > self.above, tested.high <= self.above
        return EffectResult(
            self.name,
            self.asks,
            self.unit,
            tested.value,
            (tested.low, tested.high),
            tested.p,
            tested.level,
            tested.method,
            shown,
            refuted,
            numbers,
        )

    def number(self, values: Values) -> float:
        """The effect on one seed, from its values. Raises as :meth:`judge` does."""
        try:
            number = float(self.of(values))
        except KeyError as error:
            raise BadInputError(
                f"Effect {self.name!r} asks for {error}, which the experiment does not return.",
                advice=f"It returns: {', '.join(values)}.",
            ) from error
        if not math.isfinite(number):
            raise NumericsError(f"not_finite: effect {self.name!r} is {number} on a seed.")
        return number


@dataclass(frozen=True)
class EffectResult:
    """An effect as it came out.

    ``effect`` is the mean over seeds (the median for the sign test) with ``interval`` of coverage ``level``;
    ``shown``: the whole interval lies where the claim says; ``refuted``: the whole interval lies where it
    says not. ``per_seed`` holds the number of every seed.
    """

    name: str
    asks: str
    unit: str
    effect: float
    interval: tuple[float, float]
    p: float
    level: float
    test: str
    shown: bool
    refuted: bool
    per_seed: tuple[float, ...]

    def __str__(self) -> str:
        low, high = self.interval
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.effect:.3g}{unit} [{low:.3g}, {high:.3g}]"


@dataclass(frozen=True)
class Claim:
    """A registered claim; see :func:`claim` for what each part is."""

    id: str
    title: str
    paper: str
    hypothesis: str
    figure: str
    setting: str
    baselines: tuple[str, ...]
    experiment: Experiment
    effect: Effect
    also: tuple[Effect, ...]
    controls: tuple[Effect, ...]
    seeds: tuple[int, ...]
    budget: float
    fast: bool
    threads: int
    aliases: tuple[str, ...]
    doc: str
    module: str


CLAIMS: dict[str, Claim] = {}


def claim(
    id: str,
    *,
    title: str,
    paper: str,
    hypothesis: str,
    effect: Effect,
    figure: str = "",
    setting: str = "",
    baselines: Sequence[str] = (),
    also: Sequence[Effect] = (),
    controls: Sequence[Effect] = (),
    seeds: Sequence[int] = range(10),
    budget: float = 60.0,
    fast: bool = False,
    threads: int = 1,
    aliases: Sequence[str] = (),
) -> Callable[[Experiment], Experiment]:
    """Register the decorated experiment, a function of a seed to its :class:`Outcome` (or plain values).

    Args:
        id: how it is called on the command line: the system's number, ``"S173"``.
        title: of the page; a few words.
        paper: where it is claimed: authors, year, title, identifier.
        hypothesis: one sentence that can be false, with its number.
        effect: the primary effect, whose interval decides.
        figure: what the paper itself reports, with its scale; say so when that is from memory.
        setting: what is known to be true here, so that the result can be told from the truth.
        baselines: what the method is compared with.
        also: further effects that all must be shown before the claim is supported. They need no correction
            for their number: more of them only make support harder (an intersection-union test).
        controls: negative controls, the effect with its cause taken out: none may be shown.
        seeds: fixed in advance, at least five. Try things out on seeds from 1000 on
            (``corrigible claims run ID --pilot 1``): a seed that was looked at while the experiment was made
            proves nothing.
        budget: seconds for all seeds on two cores; more is reported, nothing is cut short.
        fast: part of ``corrigible claims run --fast`` and of ``make test``: some 20 s in all.
        threads: torch threads of the experiment, fixed so that its numbers are the same everywhere.
        aliases: other names on the command line.

    The function's docstring becomes part of the claim's page.

    Raises:
        BadInputError: a name is taken, fewer than five different seeds, too few for a sign test ever to show
            anything, two effects of one name, or an equivalence among the controls.
    """
    for name in (id, *aliases):
        if name in CLAIMS or any(name in other.aliases for other in CLAIMS.values()):
            raise BadInputError(f"There is a claim {name!r} already.", advice="Choose another name.")
    if len(set(seeds)) != len(seeds) or len(seeds) < FEWEST_SEEDS:
        raise BadInputError(f"Claim {id!r} needs at least {FEWEST_SEEDS} different seeds.")
    effects = (effect, *also, *controls)
    for each in effects:
        # The first look is at alpha / 2, and the sign test's least p value is 2 / 2**n.
        if each.test == "sign" and 2.0 ** (1 - len(seeds)) >= ALPHA / 2:
            raise BadInputError(
                f"Claim {id!r}: with {len(seeds)} seeds a sign test can never show {each.name!r}.",
                advice="Declare seven seeds or more, or another test.",
            )
    if len({each.name for each in effects}) != len(effects):
        raise BadInputError(f"Two effects of claim {id!r} have one name.")
    if any(each.within for each in controls):
        raise BadInputError(
            f"Claim {id!r}: a control must not be shown, so it cannot ask for equivalence.",
            advice="An effect that must be shown to be next to none belongs to also.",
        )

    def register(experiment: Experiment) -> Experiment:
        CLAIMS[id] = Claim(
            id=id,
            title=title,
            paper=paper,
            hypothesis=hypothesis,
            figure=figure,
            setting=setting,
            baselines=tuple(baselines),
            experiment=experiment,
            effect=effect,
            also=tuple(also),
            controls=tuple(controls),
            seeds=tuple(seeds),
            budget=float(budget),
            fast=fast,
            threads=threads,
            aliases=tuple(aliases),
            doc=experiment.__doc__ or "",
            module=experiment.__module__,
        )
        return experiment

    return register


def load_claims() -> dict[str, Claim]:
    """Import every module of this package and return the registered claims by id, in the order of ids."""
    package = importlib.import_module("corrigible.claims")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"corrigible.claims.{module.name}")
    return {id: CLAIMS[id] for id in sorted(CLAIMS)}


def find_claim(name: str) -> Claim:
    """The claim of this id or alias, whatever its capitals.

    Raises:
        BadInputError: nobody knows it.
    """
    claims = load_claims()
    for each in claims.values():
        if name.lower() in (each.id.lower(), *(alias.lower() for alias in each.aliases)):
            return each
    raise BadInputError(f"No claim {name!r}.", advice=f"Known: {', '.join(claims)}.")


def alpha_of_look(look: int) -> float:
    """Level of the k-th look at a claim, ``alpha / 2**k`` for k = 1, 2, ...

    The levels of all looks that could ever be taken sum to alpha, so whoever goes on adding seeds until the
    result pleases them is wrong no more often than somebody who looks once (Bonferroni, spent in advance).
    """
    if look < 1:
        raise BadInputError(f"looks are counted from 1, not {look}")
    return float(ALPHA / 2.0**look)


def decide(
    effect: EffectResult, also: Sequence[EffectResult], controls: Sequence[EffectResult]
) -> tuple[ClaimVerdict, str]:
    """The verdict and its reason in one sentence.

    *supported*: the primary effect and all of ``also`` are shown and no control is. *not supported*: the
    whole interval of the primary effect lies where the claim says it does not. *inconclusive*: anything else.
    """
    if effect.refuted:
        return "not supported", f"The interval is not {effect.asks}."
    if not effect.shown:
        return "inconclusive", f"The interval holds values that are {effect.asks} and others that are not."
    if missing := [each for each in also if not each.shown]:
        how = "is refuted" if missing[0].refuted else "is not shown"
        return "inconclusive", f"The main effect is shown, but {missing[0].name!r} {how}."
    if found := [each for each in controls if each.shown]:
        return "inconclusive", f"The negative control {found[0].name!r} shows an effect too."
    return "supported", f"The interval is {effect.asks}, and no control shows the effect."


def outcome_of(claim: Claim, seed: int, returned: Any) -> Outcome:
    """What an experiment returned, checked: names and finite numbers.

    Raises:
        BadInputError: neither an :class:`Outcome` nor a mapping, or nothing in it.
        NumericsError: a number is NaN or infinite: a failed run is not a small effect.
    """
    outcome = returned if isinstance(returned, Outcome) else None
    if outcome is None and isinstance(returned, Mapping):
        outcome = Outcome(returned)
    if outcome is None or not outcome.values:
        raise BadInputError(f"Claim {claim.id!r} must return an Outcome or its values by name.")
    values = {str(name): float(value) for name, value in outcome.values.items()}
    curves = {
        str(name): ([float(x) for x in xs], [float(y) for y in ys])
        for name, (xs, ys) in outcome.curves.items()
    }
    for name, value in values.items():
        if not math.isfinite(value):
            raise NumericsError(f"not_finite: {name!r} of claim {claim.id!r} is {value} for seed {seed}.")
    for name, (xs, ys) in curves.items():
        if len(xs) != len(ys) or not all(map(math.isfinite, (*xs, *ys))):
            raise NumericsError(f"not_finite: curve {name!r} of claim {claim.id!r}, seed {seed}, is broken.")
    return Outcome(values, curves)
