"""What a reward model has to beat: length alone, and a bag of words.

Both are logistic regressions on the difference of the two sides' features without an intercept, trained
on every pair in both orders, each order weighted by the share of judges behind it, so that vote shares
and ties are used fairly and which side is called chosen cannot leak. The vocabulary and every scale come
from the training pairs only, and the strength of the penalty is chosen by validation inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from corrigible.errors import BadInputError
from corrigible.rewards.splits import folds, resolve_rule
from corrigible.rewards.texts import response_text

if TYPE_CHECKING:
    from corrigible.store.pairs import Pair

Floats = NDArray[np.float64]
SETTINGS: tuple[tuple[str | None, float], ...] = (("l2", 0.3), ("l2", 0.03), (None, 0.3), (None, 0.03))
"""Normalisation and scikit-learn's C of the TF-IDF baseline, grouped by normalisation."""


def _sides(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [response_text(pair.chosen) for pair in pairs], [response_text(pair.rejected) for pair in pairs]


def _length_features(texts: Sequence[str]) -> Floats:
    rows = [(np.log1p(len(text)), np.log1p(len(text.split())), len(text) / 1000) for text in texts]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _fit(difference: Any, pairs: Sequence[Pair], penalty: float) -> Any:
    """Logistic regression of "the first side wins" without an intercept.

    A row and its mirror (sides swapped, label changed) have the same loss, so showing every pair in both
    orders is the same as turning every other pair round, at half the cost; p of the votes on a pair say
    one label and 1 - p the other.
    """
    from scipy.sparse import diags_array, issparse, vstack
    from sklearn.linear_model import LogisticRegression

    p = np.array([pair.p_chosen for pair in pairs])
    weight = np.array([pair.weight for pair in pairs])
    turn = np.where(np.arange(len(pairs)) % 2 == 0, 1.0, -1.0)
    rows = diags_array(turn) @ difference if issparse(difference) else turn[:, None] * difference
    first = turn > 0
    both = vstack([rows, rows]).tocsr() if issparse(rows) else np.vstack([rows, rows])
    labels = np.r_[first, ~first]
    weights = np.r_[p * weight, (1 - p) * weight]
    keep = weights > 0
    if len(set(labels[keep])) < 2:  # a single pair: show it in both orders after all
        both = vstack([both, -both]).tocsr() if issparse(both) else np.vstack([both, -both])
        labels, weights, keep = np.r_[labels, ~labels], np.r_[weights, weights], np.r_[keep, keep]
    model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=1000)
    return model.fit(both[keep], labels[keep], sample_weight=weights[keep] / weights[keep].mean())


def length_margins(train: Sequence[Pair], test: Sequence[Pair], *, by: str = "auto") -> Floats:
    """(n_test,) log-odds for the chosen side from length alone: log characters, log words, characters.

    The direction is learned: on harmless answers the shorter one wins. ``by`` is not used (three
    coefficients need no validation); it is there so that baselines share one signature.
    """
    if not train or not test:
        raise BadInputError("a baseline needs pairs on both sides.", advice="Use a smaller held-out share.")
    chosen, rejected = _sides(train)
    difference = _length_features(chosen) - _length_features(rejected)
    weight = np.array([pair.weight for pair in train])
    scale = np.sqrt(np.average(difference**2, axis=0, weights=weight if weight.any() else None)) + 1e-12
    model = _fit(difference / scale, train, 1.0)
    chosen, rejected = _sides(test)
    return np.asarray((_length_features(chosen) - _length_features(rejected)) / scale @ model.coef_[0])


def tfidf_margins(train: Sequence[Pair], test: Sequence[Pair], *, by: str = "auto") -> Floats:
    """(n_test,) log-odds for the chosen side from TF-IDF of words and word pairs of the responses.

    Penalty and row normalisation (unit length, or not, which lets length through) are the best of four in
    2-fold validation with the split rule ``by`` inside the training pairs; the first of them when these
    are too few to split.
    """
    if not train or not test:
        raise BadInputError("a baseline needs pairs on both sides.", advice="Use a smaller held-out share.")
    setting = SETTINGS[0]
    try:
        inner = list(folds(train, 2, by=resolve_rule(train, by)))
    except BadInputError:
        inner = []
    if inner:
        losses = np.zeros(len(SETTINGS))
        for part in inner:
            p = np.array([pair.p_chosen for pair in part.held_out])
            w = np.array([pair.weight for pair in part.held_out])
            for place, m in enumerate(_tfidf(part.train, part.held_out, SETTINGS)):
                losses[place] += float((w * (p * np.logaddexp(0, -m) + (1 - p) * np.logaddexp(0, m))).sum())
        setting = SETTINGS[int(losses.argmin())]
    return _tfidf(train, test, [setting])[0]


def _tfidf(
    train: Sequence[Pair], test: Sequence[Pair], settings: Sequence[tuple[str | None, float]]
) -> list[Floats]:
    """Margins on ``test`` for each (normalisation, penalty)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    ours, theirs = _sides(train), _sides(test)
    texts = sorted({*ours[0], *ours[1]})
    margins = []
    for norm in dict.fromkeys(norm for norm, _ in settings):
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2),
            sublinear_tf=True,
            min_df=2 if len(texts) >= 20 else 1,
            token_pattern=r"(?u)\b\w+\b|[?!]",
            norm=norm,
        )
        try:
            rows = vectorizer.fit_transform(texts)
        except ValueError:  # no word occurs at all, or none twice: nothing to go by
            return [np.zeros(len(test)) for _ in settings]
        scale = float(np.sqrt(rows.multiply(rows).sum(axis=1).mean())) or 1.0
        known, held = (
            (vectorizer.transform(sides[0]) - vectorizer.transform(sides[1])) / scale
            for sides in (ours, theirs)
        )
        for penalty in (penalty for other, penalty in settings if other == norm):
            margins.append(np.asarray(held @ _fit(known, train, penalty).coef_[0], dtype=np.float64))
    return margins


BASELINES: dict[str, Callable[..., Floats]] = {"length": length_margins, "tfidf": tfidf_margins}


def accuracy_rows(margins: Floats, p_chosen: Floats) -> Floats:
    """Per pair: 1 ordered like the majority of judges, 0 not, 0.5 equal scores, NaN where judges tie."""
    towards = np.asarray(margins) * np.sign(np.asarray(p_chosen) - 0.5)
    rows = np.where(towards > 0, 1.0, np.where(towards == 0, 0.5, 0.0))
    return np.where(np.asarray(p_chosen) == 0.5, np.nan, rows)


def length_baseline(train: Sequence[Pair], test: Sequence[Pair]) -> float:
    """Accuracy of `length_margins` on the test pairs that are no tie."""
    return _accuracy(length_margins(train, test), test)


def tfidf_baseline(train: Sequence[Pair], test: Sequence[Pair]) -> float:
    """Accuracy of `tfidf_margins` on the test pairs that are no tie."""
    return _accuracy(tfidf_margins(train, test), test)


def _accuracy(margins: Floats, test: Sequence[Pair]) -> float:
    rows = accuracy_rows(margins, np.array([pair.p_chosen for pair in test]))
    if not np.isfinite(rows).any():
        raise BadInputError("every test pair is a tie.", advice="Accuracy needs pairs with a majority.")
    return float(np.nanmean(rows))
