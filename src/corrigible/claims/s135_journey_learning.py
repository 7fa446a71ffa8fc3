"""Journey learning: is the whole search, with its wrong turns, a better lesson than the solution?"""

from __future__ import annotations

import random as python_random
from collections.abc import Sequence

import numpy as np

from corrigible.align.rendering import Segment, journey, shortcut
from corrigible.align.rendering.journey import Reasons
from corrigible.claims.fixtures.chain_policy import BATCH, trained
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.search_task import (
    Search,
    calculation,
    search_vocabulary,
    searches,
    solved,
    tries,
)
from corrigible.claims.fixtures.transformer import SmallTransformer, sample
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Effect, claim

LANGUAGE = search_vocabulary()
SHORT, LONG, HELD_OUT = 3000, 300, 300
FIRST, STEPS = 600, 200
TRIALS = 4
TEXTS = 4
TOKENS = 128
TUNING_LR = 2e-3


def _row(problem: Search, segments: Sequence[Segment]) -> Row:
    text = "".join(segment.text for segment in segments)
    return Row(prompt=LANGUAGE.encode(problem.question), response=(*LANGUAGE.encode(text), EOS))


def _journey(problem: Search, rng: np.random.Generator, reasons: Reasons = "needed") -> tuple[Segment, ...]:
    """A search with one to three wrong turns at each right step: how many says nothing about what comes "
    "next."""
    return journey(problem.tree(), rng, trials=int(rng.integers(2, TRIALS + 1)), reasons=reasons)


def _lost(one: Search, other: Search, rng: np.random.Generator) -> list[Segment]:
    """The wrong turns of another problem's search, then this problem's solution."""
    turns = [segment for segment in _journey(other, rng) if segment.kind != "response"]
    return [*turns, *shortcut(one.tree(), rng)]


def _measured(model: SmallTransformer, test: Sequence[Search]) -> tuple[float, float, float]:
    """Share solved within the budget of tokens; of those that went back once at least; mean ways tried."""
    drawn = sample(model, [LANGUAGE.encode(p.question) for p in test], tokens=TOKENS)
    texts = [LANGUAGE.decode(ids) if ids[-1] == EOS else "" for ids in drawn]
    right = [solved(p, text) for p, text in zip(test, texts, strict=True)]
    back = [r for r, ids in zip(right, drawn, strict=True) if tries(LANGUAGE.decode(ids)) > 1]
    ways = sum(tries(LANGUAGE.decode(ids)) for ids in drawn) / len(drawn)
    return sum(right) / len(right), sum(back) / len(back) if back else 0.0, ways


@claim(
    "S135",
    title="The journey teaches more than the shortcut",
    paper="Qin et al. 2024, O1 Replication Journey: A Strategic Progress Report - Part 1 (arXiv:2410.18982)",
    hypothesis="After the same first phase, tuning on whole searches solves more new problems than tuning on "
    "their solutions, even on as many tokens of solutions to other problems.",
    figure="500 MATH problems: shortcut 38.6 %, journey 47.0 % (base 37.2 %); on another base 34.8 % and "
    "42.8 % (29.0 %).",
    setting="Two of four operations must lead from a digit to another; the tree is enumerated, solutions are "
    f"checked. Phase 1: {SHORT // 3} solutions and {SHORT} calculations. Phase 2: {LONG} problems, up to "
    f"{TEXTS} texts each, {STEPS} steps. {TOKENS} tokens to answer in for every arm, greedy; a text that "
    "does not end is not solved.",
    baselines=("solutions", "as many tokens of solutions to more problems", "searches without reasons"),
    effect=Effect(
        "search minus as many tokens of solutions",
        of=lambda v: v["journey"] - v["shortcut, as many tokens"],
        unit="share solved",
    ),
    also=[Effect("search minus solutions", of=lambda v: v["journey"] - v["shortcut"], unit="share solved")],
    controls=[
        Effect(
            "another problem's wrong turns minus solutions",
            of=lambda v: v["another's journey"] - v["shortcut"],
            unit="share solved",
        )
    ],
    seeds=range(5),
    budget=480,
    threads=2,
)
def s135(seed: int) -> dict[str, float]:
    """Share of new problems solved, share solved after going back at least once, and ways tried, by arm."""
    first = searches(10 * seed, SHORT)
    second = searches(10 * seed + 1, LONG, without=first)
    test = searches(10 * seed + 2, HELD_OUT, without=[*first, *second])
    rng = np.random.default_rng(seed)
    random = python_random.Random(seed)
    # In solutions the last result is the target, whatever is added: arithmetic is learnt from calculations.
    sums = [calculation(p, random) for p in first]
    known = [Row(prompt=LANGUAGE.encode(q), response=(*LANGUAGE.encode(a), EOS)) for q, a in sums]
    solutions = [_row(p, shortcut(p.tree(), rng)) for p in first[: SHORT // 3]]
    start = trained([*solutions, *known], LANGUAGE, steps=FIRST, seed=seed)
    second = second * TEXTS
    journeys = [_row(p, _journey(p, rng)) for p in second]
    short = [_row(p, shortcut(p.tree(), rng)) for p in second]
    more = round(
        len(short) * sum(len(row.response) for row in journeys) / sum(len(row.response) for row in short)
    )
    other = searches(10 * seed + 3, more, without=[*first, *second, *test])
    arms = {
        "shortcut": short,
        "shortcut, as many tokens": [_row(p, shortcut(p.tree(), rng)) for p in other],
        "journey": journeys,
        "journey without reasons": [_row(p, _journey(p, rng, "none")) for p in second],
        "another's journey": [_row(p, _lost(p, second[i - 1], rng)) for i, p in enumerate(second)],
    }
    values = {"before": _measured(start, test)[0]}
    for name, rows in arms.items():
        model = start.copy()
        # Solutions are short: a batch of as many tokens holds more of them.
        size = round(BATCH * more / len(short)) if name == "shortcut, as many tokens" else BATCH
        imitate(model, rows, Fit(steps=STEPS, rows=size, lr=TUNING_LR, seed=seed))
        values[name], values[f"solved after going back/{name}"], values[f"ways tried/{name}"] = _measured(
            model, test
        )
    return values
