"""Which reward model to make the default: a grid of configurations on real comparisons, cross-validated.

    python -m bench.reward_sweep --grid frozen --out runs/sweep
    python -m bench.reward_sweep --dataset helpful --out runs/sweep \\
        --config '{"name": "mine", "tune": "full", "text": "prompt+response", "learning_rate": 5e-5}'
    python -m bench.reward_sweep --out runs/sweep --table

Every row of OUT/rows.jsonl is one dataset and configuration with its held-out report over all folds:
accuracy with its interval, the paired differences to TF-IDF and to length, calibration, seconds. A row is
added as it is finished, and one that is there is not computed again. The stores that the comparisons are
imported into, and the features of frozen backbones, lie beside it and are used again, too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corrigible.files import plain
from corrigible.rewards import FeatureTable, RewardConfig, RewardReport, cross_validated
from corrigible.rewards.backbones import load_backbone
from corrigible.store import Pair, Store, load_pairs
from corrigible.store.formats import import_file

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Dataset:
    """Comparisons: their files or folders within the data folder, and what must not be on both sides."""

    sources: tuple[str, ...]
    by: str


_HARMLESS, _HELPFUL = (f"hh-rlhf/{name}-base_test.jsonl.gz" for name in ("harmless", "helpful"))
DATASETS = {
    "harmless": Dataset((_HARMLESS,), "prompt"),
    "helpful": Dataset((_HELPFUL,), "prompt"),
    "hh": Dataset((_HARMLESS, _HELPFUL), "prompt"),
    "ukp": Dataset(("ukp-convarg1",), "topic"),
    "humour": Dataset(("humour-pairs",), "item"),
}

LENGTH = ("log_chars", "log_words")
RICH = (*LENGTH, "sentences", "questions", "lines", "digits", "variety", "word_length", "prompt_overlap")
FULL: dict[str, Any] = {
    "tune": "full",
    "epochs": 4,
    "features": LENGTH,
    "text": "prompt+response",
    "members": 0,
}
FROZEN: dict[str, Any] = {"tune": "frozen", "members": 0}

GRIDS: dict[str, list[dict[str, Any]]] = {
    "frozen": [
        {"name": "frozen response", **FROZEN, "text": "response", "features": ()},
        {"name": "frozen response +length", **FROZEN, "text": "response", "features": LENGTH},
        {"name": "frozen product +length", **FROZEN, "text": "prompt*response", "features": LENGTH},
        {"name": "frozen product +rich", **FROZEN, "text": "prompt*response", "features": RICH},
        {"name": "frozen product 3 layers +rich", **FROZEN, "layers": (-1, 3, 0), "features": RICH},
        {"name": "frozen cross all +rich", **FROZEN, "text": "prompt+response", "features": RICH},
        {
            "name": "frozen cross response-only +rich",
            **FROZEN,
            "text": "prompt+response",
            "pooling": "response_mean",
            "features": RICH,
        },
        {
            "name": "frozen response majority",
            **FROZEN,
            "text": "response",
            "features": LENGTH,
            "labels": "majority",
        },
        {
            "name": "frozen response equal weights",
            **FROZEN,
            "text": "response",
            "features": LENGTH,
            "weights": "equal",
        },
    ],
    "minilm": [
        {"name": "full cross mean", **FULL},
        {"name": "full cross response-only", **FULL, "pooling": "response_mean"},
        {"name": "full cross first", **FULL, "pooling": "first"},
        {"name": "full response", **FULL, "text": "response"},
        {"name": "full product", **FULL, "text": "prompt*response"},
        {"name": "full cross no features", **FULL, "features": ()},
        {"name": "full cross rich", **FULL, "features": RICH},
        {"name": "full cross lr 1e-5", **FULL, "learning_rate": 1e-5},
        {"name": "full cross lr 1e-4", **FULL, "learning_rate": 1e-4},
        {"name": "full cross no warm start", **FULL, "warm_start": False},
        {"name": "full cross top 2 layers", **FULL, "train_layers": 2},
        {"name": "full cross top 3 layers lr 1e-4", **FULL, "train_layers": 3, "learning_rate": 1e-4},
        {"name": "full cross 512 tokens", **FULL, "max_length": 512},
        {"name": "full cross 128 tokens", **FULL, "max_length": 128},
        {"name": "full cross majority", **FULL, "labels": "majority"},
    ],
    "smollm2": [
        {
            "name": "smol frozen last",
            **FROZEN,
            "backbone": "smollm2-135m",
            "text": "prompt+response",
            "pooling": "last",
        },
        {
            "name": "smol frozen mean, middle layers +rich",
            **FROZEN,
            "backbone": "smollm2-135m",
            "text": "prompt+response",
            "pooling": "response_mean",
            "layers": (10, 20, -1),
            "features": RICH,
        },
        {
            "name": "smol frozen response mean layer 15 +rich",
            **FROZEN,
            "backbone": "smollm2-135m",
            "text": "prompt+response",
            "pooling": "response_mean",
            "layers": (15,),
            "features": RICH,
        },
        {
            "name": "smol frozen last layer 15 +rich",
            **FROZEN,
            "backbone": "smollm2-135m",
            "text": "prompt+response",
            "pooling": "last",
            "layers": (15,),
            "features": RICH,
        },
        {
            "name": "smol lora last",
            **FULL,
            "backbone": "smollm2-135m",
            "tune": "lora",
            "pooling": "last",
            "learning_rate": 2e-4,
            "epochs": 3,
        },
        {
            "name": "smol lora response mean",
            **FULL,
            "backbone": "smollm2-135m",
            "tune": "lora",
            "pooling": "response_mean",
            "learning_rate": 2e-4,
            "epochs": 3,
        },
        {
            "name": "smol full last lr 1e-5",
            **FULL,
            "backbone": "smollm2-135m",
            "pooling": "last",
            "learning_rate": 1e-5,
            "epochs": 3,
        },
        {
            "name": "smol full response mean lr 2e-5",
            **FULL,
            "backbone": "smollm2-135m",
            "pooling": "response_mean",
            "learning_rate": 2e-5,
            "epochs": 3,
        },
    ],
}


def comparisons(name: str, data: Path, out: Path) -> list[Pair]:
    """The pairs of a dataset, votes merged, through a store in ``out`` that is filled once."""
    with Store.open(out / f"{name}.db") as store:
        for source in DATASETS[name].sources:
            import_file(store, data / source, rejects=out / f"{Path(source).name}.rejects.jsonl")
        return load_pairs(store, aggregate=True)


def sweep(
    grid: list[dict[str, Any]],
    datasets: list[str],
    *,
    data: Path,
    out: Path,
    folds: int = 5,
    seeds: int = 1,
    device: str = "auto",
) -> None:
    """Measure every configuration of ``grid`` on every dataset and seed that OUT/rows.jsonl lacks."""
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    done = {_key(row) for row in finished(out)}
    for dataset in datasets:
        pairs: list[Pair] = []
        for entry in grid:
            for seed in range(seeds):
                settings = {key: value for key, value in entry.items() if key != "name"}
                config = RewardConfig.from_json({**settings, "seed": seed})
                row = {"dataset": dataset, "name": entry["name"], "folds": folds, "config": config.to_json()}
                if _key(plain(row)) in done:
                    continue
                pairs = pairs or comparisons(dataset, data, out)
                began = time.monotonic()
                report = measure(pairs, config, DATASETS[dataset].by, folds, out, device)
                row |= {"seconds": round(time.monotonic() - began, 1), "report": report}
                text = json.dumps(plain(row))
                print(text, flush=True)
                with rows.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")


def measure(
    pairs: list[Pair], config: RewardConfig, by: str, folds: int, out: Path, device: str
) -> RewardReport:
    """The cross-validated report; frozen backbones read every text once for all configurations."""
    table = None
    if config.tune == "frozen":
        table = FeatureTable(load_backbone(config, device=device), config, out / "features")
    # The folds are the same for every seed: what differs is the fit.
    return cross_validated(pairs, folds, config=config, by=by, table=table, device=device)


def finished(out: Path) -> list[dict[str, Any]]:
    """The rows that are there; half a line, of a run that was killed, is none."""
    path = out / "rows.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["dataset"], row["folds"], row["config"]], sort_keys=True)


def show(out: Path) -> None:
    """A readable summary of the finished rows, best first per dataset."""
    rows = finished(out)
    for dataset in sorted({row["dataset"] for row in rows}):
        inside = [row for row in rows if row["dataset"] == dataset]
        print(f"\n{dataset}")
        for row in sorted(inside, key=lambda row: -row["report"]["accuracy"]["value"]):
            report = row["report"]
            gain = report["baselines"]["tfidf"]["difference"]
            print(
                f"  {_told(report['accuracy'])}  vs tfidf {_told(gain, '+.3f')}  "
                f"loss {report['calibration']['log_loss']:.4f} ece {report['calibration']['ece']:.3f}  "
                f"{row['seconds']:>6.0f} s  {row['name']} (seed {row['config']['seed']})"
            )
        report = inside[0]["report"]
        length, tfidf = (report["baselines"][name]["accuracy"]["value"] for name in ("length", "tfidf"))
        counted = f"{report['accuracy']['n']} pairs, {report['accuracy']['clusters']} units"
        print(f"  length {length:.3f}, tfidf {tfidf:.3f}, {counted}")


def _told(estimate: dict[str, Any], form: str = ".3f") -> str:
    low, high = estimate["interval"]
    return f"{estimate['value']:{form}} [{low:{form}}, {high:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("CORRIGIBLE_DATA") or BESIDE),
        help="folder with hh-rlhf, ukp-convarg1 and humour-pairs (default: CORRIGIBLE_DATA, ../shared/data)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows and what can be reused")
    parser.add_argument("--grid", nargs="*", default=[], choices=sorted(GRIDS))
    parser.add_argument(
        "--config", action="append", default=[], help='JSON: {"name": ..., settings of RewardConfig}'
    )
    parser.add_argument(
        "--only", nargs="*", default=[""], help="keep configurations whose name contains one of these"
    )
    parser.add_argument(
        "--dataset", nargs="*", default=["harmless", "helpful", "ukp", "humour"], choices=sorted(DATASETS)
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="print a summary of finished rows and stop")
    args = parser.parse_args()
    if args.table:
        show(args.out)
        return
    grid = [entry for name in args.grid for entry in GRIDS[name]]
    grid += [json.loads(text) for text in args.config]
    grid = [entry for entry in grid if any(part in entry["name"] for part in args.only)]
    if not grid:
        parser.error("give --grid or --config (or --table)")
    sweep(
        grid,
        args.dataset,
        data=args.data,
        out=args.out,
        folds=args.folds,
        seeds=args.seeds,
        device=args.device,
    )


if __name__ == "__main__":
    main()
