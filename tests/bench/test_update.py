"""The comparison of two sides: ratios batch by batch, the reference where TRL pays for it, equal losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench.prepared import Prepared, Shape, prepare
from bench.process import ALGORITHMS, Measurement, Training
from bench.rival_search import CANDIDATES
from bench.rival_settings import SETTINGS, Setting, change
from bench.update import entry, interval

from bench import ours, rival
from corrigible.errors import BadInputError

MINE = Measurement(
    side="corrigible",
    algorithm="dpo",
    setting="default",
    warmup=1,
    seconds=[9.0, 1.0, 2.0, 3.0],
    tokens=[10, 100, 200, 300],
    losses=[0.7, 0.6, 0.5, 0.4],
    setup_seconds=1.0,
    reference_seconds=0.0,
    peak_rss_mb=500.0,
    peak_rss_steps_mb=400.0,
    options={},
)
THEIRS = replace(
    MINE,
    side="trl",
    seconds=[90.0, 5.0, 12.0, 21.0],
    losses=[0.7, 0.6, 0.5, 0.402],
    peak_rss_mb=2000.0,
    options={"precompute_reference": False},
)


def test_the_ratio_is_of_the_same_batch_and_leaves_the_warm_up_out() -> None:
    found = entry([THEIRS], [MINE])
    assert found["ratio"] == 6.0  # of 5/1, 12/2 and 21/3
    assert 5.0 <= found["low"] <= 6.0 <= found["high"] <= 7.0
    assert found["memory_ratio"] == 0.25
    assert found["loss_difference_max"] == pytest.approx(0.002)
    assert found["loss_difference_mean"] == pytest.approx(0.0005)
    assert found["measures"]["corrigible_tokens_per_second"]["median"] == 100.0
    assert found["measures"]["trl_tokens_per_second"]["median"] == pytest.approx(600 / 38)


def test_our_reference_counts_where_trl_computes_it_in_every_step() -> None:
    mine = replace(MINE, reference_seconds=4.0)  # four steps: 1 s each
    assert entry([THEIRS], [mine])["ratio"] == 12 / 3
    known = replace(THEIRS, options={"precompute_reference": True})
    assert entry([known], [mine])["ratio"] == 6.0
    without = [replace(each, algorithm="reward") for each in (THEIRS, mine)]
    assert entry(without[:1], without[1:])["ratio"] == 6.0


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 experiments of 3 runs x 5 steps around a median of 6, about 95 % must hold it; with the
    spread of runs left out far fewer would."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        runs = random.normal(0.0, 0.05, (3, 1))
        low, high = interval(6.0 * np.exp(runs + random.normal(0.0, 0.1, (3, 5))))
        held += low <= 6.0 <= high
    assert 0.85 <= held / 200 <= 1.0


def test_one_value_is_its_own_interval() -> None:
    assert interval(np.array([[4.0]])) == (4.0, 4.0)


def test_settings_are_changed_by_name() -> None:
    changed = change(Setting(), ["micro_batch=2", "compile=true", "weights=bfloat16"])
    assert changed == Setting(micro_batch=2, compile=True, weights="bfloat16")
    for wrong in ("batch=2", "compile=perhaps", "micro_batch=two"):
        with pytest.raises(BadInputError):
            change(Setting(), [wrong])


def test_the_default_is_trl_s_and_the_fastest_was_a_candidate() -> None:
    assert all(SETTINGS["default"][name] == Setting() for name in ALGORITHMS)
    for name in ALGORITHMS:
        assert () in CANDIDATES[name]
        assert SETTINGS["fastest"][name] in [change(Setting(), each) for each in CANDIDATES[name]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(
        tmp_path_factory.mktemp("bench"),
        model="tiny-random",
        batches=3,
        shape=Shape(prompt_share=0.5, group_size=2, rows=8, row_tokens=48),
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_sides_train_the_same(algorithm: str, tiny: Prepared) -> None:
    """In float32 the losses of three steps agree, and the steps move them by more than the tolerance."""
    pytest.importorskip("trl")
    training = Training(algorithm, steps=2, precision="float32", lr=1e-4)
    theirs = rival.measure(tiny, training, SETTINGS["default"][algorithm])
    mine = ours.measure(tiny, training)
    assert mine.tokens == theirs.tokens == [8 * 48] * 3
    assert len(mine.seconds) == len(theirs.seconds) == 3
    np.testing.assert_allclose(mine.losses, theirs.losses, atol=2e-5)
    untrained = ours.measure(tiny, replace(training, lr=1e-7))
    assert max(abs(a - b) for a, b in zip(mine.losses, untrained.losses, strict=True)) > 2e-4


def test_fewer_batches_than_steps_is_told(tiny: Prepared, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="3 batches"):
        ours.measure(tiny, Training("dpo", steps=9))
