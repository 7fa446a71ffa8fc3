"""One pairwise question, and the record that an answer to it becomes.

A :class:`Question` knows its two answers in the order of their content hash, which is how records
hold them. What was on the left or on top is a *presentation*: callers speak of what was shown
("the first one"), and the record gets the permutation. Nothing else in ``collect`` builds
comparison records, so no channel can get this wrong on its own.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from corrigible.errors import BadInputError
from corrigible.records import (
    Annotator,
    Comparison,
    Effort,
    Episode,
    Feedback,
    Item,
    Message,
    NotJudged,
    NotJudgedReason,
    PolicyRef,
    Presentation,
    TargetRef,
    now_us,
)
from corrigible.records.envelope import Channel

Outcome = Literal["first", "second", "tie", "both_bad", "both_good", "incomparable"]
Order = tuple[int, int]

_SWAPPED: dict[Outcome, Outcome] = {"first": "second", "second": "first"}


def draw(*parts: object) -> random.Random:
    """A random generator that depends on ``parts`` and on nothing else (no call order, no process)."""
    text = "\x1f".join(str(part) for part in parts)
    return random.Random(hashlib.sha256(text.encode()).digest())


@dataclass(frozen=True)
class Answer:
    """One side of a question: what was said, and where it came from."""

    item: Item
    episode: str | None = None
    policy: PolicyRef | None = None

    @property
    def text(self) -> str:
        """The answer as a person or a judge reads it."""
        try:
            messages = self.item.messages()
        except BadInputError:
            return self.item.text or ""
        return "\n\n".join(message.text for message in messages)

    @classmethod
    def of_episode(cls, episode: Episode) -> Answer:
        """The last thing the policy said in ``episode``."""
        policy = None
        if episode.policy is not None:
            logprobs = episode.steps[-1].logprobs
            sampler = None if episode.sampling is None else f"temperature={episode.sampling.temperature:g}"
            policy = PolicyRef(
                snapshot=episode.policy,
                sampler=sampler,
                logprob=None if logprobs is None else float(sum(logprobs)),
            )
        return cls(episode.response_item(), episode.id, policy)


@dataclass(frozen=True)
class Question:
    """Which of two answers to one prompt is better on ``criterion``?

    Make one with :meth:`between`, which puts the answers in the order of their content hash.
    """

    prompt: tuple[Message, ...]
    answers: tuple[Answer, Answer]
    criterion: str = "overall"
    task_id: str | None = None
    campaign_id: str | None = None

    @classmethod
    def between(
        cls,
        prompt: Sequence[Message],
        a: Answer,
        b: Answer,
        *,
        criterion: str = "overall",
        task_id: str | None = None,
        campaign_id: str | None = None,
    ) -> Question:
        """The question, whatever the order of ``a`` and ``b``.

        Raises:
            BadInputError: the two answers are the same text.
        """
        if a.item.sha256 == b.item.sha256:
            raise BadInputError(
                "both sides of a comparison are the same text",
                advice="leave such pairs out; they say nothing about what is better",
            )
        first, second = sorted((a, b), key=lambda answer: answer.item.sha256)
        return cls(tuple(prompt), (first, second), criterion, task_id, campaign_id)

    @property
    def context(self) -> Item:
        """The prompt as a stored item."""
        return Item.of_messages(self.prompt, type="prompt")

    @property
    def key(self) -> str:
        """Identity of the question: same prompt, same two texts, same criterion (sha256)."""
        shas = [self.context.sha256, *(answer.item.sha256 for answer in self.answers)]
        return hashlib.sha256("\n".join([*shas, self.criterion]).encode()).hexdigest()

    @property
    def guideline(self) -> str:
        """What the annotator is asked, word for word; stored with every answer."""
        return _guideline(self.criterion)

    def order(self, *seed: object) -> Order:
        """A presentation order drawn from ``seed`` and the question alone, each with probability 1/2."""
        return (0, 1) if draw("order", self.key, *seed).random() < 0.5 else (1, 0)

    def shown(self, order: Order) -> tuple[Answer, Answer]:
        """The answers as presented: first shown, second shown."""
        return self.answers[order[0]], self.answers[order[1]]

    def items(self) -> list[Item]:
        """What the records of this question refer to."""
        return [self.context, *(answer.item for answer in self.answers)]

    def judged(
        self,
        outcome: Outcome,
        order: Order,
        *,
        annotator: Annotator,
        channel: Channel,
        strength: int = 1,
        shown_at: int | None = None,
        effort: Effort | None = None,
        confidence: float | None = None,
        rationale: str | None = None,
        layout: str | None = None,
    ) -> Feedback:
        """The record of a judgement; ``outcome`` names what was *shown* first or second.

        ``strength`` (1 to 3) is kept for ``first`` and ``second`` and is 0 for the rest.
        """
        by_hash = _SWAPPED.get(outcome, outcome) if order == (1, 0) else outcome
        decided = outcome in _SWAPPED
        payload = Comparison(outcome=by_hash, strength=strength if decided else 0, criterion=self.criterion)
        return self._record(
            payload,
            order,
            annotator,
            channel,
            shown_at,
            effort,
            layout,
            confidence=confidence,
            rationale=rationale,
        )

    def not_judged(
        self,
        reason: NotJudgedReason,
        order: Order,
        *,
        annotator: Annotator,
        channel: Channel,
        detail: str = "",
        shown_at: int | None = None,
        effort: Effort | None = None,
        layout: str | None = None,
    ) -> Feedback:
        """The record of a question that was asked and not answered."""
        reasoned = NotJudged(intended="comparison", reason=reason, detail=detail)
        return self._record(reasoned, order, annotator, channel, shown_at, effort, layout)

    def _record(
        self,
        judgement: Comparison | NotJudged,
        order: Order,
        annotator: Annotator,
        channel: Channel,
        shown_at: int | None,
        effort: Effort | None,
        layout: str | None,
        *,
        confidence: float | None = None,
        rationale: str | None = None,
    ) -> Feedback:
        created_at = now_us()
        policy = tuple(answer.policy for answer in self.answers)
        presentation = Presentation(
            order=order,
            layout=layout,
            blind=True,
            shown_at=min(shown_at or created_at, created_at),  # a clock set back must not lose a judgement
            guideline=self.guideline,
        )
        return Feedback.on(
            [TargetRef.of(answer.item, role="response", episode=answer.episode) for answer in self.answers],
            judgement,
            annotator=annotator,
            task_id=self.task_id,
            campaign_id=self.campaign_id,
            context=self.context.sha256,
            channel=channel,
            presentation=presentation,
            effort=effort,
            confidence=confidence,
            rationale=rationale,
            policy=policy if any(policy) else None,
            created_at=created_at,
        )


def _guideline(criterion: str) -> str:
    return f"Which answer is better? ({criterion})"


def asked_key(record: Feedback) -> tuple[str | None, tuple[str, ...], str | None]:
    """What a stored comparison (or skipped comparison) asked, comparable to :func:`question_key`."""
    guideline = None if record.presentation is None else record.presentation.guideline
    if isinstance(record.payload, Comparison):
        guideline = _guideline(record.payload.criterion)
    return record.context, tuple(sorted(target.sha256 for target in record.targets)), guideline


def question_key(question: Question) -> tuple[str | None, tuple[str, ...], str | None]:
    """The same for a question that is still to be asked."""
    return (
        question.context.sha256,
        tuple(answer.item.sha256 for answer in question.answers),
        question.guideline,
    )


def questions_from_episodes(
    episodes: Iterable[Episode],
    *,
    pairs_per_prompt: int = 1,
    criterion: str = "overall",
    campaign_id: str | None = None,
    seed: int = 0,
) -> list[Question]:
    """Pairs of different answers to the same prompt, spread evenly over the answers.

    With k different answers and ``pairs_per_prompt`` <= k/2 no answer is used twice. Identical
    answers count as one; a prompt with fewer than two different answers gives no question. The
    pairs depend on the texts and ``seed`` only, not on the order of the episodes.

    Raises:
        BadInputError: ``pairs_per_prompt`` below 1.
    """
    if pairs_per_prompt < 1:
        raise BadInputError(f"pairs_per_prompt is {pairs_per_prompt}", advice="ask for 1 or more")
    prompts: dict[str, tuple[Message, ...]] = {}
    answers: dict[str, dict[str, Answer]] = {}
    for episode in episodes:
        messages = episode.prompt_messages()
        context = Item.of_messages(messages, "prompt").sha256
        prompts.setdefault(context, messages)
        answer = Answer.of_episode(episode)
        if answer.text.strip():  # nothing was said: nothing to compare
            answers.setdefault(context, {}).setdefault(answer.item.sha256, answer)
    questions = []
    for context, by_sha in answers.items():
        for a, b in _even_pairs(sorted(by_sha), pairs_per_prompt, draw("pairs", seed, context)):
            questions.append(
                Question.between(
                    prompts[context], by_sha[a], by_sha[b], criterion=criterion, campaign_id=campaign_id
                )
            )
    return questions


def _even_pairs(names: Sequence[str], wanted: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    left = list(combinations(names, 2))
    rng.shuffle(left)
    used = dict.fromkeys(names, 0)
    for _ in range(min(wanted, len(left))):
        best = min(left, key=lambda pair: (max(used[pair[0]], used[pair[1]]), used[pair[0]] + used[pair[1]]))
        left.remove(best)
        for name in best:
            used[name] += 1
        yield best


def questions_from_comparisons(
    records: Iterable[Feedback],
    items: Mapping[str, Item],
    *,
    criterion: str = "overall",
    campaign_id: str | None = None,
) -> list[Question]:
    """Ask again what others were asked: the pairs of stored comparisons, each once.

    ``items`` maps the sha256 of contexts and targets to their items; a comparison whose prompt or
    answers are not among them (an image, say) is left out.
    """
    questions: dict[str, Question] = {}
    for record in records:
        context = items.get(record.context or "")
        if context is None or not isinstance(record.payload, Comparison):
            continue
        sides = [
            Answer(items[target.sha256], target.episode, policy)
            for target, policy in zip(record.targets, record.policy or (None, None), strict=False)
            if target.sha256 in items and items[target.sha256].text is not None
        ]
        if len(sides) != 2 or sides[0].item.sha256 == sides[1].item.sha256:
            continue
        try:
            prompt = context.messages()
        except BadInputError:
            prompt = (Message(role="user", content=context.text or ""),)
        question = Question.between(
            prompt, sides[0], sides[1], criterion=criterion, task_id=record.task_id, campaign_id=campaign_id
        )
        questions.setdefault(question.key, question)
    return list(questions.values())
