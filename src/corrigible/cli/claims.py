"""``corrigible claims``: the papers' claims as experiments that one can run."""

from __future__ import annotations

import typer
from rich.markup import escape

from corrigible.cli.console import Json, console, examples, print_json, progress_bus
from corrigible.errors import BadInputError, RefusedError


def register(app: typer.Typer) -> None:
    """Add ``claims list`` and ``claims run`` to the command line."""
    group = typer.Typer(no_args_is_help=True, help="Check that a method does what its paper says.")
    app.add_typer(group, name="claims")

    @group.command("list", epilog=examples("corrigible claims list", "corrigible claims list --json"))
    def list_claims(json: Json = False) -> None:
        """List the claims with their hypotheses and papers."""
        from corrigible.claims import load_claims

        claims = load_claims()
        if json:
            print_json(
                {
                    "claims": [
                        {"id": c.id, "hypothesis": c.hypothesis, "paper": c.paper, "seeds": c.seeds}
                        for c in claims.values()
                    ]
                }
            )
            return
        for each in claims.values():
            console.print(f"[bold]{escape(each.id)}[/]  {escape(each.hypothesis)}")
            console.print(f"    [dim]{escape(each.paper)}; {len(each.seeds)} seeds[/]")

    @group.command(
        "run", epilog=examples("corrigible claims run S188", "corrigible claims run --json")
    )
    def run(
        names: list[str] = typer.Argument(
            None, help="Which ones; all when none is named.", show_default=False
        ),
        json: Json = False,
    ) -> None:
        """Run claims and say supported, not supported or inconclusive.

        Exit code 6 when a claim that was run is not supported or inconclusive.
        """
        from corrigible.claims import load_claims, run_claim

        claims = load_claims()
        unknown = [name for name in names or () if name not in claims]
        if unknown:
            raise BadInputError(f"No claim {unknown[0]!r}.", advice=f"Known: {', '.join(sorted(claims))}.")
        with progress_bus(json):
            results = [run_claim(claims[name]) for name in names or claims]
        if json:
            print_json({"results": results})
        else:
            colours = {"supported": "green", "not supported": "red", "inconclusive": "yellow"}
            for result in results:
                console.print(f"[{colours[result.verdict]}]{escape(str(result))}[/]")
        failed = [result.name for result in results if result.verdict != "supported"]
        if failed:
            raise RefusedError(f"Not supported here: {', '.join(failed)}.")
