"""import, export and show as a person or a script meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from corrigible.cli import app
from corrigible.store import Store

runner = CliRunner()


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def as_json(*arguments: str | Path, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CORRIGIBLE_STORE", raising=False)
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"good [{i}]", "rejected": f"bad {i}", "annotator": "ada"}
        for i in range(5)
    ]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mixed.jsonl").write_text(json.dumps(rows[0]) + "\nbroken [line]\n")
    return tmp_path


def test_import_says_what_it_did(folder: Path) -> None:
    result = run("import", "good.jsonl")
    assert "5 records added" in result.stdout and "(trl," in result.stdout
    again = run("import", "good.jsonl")
    assert "0 records added, 5 there already" in again.stdout


def test_rejected_rows_give_exit_code_3_and_a_file(folder: Path) -> None:
    result = run("import", "mixed.jsonl", code=3)
    assert "1 records added" in result.stdout and "line 2: not valid JSON" in result.output
    assert "mixed.jsonl.rejects.jsonl" in result.output
    assert json.loads((folder / "mixed.jsonl.rejects.jsonl").read_text())["raw"] == "broken [line]"


def test_a_bad_file_does_not_keep_the_good_one_out(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    got = as_json("import", "empty.jsonl", "nowhere.jsonl", "good.jsonl", code=3)
    assert [one["path"] for one in got["failed"]] == ["empty.jsonl", "nowhere.jsonl"]
    assert got["imports"][0]["added"] == 5


@pytest.mark.parametrize(
    ("name", "code", "words"), [("nowhere.jsonl", 3, "does not exist"), ("empty.jsonl", 3, "is empty")]
)
def test_one_bad_file_is_an_error(folder: Path, name: str, code: int, words: str) -> None:
    (folder / "empty.jsonl").touch()
    assert words in run("import", name, code=code).output
    assert words in as_json("import", name, code=code)["error"]["message"]


def test_import_options(folder: Path) -> None:
    got = as_json(
        "import",
        "mixed.jsonl",
        "--rejects",
        "kept/no.jsonl",
        "--campaign",
        "pilot",
        "--store",
        "s.db",
        code=3,
    )
    assert got["imports"][0]["rejects_path"] == "kept/no.jsonl" and (folder / "kept" / "no.jsonl").exists()
    with Store.open(folder / "s.db", create=False) as store:
        assert store.count_feedback(campaign="pilot") == 1
    assert as_json("import", "good.jsonl", "--limit", "2")["imports"][0]["read"] == 2
    assert "no import format" in run("import", "good.jsonl", "--format", "xml", code=3).output


def test_export_prints_the_account(folder: Path) -> None:
    run("import", "good.jsonl")
    result = run("export", "out.jsonl", "--format", "trl", "-o", "style=plain")
    assert "5 records written" in result.stdout and "annotator" in result.stdout
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert {"prompt": "Question 0?", "chosen": "good [0]", "rejected": "bad 0"} in rows
    assert "exists already" in run("export", "out.jsonl", "--format", "trl", code=3).output
    assert "nothing was lost" in run("export", "out.jsonl", "-f", "corrigible", "--overwrite").stdout
    got = as_json("export", "none.csv", "--format", "csv", "--annotator", "bob")
    assert got["written"] == 0
    assert "no '='" in run("export", "x", "-f", "trl", "-o", "plain", code=3).output
    assert "not a time" in run("export", "x", "-f", "csv", "--since", "yesterday", code=3).output


def test_show_counts_lists_and_one_record(folder: Path) -> None:
    run("import", "good.jsonl")
    counts = as_json("show")
    assert counts["kind"] == {"comparison": 5} and counts["annotator"] == {"ada": 5}
    assert counts["totals"]["feedback"] == 5 and counts["totals"]["item"] == 15
    assert "5 judgements" in run("show").stdout
    listed = as_json("show", "--kind", "comparison", "--limit", "2")
    assert listed["total"] == 5 and len(listed["feedback"]) == 2
    assert "2 of 5" in run("show", "--limit", "2").stdout
    assert "No judgement matches" in run("show", "--annotator", "bob").stdout
    record = listed["feedback"][0]
    full = run("show", record["id"]).stdout
    assert "human ada" in full and "Question" in full and "good [" in full and "outcome" in full
    assert as_json("show", record["id"][:30])["feedback"] == record
    item = record["targets"][0]["sha256"]
    assert as_json("show", item[:12])["item"]["sha256"] == item
    assert "begins several ids" in run("show", "000000", code=3).output
    assert "nothing with the id" in run("show", "ffffffff", code=3).output
    assert "is no id" in run("show", "hello", code=3).output


def test_show_and_export_do_not_make_a_store(folder: Path) -> None:
    run("show", code=5)
    run("export", "x.jsonl", "--format", "csv", code=5)
    assert not (folder / "corrigible.db").exists()


def test_ctrl_c_exits_130_and_the_same_command_goes_on(folder: Path) -> None:
    rows = 20_000
    with (folder / "big.jsonl").open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": f"q{i}", "chosen": "a", "rejected": f"b{i}"}) + "\n")
    command = [sys.executable, "-m", "corrigible", "import", "big.jsonl"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    held = 0
    while held < 1000 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        if (folder / "corrigible.db").exists():
            try:
                with Store.open(folder / "corrigible.db", create=False) as store:
                    held = store.count_feedback()
            except Exception:
                continue  # still being made
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "same command" in errors
    got = as_json("import", "big.jsonl", "--limit", str(held + 2000))["imports"][0]
    assert got["resumed_at"] >= 1000 and got["existing"] == 0
    with Store.open(folder / "corrigible.db") as store:
        assert store.count_feedback() == got["read"] == got["added"]
