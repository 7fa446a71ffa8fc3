"""Memory of our update: how it grows with the tokens of a step, and whether it grows with the steps.

    python -m bench.memory --steps 500

DPO of SmolLM2-135M, all weights, on made-up pairs (rows of 256 tokens, half of them the prompt). Each size of
a step is a process of its own, which trains three steps in one pass each; the line is fitted to the largest
resident sets. For the growth one process trains ``--steps`` steps on short rows; the ratio is the largest
resident set at the end over that after a tenth of the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench.ours import UPDATES, Task
from bench.prepared import Shape, prepare
from bench.process import ROOT, peak_rss_mb

from corrigible.align import TrainConfig
from corrigible.models import load_policy

PAIRS = (1, 2, 4, 8, 16)


def train(folder: str, pairs: int, row_tokens: int, steps: int) -> list[float]:
    """Largest resident set so far, MB, after each of ``steps`` steps."""
    shape = Shape(prompt_share=0.5, group_size=2, rows=2 * pairs, row_tokens=row_tokens)
    kinds = min(steps, 8)
    prepared = prepare(folder, batches=kinds, shape=shape)
    policy = load_policy(prepared.model, dtype="bfloat16", device="cpu")
    config = TrainConfig(
        steps=steps, batch_size=pairs, lr=1e-6, schedule="constant", warmup=0.0, micro_batch_tokens=1 << 20
    )
    batches = (prepared.batches() * (steps // kinds + 1))[:steps]
    task = Task(policy, batches, prepared, config, Path(folder) / "run")
    update = UPDATES["dpo"](task)
    found = []
    for number in range(steps):
        update.step(number)
        found.append(peak_rss_mb())
    return found


def in_a_process(pairs: int, row_tokens: int, steps: int) -> list[float]:
    """:func:`train` in a fresh process."""
    command = ["-m", "bench.memory", "--child", str(pairs), str(row_tokens), str(steps)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="processes of each size (default 3)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        with tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder:
            print(json.dumps(train(folder, *options.child)))
        return
    sizes = PAIRS[:2] if options.quick else PAIRS
    row, steps, runs = (64, 4, 1) if options.quick else (256, options.steps, options.runs)
    table = []
    for pairs in sizes:
        peaks = [in_a_process(pairs, row, 3)[-1] for _ in range(runs)]
        tokens = pairs * (row // 2) * 3
        table.append({"packed_tokens": tokens, "peak_mb": round(statistics.median(peaks), 1)})
    x, y = (np.array([entry[key] for entry in table]) for key in ("packed_tokens", "peak_mb"))
    slope, start = np.polyfit(x, y, 1)
    off = np.abs(y - (start + slope * x)) / y
    grown = in_a_process(1, 32 if options.quick else 64, steps)
    first = grown[steps // 10 - 1 if steps >= 10 else 0]
    print(
        json.dumps(
            {
                "ratio": grown[-1] / first,
                "low": grown[-1] / first,
                "high": grown[-1] / first,
                "runs": runs,
                "measures": {
                    "mb_per_packed_token": dict.fromkeys(("median", "low", "high"), float(slope)),
                    "mb_without_tokens": dict.fromkeys(("median", "low", "high"), float(start)),
                    "largest_distance_from_the_line": dict.fromkeys(
                        ("median", "low", "high"), float(off.max())
                    ),
                    "peak_mb_after_a_tenth_of_the_steps": dict.fromkeys(("median", "low", "high"), first),
                    "peak_mb_after_all_steps": dict.fromkeys(("median", "low", "high"), grown[-1]),
                },
                "labels": {"steps": str(steps)},
                "table": table,
            }
        )
    )


if __name__ == "__main__":
    main()
