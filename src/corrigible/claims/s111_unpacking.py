"""Unpacking DPO and PPO: what do data, algorithm, reward model and prompts each contribute?"""

from __future__ import annotations

import random as python_random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from corrigible.align.advantages import group_advantages
from corrigible.align.contrast import preset
from corrigible.align.grpo import grpo_loss
from corrigible.claims.fixtures.learning import Candidates, Fit, Row, descend, pad, prefer, row_logprobs
from corrigible.claims.fixtures.review_policy import compared_candidates, written
from corrigible.claims.fixtures.tiny_lm import (
    MOST_TOKENS,
    first_model,
    prompts,
    reviews,
    reward,
    vocabulary,
)
from corrigible.claims.fixtures.transformer import SmallTransformer, sample
from corrigible.claims.framework import Effect, Values, claim
from corrigible.rewards.losses import bradley_terry_loss

LANGUAGE = vocabulary()
SEEN, BROAD, HELD_OUT = 60, 500, 150
"""Prompts of the preference data, prompts without any preference, and those that are measured."""
ACCURACIES = (0.65, 0.9)
PAIRS = (500, 4000)
DPO_STEPS, DPO_BATCH, DPO_LR, DPO_BETA = 60, 32, 1e-3, 0.1
RM_BATCH, RM_STEPS, RM_LR = 64, (32, 64), 4e-3
ROUNDS, ROLLED_OUT, MINIBATCH, PPO_LR, KL = 12, 256, 64, 1e-3, 0.05


@dataclass(frozen=True)
class Cell:
    """One combination of levels, 0 or 1 each.

    Attributes:
        accuracy: of the annotator. source: the policy's own answers rather than other writers'.
        pairs: how many the reward model is fitted on. broad: PPO's prompts are not those of the pairs alone.
    """

    accuracy: int
    source: int
    pairs: int = 1
    broad: int = 0


DPO_CELLS = tuple(Cell(a, s) for a, s in product((0, 1), repeat=2))
PPO_CELLS = tuple(Cell(a, s, p, (a + s + p) % 2) for a, s, p in product((0, 1), repeat=3))
"""Half of the 2^4 design of PPO (resolution IV): main effects are mixed with interactions of three alone."""


def _labelled(
    asked: Sequence[str], drawn: Sequence[Sequence[str]], accuracy: float, seed: int
) -> list[Candidates]:
    """Pairs as an annotator sees them who is right so often; equal ones are left out."""
    random = python_random.Random(seed)
    found = []
    for one, (first, second) in zip(asked, drawn, strict=True):
        right = random.random() < accuracy
        if not first or not second or reward(first) == reward(second):
            continue
        better, worse = (first, second) if (reward(first) > reward(second)) == right else (second, first)
        found.append(compared_candidates(one, better, worse, LANGUAGE))
    return found


class _RewardModel(SmallTransformer):
    """The first model with a number read off every position of an answer; their sum is its reward, nats."""

    def __init__(self, start: SmallTransformer) -> None:
        super().__init__(start.shape, seed=0)
        self.load_state_dict(start.state_dict())
        self.head = nn.Parameter(torch.zeros(start.shape.width))

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        """``(n,)``."""
        # A batch is without its last column: the end of an answer is not read, all that was said is.
        batch = pad(rows)
        each = self(batch.inputs) @ self.head
        read: Tensor = (each * batch.scored).sum(dim=1) / MOST_TOKENS
        return read


def fit_reward(start: SmallTransformer, pairs: Sequence[Candidates], seed: int) -> _RewardModel:
    """A reward model after the product's Bradley-Terry loss: one epoch, or four on the small set."""
    model = _RewardModel(start)
    steps = RM_STEPS[len(pairs) > PAIRS[0]]
    how = Fit(steps=steps, rows=RM_BATCH, lr=RM_LR, seed=seed)

    def loss(chosen: list[int], step: int) -> Tensor:
        scores = model.rewards([row for i in chosen for row in pairs[i].rows]).view(-1, 2)
        return bradley_terry_loss(scores[:, 0], scores[:, 1]).loss

    descend(model, how, pairs, loss)
    return model


def accuracy_of(model: _RewardModel, pairs: Sequence[Candidates]) -> float:
    """Share of pairs that it orders as their annotator did."""
    with torch.no_grad():
        scores = model.rewards([row for pair in pairs for row in pair.rows]).view(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).float().mean())


def ppo(start: SmallTransformer, judge: _RewardModel, asked: Sequence[str], seed: int) -> SmallTransformer:
    """A policy after rounds of one answer a prompt, learnt from in minibatches under a KL penalty."""
    model, random = start.copy(), python_random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PPO_LR, betas=(0.9, 0.98), weight_decay=0.0)
    how = Fit(steps=ROUNDS, lr=PPO_LR)
    for turn in range(ROUNDS):
        for group in optimiser.param_groups:
            group["lr"] = how.rate(turn)
        chosen = [LANGUAGE.encode(random.choice(asked)) for _ in range(ROLLED_OUT)]
        drawn = sample(model, chosen, tokens=MOST_TOKENS, temperature=1.0, seed=1000 * seed + turn)
        rows = [Row(prompt=p, response=r) for p, r in zip(chosen, drawn, strict=True)]
        with torch.no_grad():
            rewards = judge.rewards(rows)
            behaviour, reference = row_logprobs(model, rows), row_logprobs(start, rows)
        # No critic: the batch's mean is the baseline, and its deviation the unit.
        advantages = group_advantages(rewards, torch.zeros(len(rows), dtype=torch.int64))
        for at in range(0, len(rows), MINIBATCH):
            part = slice(at, at + MINIBATCH)
            lengths = torch.tensor([len(row.response) for row in rows[part]])
            optimiser.zero_grad()
            loss = grpo_loss(
                torch.cat(row_logprobs(model, rows[part])),
                torch.cat(behaviour[part]),
                advantages[part],
                torch.repeat_interleave(torch.arange(len(lengths)), lengths),
                reference_logprobs=torch.cat(reference[part]),
                beta=KL,
            ).loss
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return model


def dpo(start: SmallTransformer, pairs: Sequence[Candidates], seed: int) -> SmallTransformer:
    """A policy after DPO on these pairs."""
    model = start.copy()
    how = Fit(steps=DPO_STEPS, rows=DPO_BATCH, lr=DPO_LR, seed=seed)
    prefer(model, pairs, how, preset("dpo", beta=DPO_BETA))
    return model


def _mean(values: Values, algorithm: str, **levels: int) -> float:
    """Mean reward over the cells of an algorithm that have these levels."""
    cells = DPO_CELLS if algorithm == "dpo" else PPO_CELLS
    of = [values[_name(algorithm, c)] for c in cells if all(getattr(c, f) == x for f, x in levels.items())]
    return sum(of) / len(of)


def _name(algorithm: str, cell: Cell) -> str:
    source = ("others' answers", "own answers")[cell.source]
    name = f"{algorithm}/{ACCURACIES[cell.accuracy]:.0%} right, {source}"
    if algorithm == "ppo":
        name += f", {PAIRS[cell.pairs]} pairs, {('seen', 'broad')[cell.broad]} prompts"
    return name


def contributions(values: Values) -> dict[str, float]:
    """Main effect of each factor on true reward; the data's are the mean of both algorithms'."""

    def of(factor: str, *algorithms: str) -> float:
        gains = [_mean(values, a, **{factor: 1}) - _mean(values, a, **{factor: 0}) for a in algorithms]
        return sum(gains) / len(gains)

    return {
        "data": of("accuracy", "dpo", "ppo"),
        "algorithm": _mean(values, "ppo", pairs=1) - _mean(values, "dpo"),
        "reward model": of("pairs", "ppo"),
        "prompts": of("broad", "ppo"),
        "own answers": of("source", "dpo", "ppo"),
    }


PAPERS_ORDER = ("data", "algorithm", "reward model", "prompts")


def _data_over_the_rest(values: Values) -> float:
    found = contributions(values)
    return found["data"] - max(found[name] for name in PAPERS_ORDER[1:])


def _agreement(values: Values) -> float:
    """Spearman's correlation with the paper's order, in [-1, 1]."""
    found = contributions(values)
    return float(spearmanr([4, 3, 2, 1], [found[name] for name in PAPERS_ORDER]).statistic)


@claim(
    "S111",
    title="Better data matters more than the algorithm",
    paper="Ivison et al. 2024, Unpacking DPO and PPO: Disentangling Best Practices for Learning from "
    "Preference Feedback (arXiv:2406.09279)",
    hypothesis="Annotators who are right 90 rather than 65 % of the time add more reward than PPO in place "
    "of DPO, a reward model of 4000 rather than 500 pairs, or prompts beyond those of the pairs, in about "
    "this order.",
    figure="Better preference data up to 8 % (instruction following, truthfulness), PPO over DPO up to 2.5 % "
    "(mathematics; 1.2 % in general), larger reward models up to 5 % on mathematics and little elsewhere, "
    "prompts least (abstract).",
    setting="Word-level reviews with an exact reward. DPO: all four kinds of data (annotator's accuracy, "
    f"others' or own answers), {PAIRS[1]} pairs. PPO: half of the 2^4 design of kind of data, pairs of the "
    f"reward model ({PAIRS[0]}, {PAIRS[1]}) and prompts ({SEEN} of the pairs, or {BROAD} more), where "
    "prompts are broad when an odd number of the others is high. One answer a prompt, whitened rewards, "
    "no critic.",
    baselines=("the model before", "DPO on pairs labelled by coin flips"),
    effect=Effect("data minus the largest other contribution", of=_data_over_the_rest, unit="reward"),
    also=[
        Effect("rank correlation with the paper's order", of=_agreement, above=0.6),
    ],
    controls=[
        Effect(
            "DPO on coin flips minus the model before",
            of=lambda v: v["coin flips"] - v["before"],
            unit="reward",
        )
    ],
    seeds=range(5),
    budget=480,
)
def s111(seed: int) -> dict[str, float]:
    """Mean true reward of two samples a held-out prompt, by cell; each factor's contribution; shares won.

    The reward model is fitted on the pairs that DPO would learn from. A contribution is a main effect in
    reward; whose answers the pairs hold is a factor of its own, reported, which the paper's order does not
    have. Won against the model before, ties one half, is reported apart from reward.
    """
    seen, broad, test = prompts(seed, SEEN, BROAD, HELD_OUT)
    random = python_random.Random(seed)
    start = first_model(seed, LANGUAGE)
    test = [one for one in test for _ in range(2)]
    ids = [LANGUAGE.encode(one) for one in test]
    before = [reward(text) for text in reviews(start, ids, LANGUAGE, seed=seed)]
    values = {"before": sum(before) / len(before)}

    asked = [random.choice(seen) for _ in range(PAIRS[1])]
    twice = [LANGUAGE.encode(one) for one in asked for _ in range(2)]
    own = reviews(start, twice, LANGUAGE, seed=10 * seed + 1)
    drawn = (written(asked, 2, 10 * seed + 2), list(zip(own[::2], own[1::2], strict=True)))
    checked = _labelled(test, written(test, 2, 10 * seed + 3), 1.0, seed)

    def labelled(cell: Cell) -> list[Candidates]:
        n = PAIRS[cell.pairs]
        return _labelled(
            asked[:n], drawn[cell.source][:n], ACCURACIES[cell.accuracy], 10 * seed + 4 + cell.source
        )

    def measure(name: str, model: SmallTransformer) -> None:
        after = [reward(text) for text in reviews(model, ids, LANGUAGE, seed=seed + 1)]
        values[name] = sum(after) / len(after)
        won = [0.5 * (a > b) + 0.5 * (a >= b) for a, b in zip(after, before, strict=True)]
        values[f"won, {name}"] = sum(won) / len(won)

    for cell in DPO_CELLS:
        measure(_name("dpo", cell), dpo(start, labelled(cell), seed))
    for cell in PPO_CELLS:
        judge = fit_reward(start, labelled(cell), seed)
        values[f"reward model's accuracy/{_name('', cell)[1:]}"] = accuracy_of(judge, checked)
        measure(_name("ppo", cell), ppo(start, judge, [*seen, *broad] if cell.broad else seen, seed))
    flips = _labelled(asked, drawn[0], 0.5, 10 * seed + 6)
    measure("coin flips", dpo(start, flips, seed))
    return values | {f"contribution/{name}": value for name, value in contributions(values).items()}
