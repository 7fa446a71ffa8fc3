"""Log-probs and entropies off the output layer, and their gradients, equal the equations."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from corrigible.models.head import Scores, score

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Relative to the norm. In bfloat16 logits of size 4 are up to 0.016 off, and so is what is made of them."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(seed: int, rows: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets and bias; float64 numbers that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).bfloat16().double()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator), bias


def weights_of(rows: int) -> tuple[Tensor, Tensor]:
    """What the log-probs and the entropies are multiplied by, to make them one number."""
    return torch.linspace(-1.0, 2.0, rows).double(), torch.linspace(0.7, -0.4, rows).double()


def graded(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
    entropy: bool = False,
    **options: float,
) -> list[Tensor]:
    """Log-probs, entropies if asked for, and the gradients of hidden, weight and bias."""
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight, bias)]
    result: Scores = score(leaves[0], leaves[1], targets, bias=leaves[2], entropy=entropy, **options)
    a, c = weights_of(len(hidden))
    total = (result.logprobs.double() * a).sum()
    if result.entropy is not None:
        total = total + (result.entropy.double() * c).sum()
    total.backward()
    values = [result.logprobs] if result.entropy is None else [result.logprobs, result.entropy]
    return [x.detach() for x in values] + [x.grad for x in leaves if x is not None]


def by_hand(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float, entropy: bool
) -> list[Tensor]:
    """``log p_y = z_y - log sum exp z`` and ``H = -sum p log p`` for ``z = (W h + b) / T``.

    Their slopes: ``d log p_y / dz_j = [j = y] - p_j`` and ``dH / dz_j = -p_j (log p_j + H)``.
    """
    (rows, width), vocabulary = hidden.shape, len(weight)
    h, w = hidden.tolist(), weight.tolist()
    b = [0.0] * vocabulary if bias is None else bias.tolist()
    a, c = (x.tolist() for x in weights_of(rows))
    logprobs, entropies = [], []
    grad_h = [[0.0] * width for _ in range(rows)]
    grad_w = [[0.0] * width for _ in range(vocabulary)]
    grad_b = [0.0] * vocabulary
    for t in range(rows):
        z = [(sum(h[t][i] * w[j][i] for i in range(width)) + b[j]) / temperature for j in range(vocabulary)]
        most = max(z)
        log_total = most + math.log(sum(math.exp(x - most) for x in z))
        logp = [x - log_total for x in z]
        p = [math.exp(x) for x in logp]
        entropies.append(-sum(x * y for x, y in zip(p, logp, strict=True)))
        y = int(targets[t])
        logprobs.append(logp[y])
        for j in range(vocabulary):
            slope = a[t] * ((j == y) - p[j])
            if entropy:
                slope -= c[t] * p[j] * (logp[j] + entropies[t])
            slope /= temperature
            grad_b[j] += slope
            for i in range(width):
                grad_h[t][i] += slope * w[j][i]
                grad_w[j][i] += slope * h[t][i]
    found = [logprobs, *([entropies] if entropy else []), grad_h, grad_w, *([] if bias is None else [grad_b])]
    return [torch.tensor(x, dtype=torch.float64) for x in found]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert [x.shape for x in found] == [x.shape for x in expected]
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        difference = float((a.double() - b.double()).norm() / b.double().norm())
        assert difference <= tolerance, f"part {number} is {difference:.2g} off"


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probs", "with entropy"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("block", ["one block", "blocks", "row by row"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
def test_score_equals_its_equation(
    entropy: bool, temperature: float, with_bias: bool, block: str, keep: bool
) -> None:
    rows, width, vocabulary = 19, 3, 11  # more rows than a stripe
    hidden, weight, targets, bias = problem(1, rows, width, vocabulary)
    given = (hidden, weight, targets, bias if with_bias else None)
    oracle = by_hand(*given, temperature, entropy)
    found = {}
    for dtype in DTYPES:
        size = {"one block": 1 << 30, "blocks": 7 * vocabulary * dtype.itemsize, "row by row": 1}[block]
        found[dtype] = graded(
            *given,
            dtype=dtype,
            entropy=entropy,
            temperature=temperature,
            block_bytes=size,
            keep_bytes=1 << 30 if keep else 0,
        )
        # Values are float32 at least; each gradient has the type of what it belongs to.
        values = 2 if entropy else 1
        assert {x.dtype for x in found[dtype][:values]} == {
            dtype if dtype == torch.float64 else torch.float32
        }
        assert {x.dtype for x in found[dtype][values:]} == {dtype}
    assert_close(found[torch.float64], oracle, TOLERANCE[torch.float64])
    assert_close(found[torch.float32], oracle, TOLERANCE[torch.float32])
    assert_close(found[torch.bfloat16], oracle, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_200_ragged_shapes_agree_with_torch(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    for case in range(200):
        rows, width, vocabulary = rng.randint(1, 70), rng.randint(1, 40), rng.randint(2, 90)
        hidden, weight, targets, bias = problem(case, rows, width, vocabulary)
        hidden = hidden / math.sqrt(width)
        temperature, entropy = rng.choice([1.0, 0.3, 1.7]), rng.random() < 0.5
        given = (hidden, weight, targets, bias if rng.random() < 0.3 else None)
        found = graded(
            *given,
            dtype=dtype,
            entropy=entropy,
            temperature=temperature,
            block_bytes=rng.choice([1, 3000, 1 << 30]),
            keep_bytes=rng.choice([0, 1 << 30]),
        )
        leaves = [None if x is None else x.clone().requires_grad_() for x in (given[0], given[1], given[3])]
        logits = torch.nn.functional.linear(leaves[0], leaves[1], leaves[2]) / temperature
        every = logits.log_softmax(dim=-1)
        values = [every.gather(-1, targets[:, None])[:, 0]]
        if entropy:
            values.append(-(every.exp() * every).sum(dim=-1))
        sum((x * w).sum() for x, w in zip(values, weights_of(rows), strict=False)).backward()
        expected = [x.detach() for x in values] + [x.grad for x in leaves if x is not None]
        assert_close(found, expected, TOLERANCE[dtype])


def test_entropy_of_an_even_and_of_a_certain_distribution() -> None:
    even = score(torch.zeros(2, 3), torch.randn(50, 3), torch.tensor([0, 49]), entropy=True)
    assert even.entropy.tolist() == pytest.approx([math.log(50)] * 2)
    assert even.logprobs.tolist() == pytest.approx([-math.log(50)] * 2)
    certain = score(torch.tensor([[1000.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), entropy=True)
    assert certain.entropy.tolist() == [0.0] and certain.logprobs.tolist() == [0.0]


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    hidden, weight, targets, _ = problem(3, 9, 4, 13)
    expected = graded(hidden, weight, targets, None)
    hidden.requires_grad_()
    score(hidden, weight, targets).logprobs.backward(weights_of(9)[0])
    assert_close([hidden.grad], expected[1:2], 1e-12)
    weight.requires_grad_()
    score(hidden.detach(), weight, targets).logprobs.backward(weights_of(9)[0])
    assert_close([weight.grad], expected[2:3], 1e-12)
    with torch.no_grad():
        assert not score(hidden, weight, targets).logprobs.requires_grad


def test_kept_probabilities_are_used_once() -> None:
    """They are overwritten by the backward pass; a second one must not read them."""
    hidden, weight, targets, _ = problem(4, 9, 4, 13)
    logprobs = score(hidden.requires_grad_(), weight, targets).logprobs
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="score again"):
        logprobs.sum().backward()


def test_no_rows_is_no_error() -> None:
    _, weight, _, _ = problem(5, 1, 4, 13)
    weight.requires_grad_()
    result = score(torch.zeros(0, 4).double(), weight, torch.zeros(0, dtype=torch.long), entropy=True)
    assert result.logprobs.shape == (0,) and result.entropy is not None and result.entropy.shape == (0,)


def test_the_widest_tensor_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits of all rows at once, in no precision, forward or backward."""
    hidden, weight, targets, _ = problem(6, 64, 4, 1000)
    largest = 0
    plain = torch.nn.functional.linear

    def watched(*given: Tensor) -> Tensor:
        nonlocal largest
        result = plain(*given)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    options = {"block_bytes": 8 * 1000 * 10, "keep_bytes": 0}
    score(hidden.requires_grad_(), weight, targets, **options).logprobs.sum().backward()
    assert 0 < largest <= 10 * 1000
