"""Run the benchmarks one after another and keep what they say in RESULTS.json and RESULTS.md.

    python -m bench                        # all, five runs each (make bench)
    python -m bench store --runs 5         # one of them
    python -m bench update/dpo update/kto  # several
    python -m bench --quick                # small sizes, once, only printed: does it still run?

Each run is its own process on an otherwise idle machine. Results of benchmarks that are not run now stay
in the file. A benchmark that fails is named at the end, and the others are run all the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if str(HERE.parent) not in sys.path:
    sys.path.insert(0, str(HERE.parent))

from bench.results import signed, spread, write  # noqa: E402


@dataclass(frozen=True)
class Benchmark:
    """A command that prints one JSON object.

    Attributes:
        name: its key in RESULTS.json.
        what: one sentence: what is measured, against what.
        ratio: the name of the number that is the comparison with the peer.
        command: arguments to Python.
        quick: the same at a small size.
        compares: whether the command takes ``--runs`` and prints an entry of :mod:`bench.results`
            (``ratio``, ``low``, ``high``, ...). Else it prints the numbers of a single run, one of which is
            called ``ratio``, and is run several times.
    """

    name: str
    what: str
    ratio: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    compares: bool = False


def _update(name: str, what: str, *options: str) -> Benchmark:
    command = ("-m", "bench.update", *options)
    return Benchmark(f"update/{name}", what, "faster_than_trl", command, (*command, "--quick"), compares=True)


_AS_RUN = "as a user runs it (its defaults, bf16 on the CPU)"
_FASTEST = "at its fastest working setting"
_NAMES = {"dpo": "DPO", "reward": "reward-model", "kto": "KTO", "grpo": "GRPO"}

BENCHMARKS = (
    Benchmark(
        "store",
        "Seconds to add feedback, over plain sqlite3.executemany of the same rows into one bare table.",
        "slower_than_sqlite3",
        ("-m", "bench.store", "--n", "1000000"),
        ("-m", "bench.store", "--n", "5000"),
    ),
    *(
        _update(
            algorithm if setting == "default" else f"{algorithm}_fastest",
            f"{title} updates of SmolLM2-135M on real HH-RLHF pairs: tokens per second over TRL 1.16 {how}.",
            "--algorithm",
            algorithm,
            "--setting",
            setting,
        )
        for algorithm, title in _NAMES.items()
        for setting, how in (("default", _AS_RUN), ("fastest", _FASTEST))
    ),
    _update(
        "sweep",
        "The same for GRPO on made-up batches of 16 rows of 64 tokens, by the share of a row that is its "
        "prompt and the rows that have it in common.",
        "--sweep",
        "--setting",
        "fastest",
        "--steps",
        "1",
    ),
    Benchmark(
        "update/losses",
        "Largest difference between the losses of the two sides over 50 steps in float32, real pairs, all "
        "weights, a learning rate at which the loss moves.",
        "largest_difference",
        ("-m", "bench.update", "--losses", "--setting", "fastest", "--steps", "50", "--lr", "1e-5"),
        ("-m", "bench.update", "--losses", "--setting", "fastest", "--quick"),
        compares=True,
    ),
    Benchmark(
        "head",
        "Output layer and log-probs, forward and backward: TRL's on every position, as on a CPU, over "
        "this one on the trained positions.",
        "faster_than_trl",
        ("-m", "bench.head"),
        ("-m", "bench.head", "--quick"),
        compares=True,
    ),
    Benchmark(
        "roofline",
        "A whole DPO update of all weights at 2,048 packed tokens: the products that the mathematics needs, "
        "over what the machine's measured bfloat16 matmul rate would do in that time.",
        "share_of_matmul_rate",
        ("-m", "bench.roofline"),
        ("-m", "bench.roofline", "--quick"),
        compares=True,
    ),
    Benchmark(
        "memory",
        "Peak memory of a DPO update of all weights against the packed tokens of a step, and its growth over "
        "500 steps.",
        "peak_at_the_end_over_an_early_one",
        ("-m", "bench.memory"),
        ("-m", "bench.memory", "--quick"),
        compares=True,
    ),
    *(
        Benchmark(
            f"generate/{case}",
            f"New tokens per second over transformers' generate: {what}.",
            "faster_than_transformers",
            ("-m", "bench.generate", "--case", case),
            ("-m", "bench.generate", "--case", case, "--quick"),
            compares=True,
        )
        for case, what in (
            ("equal", "32 prompts of 64 tokens, 128 new tokens each"),
            ("uneven", "96 real prompts, answers as long as the model makes them, 32 at a time"),
            ("group8", "8 answers to each of 4 prompts"),
        )
    ),
)


def measure(benchmark: Benchmark, runs: int, quick: bool) -> dict[str, Any]:
    """Run ``benchmark`` and make an entry of what it prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = benchmark.quick if quick else benchmark.command
    if benchmark.compares:
        command = (*command, "--runs", str(runs))
        entry = _output(benchmark.name, command)
    else:
        outputs: list[dict[str, Any]] = []
        for run in range(runs):
            outputs.append(_output(f"{benchmark.name}: run {run + 1} of {runs}", command))
        measures = {key: spread([output[key] for output in outputs]) for key in numeric(outputs[0])}
        main = measures[benchmark.ratio]
        entry = {
            "ratio": main["median"],
            "low": main["low"],
            "high": main["high"],
            "measures": measures,
            "labels": {key: value for key, value in outputs[0].items() if isinstance(value, str)},
            "runs": runs,
        }
    return signed(entry, what=benchmark.what, ratio_name=benchmark.ratio, command=command)


def _output(name: str, command: Sequence[str]) -> dict[str, Any]:
    print(name, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def numeric(output: dict[str, Any]) -> list[str]:
    """The keys whose values are numbers."""
    return [
        key for key, value in output.items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(b.name for b in BENCHMARKS))
    parser.add_argument("--runs", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run, nothing written")
    options = parser.parse_args(arguments)
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(BENCHMARKS)
    failed: list[str] = []
    for benchmark in chosen:
        try:
            result = measure(benchmark, 1 if options.quick else options.runs, options.quick)
        except subprocess.CalledProcessError:
            failed.append(benchmark.name)
            continue
        if options.quick:
            print(json.dumps({benchmark.name: result}, indent=2))
        else:
            write({benchmark.name: result})  # after each one, so that an interrupted evening keeps the rest
            print(f"{benchmark.name}: {benchmark.ratio} {result['ratio']:g}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
