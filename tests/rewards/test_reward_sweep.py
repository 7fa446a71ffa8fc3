"""The sweep: from files to one row per dataset and configuration, each computed once."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corrigible.rewards.backbones import Backbone
from corrigible.store.pairs import Pair


def transcripts(pairs: list[Pair], path: Path) -> None:
    """The pairs in the form of HH-RLHF."""
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as out:
        for pair in pairs:
            sides = {"chosen": pair.chosen, "rejected": pair.rejected}
            asked = f"\n\nHuman: {pair.prompt[0].text}\n\nAssistant: "
            out.write(json.dumps({name: asked + said[0].text for name, said in sides.items()}) + "\n")


def test_every_row_is_computed_once_and_half_a_row_is_none(
    repository: Path,
    encoder: Callable[[], Backbone],
    known: Callable[..., list[Pair]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transcripts(known(90), tmp_path / "data" / "hh-rlhf" / "helpful-base_test.jsonl.gz")
    reader = encoder()
    reader.module.save_pretrained(tmp_path / "tiny")  # type: ignore[operator]
    reader.tokenizer.save_pretrained(tmp_path / "tiny")
    frozen = {"name": "frozen", "backbone": str(tmp_path / "tiny"), "features": [], "members": 0}
    full = {**frozen, "name": "full", "tune": "full", "epochs": 1}
    out = tmp_path / "out"

    monkeypatch.syspath_prepend(str(repository))
    from bench.reward_sweep import main

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["reward_sweep", "--out", str(out), *arguments])
        main()
        return capsys.readouterr().out

    asked = ["--data", str(tmp_path / "data"), "--dataset", "helpful", "--folds", "3", "--device", "cpu"]
    asked += ["--config", json.dumps(frozen), "--config", json.dumps(full)]
    assert len(run(*asked).splitlines()) == 2
    whole = (out / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["name"] for row in rows] == ["frozen", "full"]
    report = rows[0]["report"]
    assert report["folds"] == 3 and report["split"] == "prompt" and report["accuracy"]["n"] > 80
    assert report["accuracy"]["value"] > 0.8 and report["baselines"]["length"]["accuracy"]["value"] == 0.5

    # A kill in the second row: the first is not computed again.
    (out / "rows.jsonl").write_text(whole[: len(whole) - 40])
    [again] = [json.loads(line) for line in run(*asked).splitlines()]
    assert again["report"] == rows[1]["report"]
    assert run(*asked) == ""
    shown = run("--table")
    assert "frozen (seed 0)" in shown and "vs tfidf +" in shown and "length 0.500" in shown
