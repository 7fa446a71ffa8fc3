"""CLIMB: do curricula of words, of data or of objectives help a small model of language at all?"""

from __future__ import annotations

import random as python_random
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from corrigible.align.corruptors import VocabularyLimit
from corrigible.align.curriculum import Pacing, percentiles, sampling_weights
from corrigible.align.curriculum import Shape as PacingShape
from corrigible.align.token_loss import token_loss
from corrigible.claims.fixtures.learning import Fit, Row, descend, logits_of, nll, pad, row_logprobs
from corrigible.claims.fixtures.sentences import CLASSES, KINDS, UNKNOWN, language, minimal_pair, sentences
from corrigible.claims.fixtures.transformer import Shape, SmallTransformer
from corrigible.claims.fixtures.vocabulary import EOS
from corrigible.claims.framework import Effect, Values, claim
from corrigible.models import Rendered

LANGUAGE = language()
SENTENCES, HELD_OUT = 4000, 500
STEPS, BATCH, LR = 1000, 16, 4e-3
SHAPE = Shape(vocabulary=len(LANGUAGE), width=32, layers=2, heads=2)
PAIRS = 400
"""Minimal pairs of each kind."""
CURRICULA = ("vocabulary", "data", "objective")
PACES: tuple[PacingShape, ...] = ("linear", "log")
Pace = Callable[[float], float]


def _all_at_once(progress: float) -> float:
    return 1.0


def _row(text: str) -> Row:
    """A sentence to learn, after the end of the one before."""
    return Row(prompt=(EOS,), response=(*LANGUAGE.encode(text), EOS))


def _surprise(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Mean surprise of each sentence's words when their frequency alone is known, nats, ``(n,)``."""
    counts = np.bincount(
        list(chain.from_iterable(row.response for row in rows)), minlength=len(LANGUAGE)
    ).astype(np.float64)
    rarity = -np.log(np.maximum(counts, 1.0) / counts.sum())
    return np.array([rarity[list(row.response)].mean() for row in rows])


def _classes() -> Tensor:
    """The class of each id, ``(vocabulary,)``; control tokens are one class."""
    found = torch.zeros(len(LANGUAGE), dtype=torch.int64)
    for at, words in enumerate(CLASSES.values(), start=1):
        found[[LANGUAGE.id(word) for word in words]] = at
    return found


def _class_logprobs(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Log-probability of the targets' word classes, ``(n,)``: of all words of a class together."""
    same = classes[targets][:, None] == classes[None]
    every = torch.log_softmax(logits, dim=-1)
    return every.masked_fill(~same, -torch.inf).logsumexp(dim=-1)


def _limited(row: Row, limit: VocabularyLimit, progress: float, rng: np.random.Generator) -> Row:
    """The row in the vocabulary that is known by now; rare words are read, and learnt, as unknown."""
    if limit.pace is _all_at_once:
        return row
    ids = limit(Rendered.from_tokens(row.prompt, row.response), range(len(row)), progress, rng).ids
    return Row(prompt=row.prompt, response=ids[len(row.prompt) :])


def trained(
    rows: Sequence[Row],
    seed: int,
    *,
    order: int,
    steps: int,
    vocabulary: Pace = _all_at_once,
    data: Pace = _all_at_once,
    objective: Pace = _all_at_once,
    difficulty: NDArray[np.float64] | None = None,
) -> SmallTransformer:
    """A new model after so many steps; every curriculum is a pace, and none is a pace of 1.

    Args:
        rows: the sentences.
        seed: of weights. order: of the batches, drawn alike under all curricula.
        steps: of training.
        vocabulary: share of the words that is known.
        data: share of the sentences that batches are drawn from, the easy ones first.
        objective: weight of the next word; the rest goes to the next word's class.
        difficulty: of each sentence, ``(n,)``; their surprise when absent.
    """
    model = SmallTransformer(SHAPE, seed=seed)
    percentile = percentiles(_surprise(rows) if difficulty is None else difficulty)
    limit = VocabularyLimit(vocabulary, unknown=LANGUAGE.id(UNKNOWN), size=len(LANGUAGE))
    classes = _classes()

    def loss(chosen: list[int], step: int) -> Tensor:
        progress = step / steps
        rng = np.random.default_rng([seed, order, step])
        weights = sampling_weights(percentile, data(progress), at_least=BATCH)
        picked = rng.choice(len(rows), size=BATCH, replace=False, p=weights)
        batch = pad([_limited(rows[i], limit, progress, rng) for i in picked])
        logits, targets = logits_of(model, batch), batch.targets[batch.scored]
        weight, row = batch.weights[batch.scored], batch.scored.nonzero()[:, 0]
        words = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]
        of_words = objective(progress)
        value = of_words * token_loss(words, weight, row=row).loss
        if of_words < 1.0:
            named = _class_logprobs(logits, targets, classes)
            value = value + (1.0 - of_words) * token_loss(named, weight, row=row).loss
        return value

    descend(model, Fit(steps=steps, rows=BATCH, lr=LR, seed=order), rows, loss)
    return model


@torch.no_grad()
def share_grammatical(model: SmallTransformer, pairs: Sequence[tuple[str, str]]) -> float:
    """Share of minimal pairs whose right sentence is the likelier one."""
    right, wrong = (
        torch.stack([one.sum() for one in row_logprobs(model, [_row(text) for text in texts])])
        for texts in zip(*pairs, strict=True)
    )
    return float((right > wrong).float().mean())


def _gain(*names: str) -> Callable[[Values], float]:
    """Mean score of some arms minus that of the shuffled ones."""

    def of(values: Values) -> float:
        shuffled = (values["shuffled"] + values["shuffled, another order"]) / 2
        return sum(values[name] for name in names) / len(names) - shuffled

    return of


ARMS = tuple(f"{curriculum}, {pace}" for curriculum in CURRICULA for pace in PACES)


@claim(
    "S177",
    title="Curricula of words, data and objectives make no difference",
    paper="Diehl Martinez et al. 2023, CLIMB: Curriculum Learning for Infant-inspired Model Building "
    "(arXiv:2311.08886)",
    hypothesis="At equal steps, three curricula under two paces are on average within one point of "
    "shuffled training on minimal pairs of grammar, and none gains more than two.",
    figure="No consistent improvement over the tuned baseline in the BabyLM challenge; marginal gains on "
    "some tasks (abstract).",
    setting=f"{SENTENCES} generated sentences, half child-like and half encyclopaedic; {STEPS} steps of "
    f"{BATCH}; {PAIRS} minimal pairs of each of three kinds. A causal model, so the coarse objective is the "
    "next word's class, read off the same output layer; the paper masks words and has separate heads.",
    baselines=("shuffled, the mean of two orders",),
    effect=Effect(
        "score, mean of six curricula minus shuffled", of=_gain(*ARMS), within=(-0.01, 0.01), unit="share"
    ),
    also=[
        Effect(
            "score, shuffled minus shuffled for a third of the steps (the score can tell)",
            of=lambda v: -_gain("shuffled, a third of the steps")(v),
            above=0.01,
            unit="share",
        )
    ],
    controls=[
        Effect(
            f"score, {curriculum} minus shuffled",
            of=_gain(*(f"{curriculum}, {pace}" for pace in PACES)),
            above=0.02,
            unit="share",
        )
        for curriculum in CURRICULA
    ]
    + [
        Effect(
            "score, data in random order of difficulty minus shuffled",
            of=_gain("data, random difficulty"),
            above=0.01,
            unit="share",
        )
    ],
    seeds=range(8),
    budget=480,
)
def s177(seed: int) -> dict[str, float]:
    """Share of minimal pairs that are told apart, by arm; held-out loss in nats a token.

    Paces are the paper's: from a tenth at 6.25 % of the steps to all at 87.5 %. A gain of more than two
    points by one curriculum alone would show among the controls; one of all of them refutes the claim.
    """
    rows = [_row(one.text) for one in sentences(10 * seed + 1, SENTENCES)]
    known = {row.response for row in rows}
    new = [_row(one.text) for one in sentences(10 * seed + 2, HELD_OUT)]
    held_out = [row for row in new if row.response not in known]
    random = python_random.Random(10 * seed + 3)
    pairs = {kind: [minimal_pair(kind, random) for _ in range(PAIRS)] for kind in KINDS}
    random_difficulty = np.random.default_rng([seed, 177]).permutation(len(rows)).astype(np.float64)
    models: dict[str, Callable[[], SmallTransformer]] = {
        "shuffled": lambda: trained(rows, seed, order=0, steps=STEPS),
        "shuffled, another order": lambda: trained(rows, seed, order=1, steps=STEPS),
        "shuffled, a third of the steps": lambda: trained(rows, seed, order=0, steps=STEPS // 3),
        "data, random difficulty": lambda: trained(
            rows, seed, order=0, steps=STEPS, data=Pacing("linear"), difficulty=random_difficulty
        ),
    }
    for pace in PACES:
        g = Pacing(pace)
        models[f"vocabulary, {pace}"] = lambda g=g: trained(rows, seed, order=0, steps=STEPS, vocabulary=g)
        models[f"data, {pace}"] = lambda g=g: trained(rows, seed, order=0, steps=STEPS, data=g)
        models[f"objective, {pace}"] = lambda g=g: trained(rows, seed, order=0, steps=STEPS, objective=g)
    values = {}
    for name, make in models.items():
        model = make()
        of = {kind: share_grammatical(model, pairs[kind]) for kind in KINDS}
        values[name] = sum(of.values()) / len(of)
        values |= {f"{kind}/{name}": value for kind, value in of.items()}
        values[f"held-out loss, nats a token/{name}"] = nll(model, held_out)
    return values
