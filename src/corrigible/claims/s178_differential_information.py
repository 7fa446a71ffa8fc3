"""S178 DID: which rejected answers teach a target, and when training makes chosen answers less likely."""

from __future__ import annotations

from math import log2

import torch
from torch import Tensor

from corrigible.align.candidates import optimal_rejected
from corrigible.align.contrast import ContrastSpec, preset
from corrigible.claims.fixtures.outcomes import fit_free, jensen_shannon, kl, normal_policy, tally
from corrigible.claims.fixtures.tabular import generator, sample
from corrigible.claims.framework import Effect, Outcome, Values, claim
from corrigible.evaluate.information import differential_information, entropy, power_law

OUTCOMES, PAIRS = 32, 200_000
BETA = 0.5
DISTANCE = 0.3
"""KL of every target of the second part to its reference, nats."""
REJECTED = ("for beta 1", "uniform", "random")
LOSSES: dict[str, ContrastSpec] = {
    "simpo": preset("simpo", beta=2.0, gamma=1.0),
    "hinge": preset("hinge_norm", gamma=BETA),
    "ipo": preset("ipo", tau=BETA),
    "orpo": preset("orpo"),
}


def learnt(
    reference: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    spec: ContrastSpec,
    random: torch.Generator,
    *,
    toss: bool = False,
) -> Tensor:
    """What a loss makes of pairs whose sides are drawn from two distributions; log-probabilities.

    ``toss``: a coin says which of the two is called the chosen one.
    """
    w, l = sample(chosen, PAIRS, random), sample(rejected, PAIRS, random)  # noqa: E741
    if toss:
        heads = torch.rand(PAIRS, generator=random) < 0.5
        w, l = torch.where(heads, w, l), torch.where(heads, l, w)  # noqa: E741
    return fit_free(reference, tally(w, l, len(reference)), spec)


def at_distance(reference: Tensor, direction: Tensor, distance: float) -> Tensor:
    """``pi_ref exp(c direction) / Z`` with ``c > 0`` such that its KL to the reference is ``distance``."""
    low, high = 0.0, 1.0
    while kl(torch.log_softmax(reference + high * direction, dim=0), reference) < distance and high < 1e6:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        near = kl(torch.log_softmax(reference + middle * direction, dim=0), reference) < distance
        low, high = (middle, high) if near else (low, middle)
    return torch.log_softmax(reference + low * direction, dim=0)


def directions(reference: Tensor, random: torch.Generator) -> dict[str, Tensor]:
    """Ways to leave a reference: along its own log-probabilities, or along what it knows nothing of."""
    order = torch.randperm(OUTCOMES, generator=random)
    raised, lowered = torch.zeros(OUTCOMES, dtype=torch.float64), torch.zeros(OUTCOMES, dtype=torch.float64)
    # One rare answer much more likely: low entropy; a third of the mass less likely: high entropy.
    raised[reference.argsort()[OUTCOMES // 4]] = 1.0
    mass = reference.exp()[order].cumsum(0)
    lowered[order[: int((mass < 0.35).sum()) + 1]] = -1.0
    return {"sharper": reference, "flatter": -reference, "one raised": raised, "some lowered": lowered}


def _others(values: Values, panel: str, names: tuple[str, ...], against: str = "optimal") -> float:
    """Doublings from the distance that optimal pairs leave to the least that others leave."""
    least = min(values[f"{panel}/{name}"] for name in names)
    return log2(least / values[f"JS to the target, rejected answers/{against}"])


@claim(
    "S178",
    title="DPO learns the target from the one right distribution of rejected answers",
    paper='Won et al. 2025, "Differential Information Distribution: A Bayesian Perspective on Direct '
    'Preference Optimization" (arXiv:2505.23761)',
    hypothesis="With chosen answers from the reference and rejected ones from pi_ref (pi_ref / pi*)^beta, "
    "DPO ends within a Jensen-Shannon divergence of 0.01 nats of the target, and at least five times "
    "nearer than with rejected answers for a wrong beta, uniform or random ones; and at equal KL to the "
    "reference, targets of low differential entropy raise the chosen answers while those of high one "
    "lower them.",
    figure="The paper proves the power law and its uniqueness, and shows in a small energy-based model that "
    "DPO with optimal rejected answers converges to the target where other losses do not; in language "
    "models low-entropy data raise the chosen answers and help factual questions, high-entropy data "
    "lower them and help open instructions.",
    setting="32 outcomes, policies that can express anything, 200,000 pairs, a known target: the divergence "
    "to it is an exact sum.",
    baselines=["rejected answers for beta 1 instead of 0.5, uniform, random", *LOSSES],
    effect=Effect(
        "doublings of the JS divergence by the best of three other kinds of rejected answers",
        of=lambda v: _others(v, "JS to the target, rejected answers", REJECTED),
        above=log2(5.0),
    ),
    also=[
        Effect(
            "minus the JS divergence to the target with optimal rejected answers",
            of=lambda v: -v["JS to the target, rejected answers/optimal"],
            above=-0.01,
            unit="nats",
        ),
        Effect(
            "doublings of the JS divergence by the best of four other losses, optimal rejected answers",
            of=lambda v: _others(v, "JS to the target, losses", tuple(LOSSES)),
            above=log2(5.0),
        ),
        Effect(
            "change of the chosen answers' log-prob, sharper target",
            of=lambda v: v["change of chosen/sharper"],
            test="sign",
            unit="nats",
        ),
        Effect(
            "minus the change of the chosen answers' log-prob, flatter target",
            of=lambda v: -v["change of chosen/flatter"],
            test="sign",
            unit="nats",
        ),
        Effect(
            "differential entropy of the flatter minus the sharper target",
            of=lambda v: v["differential entropy/flatter"] - v["differential entropy/sharper"],
            unit="nats",
        ),
    ],
    controls=[
        Effect(
            "doublings of the JS divergence when a coin says who was chosen",
            of=lambda v: _others(v, "JS to the target, rejected answers", REJECTED, "optimal, sides tossed"),
            above=log2(5.0),
        ),
        Effect(
            "change of chosen, low minus high entropy, targets unrelated to the reference",
            of=lambda v: v["change of chosen/one raised"] - v["change of chosen/some lowered"],
            test="sign",
            unit="nats",
        ),
    ],
    seeds=range(20),
    budget=150,
)
def s178(seed: int) -> Outcome:
    """First the pairs: chosen from the reference, rejected from four distributions; then the displacement.

    Where chosen answers are drawn from the reference itself, their mean log-prob can only fall: at the
    optimum it changes by minus KL(reference || target). So that both signs are possible, the second part
    draws the chosen answers from the geometric middle of reference and target, and the rejected ones so that
    the power law still
    holds: the optimum is the target. Its targets are at one KL to the reference: along the reference's own
    log-probs (sharper: low differential entropy; flatter: high), which is what the paper's account is about,
    and, as a control, unrelated to the reference (one rare answer raised: low; a third of the mass lowered:
    high). There
    the signs turn round: what decides is whether the target is sharper than the reference, not the entropy
    alone.
    """
    random = generator(seed, 81)
    reference = normal_policy(OUTCOMES, 1.0, random)
    target = torch.log_softmax(
        reference + torch.randn(OUTCOMES, generator=random, dtype=torch.float64), dim=0
    )
    optimal = torch.from_numpy(optimal_rejected(reference.numpy(), target.numpy(), BETA))
    rejected = {
        "optimal": optimal,
        "for beta 1": torch.from_numpy(optimal_rejected(reference.numpy(), target.numpy(), 1.0)),
        "uniform": normal_policy(OUTCOMES, 0.0, random),
        "random": normal_policy(OUTCOMES, 1.0, random),
    }
    dpo = preset("dpo", beta=BETA)
    panel = "JS to the target, rejected answers"
    values = {f"{panel}/no update": jensen_shannon(reference, target)}
    for name, source in rejected.items():
        values[f"{panel}/{name}"] = jensen_shannon(learnt(reference, reference, source, dpo, random), target)
    tossed = learnt(reference, reference, optimal, dpo, random, toss=True)
    values[f"{panel}/optimal, sides tossed"] = jensen_shannon(tossed, target)
    for name, spec in LOSSES.items():
        found = learnt(reference, reference, optimal, spec, random)
        values[f"JS to the target, losses/{name}"] = jensen_shannon(found, target)

    steep = normal_policy(OUTCOMES, 1.5, random)
    for name, direction in directions(steep, random).items():
        end = at_distance(steep, direction, DISTANCE)
        middle = torch.log_softmax(0.5 * (steep + end), dim=0)
        losers = torch.log_softmax(middle - BETA * (end - steep), dim=0)
        after = learnt(steep, middle, losers, dpo, random)
        values[f"change of chosen/{name}"] = float((middle.exp() * (after - steep)).sum())
        values[f"change of chosen, drawn from the reference/{name}"] = -kl(steep, end)
        values[f"differential entropy/{name}"] = entropy(differential_information(end.numpy(), steep.numpy()))
        law = power_law((middle - losers).numpy(), (after - steep).numpy())
        values[f"power law, slope/{name}"], values[f"power law, R2/{name}"] = law.slope, law.r2
    return Outcome(values)
