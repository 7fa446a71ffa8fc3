"""What is read off the output layer (log-probs, entropies, divergences, top-k) equals its equation."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corrigible.errors import BadInputError
from corrigible.models.head import STRIPE, Scores, divergence, score, top_k

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


# -- divergence -----------------------------------------------------------------------------------

Layer = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight and bias."""


def two_layers(seed: int, rows: int, vocabulary: int, *, bias: bool) -> tuple[Layer, Layer]:
    """Of different widths, for the two models may be."""
    found = []
    for number, width in enumerate((3, 5)):
        hidden, weight, _, b = problem(2 * seed + number, rows, width, vocabulary)
        found.append((hidden / math.sqrt(width), weight, b if bias else None))
    return found[0], found[1]


def apart(a: Layer, b: Layer, **options: float) -> Tensor:
    return divergence(a[0], a[1], b[0], b[1], bias_a=a[2], bias_b=b[2], **options)


def apart_graded(a: Layer, b: Layer, dtype: torch.dtype = torch.float64, **options: float) -> list[Tensor]:
    """Divergences, and the gradients of the first layer's hidden states, weight and bias."""
    leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in a]
    constants = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in b]
    found = apart((leaves[0], leaves[1], leaves[2]), (constants[0], constants[1], constants[2]), **options)
    (found.double() * weights_of(len(found))[0]).sum().backward()
    assert all(x is None or x.grad is None for x in constants), "the other layer is a constant"
    return [found.detach(), *(x.grad for x in leaves if x is not None)]


def log_softmax_by_hand(layer: Layer, row: int, temperature: float) -> list[float]:
    h, w = layer[0][row].tolist(), layer[1].tolist()
    b = [0.0] * len(w) if layer[2] is None else layer[2].tolist()
    z = [(sum(x * y for x, y in zip(h, line, strict=True)) + b[j]) / temperature for j, line in enumerate(w)]
    most = max(z)
    log_total = most + math.log(sum(math.exp(x - most) for x in z))
    return [x - log_total for x in z]


def apart_by_hand(a: Layer, b: Layer, temperature: float, reverse: bool) -> list[Tensor]:
    """``KL(a || b) = sum_j p_j (log p_j - log q_j)``, and its slopes after ``z_i``, a's logits before ``T``.

    By the chain rule over every ``j``, not by the closed form that the code uses:
    ``d log p_j / dz_i = ([i = j] - p_i) / T``, so ``KL(a || b)`` has
    ``sum_j p_j ([i = j] - p_i) (log p_j - log q_j + 1) / T`` and ``KL(b || a)``
    ``-sum_j q_j ([i = j] - p_i) / T``.
    """
    (rows, width), vocabulary = a[0].shape, len(a[1])
    scale = weights_of(rows)[0].tolist()
    values = []
    grad_h, grad_w = torch.zeros(rows, width).double(), torch.zeros(vocabulary, width).double()
    grad_b = torch.zeros(vocabulary).double()
    for t in range(rows):
        log_p, log_q = (log_softmax_by_hand(layer, t, temperature) for layer in (a, b))
        p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
        values.append(
            sum(
                q[j] * (log_q[j] - log_p[j]) if reverse else p[j] * (log_p[j] - log_q[j])
                for j in range(vocabulary)
            )
        )
        for i in range(vocabulary):
            slope = 0.0
            for j in range(vocabulary):
                change = ((i == j) - p[i]) / temperature
                slope += -q[j] * change if reverse else p[j] * change * (log_p[j] - log_q[j] + 1.0)
            grad_b[i] += scale[t] * slope
            grad_w[i] += scale[t] * slope * a[0][t]
            grad_h[t] += scale[t] * slope * a[1][i]
    return [torch.tensor(values, dtype=torch.float64), grad_h, grad_w, *([] if a[2] is None else [grad_b])]


@pytest.mark.parametrize("reverse", [False, True], ids=["a from b", "b from a"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("size", [1, 1000, 1 << 30], ids=["row by row", "blocks", "one block"])
def test_divergence_equals_its_equation(reverse: bool, temperature: float, bias: bool, size: int) -> None:
    for seed, (rows, vocabulary) in enumerate([(1, 13), (19, 11), (17, 2)]):
        a, b = two_layers(seed, rows, vocabulary, bias=bias)
        expected = apart_by_hand(a, b, temperature, reverse)
        for dtype in (torch.float64, torch.float32):
            found = apart_graded(a, b, dtype, temperature=temperature, reverse=reverse, block_bytes=size)
            assert {x.dtype for x in found} == {dtype}
            assert_close(found, expected, TOLERANCE[dtype])


def test_divergence_in_bfloat16_is_that_of_the_rounded_logits() -> None:
    """Not within some tolerance of rounded sums: only the logits themselves are rounded."""
    a, b = two_layers(3, 40, 301, bias=True)
    half_a, half_b = ([None if x is None else x.bfloat16() for x in layer] for layer in (a, b))
    found = apart((half_a[0], half_a[1], half_a[2]), (half_b[0], half_b[1], half_b[2]))
    p, q = (torch.nn.functional.linear(*layer).double().log_softmax(dim=-1) for layer in (half_a, half_b))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_divergence_passes_gradcheck(reverse: bool, bias: bool) -> None:
    a, b = two_layers(5, 6, 7, bias=bias)
    leaves = [x.requires_grad_() for x in a if x is not None]

    def function(hidden: Tensor, weight: Tensor, one: Tensor | None = None) -> Tensor:
        return apart((hidden, weight, one), b, temperature=0.7, reverse=reverse, block_bytes=2 * 7 * 16)

    assert torch.autograd.gradcheck(function, leaves)
    with torch.no_grad():
        assert not function(*leaves).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_equal_distributions_are_at_distance_0(dtype: torch.dtype, reverse: bool) -> None:
    (hidden, weight, bias), _ = two_layers(7, 23, 501, bias=True)
    layer = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    assert apart(layer, layer, reverse=reverse).tolist() == [0.0] * 23
    # A bias that shifts all logits alike changes the logits and not the distribution.
    shifted = hidden, weight, bias + 3.0
    found = apart((hidden.float(), weight.float(), bias.float()), tuple(x.float() for x in shifted))
    assert float(found.min()) >= 0.0 and float(found.max()) <= 1e-6


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    """Of two near distributions with logits in the twenties: about 2e-4 nats, in float32."""
    hidden, weight, _, _ = problem(9, 30, 8, 701)
    hidden, weight = 3.0 * hidden.float(), weight.float()
    near = weight + 0.002 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    exact = apart((hidden.double(), weight.double(), None), (hidden.double(), near.double(), None))
    found = apart((hidden, weight, None), (hidden, near, None))
    assert 1e-6 < float(exact.mean()) < 1e-3
    assert float((found - exact).abs().max()) < 2e-7 + 0.01 * float(exact.mean())


@pytest.mark.parametrize("reverse", [False, True])
def test_logits_of_10000_are_no_harm(reverse: bool) -> None:
    eye = torch.eye(3)
    a, b = (
        torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]),
        torch.tensor([[-1e4, 0.0, 1e4], [1e4, 0.0, 0.0]]),
    )
    found, grad, *_ = apart_graded((a, eye, None), (b, eye, None), torch.float32, reverse=reverse)
    # The first pair is certain of opposite things. The second: a coin of three sides and a certain one.
    even = math.log(3) if reverse else 2e4 / 3 - math.log(3)
    assert found.tolist() == pytest.approx([2e4, even], rel=1e-6)
    assert bool(grad.isfinite().all())


def test_divergence_of_layers_that_do_not_fit() -> None:
    a, b = two_layers(1, 4, 9, bias=False)
    with pytest.raises(BadInputError, match=r"vocabulary_mismatch.* 9 entries, the other 8"):
        apart(a, (b[0], b[1][:8], None))
    with pytest.raises(BadInputError, match="4 and 3 positions"):
        apart(a, (b[0][:3], b[1], None))
    assert apart((a[0][:0], a[1], None), (b[0][:0], b[1], None)).shape == (0,)


# -- expected log-probs ---------------------------------------------------------------------------

DRAWN = [1.0, 1.3, 0.4, math.inf]
"""Temperatures of the sampling policy; at infinity every token is as likely as any other."""


def drawn_by_hand(
    layer: Layer, targets: Tensor, temperature: float, drawn: float
) -> tuple[list[Tensor], list[Tensor]]:
    """``e = sum_a q(a) log p(a)``, ``log q(y)``, and the slopes of ``sum_t a_t e_t + c_t log p_t(y)``.

    By the chain rule over every ``a``: ``d log p_a / dz_j = ([a = j] - p_j) / T`` with ``q`` a constant.
    """
    hidden, weight, bias = layer
    vocabulary = len(weight)
    scale, other = (x.tolist() for x in weights_of(len(hidden)))
    values, sampling = [], []
    grads = [torch.zeros_like(x) for x in (hidden, weight, torch.zeros(vocabulary).double())]
    for t in range(len(hidden)):
        logp = log_softmax_by_hand(layer, t, temperature)
        even = [-math.log(vocabulary)] * vocabulary
        logq = even if math.isinf(drawn) else log_softmax_by_hand(layer, t, drawn)
        p, q, y = [math.exp(x) for x in logp], [math.exp(x) for x in logq], int(targets[t])
        values.append(sum(a * b for a, b in zip(q, logp, strict=True)))
        sampling.append(logq[y])
        for j in range(vocabulary):
            slope = sum(scale[t] * q[a] * ((a == j) - p[j]) for a in range(vocabulary))
            slope = (slope + other[t] * ((j == y) - p[j])) / temperature
            grads[0][t] += slope * weight[j]
            grads[1][j] += slope * hidden[t]
            grads[2][j] += slope
    columns = [torch.tensor(x, dtype=torch.float64) for x in (values, sampling)]
    return columns, grads if bias is not None else grads[:2]


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("size", [1, 1000, 1 << 30], ids=["row by row", "blocks", "one block"])
def test_expected_log_probs_equal_their_equation(
    drawn: float, temperature: float, bias: bool, size: int
) -> None:
    hidden, weight, targets, b = problem(11, 19, 3, 11)
    layer = hidden / 2, weight, b if bias else None
    columns, slopes = drawn_by_hand(layer, targets, temperature, drawn)
    for dtype in DTYPES:
        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in layer]
        found = score(
            leaves[0],
            leaves[1],
            targets,
            bias=leaves[2],
            temperature=temperature,
            expected_at=drawn,
            block_bytes=size,
        )
        assert found.expected is not None and found.sampling_logprobs is not None
        assert found.expected.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert not found.sampling_logprobs.requires_grad and found.entropy is None
        assert_close([found.expected.detach(), found.sampling_logprobs], columns, TOLERANCE[dtype])
        a, c = weights_of(19)
        (found.expected.double() * a + found.logprobs.double() * c).sum().backward()
        assert_close([x.grad for x in leaves if x is not None], slopes, TOLERANCE[dtype])


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_expected_log_probs_pass_gradcheck(entropy: bool, bias: bool) -> None:
    """Uniform draws do not move with the policy, so finite differences see what the backward pass does."""
    hidden, weight, targets, b = problem(12, 6, 3, 7)
    leaves = [x.requires_grad_() for x in (hidden, weight, *([b] if bias else []))]

    def function(hidden: Tensor, weight: Tensor, one: Tensor | None = None) -> tuple[Tensor, ...]:
        found = score(
            hidden,
            weight,
            targets,
            bias=one,
            temperature=0.7,
            entropy=entropy,
            expected_at=math.inf,
            block_bytes=2 * 7 * 8,
        )
        assert found.expected is not None
        return (found.logprobs, found.expected, *([] if found.entropy is None else [found.entropy]))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_200_ragged_shapes_of_expected_log_probs_agree_with_torch(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    for case in range(200):
        rows, width, vocabulary = rng.randint(1, 70), rng.randint(1, 40), rng.randint(2, 90)
        hidden, weight, targets, b = problem(case, rows, width, vocabulary)
        given = hidden / math.sqrt(width), weight, b if rng.random() < 0.3 else None
        temperature, drawn, entropy = rng.choice([1.0, 0.3, 1.7]), rng.choice(DRAWN), rng.random() < 0.5

        def total(values: list[Tensor]) -> Tensor:
            a, c = weights_of(len(values[0]))
            return sum((v.double() * w).sum() for v, w in zip(values, (a, c, a * c), strict=False))  # type: ignore[return-value]

        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in given]
        found = score(
            leaves[0],
            leaves[1],
            targets,
            bias=leaves[2],
            temperature=temperature,
            entropy=entropy,
            expected_at=drawn,
            block_bytes=rng.choice([1, 3000, 1 << 30]),
        )
        mine = [x for x in (found.expected, found.logprobs, found.entropy) if x is not None]
        total(mine).backward()
        plain = [None if x is None else x.clone().requires_grad_() for x in given]
        logits = torch.nn.functional.linear(plain[0], plain[1], plain[2])
        every, q = (logits / temperature).log_softmax(dim=-1), (logits.detach() / drawn).softmax(dim=-1)
        theirs = [(q * every).sum(dim=-1), every.gather(-1, targets[:, None])[:, 0]]
        theirs += [-(every.exp() * every).sum(dim=-1)] if entropy else []
        total(theirs).backward()
        assert_close(
            [x.detach() for x in mine] + [x.grad for x in leaves if x is not None],
            [x.detach() for x in theirs] + [x.grad for x in plain if x is not None],
            TOLERANCE[dtype],
        )


def test_drawn_from_itself_the_expected_log_prob_is_minus_the_entropy_and_has_no_slope() -> None:
    hidden, weight, targets, _ = problem(13, 9, 4, 13)
    hidden.requires_grad_()
    found = score(hidden, weight, targets, temperature=0.7, entropy=True, expected_at=0.7)
    assert found.expected is not None and found.entropy is not None
    torch.testing.assert_close(found.expected, -found.entropy)
    torch.testing.assert_close(found.sampling_logprobs, found.logprobs.detach())
    found.expected.sum().backward()
    assert float(hidden.grad.abs().max()) < 1e-14


def test_expected_log_probs_of_certain_distributions_are_finite() -> None:
    """Logits of 10,000: the draws are certain, or a third of them meet what the policy never says."""
    eye, hidden = torch.eye(3), torch.tensor([[1e4, 0.0, -1e4]])
    for drawn, expected in ((1.0, 0.0), (2.0, 0.0), (math.inf, -(1e4 + 2e4) / 3)):
        leaf = hidden.clone().requires_grad_()
        found = score(leaf, eye, torch.tensor([0]), expected_at=drawn)
        assert found.expected is not None
        found.expected.sum().backward()
        assert float(found.expected.detach()) == pytest.approx(expected, rel=1e-6)
        assert bool(leaf.grad.isfinite().all())


# -- the likeliest tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("size", [1, 500, 1 << 30])
def test_top_k_equals_sorting(k: int, temperature: float, size: int) -> None:
    layer, _ = two_layers(4, 37, 11, bias=True)
    for dtype in (torch.float64, torch.float32):
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in layer if x is not None)
        found = top_k(hidden, weight, k, bias=bias, temperature=temperature, block_bytes=size)
        assert not found.logprobs.requires_grad and found.logprobs.dtype == found.rest.dtype == dtype
        for row in range(37):
            every = log_softmax_by_hand(layer, row, temperature)
            order = sorted(range(11), key=lambda j: -every[j])
            assert found.ids[row].tolist() == order[:k]
            assert found.logprobs[row].tolist() == pytest.approx([every[j] for j in order[:k]], abs=1e-5)
            rest = sum(math.exp(every[j]) for j in order[k:])
            assert float(found.rest[row]) == pytest.approx(rest, rel=1e-5)


def test_what_is_left_of_a_nearly_certain_token_is_not_rounded_away() -> None:
    found = top_k(torch.tensor([[30.0]]), torch.tensor([[1.0], [0.0], [0.0]]), 1)
    assert float(found.rest) == pytest.approx(2 * math.exp(-30), rel=1e-6)


def test_top_k_of_too_many_and_of_no_positions() -> None:
    _, weight, _, _ = problem(5, 1, 4, 13)
    for k in (0, -1, 14):
        with pytest.raises(BadInputError, match=f"k is {k}"):
            top_k(torch.zeros(2, 4).double(), weight, k)
    none = top_k(torch.zeros(0, 4).double(), weight, 3)
    assert (none.logprobs.shape, none.ids.shape, none.rest.shape) == ((0, 3), (0, 3), (0,))


# -- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the most entries of a float32 tensor that any operation gives, and of any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = self.any = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.any = max(self.any, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.wide = max(self.wide, tensor.numel())
        return result


@pytest.mark.parametrize("what", ["score", "entropy", "expected", "divergence", "top-k"])
def test_float32_is_never_wider_than_a_stripe(what: str) -> None:
    rows, width, vocabulary = 64, 4, 1009
    hidden, weight, targets, _ = problem(6, rows, width, vocabulary)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    layer, size = (hidden, weight, None), 40 * vocabulary
    with Largest() as seen:
        if what == "top-k":
            top_k(hidden, weight, 5, block_bytes=size)
        elif what == "divergence":
            apart(layer, layer, block_bytes=size).sum().backward()
        else:
            drawn = 1.3 if what == "expected" else None
            found = score(
                hidden,
                weight,
                targets,
                entropy=what == "entropy",
                expected_at=drawn,
                block_bytes=size,
                keep_bytes=0,
            )
            read = {"score": found.logprobs, "entropy": found.entropy, "expected": found.expected}[what]
            assert read is not None
            read.sum().backward()
    assert STRIPE * vocabulary >= seen.wide > 0
    assert seen.any <= 20 * vocabulary, "logits of one block, and of no more rows"
