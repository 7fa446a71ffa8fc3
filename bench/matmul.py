"""What the matrix library of this machine can do, measured in the run that uses it as a yardstick."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def seconds(work: Callable[[], object], repeats: int = 5) -> list[float]:
    """Wall time of each of ``repeats`` calls, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return found


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of :func:`seconds`: nothing else slowed that one down."""
    return min(seconds(work, repeats))


def matmul_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of the best square product of ``size``: the machine's measured rate."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / best(lambda: a @ b, repeats)
