"""``corrigible train``: move a policy, or fit a reward model, on the feedback that is there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from rich.markup import escape

from corrigible.cli.console import DEFAULT_STORE, Json, console, examples, print_json, progress_bus
from corrigible.cli.train_reward import add_reward_command
from corrigible.errors import BadInputError, CorrigibleError

if TYPE_CHECKING:
    from corrigible.align.distributed import World
    from corrigible.intervals import Estimate
    from corrigible.records import PolicyVersion
    from corrigible.store import Pair


def register(app: typer.Typer) -> None:
    """Add ``train dpo`` and ``train reward``."""
    group = typer.Typer(no_args_is_help=True, help="Train a policy or a reward model on feedback.")
    app.add_typer(group, name="train")
    group.command(
        "dpo",
        epilog=examples(
            """
            # on the comparisons of a store
            corrigible train dpo --store corrigible.db --out runs/dpo
            # on a file or folder, imported into runs/dpo/feedback.db
            corrigible train dpo --data comparisons.jsonl --out runs/dpo --limit 200
            # after Ctrl-C or a crash
            corrigible train dpo --store corrigible.db --out runs/dpo --resume
            # in several processes, each with a share of every batch
            torchrun --nproc-per-node 2 -m corrigible train dpo --store corrigible.db --out runs/dpo
            """
        ),
    )(dpo)
    add_reward_command(group)


def dpo(
    ctx: typer.Context,
    out: Path = typer.Option(..., "--out", "-o", help="Folder of the run.", show_default=False),
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
    model: str = typer.Option("smollm2-135m", "--model", "-m", help="The policy to start from."),
    epochs: float = typer.Option(1.0, "--epochs", min=0.001, help="Passes over the training pairs."),
    steps: int = typer.Option(
        0, "--steps", min=0, help="Optimiser steps, instead of --epochs.", show_default=False
    ),
    lr: float = typer.Option(1e-4, "--lr", min=0, help="Peak learning rate."),
    beta: float = typer.Option(
        0.1, "--beta", min=0, help="KL coefficient: small moves far, large stays near."
    ),
    label_smoothing: float = typer.Option(
        0.0, "--label-smoothing", min=0, max=0.5, help="Assumed share of flipped labels (cDPO)."
    ),
    lora_rank: int = typer.Option(
        16, "--lora-rank", min=0, help="Rank of the adapter; 0 trains all weights."
    ),
    batch_size: int = typer.Option(16, "--batch-size", min=1, help="Pairs in one optimiser step."),
    max_length: int = typer.Option(
        512, "--max-length", min=8, help="Longest prompt and response, in tokens."
    ),
    limit: int = typer.Option(
        0,
        "--limit",
        min=0,
        help="Train on this many pairs at most, drawn at random after the split.",
        show_default=False,
    ),
    held_out: float = typer.Option(
        0.2, "--held-out", min=0, max=0.9, help="Share of the pairs to test on; 0 for none."
    ),
    eval_limit: int = typer.Option(
        200, "--eval-limit", min=1, help="Test on this many held-out pairs at most."
    ),
    split: str = typer.Option(
        "auto", "--split", help="What must not be on both sides: auto, prompt, topic or item. Never rows."
    ),
    micro_batch_tokens: int = typer.Option(
        1024, "--micro-batch-tokens", min=1, help="Most tokens in one forward pass; bounds memory."
    ),
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="Less memory in a pass, for a third more time."
    ),
    moments: str = typer.Option(
        "float32", "--moments", help="Precision of the optimiser's moments: float32 or bfloat16."
    ),
    shard: str = typer.Option(
        "nothing",
        "--shard",
        help="What several processes (torchrun) share out: nothing, or the state of the optimiser.",
    ),
    reuse_reference: bool = typer.Option(
        False,
        "--reuse-reference",
        help="Share reference log-probs with other runs on the same policy, pairs and settings.",
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the split, the adapter and the order."),
    name: str = typer.Option("", "--name", help="Name of the new policy version.", show_default=False),
    checkpoint_every: int = typer.Option(25, "--checkpoint-every", min=1, help="Steps between checkpoints."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in OUT, to the same numbers."),
    json: Json = False,
) -> None:
    """Train a policy on comparisons with DPO.

    Votes on the same pair become one soft label. Prints how often the policy's implicit reward agrees
    with held-out judgements, with a 95 % interval, beside a baseline that sees only lengths.
    """
    if not data and not store:
        store = DEFAULT_STORE
    with _in_step(json, out) as world:
        from pydantic import ValidationError

        from corrigible.align import DPOConfig, TrainConfig, train_dpo
        from corrigible.align.dpo import lineage
        from corrigible.loop.registry import Registry
        from corrigible.store import Store, load_pairs
        from corrigible.store.formats import import_file

        try:
            config = TrainConfig.model_validate(
                {
                    "epochs": epochs,
                    "steps": steps or None,
                    "lr": lr,
                    "batch_size": batch_size,
                    "micro_batch_tokens": micro_batch_tokens,
                    "gradient_checkpointing": gradient_checkpointing,
                    "moments": moments,
                    "shard": shard,
                    "reuse_reference": reuse_reference,
                    "seed": seed,
                    "checkpoint_every": checkpoint_every,
                }
            )
            dpo_config = DPOConfig(beta=beta, label_smoothing=label_smoothing)
        except ValidationError as error:
            wrong = error.errors()[0]
            option = f"--{str(wrong['loc'][-1]).replace('_', '-')}"
            raise BadInputError(
                f"{option}: {wrong['msg']}.", advice="See corrigible train dpo --help."
            ) from error
        out.mkdir(parents=True, exist_ok=True)

        def import_all() -> list[Any]:
            with Store.open(store or out / "feedback.db", create=True) as opened:
                return [
                    import_file(opened, path, rejects=out / f"{path.name}.rejects.jsonl") for path in data
                ]

        imported = world.by_lead(import_all) if data else []
        with Store.open(store or out / "feedback.db", create=False) as opened:
            pairs = load_pairs(opened, aggregate=True)
            if not pairs:
                raise BadInputError(
                    f"{opened.url} holds no comparisons to learn from.",
                    advice="Import some (corrigible import, or --data), or judge some (corrigible judge).",
                )
            sides = _sides(pairs, split, held_out, limit, eval_limit, seed)
            version = train_dpo(
                sides.train,
                model,
                out=out,
                config=config,
                dpo=dpo_config,
                lora_rank=lora_rank or None,
                max_length=max_length,
                held_out=sides.test,
                split=sides.by,
                name=name or None,
                store=opened,
                resume=resume,
                resume_hint=_resume_command(ctx),
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
                "split": sides.by,
                "train_pairs": len(sides.train),
                "held_out_pairs": len(sides.test),
                "implicit_reward_accuracy": version.scores.get("implicit_reward_accuracy"),
                "length_only_accuracy": length,
            }
        )
        return
    _show(version, sides.by, length, where)


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
    train: Sequence[Pair]
    test: Sequence[Pair]
    by: str


def _sides(pairs: Sequence[Pair], by: str, held_out: float, limit: int, eval_limit: int, seed: int) -> _Sides:
    """What to train on and what to test on (nothing when nothing is held out), split in whole groups."""
    from corrigible.rewards.splits import resolve_rule, split

    rule = resolve_rule(pairs, by)
    if not held_out:
        return _Sides(_some(pairs, limit, seed), (), rule)
    parts = split(pairs, by=rule, held_out=held_out, seed=seed)
    return _Sides(_some(parts.train, limit, seed), _some(parts.held_out, eval_limit, seed), rule)


def _some(pairs: Sequence[Pair], limit: int, seed: int) -> Sequence[Pair]:
    """At most ``limit`` pairs (0: all) from all groups of a side; a smaller draw is part of a larger one."""
    import numpy as np

    if not limit or limit >= len(pairs):
        return pairs
    return [pairs[i] for i in sorted(np.random.default_rng(seed).permutation(len(pairs))[:limit])]


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


def _resume_command(ctx: typer.Context) -> str:
    """The command that goes on with this run: what the user typed, and ``--resume``."""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1")
    launch = (
        ["corrigible"] if several == "1" else ["torchrun", "--nproc-per-node", several, "-m", "corrigible"]
    )
    words = [*launch, "train", "dpo"]
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        value = ctx.params.get(parameter.name or "")
        if source is None or source.name != "COMMANDLINE" or parameter.name == "resume":
            continue
        flag = parameter.opts[0]
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                words += [flag, str(each)]
    return f"Go on with: {shlex.join([*words, '--resume'])}"


def _show(version: PolicyVersion, by: str, length: Estimate | None, where: str) -> None:
    trained = version.trained_on
    console.print(f"[bold]{escape(version.name)}[/]  {version.id}")
    if trained is not None:
        console.print(f"  trained on   {trained.filter['pairs']} pairs from {trained.feedback} judgements")
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
    console.print(f"  weights      {escape(str(version.adapter or 'model/'))}")
    console.print(f"  lineage      corrigible lineage {version.id} --store {escape(where)}")
