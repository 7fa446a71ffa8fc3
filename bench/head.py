"""The output layer and its log-probabilities alone, forward and backward, against TRL 1.16's.

    python -m bench.head --runs 5

SmolLM2's shapes (width 576, vocabulary 49,152) in bfloat16, with gradients for states and weight. TRL off
CUDA scores every position and masks afterwards; here only trained positions reach the output layer. The
headline is a real batch done by each in its own way (``--share`` of ``--positions`` are trained; the
default is the share of DPO batches of HH-RLHF, prompts not shared). The measures say what the same
positions take on both sides, and what the matrix products alone take that none can avoid: the logits,
the gradient of the states, and the gradient of the weight.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from bench.matmul import best, seconds
from torch import Tensor

from corrigible.models.head import score

WIDTH, VOCABULARY = 576, 49_152


def trl_stage(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's head: what its DPO trainer calls on a CPU."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    found: Tensor = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0]
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.35, help="of the positions that are trained")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    positions = 64 if options.quick else options.positions
    trained = max(1, round(options.share * positions))
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH).bfloat16().requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.05).bfloat16().requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,))
    slope = torch.randn(positions)
    kept = slice(0, trained)

    def ours(at: slice) -> None:
        found = score(hidden[at], weight, targets[at]).logprobs
        torch.autograd.grad((found * slope[at]).sum(), (hidden, weight))

    def theirs(at: slice) -> None:
        found = trl_stage(hidden[at], weight, targets[at])
        torch.autograd.grad((found * slope[at]).sum(), (hidden, weight))

    with torch.no_grad():
        ours_values = score(hidden[kept], weight, targets[kept]).logprobs
        difference = float((ours_values - trl_stage(hidden[kept], weight, targets[kept])).abs().max())
    everything = slice(0, positions)
    rows = []
    for _ in range(options.runs):  # alternately, so that a slow minute slows both
        rows.append(
            {
                "trl_all_positions_s": min(seconds(lambda: theirs(everything), 1)),
                "ours_trained_positions_s": min(seconds(lambda: ours(kept), 1)),
                "ours_all_positions_s": min(seconds(lambda: ours(everything), 1)),
                "trl_trained_positions_s": min(seconds(lambda: theirs(kept), 1)),
            }
        )
    x, w, g = hidden.detach()[kept], weight.detach(), torch.randn(trained, VOCABULARY).bfloat16()

    def unavoidable() -> None:
        torch.mm(x, w.T)
        torch.mm(g, w)
        torch.mm(g.T, x)

    floor = best(unavoidable)
    ratios = sorted(row["trl_all_positions_s"] / row["ours_trained_positions_s"] for row in rows)
    same = sorted(row["trl_all_positions_s"] / row["ours_all_positions_s"] for row in rows)
    over = sorted(row["ours_trained_positions_s"] / floor for row in rows)
    measures = {key: _spread([row[key] for row in rows]) for key in rows[0]}
    measures["same_positions_ratio"] = _spread(same)
    measures["ours_over_unavoidable_products"] = _spread(over)
    print(
        json.dumps(
            {
                "ratio": statistics.median(ratios),
                "low": ratios[0],
                "high": ratios[-1],
                "runs": options.runs,
                "measures": measures,
                "labels": {
                    "positions": f"{positions}, of which {trained} trained",
                    "largest difference of a log-prob": f"{difference:.2g} nats",
                },
            }
        )
    )


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
