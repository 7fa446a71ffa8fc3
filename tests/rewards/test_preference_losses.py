"""Bradley-Terry loss against a scalar oracle, gradients, limits and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corrigible.errors import BadInputError, NumericsError
from corrigible.rewards import bradley_terry_loss

score = st.floats(-30, 30)
row = st.tuples(score, score, st.floats(0, 1), st.floats(0, 5), st.floats(0, 3))


def oracle(rows: list[tuple[float, float, float, float, float]], center: float) -> float:
    """The definition, one pair at a time, in Python floats."""
    total = weight_sum = 0.0
    for chosen, rejected, p, weight, margin in rows:
        win = 1 / (1 + math.exp(-(chosen - rejected - margin)))
        lose = 1 / (1 + math.exp(chosen - rejected - margin))
        cost = -(p * math.log(win) if p else 0.0) - ((1 - p) * math.log(lose) if p < 1 else 0.0)
        total += weight * (cost + center * (chosen + rejected) ** 2)
        weight_sum += weight
    return total / weight_sum


@settings(max_examples=60, deadline=None)
@given(st.lists(row, min_size=1, max_size=7), st.sampled_from([0.0, 0.01]))
def test_equals_the_definition(rows: list[tuple[float, float, float, float, float]], center: float) -> None:
    if sum(entry[3] for entry in rows) < 1e-3:
        return
    c, r, p, w, m = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    out = bradley_terry_loss(c, r, p_chosen=p, weight=w, margin=m, center=center)
    assert float(out.loss) == pytest.approx(oracle(rows, center), rel=1e-9, abs=1e-12)


def test_gradient_against_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    c, r = (torch.randn(5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, w, m = (torch.rand(5, generator=g, dtype=torch.float64) for _ in range(3))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return bradley_terry_loss(a, b, p_chosen=p, weight=w, margin=m, center=0.1).loss

    assert torch.autograd.gradcheck(loss, (c, r))


@pytest.mark.parametrize("p", [0.5, 0.8, 0.99])
def test_soft_label_minimum_is_its_log_odds(p: float) -> None:
    delta = torch.tensor([math.log(p / (1 - p))], dtype=torch.float64, requires_grad=True)
    bradley_terry_loss(
        delta, torch.zeros(1, dtype=torch.float64), p_chosen=torch.tensor([p], dtype=torch.float64)
    ).loss.backward()
    assert delta.grad is not None and abs(float(delta.grad)) < 1e-12


def test_confident_pairs_keep_their_gradient() -> None:
    # log(sigmoid(x) + eps) would give a gradient of almost nothing here.
    c = torch.tensor([-40.0], requires_grad=True)
    out = bradley_terry_loss(c, torch.tensor([40.0]))
    out.loss.backward()
    assert (
        out.loss.item() == pytest.approx(80.0) and c.grad is not None and c.grad.item() == pytest.approx(-1.0)
    )


def test_half_precision_scores_are_computed_in_float32() -> None:
    out = bradley_terry_loss(
        torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([0.25], dtype=torch.bfloat16)
    )
    assert out.loss.dtype == torch.float32 and float(out.loss) == pytest.approx(math.log1p(math.exp(-0.25)))


def test_micro_batches_with_the_common_denominator_add_up() -> None:
    g = torch.Generator().manual_seed(1)
    c, r, w = (torch.rand(9, generator=g) for _ in range(3))
    whole = bradley_terry_loss(c, r, weight=w, center=0.01).loss
    parts = sum(
        float(bradley_terry_loss(c[s], r[s], weight=w[s], center=0.01, denominator=float(w.sum())).loss)
        for s in (slice(0, 4), slice(4, 9))
    )
    assert parts == pytest.approx(float(whole), rel=1e-6)


def test_metrics_count_ties_out_and_equal_scores_half() -> None:
    out = bradley_terry_loss(
        torch.tensor([1.0, 0.0, 2.0, 5.0]),
        torch.tensor([0.0, 1.0, 2.0, 0.0]),
        p_chosen=torch.tensor([1.0, 0.2, 1.0, 0.5]),
    )
    assert out.metrics["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    ties = bradley_terry_loss(torch.zeros(2), torch.zeros(2), p_chosen=torch.full((2,), 0.5))
    assert "accuracy" not in ties.metrics


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"rejected_scores": torch.zeros(2)}, BadInputError, "rejected_scores has shape"),
        ({"p_chosen": torch.tensor([0.5, 1.2, 0.0])}, BadInputError, r"outside \[0, 1\]"),
        ({"p_chosen": torch.tensor([0.5, float("nan"), 0.0])}, BadInputError, r"outside \[0, 1\]"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0])}, BadInputError, "negative"),
        ({"margin": torch.tensor([0.0, -1.0, 0.0])}, BadInputError, "margin"),
        ({"weight": torch.zeros(3)}, NumericsError, "weight zero"),
        ({"chosen_scores": torch.tensor([0.0, float("nan"), 0.0])}, NumericsError, "NaN"),
        ({"rejected_scores": torch.tensor([0.0, float("inf"), 0.0])}, NumericsError, "NaN"),
        ({"chosen_scores": torch.zeros(3, 1)}, BadInputError, "expected"),
    ],
)
def test_refusals(change: dict[str, torch.Tensor], error: type[Exception], says: str) -> None:
    given = {"chosen_scores": torch.zeros(3), "rejected_scores": torch.zeros(3), **change}
    with pytest.raises(error, match=says):
        bradley_terry_loss(given.pop("chosen_scores"), given.pop("rejected_scores"), **given)  # type: ignore[arg-type]
