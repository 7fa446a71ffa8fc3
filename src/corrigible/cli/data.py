"""``corrigible import``, ``export`` and ``show``: feedback in, feedback out, and a look at what is there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from corrigible.errors import BadInputError, CorrigibleError

if TYPE_CHECKING:
    from corrigible.records import Feedback, Item
    from corrigible.store import Store
    from corrigible.store.formats import ExportReport, ImportReport

_HASH = re.compile(r"[0-9a-f]{6,64}")

Kind = Annotated[str | None, typer.Option("--kind", help="Only this kind of feedback, e.g. comparison.")]
Who = Annotated[str | None, typer.Option("--annotator", help="Only by this annotator (pseudonym).")]
Policy = Annotated[str | None, typer.Option("--policy", help="Only about this policy version (id or name).")]
Task = Annotated[str | None, typer.Option("--task", help="Only of this task.")]
Campaign = Annotated[str | None, typer.Option("--campaign", help="Only of this campaign.")]
Criterion = Annotated[str | None, typer.Option("--criterion", help="Only on this criterion.")]
Since = Annotated[
    str | None, typer.Option("--since", help="Given at or after this time (ISO 8601, UTC unless it says).")
]
Until = Annotated[str | None, typer.Option("--until", help="Given before this time.")]
Status = Annotated[str, typer.Option("--status", help="live, superseded, withdrawn or all.")]


def register(app: typer.Typer) -> None:
    """Add the three commands."""
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
    app.command(
        "show",
        epilog=examples(
            """
            # how much there is, of what, by whom, on which task
            corrigible show
            # the latest judgements of one kind
            corrigible show --kind comparison --limit 20
            # one record in full (as many letters of its id as make it unique)
            corrigible show 0193a1b2
            """
        ),
    )(show)


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
        filters = _filters(
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


def _filters(opened: Store, *, since: str | None, until: str | None, **given: Any) -> dict[str, Any]:
    """Filters for the store; those that were not given, and the default status, are left out."""
    found = {name: value for name, value in given.items() if value is not None}
    status = found.pop("status", "live")
    if status != "live":
        found["status"] = None if status == "all" else status
    if policy := found.get("policy"):
        found["policy"] = opened.policy(policy).id
    for name, text in (("since", since), ("until", until)):
        if text is not None:
            found[name] = _micros(text, name)
    return found


def _micros(text: str, name: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadInputError(
            f"--{name} {text!r} is not a time.", advice="Write 2025-01-31 or 2025-01-31T12:00:00+01:00."
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)


# --- show -----------------------------------------------------------------------------------------


def show(
    id: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="A feedback, episode or policy id, or the hash of an item."),
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
    json: Json = False,
) -> None:
    """Look into the store: counts, a list of judgements, or one record in full."""
    from corrigible.store import Store

    with Store.open(store, create=False) as opened:
        if id is not None:
            _show_one(opened, id.strip().lower(), json)
            return
        filters = _filters(
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
        if filters or limit is not None:
            _show_list(opened, filters, limit or 20, json)
        else:
            _show_counts(opened, store, json)


def _show_counts(opened: Store, name: str, json: bool) -> None:
    counts = tally(opened)
    if json:
        print_json({"store": name, **counts})
        return
    from rich.table import Table

    totals = counts["totals"]
    console.print(
        f"[bold]{escape(name)}[/]: {totals['feedback']:,} judgements, {totals['item']:,} items, "
        f"{totals['episode']:,} episodes, {totals['policy']:,} policy versions"
    )
    for column in ("kind", "annotator", "task", "campaign"):
        rows = counts[column]
        if not rows:
            continue
        more = totals[f"{column}s"] - len(rows)
        table = Table(column, "judgements", title_justify="left")
        for value, count in rows.items():
            table.add_row(escape(value), f"{count:,}")
        if more > 0:
            table.add_row(f"[dim]… and {more:,} more[/]", "")
        console.print(table)


def tally(opened: Store, top: int = 15) -> dict[str, Any]:
    """Records of each sort; judgements by kind, annotator, task and campaign (the ``top`` most frequent)."""
    from sqlalchemy import func, select

    from corrigible.store import schema

    totals: dict[str, int] = {}
    for table in (schema.feedback, schema.item, schema.episode, schema.policy):
        totals[table.name] = int(opened._fetch(select(func.count()).select_from(table))[0][0])
    found: dict[str, Any] = {"totals": totals}
    columns = schema.feedback.c
    for name in ("kind", "annotator", "task", "campaign"):
        column = columns[name]
        count = func.count()
        statement = select(column, count).where(column.is_not(None)).group_by(column)
        rows = opened._fetch(statement.order_by(count.desc(), column).limit(top))
        found[name] = {str(value): int(number) for value, number in rows}
        distinct = select(func.count(func.distinct(column)))
        totals[f"{name}s"] = int(opened._fetch(distinct)[0][0])
    return found


def _show_list(opened: Store, filters: Mapping[str, Any], limit: int, json: bool) -> None:
    total = opened.count_feedback(**filters)
    records = list(opened.feedback(**filters, limit=limit))
    if json:
        print_json({"total": total, "feedback": [record.to_json() for record in records]})
        return
    if not records:
        console.print("No judgement matches.")
        return
    from rich.table import Table

    items = opened.items({target.sha256 for record in records for target in record.targets})
    table = Table(title_justify="left")
    table.add_column("id", no_wrap=True)
    table.add_column("judgement")
    table.add_column("about", no_wrap=True, overflow="ellipsis")
    for record in records:
        about = " | ".join(_text(items.get(target.sha256), 60) for target in record.targets[:2])
        at = f", {_when(record.created_at)}" if record.created_at else ""
        gist = f"{record.kind}: {_gist(record)}\nby {record.annotator.pseudonym}{at}"
        table.add_row(record.id, escape(gist), escape(about))
    console.print(table)
    if total > len(records):
        console.print(f"[dim]{len(records):,} of {total:,}; --limit shows more[/]")


def _show_one(opened: Store, name: str, json: bool) -> None:
    table, full = _find(opened, name)
    if table == "item":
        item = opened.item(full)
        if json:
            print_json({"item": item.to_json()})
        else:
            console.print(f"[bold]item[/] {item.sha256} ({item.type}, {item.media_type})")
            console.print(item.text if item.text is not None else item.uri, markup=False)
        return
    if table == "episode":
        episode = opened.episode(full)
        print_json({"episode": episode.to_json()}) if json else _print_tree("episode", episode.to_json())
        return
    if table == "policy":
        policy = opened.policy(full)
        print_json({"policy": policy.to_json()}) if json else _print_tree("policy", policy.to_json())
        return
    record = opened.feedback_record(full)
    wanted = [record.context, *(target.sha256 for target in record.targets)]
    items = opened.items([sha256 for sha256 in wanted if sha256])
    if json:
        print_json(
            {"feedback": record.to_json(), "items": {sha: item.to_json() for sha, item in items.items()}}
        )
        return
    _print_feedback(record, items)


def _find(opened: Store, name: str) -> tuple[str, str]:
    """Table and full id of the one record whose id (or hash) begins with ``name``."""
    from sqlalchemy import select

    from corrigible.store import schema

    if not _HASH.fullmatch(name.replace("-", "")):
        raise BadInputError(
            f"{name!r} is no id.", advice="Ids are hexadecimal; give at least the first six letters."
        )
    found: list[tuple[str, str]] = []
    for table in (schema.feedback, schema.episode, schema.policy, schema.item):
        column = table.c.sha256 if table is schema.item else table.c.id
        rows = opened._fetch(select(column).where(column >= name, column < name + "g").limit(3))
        found += [(table.name, str(row[0])) for row in rows]
    exact = [one for one in found if one[1] == name]
    found = exact or found
    if not found:
        raise BadInputError(
            f"The store holds nothing with the id {name}.", advice="Check the id, and which store is open."
        )
    if len(found) > 1:
        shown = ", ".join(f"{table} {full}" for table, full in found[:4])
        raise BadInputError(f"{name} begins several ids: {shown}.", advice="Give more letters of the id.")
    return found[0]


def _print_feedback(record: Feedback, items: Mapping[str, Item]) -> None:
    from rich.panel import Panel
    from rich.text import Text

    who = record.annotator
    groups = f" ({', '.join(sorted(who.groups))})" if who.groups else ""
    console.print(
        f"[bold]{escape(record.kind)}[/] {record.id} · {record.status}\n"
        + escape(f"{who.type} {who.pseudonym}{groups} · {_when(record.created_at)} · {record.channel}")
        + (f" · task {escape(record.task_id)}" if record.task_id else "")
        + (f" · campaign {escape(record.campaign_id)}" if record.campaign_id else "")
    )
    if record.context:
        console.print(Panel(Text(_text(items.get(record.context))), title="context", title_align="left"))
    for index, target in enumerate(record.targets):
        title = f"target {index} · {target.type} {target.sha256[:12]}"
        console.print(Panel(Text(_text(items.get(target.sha256))), title=title, title_align="left"))
    payload = record.to_json()
    _print_tree("judgement", payload.get("payload") or payload.get("not_judged") or {})
    rest = {
        key: value
        for key, value in payload.items()
        if key in ("rationale", "confidence", "presentation", "effort", "policy", "propensity", "supersedes")
    }
    if rest:
        _print_tree("envelope", rest)


def _print_tree(title: str, value: Mapping[str, Any]) -> None:
    from rich.tree import Tree

    tree = Tree(f"[bold]{title}[/]")
    _grow(tree, value)
    console.print(tree)


def _grow(tree: Any, value: Any) -> None:
    pairs: Sequence[tuple[Any, Any]]
    pairs = list(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
    for key, one in pairs:
        if isinstance(one, Mapping | list) and one:
            short = isinstance(one, list) and all(not isinstance(v, Mapping | list) for v in one)
            if short:
                text = ", ".join(map(str, one))
                tree.add(f"{escape(str(key))}: {escape(text[:400] + ('…' if len(text) > 400 else ''))}")
            else:
                _grow(tree.add(escape(str(key))), one)
        else:
            tree.add(f"{escape(str(key))}: {escape(str(one))}")


def _text(item: Item | None, width: int | None = None) -> str:
    if item is None:
        return "(not in the store)"
    if item.media_type.endswith("messages+json"):
        try:
            messages = item.messages()
        except BadInputError:
            messages = ()
        text = "\n\n".join(f"{m.role}: {m.text}" for m in messages) or item.text or ""
    else:
        text = item.text if item.text is not None else f"({item.media_type})"
    if width is None:
        return text
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _gist(record: Feedback) -> str:
    if record.not_judged is not None:
        return f"not judged: {record.not_judged.reason}"
    payload = record.payload
    for name in ("outcome", "value", "levels", "values", "decision", "event", "text", "source"):
        value = getattr(payload, name, None)
        if value not in (None, ()):
            criterion = getattr(payload, "criterion", "overall")
            text = str(value)[:40]
            return text if criterion == "overall" else f"{text} ({criterion})"
    return ""


def _when(at: int) -> str:
    # Files that do not say when a judgement was given are imported with time 0.
    return datetime.fromtimestamp(at / 1e6, UTC).strftime("%Y-%m-%d %H:%M") if at else "unknown"
