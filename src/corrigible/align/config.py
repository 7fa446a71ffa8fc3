"""The trainer's settings and what follows from them alone: the learning rate of every step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from corrigible.align.schedules import Schedule, warmed_up
from corrigible.models.optimiser import MasterWeights, Moments

ReferenceMode = Literal["start", "base"]


class TrainConfig(BaseModel):
    """Settings of the trainer, the same for every algorithm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: float = Field(1.0, gt=0, description="Passes over the data; ignored when `steps` is given.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        16, ge=1, description="Examples (pairs, judged answers, groups) in one optimiser step."
    )
    micro_batch_tokens: int = Field(
        1024,
        ge=1,
        description="Most tokens in one forward pass, padding included: bounds memory (about 1 MB a token "
        "for SmolLM2 with LoRA in bfloat16, 1.5 in float32); larger passes are quicker, and nothing else "
        "changes. A larger pair is a pass of its own.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute each layer again in the backward pass instead of keeping it: about half a "
        "pass's memory for a third more time.",
    )
    lr: float = Field(
        1e-4, gt=0, description="Peak learning rate; about 1e-4 for LoRA, 1e-6 for full fine-tuning."
    )
    schedule: Schedule = Field(
        "linear",
        description="Decay of the learning rate after warm-up: `constant`, `linear`, `cosine`, `step` (a "
        "tenth from the middle on, a hundredth in the last quarter), `exponential`, `inverse_sqrt`, `uba`.",
    )
    schedule_floor: float = Field(
        0.0,
        ge=0,
        le=1,
        description="What the decay falls to one step after the last, as a share of the peak; 0.01 stands "
        "for 0 in `exponential`.",
    )
    phi: float = Field(
        2.5,
        gt=0,
        description="Shape of the `uba` schedule: 2 is the cosine, less holds the rate high and drops late, "
        "more falls early.",
    )
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the steps over which the rate rises from 0.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    master_weights: MasterWeights = Field(
        "split",
        description="How the exact float32 values of bfloat16 weights are kept: in 2 bytes beside each "
        "(split), in 4 (float32), or not at all, with each step rounded at random (stochastic).",
    )
    moments: Moments = Field(
        "float32", description="Precision of AdamW's two moments: 8 bytes a weight, or 4 in bfloat16."
    )
    shard: Literal["nothing", "optimiser"] = Field(
        "nothing",
        description="What several processes (torchrun) share out, where each would hold all of it: `nothing` "
        "or the masters and moments of the `optimiser`, of which each of n processes then holds about 1/n.",
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients longer than this are scaled down to it.")
    reference: ReferenceMode = Field(
        "start",
        description="What the policy is held near: itself at the `start`, or its `base` without adapter.",
    )
    reuse_reference: bool = Field(
        False,
        description="Take reference log-probs over from an earlier run with the same policy, rows and "
        "settings, and leave them for later ones, in the cache folder.",
    )
    share_prompts: bool = Field(
        True, description="Compute a prompt once for all its responses, where the model allows it."
    )
    seed: int = Field(0, ge=0, description="Of anything random while training.")
    checkpoint_every: int = Field(25, ge=1, description="Steps between checkpoints.")


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``: linear warm-up, then the schedule.

    The first step already moves, and so does the last: the decay reaches its end one step after it
    (:mod:`corrigible.align.schedules`).
    """
    warmup = math.ceil(config.warmup * total) if config.warmup else 0
    return warmed_up(
        step,
        total,
        peak=config.lr,
        warmup=warmup,
        schedule=config.schedule,
        floor=config.schedule_floor,
        phi=config.phi,
    )
