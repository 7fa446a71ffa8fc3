"""From a store to signals: which records, with which texts, by which conversions, and what was left out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, TypeVar, cast

from corrigible.errors import BadInputError
from corrigible.events import Alert, emit
from corrigible.records import KINDS, Adjudication, Approval, Critique, Demonstration, Edit, Episode, Feedback
from corrigible.records import Intervention as Stepped
from corrigible.records.envelope import Scope
from corrigible.records.items import messages_text
from corrigible.records.views import Interpreter, Ties, usable
from corrigible.store.conversions.content import REASONS, Content, LeftOut, Options
from corrigible.store.conversions.matrix import CONVERSIONS, FROM_RECORDS, check_signal, kinds_for
from corrigible.store.labelled import Labelled
from corrigible.store.pairs import Pair, merged_votes
from corrigible.store.queries import FeedbackFilter
from corrigible.store.signals import Demonstrated
from corrigible.store.store import Store

PAGE = 2000
"""Records whose texts are fetched at a time, where records are read one by one."""

BESIDE = {"critiqued": ("critique", "edit", "demonstration"), "attempts": ("critique",)}
"""Kinds that may say more on the targets of others, by signal."""

EPISODES = frozenset({"demonstration", "intervention", "segment_preference", "step_labels", "adjudication"})
"""Kinds that speak of steps of an episode."""


@dataclass(frozen=True)
class Converted:
    """What a conversion of many records gave.

    Attributes:
        signals: of the one shape that was asked for.
        left_out: records that gave none, or less than they say, with the reason.
    """

    signals: list[Any]
    left_out: list[LeftOut]

    @property
    def reasons(self) -> Counter[str]:
        """How many records were left out, by reason."""
        return Counter(one.reason for one in self.left_out for _ in one.derived_from)


def convert(records: Iterable[Feedback], signal: str, content: Content) -> Converted:
    """The signals that records of any kinds give, kind by kind; pure.

    Records that an adjudication among them resolves are replaced by its gold judgement. Kinds that give no
    such signal are passed over (:data:`IMPOSSIBLE` says why).

    Raises:
        BadInputError: there is no such signal, or it is not made of records.
    """
    check_signal(signal)
    by_kind: dict[str, list[Feedback]] = defaultdict(list)
    for record in records:
        by_kind[record.kind].append(record)
    resolved = _resolved(by_kind["adjudication"])
    found = Converted([], [])
    for kind in KINDS:
        if by_kind[kind] and (kind, signal) in CONVERSIONS:
            _add(found, kind, signal, by_kind[kind], content, resolved)
    return found


def load_signals(
    store: Store,
    signal: str,
    *,
    aggregate: bool = False,
    ties: Ties = "half",
    criterion: str | None = None,
    scope: Scope = "train",
    bad_spans: Literal["leave_out", "push_down"] = "leave_out",
    interpreter: Interpreter | None = None,
    **filters: Any,
) -> list[Any]:
    """The signals of one shape that the store's live feedback gives, through every conversion there is.

    Kinds follow each other in the order of :data:`~corrigible.records.KINDS`, records of a kind in the order
    they were given. Bad records cost nothing but themselves: an alert ``signals_left_out`` counts them
    by reason, with the first of each.

    Args:
        store: where from.
        signal: a key of :data:`SIGNALS`: ``"pairs"``, ``"labelled"``, ``"ranked"``, ``"demonstrations"``,
            ``"critiqued"`` or ``"attempts"``.
        aggregate: merge judgements of the same thing: pairs as :func:`~corrigible.store.load_pairs` does;
            labels of one answer into their weighted balance; demonstrations of one answer into one that
            weighs their sum. Other signals stay one per judgement.
        ties: of pairs: a tie is a pair with ``p_chosen`` 0.5, or is left out.
        criterion: only what was judged on this criterion; kinds without one judge "overall".
        scope: leave out records whose consent does not include this use.
        bad_spans: see :class:`Options`.
        interpreter: see :class:`Options`.
        filters: as for :meth:`Store.feedback` (``kind``, ``annotator``, ``policy``, ``task``, ...).

    Raises:
        BadInputError: an unknown signal, filter or ``ties``; a signal that is not made of records; a kind
            that gives no such signal.
    """
    converted = convert_store(
        store, signal, scope=scope, options=Options(bad_spans=bad_spans, interpreter=interpreter), **filters
    )
    found = converted.signals
    if criterion is not None:
        found = [one for one in found if one.criterion == criterion]
    if ties not in ("half", "drop"):
        raise BadInputError(f"Unknown ties={ties!r}.", advice="One of 'half', 'drop'.")
    if signal == "pairs" and ties == "drop":
        found = [pair for pair in found if pair.p_chosen != 0.5]
    _say(converted, signal)
    if aggregate:
        found = _aggregated(found, signal)
    _warn(found, signal)
    return found


def convert_store(
    store: Store, signal: str, *, scope: Scope = "train", options: Options | None = None, **filters: Any
) -> Converted:
    """As :func:`convert` over the live records of a store, with their texts; arguments as for
    :func:`load_signals`."""
    wanted = kinds_for(signal)
    try:
        FeedbackFilter(**filters)
    except TypeError as error:
        raise BadInputError(f"No such filter: {error}.") from error
    only = filters.pop("kind", None)
    if only is not None and only not in wanted:
        raise BadInputError(
            f"Records of kind {only!r} give no {signal}.",
            advice=f"Kinds that do: {', '.join(sorted(wanted))}. `corrigible show` lists what is there.",
        )
    options = options or Options()
    resolved = _resolved(usable(store.feedback(kind="adjudication"), scope, superseded=()))
    beside = _beside(store, signal, scope)
    found = Converted([], [])
    for kind in KINDS:
        if kind not in wanted or only not in (None, kind):
            continue
        records = usable(store.feedback(kind=kind, **filters), scope, superseded=())
        size = None if CONVERSIONS[kind, signal].together else PAGE
        while page := list(islice(records, size)):
            content = _content(store, page, beside, options)
            _add(found, kind, signal, page, content, resolved)
    return found


def learnable(store: Store, **filters: Any) -> dict[str, dict[str, int]]:
    """How many live records of which kinds each signal could be made of; kinds that are not there are absent.

    A record that counts here may still give nothing: :func:`load_signals` says which, and why.
    """
    counts = {kind: store.count_feedback(kind=kind, **filters) for kind in KINDS}
    return {
        signal: {kind: n for kind, n in counts.items() if n and (kind, signal) in CONVERSIONS}
        for signal in FROM_RECORDS
    }


def _resolved(adjudications: Iterable[Feedback]) -> frozenset[str]:
    payloads = [record.payload for record in adjudications]
    return frozenset(name for p in payloads if isinstance(p, Adjudication) for name in p.resolves)


def _add(
    found: Converted,
    kind: str,
    signal: str,
    records: Sequence[Feedback],
    content: Content,
    resolved: frozenset[str],
) -> None:
    live = [record for record in records if record.id not in resolved]
    found.left_out.extend(LeftOut((r.id,), "adjudicated") for r in records if r.id in resolved)
    for one in CONVERSIONS[kind, signal].convert(live, content):
        (found.left_out if isinstance(one, LeftOut) else found.signals).append(one)


def _beside(store: Store, signal: str, scope: Scope) -> tuple[Feedback, ...]:
    """Records that may say more on the same targets; a critique that its edit has superseded still does."""
    live = (
        record
        for kind in BESIDE.get(signal, ())
        for record in usable(store.feedback(kind=kind), scope, superseded=())
    )
    old: Iterator[Feedback] = iter(())
    if signal == "critiqued":
        old = (
            record
            for record in store.feedback(kind="critique", status="superseded")
            if scope in record.consent.scope
        )
    return (*live, *old)


def _content(
    store: Store, records: Sequence[Feedback], beside: tuple[Feedback, ...], options: Options
) -> Content:
    targets = {target.sha256 for record in records for target in record.targets}
    replaced = {record.supersedes for record in records}
    contexts = {record.context for record in records if record.context is not None}
    judgements = {record.judgement_id for record in records}
    near = tuple(
        other
        for other in beside
        if other.judgement_id in judgements
        or other.id in replaced
        or any(target.sha256 in targets for target in other.targets)
    )
    wanted = targets | contexts
    for record in (*records, *near):
        wanted |= set(_mentioned(record)) | {target.sha256 for target in record.targets}
    episodes: dict[str, Episode] = {}
    for record in records:
        if record.kind in EPISODES:
            for name in _episodes_of(record):
                if name not in episodes and (held := _episode(store, name)) is not None:
                    episodes[name] = held
    return Content(items=store.items(sorted(wanted)), episodes=episodes, beside=near, options=options)


def _mentioned(record: Feedback) -> Iterator[str]:
    payload = record.payload.gold if isinstance(record.payload, Adjudication) else record.payload
    if isinstance(payload, Edit):
        yield payload.after
    elif isinstance(payload, Critique) and payload.suggestion is not None:
        yield payload.suggestion
    elif isinstance(payload, Approval) and payload.alternative is not None:
        yield payload.alternative


def _episodes_of(record: Feedback) -> Iterator[str]:
    payload = record.payload.gold if isinstance(record.payload, Adjudication) else record.payload
    for target in record.targets:
        if target.episode is not None:
            yield target.episode
    if isinstance(payload, Demonstration) and payload.episode is not None:
        yield payload.episode
    elif isinstance(payload, Stepped) and payload.branch is not None:
        yield payload.branch


def _episode(store: Store, name: str) -> Episode | None:
    try:
        return store.episode(name)
    except BadInputError:  # not there: the conversion says so, if it needs it
        return None


def _say(converted: Converted, signal: str) -> None:
    if not converted.left_out:
        return
    first: dict[str, LeftOut] = {}
    for one in converted.left_out:
        first.setdefault(one.reason, one)
    listed = "; ".join(
        f"{count} {reason} ({first[reason].derived_from[0]}"
        f"{': ' + first[reason].detail if first[reason].detail else ''}) {REASONS[reason]}"
        for reason, count in converted.reasons.most_common()
    )
    emit(
        Alert(
            name="signals_left_out",
            message=f"{converted.reasons.total()} records gave no {signal}, or less than they say: {listed}",
        )
    )


def _warn(found: Sequence[Any], signal: str) -> None:
    """Say so when the labels together say nothing, or only one thing."""
    if signal == "pairs" and found and all(pair.p_chosen == 0.5 for pair in found):
        emit(
            Alert(
                name="labels_all_equal",
                message=f"All {len(found)} pairs are ties, from {found[0].derived_from[0]} on: they order "
                "nothing. Ask for decisions, or learn from demonstrations.",
            )
        )
    if signal == "labelled" and found and len({one.desirable for one in found}) == 1:
        which, other = ("good", "demonstrations") if found[0].desirable else ("bad", "critiqued")
        emit(
            Alert(
                name="single_class",
                message=f"All {len(found)} labelled answers are {which}, from {found[0].derived_from[0]} on: "
                f"nothing says what the other side looks like. Judge some that are not, or learn from "
                f"'{other}'.",
            )
        )


# -- judgements of the same thing ------------------------------------------------------------------------

S = TypeVar("S", Labelled, Demonstrated)


def _aggregated(found: list[Any], signal: str) -> list[Any]:
    if signal == "pairs":
        return merged_votes(cast("list[Pair]", found))
    if signal == "labelled":
        return merged_labels(found)
    if signal == "demonstrations":
        return merged_demonstrations(found)
    return found


def merged_labels(found: Iterable[Labelled]) -> list[Labelled]:
    """Labels of one answer on one criterion as their balance: for a loss that is linear in the label, with
    both sides weighted alike, that has the gradient of all of them. What cancels out is left out and said."""
    merged: list[Labelled] = []
    cancelled: list[tuple[str, ...]] = []
    for votes in _same(found):
        net = sum(vote.weight if vote.desirable else -vote.weight for vote in votes)
        if net == 0:
            cancelled.append(votes[0].derived_from)
            continue
        merged.append(replace(_joined(votes), desirable=net > 0, weight=abs(net)))
    if cancelled:
        emit(
            Alert(
                name="signals_left_out",
                message=f"{len(cancelled)} answers contradictory (such as {cancelled[0][0]}) "
                f"{REASONS['contradictory']}",
            )
        )
    return merged


def merged_demonstrations(found: Iterable[Demonstrated]) -> list[Demonstrated]:
    """Demonstrations of one answer (alike in spans and quality) as one that weighs their sum."""
    return [replace(_joined(same), weight=sum(one.weight for one in same)) for same in _same(found)]


def _same(found: Iterable[S]) -> Iterator[list[S]]:
    groups: dict[tuple[Any, ...], list[S]] = defaultdict(list)
    for one in found:
        key: tuple[Any, ...] = (messages_text(one.prompt), messages_text(one.response), one.criterion)
        if isinstance(one, Demonstrated):
            key = (*key, one.quality, one.spans)
        groups[key].append(one)
    return iter(groups.values())


def _joined(same: Sequence[S]) -> S:
    return replace(
        same[0],
        group=min(one.group for one in same),
        annotators=tuple(dict.fromkeys(name for one in same for name in one.annotators)),
        derived_from=tuple(dict.fromkeys(name for one in same for name in one.derived_from)),
    )
