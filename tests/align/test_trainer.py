"""The trainer: denominators, learning, the reference, named failures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrigible.align import (
    ALGORITHMS,
    Algorithm,
    DPOConfig,
    PairExample,
    PairSource,
    TrainConfig,
    Trainer,
    dpo_loss,
    implicit_reward_accuracy,
    learning_rate,
    reference_logprobs,
)
from corrigible.align.sources import row_key
from corrigible.errors import BadInputError, NumericsError
from corrigible.events import Alert, EventBus, Metric
from corrigible.models import LanguagePolicy, Rendered, load_policy, token_logprobs
from corrigible.models.renderer import SCORED
from corrigible.models.scoring import Scorer
from corrigible.store import Pair

DPO = ALGORITHMS["dpo"]


def trainer_of(
    policy: LanguagePolicy, source: PairSource, out: Path, algorithm: Algorithm = DPO, **settings: object
) -> Trainer:
    return Trainer(policy, algorithm, source, TrainConfig.model_validate(settings), out=out)


def disturb_adapter(policy: LanguagePolicy, scale: float = 0.1) -> None:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def plain_logps(policy: LanguagePolicy, row: Rendered) -> torch.Tensor:
    """One sequence at a time, no batch, full logits, with gradient: nothing of the fast path."""
    ids = torch.tensor([row.ids])
    logprobs = policy.model(input_ids=ids).logits[0, :-1].float().log_softmax(dim=-1)
    every = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return torch.stack([every[i - 1] for i, kind in enumerate(row.kinds) if kind in SCORED])


# -- gradients ------------------------------------------------------------------------------------


def gradient(trainer: Trainer, examples: list[PairExample], how: str, share: bool = True) -> torch.Tensor:
    trainer.optimiser.clear()
    longest = max(2 * max(len(row) for row in e.rows) for e in examples)
    budget = {"one by one": 1, "all at once": 1 << 30, "ragged": 2 * longest + longest // 2}[how]
    trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget, "share_prompts": share})
    trainer.score = None
    trainer.accumulate(examples)
    return torch.cat([p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None])


@pytest.fixture
def batch(
    policy: LanguagePolicy, tmp_path: Path, make_pairs: Callable[..., list[Pair]]
) -> tuple[Trainer, list]:
    disturb_adapter(policy)
    pairs = [
        dataclasses.replace(pair, weight=0.5 + (i % 3), p_chosen=1.0 if i % 4 else 0.7)
        for i, pair in enumerate(make_pairs(8))
    ]
    source = PairSource(pairs, policy.renderer, max_length=256)
    trainer = trainer_of(policy, source, tmp_path, reference="base")
    trainer._prepare_reference()
    return trainer, source.examples


def plain_gradient(trainer: Trainer, examples: list[PairExample]) -> torch.Tensor:
    """The same gradient with none of the fast parts: full logits, one row at a time, one backward."""
    assert trainer.reference is not None
    trainer.optimiser.clear()
    policy = torch.stack([plain_logps(trainer.policy, row).sum() for e in examples for row in e.rows])
    reference = torch.stack([trainer.reference[row_key(row)].sum() for e in examples for row in e.rows])
    dpo_loss(
        policy[0::2],
        policy[1::2],
        reference[0::2],
        reference[1::2],
        p_chosen=torch.tensor([e.p_chosen for e in examples]),
        weight=torch.tensor([e.weight for e in examples]),
    ).loss.backward()
    return torch.cat([p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()))
    return cosine >= 0.999999 and abs(float(a.norm() / b.norm()) - 1) <= 1e-5


@pytest.mark.parametrize("how", ["one by one", "all at once", "ragged"])
@pytest.mark.parametrize("share", [True, False], ids=["prompt once", "prompt twice"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(batch: tuple, how: str, share: bool) -> None:
    trainer, examples = batch
    assert same(gradient(trainer, examples, how, share), plain_gradient(trainer, examples))
    assert trainer.score is not None and trainer.score.share is share


@pytest.mark.parametrize("how", ["one by one", "ragged"])
def test_a_wrong_denominator_would_be_noticed(batch: tuple, how: str) -> None:
    """The mutation that trainers ship: every part divided by its own weight, or by the number of parts."""
    trainer, examples = batch
    right = gradient(trainer, examples, "all at once")

    def own_weight(scored: object, config: object) -> object:
        return DPO.objective(
            dataclasses.replace(scored, denominator=sum(e.weight for e in scored.examples)), config
        )

    def times_the_count(scored: object, config: object) -> object:
        return DPO.objective(dataclasses.replace(scored, denominator=2 * scored.denominator), config)

    for mutation in (own_weight, times_the_count):
        trainer.algorithm = dataclasses.replace(DPO, objective=mutation)
        assert not same(gradient(trainer, examples, how), right)


def test_metrics_do_not_depend_on_how_the_batch_is_cut(batch: tuple) -> None:
    trainer, examples = batch
    found = []
    for budget in (1, 1 << 30):
        trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget})
        found.append(trainer.accumulate(examples))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)


# -- learning -------------------------------------------------------------------------------------


def test_it_learns(tmp_path: Path, policy: LanguagePolicy, make_pairs: Callable[..., list[Pair]]) -> None:
    """On unseen pairs: the margin grows, accuracy leaves chance, and the base model is untouched."""
    pairs = make_pairs(40)
    source = PairSource(pairs[:32], policy.renderer)
    test = PairSource(pairs[32:], policy.renderer)
    base = policy.weights_sha256("base")
    adapter = policy.weights_sha256("adapter")
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    trainer = Trainer(
        policy,
        DPO,
        source,
        TrainConfig(steps=25, batch_size=8, lr=5e-3),
        algorithm_config=DPOConfig(beta=0.5),
        out=tmp_path,
        held_out=test,
        bus=bus,
    )
    result = trainer.train()
    history = [json.loads(line) for line in result.history.read_text().splitlines()]
    assert [row["step"] for row in history] == list(range(1, 26))
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert history[0]["rewards/margin"] == pytest.approx(0.0, abs=1e-3)
    assert history[-1]["loss"] < 0.35 and history[-1]["rewards/margin"] > 1.0
    assert trainer.reference is not None
    measured = implicit_reward_accuracy(policy, test, reference=trainer.reference)
    assert measured.accuracy.value >= 0.85 and measured.margins.mean() > 0
    assert policy.weights_sha256("base") == base
    assert policy.weights_sha256("adapter") != adapter
    logged = {event.name for event in seen if isinstance(event, Metric)}
    assert {"train/loss", "train/rewards/accuracy", "train/grad_norm", "train/lr"} <= logged
    assert not [event for event in seen if isinstance(event, Alert)]

    # What was saved is what was trained: PEFT's format, loaded by name alone.
    again = load_policy(result.weights, dtype="float32", device="cpu")
    rows = [row for example in test.examples for row in example.rows]
    for a, b in zip(token_logprobs(policy, rows), token_logprobs(again, rows), strict=True):
        assert torch.equal(a, b)


def test_all_weights_can_be_trained(tmp_path: Path, make_policy: Callable, make_pairs: Callable) -> None:
    policy = make_policy(lora=False)
    source = PairSource(make_pairs(8), policy.renderer)
    result = trainer_of(policy, source, tmp_path, steps=3, batch_size=4, lr=1e-3).train()
    again = load_policy(result.weights, dtype="float32", device="cpu")
    rows = [row for example in source.examples for row in example.rows]
    for a, b in zip(token_logprobs(policy, rows), token_logprobs(again, rows), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_steps_too_small_for_bf16_are_not_lost(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    """bf16 near 0.1 moves in steps of 5e-4; a hundred updates of 1e-5 only add up in float32 masters."""
    policy = make_policy(lora=False, dtype="bfloat16")
    source = PairSource(make_pairs(4), policy.renderer)
    trainer = trainer_of(
        policy, source, tmp_path, steps=4, batch_size=4, lr=1e-5, schedule="constant", warmup=0
    )
    start = {name: master.clone() for name, master in trainer.optimiser.masters()}
    trainer.train()
    assert all(parameter.dtype == torch.bfloat16 for parameter in trainer.parameters.values())
    for name, master in trainer.optimiser.masters():
        assert torch.equal(trainer.parameters[name], master.bfloat16())
    moved = torch.cat([(p - start[name]).abs().flatten() for name, p in trainer.optimiser.masters()])
    assert float(moved.detach().median()) > 1e-5
    kept = torch.cat(
        [(p.detach().float() == start[name]).flatten() for name, p in trainer.parameters.items()]
    )
    assert 0.3 < float(kept.float().mean()) < 1.0


def test_steps_rounded_at_random_are_no_alarm(
    tmp_path: Path, make_policy: Callable, make_pairs: Callable
) -> None:
    """A step of a hundredth of bfloat16's resolution moves one weight in a hundred."""
    policy = make_policy(lora=False, dtype="bfloat16")
    source = PairSource(make_pairs(4), policy.renderer)
    settings = {"lr": 1e-6, "schedule": "constant", "warmup": 0, "master_weights": "stochastic"}
    trainer = trainer_of(policy, source, tmp_path, steps=4, batch_size=4, **settings)
    start = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.train()
    moved = torch.cat([(p != start[name]).flatten() for name, p in trainer.parameters.items()])
    assert 0.0 < float(moved.float().mean()) < 0.1


# -- the reference --------------------------------------------------------------------------------


def test_the_base_reference_is_free_of_the_adapter(
    policy: LanguagePolicy, source: PairSource, make_policy: Callable
) -> None:
    disturb_adapter(policy)
    plain = make_policy(lora=False)
    found = reference_logprobs(policy, source.examples, mode="base")
    started = reference_logprobs(policy, source.examples, mode="start")
    for example in source.examples[:6]:
        for row in example.rows:
            without = plain_logps(plain, row).detach()
            assert torch.allclose(found[row_key(row)], without, atol=2e-5)
            # Adapters left on would give these instead:
            assert not torch.allclose(started[row_key(row)], without, atol=1e-2)
            assert torch.allclose(started[row_key(row)], plain_logps(policy, row).detach(), atol=2e-5)


def test_the_reference_is_not_touched_by_training(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path, make_policy: Callable
) -> None:
    trainer = trainer_of(policy, source, tmp_path, steps=5, batch_size=8, lr=1e-2)
    trainer.train()
    assert trainer.reference is not None
    plain = make_policy(lora=False)
    for example in source.examples[:4]:
        for row in example.rows:
            assert torch.allclose(
                trainer.reference[row_key(row)], plain_logps(plain, row).detach(), atol=2e-5
            )


def test_the_reference_is_cached_by_weights(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Scorer.__call__

    def counted(self: Scorer, *given: object, **options: object) -> object:
        calls.append(1)
        return plain(self, *given, **options)

    monkeypatch.setattr(Scorer, "__call__", counted)
    cache = tmp_path / "reference.safetensors"
    first = reference_logprobs(policy, source.examples, cache=cache)
    assert calls
    calls.clear()
    again = reference_logprobs(policy, source.examples, cache=cache)
    assert not calls
    assert all(torch.equal(first[key], again[key]) for key in first)
    disturb_adapter(policy)
    other = reference_logprobs(policy, source.examples, cache=cache)
    assert calls and not torch.equal(next(iter(other.values())), next(iter(first.values())))
    calls.clear()
    cache.write_bytes(cache.read_bytes()[:-3])
    assert reference_logprobs(policy, source.examples, cache=cache).keys() == first.keys() and calls


def test_recorded_log_probs_are_used_only_for_exactly_these_weights(
    policy: LanguagePolicy, source: PairSource
) -> None:
    from corrigible.align import Behaviour

    recorded = [
        dataclasses.replace(
            example,
            behaviour=tuple(Behaviour("v1", tuple([-0.25] * len(row.scored))) for row in example.rows),
        )
        for example in source.examples
    ]
    sha = policy.weights_sha256("base")
    used = reference_logprobs(policy, recorded, behaviour_weights={"v1": sha})
    assert all(bool((scores == -0.25).all()) for scores in used.values())
    for weights in ({}, {"v1": "0" * 64}, {"v2": sha}):
        found = reference_logprobs(policy, recorded, behaviour_weights=weights)
        assert not any(bool((scores == -0.25).any()) for scores in found.values())


def test_a_wrong_reference_is_noticed_before_the_first_step(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    trainer = trainer_of(policy, source, tmp_path, steps=2)
    trainer._prepare_reference()
    disturb_adapter(policy, 1.0)
    weights = policy.weights_sha256()
    with pytest.raises(NumericsError, match="reference_mismatch"):
        trainer._step(0)
    assert policy.weights_sha256() == weights


def test_another_policy_can_be_the_reference(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path, make_policy: Callable
) -> None:
    other = make_policy()
    disturb_adapter(other)
    trainer = Trainer(policy, DPO, source, TrainConfig(steps=1), out=tmp_path, reference_policy=other)
    trainer.train()
    row = source.examples[0].rows[0]
    assert trainer.reference is not None
    assert torch.allclose(trainer.reference[row_key(row)], plain_logps(other, row).detach(), atol=2e-5)


# -- failures have names --------------------------------------------------------------------------


def alerts_of(trainer: Trainer) -> list[str]:
    seen: list[str] = []
    trainer.bus = EventBus()
    trainer.bus.subscribe(lambda event: seen.append(event.name) if isinstance(event, Alert) else None)
    return seen


def test_nan_in_the_loss_is_an_alert_and_moves_nothing(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    def broken(batch: object, config: object) -> object:
        output = DPO.objective(batch, config)
        return dataclasses.replace(output, loss=output.loss * float("nan"))

    trainer = trainer_of(policy, source, tmp_path, dataclasses.replace(DPO, objective=broken), steps=2)
    seen, before = alerts_of(trainer), policy.weights_sha256()
    with pytest.raises(NumericsError, match="loss_not_finite"):
        trainer.train()
    assert seen == ["loss_not_finite"] and policy.weights_sha256() == before


def test_infinite_gradients_are_an_alert_and_move_nothing(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    def broken(batch: object, config: object) -> object:
        output = DPO.objective(batch, config)
        # sqrt has an infinite slope at 0 and a finite value
        return dataclasses.replace(
            output, loss=output.loss + (output.loss - output.loss.detach()).abs().sqrt()
        )

    trainer = trainer_of(policy, source, tmp_path, dataclasses.replace(DPO, objective=broken), steps=2)
    seen, before = alerts_of(trainer), policy.weights_sha256()
    with pytest.raises(NumericsError, match="gradient_not_finite"):
        trainer.train()
    assert seen == ["gradient_not_finite"] and policy.weights_sha256() == before


def test_a_gradient_that_reaches_nothing_is_an_alert(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    def nothing(batch: object, config: object) -> object:
        output = DPO.objective(batch, config)
        return dataclasses.replace(output, loss=output.loss * 0.0)

    trainer = trainer_of(policy, source, tmp_path, dataclasses.replace(DPO, objective=nothing), steps=2)
    with pytest.raises(NumericsError, match="gradient_zero"):
        trainer.train()


def test_nan_weights_are_met_in_the_reference_pass(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    with torch.no_grad():
        next(policy.model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"not.finite"):
        trainer_of(policy, source, tmp_path, steps=1).train()


def test_a_policy_with_nothing_to_train_is_refused(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    policy.model.requires_grad_(False)
    with pytest.raises(BadInputError, match="nothing_trainable"):
        trainer_of(policy, source, tmp_path)


def test_ids_outside_the_vocabulary_are_refused(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    example = source.examples[3]
    row = example.rows[0]
    foreign = dataclasses.replace(row, ids=(*row.ids[:-1], 5000))
    source.examples[3] = dataclasses.replace(example, rows=(foreign, example.rows[1]))
    with pytest.raises(BadInputError, match=r"vocabulary_mismatch.*5000"):
        trainer_of(policy, source, tmp_path)


def test_rows_longer_than_the_context_are_refused(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    policy.network.config.max_position_embeddings = 40
    with pytest.raises(BadInputError, match=r"context_overflow.*40"):
        trainer_of(policy, source, tmp_path)


def test_a_reference_with_another_vocabulary_is_refused(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path, make_policy: Callable
) -> None:
    other = make_policy()
    other.tokenizer.add_tokens(["<|another|>"])
    with pytest.raises(BadInputError, match="vocabulary_mismatch"):
        Trainer(policy, DPO, source, out=tmp_path, reference_policy=other)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_the_vocabulary_of_an_adapted_embedding_is_known(
    source: PairSource, tmp_path: Path, make_policy: Callable
) -> None:
    policy = make_policy(lora=False)
    policy.add_lora(rank=2, targets=["embed_tokens", "q_proj"])
    assert not hasattr(policy.network.get_input_embeddings(), "num_embeddings")
    trainer_of(policy, source, tmp_path, steps=1).train()


def test_settings_of_another_algorithm_are_refused(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    from corrigible.align import AlgorithmConfig

    with pytest.raises(BadInputError, match="DPOConfig"):
        Trainer(policy, DPO, source, algorithm_config=AlgorithmConfig(), out=tmp_path)


# -- the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_rise_then_fall_and_are_never_zero(schedule: str) -> None:
    config = TrainConfig.model_validate({"lr": 1.0, "schedule": schedule, "warmup": 0.2})
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 and min(rates) > 0
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    if schedule == "linear":
        assert rates[-1] == pytest.approx(1 / 16)
    if schedule == "cosine":
        assert rates[12] == pytest.approx(0.5)
    assert learning_rate(0, 1, config) > 0  # one single step
