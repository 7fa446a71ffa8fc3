"""What a batch must know of itself does not depend on how it is cut: KTO and GRPO against the plain path.

The plain path shares nothing with the fast one: full logits, one row at a time, one backward pass over
the whole batch, losses written out from their equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from corrigible.align import (
    ALGORITHMS,
    GroupExample,
    GroupSource,
    GRPOConfig,
    KTOConfig,
    ScoredExamples,
    TrainConfig,
    Trainer,
    UnpairedSource,
)
from corrigible.align.kto import ReferencePoint
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy, Rendered, generate
from corrigible.models.renderer import SCORED
from corrigible.records import Message, Sampling
from corrigible.rewards.signals import Scores
from corrigible.store import labelled_from_pairs

BETA = 0.5
CUTS = ("one by one", "ragged", "all at once")


def disturbed(policy: LanguagePolicy, seed: int, scale: float = 0.15) -> LanguagePolicy:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return policy


def plain_logprobs(policy: LanguagePolicy, row: Rendered) -> torch.Tensor:
    ids = torch.tensor([row.ids])
    every = policy.model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
    every = every.gather(1, ids[0, 1:, None])[:, 0]
    return torch.stack([every[i - 1] for i, kind in enumerate(row.kinds) if kind in SCORED])


def flat(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None])


def gradient(trainer: Trainer, how: str, share: bool = True) -> tuple[torch.Tensor, dict[str, float]]:
    trainer.optimiser.clear()
    examples = trainer.source.batch(0, trainer.config.batch_size)
    longest = max(len(row) for example in examples for row in example.rows)
    budget = {"one by one": 1, "ragged": 5 * longest // 2, "all at once": 1 << 30}[how]
    trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget, "share_prompts": share})
    trainer.score = None
    metrics = trainer.accumulate(examples)
    return flat(trainer), metrics


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    return cosine >= 0.999999 and abs(float(a.norm() / b.norm()) - 1) <= 1e-5


def test_examples_of_another_kind_are_refused(policy: LanguagePolicy, tmp_path: Path) -> None:
    for name, kind in (("kto", "unpaired"), ("dpo", "pairs")):
        with pytest.raises(BadInputError, match=f"{name} learns from {kind}, these examples are groups"):
            Trainer(policy, ALGORITHMS[name], groups(policy), out=tmp_path)


# -- KTO ------------------------------------------------------------------------------------------


@pytest.fixture
def kto(policy: LanguagePolicy, make_policy: Callable, make_pairs: Callable, tmp_path: Path) -> Trainer:
    """An odd batch of uneven weights, away from the reference, whose reference point is above 0."""
    labelled = labelled_from_pairs(make_pairs(4))[:-1]
    labelled = [dataclasses.replace(one, weight=0.5 + i % 3) for i, one in enumerate(labelled)]
    trainer = Trainer(
        disturbed(policy, 1, 0.02),
        ALGORITHMS["kto"],
        UnpairedSource(labelled, policy.renderer, max_length=256),
        TrainConfig(steps=1, batch_size=7),
        algorithm_config=KTOConfig(beta=BETA, desirable_weight=0.7, undesirable_weight=1.3),
        out=tmp_path,
        reference_policy=disturbed(make_policy(), 2),
    )
    trainer._prepare_reference()
    return trainer


def plain_kto(trainer: Trainer) -> tuple[torch.Tensor, float]:
    trainer.optimiser.clear()
    examples = trainer.source.batch(0, trainer.config.batch_size)
    other = trainer.reference_policy
    assert other is not None

    def ratio(row: Rendered) -> torch.Tensor:
        return plain_logprobs(trainer.policy, row).sum() - plain_logprobs(other, row).sum().detach()

    rows = [example.mismatched for example in examples]  # type: ignore[attr-defined]
    z0 = max(0.0, sum(float(ratio(row).detach()) for row in rows) / len(rows))
    loss = torch.zeros(())
    for example in examples:
        sign, side = (1, 0.7) if example.desirable else (-1, 1.3)  # type: ignore[attr-defined]
        value = side * (1 - torch.sigmoid(sign * BETA * (ratio(example.rows[0]) - z0)))
        loss = loss + example.weight * value
    (loss / sum(example.weight for example in examples)).backward()
    return flat(trainer), z0


@pytest.mark.parametrize("share", [True, False], ids=["prompt once", "prompt twice"])
def test_ktos_gradient_does_not_depend_on_the_cut(kto: Trainer, share: bool) -> None:
    plain, z0 = plain_kto(kto)
    assert z0 > 0.05  # or the reference point would not be tested
    found = [gradient(kto, how, share) for how in CUTS]
    for each, metrics in found:
        assert same(each, plain)
        assert metrics["z0"] == pytest.approx(z0, rel=1e-4)
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)


def test_a_reference_point_of_a_part_would_be_noticed(kto: Trainer) -> None:
    """The mutation: z0 from one micro-batch's mismatched rows instead of from the whole batch's."""
    right, _ = gradient(kto, "one by one")
    whole = kto.algorithm.measure
    assert whole is not None

    def of_a_part(batch: ScoredExamples, config: KTOConfig) -> ReferencePoint:
        part = dataclasses.replace(batch, policy=batch.policy[:2], reference=list(batch.reference or [])[:2])
        return whole(part, config)  # type: ignore[no-any-return]

    kto.algorithm = dataclasses.replace(kto.algorithm, measure=of_a_part)
    assert not same(gradient(kto, "one by one")[0], right)


def test_mismatched_rows_are_scored_without_gradient_and_known_to_the_reference(kto: Trainer) -> None:
    examples = kto.source.batch(0, 7)
    kto.optimiser.clear()
    point = kto._measure(examples, 1.0)
    assert isinstance(point, ReferencePoint) and point.z0 > 0
    assert all(parameter.grad is None for parameter in kto.parameters.values())


def test_probes_that_do_not_fit_the_context_are_refused(kto: Trainer) -> None:
    longest = max(len(row) for example in kto.source.examples for row in example.rows)
    kto.policy.network.config.max_position_embeddings = longest
    kto.reference = None
    with pytest.raises(BadInputError, match="context_overflow"):
        kto._prepare_reference()


# -- GRPO -----------------------------------------------------------------------------------------


def groups(policy: LanguagePolicy) -> GroupSource:
    """Groups of uneven size and answers of uneven length, sampled by the policy as it is now."""
    prompts = [[Message(role="user", content=text)] for text in ("A?", "Which of them?", "Why is it so?")]
    sampling = Sampling(max_tokens=9, n=5)
    found = [list(group) for group in generate(policy, prompts, n=5, sampling=sampling, seed=1)]
    found = [
        [
            dataclasses.replace(
                answer,
                ids=answer.ids[: 2 + 3 * (i % 3)],
                logprobs=answer.logprobs[: 2 + 3 * (i % 3)],
                sampling_logprobs=answer.sampling_logprobs[: 2 + 3 * (i % 3)],
            )
            for i, answer in enumerate(group)
        ]
        for group in found
    ]
    found[1] = found[1][:3]
    rewards = [Scores(np.arange(len(group)) % 4 * 0.5) for group in found]
    return GroupSource(found, rewards)


def grpo_trainer(
    policy: LanguagePolicy, make_policy: Callable, out: Path, aggregation: str, beta: float = 0.3
) -> Trainer:
    source = groups(policy)
    trainer = Trainer(
        disturbed(policy, 1, 0.05),  # after sampling: ratios leave 1, some beyond the clip
        ALGORITHMS["grpo"],
        source,
        TrainConfig(steps=1, batch_size=3),
        algorithm_config=GRPOConfig.model_validate(
            {"aggregation": aggregation, "beta": beta, "longest": 9, "clip_low": 0.1, "clip_high": 0.15}
        ),
        out=out,
        reference_policy=disturbed(make_policy(), 2, 0.05),
    )
    trainer._prepare_reference()
    return trainer


def plain_grpo(trainer: Trainer, aggregation: str, beta: float = 0.3) -> torch.Tensor:
    trainer.optimiser.clear()
    other = trainer.reference_policy
    assert other is not None
    examples: Sequence[GroupExample] = trainer.source.batch(0, 3)  # type: ignore[assignment]
    sums, lengths = [], []
    for example in examples:
        for row, advantage, recorded in zip(example.rows, example.advantages, example.behaviour, strict=True):
            now = plain_logprobs(trainer.policy, row)
            rho = torch.exp(now - torch.tensor(recorded))
            gap = plain_logprobs(other, row).detach() - now
            surrogate = -torch.minimum(rho * advantage, rho.clamp(0.9, 1.15) * advantage)
            sums.append((surrogate + beta * (gap.exp() - gap - 1)).sum())
            lengths.append(len(now))
    if aggregation == "grpo":
        loss = sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    elif aggregation == "dr_grpo":
        loss = sum(sums) / (len(sums) * 9)
    else:
        loss = sum(sums) / sum(lengths)
    loss.backward()  # type: ignore[union-attr]
    return flat(trainer)


@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo"])
def test_grpos_gradient_does_not_depend_on_the_cut(
    policy: LanguagePolicy, make_policy: Callable, tmp_path: Path, aggregation: str
) -> None:
    trainer = grpo_trainer(policy, make_policy, tmp_path, aggregation)
    plain = plain_grpo(trainer, aggregation)
    found = [gradient(trainer, how) for how in CUTS] + [gradient(trainer, "ragged", share=False)]
    assert found[0][1]["clipped/low"] > 0 and found[0][1]["clipped/high"] > 0
    for each, metrics in found:
        assert same(each, plain)
        assert metrics == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)


def test_a_group_larger_than_a_micro_batch_is_cut(
    policy: LanguagePolicy, make_policy: Callable, tmp_path: Path
) -> None:
    trainer = grpo_trainer(policy, make_policy, tmp_path, "dapo")
    example = trainer.source.examples[0]
    assert isinstance(example, GroupExample)
    score = trainer._scorer()
    most = score.size(example.rows[1:3])
    trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": most})
    parts = trainer._parts(example)
    assert 1 < len(parts) < len(example.rows)
    assert all(score.size(part.rows) <= most for part in parts)
    for name in ("rows", "advantages", "rewards", "behaviour"):
        assert sum((getattr(part, name) for part in parts), ()) == getattr(example, name)


@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo"])
def test_a_denominator_times_the_number_of_parts_would_be_noticed(
    policy: LanguagePolicy, make_policy: Callable, tmp_path: Path, aggregation: str
) -> None:
    """The mutations that trainers ship: the accumulation count in a denominator, or a part's own totals."""
    trainer = grpo_trainer(policy, make_policy, tmp_path, aggregation)
    right, _ = gradient(trainer, "one by one")
    plain = trainer.algorithm

    def times_the_count(batch: ScoredExamples, config: GRPOConfig) -> object:
        count = 13  # the answers, one a part
        whole = dataclasses.replace(
            batch.whole, answers=count * batch.whole.answers, tokens=count * batch.whole.tokens
        )
        return plain.objective(dataclasses.replace(batch, whole=whole), config)

    def own_totals(batch: ScoredExamples, config: GRPOConfig) -> object:
        assert plain.measure is not None
        whole = plain.measure(batch, config)
        return plain.objective(dataclasses.replace(batch, whole=whole), config)

    for mutation in (times_the_count, own_totals):
        trainer.algorithm = dataclasses.replace(plain, objective=mutation)  # type: ignore[arg-type]
        assert not same(gradient(trainer, "one by one")[0], right)
