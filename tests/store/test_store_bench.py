"""The benchmark runs, and its numbers are about the same records on both sides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_at_a_small_size(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.store", "--n", "1500"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["records"] == 1500
    # 1500/50 of one annotator; of one policy every fourth of the first 150; of one task 2.
    assert found["filtered"] == 30 + 38 + 2
    for name in ("add", "filter", "stream", "feed", "sqlite3_executemany", "sqlite3_same_tables"):
        assert found[f"{name}_per_second"] > 0
    ratio = found["sqlite3_executemany_per_second"] / found["add_per_second"]
    assert abs(found["slower_than_sqlite3"] - ratio) < 0.1 * ratio
    assert found["peak_rss_mb"] > found["peak_rss_growth_mb"] > 0
