"""Splits share no unit, hold out about what was asked, and say so when they cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError
from corrigible.rewards import Split, folds, split, split_by_group, split_by_item, split_by_prompt, subset
from corrigible.rewards.splits import clusters, connected_components, resolve_rule
from corrigible.rewards.texts import first_user_text
from corrigible.store.pairs import Pair

MakePair = Callable[..., Pair]


def grouped(pair: MakePair, groups: int, per_group: int, prompts_per_group: int = 1) -> list[Pair]:
    return [
        pair(
            f"good {g} {i}",
            f"bad {g} {i}",
            prompt=f"question {g} {i % prompts_per_group}",
            group=f"topic {g}",
        )
        for g in range(groups)
        for i in range(per_group)
    ]


def graph(pair: MakePair, items: int, pairs: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [pair(*(f"joke {i}" for i in rng.choice(items, size=2, replace=False))) for _ in range(pairs)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 12), st.integers(1, 9), st.floats(0.05, 0.8), st.integers(0, 5))
def test_group_split_is_disjoint_and_complete(
    pair: MakePair, groups: int, per_group: int, share: float, seed: int
) -> None:
    pairs = grouped(pair, groups, per_group)
    parts = split_by_group(pairs, share, seed)
    ours, theirs = ({p.group for p in side} for side in (parts.train, parts.held_out))
    assert not ours & theirs
    assert len(parts.train) + len(parts.held_out) == len(pairs) and parts.dropped == 0
    assert parts.train and parts.held_out
    assert abs(len(parts.held_out) - share * len(pairs)) <= per_group


def test_one_giant_topic_does_not_become_the_test_set(pair: MakePair) -> None:
    pairs = grouped(pair, 10, 10) + [pair(f"g {i}", f"b {i}", prompt="q", group="giant") for i in range(400)]
    for seed in range(8):
        assert len(split(pairs, by="topic", held_out=0.1, seed=seed).held_out) <= 100


def test_prompt_split_looks_at_the_opening_message(pair: MakePair) -> None:
    pairs = grouped(pair, 6, 8, prompts_per_group=4)
    parts = split_by_prompt(pairs, 0.25, seed=1)
    ours, theirs = ({first_user_text(p.prompt) for p in side} for side in (parts.train, parts.held_out))
    assert not ours & theirs
    # Topics may be on both sides of a prompt split; a topic split keeps them apart.
    assert {p.group for p in parts.train} & {p.group for p in parts.held_out}


def test_groups_that_share_a_prompt_stay_together(pair: MakePair) -> None:
    pairs = [pair("a", "b", prompt="same", group=f"task {i}") for i in range(4)]
    pairs += [pair(f"a{i}", f"b{i}", prompt=f"other {i}", group=f"other {i}") for i in range(6)]
    for seed in range(6):
        parts = split(pairs, by="topic", held_out=0.3, seed=seed)
        assert len({p in parts.held_out for p in pairs[:4]}) == 1


def test_item_split_has_no_item_on_both_sides_and_counts_what_it_drops(pair: MakePair) -> None:
    pairs = graph(pair, 60, 500)
    parts = split_by_item(pairs, 0.3, seed=3)
    ours, theirs = (
        {ref for p in side for ref in (p.chosen_ref, p.rejected_ref)}
        for side in (parts.train, parts.held_out)
    )
    assert not ours & theirs
    assert len(parts.train) + len(parts.held_out) + parts.dropped == 500
    assert 0.05 < len(parts.held_out) / 500 < 0.14  # about 0.3 squared


def test_a_leaking_split_cannot_be_constructed(pair: MakePair) -> None:
    shared = pair("a", "b", prompt="q")
    for by, other in (
        ("prompt", pair("c", "d", prompt="q")),
        ("topic", pair("c", "d", prompt="x", group=shared.group)),
        ("item", pair("a", "z", prompt="y")),
    ):
        with pytest.raises(BadInputError, match="not disjoint"):
            Split(train=(shared,), held_out=(other,), by=by, seed=0)


@pytest.mark.parametrize("by", ["prompt", "topic"])
def test_folds_test_every_pair_once(pair: MakePair, by: str) -> None:
    pairs = grouped(pair, 11, 7, prompts_per_group=2)
    seen: list[int] = []
    for part in folds(pairs, 4, by=by, seed=2):
        seen += [id(p) for p in part.held_out]
        assert len(part.train) + len(part.held_out) == len(pairs)
    assert sorted(seen) == sorted(map(id, pairs))


def test_item_folds_hold_out_every_item_once(pair: MakePair) -> None:
    pairs = graph(pair, 40, 600)
    held = [
        {ref for p in part.held_out for ref in (p.chosen_ref, p.rejected_ref)} for part in folds(pairs, 4)
    ]
    assert sum(map(len, held)) == len(set().union(*held))


def test_subsets_are_nested_and_of_the_asked_size(pair: MakePair) -> None:
    pairs = grouped(pair, 50, 4)
    sets = [{id(p) for p in subset(pairs, share, by="topic", seed=5)} for share in (0.1, 0.25, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(sets))
    assert all(abs(len(s) - share * 200) <= 4 for s, share in zip(sets, (0.1, 0.25, 0.5, 1.0), strict=True))


def test_auto_takes_the_coarsest_rule_with_enough_units(pair: MakePair) -> None:
    assert resolve_rule(grouped(pair, 6, 8, prompts_per_group=4), "auto") == "topic"
    assert resolve_rule(grouped(pair, 2, 8, prompts_per_group=4), "auto") == "prompt"
    assert resolve_rule(grouped(pair, 30, 1), "auto") == "prompt"
    assert resolve_rule(graph(pair, 20, 50), "auto") == "item"


def test_same_seed_same_split(pair: MakePair) -> None:
    pairs = grouped(pair, 20, 3)
    assert split(pairs, seed=4).held_out == split(pairs, seed=4).held_out
    assert split(pairs, seed=4).held_out != split(pairs, seed=5).held_out


def test_clusters_name_one_unit_or_two_items(pair: MakePair) -> None:
    pairs = graph(pair, 10, 5)
    assert all(len(unit) == 2 for unit in clusters(pairs, "item"))
    assert all(len(unit) == 1 for unit in clusters(grouped(pair, 3, 2), "prompt"))


def test_connected_components_against_repeated_merging() -> None:
    rng = np.random.default_rng(0)
    edges = [tuple(int(i) for i in rng.integers(40, size=2)) for _ in range(25)]
    merged = [set(edge) for edge in edges]
    for _ in edges:  # as often as could ever be needed
        merged = [set().union(*(other for other in merged if other & part)) for part in merged]
    numbers = connected_components(edges)
    for i in range(len(edges)):
        for j in range(len(edges)):
            assert (numbers[i] == numbers[j]) == bool(merged[i] & merged[j])


@pytest.mark.parametrize(
    ("by", "held_out", "says"),
    [
        ("row", 0.2, "unknown split"),
        ("topic", 0.0, "held_out"),
        ("topic", 1.0, "held_out"),
        ("topic", 0.2, "1 topic"),
    ],
)
def test_refusals(pair: MakePair, by: str, held_out: float, says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        split(grouped(pair, 1, 5), by=by, held_out=held_out)


def test_too_few_units_for_folds_or_items(pair: MakePair) -> None:
    with pytest.raises(BadInputError, match="5 are needed"):
        list(folds(grouped(pair, 3, 5), 5, by="topic"))
    with pytest.raises(BadInputError, match="hold some out"):
        split([pair("a", "b")], by="item")
