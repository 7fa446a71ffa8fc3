"""``corrigible train``: move a policy, or fit a reward model, on the feedback that is there.

There is one command per registered algorithm, made from its entry: its own settings and those of the trainer
are options, and everything else is the same for all. The registry is only asked when somebody trains.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.markup import escape
from typer.core import TyperGroup

from corrigible.cli.console import (
    DEFAULT_STORE,
    Json,
    console,
    examples,
    print_json,
    print_warning,
    progress_bus,
)
from corrigible.cli.train_options import Setting, config_from, settings_of
from corrigible.cli.train_reward import add_reward_command
from corrigible.errors import BadInputError, CorrigibleError

if TYPE_CHECKING:
    from corrigible.align import Algorithm
    from corrigible.align.distributed import World
    from corrigible.intervals import Estimate
    from corrigible.records import PolicyVersion
    from corrigible.store import Pair, Store

FAMILIES = {
    "contrast": "Contrast losses: better against worse",
    "tokens": "Token losses: responses to imitate",
    "rendered": "Feedback as text: what was said about a response is learnt from",
    "online": "Online: from the policy's own samples, in Python",
}
"""Headings of the families of algorithms, in the order of ``--help`` and of the documentation."""


class TrainGroup(TyperGroup):
    """``reward``, and a command per algorithm, made when one is asked for: the registry needs torch."""

    _filled = False

    @property
    def commands(self) -> MutableMapping[str, Any]:
        """Every command by name."""
        if not self._filled:
            self._filled = True
            self._commands |= algorithm_commands()
        return self._commands

    @commands.setter
    def commands(self, value: MutableMapping[str, Any]) -> None:
        self._commands = dict(value)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name alone; one that is no algorithm is found without the registry."""
        if cmd_name not in self._commands and not self._filled:
            self._commands |= algorithm_commands(cmd_name)
        return self._commands.get(cmd_name)


def register(app: typer.Typer) -> None:
    """Add ``train reward`` and ``train ALGORITHM``."""
    group = typer.Typer(
        cls=TrainGroup,
        no_args_is_help=True,
        help="Train a policy or a reward model on feedback.",
        epilog=examples(
            """
            # which algorithm learns from which feedback
            corrigible algorithms
            corrigible train dpo --store corrigible.db --out runs/dpo
            """
        ),
    )
    app.add_typer(group, name="train")
    add_reward_command(group)


def algorithm_commands(*names: str) -> dict[str, Any]:
    """A command per registered algorithm (of those names, where some are given), by family."""
    from corrigible.align import ALGORITHMS

    made = typer.Typer(rich_markup_mode="rich")
    for family, heading in FAMILIES.items():
        for entry in ALGORITHMS.values():
            if entry.family == family and (not names or entry.name in names):
                made.command(
                    entry.name,
                    help=_help(entry),
                    short_help=escape(first_sentence(entry.doc)),
                    epilog=_examples(entry),
                    rich_help_panel=heading,
                )(command_of(entry))
    return dict(typer.main.get_group(made).commands)


def command_of(entry: Algorithm) -> Callable[..., None]:
    """The function behind ``corrigible train NAME``: its parameters are the options."""
    from corrigible.align import TrainConfig
    from corrigible.align.learnable import check_offline, is_online

    if is_online(entry):

        def refuse(json: Json = False) -> None:
            check_offline(entry)

        return refuse

    common = list(inspect.signature(_common, eval_str=True).parameters.values())
    trainer = settings_of(TrainConfig, panel="Trainer")
    taken = {"ctx", *(each.name for each in common), *(each.parameter.name for each in trainer)}
    own = settings_of(entry.config, panel=f"Settings of {entry.name}", prefix=entry.name, taken=taken)

    def command(ctx: typer.Context, **given: Any) -> None:
        _run(ctx, entry, own, trainer, given)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [
        context,
        *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in common),
        *(each.parameter for each in (*own, *trainer)),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def first_sentence(doc: str) -> str:
    """The first sentence of an entry's docstring, on one line, without its last full stop."""
    paragraph = " ".join(doc.split("\n\n")[0].split()).replace("``", "`")
    head, stop, _ = paragraph.partition(". ")
    return head if stop else paragraph.removesuffix(".")


def _help(entry: Algorithm) -> str:
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(entry.doc).split("\n\n")]
    kinds = ", ".join(sorted(entry.learns_from))
    paragraphs.append(f"Learns from: {kinds} (as {entry.signal}).")
    paragraphs.append(f"Paper: {entry.paper}.")
    if entry.signal == "groups":
        paragraphs.append(
            "There is no command for it yet: it needs answers that the policy samples while it trains, each "
            "with a reward. The guide 'Algorithms' shows the lines of Python."
        )
    else:
        paragraphs.append(
            "Where the store holds comparisons, some are held out first: prints how often the policy's "
            "implicit reward agrees with them, with a 95 % interval, beside what lengths alone can do."
        )
    return escape("\n\n".join(paragraphs))


def _examples(entry: Algorithm) -> str:
    if entry.signal == "groups":
        return examples(
            f"""
            # what it needs and where that is described
            corrigible algorithms {entry.name}
            corrigible train {entry.name} --help
            """
        )
    run = f"corrigible train {entry.name}"
    return examples(
        f"""
        # on the feedback of a store
        {run} --store corrigible.db --out runs/{entry.name}
        # on a file or folder, imported into runs/{entry.name}/feedback.db
        {run} --data feedback.jsonl --out runs/{entry.name} --limit 200
        # after Ctrl-C or a crash
        {run} --store corrigible.db --out runs/{entry.name} --resume
        # in several processes, each with a share of every batch
        torchrun --nproc-per-node 2 -m {run} --store corrigible.db --out runs/{entry.name}
        """
    )


def _common(
    out: Path = typer.Option(..., "--out", "-o", help="Folder of the run.", show_default=False),
    data: list[Path] = typer.Option(
        [],
        "--data",
        "-d",
        help="File or folder of feedback to import first (any format of `corrigible import`).",
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
    model: str = typer.Option("smollm2-135m", "--model", "-m", help="The policy to start from."),
    criterion: str = typer.Option(
        "", "--criterion", help="Only judgements on this criterion.", show_default=False
    ),
    lora_rank: int = typer.Option(
        16, "--lora-rank", min=0, help="Rank of the adapter; 0 trains all weights."
    ),
    max_length: int = typer.Option(
        512, "--max-length", min=8, help="Longest prompt and response, in tokens."
    ),
    limit: int = typer.Option(
        0,
        "--limit",
        min=0,
        help="Learn from this many pairs (answers, ...) at most, drawn at random after the split.",
        show_default=False,
    ),
    held_out: float = typer.Option(
        0.2, "--held-out", min=0, max=0.9, help="Share of the comparisons to test on; 0 for none."
    ),
    eval_limit: int = typer.Option(
        200, "--eval-limit", min=1, help="Test on this many held-out pairs at most."
    ),
    split: str = typer.Option(
        "auto", "--split", help="What must not be on both sides: auto, prompt, topic or item. Never rows."
    ),
    name: str = typer.Option("", "--name", help="Name of the new policy version.", show_default=False),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in OUT, to the same numbers."),
    json: Json = False,
) -> None:
    """The options of every algorithm."""


def _run(
    ctx: typer.Context,
    entry: Algorithm,
    own: Sequence[Setting],
    trainer: Sequence[Setting],
    given: dict[str, Any],
) -> None:
    """Train by ``entry`` with what was typed, and say what came out."""
    out, json = given["out"], given["json"]
    store = given["store"] or ("" if given["data"] else DEFAULT_STORE)
    with _in_step(json, out) as world:
        from corrigible.align import TrainConfig, train
        from corrigible.align.training import lineage
        from corrigible.loop.registry import Registry
        from corrigible.store import Store
        from corrigible.store.formats import import_file

        command = f"corrigible train {entry.name}"
        config = config_from(TrainConfig, trainer, given, command)
        settings = config_from(entry.config, own, given, command)
        out.mkdir(parents=True, exist_ok=True)

        def import_all() -> list[Any]:
            with Store.open(store or out / "feedback.db", create=True) as opened:
                return [
                    import_file(opened, path, rejects=out / f"{path.name}.rejects.jsonl")
                    for path in given["data"]
                ]

        imported = world.by_lead(import_all) if given["data"] else []
        with Store.open(store or out / "feedback.db", create=False) as opened:
            sides = _sides(opened, entry, given, config.seed)
            version = train(
                entry.name,
                sides.signals,
                given["model"],
                out=out,
                config=config,
                algorithm_config=settings,
                lora_rank=given["lora_rank"] or None,
                max_length=given["max_length"],
                held_out=sides.test,
                split=sides.by,
                name=given["name"] or None,
                store=opened,
                resume=given["resume"],
                resume_hint=_resume_command(ctx, entry.name),
            )
            if not world.leads:
                return
            Registry(opened).register(version, trained_on=lineage(out))
            length = _length_only(sides) if sides.test else None
            where = opened.url
    if json:
        print_json(
            {
                "policy": version.to_json(),
                "store": where,
                "imported": imported,
                "learns_from": entry.signal,
                "train_signals": len(sides.signals),
                "split": sides.by,
                "train_pairs": len(sides.train),
                "held_out_pairs": len(sides.test),
                "implicit_reward_accuracy": version.scores.get("implicit_reward_accuracy"),
                "length_only_accuracy": length,
            }
        )
        return
    _show(version, entry.source, sides.by, length, where)


@contextmanager
def _in_step(json: bool, out: Path) -> Iterator[World]:
    """Of several processes (torchrun) all train, and all end alike; one of them imports and speaks."""
    from corrigible.align.distributed import join, leads

    with progress_bus(json, run=str(out)) if leads() else nullcontext():
        world = join()
        try:
            with world.together():
                yield world
        except CorrigibleError as error:
            if world.has_told(error) and not world.leads:
                raise typer.Exit(error.exit_code) from error
            raise


class _Sides(NamedTuple):
    """What is learnt from, the pairs of the same judgements, the pairs to test on, and the split's rule."""

    signals: Sequence[Any]
    train: Sequence[Pair]
    test: Sequence[Pair]
    by: str


def _sides(store: Store, entry: Algorithm, given: dict[str, Any], seed: int) -> _Sides:
    """What to learn from and what to test on (nothing when nothing is held out), split in whole groups."""
    from corrigible.align.learnable import apart_from, load_for, nothing_to_learn_from
    from corrigible.rewards.splits import resolve_rule, split
    from corrigible.store import load_pairs

    limit, by, held_out = given["limit"], given["split"], given["held_out"]
    criterion = given["criterion"] or None
    signals = load_for(store, entry, criterion=criterion)
    if not signals and criterion and load_for(store, entry):
        raise BadInputError(
            f"{store.url} holds no {entry.signal} that were judged on {criterion!r}.",
            advice="`corrigible show` says what was judged; without --criterion all of them are learnt from.",
        )
    if not signals:
        raise nothing_to_learn_from(store, entry)
    of_pairs = entry.signal == "pairs"
    pairs: Sequence[Pair] = signals if of_pairs else load_pairs(store, aggregate=True, criterion=criterion)
    if not pairs:
        return _Sides(_some(signals, limit, seed), (), (), by)
    rule = resolve_rule(pairs, by)
    if not held_out:
        kept = _some(signals, limit, seed)
        return _Sides(kept, kept if of_pairs else pairs, (), rule)
    try:
        parts = split(pairs, by=rule, held_out=held_out, seed=seed)
    except BadInputError as error:
        if of_pairs:
            raise
        print_warning(f"Nothing is held out to test on: {error}")
        return _Sides(_some(signals, limit, seed), pairs, (), rule)
    test = _some(parts.held_out, given["eval_limit"], seed)
    if of_pairs:
        train = _some(parts.train, limit, seed)
        return _Sides(train, train, test, rule)
    apart = apart_from(signals, parts, pairs)
    if not apart:
        raise BadInputError(
            f"All {len(signals)} {entry.signal} signals go with comparisons that are held out.",
            advice="Hold out fewer (--held-out), or none (--held-out 0).",
        )
    return _Sides(_some(apart, limit, seed), parts.train, test, rule)


def _some(items: Sequence[Any], limit: int, seed: int) -> Sequence[Any]:
    """At most ``limit`` items (0: all) from all groups of a side; a smaller draw is part of a larger one."""
    import numpy as np

    if not limit or limit >= len(items):
        return items
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:limit])]


def _length_only(sides: _Sides) -> Estimate:
    import numpy as np

    from corrigible.intervals import cluster_bootstrap
    from corrigible.rewards.baselines import accuracy_rows, length_margins
    from corrigible.rewards.splits import clusters

    labels = np.array([pair.p_chosen for pair in sides.test])
    right = accuracy_rows(length_margins(sides.train, sides.test), labels)
    decided = np.isfinite(right)
    units = [unit for unit, keep in zip(clusters(sides.test, sides.by), decided, strict=True) if keep]
    return cluster_bootstrap(right[decided], units, bounds=(0.0, 1.0))


def _resume_command(ctx: typer.Context, algorithm: str) -> str:
    """The command that goes on with this run: what the user typed, and ``--resume``."""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launch = (
        ["corrigible"] if several == "1" else ["torchrun", "--nproc-per-node", several, "-m", "corrigible"]
    )
    words = [*launch, "train", algorithm]
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        value = ctx.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or parameter.name == "resume":
            continue
        flag = parameter.opts[0]
        if isinstance(value, bool):
            words += [flag] if value else parameter.secondary_opts[:1]
        elif isinstance(value, tuple) and parameter.nargs > 1:
            words += [flag, *map(str, value)]
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [flag, str(each)]
    return f"Go on with: {shlex.join([*words, '--resume'])}"


def _show(version: PolicyVersion, kind: str, by: str, length: Estimate | None, where: str) -> None:
    trained = version.trained_on
    console.print(f"[bold]{escape(version.name)}[/]  {version.id}")
    if trained is not None:
        noun = {"unpaired": "answers", "tokens": "texts", "ranked": "rankings"}.get(kind, kind)
        console.print(f"  trained on   {trained.filter[kind]} {noun} from {trained.feedback} judgements")
        skipped: Any = trained.filter.get("skipped")
        if skipped:
            listed = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            console.print(f"  left out     {escape(listed)}")
    accuracy: Any = version.scores.get("implicit_reward_accuracy")
    if accuracy is not None:
        low, high = accuracy["interval"]
        console.print(
            f"  held out     implicit reward accuracy [bold]{accuracy['value']:.3f}[/] "
            f"(95 % interval {low:.3f} to {high:.3f}; {accuracy['n']} pairs, "
            f"{accuracy['clusters']} {by}s)"
        )
    if length is not None:
        console.print(
            f"               length only {length.value:.3f} "
            f"(95 % interval {length.low:.3f} to {length.high:.3f})"
        )
    if "serving" in version.config:
        console.print(f"  serve with   {escape(str(version.config['serving']))}")
    console.print(f"  weights      {escape(str(version.adapter or 'model/'))}")
    console.print(f"  lineage      corrigible lineage {version.id} --store {escape(where)}")
