"""DPO against an oracle that shares no code with it: scalar loops in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch

from corrigible.align.losses import agreement, dpo_loss, soft_logistic
from corrigible.errors import BadInputError, NumericsError


def oracle(pc, pr, rc, rr, beta, smoothing, labels, weights, denominator):
    """Value and gradients of DPO by scalar arithmetic: no tensors, no autograd."""
    loss, grad_chosen, grad_rejected = 0.0, [], []
    total = denominator if denominator is not None else sum(weights)
    for a, b, c, d, label, weight in zip(pc, pr, rc, rr, labels, weights, strict=True):
        x = beta * ((a - c) - (b - d))
        target = label * (1 - smoothing) + (1 - label) * smoothing
        # log(1 + e^-x) without overflow, written out
        minus_log_sigma = math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))
        minus_log_one_minus = minus_log_sigma + x
        loss += weight * (target * minus_log_sigma + (1 - target) * minus_log_one_minus) / total
        sigma = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
        slope = weight * (sigma - target) * beta / total
        grad_chosen.append(slope)
        grad_rejected.append(-slope)
    return loss, grad_chosen, grad_rejected


@dataclass
class Case:
    columns: list[list[float]]
    beta: float
    smoothing: float
    labels: list[float] | None
    weights: list[float] | None
    denominator: float | None


def cases(count: int) -> list[Case]:
    rng = random.Random(7)
    made = []
    for _ in range(count):
        n = rng.randint(1, 9)
        scale = rng.choice([1.0, 20.0, 300.0])
        made.append(
            Case(
                columns=[[-rng.random() * scale for _ in range(n)] for _ in range(4)],
                beta=rng.choice([0.01, 0.1, 0.5, 2.0]),
                smoothing=rng.choice([0.0, 0.0, 0.1, 0.3]),
                labels=rng.choice([None, [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in range(n)]]),
                weights=rng.choice([None, [rng.random() + 0.01 for _ in range(n)]]),
                denominator=rng.choice([None, 0.5 + 20 * rng.random()]),
            )
        )
    return made


def test_value_and_gradient_equal_the_oracle_on_200_cases() -> None:
    for case in cases(200):
        n = len(case.columns[0])
        pc, pr, rc, rr = (torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in case.columns)
        out = dpo_loss(
            pc,
            pr,
            rc,
            rr,
            beta=case.beta,
            label_smoothing=case.smoothing,
            p_chosen=None if case.labels is None else torch.tensor(case.labels, dtype=torch.float64),
            weight=None if case.weights is None else torch.tensor(case.weights, dtype=torch.float64),
            denominator=case.denominator,
        )
        out.loss.backward()
        value, grad_chosen, grad_rejected = oracle(
            *case.columns,
            case.beta,
            case.smoothing,
            case.labels or [1.0] * n,
            case.weights or [1.0] * n,
            case.denominator,
        )
        assert float(out.loss.detach()) == pytest.approx(value, rel=1e-10, abs=1e-12)
        assert out.metrics["loss"] == pytest.approx(value, rel=1e-10, abs=1e-12)
        assert pc.grad is not None and pr.grad is not None
        assert pc.grad.tolist() == pytest.approx(grad_chosen, rel=1e-8, abs=1e-13)
        assert pr.grad.tolist() == pytest.approx(grad_rejected, rel=1e-8, abs=1e-13)
        assert rc.grad is None and rr.grad is None


def logps(*values: float, grad: bool = True) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(("smoothing", "slope"), [(0.0, -0.05), (0.1, -0.04), (0.25, -0.025)])
def test_at_the_start_the_loss_is_ln_2_and_the_slope_is_the_papers(smoothing: float, slope: float) -> None:
    """d = 0: value log 2; d loss / d h_chosen = -(1 - 2e) beta / 2 (field guide, exact tests)."""
    pc, pr = logps(-3.0), logps(-5.0)
    out = dpo_loss(pc, pr, logps(-3.0), logps(-5.0), beta=0.1, label_smoothing=smoothing)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(math.log(2), rel=1e-12)
    assert pc.grad is not None and pr.grad is not None
    assert float(pc.grad) == pytest.approx(slope, rel=1e-12)
    assert float(pr.grad) == pytest.approx(-slope, rel=1e-12)
    assert out.metrics["rewards/accuracy"] == 0.5


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.4])
def test_cdpo_is_flat_at_its_finite_optimum_and_pulls_back_beyond_it(epsilon: float) -> None:
    """cDPO's optimum is d = log((1 - e) / e); plain DPO still pushes there."""
    beta = 0.1
    optimum = math.log((1 - epsilon) / epsilon)
    slopes = []
    for d in (optimum - 0.5, optimum, optimum + 0.5):
        pc = logps(-20 + d / beta / 2)
        pr = logps(-20 - d / beta / 2)
        dpo_loss(pc, pr, logps(-20.0), logps(-20.0), beta=beta, label_smoothing=epsilon).loss.backward()
        assert pc.grad is not None
        slopes.append(float(pc.grad))
    assert slopes[0] < 0 < slopes[2]
    assert slopes[1] == pytest.approx(0.0, abs=1e-12)
    pc = logps(-20 + optimum / beta / 2)
    dpo_loss(pc, logps(-20 - optimum / beta / 2), logps(-20.0), logps(-20.0), beta=beta).loss.backward()
    assert pc.grad is not None and float(pc.grad) < -1e-3


def test_a_constant_of_the_prompt_changes_nothing_and_gradients_cancel_within_a_pair() -> None:
    pc, pr, rc, rr = logps(-3.0, -9.0), logps(-5.0, -2.0), logps(-3.5, -8.0), logps(-4.0, -4.0)
    plain = dpo_loss(pc, pr, rc, rr)
    plain.loss.backward()
    assert pc.grad is not None and pr.grad is not None
    assert (pc.grad + pr.grad).abs().max() < 1e-15
    shift = torch.tensor([-7.0, -0.5], dtype=torch.float64)
    shifted = dpo_loss(pc, pr, rc + shift, rr + shift)
    assert float(shifted.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-12)


def test_swapping_the_sides_is_the_same_as_flipping_the_label() -> None:
    a, b, c, d = logps(-3.0, -9.0), logps(-5.0, -2.0), logps(-3.5, -8.0), logps(-4.0, -4.0)
    p = torch.tensor([0.8, 0.3], dtype=torch.float64)
    forward = dpo_loss(a, b, c, d, p_chosen=p).loss
    flipped = dpo_loss(b, a, d, c, p_chosen=1 - p).loss
    assert float(forward.detach()) == pytest.approx(float(flipped.detach()), rel=1e-12)


def test_micro_batches_with_the_batch_weight_add_up_to_the_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    columns = [-50 * torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(4)]
    weight = torch.rand(7, generator=generator, dtype=torch.float64)
    label = torch.rand(7, generator=generator, dtype=torch.float64)
    whole = dpo_loss(*columns, p_chosen=label, weight=weight)
    parts = [
        dpo_loss(*(c[s] for c in columns), p_chosen=label[s], weight=weight[s], denominator=weight.sum())
        for s in (slice(0, 1), slice(1, 5), slice(5, 7))
    ]
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, rel=1e-10), name
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-10)


def test_low_precision_is_widened_before_anything_is_subtracted() -> None:
    # In bf16 a difference of 300 and 301 is lost to rounding steps of 2.
    columns = [torch.tensor([v], dtype=torch.bfloat16) for v in (-1.0, -2.0, -1.5, -1.5)]
    out = dpo_loss(*columns)
    assert out.loss.dtype == torch.float32
    assert out.metrics["rewards/margin"] == pytest.approx(0.1, rel=1e-6)


def test_extreme_margins_stay_finite() -> None:
    pc, pr = logps(-1.0, -4e6), logps(-4e6, -1.0)
    out = dpo_loss(pc, pr, logps(-1.0, -1.0), logps(-1.0, -1.0), beta=2.0)
    out.loss.backward()
    assert math.isfinite(float(out.loss.detach()))
    assert pc.grad is not None and torch.isfinite(pc.grad).all()
    assert out.metrics["saturated"] == 1.0


def test_soft_label_half_has_no_preference() -> None:
    value = soft_logistic(torch.tensor([0.0, 2.0, -2.0]), torch.full((3,), 0.5))
    assert value[0] < value[1] and value[1] == value[2]


def test_agreement_counts_ties_half() -> None:
    margin = torch.tensor([1.0, -1.0, 0.0, 3.0, -1.0])
    label = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.2])
    assert agreement(margin, label).tolist() == [1.0, 0.0, 0.5, 0.5, 1.0]


GOOD = [-1.0, -2.0]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"policy_chosen_logps": [-1.0]}, BadInputError, "one shape"),
        ({"policy_chosen_logps": [[-1.0, -2.0]]}, BadInputError, "one shape"),
        (
            {"policy_rejected_logps": [-1.0, math.nan]},
            NumericsError,
            "logps_not_finite.*policy_rejected.*\\[1\\]",
        ),
        ({"reference_chosen_logps": [-math.inf, -1.0]}, NumericsError, "logps_not_finite.*reference_chosen"),
        ({"reference_rejected_logps": [4.0, -1.0]}, NumericsError, "logps_positive"),
        ({"weight": [0.0, 0.0]}, NumericsError, "nothing_to_average"),
        ({"weight": [1.0, -1.0]}, BadInputError, "weight"),
        ({"weight": [1.0, math.nan]}, NumericsError, "weight_not_finite"),
        ({"weight": [1.0]}, BadInputError, "weight"),
        ({"p_chosen": [1.2, 0.0]}, BadInputError, "p_chosen"),
        ({"beta": 0.0}, BadInputError, "beta"),
        ({"beta": math.nan}, BadInputError, "beta"),
        ({"label_smoothing": 0.5}, BadInputError, "label_smoothing"),
        ({"denominator": 0.0}, NumericsError, "nothing_to_average"),
        ({"denominator": math.nan}, NumericsError, "nothing_to_average"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, object], error: type[Exception], says: str) -> None:
    arguments: dict[str, object] = {
        name: torch.tensor(GOOD)
        for name in (
            "policy_chosen_logps",
            "policy_rejected_logps",
            "reference_chosen_logps",
            "reference_rejected_logps",
        )
    }
    arguments |= {k: torch.tensor(v) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(error, match=says):
        dpo_loss(**arguments)  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    empty = torch.zeros(0)
    with pytest.raises(BadInputError, match="n = 0"):
        dpo_loss(empty, empty, empty, empty)
