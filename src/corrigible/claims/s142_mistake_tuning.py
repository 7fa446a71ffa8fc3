"""Mistake tuning: do a model's own wrong rationales, marked as wrong, teach it to be right?"""

from __future__ import annotations

from collections.abc import Sequence

from corrigible.align.rendering import PLAIN, mistake_serving, mistakes
from corrigible.align.rendering.mistakes import RIGHT, WRONG
from corrigible.claims.fixtures.chain_policy import (
    BATCH,
    share_right,
    solution_row,
    solutions,
    trained,
    verdicts,
)
from corrigible.claims.fixtures.digit_chain import Problem, chain_vocabulary, problems
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.lessons import asks, row_of, says
from corrigible.claims.framework import Effect, claim
from corrigible.store.signals import Attempt, Attempts

LANGUAGE = chain_vocabulary(RIGHT, WRONG)
LINKS, DISTRACTORS = 2, 1
TRAINING, HELD_OUT = 1500, 500
FIRST, STEPS = 350, 300
TUNING_LR = 2e-3


def _attempts(problem: Problem, wrong: Sequence[str]) -> Attempts:
    """The canonical solution and the model's own mistakes."""
    return Attempts(
        prompt=asks(problem.question),
        attempts=(
            Attempt(response=says(problem.solution), right=True),
            *(Attempt(response=says(text), right=False) for text in wrong),
        ),
        weight=1.0,
        group=problem.question,
        annotators=("checker",),
        derived_from=(),
    )


@claim(
    "S142",
    title="A model learns from its marked mistakes",
    paper="Tong et al. 2024, Can LLMs Learn from Previous Mistakes? Investigating LLMs' Errors to Boost for "
    "Reasoning (arXiv:2403.20046)",
    hypothesis="Tuning on right and own wrong rationales under prefixes that say which is which gives more "
    "right answers than tuning on the right ones alone, even for the same number of tokens.",
    figure="Flan-T5-large: GSM8K 14.28 % to 18.36 %, MathQA 42.79 % to 48.95 %, AQuA 13.10 % to 18.07 %; the "
    "paper does not equalise tokens.",
    setting=f"Digit chains of {LINKS} steps with {DISTRACTORS} definition that does not matter, checked "
    f"exactly. Wrong rationales are sampled from the model after {FIRST} steps on {TRAINING} problems, two "
    "tries a problem.",
    baselines=("right rationales", "right rationales, as many tokens", "both without prefixes"),
    effect=Effect(
        "mistake tuning minus as many right tokens",
        of=lambda v: v["mistakes"] - v["right, as many tokens"],
        unit="share right",
    ),
    also=[
        Effect(
            "mistake tuning minus right rationales",
            of=lambda v: v["mistakes"] - v["right"],
            unit="share right",
        ),
        Effect(
            "asked for a right rationale minus asked for a wrong one",
            of=lambda v: v["mistakes"] - v["mistakes, asked for a wrong one"],
            unit="share right",
        ),
    ],
    controls=[
        Effect(
            "both without prefixes minus as many right tokens",
            of=lambda v: v["no prefixes"] - v["right, as many tokens"],
            unit="share right",
        )
    ],
    seeds=range(6),
    budget=480,
    threads=2,
)
def s142(seed: int) -> dict[str, float]:
    """Share of right answers on held-out problems, greedy, asked with the prefix for a right rationale.

    All arms go on from the model whose mistakes they are. Mistakes that reach the right answer are left out
    by the renderer. "As many tokens" repeats right rationales until they are as many tokens as right and
    wrong ones.
    """
    train = problems(10 * seed, TRAINING, links=LINKS, distractors=DISTRACTORS)
    test = problems(10 * seed + 1, HELD_OUT, links=LINKS, distractors=DISTRACTORS, without=train)
    right = [solution_row(problem, LANGUAGE) for problem in train]
    first = trained(right, LANGUAGE, steps=FIRST, seed=seed)
    wrong: list[list[str]] = [[] for _ in train]
    for attempt in range(2):
        texts = solutions(first, train, LANGUAGE, temperature=1.0, seed=2 * seed + attempt)
        for found, text, verdict in zip(wrong, texts, verdicts(train, texts), strict=True):
            if not verdict.right and text and text not in found:
                found.append(text)
    marked: list[Row] = []
    unmarked: list[Row] = []
    for problem, texts in zip(train, wrong, strict=True):
        marked += [row_of(lesson, LANGUAGE) for lesson in mistakes(_attempts(problem, texts))]
        unmarked += [solution_row(problem, LANGUAGE, text) for text in (problem.solution, *texts)]
    share_wrong = 1.0 - TRAINING / len(marked)
    steps = {"right": round(STEPS * (1.0 - share_wrong))}
    values = {
        "before": share_right(test, solutions(first, test, LANGUAGE)),
        "data/share of wrong rationales": share_wrong,
    }
    arms = {
        "right": (right, PLAIN),
        "right, as many tokens": (right, PLAIN),
        "mistakes": (marked, mistake_serving()),
        "no prefixes": (unmarked, PLAIN),
    }
    for name, (rows, serving) in arms.items():
        model = first.copy()
        imitate(model, rows, Fit(steps=steps.get(name, STEPS), rows=BATCH, lr=TUNING_LR, seed=seed))
        values[name] = share_right(test, solutions(model, test, LANGUAGE, serving=serving))
        if name == "mistakes":
            asked = solutions(model, test, LANGUAGE, serving=mistake_serving(right=False))
            values["mistakes, asked for a wrong one"] = share_right(test, asked)
    return values
