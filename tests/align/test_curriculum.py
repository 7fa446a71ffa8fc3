"""Pacing against golden values, difficulty with ties, and an order that is a function of seed and step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corrigible.align import PairSource, TrainConfig, Trainer, UnpairedSource, get_algorithm
from corrigible.align.curriculum import (
    CurriculumSource,
    Pacing,
    length_difficulty,
    percentiles,
    report,
    sampling_weights,
    uncertainty_difficulty,
)
from corrigible.errors import BadInputError, NumericsError
from corrigible.models import LanguagePolicy
from corrigible.store import labelled_from_pairs

SHAPES = ("linear", "quad", "root", "step", "exp", "log")


def at(u: float) -> float:
    """The progress at which a pacing of the default window is a share ``u`` of its way."""
    return 0.0625 + u * (0.875 - 0.0625)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        # at u = 0.01, 0.25, 0.5, 0.9 of the way, from 0.1 to 1
        ("linear", (0.109, 0.325, 0.55, 0.91)),
        ("quad", (0.10009, 0.15625, 0.325, 0.829)),
        ("root", (0.19, 0.55, 0.7363961, 0.9538150)),
        ("step", (0.1, 0.325, 0.55, 0.775)),
        ("exp", (0.1000043, 0.1004570, 0.1060235, 0.4310657)),
        ("log", (0.5859422, 0.8752495, 0.9376249, 0.9905221)),
    ],
)
def test_golden_values(shape: str, values: tuple[float, ...]) -> None:
    pacing = Pacing(shape)  # type: ignore[arg-type]
    for u, expected in zip((0.01, 0.25, 0.5, 0.9), values, strict=True):
        assert pacing(at(u)) == pytest.approx(expected, abs=2e-6), (shape, u)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pacing_starts_grows_and_lets_everything_in(shape: str) -> None:
    pacing = Pacing(shape, start=0.2, begin=0.1, end=0.8)  # type: ignore[arg-type]
    shares = [pacing(p / 200) for p in range(201)]
    assert shares[:21] == [0.2] * 21 and shares[160:] == [1.0] * 41
    assert all(a <= b for a, b in itertools.pairwise(shares)) and max(shares) == 1.0


def test_log_pacing_is_half_way_at_one_per_cent() -> None:
    grown = (Pacing("log")(at(0.01)) - 0.1) / 0.9
    assert grown == pytest.approx(1 + math.log(0.01 + math.exp(-10)) / 10) and 0.53 < grown < 0.55


@pytest.mark.parametrize(
    "wrong", [{"shape": "cubic"}, {"start": 1.2}, {"begin": 0.9, "end": 0.5}, {"end": 1.5}, {"begin": -0.1}]
)
def test_a_pacing_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(BadInputError):
        Pacing(**wrong)


def test_percentiles_never_let_in_more_than_the_share() -> None:
    rng = np.random.default_rng(0)
    for levels in (1, 2, 3, 50):
        difficulty = rng.integers(0, levels, size=40).astype(float)
        together, apart = percentiles(difficulty), percentiles(difficulty, ties="apart")
        for share in (0.0, 0.1, 0.33, 0.5, 0.99, 1.0):
            assert (together <= share).mean() <= share + 1e-12
            assert (apart <= share).sum() == math.floor(share * 40 + 1e-9)
        assert together.max() == apart.max() == 1.0
        # an easier item is never let in later
        for i, j in itertools.combinations(range(40), 2):
            if difficulty[i] < difficulty[j]:
                assert together[i] < together[j] and apart[i] < apart[j]
            if difficulty[i] == difficulty[j]:
                assert together[i] == together[j] and apart[i] != apart[j]


def test_percentiles_by_hand_and_what_they_refuse() -> None:
    assert percentiles([3.0, 1.0, 1.0, 2.0]).tolist() == [1.0, 0.5, 0.5, 0.75]
    assert percentiles([3.0, 1.0, 1.0, 2.0], ties="apart").tolist() == [1.0, 0.25, 0.5, 0.75]
    with pytest.raises(NumericsError, match=r"difficulty_not_finite: items \[1\]"):
        percentiles([1.0, math.nan])
    with pytest.raises(BadInputError, match="one number per item"):
        percentiles([])


def test_sampling_weights() -> None:
    percentile = percentiles([1, 2, 3, 4])
    assert sampling_weights(percentile, 0.5).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert sampling_weights(percentile, 0.5, favour="hard").tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    assert sampling_weights(percentile, 0.5, favour="easy").tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    # Nothing is below the share: the easiest level is let in all the same, and as many as a batch needs.
    assert sampling_weights(percentile, 0.0).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert (sampling_weights(percentile, 0.0, at_least=3) > 0).sum() == 3
    tied = percentiles([1, 1, 1, 4])
    assert (sampling_weights(tied, 0.1, at_least=2) > 0).tolist() == [True, True, True, False]
    with pytest.raises(BadInputError, match="at_least"):
        sampling_weights(percentile, 0.5, at_least=5)


def test_batches_come_from_what_is_let_in_and_depend_on_seed_and_step_alone(source: PairSource) -> None:
    difficulty = length_difficulty(source)
    curriculum = CurriculumSource(source, difficulty).over(20)
    easy = np.quantile(difficulty, 0.5)
    for step in range(20):
        batch = curriculum.batch(step, 4)
        assert len(batch) == 4 == len({id(example) for example in batch})
        assert [e.rows for e in batch] == [e.rows for e in curriculum.batch(step, 4)]
        if step < 2:  # 10 % of 24, but at least a batch
            assert all(max(map(len, e.rows)) <= easy for e in batch)
    assert [e.rows for e in curriculum.batch(3, 4)] != [e.rows for e in curriculum.batch(19, 4)]
    assert {id(e) for step in range(18, 20) for e in curriculum.batch(step, 24)} == {
        id(e) for e in source.examples
    }


def test_a_draw_is_as_likely_as_its_weight(source: PairSource) -> None:
    difficulty = np.arange(len(source.examples), dtype=float)
    curriculum = CurriculumSource(source, difficulty, pacing=lambda progress: 0.5, favour="hard")
    curriculum = curriculum.over(4000)
    place = {id(example): i for i, example in enumerate(source.examples)}
    counts = np.zeros(len(source.examples))
    for step in range(4000):
        (example,) = curriculum.batch(step, 1)
        counts[place[id(example)]] += 1
    expected = 4000 * curriculum.weights(0, 1)
    seen = expected > 0
    assert counts[~seen].sum() == 0
    chi2 = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001


def test_what_decides_the_batches_is_in_the_digest(source: PairSource) -> None:
    difficulty = length_difficulty(source)
    first = CurriculumSource(source, difficulty)
    assert first.digest() == CurriculumSource(source, difficulty.copy()).digest() != source.digest()
    assert first.digest() != CurriculumSource(source, difficulty, pacing=Pacing("exp")).digest()
    assert first.digest() != CurriculumSource(source, -difficulty).digest()
    assert first.kind == "pairs" and first.derived_from() == source.derived_from()
    with pytest.raises(BadInputError, match="difficulties"):
        CurriculumSource(source, difficulty[1:])


def test_a_source_that_makes_its_batches_still_does(policy: LanguagePolicy, make_pairs: Callable) -> None:
    labelled = labelled_from_pairs(make_pairs(8))
    source = UnpairedSource(labelled, policy.renderer, max_length=256)
    batch = CurriculumSource(source, length_difficulty(source)).over(10).batch(9, 6)
    assert len(batch) == 6 and all(example.mismatched is not None for example in batch)


def test_a_tie_is_the_hardest_comparison(policy: LanguagePolicy, make_pair: Callable) -> None:
    pairs = [make_pair(f"q{p}", "yes", "no", p_chosen=p) for p in (0.5, 1.0, 0.25, 0.0)]
    difficulty = uncertainty_difficulty(PairSource(pairs, policy.renderer))
    assert difficulty.tolist() == [1.0, 0.0, 0.5, 0.0]


def test_the_report_shows_what_is_let_in(source: PairSource) -> None:
    rows = report(CurriculumSource(source, length_difficulty(source)).over(80), 4)
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40, 50, 60, 70]
    assert rows[0]["admitted"] < rows[-1]["admitted"] == 1.0
    assert all(a["admitted"] <= b["admitted"] for a, b in itertools.pairwise(rows))
    assert rows[-1]["effective"] == pytest.approx(24)


def test_the_trainer_runs_a_curriculum_over_its_own_number_of_steps(
    policy: LanguagePolicy, source: PairSource, tmp_path: Path
) -> None:
    curriculum = CurriculumSource(source, length_difficulty(source))
    config = TrainConfig(steps=3, batch_size=4, lr=1e-3)
    trainer = Trainer(policy, get_algorithm("dpo"), curriculum, config, out=tmp_path)
    assert trainer.source.total_steps == 3  # type: ignore[attr-defined]
    assert trainer.train().steps == 3
