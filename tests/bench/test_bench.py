"""The bench runner: summarises runs, keeps other results, names no machine."""

from __future__ import annotations

import json
import platform
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def bench(repository: Path) -> dict[str, Any]:
    return runpy.run_path(str(repository / "bench" / "__main__.py"), run_name="bench_under_test")


def toy(bench: dict[str, Any], name: str = "toy") -> Any:
    code = "import json, os; print(json.dumps({'slower': 1.5, 'n': os.getpid() * 0 + 2, 'database': 'x'}))"
    return bench["Benchmark"](name, "A toy.", "slower", ("-c", code), ("-c", code))


def test_measure_write_and_merge(bench: dict[str, Any], tmp_path: Path) -> None:
    result = bench["measure"](toy(bench), runs=2, quick=False)
    assert result["ratio"] == {"name": "slower", "median": 1.5, "low": 1.5, "high": 1.5}
    assert result["runs"] == 2 and result["labels"] == {"database": "x"}
    bench["write"]({"toy": result}, tmp_path)
    bench["write"]({"another": result}, tmp_path)
    kept = json.loads((tmp_path / "RESULTS.json").read_text())
    assert set(kept) == {"another", "toy"}
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## toy" in page and "## another" in page and "1.5" in page
    assert platform.node() not in json.dumps(kept) + page


def test_spread_is_median_and_range(bench: dict[str, Any]) -> None:
    assert bench["spread"]([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_every_benchmark_still_runs(bench: dict[str, Any]) -> None:
    for benchmark in bench["BENCHMARKS"]:
        result = bench["measure"](benchmark, runs=1, quick=True)
        assert result["ratio"]["median"] > 0


def test_an_unknown_name_is_wrong_usage(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nope"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "store" in done.stderr
