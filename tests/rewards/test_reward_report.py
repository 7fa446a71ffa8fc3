"""Reports: paired differences, ties, notes, learning curves and cross-validation on known truths."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from corrigible.errors import BadInputError
from corrigible.intervals import wilson_interval
from corrigible.rewards import (
    FeatureTable,
    RewardConfig,
    cross_validated,
    fit_reward,
    learning_curve,
    reward_report,
    split,
)
from corrigible.rewards.backbones import Backbone
from corrigible.rewards.report import accuracy, report_margins
from corrigible.store.pairs import Pair

FROZEN = RewardConfig(text="response", features=(), members=0, penalties=(0.01, 0.1))
Known = Callable[..., list[Pair]]
MakeBackbone = Callable[..., Backbone]


class Fixed:
    def __init__(self, margins: Sequence[float]) -> None:
        self.held = np.array(margins, dtype=float)

    def margins(self, pairs: Sequence[Pair]) -> np.ndarray:
        return self.held


def test_accuracy_counts_ties_apart_and_follows_the_majority(known: Known) -> None:
    pairs = known(6)
    pairs[1] = replace(pairs[1], p_chosen=0.5)
    pairs[2] = replace(pairs[2], p_chosen=0.2)
    found, ties = accuracy(np.array([1.0, 1.0, -1.0, -1.0, 0.0, 2.0]), pairs, by="prompt")
    assert ties == 1 and found.n == 5
    assert found.value == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5)


def test_differences_are_paired(known: Known) -> None:
    """Two models that err on the same pairs but one: the difference is far surer than either accuracy."""
    pairs = known(400, prompts=100)
    rng = np.random.default_rng(0)
    ours = np.where(rng.random(400) < 0.7, 1.0, -1.0)
    theirs = ours.copy()
    theirs[np.flatnonzero(ours > 0)[:20]] = -1.0
    report = report_margins(ours, pairs, {"other": theirs}, by="prompt", n_train=0)
    difference = report.baselines["other"].difference
    assert difference.value == pytest.approx(0.05)
    assert difference.low > 0
    assert (difference.high - difference.low) < 0.6 * (report.accuracy.high - report.accuracy.low)


def test_a_report_is_json_and_says_when_units_are_few(known: Known) -> None:
    pairs = [replace(p, p_chosen=0.6 if i % 2 else 1.0) for i, p in enumerate(known(40, prompts=4))]
    report = reward_report(Fixed(np.ones(40)), pairs, by="prompt")
    told = json.loads(json.dumps(report.to_json()))
    assert told["accuracy"]["value"] == 1.0 and told["baselines"] == {}
    assert told["accuracy_clear_majority"]["n"] == 20
    assert any("only 4" in note for note in told["notes"])


def test_five_of_five_right_is_not_certainty(known: Known) -> None:
    """Nor is a baseline that is right on the same five, or wrong on all of them."""
    others = {"same": np.ones(5), "wrong": -np.ones(5)}
    for by in ("prompt", "item"):  # five prompts; ten items in five pairs
        report = report_margins(np.ones(5), known(5, prompts=5), others, by=by, n_train=0)
        assert report.accuracy.interval == pytest.approx(wilson_interval(5, 5))
        assert report.baselines["wrong"].accuracy.interval == pytest.approx(wilson_interval(0, 5))
        same, ahead = (report.baselines[name].difference for name in others)
        assert same.value == 0 and -0.5 < same.low < 0 < same.high < 0.5
        assert ahead.value == 1 and 0 < ahead.low < 0.5 and ahead.high == 1


def test_baselines_stand_beside_the_model(encoder: MakeBackbone, known: Known) -> None:
    parts = split(known(300), by="prompt", held_out=0.3)
    model = fit_reward(parts.train, config=FROZEN, backbone=encoder(), by="prompt")
    report = reward_report(model, parts.held_out, train_pairs=parts.train)
    assert set(report.baselines) == {"length", "tfidf"}
    assert report.accuracy.low > report.baselines["length"].accuracy.high
    assert report.baselines["length"].difference.low > 0
    assert report.calibration.log_loss < 0.6 and report.calibration.ece < 0.25


def test_learning_curve_rises_to_the_full_model(encoder: MakeBackbone, known: Known) -> None:
    parts = split(known(500, prompts=100), by="prompt", held_out=0.4)
    table = FeatureTable(encoder(), FROZEN)
    points = learning_curve(parts, config=FROZEN, table=table)
    assert [point.share for point in points] == [0.1, 0.25, 0.5, 1.0]
    sizes = [point.pairs for point in points]
    assert sizes == sorted(sizes) and sizes[-1] == len(parts.train)
    assert points[-1].accuracy.value > points[0].accuracy.value - 0.02
    assert points[-1].accuracy.value > 0.85
    model = fit_reward(parts.train, config=FROZEN, table=table, by="prompt")
    full, _ = accuracy(model.margins(parts.held_out), parts.held_out, by="prompt")
    assert points[-1].accuracy.value == pytest.approx(full.value)


def test_cross_validation_tests_every_pair_and_finds_nothing_in_noise(
    encoder: MakeBackbone, known: Known
) -> None:
    table = FeatureTable(encoder(), FROZEN)
    real = cross_validated(known(300), 3, config=FROZEN, by="prompt", table=table)
    assert real.accuracy.n == 300 and real.accuracy.low > 0.8
    noise = cross_validated(known(600, shuffled=True), 3, config=FROZEN, by="prompt", table=table)
    assert noise.accuracy.low < 0.5 < noise.accuracy.high
    assert noise.calibration.log_loss < 0.73  # a temperature from validation keeps it near ln 2 = 0.693


def test_only_ties_have_no_accuracy(known: Known) -> None:
    with pytest.raises(BadInputError, match="tie"):
        reward_report(Fixed(np.ones(4)), [replace(p, p_chosen=0.5) for p in known(4)], by="prompt")
