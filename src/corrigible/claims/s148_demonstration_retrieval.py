"""Demonstration retrieval: does a small model do better on new tasks when its examples are looked up?"""

from __future__ import annotations

import random as python_random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from corrigible.align.rendering import Bank, with_demonstrations
from corrigible.align.rendering.demonstrations import question_text
from corrigible.align.retrieval import Encode
from corrigible.claims.fixtures.families import FAMILIES, FRAMES, Family, families, family_vocabulary
from corrigible.claims.fixtures.learning import Fit, Row, imitate
from corrigible.claims.fixtures.lessons import asks, row_of
from corrigible.claims.fixtures.transformer import Shape, SmallTransformer, sample
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Effect, claim
from corrigible.store.signals import Demonstrated

LANGUAGE = family_vocabulary()
HELD_OUT_FAMILIES, SHOTS = 4, 3
WORLDS, NEIGHBOURS = 60, 4
META_STEPS, TUNING_STEPS, BATCH = 350, 40, 64
META_LR, TUNING_LR = 3e-3, 5e-4

Demonstrations = Sequence[Demonstrated]


@lru_cache(maxsize=1)
def _encode() -> Encode:
    from corrigible.models import load_encoder

    return load_encoder("minilm").encode


def _rows(
    questions: Demonstrations, before: Sequence[Demonstrations], rng: np.random.Generator | None
) -> list[Row]:
    """Questions after their examples; without any, questions alone."""
    rows = []
    for one, examples in zip(questions, before, strict=True):
        if examples:
            rows.append(row_of(with_demonstrations(one, examples, rng), LANGUAGE))
        else:
            answer = LANGUAGE.encode(one.response[0].text)
            rows.append(Row(prompt=LANGUAGE.encode(question_text(one.prompt)), response=(*answer, EOS)))
    return rows


def _meta_rows(training: Sequence[str], near: bool | None, seed: int) -> list[Row]:
    """Questions of many worlds: the same requests, with other code words in each.

    Args:
        training: names of the families.
        near: whether a question's examples are its neighbours, any others, or (``None``) none.
        seed: of worlds and draws.
    """
    random, rng = python_random.Random(seed), np.random.default_rng(seed)
    rows: list[Row] = []
    order: list[list[int]] = []
    for world in range(WORLDS):
        drawn = {family.name: family for family in families(1000 * (seed + 1) + world)}
        bank = [one for name in training for part in drawn[name].examples(seed) for one in part]
        if not order:
            # The requests are the same in every world: neighbours are looked up once.
            place = {question_text(one.prompt): i for i, one in enumerate(bank)}
            found = Bank.of(bank, _encode()).neighbours(NEIGHBOURS)
            order = [[place[question_text(other.prompt)] for other in others] for others in found]
        before: list[list[Demonstrated]] = [[] for _ in bank]
        if near:
            before = [[bank[i] for i in others] for others in order]
        elif near is not None:
            before = [random.sample([o for o in bank if o is not one], NEIGHBOURS) for one in bank]
        rows += _rows(bank, before, rng)
    return rows


def _accuracy(model: SmallTransformer, questions: Demonstrations, before: Sequence[Demonstrations]) -> float:
    """Share of questions answered with their class's code word."""
    drawn = sample(model, [row.prompt for row in _rows(questions, before, None)], tokens=2)
    answers = [LANGUAGE.decode(ids) for ids in drawn]
    right = sum(answer == one.response[0].text for answer, one in zip(answers, questions, strict=True))
    return right / len(questions)


def _framed(one: Demonstrated, request: str) -> list[Demonstrated]:
    """A question in every frame."""
    return [replace(one, prompt=asks(frame.format(request))) for frame in FRAMES]


def _split(held_out: Sequence[Family], seed: int) -> tuple[list[Demonstrated], list[Demonstrated]]:
    """Shots of every class, and questions about its other requests in all frames."""
    shots: list[Demonstrated] = []
    questions: list[Demonstrated] = []
    for family in held_out:
        for requests, examples in zip(family.requests, family.examples(seed), strict=True):
            shots += examples[:SHOTS]
            for one in examples[SHOTS:]:
                text = question_text(one.prompt)
                questions += _framed(one, next(request for request in requests if request in text))
    return shots, questions


@claim(
    "S148",
    title="Retrieved demonstrations make a small model few-shot",
    paper="Mueller et al. 2023, Meta-training with Demonstration Retrieval for Efficient Few-shot Learning "
    "(arXiv:2307.00119)",
    hypothesis="Meta-trained with retrieved demonstrations, a small model answers more questions of new "
    "families than meta-trained with random ones, and that more than without any.",
    figure="Better than parameter-efficient and retrieval-augmented few-shot baselines on SQuAD, QNLI and "
    "TREC (TREC 91.7 %, QNLI 84.4 %).",
    setting="Twelve families of requests whose answers are code words that only examples can tell; "
    f"{HELD_OUT_FAMILIES} families are new, with {SHOTS} examples a class in the bank and for tuning. "
    f"Neighbours by a frozen sentence encoder (MiniLM), {NEIGHBOURS} a question, never the question itself.",
    baselines=("random demonstrations", "no demonstrations", "retrieval without meta-training"),
    effect=Effect("retrieved minus random", of=lambda v: v["retrieved"] - v["random"], unit="share right"),
    also=[
        Effect("random minus none", of=lambda v: v["random"] - v["none"], unit="share right"),
        Effect(
            "retrieved, meta-trained minus not",
            of=lambda v: v["retrieved"] - v["retrieved, no meta-training"],
            unit="share right",
        ),
    ],
    controls=[
        Effect(
            "retrieved minus random when the bank's answers are shuffled",
            of=lambda v: v["retrieved, shuffled bank"] - v["random"],
            unit="share right",
        )
    ],
    seeds=range(5),
    budget=480,
    threads=2,
)
def s148(seed: int) -> dict[str, float]:
    """Share of right answers on new families, after tuning on their shots in the way that is then used.

    Code words are drawn anew in each of many worlds during meta-training, as if there were many tasks: with
    eight fixed families a small model would learn their answers by heart and never look at a demonstration.
    """
    drawn = families(seed)
    held_out, training = drawn[:HELD_OUT_FAMILIES], [f.name for f in drawn[HELD_OUT_FAMILIES:]]
    assert len(training) + len(held_out) == len(FAMILIES)
    shots, questions = _split(held_out, seed)
    random = python_random.Random(seed)
    bank = Bank.of(shots, _encode())
    codes = [one.response for one in shots]
    random.shuffle(codes)
    shuffled = {question_text(one.prompt): code for one, code in zip(shots, codes, strict=True)}

    def at_random(one: Demonstrated) -> list[Demonstrated]:
        return random.sample([other for other in shots if other.prompt != one.prompt], NEIGHBOURS)

    near_shots = bank.neighbours(NEIGHBOURS)
    near = [bank.near(one.prompt, NEIGHBOURS) for one in questions]
    ways: dict[str, tuple[bool | None, Sequence[Demonstrations], Sequence[Demonstrations]]] = {
        "retrieved": (True, near_shots, near),
        "random": (False, [at_random(one) for one in shots], [at_random(one) for one in questions]),
        "none": (None, [()] * len(shots), [()] * len(questions)),
    }
    values = {}
    for name, (kind, for_shots, for_questions) in ways.items():
        model = SmallTransformer(Shape(vocabulary=len(LANGUAGE)), seed=seed)
        if name == "retrieved":
            values["retrieved, no meta-training"] = _tuned_accuracy(
                model.copy(), shots, for_shots, questions, for_questions, seed
            )
        imitate(
            model,
            _meta_rows(training, kind, seed),
            Fit(steps=META_STEPS, rows=BATCH, lr=META_LR, seed=seed),
        )
        values[name] = _tuned_accuracy(model.copy(), shots, for_shots, questions, for_questions, seed)
        if name == "retrieved":
            lost = [
                [replace(other, response=shuffled[question_text(other.prompt)]) for other in others]
                for others in for_questions
            ]
            values["retrieved, shuffled bank"] = _tuned_accuracy(
                model, shots, for_shots, questions, lost, seed
            )
    values["nearest neighbour's answer"] = sum(
        others[0].response == one.response for others, one in zip(near, questions, strict=True)
    ) / len(questions)
    return values


def _tuned_accuracy(
    model: SmallTransformer,
    shots: Demonstrations,
    before_shots: Sequence[Demonstrations],
    questions: Demonstrations,
    before_questions: Sequence[Demonstrations],
    seed: int,
) -> float:
    """Tune on the shots, then answer."""
    rows = _rows(shots, before_shots, np.random.default_rng(seed))
    imitate(model, rows, Fit(steps=TUNING_STEPS, rows=32, lr=TUNING_LR, seed=seed))
    return _accuracy(model, questions, before_questions)
