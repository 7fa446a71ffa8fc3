"""Which reward model to make the default: a grid of configurations on real comparisons, cross-validated.

Standalone on purpose: it needs torch, transformers, numpy and scipy, and the folder ``src`` of this
repository beside it, but no store, no database and no installed package, so that it runs on a bare GPU
machine.

    # where the data is: one portable file, with the baselines' answers in it
    python bench/reward_sweep.py --data DATA_DIR --dump pairs.jsonl.gz
    python bench/reward_sweep.py --pack-minilm minilm16      # half-precision copy, 45 MB

    # where the device is
    python bench/reward_sweep.py --pairs pairs.jsonl.gz --minilm-dir minilm16 --grid minilm --out out.jsonl
    python bench/reward_sweep.py --pairs pairs.jsonl.gz --minilm-dir minilm16 \\
        --config '{"name": "mine", "tune": "full", "text": "prompt+response", "learning_rate": 5e-5}'

Every row of the answer is one dataset and configuration: accuracy over all folds with its interval, the
paired difference to TF-IDF and to length, log-loss, calibration error and seconds. Rows are appended to
``--out`` as they are finished, and a row that is there is not computed again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import json
import re
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SRC = Path(__file__).resolve().parent.parent / "src"
RULES = {"harmless": "prompt", "helpful": "prompt", "hh": "prompt", "ukp": "topic", "humour": "item"}
MIXED = {"hh": ("harmless", "helpful")}


def open_package() -> None:
    """Make ``corrigible.rewards`` importable, also where pydantic is missing."""
    sys.path.insert(0, str(SRC))
    try:
        import pydantic  # noqa: F401

        importlib.import_module("corrigible.events")
        return
    except ImportError:
        pass
    package = types.ModuleType("corrigible")
    package.__path__ = [str(SRC / "corrigible")]
    events = types.ModuleType("corrigible.events")
    events.track = lambda iterable, *args, **kwargs: iter(iterable)  # type: ignore[attr-defined]
    events.emit = lambda event: None  # type: ignore[attr-defined]
    events.Metric = lambda **fields: fields  # type: ignore[attr-defined]
    sys.modules["corrigible"] = package
    sys.modules["corrigible.events"] = events


# -- pairs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, eq=False)
class Pair:
    """What corrigible.store.pairs.Pair has and a reward model reads, and where it comes from."""

    dataset: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    p_chosen: float
    weight: float
    group: str
    chosen_ref: str
    rejected_ref: str
    strict: bool
    number: int


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def turns(transcript: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", transcript)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[w], "content": t.strip()} for w, t in zip(parts[1::2], parts[2::2], strict=True)]


def raw_pairs(data: Path) -> Iterator[dict[str, Any]]:
    """The four real sets, aggregated to one row per pair, oriented towards the majority."""
    for name in ("harmless", "helpful"):
        for row in rows_of(data / "hh-rlhf" / f"{name}-base_test.jsonl.gz"):
            chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            if chosen == rejected or not chosen[same:] or chosen[-1]["role"] != "assistant":
                continue
            yield {
                "dataset": name,
                "prompt": chosen[:same],
                "chosen": chosen[same:],
                "rejected": rejected[same:],
                "p": 1.0,
                "weight": 1,
                "group": "hh:" + sha(chosen[0]["content"]),
                "strict": True,
            }
    arguments = {row["arg_id"]: row for row in rows_of(data / "ukp-convarg1" / "arguments.jsonl.gz")}
    for row in rows_of(data / "ukp-convarg1" / "pairs.jsonl.gz"):
        first, second = arguments[row["arg1"]], arguments[row["arg2"]]
        votes = row["votes"]
        total = sum(votes.values())
        if first["text"] == second["text"] or not total:
            continue
        p = (votes.get("a1", 0) + 0.5 * votes.get("equal", 0)) / total
        side = [{"role": "assistant", "content": entry["text"]} for entry in (first, second)]
        if p < 0.5:
            side.reverse()
        strict = row["strict_label"]
        yield {
            "dataset": "ukp",
            "prompt": [
                {
                    "role": "user",
                    "content": f"Debate: {first['title']}\nArgue for this side: {first['stance']}",
                }
            ],
            "chosen": [side[0]],
            "rejected": [side[1]],
            "p": max(p, 1 - p),
            "weight": total,
            "group": row["topic"],
            "strict": strict is not None and p != 0.5 and (strict == "a1") == (p > 0.5),
        }
    items = {row["item_id"]: row["text"] for row in rows_of(data / "humour-pairs" / "items.jsonl.gz")}
    for row in rows_of(data / "humour-pairs" / "pairs.jsonl.gz"):
        side = [{"role": "assistant", "content": items[row[key]]} for key in ("item_a", "item_b")]
        if side[0] == side[1]:
            continue
        total = row["votes_a"] + row["votes_b"]
        p = row["votes_a"] / total
        if p < 0.5:
            side.reverse()
        yield {
            "dataset": "humour",
            "prompt": [],
            "chosen": [side[0]],
            "rejected": [side[1]],
            "p": max(p, 1 - p),
            "weight": total,
            "group": "humour",
            "strict": True,
        }


def dump(data: Path, target: Path, folds: int, seed: int) -> None:
    """Texts once, pairs by reference, and the baselines' held-out margins under the same folds."""
    texts: dict[str, list[dict[str, str]]] = {}

    def keep(messages: list[dict[str, str]]) -> str:
        key = sha(json.dumps(messages))
        texts[key] = messages
        return key

    pairs = [
        {**row, **{part: keep(row[part]) for part in ("prompt", "chosen", "rejected")}}
        for row in raw_pairs(data)
    ]
    loaded = build(pairs, texts)
    answers: dict[str, dict[str, list[float]]] = {}
    for dataset, rule in RULES.items():
        if dataset in MIXED:
            continue
        held = [pair for pair in loaded if pair.dataset == dataset]
        answers[dataset] = baseline_margins(held, rule, folds, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(target, "wt", encoding="utf-8") as out:
        for key, messages in texts.items():
            out.write(json.dumps({"text": key, "messages": messages}, ensure_ascii=False) + "\n")
        for row in pairs:
            out.write(json.dumps({"pair": row}, ensure_ascii=False) + "\n")
        out.write(json.dumps({"baselines": answers, "folds": folds, "seed": seed}) + "\n")
    print(f"{len(pairs)} pairs over {len(texts)} texts in {target} ({target.stat().st_size / 1e6:.1f} MB)")


def build(rows: list[dict[str, Any]], texts: dict[str, list[dict[str, str]]]) -> list[Pair]:
    made = {key: tuple(Message(m["role"], m["content"]) for m in messages) for key, messages in texts.items()}
    return [
        Pair(
            dataset=row["dataset"],
            prompt=made[row["prompt"]],
            chosen=made[row["chosen"]],
            rejected=made[row["rejected"]],
            p_chosen=row["p"],
            weight=float(row["weight"]),
            group=row["group"],
            chosen_ref=row["chosen"],
            rejected_ref=row["rejected"],
            strict=row["strict"],
            number=number,
        )
        for number, row in enumerate(rows)
    ]


def load(path: Path) -> tuple[list[Pair], dict[str, Any]]:
    texts: dict[str, list[dict[str, str]]] = {}
    rows: list[dict[str, Any]] = []
    rest: dict[str, Any] = {}
    for row in rows_of(path):
        if "text" in row:
            texts[row["text"]] = row["messages"]
        elif "pair" in row:
            rows.append(row["pair"])
        else:
            rest = row
    return build(rows, texts), rest


def baseline_margins(pairs: list[Pair], rule: str, folds: int, seed: int) -> dict[str, list[float]]:
    from corrigible.rewards.baselines import BASELINES
    from corrigible.rewards.splits import folds as cut

    margins: dict[str, list[float]] = {name: [] for name in BASELINES}
    for part in cut(pairs, folds, by=rule, seed=seed):
        for name, fit in BASELINES.items():
            margins[name] += [float(value) for value in fit(part.train, part.held_out, by=rule)]
    return margins


# -- models -----------------------------------------------------------------------------------------


class ChatRenderer:
    """(prompt, response) through the tokenizer's own chat template: ids, and 1 on the response's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def pair(self, prompt: tuple[Message, ...], response: tuple[Message, ...]) -> Any:
        before = [{"role": m.role, "content": m.content} for m in prompt]
        after = [{"role": m.role, "content": m.content} for m in response]
        head = self.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(before + after, tokenize=False).rstrip("\n")
        start = self.tokenizer(head, add_special_tokens=False)["input_ids"]
        rest = self.tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"]
        return types.SimpleNamespace(ids=[*start, *rest], kinds=[0] * len(start) + [1] * len(rest))


def backbone_for(config: Any, folders: dict[str, Path], device: str) -> Any:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from corrigible.rewards.backbones import Backbone

    folder = folders.get(config.backbone)
    if folder is None:
        raise SystemExit(
            f"no folder for the backbone {config.backbone!r}: pass --minilm-dir or --smollm2-dir"
        )
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    options: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    if gguf:
        import transformers

        if hasattr(transformers, "GgufConfig"):  # newer versions keep the packed blocks unless told not to
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        module = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options).model
    else:
        module = AutoModel.from_pretrained(str(folder))
    module = module.to(device=device, dtype=torch.float32)
    if config.backbone == "minilm":
        return Backbone("minilm", module, tokenizer, kind="encoder")
    if config.tune == "lora":
        import peft

        torch.manual_seed(config.seed)
        rank = config.lora_rank
        wanted = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", bias="none")
        module = peft.get_peft_model(module, wanted).get_base_model()
    return Backbone(config.backbone, module, tokenizer, kind="causal", renderer=ChatRenderer(tokenizer))


def pack_minilm(target: Path) -> None:
    """A half-precision copy of MiniLM in ``target``: small enough to carry."""
    open_package()
    import torch

    from corrigible.models import load_encoder

    encoder = load_encoder("minilm", device="cpu")
    encoder.model.to(torch.float16).save_pretrained(str(target))
    encoder.tokenizer.save_pretrained(str(target))
    print(f"{sum(path.stat().st_size for path in target.iterdir()) / 1e6:.1f} MB in {target}")


# -- the grid ---------------------------------------------------------------------------------------

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


def describe(
    dataset: str, pairs: list[Pair], margins: Any, baselines: dict[str, Any], rule: str
) -> dict[str, Any]:
    """The numbers of one dataset, and of its parts: strict pairs, and the sources of a mixed one."""
    import numpy as np

    from corrigible.rewards.report import report_margins

    slices = {dataset: range(len(pairs))}
    for source in MIXED.get(dataset, ()):
        slices[source] = [i for i, pair in enumerate(pairs) if pair.dataset == source]  # type: ignore[assignment]
    if not all(pair.strict for pair in pairs):
        slices[f"{dataset} strict"] = [i for i, pair in enumerate(pairs) if pair.strict]  # type: ignore[assignment]
    told: dict[str, Any] = {}
    for name, inside in slices.items():
        at = np.array(list(inside))
        report = report_margins(
            margins[at], [pairs[i] for i in at], {k: v[at] for k, v in baselines.items()}, by=rule, n_train=0
        )
        told[name] = {
            "accuracy": [report.accuracy.value, report.accuracy.low, report.accuracy.high],
            "n": report.accuracy.n,
            "units": report.accuracy.clusters,
            "log_loss": report.calibration.log_loss,
            "ece": report.calibration.ece,
            **{
                f"minus {key}": [r.difference.value, r.difference.low, r.difference.high]
                for key, r in report.baselines.items()
            },
            **{key: r.accuracy.value for key, r in report.baselines.items()},
        }
    return told


class Tables:
    """Frozen features by reading settings, so that configurations differing only in the head share them."""

    def __init__(self, folders: dict[str, Path], device: str) -> None:
        self.folders, self.device = folders, device
        self.held: dict[Any, Any] = {}

    def get(self, config: Any) -> Any:
        from corrigible.rewards.table import READ_BY, FeatureTable

        key = (config.backbone, *(getattr(config, name) for name in READ_BY))
        if key not in self.held:
            backbone = backbone_for(config, self.folders, self.device)
            self.held[key] = FeatureTable(backbone, config)
        return self.held[key]


@contextmanager
def one_row(out: Path | None) -> Iterator[Any]:
    def write(row: dict[str, Any]) -> None:
        text = json.dumps(row)
        print(text, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as lines:
                lines.write(text + "\n")

    yield write


def run(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from corrigible.rewards.config import RewardConfig
    from corrigible.rewards.splits import folds as cut
    from corrigible.rewards.training import fit_reward, table_margins

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    batch_tokens = args.batch_tokens or (16384 if device.startswith("cuda") else 4096)
    folders = {"minilm": args.minilm_dir, "smollm2-135m": args.smollm2_dir}
    folders = {name: folder for name, folder in folders.items() if folder is not None}
    pairs, rest = load(args.pairs)
    grid = [entry for name in args.grid for entry in GRIDS[name]]
    for text in args.config:
        grid.append(json.loads(text))
    if args.only:
        grid = [entry for entry in grid if any(part in entry["name"] for part in args.only)]
    done = set()
    if args.out is not None and args.out.is_file():
        for line in args.out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            done.add((row["dataset"], json.dumps(row["config"], sort_keys=True)))
    end = time.monotonic() + args.seconds
    tables = Tables(folders, device)
    cached: dict[str, dict[str, Any]] = {}
    with one_row(args.out) as write:
        for entry in grid:
            overrides = {key: value for key, value in entry.items() if key != "name"}
            for seed in range(args.seed, args.seed + args.seeds):
                config = RewardConfig.from_json({"batch_tokens": batch_tokens, **overrides, "seed": seed})
                for dataset in args.dataset:
                    told = {"dataset": dataset, "name": entry["name"], "config": config.to_json()}
                    told["config"] = json.loads(json.dumps(told["config"]))
                    if (dataset, json.dumps(told["config"], sort_keys=True)) in done:
                        continue
                    if time.monotonic() > end:
                        print("out of time", file=sys.stderr)
                        return
                    rule = RULES[dataset]
                    sources = MIXED.get(dataset, (dataset,))
                    held = [pair for pair in pairs if pair.dataset in sources]
                    parts = list(cut(held, args.folds, by=rule, seed=rest.get("seed", 0)))[: args.first_folds]
                    began = time.monotonic()
                    tested: list[Pair] = []
                    margins: list[Any] = []
                    epochs: list[Any] = []
                    for part in parts:
                        tested += part.held_out  # type: ignore[arg-type]
                        if config.tune == "frozen":
                            table = tables.get(config)
                            model = fit_reward(part.train, config=config, by=rule, table=table)
                            margins.append(table_margins(model, table, part.held_out))
                            epochs.append(model.history["penalty"])
                        else:
                            reader = backbone_for(config, folders, device)
                            model = fit_reward(part.train, config=config, by=rule, backbone=reader)
                            margins.append(model.margins(part.held_out))
                            best = min(
                                model.history["epochs"], key=lambda row: row.get("validation_log_loss", 9)
                            )
                            epochs.append(best["epoch"])
                    spent = time.monotonic() - began
                    baselines = held_baselines(dataset, tested, pairs, rule, rest, args, cached)
                    told["results"] = describe(dataset, tested, np.concatenate(margins), baselines, rule)
                    told |= {
                        "seconds": round(spent, 1),
                        "folds": len(parts),
                        "chosen": epochs,
                        "device": device,
                    }
                    write(told)


def held_baselines(
    dataset: str,
    tested: list[Pair],
    pairs: list[Pair],
    rule: str,
    rest: dict[str, Any],
    args: argparse.Namespace,
    cached: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The stored baselines' margins for these test pairs; none when the folds differ from the dump's."""
    import numpy as np

    from corrigible.rewards.splits import folds as cut

    if args.folds != rest.get("folds"):
        return {}
    if not cached:
        for source, answers in rest["baselines"].items():
            held = [pair for pair in pairs if pair.dataset == source]
            order = [
                p.number
                for part in cut(held, args.folds, by=RULES[source], seed=rest["seed"])
                for p in part.held_out
            ]
            for name, values in answers.items():
                cached.setdefault(name, {}).update(zip(order, values, strict=True))
    if not all(pair.number in cached["tfidf"] for pair in tested):
        return {}
    return {name: np.array([values[pair.number] for pair in tested]) for name, values in cached.items()}


def table(path: Path) -> None:
    """A readable summary of finished rows, best first per dataset."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for row in rows for name in row["results"]})
    for name in names:
        print(f"\n{name}")
        inside = [(row, row["results"][name]) for row in rows if name in row["results"]]
        for row, numbers in sorted(inside, key=lambda entry: -entry[1]["accuracy"][0]):
            value, low, high = numbers["accuracy"]
            gain = numbers.get("minus tfidf")
            beside = f"  vs tfidf {gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]" if gain else ""
            label = f"{row['name']} (on {row['dataset']}, seed {row['config']['seed']})"
            print(
                f"  {value:.3f} [{low:.3f}, {high:.3f}]{beside}  loss {numbers['log_loss']:.4f} "
                f"ece {numbers['ece']:.3f}  {row['seconds']:>6.0f} s  {label}"
            )
        base = next((numbers for _, numbers in inside if "tfidf" in numbers), None)
        if base:
            print(
                f"  length {base['length']:.3f}, tfidf {base['tfidf']:.3f}, "
                f"{base['n']} pairs, {base['units']} units"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with hh-rlhf, ukp-convarg1 and humour-pairs (for --dump)"
    )
    parser.add_argument("--dump", type=Path, help="write the portable pairs file and stop")
    parser.add_argument("--pack-minilm", type=Path, help="write a half-precision copy of MiniLM and stop")
    parser.add_argument("--pairs", type=Path, help="the portable pairs file")
    parser.add_argument("--minilm-dir", type=Path)
    parser.add_argument("--smollm2-dir", type=Path, help="safetensors folder, or one that holds a .gguf")
    parser.add_argument("--grid", nargs="*", default=[], choices=sorted(GRIDS))
    parser.add_argument(
        "--config", action="append", default=[], help='JSON: {"name": ..., settings of RewardConfig}'
    )
    parser.add_argument(
        "--only", nargs="*", default=[], help="keep configurations whose name contains one of these"
    )
    parser.add_argument(
        "--dataset", nargs="*", default=["harmless", "helpful", "ukp", "humour"], choices=sorted(RULES)
    )
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--first-folds", type=int, default=None, help="run only this many of the folds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no new row after this long"
    )
    parser.add_argument("--batch-tokens", type=int, default=None, help="16384 on a GPU, 4096 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append rows here as they are finished")
    parser.add_argument("--table", type=Path, help="print a summary of finished rows and stop")
    args = parser.parse_args()
    open_package()
    if args.table:
        table(args.table)
    elif args.pack_minilm:
        pack_minilm(args.pack_minilm)
    elif args.dump:
        if args.data is None:
            parser.error("--dump needs --data")
        dump(args.data, args.dump, args.folds, args.seed)
    elif args.pairs and (args.grid or args.config):
        run(args)
    else:
        parser.error("give --dump with --data, --pack-minilm, --table, or --pairs with --grid or --config")


if __name__ == "__main__":
    main()
