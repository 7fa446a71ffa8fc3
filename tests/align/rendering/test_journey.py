"""Journey learning: attempts as a tree, and a walk through it as text."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from feedback_texts import attempt, attempts, written

from corrigible.align import Unusable
from corrigible.align.rendering import Node, journey, journey_lesson, shortcut, tree_of
from corrigible.models import Renderer

TASK = attempts(
    attempt("a\nx\ny", False, first_wrong=1, feedback="x does not follow."),
    attempt("a\nb\nc", True),
    attempt("a\nb\nz", False, error="arithmetic"),
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text_of(tree: Node, **settings: object) -> str:
    return "".join(segment.text for segment in journey(tree, generator(), **settings))  # type: ignore[arg-type]


def test_attempts_that_begin_alike_share_their_first_steps() -> None:
    assert tree_of(TASK) == Node(
        "",
        True,
        children=(
            Node(
                "a",
                True,
                children=(
                    Node("x", False, "x does not follow.", (Node("y", False),)),
                    Node("b", True, children=(Node("c", True), Node("z", False, "arithmetic"))),
                ),
            ),
        ),
    )


def test_the_walk_by_hand(renderer: Renderer) -> None:
    segments = journey(tree_of(TASK), generator())
    assert written([journey_lesson(TASK, segments)], renderer) == [
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
        "«a\nx\ny\nThat is wrong: x does not follow. Let me go back.\n"
        "b\nz\nThat is wrong: arithmetic Let me go back.\nc<|im_end|>»"
    ]
    kinds = Counter(segment.kind for segment in segments)
    assert kinds == {"response": 3, "mistake": 3, "reflection": 2}


def test_the_shortcut_is_the_right_steps_alone() -> None:
    assert "".join(segment.text for segment in shortcut(tree_of(TASK), generator())) == "a\nb\nc"


def test_wrong_steps_may_weigh_nothing(renderer: Renderer) -> None:
    segments = journey(tree_of(TASK), generator(), mistake_weight=0.0)
    [text] = written([journey_lesson(TASK, segments)], renderer)
    assert "«a»\nx\ny«\nThat is wrong" in text and "«b»" not in text


def test_trials_bound_how_much_is_tried() -> None:
    children = tuple(Node(f"wrong {n}", False, f"reason {n}") for n in range(6))
    tree = Node("", True, children=(*children, Node("right", True)))
    for trials in (2, 3, 7, 20):
        text = text_of(tree, trials=trials)
        assert text.count("That is wrong") == min(trials - 1, 6) and text.endswith("\nright")
    with pytest.raises(Unusable, match="no_detour"):
        text_of(tree, trials=1)


def test_every_wrong_turn_is_as_likely() -> None:
    children = tuple(Node(f"wrong {n}", False, "no") for n in range(4))
    tree = Node("", True, children=(*children, Node("right", True)))
    first = Counter(journey(tree, generator(seed))[0].text for seed in range(400))
    assert sum((count - 100) ** 2 / 100 for count in first.values()) < 16.3  # 3 degrees, p = 0.001
    assert len(first) == 4


def test_wrong_turns_without_a_reason_are_not_shown_unless_reasons_never_are() -> None:
    silent = attempts(attempt("a\nx", False), attempt("a\nb", True))
    with pytest.raises(Unusable, match=r"no_detour: .*says why"):
        journey(tree_of(silent), generator())
    assert text_of(tree_of(silent), reasons="none") == "a\nx\nLet me go back.\nb"
    assert "does not follow" not in text_of(tree_of(TASK), reasons="none")


def test_an_attempt_that_nobody_divided_is_one_step_and_one_that_nobody_checked_is_none() -> None:
    task = attempts(
        attempt("3", False, feedback="Too small."), attempt("4", True), attempt("5", None, feedback="?")
    )
    assert text_of(tree_of(task)) == "3\nThat is wrong: Too small. Let me go back.\n4"


def test_a_right_attempt_may_end_where_a_wrong_one_went_on() -> None:
    task = attempts(attempt("a\nb\nc", False, feedback="Too long."), attempt("a\nb", True))
    assert "".join(segment.text for segment in shortcut(tree_of(task), generator())) == "a\nb"


def test_a_search_that_finds_nothing_is_named() -> None:
    with pytest.raises(Unusable, match="no_right_attempt"):
        tree_of(attempts(attempt("3", False)))
    with pytest.raises(Unusable, match="no_right_attempt"):
        shortcut(Node("", True, children=(Node("x", False),)), generator())
