"""``corrigible claims``: the papers' claims as experiments that one can run, and what came out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from corrigible.cli.console import Json, console, error_console, examples, print_json, progress_bus
from corrigible.errors import CorrigibleError, NumericsError, RefusedError

COLOURS = {"supported": "green", "not supported": "red", "inconclusive": "yellow", "not run": "dim"}

Folder = Annotated[Path, typer.Option("--results", help="Folder of results, one file a claim.")]


def register(app: typer.Typer) -> None:
    """Add ``claims list``, ``claims run`` and ``claims report`` to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Check that a method does what its paper says.")
    app.add_typer(group, name="claims")

    @group.command("list", epilog=examples("corrigible claims list", "corrigible claims list --json"))
    def list_claims(json: Json = False) -> None:
        """List the claims with their hypotheses and papers."""
        from corrigible.claims import load_claims

        claims = load_claims().values()
        if json:
            print_json({"claims": [_words(each) for each in claims]})
            return
        for each in claims:
            also = f" ({', '.join(each.aliases)})" if each.aliases else ""
            fast = "[green] fast[/]" if each.fast else ""
            console.print(f"[bold]{escape(each.id)}[/]{escape(also)}{fast}  {escape(each.title)}")
            console.print(f"    {escape(each.hypothesis)}")
            console.print(
                f"    [dim]{escape(each.paper)}; {len(each.seeds)} seeds, up to {each.budget:.0f} s[/]"
            )

    @group.command(
        "run",
        epilog=examples(
            "corrigible claims run S188",
            "corrigible claims run --fast",
            "# leave out what this very code has run already",
            "corrigible claims run --all --keep",
            "# an inconclusive one, with ten seeds more",
            "corrigible claims run S173 --more 10",
        ),
    )
    def run(
        names: list[str] = typer.Argument(
            None, help="Which ones: ids, as in `corrigible claims list`.", show_default=False
        ),
        all_: bool = typer.Option(False, "--all", help="All of them (some hours)."),
        fast: bool = typer.Option(False, "--fast", help="Those that are marked as fast (some minutes)."),
        more: int = typer.Option(
            0,
            min=0,
            help="Add this many seeds to the newest result: a further look, judged at half the level.",
        ),
        pilot: int = typer.Option(
            0,
            min=0,
            help="Only try the experiment, on this many seeds from 1000 on; nothing is kept.",
        ),
        keep: bool = typer.Option(
            False, "--keep", help="Leave out claims that this very code has run already."
        ),
        strict: bool = typer.Option(
            False, "--strict", help="Exit code 6 unless every claim that was run is supported."
        ),
        results: Folder = Path("runs/claims"),
        json: Json = False,
    ) -> None:
        """Run claims and say supported, not supported or inconclusive.

        A claim that is refuted is a result and no failure of the command: the exit code is 0, or 6 with
        --strict. It is 7 (or 1) when a seed of a claim failed, so that there is no verdict. Ctrl-C keeps the
        seeds that are done; the same command goes on from there.
        """
        from corrigible.claims import run_claim
        from corrigible.claims.results import Results

        chosen = _chosen(names or [], all_, fast)
        kept = Results(results)
        found, skipped = [], []
        with progress_bus(json):
            for claim in chosen:
                if pilot:
                    found.append(run_claim(claim, range(1000, 1000 + pilot)))
                    if not json:
                        _show_values(found[-1])
                elif keep and not more and kept.up_to_date(claim):
                    skipped.append(claim.id)
                else:
                    found.append(kept.run(claim, more=more))
                if not json and (not skipped or skipped[-1] != claim.id):
                    console.print(f"[{COLOURS[found[-1].verdict]}]{escape(str(found[-1]))}[/]")
        if json:
            print_json({"results": found, "kept": skipped})
        elif skipped:
            console.print(f"[dim]Kept as they are: {', '.join(skipped)}.[/]")
        _fail_where_due(found, strict)

    @group.command(
        "report",
        epilog=examples(
            "corrigible claims report",
            "corrigible claims report --json",
            "# a page per claim with its plots, and all in one HTML file",
            "corrigible claims report --out runs/claims-report",
        ),
    )
    def report(
        out: Path = typer.Option(
            None,
            "--out",
            help="Write index.md, a page per claim and report.html into this folder.",
            show_default=False,
        ),
        results: Folder = Path("runs/claims"),
        json: Json = False,
    ) -> None:
        """Show the table of all claims: verdict, effect, interval, control, seeds, seconds.

        The p values are corrected for looks and, by Holm's method, for the number of claims.
        """
        from corrigible.claims import load_claims
        from corrigible.claims.report import interval, number, table, write_report
        from corrigible.claims.results import Results

        claims, kept = load_claims(), Results(results)
        rows = table(claims, list(kept))
        written = [str(path) for path in write_report(claims, kept, out)] if out else []
        if json:
            print_json({"claims": rows, **({"files": written} if out else {})})
            return
        for row in rows:
            colour = COLOURS[row["verdict"]]
            console.print(
                f"[bold]{escape(row['id'])}[/]  [{colour}]{row['verdict']}[/]  {escape(row['title'])}"
            )
            if row["effect"] is not None:
                control = row["control"]
                said = f"{number(row['effect'])} {row['unit'] or ''}".strip()
                parts = [f"{said} [{interval(row['interval'])}], asked: {row['asks']}"]
                if control:
                    parts.append(f"control {number(control['effect'])} [{interval(control['interval'])}]")
                parts.append(f"{row['seeds']} seeds, {number(row['seconds'])} s, look {row['looks']}")
                parts.append("changed since" if row["changed"] else f"p (Holm) {number(row['p_holm'])}")
                console.print(f"    [dim]{escape('; '.join(parts))}[/]")
        for path in written[-1:]:
            error_console.print(f"{len(written)} files written; all of it is in {escape(path)}")


def _chosen(names: list[str], all_: bool, fast: bool) -> list[Any]:
    """The claims that were asked for, each once."""
    from corrigible.claims import find_claim, load_claims

    if sum((bool(names), all_, fast)) != 1:
        raise typer.BadParameter(
            "say which claims to run: ids (`corrigible claims list` names them), --fast or --all."
        )
    claims = load_claims()
    if names:
        return list({claim.id: claim for claim in map(find_claim, names)}.values())
    return [each for each in claims.values() if all_ or each.fast]


def _show_values(result: Any) -> None:
    """What a trial measured: every value over its seeds."""
    outcomes = [run.outcome.values for run in result.runs if run.outcome is not None]
    for name in outcomes[0] if outcomes else ():
        column = "  ".join(f"{values[name]:9.4g}" for values in outcomes)
        console.print(f"    {escape(name):60} {column}")


def _words(claim: Any) -> dict[str, Any]:
    from corrigible.claims.results import about

    return {
        **about(claim),
        "aliases": claim.aliases,
        "effects": [f"{each.name}: {each.asks}" for each in (claim.effect, *claim.also)],
        "controls": [each.name for each in claim.controls],
        "seeds": claim.seeds,
        "budget": claim.budget,
    }


def _fail_where_due(results: list[Any], strict: bool) -> None:
    failed = [result for result in results if result.failures]
    if failed:
        first = next(iter(failed[0].failures.values()))
        message = f"No verdict, seeds failed: {', '.join(result.id for result in failed)}. The first: {first}"
        advice = "What ran is kept; run the same claim again once that is mended."
        if first.startswith("NumericsError"):
            raise NumericsError(message, advice=advice)
        raise CorrigibleError(message, advice=advice)
    against = [result.id for result in results if result.verdict != "supported"]
    if strict and against:
        raise RefusedError(f"Not supported here: {', '.join(against)}.")
