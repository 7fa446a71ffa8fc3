"""``corrigible show``: a look at what a store holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from corrigible.cli.console import Json, StoreUrl, console, examples, print_json
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
from corrigible.errors import BadInputError

if TYPE_CHECKING:
    from corrigible.records import Feedback, Item
    from corrigible.store import Store


def register(app: typer.Typer) -> None:
    """Add ``show`` to the command line."""
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
        if filters or limit is not None:
            _show_list(opened, filters, limit or 20, json)
        else:
            _show_counts(opened, store, json)


def _show_counts(opened: Store, name: str, json: bool) -> None:
    counts = opened.tally()
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
    table, full = opened.find(name)
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
