"""How TRL may be set, as a user runs it and as fast as it goes; see :mod:`bench.rival`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from bench.process import ALGORITHMS

from corrigible.errors import BadInputError


@dataclass(frozen=True)
class Setting:
    """How TRL is set; the defaults here are TRL's.

    Attributes:
        precompute_reference: ``precompute_ref_log_probs``: the reference once, before training.
        gradient_checkpointing: compute activations again in the backward pass.
        micro_batch: pairs (DPO, reward model) or rows (KTO, GRPO) in one forward pass; 0 for the whole
            batch. The rest of the batch is accumulated. Rows are then sorted by length within the batch,
            which is all that grouping by length can do for a given batch.
        weights: dtype the model is loaded in: ``"float32"`` or ``"bfloat16"``.
        autocast: bf16 mixed precision.
        attention: ``attn_implementation``; empty for transformers' choice (sdpa).
        optimiser: ``optim``; empty for transformers' choice (adamw_torch_fused).
        compile: ``torch_compile``.
        offload: ``activation_offloading``.
        padding_free: ``padding_free``, DPO only.
    """

    precompute_reference: bool = False
    gradient_checkpointing: bool = True
    micro_batch: int = 0
    weights: str = "float32"
    autocast: bool = True
    attention: str = ""
    optimiser: str = ""
    compile: bool = False
    offload: bool = False
    padding_free: bool = False


SETTINGS: dict[str, dict[str, Setting]] = {
    "default": {name: Setting() for name in ALGORITHMS},
    "fastest": {
        "dpo": Setting(precompute_reference=True, gradient_checkpointing=False, micro_batch=1),
        "reward": Setting(gradient_checkpointing=False, micro_batch=4),
        # Without checkpointing and with eager attention a batch of medium length is a twentieth quicker, but
        # of the benchmark's five batches one takes more than 23.7 GB then.
        "kto": Setting(precompute_reference=True),
        "grpo": Setting(gradient_checkpointing=False, micro_batch=2),
    },
}


def change(setting: Setting, assignments: Sequence[str]) -> Setting:
    """``setting`` with ``NAME=VALUE`` assignments applied.

    Raises:
        BadInputError: a name or a value that is none.
    """
    kinds = {field.name: type(getattr(setting, field.name)) for field in fields(setting)}
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in kinds:
            raise BadInputError(f"TRL's setting has no {name!r}.", advice=f"It has: {', '.join(kinds)}.")
        if kinds[name] is bool:
            if text.lower() not in ("true", "false"):
                raise BadInputError(f"{name} is true or false, not {text!r}.")
            changes[name] = text.lower() == "true"
        else:
            try:
                changes[name] = kinds[name](text)
            except ValueError as error:
                raise BadInputError(f"{name}: {error}") from error
    return replace(setting, **changes)
