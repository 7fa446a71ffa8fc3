"""Adding an algorithm is one function and one decorator; the trainer stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import Field, ValidationError

from corrigible.align import (
    ALGORITHMS,
    AlgorithmConfig,
    DPOConfig,
    LossOutput,
    PairExample,
    PairSource,
    ScoredExamples,
    TrainConfig,
    Trainer,
    algorithm,
    get_algorithm,
)
from corrigible.errors import BadInputError
from corrigible.models import LanguagePolicy
from corrigible.records import KINDS


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def test_dpo_is_registered_with_all_that_a_reader_needs() -> None:
    dpo = get_algorithm("dpo")
    assert dpo.config is DPOConfig and dpo.needs_reference and dpo.source == "pairs"
    assert "2305.18290" in dpo.paper and len(dpo.doc) > 50
    assert "comparison" in dpo.learns_from and dpo.learns_from <= set(KINDS)


def test_every_setting_of_every_algorithm_says_what_it_is() -> None:
    for each in [*(entry.config for entry in ALGORITHMS.values()), TrainConfig]:
        for name, field in each.model_fields.items():
            assert field.description, f"{each.__name__}.{name}"


def test_a_new_algorithm_is_one_function(
    tmp_path: Path, policy: LanguagePolicy, make_pairs: Callable
) -> None:
    class HingeConfig(AlgorithmConfig):
        delta: float = Field(1.0, gt=0, description="Margin, nats.")

    @algorithm(
        "hinge",
        source="pairs",
        weight="judgement",
        config=HingeConfig,
        learns_from={"comparison"},
        paper="SLiC",
        needs_reference=False,
    )
    def hinge(batch: ScoredExamples[PairExample], config: HingeConfig) -> LossOutput:
        """Push the chosen response a margin above the rejected one; no reference."""
        logps = batch.policy_logps()
        gap = torch.relu(config.delta - (logps[0::2] - logps[1::2]))
        loss = (batch.column("weight") * gap).sum() / batch.denominator
        return LossOutput(loss, {"loss": float(loss.detach())})

    source = PairSource(make_pairs(8), policy.renderer)
    trainer = Trainer(
        policy, get_algorithm("hinge"), source, TrainConfig(steps=8, batch_size=8, lr=5e-3), out=tmp_path
    )
    first = trainer.accumulate(source.examples)["loss"]
    result = trainer.train()
    assert trainer.reference is None and not (tmp_path / "reference.safetensors").exists()
    assert result.metrics["loss"] < first


def test_a_name_is_taken_once_and_a_docstring_is_needed() -> None:
    def silent(batch: object, config: object) -> LossOutput:
        raise AssertionError

    entry = {"source": "pairs", "weight": "judgement", "config": DPOConfig, "learns_from": (), "paper": "-"}
    with pytest.raises(BadInputError, match="no docstring"):
        algorithm("silent", **entry)(silent)
    with pytest.raises(BadInputError, match="already registered"):
        algorithm("dpo", **entry)(silent)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BadInputError, match="no algorithm 'dop'") as caught:
        get_algorithm("dop")
    assert "dpo" in caught.value.advice


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="betta"):
        DPOConfig.model_validate({"betta": 0.1})
    with pytest.raises(ValidationError, match="learning_rate"):
        TrainConfig.model_validate({"learning_rate": 0.1})


def test_an_objective_that_needs_a_reference_must_say_so() -> None:
    scored = ScoredExamples(examples=[], policy=[], reference=None, denominator=1.0)
    with pytest.raises(BadInputError, match="needs_reference"):
        scored.reference_logps()
