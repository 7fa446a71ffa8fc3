"""The command line's promises: fast help, one JSON object, exit codes, errors with advice."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from corrigible import errors
from corrigible.cli import EXIT_CODES, ORDER, _Group, app, as_corrigible_error
from corrigible.cli.console import Json, ask, examples, print_json, progress_bus
from corrigible.errors import CorrigibleError
from corrigible.events import Metric, emit, track


def commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below ``group`` with the words that call it."""
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


ALL_COMMANDS = list(commands(typer.main.get_command(app)))


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from corrigible.cli import app; "
        "app(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'matplotlib', 'pyarrow'}; "
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    # User CPU time, and the best of three: the machine may be doing other things.
    best = 1e9
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        best = min(best, after.children_user - before.children_user)
        assert done.stderr.strip() == "[]"
    assert best < 1.0


@pytest.mark.parametrize("words", [words for words, _ in ALL_COMMANDS], ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], prog_name="corrigible", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Examples" in result.stdout, "add epilog=examples(...) to the command"
    assert f"corrigible {' '.join(words)}" in result.stdout.partition("Examples")[2]


def test_the_commands_are_those_of_the_loop_in_its_order() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    shown = re.findall(r"^│ ([a-z]+) ", result.stdout, re.MULTILINE)
    assert tuple(shown) == ORDER


def test_no_arguments_shows_help() -> None:
    result = CliRunner().invoke(app, [])
    assert "doctor" in result.output and "Examples" in result.output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout.startswith("corrigible 0.")


def toy(fail: Callable[[], Any]) -> typer.Typer:
    """A command line with our root and one command that does what the test wants."""
    toy_app = typer.Typer(cls=_Group)

    @toy_app.callback()
    def root() -> None: ...

    @toy_app.command()
    def act(number: int = 1, json: Json = False) -> None:
        fail()

    return toy_app


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (errors.BadInputError("Line 3 is not JSON.", advice="Fix it."), 3, "Line 3 is not JSON."),
        (errors.MissingError("No such model."), 4, "No such model."),
        (errors.StorageError("The store is locked."), 5, "locked"),
        (errors.RefusedError("Not better."), 6, "Not better."),
        (errors.NumericsError("nan_loss"), 7, "nan_loss"),
        (errors.Interrupted("Stopped.", advice="--resume"), 130, "--resume"),
        (CorrigibleError("It failed."), 1, "It failed."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (MemoryError(), 1, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "Out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x.db"), 5, "disk is full (x.db)"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 3, "No such file (x)"),
        (FileExistsError(errno.EEXIST, "File exists", "x"), 3, "File exists (x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 5, "Permission denied (/x)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
@pytest.mark.parametrize("json_wanted", [False, True])
def test_errors_become_messages_and_exit_codes(
    error: BaseException, code: int, said: str, json_wanted: bool
) -> None:
    arguments = ["act", "--json"] if json_wanted else ["act"]
    result = CliRunner().invoke(toy(raiser(error)), arguments)
    assert result.exit_code == code
    assert code in EXIT_CODES
    assert said in result.stderr
    assert "Traceback" not in result.output
    if json_wanted:
        told = json.loads(result.stdout)["error"]
        assert told["exit_code"] == code and said in told["message"] + told["advice"]
    else:
        assert result.stdout == ""


def test_a_bug_keeps_its_traceback() -> None:
    assert as_corrigible_error(ZeroDivisionError()) is None
    result = CliRunner().invoke(toy(raiser(ZeroDivisionError())), ["act", "--json"])
    assert isinstance(result.exception, ZeroDivisionError)
    assert json.loads(result.stdout)["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize("arguments", [["act", "--number", "x"], ["act", "--nope"], ["nope"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(toy(lambda: None), arguments)
    assert result.exit_code == 2 and result.stdout == ""
    for places in ([*arguments, "--json"], ["--nope", *arguments, "--json"]):
        with_json = CliRunner().invoke(toy(lambda: None), places)
        assert with_json.exit_code == 2
        assert json.loads(with_json.stdout)["error"]["exit_code"] == 2


def test_a_result_already_printed_stays_the_only_object() -> None:
    def refuse() -> None:
        print_json({"verdict": "refuse"})
        raise errors.RefusedError("Not better.")

    result = CliRunner().invoke(toy(refuse), ["act", "--json"])
    assert result.exit_code == 6
    assert json.loads(result.stdout) == {"verdict": "refuse"}


def test_markup_in_an_error_is_shown_as_it_is() -> None:
    result = CliRunner().invoke(toy(raiser(errors.BadInputError("bad [/x] key [red]"))), ["act"])
    assert "bad [/x] key [red]" in result.stderr


@dataclass
class Row:
    values: Any
    path: Path


def test_print_json_writes_what_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {
            "row": Row(np.array([1.5, float("nan")]), Path("a/b")),
            "numpy": np.float32(0.5),
            "set": {"b", "a"},
            "infinite": float("inf"),
            3: "ü",
        }
    )
    assert json.loads(capsys.readouterr().out) == {
        "row": {"values": [1.5, None], "path": "a/b"},
        "numpy": 0.5,
        "set": ["a", "b"],
        "infinite": None,
        "3": "ü",
    }
    with pytest.raises(TypeError, match="object"):
        print_json({"x": object()})


def test_progress_goes_to_stderr_and_to_the_event_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRIGIBLE_EVENTS", str(tmp_path / "events.jsonl"))
    monkeypatch.setenv("CORRIGIBLE_TRACK", f"tensorboard:{tmp_path / 'tb'}")
    with progress_bus(json=True, run="r7"):
        list(track(range(3), "reading"))
        emit(Metric(name="loss", value=0.5))
    captured = capsys.readouterr()
    assert captured.out == "" and "reading" in captured.err
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines[-1]["name"] == "loss" and {line["run"] for line in lines} == {"r7"}
    assert list((tmp_path / "tb").iterdir())


def test_an_unknown_tracker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRIGIBLE_TRACK", "excel")
    with pytest.raises(errors.BadInputError, match="tensorboard"), progress_bus():
        pass


def test_examples_escape_markup() -> None:
    shown = examples("# a caption", "pip install 'corrigible[dev]'", "corrigible x \\", "--y")
    assert "\\[dev]" in shown and "[dim]# a caption[/]" in shown
    assert Text.from_markup(shown).plain.splitlines()[-2:] == ["  corrigible x \\", "  --y"]


def test_ask_takes_the_default_when_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert ask("Install?", default=True) is True
    assert ask("Install?") is False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_long_command_with_130(tmp_path: Path, sent: int) -> None:
    """A real process, a real signal: the message comes, the traceback does not."""
    code = (
        "import time, typer\n"
        "from corrigible import cli\n"
        "@cli.app.command()\n"
        "def wait() -> None:\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "import sys; sys.argv = ['corrigible', 'wait']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(sent)
    start = time.monotonic()
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Interrupted" in told and "Traceback" not in told
    assert time.monotonic() - start < 20
