"""PRO: do longer rankings teach more than pairs when as many answers are read?"""

from __future__ import annotations

import random as python_random

from corrigible.align.contrast import preset
from corrigible.claims.fixtures.learning import Candidates, Fit, imitate, prefer
from corrigible.claims.fixtures.review_policy import (
    compared_candidates,
    mean_reward,
    ranked_candidates,
    written,
)
from corrigible.claims.fixtures.tiny_lm import first_model, prompts, review_row, reward, vocabulary
from corrigible.claims.framework import Effect, claim

LANGUAGE = vocabulary()
ANSWERS, HELD_OUT = 3000, 200
STEPS, ANSWERS_PER_STEP, LR = 120, 60, 1e-3


@claim(
    "S075",
    title="Longer rankings teach more",
    paper="Song et al. 2023, Preference Ranking Optimization for Human Alignment (arXiv:2306.17492)",
    hypothesis="PRO on pairs earns more reward than imitation of the better one, and on rankings of five "
    "more than on pairs, at the same number of answers read.",
    figure="HH reward: PRO 55.35, imitation 48.83, RRHF 52.25 on raw pairs; 67.97 with rankings of three.",
    setting="Word-level reviews with an exact reward of each word; answers by writers of three known "
    f"qualities, ranked without error. Every arm reads {ANSWERS_PER_STEP} answers a step for {STEPS} steps; "
    "one sample a prompt at temperature 1.",
    baselines=("imitation of the best of two", "RRHF on five", "DPO on the best and worst of five"),
    effect=Effect("PRO on five minus PRO on two", of=lambda v: v["pro, 5"] - v["pro, 2"], unit="reward"),
    also=[
        Effect(
            "PRO on two minus imitation of the better",
            of=lambda v: v["pro, 2"] - v["best of 2"],
            unit="reward",
        )
    ],
    controls=[
        Effect(
            "PRO on five in random order minus imitation of the better",
            of=lambda v: v["pro, 5, shuffled"] - v["best of 2"],
            unit="reward",
        )
    ],
    seeds=range(6),
    budget=420,
    threads=2,
)
def s075(seed: int) -> dict[str, float]:
    """Mean true reward of samples for held-out prompts, by arm.

    Scores are the true rewards, as they are: their scale is PRO's temperature. The weight of its imitation
    term is the paper's, 0.05.
    """
    train, test = prompts(seed, 500, HELD_OUT)
    random = python_random.Random(seed)
    start = first_model(seed, LANGUAGE)
    values = {"before": mean_reward(start, test, LANGUAGE, seed=seed)}
    rankings: dict[int, list[tuple[str, list[str]]]] = {}
    for size in (2, 3, 5):
        asked = [random.choice(train) for _ in range(ANSWERS // size)]
        rankings[size] = [
            (one, sorted(texts, key=reward, reverse=True))
            for one, texts in zip(asked, written(asked, size, 7 * seed + size), strict=True)
            # Of equals none is the better one.
            if reward(max(texts, key=reward)) > reward(min(texts, key=reward))
        ]

    def ranked(size: int, *, shuffled: bool = False) -> list[Candidates]:
        found = []
        for one, texts in rankings[size]:
            scores = [reward(text) for text in texts]
            if shuffled:
                random.shuffle(scores)
            found.append(ranked_candidates(one, texts, scores, LANGUAGE))
        return found

    arms = {
        "pro, 2": (ranked(2), 2, preset("pro")),
        "pro, 3": (ranked(3), 3, preset("pro")),
        "pro, 5": (ranked(5), 5, preset("pro")),
        "pro, 5, shuffled": (ranked(5, shuffled=True), 5, preset("pro")),
        "rrhf, 5": (ranked(5), 5, preset("rrhf")),
        "dpo, best and worst of 5": (
            [compared_candidates(one, texts[0], texts[-1], LANGUAGE) for one, texts in rankings[5]],
            2,
            preset("dpo"),
        ),
    }
    for name, (groups, size, spec) in arms.items():
        model = start.copy()
        prefer(model, groups, Fit(steps=STEPS, rows=ANSWERS_PER_STEP // size, lr=LR, seed=seed), spec)
        values[name] = mean_reward(model, test, LANGUAGE, seed=seed)
    for size in (2, 5):
        model = start.copy()
        rows = [review_row(one, texts[0], LANGUAGE) for one, texts in rankings[size]]
        imitate(model, rows, Fit(steps=STEPS, rows=ANSWERS_PER_STEP, lr=LR, seed=seed))
        values[f"best of {size}"] = mean_reward(model, test, LANGUAGE, seed=seed)
    return values
