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
PENALTIES = (0.03, 0.3, 3.0)  # scikit-learn's C


def _sides(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [response_text(pair.chosen) for pair in pairs], [response_text(pair.rejected) for pair in pairs]


def _length_features(texts: Sequence[str]) -> Floats:
    rows = [(np.log1p(len(text)), np.log1p(len(text.split())), len(text) / 1000) for text in texts]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _fit(difference: Any, pairs: Sequence[Pair], penalty: float) -> Any:
    from scipy.sparse import issparse, vstack
    from sklearn.linear_model import LogisticRegression

    p = np.array([pair.p_chosen for pair in pairs])
    weight = np.array([pair.weight for pair in pairs])
    both = vstack([difference, -difference]) if issparse(difference) else np.vstack([difference, -difference])
    label = np.r_[np.ones(len(pairs)), np.zeros(len(pairs))]
    # In each row "the first side wins": p of the votes say so for (chosen, rejected), and the same p say
    # it does not for (rejected, chosen). The 1 - p other votes are the same two rows with labels changed.
    rows = vstack([both, both]) if issparse(both) else np.vstack([both, both])
    labels = np.r_[label, 1 - label]
    weights = np.r_[p * weight, p * weight, (1 - p) * weight, (1 - p) * weight]
    keep = weights > 0
    model = LogisticRegression(C=penalty, fit_intercept=False, max_iter=1000)
    return model.fit(rows[keep], labels[keep], sample_weight=weights[keep] / weights[keep].mean())


def length_margins(train: Sequence[Pair], test: Sequence[Pair], *, by: str = "auto") -> Floats:
    """(n_test,) log-odds for the chosen side from length alone: log characters, log words, characters.

    The direction is learned: on harmless answers the shorter one wins. ``by`` is not used (three
    coefficients need no validation); it is there so that baselines share one signature.
    """
    if not train or not test:
        raise BadInputError("a baseline needs pairs on both sides.", advice="Use a smaller held-out share.")
    chosen, rejected = _sides(train)
    difference = _length_features(chosen) - _length_features(rejected)
    scale = difference.std(axis=0) + 1e-12
    model = _fit(difference / scale, train, 1.0)
    chosen, rejected = _sides(test)
    return np.asarray((_length_features(chosen) - _length_features(rejected)) / scale @ model.coef_[0])


def tfidf_margins(train: Sequence[Pair], test: Sequence[Pair], *, by: str = "auto") -> Floats:
    """(n_test,) log-odds for the chosen side from TF-IDF of words and word pairs of the responses.

    The penalty is the best of three in 3-fold validation with the split rule ``by`` inside the training
    pairs (the middle one when these are too few to split).
    """
    if not train or not test:
        raise BadInputError("a baseline needs pairs on both sides.", advice="Use a smaller held-out share.")

    def margins(fit_on: Sequence[Pair], score_on: Sequence[Pair], penalties: Sequence[float]) -> list[Floats]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        chosen, rejected = _sides(fit_on)
        texts = sorted({*chosen, *rejected})
        vectorizer = TfidfVectorizer(
            ngram_range=(1, 2),
            sublinear_tf=True,
            min_df=2 if len(texts) >= 20 else 1,
            token_pattern=r"(?u)\b\w+\b|[?!]",
        )
        try:
            vectorizer.fit(texts)
        except ValueError:  # no word occurs at all, or none twice: nothing to go by
            return [np.zeros(len(score_on)) for _ in penalties]
        difference = vectorizer.transform(chosen) - vectorizer.transform(rejected)
        other = _sides(score_on)
        held = vectorizer.transform(other[0]) - vectorizer.transform(other[1])
        return [np.asarray(held @ _fit(difference, fit_on, c).coef_[0]) for c in penalties]

    penalty = PENALTIES[len(PENALTIES) // 2]
    try:
        inner = list(folds(train, 3, by=resolve_rule(train, by)))
    except BadInputError:
        inner = []
    if inner:
        losses = np.zeros(len(PENALTIES))
        for part in inner:
            p = np.array([pair.p_chosen for pair in part.held_out])
            w = np.array([pair.weight for pair in part.held_out])
            for place, m in enumerate(margins(part.train, part.held_out, PENALTIES)):
                losses[place] += float((w * (p * np.logaddexp(0, -m) + (1 - p) * np.logaddexp(0, m))).sum())
        penalty = PENALTIES[int(losses.argmin())]
    return margins(train, test, [penalty])[0]


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
