"""Each kernel equals its equation, written out in scalar loops, in value and in gradient."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from corrigible.models import attention
from corrigible.models.attention import masked_attention, tree_attention
from corrigible.models.kernels import rms_norm, rotate, swiglu
from corrigible.models.packing import Node

Kernel = Callable[..., Tensor]
Matrix = list[list[float]]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of results and gradients, relative to their norm. bfloat16 rounds each number by up to 2^-9, a few
times over; it is compared with float32 on the same inputs."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def run(kernel: Kernel, inputs: Sequence[Tensor], weight: Tensor, *rest: object) -> list[Tensor]:
    """A kernel's result and, under ``sum(result * weight)``, the gradient of every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = kernel(*leaves, *rest)
    (result * weight.to(result.dtype)).sum().backward()
    return [result.detach(), *(x.grad for x in leaves if x.grad is not None)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Whether every tensor is within ``tolerance`` of the expected one, relative to its norm."""
    assert [x.shape for x in found] == [x.shape for x in expected]
    differences = [float((a.double() - b.double()).norm()) for a, b in zip(found, expected, strict=True)]
    sizes = [float(b.double().norm()) for b in expected]
    return all(a <= tolerance * (b + 1e-30) for a, b in zip(differences, sizes, strict=True))


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Float64 numbers that bfloat16 holds exactly, so that every precision gets the same inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).bfloat16().double() for shape in shapes]


def check(kernel: Kernel, inputs: list[Tensor], weight: Tensor, oracle: list[Tensor], *rest: object) -> None:
    """In float64 and float32 against the oracle, in bfloat16 against float32."""
    results = {dtype: run(kernel, [x.to(dtype) for x in inputs], weight, *rest) for dtype in DTYPES}
    assert all(x.dtype == dtype for dtype, found in results.items() for x in found)
    assert close(results[torch.float64], oracle, TOLERANCE[torch.float64])
    assert close(results[torch.float32], oracle, TOLERANCE[torch.float32])
    assert close(results[torch.bfloat16], results[torch.float32], TOLERANCE[torch.bfloat16])


# -- norm -----------------------------------------------------------------------------------------


def norm_by_hand(x: Matrix, weight: list[float], eps: float, grad: Matrix) -> list[Tensor]:
    """``y_i = w_i x_i r``, ``r = (mean x² + eps)^-1/2``; so ``dy_i/dx_j = w_i (r [i=j] - x_i x_j r³/n)``."""
    width = len(weight)
    y, grad_x, grad_weight = [], [], [0.0] * width
    for row, g in zip(x, grad, strict=True):
        r = (sum(a * a for a in row) / width + eps) ** -0.5
        y.append([weight[i] * row[i] * r for i in range(width)])
        grad_x.append(
            [
                sum(
                    g[i] * weight[i] * ((r if i == j else 0.0) - row[i] * row[j] * r**3 / width)
                    for i in range(width)
                )
                for j in range(width)
            ]
        )
        for i in range(width):
            grad_weight[i] += g[i] * row[i] * r
    return [torch.tensor(v, dtype=torch.float64) for v in (y, grad_x, grad_weight)]


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_norm_equals_its_equation(eps: float) -> None:
    x, weight, grad = normal(1, (5, 7), (7,), (5, 7))
    check(rms_norm, [x, weight], grad, norm_by_hand(x.tolist(), weight.tolist(), eps, grad.tolist()), eps)


def test_norm_of_heads_equals_norm_of_rows() -> None:
    """Qwen3 norms queries and keys head by head: one axis more."""
    x, weight, grad = normal(2, (5, 3, 8), (8,), (5, 3, 8))
    expected = norm_by_hand(x.view(15, 8).tolist(), weight.tolist(), 1e-6, grad.view(15, 8).tolist())
    expected[:2] = [part.view(5, 3, 8) for part in expected[:2]]
    check(rms_norm, [x, weight], grad, expected, 1e-6)


def test_a_weight_of_a_wider_type_is_not_rounded() -> None:
    """Gemma multiplies by 1 + weight in float32: what comes out is the exact product, rounded once."""
    x, _, grad = normal(10, (5, 7), (7,), (5, 7))
    weight = 1.0 + torch.linspace(-0.3, 0.3, 7)
    exact = norm_by_hand(x.tolist(), weight.tolist(), 1e-6, grad.tolist())
    leaves = [x.bfloat16().requires_grad_(), weight.requires_grad_()]
    result = rms_norm(*leaves, 1e-6)
    assert torch.equal(result, exact[0].bfloat16())
    result.backward(grad.bfloat16())
    assert leaves[0].grad.dtype == torch.bfloat16 and leaves[1].grad.dtype == torch.float32
    assert close([leaves[0].grad], exact[1:2], 4e-3) and close([leaves[1].grad], exact[2:], 1e-6)


def test_a_row_of_zeros_has_a_finite_norm_and_gradient() -> None:
    x, weight, grad = torch.zeros(2, 4), torch.ones(4), torch.ones(2, 4)
    found = run(rms_norm, [x, weight], grad, 1e-6)
    assert found[0].tolist() == [[0.0] * 4] * 2
    assert torch.allclose(found[1], torch.full((2, 4), 1e3))  # 1 / sqrt(eps)


def test_a_frozen_norm_gets_no_gradient() -> None:
    x, weight, grad = normal(3, (5, 7), (7,), (5, 7))
    x.requires_grad_()
    (rms_norm(x, weight, 1e-6) * grad).sum().backward()
    assert weight.grad is None
    assert close([x.grad], run(rms_norm, [x, weight], grad, 1e-6)[1:2], 1e-12)


# -- gated unit -----------------------------------------------------------------------------------


def test_gated_unit_equals_its_equation() -> None:
    gate, up, grad = normal(4, (6, 9), (6, 9), (6, 9))
    gate[0, :3] = torch.tensor([0.0, 30.0, -30.0])
    results: list[Matrix] = [[], [], []]
    for gs, us, ws in zip(gate.tolist(), up.tolist(), grad.tolist(), strict=True):
        sigma = [1.0 / (1.0 + math.exp(-g)) for g in gs]
        results[0].append([g * s * u for g, s, u in zip(gs, sigma, us, strict=True)])
        results[1].append(
            [w * u * s * (1 + g * (1 - s)) for g, s, u, w in zip(gs, sigma, us, ws, strict=True)]
        )
        results[2].append([w * g * s for g, s, w in zip(gs, sigma, ws, strict=True)])
    check(swiglu, [gate, up], grad, [torch.tensor(r, dtype=torch.float64) for r in results])


# -- rotary positions -----------------------------------------------------------------------------


def angles(positions: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(tokens, 1, size)`` of Su et al. 2021, eq. 15, both halves of the last axis equal."""
    table = [[p * 10000.0 ** (-2 * i / size) for i in range(size // 2)] * 2 for p in positions]
    angle = torch.tensor(table, dtype=torch.float64).unsqueeze(1)
    return angle.cos(), angle.sin()


def test_rotation_equals_complex_multiplication() -> None:
    """The pair (first half, second half) is a complex number that turns by position times frequency."""
    positions, heads, size = [0, 1, 7, 100, 3], 3, 8
    x, grad = normal(5, (5, heads, size), (5, heads, size))
    expected = [torch.zeros_like(x), torch.zeros_like(x)]
    for t, position in enumerate(positions):
        for h in range(heads):
            for i in range(size // 2):
                theta = position * 10000.0 ** (-2 * i / size)
                turn = complex(math.cos(theta), math.sin(theta))
                y = complex(x[t, h, i], x[t, h, i + size // 2]) * turn
                # Turning by theta is orthogonal: its transpose turns back.
                g = complex(grad[t, h, i], grad[t, h, i + size // 2]) * turn.conjugate()
                for out, value in zip(expected, (y, g), strict=True):
                    out[t, h, i], out[t, h, i + size // 2] = value.real, value.imag
    cos, sin = angles(positions, size)

    def kernel(x: Tensor) -> Tensor:
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))

    check(kernel, [x], grad, expected)
    # Stretched positions (YaRN) scale cosine and sine alike; the transpose is scaled with them.
    stretched = run(lambda x: rotate(x, 1.3 * cos, 1.3 * sin), [x], grad)
    assert close(stretched, [1.3 * part for part in expected], 1e-12)


# -- attention over a tree ------------------------------------------------------------------------

FOREST = (
    # A prompt of 3, under it an answer of 1, and a further stretch of 2 with two answers; then a row alone.
    Node(0, 3, 10),
    Node(3, 4, 4),
    Node(4, 6, 10),
    Node(6, 9, 9),
    Node(9, 10, 10),
    Node(10, 14, 14),
)

SEEN = [
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 1, 2, 3],
    [0, 1, 2, 4],
    [0, 1, 2, 4, 5],
    [0, 1, 2, 4, 5, 6],
    [0, 1, 2, 4, 5, 6, 7],
    [0, 1, 2, 4, 5, 6, 7, 8],
    [0, 1, 2, 4, 5, 9],
    [10],
    [10, 11],
    [10, 11, 12],
    [10, 11, 12, 13],
]
"""What each token of :data:`FOREST` sees, written down and not computed."""


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]], scale: float, grad: Tensor
) -> list[Tensor]:
    """Softmax attention and its gradients, token by token (Vaswani et al. 2017, eq. 1)."""
    tokens, heads, size = q.shape
    group = heads // k.shape[1]
    out, grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, q, k, v))
    Q, K, V, G = (x.tolist() for x in (q, k, v, grad))
    for t in range(tokens):
        for h in range(heads):
            j = h // group
            dots = [scale * sum(Q[t][h][i] * K[s][j][i] for i in range(size)) for s in seen[t]]
            most = max(dots)
            total = sum(math.exp(d - most) for d in dots)
            p = [math.exp(d - most) / total for d in dots]
            # d loss / d p_s, and of the softmax: ds_s = p_s (dp_s - sum p dp)
            dp = [sum(G[t][h][i] * V[s][j][i] for i in range(size)) for s in seen[t]]
            mean = sum(a * b for a, b in zip(p, dp, strict=True))
            for s, p_s, dp_s in zip(seen[t], p, dp, strict=True):
                for i in range(size):
                    out[t, h, i] += p_s * V[s][j][i]
                    grad_v[s, j, i] += p_s * G[t][h][i]
                    grad_q[t, h, i] += scale * p_s * (dp_s - mean) * K[s][j][i]
                    grad_k[s, j, i] += scale * p_s * (dp_s - mean) * Q[t][h][i]
    return [out, grad_q, grad_k, grad_v]


@pytest.fixture(params=[0, 5, 384], ids=["long", "both", "short"])
def dense(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All branches by the fused kernel, those with more than 5 keys, or none."""
    monkeypatch.setattr(attention, "DENSE", request.param)


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("kernel", [tree_attention, masked_attention])
@pytest.mark.parametrize("heads, key_heads", [(2, 2), (4, 2), (3, 1)])
def test_attention_equals_its_equation(kernel: Kernel, heads: int, key_heads: int) -> None:
    shapes = [(14, heads, 4), (14, key_heads, 4), (14, key_heads, 4)]
    q, k, v, grad = normal(6, *shapes, shapes[0])
    oracle = attention_by_hand(q, k, v, SEEN, 0.7, grad)
    check(kernel, [q, k, v], grad, oracle, FOREST, 0.7)


@pytest.mark.usefixtures("dense")
def test_attention_that_is_very_sure_stays_exact() -> None:
    """Logits of hundreds: parts are joined by their log-sum-exp, never by their sums."""
    q, k, v, grad = normal(7, (14, 2, 4), (14, 2, 4), (14, 2, 4), (14, 2, 4))
    found = run(tree_attention, [10 * q, 10 * k, v], grad, FOREST, 1.0)
    assert all(bool(part.isfinite().all()) for part in found)
    assert close(found, attention_by_hand(10 * q, 10 * k, v, SEEN, 1.0, grad), 1e-9)


# -- many shapes, against torch's own gradients ----------------------------------------------------


def random_forest(rng: random.Random, depth: int = 3) -> list[Node]:
    nodes: list[Node] = []

    def grow(start: int, level: int) -> int:
        number, end = len(nodes), start + rng.choice([1, 2, 3, 16, 33, 40])
        nodes.append(Node(start, end, end))
        below = end
        for _ in range(rng.randint(0, 3) if level else 0):
            below = grow(below, level - 1)
        nodes[number] = Node(start, end, below)
        return below

    end = 0
    for _ in range(rng.randint(1, 3)):
        end = grow(end, rng.randrange(depth))
    return nodes


def plain_attention(q: Tensor, k: Tensor, v: Tensor, nodes: Sequence[Node], scale: float) -> Tensor:
    """Written with a mask of minus infinity, from what each token's chain of nodes says."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for node in nodes:
            if node.start <= t < node.below:
                visible[t, node.start : min(node.end, t + 1)] = True
    dots = torch.einsum("thi,shi->hts", q, k.repeat_interleave(group, 1)) * scale
    weights = dots.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return torch.einsum("hts,shi->thi", weights, v.repeat_interleave(group, 1))


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_200_ragged_shapes_agree_with_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(8)
    tolerance = TOLERANCE[dtype]
    for case in range(200):
        monkeypatch.setattr(attention, "DENSE", (384, 30, 0)[case % 3])
        tokens, width = rng.randint(1, 40), rng.choice([1, 2, 5, 16, 33, 64])
        kernel, plain, inputs, rest = {
            0: (rms_norm, plain_norm, normal(case, (tokens, 1 + width), (1 + width,)), (1e-5,)),
            1: (
                swiglu,
                lambda g, u: g / (1 + (-g).exp()) * u,
                normal(case, (tokens, width), (tokens, width)),
                (),
            ),
            2: (
                rotate,
                plain_rotate,
                normal(case, (tokens, rng.randint(1, 4), 2 * width)),
                tuple(a.to(dtype) for a in angles([rng.randrange(2000) for _ in range(tokens)], 2 * width)),
            ),
        }.get(case % 5) or (tree_attention, plain_attention, *forest_case(rng, case))
        inputs = [x.to(dtype) for x in inputs]
        weight = normal(1000 + case, tuple(kernel(*inputs, *rest).shape))[0].to(dtype)
        assert close(run(kernel, inputs, weight, *rest), run(plain, inputs, weight, *rest), tolerance), (
            f"case {case}"
        )


def forest_case(rng: random.Random, seed: int) -> tuple[list[Tensor], tuple[list[Node], float]]:
    nodes = random_forest(rng)
    key_heads, size = rng.randint(1, 2), rng.choice([4, 8, 16, 24])
    heads, tokens = key_heads * rng.randint(1, 3), max(node.below for node in nodes)
    shapes = (tokens, heads, size), (tokens, key_heads, size), (tokens, key_heads, size)
    return normal(seed, *shapes), (nodes, size**-0.5)


def test_masked_attention_agrees_with_tree_attention_on_forests() -> None:
    rng = random.Random(9)
    for case in range(20):
        inputs, rest = forest_case(rng, case)
        weight = normal(case + 50, tuple(inputs[0].shape))[0]
        assert close(
            run(masked_attention, inputs, weight, *rest), run(tree_attention, inputs, weight, *rest), 1e-9
        )


@pytest.mark.parametrize("most", [384, 0])
def test_a_branch_is_computed_alike_whatever_stands_beside_it(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, result and gradients: the reference pass packs otherwise than training does."""
    monkeypatch.setattr(attention, "DENSE", most)
    pair = [Node(0, 70, 150), Node(70, 101, 101), Node(101, 150, 150)]
    q, k, v, grad = (x.bfloat16() for x in normal(11, (150, 9, 64), (150, 3, 64), (150, 3, 64), (150, 9, 64)))
    alone = run(tree_attention, [q, k, v], grad, pair, 0.125)
    for before in (1, 37, 384):
        others = normal(12 + before, *[(before, *x.shape[1:]) for x in (q, k, v, grad)])
        packed = [torch.cat([other.bfloat16(), x]) for other, x in zip(others, (q, k, v, grad), strict=True)]
        moved = [Node(n.start + before, n.end + before, n.below + before) for n in pair]
        nodes = [Node(0, before, before), *moved]
        found = run(tree_attention, packed[:3], packed[3], nodes, 0.125)
        assert all(torch.equal(a, b[before:]) for a, b in zip(alone, found, strict=True)), before
