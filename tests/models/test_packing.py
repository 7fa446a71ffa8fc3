"""Packed rows are all there, each along its own branch, and what is shared stands there once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.models import Rendered, TokenKind
from corrigible.models.packing import SHARE_FROM, Packed, pack, packed_size

PIECES = {
    letter: tuple(100 * number + i % 90 for i in range(length))
    for number, (letter, length) in enumerate([("a", 20), ("b", 16), ("c", 15), ("d", 3), ("e", 40)])
}
"""Stretches of tokens; rows made of them begin alike for none, a few or many tokens."""


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    ids = [token for letter in draw(st.text("abcde", min_size=0, max_size=4)) for token in PIECES[letter]]
    ids += draw(st.lists(st.integers(0, 3), min_size=0 if len(ids) > 1 else 2, max_size=4))
    scored = draw(st.sets(st.integers(1, len(ids) - 1), max_size=5))
    kinds = [TokenKind.SAMPLED if i in scored else TokenKind.SPECIAL for i in range(len(ids))]
    return Rendered(tuple(ids), tuple(kinds))


ROWS = st.lists(rendered(), min_size=1, max_size=7)


def kept(row: Rendered, whole: bool) -> tuple[int, ...]:
    """The tokens that a forward pass needs: those before the last scored one."""
    return row.ids if whole or not row.scored else row.ids[: row.scored[-1]]


def path_to(packed: Packed, last: int) -> list[int]:
    """Indices of what the token at ``last`` sees, itself included."""
    return [
        i for n in packed.nodes if n.start <= last < n.below for i in range(n.start, min(n.end, last + 1))
    ]


@settings(max_examples=200, deadline=None)
@given(ROWS, st.booleans(), st.booleans())
def test_every_row_is_found_along_its_path(rows: list[Rendered], share: bool, whole: bool) -> None:
    packed = pack(rows, share=share, whole=whole)
    wanted = [kept(row, whole) for row in rows]
    assert packed.rows_tokens == sum(map(len, wanted))
    assert packed.lengths == tuple(len(row.scored) for row in rows)
    assert packed.targets.tolist() == [row.ids[i] for row in rows for i in row.scored]
    read = packed.read.split_with_sizes(packed.lengths)
    for number, row in enumerate(rows):
        last = int(packed.last[number])
        path = path_to(packed, last)
        assert path[-1] == last and packed.places[number].tolist() == path
        assert packed.ids[path].tolist() == list(wanted[number])
        assert packed.positions[path].tolist() == list(range(len(wanted[number])))
        # A scored token is read off the token before it.
        assert read[number].tolist() == [path[i - 1] for i in row.scored]


@settings(max_examples=200, deadline=None)
@given(ROWS, st.booleans(), st.booleans())
def test_the_nodes_are_a_tree_that_covers_the_pack(rows: list[Rendered], share: bool, whole: bool) -> None:
    packed = pack(rows, share=share, whole=whole)
    edges = [0, *(node.end for node in packed.nodes)]
    assert [node.start for node in packed.nodes] == edges[:-1] and edges[-1] == len(packed)
    for node in packed.nodes:
        assert node.start < node.end <= node.below <= len(packed)
        # What stands under a node is whole nodes.
        under = [other for other in packed.nodes if node.end <= other.start < node.below]
        assert all(other.below <= node.below for other in under)
    assert len(packed) == len(packed.positions) == packed_size(rows, share=share, whole=whole)
    assert packed.ids.dtype == packed.positions.dtype == packed.targets.dtype == torch.int64


@settings(max_examples=200, deadline=None)
@given(ROWS, st.booleans())
def test_what_is_shared_is_shared_by_rows_that_agree(rows: list[Rendered], whole: bool) -> None:
    """Two rows stand on one token exactly as far as they agree, but for stretches too short to share."""
    packed = pack(rows, whole=whole)
    paths = [path_to(packed, int(last)) for last in packed.last]
    for i, one in enumerate(paths):
        for j, other in enumerate(paths[:i]):
            a, b = kept(rows[i], whole), kept(rows[j], whole)
            same = 0
            while same < min(len(a), len(b)) and a[same] == b[same]:
                same += 1
            shared = len(set(one) & set(other))
            assert one[:shared] == other[:shared]
            assert same - SHARE_FROM < shared <= same


@given(ROWS, st.booleans())
def test_without_sharing_every_token_stands_there(rows: list[Rendered], whole: bool) -> None:
    packed = pack(rows, share=False, whole=whole)
    assert len(packed) == packed.rows_tokens >= packed_size(rows, whole=whole)
    assert packed.ids.tolist() == [token for row in rows for token in kept(row, whole)]
    assert all(node.below == node.end for node in packed.nodes)


@given(rendered(), st.integers(2, 5))
def test_equal_rows_share_everything(row: Rendered, count: int) -> None:
    length = len(kept(row, False))
    expected = length if length >= SHARE_FROM else count * length
    assert packed_size([row] * count) == expected


@given(ROWS, st.randoms())
def test_the_order_of_the_rows_does_not_change_the_size(rows: list[Rendered], rng: object) -> None:
    shuffled = list(rows)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert packed_size(shuffled) == packed_size(rows)


def test_a_pair_by_hand() -> None:
    """20 tokens of prompt once, then 4 of 5 and 1 of 2 answer tokens: the last one is never read."""
    prompt = list(range(20))
    rows = [Rendered.from_tokens(prompt, [7, 8, 9, 10, 11]), Rendered.from_tokens(prompt, [5, 6])]
    packed = pack(rows)
    assert packed.ids.tolist() == [*prompt, 5, 7, 8, 9, 10]
    assert packed.positions.tolist() == [*range(20), 20, 20, 21, 22, 23]
    assert [(n.start, n.end, n.below) for n in packed.nodes] == [(0, 20, 25), (20, 21, 21), (21, 25, 25)]
    assert packed.read.tolist() == [19, 21, 22, 23, 24, 19, 20]
    assert packed.targets.tolist() == [7, 8, 9, 10, 11, 5, 6]
    assert packed.lengths == (5, 2) and packed.last.tolist() == [24, 20] and packed.rows_tokens == 45
    assert pack(rows, whole=True).last.tolist() == [26, 21]


@pytest.mark.parametrize("common, size", [(SHARE_FROM, SHARE_FROM + 2), (SHARE_FROM - 1, 2 * SHARE_FROM)])
def test_short_beginnings_are_not_worth_sharing(common: int, size: int) -> None:
    rows = [Rendered.from_tokens([*range(common), 50 + i], [3]) for i in range(2)]
    assert packed_size(rows) == size


def test_branches_of_branches_share_at_every_depth() -> None:
    """A system prompt for all, a question for two, and a conversation that another one goes on from."""
    system, question, answer = ([10 * k + i for i in range(16)] for k in (1, 5, 9))
    rows = [
        Rendered.from_tokens(system, question),
        Rendered.from_tokens([*system, *question], [1, 2]),
        Rendered.from_tokens([*system, *question, *answer], [3, 4]),
        Rendered.from_tokens([*system, *question, *answer], [4, 5]),
        Rendered.from_tokens([*system, 7], [8]),
    ]
    packed = pack(rows, whole=True)
    assert len(packed) == 16 + 16 + 2 + 16 + 2 + 2 + 2
    assert sorted(len(path_to(packed, int(last))) for last in packed.last) == [18, 32, 34, 50, 50]


def test_a_group_is_laid_out_alike_whatever_stands_beside_it() -> None:
    """Rows of different groups share nothing, so a group's attention is cut into the same calls."""
    prompt = list(range(3, 43))
    groups = [
        [Rendered.from_tokens(prompt, [50 + n, 60, 61]), Rendered.from_tokens(prompt, [70 + n] * 5)]
        for n in range(3)
    ]
    rows = [row for group in groups for row in group]
    together, alone = pack(rows, groups=[2, 2, 2]), pack(groups[1])
    start = int(together.places[2][0])
    mine = [node for node in together.nodes if start <= node.start < start + len(alone)]
    assert [(n.start - start, n.end - start, n.below - start) for n in mine] == [
        (n.start, n.end, n.below) for n in alone.nodes
    ]
    assert len(together) == 3 * len(alone) > len(pack(rows))


def test_what_every_conversation_begins_with_is_laid_out_once_and_alone() -> None:
    """A group under a preamble is laid out alike in any company; its rows sit in their own order."""
    preamble = list(range(100, 120))

    def pair(n: int) -> list[Rendered]:
        prompt = [*preamble, *range(200 + n, 230 + n)]
        return [Rendered.from_tokens(prompt, [1, 2 + n, 3]), Rendered.from_tokens(prompt, [4 + n] * 5)]

    other = [Rendered.from_tokens(range(60, 90), [n, n]) for n in (1, 2)]
    groups = [pair(0), other, pair(3), [pair(5)[0], other[0]]]
    together = pack(
        [row for group in groups for row in group], groups=list(map(len, groups)), preamble=preamble
    )
    assert together.nodes[0].end == 20 and together.ids[:20].tolist() == preamble
    for group, first in zip(groups, (0, 2, 4, 6), strict=True):
        for row, places in zip(group, together.places[first:], strict=False):
            assert together.ids[places].tolist() == list(row.ids[: row.scored[-1]])
            assert path_to(together, int(places[-1])) == places.tolist()
    alone = pack(groups[2], preamble=preamble)
    begin = int(together.places[4][20])
    mine = [node for node in together.nodes if begin <= node.start < begin + len(alone) - 20]
    assert [(n.start - begin, n.end - begin, n.below - begin) for n in mine] == [
        (n.start - 20, n.end - 20, n.below - 20) for n in alone.nodes[1:]
    ]
    assert packed_size(groups[2], preamble=preamble) == len(alone) - 20
    assert len(pack(other, preamble=preamble)) == packed_size(other, preamble=preamble) == packed_size(other)
    assert len(pack(groups[0], share=False, preamble=preamble)) == 54 + 52


def test_a_row_that_ends_within_or_with_the_preamble_keeps_its_tokens() -> None:
    preamble = list(range(100, 120))
    rows = [
        Rendered.from_tokens(preamble[:18], [118]),  # its last read token stands before the preamble's end
        Rendered.from_tokens(preamble[:19], [119, 7]),  # it is the preamble, and one token scored
        Rendered.from_tokens(preamble, [5]),
        Rendered.from_tokens([*preamble, 9], [5]),
    ]
    packed = pack(rows, preamble=preamble)
    for row, places in zip(rows, packed.places, strict=True):
        assert packed.ids[places].tolist() == list(row.ids[: row.scored[-1]])
    assert packed.ids[packed.read].tolist() == [117, 118, 119, 119, 9]
    assert packed.targets.tolist() == [118, 119, 7, 5, 5]
