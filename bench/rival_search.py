"""Which setting of TRL is the fastest here: every candidate in a process of its own, on the same batches.

    python -m bench.rival_search --algorithm dpo --steps 2

The winner among those that train belongs into ``SETTINGS["fastest"]`` of :mod:`bench.rival_settings`. A
candidate is a list of changes to TRL's defaults, each added to those that are expected to help.

Not candidates, and why:

* ``use_liger_kernel`` and ``use_kernels`` need Triton, vLLM and DeepSpeed a GPU.
* An option that turns DPO's, KTO's or GRPO's chunked head off: TRL 1.16 has none; it is always on.
* ``dataloader_num_workers``, ``dataset_num_proc``: nothing is loaded or tokenised while the clock runs.
* ``max_length`` below 512, ``steps_per_generation`` above the accumulation: another computation.
* For KTO, ``micro_batch``: its KL estimate is taken within a forward pass, so its loss would change.
* For GRPO, sorting by length within ``micro_batch``: TRL shuffles the rows of a generation batch and keeps
  its padding, so a smaller forward pass saves memory only. It is tried all the same.

``weights=bfloat16`` is tried and timed, but is no working setting for full fine-tuning: TRL keeps no
float32 masters, and a step of 1e-6 is below the resolution of most bfloat16 weights (8 bits: 4e-3 of the
weight), so most of them never move. ``moved`` in the table says how far the loss has got from the
default's on the last batch; with such a setting it is the loss of the untrained model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence

from bench.prepared import prepare
from bench.process import ALGORITHMS, Measurement, run

NO_RECOMPUTE = "gradient_checkpointing=false"
PLAIN = (NO_RECOMPUTE,)
REFERENCED = ("precompute_reference=true", NO_RECOMPUTE)
SMALL = (NO_RECOMPUTE, "micro_batch=2")
REFERENCED_SMALL = (*REFERENCED, "micro_batch=2")
BFLOAT16 = ("weights=bfloat16", "autocast=false")

CANDIDATES: dict[str, tuple[tuple[str, ...], ...]] = {
    "dpo": (
        (),
        ("precompute_reference=true",),
        REFERENCED,
        (*REFERENCED, "micro_batch=4"),
        REFERENCED_SMALL,
        (*REFERENCED, "micro_batch=1"),
        (*REFERENCED_SMALL, "attention=eager"),
        (*REFERENCED_SMALL, "optimiser=adamw_torch"),
        (*REFERENCED_SMALL, "compile=true"),
        (*REFERENCED_SMALL, "padding_free=true"),
        (*REFERENCED_SMALL, "offload=true"),
        (*REFERENCED_SMALL, "autocast=false"),
        (*REFERENCED_SMALL, "weights=bfloat16"),
        (*REFERENCED_SMALL, *BFLOAT16),
    ),
    "reward": (
        (),
        PLAIN,
        (*PLAIN, "micro_batch=4"),
        SMALL,
        (*PLAIN, "micro_batch=1"),
        (*SMALL, "attention=eager"),
        (*SMALL, "optimiser=adamw_torch"),
        (*SMALL, "compile=true"),
        (*SMALL, *BFLOAT16),
    ),
    "kto": (
        (),
        ("precompute_reference=true",),
        REFERENCED,
        (*REFERENCED, "attention=eager"),
        (*REFERENCED, "compile=true"),
        (*REFERENCED, *BFLOAT16),
    ),
    "grpo": (
        (),
        PLAIN,
        (*PLAIN, "micro_batch=8"),
        (*PLAIN, "micro_batch=4"),
        (*PLAIN, "micro_batch=2"),
        (*PLAIN, "attention=eager"),
        (*PLAIN, "compile=true"),
        (*PLAIN, *BFLOAT16),
    ),
}
"""Changes to TRL's defaults that were tried, by algorithm."""


def search(
    algorithm: str,
    *,
    steps: int,
    model: str = "smollm2-135m",
    data: str | None = None,
    precision: str = "bf16",
    timeout: float = 3600.0,
) -> list[dict[str, object]]:
    """One row a candidate, fastest first; a candidate that fails comes last and says why."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder:
        prepared = prepare(folder, model=model, batches=steps + 1, data=data)
        default: Measurement | None = None
        for changes in CANDIDATES[algorithm]:
            arguments = ["--algorithm", algorithm, "--prepared", str(prepared.folder), "--json"]
            arguments += ["--steps", str(steps), "--precision", precision]
            for assignment in changes:
                arguments += ["--set", assignment]
            row: dict[str, object] = {"setting": " ".join(changes) or "default"}
            try:
                found = run("bench.rival", arguments, timeout=timeout)
            except (RuntimeError, OSError) as error:
                row["failed"] = str(error).strip().splitlines()[-1][:200]
            except subprocess.TimeoutExpired:
                row["failed"] = f"not done after {timeout:.0f} s"
            else:
                default = default or found
                row |= {
                    "tokens_per_second": round(found.tokens_per_second(), 1),
                    "peak_rss_mb": round(found.peak_rss_mb),
                    "last_loss": round(found.losses[-1], 6),
                    "moved": round(abs(found.losses[-1] - default.losses[-1]), 6),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return sorted(rows, key=lambda row: -float(str(row.get("tokens_per_second", 0.0))))


def fair(row: dict[str, object]) -> bool:
    """Whether a row ran, at the precision of the comparison: float32 weights, bfloat16 products."""
    setting = str(row["setting"])
    return "failed" not in row and "weights=bfloat16" not in setting and "autocast=false" not in setting


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench.rival_search``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="dpo")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each (default 2)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--data", help="folder with hh-rlhf/")
    options = parser.parse_args(arguments)
    rows = search(
        options.algorithm,
        steps=options.steps,
        model=options.model,
        data=options.data,
        precision=options.precision,
    )
    for what, fit in (
        ("of all", rows),
        ("of those that train in mixed precision", [r for r in rows if fair(r)]),
    ):
        print(f"fastest {what}: {fit[0]['setting']}")


if __name__ == "__main__":
    main()
