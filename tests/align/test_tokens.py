"""Demonstrations with token weights: what is learnt, from which token, and how much."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.tokens import TOKEN_ORACLES
from torch import Tensor

from corrigible.align import (
    ALGORITHMS,
    MFTConfig,
    OTRConfig,
    SFTConfig,
    TokenExample,
    TokenSource,
    TrainConfig,
    Trainer,
    Unusable,
    demonstration_source,
)
from corrigible.align.corruptors import MaskedThought
from corrigible.align.sources import row_key
from corrigible.align.tokens import character_weights, token_weights, weighted_example
from corrigible.errors import BadInputError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models import LanguagePolicy, Rendered, TokenKind
from corrigible.records import Episode, Message, Step
from corrigible.store.signals import Demonstrated

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord"]
NAMES = tuple(TOKEN_ORACLES)


def demonstrated(prompt: str, response: str, /, *, number: int = 0, **changes: object) -> Demonstrated:
    fields: dict[str, object] = {
        "prompt": (Message(role="user", content=prompt),),
        "response": (Message(role="assistant", content=response),),
        "weight": 1.0,
        "group": prompt,
        "annotators": ("ada",),
        "derived_from": (f"f{number:06d}",),
    }
    return Demonstrated(**(fields | changes))  # type: ignore[arg-type]


def demonstrations(count: int, seed: int = 0) -> list[Demonstrated]:
    """Uneven lengths and weights; every other one has spans, some of them unwanted."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        prompt = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        response = "yes " + " ".join(rng.choices(WORDS, k=rng.randint(0, 3)))
        spans = ((0, 2, -1.5), (3, 4, 0.25)) if number % 2 else ()
        made.append(
            demonstrated(
                prompt,
                response,
                number=number,
                weight=0.5 + number % 3,
                spans=spans,
                quality=("expert", "")[number % 2],
            )
        )
    return made


def settings_of(name: str) -> Any:
    """Settings away from the defaults wherever that changes the loss."""
    wanted: dict[str, dict[str, object]] = {
        "sft": {"label_smoothing": 0.2, "log_entropy": True, "normaliser": "tokens"},
        "weighted-sft": {"quality_weights": {"expert": 2.0}},
        "dft": {"normaliser": "sequences"},
        "otr": {"kappa": 1.5, "beta": -0.3},
        "unlikelihood-tokens": {"alpha": 0.7, "normaliser": "tokens"},
        "mft": {"share": 0.5, "ramp": 0.0},
    }
    return ALGORITHMS[name].config.model_validate(wanted[name])


def source_of(
    name: str, policy: LanguagePolicy, config: Any, found: Sequence[Demonstrated], seed: int = 0
) -> TokenSource:
    make = ALGORITHMS[name].make_source
    assert make is not None
    made = make(found, policy.renderer, config, max_length=256, seed=seed, invalid="raise", episodes={})
    assert isinstance(made, TokenSource)
    return made


def trainer_of(name: str, policy: LanguagePolicy, out: Path, count: int = 6, **settings: object) -> Trainer:
    config = settings_of(name)
    return Trainer(
        policy,
        ALGORITHMS[name],
        source_of(name, policy, config, demonstrations(count)),
        TrainConfig.model_validate({"steps": 1, "batch_size": count} | settings),
        algorithm_config=config,
        out=out,
    )


# -- from characters to tokens --------------------------------------------------------------------


def test_characters_weigh_what_their_span_does() -> None:
    spans = ((1, 3, 0.5), (3, 4, -2.0), (5, 6, 0.0))
    assert character_weights("abcdef", spans).tolist() == [1, 0.5, 0.5, -2, 1, 0]
    assert character_weights("abcdef", spans, "weights").tolist() == [1, 0.5, 0.5, 0, 1, 0]
    assert character_weights("abcdef", spans, "keep").tolist() == [1, 1, 1, 0, 1, 0]
    for wrong in (
        [(0, 7, 1.0)],
        [(2, 2, 1.0)],
        [(-1, 2, 1.0)],
        [(0, 3, 1.0), (2, 4, 1.0)],
        [(0, 1, math.nan)],
    ):
        with pytest.raises(Unusable, match="bad_span"):
            character_weights("abcdef", wrong)


def test_a_token_across_a_border_takes_the_mean_of_its_characters() -> None:
    weights = np.array([1.0, 1.0, 0.0, 0.0, 4.0])
    places = [(0, 2), (1, 3), (1, 5), (2, 4), (4, 5), (5, 5), (3, 3), (0, 0), None]
    #                                      the rest of a character: that of the one before
    assert token_weights(places, weights) == (1.0, 0.5, 1.25, 0.0, 4.0, 4.0, 0.0, 1.0, 1.0)
    assert token_weights([(0, 3)], np.full(3, 0.1)) == (0.1,)  # not rounded
    assert token_weights([(0, 0), None], np.zeros(0)) == (1.0, 1.0)


@pytest.mark.parametrize("text", ["yes, naïve 日本語 🙂 end", "plain words only"])
@pytest.mark.parametrize("sampled", [False, True], ids=["written", "sampled"])
def test_spans_reach_the_tokens_that_spell_them(policy: LanguagePolicy, text: str, sampled: bool) -> None:
    start, stop = len(text) // 3, 2 * len(text) // 3
    one = demonstrated("Why?", text, spans=((start, stop, 0.5),), episode="e")
    episodes = {}
    if sampled:
        prompt = policy.renderer.prompt(one.prompt).ids
        ids = [*policy.renderer.tokenizer(text)["input_ids"], policy.renderer.end_of_turn_ids[0]]
        episodes["e"] = episode_of(text, prompt, ids)
    source = demonstration_source([one], policy.renderer, spans="weights", episodes=episodes)
    (example,) = source.examples
    (row,) = example.rows
    assert (TokenKind.SAMPLED in row.kinds) is sampled
    said = [row.ids[i] for i in row.scored]
    assert said[-1] in policy.renderer.end_of_turn_ids and example.token_weights[-1] == 1.0
    light = [i for i, w in zip(said, example.token_weights, strict=True) if w == 0.5]
    rest = [i for i, w in zip(said[:-1], example.token_weights, strict=False) if w == 1.0]
    assert len(light) + len(rest) == len(said) - 1
    assert policy.renderer.decode(light) == text[start:stop]
    assert policy.renderer.decode(rest) == text[:start] + text[stop:]


def episode_of(text: str, prompt: Sequence[int], ids: Sequence[int]) -> Episode:
    return Episode(
        task="t",
        steps=(
            Step(
                observation=[Message(role="user", content="Why?")],
                action=Message(role="assistant", content=text),
                token_ids=tuple(ids),
                prompt_token_ids=tuple(prompt),
                done=True,
            ),
        ),
    )


def test_what_weighs_nothing_is_read_but_not_scored(policy: LanguagePolicy) -> None:
    whole = demonstrated("Why?", "bad good")
    part = dataclasses.replace(whole, spans=((0, 4, 0.0),))
    full, half = (demonstration_source([one], policy.renderer).examples[0] for one in (whole, part))
    assert half.rows[0].ids == full.rows[0].ids and len(half.token_weights) == len("good") + 1
    assert policy.renderer.decode([half.rows[0].ids[i] for i in half.rows[0].scored]) == "good"
    assert half.places == full.places  # a corruptor may still touch it
    end = dataclasses.replace(whole, spans=((4, 8, -1.0),))
    # What comes last and weighs nothing is not even read, but the end of the turn weighs 1.
    (example,) = demonstration_source([end], policy.renderer).examples
    assert example.rows[0].ids == full.rows[0].ids and example.token_weights == (1.0,) * 5


def test_spans_may_be_kept_weighed_or_signed(policy: LanguagePolicy) -> None:
    one = demonstrated("Why?", "abcd", spans=((0, 1, -2.0), (1, 2, 0.25)))
    found = {
        mode: demonstration_source([one], policy.renderer, spans=mode).examples[0].token_weights
        for mode in ("keep", "weights", "signed")
    }
    assert found == {
        "keep": (1.0, 1.0, 1.0, 1.0),
        "weights": (0.25, 1.0, 1.0, 1.0),
        "signed": (-2.0, 0.25, 1.0, 1.0, 1.0),
    }


def test_a_response_of_several_messages_counts_its_characters_through(policy: LanguagePolicy) -> None:
    response = (
        Message(role="assistant", content="one"),
        Message(role="user", content="more"),
        Message(role="assistant", content="two"),
    )
    at = len("one\n\nmore\n\n")
    one = demonstrated("Why?", "", response=response, spans=((at, at + 2, 0.5),))
    (example,) = demonstration_source([one], policy.renderer, spans="weights").examples
    assert example.token_weights == (1.0,) * 4 + (0.5, 0.5, 1.0, 1.0)


def test_a_long_prompt_is_cut_and_places_move_along(policy: LanguagePolicy) -> None:
    row = policy.renderer.pair(
        [Message(role="user", content="x" * 60)], [Message(role="assistant", content="abc")]
    )
    may = [i % 2 == 0 for i in range(len(row))]
    example = weighted_example(
        row,
        (0.0, 1.0, 2.0, 1.0),
        policy.renderer,
        max_length=40,
        weight=2.0,
        group="g",
        derived_from=("f",),
        corruptible=may,
    )
    (cut,) = example.rows
    assert len(cut) == 40 and example.prompt_tokens_cut == cut.dropped > 0
    assert example.token_weights == (1.0, 2.0, 1.0)
    dropped = cut.dropped
    assert cut.ids[0] == row.ids[0]  # the beginning of the sequence stays
    assert example.corruptible == (may[0], *may[1 + dropped : row.scored[-1] + 1])


# -- what cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"response": (Message(role="assistant", content="  "),)}, "empty_completion"),
        ({"weight": 0.0}, "bad_weight"),
        ({"weight": math.nan}, "bad_weight"),
        ({"spans": ((0, 99, 1.0),)}, "bad_span"),
        ({"spans": ((0, 6, 0.0),)}, "nothing_weighted"),
        ({"response": (Message(role="assistant", content="y" * 300),)}, "too_long"),
        ({"episode": "other", "spans": ((0, 2, 0.5),)}, "text_differs"),
    ],
)
def test_an_unusable_demonstration_is_named_and_the_others_go_on(
    policy: LanguagePolicy, changes: dict[str, object], reason: str
) -> None:
    good = demonstrated("Why?", "answer")
    bad = dataclasses.replace(good, **changes)  # type: ignore[arg-type]
    prompt = policy.renderer.prompt(good.prompt).ids
    episodes = {"other": episode_of("zzz", prompt, [99, 99, 2])}
    options: dict[str, Any] = {"max_length": 128, "episodes": episodes}
    with pytest.raises(Unusable, match=rf"{reason}: demonstration 1 of 2") as caught:
        demonstration_source([good, bad], policy.renderer, **options)
    assert caught.value.reason == reason
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        source = demonstration_source([good, bad], policy.renderer, invalid="skip", **options)
    assert len(source) == 1 and source.skipped == {reason: 1}
    assert [e.name for e in seen if isinstance(e, Alert)] == ["demonstrations_skipped"]


def test_nothing_to_train_on_and_wrong_weights_are_errors(policy: LanguagePolicy) -> None:
    with pytest.raises(BadInputError, match="no demonstration to train on"):
        demonstration_source([], policy.renderer)
    with pytest.raises(BadInputError, match="no text to train on"):
        TokenSource([])
    with pytest.raises(BadInputError, match="quality class 'expert' weighs 0"):
        demonstration_source(demonstrations(2), policy.renderer, quality_weights={"expert": 0})
    row = Rendered.from_tokens(range(10, 20), [5, 2])
    with pytest.raises(BadInputError, match="1 weights for 2 scored tokens"):
        TokenExample((row,), (1.0,), 1.0, "g", ())
    with pytest.raises(BadInputError, match="corruptible speaks of 1 tokens"):
        TokenExample((row,), (1.0, 1.0), 1.0, "g", (), corruptible=(True,))


def test_demonstrations_without_unwanted_spans_have_nothing_to_push_down(policy: LanguagePolicy) -> None:
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        source_of("unlikelihood-tokens", policy, None, [demonstrated("Why?", "so")])
        source_of("unlikelihood-tokens", policy, None, demonstrations(2))
    assert [e.name for e in seen if isinstance(e, Alert)] == ["nothing_unwanted"]


# -- batches that are corrupted --------------------------------------------------------------------


@pytest.fixture
def masked(policy: LanguagePolicy) -> TokenSource:
    config = MFTConfig(share=0.5)
    return source_of("mft", policy, config, demonstrations(6), seed=3)


def fed(examples: Sequence[TokenExample]) -> list[tuple[int, ...]]:
    return [one.rows[0].fed for one in examples]


def test_every_epoch_reads_an_example_differently(masked: TokenSource, policy: LanguagePolicy) -> None:
    source = masked.over(2)  # the ramp is over after one step
    plain = {one.derived_from: one for one in source.examples}
    first, second = source.batch(2, 6), source.batch(3, 6)
    reading = [{one.derived_from: one.rows[0].fed for one in batch} for batch in (first, second)]
    assert reading[0].keys() == reading[1].keys()
    assert all(reading[0][key] != reading[1][key] for key in reading[0])
    for one in (*first, *second):
        row, before = one.rows[0], plain[one.derived_from].rows[0]
        assert row.ids == before.ids and row.scored == before.scored and row.inputs is not None
        touched = {i for i, (a, b) in enumerate(zip(row.ids, row.fed, strict=True)) if a != b}
        assert touched <= set(plain[one.derived_from].places)
        assert not any(row.ids[i] in policy.renderer.special_ids for i in touched)
        assert not any(row.fed[i] in policy.renderer.special_ids for i in touched)
    # A resumed run asks for the same step again; the examples themselves stay what they were.
    assert fed(source.batch(2, 6)) == fed(first)
    assert all(one.rows[0].inputs is None for one in source.examples)


def test_the_mask_ramps_up_with_the_run(masked: TokenSource) -> None:
    def hidden(source: TokenSource, step: int) -> int:
        return sum(
            a != b
            for one in source.batch(step, 6)
            for a, b in zip(one.rows[0].ids, one.rows[0].fed, strict=True)
        )

    assert hidden(masked.over(30), 0) == 0
    assert hidden(masked.over(30), 3) < hidden(masked.over(30), 25)
    assert hidden(masked, 0) > 0  # nobody said how long the run is: the ramp counts as over
    assert hidden(masked.over(30), 3) != hidden(masked.over(10), 3)


def test_the_digest_tells_what_decides_the_batches(policy: LanguagePolicy) -> None:
    found = demonstrations(4)

    def digest(**options: Any) -> str:
        return demonstration_source(found, policy.renderer, **options).digest()

    mask = MaskedThought(0.5, (0,))
    different = {
        digest(),
        digest(seed=1),
        digest(spans="weights"),
        digest(quality_weights={"expert": 3.0}),
        digest(corruptor=mask),
        digest(corruptor=dataclasses.replace(mask, share=0.4)),
    }
    assert len(different) == 6 and digest() in different and digest(corruptor=mask) in different


def test_a_corrupted_row_is_another_row() -> None:
    row = Rendered.from_tokens(range(10, 20), [5, 2])
    read = dataclasses.replace(row, inputs=(0, *row.ids[1:]))
    assert row_key(row) != row_key(read) and row != read
    assert row_key(dataclasses.replace(row, inputs=None)) == row_key(row)


# -- the trainer ----------------------------------------------------------------------------------


def plain_logits(policy: LanguagePolicy, row: Rendered) -> Tensor:
    """Before each scored token: one row, full logits, nothing of the fast path."""
    logits = policy.model(input_ids=torch.tensor([row.fed])).logits[0]
    found: Tensor = logits[[i - 1 for i in row.scored]]
    return found.float()


def flat(trainer: Trainer) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in trainer.parameters.values() if p.grad is not None])


def disturbed(policy: LanguagePolicy) -> LanguagePolicy:
    """Give a fresh adapter an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_the_oracles_however_the_batch_is_cut(
    name: str, policy: LanguagePolicy, tmp_path: Path
) -> None:
    """Value and slope after every logit come from scalar loops; the rest of the gradient from autograd."""
    trainer = trainer_of(name, disturbed(policy), tmp_path)
    config = trainer.algorithm_config
    examples: list[TokenExample] = trainer.source.batch(0, 6)  # type: ignore[assignment]
    alpha = getattr(config, "alpha", 1.0)
    logits = [plain_logits(policy, one.rows[0]) for one in examples]
    loss, slopes = TOKEN_ORACLES[name](
        [each.double().tolist() for each in logits],
        [[one.rows[0].ids[i] for i in one.rows[0].scored] for one in examples],
        [[one.weight * w * (alpha if w < 0 else 1.0) for w in one.token_weights] for one in examples],
        normaliser=config.normaliser,  # type: ignore[attr-defined]
        smoothing=getattr(config, "label_smoothing", 0.0),
        kappa=getattr(config, "kappa", 1.0),
        beta=getattr(config, "beta", 0.0),
    )
    trainer.optimiser.clear()
    torch.autograd.backward(logits, [torch.tensor(each) for each in slopes])
    wanted = flat(trainer)
    if name == "mft":
        assert any(one.rows[0].inputs is not None for one in examples)
    longest = max(len(row) for one in examples for row in one.rows)
    metrics = []
    for budget in (1, 5 * longest // 2, 1 << 30):
        trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": budget})
        trainer.optimiser.clear()
        metrics.append(trainer.accumulate(examples))
        found = flat(trainer)
        assert float(torch.dot(found, wanted) / (found.norm() * wanted.norm())) >= 0.999999
        assert abs(float(found.norm() / wanted.norm()) - 1) <= 1e-4
        assert metrics[-1]["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics[-1] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_divides_by_itself_would_be_noticed(
    name: str, policy: LanguagePolicy, tmp_path: Path
) -> None:
    trainer = trainer_of(name, disturbed(policy), tmp_path)
    examples = trainer.source.batch(0, 6)
    trainer.accumulate(examples)
    right, plain = flat(trainer), trainer.algorithm
    assert plain.measure is not None
    measure = plain.measure

    def own_totals(batch: Any, config: Any) -> Any:
        return plain.objective(dataclasses.replace(batch, whole=measure(batch, config)), config)

    trainer.algorithm = dataclasses.replace(plain, objective=own_totals)
    trainer.config = trainer.config.model_copy(update={"micro_batch_tokens": 1})
    trainer.optimiser.clear()
    trainer.accumulate(examples)
    assert abs(float(flat(trainer).norm() / right.norm()) - 1) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_every_algorithm(name: str, policy: LanguagePolicy, tmp_path: Path) -> None:
    """Through the front door, with the watch that checks the cut and the end of every turn."""
    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    entry = ALGORITHMS[name]
    assert (entry.family, entry.signal, entry.source) == ("tokens", "demonstrations", "tokens")
    assert not entry.needs_reference and "demonstration" in entry.learns_from and len(entry.doc) > 80
    trainer = trainer_of(name, policy, tmp_path, steps=2, micro_batch_tokens=200, lr=1e-3)
    trainer.bus = bus
    result = trainer.train()
    assert result.steps == 2 and math.isfinite(result.metrics["loss"])
    assert trainer.reference is None and result.weights_sha256 != result.start_sha256
    assert not [e for e in seen if isinstance(e, Alert)]
    wanted = {"loss", "nll", "probability", "nll/sequence", "weight", "grad_weight"}
    more = {"sft": {"entropy"}, "unlikelihood-tokens": {"unwanted/probability"}}.get(name, set())
    logged = set(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]))
    assert logged - {"step", "grad_norm", "lr", "examples", "tokens_per_second"} == wanted | more


@pytest.mark.parametrize("name", ["sft", "dft", "otr", "mft"])
def test_it_learns(name: str, policy: LanguagePolicy, tmp_path: Path) -> None:
    found = [demonstrated(f"{i} {WORDS[i % 6]}", "yes") for i in range(8)]
    config = ALGORITHMS[name].config()
    trainer = Trainer(
        policy,
        ALGORITHMS[name],
        source_of(name, policy, config, found),
        TrainConfig(steps=20, batch_size=8, lr=2e-2),
        algorithm_config=config,
        out=tmp_path,
    )
    before = trainer.accumulate(trainer.source.examples)
    trainer.train()
    after = trainer.accumulate(trainer.source.examples)
    assert after["probability"] > 2 * before["probability"]
    if name in ("sft", "mft"):  # the others leave a token alone that the policy finds impossible
        assert after["nll"] < 0.6 * before["nll"]


def test_what_is_unwanted_falls_while_the_rest_is_learnt(policy: LanguagePolicy, tmp_path: Path) -> None:
    found = [demonstrated(f"{i}?", "zz yes", spans=((0, 2, -1.0),)) for i in range(6)]
    config = ALGORITHMS["unlikelihood-tokens"].config()
    source = source_of("unlikelihood-tokens", policy, config, found)
    settings = TrainConfig(steps=20, batch_size=6, lr=1e-2)
    # First the policy learns to say it, then somebody marks it.
    sft = source_of("sft", policy, SFTConfig(), [dataclasses.replace(one, spans=()) for one in found])
    Trainer(policy, ALGORITHMS["sft"], sft, settings, out=tmp_path / "sft").train()
    trainer = Trainer(policy, ALGORITHMS["unlikelihood-tokens"], source, settings, out=tmp_path / "after")
    before = trainer.accumulate(source.examples)
    trainer.train()
    after = trainer.accumulate(source.examples)
    assert before["unwanted/probability"] > 0.3 > 0.1 > after["unwanted/probability"]
    assert after["nll"] < before["nll"]


def test_an_interrupted_run_with_masks_ends_with_the_same_bits(
    make_policy: Callable[..., LanguagePolicy], tmp_path: Path
) -> None:
    def run(out: str, stop: int | None = None) -> str:
        policy = make_policy()
        trainer = trainer_of(
            "mft", policy, tmp_path / out, steps=6, batch_size=2, checkpoint_every=2, lr=1e-2
        )
        if stop is None:
            return trainer.train(resume=True).weights_sha256
        plain = trainer._step

        def killed(step: int) -> dict[str, float]:
            if step == stop:
                raise KeyboardInterrupt
            return plain(step)

        trainer._step = killed  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return ""

    run("a", stop=3)
    assert run("a") == run("b")


def test_another_temperature_of_sampling_is_another_loss(policy: LanguagePolicy, tmp_path: Path) -> None:
    """The engine is asked for the expected log-prob at kappa, and only where somebody asks."""
    assert OTRConfig(kappa=1.7).expected_at == 1.7
    assert SFTConfig().expected_at is None and SFTConfig(label_smoothing=0.1).expected_at == math.inf
    assert not SFTConfig().asks_entropy and SFTConfig(log_entropy=True).asks_entropy
    losses = []
    for kappa in (1.0, 2.0):
        trainer = trainer_of("otr", policy, tmp_path / str(kappa))
        trainer.algorithm_config = OTRConfig(kappa=kappa, beta=-0.3)
        losses.append(trainer.accumulate(trainer.source.batch(0, 6))["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
