"""Which examples go through the model together: few passes within a budget of tokens, about equally large.

A pass that is nearly empty costs almost what a full one does (the weights are read either way), so the
fewest passes that the budget allows are made about equally large.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

from corrigible.models import Rendered
from corrigible.models.scoring import Scorer

Batches = list[list[int]]


def passes(score: Scorer, examples: Sequence[Sequence[Rendered]], token_budget: int) -> Batches:
    """Indices of the examples (groups of rows) of each forward pass of ``score``; :func:`micro_batches`."""
    sizes = [score.size(rows) for rows in examples]
    return micro_batches(sizes, token_budget, padded=score.network is None)


def micro_batches(sizes: Sequence[int], token_budget: int, *, padded: bool = False) -> Batches:
    """Cut items into batches within a budget: few, and about equally large.

    The number of batches is that of best-fit-decreasing bin packing, at most 11/9 of the fewest possible
    plus one (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
    algorithms"). They are then evened out: each item, largest first, goes to the emptiest batch
    (Graham 1969); where that would break the budget, the smallest budget is searched that takes no
    more batches (MULTIFIT: Coffman, Garey and Johnson 1978).

    Args:
        sizes: tokens of each item, ``(n,)``; an item is never cut.
        token_budget: most tokens in a batch. A larger item forms a batch of its own.
        padded: every item of a batch is as large as its largest.

    Returns:
        Indices, the largest batch first: running out of memory happens at once or not at all. A pure
        function of the sizes; their order only decides which of two equal items goes where.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [[i] for i in order if sizes[i] >= token_budget]
    order = order[len(alone) :]

    def load(batch: list[int]) -> int:
        return len(batch) * sizes[batch[0]] if padded else sum(sizes[i] for i in batch)

    fill = _side_by_side if padded else _best_fit
    batches = fill(order, sizes, token_budget)
    even = [] if padded else _emptiest_first(order, sizes, len(batches))
    if not even or max(map(load, even)) > token_budget:
        even = _least_budget(fill, order, sizes, batches, token_budget)
    return alone + sorted(even, key=lambda batch: (-load(batch), batch))


def _best_fit(order: Sequence[int], sizes: Sequence[int], budget: int) -> Batches:
    """Each item into the fullest batch that has room for it."""
    batches: Batches = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    for item in order:
        place = bisect_left(rooms, sizes[item])
        if place == len(rooms):
            batches.append([])
            batch, room = len(batches) - 1, budget
        else:
            room = rooms[place]
            batch = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        batches[batch].append(item)
        room -= sizes[item]
        if room not in by_room:
            by_room[room] = []
            insort(rooms, room)
        by_room[room].append(batch)
    return batches


def _side_by_side(order: Sequence[int], sizes: Sequence[int], budget: int) -> Batches:
    """Items of neighbouring sizes together, each counted at the size of the first, which is the largest."""
    batches: Batches = []
    for item in order:
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


def _emptiest_first(order: Sequence[int], sizes: Sequence[int], count: int) -> Batches:
    """Each item into the emptiest of ``count`` batches."""
    batches: Batches = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for item in order:
        load, number = heap[0]
        batches[number].append(item)
        heapq.heapreplace(heap, (load + sizes[item], number))
    return batches


def _least_budget(
    fill: Callable[[Sequence[int], Sequence[int], int], Batches],
    order: Sequence[int],
    sizes: Sequence[int],
    batches: Batches,
    budget: int,
) -> Batches:
    """What ``fill`` makes of the smallest budget that takes no more batches than ``batches``."""
    low, high = max((sizes[i] for i in order), default=0), budget
    while low < high:
        middle = (low + high) // 2
        found = fill(order, sizes, middle)
        if len(found) <= len(batches):
            batches, high = found, middle
        else:
            low = middle + 1
    return batches
