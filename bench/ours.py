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

from corrigible.align import TrainConfig, Trainer, get_algorithm
from corrigible.align.advantages import group_advantages
from corrigible.align.groups import GroupExample
from corrigible.align.sources import PairExample, row_key
from corrigible.align.unpaired import UnpairedExample
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, Rendered, load_policy
from corrigible.models.optimiser import Group as Trained
from corrigible.models.optimiser import Optimiser
from corrigible.models.scoring import Scorer
from corrigible.rewards.backbones import Encoded, causal_backbone
from corrigible.rewards.config import RewardConfig
from corrigible.rewards.head import Comparisons, Standardiser
from corrigible.rewards.tuning import TunedReward

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


@dataclass(frozen=True)
class Task:
    """What to train on what.

    Attributes:
        policy: trained in place.
        batches: one for each step.
        prepared: where they and the weights come from.
        config: of the trainer.
        out: folder of the run.
    """

    policy: LanguagePolicy
    batches: Batches
    prepared: Prepared
    config: TrainConfig
    out: Path


def dpo(task: Task) -> Update:
    """DPO through the one trainer."""
    return _through_trainer(
        task, "dpo", "pairs", [[_pair(group) for group in batch] for batch in task.batches]
    )


def kto(task: Task) -> Update:
    """KTO through the one trainer: desirable answers first, as :mod:`bench.rival` gives them to TRL."""
    return _through_trainer(task, "kto", "unpaired", [_unpaired(batch) for batch in task.batches])


def grpo(task: Task) -> Update:
    """GRPO through the one trainer; behaviour log-probs are those of the policy before the first step."""
    scorer = Scorer(task.policy)
    batches = [[_group(group, scorer) for group in batch] for batch in task.batches]
    return _through_trainer(task, "grpo", "groups", batches)


def reward(task: Task) -> Update:
    """A reward model: a linear head on each row's last state, Bradley-Terry, all weights trained.

    The update is that of ``corrigible train reward`` with a tuned causal backbone, on prepared tokens, with
    a head that stands on the plain states and is updated as the backbone is.
    """
    config = task.config
    start = task.prepared.score()
    settings = RewardConfig(
        backbone=str(task.prepared.model),
        tune="full",
        text="prompt+response",
        pooling="last",
        features=(),
        members=0,
        # Reward models have a default of their own: without the output layer a token takes less memory.
        batch_tokens=(
            config.micro_batch_tokens
            if "micro_batch_tokens" in config.model_fields_set
            else RewardConfig.batch_tokens
        ),
    )
    tuned = TunedReward(
        causal_backbone(settings.backbone, task.policy),
        settings,
        Standardiser(torch.zeros_like(start), torch.ones_like(start)),
        start,
    )
    optimiser = Optimiser(
        Trained(
            {name: p for name, p in tuned.named_parameters() if p.requires_grad},
            weight_decay=config.weight_decay,
        ),
        betas=config.betas,
        eps=config.eps,
        seed=config.seed,
    )

    def step(number: int) -> float:
        groups = task.batches[number]
        texts = [_encoded(group, completion) for group in groups for completion in group.completions[:2]]
        place = torch.arange(len(texts)).view(-1, 2)
        ones = torch.ones(len(groups))
        pairs = Comparisons(place[:, 0], place[:, 1], ones, ones)
        named = torch.zeros(len(texts), 0)
        return tuned.update(optimiser, [texts], named, pairs, lr=config.lr, max_gradient=config.max_grad_norm)

    return Update(step, 0.0, {"batch_tokens": settings.batch_tokens})


UPDATES: dict[str, Callable[[Task], Update]] = {"dpo": dpo, "reward": reward, "kto": kto, "grpo": grpo}
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
        update = UPDATES[training.algorithm](Task(policy, batches, prepared, config, Path(folder)))
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


def _through_trainer(task: Task, algorithm: str, kind: str, batches: Sequence[Sequence[Any]]) -> Update:
    config = task.config
    source = GivenExamples(kind, batches)
    trainer = Trainer(task.policy, get_algorithm(algorithm), source, config, out=task.out)
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


def _encoded(group: Group, completion: Sequence[int]) -> Encoded:
    ids = (*group.prompt, *completion)
    return Encoded(ids, len(group.prompt), len(ids))


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
