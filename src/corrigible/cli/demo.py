"""``corrigible demo``: the whole loop once, on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from corrigible.cli.console import Json, console, examples, print_json, print_warning, progress_bus
from corrigible.errors import BadInputError

DEFAULT_OUT = Path("runs/demo")


def register(app: typer.Typer) -> None:
    """Add ``demo`` to the command line."""

    @app.command(
        epilog=examples(
            """
            corrigible demo
            # another place, other chance
            corrigible demo --out runs/second --seed 1
            # a smoke test with random weights: seconds instead of minutes
            corrigible demo --model tiny-random --quick --out runs/smoke
            # on your own prompts, one a line
            corrigible demo --prompts my-prompts.txt --out runs/mine
            """
        )
    )
    def demo(
        out: Path = typer.Option(DEFAULT_OUT, "--out", "-o", help="Folder for everything the turn leaves."),
        model: str = typer.Option("smollm2-135m", help="Policy to start from: a name, a folder or a hub id."),
        prompts: Path = typer.Option(
            None,
            help="Text, one prompt a line, or JSONL with `prompt` or `messages`. Default: 200 that ship.",
        ),
        seed: int = typer.Option(0, help="Of everything that is drawn."),
        quick: bool = typer.Option(
            False, "--quick", help="Few prompts: checks that it runs, proves nothing."
        ),
        fresh: bool = typer.Option(
            False,
            "--fresh",
            help="Do not go on with an unfinished turn in --out: set it aside and begin anew.",
        ),
        json: Json = False,
    ) -> None:
        """Turn the whole loop once: act, collect, model, align, evaluate, promote.

        A small language model answers everyday prompts; five simulated people with known reliability
        and biases compare the answers; a reward model and a better policy are learned from that; the
        policy is tried on prompts it has not seen, and promoted only if the interval says so. Interrupt
        it when you like: the same command goes on where it stopped. A prompt of your own file that cannot be
        read is named and left out; the exit code is then 3.
        """
        from corrigible.loop.prompts import household, read_prompts
        from corrigible.loop.turn import Turn, TurnConfig, set_aside

        asked, bad_lines = read_prompts(prompts) if prompts is not None else (household(), [])
        for line in bad_lines:
            print_warning(line)
        settings: dict[str, Any] = {"model": model, "seed": seed}
        if quick:
            settings |= {
                "train_prompts": 12,
                "held_out": 8,
                "answers": 3,
                "pairs_per_prompt": 2,
                "max_tokens": 24,
                "kl_prompts": 4,
            }
        elif prompts is not None and len(asked) < TurnConfig.train_prompts + TurnConfig.held_out:
            half = len(asked) // 2
            settings |= {"train_prompts": len(asked) - half, "held_out": half, "kl_prompts": min(24, half)}
        if fresh:
            set_aside(out)
        with progress_bus(json, run="demo"):
            summary = Turn(out, TurnConfig(**settings), prompts=asked).run()
        if json:
            print_json({**summary, "bad_lines": bad_lines})
        else:
            _show(summary, out)
        if bad_lines:
            raise typer.Exit(BadInputError.exit_code)


def _show(summary: dict[str, Any], out: Path) -> None:
    low, high = summary["win_rate_interval"]
    promoted = summary["verdict"] == "promote"
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row(
        "win rate on unseen prompts", f"[bold]{summary['win_rate']:.2f}[/]  (95 %: {low:.2f} to {high:.2f})"
    )
    gold_low, gold_high = summary["gold_win_rate_interval"]
    table.add_row(
        "  by the known house style", f"{summary['gold_win_rate']:.2f}  ({gold_low:.2f} to {gold_high:.2f})"
    )
    reward_low, reward_high = summary["reward_accuracy_interval"]
    table.add_row(
        "reward model, unseen prompts",
        f"{summary['reward_accuracy']:.2f}  ({reward_low:.2f} to {reward_high:.2f})",
    )
    table.add_row("KL to the start", f"{summary['kl']:.1f} nats an answer")
    length = summary["mean_length"]
    table.add_row("mean answer", f"{length['start']:.0f} → {length['candidate']:.0f} tokens")
    table.add_row("took", f"{summary['seconds']:.0f} s, {summary['peak_rss_mb']:.0f} MB at most")
    console.print(table)
    if promoted:
        console.print("\n[bold green]Promoted.[/] The interval lies above one half.")
    else:
        console.print("\n[bold red]Not promoted.[/] " + escape("; ".join(summary["reasons"])))
    console.print(f"\nThe report, with answers before and after: [bold]{escape(str(out / 'report.html'))}[/]")
    console.print("What next:")
    for command, why in next_commands(out, f"{summary['settings']['name']}-v2"):
        console.print(f"  [cyan]{escape(command)}[/]  [dim]{escape(why)}[/]")


def next_commands(out: Path, policy: str) -> list[tuple[str, str]]:
    """What somebody who has seen the demo may want to type, and why."""
    store = shlex.quote(str(out / "store.db"))
    return [
        (f"corrigible lineage {policy} --store {store}", "from the policy back to every judgement"),
        (f"corrigible judge --annotator me --store {store}", "judge some pairs yourself"),
        (f"corrigible show --store {store}", "what the store holds"),
        ("corrigible train reward --data FILE --out runs/reward", "learn from your own comparisons"),
    ]
