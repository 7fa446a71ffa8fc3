"""The bench runner: summarises runs, keeps other results, goes on after a failure, names no machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench.__main__ as runner
import pytest
from bench.results import as_markdown, signed, spread, write


def toy(name: str = "toy", ratio: float = 1.5, *, compares: bool = False) -> runner.Benchmark:
    numbers = {"slower": ratio, "n": 2, "database": "x"}
    entry = {"ratio": ratio, "low": 1.0, "high": 2.0, "memory_ratio": 0.4, "runs": 3}
    code = f"import json; print(json.dumps({entry if compares else numbers!r}))"
    return runner.Benchmark(name, "A toy.", "slower", ("-c", code), ("-c", code), compares=compares)


def test_measure_write_and_merge(tmp_path: Path) -> None:
    result = runner.measure(toy(), runs=2, quick=False)
    assert (result["ratio"], result["low"], result["high"]) == (1.5, 1.5, 1.5)
    assert result["measures"]["n"] == {"median": 2, "low": 2, "high": 2}
    assert result["runs"] == 2 and result["labels"] == {"database": "x"}
    write({"toy": result}, tmp_path)
    write({"another": {**result, "ratio": 7.25}}, tmp_path)
    write({"toy": {**result, "ratio": 1.75}}, tmp_path)
    kept = json.loads((tmp_path / "RESULTS.json").read_text())
    assert {name: entry["ratio"] for name, entry in kept.items()} == {"another": 7.25, "toy": 1.75}
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## toy" in page and "## another" in page and "1.75" in page and "7.25" in page
    assert platform.node() not in json.dumps(kept) + page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.json", "RESULTS.md"]


def test_a_comparison_prints_its_own_entry_and_is_told_the_runs() -> None:
    benchmark = toy("update/toy", 6.5, compares=True)
    result = runner.measure(benchmark, runs=3, quick=False)
    assert (result["ratio"], result["low"], result["high"], result["memory_ratio"]) == (6.5, 1.0, 2.0, 0.4)
    assert result["ratio_name"] == "slower" and result["command"].endswith("--runs 3")
    assert {"machine", "date", "what"} <= result.keys()


def test_the_page_shows_tables_and_memory() -> None:
    entry = signed(
        {
            "ratio": 5.0,
            "low": 4.0,
            "high": 6.0,
            "memory_ratio": 0.25,
            "runs": 2,
            "table": [{"prompt_share": 0.9, "ratio": 8.0}, {"prompt_share": 0.0, "ratio": 2.0}],
            "labels": {"trl": "as it comes"},
        },
        what="A sweep.",
        ratio_name="faster_than_trl",
        command=("-m", "bench.update"),
    )
    page = as_markdown({"update/sweep": entry}).splitlines()
    assert "| [update/sweep](#updatesweep) | 5 | 4 | 6 | 0.25 |" in page
    assert "| prompt_share | ratio |" in page and "| 0.9 | 8 |" in page and "- trl: as it comes" in page
    assert any("memory ratio 0.25" in line for line in page)


def test_spread_is_median_and_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_a_failure_is_named_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = runner.Benchmark("broken", "Fails.", "slower", ("-c", "raise SystemExit(3)"), ())
    written: dict[str, Any] = {}
    monkeypatch.setattr(runner, "BENCHMARKS", (broken, toy()))
    monkeypatch.setattr(runner, "write", written.update)
    with pytest.raises(SystemExit, match="broken"):
        runner.main(["--runs", "1"])
    assert list(written) == ["toy"]


def test_the_results_that_are_promised_have_a_benchmark() -> None:
    names = {benchmark.name for benchmark in runner.BENCHMARKS}
    assert names >= {
        "store",
        "update/dpo",
        "update/dpo_fastest",
        "update/reward",
        "update/kto",
        "update/grpo",
    }


def test_the_store_benchmark_still_runs() -> None:
    store = next(benchmark for benchmark in runner.BENCHMARKS if benchmark.name == "store")
    assert runner.measure(store, runs=1, quick=True)["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [b for b in runner.BENCHMARKS if b.compares], ids=lambda b: b.name)
def test_every_comparison_still_runs(benchmark: runner.Benchmark) -> None:
    pytest.importorskip("trl")
    assert runner.measure(benchmark, runs=1, quick=True)["ratio"] > 0


def test_an_unknown_name_is_wrong_usage(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nope"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "store" in done.stderr
