"""``corrigible evaluate``: is the candidate better than the baseline, by how much, and at what distance."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Table

from corrigible.cli.console import console, examples, json_option, print_json, print_warning, progress_bus
from corrigible.errors import BadInputError, Interrupted
from corrigible.files import write_json

if TYPE_CHECKING:
    from corrigible.evaluate.evaluation import Evaluation, SideBySide
    from corrigible.models import LanguagePolicy
    from corrigible.rewards.signals import Signal
    from corrigible.store import Store


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "evaluate",
        epilog=examples(
            """
            # an adapter against its own base model, judged by the demo's house style
            corrigible evaluate --candidate runs/dpo/adapter --prompts prompts.txt
            # a learned reward decides, the house style is reported beside it
            corrigible evaluate --candidate runs/dpo/adapter --judge reward:runs/reward --judge gold \\
                --prompts prompts.jsonl -n 2 --out runs/evaluation
            # versions of a store, for machines
            corrigible evaluate --store runs/demo/store.db --candidate demo-v2 --baseline demo-v1 \\
                --prompts prompts.txt --json
            """
        ),
    )(evaluate)


def evaluate(
    candidate: str = typer.Option(
        ..., "--candidate", "-c", help="A model, an adapter folder, or with --store a policy version."
    ),
    baseline: str = typer.Option(
        "", "--baseline", "-b", help="The same. Default: the candidate's model without its adapter."
    ),
    prompts: Path = typer.Option(
        ..., "--prompts", "-p", help='Held-out prompts: one a line, or JSONL with "prompt" or "messages".'
    ),
    judge: list[str] = typer.Option(
        ["gold"], "--judge", "-j", help="gold (the house style) or reward:FOLDER; the first one decides."
    ),
    n: int = typer.Option(1, "-n", "--n", min=1, help="Answers per prompt and policy."),
    max_tokens: int = typer.Option(128, min=1, help="Longest answer, tokens."),
    temperature: float = typer.Option(
        1.0, min=0.0, help="Of sampling; at other than 1 the divergence is no longer a KL."
    ),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Nucleus sampling."),
    system: str = typer.Option("", help="System message before every prompt."),
    seed: int = typer.Option(0, help="Of sampling and of the intervals."),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="Keep answers and evaluation.json here; run again to go on after Ctrl-C."
    ),
    store: str = typer.Option(
        "", "--store", "-s", help="Look policy versions up here, and add the answers to it."
    ),
    json: bool = json_option,
) -> None:
    """Answer held-out prompts with two policies and compare: win rate (paired by prompt, both orders),
    KL divergence, length, and every judge's score side by side, all with 95 % intervals over prompts.

    A prompt that cannot be read, or is longer than the model's context, is named or counted and left out;
    the exit code is then 3.
    """
    from corrigible.evaluate.evaluation import evaluate_policy
    from corrigible.evaluate.win_rate import SignalJudge
    from corrigible.loop.prompts import read_prompts
    from corrigible.records import Sampling

    found, bad_lines = read_prompts(prompts)
    for line in bad_lines:
        print_warning(line)
    asked = [prompt.messages(system) for prompt in found]
    signals = _signals(judge)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, n=n)
    with tempfile.TemporaryDirectory() as scratch, progress_bus(json):
        opened = _open(store)
        try:
            names = (candidate, baseline or f"{candidate} without its adapter")
            mine, version = _load(candidate, opened, Path(scratch) / "candidate")
            theirs, other = None, names[1]
            if baseline:
                theirs, other = _load(baseline, opened, Path(scratch) / "baseline")
            if theirs is None and not mine.has_adapter:
                raise BadInputError(
                    f"{candidate} has no adapter, so there is nothing to compare it with.",
                    advice="Name the other policy with --baseline.",
                )
            try:
                evaluation, *sides = evaluate_policy(
                    mine,
                    theirs,
                    asked,
                    [SignalJudge(signal) for signal in signals.values()],
                    signals=signals,
                    n=n,
                    sampling=sampling,
                    seed=seed,
                    names=names,
                    versions=(version, other),
                    keep=out,
                )
            except KeyboardInterrupt:
                raise Interrupted(
                    "Stopped before the evaluation was complete.",
                    advice="The same command goes on with the answers kept in --out."
                    if out
                    else "With --out FOLDER the answers are kept and the same command goes on.",
                ) from None
            if opened is not None:
                opened.add_episodes(episode for side in sides for episode in side)
        finally:
            if opened is not None:
                opened.close()
    result = {
        **evaluation.to_json(),
        "prompts": len(asked),
        "bad_lines": bad_lines,
        "sampling": sampling.to_json(),
    }
    if out is not None:
        write_json(out / "evaluation.json", {**result, **evaluation.to_json(items=True)})
    if json:
        print_json(result)
    else:
        _print(evaluation)
    if bad_lines or any("context_overflow" in rate.not_judged for rate in evaluation.win_rates.values()):
        raise typer.Exit(BadInputError.exit_code)


def _signals(judges: list[str]) -> Mapping[str, Signal]:
    from corrigible.collect.gold import GoldSignal, HouseStyle

    signals: dict[str, Signal] = {}
    for judge in judges:
        kind, _, folder = judge.partition(":")
        if judge == "gold":
            signals["gold"] = GoldSignal(HouseStyle(name="gold"))
        elif kind == "reward" and folder:
            from corrigible.rewards.reward_model import RewardModel

            signals[judge] = RewardModel.load(Path(folder)).renamed(judge)
        else:
            raise BadInputError(f"There is no judge {judge!r}.", advice="Use gold, or reward:FOLDER.")
    return signals


def _open(store: str) -> Store | None:
    if not store:
        return None
    from corrigible.store import Store

    return Store.open(store, create=False)


def _load(name: str, store: Store | None, scratch: Path) -> tuple[LanguagePolicy, str]:
    """The policy, and the version id that its episodes carry."""
    from corrigible.models import load_policy

    known = [] if store is None else [key for v in store.policies() for key in (v.id, v.name)]
    if store is None or name not in known:
        return load_policy(name), name
    version = store.policy(name)
    if version.adapter is None:
        return load_policy(version.base_model), version.id
    folder = Path(version.adapter)
    if not folder.is_dir():
        folder = store.blobs.fetch_directory(version.adapter, scratch)
    return load_policy(version.base_model, adapter=folder), version.id


def _print(found: Evaluation) -> None:
    rates = Table(
        "judge", "win rate", "95 % interval", "won", "tied", "lost", "not judged", "position effect"
    )
    for name, rate in found.win_rates.items():
        rates.add_row(
            escape(name),
            f"{rate.value:.3f}",
            rate.estimate.between("prompt"),
            *(str(count) for count in (rate.wins, rate.ties, rate.losses, sum(rate.not_judged.values()))),
            f"{rate.position_effect.value:+.3f}",
        )
    console.print(f"[bold]{escape(found.candidate)}[/] against {escape(found.baseline)}")
    console.print(rates)
    sides = Table("", "candidate", "baseline", "difference", "95 % interval")
    for side in (*found.scores.values(), found.length):
        sides.add_row(*_row(side))
    console.print(sides)
    if found.kl is not None:
        console.print(
            f"KL to the baseline: {found.kl.value:.3f} ({found.kl.per_sequence.between('prompt')}) "
            f"nats an answer, {found.kl.per_token.value:.4f} a token"
            + ("" if found.kl.on_policy else " (of answers drawn otherwise: temperature or top-p is not 1)"),
            markup=False,
        )
    low, high = found.win_rate.interval
    verdict = (
        "better"
        if low > 0.5
        else "worse"
        if high < 0.5
        else "not shown to be different: the interval holds 0.5"
    )
    console.print(f"By {escape(found.win_rate.judge)} the candidate is [bold]{verdict}[/].")
    for name, rate in found.win_rates.items():
        if rate.not_judged or rate.unpaired:
            print_warning(f"{name}: left out {rate.not_judged or ''} {rate.unpaired} unpaired answers")


def _row(side: SideBySide) -> tuple[str, ...]:
    return (
        escape(f"{side.name} ({side.unit})"),
        f"{side.candidate.value:.3f}",
        f"{side.baseline.value:.3f}",
        f"{side.difference.value:+.3f}",
        side.difference.between("prompt"),
    )
