"""Known preferences: what "better" means, written down, for experiments that must be checkable.

A gold preference is never shown to a learner. Simulated annotators judge by it (with noise and
bias), and an evaluation reads it beside the learned reward, which is how over-optimisation shows:
the reward goes up while the gold does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from corrigible.errors import BadInputError

if TYPE_CHECKING:
    from corrigible.records import Episode, Message
    from corrigible.rewards.signals import Scores


@runtime_checkable
class GoldPreference(Protocol):
    """Scores one answer to one prompt; higher is better, and only differences matter."""

    @property
    def name(self) -> str: ...

    def score(self, prompt: Sequence[Message], text: str) -> float:
        """A finite score of ``text`` as the next assistant message after ``prompt``."""
        ...

    def declaration(self) -> dict[str, object]:
        """Everything the score depends on, as JSON: it is stored with what was judged by it."""
        ...


_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_FINISHED = re.compile(r"""[.!?…][)\]"'”’*]*\Z""")
_LIST_NUMBER = re.compile(r"(?:^|\s)\(?\d{1,2}[.)]\Z")
_MARKUP = re.compile(r"^\s*(?:#{1,6}\s|[-*•]\s|\d{1,2}[.)]\s|```)|\*\*", re.MULTILINE)
_READER = re.compile(r"\b(?:you|your|yours|yourself)\b", re.IGNORECASE)
_FILLER = re.compile(
    r"""\W*(?:
        sure\b | certainly\b | of\ course\b | absolutely\b | definitely\b | great\b | good\ question
      | that['’]s\ an?\ \w+\ question
      | what\ an?\b | thank(?:s|\ you)\b | hello\b | hi\b | hey\b | okay\b | ok\b | well, | so,
      | i\b | i['’](?:m|d|ve|ll)\b | as\ an?\ (?:ai|language\ model|assistant)\b | my\b
      | here(?:['’]s|\ is|\ are)\b | to\ answer\ (?:this|your|the)\b | the\ answer\ (?:is|to)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_COMMON = frozenset(
    _WORD.findall("""a about after all also am an and any are as at be because been before but by can could
    did do does
    explain for from get give had has have help how i if in into is it its just know like make me more most
    my need no not of on one or our out over please say she he should so some suggest tell than that the
    their them then there these they thing this those to too up us use very want was way we were what when
    where which while who why will with without write would you your""")
)


@dataclass(frozen=True)
class HouseStyle:
    """The demo's house style: answer the person, plainly, briefly, and finish.

    Every part lies in [0, 1] and can be seen by reading the answer::

        direct    0 if the answer opens with filler, a greeting or itself ("Sure", "I'm happy to",
                  "Here is", "As an AI"), else 1
        complete  1 if the last thing said is a finished sentence, else 0
        brief     1 up to brief_words words, falling linearly to 0 at long_words
        friendly  min(1, address_every x (you, your, yours, yourself) / words)
        plain     0 if there is a list, a heading, bold or a code fence, else 1
        on_topic  min(1, t / min(2, content words of the last user message)), t = how many of those
                  come up in the answer, compared by their first five letters

        score = substance x (w_direct direct + w_complete complete + w_brief brief
                             + w_friendly friendly + w_plain plain + w_on_topic on_topic)

    where ``substance = min(1, d / 8)`` and ``d`` is the number of different words, so that neither
    silence nor one word repeated is ever good. The weights sum to 1, so the score is in [0, 1].
    Length alone is worth the weight of ``brief``, kept below a third.

    Raises:
        BadInputError: weights that are negative, do not sum to 1, or give length a third or more;
            a word range that does not rise.

    >>> HouseStyle().score([], "You can freeze it. Wrap your bread well and it keeps a month.")
    1.0
    >>> HouseStyle().parts([], "Sure! Here is a list:\\n1. Buy")["direct"]
    0.0
    """

    direct: float = 0.10
    complete: float = 0.20
    brief: float = 0.25
    friendly: float = 0.25
    plain: float = 0.10
    on_topic: float = 0.10
    brief_words: int = 20
    long_words: int = 60
    address_every: int = 25
    name: str = field(default="house-style", compare=False)

    def __post_init__(self) -> None:
        weights = self.weights()
        if min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-9:
            raise BadInputError(
                f"the weights of a house style must be non-negative and sum to 1, not {weights}"
            )
        if self.brief >= 1 / 3:
            raise BadInputError(
                f"brief = {self.brief}: length must stay below a third of the score",
                advice="a style that is mostly length teaches only length",
            )
        if not 0 < self.brief_words < self.long_words or self.address_every < 1:
            raise BadInputError("a house style needs 0 < brief_words < long_words and address_every >= 1")

    def weights(self) -> dict[str, float]:
        """Part name to weight; they sum to 1."""
        return {
            "direct": self.direct,
            "complete": self.complete,
            "brief": self.brief,
            "friendly": self.friendly,
            "plain": self.plain,
            "on_topic": self.on_topic,
        }

    def parts(self, prompt: Sequence[Message], text: str) -> dict[str, float]:
        """Each part in [0, 1], and ``substance``; the docstring of the class has the formulas."""
        words = _WORD.findall(text)
        ending = text.rstrip()
        finished = bool(_FINISHED.search(ending)) and not _LIST_NUMBER.search(ending)
        span = self.long_words - self.brief_words
        return {
            "direct": 0.0 if _FILLER.match(text) else 1.0,
            "complete": float(finished),
            "brief": min(1.0, max(0.0, (self.long_words - len(words)) / span)),
            "friendly": min(1.0, self.address_every * len(_READER.findall(text)) / max(1, len(words))),
            "plain": 0.0 if _MARKUP.search(text) else 1.0,
            "on_topic": _on_topic(prompt, words),
            "substance": min(1.0, len({word.lower() for word in words}) / 8),
        }

    def score(self, prompt: Sequence[Message], text: str) -> float:
        parts = self.parts(prompt, text)
        # Rounded so that sums of weights in a different order never break a tie.
        total = sum(weight * parts[part] for part, weight in self.weights().items())
        return round(parts["substance"] * total, 12)

    def declaration(self) -> dict[str, object]:
        return {"gold": type(self).__name__, "version": 1, **asdict(self)}

    @classmethod
    def explain(cls) -> dict[str, str]:
        """One line for a report about each part."""
        return {
            "direct": "no filler opening, no greeting, no talk about itself",
            "complete": "ends in a finished sentence",
            "brief": "few words",
            "friendly": "speaks to the reader as you",
            "plain": "no lists, headings or bold",
            "on_topic": "takes up the words of the question",
        }


@dataclass(frozen=True)
class GoldSignal:
    """A gold preference as a signal: it scores the last thing said in an episode."""

    gold: GoldPreference
    axis: str = "overall"

    @property
    def name(self) -> str:
        return self.gold.name

    def score(self, episodes: Sequence[Episode]) -> Scores:
        import numpy as np

        from corrigible.rewards.signals import Scores

        values = [self.gold.score(e.prompt_messages(), e.response_text()) for e in episodes]
        return Scores(np.array(values, dtype=np.float64), axis=self.axis)


def _on_topic(prompt: Sequence[Message], words: Sequence[str]) -> float:
    asked = next((message.text for message in reversed(prompt) if message.role == "user"), "")
    stems = {
        w[:5] for w in (word.lower() for word in _WORD.findall(asked)) if len(w) > 2 and w not in _COMMON
    }
    if not stems:
        return 1.0  # nothing to take up
    taken = stems & {word.lower()[:5] for word in words}
    return min(1.0, len(taken) / min(2, len(stems)))


PARTS: tuple[str, ...] = tuple(f.name for f in fields(HouseStyle) if f.name in HouseStyle.explain())
"""Names of the parts of :class:`HouseStyle`, in the order of its formula."""
