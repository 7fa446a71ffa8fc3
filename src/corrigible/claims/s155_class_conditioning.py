"""C-RLFT: can a class of demonstrators as a condition and a weight make good use of mixed data?"""

from __future__ import annotations

import random as python_random

from corrigible.align.rendering import PLAIN, class_conditioned, class_serving
from corrigible.claims.fixtures.chain_policy import (
    BATCH,
    LR,
    first_model,
    share_right,
    solution_row,
    solutions,
)
from corrigible.claims.fixtures.digit_chain import Problem, chain_vocabulary, problems, solution_with_error
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.lessons import asks, row_of, says
from corrigible.claims.framework import Effect, claim
from corrigible.store.signals import Demonstrated

CLASSES = ("expert", "casual")
LANGUAGE = chain_vocabulary(*(word for name in CLASSES for word in (f"{name} user:", f"{name} assistant:")))
LINKS, DISTRACTORS = 2, 0
TRAINING, HELD_OUT = 2000, 400
EXPERTS = 0.1
CARELESS = 0.7
STEPS = 300


def _careless(problem: Problem, random: python_random.Random) -> str:
    """By a casual writer, who often takes the first minus for plus."""
    if random.random() >= CARELESS:
        return problem.solution
    minus = [i for i, definition in enumerate(problem.path) if definition.operator == "-"]
    if not minus:
        return problem.solution
    text = solution_with_error(problem, random, error="operator", at=minus[0])
    # Minus five is plus five, mod ten.
    return text if text is not None else problem.solution


def _demonstrated(problem: Problem, text: str, quality: str) -> Demonstrated:
    return Demonstrated(
        prompt=asks(problem.question),
        response=says(text),
        weight=1.0,
        group=problem.question,
        annotators=(quality,),
        derived_from=(),
        quality=quality,
    )


@claim(
    "S155",
    title="Class-conditioned fine-tuning makes use of mixed data",
    paper="Wang et al. 2023, OpenChat: Advancing Open-source Language Models with Mixed-Quality Data "
    "(arXiv:2309.11235)",
    hypothesis="From one tenth expert and nine tenths casual demonstrations, C-RLFT solves more held-out "
    "problems than imitation of all of them, and no fewer than imitation of the experts alone.",
    figure="OpenChat-13B has the best average of the open 13B models of its time; condition and weight both "
    "matter.",
    setting=f"Digit chains of {LINKS} steps, checked exactly. {TRAINING} demonstrations; casual writers take "
    f"the first minus for plus {CARELESS:.0%} of the time. All arms: {STEPS} steps from a model that solves "
    "chains of one step, greedy answers.",
    baselines=("imitation of all", "experts alone", "weights alone", "condition alone"),
    effect=Effect("C-RLFT minus imitation of all", of=lambda v: v["c-rlft"] - v["all"], unit="share right"),
    also=[
        Effect(
            "C-RLFT minus experts alone",
            of=lambda v: v["c-rlft"] - v["experts alone"],
            above=-0.01,
            unit="share right",
        ),
        Effect(
            "asked as an expert minus asked as a casual writer",
            of=lambda v: v["condition alone"] - v["condition alone, asked as casual"],
            unit="share right",
        ),
    ],
    controls=[
        Effect(
            "classes at random minus imitation of all",
            of=lambda v: v["classes at random"] - v["all"],
            unit="share right",
        )
    ],
    seeds=range(5),
    budget=480,
    threads=2,
)
def s155(seed: int) -> dict[str, float]:
    """Share of right answers on held-out problems, asked under the expert condition where there is one."""
    random = python_random.Random(seed)
    train = problems(10 * seed, TRAINING, links=LINKS, distractors=DISTRACTORS)
    test = problems(10 * seed + 1, HELD_OUT, links=LINKS, distractors=DISTRACTORS, without=train)
    experts = round(EXPERTS * TRAINING)
    texts = [p.solution if i < experts else _careless(p, random) for i, p in enumerate(train)]
    classes = [CLASSES[0] if i < experts else CLASSES[1] for i in range(TRAINING)]
    shuffled = random.sample(classes, len(classes))

    def conditioned(of: list[str], other_weight: float) -> list[Row]:
        return [
            row_of(class_conditioned(_demonstrated(p, text, name), other_weight=other_weight), LANGUAGE)
            for p, text, name in zip(train, texts, of, strict=True)
        ]

    plain = [solution_row(p, LANGUAGE, text) for p, text in zip(train, texts, strict=True)]
    weighted = conditioned(classes, 0.1)
    expert = class_serving(CLASSES[0])
    arms = {
        "all": (plain, PLAIN),
        "experts alone": (plain[:experts], PLAIN),
        "weights alone": (
            [
                Row(prompt=row.prompt, response=row.response, weight=1.0 if i < experts else 0.1)
                for i, row in enumerate(plain)
            ],
            PLAIN,
        ),
        "condition alone": (conditioned(classes, 1.0), expert),
        "c-rlft": (weighted, expert),
        "classes at random": (conditioned(shuffled, 0.1), expert),
    }
    values = {}
    for name, (rows, serving) in arms.items():
        model = first_model(seed, LANGUAGE).copy()
        imitate(model, rows, Fit(steps=STEPS, rows=BATCH, lr=LR / 2, seed=seed))
        values[name] = share_right(test, solutions(model, test, LANGUAGE, serving=serving))
        if name == "condition alone":
            casual = solutions(model, test, LANGUAGE, serving=class_serving(CLASSES[1]))
            values[f"{name}, asked as casual"] = share_right(test, casual)
    return values
