"""``corrigible judge``: a person compares answers in the terminal, keyboard only."""

from __future__ import annotations

import sys
from enum import StrEnum

import typer

from corrigible.cli.console import console, error_console, examples, json_option, print_json, store_option
from corrigible.errors import BadInputError


class Source(StrEnum):
    """Where questions come from."""

    episodes = "episodes"
    comparisons = "comparisons"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "judge",
        epilog=examples(
            """
            # answers made by `corrigible generate --store`
            corrigible judge --store corrigible.db --annotator kim
            # judge imported pairs again, for helpfulness, twenty of them
            corrigible judge --annotator kim --source comparisons --axis helpfulness --limit 20
            # without a terminal: one key per line
            printf '1\\n2\\nt\\nq\\n' | corrigible judge --annotator kim --json
            """
        ),
    )(judge)


def judge(
    store: str = store_option,
    annotator: str = typer.Option(
        ..., "--annotator", "-a", help="Your pseudonym; nobody is asked the same question twice."
    ),
    task: str | None = typer.Option(None, help="Only answers, or comparisons, of this task."),
    axis: str = typer.Option("overall", help="What to judge by: overall, helpfulness, safety, ..."),
    source: Source = typer.Option(
        Source.episodes,
        help="episodes: pair the stored answers to each prompt; comparisons: ask what others were asked.",
    ),
    pairs: int = typer.Option(1, min=1, help="Questions per prompt when pairing episodes."),
    limit: int | None = typer.Option(None, min=1, help="Stop after this many questions."),
    campaign: str | None = typer.Option(None, help="Campaign written into the records."),
    seed: int = typer.Option(0, help="Of the pairs, their order and which answer is shown first."),
    json: bool = json_option,
) -> None:
    """Compare answers two by two. One key each: 1 or ←, 2 or →, t tie, b both bad, g both good, s skip
    with a reason, u undo, q quit. Every judgement is stored at once; run again to go on."""
    from corrigible.collect.queue import open_questions
    from corrigible.collect.terminal import judge_in_terminal, keyboard
    from corrigible.store import Store

    if not annotator.strip():
        raise BadInputError("The annotator's name is empty.", advice="Give a pseudonym with --annotator.")
    with Store.open(store, create=False) as opened:
        questions = open_questions(
            opened,
            annotator,
            source="episodes" if source is Source.episodes else "comparisons",
            task=task,
            criterion=axis,
            campaign_id=campaign,
            pairs_per_prompt=pairs,
            at_most=limit or 1000,
            seed=seed,
        )
        if not questions:
            _nothing_to_ask(source, annotator, json)
            return
        with keyboard(sys.stdin) as keys:
            screen = error_console if json else console
            tally = judge_in_terminal(opened, questions, annotator, keys=keys, screen=screen, seed=seed)
    if json:
        print_json(tally.to_json())
    else:
        console.print(
            f"{tally.judged} judged, {tally.skipped} skipped, {tally.undone} taken back; {tally.left} left. "
            "All of it is stored."
        )


def _nothing_to_ask(source: Source, annotator: str, json: bool) -> None:
    other = "comparisons" if source is Source.episodes else "episodes"
    needed = (
        "two different answers to one prompt (corrigible generate -n 2 --store ...)"
        if source is Source.episodes
        else "imported comparisons (corrigible import FILE)"
    )
    if json:
        print_json({"judged": 0, "skipped": 0, "undone": 0, "left": 0, "active_ms": 0})
    error_console.print(
        f"There is nothing left to ask {annotator} from {source.value}. "
        f"It takes {needed}, or --source {other}.",
        markup=False,
    )
