"""Simulated annotators: a known preference seen through declared reliability and biases.

They stand in for people where an experiment has to be checkable: what they would choose is a
probability that is written down, so a method that claims to undo noise or bias can be held to it.

The model of one judgement, with g the gold score, w the number of words, and the answers as shown::

    utility  = sharpness * (g(first) - g(second)) + length_bias * ln((w(first) + 1) / (w(second) + 1))
    P(first) = reliability * sigmoid(utility + position_bias)
             + (1 - reliability) * sigmoid(position_bias)

given that the annotator does not abstain (probability ``abstain``). A lapse (the second line) does
not look at the answers but still leans to one side. This is the noisy Bradley-Terry model of Chen,
Bennett, Collins-Thompson and Horvitz (2013), "Pairwise ranking aggregation in a crowdsourced
setting", eq. 4, with a position intercept and a length term.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log

from corrigible.collect.gold import GoldPreference
from corrigible.collect.questions import Order, Question, draw, questions_from_episodes
from corrigible.errors import BadInputError
from corrigible.events import track
from corrigible.records import Annotator, Effort, Episode, Feedback, Item, NotJudgedReason

_READING_MS_PER_WORD = 250  # 240 words a minute, a usual silent reading rate
_DECIDING_MS = 1500


@dataclass(frozen=True)
class SimulatedAnnotator:
    """One annotator; the module docstring has the formula.

    Args:
        name: pseudonym in the records.
        gold: what the annotator means to judge by.
        reliability: probability in [0, 1] that a judgement looks at the answers at all.
        sharpness: logits per unit of gold score; about 10 makes 0.2 of gold a clear case (0.88).
        position_bias: logits towards the answer shown first (negative: second).
        length_bias: logits per factor e in the number of words, towards the longer answer.
        abstain: probability in [0, 1) of "cannot judge".
        seed: of this annotator's chance. A judgement depends on the seed, the name, the question,
            its order and ``occasion``, never on what was judged before.

    Raises:
        BadInputError: a probability outside its range.
    """

    name: str
    gold: GoldPreference
    reliability: float = 0.95
    sharpness: float = 12.0
    position_bias: float = 0.0
    length_bias: float = 0.0
    abstain: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise BadInputError("a simulated annotator needs a name")
        if not 0 <= self.reliability <= 1 or not 0 <= self.abstain < 1:
            raise BadInputError(
                f"{self.name}: reliability {self.reliability} must be in [0, 1] and "
                f"abstain {self.abstain} in [0, 1)"
            )

    def declaration(self) -> Item:
        """Everything this annotator does, as a stored item; its sha256 is ``annotator.version``."""
        return Item.of_json(
            {
                "simulated_annotator": 1,
                "name": self.name,
                "gold": self.gold.declaration(),
                "reliability": self.reliability,
                "sharpness": self.sharpness,
                "position_bias": self.position_bias,
                "length_bias": self.length_bias,
                "abstain": self.abstain,
                "seed": self.seed,
            },
            type="rule",
        )

    def annotator(self) -> Annotator:
        """Who judged, for the records."""
        return Annotator(
            pseudonym=self.name,
            type="simulated",
            version=self.declaration().sha256,
            groups=frozenset({"simulated"}),
        )

    def probability_first(self, question: Question, order: Order) -> float:
        """The declared P(the answer shown first is chosen), in (0, 1), given no abstention."""
        first, second = question.shown(order)
        gap = self.gold.score(question.prompt, first.text) - self.gold.score(question.prompt, second.text)
        lengths = log(_words(first.text) + 1) - log(_words(second.text) + 1)
        deliberate = _sigmoid(self.sharpness * gap + self.length_bias * lengths + self.position_bias)
        return self.reliability * deliberate + (1 - self.reliability) * _sigmoid(self.position_bias)

    def judge(self, question: Question, *, order: Order | None = None, occasion: int = 0) -> Feedback:
        """One judgement. Ask again with another ``occasion`` for an independent one.

        Without ``order`` the presentation is drawn, fair, from the seed and the question.
        """
        if order is None:
            order = question.order(self.seed, self.name, occasion)
        chance = draw("judge", self.seed, self.name, question.key, order, occasion)
        words = sum(_words(answer.text) for answer in question.answers)
        effort = Effort(active_ms=_DECIDING_MS + _READING_MS_PER_WORD * words, keys=1)
        who = self.annotator()
        if chance.random() < self.abstain:
            return question.not_judged(
                NotJudgedReason.cannot_judge, order, annotator=who, channel="sim", effort=effort
            )
        first = chance.random() < self.probability_first(question, order)
        return question.judged(
            "first" if first else "second", order, annotator=who, channel="sim", effort=effort
        )


@dataclass(frozen=True)
class PanelResult:
    """What a panel gave: records, the items they refer to, and what they amount to."""

    records: tuple[Feedback, ...]
    items: tuple[Item, ...]
    questions: int

    @property
    def judged(self) -> int:
        return sum(record.payload is not None for record in self.records)

    @property
    def not_judged(self) -> dict[str, int]:
        """Reason to count."""
        return dict(Counter(record.not_judged.reason.value for record in self.records if record.not_judged))


@dataclass(frozen=True)
class Panel:
    """Several annotators who share the work.

    Each question goes to ``votes`` different annotators, drawn per question. The presentation order
    is balanced within a question: the first vote's order is a fair draw and every further vote sees
    the other one, so first and second differ by at most one showing.

    Raises:
        BadInputError: no annotators, a name used twice, or (when judging) more votes than annotators.
    """

    annotators: tuple[SimulatedAnnotator, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        names = [annotator.name for annotator in self.annotators]
        if not names or len(set(names)) < len(names):
            raise BadInputError(
                f"a panel needs annotators with different names, not {names}",
                advice="a pseudonym stands for one person in the records",
            )

    @classmethod
    def demo(cls, gold: GoldPreference, *, seed: int = 0) -> Panel:
        """Five annotators: mostly careful, one hasty, with mild leanings of position and length."""
        return cls(
            (
                SimulatedAnnotator("ada", gold, reliability=0.97, position_bias=0.1, seed=seed),
                SimulatedAnnotator("ben", gold, reliability=0.95, position_bias=0.4, seed=seed),
                SimulatedAnnotator("chi", gold, reliability=0.92, length_bias=0.3, seed=seed),
                SimulatedAnnotator(
                    "dan", gold, reliability=0.90, position_bias=-0.2, abstain=0.03, seed=seed
                ),
                SimulatedAnnotator("eve", gold, reliability=0.75, position_bias=0.6, abstain=0.02, seed=seed),
            ),
            seed=seed,
        )

    def judge(self, questions: Iterable[Question], *, votes: int = 3) -> PanelResult:
        """``votes`` judgements of every question."""
        if not 1 <= votes <= len(self.annotators):
            raise BadInputError(
                f"{votes} votes from a panel of {len(self.annotators)}",
                advice="nobody is asked the same question twice: use fewer votes or more annotators",
            )
        asked = list(questions)
        records: list[Feedback] = []
        items = {item.sha256: item for item in (a.declaration() for a in self.annotators)}
        for question in track(asked, "judging", unit="question"):
            rng = draw("panel", self.seed, question.key)
            first: Order = (0, 1) if rng.random() < 0.5 else (1, 0)
            for vote, annotator in enumerate(rng.sample(self.annotators, votes)):
                order: Order = first if vote % 2 == 0 else (first[1], first[0])
                records.append(annotator.judge(question, order=order))
            items.update((item.sha256, item) for item in question.items())
        return PanelResult(tuple(records), tuple(items.values()), len(asked))

    def judge_episodes(
        self,
        episodes: Sequence[Episode],
        *,
        pairs_per_prompt: int = 1,
        votes: int = 3,
        criterion: str = "overall",
        campaign_id: str | None = None,
    ) -> PanelResult:
        """Pair the answers to each prompt (see ``questions_from_episodes``) and judge the pairs."""
        questions = questions_from_episodes(
            episodes,
            pairs_per_prompt=pairs_per_prompt,
            criterion=criterion,
            campaign_id=campaign_id,
            seed=self.seed,
        )
        return self.judge(questions, votes=votes)


def _words(text: str) -> int:
    return len(text.split())


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))
