"""One measurement is one process: its steps, its losses, its peak memory, as one JSON object on stdout."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ALGORITHMS = ("dpo", "reward", "kto", "grpo")
"""The updates that are compared."""

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Training:
    """What both sides have in common: the same optimiser (AdamW, betas 0.9 and 0.999, no weight decay,
    gradients clipped to norm 1, a constant learning rate) on the same batches.

    Attributes:
        algorithm: one of :data:`ALGORITHMS`.
        steps: optimiser steps that are timed.
        warmup: steps before them, trained on batches of their own and not timed.
        lr: the learning rate of every step.
        precision: ``"bf16"`` or ``"float32"`` (the tests', where losses agree to rounding).
        lora: train a LoRA adapter (rank 16 on every linear layer) instead of all weights.
    """

    algorithm: str
    steps: int
    warmup: int = 1
    lr: float = 1e-6
    precision: str = "bf16"
    lora: bool = False

    @property
    def total(self) -> int:
        """All steps, those of the warm-up included."""
        return self.warmup + self.steps


@dataclass
class Measurement:
    """What one process found. Lists have one entry a step, those of the warm-up first.

    Attributes:
        side: ``"trl"`` or ``"corrigible"``.
        seconds: wall time of each step, from the end of the one before.
        tokens: real tokens of each step: every row with its prompt, no padding.
        losses: the batch's loss before the step's update.
        setup_seconds: loading the model, and whatever is done once before the first step.
        reference_seconds: of these, the pass of the frozen reference over all batches.
        peak_rss_mb: largest resident set of the whole process, imports and loading included, MB.
        peak_rss_steps_mb: the same while the steps ran, MB; 0 where the system cannot tell.
        options: how this side was set.
    """

    side: str
    algorithm: str
    setting: str
    warmup: int
    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    setup_seconds: float
    reference_seconds: float
    peak_rss_mb: float
    peak_rss_steps_mb: float
    options: dict[str, Any] = field(default_factory=dict)

    def timed(self) -> list[float]:
        """Seconds of the steps after the warm-up."""
        return self.seconds[self.warmup :]

    def tokens_per_second(self) -> float:
        """Real tokens of the timed steps over their seconds."""
        return sum(self.tokens[self.warmup :]) / sum(self.timed())


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def forget_peak() -> bool:
    """Begin a new peak for :func:`recent_peak_rss_mb`; False where the system cannot (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def recent_peak_rss_mb() -> float:
    """Largest resident set since :func:`forget_peak`, in MB; 0 where the system cannot tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def run(module: str, arguments: Sequence[str], *, timeout: float | None = None) -> Measurement:
    """Run ``python -m module ARGUMENTS`` and read the measurement it prints.

    Raises:
        RuntimeError: it failed; the message ends with what it wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        how = "was killed (out of memory?)" if done.returncode == -9 else f"failed with {done.returncode}"
        raise RuntimeError(f"{module} {' '.join(arguments)} {how}:\n{done.stderr[-4000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def report(measurement: Measurement, *, as_json: bool) -> None:
    """Print a measurement: as one line of JSON, or for a person."""
    if as_json:
        print(json.dumps(asdict(measurement)))
        return
    print(f"{measurement.side} {measurement.algorithm} {measurement.setting}: {measurement.options}")
    for number, (seconds, tokens, loss) in enumerate(
        zip(measurement.seconds, measurement.tokens, measurement.losses, strict=True)
    ):
        note = " (warm-up)" if number < measurement.warmup else ""
        print(f"  step {number}: {seconds:.2f} s, {tokens} tokens, loss {loss:.6f}{note}")
    print(
        f"  {measurement.tokens_per_second():.1f} tokens/s, peak {measurement.peak_rss_mb:,.0f} MB "
        f"({measurement.peak_rss_steps_mb:,.0f} MB in the steps), set-up {measurement.setup_seconds:.1f} s "
        f"(reference {measurement.reference_seconds:.1f} s)"
    )
