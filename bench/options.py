"""The command line that both sides of a comparison share."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.prepared import Prepared, prepare
from bench.process import ALGORITHMS, Training


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that both sides of a comparison take."""
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="dpo")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default 1)")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--lora", action="store_true", help="a LoRA adapter instead of all weights")
    parser.add_argument("--prepared", help="a folder of bench.prepared; made anew when absent")
    parser.add_argument("--model", default="smollm2-135m", help="when nothing is prepared")
    parser.add_argument("--data", help="folder with hh-rlhf/ (default: CORRIGIBLE_DATA, ../shared/data)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change an option")
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def as_training(options: argparse.Namespace) -> Training:
    """The :class:`Training` that a command line asks for."""
    return Training(
        algorithm=options.algorithm,
        steps=options.steps,
        warmup=options.warmup,
        lr=options.lr,
        precision=options.precision,
        lora=options.lora,
    )


@contextmanager
def prepared_for(options: argparse.Namespace) -> Iterator[Prepared]:
    """The folder that is named, or one made for this run (whose memory then counts: name one to measure)."""
    if options.prepared:
        yield Prepared(Path(options.prepared).resolve())
        return
    with tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder:
        yield prepare(folder, model=options.model, batches=options.steps + options.warmup, data=options.data)
