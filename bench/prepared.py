"""What both sides read: one folder with the weights and the tokens, made before anything is measured.

::

    model/               weights rounded to bfloat16 once, so that a float32 and a bfloat16 copy agree
    adapter/             a fresh LoRA adapter, the same start for both
    score.safetensors    the reward model's first head, (hidden,)
    tokens.json          the batches

Rendering, converting and rounding happen in the process that calls :func:`prepare`, never in one whose
memory and time are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.pairs import Group, as_json, from_json, real_batches, synthetic_batches
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from corrigible.models import load_policy

HEAD_SCALE = 0.02
"""Standard deviation of the reward head's first weights, as in Llama's configuration."""


@dataclass(frozen=True)
class Prepared:
    """A folder that :func:`prepare` wrote."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def batches(self) -> list[list[Group]]:
        """The batches of groups, in the order of the steps."""
        return from_json((self.folder / "tokens.json").read_text(encoding="utf-8"))

    def score(self) -> torch.Tensor:
        """The reward head's first weights, ``(hidden,)`` float32."""
        return load_file(self.folder / "score.safetensors")["score"]


@dataclass(frozen=True)
class Shape:
    """The shape of synthetic batches; see :func:`bench.pairs.synthetic_batches`."""

    prompt_share: float
    group_size: int
    rows: int = 16
    row_tokens: int = 256


def prepare(
    folder: str | Path,
    *,
    model: str = "smollm2-135m",
    batches: int,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    data: str | Path | None = None,
    shape: Shape | None = None,
    weights_of: Prepared | None = None,
) -> Prepared:
    """Write the folder that both sides read.

    Args:
        folder: where to; made when absent.
        model: what :func:`corrigible.models.load_policy` takes.
        batches, batch_size, max_length, seed, data: of the real pairs; see
            :func:`bench.pairs.real_batches`.
        shape: synthetic batches of this shape instead of real pairs.
        weights_of: take the weights of another prepared folder instead of writing them again.

    Raises:
        MissingError: the model or the data is not here.
    """
    prepared = Prepared(Path(folder).resolve())
    prepared.folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    policy = load_policy(weights_of.model if weights_of else model, dtype="bfloat16", device="cpu")
    if weights_of is None:
        policy.save_full(prepared.model)
        hidden = int(policy.network.config.hidden_size)
        score = torch.randn(hidden, generator=torch.Generator().manual_seed(seed)) * HEAD_SCALE
        save_file({"score": score.to(torch.bfloat16).float()}, prepared.folder / "score.safetensors")
    else:
        for name in ("model", "adapter", "score.safetensors"):
            (prepared.folder / name).symlink_to(weights_of.folder / name)
    groups: Sequence[Sequence[Group]]
    if shape is None:
        groups = real_batches(
            policy.renderer,
            data=data,
            batches=batches,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
        )
    else:
        groups = synthetic_batches(
            int(policy.network.config.vocab_size),
            batches=batches,
            rows=shape.rows,
            row_tokens=shape.row_tokens,
            prompt_share=shape.prompt_share,
            group_size=shape.group_size,
            seed=seed,
        )
    (prepared.folder / "tokens.json").write_text(as_json(groups), encoding="utf-8")
    if weights_of is None:
        policy.add_lora(seed=seed)
        policy.save_adapter(prepared.adapter)
    return prepared
