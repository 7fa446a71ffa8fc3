"""Feedback as text: what is written of a judgement for a policy to learn, and how it must be asked then.

- ``segments``: conversations in weighted pieces, and the one compiler from there to tokens.
- ``serving``: the conditioning that training writes and serving must put back; one object does both.
- ``source``: signals through a renderer of feedback to the examples of a source.
- ``hindsight``, ``conditioned``, ``mistakes``, ``goals``: an answer after words that say what it is worth.
- ``trajectories``, ``journey``: several tries at a task as one text.
- ``refinement``: critique to refinement; selectors among refinements.
- ``demonstrations``: solved neighbours before a question.

Every renderer is a pure function from a signal of :mod:`corrigible.store.signals` to :class:`Lesson`; it
knows neither tokenizer nor model.
"""

from corrigible.align.rendering.conditioned import class_conditioned, class_serving
from corrigible.align.rendering.demonstrations import (
    Bank,
    demonstration_turns,
    question_text,
    with_demonstrations,
    within_budget,
)
from corrigible.align.rendering.goals import GoalScale, goal_pairs, goal_serving
from corrigible.align.rendering.hindsight import hindsight, hindsight_of_one, hindsight_serving
from corrigible.align.rendering.journey import Node, journey, journey_lesson, shortcut, tree_of
from corrigible.align.rendering.mistakes import final_answer, mistake_serving, mistakes
from corrigible.align.rendering.refinement import (
    AtRandom,
    Selection,
    Selector,
    Similarity,
    Verified,
    YesNo,
    check_judge,
    refine,
    refinement,
    refinement_prompt,
)
from corrigible.align.rendering.segments import Lesson, Segment, Spoken, spoken_turns, token_example
from corrigible.align.rendering.serving import PLAIN, Serving, serving_of
from corrigible.align.rendering.source import lesson_source, lessons_of
from corrigible.align.rendering.trajectories import (
    Verifier,
    checked,
    error_types,
    lemma,
    rise,
    rise_serving,
)

__all__ = [
    "PLAIN",
    "AtRandom",
    "Bank",
    "GoalScale",
    "Lesson",
    "Node",
    "Segment",
    "Selection",
    "Selector",
    "Serving",
    "Similarity",
    "Spoken",
    "Verified",
    "Verifier",
    "YesNo",
    "check_judge",
    "checked",
    "class_conditioned",
    "class_serving",
    "demonstration_turns",
    "error_types",
    "final_answer",
    "goal_pairs",
    "goal_serving",
    "hindsight",
    "hindsight_of_one",
    "hindsight_serving",
    "journey",
    "journey_lesson",
    "lemma",
    "lesson_source",
    "lessons_of",
    "mistake_serving",
    "mistakes",
    "question_text",
    "refine",
    "refinement",
    "refinement_prompt",
    "rise",
    "rise_serving",
    "serving_of",
    "shortcut",
    "spoken_turns",
    "token_example",
    "tree_of",
    "with_demonstrations",
    "within_budget",
]
