"""Which contrast loss: one frozen description of the five steps, and the published ones by name.

The table is that of the field guide (section 1.2). :func:`preset` takes each loss's own constants under the
names of its paper and turns them into a :class:`ContrastSpec`; ``dataclasses.replace`` makes a loss that no
paper has.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from corrigible.errors import BadInputError

Link = Literal["log_ratio", "forward_kl", "jensen_shannon", "alpha", "log_odds"]
"""From a row's log-ratio ``h`` to its utility ``u`` (``h = s`` without a reference).

* ``"log_ratio"``: ``h`` (reverse KL: Rafailov et al. 2023);
* ``"forward_kl"``: ``1 - exp(-h)``, ``"jensen_shannon"``: ``log 2 + log sigma(h)``, ``"alpha"``:
  ``(exp((alpha - 1) h) - 1) / (alpha - 1)``, which is the first at ``alpha = 1`` and forward KL at 0
  (f-DPO, Wang et al. 2023, arXiv:2309.16240);
* ``"log_odds"``: ``log(p / (1 - p))`` with ``p = exp(s)``; needs a mean log-prob (ORPO).
"""

Comparison = Literal["pair", "all_pairs", "gaps", "k_vs_worse", "group", "single", "wanted"]
"""What is held against what within a group of rows.

* ``"pair"``: the two rows of a group, the chosen against the rejected one;
* ``"all_pairs"``: every two rows of which one is strictly better;
* ``"gaps"``: every two rows, tied ones as well, for losses that know how much better;
* ``"k_vs_worse"``: every row against the set of all strictly worse ones;
* ``"group"``: all rows at once;
* ``"single"``: each row by itself (labels +1 and -1, or scores);
* ``"wanted"``: each row by itself that is not labelled -1.
"""

Psi = Literal[
    "logistic", "hinge", "square", "unlikelihood", "softmax", "divergence", "prospect", "weighted", "f_sft"
]
"""The loss of a comparison; :mod:`corrigible.align.comparisons` has the equations."""

Divergence = Literal["total_variation", "pearson", "hellinger", "kl", "jensen_shannon"]
"""Of f-SFT: which function ``G`` of the implicit reward of a demonstration is raised."""

PAIRWISE = ("logistic", "hinge", "square", "unlikelihood")
MOST_FLIPPED = 0.45
"""Flip rates above this are taken for this: what undoes them is divided by ``1 - 2 rate``."""


@dataclass(frozen=True, kw_only=True)
class ContrastSpec:
    """One loss on sequence log-probs, step by step.

    Attributes:
        name: what it is called in messages.
        length_power: step 1. A row's log-prob is its tokens' sum over ``length ** this``: 0 sum, 1 mean.
        reference: whether the reference's log-prob is subtracted.
        link: step 2.
        alpha: of the ``"alpha"`` link.
        beta: ``v = beta * (u - z0)``; the KL coefficient, > 0.
        comparison: step 3.
        margin: subtracted from the difference of every pair, in units of v (SimPO's gamma, IPO's 1/2).
        ties: a pair without a better side counts with label one half, or is dropped.
        pair_weight: constant factor of each pair: 1, WPO's ``exp`` of both mean log-probs, or the score gap.
        drop_truncated: leave out rows that are flagged as cut off.
        within: how the comparisons of one group add up: the mean (every prompt counts once) or the sum.
        per_comparison: average over comparisons instead of groups; then ``within`` does not matter.
        psi: step 4.
        scale: factor of the comparison's loss.
        label_smoothing: assumed share of flipped labels; soft labels are mixed with it.
        flip_rate: known share of flipped labels, whose effect is taken out (rDPO); ``ContrastRows.flip_rate``
            is that of single pairs.
        largest_margin: differences beyond this earn nothing more where the loss would fall for ever, as it
            does with a flip rate; ``None``: no cap.
        rejected_weight: factor of the rejected side's log-prob in ``"unlikelihood"``.
        desirable_weight, undesirable_weight: of the two labels in ``"prospect"``.
        score_temperature: whether set softmaxes are tempered by score gaps (PRO).
        standardise_scores: whether scores are divided by their group's standard deviation first.
        hard: whether the target of ``"divergence"`` is the best row alone.
        log_weight_cap: nats, bound of ``log p - log q`` in that target; ``None``: none.
        baseline: what ``"weighted"`` subtracts from the scores of a group.
        weight_temperature: ``exp((score - baseline) / this)`` weighs a row; ``None``: every row weighs 1.
        weight_cap: most a row may weigh, > 0; ``None``: no cap.
        self_normalised: whether those weights are divided by their sum over the group.
        divergence: of ``"f_sft"``.
        anchor: step 5. Coefficient of the best row's negative log-likelihood.
        anchor_reduce: the sum or the mean over that row's tokens.
        anchor_by_size: whether the anchor is multiplied by ``(rows of the group - 1) ** 2`` (PRO).
    """

    name: str = "contrast"
    length_power: float = 0.0
    reference: bool = True
    link: Link = "log_ratio"
    alpha: float = 1.0
    beta: float = 0.1
    comparison: Comparison = "pair"
    margin: float = 0.0
    ties: Literal["half", "drop"] = "half"
    pair_weight: Literal["one", "wpo", "score_gap"] = "one"
    drop_truncated: bool = True
    within: Literal["mean", "sum"] = "mean"
    per_comparison: bool = False
    psi: Psi = "logistic"
    scale: float = 1.0
    label_smoothing: float = 0.0
    flip_rate: float = 0.0
    largest_margin: float | None = None
    rejected_weight: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    score_temperature: bool = False
    standardise_scores: bool = False
    hard: bool = False
    log_weight_cap: float | None = None
    baseline: Literal["zero", "group_mean", "group_best"] = "zero"
    weight_temperature: float | None = None
    weight_cap: float | None = None
    self_normalised: bool = False
    divergence: Divergence = "total_variation"
    anchor: float = 0.0
    anchor_reduce: Literal["sum", "mean"] = "sum"
    anchor_by_size: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range.

        Raises:
            BadInputError: with the setting's name.
        """
        finite = {name: value for name, value in vars(self).items() if isinstance(value, float)}
        for name, value in finite.items():
            if not math.isfinite(value):
                raise BadInputError(f"{self.name}: {name} must be a finite number, got {value}.")
        positive = ("beta", "scale", "weight_temperature", "weight_cap", "log_weight_cap", "largest_margin")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise BadInputError(f"{self.name}: {name} must be a positive number, got {value}.")
        for name in ("rejected_weight", "desirable_weight", "undesirable_weight", "anchor", "length_power"):
            if getattr(self, name) < 0.0:
                raise BadInputError(f"{self.name}: {name} must be >= 0, got {getattr(self, name)}.")
        for name in ("label_smoothing", "flip_rate"):
            if not 0.0 <= getattr(self, name) < 0.5:
                raise BadInputError(
                    f"{self.name}: {name} must be in [0, 0.5), got {getattr(self, name)}.",
                    advice="It is the share of labels that are flipped; at 0.5 labels say nothing.",
                )
        if (self.psi in PAIRWISE) != (self.comparison in ("pair", "all_pairs", "gaps")):
            raise BadInputError(f"{self.name}: '{self.psi}' is no loss of '{self.comparison}' comparisons.")
        if self.desirable_weight == self.undesirable_weight == 0.0:
            raise BadInputError(f"{self.name}: desirable_weight and undesirable_weight are both 0.")

    @property
    def needs_scores(self) -> bool:
        """Whether rows must have scores (for the others labels are enough)."""
        return (
            self.comparison == "gaps"
            or self.psi == "divergence"
            or self.score_temperature
            or self.weight_temperature is not None
            or self.pair_weight == "score_gap"
        )


def _dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> ContrastSpec:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    return ContrastSpec(beta=beta, label_smoothing=label_smoothing)


def _cdpo(beta: float = 0.1, label_smoothing: float = 0.1) -> ContrastSpec:
    """Conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences")."""
    return ContrastSpec(beta=beta, label_smoothing=label_smoothing)


def _rdpo(beta: float = 0.1, flip_rate: float = 0.1, largest_margin: float | None = None) -> ContrastSpec:
    """Robust DPO: DPO's loss without the flips, unbiased (Chowdhury et al. 2024, arXiv:2403.00409)."""
    return ContrastSpec(beta=beta, flip_rate=flip_rate, largest_margin=largest_margin)


def _ipo(tau: float = 0.1, length_normalised: bool = False) -> ContrastSpec:
    """IPO, ``(h_w - h_l - 1 / (2 tau))^2`` (Azar et al. 2023, arXiv:2310.12036, eq. 17)."""
    return ContrastSpec(
        psi="square", beta=tau, margin=0.5, scale=1.0 / tau**2, length_power=1.0 if length_normalised else 0.0
    )


def _slic(gamma: float = 0.05, sft_weight: float = 0.0) -> ContrastSpec:
    """SLiC, ``max(0, 1 / gamma - s_w + s_l)`` and likelihood (Zhao et al. 2023, arXiv:2305.10425)."""
    return ContrastSpec(
        psi="hinge", reference=False, beta=gamma, margin=0.0, scale=1.0 / gamma, anchor=sft_weight
    )


def _hinge_norm(gamma: float = 0.05) -> ContrastSpec:
    """RSO's hinge-norm, ``max(0, 1 - gamma (h_w - h_l))`` (Liu et al. 2023, arXiv:2309.06657)."""
    return ContrastSpec(psi="hinge", beta=gamma)


def _simpo(beta: float = 2.0, gamma: float = 1.0, sft_weight: float = 0.0) -> ContrastSpec:
    """SimPO, ``-log sigma(beta (mean_w - mean_l) - gamma)`` (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    return ContrastSpec(
        reference=False, length_power=1.0, beta=beta, margin=gamma, anchor=sft_weight, anchor_reduce="mean"
    )


def _orpo(odds_weight: float = 0.1) -> ContrastSpec:
    """The odds ratio and the likelihood of the chosen (Hong et al. 2024, arXiv:2403.07691, eq. 6)."""
    return ContrastSpec(
        reference=False,
        length_power=1.0,
        link="log_odds",
        beta=1.0,
        scale=odds_weight,
        anchor=1.0,
        anchor_reduce="mean",
    )


def _kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> ContrastSpec:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8)."""
    return ContrastSpec(
        comparison="single",
        psi="prospect",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def _plackett_luce(beta: float = 0.1) -> ContrastSpec:
    """DPO of rankings: Plackett-Luce (Rafailov et al. 2023, arXiv:2305.18290, appendix A.3)."""
    return ContrastSpec(comparison="k_vs_worse", psi="softmax", beta=beta, within="sum")


def _rrhf(sft_weight: float = 1.0, sft_reduce: Literal["sum", "mean"] = "mean") -> ContrastSpec:
    """``sum max(0, mean_worse - mean_better)`` and likelihood (Yuan et al. 2023, arXiv:2304.05302)."""
    return ContrastSpec(
        comparison="all_pairs",
        psi="hinge",
        reference=False,
        length_power=1.0,
        beta=1.0,
        margin=-1.0,  # max(0, 1 - (d + 1)): no margin at all
        within="sum",
        anchor=sft_weight,
        anchor_reduce=sft_reduce,
    )


def _pro(sft_weight: float = 0.05, standardise_scores: bool = False) -> ContrastSpec:
    """Preference ranking optimisation with score temperatures (Song et al. 2023, arXiv:2306.17492)."""
    return ContrastSpec(
        comparison="k_vs_worse",
        psi="softmax",
        reference=False,
        length_power=1.0,
        beta=1.0,
        score_temperature=True,
        standardise_scores=standardise_scores,
        within="sum",
        anchor=sft_weight,
        anchor_by_size=True,
    )


def _brain(beta: float = 1.0, hard: bool = False, log_weight_cap: float | None = None) -> ContrastSpec:
    """Self-normalised KL to the reward-conditioned posterior (Pandey et al. 2024, arXiv:2402.02479)."""
    return ContrastSpec(
        comparison="group", psi="divergence", beta=beta, hard=hard, log_weight_cap=log_weight_cap
    )


def _copg(beta: float = 0.1) -> ContrastSpec:
    """Contrastive policy gradient, to its scale (Flet-Berliac et al. 2024, arXiv:2406.19185)."""
    return ContrastSpec(comparison="gaps", psi="square", beta=beta, scale=1.0 / (4.0 * beta))


def _spin(beta: float = 0.1) -> ContrastSpec:
    """Data against the previous policy's own samples (Chen et al. 2024, arXiv:2401.01335)."""
    return ContrastSpec(beta=beta)


def _rwr(
    beta: float = 1.0,
    baseline: Literal["zero", "group_mean", "group_best"] = "zero",
    weight_cap: float | None = None,
    self_normalised: bool = False,
    length_normalised: bool = False,
) -> ContrastSpec:
    """Reward-weighted (Peters and Schaal 2007), with a baseline advantage-weighted (Peng et al. 2019)."""
    return ContrastSpec(
        comparison="single",
        psi="weighted",
        reference=False,
        beta=1.0,
        length_power=1.0 if length_normalised else 0.0,
        weight_temperature=beta,
        baseline=baseline,
        weight_cap=weight_cap,
        self_normalised=self_normalised,
        within="sum" if self_normalised else "mean",
    )


def _f_sft(
    beta: float = 0.1, divergence: Divergence = "pearson", length_normalised: bool = False
) -> ContrastSpec:
    """``-G(beta h)`` (Wang et al. 2025, "Implicit Reward as the Bridge", arXiv:2507.00018)."""
    return ContrastSpec(
        comparison="wanted",
        psi="f_sft",
        beta=beta,
        divergence=divergence,
        length_power=1.0 if length_normalised else 0.0,
    )


def _sft(length_normalised: bool = False) -> ContrastSpec:
    """The negative log-likelihood of every row that is not labelled -1."""
    return ContrastSpec(
        comparison="wanted",
        psi="weighted",
        reference=False,
        beta=1.0,
        length_power=1.0 if length_normalised else 0.0,
    )


def _unlikelihood(rejected_weight: float = 1.0, length_normalised: bool = False) -> ContrastSpec:
    """``-s_w + weight * s_l``: the negative gradient alone (Tajwar et al. 2024, arXiv:2404.14367)."""
    return ContrastSpec(
        psi="unlikelihood",
        reference=False,
        beta=1.0,
        rejected_weight=rejected_weight,
        length_power=1.0 if length_normalised else 0.0,
    )


def _reward_augmented(beta: float = 0.01) -> ContrastSpec:
    """DPO on goal-conditioned prompts (Zhang et al. 2024, arXiv:2410.08067)."""
    return ContrastSpec(beta=beta)


def _f_dpo(beta: float = 0.1, link: Link = "jensen_shannon", alpha: float = 0.5) -> ContrastSpec:
    """DPO under another divergence (Wang et al. 2023, arXiv:2309.16240)."""
    return ContrastSpec(beta=beta, link=link, alpha=alpha)


PRESETS: dict[str, Callable[..., ContrastSpec]] = {
    made.__name__[1:]: made
    for made in (
        _dpo,
        _cdpo,
        _rdpo,
        _ipo,
        _slic,
        _hinge_norm,
        _simpo,
        _orpo,
        _kto,
        _plackett_luce,
        _rrhf,
        _pro,
        _brain,
        _copg,
        _spin,
        _rwr,
        _f_sft,
        _sft,
        _unlikelihood,
        _reward_augmented,
        _f_dpo,
    )
}
"""The published losses by name."""


def preset(name: str, **settings: Any) -> ContrastSpec:
    """The published loss of that name with these constants, under the names of its paper.

    >>> preset("ipo", tau=0.5).psi
    'square'

    Raises:
        BadInputError: there is no such loss, it has no such setting, or a setting is out of range.
    """
    if name not in PRESETS:
        raise BadInputError(
            f"There is no contrast loss '{name}'.", advice=f"Known: {', '.join(sorted(PRESETS))}."
        )
    make = PRESETS[name]
    known = inspect.signature(make).parameters
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise BadInputError(
            f"{name} has no setting {', '.join(unknown)}.", advice=f"It has {', '.join(known)}."
        )
    for setting in ("beta", "tau", "gamma", "odds_weight"):
        # Checked before it divides anything.
        value = settings.get(setting, 1.0)
        if (name, setting) != ("simpo", "gamma") and not 0.0 < value < math.inf:
            raise BadInputError(f"{name}: {setting} must be a positive number, got {value}.")
    return replace(make(**settings), name=name)
