"""Masked thought: does reading a corrupted solution while learning the true one help to solve new "
"problems?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from corrigible.align.corruptors import MaskedThought
from corrigible.claims.fixtures.chain_policy import BATCH, LR, share_right, solution_row, solutions
from corrigible.claims.fixtures.digit_chain import chain_vocabulary, problems
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.transformer import Shape, SmallTransformer
from corrigible.claims.fixtures.vocabulary import MASK
from corrigible.claims.framework import Effect, claim

LANGUAGE = chain_vocabulary()
LINKS, DISTRACTORS = 2, 2
TRAINING, HELD_OUT = 1000, 400
STEPS = 600


def _masked_questions(rows: list[Row], share: float, seed: int) -> list[Row]:
    """The rows with random tokens of their *questions* masked: the same amount of noise in the wrong
    place."""
    random = np.random.default_rng(seed)
    return [
        replace(
            row,
            prompt=tuple(
                MASK if hit else i
                for i, hit in zip(row.prompt, random.random(len(row.prompt)) < share, strict=True)
            ),
        )
        for row in rows
    ]


@claim(
    "S035",
    title="Masked thought helps small models to reason",
    paper="Chen et al. 2024, Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical "
    "Reasoning Learning of Language Models (arXiv:2403.02178)",
    hypothesis="With the same data and steps, learning from solutions whose inputs are partly masked gives "
    "more right answers on held-out problems than plain imitation, and more than dropout does.",
    figure="Llama-2-7B on GSM8K: 42.8 % with imitation, 47.3 % with masked thought; MetaMath-Mistral 77.7 % "
    "and 79.9 %.",
    setting=f"Digit chains of {LINKS} steps with {DISTRACTORS} definitions that do not matter; every answer "
    f"is checked exactly. A transformer of 0.1 M parameters learns {TRAINING} problems for {STEPS} steps of "
    f"{BATCH}.",
    baselines=("imitation", "dropout 0.1", "masked questions"),
    effect=Effect(
        "masked thought minus imitation", of=lambda v: v["mask 0.2"] - v["imitation"], unit="share right"
    ),
    also=[
        Effect(
            "masked thought minus dropout", of=lambda v: v["mask 0.2"] - v["dropout 0.1"], unit="share right"
        )
    ],
    controls=[
        Effect(
            "masked questions minus imitation",
            of=lambda v: v["masked questions"] - v["imitation"],
            unit="share right",
        )
    ],
    seeds=range(5),
    budget=480,
    threads=2,
)
def s035(seed: int) -> dict[str, float]:
    """Share of right answers on held-out problems, and on chains that are one step longer than any in
    training.

    Which of the paper's two corruptions counts is fixed in advance: the mask token at 0.2, its setting for
    most data sets; random tokens at 0.4 (its setting for GSM8K) are reported beside it. The rate of dropout
    is the usual one. Corruption is off when answers are sampled.
    """
    train = problems(10 * seed, TRAINING, links=LINKS, distractors=DISTRACTORS)
    test = problems(10 * seed + 1, HELD_OUT, links=LINKS, distractors=DISTRACTORS, without=train)
    longer = problems(10 * seed + 2, HELD_OUT, links=LINKS + 1, distractors=DISTRACTORS)
    rows = [solution_row(problem, LANGUAGE) for problem in train]
    symbols = tuple(range(MASK + 1, len(LANGUAGE)))
    arms: dict[str, tuple[list[Row], MaskedThought | None, float]] = {
        "imitation": (rows, None, 0.0),
        "mask 0.2": (rows, MaskedThought(0.2, (MASK,)), 0.0),
        "random tokens 0.4": (rows, MaskedThought(0.4, symbols), 0.0),
        "dropout 0.1": (rows, None, 0.1),
        "masked questions": (_masked_questions(rows, 0.2, seed), None, 0.0),
    }
    values = {}
    for name, (data, corrupt, dropout) in arms.items():
        model = SmallTransformer(Shape(vocabulary=len(LANGUAGE), dropout=dropout), seed=seed)
        imitate(model, data, Fit(steps=STEPS, rows=BATCH, lr=LR, seed=seed), corrupt=corrupt)
        values[name] = share_right(test, solutions(model, test, LANGUAGE))
        values[f"longer chains/{name}"] = share_right(longer, solutions(model, longer, LANGUAGE))
    return values
