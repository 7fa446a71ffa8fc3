"""Corrigible's update step beside TRL's: alternately, each in fresh processes, on the same tokens.

    python -m bench.update --algorithm dpo                       # against TRL as a user runs it
    python -m bench.update --algorithm dpo --setting fastest     # against its fastest setting
    python -m bench.update --sweep                               # prompt share x group size, made-up tokens
    python -m bench.update --losses                              # 50 steps of every algorithm in float32
    python -m bench.update --quick                               # a tiny model: does it still run?

The ratio is the median over runs and timed steps of *TRL's seconds / our seconds on the same batch*: what
a batch costs depends on its lengths, so seconds are compared batch by batch. As both sides count the same
real tokens it is the ratio of tokens per second. ``low`` and ``high`` are the 95 % interval of that median
from resampling runs and steps. Where TRL computes the reference in every step (``default``), our pass over
the reference is counted in: its seconds are spread evenly over all steps, as if each batch were trained on
once. The memory ratio is of whole processes, loading included. What differs between the two sides is
listed in :mod:`bench.rival` and :mod:`bench.ours`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.prepared import Prepared, Shape, prepare
from bench.process import ALGORITHMS, Measurement, run
from bench.results import spread

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
SIZES = (2, 4, 8, 16)
RESAMPLES = 10_000


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how often.

    Attributes:
        algorithm: one of :data:`bench.process.ALGORITHMS`.
        setting: TRL's, ``"default"`` or ``"fastest"``.
        runs: fresh processes of each side, alternating.
        steps: timed steps of each process.
        warmup: steps before them.
        precision, lr, lora: see :class:`bench.process.Training`.
        ours: ``NAME=VALUE`` changes to our trainer's configuration.
    """

    algorithm: str
    setting: str
    runs: int
    steps: int
    warmup: int = 1
    precision: str = "bf16"
    lr: float = 1e-6
    lora: bool = False
    ours: tuple[str, ...] = ()


def compare(comparison: Comparison, prepared: Prepared) -> dict[str, Any]:
    """Measure both sides in turn; the result is an entry of :mod:`bench.results` without its signature."""
    theirs: list[Measurement] = []
    ours: list[Measurement] = []
    common = ["--algorithm", comparison.algorithm, "--prepared", str(prepared.folder), "--json"]
    common += ["--steps", str(comparison.steps), "--warmup", str(comparison.warmup)]
    common += ["--precision", comparison.precision, "--lr", str(comparison.lr)]
    common += ["--lora"] * comparison.lora
    changes = [word for assignment in comparison.ours for word in ("--set", assignment)]
    for number in range(comparison.runs):
        for side, module, more in (
            (theirs, "bench.rival", ["--setting", comparison.setting]),
            (ours, "bench.ours", changes),
        ):
            name = f"{comparison.algorithm}, {comparison.setting}: {module}, run {number + 1}"
            print(f"{name} of {comparison.runs}", file=sys.stderr, flush=True)
            side.append(run(module, [*common, *more]))
    return entry(theirs, ours)


def entry(theirs: Sequence[Measurement], ours: Sequence[Measurement]) -> dict[str, Any]:
    """The comparison of runs: ``theirs[i]`` and ``ours[i]`` trained on the same batches."""
    counted = [_share_of_reference(t, o) for t, o in zip(theirs, ours, strict=True)]
    ratios = np.array(
        [
            [a / (b + share) for a, b in zip(t.timed(), o.timed(), strict=True)]
            for t, o, share in zip(theirs, ours, counted, strict=True)
        ]
    )
    low, high = interval(ratios)
    gaps = [abs(a - b) for a, b in zip(theirs[0].losses, ours[0].losses, strict=True)]
    memory = [o.peak_rss_mb / t.peak_rss_mb for t, o in zip(theirs, ours, strict=True)]
    measures: dict[str, Sequence[float]] = {
        "trl_tokens_per_second": [t.tokens_per_second() for t in theirs],
        "corrigible_tokens_per_second": [
            sum(o.tokens[o.warmup :]) / (sum(o.timed()) + share * len(o.timed()))
            for o, share in zip(ours, counted, strict=True)
        ],
        "trl_seconds_per_step": [s for t in theirs for s in t.timed()],
        "corrigible_seconds_per_step": [
            s + share for o, share in zip(ours, counted, strict=True) for s in o.timed()
        ],
        "tokens_per_step": [float(n) for n in ours[0].tokens[ours[0].warmup :]],
        "trl_peak_rss_mb": [t.peak_rss_mb for t in theirs],
        "corrigible_peak_rss_mb": [o.peak_rss_mb for o in ours],
        "loss_difference": gaps,
    }
    return {
        "ratio": float(np.median(ratios)),
        "low": low,
        "high": high,
        "memory_ratio": statistics.median(memory),
        "loss_difference_mean": statistics.fmean(gaps),
        "loss_difference_max": max(gaps),
        "first_loss": theirs[0].losses[0],
        "last_loss": theirs[0].losses[-1],
        "runs": len(theirs),
        "measures": {name: spread([round(v, 6) for v in values]) for name, values in measures.items()},
        "labels": {
            "steps": f"{len(theirs[0].timed())} timed after {theirs[0].warmup} of warm-up, in each run",
            "losses": f"mean difference {statistics.fmean(gaps):.2e}, largest {max(gaps):.2e} "
            f"over {len(gaps)} steps",
            "reference": "counted in on both sides" if any(counted) else "in the step of neither side",
            "trl": _as_text(theirs[0].options),
            "corrigible": _as_text(ours[0].options),
        },
    }


def interval(ratios: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median of ``(runs, steps)`` ratios: runs are resampled, then steps within them.

    A single value is its own interval.
    """
    random = np.random.default_rng(seed)
    runs, steps = ratios.shape
    rows = random.integers(0, runs, (RESAMPLES, runs))
    columns = random.integers(0, steps, (RESAMPLES, runs, steps))
    medians = np.median(ratios[rows[:, :, None], columns].reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def sweep(
    comparison: Comparison, folder: Path, *, model: str, shares: Sequence[float], sizes: Sequence[int]
) -> dict:
    """The comparison on made-up batches of 16 rows of 64 tokens, for every prompt share and group size."""
    base: Prepared | None = None
    rows: list[dict[str, Any]] = []
    ratios: list[float] = []
    for share in shares:
        for size in sizes:
            prepared = prepare(
                folder / f"{share:g}-{size}",
                model=model,
                batches=comparison.steps + comparison.warmup,
                shape=Shape(prompt_share=share, group_size=size, row_tokens=64),
                weights_of=base,
            )
            base = base or prepared
            found = compare(comparison, prepared)
            ratios.append(found["ratio"])
            rows.append(
                {
                    "prompt_share": share,
                    "group_size": size,
                    "ratio": found["ratio"],
                    "low": found["low"],
                    "high": found["high"],
                    "memory_ratio": found["memory_ratio"],
                    "trl tokens/s": found["measures"]["trl_tokens_per_second"]["median"],
                    "corrigible tokens/s": found["measures"]["corrigible_tokens_per_second"]["median"],
                    "loss_difference_max": found["loss_difference_max"],
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "memory_ratio": statistics.median(row["memory_ratio"] for row in rows),
        "runs": comparison.runs,
        "table": rows,
        "labels": {"spread": "low and high are the worst and the best cell of the table"},
    }


def losses(
    comparison: Comparison, folder: Path, *, model: str, data: str | None, short: bool
) -> dict[str, Any]:
    """Do both sides train alike? Every algorithm on the same short pairs in float32, step by step.

    In bfloat16 the roundings of either side are larger than what is looked for: two settings of our own
    differ by a hundredth there.
    """
    rows: list[dict[str, Any]] = []
    base: Prepared | None = None
    for algorithm in ALGORITHMS:
        prepared = prepare(
            folder / algorithm,
            model=model,
            batches=comparison.steps,
            batch_size=2,
            max_length=96,
            data=data,
            shape=Shape(0.5, 2, rows=8, row_tokens=48) if short else None,
            weights_of=base,
        )
        base = base or prepared
        found = compare(replace(comparison, algorithm=algorithm, warmup=0), prepared)
        rows.append(
            {
                "algorithm": algorithm,
                "steps": comparison.steps,
                "mean difference": found["loss_difference_mean"],
                "largest difference": found["loss_difference_max"],
                "first loss": found["first_loss"],
                "last loss": found["last_loss"],
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    largest = [row["largest difference"] for row in rows]
    return {
        "ratio": max(largest),
        "low": min(largest),
        "high": max(largest),
        "runs": comparison.runs,
        "table": rows,
        "labels": {"spread": "low and high are the best and the worst algorithm; losses are TRL's"},
    }


def _share_of_reference(theirs: Measurement, ours: Measurement) -> float:
    """Seconds that our reference pass adds to a step, where TRL pays for its reference in every step."""
    in_every_step = theirs.algorithm in ("dpo", "kto") and not theirs.options["precompute_reference"]
    return ours.reference_seconds / len(ours.seconds) if in_every_step else 0.0


def _as_text(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in options.items() if value not in ("", 0, False, None)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench.update``: prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="dpo")
    parser.add_argument("--setting", choices=("default", "fastest"), default="default", help="TRL's")
    parser.add_argument("--runs", type=int, default=3, help="fresh processes of each side (default 3)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each (default 5)")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", help="folder with hh-rlhf/ (default: CORRIGIBLE_DATA, ../shared/data)")
    parser.add_argument(
        "--ours", action="append", default=[], metavar="NAME=VALUE", help="a TrainConfig field"
    )
    parser.add_argument("--sweep", action="store_true", help="made-up tokens, GRPO, a table")
    parser.add_argument("--losses", action="store_true", help="of every algorithm, float32, a table")
    parser.add_argument("--quick", action="store_true", help="tiny model, made-up tokens, one step")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.precision, options.runs, options.steps = "tiny-random", "float32", 1, 1
    comparison = Comparison(
        algorithm="grpo" if options.sweep else options.algorithm,
        setting=options.setting,
        runs=options.runs,
        steps=options.steps,
        warmup=options.warmup,
        precision=options.precision,
        lr=options.lr,
        lora=options.lora,
        ours=tuple(options.ours),
    )
    with tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder:
        if options.losses:
            comparison = replace(comparison, precision="float32")
            found = losses(
                comparison, Path(folder), model=options.model, data=options.data, short=options.quick
            )
        elif options.sweep:
            shares, sizes = ((0.5,), (4,)) if options.quick else (SHARES, SIZES)
            found = sweep(comparison, Path(folder), model=options.model, shares=shares, sizes=sizes)
        else:
            prepared = prepare(
                folder,
                model=options.model,
                batches=options.steps + options.warmup,
                data=options.data,
                shape=Shape(0.5, 2, rows=8, row_tokens=48) if options.quick else None,
            )
            found = compare(comparison, prepared)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
