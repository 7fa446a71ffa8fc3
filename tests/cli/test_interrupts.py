"""Ctrl-C in the long commands whose own tests do not send it: demo, export, claims."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from corrigible.cli import app
from corrigible.events import Message, emit
from corrigible.records import Annotator, comparison
from corrigible.store import Store


@pytest.mark.weights
def test_demo_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "corrigible",
        "demo",
        "--model",
        "tiny-random",
        "--quick",
        "--out",
        str(tmp_path / "d"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "collect:" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, "".join(seen) + rest
    assert "kept" in rest and "Traceback" not in rest
    assert not (tmp_path / "d" / "summary.json").exists()
    with Store.open(tmp_path / "d" / "store.db", create=False) as store:
        assert store.count_feedback(campaign="demo") > 0, "what was collected is kept"


def test_export_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, target = tmp_path / "s.db", tmp_path / "out.jsonl"
    target.write_text("the earlier export\n")
    with Store.open(store) as opened:
        for n in range(20):
            record, items = comparison(f"q{n}", "yes", "no", annotator=Annotator(pseudonym="a", type="human"))
            opened.add_feedback([record], items)
    real = Store.feedback

    def interrupted(self: Store, **filters: object):
        for n, record in enumerate(real(self, **filters)):  # type: ignore[arg-type]
            if n == 10:
                os.kill(os.getpid(), signal.SIGINT)
            yield record

    monkeypatch.setattr(Store, "feedback", interrupted)
    command = [
        "export",
        str(target),
        "--format",
        "corrigible",
        "--overwrite",
        "--store",
        str(store),
        "--json",
    ]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 130, ended.output
    assert json.loads(ended.stdout)["error"]["exit_code"] == 130
    assert target.read_text() == "the earlier export\n"
    assert not list(tmp_path.glob("*.partial*")), "no half file is left behind"


def test_claims_stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **settings: object) -> None:
        emit(Message(text="started"))
        raise KeyboardInterrupt

    monkeypatch.setattr("corrigible.claims.results.run_claim", stop)
    assert CliRunner().invoke(app, ["claims", "run", "--fast"]).exit_code == 130
