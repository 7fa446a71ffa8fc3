"""OpenBezoar: what each stage of a small recipe is good for, the one before DPO above all."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from corrigible.align.contrast import preset
from corrigible.claims.fixtures.adapters import adapted
from corrigible.claims.fixtures.instructions import (
    INSTRUCTION_WORDS,
    SCHEMES,
    Instruction,
    instructions,
    kept_by_judge,
)
from corrigible.claims.fixtures.learning import Candidates, Fit, Row, imitate, prefer, row_logprobs
from corrigible.claims.fixtures.review_policy import compared_candidates, mean_reward, written
from corrigible.claims.fixtures.tiny_lm import (
    Writer,
    first_model,
    prompts,
    review_row,
    reward,
    vocabulary,
    write,
)
from corrigible.claims.fixtures.transformer import SmallTransformer, sample
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Effect, claim

LANGUAGE = vocabulary(*INSTRUCTION_WORDS)
TERSE = Writer(0.5, sentences=(1, 1))
"""Whose reviews the base model knows: one sentence, where those of the preference data have up to three."""
GENERATED, HELD_OUT = 1500, 200
WRONG, RIGHT_KEPT, WRONG_KEPT = 0.4, 0.9, 0.2
"""Share of wrong answers of the generator; what the judge lets through of the right and of the wrong ones."""
PAIRS = 1500
RANK = 8
SFT_STEPS, SFT_LR = 150, 1e-2
REPLAYED = 600
"""Rows of every earlier set, and of terse reviews, that a stage reads again."""
DOMAIN_STEPS = 60
DPO_STEPS, DPO_BATCH, DPO_LR, BETA = 60, 32, 4e-3, 0.1
BATCH = 64


@dataclass(frozen=True)
class Data:
    """Everything that the stages read.

    Attributes:
        generated: answers of the generator by scheme, as they come; ``kept``: what the judge lets through.
        pairs: reviews that were compared; ``more``: instructions that were never read.
    """

    generated: dict[str, list[Instruction]]
    kept: dict[str, list[Instruction]]
    pairs: list[Candidates]
    more: list[Instruction]


def _row(one: Instruction) -> Row:
    return Row(prompt=LANGUAGE.encode(one.asked), response=(*LANGUAGE.encode(one.answer), EOS))


def _data(asked: Sequence[str], seed: int) -> Data:
    random = python_random.Random(seed)
    generated = {
        scheme: instructions(scheme, 100 * seed + i, GENERATED, wrong=WRONG)
        for i, scheme in enumerate(SCHEMES)
    }
    kept = {
        scheme: kept_by_judge(given, 100 * seed + 10 + i, right_kept=RIGHT_KEPT, wrong_kept=WRONG_KEPT)
        for i, (scheme, given) in enumerate(generated.items())
    }
    drawn = [random.choice(asked) for _ in range(PAIRS)]
    pairs = [
        compared_candidates(one, *sorted(two, key=reward, reverse=True), LANGUAGE)
        for one, two in zip(drawn, written(drawn, 2, 100 * seed + 20), strict=True)
        if reward(two[0]) != reward(two[1])
    ]
    more = [one for i, s in enumerate(SCHEMES) for one in instructions(s, 100 * seed + 30 + i, GENERATED)]
    return Data(generated, kept, pairs, more)


def tuned(
    base: SmallTransformer,
    sets: dict[str, list[Instruction]],
    reviews: Sequence[Row],
    seed: int,
    *,
    merged: bool = True,
) -> SmallTransformer:
    """The base after one stage for each set in turn; adapters are merged after each, or one goes on.

    Every stage reads some reviews, and some of the sets before it, again: a model this small would know
    nothing else afterwards.
    """
    model = base.copy()
    earlier = list(reviews)
    with nullcontext() if merged else adapted(model, RANK, seed):
        for i, given in enumerate(sets.values()):
            with adapted(model, RANK, seed + i) if merged else nullcontext():
                rows = [_row(one) for one in given]
                imitate(model, [*earlier, *rows], Fit(steps=SFT_STEPS, rows=BATCH, lr=SFT_LR, seed=seed))
                earlier += rows[:REPLAYED]
    return model


def read_more(model: SmallTransformer, rows: Sequence[Row], seed: int) -> SmallTransformer:
    """The model after the stage before DPO, on whatever rows."""
    after = model.copy()
    with adapted(after, RANK, seed):
        imitate(after, rows, Fit(steps=DOMAIN_STEPS, rows=BATCH, lr=SFT_LR, seed=seed))
    return after


def dpo(model: SmallTransformer, pairs: Sequence[Candidates], seed: int, steps: int) -> SmallTransformer:
    """The model after DPO; its reference is the merged model that comes in."""
    after = model.copy()
    with adapted(after, RANK, seed):
        how = Fit(steps=steps, rows=DPO_BATCH, lr=DPO_LR, seed=seed)
        prefer(after, pairs, how, preset("dpo", beta=BETA), reference=model)
    return after


def accuracy(model: SmallTransformer, test: Sequence[Instruction], seed: int) -> float:
    """Share of instructions that a sample at temperature 1 follows."""
    drawn = sample(model, [LANGUAGE.encode(one.asked) for one in test], tokens=8, temperature=1.0, seed=seed)
    return sum(LANGUAGE.decode(ids) == one.right for ids, one in zip(drawn, test, strict=True)) / len(test)


@torch.no_grad()
def reward_accuracy(
    model: SmallTransformer, reference: SmallTransformer, pairs: Sequence[Candidates]
) -> float:
    """Share of pairs whose better review gained more log-probability over the reference."""
    rows = [row for pair in pairs for row in pair.rows]
    now, then = (
        torch.stack([one.sum() for one in row_logprobs(of, rows)]).view(-1, 2) for of in (model, reference)
    )
    gained = now - then
    return float((gained[:, 0] > gained[:, 1]).float().mean())


@claim(
    "S019",
    title="Fine-tuning on the preference data's domain belongs before DPO",
    paper="Dissanayake et al. 2024, OpenBezoar: Small, Cost-Effective and Open Models Trained on Mixes of "
    "Instruction Data (arXiv:2404.12195)",
    hypothesis="Without the stage of fine-tuning on the preference data's chosen answers, as many steps of "
    "DPO end at a lower reward; without the filter, fewer instructions are followed.",
    figure="Each stage improves a model of 3B on average of ten tasks, and the DPO checkpoint beats many "
    "models of its size (abstract); the stages were not taken out one by one.",
    setting="A base that knows one-sentence reviews; three sets of instructions with one right answer, "
    f"{WRONG:.0%} of the generator's answers wrong, a judge who keeps {RIGHT_KEPT:.0%} of the right and "
    f"{WRONG_KEPT:.0%} of the wrong; then pairs of reviews of up to three sentences with an exact reward. "
    f"Adapters of rank {RANK} in every stage.",
    baselines=(
        "without the stage",
        "without it, as many steps in all",
        "other rows in the stage",
        "either side of the pairs in the stage",
        "filter off",
        "one adapter for all sets",
    ),
    effect=Effect(
        "reward after DPO, all stages minus without the preference data's domain",
        of=lambda v: v["all stages"] - v["without the domain"],
        unit="reward",
    ),
    also=[
        Effect(
            "instructions followed after the sets, filtered minus not",
            of=lambda v: (
                v["instructions followed/after the sets"]
                - v["instructions followed/after the sets, filter off"]
            ),
            unit="share",
        )
    ],
    controls=[
        Effect(
            "reward after DPO, more instructions in the stage minus without it",
            of=lambda v: v["other rows in the stage"] - v["without the domain"],
            unit="reward",
        )
    ],
    seeds=range(5),
    budget=480,
)
def s019(seed: int) -> dict[str, float]:
    """Mean true reward of samples for held-out prompts after all stages, by arm; panels hold what else is
    known of each.

    Two arms tell what the stage does. With chosen answers it brings the reference near the data and shows it
    good answers; with either side of each pair it brings it near alone.
    """
    train, test = prompts(seed, 500, HELD_OUT)
    data = _data(train, seed)
    followed = [one for i, s in enumerate(SCHEMES) for one in instructions(s, 100 * seed + 40 + i, HELD_OUT)]
    held_out = _data(test, seed + 50_000).pairs[:400]
    base = first_model(seed, LANGUAGE, TERSE)
    random = python_random.Random(seed)
    again = [random.choice(train) for _ in range(REPLAYED)]
    terse = [review_row(one, write(TERSE, one, random), LANGUAGE) for one in again]
    kept = tuned(base, data.kept, terse, seed)
    unfiltered = tuned(base, data.generated, terse, seed)
    continued = tuned(base, data.kept, terse, seed, merged=False)
    values = {"base": mean_reward(base, test, LANGUAGE, seed=seed)}
    for name, model in (
        ("base", base),
        ("after the sets", kept),
        ("after the sets, filter off", unfiltered),
        ("after the sets, one adapter", continued),
    ):
        values[f"instructions followed/{name}"] = accuracy(model, followed, seed)

    chosen = [pair.rows[0] for pair in data.pairs]
    either = [random.choice(pair.rows) for pair in data.pairs]
    before: dict[str, Callable[[], SmallTransformer]] = {
        "all stages": lambda: read_more(kept, chosen, seed),
        "without the domain": lambda: kept,
        "without the domain, as many steps in all": lambda: kept,
        "other rows in the stage": lambda: read_more(kept, [_row(one) for one in data.more], seed),
        "either side in the stage": lambda: read_more(kept, either, seed),
        "filter off": lambda: read_more(unfiltered, chosen, seed),
        "one adapter": lambda: read_more(continued, chosen, seed),
    }
    for name, make in before.items():
        reference = make()
        steps = DPO_STEPS + DOMAIN_STEPS * name.endswith("in all")
        model = dpo(reference, data.pairs, seed, steps)
        values[name] = mean_reward(model, test, LANGUAGE, seed=seed)
        values[f"reward before DPO/{name}"] = mean_reward(reference, test, LANGUAGE, seed=seed)
        values[f"instructions followed/{name}"] = accuracy(model, followed, seed)
        values[f"reward accuracy/{name}"] = reward_accuracy(model, reference, held_out)
    return values
