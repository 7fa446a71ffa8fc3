"""``corrigible policies``, ``lineage`` and ``promote``: which versions exist and where they came from."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from corrigible.cli.console import Json, StoreUrl, console, examples, print_json, print_warning
from corrigible.errors import BadInputError

if TYPE_CHECKING:
    from corrigible.loop.registry import Lineage

_COLOURS = {"promoted": "green", "refused": "red", "retired": "dim"}


def register(app: typer.Typer) -> None:
    """Add the three commands to the command line."""
    app.command(
        epilog=examples("corrigible policies", "corrigible policies --store runs/demo/store.db --json")
    )(policies)
    app.command(
        epilog=examples(
            "corrigible lineage demo-v2 --store runs/demo/store.db",
            "corrigible lineage demo-v2 --records --json",
        )
    )(lineage)
    app.command(
        epilog=examples(
            'corrigible promote demo-v2 --reason "reads better to all of us" --store runs/demo/store.db',
            'corrigible promote demo-v2 --reason "we accept the drift" --override',
        )
    )(promote)


def policies(store: StoreUrl = "corrigible.db", json: Json = False) -> None:
    """List the policy versions of a store, with status and win rate; * marks the current one.

    Where several versions have one name, each is numbered, and the name alone means the newest.
    """
    from corrigible.loop.registry import Registry
    from corrigible.store import Store

    with Store.open(store, create=False) as opened:
        states = Registry(opened).states()
    by_name: dict[str, list[str]] = {}
    for state in states:
        by_name.setdefault(state.version.name, []).append(state.version.id)
    if json:
        print_json(
            {
                "policies": [
                    {
                        **s.version.to_json(),
                        "status": s.status,
                        "current": s.current,
                        "detail": s.detail,
                        "same_name": [one for one in by_name[s.version.name] if one != s.version.id],
                    }
                    for s in states
                ]
            }
        )
        return
    if not states:
        console.print("No policy versions yet. `corrigible demo` or `corrigible train dpo` make some.")
        return
    # Two lines a version, so that on a narrow terminal, too, its id is whole and can be copied.
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  name and id", no_wrap=True, min_width=38)
    for column in ("status", "win rate", "made by"):
        table.add_column(column)
    for state in states:
        version = state.version
        created = datetime.fromtimestamp(version.created_at / 1e6, UTC).strftime("%Y-%m-%d")
        colour = _COLOURS.get(state.status, "default")
        judgements = f"\n{version.trained_on.feedback} judgements" if version.trained_on else ""
        ids = by_name[version.name]
        which = f" [yellow]({ids.index(version.id) + 1} of {len(ids)})[/]" if len(ids) > 1 else ""
        table.add_row(
            f"{'*' if state.current else ' '} [bold]{escape(version.name)}[/]{which}\n  {version.id}",
            f"[{colour}]{state.status}[/]\n[dim]{created}[/]",
            _win_rate(state.detail.get("evaluation")),
            escape(f"{version.algorithm or version.base_model}{judgements}"),
        )
    console.print(table)
    for name, ids in by_name.items():
        if len(ids) > 1:
            print_warning(f"{len(ids)} versions are called {name}: the name means the newest, {ids[-1]}")


def _win_rate(evaluation: Any) -> str:
    """The win rate that the gate decided on; nothing for a version that met no gate."""
    if not isinstance(evaluation, dict) or "win_rate" not in evaluation:
        return ""
    low, high = evaluation["win_rate_interval"]
    return f"{evaluation['win_rate']:.2f}\n[dim]{low:.2f} to {high:.2f}[/]"


def lineage(
    policy: str = typer.Argument(..., help="Id, the beginning of an id, or name of a policy version."),
    store: StoreUrl = "corrigible.db",
    records: bool = typer.Option(
        False, "--records", help="Also list the id of every judgement it was trained on."
    ),
    json: Json = False,
) -> None:
    """Show where a policy version came from, back to the base model and every judgement."""
    from corrigible.loop.registry import Registry
    from corrigible.store import Store

    with Store.open(store, create=False) as opened:
        registry = Registry(opened)
        found = registry.lineage(policy)
        judgements = [record.id for record in registry.training_feedback(found.version)] if records else []
    if json:
        print_json({**found.to_json(), **({"records": judgements} if records else {})})
        return
    tree = Tree(_line(found))
    _grow(tree, found)
    console.print(tree)
    for record_id in judgements:
        console.print(record_id)


def promote(
    policy: str = typer.Argument(..., help="Id, the beginning of an id, or name of a policy version."),
    reason: str = typer.Option(..., "--reason", "-r", help="Why: kept with the promotion."),
    by: str = typer.Option("", help="Who promotes it; default: the user of this machine."),
    override: bool = typer.Option(False, "--override", help="Although the gate refused it."),
    store: StoreUrl = "corrigible.db",
    json: Json = False,
) -> None:
    """Make a policy version the current one, by hand. Exit code 6 when the gate had refused it."""
    from corrigible.loop.registry import Registry
    from corrigible.store import Store

    if not reason.strip():
        raise BadInputError("The reason is empty.", advice="Say why: it is kept with the promotion.")
    with Store.open(store, create=False) as opened:
        registry = Registry(opened)
        version = registry.promote(policy, by=by or _user(), reason=reason, override=override)
        namesakes = registry.namesakes(version)
    if json:
        print_json({"promoted": version.id, "name": version.name, "same_name": namesakes})
        return
    console.print(f"[green]{escape(version.name)}[/] ({version.id}) is now current.")
    if namesakes and policy == version.name:
        others = "another version is" if len(namesakes) == 1 else f"{len(namesakes)} other versions are"
        print_warning(f"{others} called {version.name}, too ({', '.join(namesakes)}): the newest was taken")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in a bare container
        return "unknown"


def _line(found: Lineage) -> str:
    version = found.version
    colour = _COLOURS.get(found.status, "default")
    how = f"{version.algorithm} from" if version.algorithm else "base model"
    made = (
        f" [dim]{how}[/] {escape(version.base_model)}"
        if not version.algorithm
        else f" [dim]by {version.algorithm}[/]"
    )
    return f"[bold]{escape(version.name)}[/] [{colour}]{found.status}[/]{made} [dim]{version.id}[/]"


def _grow(tree: Any, found: Lineage) -> None:
    tree.add(f"weights [dim]{escape(found.version.weights)}[/]")
    for name, score in found.version.scores.items():
        if isinstance(score, dict) and "value" in score:
            tree.add(f"{escape(name)} {score['value']:.3f} {score.get('interval', '')}")
    if found.evaluation:
        low, high = found.evaluation["win_rate_interval"]
        tree.add(
            f"evaluated against {escape(str(found.evaluation['baseline']))}: "
            f"win rate {found.evaluation['win_rate']:.3f} [{low:.3f}, {high:.3f}]"
        )
    if found.judgements:
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
        branch = tree.add(f"trained on {found.judgements} judgements ({kinds or 'records of another store'})")
        for name, count in found.annotators.items():
            branch.add(f"{escape(name)} [dim]{count}[/]")
    if found.parent is not None:
        _grow(tree.add(_line(found.parent)), found.parent)
