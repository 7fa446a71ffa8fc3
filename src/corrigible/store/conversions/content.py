"""What conversions work with: what records refer to, as texts, and why a record may give nothing.

A conversion is a pure function from records and their :class:`Content` to signals. A record that it cannot
use is no error: it becomes a :class:`LeftOut` with one of a few stable reasons, and the rest goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from corrigible.records import Critique, Demonstration, Edit, Episode, Feedback, Item, Message
from corrigible.records.views import Interpreter, PairRow, Slice
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair, pair_of, turn_of
from corrigible.store.signals import Demonstrated, Ranked, Turn

Made = TypeVar("Made")

REASONS: dict[str, str] = {
    "adjudicated": "An adjudication has settled it; its gold judgement is used instead.",
    "all_equal": "Judgements that are all equal order nothing; learn from demonstrations instead.",
    "at_the_median": "It is neither above nor below its annotator's median; learn from 'ranked' instead.",
    "contradictory": "Equal weights for and against cancel out; ask once more.",
    "empty_response": "An empty answer has no token to learn from; check the import.",
    "equal_sides": "Both sides are the same text; check that they were read from different fields.",
    "failed": "It failed, or was disliked: it is nothing to imitate; learn from 'labelled' instead.",
    "group_of_one": "It is the only judged answer to its prompt; learn from 'labelled' instead.",
    "incomparable": "The judge could not compare the two.",
    "missing_item": "The store does not hold the content; add it with add_items, or import again.",
    "missing_episode": "The store does not hold the episode; add it with add_episodes.",
    "needs_interpreter": "Behaviour means nothing by itself; pass interpreter= to say what it may mean.",
    "no_mistake": "The edit is about style, not about what is right; learn from 'pairs' instead.",
    "no_order": "It puts nothing above anything else.",
    "no_prompt": "It names no prompt, so nothing says which answers belong together.",
    "no_steps": "The text does not divide into the steps that were labelled.",
    "no_threshold": "The score has no range, so nothing says what is good; learn from 'ranked' instead.",
    "no_words": "Nobody said anything in words; learn from another signal.",
    "not_applicable": "The judge said that the question does not apply, or took the judgement back.",
    "not_characters": "It marks no characters of a text.",
    "not_text": "It is about no text; control and images have learners of their own.",
    "nothing_good": "Everything in it is marked as bad.",
    "nothing_replaced": "Nothing stands in its place: there is no other side.",
    "out_of_range": "A marked range ends after the text; check the offsets.",
    "prompts_differ": "The two sides do not answer the same prompt.",
    "tie": "A tie puts neither side above the other; learn from 'pairs', where it is a soft label.",
    "unchanged": "The edit changed nothing.",
    "undecided": "The judge or the verifier came to no verdict.",
    "unfinished": "Not everything was judged, and nothing wrong was found so far.",
}
"""Why a record may give no signal, and what to do instead."""


class NotConvertibleError(Exception):
    """Raised inside a conversion and turned into a :class:`LeftOut`; never leaves this package."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class LeftOut:
    """Records that gave no signal, or less than they say.

    Attributes:
        derived_from: ids of the records.
        reason: a key of :data:`REASONS`.
        detail: what exactly, when the reason does not say it all.
    """

    derived_from: tuple[str, ...]
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choices that a conversion leaves to its caller.

    Attributes:
        bad_spans: a span marked as bad is left out (weight 0), or pushed down with its severity / 3.
        unchanged: weight of what an edit left as it was, beside the 1 of what it changed.
        unmarked: weight of text of which a marking that is not exhaustive says nothing.
        interpreter: what behaviour (implicit events) may mean; without one it gives nothing.
    """

    bad_spans: Literal["leave_out", "push_down"] = "leave_out"
    unchanged: float = 0.1
    unmarked: float = 0.5
    interpreter: Interpreter | None = None


@dataclass(frozen=True, kw_only=True)
class Content:
    """What records refer to.

    Attributes:
        items: by SHA-256.
        episodes: by id.
        beside: other records that may speak of the same targets: critiques (superseded ones too), edits and
            demonstrations.
        options: what the caller chose.
    """

    items: Mapping[str, Item]
    episodes: Mapping[str, Episode] = field(default_factory=dict)
    beside: tuple[Feedback, ...] = ()
    options: Options = Options()

    def item(self, sha: str) -> Item:
        """The item with this hash."""
        if sha not in self.items:
            raise NotConvertibleError("missing_item", sha)
        return self.items[sha]

    def prompt(self, sha: str | None) -> Turn:
        """The messages of a prompt; none when the judgement was about responses alone."""
        return () if sha is None else self._turn(sha, "user")

    def response(self, sha: str) -> Turn:
        """The messages of a response, which says something."""
        turn = self._turn(sha, "assistant")
        if not any(message.text.strip() or message.tool_calls for message in turn):
            raise NotConvertibleError("empty_response", sha)
        return turn

    def _turn(self, sha: str, role: str) -> Turn:
        item = self.item(sha)
        turn = turn_of(item, role)
        if turn is None:
            raise NotConvertibleError("not_text", f"{item.media_type} {sha}")
        return turn

    def steps(self, where: Slice) -> list[tuple[int, Turn, Message]]:
        """Number, prompt and action of each step of a text episode's slice."""
        episode = self.episodes.get(where.episode)
        if episode is None:
            raise NotConvertibleError("missing_episode", where.episode)
        said: list[Message] = []
        found: list[tuple[int, Turn, Message]] = []
        for number, step in enumerate(episode.steps[: where.stop]):
            action = step.action
            seen = [m for m in step.observation if isinstance(m, Message)] if step.is_text else []
            if not isinstance(action, Message):
                raise NotConvertibleError("not_text", f"step {number} of episode {episode.id} is control")
            said += seen
            if number >= where.start:
                found.append((number, tuple(said), action))
            said.append(action)
        return found

    @cached_property
    def critiques(self) -> dict[str, Feedback]:
        """The critiques among :attr:`beside`, by id."""
        return {r.id: r for r in self.beside if isinstance(r.payload, Critique)}

    @cached_property
    def words_on(self) -> dict[str, list[Feedback]]:
        """The live critiques on each target, by its hash."""
        found: dict[str, list[Feedback]] = defaultdict(list)
        for record in self.critiques.values():
            if record.status == "live":
                for target in record.targets:
                    found[target.sha256].append(record)
        return found

    @cached_property
    def revisions(self) -> dict[str, list[Feedback]]:
        """The edits of each target, by its hash, and the demonstrations for each prompt, by the prompt's."""
        found: dict[str, list[Feedback]] = defaultdict(list)
        for record in self.beside:
            if isinstance(record.payload, Edit):
                found[record.targets[0].sha256].append(record)
            elif isinstance(record.payload, Demonstration) and record.context is not None:
                found[record.context].append(record)
        return found


def group_of(record: Feedback, target: str) -> str:
    """What data is split by: the task, else the prompt, else the thing itself."""
    return record.task_id or record.context or f"item:{target}"


def words_of(record: Feedback) -> str:
    """The reason that a judge gave in words."""
    words = (record.rationale or "").strip()
    if not words:
        raise NotConvertibleError("no_words")
    return words


def text_of(turn: Turn) -> str:
    """The text of a turn, messages joined by blank lines."""
    return "\n\n".join(message.text for message in turn)


def common(record: Feedback, *more: Feedback) -> dict[str, Any]:
    """``annotators`` and ``derived_from`` of a signal made of these records."""
    records = (record, *more)
    return {
        "annotators": tuple(dict.fromkeys(r.annotator.pseudonym for r in records)),
        "derived_from": tuple(dict.fromkeys(r.id for r in records)),
    }


def tried(record: Feedback, makers: Iterable[Callable[[], Made]]) -> Iterator[Made | LeftOut]:
    """What each maker makes; one that cannot does not cost the others."""
    for make in makers:
        try:
            yield make()
        except NotConvertibleError as why:
            yield LeftOut((record.id,), why.reason, why.detail)


def pair_from_row(row: PairRow, content: Content) -> Pair:
    """A row of a view with its texts."""
    prompt = content.prompt(row.context)
    chosen, rejected = content.response(row.chosen), content.response(row.rejected)
    if chosen == rejected:
        raise NotConvertibleError("equal_sides")
    return pair_of(row, prompt, chosen, rejected)


def pairs_from_rows(rows: Iterable[PairRow], content: Content) -> Iterator[Pair | LeftOut]:
    """Every row that has its texts as a pair."""
    for row in rows:
        try:
            yield pair_from_row(row, content)
        except NotConvertibleError as why:
            yield LeftOut(row.derived_from, why.reason, why.detail)


def left_over(
    records: Sequence[Feedback], found: Sequence[Any], reasons: Mapping[str, str]
) -> Iterator[LeftOut]:
    """What a joint conversion made nothing of, by the reason of each id, and ``group_of_one`` without one."""
    used = {name for one in found for name in one.derived_from}
    for record in records:
        if record.id not in used:
            yield LeftOut((record.id,), reasons.get(record.id, "group_of_one"))


def labelled(
    record: Feedback,
    content: Content,
    target: str,
    *,
    desirable: bool,
    weight: float = 1.0,
    criterion: str = "overall",
) -> Labelled:
    """One target of a record, found good or bad."""
    if weight <= 0:
        raise NotConvertibleError("undecided")
    return Labelled(
        prompt=content.prompt(record.context),
        response=content.response(target),
        desirable=desirable,
        weight=weight,
        group=group_of(record, target),
        criterion=criterion,
        episode=next((t.episode for t in record.targets if t.sha256 == target), None),
        **common(record),
    )


def demonstrated(
    record: Feedback,
    content: Content,
    target: str,
    *,
    weight: float = 1.0,
    criterion: str = "overall",
    quality: str = "",
    spans: tuple[tuple[int, int, float], ...] = (),
) -> Demonstrated:
    """One target of a record as something to imitate; its quality is the type of its judge unless given."""
    if weight <= 0:
        raise NotConvertibleError("failed")
    return Demonstrated(
        prompt=content.prompt(record.context),
        response=content.response(target),
        weight=weight,
        group=group_of(record, target),
        criterion=criterion,
        quality=quality or record.annotator.type,
        spans=spans,
        episode=next((t.episode for t in record.targets if t.sha256 == target), None),
        **common(record),
    )


Judged = tuple[Hashable, Feedback, float]
"""What belongs together (besides the prompt), a record on one target, and its score."""


def ranked_by_prompt(
    judged: Iterable[Judged], content: Content, *, criterion: str | None = None
) -> Iterator[Ranked | LeftOut]:
    """Scores of single answers as one :class:`Ranked` per prompt and key; a text scored twice has the mean.

    ``criterion`` None takes it from the records' payloads.
    """
    groups: dict[tuple[Hashable, str], list[tuple[Feedback, float]]] = defaultdict(list)
    for key, record, score in judged:
        if record.context is None:
            yield LeftOut((record.id,), "no_prompt")
        else:
            groups[key, record.context].append((record, score))
    for rated in groups.values():
        kept: dict[str, list[tuple[Feedback, float]]] = defaultdict(list)
        for record, score in rated:
            sha = record.targets[0].sha256
            try:
                content.prompt(record.context)
                content.response(sha)
                kept[sha].append((record, score))
            except NotConvertibleError as why:
                yield LeftOut((record.id,), why.reason, why.detail)
        records = [record for each in kept.values() for record, _ in each]
        if not records:
            continue
        scores = [sum(score for _, score in each) / len(each) for each in kept.values()]
        if len(kept) < 2 or len(set(scores)) == 1:
            reason = "group_of_one" if len(kept) < 2 else "all_equal"
            yield LeftOut(tuple(record.id for record in records), reason)
            continue
        first = records[0]
        yield Ranked(
            prompt=content.prompt(first.context),
            responses=tuple(content.response(sha) for sha in kept),
            scores=tuple(scores),
            weight=1.0,
            group=group_of(first, first.targets[0].sha256),
            criterion=criterion or str(getattr(first.payload, "criterion", "overall")),
            episodes=tuple(each[0][0].targets[0].episode for each in kept.values()),
            **common(*records),
        )
