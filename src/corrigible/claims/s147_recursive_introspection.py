"""RISE: can a model learn, from its own failures alone, to do better when it is asked again?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from corrigible.align.rendering import Serving, rise, rise_serving
from corrigible.claims.fixtures.chain_policy import (
    BATCH,
    LR,
    first_model,
    share_right,
    solution_row,
    solutions,
)
from corrigible.claims.fixtures.digit_chain import Problem, answer_of, chain_vocabulary, problems
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.lessons import asks, prompt_ids, row_of, says
from corrigible.claims.fixtures.transformer import SmallTransformer, sample
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Effect, Outcome, claim
from corrigible.store.signals import Attempt, Attempts

RETRY = "[INCORRECT. TRY AGAIN]"
SERVING = rise_serving(retry=RETRY)
LANGUAGE = chain_vocabulary(RETRY)
LINKS, DISTRACTORS = 2, 1
TRAINING, ROLLED_OUT, HELD_OUT = 1500, 600, 300
FIRST, STEPS, ITERATIONS = 200, 180, 2
SAMPLES, TURNS = 16, 5
TUNING_LR = 1.5e-3
TEMPERATURE = 0.7


def _first_rows(train: Sequence[Problem]) -> list[Row]:
    """Solutions, and for a third of the problems the same solution once more when asked again.

    A model must know what a conversation is before it can learn anything about what to say in it; this one
    knows how to repeat itself.
    """
    again = [
        Row(
            prompt=prompt_ids(asks(p.question), LANGUAGE, SERVING, answers=[p.solution]),
            response=(*LANGUAGE.encode(p.solution), EOS),
        )
        for p in train[::3]
    ]
    return [*(solution_row(p, LANGUAGE) for p in train), *again]


def _again(
    model: SmallTransformer,
    asked: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    seed: int,
    serving: Serving,
) -> list[str]:
    """One more answer to each question, after those given so far."""
    prompts = [
        prompt_ids(asks(p.question), LANGUAGE, serving, answers=given)
        for p, given in zip(asked, answers, strict=True)
    ]
    drawn = sample(model, prompts, tokens=32, temperature=TEMPERATURE, seed=seed)
    return [LANGUAGE.decode(ids) for ids in drawn]


def _right(problem: Problem, text: str) -> bool | None:
    answer = answer_of(text)
    return None if answer is None else answer == problem.answer


def _rollouts(
    model: SmallTransformer, asked: Sequence[Problem], seed: int, *, first: bool
) -> tuple[list[Attempts], list[Row]]:
    """Failures of the model with an answer of its own that is right, and its right first answers as rows.

    At every state that it visits the best of sixteen of its own samples is the improved answer. In the first
    iteration, where it has never been asked again, those are samples of the question alone.
    """
    drawn = [_again(model, asked, [()] * len(asked), seed * 100 + i, SERVING) for i in range(SAMPLES)]
    conversations, successes = [], []
    visited: list[list[str]] = [[drawn[0][i]] for i in range(len(asked))]
    if not first:
        for i, text in enumerate(_again(model, asked, visited, seed * 100 + 50, SERVING)):
            visited[i].append(text)
        improved = [_again(model, asked, visited, seed * 100 + 60 + i, SERVING) for i in range(SAMPLES // 2)]
        drawn = [*drawn[: SAMPLES // 2], *improved]
    for i, problem in enumerate(asked):
        samples = [texts[i] for texts in drawn if texts[i]]
        right = next((text for text in samples if _right(problem, text)), None)
        if right is None:
            continue
        successes.append(solution_row(problem, LANGUAGE, right))
        tried = [Attempt(response=says(text), right=_right(problem, text)) for text in visited[i] if text]
        conversations.append(
            Attempts(
                prompt=asks(problem.question),
                attempts=(*tried, Attempt(response=says(right), right=True)),
                weight=1.0,
                group=problem.question,
                annotators=("checker",),
                derived_from=(),
            )
        )
    return conversations, successes


def _turns(model: SmallTransformer, asked: Sequence[Problem], seed: int) -> list[list[str]]:
    """Five answers in a row, the model always told that the last one was wrong."""
    given: list[list[str]] = [[] for _ in asked]
    for turn in range(TURNS):
        for answers, text in zip(given, _again(model, asked, given, seed * 10 + turn, SERVING), strict=True):
            answers.append(text)
    return [[answers[turn] for answers in given] for turn in range(TURNS)]


def _majority(asked: Sequence[Problem], answers: Sequence[Sequence[str]]) -> float:
    """Share of problems whose most frequent answer is right; of equals the earliest."""
    right = 0
    for i, problem in enumerate(asked):
        found = [answer for texts in answers if (answer := answer_of(texts[i])) is not None]
        right += bool(found) and Counter(found).most_common(1)[0][0] == problem.answer
    return right / len(asked)


@claim(
    "S147",
    title="RISE improves over turns",
    paper="Qu et al. 2024, Recursive Introspection: Teaching Language Model Agents How to Self-Improve "
    "(arXiv:2407.18219)",
    hypothesis="After two iterations of RISE on its own samples, a model that is always told 'incorrect' is "
    "right more often at the fifth answer than at the first; one tuned on its single right answers is not.",
    figure="GSM8K, five turns: about +17.7 points for Llama-2-7B and +23.9 for Mistral-7B after iterations "
    "(from memory).",
    setting=f"Digit chains of {LINKS} steps with {DISTRACTORS} definition that does not matter, which the "
    f"first model solves in part. Self-distillation from {SAMPLES} own samples on {ROLLED_OUT} problems an "
    f"iteration; answers at temperature {TEMPERATURE}; no oracle at evaluation.",
    baselines=("imitation of single right samples (RFT)", "the first model asked again"),
    effect=Effect(
        "RISE, fifth turn minus first", of=lambda v: v["rise/turn 5"] - v["rise/turn 1"], unit="share right"
    ),
    also=[
        Effect(
            "RISE, majority of turns minus majority of parallel samples",
            of=lambda v: v["rise/majority of turns"] - v["rise/majority of parallel"],
            above=-0.01,
            unit="share right",
        ),
        Effect(
            "first turn, RISE minus RFT",
            of=lambda v: v["rise/turn 1"] - v["rft/turn 1"],
            above=-0.02,
            unit="share right",
        ),
    ],
    controls=[
        Effect(
            "RFT, fifth turn minus first", of=lambda v: v["rft/turn 5"] - v["rft/turn 1"], unit="share right"
        )
    ],
    seeds=range(5),
    budget=480,
    threads=2,
)
def s147(seed: int) -> Outcome:
    """Accuracy of every turn, and of majorities, for RISE, RFT and the model that both start from."""
    train = problems(10 * seed, TRAINING, links=LINKS, distractors=DISTRACTORS)
    fresh = problems(
        10 * seed + 1, ITERATIONS * ROLLED_OUT + HELD_OUT, links=LINKS, distractors=DISTRACTORS, without=train
    )
    test = fresh[ITERATIONS * ROLLED_OUT :]
    start = first_model(seed, LANGUAGE).copy()
    imitate(start, _first_rows(train), Fit(steps=FIRST, rows=BATCH, lr=LR / 2, seed=seed))
    models = {"before": start, "rise": start, "rft": start}
    values, curves = {}, {}
    for iteration in range(ITERATIONS):
        asked = fresh[iteration * ROLLED_OUT : (iteration + 1) * ROLLED_OUT]
        how = Fit(steps=STEPS, rows=BATCH, lr=TUNING_LR, seed=seed + iteration)
        conversations, successes = _rollouts(
            models["rise"], asked, 10 * seed + iteration, first=iteration == 0
        )
        lessons = [lesson for one in conversations for lesson in rise(one, serving=SERVING)]
        if iteration:
            _, successes = _rollouts(models["rft"], asked, 10 * seed + 5 + iteration, first=True)
        # The weights' size is a step size: divided by their mean, as the guide advises.
        rows = [row_of(lesson, LANGUAGE) for lesson in lessons]
        models["rise"], models["rft"] = models["rise"].copy(), models["rft"].copy()
        imitate(models["rise"], rows, how, normaliser="weights")
        imitate(models["rft"], successes, how)
        corrections = sum(len(lesson.turns) > 2 for lesson in lessons)
        values[f"data/share of corrections, iteration {iteration + 1}"] = corrections / len(lessons)
    for name, model in models.items():
        turns = _turns(model, test, 1000 + seed)
        accuracy = [share_right(test, texts) for texts in turns]
        values |= {f"{name}/turn {turn + 1}": share for turn, share in enumerate(accuracy)}
        curves[f"accuracy by turn/{name}"] = (list(range(1, TURNS + 1)), accuracy)
        parallel = [
            solutions(model, test, LANGUAGE, temperature=TEMPERATURE, seed=2000 + seed + i)
            for i in range(TURNS)
        ]
        values[f"{name}/majority of turns"] = _majority(test, turns)
        values[f"{name}/majority of parallel"] = _majority(test, parallel)
        values[f"{name}/right turned wrong"] = sum(
            bool(_right(p, turns[0][i])) and not _right(p, turns[-1][i]) for i, p in enumerate(test)
        ) / len(test)
    return Outcome(values, curves)
