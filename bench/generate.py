"""Sampling against transformers' own ``generate``: SmolLM2-135M, bfloat16, temperature 1, real prompts.

    python -m bench.generate --case equal --runs 5
    python -m bench.generate --case uneven
    python -m bench.generate --case group8

* ``equal``: 32 prompts of 64 tokens, 128 new tokens each, none stops early.
* ``uneven``: 96 prompts as long as they are, an answer ends where the model ends it (at most 192 tokens),
  32 at a time. transformers runs three batches of 32, each until its longest answer ends.
* ``group8``: 8 answers to each of 4 prompts of 64 tokens, 128 new tokens each. transformers gets
  ``num_return_sequences=8``.

Counted are the new tokens of answers, up to their end. Both sides sample from the same distribution with
their own random numbers, alternately within each run. What only this side gives (log-probs of every
token under two distributions, text that does not depend on the batch) is in its time. The bound is the
products of the weights alone, laid out beforehand: once over the prompts' tokens (each prompt once, whatever
prompts have in common), and once for every step, as many as a full table of rows would need. A second bound
leaves the prompts out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench.matmul import best
from bench.pairs import real_batches

from corrigible.models import LanguagePolicy, Rendered, RolloutEngine, load_policy
from corrigible.records import Sampling

CASES = {"equal": (32, 1, 128, False), "uneven": (96, 1, 192, True), "group8": (4, 8, 128, False)}
"""Prompts, answers to each, new tokens at most, and whether an answer may end by itself."""

SLOTS = 32


def prompts_for(policy: LanguagePolicy, count: int, equal: bool, data: Path | None) -> list[list[int]]:
    """Token ids of real prompts; with ``equal`` their last 64 tokens, of prompts that have as many."""
    groups = [g for batch in real_batches(policy.renderer, data=data, batches=40) for g in batch]
    found = [list(group.prompt) for group in groups]
    if equal:
        found = [ids[-64:] for ids in found if len(ids) >= 64]
    return found[:count]


def theirs(policy: LanguagePolicy, prompts: list[list[int]], n: int, most: int, ends: bool) -> int:
    """transformers' ``generate`` in batches of :data:`SLOTS`; returns the new tokens."""
    pad = policy.tokenizer.pad_token_id or 0
    eos = list(policy.end_ids)
    new = 0
    for start in range(0, len(prompts), SLOTS // n):
        batch = prompts[start : start + SLOTS // n]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with torch.inference_mode():
            out = policy.network.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                num_return_sequences=n,
                max_new_tokens=most,
                min_new_tokens=None if ends else most,
                eos_token_id=eos,
                pad_token_id=pad,
            )
        for row in out[:, width:].tolist():
            stop = next((i + 1 for i, token in enumerate(row) if ends and token in eos), len(row))
            new += stop
    return new


def ours(engine: RolloutEngine, prompts: list[list[int]], n: int, most: int, seed: int) -> int:
    """The rollout engine; returns the new tokens."""
    rendered = [Rendered.from_tokens(ids, ()) for ids in prompts]
    answers = engine.generate(
        rendered, n=n, sampling=Sampling(temperature=1.0, max_tokens=most, n=n), seed=seed
    )
    return sum(len(answer.ids) for group in answers for answer in group)


def bound(policy: LanguagePolicy, rows: int, *, head: bool, repeats: int = 8) -> float:
    """Seconds of the weights' products on ``rows`` tokens; with the output layer or not."""
    from corrigible.models.decode import FusedLinear

    products = []
    for layer in policy.network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ):
            products.append(FusedLinear(modules, policy.dtype))
    if head:
        products.append(FusedLinear([policy.network.get_output_embeddings()], policy.dtype))
    inputs = {p.inputs: torch.randn(rows, p.inputs).to(policy.dtype) for p in products}
    with torch.inference_mode():
        return best(lambda: [product(inputs[product.inputs]) for product in products], repeats)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    count, n, most, ends = CASES[options.case]
    if options.quick:
        count, most = max(1, count // 8), 8
    policy = load_policy("smollm2-135m", dtype="bfloat16", device="cpu")
    prompts = prompts_for(policy, count, not ends, options.data)
    engine = RolloutEngine(policy, slots=SLOTS)
    if not ends:
        engine.policy.renderer.end_of_turn_ids = ()
    warm = prompts[:2]
    theirs(policy, warm, n, 4, ends)
    ours(engine, warm, n, 4, 0)
    rates: dict[str, list[float]] = {"transformers": [], "corrigible": []}
    made: list[int] = []
    for run in range(options.runs):
        torch.manual_seed(run)
        began = time.perf_counter()
        new = theirs(policy, prompts, n, most, ends)
        rates["transformers"].append(new / (time.perf_counter() - began))
        began = time.perf_counter()
        new = ours(engine, prompts, n, most, run)
        rates["corrigible"].append(new / (time.perf_counter() - began))
        made.append(new)
    ratios = sorted(b / a for a, b in zip(rates["transformers"], rates["corrigible"], strict=True))
    step = bound(policy, SLOTS, head=True)
    reading = bound(policy, 2048, head=False, repeats=3) / 2048 * sum(map(len, prompts))
    new = statistics.median(made)
    limits = {"bound": new / (new / SLOTS * step + reading), "bound_without_prompts": SLOTS / step}
    print(
        json.dumps(
            {
                "ratio": statistics.median(ratios),
                "low": ratios[0],
                "high": ratios[-1],
                "runs": options.runs,
                "measures": {
                    **{
                        f"{side}_tokens_per_second": {
                            "median": statistics.median(values),
                            "low": min(values),
                            "high": max(values),
                        }
                        for side, values in rates.items()
                    },
                    **{
                        f"{name}_tokens_per_second": dict.fromkeys(("median", "low", "high"), limit)
                        for name, limit in limits.items()
                    },
                    **{
                        f"{name}_over_corrigible": {
                            "median": limit / statistics.median(rates["corrigible"]),
                            "low": limit / max(rates["corrigible"]),
                            "high": limit / min(rates["corrigible"]),
                        }
                        for name, limit in limits.items()
                    },
                },
            }
        )
    )


if __name__ == "__main__":
    main()
