"""The sweep runs from a pairs file and a model folder alone, also where pydantic is missing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from corrigible.rewards.backbones import Backbone
from corrigible.store.pairs import Pair

BARE = """
import runpy, sys
for name in ("pydantic", "sqlalchemy", "peft", "sklearn", "typer", "rich"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def written(pairs: list[Pair], path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as out:
        rows = []
        for pair in pairs:
            parts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            row: dict[str, object] = {
                "dataset": "helpful",
                "p": 1.0,
                "weight": 1,
                "group": "g",
                "strict": True,
            }
            for name, messages in parts.items():
                key = f"{name} {len(rows)}"
                told = [{"role": m.role, "content": m.content} for m in messages]
                out.write(json.dumps({"text": key, "messages": told}) + "\n")
                row[name] = key
            rows.append(row)
        for row in rows:
            out.write(json.dumps({"pair": row}) + "\n")
        answers = {name: [0.0] * len(rows) for name in ("length", "tfidf")}
        out.write(json.dumps({"baselines": {"helpful": answers}, "folds": 3, "seed": 0}) + "\n")


def test_sweep_on_a_bare_machine(
    repository: Path,
    encoder: Callable[[], Backbone],
    known: Callable[..., list[Pair]],
    tmp_path: Path,
) -> None:
    written(known(90), tmp_path / "pairs.jsonl.gz")
    reader = encoder()
    reader.module.save_pretrained(tmp_path / "tiny")  # type: ignore[operator]
    reader.tokenizer.save_pretrained(tmp_path / "tiny")
    frozen = {"name": "frozen", "text": "response", "features": [], "members": 0}
    full = {**frozen, "name": "full", "tune": "full", "epochs": 1}
    command = [
        sys.executable,
        "-c",
        BARE,
        str(repository / "bench" / "reward_sweep.py"),
        *("--pairs", str(tmp_path / "pairs.jsonl.gz"), "--minilm-dir", str(tmp_path / "tiny")),
        *("--config", json.dumps(frozen), "--config", json.dumps(full)),
        *("--dataset", "helpful", "--folds", "3", "--out", str(tmp_path / "out.jsonl"), "--device", "cpu"),
    ]
    for _ in range(2):  # the second time everything is there already
        ran = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert ran.returncode == 0, ran.stderr
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["name"] for row in rows] == ["frozen", "full"]
    result = rows[0]["results"]["helpful"]
    assert result["n"] == 90 and result["accuracy"][0] > 0.8
    assert result["tfidf"] == 0.5 and result["minus tfidf"][0] > 0.3
