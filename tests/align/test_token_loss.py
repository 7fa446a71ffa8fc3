"""The weighted token loss equals its equations, whatever stands in slots that weigh nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from oracles.tokens import KERNELS, TOKEN_ORACLES, token_oracle
from torch import Tensor

from corrigible.align import ALGORITHMS, TokenTotals, token_loss
from corrigible.align.token_loss import LEAST_DOUBT, read_logits, unlikelihood
from corrigible.errors import BadInputError, NumericsError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

ROUNDING = {torch.float64: 1e-15, torch.float32: 2e-7}
"""Of a slope whose probabilities are near 0 or 1."""

NORMALISERS = ("tokens", "weights", "sequences")
KAPPA, BETA, SMOOTHING = 1.3, -0.1, 0.2


def expected_at(kernel: str, kappa: float = KAPPA) -> float | None:
    return {"otr": kappa, "label_smoothing": math.inf}.get(kernel)


class Case:
    """Sequences of uneven length, padded to the longest; some tokens, or all of a sequence, weigh nothing."""

    def __init__(self, seed: int, kernel: str) -> None:
        rng = random.Random(f"{kernel} {seed}")
        sequences, vocabulary = rng.randint(1, 4), rng.randint(2, 7)
        self.lengths = [rng.randint(1, 6) for _ in range(sequences)]
        # 1 - p is known as exactly as the log-prob is: near p = 1 that is no relative precision at all.
        scale = rng.choice([0.3, 0.7] if kernel == "unlikelihood" else [0.3, 2.0, 6.0])
        self.logits = [
            [[rng.gauss(0, scale) for _ in range(vocabulary)] for _ in range(n)] for n in self.lengths
        ]
        self.targets = [[rng.randrange(vocabulary) for _ in range(n)] for n in self.lengths]
        self.weights = [
            [rng.choice([0.0, 1.0, 1.0, 0.1, rng.uniform(0.2, 3.0)]) for _ in range(n)] for n in self.lengths
        ]
        if sequences > 1 and rng.random() < 0.3:
            self.weights[0] = [0.0] * self.lengths[0]  # an answer of which nothing is learnt
        if kernel == "unlikelihood":
            self.weights = [[w * rng.choice([-1, 1]) for w in row] for row in self.weights]
        if not any(w for row in self.weights for w in row):
            self.weights[-1][-1] = 0.7
        self.vocabulary = vocabulary

    def padded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (NaN wherever nothing is learnt), targets (-100 there) and weights."""
        shape = len(self.lengths), max(self.lengths)
        logits = torch.full((*shape, self.vocabulary), math.nan, dtype=dtype)
        targets = torch.full(shape, -100)
        weights = torch.zeros(shape, dtype=dtype)
        for i, row in enumerate(self.weights):
            for t, w in enumerate(row):
                if w:
                    logits[i, t] = torch.tensor(self.logits[i][t], dtype=dtype)
                    targets[i, t], weights[i, t] = self.targets[i][t], w
        return logits.requires_grad_(), targets, weights


def graded(
    kernel: str, logits: Tensor, targets: Tensor, weights: Tensor, **options: object
) -> tuple[float, Tensor]:
    # NaN logits would reach the gradient inside of read_logits; a scorer gives NaN log-probs at worst.
    live = (weights != 0).expand_as(weights)
    read = read_logits(torch.where(live[..., None], logits, 0.0), targets, expected_at=expected_at(kernel))
    columns = {
        name: None if column is None else torch.where(live, column, math.nan)
        for name, column in vars(read).items()
    }
    logprobs = columns.pop("logprobs")
    assert logprobs is not None
    settings = {"smoothing": SMOOTHING, "wrong_reward": BETA}
    output = token_loss(logprobs, weights, kernel=kernel, **columns, **settings, **options)  # type: ignore[arg-type]
    output.loss.backward()
    assert logits.grad is not None
    return output.metrics["loss"], logits.grad


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_200_ragged_cases_equal_the_oracle(kernel: str, dtype: torch.dtype) -> None:
    for seed in range(200):
        case = Case(seed, kernel)
        normaliser = NORMALISERS[seed % 3]
        loss, slopes = token_oracle(
            kernel,
            case.logits,
            case.targets,
            case.weights,
            normaliser=normaliser,
            kappa=KAPPA,
            beta=BETA,
            smoothing=SMOOTHING,
        )
        found, grad = graded(kernel, *case.padded(dtype), normaliser=normaliser)
        assert found == pytest.approx(loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
        wanted = torch.zeros(grad.shape, dtype=torch.float64)
        for i, row in enumerate(slopes):
            wanted[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        assert bool(grad.isfinite().all())
        difference = float((grad.double() - wanted).norm())
        assert difference <= TOLERANCE[dtype] * float(wanted.norm()) + ROUNDING[dtype], (seed, difference)


def test_every_algorithm_of_the_family_has_an_oracle() -> None:
    named = {name for name, entry in ALGORITHMS.items() if entry.family == "tokens"}
    assert named == set(TOKEN_ORACLES)


def test_sums_that_are_easy_by_hand() -> None:
    """Two sequences: log-probs -1, -2 with weight 1 and 3; log-prob -4 with weight 2."""
    logprobs = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]])
    weights = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    total = 1 + 6 + 8
    for normaliser, divisor in (("tokens", 3), ("weights", 6), ("sequences", 2)):
        output = token_loss(logprobs, weights, normaliser=normaliser)  # type: ignore[arg-type]
        assert float(output.loss) == pytest.approx(total / divisor)
    assert output.metrics == pytest.approx(
        {
            "loss": total / 2,
            "nll": 7 / 3,
            "probability": (math.exp(-1) + math.exp(-2) + math.exp(-4)) / 3,
            "nll/sequence": 7 / 2,
            "weight": 2.0,
            "grad_weight": 2.0,
        }
    )
    flat = token_loss(
        torch.tensor([-1.0, -2.0, -4.0]),
        torch.tensor([1.0, 3.0, 2.0]),
        row=torch.tensor([0, 0, 1]),
        normaliser="sequences",
    )
    assert float(flat.loss) == pytest.approx(total / 2)
    # p = 1/4, pushed down with weight 2: 2 log(4/3), beside one wanted token.
    signed = token_loss(
        torch.tensor([math.log(0.25), -1.0]), torch.tensor([-2.0, 1.0]), kernel="unlikelihood"
    )
    assert float(signed.loss) == pytest.approx((2 * math.log(4 / 3) + 1) / 3)
    assert signed.metrics["unwanted/probability"] == pytest.approx(0.25)
    assert signed.metrics["nll"] == pytest.approx(1.0)
    assert signed.metrics["grad_weight"] == pytest.approx((2 * (0.25 / 0.75) + 1) / 2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_micro_batches_add_up(kernel: str, normaliser: str) -> None:
    case = next(c for c in (Case(s, kernel) for s in range(99)) if len(c.lengths) == 4)
    logits, targets, weights = case.padded(torch.float64)
    whole, grad = graded(kernel, logits, targets, weights, normaliser=normaliser)
    totals = TokenTotals.of(case.weights)
    losses, slopes = [], []
    for rows in ([0, 1], [2], [3]):
        part = logits.detach()[rows].requires_grad_()
        loss, slope = graded(kernel, part, targets[rows], weights[rows], normaliser=normaliser, totals=totals)
        losses.append(loss)
        slopes.append(slope)
    assert sum(losses) == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(torch.cat(slopes), grad, rtol=1e-12, atol=1e-14)
    # The mutation: a part that is divided by what it holds itself.
    alone, _ = graded(
        kernel, logits.detach()[[3]].requires_grad_(), targets[[3]], weights[[3]], normaliser=normaliser
    )
    assert alone != pytest.approx(losses[-1], rel=1e-6)


# -- identities -----------------------------------------------------------------------------------


def logits_of(seed: int, tokens: int = 12, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(vocabulary, (tokens,), generator=generator)


def slope_of(kernel: str, kappa: float = KAPPA, **settings: float) -> Tensor:
    logits, targets = logits_of(3)
    read = read_logits(logits, targets, expected_at=expected_at(kernel, kappa))
    options = {"expected": read.expected, "sampling_logprobs": read.sampling_logprobs}
    token_loss(read.logprobs, kernel=kernel, **options, **settings).loss.backward()  # type: ignore[arg-type]
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("beta", [-2.0, -0.1, 0.0, 0.3, 0.9])
def test_otr_at_kappa_1_is_dft_times_1_minus_beta(beta: float) -> None:
    """Whatever beta is: it only is a baseline there, and changes the size of the step (S165)."""
    found = slope_of("otr", kappa=1.0, wrong_reward=beta)
    torch.testing.assert_close(found, (1 - beta) * slope_of("dft"), rtol=1e-9, atol=1e-14)
    away = slope_of("otr", kappa=1.5, wrong_reward=beta)
    assert not torch.allclose(away, (1 - beta) * slope_of("dft"), rtol=1e-2)


def test_dft_is_minus_the_slope_of_the_probability() -> None:
    logits, targets = logits_of(3)
    p = logits.softmax(dim=-1).gather(-1, targets[:, None]).mean()
    (slope,) = torch.autograd.grad(-p, logits)
    torch.testing.assert_close(slope_of("dft"), slope, rtol=1e-9, atol=1e-14)


def test_no_smoothing_is_cross_entropy_and_smoothing_is_torchs() -> None:
    torch.testing.assert_close(slope_of("label_smoothing", smoothing=0.0), slope_of("ce"), rtol=0, atol=0)
    logits, targets = logits_of(3)
    torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.3).backward()
    assert logits.grad is not None
    torch.testing.assert_close(slope_of("label_smoothing", smoothing=0.3), logits.grad, rtol=1e-9, atol=1e-14)


def test_sampled_rollouts_have_otrs_exact_loss_as_their_mean() -> None:
    """Value, and the slope in a direction, within 3 standard errors of 40,000 draws a token."""
    draws = 40_000
    logits, targets = logits_of(5, tokens=4, vocabulary=6)
    read = read_logits(logits, targets, expected_at=KAPPA)
    exact = token_loss(
        read.logprobs,
        kernel="otr",
        expected=read.expected,
        sampling_logprobs=read.sampling_logprobs,
        wrong_reward=BETA,
    )
    exact.loss.backward()
    assert logits.grad is not None
    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    q = (logits.detach() / KAPPA).softmax(dim=-1)
    drawn = torch.multinomial(q, draws, replacement=True, generator=generator)  # (tokens, draws)
    reward = torch.where(drawn == targets[:, None], 1.0, BETA).double()
    every = logits.detach().log_softmax(dim=-1)
    values = -(reward * every.gather(-1, drawn)).mean(dim=0)
    # d log p(a) along the direction: the direction's entry of a less its mean under p.
    along = direction.gather(-1, drawn) - (every.exp() * direction).sum(dim=-1, keepdim=True)
    slopes = -(reward * along).mean(dim=0)
    for sampled, wanted in ((values, exact.loss.detach()), (slopes, (logits.grad * direction).sum())):
        error = float(sampled.std()) / math.sqrt(draws)
        assert abs(float(sampled.mean() - wanted)) < 3 * error
        assert abs(float(wanted)) > 20 * error  # or anything would pass


def test_expected_log_probs_have_no_slope_where_they_are_drawn_from_the_policy_itself() -> None:
    logits, targets = logits_of(4)
    expected = read_logits(logits, targets, expected_at=1.0).expected
    assert expected is not None
    torch.testing.assert_close(expected, -torch.distributions.Categorical(logits=logits).entropy())
    expected.sum().backward()
    assert float(logits.grad.abs().max()) < 1e-14  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unlikelihood_is_stable_at_both_ends(dtype: torch.dtype) -> None:
    wanted = [1e-30, 1e-9, 0.3, math.log(2.0), 5.0, 30.0, 700.0]  # -log p
    logprobs = (-torch.tensor(wanted, dtype=dtype)).requires_grad_()
    found = unlikelihood(logprobs)
    found.sum().backward()
    assert logprobs.grad is not None
    assert bool(found.isfinite().all()) and bool(logprobs.grad.isfinite().all())
    floor = LEAST_DOUBT[dtype]
    exact = [
        -math.log(max(-math.expm1(-x), floor)) if x < 0.5 else -math.log1p(-math.exp(-x)) for x in wanted
    ]
    assert found.tolist() == pytest.approx(exact, rel=1e-6 if dtype == torch.float32 else 1e-10, abs=1e-300)
    slopes = [1.0 / max(-math.expm1(-x), floor) - 1.0 for x in wanted[:3]]
    assert logprobs.grad[:3].tolist() == pytest.approx(slopes, rel=1e-3)
    # However sure the policy is of an unwanted token, it is pushed down.
    certain = torch.zeros(1, dtype=dtype, requires_grad=True)
    unlikelihood(certain).backward()
    assert float(certain.grad) == pytest.approx(1.0 / floor, rel=1e-3)  # type: ignore[arg-type]


def test_half_precision_is_widened() -> None:
    output = token_loss(torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True))
    assert output.loss.dtype == torch.float32 and float(output.loss) == 1.5


# -- what is refused ------------------------------------------------------------------------------


def test_wrong_input_is_named() -> None:
    logp = torch.tensor([-1.0, -2.0])
    one = torch.tensor([-1.0])
    nan = torch.tensor([-1.0, math.nan])
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"kernel": "mse"}, BadInputError, "no kernel 'mse'"),
        ({"normaliser": "pages"}, BadInputError, "no normaliser 'pages'"),
        ({"kernel": "otr", "expected": logp}, BadInputError, "otr needs sampling_logprobs"),
        ({"kernel": "label_smoothing"}, BadInputError, "label_smoothing needs expected"),
        ({"smoothing": 1.0}, BadInputError, "smoothing must be in"),
        ({"wrong_reward": 1.0}, BadInputError, "wrong_reward must be below 1"),
        ({"weights": one}, BadInputError, "one shape.*weights .1,."),
        ({"weights": torch.tensor([1.0, -1.0])}, BadInputError, "below 0, where the kernel ce"),
        ({"weights": nan}, NumericsError, "weights_not_finite"),
        ({"weights": torch.zeros(2)}, NumericsError, "nothing_to_average"),
        ({"normaliser": "sequences"}, BadInputError, "must know which sequence"),
        ({"row": torch.zeros(3)}, BadInputError, "row must have shape"),
        ({"entropy": nan}, NumericsError, "logprobs_not_finite: entropy"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            token_loss(logp, **options)  # type: ignore[arg-type]
    with pytest.raises(
        NumericsError, match=r"logprobs_not_finite: logprobs is NaN or infinite at tokens \[\[1\]\]"
    ):
        token_loss(nan)
    with pytest.raises(NumericsError, match="logprobs_positive"):
        token_loss(-logp)
    with pytest.raises(BadInputError, match="floating-point"):
        token_loss(torch.tensor([-1, -2]))


def totals_by_hand(weights: Sequence[Sequence[float]]) -> tuple[int, float, int, int]:
    flat = [w for row in weights for w in row if w]
    return len(flat), sum(map(abs, flat)), sum(any(row) for row in weights), sum(w < 0 for w in flat)


def test_totals_count_what_is_learnt_from() -> None:
    weights = [[0.0, 0.0], [1.0, -0.5, 0.0], [], [2.0]]
    totals = TokenTotals.of(weights)
    assert (totals.tokens, totals.weights, totals.sequences, totals.unwanted) == totals_by_hand(weights)
    assert totals == TokenTotals(3.0, 3.5, 2.0, 1.0)
