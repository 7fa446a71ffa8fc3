"""The claims on curricula, a factorial of DPO and PPO, and a recipe of stages: exact parts, small runs."""

from __future__ import annotations

import importlib
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from corrigible.align.corruptors import VocabularyLimit
from corrigible.align.curriculum import Pacing
from corrigible.claims import find_claim, run_seed, s019_openbezoar, s111_unpacking, s177_curricula
from corrigible.claims.fixtures import tiny_lm
from corrigible.claims.fixtures.learning import Row
from corrigible.claims.fixtures.sentences import UNKNOWN
from corrigible.claims.fixtures.tiny_lm import reward
from corrigible.claims.fixtures.transformer import Shape, SmallTransformer

SMALL: dict[str, dict[str, Any]] = {
    "S177": {"STEPS": 6, "SENTENCES": 60, "HELD_OUT": 10, "PAIRS": 8},
    "S111": {
        "SEEN": 6,
        "BROAD": 6,
        "HELD_OUT": 4,
        "PAIRS": (12, 24),
        "DPO_STEPS": 2,
        "ROUNDS": 2,
        "ROLLED_OUT": 8,
        "MINIBATCH": 4,
        "RM_BATCH": 4,
        "RM_STEPS": (2, 2),
    },
    "S019": {
        "GENERATED": 24,
        "HELD_OUT": 4,
        "PAIRS": 24,
        "SFT_STEPS": 2,
        "DOMAIN_STEPS": 2,
        "DPO_STEPS": 2,
        "BATCH": 8,
        "DPO_BATCH": 4,
    },
}


@pytest.mark.parametrize("id", SMALL)
def test_a_claim_declares_seeds_controls_and_a_budget(id: str) -> None:
    claim = find_claim(id)
    assert len(claim.seeds) >= 5 and max(claim.seeds) < 1000
    assert claim.controls and claim.baselines and claim.figure and claim.setting
    assert 0 < claim.budget <= 480 and claim.threads == 1


@pytest.mark.parametrize("id", SMALL)
def test_an_experiment_runs_through_and_is_a_function_of_its_seed(
    id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = find_claim(id)
    module = importlib.import_module(claim.module)
    for name, size in SMALL[id].items():
        monkeypatch.setattr(module, name, size)
    if id != "S177":
        monkeypatch.setattr(module, "first_model", lambda *args: tiny_lm.first_model(*args, reviews=64))
    first, second = run_seed(claim, 1000), run_seed(claim, 1000)
    assert first.failure == "" and first.outcome is not None
    for effect in (claim.effect, *claim.also, *claim.controls):
        assert math.isfinite(effect.number(first.outcome.values))
    assert first.outcome == second.outcome


def test_the_design_is_balanced_and_its_main_effects_are_exact() -> None:
    cells = s111_unpacking.PPO_CELLS
    levels = np.array([[c.accuracy, c.source, c.pairs, c.broad] for c in cells]) * 2 - 1
    # Orthogonal, and every main effect is orthogonal to every product of two factors.
    assert (levels.T @ levels == 8 * np.eye(4)).all()
    for (i, j), k in product([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], range(4)):
        assert (levels[:, i] * levels[:, j] * levels[:, k]).sum() == 0
    weights = {"accuracy": 0.8, "source": 0.1, "pairs": 0.3, "broad": 0.05}
    values = {
        s111_unpacking._name(algorithm, cell): 0.5 * (algorithm == "ppo")
        + sum(w * getattr(cell, f) for f, w in weights.items())
        for algorithm, of in (("dpo", s111_unpacking.DPO_CELLS), ("ppo", cells))
        for cell in of
    }
    found = s111_unpacking.contributions(values)
    assert found["data"] == pytest.approx(0.8)
    assert found["own answers"] == pytest.approx(0.1)
    assert found["reward model"] == pytest.approx(0.3)
    assert found["prompts"] == pytest.approx(0.05)
    # At the larger set alone, as DPO has it; DPO's pairs are 1 in every cell and prompts half broad there.
    assert found["algorithm"] == pytest.approx(0.5 + 0.5 * 0.05)
    assert s111_unpacking._agreement(values) == pytest.approx(1.0)
    assert s111_unpacking._data_over_the_rest(values) == pytest.approx(0.8 - 0.525)


def test_annotators_are_right_as_often_as_they_say() -> None:
    asked = tiny_lm.prompts(0, 700)[0]
    drawn = s111_unpacking.written(asked, 2, 1)
    pairs = s111_unpacking._labelled(asked, drawn, 0.65, 2)
    worth = [[reward(s111_unpacking.LANGUAGE.decode(row.response)) for row in pair.rows] for pair in pairs]
    assert all(a != b for a, b in worth)
    assert abs(sum(a > b for a, b in worth) / len(worth) - 0.65) < 0.06


def test_a_reward_model_reads_each_row_alone() -> None:
    model = s111_unpacking._RewardModel(SmallTransformer(Shape(vocabulary=20, width=16, heads=2), seed=0))
    with torch.no_grad():
        model.head.normal_(generator=torch.Generator().manual_seed(0))
    rows = [Row(prompt=(3, 4), response=(5, 1)), Row(prompt=(3, 4, 6), response=(7, 8, 9, 1))]
    together = model.rewards(rows)
    alone = torch.cat([model.rewards([row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
    # All that was said is read.
    other = model.rewards([Row(prompt=(3, 4, 6), response=(7, 8, 10, 1))])
    assert not torch.allclose(other, together[1:])


def test_class_probabilities_are_sums_of_their_words() -> None:
    classes = s177_curricula._classes()
    logits = torch.randn(5, len(classes), generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([4, 9, 30, 60, 1])
    found = s177_curricula._class_logprobs(logits, targets, classes).exp()
    every = logits.softmax(dim=1)
    wanted = torch.stack([every[i, classes == classes[t]].sum() for i, t in enumerate(targets.tolist())])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert torch.bincount(classes).tolist()[0] == 4  # control tokens


def test_rare_words_become_unknown_where_they_are_read_and_where_they_are_learnt() -> None:
    language = s177_curricula.LANGUAGE
    row = s177_curricula._row("the fungi run .")
    limit = VocabularyLimit(Pacing("linear"), unknown=language.id(UNKNOWN), size=len(language))
    rng = np.random.default_rng(0)
    early = s177_curricula._limited(row, limit, 0.0, rng)
    assert language.id("fungi") not in early.response and language.id(UNKNOWN) in early.response
    assert len(early) == len(row) and early.prompt == row.prompt and early.response[-1] == row.response[-1]
    assert s177_curricula._limited(row, limit, 0.9, rng) == row


def test_stages_without_the_filter_read_what_the_generator_wrote() -> None:
    data = s019_openbezoar._data(tiny_lm.prompts(0, 20)[0], 3)
    for scheme, kept in data.kept.items():
        wrong = [sum(not one.is_right for one in some) / len(some) for some in (data.generated[scheme], kept)]
        assert 0.35 < wrong[0] < 0.45 and wrong[1] < 0.18
    for pair in data.pairs:
        better, worse = (reward(s019_openbezoar.LANGUAGE.decode(row.response)) for row in pair.rows)
        assert better > worse
