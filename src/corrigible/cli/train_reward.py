"""``corrigible train reward``: a reward model from comparisons, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape

from corrigible.cli.console import (
    DEFAULT_STORE,
    Json,
    console,
    examples,
    print_json,
    print_warning,
    progress_bus,
)
from corrigible.errors import BadInputError, Interrupted
from corrigible.files import write_json

if TYPE_CHECKING:
    from corrigible.intervals import Estimate
    from corrigible.rewards import FeatureTable, RewardConfig, RewardModel, RewardReport
    from corrigible.store import Pair


def add_reward_command(app: typer.Typer) -> None:
    """Add ``reward`` to the ``train`` group."""
    app.command(
        "reward",
        epilog=examples(
            """
            # on the comparisons of a store
            corrigible train reward --out runs/reward
            # on a file or folder, imported into runs/reward/feedback.db first
            corrigible train reward --data helpful-base_test.jsonl.gz --out runs/helpful --learning-curve
            # test on every topic once, each time by a model that has not seen it
            corrigible train reward --data ukp-convarg1/ --split topic --folds 5 --out runs/arguments
            # all weights of the encoder rather than a head on its vectors
            corrigible train reward --data humour-pairs/ --split item --tune full --out runs/humour
            """
        ),
    )(reward)


def reward(
    out: Path = typer.Option(
        ..., "--out", "-o", help="Folder for the model and its report.", show_default=False
    ),
    data: list[Path] = typer.Option(
        [],
        "--data",
        "-d",
        help="File or folder of comparisons to import first (any format of `corrigible import`).",
        show_default=False,
    ),
    store: str = typer.Option(
        "",
        "--store",
        "-s",
        envvar="CORRIGIBLE_STORE",
        help=f"The store to learn from (and to import --data into). Default: OUT/feedback.db with "
        f"--data, else {DEFAULT_STORE}.",
        show_default=False,
    ),
    criterion: str = typer.Option(
        "", "--criterion", help="Only judgements on this criterion.", show_default=False
    ),
    split: str = typer.Option(
        "auto", "--split", help="What must not be on both sides: auto, prompt, topic or item. Never rows."
    ),
    held_out: float = typer.Option(
        0.2, "--held-out", min=0.01, max=0.9, help="Share to test on (of the items with --split item)."
    ),
    folds: int = typer.Option(
        0, "--folds", min=0, help="Cross-validate with this many folds; the saved model then learns from all."
    ),
    learning_curve: bool = typer.Option(
        False, "--learning-curve", help="Also train on 10, 25 and 50 % of the training data."
    ),
    backbone: str = typer.Option(
        "",
        "--backbone",
        "-b",
        help="smollm2-135m (the default), another causal model, or minilm (quicker).",
        show_default=False,
    ),
    tune: str = typer.Option(
        "",
        "--tune",
        help="frozen (a head on fixed vectors), full (all weights) or lora (causal models).",
        show_default=False,
    ),
    text: str = typer.Option(
        "",
        "--text",
        help="What is read: response, prompt+response (together) or prompt*response (each alone).",
        show_default=False,
    ),
    pooling: str = typer.Option(
        "", "--pooling", help="mean, response_mean, last or first token.", show_default=False
    ),
    feature: list[str] = typer.Option(
        [],
        "--feature",
        help="Named number beside the text's vector, such as log_chars; repeat for several; none for none.",
        show_default=False,
    ),
    labels: str = typer.Option("", "--labels", help="votes (soft labels) or majority.", show_default=False),
    max_length: int = typer.Option(
        0,
        "--max-length",
        min=0,
        help="Tokens read of a text; the prompt's start is cut first.",
        show_default=False,
    ),
    epochs: int = typer.Option(
        0, "--epochs", min=0, help="At most this many, when weights are tuned.", show_default=False
    ),
    lr: float = typer.Option(
        0.0, "--lr", min=0, help="Peak learning rate, when weights are tuned.", show_default=False
    ),
    limit: int = typer.Option(
        0, "--limit", min=0, help="Use about this many pairs, drawn in whole groups.", show_default=False
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the split, the order and the intervals."),
    name: str = typer.Option("reward_model", "--name", help="Name of the signal."),
    json: Json = False,
) -> None:
    """Fit a Bradley-Terry reward model to comparisons and test it on pairs it has not seen.

    Votes on the same pair become one soft label. Prints the held-out accuracy with a 95 % interval beside
    a length-only and a bag-of-words (TF-IDF) baseline, and how well its probabilities are calibrated.
    After Ctrl-C or a crash the same command goes on from where it was.
    """
    given: dict[str, Any] = {
        "backbone": backbone,
        "tune": tune,
        "text": text,
        "pooling": pooling,
        "features": None if not feature else () if feature == ["none"] else tuple(feature),
        "labels": labels,
        "max_length": max_length,
        "epochs": epochs,
        "learning_rate": lr,
    }
    if not data and not store:
        store = DEFAULT_STORE
    with progress_bus(json, run=str(out)):
        from corrigible.rewards.config import RewardConfig
        from corrigible.rewards.splits import resolve_rule, subset
        from corrigible.store import Store, load_pairs
        from corrigible.store.formats import import_file

        chosen = {key: value for key, value in given.items() if value or value == ()}
        config = RewardConfig.from_json({**RewardConfig.preset(backbone), **chosen, "seed": seed})
        out.mkdir(parents=True, exist_ok=True)
        with Store.open(store or out / "feedback.db", create=bool(data)) as opened:
            imported = [
                import_file(opened, path, rejects=out / f"{path.name}.rejects.jsonl") for path in data
            ]
            pairs = load_pairs(opened, aggregate=True, criterion=criterion or None)
            where = opened.url
        if not pairs:
            raise BadInputError(
                f"{where} holds no comparisons to learn from.",
                advice="Import some (corrigible import, or --data), or judge some (corrigible judge).",
            )
        rule = resolve_rule(pairs, split)
        if limit and limit < len(pairs):
            pairs = subset(pairs, limit / len(pairs), by=rule, seed=seed)
        try:
            model, report = _fit(pairs, config, rule, held_out, folds, learning_curve, out, name)
        except KeyboardInterrupt:
            raise Interrupted(
                "Interrupted while training the reward model.",
                advice="Run the same command again: it goes on from what was read and trained.",
            ) from None
        model.save(out)
        for path in (out / "work").glob("epochs-*"):
            path.unlink()
    told = {
        "model": str(out),
        "store": where,
        "imported": imported,
        "config": config.to_json(),
        "temperature": model.temperature,
        "history": model.history,
        **report.to_json(),
    }
    write_json(out / "report.json", told)
    if json:
        print_json(told)
        return
    _show(model, report, out)


def _fit(
    pairs: Sequence[Pair],
    config: RewardConfig,
    rule: str,
    held_out: float,
    folds: int,
    curve: bool,
    out: Path,
    name: str,
) -> tuple[RewardModel, RewardReport]:
    """The model and its held-out report. Everything that can be gone on with lies in OUT/work."""
    from corrigible.rewards import FeatureTable, cross_validated, fit_reward, reward_report, split
    from corrigible.rewards import learning_curve as measure_curve
    from corrigible.rewards.backbones import load_backbone
    from corrigible.rewards.training import table_margins

    work = out / "work"
    table: FeatureTable | None = None
    if config.tune == "frozen":
        table = FeatureTable(load_backbone(config), config, work / "features")
    settings: dict[str, Any] = {"config": config, "table": table, "work_dir": work}
    if folds:
        report = cross_validated(pairs, folds, by=rule, seed=config.seed, **settings)
        return fit_reward(pairs, by=rule, name=name, **settings), report
    parts = split(pairs, by=rule, held_out=held_out, seed=config.seed)
    model = fit_reward(parts.train, by=rule, name=name, **settings)
    margins = table_margins(model, table, parts.held_out) if table else model.margins(parts.held_out)
    points = measure_curve(parts, full=margins, seed=config.seed, **settings) if curve else ()
    return model, reward_report(
        _Scored(margins),
        parts.held_out,
        train_pairs=parts.train,
        by=rule,
        dropped=parts.dropped,
        learning_curve=points,
        seed=config.seed,
    )


class _Scored:
    """A model whose answers are known already."""

    def __init__(self, margins: Any) -> None:
        self._margins = margins

    def margins(self, pairs: Sequence[Pair]) -> Any:
        return self._margins


def _show(model: RewardModel, report: RewardReport, out: Path) -> None:
    from rich.table import Table

    accuracy = report.accuracy
    table = Table("held out", "accuracy", "95 % interval", "reward model minus it", title_justify="left")

    def row(title: str, value: Estimate, gain: Estimate | None = None) -> None:
        beside = "" if gain is None else f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        table.add_row(title, f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}", beside)

    row("[bold]reward model[/]", accuracy)
    titles = {"length": "length alone", "tfidf": "bag of words (TF-IDF)"}
    for name, result in report.baselines.items():
        row(titles.get(name, name), result.accuracy, result.difference)
    if report.clear is not None:
        row(f"reward model, clear majorities ({report.clear.n})", report.clear)
    console.print(table)
    ties = f", {report.ties} ties left out" if report.ties else ""
    console.print(
        f"  {accuracy.n:,} pairs in {accuracy.clusters:,} {report.split}s, "
        f"trained on {report.n_train:,}{ties}"
    )
    fit = report.calibration
    console.print(f"  log-loss {fit.log_loss:.3f} (chance 0.693), calibration error {fit.ece:.3f}")
    if report.learning_curve:
        console.print("  learning curve")
        for point in report.learning_curve:
            value = point.accuracy
            bar = "█" * max(0, round((value.value - 0.5) * 80))
            console.print(
                f"    {point.share:4.0%} {point.pairs:>7,} pairs  {value.value:.3f} "
                f"({value.low:.3f} to {value.high:.3f})  {bar}"
            )
    for note in report.notes:
        print_warning(note)
    cut = model.history.get("texts_cut", 0)
    if cut:
        print_warning(f"{cut} of {model.history['texts']} texts were longer than --max-length and were cut")
    console.print(f"  model        {escape(str(out))}")
