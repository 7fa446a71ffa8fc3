"""``corrigible algorithms`` says of every algorithm what it learns from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corrigible.align import ALGORITHMS
from corrigible.cli.train import FAMILIES, first_sentence
from corrigible.records import KINDS


def test_json_is_the_registry(run_cli: Callable[..., Any]) -> None:
    result = run_cli("algorithms", "--json")
    assert result.exit_code == 0, result.output
    said = {entry["name"]: entry for entry in json.loads(result.stdout)["algorithms"]}
    assert list(said) == list(ALGORITHMS)
    for name, entry in ALGORITHMS.items():
        told = said[name]
        assert told["learns_from"] == sorted(entry.learns_from) and set(told["learns_from"]) <= set(KINDS)
        assert told["signal"] == entry.signal and told["paper"] == entry.paper
        assert set(told["settings"]) == set(entry.config.model_fields)
        assert told["claim"] == (entry.claim or None)
        assert told["summary"] and told["metrics"]["loss"] and told["metrics"]["lr"]
    assert said["kto"]["command"] == "corrigible train kto" and said["grpo"]["command"] is None
    assert said["dpo"]["settings"]["beta"]["default"] == 0.1


def test_for_people_it_lists_all_by_family(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run_cli("algorithms")
    assert result.exit_code == 0, result.output
    for name, entry in ALGORITHMS.items():
        assert f"│ {name} " in result.stdout, name
        assert FAMILIES[entry.family] in result.stdout
    assert "comparison" in result.stdout


def test_one_says_settings_and_metrics(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run_cli("algorithms", "kto")
    assert result.exit_code == 0, result.output
    for text in ("undesirable_weight", "rewards/desirable", "corrigible train kto", "2402.01306", "reaction"):
        assert text in result.stdout, text


def test_an_unknown_one_is_refused_with_those_there_are(run_cli: Callable[..., Any]) -> None:
    result = run_cli("algorithms", "dop", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)["error"]
    assert "'dop'" in told["message"] and "dpo" in told["advice"]


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("One thing: and\nanother. More.", "One thing: and another"),
        ("Only ``this``.\n\nNot. this.", "Only `this`"),
    ],
)
def test_first_sentence(doc: str, sentence: str) -> None:
    assert first_sentence(doc) == sentence


def test_the_result_of_a_claim_is_shown_where_it_has_been_run(
    run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    record = {
        "schema": 1,
        "about": {"id": "S999"},
        "result": {
            "verdict": "not supported",
            "effect": {"effect": 0.25, "interval": [0.125, 0.5], "unit": "nats"},
        },
        "history": [],
        "runs": {},
    }
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "S999.json").write_text(json.dumps(record))
    monkeypatch.setitem(ALGORITHMS, "kto", replace(ALGORITHMS["kto"], claim="S999"))
    assert "S999: not run" in run_cli("algorithms", "kto").stdout
    shown = run_cli("algorithms", "kto", "--results", str(tmp_path / "kept"))
    assert "S999: not supported, 0.25 nats [0.125, 0.5]" in shown.stdout
    told = json.loads(run_cli("algorithms", "--results", str(tmp_path / "kept"), "--json").stdout)
    [kto] = [entry for entry in told["algorithms"] if entry["name"] == "kto"]
    assert kto["result"]["verdict"] == "not supported" and kto["result"]["interval"] == [0.125, 0.5]
