"""Several tries at one task, put together as one text to learn from.

* :func:`lemma`: a wrong try up to its first wrong step, words that turn from it, and a right solution. Pan et
  al. 2025, "LEMMA: Learning from Errors for MatheMatical Advancement in LLMs" (arXiv:2503.17439).
* :func:`rise`: the conversation in which a better answer follows worse ones. Qu et al. 2024, "Recursive
  Introspection: Teaching Language Model Agents How to Self-Improve" (arXiv:2407.18219).

A search through a tree of steps is in :mod:`corrigible.align.rendering.journey`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import numpy as np

from corrigible.align.rendering.mistakes import reaches
from corrigible.align.rendering.segments import Lesson, Segment, Spoken, answer_text, spoken_turns
from corrigible.align.rendering.serving import Serving
from corrigible.align.sources import Unusable
from corrigible.store.signals import Attempt, Attempts

Verifier = Callable[[str], int]
"""From an answer's text to 1 (right), 0 (wrong) or -1 (no answer can be read)."""


def checked(attempts: Attempts, verify: Verifier) -> Attempts:
    """The attempts with ``right`` as a verifier says; ``None`` where it can read no answer."""
    verdicts = {1: True, 0: False, -1: None}
    return replace(
        attempts,
        attempts=tuple(
            replace(each, right=verdicts[verify(answer_text(each.response))]) for each in attempts.attempts
        ),
    )


# -- LEMMA --------------------------------------------------------------------------------------

Mode = Literal["fix", "restart", "both"]
"""After a mistake: repair the step and go on, begin afresh, or one text of each."""

FIX = (
    "Wait, that step is wrong. Let me correct it.",
    "Hold on, there is a mistake in the last step. It should be:",
    "Let me check that step again. It is not right; here is the correct one.",
    "Hmm, the last step does not hold. Correcting it:",
    "Actually, I made an error just now. The step should read:",
    "That cannot be right. Let me redo the last step.",
    "On reflection, the previous step is mistaken. Fixing it:",
)
"""Transition phrases before a repaired step."""

RESTART = (
    "Wait, this approach went wrong. Let me start over.",
    "I made a mistake above. Let me solve it again from the beginning.",
    "This is not leading to the right answer. Starting afresh:",
    "Hold on, I have gone astray. Let me begin again.",
    "Let me step back and try this another way.",
    "On reflection, the reasoning above is flawed. Here is a new attempt.",
)
"""Transition phrases before a new solution."""


def lemma(
    attempts: Attempts,
    rng: np.random.Generator,
    *,
    mode: Mode = "both",
    mistake_weight: float = 1.0,
    truncate: bool = True,
) -> list[Lesson]:
    """Each wrong attempt up to its first wrong step, a transition phrase, and a right way on.

    To *fix* needs a right attempt with the same steps before the wrong one: it goes on from there. To
    *restart* needs any right attempt. The right attempt is the first one made after the mistake, or else
    the first of all. Only right attempts end a text.

    Args:
        attempts: at one task, with ``steps`` and ``first_wrong`` for the wrong ones.
        rng: draws the phrases, uniformly.
        mode: which ways on; with ``both``, those that there are.
        mistake_weight: of each token of the wrong attempt: 1 as in the paper, 0 to show the mistake
            without learning to make it.
        truncate: stop after the first wrong step; otherwise the whole wrong attempt is shown.

    Raises:
        Unusable: ``no_right_attempt``, ``no_mistake`` (no wrong attempt whose first wrong step is known),
            ``no_fix`` (with ``mode="fix"``, no right attempt begins like a wrong one).
    """
    right = [(i, each) for i, each in enumerate(attempts.attempts) if each.right]
    if not right:
        raise Unusable("no_right_attempt", "no attempt at the task is right, so there is no way on")
    texts = [answer_text(each.response) for _, each in right]
    wrong = [
        (i, each)
        for i, each in enumerate(attempts.attempts)
        if each.right is False and not reaches(each, texts) and (not truncate or _has_first_wrong(each))
    ]
    if not wrong:
        raise Unusable(
            "no_mistake",
            "no wrong attempt says which of its steps is the first wrong one",
            advice="Label steps, or set truncate to false.",
        )
    lessons: list[Lesson] = []
    for place, mistake in wrong:
        in_order = [each for i, each in right if i > place] + [each for i, each in right if i < place]
        shown = _through(mistake, mistake.first_wrong) if truncate else answer_text(mistake.response)
        ways = []
        if mode != "restart" and (fixed := _fix(mistake, in_order)):
            ways.append((str(rng.choice(FIX)), fixed))
        if mode != "fix":
            ways.append((str(rng.choice(RESTART)), answer_text(in_order[0].response)))
        for phrase, way in ways:
            segments = (
                Segment(shown.rstrip("\n"), mistake_weight, kind="mistake"),
                Segment(f"\n{phrase}\n", kind="transition"),
                Segment(way.lstrip("\n")),
            )
            lessons.append(
                Lesson(
                    turns=(*attempts.prompt, Spoken(segments)),
                    weight=attempts.weight,
                    group=attempts.group,
                    derived_from=attempts.derived_from,
                )
            )
    if not lessons:
        raise Unusable("no_fix", "no right attempt begins like a wrong one", advice="Set mode to restart.")
    return lessons


def error_types(attempts: Iterable[Attempts]) -> dict[str, float]:
    """How often each type of mistake was made, as shares: what injected mistakes should be drawn from.

    Empty when no mistake has a type.
    """
    found = Counter(
        each.error for task in attempts for each in task.attempts if each.right is False and each.error
    )
    return {name: count / found.total() for name, count in found.most_common()}


def _has_first_wrong(attempt: Attempt) -> bool:
    return attempt.first_wrong is not None and 0 <= attempt.first_wrong < len(attempt.steps)


def _ends(attempt: Attempt) -> list[int] | None:
    """Where each step ends in the attempt's text; ``None`` when the text is not made of the steps."""
    text, position = answer_text(attempt.response), 0
    ends: list[int] = []
    for step in attempt.steps:
        start = text.find(step, position)
        if start < 0:
            return None
        position = start + len(step)
        ends.append(position)
    return ends


def _through(attempt: Attempt, step: int | None) -> str:
    """An attempt's text up to and with a step."""
    assert step is not None
    ends = _ends(attempt)
    if ends is None:
        return "\n".join(attempt.steps[: step + 1])
    return answer_text(attempt.response)[: ends[step]]


def _fix(mistake: Attempt, right: list[Attempt]) -> str:
    """How the first right attempt that begins like ``mistake`` goes on from its wrong step; else nothing."""
    if not _has_first_wrong(mistake):
        return ""
    at = mistake.first_wrong or 0
    for each in right:
        if len(each.steps) <= at or each.steps[:at] != mistake.steps[:at]:
            continue
        ends = _ends(each)
        if ends is None:
            return "\n".join(each.steps[at:])
        return answer_text(each.response)[ends[at - 1] if at else 0 :]
    return ""


# -- RISE ---------------------------------------------------------------------------------------

Keep = Literal["all", "better", "best", "success"]
"""Which answers are learnt: all, those better than all before them (the first one when it is right), those
as good as the best of the task, or right ones."""

RETRY = "The answer is incorrect. Please try again. Here's the question: {question}"
"""What is said after every answer but the last, in training and in use, whatever the answer was."""


def rise_serving(*, retry: str = RETRY, turns: int = 5, context_turns: int = 2) -> Serving:
    """Ask again and again, always saying that the answer is wrong; a majority of the answers decides."""
    return Serving(retry=retry, turns=turns, context_turns=context_turns)


def rise(
    attempts: Attempts,
    *,
    keep: Keep = "better",
    temperature: float = 0.4,
    serving: Serving | None = None,
) -> list[Lesson]:
    """Each answer after the answers before it; only the last turn is learnt, with weight ``e^(r/tau)``.

    The reward ``r`` is 1 for a right answer, 0 for a wrong one, -1 for one that cannot be read
    (``right=None``). An answer that was given before is left out, and so is what came after the first
    right one. What is said between answers is what serving says, not what the records say: the policy is
    told "incorrect" when it is used, and must know no more in training.

    Args:
        attempts: at one task, in the order they were made.
        keep: which answers are learnt.
        temperature: ``tau``.
        serving: says what stands between answers and how many stay in sight; :func:`rise_serving`'s.

    Raises:
        Unusable: ``nothing_kept`` (no answer passes the filter), ``empty_completion``.
    """
    serving = serving or rise_serving()
    visited: list[Attempt] = []
    for attempt in attempts.attempts:
        if all(answer_text(attempt.response) != answer_text(each.response) for each in visited):
            visited.append(attempt)
        if attempt.right:
            break
    rewards = [_reward(attempt) for attempt in visited]
    lessons: list[Lesson] = []
    for turn, (attempt, reward) in enumerate(zip(visited, rewards, strict=True)):
        kept = {
            "all": True,
            "better": reward > max(rewards[:turn], default=0.0),
            "best": reward == max(rewards),
            "success": reward == 1.0,
        }
        if not kept[keep]:
            continue
        earlier = [answer_text(each.response) for each in visited[:turn]]
        lessons.append(
            Lesson(
                turns=(*serving.again(attempts.prompt, earlier), *spoken_turns(attempt.response)),
                weight=attempts.weight * math.exp(reward / temperature),
                group=attempts.group,
                derived_from=attempts.derived_from,
                per_token=False,
            )
        )
    if not lessons:
        raise Unusable("nothing_kept", f"none of {len(visited)} answers is kept by keep={keep!r}")
    return lessons


def _reward(attempt: Attempt) -> float:
    return -1.0 if attempt.right is None else float(attempt.right)
