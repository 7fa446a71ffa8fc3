"""Algorithms that learn from several tries at one task, written out as text.

The loss is the weighted cross-entropy of :mod:`corrigible.align.imitation`. They differ in what they make of
a mistake: something to be told apart, to be turned from, or to be answered again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from corrigible.align.imitation import imitate, token_totals
from corrigible.align.losses import LossOutput
from corrigible.align.registry import AlgorithmConfig, ScoredExamples, algorithm
from corrigible.align.rendering.journey import Reasons, journey, journey_lesson, shortcut, tree_of
from corrigible.align.rendering.mistakes import WRONG, mistake_serving, mistakes
from corrigible.align.rendering.segments import Lesson
from corrigible.align.rendering.serving import Serving
from corrigible.align.rendering.source import lesson_source, taught
from corrigible.align.rendering.trajectories import Keep, Mode, lemma, rise, rise_serving
from corrigible.align.tokens import TokenExample, TokenSource
from corrigible.events import Alert, emit
from corrigible.models import Renderer
from corrigible.records import Episode
from corrigible.store.conversions import kinds_for
from corrigible.store.signals import Attempts


class MistakeConfig(AlgorithmConfig):
    """Settings of mistake tuning."""

    mask_prompt: bool = Field(
        True, description="Learn the rationale alone; otherwise the question as well, as in the paper."
    )


def _mistake_source(
    signals: Sequence[Attempts],
    renderer: Renderer,
    config: MistakeConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Literal["raise", "skip"],
    episodes: Mapping[str, Episode],
) -> TokenSource:
    wrong, every = 0, 0

    def teach(attempts: Attempts, rng: np.random.Generator) -> list[Lesson]:
        nonlocal wrong, every
        lessons = mistakes(attempts, mask_prompt=config.mask_prompt)
        wrong += sum(spoken.given == WRONG for lesson in lessons for spoken in lesson.spoken)
        every += len(lessons)
        return lessons

    source = lesson_source(
        signals, teach, renderer, noun="task", max_length=max_length, seed=seed, invalid=invalid
    )
    if 2 * wrong > every:
        emit(
            Alert(
                name="mostly_mistakes",
                message=f"{wrong} of {every} rationales are wrong ones: with more than half, the policy gets "
                "worse at right ones.",
            )
        )
    return source


@algorithm(
    "mistake-tuning",
    source="tokens",
    signal="attempts",
    weight="judgement",
    config=MistakeConfig,
    learns_from=kinds_for("attempts"),
    paper="Tong et al. 2024, Can LLMs Learn from Previous Mistakes? (arXiv:2403.20046)",
    needs_reference=False,
    measure=token_totals,
    make_source=_mistake_source,
    family="rendered",
    claim="S142",
    serving=lambda config: mistake_serving(),
)
def mistake_tuning(batch: ScoredExamples[TokenExample], config: MistakeConfig) -> LossOutput:
    """Mistake tuning: right and wrong rationales, each after a prefix that says which it is.

    Choose it when a policy's own wrong attempts are at hand besides right ones (rejected solutions, the text
    before a correction) and their steps are not labelled; with step labels take lemma. Keep mistakes to at
    most half of the data. The prefix of right rationales must stand before every answer in use.
    """
    return imitate(batch, normaliser="tokens")


class LemmaConfig(AlgorithmConfig):
    """Settings of LEMMA."""

    mode: Mode = Field(
        "both", description="After a mistake: repair the step and go on, begin afresh, or a text of each."
    )
    mistake_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of the mistake's tokens: 0 shows mistakes without learning to make them.",
    )
    truncate: bool = Field(
        True, description="Show a wrong attempt up to its first wrong step only (this needs step labels)."
    )


def _lemma(attempts: Attempts, rng: np.random.Generator, config: LemmaConfig) -> list[Lesson]:
    return lemma(
        attempts,
        rng,
        mode=config.mode,
        mistake_weight=config.mistake_weight,
        truncate=config.truncate,
    )


@algorithm(
    "lemma",
    source="tokens",
    signal="attempts",
    weight="judgement",
    config=LemmaConfig,
    learns_from=kinds_for("attempts"),
    paper="Pan et al. 2025, LEMMA: Learning from Errors for MatheMatical Advancement in LLMs "
    "(arXiv:2503.17439)",
    needs_reference=False,
    measure=token_totals,
    make_source=taught("task", _lemma),
    family="rendered",
    claim="S143",
)
def lemma_sft(batch: ScoredExamples[TokenExample], config: LemmaConfig) -> LossOutput:
    """Error-corrective trajectories: a mistake, words that turn from it, and the right way on, as one answer.

    Choose it when wrong attempts have their first wrong step labelled and each task has a right attempt,
    and the policy should notice its own mistakes while it answers. Nothing needs to be put before prompts.
    """
    return imitate(batch, normaliser="tokens")


class JourneyConfig(AlgorithmConfig):
    """Settings of journey learning."""

    form: Literal["journey", "shortcut"] = Field(
        "journey", description="The whole search, or its right steps alone (what it is compared with)."
    )
    trials: int = Field(
        2, ge=1, description="Steps tried at each point, the right one included; bounds the length."
    )
    reasons: Reasons = Field(
        "needed",
        description="'needed' shows only wrong turns that say why they are wrong; 'none' shows all, and why "
        "never.",
    )
    mistake_weight: float = Field(1.0, ge=0, description="Weight of the tokens of wrong turns.")


def _journey(attempts: Attempts, rng: np.random.Generator, config: JourneyConfig) -> list[Lesson]:
    tree = tree_of(attempts)
    if config.form == "shortcut":
        return [journey_lesson(attempts, shortcut(tree, rng))]
    segments = journey(
        tree, rng, trials=config.trials, reasons=config.reasons, mistake_weight=config.mistake_weight
    )
    return [journey_lesson(attempts, segments)]


@algorithm(
    "journey",
    source="tokens",
    signal="attempts",
    weight="judgement",
    config=JourneyConfig,
    learns_from=kinds_for("attempts"),
    paper="Qin et al. 2024, O1 Replication Journey: A Strategic Progress Report - Part 1 (arXiv:2410.18982)",
    needs_reference=False,
    measure=token_totals,
    make_source=taught("task", _journey),
    family="rendered",
    claim="S135",
)
def journey_sft(batch: ScoredExamples[TokenExample], config: JourneyConfig) -> LossOutput:
    """Journey learning: the whole search as one answer, wrong turns, reasons and ways back included.

    Choose it for tasks that are searched (several attempts in steps, with what was wrong with each), when
    answers may be long: compare it with others at equal numbers of generated tokens.
    """
    return imitate(batch, normaliser="tokens")


class RiseConfig(AlgorithmConfig):
    """Settings of recursive introspection."""

    keep: Keep = Field(
        "better",
        description="Which answers are learnt: all, those better than all before, those as good as the "
        "task's best, or right ones.",
    )
    temperature: float = Field(
        0.4, gt=0, description="tau of the weight exp(r / tau), r = 1 right, 0 wrong, -1 unreadable."
    )
    turns: int = Field(5, ge=1, description="How many answers are asked for when the policy is used.")
    context_turns: int = Field(
        2, ge=0, description="How many of the latest answers stay in sight, in training and use; 0 is all."
    )


def _rise_serving(config: RiseConfig) -> Serving:
    return rise_serving(turns=config.turns, context_turns=config.context_turns)


def _rise(attempts: Attempts, rng: np.random.Generator, config: RiseConfig) -> list[Lesson]:
    return rise(attempts, keep=config.keep, temperature=config.temperature, serving=_rise_serving(config))


@algorithm(
    "rise",
    source="tokens",
    signal="attempts",
    weight="exp(reward / tau)",
    config=RiseConfig,
    learns_from=kinds_for("attempts"),
    paper="Qu et al. 2024, Recursive Introspection: Teaching Language Model Agents How to Self-Improve "
    "(arXiv:2407.18219)",
    needs_reference=False,
    measure=token_totals,
    make_source=taught("task", _rise),
    family="rendered",
    claim="S147",
    serving=_rise_serving,
)
def rise_sft(batch: ScoredExamples[TokenExample], config: RiseConfig) -> LossOutput:
    """Recursive introspection: learn the better answer that follows worse ones, weighted by how good it is.

    Choose it when tasks can be checked and the policy may answer several times: it is trained to improve on
    its own answers when told, rightly or not, that they are wrong. Collect again with the new policy
    after each round. Each answer counts by its weight, whatever its length, over the sum of weights.
    """
    return imitate(batch, normaliser="weights")
