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
    assert set(got.to_json()) >= {"per_sequence", "per_token", "on_policy"}


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
