"""DPO from pairs to a policy version, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from corrigible.align.config import TrainConfig
from corrigible.align.registry import DPOConfig
from corrigible.align.training import train
from corrigible.models import LanguagePolicy
from corrigible.records import PolicyVersion
from corrigible.store import Pair, Store


def train_dpo(
    pairs: Iterable[Pair] | Store,
    model: str | Path | LanguagePolicy = "smollm2-135m",
    *,
    out: str | Path,
    config: TrainConfig | None = None,
    dpo: DPOConfig | None = None,
    lora_rank: int | None = 16,
    max_length: int = 512,
    held_out: Sequence[Pair] = (),
    split: str = "auto",
    name: str | None = None,
    parent: str | None = None,
    store: Store | None = None,
    invalid: Literal["raise", "skip"] = "skip",
    resume: bool = False,
    resume_hint: str = "Run it again with resume=True to go on from there.",
) -> PolicyVersion:
    """Train a policy on comparisons with DPO: :func:`~corrigible.align.training.train` with its settings.

    Args:
        pairs: what to learn from, or a store whose live comparisons to learn from.
        dpo: the loss's settings.

    The other arguments, the result and the errors are those of ``train``.
    """
    return train(
        "dpo",
        pairs,
        model,
        out=out,
        config=config,
        algorithm_config=dpo,
        lora_rank=lora_rank,
        max_length=max_length,
        held_out=held_out,
        split=split,
        name=name,
        parent=parent,
        store=store,
        invalid=invalid,
        resume=resume,
        resume_hint=resume_hint,
    )
