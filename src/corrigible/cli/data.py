"""``corrigible import`` and ``export``: feedback in, feedback out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from corrigible.cli.console import (
    Json,
    StoreUrl,
    console,
    error_console,
    examples,
    print_json,
    print_warning,
    progress_bus,
)
from corrigible.cli.filters import (
    Campaign,
    Criterion,
    Kind,
    Policy,
    Since,
    Status,
    Task,
    Until,
    Who,
    feedback_filters,
)
from corrigible.errors import BadInputError, CorrigibleError

if TYPE_CHECKING:
    from corrigible.store.formats import ExportReport, ImportReport


def register(app: typer.Typer) -> None:
    """Add the two commands."""
    app.command(
        "import",
        epilog=examples(
            """
            # what the file is, is found out
            corrigible import harmless-base_test.jsonl.gz
            # several at once, into a store of their own
            corrigible import ukp-convarg1/ humour-pairs/ --store arguments.db
            # a labelling project, under the name of its campaign
            corrigible import export.json --format label-studio --campaign pilot
            # rows: {"prompt", "chosen", "rejected"}; {"prompt", "completion", "label"};
            # {"prompt", "completions", "labels"}; {"prompt", "completion"}; {"messages"};
            # prompt, response_a, response_b, winner; prompt, response, rating
            corrigible import votes.csv
            """
        ),
    )(import_)
    app.command(
        "export",
        epilog=examples(
            """
            # everything, exactly
            corrigible export backup.jsonl.gz --format corrigible
            # preference rows for TRL; the account says what they cannot hold
            corrigible export pairs.jsonl --format trl --kind comparison --option style=plain
            corrigible export table.parquet --format parquet --annotator ada --since 2025-01-01
            """
        ),
    )(export)


# --- import ---------------------------------------------------------------------------------------


def import_(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Files or dataset folders.")],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="hh-rlhf, trl, openai-chat, argilla, label-studio, csv, parquet, hf-dataset, jsonl, "
            "corrigible, ukp-convarg1 or humour-pairs; found out from the content when not given.",
        ),
    ] = None,
    store: StoreUrl = "corrigible.db",
    rejects: Annotated[
        Path | None,
        typer.Option("--rejects", help="Where rejected rows are kept; <PATH>.rejects.jsonl when not given."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read at most this many rows.")] = None,
    campaign: Annotated[
        str | None, typer.Option("--campaign", help="Campaign that the records belong to.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--from-start", help="Go on where an earlier import was cut short.")
    ] = True,
    json: Json = False,
) -> None:
    """Bring in feedback that you already have.

    Rows that cannot be used are reported with line number and reason and kept, word for word, in a
    reject file; all others are imported. Importing again stores nothing twice, and an import that was
    cut short goes on where it stopped. Exits with 3 when a row was rejected.
    """
    from corrigible.store import Store
    from corrigible.store.formats import import_file

    reports: list[ImportReport] = []
    failures: list[tuple[Path, CorrigibleError]] = []
    with Store.open(store) as opened, progress_bus(json):
        for path in paths:
            try:
                report = import_file(
                    opened,
                    path,
                    format=format,
                    rejects=rejects,
                    resume=resume,
                    campaign=campaign,
                    limit=limit,
                )
            except CorrigibleError as error:
                # A bad file must not keep the good ones after it out; the store failing ends it all.
                if error.exit_code not in (3, 4) or len(paths) == 1:
                    raise
                failures.append((path, error))
                continue
            reports.append(report)
            if not json:
                _print_import(report)
    if json:
        print_json(
            {
                "store": store,
                "imports": [asdict(report) for report in reports],
                "failed": [
                    {"path": str(path), "message": failure.message, "advice": failure.advice}
                    for path, failure in failures
                ],
            }
        )
    for _, failure in failures:
        error_console.print(f"[bold red]{escape(failure.message)}[/] {escape(failure.advice)}")
    if failures or any(report.rejected for report in reports):
        raise typer.Exit(BadInputError.exit_code)


def _print_import(report: ImportReport) -> None:
    resumed = f", resumed at row {report.resumed_at:,}" if report.resumed_at else ""
    console.print(f"[bold]{escape(report.path)}[/] ({report.format}, {report.seconds:.1f} s{resumed})")
    console.print(
        f"  {report.read:,} rows: {report.added:,} records added, {report.existing:,} there already, "
        f"{report.rejected:,} rows rejected"
    )
    if report.not_held:
        console.print("  not held: " + escape("; ".join(f"{k} ({v:,})" for k, v in report.not_held.items())))
    for warning in report.warnings:
        print_warning(warning)
    if report.rejected:
        for line in report.first_rejects:
            error_console.print(f"  {line}", markup=False)
        more = report.rejected - len(report.first_rejects)
        if more > 0:
            error_console.print(f"  … and {more:,} more")
        error_console.print(f"  the rejected rows are in {report.rejects_path}", markup=False)


# --- export ---------------------------------------------------------------------------------------


def export(
    file: Annotated[Path, typer.Argument(help="Where to write; a .gz name is compressed.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="corrigible, csv, parquet, hf-dataset, argilla, label-studio (lossless); hh-rlhf, trl, "
            "openai-chat (the account says what they cannot hold).",
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            help="NAME=VALUE for the format. trl: type=preference|unpaired|stepwise|prompt-completion|"
            "language-modeling, style=conversational|plain, prompt=explicit|implicit.",
        ),
    ] = None,
    store: StoreUrl = "corrigible.db",
    kind: Kind = None,
    annotator: Who = None,
    policy: Policy = None,
    task: Task = None,
    campaign: Campaign = None,
    criterion: Criterion = None,
    since: Since = None,
    until: Until = None,
    status: Status = "live",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most this many records.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
) -> None:
    """Write feedback in another tool's format, with an account of what that format cannot hold."""
    from corrigible.store import Store
    from corrigible.store.formats import export_file

    options: dict[str, str] = {}
    for given in option or []:
        name, mark, value = given.partition("=")
        if not mark:
            raise BadInputError(f"--option {given!r} has no '='.", advice="Write --option NAME=VALUE.")
        options[name.strip()] = value.strip()
    with Store.open(store, create=False) as opened, progress_bus(json):
        filters = feedback_filters(
            opened,
            kind=kind,
            annotator=annotator,
            policy=policy,
            task=task,
            campaign=campaign,
            criterion=criterion,
            since=since,
            until=until,
            status=status,
        )
        report = export_file(
            opened, file, format=format, overwrite=overwrite, options=options, limit=limit, **filters
        )
    if json:
        print_json(asdict(report))
        return
    _print_export(report)


def _print_export(report: ExportReport) -> None:
    console.print(
        f"[bold]{escape(report.path)}[/] ({report.format}, {report.seconds:.1f} s): "
        f"{report.written:,} records written, {report.skipped:,} could not be"
    )
    if report.not_held:
        from rich.table import Table

        table = Table("what the format cannot hold", "records", title_justify="left")
        for what, count in report.not_held.items():
            table.add_row(escape(what), f"{count:,}")
        console.print(table)
    else:
        console.print("  nothing was lost")
    if report.reimport:
        console.print(f"  {report.reimport}")
