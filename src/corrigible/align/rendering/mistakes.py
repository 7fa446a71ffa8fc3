"""Mistake tuning: right and wrong rationales under a prefix that says which is which.

Source: Tong et al. 2024, "Can LLMs Learn from Previous Mistakes? Investigating LLMs' Errors to Boost for
Reasoning" (arXiv:2403.20046), eq. 1. The paper's sum runs over the question and the prefix as well
(``mask_prompt=False``); by default only the rationale is learnt.
"""

from __future__ import annotations

import re

from corrigible.align.rendering.segments import Lesson, answer_text, spoken_turns
from corrigible.align.rendering.serving import Serving
from corrigible.align.sources import Unusable
from corrigible.store.signals import Attempt, Attempts

RIGHT = "[CORRECT RATIONALE]\n"
WRONG = "[INCORRECT RATIONALE]\n"
"""What a rationale is announced with."""


def mistake_serving(*, right: bool = True) -> Serving:
    """Ask for a right rationale (or, to see what the prefix does, for a wrong one)."""
    return Serving(assistant_prefix=RIGHT if right else WRONG)


def mistakes(attempts: Attempts, *, mask_prompt: bool = True) -> list[Lesson]:
    """Every attempt that was checked, after the prefix that says how it went.

    A wrong rationale that ends in the answer of a right one, word for word the same or by its
    :func:`final_answer`, would teach that the right answer is a mistake, and is left out.

    Args:
        attempts: at one task.
        mask_prompt: learn the rationale alone.

    Raises:
        Unusable: ``unchecked`` (nobody said of any attempt whether it was right), ``empty_completion``.
    """
    checked = [attempt for attempt in attempts.attempts if attempt.right is not None]
    if not checked:
        raise Unusable(
            "unchecked",
            "nobody said whether the attempts are right",
            advice="Check them with a verifier, or record outcomes.",
        )
    serving = {True: mistake_serving(), False: mistake_serving(right=False)}
    right = [answer_text(attempt.response) for attempt in checked if attempt.right]
    lessons: list[Lesson] = []
    for attempt in checked:
        if not attempt.right and reaches(attempt, right):
            continue
        of = serving[bool(attempt.right)]
        lessons.append(
            Lesson(
                turns=(*of.apply(attempts.prompt), *spoken_turns(attempt.response, of.assistant_prefix)),
                weight=attempts.weight,
                group=attempts.group,
                derived_from=attempts.derived_from,
                prompt_weight=0.0 if mask_prompt else 1.0,
            )
        )
    return lessons


def reaches(attempt: Attempt, right: list[str]) -> bool:
    """Whether a wrong attempt ends in the same answer as a right one, or is one."""
    text = answer_text(attempt.response)
    answer = final_answer(text)
    return text in right or (answer is not None and answer in {final_answer(each) for each in right})


_MARKED = re.compile(r"(?:\\boxed\{([^{}]*)\}|####((?:(?!####)[^\n])*))")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?")


def final_answer(text: str) -> str | None:
    """The answer that a worked solution ends with: the last one marked (``####``, ``\\boxed``), else the last
    number; ``None`` when it has neither. Thousands' commas and trailing zeros of a fraction are dropped."""
    marked = [part.strip() for found in _MARKED.findall(text) for part in found if part.strip()]
    if marked:
        return _plain_number(marked[-1].rstrip("."))
    numbers = _NUMBER.findall(text)
    return _plain_number(numbers[-1]) if numbers else None


def _plain_number(text: str) -> str:
    found = _NUMBER.fullmatch(text)
    if not found:
        return text
    plain = text.replace(",", "")
    return plain.rstrip("0").rstrip(".") if "." in plain else plain
