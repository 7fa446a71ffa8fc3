"""Journey learning: a whole search as one text: wrong turns, what was said of them, and the way back.

Source: Qin et al. 2024, "O1 Replication Journey: A Strategic Progress Report - Part 1" (arXiv:2410.18982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from corrigible.align.rendering.segments import Lesson, Segment, SegmentKind, Spoken, answer_text
from corrigible.align.sources import Unusable
from corrigible.store.signals import Attempts

Reasons = Literal["needed", "none"]
"""Whether a wrong turn must say why it is wrong (others are not shown), or none says it."""

BACK = "Let me go back."
"""What ends every wrong turn."""


@dataclass(frozen=True)
class Node:
    """A step of a search.

    Attributes:
        text: the step; the root's is empty.
        right: whether it is on a path to a right answer.
        reason: why it is wrong, in the critic's words.
        children: what was tried next.
    """

    text: str
    right: bool
    reason: str = ""
    children: tuple[Node, ...] = ()


@dataclass
class _Growing:
    right: bool = False
    reason: str = ""
    children: dict[str, _Growing] = field(default_factory=dict)

    def frozen(self, text: str = "") -> Node:
        children = tuple(child.frozen(step) for step, child in self.children.items())
        return Node(text, self.right, self.reason, children)


def tree_of(attempts: Attempts) -> Node:
    """The tree of steps that attempts at one task span: those that begin alike share their first steps.

    An attempt that nobody divided is one step. What was said of a wrong attempt (its ``feedback``, else
    the type of its ``error``) is the reason at its first wrong step, or at its last when nobody said which.

    Raises:
        Unusable: ``no_right_attempt``, ``empty_completion``.
    """
    if not any(each.right for each in attempts.attempts):
        raise Unusable("no_right_attempt", "no attempt at the task is right, so the search finds nothing")
    root = _Growing(right=True)
    for attempt in attempts.attempts:
        if attempt.right is None:
            continue
        steps = attempt.steps or (answer_text(attempt.response),)
        node, reached = root, []
        for step in steps:
            node = node.children.setdefault(step.strip("\n"), _Growing())
            node.right = node.right or attempt.right
            reached.append(node)
        if not attempt.right:
            first = attempt.first_wrong
            at = reached[first if first is not None and 0 <= first < len(reached) else -1]
            at.reason = at.reason or attempt.feedback or attempt.error
    return root.frozen()


def shortcut(tree: Node, rng: np.random.Generator) -> tuple[Segment, ...]:
    """The right steps alone, from the root to a leaf; where several are right, one at random.

    Raises:
        Unusable: ``no_right_attempt``.
    """
    steps: list[tuple[str, SegmentKind]] = []
    node = tree
    while _goes_on(node):
        node = _right_child(node, rng)
        steps.append((node.text, "response"))
    return _joined(steps, 1.0)


def journey(
    tree: Node,
    rng: np.random.Generator,
    *,
    trials: int = 2,
    reasons: Reasons = "needed",
    mistake_weight: float = 1.0,
) -> tuple[Segment, ...]:
    """The search depth first: at each right step at most ``trials - 1`` wrong turns, then the right one.

    A wrong turn follows one child after another, at random, to a leaf; then comes why it is wrong, and
    "Let me go back."

    Args:
        tree: its root.
        rng: decides which wrong turns are taken, and in which order.
        trials: at each right step, the right one included: what bounds the text's length.
        reasons: whether wrong turns must have one.
        mistake_weight: of each token of a wrong turn's steps.

    Raises:
        Unusable: ``no_right_attempt``, ``no_detour`` (no wrong turn can be taken: it would be a shortcut).
    """
    steps: list[tuple[str, SegmentKind]] = []
    node = tree
    while _goes_on(node):
        detours = [
            detour
            for child in node.children
            if not child.right and (detour := _detour(child, rng, reasons)) is not None
        ]
        order = rng.permutation(len(detours))[: trials - 1]
        for place in order:
            steps += detours[place]
        node = _right_child(node, rng)
        steps.append((node.text, "response"))
    if all(kind == "response" for _, kind in steps):
        raise Unusable(
            "no_detour",
            "the search has no wrong turn that says why it is wrong"
            if reasons == "needed"
            else "the search has no wrong turn",
            advice="Record why attempts were wrong, or set reasons to none.",
        )
    return _joined(steps, mistake_weight)


def journey_lesson(attempts: Attempts, segments: Sequence[Segment]) -> Lesson:
    """A journey or a shortcut through the tree of ``attempts``, as the answer to their prompt."""
    return Lesson(
        turns=(*attempts.prompt, Spoken(tuple(segments))),
        weight=attempts.weight,
        group=attempts.group,
        derived_from=attempts.derived_from,
    )


def _goes_on(node: Node) -> bool:
    """Whether a right step comes next; a right attempt may end where a wrong one went on."""
    found = any(child.right for child in node.children)
    if not found and not node.text:
        raise Unusable("no_right_attempt", "no first step is right, so the search finds nothing")
    return found


def _right_child(node: Node, rng: np.random.Generator) -> Node:
    right = [child for child in node.children if child.right]
    return right[int(rng.integers(len(right)))]


def _detour(child: Node, rng: np.random.Generator, reasons: Reasons) -> list[tuple[str, SegmentKind]] | None:
    """A wrong turn from its first step to a leaf and back; ``None`` when it lacks the reason it needs."""
    steps: list[tuple[str, SegmentKind]] = []
    said = ""
    node = child
    while True:
        steps.append((node.text, "mistake"))
        said = said or node.reason
        if not node.children:
            break
        node = node.children[int(rng.integers(len(node.children)))]
    if reasons == "needed" and not said:
        return None
    why = f"That is wrong: {said.strip()} " if reasons == "needed" else ""
    return [*steps, (f"{why}{BACK}", "reflection")]


def _joined(steps: Sequence[tuple[str, SegmentKind]], mistake_weight: float) -> tuple[Segment, ...]:
    return tuple(
        Segment(f"\n{text}" if n else text, mistake_weight if kind == "mistake" else 1.0, kind=kind)
        for n, (text, kind) in enumerate(steps)
    )
