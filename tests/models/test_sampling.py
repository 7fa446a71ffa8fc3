"""Drawing from a large vocabulary: blocks and bisection against plain float64 sums and a plain sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from corrigible.models.reference import distribution_reference
from corrigible.models.sampling import BLOCK, HEAD, Scratch, draw, sequence_seed, threshold, uniforms
from corrigible.records import Sampling

SIZES = (BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 40 * BLOCK, 8191)
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.3),
    Sampling(temperature=3.0),
    Sampling(top_k=2),
    Sampling(top_k=300),
    Sampling(top_p=0.4),
    Sampling(top_p=0.97),
    Sampling(temperature=4.0, top_p=0.9),  # the nucleus is far longer than the head that is sorted
    Sampling(min_p=0.3),
    Sampling(temperature=1.5, top_k=400, top_p=0.8, min_p=0.01),
]


def logits_of(size: int, rows: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * 3
    logits[1, :] = 0.25  # all alike
    logits[2, 7] = 60.0  # certain
    logits[3, : size // 2] = -torch.inf  # half of it forbidden
    logits[4] = (logits[4] * 2).round()  # many ties
    return logits


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "sampling", SETTINGS, ids=lambda s: f"t{s.temperature}p{s.top_p}k{s.top_k}m{s.min_p}"
)
def test_a_draw_inverts_the_plain_distribution(size: int, sampling: Sampling) -> None:
    logits = logits_of(size)
    numbers = np.linspace(0, 1, 9, endpoint=False) + 0.013
    exact = []
    for row in logits.double().numpy():
        finite = [float(x) if math.isfinite(x) else -1e9 for x in row]
        exact.append(np.array(distribution_reference(finite, sampling)))
    scratch = Scratch()
    for number in numbers:
        uniform = torch.full((len(logits),), number, dtype=torch.float64)
        ids, plain, chosen = draw(logits, sampling, uniform, scratch)
        for row, token in enumerate(ids.tolist()):
            probabilities = exact[row]
            assert probabilities[token] > 0
            reached = math.fsum(probabilities[: token + 1])
            assert reached - probabilities[token] <= number + 1e-6 and reached >= number - 1e-6
            assert float(chosen[row]) == pytest.approx(math.log(probabilities[token]), abs=2e-5)
            table = logits[row].double()
            assert float(plain[row]) == pytest.approx(float(table[token] - table.logsumexp(-1)), abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_do_not_know_each_other(dtype: torch.dtype) -> None:
    logits = logits_of(40 * BLOCK, rows=6).to(dtype)
    uniform = torch.from_numpy(uniforms(3, 6))
    for sampling in SETTINGS:
        scratch = Scratch()
        together = draw(logits, sampling, uniform, scratch)
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        shuffled = draw(logits[order], sampling, uniform[order], scratch)
        for row in range(6):
            alone = draw(logits[row : row + 1], sampling, uniform[row : row + 1], scratch)
            for a, b in zip(together, alone, strict=True):
                assert torch.equal(a[row], b[0])
        for a, b in zip(together, shuffled, strict=True):
            assert torch.equal(a[order], b)
        assert torch.equal(logits, logits_of(40 * BLOCK, rows=6).to(dtype)), "the logits are left alone"


def test_the_threshold_is_a_logit_and_keeps_ties() -> None:
    scaled = logits_of(8191)
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=HEAD + 1), Sampling(top_k=5000, top_p=0.99)):
        floor = threshold(scaled, sampling)
        assert floor is not None
        for row, least in zip(scaled, floor[:, 0], strict=True):
            assert bool((row == least).any())
    everything = threshold(scaled, Sampling(top_p=0.5))
    assert everything is not None and bool((scaled[1] >= everything[1]).all()), "all alike: all are kept"
    assert threshold(scaled, Sampling()) is None


def test_the_ends_of_the_unit_interval() -> None:
    logits = logits_of(5 * BLOCK + 1)
    for number, first in ((0.0, True), (1 - 2**-53, False)):
        ids, _, chosen = draw(logits, Sampling(), torch.full((6,), number, dtype=torch.float64))
        assert chosen.isfinite().all()
        half = (5 * BLOCK + 1) // 2
        assert int(ids[3]) == half if first else int(ids[3]) > half, "never a forbidden token"
        assert int(ids[1]) == (0 if first else 5 * BLOCK)


def test_logits_that_are_not_finite_give_logprobs_that_are_not() -> None:
    for bad in (torch.nan, torch.inf):
        logits = logits_of(5 * BLOCK)
        logits[0, 3] = bad
        for sampling in (*SETTINGS, Sampling(temperature=0.0)):
            ids, plain, _ = draw(logits, sampling, torch.full((6,), 0.5, dtype=torch.float64))
            assert not bool(plain[0].isfinite()) and bool(plain[1:].isfinite().all())
            assert bool((ids >= 0).all()) and bool((ids < 5 * BLOCK).all())


def test_uniform_numbers_belong_to_seed_and_position() -> None:
    assert np.array_equal(uniforms(5, 10), uniforms(5, 99)[:10])
    assert not np.array_equal(uniforms(5, 10), uniforms(6, 10))
    keys = [(s, p, o, n) for s in (0, 1) for p in ((1, 2), (12,)) for o in (0, 1) for n in (0, 1)]
    assert len({sequence_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= sequence_seed(*key) < 2**63 for key in keys)
