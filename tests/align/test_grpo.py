"""GRPO against an oracle of scalar loops in float64, its groups, and the trainer on them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from corrigible.align import (
    ALGORITHMS,
    GroupSource,
    GRPOConfig,
    TrainConfig,
    Trainer,
    group_examples,
    grpo_loss,
    reference_logprobs,
)
from corrigible.align.grpo import BatchTotals
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models import Generation, LanguagePolicy, generate
from corrigible.records import FinishReason, Message, Sampling
from corrigible.rewards.signals import Scores

AGGREGATIONS = ("grpo", "dr_grpo", "dapo", "bnpo")
LONGEST = 12


@dataclasses.dataclass
class Case:
    """Ragged answers as lists of tokens, each ``(policy, behaviour, reference, live)``."""

    answers: list[list[tuple[float, float, float, bool]]]
    advantages: list[float]
    low: float
    high: float
    beta: float


def oracle(case: Case, aggregation: str) -> tuple[float, list[float], dict[str, float]]:
    """Value, gradient and metrics by scalar arithmetic: one token at a time."""
    counted = [sum(t[3] for t in tokens) for tokens in case.answers]
    total, answers = sum(counted), sum(n > 0 for n in counted)
    loss, slopes = 0.0, []
    means = {"ratio": 0.0, "clipped/low": 0.0, "clipped/high": 0.0, "kl": 0.0, "log_ratio": 0.0}
    for tokens, advantage, length in zip(case.answers, case.advantages, counted, strict=True):
        for policy, behaviour, reference, live in tokens:
            if not live:
                slopes.append(0.0)
                continue
            if aggregation == "grpo":
                share = 1 / length / answers
            elif aggregation == "dr_grpo":
                share = 1 / (answers * LONGEST)
            else:
                share = 1 / total
            d = policy - behaviour
            rho = math.exp(min(max(d, -20.0), 20.0))
            clipped = min(max(rho, 1 - case.low), 1 + case.high)
            value = -min(rho * advantage, clipped * advantage)
            slope = -rho * advantage if rho * advantage <= clipped * advantage and abs(d) <= 20 else 0.0
            gap = reference - policy
            bounded = min(max(gap, -20.0), 20.0)
            k3 = math.exp(bounded) - bounded - 1
            loss += share * (value + case.beta * k3)
            slopes.append(share * (slope + case.beta * (1 - math.exp(gap) if abs(gap) <= 20 else 0.0)))
            means["ratio"] += rho / total
            means["log_ratio"] += d / total
            means["kl"] += k3 / total
            means["clipped/low"] += (advantage < 0 and rho < 1 - case.low) / total
            means["clipped/high"] += (advantage > 0 and rho > 1 + case.high) / total
    return loss, slopes, means


def cases(count: int) -> list[Case]:
    rng = random.Random(23)
    made = []
    while len(made) < count:
        far = rng.choice([0.0, 0.1, 0.5, 30.0])  # 0.0: exactly on policy
        answers = []
        for _ in range(rng.randint(1, 6)):
            tokens = []
            for _ in range(rng.choice([0, 1, 3, LONGEST])):  # an empty answer has no token
                live = rng.random() < 0.85
                policy = -rng.random() * 3 - far
                near = [policy + rng.uniform(-far, far), policy + rng.uniform(-1, 1)]
                held = [min(0.0, value) for value in near]
                # What is left out is NaN, or worse.
                wrong = rng.choice([math.nan, math.inf, 5.0])
                tokens.append((policy, *held, True) if live else (wrong, wrong, wrong, False))
            answers.append(tokens)
        if any(t[3] for tokens in answers for t in tokens):
            advantages = [rng.choice([0.0, rng.gauss(0, 2), 1.0, -1.0]) for _ in answers]
            made.append(Case(answers, advantages, *rng.choice([(0.2, 0.2), (0.2, 0.28), (0.5, 0.05)]), 0.0))
            made[-1].beta = rng.choice([0.0, 0.04, 1.0])
    return made


def column(values: Sequence[float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def arguments(case: Case) -> dict:
    flat = [token for tokens in case.answers for token in tokens]
    owner = [i for i, tokens in enumerate(case.answers) for _ in tokens]
    return {
        "policy_logprobs": column([t[0] for t in flat], grad=True),
        "behaviour_logprobs": column([t[1] for t in flat], grad=True),
        "advantages": column(case.advantages, grad=True),
        "answer": torch.tensor(owner, dtype=torch.long),
        "reference_logprobs": column([t[2] for t in flat], grad=True),
        "mask": torch.tensor([t[3] for t in flat], dtype=torch.bool),
        "clip_low": case.low,
        "clip_high": case.high,
        "beta": case.beta,
        "longest": LONGEST,
    }


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_value_and_gradient_equal_the_oracle_on_200_ragged_cases(aggregation: str) -> None:
    for case in cases(200):
        given = arguments(case)
        out = grpo_loss(**given, aggregation=aggregation)  # type: ignore[arg-type]
        out.loss.backward()
        value, slopes, means = oracle(case, aggregation)
        assert float(out.loss.detach()) == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert out.metrics["loss"] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert given["policy_logprobs"].grad.tolist() == pytest.approx(slopes, rel=1e-8, abs=1e-12)
        for constant in ("behaviour_logprobs", "reference_logprobs", "advantages"):
            assert given[constant].grad is None
        for name, mean in means.items():
            assert out.metrics[name] == pytest.approx(mean, rel=1e-9, abs=1e-12), name


def test_on_policy_the_loss_is_0_and_the_gradient_is_that_of_reinforce() -> None:
    """Ratio 1, no clip: -A per token, which sums to 0 over a group, with slope -A / (N |y|)."""
    policy = column([-1.0, -2.0, -0.5, -3.0], grad=True)
    answer = torch.tensor([0, 0, 0, 1])
    out = grpo_loss(policy, policy.detach(), column([0.7, -0.7]), answer, aggregation="grpo")
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(0.0, abs=1e-15)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.7 / 6] * 3 + [0.7 / 2])
    assert out.metrics["ratio"] == 1.0 and out.metrics["log_ratio"] == 0.0
    assert out.metrics["clipped/low"] == out.metrics["clipped/high"] == 0.0


def test_what_the_aggregations_do_to_length() -> None:
    """One token of a short and of a long answer: grpo favours the short one, the others do not."""
    answer = torch.tensor([0] + [1] * 4)
    logprobs = column([-1.0] * 5)
    weights = {}
    for aggregation in AGGREGATIONS:
        policy = column([-1.0] * 5, grad=True)
        out = grpo_loss(
            policy,
            logprobs,
            column([1.0, 1.0]),
            answer,
            aggregation=aggregation,  # type: ignore[arg-type]
            longest=8,
        )
        out.loss.backward()
        assert policy.grad is not None
        weights[aggregation] = [-float(policy.grad[0]), -float(policy.grad[4])]
    assert weights["grpo"] == pytest.approx([1 / 2, 1 / 8])
    assert weights["dapo"] == weights["bnpo"] == pytest.approx([1 / 5, 1 / 5])
    assert weights["dr_grpo"] == pytest.approx([1 / 16, 1 / 16])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_with_the_totals_add_up_to_the_batch(aggregation: str) -> None:
    for case in cases(40):
        if len(case.answers) < 2:
            continue
        whole = grpo_loss(**arguments(case), aggregation=aggregation)  # type: ignore[arg-type]
        counts = [sum(t[3] for t in tokens) for tokens in case.answers]
        totals = BatchTotals(float(sum(n > 0 for n in counts)), float(sum(counts)))
        cut = len(case.answers) // 2
        parts = [
            grpo_loss(
                **arguments(dataclasses.replace(case, answers=answers, advantages=advantages)),
                aggregation=aggregation,  # type: ignore[arg-type]
                totals=totals,
            )
            for answers, advantages in (
                (case.answers[:cut], case.advantages[:cut]),
                (case.answers[cut:], case.advantages[cut:]),
            )
        ]
        for name, value in whole.metrics.items():
            assert sum(p.metrics[name] for p in parts) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def good() -> dict:
    return {
        "policy_logprobs": column([-1.0, -2.0, -3.0]),
        "behaviour_logprobs": column([-1.0, -2.0, -3.0]),
        "advantages": column([1.0, -1.0]),
        "answer": torch.tensor([0, 0, 1]),
    }


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"policy_logprobs": column([-1.0])}, BadInputError, "one shape"),
        ({"mask": torch.ones(3)}, BadInputError, "mask must be booleans"),
        ({"answer": torch.tensor([0, 0, 2])}, BadInputError, "2 advantages"),
        ({"answer": torch.tensor([0, -1, 1])}, BadInputError, "2 advantages"),
        ({"policy_logprobs": column([-1.0, math.nan, -1.0])}, NumericsError, r"logprobs_not_finite.*\[1\]"),
        ({"behaviour_logprobs": column([-1.0, -1.0, 0.5])}, NumericsError, "logprobs_positive: behaviour"),
        ({"advantages": column([1.0, math.nan])}, NumericsError, "advantages_not_finite"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, NumericsError, "nothing_to_average"),
        ({"totals": BatchTotals(0.0, 0.0)}, NumericsError, "nothing_to_average"),
        ({"beta": 0.1}, BadInputError, "reference"),
        ({"clip_low": 0.0}, BadInputError, "clip_low"),
        ({"aggregation": "sum"}, BadInputError, "sum"),
        ({"aggregation": "dr_grpo"}, BadInputError, "longest"),
        ({"aggregation": "dr_grpo", "longest": 1}, BadInputError, "longer than longest=1"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        grpo_loss(**(good() | change))
    assert str(caught.value)


# -- groups of generations ------------------------------------------------------------------------


def answer_of(ids: Sequence[int], logprob: float = -1.0, **changes: object) -> Generation:
    fields: dict = {
        "prompt_ids": (1, 2, 3),
        "ids": tuple(ids),
        "text": "",
        "logprobs": (logprob,) * len(ids),
        "sampling_logprobs": (2 * logprob,) * len(ids),
        "finish_reason": FinishReason.stop,
        "seed": 0,
    }
    return Generation(**(fields | changes))


def scores(*values: float | str) -> Scores:
    """A text is the reason why there is no value."""
    return Scores(
        np.array([0.0 if isinstance(v, str) else v for v in values]),
        reasons=tuple(v if isinstance(v, str) else None for v in values),
    )


FOUR = [answer_of([5, 6]), answer_of([7]), answer_of([8, 9]), answer_of([5])]


def test_a_failed_judge_leaves_its_answer_out_of_mean_and_loss() -> None:
    [example], skipped = group_examples(
        [FOUR], [scores(3.0, "judge_error: no answer", 1.0, 5.0)], estimator="mean"
    )
    assert [row.ids[3:] for row in example.rows] == [(5, 6), (8, 9), (5,)]
    assert example.rewards == (3.0, 1.0, 5.0) and example.advantages == (0.0, -2.0, 2.0)
    assert skipped == {"no_reward": 1}


def test_groups_that_teach_nothing_are_skipped_and_counted() -> None:
    failed = answer_of([], error="too long", finish_reason=FinishReason.error)
    groups = [FOUR, FOUR[:2], [FOUR[0], failed], FOUR[:2]]
    rewards = [scores(1.0, 1.0, 1.0, 1.0), scores(1.0, "timeout"), scores(1.0, 0.0), scores(1.0, 0.0)]
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        source = GroupSource(groups, rewards)
    assert len(source) == 1
    assert source.skipped == {"no_spread": 1, "no_reward": 1, "no_answer": 1, "one_answer": 2}
    assert [e.name for e in seen if isinstance(e, Alert)] == ["groups_skipped"]
    with pytest.raises(BadInputError, match=r"no group to train on.*no_spread"):
        GroupSource(groups[:1], rewards[:1])


def test_the_recorded_log_probs_are_those_of_the_temperature() -> None:
    for temperature, expected in ((1.0, -1.0), (0.7, -2.0)):
        [example], _ = group_examples(
            [FOUR], [scores(0, 1, 2, 3)], sampling=Sampling(temperature=temperature)
        )
        assert example.behaviour[0] == (expected,) * 2 and example.temperature == temperature
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        group_examples([FOUR], [scores(0, 1, 2, 3)], sampling=Sampling(top_p=0.9))
    assert [e.name for e in seen if isinstance(e, Alert)] == ["sampling_filtered"]


@pytest.mark.parametrize(
    ("group", "sampling", "error", "says"),
    [
        (FOUR[:3], Sampling(), BadInputError, "one reward"),
        (FOUR, Sampling(temperature=0.7, top_k=5), BadInputError, "sampling_filtered"),
        (FOUR, Sampling(temperature=0), BadInputError, "Greedy"),
        ([*FOUR[:3], answer_of([5], prompt_ids=(1, 2))], Sampling(), BadInputError, "prompts_differ"),
        ([*FOUR[:3], answer_of([5], logprob=math.nan)], Sampling(), NumericsError, "behaviour_not_finite"),
        ([*FOUR[:3], answer_of([5], logprobs=(-1.0, -1.0))], Sampling(), BadInputError, "behaviour_shape"),
    ],
)
def test_groups_that_lie_are_refused(
    group: list[Generation], sampling: Sampling, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        group_examples([group], [scores(0, 1, 2, 3)], sampling=sampling)


def test_the_digest_knows_everything_that_decides_the_batches() -> None:
    rewards = scores(0, 1, 2, 3)
    digests = [
        GroupSource([FOUR, FOUR[:2]], [rewards, scores(0, 1)]).digest(),
        GroupSource([FOUR], [rewards]).digest(),
        GroupSource([FOUR], [rewards], seed=1).digest(),
        GroupSource([FOUR], [rewards], estimator="mean").digest(),
        GroupSource([FOUR], [scores(0, 1, 2, 4)]).digest(),
        GroupSource([[*FOUR[:3], answer_of([6])]], [rewards]).digest(),
        GroupSource([[*FOUR[:3], answer_of([5], logprob=-2.0)]], [rewards]).digest(),
    ]
    assert len(set(digests)) == len(digests)


# -- through the trainer --------------------------------------------------------------------------


def sampled(
    policy: LanguagePolicy, sampling: Sampling | None = None, count: int = 4
) -> tuple[list[list[Generation]], list[Scores]]:
    """Answers the policy really gives, rewarded for even token ids."""
    prompts = [[Message(role="user", content=f"Question {i}?")] for i in range(count)]
    groups = generate(policy, prompts, n=4, sampling=sampling or Sampling(max_tokens=10, n=4), seed=3)
    even = [[sum(i % 2 == 0 for i in g.ids) / len(g.ids) for g in group] for group in groups]
    return groups, [scores(*values) for values in even]


def test_first_step_ratio_1_loss_0_and_a_gradient(policy: LanguagePolicy, tmp_path: Path) -> None:
    source = GroupSource(*sampled(policy))
    trainer = Trainer(
        policy,
        ALGORITHMS["grpo"],
        source,
        TrainConfig(steps=12, batch_size=4, lr=5e-3, max_grad_norm=10.0),
        algorithm_config=GRPOConfig(aggregation="grpo"),
        out=tmp_path,
    )
    result = trainer.train()
    assert trainer.reference is None and not (tmp_path / "reference.safetensors").exists()
    history = [json.loads(line) for line in result.history.read_text().splitlines()]
    first, last = history[0], history[-1]
    assert first["loss"] == pytest.approx(0.0, abs=1e-5) and first["grad_norm"] > 1e-3
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4) and first["behaviour_unknown"] == 0.0
    assert last["loss"] < -0.05 and last["clipped/high"] > 0.0


def test_the_ratio_is_1_at_another_temperature_too(policy: LanguagePolicy, tmp_path: Path) -> None:
    """Temperature on one side only is the usual silent bug; here it has a name."""
    sampling = Sampling(max_tokens=10, n=4, temperature=1.7)
    source = GroupSource(*sampled(policy, sampling), sampling=sampling)
    config = TrainConfig(steps=1, batch_size=4)
    right = Trainer(
        policy,
        ALGORITHMS["grpo"],
        source,
        config,
        algorithm_config=GRPOConfig(temperature=1.7),
        out=tmp_path / "right",
    )
    assert right.accumulate(source.examples)["ratio"] == pytest.approx(1.0, abs=1e-4)
    wrong = Trainer(policy, ALGORITHMS["grpo"], source, config, out=tmp_path / "wrong")
    with pytest.raises(BadInputError, match=r"temperature_mismatch.*1\.7"):
        wrong.train()


def test_an_answer_that_nobody_recorded_has_ratio_1(policy: LanguagePolicy, tmp_path: Path) -> None:
    source = GroupSource(*sampled(policy))
    forgotten = [dataclasses.replace(e, behaviour=(None,) * len(e.rows)) for e in source.examples]
    trainer = Trainer(policy, ALGORITHMS["grpo"], source, TrainConfig(steps=1, batch_size=4), out=tmp_path)
    found = trainer.accumulate(forgotten)
    assert found["ratio"] == 1.0 and found["behaviour_unknown"] == 1.0


def test_the_kl_penalty_is_0_at_the_reference(policy: LanguagePolicy, tmp_path: Path) -> None:
    trainer = Trainer(
        policy,
        ALGORITHMS["grpo"],
        GroupSource(*sampled(policy)),
        TrainConfig(steps=2, batch_size=4, lr=5e-2),
        algorithm_config=GRPOConfig(beta=0.1),
        out=tmp_path,
    )
    result = trainer.train()
    first = json.loads(result.history.read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(0.0, abs=1e-8) and result.metrics["kl"] > 1e-5


def test_the_reference_is_scored_at_the_policys_temperature(policy: LanguagePolicy, tmp_path: Path) -> None:
    """Policy and reference are the same weights: at one temperature their divergence is 0."""
    sampling = Sampling(max_tokens=10, n=4, temperature=0.6)
    trainer = Trainer(
        policy,
        ALGORITHMS["grpo"],
        GroupSource(*sampled(policy, sampling), sampling=sampling),
        TrainConfig(steps=1, batch_size=4),
        algorithm_config=GRPOConfig(beta=0.1, temperature=0.6),
        out=tmp_path,
    )
    assert trainer.train().metrics["kl"] == pytest.approx(0.0, abs=1e-8)
    # What is kept is not taken for log-probs at another temperature.
    plain = reference_logprobs(policy, trainer.source.examples, cache=tmp_path / "reference.safetensors")
    assert trainer.reference is not None
    assert not any(torch.allclose(plain[key], trainer.reference[key], atol=1e-2) for key in plain)
