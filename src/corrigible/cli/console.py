"""What every command shares: where output goes, ``--json``, ``--store``, examples, progress.

The rule: results on stdout, everything else on stderr. With ``--json`` stdout holds exactly one
JSON object, also when the command fails (``{"error": {...}}``).
"""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from corrigible.errors import BadInputError
from corrigible.events import EventBus, use_bus
from corrigible.files import plain

DEFAULT_STORE = "corrigible.db"

# Neither console keeps its stream: they look sys.stdout up at each print, so that tests and
# redirections that swap it are honoured.
console = Console(highlight=False, soft_wrap=True)
"""Results for people (stdout)."""
error_console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress, warnings and errors (stderr)."""

_JSON_HELP = "One JSON object on stdout and nothing else there; progress goes to stderr."
_STORE_HELP = "The store: a file, sqlite:///FILE, or postgresql://USER@HOST/NAME."

# Two ways to say the same: `json: Json = False` or `json: bool = json_option`.
json_option: Any = typer.Option(False, "--json", help=_JSON_HELP)
store_option: Any = typer.Option(DEFAULT_STORE, "--store", "-s", envvar="CORRIGIBLE_STORE", help=_STORE_HELP)
Json = Annotated[bool, typer.Option("--json", help=_JSON_HELP)]
StoreUrl = Annotated[str, typer.Option("--store", "-s", envvar="CORRIGIBLE_STORE", help=_STORE_HELP)]

_state = {"printed_json": False}


def examples(*lines: str) -> str:
    """An epilog with one example per line, for ``@app.command(epilog=examples("corrigible ..."))``.

    Takes several strings or one of several lines; a line that starts with ``#`` is a caption.
    """
    shown = [line.strip() for text in lines for line in text.strip().splitlines() if line.strip()]
    # rich doubles a backslash at the very end; one before a line break is a continuation and stays.
    safe = [escape(f"{line}\n")[:-1] for line in shown]
    marked = [f"[dim]{line}[/]" if line.startswith("#") else f"  {line}" for line in safe]
    return "\n".join(["[bold]Examples[/]", *marked])


def print_json(value: Any) -> None:
    """Write ``value`` (a mapping, record, dataclass, ...) as the command's one JSON object on stdout."""
    text = jsonlib.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False)
    _state["printed_json"] = True
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_warning(text: str) -> None:
    """A line on stderr that a person should notice."""
    error_console.print(f"[yellow]! {escape(text)}[/]")


def ask(question: str, *, default: bool = False) -> bool:
    """Ask yes or no on the terminal; ``default`` at once when nobody can answer (no terminal, CI)."""
    if os.environ.get("CI") or not sys.stdin.isatty():
        return default
    return typer.confirm(question, default=default, err=True)


@contextmanager
def progress_bus(json: bool = False, *, run: str | None = None) -> Iterator[EventBus]:
    """A current event bus for the length of a command.

    Shows progress on stderr (lines only, no live bars, with ``json``), and adds what the global
    options ``--events`` and ``--track`` ask for (``CORRIGIBLE_EVENTS``, ``CORRIGIBLE_TRACK``).
    """
    from corrigible.subscribers import JsonlSubscriber, RichSubscriber

    bus = EventBus(run=run)
    try:
        shown = Console(stderr=True, highlight=False, force_terminal=False) if json else Console(stderr=True)
        bus.subscribe(RichSubscriber(shown))
        if events := os.environ.get("CORRIGIBLE_EVENTS"):
            bus.subscribe(JsonlSubscriber(events))
        for tracker in filter(None, os.environ.get("CORRIGIBLE_TRACK", "").split(",")):
            bus.subscribe(_tracker(tracker.strip(), run))
        with use_bus(bus):
            yield bus
    finally:
        bus.close()


def _tracker(text: str, run: str | None) -> Any:
    from corrigible.subscribers import MlflowSubscriber, TensorBoardSubscriber, WandbSubscriber

    name, _, where = text.partition(":")
    match name:
        case "tensorboard":
            return TensorBoardSubscriber(where or "runs/tensorboard")
        case "wandb":
            return WandbSubscriber(project=where or "corrigible", name=run)
        case "mlflow":
            return MlflowSubscriber(run_name=where or run)
    raise BadInputError(
        f"Unknown tracker {name!r}.",
        advice="Known: tensorboard[:DIRECTORY], wandb[:PROJECT], mlflow[:RUN NAME].",
    )
