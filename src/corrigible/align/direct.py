"""Algorithms on pairs (and one on demonstrations) that are settings of the one contrast function.

Each entry says what its paper changes: :func:`~corrigible.align.contrast.contrast_loss` does the rest. Those
without a reference are in :mod:`corrigible.align.reference_free`, those that learn from more than two
answers a prompt in :mod:`corrigible.align.listwise`; DPO itself stands in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from corrigible.align.contrast import ContrastRows, ContrastSpec, contrast_loss, preset
from corrigible.align.contrast_spec import MOST_FLIPPED, Divergence
from corrigible.align.imitation import from_demonstrations
from corrigible.align.losses import LossOutput
from corrigible.align.registry import AlgorithmConfig, ScoredExamples, algorithm
from corrigible.align.sources import PairExample, PairSource
from corrigible.align.tokens import TokenExample
from corrigible.models import Renderer
from corrigible.records import Episode
from corrigible.store import Pair
from corrigible.store.conversions import kinds_for

BETA = "KL coefficient: small lets the policy move far, large keeps it near."
GAMMA = "Inverse of the margin, nats: a pair counts until the chosen response leads by 1 / gamma."
LENGTHS = "Use mean log-probs per token instead of sums: long responses then weigh no more than short ones."


def pair_rows(batch: ScoredExamples[PairExample], **columns: Any) -> ContrastRows:
    """The rows of scored pairs: both sides one after the other, soft labels, weights."""
    count = len(batch.examples)
    device = batch.policy[0].device
    return ContrastRows.from_ragged(
        batch.policy,
        torch.arange(count, device=device).repeat_interleave(2),
        ref_logp=batch.reference,
        label=torch.tensor([1, -1] * count, dtype=torch.int8, device=device),
        weight=batch.column("weight").repeat_interleave(2),
        p_chosen=batch.column("p_chosen"),
        **columns,
    )


def pair_loss(batch: ScoredExamples[PairExample], spec: ContrastSpec, **columns: Any) -> LossOutput:
    """The contrast loss of scored pairs."""
    return contrast_loss(pair_rows(batch, **columns), spec, denominator=batch.denominator)


# -- labels that are wrong now and then ---------------------------------------------------------------


class CDPOConfig(AlgorithmConfig):
    """Settings of conservative DPO."""

    beta: float = Field(0.1, gt=0, description=BETA)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="Assumed share of flipped labels.")


@algorithm(
    "cdpo",
    source="pairs",
    weight="judgement",
    config=CDPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO",
)
def cdpo(batch: ScoredExamples[PairExample], config: CDPOConfig) -> LossOutput:
    """Conservative DPO: labels are taken to be right with probability ``1 - label_smoothing`` only.

    Choose it to keep the policy from running away on pairs that it has by heart: the loss has its minimum at
    a finite margin, ``log((1 - e) / e)``. To undo known flips, take ``rdpo``; it aims at the clean optimum.
    """
    return pair_loss(batch, preset("cdpo", beta=config.beta, label_smoothing=config.label_smoothing))


class RDPOConfig(AlgorithmConfig):
    """Settings of robust DPO."""

    beta: float = Field(0.1, gt=0, description=BETA)
    flip_rate: float = Field(
        0.1,
        ge=0,
        le=MOST_FLIPPED,
        description="Share of labels that are flipped; measure it, do not guess high.",
    )
    annotator_flip_rates: dict[str, float] = Field(
        default_factory=dict,
        description="The share of single annotators, by pseudonym; flip_rate for all others. Votes that were "
        "merged take the mean of their annotators'.",
    )
    largest_margin: float | None = Field(
        None,
        gt=0,
        description="Margins of the implicit reward beyond this earn nothing more. The loss is unbounded "
        "below: without a bound, stop early.",
    )


def _rdpo_source(
    signals: Sequence[Pair],
    renderer: Renderer,
    config: RDPOConfig,
    /,
    *,
    max_length: int,
    seed: int,
    invalid: Literal["raise", "skip"],
    episodes: Mapping[str, Episode],
) -> PairSource:
    """Pairs that know how often those who judged them are wrong."""
    source = PairSource(
        signals, renderer, max_length=max_length, seed=seed, invalid=invalid, episodes=episodes
    )
    if config.annotator_flip_rates:
        rates = [
            [config.annotator_flip_rates.get(name, config.flip_rate) for name in pair.annotators]
            for pair in source.pairs
        ]
        source.examples = [
            replace(example, flip_rate=sum(each) / len(each) if each else config.flip_rate)
            for example, each in zip(source.examples, rates, strict=True)
        ]
    return source


@algorithm(
    "rdpo",
    source="pairs",
    weight="judgement",
    config=RDPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Chowdhury et al. 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback "
    "(arXiv:2403.00409)",
    make_source=_rdpo_source,
    claim="S173",
)
def rdpo(batch: ScoredExamples[PairExample], config: RDPOConfig) -> LossOutput:
    """Robust DPO: an unbiased estimate of the loss that the labels would have without their flips.

    Choose it when labels are noisy and you know about how noisy, in all or of each annotator: with a fifth
    to two fifths of labels flipped it stays near what clean labels give. A pair that the policy contradicts
    never loses its pull, as it does in ``cdpo``. It needs thousands of pairs to pay, and stops early or
    overfits.
    """
    rates = [config.flip_rate if one.flip_rate is None else one.flip_rate for one in batch.examples]
    spec = preset("rdpo", beta=config.beta, flip_rate=config.flip_rate, largest_margin=config.largest_margin)
    return pair_loss(batch, spec, flip_rate=rates)


# -- other losses of the same margin ------------------------------------------------------------------


class IPOConfig(AlgorithmConfig):
    """Settings of IPO."""

    tau: float = Field(
        0.1, gt=0, description="KL coefficient: the log-ratio margin is drawn to 1 / (2 tau) nats."
    )
    length_normalised: bool = Field(
        False, description="Use log-ratios per token, as TRL and HALOs do; the paper sums. " + LENGTHS
    )


@algorithm(
    "ipo",
    source="pairs",
    weight="judgement",
    config=IPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences "
    "(arXiv:2310.12036), eq. 17",
)
def ipo(batch: ScoredExamples[PairExample], config: IPOConfig) -> LossOutput:
    """Identity preference optimisation: draw the margin of log-ratios to ``1 / (2 tau)``, and no further.

    Choose it when pairs are few or every prompt has one clear answer, where DPO would push margins for ever.
    ``tau`` decides how far the policy goes and must be tuned; it is no drop-in for DPO's ``beta``.
    """
    return pair_loss(batch, preset("ipo", tau=config.tau, length_normalised=config.length_normalised))


class HingeNormConfig(AlgorithmConfig):
    """Settings of the normalised hinge."""

    gamma: float = Field(0.05, gt=0, description=GAMMA)


@algorithm(
    "hinge-norm",
    source="pairs",
    weight="judgement",
    config=HingeNormConfig,
    learns_from=kinds_for("pairs"),
    paper="Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization "
    "(arXiv:2309.06657)",
    claim="S176",
)
def hinge_norm(batch: ScoredExamples[PairExample], config: HingeNormConfig) -> LossOutput:
    """The hinge on log-ratios: a pair counts until its margin is ``1 / gamma`` nats, then not at all.

    Choose it for pairs that a ranking model has labelled (RSO), and where a few wrong labels should not pull
    for ever: its slope is bounded, and what is learnt is left alone.
    """
    return pair_loss(batch, preset("hinge_norm", gamma=config.gamma))


FDivergence = Literal["forward_kl", "jensen_shannon", "alpha"]


class FDPOConfig(AlgorithmConfig):
    """Settings of f-DPO."""

    beta: float = Field(0.1, gt=0, description="Coefficient of the divergence from the reference.")
    divergence: FDivergence = Field(
        "jensen_shannon",
        description="Which one: forward KL keeps the most diversity, Jensen-Shannon lies between it and "
        "DPO's reverse KL, alpha interpolates.",
    )
    alpha: float = Field(
        0.5, ge=0, le=1, description="Of the alpha divergence: 0 is forward KL, 1 reverse KL (DPO)."
    )


@algorithm(
    "f-dpo",
    source="pairs",
    weight="judgement",
    config=FDPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Wang et al. 2023, Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse "
    "Divergence Constraints (arXiv:2309.16240)",
)
def f_dpo(batch: ScoredExamples[PairExample], config: FDPOConfig) -> LossOutput:
    """DPO held to the reference by another divergence than the reverse KL.

    Choose it when DPO makes answers too alike: divergences towards forward KL give up some reward to keep
    what else the reference would have said.
    """
    return pair_loss(batch, preset("f_dpo", beta=config.beta, link=config.divergence, alpha=config.alpha))


class WPOConfig(AlgorithmConfig):
    """Settings of WPO."""

    beta: float = Field(0.1, gt=0, description=BETA)


@algorithm(
    "wpo",
    source="pairs",
    weight="judgement x the policy's own probability of both responses",
    config=WPOConfig,
    learns_from=kinds_for("pairs"),
    paper="Zhou et al. 2024, WPO: Enhancing RLHF with Weighted Preference Optimization (arXiv:2406.11827)",
)
def wpo(batch: ScoredExamples[PairExample], config: WPOConfig) -> LossOutput:
    """DPO whose pairs count as the policy would sample them: ``exp`` of both mean log-probs, a constant.

    Choose it for pairs that another model wrote: what the policy would never say hardly moves it. The weights
    are below 1, so the learning rate may be higher than DPO's.
    """
    return pair_loss(batch, replace(preset("dpo", beta=config.beta), name="wpo", pair_weight="wpo"))


# -- demonstrations -----------------------------------------------------------------------------------


class SPINConfig(AlgorithmConfig):
    """Settings of self-play fine-tuning."""

    beta: float = Field(
        0.1, gt=0, description="KL coefficient to the last iterate (the paper's lambda); below 1, stop early."
    )


@algorithm(
    "spin",
    source="pairs",
    weight="judgement",
    config=SPINConfig,
    learns_from=kinds_for("pairs"),
    paper="Chen et al. 2024, Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models "
    "(arXiv:2401.01335)",
    claim="S185",
)
def spin(batch: ScoredExamples[PairExample], config: SPINConfig) -> LossOutput:
    """One round of self-play: demonstrations must win against the policy's own samples.

    Choose it when there are demonstrations, no judgements, and more fine-tuning no longer helps. Its pairs
    are a demonstration and what the policy at the start of the round answers; sample anew for every round,
    whose reference is that policy. It ends where the policy's samples cannot be told from the data.
    """
    return pair_loss(batch, preset("spin", beta=config.beta))


class FSFTConfig(AlgorithmConfig):
    """Settings of f-SFT."""

    beta: float = Field(
        0.1,
        gt=0,
        description="Scale of the log-ratio: how soon a demonstration that is learnt lets go. " + BETA,
    )
    divergence: Divergence = Field(
        "pearson",
        description="Which f-divergence: total_variation is plain fine-tuning; pearson turns back beyond a "
        "log-ratio of 2 / beta; hellinger, kl and jensen_shannon fade out.",
    )
    length_normalised: bool = Field(False, description=LENGTHS)

    @property
    def uses_reference(self) -> bool:
        """Under total variation the reference is a constant of the loss."""
        return self.divergence != "total_variation"


@algorithm(
    "f-sft",
    source="tokens",
    signal="demonstrations",
    weight="judgement",
    config=FSFTConfig,
    learns_from=kinds_for("demonstrations"),
    paper="Wang et al. 2025, Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections "
    "(arXiv:2507.00018)",
    make_source=from_demonstrations("weights"),
    claim="S164",
)
def f_sft(batch: ScoredExamples[TokenExample], config: FSFTConfig) -> LossOutput:
    """Fine-tuning that stays tied to its start: an f-divergence of a demonstration's implicit reward.

    Choose it before DPO on the same policy: plain fine-tuning forgets the reference, this slows down as a
    demonstration is learnt. Long responses have large log-ratios: lower ``beta`` or set
    ``length_normalised``.
    """
    device = batch.policy[0].device
    rows = ContrastRows.from_ragged(
        batch.policy,
        torch.arange(len(batch.policy), device=device),
        ref_logp=batch.reference,
        token_weight=[torch.tensor(one.token_weights, device=device) for one in batch.examples],
        weight=batch.column("weight"),
    )
    spec = preset(
        "f_sft", beta=config.beta, divergence=config.divergence, length_normalised=config.length_normalised
    )
    return contrast_loss(rows, replace(spec, reference=config.uses_reference), denominator=batch.denominator)
