"""Pairs as examples: the order, the cut, sampled ids, and every reason to refuse one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrigible.align import PairSource, TrainConfig, Unusable, reference_logprobs, train_dpo
from corrigible.errors import BadInputError
from corrigible.events import Alert, EventBus, use_bus
from corrigible.models import LanguagePolicy, generate, sequence_logprobs, to_episode
from corrigible.models.scoring import Scorer
from corrigible.records import Annotator, Item, Message, PolicyVersion, Sampling, comparison
from corrigible.store import Pair, Store, load_pairs


def test_every_epoch_is_a_permutation_that_the_seed_decides(
    policy: LanguagePolicy, make_pairs: Callable
) -> None:
    pairs = make_pairs(10)
    source = PairSource(pairs, policy.renderer, seed=4)
    again = PairSource(pairs, policy.renderer, seed=4)
    other = PairSource(pairs, policy.renderer, seed=5)
    assert source.steps_per_epoch(4) == 3
    orders = []
    for epoch in range(3):
        batches = [source.batch(3 * epoch + step, 4) for step in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        order = [example.derived_from for batch in batches for example in batch]
        assert Counter(order) == Counter(pair.derived_from for pair in pairs)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert [again.batch(step, 4) for step in range(9)] == [source.batch(step, 4) for step in range(9)]
    assert [other.batch(step, 4) for step in range(9)] != [source.batch(step, 4) for step in range(9)]


def test_the_digest_knows_everything_that_decides_the_batches(
    policy: LanguagePolicy, make_pairs: Callable
) -> None:
    pairs = make_pairs(4)

    def digest(changed: list[Pair], **options: int) -> str:
        return PairSource(changed, policy.renderer, **options).digest()

    plain = digest(pairs)
    assert plain == digest(make_pairs(4))
    assert (
        len(
            {
                plain,
                digest(pairs, seed=1),
                digest(pairs[:3]),
                digest(pairs[::-1]),
                digest([*pairs[:3], dataclasses.replace(pairs[3], weight=2.0)]),
                digest([*pairs[:3], dataclasses.replace(pairs[3], p_chosen=0.9)]),
                digest([*pairs[:3], dataclasses.replace(pairs[3], chosen=pairs[0].chosen)]),
            }
        )
        == 7
    )


def test_only_the_response_and_its_end_are_scored(policy: LanguagePolicy, make_pair: Callable) -> None:
    example = PairSource([make_pair("What?", "yes", "no")], policy.renderer).examples[0]
    for row, text in zip(example.rows, ("yes", "no"), strict=True):
        ids = [row.ids[i] for i in row.scored]
        assert policy.renderer.decode(ids[:-1]) == text
        assert ids[-1] in policy.renderer.end_of_turn_ids
        assert row.scored[-1] == len(row) - 1


def test_a_long_prompt_loses_the_same_tokens_on_both_sides(
    policy: LanguagePolicy, make_pair: Callable
) -> None:
    pair = make_pair("word " * 60, "yes indeed it is so", "no")
    whole = PairSource([pair], policy.renderer, max_length=1000).examples[0]
    cut = PairSource([pair], policy.renderer, max_length=100).examples[0]
    assert max(len(row) for row in cut.rows) == 100
    assert cut.prompt_tokens_cut == max(len(row) for row in whole.rows) - 100 > 0
    for before, after in zip(whole.rows, cut.rows, strict=True):
        assert [before.ids[i] for i in before.scored] == [after.ids[i] for i in after.scored]
    starts = [row.ids[: row.scored[0]] for row in cut.rows]
    assert starts[0] == starts[1]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("equal_sides", {"rejected": (Message(role="assistant", content="yes"),)}),
        ("empty_completion", {"chosen": (Message(role="assistant", content="  "),)}),
        ("empty_completion", {"rejected": ()}),
        ("too_long", {"chosen": (Message(role="assistant", content="y" * 400),)}),
        # It fits, but with next to nothing of its prompt.
        ("too_long", {"chosen": (Message(role="assistant", content="y" * 124),)}),
        ("bad_weight", {"weight": 0.0}),
        ("bad_weight", {"weight": float("nan")}),
        ("bad_label", {"p_chosen": 1.5}),
        ("bad_label", {"p_chosen": float("nan")}),
        ("not_renderable", {"rejected": (Message(role="user", content="no"),)}),
    ],
)
def test_an_unusable_pair_has_a_named_reason(
    policy: LanguagePolicy, make_pair: Callable, reason: str, change: dict
) -> None:
    good, bad = make_pair("A?", "yes", "no"), make_pair("B?", "yes", "no", **change)
    with pytest.raises(Unusable, match=f"^{reason}: pair 1 of 2 from record f000000") as caught:
        PairSource([good, bad], policy.renderer, max_length=128)
    assert caught.value.reason == reason and caught.value.exit_code == 3 and caught.value.advice

    bus, seen = EventBus(), []
    bus.subscribe(seen.append)
    with use_bus(bus):
        source = PairSource([good, bad], policy.renderer, max_length=128, invalid="skip")
    assert source.pairs == [good] and source.skipped == {reason: 1}
    said = [event.message for event in seen if isinstance(event, Alert) and event.name == "pairs_skipped"]
    assert said == [f"Left out of training: 1 {reason} (it came from record f000000)."]


def test_nothing_left_to_train_on_is_an_error(policy: LanguagePolicy, make_pair: Callable) -> None:
    with pytest.raises(BadInputError, match="no pair to train on"):
        PairSource([], policy.renderer)
    with pytest.raises(BadInputError, match="1 equal_sides"):
        PairSource([make_pair("A?", "yes", "yes")], policy.renderer, invalid="skip")


def _judged(policy: LanguagePolicy, store: Store) -> PolicyVersion:
    """Answers that the policy really sampled, as episodes with judgements, in a store."""
    version = PolicyVersion(name="start", base_model="tiny-random", weights=policy.weights_sha256("base"))
    store.add_policies([version])
    sampling = Sampling(max_tokens=12, n=2, seed=0)
    prompts = [[Message(role="user", content=f"Question {i}?")] for i in range(6)]
    groups = generate(policy, prompts, n=2, sampling=sampling, seed=3)
    for prompt, group in zip(prompts, groups, strict=True):
        episodes = [to_episode(prompt, each, version.id, "test", sampling) for each in group]
        store.add_episodes(episodes)
        texts = [Item.of_text(each.text, type="response").sha256 for each in group]
        record, items = comparison(
            prompt, group[0].text, group[1].text, annotator=Annotator(pseudonym="ada", type="human")
        )
        ids = dict(zip(texts, episodes, strict=True))
        targets = tuple(
            target.model_copy(update={"episode": ids[target.sha256].id}) if target.sha256 in ids else target
            for target in record.targets
        )
        store.add_feedback([record.model_copy(update={"targets": targets})], items)
    return version


def test_what_a_policy_sampled_is_trained_on_as_it_was_sampled(
    tmp_path: Path, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes are rarely valid UTF-8: decoded and encoded again they are other tokens."""
    with Store.open(tmp_path / "s.db") as store:
        version = _judged(policy, store)
        pairs = load_pairs(store)
        episodes = {e.id: e for e in store.episodes()}
    source = PairSource(pairs, policy.renderer, episodes=episodes)
    retokenised = PairSource(pairs, policy.renderer)
    changed = 0
    for example, other, pair in zip(source.examples, retokenised.examples, pairs, strict=True):
        for row, alternative, name in zip(
            example.rows, other.rows, (pair.chosen_episode, pair.rejected_episode), strict=True
        ):
            step = episodes[name].steps[0]
            assert tuple(row.ids[i] for i in row.scored) == step.token_ids
            assert tuple(row.ids[: row.scored[0]]) == step.prompt_token_ids
            changed += row.ids != alternative.ids
    assert changed

    # Recorded at sampling = computed now; and when they are used nothing is computed.
    computed = reference_logprobs(policy, source.examples)
    monkeypatch.setattr(Scorer, "__call__", lambda *a, **k: pytest.fail("computed again"))
    reused = reference_logprobs(policy, source.examples, behaviour_weights={version.id: version.weights})
    assert computed.keys() == reused.keys()
    assert all(torch.allclose(computed[key], reused[key], atol=1e-4) for key in computed)


def test_a_store_becomes_a_policy_version_with_lineage(tmp_path: Path, policy: LanguagePolicy) -> None:
    with Store.open(tmp_path / "s.db") as store:
        parent = _judged(policy, store)
        version = train_dpo(
            store,
            policy,
            out=tmp_path / "run",
            config=TrainConfig(steps=2, batch_size=4),
            name="v1",
            parent=parent.id,
        )
        ids = sorted(record.id for record in store.feedback())
        store.add_policies([version])
        assert store.policy("v1") == version
    assert version.trained_on is not None
    assert version.trained_on.feedback == len(ids) == 6
    assert (version.trained_on.first_id, version.trained_on.last_id) == (ids[0], ids[-1])
    assert version.parent == parent.id and version.algorithm == "dpo" and version.base_model == "tiny-random"
    assert version.weights == policy.weights_sha256() != parent.weights
    assert version.adapter is not None and (Path(version.adapter) / "adapter_config.json").exists()


def test_held_out_pairs_must_not_be_trained_on(
    tmp_path: Path, policy: LanguagePolicy, make_pairs: Callable
) -> None:
    pairs = make_pairs(6)
    with pytest.raises(BadInputError, match="1 held-out pairs are also trained on"):
        train_dpo(pairs, policy, out=tmp_path, held_out=pairs[5:])


def test_implicit_reward_against_plain_arithmetic(
    policy: LanguagePolicy, make_policy: Callable, make_pairs: Callable
) -> None:
    from corrigible.align import implicit_reward_accuracy

    pairs = make_pairs(12)
    pairs[3] = dataclasses.replace(pairs[3], p_chosen=0.5)
    pairs[4] = dataclasses.replace(pairs[4], p_chosen=0.2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    base = make_policy(lora=False)
    source = PairSource(pairs, policy.renderer)
    right = []
    for example in source.examples:
        h = [
            float(sequence_logprobs(policy, [row])[0] - sequence_logprobs(base, [row])[0])
            for row in example.rows
        ]
        if example.p_chosen != 0.5:
            right.append((h[0] > h[1]) == (example.p_chosen > 0.5))
    measured = implicit_reward_accuracy(policy, pairs, beta=0.3)
    assert measured.accuracy.value == pytest.approx(sum(right) / 11)
    assert measured.accuracy.low <= measured.accuracy.value <= measured.accuracy.high
    assert measured.ties == 1 and measured.accuracy.n == 11 and len(measured.margins) == 12
    assert measured.margins[-1] == pytest.approx(0.3 * (h[0] - h[1]), abs=1e-4)


def test_implicit_reward_without_reference_is_refused(make_policy: Callable, make_pairs: Callable) -> None:
    from corrigible.align import implicit_reward_accuracy

    with pytest.raises(BadInputError, match="its own reference"):
        implicit_reward_accuracy(make_policy(lora=False), make_pairs(6))
