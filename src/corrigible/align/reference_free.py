"""Algorithms on pairs that need no reference: settings of the one contrast function, like those of
``direct``."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from corrigible.align.contrast import preset
from corrigible.align.direct import GAMMA, LENGTHS, pair_loss
from corrigible.align.losses import LossOutput
from corrigible.align.registry import AlgorithmConfig, ScoredExamples, algorithm
from corrigible.align.sources import PairExample
from corrigible.store.conversions import kinds_for

SFT_WEIGHT = "Coefficient of the negative log-likelihood of the chosen response, which keeps it from falling."


class SLiCConfig(AlgorithmConfig):
    """Settings of SLiC."""

    gamma: float = Field(0.05, gt=0, description=GAMMA)
    sft_weight: float = Field(0.1, ge=0, description=SFT_WEIGHT)


@algorithm(
    "slic",
    source="pairs",
    weight="judgement",
    config=SLiCConfig,
    learns_from=kinds_for("pairs"),
    paper="Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback (arXiv:2305.10425)",
    needs_reference=False,
)
def slic(batch: ScoredExamples[PairExample], config: SLiCConfig) -> LossOutput:
    """Sequence likelihood calibration: the chosen response must lead by ``1 / gamma`` nats; no reference.

    Choose it when memory or time for a reference is missing. The likelihood of the chosen response is what
    holds the policy, so keep ``sft_weight`` above 0. With a reference, ``hinge-norm`` games proxies less.
    """
    return pair_loss(batch, preset("slic", gamma=config.gamma, sft_weight=config.sft_weight))


class SimPOConfig(AlgorithmConfig):
    """Settings of SimPO."""

    beta: float = Field(2.0, gt=0, description="Scale of mean log-probs; 2 to 10, far above DPO's.")
    gamma: float = Field(
        1.0, ge=0, description="Margin that the chosen response must lead by; 0.3 to 0.5 of beta."
    )
    sft_weight: float = Field(0.0, ge=0, description=SFT_WEIGHT + " Per token; above 0 this is CPO-SimPO.")


@algorithm(
    "simpo",
    source="pairs",
    weight="judgement",
    config=SimPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward "
    "(arXiv:2405.14734), eq. 6",
    needs_reference=False,
)
def simpo(batch: ScoredExamples[PairExample], config: SimPOConfig) -> LossOutput:
    """SimPO: the mean log-prob per token is the reward, with a margin; no reference.

    Choose it when responses differ much in length and DPO learns to be long, or when there is no room for a
    reference. Nothing holds the policy near its start but a small learning rate: watch ``logps/chosen``.
    """
    return pair_loss(
        batch, preset("simpo", beta=config.beta, gamma=config.gamma, sft_weight=config.sft_weight)
    )


class ORPOConfig(AlgorithmConfig):
    """Settings of ORPO."""

    odds_weight: float = Field(
        0.1, gt=0, description="Coefficient of the odds ratio (lambda) beside the likelihood of the chosen."
    )


@algorithm(
    "orpo",
    source="pairs",
    weight="judgement",
    config=ORPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model "
    "(arXiv:2403.07691), eq. 6",
    needs_reference=False,
)
def orpo(batch: ScoredExamples[PairExample], config: ORPOConfig) -> LossOutput:
    """Odds-ratio preference optimisation: imitate the chosen response and prefer its odds, in one stage.

    Choose it to start from a base model without supervised fine-tuning before: the likelihood of the chosen
    response does most of the work, the odds ratio keeps the rejected ones from rising with it.
    """
    return pair_loss(batch, preset("orpo", odds_weight=config.odds_weight))


class PrefFTConfig(AlgorithmConfig):
    """Settings of preferred fine-tuning."""

    length_normalised: bool = Field(False, description=LENGTHS)


@algorithm(
    "pref-ft",
    source="pairs",
    weight="judgement",
    config=PrefFTConfig,
    learns_from=kinds_for("pairs"),
    paper="Tajwar et al. 2024, Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data "
    "(arXiv:2404.14367); Preferred-FT of Rafailov et al. 2023 (arXiv:2305.18290)",
    needs_reference=False,
    claim="S189",
)
def pref_ft(batch: ScoredExamples[PairExample], config: PrefFTConfig) -> LossOutput:
    """Fine-tune on the chosen responses alone: what any preference loss must beat.

    Choose it as a baseline, or when the rejected responses carry no information. A soft label shares the
    pair's weight between its sides.
    """
    settings = {"rejected_weight": 0.0, "length_normalised": config.length_normalised}
    return pair_loss(batch, replace(preset("unlikelihood", **settings), name="pref-ft"))


class UnlikelihoodConfig(AlgorithmConfig):
    """Settings of unlikelihood on pairs."""

    rejected_weight: float = Field(
        0.1,
        ge=0,
        description="How strongly rejected responses are pushed down; unbounded, so keep it well below 1.",
    )
    length_normalised: bool = Field(False, description=LENGTHS)


@algorithm(
    "unlikelihood",
    source="pairs",
    weight="judgement",
    config=UnlikelihoodConfig,
    learns_from=kinds_for("pairs"),
    paper="Tajwar et al. 2024, Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data "
    "(arXiv:2404.14367)",
    needs_reference=False,
    claim="S189",
)
def unlikelihood(batch: ScoredExamples[PairExample], config: UnlikelihoodConfig) -> LossOutput:
    """Raise the chosen response and push the rejected one down, both linearly: the bare negative gradient.

    Choose it to study what pushing down does by itself. Nothing bounds it: for use, DPO or ``orpo`` push down
    only as long as a pair is not learnt.
    """
    settings = {"rejected_weight": config.rejected_weight, "length_normalised": config.length_normalised}
    return pair_loss(batch, preset("unlikelihood", **settings))
