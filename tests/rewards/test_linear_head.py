"""The convex fit against scikit-learn and against the truth it was made from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrigible.rewards.head import (
    FEATURE_SCALE,
    Comparisons,
    Standardiser,
    bootstrap_members,
    cross_validate,
    fit_linear,
)


def made(
    n: int = 300, width: int = 5, seed: int = 0, rows: int = 80
) -> tuple[torch.Tensor, Comparisons, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(rows, width))
    truth = rng.normal(size=width)
    a, b = np.array([rng.choice(rows, 2, replace=False) for _ in range(n)]).T
    wins = rng.random(n) < 1 / (1 + np.exp(-(z[a] - z[b]) @ truth))
    data = Comparisons(
        torch.from_numpy(np.where(wins, a, b)),
        torch.from_numpy(np.where(wins, b, a)),
        torch.ones(n, dtype=torch.float64),
        torch.from_numpy(rng.random(n) + 0.5),
    )
    return torch.from_numpy(z), data, truth


def test_equals_logistic_regression_on_differences() -> None:
    from sklearn.linear_model import LogisticRegression

    z, data, _ = made()
    penalty = 0.05
    ours = fit_linear(z, data, penalty).numpy()
    difference = (z[data.chosen] - z[data.rejected]).numpy()
    weights = data.weight.numpy()
    # scikit-learn: C·Σ w·loss + |w|²/2 on both orders; ours: Σ w·loss / Σ w + penalty·|w|²/2
    peer = LogisticRegression(
        C=1 / (penalty * 2 * weights.sum()), fit_intercept=False, tol=1e-10, max_iter=5000
    )
    peer.fit(
        np.vstack([difference, -difference]),
        np.r_[np.ones(len(data)), np.zeros(len(data))],
        sample_weight=np.r_[weights, weights],
    )
    assert ours == pytest.approx(peer.coef_[0], abs=1e-4)


def test_recovers_the_truth_with_enough_data() -> None:
    z, data, truth = made(n=20_000, rows=2_000)
    assert fit_linear(z, data, 1e-6).numpy() == pytest.approx(truth, abs=0.12)


def test_the_start_does_not_matter() -> None:
    z, data, _ = made()
    far = fit_linear(z, data, 0.1, torch.full((5,), 9.0, dtype=torch.float64))
    assert far.numpy() == pytest.approx(fit_linear(z, data, 0.1).numpy(), abs=1e-4)


def test_weight_zero_is_absence() -> None:
    z, data, _ = made()
    times = torch.zeros(len(data), dtype=torch.float64)
    times[:100] = 1
    whole = fit_linear(z, data.reweighted(times), 0.1)
    assert whole.numpy() == pytest.approx(fit_linear(z, data.take(range(100)), 0.1).numpy(), abs=1e-4)


def test_standardiser_ignores_constants_and_favours_named_features() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(3, 7, size=(500, 3))).float()
    x[:, 1] = 4.0
    z = Standardiser.fit(x, features=1)(x)
    assert z.mean(dim=0).abs().max() < 1e-5
    assert float(z[:, 0].std()) == pytest.approx(1, rel=0.01)
    assert float(z[:, 1].abs().max()) == 0
    assert float(z[:, 2].std()) == pytest.approx(FEATURE_SCALE, rel=0.01)


def test_cross_validation_prefers_a_strong_penalty_for_noise_and_a_weak_one_for_signal() -> None:
    def best(noise: bool) -> float:
        z, data, _ = made(n=240, width=40, seed=1, rows=400)
        if noise:
            coin = torch.from_numpy(np.random.default_rng(2).random(240) < 0.5)
            chosen = torch.where(coin, data.chosen, data.rejected)
            data = Comparisons(chosen, torch.where(coin, data.rejected, data.chosen), data.p, data.weight)
        parts = [
            (
                data.take([i for i in range(240) if i % 3 != k]),
                data.take([i for i in range(240) if i % 3 == k]),
            )
            for k in range(3)
        ]
        penalty, margins, losses = cross_validate(z, 0, parts, (0.001, 0.1, 10.0))
        assert len(margins) == 240 and len(losses) == 3
        return penalty

    assert best(noise=True) == 10.0
    assert best(noise=False) < 10.0


def test_members_spread_less_with_more_data() -> None:
    def spread(n: int) -> float:
        z, data, _ = made(n=n, rows=500)
        start = fit_linear(z, data, 0.01)
        heads = bootstrap_members(z, data, np.arange(n), 0.01, start, 8, seed=0)
        assert heads.shape == (8, 5)
        return float(heads.std(dim=0).mean())

    assert spread(3_000) < 0.6 * spread(300)
