"""The algorithms on the contrast function, through their sources and the trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from corrigible.align import (
    ALGORITHMS,
    AlgorithmConfig,
    PairSource,
    RDPOConfig,
    ScoredExamples,
    TrainConfig,
    Trainer,
    make_source,
)
from corrigible.align.listwise import BRAInConfig
from corrigible.align.ranked import RankedExample
from corrigible.models import LanguagePolicy
from corrigible.records import Message
from corrigible.store import Pair
from corrigible.store.signals import Demonstrated, Ranked

PAIRS = (
    *("cdpo", "rdpo", "ipo", "slic", "hinge-norm", "simpo", "orpo", "f-dpo", "wpo", "spin"),
    *("pref-ft", "unlikelihood"),
)
RANKED = ("plackett-luce", "rrhf", "pro", "brain", "copg", "rwr", "awr")
ALL = (*PAIRS, *RANKED, "f-sft")
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove")


def said(text: str, role: str = "assistant") -> tuple[Message, ...]:
    return (Message.model_validate({"role": role, "content": text}),)


def signals_of(name: str, make_pairs: Callable[[int], list[Pair]], count: int = 5) -> list[Any]:
    """Uneven lengths, weights, labels and sizes, with ties."""
    made: list[Any] = []
    for number, pair in enumerate(make_pairs(count)):
        common: dict[str, Any] = {"weight": 0.5 + number % 3, "group": f"g{number}", "annotators": ("ada",)}
        common["derived_from"] = (f"f{number:06d}",)
        if name in PAIRS:
            made.append(replace(pair, weight=common["weight"], p_chosen=(1.0, 0.75, 0.5)[number % 3]))
        elif name == "f-sft":
            made.append(Demonstrated(prompt=pair.prompt, response=pair.chosen, **common))
        else:
            size = 2 + number % 3
            texts = [" ".join(WORDS[i : i + 1 + (number + i) % 4]) for i in range(size)]
            scores = tuple(float((number + 2 * i) % 3) for i in range(size))
            scores = scores if len(set(scores)) > 1 else (*scores[:-1], 5.0)
            made.append(
                Ranked(prompt=pair.prompt, responses=tuple(map(said, texts)), scores=scores, **common)
            )
    return made


def trainer_of(
    name: str,
    policy: LanguagePolicy,
    signals: Sequence[Any],
    out: Path,
    other: LanguagePolicy | None = None,
    config: AlgorithmConfig | None = None,
    **options: Any,
) -> Trainer:
    entry = ALGORITHMS[name]
    settings = config or entry.config()
    source = make_source(entry, signals, policy.renderer, settings, max_length=256)
    train = TrainConfig(**({"steps": 1, "batch_size": len(source)} | options))
    return Trainer(policy, entry, source, train, algorithm_config=settings, out=out, reference_policy=other)


def disturbed(policy: LanguagePolicy, seed: int) -> LanguagePolicy:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradient_do_not_depend_on_the_cut(
    name: str, policy: LanguagePolicy, make_policy: Callable, make_pairs: Callable, tmp_path: Path
) -> None:
    trainer = trainer_of(
        name, disturbed(policy, 1), signals_of(name, make_pairs), tmp_path, disturbed(make_policy(), 2)
    )
    trainer._prepare_reference()
    examples = trainer.source.batch(0, len(trainer.source.examples))
    longest = max(len(row) for example in examples for row in example.rows)
    found = []
    for budget in (1, 5 * longest, 1 << 30):
        trainer.optimiser.clear()
        trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget})
        metrics = trainer.accumulate(examples)
        grads = [p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None]
        found.append((torch.cat(grads), metrics))
    whole, logged = found[-1]
    assert float(whole.norm()) > 0
    for gradient, metrics in found[:-1]:
        assert float((gradient - whole).norm()) <= 1e-4 * float(whole.norm())
        assert metrics == pytest.approx(logged, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("name", ["ipo", "slic", "simpo", "orpo"])
def test_pairs_are_learnt(name: str, policy: LanguagePolicy, make_pairs: Callable, tmp_path: Path) -> None:
    trainer = trainer_of(name, policy, make_pairs(16), tmp_path, batch_size=16, steps=10, lr=5e-3)
    steps = [json.loads(line) for line in trainer.train().history.read_text().splitlines()]
    first, last = steps[0], steps[-1]
    assert last["loss"] < first["loss"] and last["rewards/margin"] > first["rewards/margin"]
    assert last["rewards/accuracy"] > first["rewards/accuracy"] or last["rewards/accuracy"] == 1.0


@pytest.mark.parametrize("name", ["plackett-luce", "rrhf", "copg", "brain"])
def test_rankings_are_learnt(name: str, policy: LanguagePolicy, make_pairs: Callable, tmp_path: Path) -> None:
    """``yes`` over ``maybe`` over ``no``, to prompts that differ."""
    signals = [
        Ranked(
            prompt=pair.prompt,
            responses=(said("no"), said("maybe"), said("yes")),
            scores=(-1.0, 0.0, 1.0),
            weight=1.0,
            group=pair.group,
            annotators=(),
            derived_from=pair.derived_from,
        )
        for pair in make_pairs(8)
    ]
    trainer = trainer_of(name, policy, signals, tmp_path, batch_size=8, steps=12, lr=5e-3)
    start = _scores(trainer)
    trainer.train()
    moved = [now - then for now, then in zip(_scores(trainer), start, strict=True)]
    assert moved[0] < moved[2] and moved[1] < moved[2]


def _scores(trainer: Trainer) -> list[float]:
    """Mean log-prob of each place of the examples' rows."""
    examples = trainer.source.examples
    with torch.no_grad():
        scored = trainer._logprobs([example.rows for example in examples], grad=False)
    sums = torch.tensor([float(row.sum()) for row in scored]).reshape(len(examples), -1)
    return [float(x) for x in sums.mean(dim=0)]


def test_rdpo_knows_how_often_each_annotator_is_wrong(
    policy: LanguagePolicy, make_pair: Callable, tmp_path: Path
) -> None:
    pairs = [
        make_pair("A?", "yes", "no", annotators=("ada",)),
        make_pair("B?", "yes", "no", annotators=("bob",)),
        make_pair("C?", "yes", "no", annotators=("ada", "cy")),
        make_pair("D?", "yes", "no", annotators=()),
    ]
    config = RDPOConfig(flip_rate=0.2, annotator_flip_rates={"ada": 0.0, "bob": 0.4})
    trainer = trainer_of("rdpo", policy, pairs, tmp_path, config=config)
    rates = [example.flip_rate for example in trainer.source.examples]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.0, 0.4, 0.1, 0.2])
    plain = PairSource(pairs, policy.renderer, max_length=256)
    assert trainer.source.digest() != plain.digest()
    trainer._prepare_reference()
    # At the start each pair pulls with 1 / (1 - 2 e) of DPO's slope.
    found = trainer.accumulate(trainer.source.examples)["grad_weight"]
    assert found == pytest.approx(sum(0.5 / (1 - 2 * e) for e in (0.0, 0.4, 0.1, 0.2)) / 4, rel=1e-5)


def test_f_sft_asks_for_a_reference_only_where_it_matters(
    policy: LanguagePolicy, make_pairs: Callable, tmp_path: Path
) -> None:
    signals = signals_of("f-sft", make_pairs)
    config = ALGORITHMS["f-sft"].config
    for divergence, wanted in (("total_variation", False), ("hellinger", True)):
        settings = config.model_validate({"divergence": divergence})
        trainer = trainer_of("f-sft", policy, signals, tmp_path / divergence, config=settings)
        trainer._prepare_reference()
        assert (trainer.reference is not None) == wanted
        assert math.isfinite(trainer.accumulate(trainer.source.examples)["loss"])


def test_brain_takes_unrecorded_answers_for_the_references_own() -> None:
    """Then its target is the softmax of the scores alone."""
    rows: tuple[Any, ...] = (None, None)
    example = RankedExample(rows, (1.0, 0.0), (math.nan, math.nan), 1.0, "g", ())
    policy = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-3.0], requires_grad=True)]
    reference = [torch.tensor([-1.5, -2.0]), torch.tensor([-2.0])]
    batch = ScoredExamples([example], policy, reference, 1.0)
    out = ALGORITHMS["brain"].objective(batch, BRAInConfig(beta=0.5))
    target = torch.softmax(torch.tensor([2.0, 0.0]), dim=0)
    fitted = torch.log_softmax(torch.tensor([0.5, -1.0]), dim=0)
    wanted = float((target * (target.log() - fitted)).sum())
    assert float(out.loss.detach()) == pytest.approx(wanted, rel=1e-5)
    recorded = replace(example, logq=(-3.5, -2.5))
    other = ALGORITHMS["brain"].objective(replace(batch, examples=[recorded]), BRAInConfig(beta=0.5))
    target = torch.softmax(torch.tensor([2.0, 0.5]), dim=0)
    fitted = torch.log_softmax(torch.tensor([0.5, -0.5]), dim=0)
    assert float(other.loss.detach()) == pytest.approx(
        float((target * (target.log() - fitted)).sum()), rel=1e-5
    )


def test_every_entry_says_what_a_reader_needs() -> None:
    for name in ALL:
        entry = ALGORITHMS[name]
        assert entry.family == "contrast" and "Choose it" in entry.doc and entry.learns_from
        assert any(year in entry.paper for year in map(str, range(2007, 2027)))
        for setting, field in entry.config.model_fields.items():
            assert field.description and not field.is_required(), f"{name}.{setting}"
    free = {"slic", "simpo", "orpo", "pref-ft", "unlikelihood", "rrhf", "pro", "rwr", "awr"}
    assert {name for name in ALL if not ALGORITHMS[name].needs_reference} == free
