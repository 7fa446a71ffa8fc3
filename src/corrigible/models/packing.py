"""Rows of tokens laid side by side without padding, a shared beginning only once.

Rows that begin alike (both sides of a pair, the k answers to one prompt, the branches of a
conversation, a system prompt that all have) form a tree: each stretch of tokens is a *node*, and a
token sees its own node up to itself and all nodes above. Nodes are laid out depth first, so what
stands under a node is the stretch right behind it. Positions count along a token's own branch. The
hidden states are those of separate rows; ``tests/models/test_packing.py`` holds them to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from corrigible.models.renderer import Rendered

SHARE_FROM = 16
"""Fewer common tokens than this are cheaper to compute twice than to share."""


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens ``start`` to ``end`` of a pack; what continues them stands at ``end`` to ``below``."""

    start: int
    end: int
    below: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A forward pass's worth of rows.

    Attributes:
        ids: ``(tokens,)`` int64, what is read; rows share what is read alike.
        positions: ``(tokens,)`` int64, each token's place in its own row.
        nodes: the tree, in the order of the tokens; they cover all of them.
        read: ``(scored,)`` index of the token after which each scored token stands; row after row.
        targets: ``(scored,)`` ids of the scored tokens.
        lengths: scored tokens of each row.
        last: ``(rows,)`` index of each row's last token (with ``whole``, of the whole row).
        places: per row, the index of each of its tokens.
        rows_tokens: tokens that the rows have one by one.
    """

    ids: Tensor
    positions: Tensor
    nodes: tuple[Node, ...]
    read: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    last: Tensor
    places: tuple[Tensor, ...]
    rows_tokens: int

    def __len__(self) -> int:
        return len(self.ids)


def pack(
    rows: Sequence[Rendered],
    *,
    share: bool = True,
    whole: bool = False,
    groups: Sequence[int] | None = None,
    preamble: Sequence[int] = (),
) -> Packed:
    """Lay rows out.

    Args:
        rows: what to compute, at least one, none empty.
        share: compute common beginnings once.
        whole: keep what follows a row's last scored token, which log-probs have no use for (the last
            scored token itself is predicted, never read).
        groups: how many rows, one after the other, share among themselves only; all of them by
            default. A group is laid out alike whatever stands beside it, so that its numbers change by
            no more than the matrix library's own rounding (in bfloat16 on a CPU: not at all).
        preamble: tokens that most rows begin with, whatever group they are in (a system prompt): a node
            of its own for all of them, even where only one row is there.
    """
    lengths = [_length(row, whole) for row in rows]
    cut = [np.asarray(row.fed[:length], dtype=np.int64) for row, length in zip(rows, lengths, strict=True)]
    tree = _Tree(cut, share, groups or [len(rows)], preamble)
    places = tree.places
    read = [
        place[np.asarray(row.scored, dtype=np.int64) - 1] for row, place in zip(rows, places, strict=True)
    ]
    return Packed(
        ids=torch.from_numpy(np.concatenate(tree.ids)),
        positions=torch.from_numpy(np.concatenate(tree.positions)),
        nodes=tuple(tree.nodes),
        read=torch.from_numpy(np.concatenate(read)),
        targets=torch.tensor([row.ids[place] for row in rows for place in row.scored], dtype=torch.long),
        lengths=tuple(len(row.scored) for row in rows),
        last=torch.tensor([int(place[-1]) for place in places]),
        places=tuple(map(torch.from_numpy, places)),
        rows_tokens=sum(lengths),
    )


def packed_size(
    rows: Sequence[Rendered], *, share: bool = True, whole: bool = False, preamble: Sequence[int] = ()
) -> int:
    """Tokens that :func:`pack` would lay out, those of the ``preamble`` not counted."""
    cut = [np.asarray(row.fed[: _length(row, whole)], dtype=np.int64) for row in rows]
    tree = _Tree(cut, share, [len(rows)], preamble)
    return tree.size - tree.begun


def _length(row: Rendered, whole: bool) -> int:
    return len(row.ids) if whole or not row.scored else row.scored[-1]


class _Tree:
    """The prefix trees of some groups of rows, depth first."""

    def __init__(
        self, rows: list[np.ndarray], share: bool, groups: Sequence[int], preamble: Sequence[int]
    ) -> None:
        self.rows = rows
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.nodes: list[Node] = []
        self.places: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(rows)
        self.size = self.begun = 0
        if not share:
            for index in range(len(rows)):
                self._leaf(index, 0, [])
            return
        begin = np.asarray(preamble, dtype=np.int64)
        begins = [_common(row, begin) == len(begin) >= SHARE_FROM for row in rows]
        edges = list(itertools.accumulate(groups, initial=0))
        together = [range(*edge) for edge in itertools.pairwise(edges)]
        if any(begins):
            self.begun = len(begin)
            above = [self._lay(begins.index(True), 0, len(begin))]
            for group in together:
                self._group([index for index in group if begins[index]], len(begin), above)
            self.nodes[0] = Node(0, len(begin), self.size)
        for group in together:
            self._group([index for index in group if not begins[index]], 0, [])

    def _group(self, rows: list[int], depth: int, above: list[np.ndarray]) -> None:
        # In lexical order rows that begin alike are neighbours, and what two rows have in common is the
        # least that any neighbours between them have.
        order = sorted(rows, key=lambda index: self.rows[index].tolist())
        common = [_common(self.rows[a], self.rows[b]) for a, b in itertools.pairwise(order)]
        if order:
            self._branch(order, common, depth, above)

    def _branch(self, order: list[int], common: list[int], depth: int, above: list[np.ndarray]) -> None:
        """Lay out rows (neighbours in lexical order, with ``depth`` tokens already laid out above)."""
        if len(order) == 1:
            self._leaf(order[0], depth, above)
            return
        shared = min(common)
        if shared - depth >= SHARE_FROM:
            number, start = len(self.nodes), self.size
            above = [*above, self._lay(order[0], depth, shared)]
            self._split(order, common, shared, above)
            self.nodes[number] = Node(start, start + shared - depth, self.size)
        else:
            self._split(order, common, depth, above)

    def _split(self, order: list[int], common: list[int], depth: int, above: list[np.ndarray]) -> None:
        begin = 0
        for place in range(1, len(order) + 1):
            if place == len(order) or common[place - 1] - depth < SHARE_FROM:
                self._branch(order[begin:place], common[begin : place - 1], depth, above)
                begin = place

    def _leaf(self, index: int, depth: int, above: list[np.ndarray]) -> None:
        length = len(self.rows[index])
        if length > depth:
            start = self.size
            above = [*above, self._lay(index, depth, length)]
            self.nodes[-1] = Node(start, self.size, self.size)
        self.places[index] = np.concatenate(above)

    def _lay(self, index: int, depth: int, end: int) -> np.ndarray:
        self.ids.append(self.rows[index][depth:end])
        self.positions.append(np.arange(depth, end))
        places = np.arange(self.size, self.size + end - depth)
        self.nodes.append(Node(0, 0, 0))
        self.size += end - depth
        return places


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that two rows begin with alike."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
