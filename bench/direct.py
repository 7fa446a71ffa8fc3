"""The direct family on real comparisons, with clean labels and with labels flipped on purpose.

    python -m bench.direct --out runs/direct            # everything: 3 sets x 6 algorithms x 3 flip rates
    python -m bench.direct --out runs/direct --set humour --algorithm dpo --flips 0.4
    python -m bench.direct --out runs/direct --table    # what is there already, and the plot

SmolLM2-135M with a fresh LoRA adapter is trained for one pass over the same pairs by every algorithm,
then asked which side of *unflipped* held-out pairs its implicit reward (``log pi - log pi_ref``, summed)
prefers. Sets are split by what repeats in them (first message, topic, text), and intervals are over
those units. Nothing is tuned: one learning rate for all, each algorithm's own default constants; rDPO is
told the rate that labels were really flipped at.

Every row of OUT/rows.jsonl is one set, algorithm and rate; it is added as it is finished, and one that
is there is not computed again. OUT/direct.svg and OUT/direct.md are made from the rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench.pairs import data_folder
from bench.reward_sweep import DATASETS

from corrigible.align import (
    PairSource,
    TrainConfig,
    Trainer,
    UnpairedSource,
    get_algorithm,
    implicit_reward_accuracy,
    reference_logprobs,
)
from corrigible.align.sources import Source
from corrigible.align.tokens import demonstration_source
from corrigible.intervals import cluster_bootstrap
from corrigible.models import LanguagePolicy, load_policy
from corrigible.rewards.baselines import accuracy_rows, length_margins
from corrigible.rewards.splits import clusters, split
from corrigible.store import Demonstrated, Pair, Store, labelled_from_pairs, load_pairs
from corrigible.store.formats import import_file

SETS = ("helpful", "ukp", "humour")
ALGORITHMS = ("dpo", "rdpo", "ipo", "kto", "simpo", "sft")
FLIPS = (0.0, 0.2, 0.4)


@dataclass(frozen=True)
class Size:
    """How much is trained on and tested on, the same for every algorithm.

    Attributes:
        train, test: pairs.
        max_length: longest row in tokens.
        lr: peak learning rate of the adapter.
        model: the policy to start from.
    """

    train: int = 256
    test: int = 300
    max_length: int = 192
    lr: float = 3e-4
    batch_size: int = 8
    model: str = "smollm2-135m"


def load(name: str, folder: Path, data: Path) -> list[Pair]:
    """The pairs of a set with a majority, as hard labels."""
    url = folder / f"{name}.db"
    if not url.exists():
        with Store.open(url, create=True) as store:
            for source in DATASETS[name].sources:
                import_file(store, data / source)
    with Store.open(url) as store:
        pairs = load_pairs(store, aggregate=True, ties="drop")
    return [replace(pair, p_chosen=1.0, weight=1.0) for pair in pairs if pair.p_chosen > 0.5]


def flipped(pairs: Sequence[Pair], rate: float, seed: int = 0) -> list[Pair]:
    """A share ``rate`` of the pairs with their sides exchanged; a larger share contains a smaller one."""
    order = np.random.default_rng([seed, 1]).permutation(len(pairs))
    turned = {int(i) for i in order[: round(rate * len(pairs))]}
    return [_turned(pair) if i in turned else pair for i, pair in enumerate(pairs)]


def _turned(pair: Pair) -> Pair:
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_ref=pair.rejected_ref,
        rejected_ref=pair.chosen_ref,
        chosen_episode=pair.rejected_episode,
        rejected_episode=pair.chosen_episode,
    )


def source_of(kind: str, pairs: Sequence[Pair], policy: LanguagePolicy, size: Size) -> Source:
    """The pairs as examples of a kind: as they are, side by side, or the chosen ones alone."""
    if kind == "pairs":
        return PairSource(pairs, policy.renderer, max_length=size.max_length, invalid="skip")
    if kind == "unpaired":
        labelled = labelled_from_pairs(pairs)
        return UnpairedSource(labelled, policy.renderer, max_length=size.max_length, invalid="skip")
    chosen = [
        Demonstrated(
            prompt=pair.prompt,
            response=pair.chosen,
            weight=pair.weight,
            group=pair.group,
            annotators=pair.annotators,
            derived_from=pair.derived_from,
        )
        for pair in pairs
    ]
    return demonstration_source(chosen, policy.renderer, max_length=size.max_length, invalid="skip")


def row(name: str, algorithm: str, rate: float, sides: Any, size: Size, out: Path) -> dict[str, Any]:
    """Train and test once."""
    start = time.perf_counter()
    policy = load_policy(size.model)
    policy.add_lora(rank=16, alpha=32, seed=0)
    entry = get_algorithm(algorithm)
    settings = {"flip_rate": rate} if algorithm == "rdpo" else {}
    train = flipped(sides.train[: size.train], rate)
    source = source_of(entry.source, train, policy, size)
    test = PairSource(
        sides.held_out[: size.test], policy.renderer, max_length=size.max_length, invalid="skip"
    )
    reference = reference_logprobs(policy, test.examples, mode="base", reuse=True)
    # Both sides of a pair are two examples of an unpaired loss: the same pairs in every step.
    batch = size.batch_size * (2 if entry.source == "unpaired" else 1)
    config = TrainConfig(epochs=1, batch_size=batch, lr=size.lr, reuse_reference=True)
    result = Trainer(
        policy,
        entry,
        source,
        config,
        algorithm_config=entry.config(**settings),
        out=out / "runs" / f"{name}-{algorithm}-{rate:g}",
    ).train()
    by = DATASETS[name].by
    measured = implicit_reward_accuracy(policy, test, beta=1.0, reference=reference, by=by)
    return {
        "set": name,
        "algorithm": algorithm,
        "flips": rate,
        "accuracy": measured.accuracy.value,
        "low": measured.accuracy.low,
        "high": measured.accuracy.high,
        "test_pairs": len(test),
        "units": measured.accuracy.to_json().get("clusters"),
        "train_pairs": len(train),
        "steps": result.steps,
        "margin": float(measured.margins.mean()),
        "seconds": round(time.perf_counter() - start, 1),
    }


def length_only(name: str, sides: Any, size: Size) -> dict[str, Any]:
    """What a model that sees nothing but lengths gets on the same held-out pairs."""
    test = sides.held_out[: size.test]
    right = accuracy_rows(length_margins(sides.train[: size.train], test), np.ones(len(test)))
    found = cluster_bootstrap(right, clusters(test, DATASETS[name].by), bounds=(0.0, 1.0))
    return {"set": name, "algorithm": "length only", "flips": 0.0, "accuracy": found.value} | {
        "low": found.low,
        "high": found.high,
        "test_pairs": len(test),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for each set and algorithm, a column for each rate."""
    rates = sorted({row["flips"] for row in rows})
    lines = ["| set | algorithm | " + " | ".join(f"{rate:.0%} flipped" for rate in rates) + " |"]
    lines.append("|---|---|" + "---|" * len(rates))
    for key in dict.fromkeys((row["set"], row["algorithm"]) for row in rows):
        found = {row["flips"]: row for row in rows if (row["set"], row["algorithm"]) == key}
        cells = (
            f"{found[rate]['accuracy']:.3f} [{found[rate]['low']:.3f}, {found[rate]['high']:.3f}]"
            if rate in found
            else ""
            for rate in rates
        )
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each set: held-out accuracy with its interval against the rate of flips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = plt.subplots(
        1, len(sets), figsize=(4.2 * len(sets), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], sets, strict=True):
        here = [row for row in rows if row["set"] == name]
        names = [n for n in dict.fromkeys(row["algorithm"] for row in here) if n != "length only"]
        for number, algorithm in enumerate(names):
            mine = sorted((r for r in here if r["algorithm"] == algorithm), key=lambda r: r["flips"])
            # Side by side, so that intervals can be told apart.
            x = [r["flips"] + 0.012 * (number - (len(names) - 1) / 2) for r in mine]
            y = [r["accuracy"] for r in mine]
            error = [[r["accuracy"] - r["low"] for r in mine], [r["high"] - r["accuracy"] for r in mine]]
            panel.errorbar(x, y, yerr=error, marker="o", markersize=4, linewidth=1.2, label=algorithm)
        for r in here:
            if r["algorithm"] == "length only":
                panel.axhline(r["accuracy"], color="grey", linestyle=":", label="length only")
        panel.axhline(0.5, color="black", linewidth=0.6)
        panel.set(title=f"{name} (n = {here[0]['test_pairs']})", xlabel="share of labels flipped")
        panel.set_xticks(sorted({r["flips"] for r in here}))
    panels[0][0].set_ylabel("held-out accuracy, clean labels")
    panels[0][-1].legend(fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/direct"))
    parser.add_argument("--data", type=Path, help="folder of real feedback (default: ../shared/data)")
    parser.add_argument("--set", action="append", choices=SETS, dest="sets")
    parser.add_argument("--algorithm", action="append", choices=ALGORITHMS, dest="algorithms")
    parser.add_argument("--flips", action="append", type=float)
    parser.add_argument("--train", type=int, default=Size.train, help="pairs to train on")
    parser.add_argument("--test", type=int, default=Size.test, help="pairs to test on")
    parser.add_argument("--model", default=Size.model)
    parser.add_argument("--table", action="store_true", help="only write the table and the plot again")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    size = Size(train=options.train, test=options.test, model=options.model)
    path = options.out / "rows.jsonl"
    rows: list[dict[str, Any]] = []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    wanted = [
        (name, algorithm, rate)
        for name in options.sets or SETS
        for rate in options.flips or FLIPS
        for algorithm in ("length only", *(options.algorithms or ALGORITHMS))
        if algorithm != "length only" or rate == 0.0
    ]
    there = {(row["set"], row["algorithm"], row["flips"]) for row in rows}
    sides: dict[str, Any] = {}
    for name, algorithm, rate in () if options.table else wanted:
        if (name, algorithm, rate) in there:
            continue
        if name not in sides:
            pairs = load(name, options.out, data_folder(options.data))
            sides[name] = _shuffled(split(pairs, by=DATASETS[name].by, held_out=0.3, seed=0))
        if algorithm == "length only":
            found = length_only(name, sides[name], size)
        else:
            found = row(name, algorithm, rate, sides[name], size, options.out)
        rows.append(found)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    (options.out / "direct.md").write_text(table(rows), encoding="utf-8")
    plot(rows, options.out / "direct.svg")


@dataclass(frozen=True)
class _Sides:
    train: list[Pair]
    held_out: list[Pair]


def _shuffled(parts: Any) -> _Sides:
    """Both sides in a fixed random order, so that the first n are a sample of all groups."""
    random = np.random.default_rng(0)
    return _Sides(
        [parts.train[i] for i in random.permutation(len(parts.train))],
        [parts.held_out[i] for i in random.permutation(len(parts.held_out))],
    )


if __name__ == "__main__":
    main()
