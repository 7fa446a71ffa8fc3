"""S169: asked for scores, a policy learns what each looks like, and does better when asked for the best."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corrigible.align.contrast import ContrastRows, contrast_loss, preset
from corrigible.align.rendering.goals import GoalScale, goal_pairs
from corrigible.claims.fixtures.tabular import TabPref, draw_pairs, generator
from corrigible.claims.framework import Effect, Outcome, claim
from corrigible.records.items import as_messages
from corrigible.store import Pair
from corrigible.store.signals import Ranked

CONTEXTS, ARMS, FEATURES, PAIRS = 120, 40, 3, 960
BEST = 10.0
GOALS = (2.0, 4.0, 6.0, 8.0)
BETA, HIDDEN = 0.1, 32
STEPS, BATCH, RATE = 1000, 64, 1e-2
LOOKS = 4
"""How often a run is looked at for the curves."""
WELL = 7.0
"""Losers with this score or more are called good ones."""


@dataclass(frozen=True)
class Lessons:
    """Pairs to learn: ``context``, ``chosen``, ``rejected`` and the ``goal`` asked for, all ``(n,)``."""

    context: Tensor
    chosen: Tensor
    rejected: Tensor
    goal: Tensor

    def __len__(self) -> int:
        return len(self.context)

    def take(self, rows: Tensor) -> Lessons:
        return Lessons(self.context[rows], self.chosen[rows], self.rejected[rows], self.goal[rows])


def scored_world(seed: int, part: int) -> TabPref:
    """Contexts whose arms have scores from 1 to 10 that a smooth function of three features gives.

    The reference prefers mediocre arms, with scores about 5. The function is the seed's, the contexts are the
    part's.
    """
    form, random = generator(seed, 120), generator(seed, 121, part)
    first, second = (torch.randn(FEATURES, generator=form, dtype=torch.float64) for _ in range(2))
    features = torch.randn(CONTEXTS, ARMS, FEATURES, generator=random, dtype=torch.float64)
    inside = features @ (first / first.norm()) + 0.25 * torch.sin(2.0 * features @ (second / second.norm()))
    scores = 5.5 + 4.5 * torch.tanh(inside)
    noise = 0.5 * torch.randn(CONTEXTS, ARMS, generator=random, dtype=torch.float64)
    reference = torch.log_softmax(-((scores - 5.0) ** 2) / (2 * 2.0**2) + noise, dim=1)
    return TabPref(features, reference, scores, BETA)


def written(world: TabPref, seed: int) -> list[Ranked]:
    """Two scored arms of a context, as a store would give them, drawn from the reference."""
    context, first, second = draw_pairs(world, PAIRS, generator(seed, 122))
    return [
        Ranked(
            prompt=as_messages(f"context {c}"),
            responses=tuple(as_messages([{"role": "assistant", "content": str(arm)}]) for arm in (a, b)),
            scores=(float(world.rewards[c, a]), float(world.rewards[c, b])),
            weight=1.0,
            group=str(c),
            annotators=("oracle",),
            derived_from=(),
        )
        for c, a, b in zip(context.tolist(), first.tolist(), second.tolist(), strict=True)
    ]


def augmented(rankings: list[Ranked]) -> Lessons:
    """Every pair both ways round under its goals, as the product writes them, read back from its texts."""
    scale = GoalScale(1.0, BEST, {"overall": (1.0, BEST)})
    return _read(
        [pair for ranked in rankings if distinct(ranked, scale) for pair in goal_pairs(ranked, scale)]
    )


def distinct(ranked: Ranked, scale: GoalScale) -> bool:
    """Whether its two scores are different goals; equal ones are learnt by no arm."""
    return len({scale.goal(score, ranked.criterion) for score in ranked.scores}) == 2


def plain(lessons: Lessons, world: TabPref) -> Lessons:
    """The same pairs, each once, the better arm chosen, the best score asked for (which says nothing)."""
    score = world.rewards[lessons.context, lessons.chosen] - world.rewards[lessons.context, lessons.rejected]
    kept = lessons.take(score > 0)
    return Lessons(kept.context, kept.chosen, kept.rejected, torch.full_like(kept.goal, BEST))


def _read(pairs: list[Pair]) -> Lessons:
    asked = ["\n".join(str(message.content) for message in pair.prompt) for pair in pairs]
    goals = [re.findall(r"should be ([\d.]+) out of", text)[0] for text in asked]
    contexts = [re.findall(r"context (\d+)", text)[0] for text in asked]
    return Lessons(
        torch.tensor([int(each) for each in contexts]),
        torch.tensor([int(str(pair.chosen[0].content)) for pair in pairs]),
        torch.tensor([int(str(pair.rejected[0].content)) for pair in pairs]),
        torch.tensor([float(each) for each in goals]),
    )


class GoalPolicy:
    """``pi_ref exp(f(features, goal)) / Z`` with a small network ``f`` that begins as nothing."""

    def __init__(self, seed: int) -> None:
        random = generator(seed, 123)

        def layer(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            weight: Tensor = scale * torch.randn(rows, columns, generator=random) / rows**0.5
            weight.requires_grad_()
            return weight

        self.weights = [layer(FEATURES + 1, HIDDEN), layer(HIDDEN, HIDDEN), layer(HIDDEN, 1, 0.0)]
        self.biases = [torch.zeros(HIDDEN, requires_grad=True) for _ in range(2)]

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def offsets(self, features: Tensor, goal: Tensor) -> Tensor:
        """``f`` of ``(rows, arms, features)`` for goals ``(rows,)``: ``(rows, arms)``."""
        asked = ((goal.float() - 5.5) / 4.5)[:, None, None].expand(-1, features.shape[1], 1)
        x = torch.cat([features.float(), asked], dim=2)
        for weight, bias in zip(self.weights, self.biases, strict=False):
            x = torch.tanh(x @ weight + bias)
        offsets: Tensor = (x @ self.weights[-1])[..., 0]
        return offsets

    def table(self, world: TabPref, goal: float, *, strength: float = 1.0) -> Tensor:
        """Log-probabilities of a world ``(contexts, arms)`` when this goal is asked for; no gradient.

        ``strength`` multiplies ``f``: 0 is the reference.
        """
        with torch.no_grad():
            asked = torch.full((len(world.features),), goal)
            offsets = self.offsets(world.features, asked).double()
            return torch.log_softmax(world.reference + strength * offsets, dim=1)


def train(
    world: TabPref,
    lessons: Lessons,
    seed: int,
    *,
    steps: int = STEPS,
    look: Callable[[int, GoalPolicy], None],
) -> GoalPolicy:
    """DPO by Adam on batches of pairs, the rate falling linearly over the last half."""
    policy = GoalPolicy(seed)
    optimiser = torch.optim.Adam(policy.parameters(), lr=RATE)
    random = generator(seed, 124)
    spec = preset("reward_augmented", beta=BETA)
    features, reference = world.features.float(), world.reference.float()
    group = torch.arange(BATCH).repeat_interleave(2)
    side = torch.tensor([1, -1], dtype=torch.int8).repeat(BATCH)
    for step in range(steps):
        batch = lessons.take(torch.randint(len(lessons), (BATCH,), generator=random))
        base = reference[batch.context]
        logp = torch.log_softmax(base + policy.offsets(features[batch.context], batch.goal), dim=1)
        arms = torch.stack([batch.chosen, batch.rejected], dim=1)
        rows = ContrastRows(
            logp=logp.gather(1, arms).reshape(-1, 1),
            mask=torch.ones(2 * BATCH, 1, dtype=torch.bool),
            group=group,
            ref_logp=base.gather(1, arms).reshape(-1, 1),
            label=side,
        )
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2.0 * (1.0 - step / steps))
        optimiser.zero_grad()
        contrast_loss(rows, spec).loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % (steps // LOOKS) == 0:
            look(step + 1, policy)
    return policy


def at_divergence(policy: GoalPolicy, world: TabPref, divergence: float) -> float:
    """Expected score of a policy whose offsets are scaled so that its KL to the reference is this."""
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        near = world.divergence(policy.table(world, BEST, strength=middle)) < divergence
        low, high = (middle, high) if near else (low, middle)
    return world.reward(policy.table(world, BEST, strength=low))


def kept(world: TabPref, lessons: Lessons, policy: GoalPolicy) -> float:
    """Mean ``log pi - log pi_ref`` of good arms that lost, where their own score is asked for."""
    score = world.rewards[lessons.context, lessons.chosen]
    losers = lessons.take((score < world.rewards[lessons.context, lessons.rejected]) & (score >= WELL))
    with torch.no_grad():
        base = world.reference[losers.context]
        logp = torch.log_softmax(base + policy.offsets(world.features[losers.context], losers.goal), dim=1)
    return float((logp - base).gather(1, losers.chosen[:, None]).mean())


@claim(
    "S169",
    title="Pairs relabelled by a goal teach control, and a better best",
    paper="Zhang et al. 2024, Reward-Augmented Data Enhances Direct Preference Alignment of LLMs "
    "(arXiv:2410.08067)",
    hypothesis="DPO on pairs relabelled by goal scores higher than DPO on the same pairs when the best "
    "score is asked for, and higher than DPO that sees each pair twice as often; it reaches asked "
    "scores of 2, 4, 6 and 8 within 0.6 and does not unlearn good losers.",
    figure="AlpacaEval 2 length-controlled win rate, DPO on raw and on augmented data: Mistral-7B 18.7 and "
    "26, Qwen2-7B 21.5 and 31, Llama-3.1-8B 29 and 31, Gemma-2-9B 51 and 59 (read off bars, 0.5 either "
    "way).",
    setting="120 contexts of 40 arms with known scores from 1 to 10, a reference that prefers scores about "
    "5, 960 pairs that it drew, a network that sees three features of an arm and the goal. Measured on "
    "120 other contexts, exactly.",
    baselines=["DPO on the same pairs", "DPO on each pair twice, for twice the steps"],
    effect=Effect(
        "expected score with goals minus DPO's, equal steps",
        of=lambda v: v["expected score/goals"] - v["expected score/DPO"],
    ),
    also=[
        Effect(
            "expected score with goals minus DPO's on each pair twice, twice the steps",
            of=lambda v: v["expected score/goals"] - v["expected score/DPO, twice the data"],
        ),
        Effect(
            "minus the largest distance of a reached score from the goal",
            of=lambda v: -max(abs(v[f"score reached/goal {goal:g}"] - goal) for goal in GOALS),
            above=-0.6,
        ),
        Effect(
            "log-ratio of good losers under their own goal minus DPO's",
            of=lambda v: v["log-ratio of good losers/goals"] - v["log-ratio of good losers/DPO"],
            unit="nats",
        ),
    ],
    controls=[
        Effect(
            "expected score when goals are dealt out at random minus DPO's",
            of=lambda v: v["expected score/goals at random"] - v["expected score/DPO"],
        ),
    ],
    seeds=range(200, 216),
    budget=480,
)
def s169(seed: int) -> Outcome:
    """Expected score on contexts that were not trained on; the product relabels the pairs and writes the
    goals.

    Two things are reported and not judged. Passing over the pairs twice as often helps plain DPO, too. And
    the policy that is asked for the best leaves the reference further: when DPO's policy is exaggerated to
    the same KL it scores as high, so that goals buy control and distance, not a better score at equal cost.
    Seeds begin at 200, which nobody had looked at when this was written: a first design (threshold 0.1 over
    the better of both lengths of DPO, 1,500 steps) came out inconclusive on seeds 0 to 7, at
    0.11 [-0.12, 0.33], and this one was first run on seeds 100 to 123.
    """
    world, others = scored_world(seed, 0), scored_world(seed, 1)
    both = augmented(written(world, seed))
    once = plain(both, world)
    twice = once.take(torch.arange(len(once)).repeat(2))
    order = torch.randperm(len(both), generator=generator(seed, 125))
    anyhow = Lessons(both.context, both.chosen, both.rejected, both.goal[order])
    arms = {
        "goals": (both, STEPS),
        "DPO": (once, STEPS),
        "DPO, twice the data": (twice, 2 * STEPS),
        "goals at random": (anyhow, STEPS),
    }
    values = {"expected score/reference": others.reward(others.reference)}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    policies: dict[str, GoalPolicy] = {}
    for name, (lessons, steps) in arms.items():
        seen_at: list[float] = []
        seen: list[float] = []

        def look(step: int, policy: GoalPolicy, at: list[float] = seen_at, seen: list[float] = seen) -> None:
            at.append(float(step))
            seen.append(others.reward(policy.table(others, BEST)))

        policies[name] = train(world, lessons, seed, steps=steps, look=look)
        curves[f"expected score by step/{name}"] = (seen_at, seen)
        end = policies[name].table(others, BEST)
        values[f"expected score/{name}"] = others.reward(end)
        values[f"KL to the reference/{name}"] = others.divergence(end)
    for goal in GOALS:
        values[f"score reached/goal {goal:g}"] = others.reward(policies["goals"].table(others, goal))
    values["expected score/DPO at the KL of goals"] = at_divergence(
        policies["DPO"], others, values["KL to the reference/goals"]
    )
    for name in ("goals", "DPO"):
        values[f"log-ratio of good losers/{name}"] = kept(world, both, policies[name])
    return Outcome(values, curves)
