"""Algorithms on several scored answers to one prompt: rankings, ratings, rewards.

A ranking is one example, whose answers are never cut apart: ``corrigible.align.ranked`` makes them, the
one contrast function (:mod:`corrigible.align.contrast`) compares them. A prompt counts once, however many
answers it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from corrigible.align.contrast import ContrastRows, ContrastSpec, contrast_loss, preset
from corrigible.align.direct import BETA, LENGTHS
from corrigible.align.losses import LossOutput
from corrigible.align.ranked import RankedExample, RankedSource
from corrigible.align.registry import AlgorithmConfig, MakeSource, ScoredExamples, algorithm
from corrigible.models import Renderer
from corrigible.records import Episode
from corrigible.store.conversions import kinds_for
from corrigible.store.signals import Ranked

Baseline = Literal["zero", "group_mean", "group_best"]


def ranked_rows(batch: ScoredExamples[RankedExample], **columns: Any) -> ContrastRows:
    """The rows of scored rankings, with their scores and weights."""
    device = batch.policy[0].device
    sizes = torch.tensor([len(one.rows) for one in batch.examples], device=device)
    scores = [score for one in batch.examples for score in one.scores]
    return ContrastRows.from_ragged(
        batch.policy,
        torch.arange(len(sizes), device=device).repeat_interleave(sizes),
        ref_logp=batch.reference,
        score=torch.tensor(scores, dtype=torch.float32, device=device),
        weight=batch.column("weight").repeat_interleave(sizes),
        **columns,
    )


def ranked_loss(batch: ScoredExamples[RankedExample], spec: ContrastSpec, **columns: Any) -> LossOutput:
    """The contrast loss of scored rankings."""
    return contrast_loss(ranked_rows(batch, **columns), spec, denominator=batch.denominator)


def from_rankings(*, equal_scores: bool = False, proposal: bool = False) -> MakeSource:
    """How an algorithm makes its source of rankings.

    Args:
        equal_scores: whether answers that all score the same teach it anything.
        proposal: whether it needs to know what answers were sampled with.
    """

    def make(
        signals: Sequence[Ranked],
        renderer: Renderer,
        config: Any,
        /,
        *,
        max_length: int,
        seed: int,
        invalid: Literal["raise", "skip"],
        episodes: Mapping[str, Episode],
    ) -> RankedSource:
        source = RankedSource(
            signals,
            renderer,
            max_length=max_length,
            seed=seed,
            invalid=invalid,
            episodes=episodes,
            equal_scores=equal_scores,
        )
        if proposal:
            source.say_proposal()
        return source

    return make


# -- an order -----------------------------------------------------------------------------------------


class PlackettLuceConfig(AlgorithmConfig):
    """Settings of DPO on rankings."""

    beta: float = Field(0.1, gt=0, description=BETA)


@algorithm(
    "plackett-luce",
    source="ranked",
    signal="ranked",
    weight="judgement",
    config=PlackettLuceConfig,
    learns_from=kinds_for("ranked"),
    paper="Rafailov et al. 2023, Direct Preference Optimization (arXiv:2305.18290), appendix A.3",
    make_source=from_rankings(),
)
def plackett_luce(batch: ScoredExamples[RankedExample], config: PlackettLuceConfig) -> LossOutput:
    """DPO for rankings: each answer must win against all that were ranked below it.

    Choose it when people rank three or more answers: the order is used once and as a whole, where pairs of it
    would count the same judgement several times. Of two answers it is DPO; tied answers are not compared.
    """
    return ranked_loss(batch, preset("plackett_luce", beta=config.beta))


class RRHFConfig(AlgorithmConfig):
    """Settings of RRHF."""

    sft_weight: float = Field(
        1.0, ge=0, description="Coefficient of the best answer's negative log-likelihood."
    )
    sft_reduce: Literal["sum", "mean"] = Field(
        "mean",
        description="That likelihood's sum over tokens, as the paper has it, or its mean, as its code.",
    )


@algorithm(
    "rrhf",
    source="ranked",
    signal="ranked",
    weight="judgement",
    config=RRHFConfig,
    learns_from=kinds_for("ranked"),
    paper="Yuan et al. 2023, RRHF: Rank Responses to Align Language Models with Human Feedback "
    "(arXiv:2304.05302)",
    needs_reference=False,
    make_source=from_rankings(),
)
def rrhf(batch: ScoredExamples[RankedExample], config: RRHFConfig) -> LossOutput:
    """Rank responses: mean log-probs must have the order of the scores, and the best answer is imitated.

    Choose it for answers of several writers with scores, when a reference is too dear. There is no margin:
    two answers in the right order teach nothing more, so the imitation of the best one does most.
    """
    return ranked_loss(batch, preset("rrhf", sft_weight=config.sft_weight, sft_reduce=config.sft_reduce))


class PROConfig(AlgorithmConfig):
    """Settings of PRO."""

    sft_weight: float = Field(
        0.05,
        ge=0,
        description="Coefficient of the best answer's negative log-likelihood, times (answers - 1)^2.",
    )
    standardise_scores: bool = Field(
        True,
        description="Divide scores by their standard deviation within the ranking: they are temperatures "
        "of the loss, so their unit would be a hidden setting.",
    )


@algorithm(
    "pro",
    source="ranked",
    signal="ranked",
    weight="judgement",
    config=PROConfig,
    learns_from=kinds_for("ranked"),
    paper="Song et al. 2023, Preference Ranking Optimization for Human Alignment (arXiv:2306.17492)",
    needs_reference=False,
    make_source=from_rankings(),
    claim="S075",
)
def pro(batch: ScoredExamples[RankedExample], config: PROConfig) -> LossOutput:
    """Preference ranking optimisation: each answer against all worse ones, softened where scores are close.

    Choose it for long rankings with scores that mean something, without a reference. The imitation of the
    best answer grows with the ranking's length; watch how far the policy moves, nothing else holds it.
    """
    return ranked_loss(
        batch, preset("pro", sft_weight=config.sft_weight, standardise_scores=config.standardise_scores)
    )


# -- rewards ------------------------------------------------------------------------------------------


class BRAInConfig(AlgorithmConfig):
    """Settings of BRAIn."""

    beta: float = Field(
        1.0, gt=0, description="Temperature of the scores: small trusts the best answer alone."
    )
    log_weight_cap: float | None = Field(
        None,
        gt=0,
        description="Bound on how much likelier, in nats, the reference makes an answer than what sampled "
        "it; long answers need one when they were sampled by another policy.",
    )


@algorithm(
    "brain",
    source="ranked",
    signal="ranked",
    weight="posterior given the scores",
    config=BRAInConfig,
    learns_from=kinds_for("ranked"),
    paper="Pandey et al. 2024, BRAIn: Bayesian Reward-conditioned Amortized Inference (arXiv:2402.02479)",
    make_source=from_rankings(equal_scores=True, proposal=True),
    claim="S101",
)
def brain(batch: ScoredExamples[RankedExample], config: BRAInConfig) -> LossOutput:
    """BRAIn: fit the policy's probabilities of a prompt's answers to the posterior that their scores imply.

    Choose it for 8 to 32 sampled answers a prompt with rewards: scores are used in full, and the gradient
    has a small variance. Answers need the log-probs they were sampled with (episodes have them); without,
    they are taken to be the reference's own. An ``ess`` near 1 says that one answer decides: raise ``beta``.
    """
    logq = torch.tensor(
        [value for one in batch.examples for value in one.logq],
        dtype=torch.float32,
        device=batch.policy[0].device,
    )
    logq = torch.where(logq.isnan(), batch.reference_logps(), logq)
    spec = preset("brain", beta=config.beta, log_weight_cap=config.log_weight_cap)
    return ranked_loss(batch, spec, logq=logq)


class CoPGConfig(AlgorithmConfig):
    """Settings of contrastive policy gradient."""

    beta: float = Field(
        0.1, gt=0, description="KL coefficient in the unit of the scores: their gaps should be a few betas."
    )


@algorithm(
    "copg",
    source="ranked",
    signal="ranked",
    weight="reward gap",
    config=CoPGConfig,
    learns_from=kinds_for("ranked"),
    paper="Flet-Berliac et al. 2024, Contrastive Policy Gradient (arXiv:2406.19185)",
    make_source=from_rankings(equal_scores=True),
    claim="S179",
)
def copg(batch: ScoredExamples[RankedExample], config: CoPGConfig) -> LossOutput:
    """Contrastive policy gradient: log-ratio gaps are fitted to reward gaps, whoever sampled the answers.

    Choose it for rewards that are no preferences (tests, verifiers, reward models), and for answers of any
    policy: it needs no importance weights. Scores are used in their own unit; set ``beta`` by it.
    """
    return ranked_loss(batch, preset("copg", beta=config.beta))


class RWRConfig(AlgorithmConfig):
    """Settings of reward-weighted regression."""

    beta: float = Field(
        1.0, gt=0, description="Temperature of the scores: small imitates the best answers only."
    )
    length_normalised: bool = Field(False, description=LENGTHS)


@algorithm(
    "rwr",
    source="ranked",
    signal="ranked",
    weight="softmax of the scores within a prompt",
    config=RWRConfig,
    learns_from=kinds_for("ranked"),
    paper="Peters & Schaal 2007, Reinforcement learning by reward-weighted regression for operational "
    "space control",
    needs_reference=False,
    make_source=from_rankings(equal_scores=True),
)
def rwr(batch: ScoredExamples[RankedExample], config: RWRConfig) -> LossOutput:
    """Reward-weighted regression: imitate a prompt's answers, better ones more, with weights that add up
    to 1.

    Choose it when all you want is to imitate, softly, the best of several samples: nothing is pushed down, so
    it is safe and slow. ``copg`` and ``brain`` learn from bad answers as well.
    """
    settings = {"self_normalised": True, "length_normalised": config.length_normalised}
    return ranked_loss(batch, preset("rwr", beta=config.beta, **settings))


class AWRConfig(AlgorithmConfig):
    """Settings of advantage-weighted regression."""

    beta: float = Field(
        1.0, gt=0, description="Temperature of the advantages: small imitates the best answers only."
    )
    baseline: Baseline = Field(
        "group_mean",
        description="What is subtracted from a prompt's scores: their mean, the best one, or nothing.",
    )
    weight_cap: float = Field(20.0, gt=0, description="The most an answer may weigh.")
    length_normalised: bool = Field(False, description=LENGTHS)


@algorithm(
    "awr",
    source="ranked",
    signal="ranked",
    weight="exp of the advantage",
    config=AWRConfig,
    learns_from=kinds_for("ranked"),
    paper="Peng et al. 2019, Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement "
    "Learning (arXiv:1910.00177)",
    needs_reference=False,
    make_source=from_rankings(equal_scores=True),
)
def awr(batch: ScoredExamples[RankedExample], config: AWRConfig) -> LossOutput:
    """Advantage-weighted regression: imitate each answer by how much better it is than the prompt's others.

    Choose it over ``rwr`` when a prompt with a much better answer should count more than one whose answers
    are all alike.
    """
    settings = {
        "baseline": config.baseline,
        "weight_cap": config.weight_cap,
        "length_normalised": config.length_normalised,
    }
    return ranked_loss(batch, preset("rwr", beta=config.beta, **settings))
