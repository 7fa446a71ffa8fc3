"""Splits that keep what was seen in training out of what is tested on.

Comparisons share prompts, topics and items, so a split by row tests on what was trained on. Every split
here moves whole *units*, and every `Split` asserts on construction that its two sides share none:

- ``prompt``: pairs whose conversations open with the same user message stay together;
- ``topic``: pairs with the same ``group`` (the task id, such as a debate topic) stay together, and so do
  groups that share a prompt;
- ``item``: no response of a held-out pair occurs in a training pair; pairs with one side on each are
  dropped and counted, because most preference graphs over items are one connected component;
- ``auto``: the coarsest of ``topic``, ``prompt`` and ``item`` that has at least five units.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from corrigible.errors import BadInputError
from corrigible.rewards.texts import first_user_text

if TYPE_CHECKING:
    from corrigible.store.pairs import Pair

RULES = ("auto", "prompt", "topic", "item")
MINIMUM_UNITS = 5


def connected_components(edges: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """One component number per edge: edges that share a node, directly or through others, share it.

    Numbers are given in order of first appearance.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for nodes in edges:
        first = root(nodes[0])
        for node in nodes[1:]:
            parent[root(node)] = first
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(nodes[0]), len(numbers)) for nodes in edges]


def _topic_keys(pair: Pair) -> tuple[Hashable, ...]:
    prompt = first_user_text(pair.prompt)
    return (("group", pair.group), ("prompt", prompt)) if prompt else (("group", pair.group),)


def prompt_units(pairs: Sequence[Pair]) -> list[int]:
    """(n,) unit of each pair under the ``prompt`` rule."""
    return connected_components([(first_user_text(pair.prompt),) for pair in pairs])


def topic_units(pairs: Sequence[Pair]) -> list[int]:
    """(n,) unit of each pair under the ``topic`` rule."""
    return connected_components([_topic_keys(pair) for pair in pairs])


def resolve_rule(pairs: Sequence[Pair], by: str) -> str:
    """The rule that ``by`` stands for on these pairs; BadInputError for an unknown one."""
    if by not in RULES:
        raise BadInputError(f"unknown split {by!r}.", advice=f"Choose one of {', '.join(RULES)}.")
    if by != "auto":
        return by
    topics, prompts = len(set(topic_units(pairs))), len(set(prompt_units(pairs)))
    if MINIMUM_UNITS <= topics < prompts:
        return "topic"
    return "prompt" if prompts >= MINIMUM_UNITS else "item"


def clusters(pairs: Sequence[Pair], by: str) -> list[tuple[Hashable, ...]]:
    """The independent units behind each pair, for intervals: one (prompt, topic) or two (items)."""
    if by == "item":
        return [(pair.chosen_ref, pair.rejected_ref) for pair in pairs]
    return [(unit,) for unit in (prompt_units(pairs) if by == "prompt" else topic_units(pairs))]


@dataclass(frozen=True)
class Split:
    """Two lists of pairs that share no unit; ``dropped`` counts pairs that lie across."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    by: str
    seed: int
    dropped: int = 0

    def __post_init__(self) -> None:
        def keys(pair: Pair) -> tuple[Hashable, ...]:
            if self.by == "item":
                return (pair.chosen_ref, pair.rejected_ref)
            return (first_user_text(pair.prompt),) if self.by == "prompt" else _topic_keys(pair)

        seen = {key for pair in self.train for key in keys(pair)}
        shared = [key for pair in self.held_out for key in keys(pair) if key in seen]
        if shared:
            raise BadInputError(
                f"the split by {self.by} is not disjoint: {len(shared)} held-out pairs share a unit with "
                f"training, the first is {str(shared[0])[:80]!r}.",
                advice="Build splits with corrigible.rewards.split.",
            )


def _too_few(by: str, units: int, needed: int) -> BadInputError:
    other = "--split item" if by in ("prompt", "topic") else "more data"
    return BadInputError(
        f"the pairs hold {units} {by} unit(s), but {needed} are needed to hold some out.",
        advice=f"Use {other}, or bring feedback on more {by}s.",
    )


def split(pairs: Sequence[Pair], *, by: str = "auto", held_out: float = 0.2, seed: int = 0) -> Split:
    """Hold out whole units until they cover about ``held_out`` of the pairs.

    Units are taken in seeded random order. With ``prompt`` and ``topic`` a unit that would overshoot by
    more than it brings nearer is skipped, so one giant topic does not become the whole test set. With
    ``item`` the fraction is of items: about its square of the pairs is held out.

    Raises:
        BadInputError: ``held_out`` is outside (0, 1), or there are too few units for both sides.
    """
    if not 0 < held_out < 1:
        raise BadInputError(f"held_out is {held_out}.", advice="Give a share between 0 and 1, such as 0.2.")
    by = resolve_rule(pairs, by)
    if by == "item":
        return _split_items(pairs, held_out, seed)
    units = prompt_units(pairs) if by == "prompt" else topic_units(pairs)
    sizes = np.bincount(units) if units else np.zeros(0, dtype=np.int64)
    if len(sizes) < 2:
        raise _too_few(by, len(sizes), 2)
    target = held_out * len(pairs)
    out: set[int] = set()
    filled = 0
    for unit in np.random.default_rng(seed).permutation(len(sizes)):
        if filled >= target or len(out) == len(sizes) - 1:
            break
        if filled + sizes[unit] - target > target - filled:
            continue
        out.add(int(unit))
        filled += int(sizes[unit])
    if not out:  # every unit is larger than what is wanted
        out.add(int(sizes.argmin()))
    return Split(
        train=tuple(pair for pair, unit in zip(pairs, units, strict=True) if unit not in out),
        held_out=tuple(pair for pair, unit in zip(pairs, units, strict=True) if unit in out),
        by=by,
        seed=seed,
    )


def _by_items(pairs: Sequence[Pair], out: set[str], seed: int) -> Split:
    sides = [(pair.chosen_ref in out) + (pair.rejected_ref in out) for pair in pairs]
    train = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side == 0)
    held = tuple(pair for pair, side in zip(pairs, sides, strict=True) if side == 2)
    if not train or not held:
        raise _too_few(
            "item", len({ref for pair in pairs for ref in (pair.chosen_ref, pair.rejected_ref)}), 4
        )
    return Split(train=train, held_out=held, by="item", seed=seed, dropped=sides.count(1))


def _items(pairs: Sequence[Pair]) -> list[str]:
    return sorted({ref for pair in pairs for ref in (pair.chosen_ref, pair.rejected_ref)})


def _split_items(pairs: Sequence[Pair], held_out: float, seed: int) -> Split:
    items = _items(pairs)
    order = np.random.default_rng(seed).permutation(len(items))
    return _by_items(pairs, {items[i] for i in order[: round(held_out * len(items))]}, seed)


def folds(pairs: Sequence[Pair], k: int, *, by: str = "auto", seed: int = 0) -> Iterator[Split]:
    """k splits whose held-out sides are disjoint; with ``prompt`` and ``topic`` they cover every pair.

    Units go, largest first (ties in seeded order), to the fold that holds fewest pairs so far. With
    ``item`` each fold holds out 1/k of the items, and pairs across two folds are never tested.
    """
    if k < 2:
        raise BadInputError(f"{k} folds.", advice="Cross-validation needs at least 2.")
    by = resolve_rule(pairs, by)
    rng = np.random.default_rng(seed)
    if by == "item":
        items = _items(pairs)
        for part in np.array_split(rng.permutation(len(items)), k):
            yield _by_items(pairs, {items[i] for i in part}, seed)
        return
    units = prompt_units(pairs) if by == "prompt" else topic_units(pairs)
    sizes = np.bincount(units) if units else np.zeros(0, dtype=np.int64)
    if len(sizes) < k:
        raise _too_few(by, len(sizes), k)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled = np.zeros(k, dtype=np.int64)
    fold = np.zeros(len(sizes), dtype=np.int64)
    for unit in order:
        fold[unit] = int(filled.argmin())
        filled[fold[unit]] += sizes[unit]
    for number in range(k):
        yield Split(
            train=tuple(pair for pair, unit in zip(pairs, units, strict=True) if fold[unit] != number),
            held_out=tuple(pair for pair, unit in zip(pairs, units, strict=True) if fold[unit] == number),
            by=by,
            seed=seed,
        )


def subset(pairs: Sequence[Pair], share: float, *, by: str = "auto", seed: int = 0) -> list[Pair]:
    """About ``share`` of the pairs in whole units, nested: a smaller share is part of a larger one.

    With ``item`` single pairs are taken (a share of the items would leave the square of it). This is what
    learning curves and ``--limit`` use. At least one unit is kept.
    """
    if not 0 < share <= 1:
        raise BadInputError(f"share is {share}.", advice="Give a number in (0, 1].")
    if share == 1:
        return list(pairs)
    by = resolve_rule(pairs, by)
    if by == "item":
        units: list[int] = list(range(len(pairs)))
    else:
        units = prompt_units(pairs) if by == "prompt" else topic_units(pairs)
    sizes = np.bincount(units) if units else np.zeros(0, dtype=np.int64)
    kept: set[int] = set()
    filled = 0
    for unit in np.random.default_rng(seed).permutation(len(sizes)):
        if kept and filled + sizes[unit] / 2 > share * len(pairs):
            break
        kept.add(int(unit))
        filled += int(sizes[unit])
    return [pair for pair, unit in zip(pairs, units, strict=True) if unit in kept]


def split_by_group(pairs: Sequence[Pair], held_out: float = 0.2, seed: int = 0) -> Split:
    """`split` by ``Pair.group``: whole tasks or topics."""
    return split(pairs, by="topic", held_out=held_out, seed=seed)


def split_by_prompt(pairs: Sequence[Pair], held_out: float = 0.2, seed: int = 0) -> Split:
    """`split` by the opening user message."""
    return split(pairs, by="prompt", held_out=held_out, seed=seed)


def split_by_item(pairs: Sequence[Pair], held_out: float = 0.3, seed: int = 0) -> Split:
    """`split` by response: no held-out response occurs in training."""
    return split(pairs, by="item", held_out=held_out, seed=seed)
