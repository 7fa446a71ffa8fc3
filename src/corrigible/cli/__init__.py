"""The command line: one module per command, errors handled once, here.

Every module exposes ``register(app)``. None may import torch (or anything else heavy) when it is
imported: ``corrigible --help`` answers in well under a second, and a test holds it to that.

Exit codes: 0 done · 1 failure · 2 wrong usage · 3 input that cannot be used · 4 something missing ·
5 the store or the disk · 6 refused by a gate · 7 the numbers broke (NaN, shapes) · 130 interrupted.
A path that is not there counts by what should be there: data 3, a model 4, a store 5.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from corrigible.cli import console as _console
from corrigible.cli.console import error_console, examples, print_json
from corrigible.errors import BadInputError, CorrigibleError, Interrupted, StorageError, is_out_of_memory

MODULES = (
    *("demo", "data", "show", "generate", "judge", "train", "algorithms", "evaluate"),
    *("policies", "claims", "doctor"),
)

# The order of --help: that of the loop.
ORDER = (
    *("demo", "import", "export", "show", "generate", "judge", "train", "algorithms", "evaluate"),
    *("policies", "lineage", "promote", "claims", "doctor"),
)

EXIT_CODES = {
    0: "done",
    1: "failure (a bug, or out of memory)",
    2: "wrong usage: an unknown option, a missing argument",
    3: "input that cannot be used: a file that is not there, is empty or malformed; a name nobody knows",
    4: "something that is needed is missing: a model, its weights, an extra, a system package",
    5: "the store or the disk: locked, gone, full, damaged",
    6: "refused: the evidence does not support the promotion",
    7: "the numbers broke: NaN, an all-masked batch",
    130: "interrupted (Ctrl-C or SIGTERM); what was done is kept",
}

# typer carries its own click in some versions and depends on it in others; this is click's
# UsageError in both.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def as_corrigible_error(error: BaseException) -> CorrigibleError | None:
    """The error to show for ``error``; None when it is nothing we can put better (a bug, say)."""
    if isinstance(error, CorrigibleError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(
            "Interrupted.", advice="What was finished is kept; the same command goes on or starts again."
        )
    if is_out_of_memory(error):
        return CorrigibleError(
            "Out of memory.",
            advice="Use a smaller batch or model; `corrigible doctor` shows how much memory is free.",
        )
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"The disk is full{where}.",
                advice="Free some space and run the same command again; nothing stored is lost.",
            )
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return BadInputError(f"{error.strerror}{where}.", advice="Check the path.")
        if isinstance(error, FileExistsError):
            return BadInputError(
                f"{error.strerror}{where}.", advice="Something else is there: choose another name."
            )
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return StorageError(f"{error.strerror}{where}.", advice="Choose a place that you may write to.")
    return None


class _Group(TyperGroup):
    """The root command: whatever a command raises becomes a message, advice and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        # typer alone would put the groups (train, claims) last.
        order = [name for name in ORDER if name in self.commands]
        return order + [name for name in self.commands if name not in order]

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta["corrigible.json"] = "--json" in args
        _console._state["printed_json"] = False
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:  # in an option before the command: invoke() is never reached
            _tell_usage_error(ctx, error)
            raise

    def invoke(self, ctx: Any) -> Any:
        json = bool(ctx.meta.get("corrigible.json"))
        try:
            return super().invoke(ctx)
        except _USAGE_ERROR as error:
            _tell_usage_error(ctx, error)
            raise
        except (Exception, KeyboardInterrupt) as error:
            known = as_corrigible_error(error)
            if known is None:
                if json and not isinstance(error, typer.Exit | typer.Abort):
                    _print_json_error(type(error).__name__, str(error), "This looks like a bug.", 1)
                raise
            if json:
                _print_json_error(type(known).__name__, known.message, known.advice, known.exit_code)
            error_console.print(f"[bold red]{escape(known.message)}[/]")
            if known.advice:
                error_console.print(escape(known.advice))
            raise typer.Exit(known.exit_code) from error


def _tell_usage_error(ctx: Any, error: Exception) -> None:
    if ctx.meta.get("corrigible.json"):
        _print_json_error("UsageError", str(getattr(error, "message", error)), "See --help.", 2)


def _print_json_error(kind: str, message: str, advice: str, exit_code: int) -> None:
    if _console._state["printed_json"]:  # a refused promotion has already said all in its result
        return
    print_json({"error": {"type": kind, "message": message, "advice": advice, "exit_code": exit_code}})


app = typer.Typer(
    name="corrigible",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn feedback into better policies, and prove that it did.",
    epilog=examples(
        """
        # the whole loop once, on this machine
        corrigible demo --out runs/demo
        # what this machine has, what is missing, how to get it
        corrigible doctor
        # your own comparisons
        corrigible import comparisons.jsonl
        corrigible train reward --out runs/reward
        corrigible train dpo --out runs/dpo
        """
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"corrigible {version('corrigible')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    events: str = typer.Option(
        "", "--events", envvar="CORRIGIBLE_EVENTS", help="Append every event, as JSON lines, to this file."
    ),
    track: list[str] = typer.Option(
        [],
        "--track",
        help="Send metrics to tensorboard[:DIRECTORY], wandb[:PROJECT] or mlflow[:RUN NAME] "
        "(CORRIGIBLE_TRACK, comma separated).",
    ),
) -> None:
    # Handed on in the environment, so that worker processes that a command starts report as well.
    if events:
        os.environ["CORRIGIBLE_EVENTS"] = events
    if track:
        os.environ["CORRIGIBLE_TRACK"] = ",".join(track)


for _name in MODULES:
    importlib.import_module(f"corrigible.cli.{_name}").register(app)


def main() -> None:
    """The ``corrigible`` command."""
    # A polite kill is Ctrl-C by other means: trainers save a checkpoint, importers their place.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app(prog_name="corrigible")
