from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from corrigible.errors import BadInputError, NumericsError
from corrigible.evaluate.kl import kl_estimate, kl_terms

VOCABULARY, LENGTH, END = 3, 3, 0


class Table:
    """A language model that can be enumerated: next-token log-probs per prefix."""

    def __init__(self, seed: int, spread: float) -> None:
        self.rng, self.spread, self.rows = np.random.default_rng(seed), spread, {}

    def row(self, prefix: tuple[int, ...]) -> np.ndarray:
        if prefix not in self.rows:
            logits = self.spread * self.rng.normal(size=VOCABULARY)
            self.rows[prefix] = logits - np.log(np.exp(logits).sum())
        return self.rows[prefix]

    def logprobs(self, sequence: tuple[int, ...]) -> list[float]:
        return [float(self.row(sequence[:t])[token]) for t, token in enumerate(sequence)]

    def divergences(self, other: Table, sequence: tuple[int, ...]) -> list[float]:
        """KL of the two next-token distributions before each token."""
        rows = [(self.row(sequence[:t]), other.row(sequence[:t])) for t in range(len(sequence))]
        return [sum(float(np.exp(x) * (x - y)) for x, y in zip(p, q, strict=True)) for p, q in rows]

    def sample(self, rng: np.random.Generator) -> tuple[int, ...]:
        sequence: tuple[int, ...] = ()
        while len(sequence) < LENGTH and (not sequence or sequence[-1] != END):
            sequence = (*sequence, int(rng.choice(VOCABULARY, p=np.exp(self.row(sequence)))))
        return sequence


def sequences() -> list[tuple[int, ...]]:
    """Every sequence that ends at END or at LENGTH."""
    every = [s for n in range(1, LENGTH + 1) for s in product(range(VOCABULARY), repeat=n)]
    return [s for s in every if END not in s[:-1] and (s[-1] == END or len(s) == LENGTH)]


@pytest.fixture(scope="module")
def models() -> tuple[Table, Table, float, float]:
    """Policy, reference, exact KL, exact mean length; enumerated once with every prefix filled in."""
    policy, reference = Table(0, 1.0), Table(1, 1.0)
    exact = length = total = 0.0
    for s in sequences():
        p, q = policy.logprobs(s), reference.logprobs(s)
        weight = float(np.exp(sum(p)))
        total += weight
        exact += weight * (sum(p) - sum(q))
        length += weight * len(s)
    assert total == pytest.approx(1.0)
    return policy, reference, exact, length


def test_both_estimators_are_unbiased_by_enumeration(models: tuple[Table, Table, float, float]) -> None:
    policy, reference, exact, _ = models
    means = np.zeros(2)
    for s in sequences():
        p, q = policy.logprobs(s), reference.logprobs(s)
        means += np.exp(sum(p)) * np.array(kl_terms(p, q))
    assert means == pytest.approx([exact, exact])


def test_the_exact_estimator_is_unbiased_and_varies_least(models: tuple[Table, Table, float, float]) -> None:
    """By enumeration, on this pair of models and on one whose two are near."""
    policy, reference, exact, _ = models
    near = Table(0, 1.0)
    rng = np.random.default_rng(3)
    for s in sequences():
        for t in range(len(s)):
            row = policy.row(s[:t]) + 0.1 * rng.normal(size=VOCABULARY)
            near.rows[s[:t]] = row - np.log(np.exp(row).sum())
    for other, truth in ((reference, exact), (near, None)):
        weights, values = [], []
        for s in sequences():
            p, q = policy.logprobs(s), other.logprobs(s)
            weights.append(np.exp(sum(p)))
            values.append([*kl_terms(p, q), sum(policy.divergences(other, s))])
        w, v = np.array(weights), np.array(values)
        means = w @ v
        variances = w @ (v - means) ** 2
        if truth is not None:
            assert means[2] == pytest.approx(truth)
        assert means == pytest.approx([means[0]] * 3)
        assert variances[2] < variances[1] and variances[2] < variances[0] / 3
        assert (v[:, 2] >= 0).all()


def test_with_divergences_the_estimate_is_the_exact_one(models: tuple[Table, Table, float, float]) -> None:
    policy, reference, exact, length = models
    covered = {"answer": 0, "token": 0}
    narrower = 0
    for run in range(150):
        rng = np.random.default_rng(1000 + run)  # other draws than those of the bootstrap
        drawn = [policy.sample(rng) for _ in range(100)]
        got = kl_estimate(
            [policy.logprobs(s) for s in drawn],
            [reference.logprobs(s) for s in drawn],
            divergences=[policy.divergences(reference, s) for s in drawn],
            draws=400,
            seed=run,
        )
        assert got.estimator == "exact"
        covered["answer"] += got.per_sequence.low <= exact <= got.per_sequence.high
        covered["token"] += got.per_token.low <= exact / length <= got.per_token.high
        widths = [one.high - one.low for one in (got.per_sequence, got.per_sequence_k1)]
        narrower += widths[0] < widths[1] / 1.5
    assert all(count / 150 > 0.88 for count in covered.values()), covered
    assert narrower == 150


def test_intervals_cover_the_exact_divergence(models: tuple[Table, Table, float, float]) -> None:
    policy, reference, exact, length = models
    covered = dict.fromkeys(("k1", "k3", "token"), 0)
    runs = 150
    for run in range(runs):
        rng = np.random.default_rng(run)
        drawn = [policy.sample(rng) for _ in range(100)]
        got = kl_estimate(
            [policy.logprobs(s) for s in drawn], [reference.logprobs(s) for s in drawn], draws=400, seed=run
        )
        covered["k1"] += got.per_sequence.low <= exact <= got.per_sequence.high
        covered["k3"] += got.per_sequence_k3.low <= exact <= got.per_sequence_k3.high
        covered["token"] += got.per_token.low <= exact / length <= got.per_token.high
    assert all(count / runs > 0.88 for count in covered.values()), covered


def test_k3_varies_less_for_policies_that_are_close() -> None:
    rng = np.random.default_rng(0)
    reference = Table(5, 1.0)
    policy = Table(5, 1.0)
    for s in sequences():
        for t in range(len(s)):
            near = reference.row(s[:t]) + 0.1 * rng.normal(size=VOCABULARY)
            policy.rows[s[:t]] = near - np.log(np.exp(near).sum())
    drawn = [policy.sample(rng) for _ in range(500)]
    terms = np.array([kl_terms(policy.logprobs(s), reference.logprobs(s)) for s in drawn])
    assert terms[:, 1].std() < terms[:, 0].std() / 3
    assert (terms[:, 1] >= 0).all()


def test_per_token_is_the_ratio_of_sums_and_clusters_are_prompts() -> None:
    got = kl_estimate([[-1.0, -1.0], [-1.0]], [[-2.0, -1.5], [-1.0]], ["a", "b"])
    assert got.per_sequence.value == pytest.approx(0.75)
    assert got.per_token.value == pytest.approx(1.5 / 3)
    assert (got.sequences, got.tokens, got.per_sequence.clusters) == (2, 3, 2)
    k3 = (np.exp(-1) - 1 + 1) + (np.exp(-0.5) - 1 + 0.5)
    assert got.per_sequence_k3.value == pytest.approx(k3 / 2)
    assert got.per_sequence_k1 == got.per_sequence and got.estimator == "k1"
    exact = kl_estimate([[-1.0, -1.0], [-1.0]], [[-2.0, -1.5], [-1.0]], ["a", "b"], divergences=[[1, 2], [4]])
    assert exact.value == pytest.approx(3.5) and exact.per_token.value == pytest.approx(7 / 3)
    assert exact.per_sequence_k1 == got.per_sequence and exact.per_token_k3 == got.per_token_k3
    written = exact.to_json()
    assert set(written) >= {"per_sequence", "per_token", "per_sequence_k1", "estimator", "on_policy"}


def test_a_policy_is_at_no_distance_from_itself() -> None:
    rows = [[-0.3, -2.0], [-5.0]]
    got = kl_estimate(rows, rows)
    assert got.value == 0.0 and got.per_sequence_k3.value == 0.0 and got.interval == (0.0, 0.0)


@pytest.mark.parametrize(
    ("policy", "reference", "error"),
    [
        ([-1.0], [-1.0, -2.0], BadInputError),
        ([[-1.0]], [[-1.0]], BadInputError),
        ([float("nan")], [-1.0], NumericsError),
        ([-1.0], [float("-inf")], NumericsError),
        ([0.7], [-1.0], BadInputError),
    ],
)
def test_bad_rows_are_refused(policy: Any, reference: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        kl_terms(policy, reference)


def test_nothing_to_estimate_from_is_an_error() -> None:
    with pytest.raises(BadInputError):
        kl_estimate([], [])
    with pytest.raises(BadInputError, match="no answer has a token"):
        kl_estimate([[]], [[]])
    with pytest.raises(BadInputError):
        kl_estimate([[-1.0]], [])


@pytest.mark.parametrize(
    ("divergences", "error"),
    [
        ([[0.1]], BadInputError),
        ([[0.1, 0.2], [0.3, 0.1]], BadInputError),
        ([[0.1, -0.2], [0.3]], BadInputError),
        ([[0.1, float("nan")], [0.3]], NumericsError),
    ],
)
def test_divergences_that_do_not_fit_are_refused(divergences: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        kl_estimate([[-1.0, -1.0], [-1.0]], [[-2.0, -1.5], [-1.0]], divergences=divergences)
