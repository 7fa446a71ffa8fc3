"""What an algorithm can learn from what is there, and what to do when it cannot."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from corrigible.align.registry import ALGORITHMS, Algorithm
from corrigible.errors import BadInputError
from corrigible.records import KINDS
from corrigible.rewards.splits import Split
from corrigible.rewards.texts import first_user_text, response_text
from corrigible.store import Pair, Store
from corrigible.store.conversions import SIGNALS, convert_store, load_signals

WAYS = {
    "pairs": "Import comparisons (corrigible import, or --data), or judge some (corrigible judge).",
    "labelled": "Import or collect thumbs, ratings or comparisons.",
    "ranked": "Import or collect rankings of several responses, or ratings of them.",
    "demonstrations": "Import responses that are worth imitating (demonstrations, edits).",
    "critiqued": "Import or collect critiques of responses, best with what became of them.",
    "attempts": "Import several tries at a task with what was right or wrong with each.",
}
"""What brings signals of each shape into a store."""


def is_online(algorithm: Algorithm) -> bool:
    """Whether it learns from answers that the policy samples while it trains."""
    return algorithm.signal == "groups"


def load_for(store: Store, algorithm: Algorithm, *, criterion: str | None = None) -> list[Any]:
    """The signals of a store's live feedback that an algorithm learns from; votes on the same are one.

    Args:
        store: where from.
        algorithm: a registry entry.
        criterion: only judgements on this criterion.

    Raises:
        BadInputError: it learns from groups that are sampled while it trains, or an item that a judgement
            is about is not in the store.
    """
    check_offline(algorithm)
    options = {"aggregate": True, **algorithm.loads}
    return load_signals(store, algorithm.signal, criterion=criterion, **options)


def check_offline(algorithm: Algorithm) -> None:
    """BadInputError for an algorithm that needs answers which the policy samples as it is trained."""
    if is_online(algorithm):
        raise BadInputError(
            f"{algorithm.name} learns from groups of answers that the policy samples while it trains, each "
            "with a reward; recorded feedback is no substitute, and no command samples them yet.",
            advice="From Python: sample with corrigible.models.generate, score, and give a GroupSource to "
            f"the Trainer (the guide 'Algorithms' has the lines). {_instead(_offline())}",
        )


def check_signals(algorithm: Algorithm, signals: Sequence[Any]) -> None:
    """Hold signals against the shape that an algorithm learns from.

    Raises:
        BadInputError: it is an online one, or a signal has another shape; the message names the shape, what
            the algorithm needs, and which algorithms can use what was given.
    """
    check_offline(algorithm)
    wanted = SIGNALS[algorithm.signal].type
    assert wanted is not None  # it is no online one
    for index, signal in enumerate(signals):
        if isinstance(signal, wanted):
            continue
        shapes = ((name, each.type) for name, each in SIGNALS.items() if each.type is not None)
        given = next((name for name, shape in shapes if isinstance(signal, shape)), None)
        if given is None:
            raise BadInputError(
                f"signal {index} of {len(signals)} is a {type(signal).__name__}, which is no signal.",
                advice=f"{algorithm.name} learns from {algorithm.signal} ({wanted.__name__}).",
            )
        ways = "labelled_from_pairs makes them from pairs. " if algorithm.signal == "labelled" else ""
        raise BadInputError(
            f"{algorithm.name} learns from {algorithm.signal} ({wanted.__name__}); signal {index} of "
            f"{len(signals)} is one of {given} ({type(signal).__name__}).",
            advice=f"Give it a store, which holds the judgements themselves. {ways}"
            f"{_instead([entry for entry in _offline() if entry.signal == given])}",
        )


def nothing_to_learn_from(store: Store, algorithm: Algorithm) -> BadInputError:
    """The error for a store without anything for an algorithm: what it holds, and what could use it."""
    kinds = {kind: count for kind in KINDS if (count := store.count_feedback(kind=kind))}
    noun = "comparisons" if algorithm.signal == "pairs" else f"{algorithm.signal} signals"
    if not kinds:
        return BadInputError(
            f"{store.url} holds no {noun} to learn from: it holds no judgement at all.",
            advice=WAYS[algorithm.signal],
        )
    held = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    uses = ", ".join(sorted(algorithm.learns_from))
    nothing = f"{store.url} holds no {noun} to learn from: it holds {held}"
    if algorithm.learns_from.isdisjoint(kinds):
        message = f"{nothing}, and {algorithm.name} learns from {uses}."
    else:
        reasons = convert_store(store, algorithm.signal).reasons
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        message = f"{nothing}, which give no {algorithm.signal} ({why or 'nothing to hold them against'})."
    return BadInputError(message, advice=f"{_instead(able_to_use(store))} {WAYS[algorithm.signal]}")


def able_to_use(store: Store) -> list[Algorithm]:
    """The offline algorithms that find something to learn from in a store, in the registry's order."""
    found: dict[str, bool] = {}
    for entry in _offline():
        if entry.signal not in found:
            found[entry.signal] = bool(convert_store(store, entry.signal).signals)
    return [entry for entry in _offline() if found[entry.signal]]


def _offline() -> list[Algorithm]:
    return [entry for entry in ALGORITHMS.values() if not is_online(entry)]


def _instead(entries: Sequence[Algorithm]) -> str:
    if not entries:
        return "No algorithm can learn from what is there."
    return f"What is there can be used by: {', '.join(sorted(entry.name for entry in entries))}."


# -- what is learnt from, and what is tested on ---------------------------------------------------------


def apart_from(signals: Sequence[Any], split: Split, pairs: Sequence[Pair]) -> list[Any]:
    """The signals that share nothing with the held-out side of a split of the same store's pairs.

    Left out are signals of judgements behind a held-out pair (or behind one that the split left out), and
    what the split's rule keeps together with one: the same prompt, the same topic, the same response.

    Args:
        signals: of any shape.
        split: of ``pairs``.
        pairs: all of them.
    """
    used = {record for pair in split.train for record in pair.derived_from}
    apart = {record for pair in pairs for record in pair.derived_from} - used
    apart |= {record for pair in split.held_out for record in pair.derived_from}
    units = {unit for pair in split.held_out for unit in _units(pair, split.by)}
    return [
        signal
        for signal in signals
        if apart.isdisjoint(signal.derived_from) and units.isdisjoint(_units(signal, split.by))
    ]


def _units(signal: Any, by: str) -> set[Hashable]:
    """What of a signal must not be on both sides."""
    prompt = first_user_text(signal.prompt)
    if by == "item":
        return set(_responses(signal))
    named: set[Hashable] = {("prompt", prompt)} if prompt else set()
    return named | ({("group", signal.group)} if by == "topic" else set())


def _responses(signal: Any) -> Iterator[str]:
    for name in ("chosen", "rejected", "response", "draft", "refined"):
        if said := getattr(signal, name, ()):
            yield response_text(said)
    yield from map(response_text, getattr(signal, "responses", ()))
    yield from (response_text(attempt.response) for attempt in getattr(signal, "attempts", ()))
