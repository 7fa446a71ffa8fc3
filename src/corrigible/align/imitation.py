"""Algorithms that imitate demonstrations token by token.

They share one source (:mod:`corrigible.align.tokens`) and one loss (:mod:`corrigible.align.token_loss`), and
differ in what a token costs, in what it weighs, and in what is read before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from corrigible.align.corruptors import Corruptor, MaskedThought, Replacement, replacements
from corrigible.align.losses import LossOutput
from corrigible.align.registry import AlgorithmConfig, MakeSource, ScoredExamples, algorithm
from corrigible.align.token_loss import Normaliser, TokenTotals, token_loss
from corrigible.align.tokens import Spans, TokenExample, TokenSource, demonstration_source
from corrigible.events import Alert, emit
from corrigible.models import Renderer
from corrigible.records import Episode
from corrigible.store.signals import Demonstrated

DIVISOR = (
    "What the sum over tokens is divided by: their weights (a weighted mean), their number, or the number "
    "of sequences (long answers count more)."
)


def whole_weights(example: TokenExample, unwanted: float = 1.0) -> list[float]:
    """What each scored token of an example counts, the example's own weight included.

    Args:
        example: with its weights.
        unwanted: what weights below 0 are multiplied by.
    """
    return [example.weight * w * (unwanted if w < 0.0 else 1.0) for w in example.token_weights]


def token_totals(batch: ScoredExamples[TokenExample], config: AlgorithmConfig) -> TokenTotals:
    """What a whole batch holds, for its micro-batches to divide by."""
    return TokenTotals.of(whole_weights(example) for example in batch.examples)


def imitate(batch: ScoredExamples[TokenExample], *, unwanted: float = 1.0, **options: Any) -> LossOutput:
    """:func:`~corrigible.align.token_loss.token_loss` of scored examples whose ``whole`` is their totals.

    Args:
        batch: what was scored.
        unwanted: what weights below 0 are multiplied by.
        options: kernel, normaliser and their settings.
    """
    logprobs = torch.cat(list(batch.policy))
    weights = [w for example in batch.examples for w in whole_weights(example, unwanted)]
    asked = batch.asked

    def column(rows: Sequence[torch.Tensor] | None) -> torch.Tensor | None:
        return None if rows is None else torch.cat(list(rows))

    return token_loss(
        logprobs,
        torch.tensor(weights, dtype=logprobs.dtype, device=logprobs.device),
        expected=column(asked.expected if asked else None),
        sampling_logprobs=column(asked.sampling_logprobs if asked else None),
        entropy=column(asked.entropies if asked else None),
        totals=batch.whole,
        **options,
    )


def from_demonstrations(spans: Spans) -> MakeSource:
    """How an algorithm makes its source of demonstrations whose spans mean this.

    The algorithm's settings may have ``quality_weights`` and ``corruptor(renderer)``.
    """

    def make(
        signals: Sequence[Demonstrated],
        renderer: Renderer,
        config: Any,
        /,
        *,
        max_length: int,
        seed: int,
        invalid: Literal["raise", "skip"],
        episodes: Mapping[str, Episode],
    ) -> TokenSource:
        corruptor = getattr(config, "corruptor", None)
        source = demonstration_source(
            signals,
            renderer,
            max_length=max_length,
            seed=seed,
            invalid=invalid,
            episodes=episodes,
            spans=spans,
            quality_weights=getattr(config, "quality_weights", None),
            corruptor=None if corruptor is None else corruptor(renderer),
        )
        if spans == "signed" and all(w > 0.0 for one in source.examples for w in one.token_weights):
            emit(
                Alert(
                    name="nothing_unwanted",
                    message="No span of a demonstration has a weight below 0, so nothing is pushed down: "
                    "this is plain imitation.",
                )
            )
        return source

    return make


# -- maximum likelihood ---------------------------------------------------------------------------


class SFTConfig(AlgorithmConfig):
    """Settings of supervised fine-tuning."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability that the target gives away to all tokens alike; 0.1 is usual.",
    )
    log_entropy: bool = Field(False, description="Also log the entropy of the policy; costs a little time.")

    @property
    def expected_at(self) -> float | None:
        """Smoothing asks for the mean log-prob of the whole vocabulary."""
        return math.inf if self.label_smoothing else None

    @property
    def asks_entropy(self) -> bool:
        """Only to log it."""
        return self.log_entropy


@algorithm(
    "sft",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement",
    config=SFTConfig,
    paper="Ouyang et al. 2022, Training language models to follow instructions (arXiv:2203.02155), step 1; "
    "label smoothing: Szegedy et al. 2016 (arXiv:1512.00567)",
    needs_reference=False,
    measure=token_totals,
    make_source=from_demonstrations("keep"),
)
def sft(batch: ScoredExamples[TokenExample], config: SFTConfig) -> LossOutput:
    """Supervised fine-tuning: raise the probability of demonstrated responses, token by token.

    Choose it first when there are responses to imitate and no comparisons, and before any method that
    needs a policy which already answers in the right manner. Every token of a response counts alike; what
    a span marks as wrong is read but not learnt.
    """
    kernel = "label_smoothing" if config.label_smoothing else "ce"
    return imitate(batch, kernel=kernel, normaliser=config.normaliser, smoothing=config.label_smoothing)


class WeightedSFTConfig(AlgorithmConfig):
    """Settings of weighted fine-tuning."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)
    quality_weights: dict[str, float] = Field(
        default_factory=dict,
        description="What a demonstration counts by the class its source puts it in; 1 for any other class.",
    )


@algorithm(
    "weighted-sft",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement x quality class x span",
    config=WeightedSFTConfig,
    paper="Peters & Schaal 2007, Reinforcement learning by reward-weighted regression, with weights from "
    "judgements; span weights: Wu et al. 2023, Fine-Grained Human Feedback (arXiv:2306.01693)",
    needs_reference=False,
    measure=token_totals,
    make_source=from_demonstrations("weights"),
)
def weighted_sft(batch: ScoredExamples[TokenExample], config: WeightedSFTConfig) -> LossOutput:
    """Fine-tuning in which every token counts what its span, its source and its judgement say.

    Choose it over ``sft`` when demonstrations differ in quality or only parts of them are good: corrected
    passages may count more than what was left as it was, experts more than everybody. What weighs 0 or
    less is read but not learnt; to push it down, use ``unlikelihood-tokens``.
    """
    return imitate(batch, normaliser=config.normaliser)


# -- kernels that ask the policy itself -------------------------------------------------------------


class DFTConfig(AlgorithmConfig):
    """Settings of dynamic fine-tuning."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)


@algorithm(
    "dft",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement x the token's own probability",
    config=DFTConfig,
    paper="Wu et al. 2025, On the Generalization of SFT (arXiv:2508.05629)",
    needs_reference=False,
    measure=token_totals,
    make_source=from_demonstrations("keep"),
)
def dft(batch: ScoredExamples[TokenExample], config: DFTConfig) -> LossOutput:
    """Dynamic fine-tuning: each token's loss is multiplied by its probability, which gets no gradient.

    Choose it over ``sft`` when the policy is to forget little: tokens that it finds impossible hardly move
    it. For the same reason it learns new facts slowly, and wants a larger learning rate.
    """
    return imitate(batch, kernel="dft", normaliser=config.normaliser)


class OTRConfig(AlgorithmConfig):
    """Settings of one-token rollouts."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)
    kappa: float = Field(1.3, gt=0, description="Temperature at which the tokens would be sampled.")
    beta: float = Field(
        -0.1, lt=1, description="Reward of any token but the demonstrated one, whose reward is 1."
    )

    @property
    def expected_at(self) -> float:
        """Tokens are drawn at ``kappa``."""
        return self.kappa


@algorithm(
    "otr",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement x reward of a sampled token",
    config=OTRConfig,
    paper="Ming et al. 2025, One-Token Rollout (arXiv:2509.26313)",
    needs_reference=False,
    measure=token_totals,
    make_source=from_demonstrations("keep"),
    claim="S165",
)
def otr(batch: ScoredExamples[TokenExample], config: OTRConfig) -> LossOutput:
    """One-token rollouts: at every position the policy guesses a token and is paid for the right one.

    The expectation over guesses is computed exactly, not sampled. Choose it for what ``dft`` is for: at
    ``kappa`` 1 its gradient is that of ``dft`` times ``1 - beta``, whatever ``beta`` is. Above 1, a ``beta``
    below 0 also takes probability from tokens that only the flatter guesses would find.
    """
    return imitate(batch, kernel="otr", normaliser=config.normaliser, wrong_reward=config.beta)


# -- tokens that are not wanted --------------------------------------------------------------------


class UnlikelihoodTokensConfig(AlgorithmConfig):
    """Settings of token unlikelihood."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)
    alpha: float = Field(1.0, gt=0, description="What an unwanted token counts beside a wanted one.")


def _signed_totals(batch: ScoredExamples[TokenExample], config: UnlikelihoodTokensConfig) -> TokenTotals:
    return TokenTotals.of(whole_weights(example, config.alpha) for example in batch.examples)


@algorithm(
    "unlikelihood-tokens",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement x span",
    config=UnlikelihoodTokensConfig,
    paper="Welleck et al. 2020, Neural Text Generation with Unlikelihood Training (arXiv:1908.04319)",
    needs_reference=False,
    measure=_signed_totals,
    make_source=from_demonstrations("signed"),
    loads={"bad_spans": "push_down"},
)
def unlikelihood_tokens(batch: ScoredExamples[TokenExample], config: UnlikelihoodTokensConfig) -> LossOutput:
    """Imitate what is marked as good and push down, token by token, what is marked as bad.

    Choose it when somebody marked the very passages that are wrong (spans with a weight below 0): the rest
    of the response is learnt as ever. Its loss has a minimum where the marked tokens are impossible, so it
    does not run away as a negative likelihood would.
    """
    return imitate(batch, kernel="unlikelihood", normaliser=config.normaliser, unwanted=config.alpha)


# -- inputs that are not what is learnt --------------------------------------------------------------


class MFTConfig(AlgorithmConfig):
    """Settings of masked-thought fine-tuning."""

    normaliser: Normaliser = Field("weights", description=DIVISOR)
    share: float = Field(
        0.4, ge=0, le=1, description="Largest probability that a token of the answer is read as another one."
    )
    replace: Replacement = Field(
        "random", description="What is read instead: any token of the vocabulary, or always the mask token."
    )
    mask_token: str | None = Field(
        None, description="The mask token, if the tokenizer has none: one that text never has."
    )
    ramp: float = Field(
        2 / 3,
        ge=0,
        le=1,
        description="Share of the run over which the probability grows from 0 to its largest.",
    )

    def corruptor(self, renderer: Renderer) -> Corruptor:
        """What changes the inputs; control tokens (end of turn, padding) stay."""
        pool = replacements(renderer, self.replace, self.mask_token)
        return MaskedThought(self.share, pool, renderer.special_ids, self.ramp)


@algorithm(
    "mft",
    source="tokens",
    signal="demonstrations",
    family="tokens",
    weight="judgement",
    config=MFTConfig,
    paper="Chen et al. 2024, Masked Thought (arXiv:2403.02178)",
    needs_reference=False,
    measure=token_totals,
    make_source=from_demonstrations("keep"),
    claim="S035",
)
def mft(batch: ScoredExamples[TokenExample], config: MFTConfig) -> LossOutput:
    """Masked-thought fine-tuning: tokens of the answer are hidden where it is read, none where it is learnt.

    Choose it for demonstrations that reason in steps, when there are few of them: a step must be found from
    the question and from distant premises, not from the words just before it. Every epoch hides others.
    """
    return imitate(batch, normaliser=config.normaliser)
