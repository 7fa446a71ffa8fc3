"""Algorithms that learn from feedback written out as text.

They share one loss, the weighted cross-entropy of :mod:`corrigible.align.imitation`, and differ in what is
written and in what serving must put before a prompt afterwards (:mod:`corrigible.align.rendering`).
Reward-augmented DPO writes the goal into prompts and then is DPO. Those that learn from several tries at one
task are in :mod:`corrigible.align.attempted`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from corrigible.align.corruptors import PastTokens, replacements
from corrigible.align.imitation import imitate, token_totals
from corrigible.align.losses import LossOutput
from corrigible.align.registry import (
    PAIR_KINDS,
    AlgorithmConfig,
    DPOConfig,
    ScoredExamples,
    algorithm,
    dpo,
)
from corrigible.align.rendering.conditioned import class_conditioned, class_serving
from corrigible.align.rendering.demonstrations import Bank, with_demonstrations, within_budget
from corrigible.align.rendering.goals import Choice, GoalScale, goal_pairs, goal_serving
from corrigible.align.rendering.hindsight import FORMS, PHRASINGS, Placement, hindsight, hindsight_serving
from corrigible.align.rendering.refinement import refinement
from corrigible.align.rendering.segments import Lesson
from corrigible.align.rendering.serving import Serving
from corrigible.align.rendering.source import lesson_source, said_of, taught
from corrigible.align.retrieval import Encode, encode_words
from corrigible.align.sources import PairExample, PairSource, Unusable, render_all
from corrigible.align.tokens import TokenExample, TokenSource
from corrigible.errors import BadInputError
from corrigible.events import Alert, emit
from corrigible.models import Renderer, load_encoder
from corrigible.records import Episode
from corrigible.store import Pair
from corrigible.store.conversions import kinds_for
from corrigible.store.signals import Demonstrated, Ranked, Turn

Invalid = Literal["raise", "skip"]


# -- chain of hindsight -------------------------------------------------------------------------


class HindsightConfig(AlgorithmConfig):
    """Settings of chain of hindsight."""

    chains: bool = Field(
        True, description="Also show both answers of a pair one after the other, in both orders."
    )
    phrasings: int = Field(
        1,
        ge=1,
        le=len(PHRASINGS),
        description="How many ways of saying 'a helpful answer' are used; serving uses the first.",
    )
    placement: Placement = Field(
        "assistant",
        description="Who says the marker. With chains, 'assistant' needs a chat template in which the "
        "assistant may speak twice in a row; 'user' works with all.",
    )
    past_mask: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Up to this share of an answer's tokens is read as random ones, so that an earlier "
        "answer is not just copied.",
    )


def _hindsight_source(
    signals: Sequence[Pair],
    renderer: Renderer,
    config: HindsightConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Invalid,
    episodes: Mapping[str, Episode],
) -> TokenSource:
    def teach(pair: Pair, rng: np.random.Generator) -> list[Lesson]:
        phrasing = int(rng.integers(config.phrasings))
        forms = FORMS if config.chains else FORMS[:2]
        return hindsight(pair, forms=forms, phrasing=phrasing, placement=config.placement)

    corruptor = None
    if config.past_mask:
        corruptor = PastTokens(config.past_mask, replacements(renderer), frozenset(renderer.special_ids))
    return lesson_source(
        signals,
        teach,
        renderer,
        noun="comparison",
        max_length=max_length,
        seed=seed,
        invalid=invalid,
        corruptor=corruptor,
    )


@algorithm(
    "coh",
    source="tokens",
    signal="pairs",
    weight="judgement",
    config=HindsightConfig,
    learns_from=PAIR_KINDS,
    paper="Liu, Sferrazza and Abbeel 2023, Chain of Hindsight Aligns Language Models with Feedback "
    "(arXiv:2302.02676)",
    needs_reference=False,
    measure=token_totals,
    make_source=_hindsight_source,
    family="rendered",
    claim="S060",
    serving=lambda config: hindsight_serving(config.placement),
)
def coh(batch: ScoredExamples[TokenExample], config: HindsightConfig) -> LossOutput:
    """Chain of hindsight: learn good and bad answers alike, each after words that say which it is.

    Choose it when the policy should also know what a bad answer looks like and be steerable by words, and
    when no reference model fits into memory. It needs pairs; the marker must stand before every answer
    when the policy is used. DPO usually prefers more sharply.
    """
    return imitate(batch, normaliser="tokens")


# -- class-conditioned --------------------------------------------------------------------------


class ClassConfig(AlgorithmConfig):
    """Settings of class-conditioned fine-tuning."""

    best: str = Field("expert", min_length=1, description="The class of demonstrations that is served.")
    other_weight: float = Field(
        0.1, gt=0, le=1, description="What demonstrations of every other class weigh; the best weighs 1."
    )
    per_answer: bool = Field(
        False, description="Count answers rather than tokens, so that long ones do not count more."
    )


def _class_source(
    signals: Sequence[Demonstrated],
    renderer: Renderer,
    config: ClassConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Invalid,
    episodes: Mapping[str, Episode],
) -> TokenSource:
    classes = Counter(each.quality for each in signals if each.quality.strip())
    listed = ", ".join(f"{name} {count}" for name, count in classes.most_common()) or "none is named"
    if signals and config.best not in classes:
        raise BadInputError(
            f"best_class_missing: no demonstration is of the class {config.best!r}, which would be served "
            f"({listed}).",
            advice="Set best to a class that is there, or use sft, which needs none.",
        )
    if len(classes) == 1:
        emit(
            Alert(
                name="one_class",
                message=f"All demonstrations are of one class ({listed}): this is sft under a prefix.",
            )
        )

    def teach(one: Demonstrated, rng: np.random.Generator) -> list[Lesson]:
        return [
            class_conditioned(
                one, best=config.best, other_weight=config.other_weight, per_token=not config.per_answer
            )
        ]

    return lesson_source(
        signals,
        teach,
        renderer,
        noun="demonstration",
        max_length=max_length,
        seed=seed,
        invalid=invalid,
    )


@algorithm(
    "c-rlft",
    source="tokens",
    signal="demonstrations",
    weight="class of the source",
    config=ClassConfig,
    learns_from=kinds_for("demonstrations"),
    paper="Wang et al. 2023, OpenChat: Advancing Open-source Language Models with Mixed-Quality Data "
    "(arXiv:2309.11235)",
    needs_reference=False,
    measure=token_totals,
    make_source=_class_source,
    family="rendered",
    claim="S155",
    serving=lambda config: class_serving(config.best),
)
def c_rlft(batch: ScoredExamples[TokenExample], config: ClassConfig) -> LossOutput:
    """Class-conditioned fine-tuning: say where an answer comes from, weigh it by that, serve the best class.

    Choose it when demonstrations come from sources of different quality and nobody compared them answer by
    answer: a little from experts, much from elsewhere. The condition must stand in every turn when the
    policy is used. The loss is divided by the sum of weights, so that their scale does not change the step.
    """
    return imitate(batch, normaliser="weights")


# -- refinements and demonstrations -------------------------------------------------------------


class RefinementConfig(AlgorithmConfig):
    """Imitation learning from language feedback has no settings: refinements are chosen before."""


@algorithm(
    "ilf",
    source="tokens",
    signal="critiqued",
    weight="judgement",
    config=RefinementConfig,
    learns_from=kinds_for("critiqued"),
    paper="Scheurer et al. 2023, Training Language Models with Language Feedback at Scale (arXiv:2303.16755)",
    needs_reference=False,
    measure=token_totals,
    make_source=taught("critique", lambda one, rng, config: [refinement(one)]),
    family="rendered",
    claim="S076",
)
def ilf(batch: ScoredExamples[TokenExample], config: RefinementConfig) -> LossOutput:
    """Imitation learning from language feedback: learn to give at once the answer that a critique led to.

    Choose it when people say in words what is wrong. Critiques that nobody acted on need refinements first:
    sample some after ``refinement_prompt`` and keep the best by a selector
    (:mod:`corrigible.align.rendering.refinement`), which must not be the judge of the policy afterwards.
    """
    return imitate(batch, normaliser="tokens")


class RetrievalConfig(AlgorithmConfig):
    """Settings of training with retrieved demonstrations."""

    demonstrations: int = Field(4, ge=1, description="How many neighbours stand before each question.")
    encoder: Literal["minilm", "words"] = Field(
        "minilm", description="What finds neighbours: a sentence encoder, or hashed words (no model)."
    )
    shuffle: bool = Field(
        True, description="Put neighbours into random order; otherwise the nearest stands last."
    )
    duplicates_above: float = Field(
        0.95, gt=0, le=1, description="Cosine above which a question is taken for the same one."
    )


@dataclass(frozen=True)
class _Neighboured:
    one: Demonstrated
    neighbours: list[Demonstrated]

    @property
    def prompt(self) -> Turn:
        return self.one.prompt

    @property
    def derived_from(self) -> tuple[str, ...]:
        return self.one.derived_from


ENCODERS: dict[str, Callable[[], Encode]] = {
    "minilm": lambda: load_encoder("minilm").encode,
    "words": lambda: encode_words,
}
"""What finds neighbours, loaded when it is asked for."""


def _retrieval_source(
    signals: Sequence[Demonstrated],
    renderer: Renderer,
    config: RetrievalConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Invalid,
    episodes: Mapping[str, Episode],
) -> TokenSource:
    bank = Bank.of(signals, ENCODERS[config.encoder](), duplicates_above=config.duplicates_above)
    asked = [
        _Neighboured(one, near)
        for one, near in zip(signals, bank.neighbours(config.demonstrations), strict=True)
    ]

    def teach(each: _Neighboured, rng: np.random.Generator) -> list[Lesson]:
        near = each.neighbours
        if near:
            try:
                near = within_budget(near, (*each.one.prompt, *each.one.response), renderer, max_length)
            except BadInputError as error:
                raise Unusable("not_renderable", error.message) from error
            if not near:
                raise Unusable(
                    "too_long", f"no demonstration fits before the question into {max_length} tokens"
                )
        return [with_demonstrations(each.one, near, rng if config.shuffle else None)]

    return lesson_source(
        asked, teach, renderer, noun="demonstration", max_length=max_length, seed=seed, invalid=invalid
    )


@algorithm(
    "demonstration-retrieval",
    source="tokens",
    signal="demonstrations",
    weight="judgement",
    config=RetrievalConfig,
    learns_from=kinds_for("demonstrations"),
    paper="Mueller et al. 2023, Meta-training with Demonstration Retrieval for Efficient Few-shot Learning "
    "(arXiv:2307.00119)",
    needs_reference=False,
    measure=token_totals,
    make_source=_retrieval_source,
    family="rendered",
    claim="S148",
    serving=lambda config: Serving(demonstrations=config.demonstrations),
)
def demonstration_retrieval(batch: ScoredExamples[TokenExample], config: RetrievalConfig) -> LossOutput:
    """Learn to answer after the nearest solved questions: a bank of them then changes without training.

    Choose it for many small tasks, few examples each, and a policy too small to know them by heart. The bank
    must be looked up in use as it is in training (``Bank.near``); ``max_length`` must hold the neighbours, of
    which the farthest are left out first.
    """
    return imitate(batch, normaliser="tokens")


# -- goals --------------------------------------------------------------------------------------


class GoalConfig(AlgorithmConfig):
    """Settings of reward-augmented DPO."""

    beta: float = Field(
        0.01, gt=0, description="KL coefficient: small lets the policy move far, large keeps it near."
    )
    lowest: float = Field(1.0, description="The goal that the least score becomes.")
    highest: float = Field(10.0, description="The goal that the greatest score becomes; serving asks for it.")
    choice: Choice = Field(
        "best_worst", description="Which pairs of a ranking: best against worst, or all with unequal scores."
    )


def _goal_source(
    signals: Sequence[Ranked],
    renderer: Renderer,
    config: GoalConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Invalid,
    episodes: Mapping[str, Episode],
) -> PairSource:
    scale = GoalScale.of(signals, config.lowest, config.highest)

    found = render_all(
        list(signals),
        lambda ranked: said_of(ranked, lambda: goal_pairs(ranked, scale, choice=config.choice)),
        noun="ranking",
        invalid=invalid,
    )
    pairs = [pair for made in found.examples for pair in made]
    source = PairSource(pairs, renderer, max_length=max_length, seed=seed, invalid=invalid)
    source.skipped.update(found.skipped)
    return source


@algorithm(
    "reward-augmented-dpo",
    source="pairs",
    signal="ranked",
    weight="judgement",
    config=GoalConfig,
    learns_from=kinds_for("ranked"),
    paper="Zhang et al. 2024, Reward-Augmented Data Enhances Direct Preference Alignment of LLMs "
    "(arXiv:2410.08067)",
    make_source=_goal_source,
    family="rendered",
    claim="S169",
    serving=lambda config: goal_serving(config.highest, config.highest),
)
def reward_augmented_dpo(batch: ScoredExamples[PairExample], config: GoalConfig) -> LossOutput:
    """DPO with the score to reach in the prompt: each answer of a pair wins when its own score is asked for.

    Choose it when answers have scores, not only an order: what is worth copying in a good second answer is
    then not unlearnt, and the policy can be asked for a quality. Serving asks for the best score.
    """
    return dpo(batch, DPOConfig(beta=config.beta))
