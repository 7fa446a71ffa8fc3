"""Reward models learn what can be learned, only that, and come back from disk and from a kill the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.errors import BadInputError, MissingError
from corrigible.records import ArrayRef, Episode, Message, Step
from corrigible.rewards import FeatureTable, RewardConfig, RewardModel, Signal, fit_reward, split
from corrigible.rewards.backbones import Backbone, Encoded, Example, token_batches
from corrigible.rewards.baselines import accuracy_rows
from corrigible.rewards.training import table_margins
from corrigible.rewards.tuning import TunedReward
from corrigible.store.pairs import Pair

FROZEN = RewardConfig(text="response", features=(), members=4)
TUNED = RewardConfig(
    tune="full",
    text="prompt+response",
    features=(),
    members=3,
    epochs=3,
    learning_rate=3e-3,
    head_learning_rate=1e-2,
    batch_pairs=32,
)
Known = Callable[..., list[Pair]]
MakeBackbone = Callable[..., Backbone]


def accuracy(model: RewardModel, pairs: list[Pair] | tuple[Pair, ...]) -> float:
    return float(accuracy_rows(model.margins(pairs), np.ones(len(pairs))).mean())


def test_frozen_learns_the_truth_on_unseen_prompts(encoder: MakeBackbone, known: Known) -> None:
    parts = split(known(400), by="prompt", held_out=0.3)
    model = fit_reward(parts.train, config=FROZEN, backbone=encoder(), by="prompt")
    assert accuracy(model, parts.held_out) > 0.85
    assert model.history["validation_log_loss"] and model.history["texts_cut"] == 0


def test_nothing_is_learned_from_shuffled_labels(encoder: MakeBackbone, known: Known) -> None:
    found = []
    table = FeatureTable(encoder(), FROZEN)
    for seed in range(4):
        parts = split(known(300, seed, shuffled=True), by="prompt", held_out=0.5, seed=seed)
        model = fit_reward(parts.train, config=FROZEN, table=table, by="prompt")
        found.append(accuracy(model, parts.held_out))
    assert 0.42 < np.mean(found) < 0.58


def test_tuning_all_weights_learns_what_a_frozen_reader_misses(encoder: MakeBackbone, known: Known) -> None:
    """Which word of the prompt is asked about decides: the response alone says nothing."""
    rng = np.random.default_rng(0)
    pairs = []
    for base in known(240):
        asked = "zz" if rng.random() < 0.5 else "qq"
        sides = [base.chosen_text.replace("z", "q"), base.chosen_text]
        if asked == "zz":
            sides.reverse()
        pairs.append(
            replace(
                base,
                prompt=(Message(role="user", content=f"{base.prompt_text} {asked}"),),
                chosen=(Message(role="assistant", content=sides[0]),),
                rejected=(Message(role="assistant", content=sides[1]),),
            )
        )
    pairs = [p for p in pairs if "z" in p.chosen_text + p.rejected_text]
    train, test = pairs[: len(pairs) * 2 // 3], pairs[len(pairs) * 2 // 3 :]
    blind = fit_reward(train, config=FROZEN, backbone=encoder(), by="item")
    assert accuracy(blind, test) < 0.7
    config = replace(TUNED, epochs=12, validation=0.0, warm_start=False, members=0)
    tuned = fit_reward(train, config=config, backbone=encoder(), by="item")
    assert accuracy(tuned, test) > 0.85


def test_a_tuned_fit_keeps_the_best_epoch_and_never_its_worse_successors(
    encoder: MakeBackbone, known: Known
) -> None:
    parts = split(known(160), by="prompt", held_out=0.3)
    config = replace(TUNED, epochs=4, patience=4)
    model = fit_reward(parts.train, config=config, backbone=encoder(), by="prompt")
    curve = [row["validation_log_loss"] for row in model.history["epochs"]]
    assert model.history["best_validation_log_loss"] == min(curve)
    assert len(curve) == 5 and accuracy(model, parts.held_out) > 0.8


class Killed(Exception):
    pass


def test_a_killed_tuned_fit_resumes_to_the_same_numbers(
    encoder: MakeBackbone, known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = known(64)
    whole = fit_reward(pairs, config=TUNED, backbone=encoder(), by="prompt")
    steps = 0
    real = TunedReward.accumulate

    def dies(*args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:  # in the second epoch
            raise Killed
        return real(*args)

    monkeypatch.setattr(TunedReward, "accumulate", dies)
    with pytest.raises(Killed):
        fit_reward(pairs, config=TUNED, backbone=encoder(), by="prompt", work_dir=tmp_path)
    done = steps
    resumed = fit_reward(pairs, config=TUNED, backbone=encoder(), by="prompt", work_dir=tmp_path)
    assert 0 < steps - done < 2 * done  # the first epoch was not trained again
    assert resumed.history["epochs"] == whole.history["epochs"]
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.members, whole.members)
    for ours, theirs in zip(
        resumed.backbone.module.parameters(), whole.backbone.module.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_training_leaves_the_random_state_alone(encoder: MakeBackbone, known: Known) -> None:
    reader = encoder()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_reward(known(40), config=replace(TUNED, epochs=1), backbone=reader, by="prompt")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("tune", ["frozen", "full"])
def test_saved_and_loaded_scores_are_the_same(
    encoder: MakeBackbone, known: Known, tmp_path: Path, tune: str
) -> None:
    pairs = known(60)
    config = FROZEN if tune == "frozen" else TUNED
    model = fit_reward(pairs, config=config, backbone=encoder(), by="prompt", name="zs", axis="letters")
    model.save(tmp_path / "rm")
    loaded = RewardModel.load(tmp_path / "rm", backbone=encoder())
    assert loaded.margins(pairs).tolist() == model.margins(pairs).tolist()
    assert (loaded.name, loaded.axis, loaded.config) == ("zs", "letters", config)
    assert not list((tmp_path / "rm").glob("*.partial"))


def test_lora_backbone_learns_and_comes_back(causal: MakeBackbone, known: Known, tmp_path: Path) -> None:
    config = RewardConfig(
        backbone="tiny-random",
        tune="lora",
        text="prompt+response",
        pooling="last",
        features=(),
        lora_rank=4,
        epochs=2,
        learning_rate=3e-3,
        members=0,
    )
    parts = split(known(120), by="prompt", held_out=0.3)
    reader = causal(lora=True)
    before = {n: p.clone() for n, p in reader.module.named_parameters() if "lora_" not in n}
    model = fit_reward(parts.train, config=config, backbone=reader, by="prompt")
    assert all(torch.equal(before[n], p) for n, p in reader.module.named_parameters() if n in before)
    assert model.history["epochs"][-1]["train_log_loss"] < 0.68
    model.save(tmp_path)
    loaded = RewardModel.load(tmp_path, device="cpu")
    assert loaded.margins(parts.held_out) == pytest.approx(model.margins(parts.held_out), abs=1e-6)


def test_loading_refuses_what_is_not_there_or_does_not_fit(
    encoder: MakeBackbone, known: Known, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match="holds no reward model"):
        RewardModel.load(tmp_path)
    model = fit_reward(known(40), config=FROZEN, backbone=encoder(), by="prompt")
    model.save(tmp_path)
    with pytest.raises(BadInputError, match="not those the reward model"):
        RewardModel.load(tmp_path, backbone=encoder(seed=1))
    description = json.loads((tmp_path / "reward_model.json").read_text())
    for change, says in (({"format": "other"}, "format"), ({"config": {"depth": 3}}, "depth")):
        (tmp_path / "reward_model.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(BadInputError, match=says):
            RewardModel.load(tmp_path, backbone=encoder())
    (tmp_path / "reward_model.json").write_text(json.dumps(description))
    (tmp_path / "reward_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(BadInputError, match="cannot be read"):
        RewardModel.load(tmp_path, backbone=encoder())


def test_votes_pull_confidence_towards_their_share(encoder: MakeBackbone, known: Known) -> None:
    certain = known(150)
    divided = [replace(p, p_chosen=0.7, weight=5.0) for p in certain]
    sure = fit_reward(certain, config=FROZEN, backbone=encoder(), by="prompt")
    unsure = fit_reward(divided, config=FROZEN, backbone=encoder(), by="prompt")
    rounded = fit_reward(divided, config=replace(FROZEN, labels="majority"), backbone=encoder(), by="prompt")
    assert np.median(unsure.margins(certain)) < 0.6 * np.median(sure.margins(certain))
    assert np.median(rounded.margins(certain)) == pytest.approx(np.median(sure.margins(certain)), rel=0.05)


def text_episode(prompt: str, response: str) -> Episode:
    step = Step(
        observation=(Message(role="user", content=prompt),),
        action=Message(role="assistant", content=response),
        done=True,
    )
    return Episode(task="t", steps=(step,))


def test_it_is_a_signal_over_episodes_and_says_why_not(encoder: MakeBackbone, known: Known) -> None:
    model = fit_reward(known(200), config=FROZEN, backbone=encoder(), by="prompt")
    control = Episode(task="c", steps=(Step(observation=(0.0, 1.0), action=(0.5,), done=True),))
    scores = model.score([text_episode("q", "zzzzzzzz"), control, text_episode("q", "abcdefga")])
    assert isinstance(model, Signal)
    assert scores.reasons == (None, "not_applicable", None)
    assert scores.values[0] > scores.values[2]
    assert scores.uncertainty is not None and scores.uncertainty[0] > 0
    assert scores.values[[0, 2]] == pytest.approx(model.score_texts(["q", "q"], ["zzzzzzzz", "abcdefga"]))
    p = model.prefer([text_episode("q", "zzzzzzzz"), control], [text_episode("q", "abcdefga")] * 2)
    assert p[0] > 0.5 and p[1] == 0.5
    assert len(model.score([])) == 0


def test_array_observations_are_not_text(encoder: MakeBackbone, known: Known) -> None:
    model = fit_reward(known(40), config=replace(FROZEN, members=0), backbone=encoder(), by="prompt")
    frame = ArrayRef(sha256="0" * 64, dtype="uint8", shape=(4, 4))
    scores = model.score([Episode(task="c", steps=(Step(observation=frame, action=(0.5,), done=True),))])
    assert scores.reasons == ("not_applicable",) and scores.uncertainty is None


def test_scores_do_not_depend_on_company_or_order(encoder: MakeBackbone, known: Known) -> None:
    pairs = known(60)
    model = fit_reward(pairs, config=replace(FROZEN, batch_tokens=200), backbone=encoder(), by="prompt")
    together = model.margins(pairs)
    assert model.margins(pairs[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert [model.margins([p])[0] for p in pairs[:5]] == pytest.approx(list(together[:5]), abs=1e-5)


def test_mean_score_of_training_responses_is_zero(encoder: MakeBackbone, known: Known) -> None:
    pairs = known(100)
    model = fit_reward(pairs, config=FROZEN, backbone=encoder(), by="prompt")
    unique = {p.chosen_text: p for p in pairs}
    examples = [Example(tuple(p.prompt), tuple(side)) for p in pairs for side in (p.chosen, p.rejected)]
    assert len(unique) > 10
    assert model.score_examples(examples)[0].mean() == pytest.approx(0, abs=1e-3)


# -- reading ----------------------------------------------------------------------------------------


def rows_for(reader: Backbone, config: RewardConfig, prompt: str, response: str) -> list[list[Encoded]]:
    said = (Message(role="user", content=prompt),) if prompt else ()
    return reader.encode([Example(said, (Message(role="assistant", content=response),))], config)


def test_layouts_and_where_the_response_is(encoder: MakeBackbone) -> None:
    reader = encoder()
    text = reader.tokenizer.decode
    [[alone]] = rows_for(reader, FROZEN, "ask", "answer")
    assert text(alone.ids[alone.start : alone.end]) == "answer"
    [[both]] = rows_for(reader, replace(FROZEN, text="prompt+response"), "ask", "answer")
    assert text(both.ids[both.start : both.end]) == "answer" and "ask" in text(both.ids[: both.start])
    apart = rows_for(reader, replace(FROZEN, text="prompt*response"), "ask", "answer")
    assert len(apart) == 2 and apart[0][0].ids == alone.ids


def test_the_prompts_beginning_is_cut_first_and_counted(encoder: MakeBackbone) -> None:
    config = replace(FROZEN, text="prompt+response", max_length=40)
    reader = encoder()
    [[row]] = rows_for(reader, config, "begin " + "x" * 40 + " end", "answer")
    text = reader.tokenizer.decode
    assert len(row.ids) == 40 and row.cut > 0
    assert text(row.ids[row.start : row.end]) == "answer"
    assert "end" in text(row.ids[: row.start]) and "begin" not in text(row.ids[: row.start])
    [[long]] = rows_for(reader, config, "ask", "y" * 100)
    assert len(long.ids) <= 40 and long.cut >= 60 and text(long.ids[long.start : long.end]).startswith("yyy")


def test_a_causal_reader_keeps_the_response_when_it_cuts(causal: MakeBackbone) -> None:
    config = RewardConfig(backbone="tiny-random", text="prompt+response", pooling="last", max_length=48)
    reader = causal()
    [[row]] = rows_for(reader, config, "start " + "x" * 80 + " end", "answer")
    assert len(row.ids) == 48 and row.end == 48 and row.cut > 0
    assert reader.tokenizer.decode(row.ids[row.start : row.end]).startswith("answer")
    assert row.ids[-1] in reader.renderer.end_of_turn_ids
    [[long]] = rows_for(reader, config, "ask", "y" * 200)
    assert len(long.ids) == 48 and long.ids[-1] == row.ids[-1]


def test_poolings_against_the_hidden_states(encoder: MakeBackbone) -> None:
    reader = encoder()
    base = replace(FROZEN, text="prompt+response")
    [[row]] = rows_for(reader, base, "ask", "answer")
    other = rows_for(reader, base, "a much longer question", "words")[0][0]
    with torch.no_grad():
        out = reader.module(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        last, middle = out.last_hidden_state[0], out.hidden_states[1][0]
        expected = {
            "mean": last.mean(dim=0),
            "response_mean": last[row.start : row.end].mean(dim=0),
            "last": last[-1],
            "first": last[0],
        }
        for pooling, value in expected.items():
            config = replace(base, pooling=pooling)  # type: ignore[arg-type]
            alone = reader.pooled([row], config)[0]
            padded = reader.pooled([row, other], config)[0]
            assert torch.allclose(alone, value, atol=1e-5) and torch.allclose(padded, value, atol=1e-5)
        two = reader.pooled([row], replace(base, layers=(1, -1)))[0]
    assert torch.allclose(two, torch.cat([middle.mean(dim=0), last.mean(dim=0)]), atol=1e-5)


def test_token_batches_respect_the_budget_and_lose_nothing() -> None:
    lengths = [3, 5, 8, 8, 40, 90]
    batches = list(token_batches(lengths, range(6), 32))
    assert [i for batch in batches for i in batch] == list(range(6))
    for batch in batches:
        assert len(batch) == 1 or lengths[batch[-1]] * len(batch) <= 32


# -- the feature table ------------------------------------------------------------------------------


def test_a_table_reads_each_text_once_and_survives_a_kill(
    encoder: MakeBackbone, known: Known, tmp_path: Path
) -> None:
    pairs = known(30)
    reader = encoder()
    first = FeatureTable(reader, FROZEN, tmp_path)
    model = fit_reward(pairs, config=FROZEN, table=first, by="prompt")
    calls = 0
    real = reader.represent

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return real(*args)

    reader.represent = counted  # type: ignore[method-assign]
    assert table_margins(model, first, pairs) == pytest.approx(model.margins(pairs), abs=1e-5)
    calls = 0
    again = FeatureTable(reader, FROZEN, tmp_path)
    assert len(again) == len(first) and table_margins(model, again, pairs) == pytest.approx(
        table_margins(model, first, pairs)
    )
    assert calls == 0
    [piece] = tmp_path.glob("*/*.safetensors")
    piece.write_bytes(b"half a piece")
    assert len(FeatureTable(reader, FROZEN, tmp_path)) == 0 and not piece.exists()


def test_a_table_of_other_settings_is_refused_and_kept_apart(
    encoder: MakeBackbone, known: Known, tmp_path: Path
) -> None:
    reader = encoder()
    table = FeatureTable(reader, FROZEN, tmp_path)
    fit_reward(known(20), config=FROZEN, table=table, by="prompt")
    with pytest.raises(BadInputError, match="max_length"):
        fit_reward(known(20), config=replace(FROZEN, max_length=64), table=table, by="prompt")
    assert len(FeatureTable(reader, replace(FROZEN, max_length=64), tmp_path)) == 0
    assert len(FeatureTable(encoder(seed=1), FROZEN, tmp_path)) == 0


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tune": "some"}, "tune"),
        ({"text": "both"}, "text"),
        ({"pooling": "max"}, "pooling"),
        ({"features": ("log_chars", "vibes")}, "vibes"),
        ({"tune": "lora"}, "LoRA"),
        ({"layers": ()}, "layers"),
        ({"epochs": 0}, "epochs"),
        ({"penalties": (0.0,)}, "penalties"),
        ({"labels": "loudest"}, "labels"),
        ({"validation": 1.0}, "validation"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        RewardConfig(**settings)


def test_config_round_trip_and_unknown_setting() -> None:
    config = RewardConfig(layers=(0, -1), penalties=(0.1,), features=())
    assert RewardConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(BadInputError, match="colour"):
        RewardConfig.from_json({"colour": "red"})


def test_too_few_pairs_and_only_ties(encoder: MakeBackbone, known: Known) -> None:
    with pytest.raises(BadInputError, match="too few"):
        fit_reward(known(3), config=FROZEN, backbone=encoder())
    with pytest.raises(BadInputError, match="tie"):
        fit_reward([replace(p, p_chosen=0.5) for p in known(8)], config=FROZEN, backbone=encoder())
