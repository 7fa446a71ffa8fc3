"""Run the benchmarks one after another and keep what they say in RESULTS.json and RESULTS.md.

    python -m bench                    # all, three runs each (make bench)
    python -m bench store --runs 5     # one of them
    python -m bench --quick            # small sizes, once, only printed: does it still run?

Each run is its own process on an otherwise idle machine; a benchmark prints one JSON object of numbers.
Results of benchmarks that are not run now stay in the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A command that prints one JSON object, and which of its numbers is the comparison with the peer."""

    name: str
    what: str
    ratio: str
    command: tuple[str, ...]
    quick: tuple[str, ...]


BENCHMARKS = (
    Benchmark(
        "store",
        "Seconds to add feedback, over plain sqlite3.executemany of the same rows into one bare table.",
        "slower_than_sqlite3",
        ("-m", "bench.store", "--n", "1000000"),
        ("-m", "bench.store", "--n", "5000"),
    ),
)


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no names, no paths."""
    import psutil

    from corrigible.cli.doctor import cpu

    facts = cpu().facts
    return {
        "cpu": facts["model"],
        "cores": facts["cores"],
        "instruction_sets": facts["instruction_sets"],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def measure(benchmark: Benchmark, runs: int, quick: bool) -> dict[str, Any]:
    """Run ``benchmark`` in ``runs`` processes and summarise every number as median, low and high."""
    command = benchmark.quick if quick else benchmark.command
    outputs: list[dict[str, Any]] = []
    for run in range(runs):
        print(f"{benchmark.name}: run {run + 1} of {runs}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, *command], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True
        )
        outputs.append(json.loads(done.stdout))
    measures = {key: spread([output[key] for output in outputs]) for key in numeric(outputs[0])}
    return {
        "what": benchmark.what,
        "ratio": {"name": benchmark.ratio, **measures[benchmark.ratio]},
        "measures": measures,
        "labels": {key: value for key, value in outputs[0].items() if isinstance(value, str)},
        "runs": runs,
        "command": shlex.join(("python", *command)),
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def numeric(output: dict[str, Any]) -> list[str]:
    """The keys whose values are numbers."""
    return [
        key for key, value in output.items() if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def write(results: dict[str, Any], folder: Path = HERE) -> None:
    """Merge ``results`` into RESULTS.json by benchmark name and write RESULTS.md from the whole."""
    path = folder / "RESULTS.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    merged = dict(sorted((known | results).items()))
    path.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "RESULTS.md").write_text(as_markdown(merged), encoding="utf-8")


def as_markdown(results: dict[str, Any]) -> str:
    """The results as a page: one table per benchmark, with the machine it ran on."""
    lines = [
        "# Benchmark results",
        "",
        "Written by `python -m bench` (`make bench`): medians, and the range over runs.",
    ]
    for name, result in results.items():
        ratio, where = result["ratio"], result["machine"]
        lines += [
            "",
            f"## {name}",
            "",
            result["what"],
            "",
            f"**{ratio['name']}: {ratio['median']:g}** (range {ratio['low']:g} to {ratio['high']:g}, "
            f"{result['runs']} runs)",
            "",
            "| measure | median | low | high |",
            "|---|---:|---:|---:|",
            *(
                f"| {key} | {value['median']:,g} | {value['low']:,g} | {value['high']:,g} |"
                for key, value in result["measures"].items()
            ),
            "",
            f"`{result['command']}`, {result['date']}, {where['cpu']}, {where['cores']} cores, "
            f"{where['memory_gib']} GiB, {where['system']}, Python {where['python']}, torch {where['torch']}",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(b.name for b in BENCHMARKS))
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run, nothing written")
    options = parser.parse_args(arguments)
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(BENCHMARKS)
    for benchmark in chosen:
        result = measure(benchmark, 1 if options.quick else options.runs, options.quick)
        if options.quick:
            print(json.dumps({benchmark.name: result}, indent=2))
        else:
            write({benchmark.name: result})  # after each one, so that an interrupted evening keeps the rest
            print(f"{benchmark.name}: {benchmark.ratio} {result['ratio']['median']:g}", file=sys.stderr)


if __name__ == "__main__":
    main()
