"""Algorithms that learn from feedback written out as text: what they make of signals, and their steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "rendering"))

from feedback_texts import (
    attempt,
    attempts,
    critiqued,
    demonstrated,
    marked,
    pair,
    ranked,
    user,
)

import corrigible.align.attempted
import corrigible.align.rendered  # noqa: F401
from corrigible.align import ALGORITHMS, TrainConfig, Trainer, Unusable
from corrigible.align.rendering import Serving
from corrigible.align.tokens import TokenExample
from corrigible.errors import BadInputError
from corrigible.events import Alert
from corrigible.models import LanguagePolicy, Rendered
from corrigible.models.renderer import SCORED

TASKS = [
    attempts(
        attempt(f"a = {n}\nb = 9\nso 9", False, first_wrong=1, feedback="b was misread."),
        attempt(f"a = {n}\nb = 2\nso {n + 2}", True),
        prompt=user(f"a = {n}, b = 2, a + b?"),
        derived_from=(f"f{n}",),
        group=f"g{n}",
    )
    for n in range(1, 5)
]
SIGNALS: dict[str, Sequence[Any]] = {
    "pairs": [pair(f"yes {n}", "no", f"Q{n}?", weight=1.0 + n) for n in range(4)],
    "demonstrations": [
        demonstrated(f"price of {fruit}", str(n), quality="expert" if n % 2 else "mixed", weight=1.0 + n)
        for n, fruit in enumerate(["apple", "pear", "plum and quince", "cherry"])
    ],
    "attempts": TASKS,
    "critiqued": [critiqued(refined=f"yes {n}", prompt=user(f"Q{n}?")) for n in range(4)],
    "ranked": [ranked([f"good {n}", "bad"], [float(n), 0.5 * n - 1.0]) for n in range(1, 5)],
}
SETTINGS: dict[str, dict[str, Any]] = {"demonstration-retrieval": {"encoder": "words", "demonstrations": 2}}
RENDERED = [name for name, entry in sorted(ALGORITHMS.items()) if entry.family == "rendered"]


def source_of(
    name: str, policy: LanguagePolicy, signals: Sequence[Any] | None = None, **settings: Any
) -> Any:
    entry = ALGORITHMS[name]
    assert entry.make_source is not None
    how: dict[str, Any] = {"max_length": 400, "seed": 0, "invalid": "raise", "episodes": {}}
    how |= {key: settings.pop(key) for key in list(settings) if key in how}
    config = entry.config(**(SETTINGS.get(name, {}) | settings))
    found = SIGNALS[entry.signal] if signals is None else signals
    return entry.make_source(found, policy.renderer, config, **how)


def trainer_of(name: str, policy: LanguagePolicy, out: Path, **settings: Any) -> Trainer:
    entry = ALGORITHMS[name]
    config = entry.config(**(SETTINGS.get(name, {}) | settings))
    source = source_of(name, policy, **settings)
    batch = min(6, len(source))
    train = TrainConfig(steps=1, batch_size=batch, warmup=0, lr=1e-3)
    return Trainer(policy, entry, source, train, algorithm_config=config, out=out)


def disturbed(policy: LanguagePolicy) -> LanguagePolicy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return policy


def test_the_family_is_what_the_guide_lists() -> None:
    assert RENDERED == [
        "c-rlft",
        "coh",
        "demonstration-retrieval",
        "ilf",
        "journey",
        "lemma",
        "mistake-tuning",
        "reward-augmented-dpo",
        "rise",
    ]


@pytest.mark.parametrize("name", RENDERED)
def test_one_step_moves_the_policy(name: str, policy: LanguagePolicy, tmp_path: Path) -> None:
    before = policy.weights_sha256()
    result = trainer_of(name, policy, tmp_path).train()
    assert result.steps == 1 and result.weights_sha256 != before
    assert all(math.isfinite(value) for value in result.metrics.values())
    if name == "reward-augmented-dpo":
        assert result.metrics["loss"] == pytest.approx(math.log(2.0), abs=1e-6)


@pytest.mark.parametrize("name", RENDERED)
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_cut(
    name: str, policy: LanguagePolicy, tmp_path: Path
) -> None:
    trainer = trainer_of(name, policy, tmp_path)
    trainer._prepare_reference()
    disturbed(policy)  # after its reference was read: margins of 0 have the sign of their rounding
    examples = trainer.source.batch(0, trainer.config.batch_size)
    found = []
    for budget in (1, 1 << 30):
        trainer.optimiser.clear()
        trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget})
        metrics = trainer.accumulate(examples)
        grads = [p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None]
        found.append((torch.cat(grads), metrics))
    (one, metrics), (whole, other) = found
    assert torch.dot(one, whole) / (one.norm() * whole.norm()) > 0.999999
    assert float(one.norm() / whole.norm()) == pytest.approx(1.0, rel=1e-5)
    assert metrics == pytest.approx(other, rel=1e-4, abs=1e-6)


def plain_nll(policy: LanguagePolicy, row: Rendered) -> list[float]:
    """Full logits, one row: nothing of the fast path."""
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        every = policy.model(input_ids=ids).logits[0, :-1].double().log_softmax(dim=-1)
    return [-float(every[i - 1, row.ids[i]]) for i, kind in enumerate(row.kinds) if kind in SCORED]


def plain_loss(policy: LanguagePolicy, examples: Sequence[TokenExample], by: str) -> float:
    total, divisor = 0.0, 0.0
    for example in examples:
        nll = plain_nll(policy, example.rows[0])
        if by == "answers":
            # Each answer's mean over its tokens, weighted by the answer.
            total += example.weight * sum(nll) / len(nll)
            divisor += example.weight
            continue
        for value, weight in zip(nll, example.token_weights, strict=True):
            total += example.weight * weight * value
            divisor += 1.0 if by == "tokens" else example.weight * weight
    return total / divisor


@pytest.mark.parametrize(
    ("name", "by", "settings"),
    [
        ("coh", "tokens", {"past_mask": 0.0}),
        ("c-rlft", "weights", {}),
        ("c-rlft", "answers", {"per_answer": True}),
        ("mistake-tuning", "tokens", {"mask_prompt": False}),
        ("lemma", "tokens", {"mistake_weight": 0.0}),
        ("journey", "tokens", {"mistake_weight": 0.5}),
        ("rise", "answers", {"keep": "all"}),
        ("ilf", "tokens", {}),
        ("demonstration-retrieval", "tokens", {}),
    ],
)
def test_the_loss_is_the_one_that_is_meant(
    name: str, by: str, settings: dict[str, Any], policy: LanguagePolicy, tmp_path: Path
) -> None:
    trainer = trainer_of(name, disturbed(policy), tmp_path, **settings)
    examples = trainer.source.batch(0, trainer.config.batch_size)
    assert len({example.weight for example in examples}) > 1 or name not in ("c-rlft", "rise")
    found = trainer.accumulate(examples)["loss"]
    assert found == pytest.approx(plain_loss(policy, examples, by), rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RENDERED)
def test_training_texts_begin_as_serving_begins(name: str, policy: LanguagePolicy) -> None:
    """What serving puts before a prompt stands in the training rows, token by token."""
    entry = ALGORITHMS[name]
    config = entry.config(**SETTINGS.get(name, {}))
    serving = entry.serving(config) if entry.serving is not None else Serving()
    assert isinstance(serving, Serving) and Serving.from_json(serving.to_json()) == serving
    if serving.demonstrations:
        return  # what stands before depends on the bank; tests/align/rendering/test_serving.py
    prompts = {s.prompt for s in SIGNALS[entry.signal] if getattr(s, "quality", "") in ("", "expert")}
    served = [serving.prompt(policy.renderer, prompt).ids for prompt in prompts]
    rows = [example.rows[0].ids for example in source_of(name, policy).examples]
    assert all(any(row[: len(ids)] == ids for row in rows) for ids in served)


def test_every_row_ends_with_the_end_of_a_turn_that_is_learnt(policy: LanguagePolicy) -> None:
    for name in RENDERED:
        for example in source_of(name, policy).examples:
            for row in example.rows:
                assert row.ids[-1] in policy.end_ids and row.kinds[-1] in SCORED, name


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RENDERED)
def test_a_signal_without_a_prompt_is_named_and_the_rest_goes_on(name: str, policy: LanguagePolicy) -> None:
    signals = list(SIGNALS[ALGORITHMS[name].signal])
    signals[1] = replace(signals[1], prompt=())
    with pytest.raises(Unusable, match="no_prompt"):
        source_of(name, policy, signals)
    source = source_of(name, policy, signals, invalid="skip")
    assert source.skipped == {"no_prompt": 1} and len(source) > 0


@pytest.mark.parametrize("name", RENDERED)
def test_nothing_to_learn_from_is_an_error(name: str, policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError):
        source_of(name, policy, [])


def test_classes(policy: LanguagePolicy, recorded_events: list[object]) -> None:
    mixed = [demonstrated(quality="mixed"), demonstrated("R?", quality="mixed")]
    with pytest.raises(BadInputError, match=r"best_class_missing: .*'expert'.*mixed 2"):
        source_of("c-rlft", policy, mixed)
    source_of("c-rlft", policy, mixed, best="mixed")
    assert "one_class" in {event.name for event in recorded_events if isinstance(event, Alert)}
    source = source_of("c-rlft", policy, [*mixed, demonstrated("S?")], best="mixed", invalid="skip")
    assert source.skipped == {"no_class": 1}


def test_more_mistakes_than_right_rationales_are_said(
    policy: LanguagePolicy, recorded_events: list[object]
) -> None:
    def alerts() -> list[str]:
        return [event.message for event in recorded_events if isinstance(event, Alert)]

    source_of("mistake-tuning", policy)  # half and half
    assert not alerts()
    source_of("mistake-tuning", policy, [*TASKS, attempts(attempt("7", False))])
    assert any("5 of 9" in message for message in alerts())


def test_a_chain_that_the_template_refuses_is_left_out_and_the_rest_goes_on(policy: LanguagePolicy) -> None:
    alternating = type(policy.renderer)(
        policy.tokenizer,
        "{% for m in messages %}{% if loop.index0 > 0 and m['role'] == messages[loop.index0 - 1]['role'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    entry = ALGORITHMS["coh"]
    how: dict[str, Any] = {"max_length": 400, "seed": 0, "episodes": {}}
    make: Callable[..., Any] = entry.make_source  # type: ignore[assignment]
    source = make(SIGNALS["pairs"], alternating, entry.config(), invalid="skip", **how)
    assert len(source) == 8 and source.skipped == {"not_renderable": 8}
    with pytest.raises(Unusable, match="roles must alternate"):
        make(SIGNALS["pairs"], alternating, entry.config(), invalid="raise", **how)
    assert (
        len(make(SIGNALS["pairs"], alternating, entry.config(placement="user"), invalid="raise", **how)) == 16
    )


def test_scores_that_are_all_equal_and_rankings_that_are_ties(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match="scores_all_equal"):
        source_of("reward-augmented-dpo", policy, [ranked(["a", "b"], [1.0, 1.0])])
    signals = [
        ranked(["a", "b"], [1.0, 3.0]),
        ranked(["a", "b"], [2.0, 2.0]),
        ranked(["a", "b"], [2.0, math.nan]),
    ]
    source = source_of("reward-augmented-dpo", policy, signals, invalid="skip")
    assert len(source) == 2 and source.skipped == {"tie": 1, "too_few_scores": 1}


def test_neighbours_give_way_to_the_question_and_its_answer(policy: LanguagePolicy) -> None:
    lengths = {}
    for max_length in (90, 400):
        source = source_of("demonstration-retrieval", policy, max_length=max_length, shuffle=False)
        lengths[max_length] = [len(example.rows[0]) for example in source.examples]
        assert all(example.prompt_tokens_cut == 0 for example in source.examples)
        assert all(
            f"price of {fruit}" in marked(source.examples[n], policy.renderer).rsplit("user\n", 1)[1]
            for n, fruit in enumerate(["apple", "pear", "plum and quince", "cherry"])
        )
    assert max(lengths[90]) <= 90 and min(lengths[400]) > max(lengths[90])
    with pytest.raises(Unusable, match=r"too_long: .*no demonstration fits"):
        source_of("demonstration-retrieval", policy, max_length=50)
    alone = [SIGNALS["demonstrations"][0]]
    with pytest.raises(Unusable, match="no_neighbours"):
        source_of("demonstration-retrieval", policy, alone)


def test_only_words_of_answers_are_read_as_others(policy: LanguagePolicy) -> None:
    source = source_of("coh", policy, past_mask=1.0)
    changed = 0
    for step in range(6):
        for example in source.batch(step, 4):
            [row] = example.rows
            other = [i for i in range(len(row)) if row.fed[i] != row.ids[i]]
            assert {policy.renderer.decode([row.ids[i]]) for i in other} <= set("yes no0123")
            assert set(other) <= set(row.scored) and not {row.ids[i] for i in other} & set(policy.end_ids)
            changed += len(other)
    assert changed > 20
    plain = source_of("coh", policy, past_mask=0.0)
    assert all(example.rows[0].inputs is None for example in plain.batch(0, 16))
