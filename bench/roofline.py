"""How much of this machine's measured matmul rate a whole update reaches, and where the rest goes.

    python -m bench.roofline --runs 5

A DPO update of SmolLM2-135M (all weights, reference computed beforehand) on real HH-RLHF pairs that fill
about ``--tokens`` packed tokens. Counted are the products that the mathematics asks for on those tokens:
forward once and backward twice through every layer and, on scored positions, the output layer, and the
products of attention. Nothing that is computed again is counted twice. The yardstick is the best
square product in bfloat16 of this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench.matmul import matmul_rate
from bench.ours import GivenExamples, _pair
from bench.pairs import real_batches

from corrigible.align import TrainConfig, Trainer, get_algorithm
from corrigible.models import LanguagePolicy, load_policy
from corrigible.models.packing import Packed, pack


def products(policy: LanguagePolicy, packed: Packed) -> dict[str, float]:
    """FLOPs of the products of one forward and backward pass over a pack, by part."""
    config = policy.network.config
    layers = policy.network.model.layers
    body = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)
    pairs = 0.0  # of a query and a key that it sees
    for node in packed.nodes:
        own, below = node.end - node.start, node.below - node.end
        pairs += own * (own + 1) / 2 + below * own
    size = policy.network.model.layers[0].self_attn.head_dim * config.num_attention_heads
    return {
        "layers": 6.0 * body * len(packed),
        "output layer": 6.0 * config.vocab_size * config.hidden_size * len(packed.targets),
        "attention": 12.0 * pairs * size * len(layers),
    }


def as_trained(policy: LanguagePolicy, rows: list[Any]) -> Packed:
    """The pack that the trainer makes of pairs: a pair shares its prompt, all the template's preamble."""
    return pack(rows, groups=[2] * (len(rows) // 2), preamble=policy.renderer.preamble)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    policy = load_policy("smollm2-135m", dtype="bfloat16", device="cpu")
    groups = [g for batch in real_batches(policy.renderer, data=options.data, batches=8) for g in batch]
    rows: list[Any] = []
    chosen = []
    budget = 256 if options.quick else options.tokens
    for group in groups:
        pair = _pair(group)
        if len(as_trained(policy, [*rows, *pair.rows])) <= budget:
            rows += pair.rows
            chosen.append(pair)
    packed = as_trained(policy, rows)
    source = GivenExamples("pairs", [chosen] * (options.runs + 2))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            steps=options.runs + 2, batch_size=len(chosen), lr=1e-6, micro_batch_tokens=1 << 20
        )
        trainer = Trainer(policy, get_algorithm("dpo"), source, config, out=Path(folder))
        trainer._prepare_reference()
        trainer._step(0)
        times = []
        for step in range(options.runs):
            began = time.perf_counter()
            trainer._step(step + 1)
            times.append(time.perf_counter() - began)
        table = breakdown(trainer, options.runs + 1)
    rate = matmul_rate(torch.bfloat16)
    parts = products(policy, packed)
    work = sum(parts.values())
    shares = sorted(work / seconds / rate for seconds in times)
    print(
        json.dumps(
            {
                "ratio": statistics.median(shares),
                "low": shares[0],
                "high": shares[-1],
                "runs": options.runs,
                "measures": {
                    "step_seconds": {
                        "median": statistics.median(times),
                        "low": min(times),
                        "high": max(times),
                    },
                    "matmul_tflops": dict.fromkeys(("median", "low", "high"), rate / 1e12),
                },
                "labels": {
                    "tokens": f"{len(packed)} packed ({packed.rows_tokens} row by row), "
                    f"{len(packed.targets)} scored, {len(chosen)} pairs",
                    "products": ", ".join(
                        f"{name} {value / 1e12:.3f} TFLOP" for name, value in parts.items()
                    ),
                },
                "table": table,
            }
        )
    )


def breakdown(trainer: Trainer, step: int) -> list[dict[str, object]]:
    """Where one step's time goes, by kind of operation, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer._step(step)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        kinds[_kind(event.key)] += event.self_cpu_time_total / 1e6
    total = sum(kinds.values())
    return [
        {"part": kind, "seconds": round(seconds, 3), "share": round(seconds / total, 3)}
        for kind, seconds in sorted(kinds.items(), key=lambda entry: -entry[1])
    ]


def _kind(name: str) -> str:
    for kind, words in (
        ("matrix products", ("::mm", "::addmm", "::linear", "mkldnn", "::bmm", "::matmul")),
        ("attention", ("flash_attention",)),
        ("optimiser", ("adam", "foreach", "Optimizer", "clip_grad")),
        ("embedding", ("embedding", "index_select", "index_put", "gather")),
        ("softmax over the vocabulary", ("::exp", "::amax", "::logsumexp", "::log")),
        ("copies and casts", ("copy_", "::to", "::cat", "::clone", "contiguous")),
        (
            "element by element",
            ("::mul", "::add", "::silu", "::sub", "::div", "addcmul", "norm", "::sum", "mean"),
        ),
    ):
        if any(word in name for word in words):
            return kind
    return "everything else"


if __name__ == "__main__":
    main()
