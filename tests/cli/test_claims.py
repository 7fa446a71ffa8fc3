"""``corrigible claims``: what is run, kept, reported, and what the exit code says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corrigible.claims import CLAIMS, Effect, claim, load_claims


@pytest.fixture
def toys() -> Iterator[list[int]]:
    """The claims "good", "bad", "nan" and "bug"; the seeds that "good" was run on."""
    load_claims()
    before = dict(CLAIMS)
    CLAIMS.clear()
    seen: list[int] = []

    def good(seed: int) -> dict[str, float]:
        seen.append(seed)
        return {"x": 1.0, "c": 0.0}

    def bug(seed: int) -> dict[str, float]:
        raise ValueError("a bug")

    settings: dict[str, Any] = {
        "title": "t",
        "hypothesis": "h",
        "paper": "p",
        "effect": Effect("x", of=lambda v: v["x"], above=0.5),
        "controls": [Effect("c", of=lambda v: v["c"], above=0.5)],
        "seeds": range(5),
    }
    claim("good", fast=True, aliases=["fine"], **settings)(good)
    claim("bad", **settings)(lambda seed: {"x": 0.0, "c": 0.0})
    claim("nan", **settings)(lambda seed: {"x": float("nan"), "c": 0.0})
    claim("bug", **settings)(bug)
    yield seen
    CLAIMS.clear()
    CLAIMS.update(before)


def test_list(run_cli: Callable[..., Any], toys: list[int]) -> None:
    listed = json.loads(run_cli("claims", "list", "--json").stdout)["claims"]
    assert {"good", "bad"} <= {each["id"] for each in listed}
    shown = run_cli("claims", "list")
    assert shown.exit_code == 0 and "good (fine) fast" in shown.stdout


def test_a_refuted_claim_is_a_result_and_strict_refuses_it(
    run_cli: Callable[..., Any], toys: list[int]
) -> None:
    good = run_cli("claims", "run", "fine", "--json")
    assert good.exit_code == 0 and json.loads(good.stdout)["results"][0]["verdict"] == "supported"
    both = run_cli("claims", "run", "good", "bad")
    assert both.exit_code == 0 and "not supported" in both.stdout
    strict = run_cli("claims", "run", "good", "bad", "--strict")
    assert strict.exit_code == 6 and "Not supported here: bad." in strict.stderr
    assert run_cli("claims", "run", "good", "--strict").exit_code == 0


def test_a_claim_whose_seeds_failed_is_a_failure(run_cli: Callable[..., Any], toys: list[int]) -> None:
    broken = run_cli("claims", "run", "nan")
    assert broken.exit_code == 7 and "nan" in broken.stderr
    bug = run_cli("claims", "run", "bug", "--json")
    assert bug.exit_code == 1 and json.loads(bug.stdout)["results"][0]["failures"]["0"] == "ValueError: a bug"


def test_what_to_run(run_cli: Callable[..., Any], toys: list[int]) -> None:
    assert run_cli("claims", "run", "nope").exit_code == 3
    for arguments in ([], ["good", "--fast"], ["--all", "--fast"]):
        assert run_cli("claims", "run", *arguments).exit_code == 2
    fast = json.loads(run_cli("claims", "run", "--fast", "--json").stdout)
    assert [each["id"] for each in fast["results"]] == ["good"]


def test_keep_more_and_pilot(run_cli: Callable[..., Any], toys: list[int], tmp_path: Path) -> None:
    pilot = run_cli("claims", "run", "good", "--pilot", "2")
    assert toys == [1000, 1001] and not (tmp_path / "runs").exists(), "a trial is not kept"
    assert pilot.exit_code == 0 and "x" in pilot.stdout
    run_cli("claims", "run", "good", "--results", "kept")
    kept = run_cli("claims", "run", "good", "--keep", "--results", "kept", "--json")
    assert json.loads(kept.stdout) == {"results": [], "kept": ["good"]}
    more = json.loads(run_cli("claims", "run", "good", "--more", "2", "--results", "kept", "--json").stdout)
    assert more["results"][0]["look"] == 2 and toys == [1000, 1001, 0, 1, 2, 3, 4, 5, 6]
    assert run_cli("claims", "run", "bad", "--more", "2", "--results", "kept").exit_code == 3


def test_report(run_cli: Callable[..., Any], toys: list[int], tmp_path: Path) -> None:
    run_cli("claims", "run", "good", "bad")
    rows = json.loads(run_cli("claims", "report", "--json").stdout)["claims"]
    assert {row["id"]: row["verdict"] for row in rows} == {
        "bad": "not supported",
        "bug": "not run",
        "good": "supported",
        "nan": "not run",
    }
    for row in rows:
        assert row.keys() >= {"id", "verdict", "effect", "interval", "seeds", "seconds", "control"}
    shown = run_cli("claims", "report", "--out", "pages")
    assert shown.exit_code == 0 and "not supported" in shown.stdout and "report.html" in shown.stderr
    assert (tmp_path / "pages" / "report.html").is_file() and (tmp_path / "pages" / "good.md").is_file()
    (tmp_path / "runs" / "claims" / "bad.json").write_text("{")
    broken = run_cli("claims", "report")
    assert broken.exit_code == 3 and "bad.json" in broken.stderr
