"""Imitation learning from language feedback: a critique, refinements that follow it, and the best of them.

Source: Scheurer et al. 2023, "Training Language Models with Language Feedback at Scale" (arXiv:2303.16755).
The policy learns to give the refinement at once: neither the draft nor the critique stands in what it is
trained on (training on critique and refinement together was worse in the paper).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from corrigible.align.rendering.segments import Lesson, spoken_turns
from corrigible.align.retrieval import Encode, unit_vectors
from corrigible.align.sources import Unusable
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, Rendered, TokenKind, token_logprobs
from corrigible.records import Message
from corrigible.store.signals import Critiqued, Turn

ASK = (
    "{prompt}\n\nHere is an answer:\n{draft}\n\nWhat was said about it:\n{critique}\n\n"
    "Write the answer again so that it follows what was said. Give the new answer only."
)
"""What asks for a refinement."""

WORDINGS = (
    "Does the new answer follow what was said about the old one?",
    "Was everything that the feedback asks for done in the new answer?",
    "Is the new answer one that whoever gave the feedback would accept?",
    "Has the new answer been improved as the feedback says?",
    "Does the feedback no longer apply to the new answer?",
)
"""Questions whose answer is yes for a refinement that follows its critique."""


def refinement(critiqued: Critiqued) -> Lesson:
    """The refined answer to the prompt, as a demonstration.

    Raises:
        Unusable: ``no_refinement`` (nobody wrote one yet), ``unchanged`` (it is the draft).
    """
    if not critiqued.refined:
        raise Unusable(
            "no_refinement",
            "nobody wrote what the critique asks for",
            advice="Sample refinements with refinement_prompt(...) and choose one with refine(...).",
        )
    if _text(critiqued.refined) == _text(critiqued.draft):
        raise Unusable("unchanged", "the refinement is the draft itself")
    return Lesson(
        turns=(*critiqued.prompt, *spoken_turns(critiqued.refined)),
        weight=critiqued.weight,
        group=critiqued.group,
        derived_from=critiqued.derived_from,
    )


def refinement_prompt(critiqued: Critiqued) -> tuple[Message, ...]:
    """What to sample refinements after: the prompt, the draft and the critique in one question.

    Messages before the prompt's last one stay as they are.

    Raises:
        Unusable: ``no_prompt``, ``no_critique``.
    """
    if not critiqued.prompt or not critiqued.critique.strip():
        raise Unusable(
            "no_prompt" if not critiqued.prompt else "no_critique",
            "there is nothing to answer again" if not critiqued.prompt else "the critique says nothing",
        )
    *earlier, last = critiqued.prompt
    words = {"prompt": last.text, "draft": _text(critiqued.draft), "critique": critiqued.critique.strip()}
    # In one go: a text may hold another one's name in braces.
    text = re.sub(r"\{(prompt|draft|critique)\}", lambda match: words[match[1]], ASK)
    return (*earlier, Message(role="user", content=text))


@dataclass(frozen=True)
class Selection:
    """What a selector found.

    Attributes:
        index: of the candidate that follows the critique best; the first of equals.
        probabilities: one of each candidate, as the selector sees it, in [0, 1].
        by: name of the selector. A policy must not be judged by the selector that chose what it learnt.
    """

    index: int
    probabilities: tuple[float, ...]
    by: str


class Selector(Protocol):
    """Chooses among candidates the one that does most of what a critique asks for."""

    def __call__(self, record: Critiqued, candidates: Sequence[str], /) -> Selection: ...


@dataclass(frozen=True)
class YesNo:
    """How probable a model finds "yes" over "no" when asked whether the critique was followed.

    ``P(yes) / (P(yes) + P(no))``, averaged (as a probability) over several wordings of the question.

    Attributes:
        policy: who is asked.
        wordings: of the question.
        answers: yes and no, as the assistant's turn begins with them; each must be one token.
        token_budget: tokens in one forward pass.
    """

    policy: LanguagePolicy
    wordings: tuple[str, ...] = WORDINGS
    answers: tuple[str, str] = ("Yes", "No")
    token_budget: int = 4096

    def __post_init__(self) -> None:
        if not self.wordings:
            raise BadInputError("A yes-or-no selector needs a question.", advice="Give at least one wording.")
        self.answer_ids()

    def answer_ids(self) -> tuple[int, int]:
        """The two answers' token ids.

        Raises:
            BadInputError: ``answer_not_one_token``, or the two are one.
        """
        tokenizer = self.policy.renderer.tokenizer
        yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.answers)
        for text, ids in zip(self.answers, (yes, no), strict=True):
            if len(ids) != 1:
                raise BadInputError(
                    f"answer_not_one_token: {text!r} is {len(ids)} tokens for this tokenizer, so that its "
                    "first one stands for other words as well.",
                    advice="Give answers that are one token each, such as 'Yes' or ' yes'.",
                )
        if yes == no:
            raise BadInputError("Yes and no are the same token.", advice="Give two different answers.")
        return int(yes[0]), int(no[0])

    def __call__(self, record: Critiqued, candidates: Sequence[str], /) -> Selection:
        """Ask about every candidate in every wording."""
        _check(candidates)
        answers = self.answer_ids()
        rows: list[Rendered] = []
        for candidate in candidates:
            for wording in self.wordings:
                prompt = self.policy.renderer.prompt(_question(record, candidate, wording))
                rows += [_answered(prompt, answer) for answer in answers]
        logps = torch.cat(token_logprobs(self.policy, rows, token_budget=self.token_budget)).double()
        logps = logps.view(len(candidates), len(self.wordings), 2)
        return _best(logps.softmax(dim=-1)[..., 0].mean(dim=-1).tolist(), "yes-no")


@dataclass(frozen=True)
class Similarity:
    """How near a candidate is to the critique: the cosine of their sentence vectors.

    Attributes:
        encode: texts to unit vectors.
    """

    encode: Encode

    def __call__(self, record: Critiqued, candidates: Sequence[str], /) -> Selection:
        """Cosines, as ``(1 + cosine) / 2``."""
        _check(candidates)
        vectors = unit_vectors(self.encode, [record.critique, *candidates])
        return _best(((1.0 + vectors[1:] @ vectors[0]) / 2.0).clip(0.0, 1.0).tolist(), "similarity")


@dataclass(frozen=True)
class AtRandom:
    """Any candidate: what a selector must beat.

    Attributes:
        rng: draws.
    """

    rng: np.random.Generator

    def __call__(self, record: Critiqued, candidates: Sequence[str], /) -> Selection:
        """All alike; one is drawn."""
        _check(candidates)
        share = 1.0 / len(candidates)
        return Selection(int(self.rng.integers(len(candidates))), (share,) * len(candidates), "random")


@dataclass(frozen=True)
class Verified:
    """What a check says of each candidate.

    Attributes:
        check: how sure it is that the candidate does what the critique asks for, in [0, 1].
    """

    check: Callable[[Critiqued, str], float]

    def __call__(self, record: Critiqued, candidates: Sequence[str], /) -> Selection:
        """Check every candidate."""
        _check(candidates)
        return _best([float(self.check(record, candidate)) for candidate in candidates], "verifier")


def refine(record: Critiqued, candidates: Sequence[str], selector: Selector) -> tuple[Critiqued, Selection]:
    """The record with the best of some sampled refinements, and how it was chosen.

    Raises:
        BadInputError: no candidates, or one that says nothing.
    """
    selection = selector(record, candidates)
    refined: Turn = (Message(role="assistant", content=candidates[selection.index]),)
    return replace(record, refined=refined), selection


def check_judge(selection: Selection, judge: str) -> None:
    """BadInputError when a policy would be judged by what chose what it learnt: it would score too well."""
    if selection.by == judge:
        raise BadInputError(
            f"judge_is_selector: {judge!r} chose the refinements that the policy learnt from.",
            advice="Judge with another signal.",
        )


def _question(record: Critiqued, candidate: str, wording: str) -> list[Message]:
    text = (
        f"Question:\n{_text(record.prompt)}\n\nOld answer:\n{_text(record.draft)}\n\n"
        f"Feedback:\n{record.critique.strip()}\n\nNew answer:\n{candidate}\n\n{wording} Answer yes or no."
    )
    return [Message(role="user", content=text)]


def _answered(prompt: Rendered, answer: int) -> Rendered:
    return replace(
        prompt, ids=(*prompt.ids, answer), kinds=(*prompt.kinds, TokenKind.NOT_SAMPLED), messages=()
    )


def _best(probabilities: Sequence[float], by: str) -> Selection:
    if not all(math.isfinite(p) and 0.0 <= p <= 1.0 for p in probabilities):
        raise BadInputError(f"The selector {by} gives {list(probabilities)}, which are no probabilities.")
    best = max(range(len(probabilities)), key=lambda i: probabilities[i])
    return Selection(best, tuple(probabilities), by)


def _check(candidates: Sequence[str]) -> None:
    if not candidates or not all(candidate.strip() for candidate in candidates):
        raise BadInputError(
            f"There must be candidates, each with some text, got {list(candidates)!r}.",
            advice="Sample some refinements after refinement_prompt(...).",
        )


def _text(turn: Turn) -> str:
    return "\n\n".join(message.text for message in turn)
