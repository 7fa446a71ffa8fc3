"""Corrigible's update step on the same prepared tokens as :mod:`bench.rival`.

    python -m bench.ours --algorithm dpo --steps 5
    python -m bench.ours --algorithm dpo --set micro_batch_tokens=2048 --json

What is timed is a step of :class:`corrigible.align.Trainer`, from the batch to the updated weights, with
its checks and metrics; writing checkpoints and the metrics file is left out, as it is for TRL. Losses are
the ones the trainer reports.

Same as TRL: the batches, the loss, AdamW and its settings, gradient clipping, the start (weights rounded
to bfloat16 once; adapter; reward head). Different, and stated with the results:

* Precision. Weights are bfloat16 with float32 masters for the optimiser; TRL keeps float32 weights and
  casts them to bfloat16 at every product. The products read the same bits; what lies between them
  (residual stream, norms) is float32 in TRL's default and bfloat16 here.
* The reference is computed once, before the first step, whatever TRL does. ``reference_seconds`` says what
  that took, and :mod:`bench.update` adds its share to every step when TRL computes it in every step.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench.options import add_common_options, as_training, prepared_for
from bench.pairs import Group
from bench.prepared import Prepared
from bench.process import Measurement, Training, forget_peak, peak_rss_mb, recent_peak_rss_mb, report
from torch import nn

from corrigible.align import TrainConfig, Trainer, get_algorithm
from corrigible.align.advantages import group_advantages
from corrigible.align.groups import GroupExample
from corrigible.align.reference import micro_batches
from corrigible.align.sources import PairExample, row_key
from corrigible.align.unpaired import UnpairedExample
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, Rendered, load_policy
from corrigible.models.scoring import Scorer
from corrigible.rewards.losses import bradley_terry_loss

Batches = Sequence[Sequence[Group]]


@dataclass
class Update:
    """One side's training, step by step.

    Attributes:
        step: does step ``number`` (from 0) and returns the batch's loss before it.
        reference_seconds: what the reference took before the first step.
        options: how it is set.
    """

    step: Callable[[int], float]
    reference_seconds: float
    options: dict[str, Any]


class GivenExamples:
    """Prepared examples as a source of the trainer: batch ``k`` is step ``k``'s."""

    def __init__(self, kind: str, batches: Sequence[Sequence[Any]]) -> None:
        self.kind = kind
        self.batches = batches
        self.examples = [example for batch in batches for example in batch]

    def __len__(self) -> int:
        return len(self.examples)

    def steps_per_epoch(self, batch_size: int) -> int:
        return len(self.batches)

    def batch(self, step: int, batch_size: int) -> list[Any]:
        return list(self.batches[step])

    def digest(self) -> str:
        rows = (row_key(row) for example in self.examples for row in example.rows)
        return hashlib.sha256(b"".join(rows)).hexdigest()

    def derived_from(self) -> list[str]:
        return []


def dpo(
    policy: LanguagePolicy,
    batches: Sequence[Sequence[Group]],
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
) -> Update:
    """DPO through the one trainer."""
    source = GivenExamples("pairs", [[_pair(group) for group in batch] for batch in batches])
    return _through_trainer("dpo", policy, source, config, out)


def kto(
    policy: LanguagePolicy,
    batches: Sequence[Sequence[Group]],
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
) -> Update:
    """KTO through the one trainer: desirable answers first, as :mod:`bench.rival` gives them to TRL."""
    source = GivenExamples("unpaired", [_unpaired(batch) for batch in batches])
    return _through_trainer("kto", policy, source, config, out)


def grpo(
    policy: LanguagePolicy,
    batches: Sequence[Sequence[Group]],
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
) -> Update:
    """GRPO through the one trainer; behaviour log-probs are those of the policy before the first step."""
    scorer = Scorer(policy)
    source = GivenExamples("groups", [[_group(group, scorer) for group in batch] for batch in batches])
    return _through_trainer("grpo", policy, source, config, out)


def reward(
    policy: LanguagePolicy,
    batches: Sequence[Sequence[Group]],
    prepared: Prepared,
    config: TrainConfig,
    out: Path,
) -> Update:
    """A reward model: a linear head on each row's last state, Bradley-Terry, all weights trained.

    The one trainer moves policies by log-probs, so this loop is written out here, of the library's
    scorer, loss and micro-batches and with the trainer's optimiser.
    """
    scorer = Scorer(policy)
    head = nn.Parameter(prepared.score())
    parameters = policy.trainable_parameters()
    masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
    optimiser = torch.optim.AdamW(
        [*masters, head], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )

    def step(number: int) -> float:
        pairs = [_pair(group).rows for group in batches[number]]
        loss = 0.0
        for part in micro_batches([scorer.size(rows) for rows in pairs], config.micro_batch_tokens):
            states = scorer.states([pairs[i] for i in part], grad=True)
            scores = (states @ head).view(-1, 2)
            output = bradley_terry_loss(scores[:, 0], scores[:, 1], denominator=float(len(pairs)))
            output.loss.backward()
            loss += float(output.loss.detach())
        for parameter, master in zip(parameters, masters, strict=True):
            # The output layer is not read; where it is a weight of its own, it has no gradient.
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_([*masters, head], config.max_grad_norm)
        optimiser.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                parameter.grad = master.grad = None
            head.grad = None
        return loss

    return Update(step, 0.0, {"micro_batch_tokens": config.micro_batch_tokens})


UPDATES: dict[str, Callable[..., Update]] = {"dpo": dpo, "reward": reward, "kto": kto, "grpo": grpo}
"""How each algorithm's update is made."""


def measure(prepared: Prepared, training: Training, assignments: Sequence[str] = ()) -> Measurement:
    """Train for ``training.total`` steps and say how long each took.

    Args:
        assignments: ``NAME=VALUE`` changes to :class:`~corrigible.align.TrainConfig`.

    Raises:
        BadInputError: fewer batches than steps.
    """
    batches = prepared.batches()[: training.total]
    if len(batches) < training.total:
        raise BadInputError(f"{len(batches)} batches are prepared, {training.total} steps were asked for.")
    began = time.perf_counter()
    policy = load_policy(
        prepared.model,
        adapter=prepared.adapter if training.lora else None,
        dtype="bfloat16" if training.precision == "bf16" else "float32",
        device="cpu",
    )
    changes = dict(assignment.split("=", 1) for assignment in assignments)
    config = TrainConfig(
        **{
            "steps": training.total,
            "batch_size": len(batches[0]),  # only named; the source gives whole batches
            "lr": training.lr,
            "schedule": "constant",
            "warmup": 0.0,
            **changes,
        }
    )
    with tempfile.TemporaryDirectory(prefix="corrigible-bench-") as folder:
        update = UPDATES[training.algorithm](policy, batches, prepared, config, Path(folder))
        setup = time.perf_counter() - began
        can_tell = forget_peak()
        seconds: list[float] = []
        losses: list[float] = []
        last = time.perf_counter()
        for number in range(training.total):
            losses.append(update.step(number))
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        recent = recent_peak_rss_mb() if can_tell else 0.0
    return Measurement(
        side="corrigible",
        algorithm=training.algorithm,
        setting=" ".join(assignments) or "default",
        warmup=training.warmup,
        seconds=seconds,
        tokens=[sum(group.tokens for group in batch) for batch in batches],
        losses=losses,
        setup_seconds=setup,
        reference_seconds=update.reference_seconds,
        peak_rss_mb=peak_rss_mb(),
        peak_rss_steps_mb=recent,
        options={
            **update.options,
            "precision": training.precision,
            "lora": training.lora,
            "threads": torch.get_num_threads(),
        },
    )


def _through_trainer(
    algorithm: str, policy: LanguagePolicy, source: GivenExamples, config: TrainConfig, out: Path
) -> Update:
    trainer = Trainer(policy, get_algorithm(algorithm), source, config, out=out)
    began = time.perf_counter()
    trainer._prepare_reference()
    reference = time.perf_counter() - began
    return Update(
        step=lambda number: trainer._step(number)["loss"],
        reference_seconds=reference,
        options={
            "micro_batch_tokens": config.micro_batch_tokens,
            "share_prompts": config.share_prompts,
        },
    )


def _row(group: Group, completion: Sequence[int]) -> Rendered:
    return Rendered.from_tokens(group.prompt, completion)


def _pair(group: Group) -> PairExample:
    chosen, rejected = (_row(group, completion) for completion in group.completions)
    return PairExample(rows=(chosen, rejected), p_chosen=1.0, weight=1.0, group="", derived_from=())


def _unpaired(batch: Sequence[Group]) -> list[UnpairedExample]:
    order = [(group, side) for side in (0, 1) for group in batch]
    answers = [group.completions[side] for group, side in order]
    return [
        UnpairedExample(
            rows=(_row(group, answers[place]),),
            desirable=group.rewards[side] > 0.5,
            weight=1.0,
            group="",
            derived_from=(),
            mismatched=_row(group, answers[(place + 1) % len(answers)]),
        )
        for place, (group, side) in enumerate(order)
    ]


def _group(group: Group, scorer: Scorer) -> GroupExample:
    rows = tuple(_row(group, completion) for completion in group.completions)
    rewards = torch.tensor(group.rewards)
    advantages = group_advantages(rewards, torch.zeros(len(rows), dtype=torch.long))
    return GroupExample(
        rows=rows,
        advantages=tuple(advantages.tolist()),
        rewards=group.rewards,
        behaviour=tuple(tuple(known.tolist()) for known in scorer([rows])),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of ``python -m bench.ours``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser)
    options = parser.parse_args(arguments)
    with prepared_for(options) as prepared:
        found = measure(prepared, as_training(options), options.set)
    report(found, as_json=options.json)


if __name__ == "__main__":
    main()
