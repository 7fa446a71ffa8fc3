"""``corrigible algorithms``: which there are, and which feedback each of them learns from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from corrigible.cli.console import Json, console, examples, print_json
from corrigible.cli.train import FAMILIES, first_sentence

if TYPE_CHECKING:
    from corrigible.align import Algorithm


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "algorithms",
        epilog=examples(
            """
            # all of them, by family
            corrigible algorithms
            # one: what it does, its settings, what its metrics mean
            corrigible algorithms kto
            corrigible algorithms --json
            """
        ),
    )(algorithms)


def algorithms(
    name: str = typer.Argument("", help="Only this one, with its settings and metrics.", show_default=False),
    results: Path = typer.Option(
        Path("runs/claims"), "--results", help="Folder of the claims' results (corrigible claims run)."
    ),
    json: Json = False,
) -> None:
    """List the algorithms with the feedback that each can learn from, its paper and its claim.

    A claim is an experiment that could come out against the paper (corrigible claims); its verdict is shown
    where it has been run.
    """
    from corrigible.align import ALGORITHMS, get_algorithm

    if name:
        told = described(get_algorithm(name), results)
        print_json(told) if json else _show(told)
        return
    found = [described(entry, results) for entry in ALGORITHMS.values()]
    print_json({"algorithms": found}) if json else _list(found)


def described(entry: Algorithm, results: Path) -> dict[str, Any]:
    """Everything that the registry knows of an algorithm, and how its claim came out, as plain data."""
    from corrigible.align.learnable import is_online
    from corrigible.align.metrics import logged_by

    settings = {}
    for field_name, field in entry.config.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        settings[field_name] = {
            "type": str(getattr(field.annotation, "__name__", field.annotation)).replace("typing.", ""),
            "required": field.is_required(),
            "default": default,
            "description": " ".join((field.description or "").split()),
        }
    return {
        "name": entry.name,
        "family": entry.family,
        "summary": first_sentence(entry.doc),
        "doc": entry.doc,
        "signal": entry.signal,
        "learns_from": sorted(entry.learns_from),
        "command": None if is_online(entry) else f"corrigible train {entry.name}",
        "needs_reference": entry.needs_reference,
        "paper": entry.paper,
        "claim": entry.claim or None,
        "result": result_of(entry, results),
        "settings": settings,
        "metrics": logged_by(entry),
    }


def result_of(entry: Algorithm, results: Path) -> dict[str, Any] | None:
    """How its claim came out: ``verdict``, ``effect``, ``interval``; ``None`` when it was not run there."""
    from corrigible.claims.results import Results

    record = Results(results).read(entry.claim) if entry.claim else None
    if record is None:
        return None
    effect = record.result["effect"] or {}
    return {
        "verdict": record.result["verdict"],
        "effect": effect.get("effect"),
        "interval": effect.get("interval"),
        "unit": effect.get("unit", ""),
    }


def in_words(result: dict[str, Any] | None) -> str:
    """A result in a few words: ``supported, 0.95 [0.93, 0.97]``."""
    if result is None:
        return "not run"
    if result["interval"] is None:
        return str(result["verdict"])
    low, high = result["interval"]
    unit = f" {result['unit']}" if result["unit"] else ""
    return f"{result['verdict']}, {result['effect']:.3g}{unit} [{low:.3g}, {high:.3g}]"


def _list(found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    for family, heading in FAMILIES.items():
        entries = [entry for entry in found if entry["family"] == family]
        if not entries:
            continue
        table = Table("name", "what it does", "learns from", "claim", title=heading, title_justify="left")
        for entry in entries:
            kinds = f"{entry['signal']}: {', '.join(entry['learns_from'])}"
            table.add_row(
                f"[bold]{escape(entry['name'])}[/]", escape(entry["summary"]), escape(kinds), _claim(entry)
            )
        console.print(table, soft_wrap=False)
    console.print("corrigible algorithms NAME says more; corrigible train NAME trains.")


def _claim(entry: dict[str, Any]) -> str:
    if entry["claim"] is None:
        return ""
    return f"{entry['claim']}: {in_words(entry['result'])}"


def _show(entry: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(f"[bold]{escape(entry['name'])}[/]\n")
    console.print(escape(entry["doc"].replace("``", "`")), soft_wrap=False)
    kinds = ", ".join(entry["learns_from"])
    console.print(f"\n  learns from  {escape(kinds)} (as {entry['signal']})")
    console.print(f"  paper        {escape(entry['paper'])}")
    if entry["claim"]:
        console.print(f"  claim        {escape(_claim(entry))}")
    console.print(f"  command      {escape(entry['command'] or 'none: from Python (the guide Algorithms)')}")
    settings = Table("setting", "default", "", title="\nsettings", title_justify="left")
    for name, setting in entry["settings"].items():
        default = "required" if setting["required"] else str(setting["default"])
        settings.add_row(name, escape(default), escape(setting["description"]))
    metrics = Table("metric", "meaning", title="\nmetrics", title_justify="left")
    for name, meaning in entry["metrics"].items():
        metrics.add_row(name, escape(meaning))
    for table in (settings, metrics):
        if table.row_count:
            console.print(table, soft_wrap=False)
